//! Debuggers of a machine: the address at which one can come, and the time for which one has the machine.
//!
//! A [`Door`] is open at an address until it is closed. Who comes is a [`Session`], one at a time: a thread reads what the
//! debugger sends, no more than is used, and the machine's thread does what it asks, until it is gone. Nobody else may
//! do anything with the machine meanwhile but end the VMM.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TryRecvError};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use engine::{Hypervisor, Vm, VmBuilder};
use inspect::gdb::{self, Debuggee, End, Event, Last};
use mte::TagPage;
use rustix::net::sockopt;
use transport::unix::{self, SocketFile};
use transport::{Address, Host};
use vmm::machine::Ending;
use vmm::machine::debug::{Debugged, Woken};

use super::{Landlord, Life, Order, Shared};
use crate::control::{DebugRequest, Refusal, VmState};

/// How long a debugger may leave what it is told unread. The guest stands meanwhile.
const PATIENCE: Duration = Duration::from_secs(10);
/// When a debugger at another place that says nothing is asked whether it is there, how often, and how many times.
const SILENCE: Duration = Duration::from_secs(15);
const ASK_EVERY: Duration = Duration::from_secs(5);
const ASK_TIMES: u32 = 3;
/// Pieces of what the debugger sends that wait to be used, and bytes of each.
const PIECES: usize = 2;
const PIECE: usize = 4096;

/// An address at which a debugger can come. Dropping it closes it, and ends the session of whoever came by it.
pub struct Door {
    listener: Arc<Listener>,
    address: Address,
    cut: Arc<AtomicBool>,
    life: Life,
    _file: Option<SocketFile>,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A debugger's connection.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A debugger that came.
pub struct Session {
    stream: Stream,
    input: Receiver<Vec<u8>>,
    /// There is input, or there will be none, and the machine's thread was told so.
    told: Arc<AtomicBool>,
    cut: Arc<AtomicBool>,
    peer: String,
}

/// Somebody who has the machine, or is about to: whatever comes of it, nobody has it then.
struct Hold<'a>(&'a Shared);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.0.known().debugger = None;
    }
}

impl Listener {
    fn bind(
        request: &DebugRequest,
        address: &Address,
    ) -> Result<(Self, Address, Option<SocketFile>), Refusal> {
        let failed = |e: &dyn fmt::Display| Refusal::Failed(format!("{address}: {e}"));
        match address {
            Address::Tcp { host, port } => {
                let name = match host {
                    Host::Ip(ip) => ip.to_string(),
                    Host::Name(name) => name.clone(),
                };
                let all: Vec<_> = (name.as_str(), *port)
                    .to_socket_addrs()
                    .map_err(|e| failed(&e))?
                    .collect();
                let is_local = all.iter().all(|at| Address::from(*at).is_local());
                if !is_local && !request.unprotected {
                    return Err(failed(
                        &"whoever reaches it could read and change all of the guest; take 127.0.0.1, a Unix socket or an \
                          SSH tunnel, or --unprotected if the network is trusted",
                    ));
                }
                let listener = TcpListener::bind(&all[..]).map_err(|e| failed(&e))?;
                let address = listener.local_addr().map_err(|e| failed(&e))?.into();
                Ok((Self::Tcp(listener), address, None))
            }
            Address::Unix(path) => {
                let (listener, file) = unix::listen(path).map_err(|e| failed(&e))?;
                Ok((Self::Unix(listener), address.clone(), Some(file)))
            }
        }
    }

    /// Waits for the next debugger.
    fn accept(&self) -> io::Result<(Stream, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, from) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(PATIENCE))?;
                sockopt::set_socket_keepalive(&stream, true)?;
                sockopt::set_tcp_keepidle(&stream, SILENCE)?;
                sockopt::set_tcp_keepintvl(&stream, ASK_EVERY)?;
                sockopt::set_tcp_keepcnt(&stream, ASK_TIMES)?;
                Ok((Stream::Tcp(stream), from.to_string()))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_write_timeout(Some(PATIENCE))?;
                if let Some(user) = unix::foreign_user(&stream)? {
                    return Err(io::Error::new(
                        io::ErrorKind::PermissionDenied,
                        format!("user {user} is not the VM's owner"),
                    ));
                }
                let process = sockopt::socket_peercred(&stream)?.pid;
                Ok((
                    Stream::Unix(stream),
                    format!("process {}", process.as_raw_pid()),
                ))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Stream {
    fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
        }
    }

    fn close(&self) {
        // The other side may have been first.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for &Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&*stream).read(bytes),
            Stream::Unix(stream) => (&*stream).read(bytes),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&*stream).write(bytes),
            Stream::Unix(stream) => (&*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Door {
    /// Opens one, and a thread that waits at it.
    fn open(request: &DebugRequest, address: &Address, life: Life) -> Result<Self, Refusal> {
        let (listener, address, file) = Listener::bind(request, address)?;
        let door = Self {
            listener: Arc::new(listener),
            address,
            cut: Arc::default(),
            life,
            _file: file,
        };
        let (listener, cut, life) = (door.listener.clone(), door.cut.clone(), door.life.clone());
        thread::Builder::new()
            .name("tv-gdb".into())
            .spawn(move || attend(&listener, &cut, &life))
            .map_err(|e| Refusal::Failed(format!("starting a thread for debuggers: {e}")))?;
        Ok(door)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.cut.store(true, Ordering::SeqCst);
        // The thread that waits at it has it as well, and comes back by this.
        if let Err(e) = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both) {
            tracing::warn!("closing {}: {e}", self.address);
        }
        self.life.call();
    }
}

/// Between attempts to accept when the host lacks what it takes.
const LACK: Duration = Duration::from_millis(50);

/// Lets debuggers in, one at a time.
fn attend(listener: &Listener, cut: &Arc<AtomicBool>, life: &Life) {
    while !cut.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((stream, peer)) => {
                if let Err(why) = admit(stream, &peer, cut, life) {
                    tracing::warn!("a debugger ({peer}) was turned away: {why}");
                }
            }
            Err(_) if cut.load(Ordering::SeqCst) => return,
            Err(e) => {
                tracing::warn!("a debugger could not come: {e}");
                thread::sleep(LACK);
            }
        }
    }
}

fn admit(stream: Stream, peer: &str, cut: &Arc<AtomicBool>, life: &Life) -> Result<(), Refusal> {
    let failed = |e: io::Error| Refusal::Failed(e.to_string());
    let theirs = stream.try_clone().map_err(failed)?;
    let (sender, input) = mpsc::sync_channel(PIECES);
    let told = Arc::<AtomicBool>::default();
    let session = Session {
        stream,
        input,
        told: told.clone(),
        cut: cut.clone(),
        peer: peer.into(),
    };
    {
        let mut known = life.shared.known();
        if let Some(work) = known.work().filter(|work| work.what != "restore") {
            return Err(Refusal::Failed(format!("a {} is on its way", work.what)));
        }
        if let Some(other) = &known.debugger {
            return Err(Refusal::Failed(format!("another has the VM: {other}")));
        }
        known.debugger = Some(peer.into());
        // Under the lock, so that nothing that was let pass before comes after it.
        if life.orders.send(Order::Debug(Box::new(session))).is_err() {
            known.debugger = None;
            return Err(Refusal::Failed("the VMM is ending".into()));
        }
    }
    life.call();
    let life = life.clone();
    thread::Builder::new()
        .name("tv-gdb-read".into())
        .spawn(move || listen(&theirs, sender, &told, &life))
        .map(drop)
        .map_err(failed)
}

/// Reads what a debugger sends, as far as it is used, until it is gone or sent away.
fn listen(mut stream: &Stream, sender: SyncSender<Vec<u8>>, told: &AtomicBool, life: &Life) {
    let mut piece = [0; PIECE];
    while let Ok(length @ 1..) = stream.read(&mut piece) {
        if sender.send(piece[..length].to_vec()).is_err() {
            return;
        }
        if !told.swap(true, Ordering::SeqCst) {
            life.call();
        }
    }
    // Without a sender it is known that nothing comes.
    drop(sender);
    life.call();
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stream.close();
    }
}

impl Life {
    /// Closes the door for debuggers, if there is one.
    pub(super) fn close_door(&self) {
        let mut door = self
            .shared
            .door
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        drop(door.take());
    }

    /// Opens a door for debuggers, in the place of the one that is open, or closes it. Returns where it is.
    pub(super) fn open_door(&self, request: &DebugRequest) -> Result<Option<Address>, Refusal> {
        let mut door = self
            .shared
            .door
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Before a new one is opened: it may be at the same address.
        drop(door.take());
        let Some(address) = &request.listen else {
            return Ok(None);
        };
        self.shared.known().info.as_ref().ok_or(Refusal::NoVm)?;
        let opened = door.insert(Door::open(request, address, self.clone())?);
        Ok(Some(opened.address.clone()))
    }
}

/// A machine for the debugger of a session.
struct Patient<'a, H: Hypervisor>
where
    <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
{
    debugged: Debugged<'a, H>,
    session: &'a Session,
    shared: &'a Shared,
    /// A guest that resets its machine has another one then.
    starts_over: bool,
}

impl<H: Hypervisor> Patient<'_, H>
where
    <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
{
    fn set_state(&self, state: VmState) {
        if let Some(info) = &mut self.shared.known().info {
            info.state = state;
        }
    }

    /// What the debugger is told of the machine's end; none if a vCPU cannot go on.
    fn last(&self, ending: Option<Ending>) -> Last {
        let words = match ending {
            Some(Ending::Reset) if self.starts_over => {
                "the guest reset its machine, which starts over without a debugger: come again at the same address"
            }
            Some(Ending::Reset) => "the guest reset its machine, and that is its end (--no-reboot)",
            Some(Ending::Off) => "the guest switched its machine off",
            Some(Ending::Asked | Ending::Interrupted) => "the machine was ended",
            None => "a vCPU cannot go on: the VMM says why",
        };
        tracing::warn!("to the debugger ({}): {words}", self.session.peer);
        Last {
            killed: ending.is_none(),
            words: format!("tagvisor: {words}"),
        }
    }

    /// What the debugger sent, or that it is gone or has to go.
    fn heard(&self) -> Option<Event> {
        if self.session.cut.load(Ordering::SeqCst) || self.shared.has_ended() {
            return Some(Event::Gone);
        }
        match self.session.input.try_recv() {
            Ok(bytes) => Some(Event::Input(bytes)),
            Err(TryRecvError::Disconnected) => Some(Event::Gone),
            Err(TryRecvError::Empty) => None,
        }
    }
}

impl<H: Hypervisor> Debuggee for Patient<'_, H>
where
    <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
{
    type Vcpu = <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu;

    fn vcpu_count(&self) -> usize {
        self.debugged.vcpu_count()
    }

    fn vcpu(&self, number: usize) -> Option<&Self::Vcpu> {
        self.debugged.vcpu(number)
    }

    fn ram(&self) -> Range<u64> {
        self.debugged.ram()
    }

    fn has_tags(&self) -> bool {
        self.debugged.has_tags()
    }

    fn read(&self, address: u64, data: &mut [u8]) -> io::Result<()> {
        self.debugged.read(address, data).map_err(io::Error::other)
    }

    fn write(&mut self, address: u64, data: &[u8]) -> io::Result<()> {
        self.debugged.write(address, data).map_err(io::Error::other)
    }

    fn read_tags(&self, page: u64, tags: &mut TagPage) -> io::Result<()> {
        self.debugged
            .read_tags(page, tags)
            .map_err(io::Error::other)
    }

    fn write_tags(&mut self, page: u64, tags: &TagPage) -> io::Result<()> {
        self.debugged
            .write_tags(page, tags)
            .map_err(io::Error::other)
    }

    fn resume(&mut self, vcpus: &[usize]) -> io::Result<()> {
        self.debugged.resume(vcpus).map_err(io::Error::other)?;
        self.set_state(VmState::Running);
        Ok(())
    }

    fn stop(&mut self) {
        self.debugged.stop();
        self.set_state(VmState::Paused);
    }

    fn wait(&mut self) -> Event {
        loop {
            if let Some(event) = self.heard() {
                return event;
            }
            // What comes from here on is told anew.
            self.session.told.store(false, Ordering::SeqCst);
            if let Some(event) = self.heard() {
                return event;
            }
            match self.debugged.wait() {
                Woken::Interrupted => {}
                Woken::Stopped { vcpu, exit } => {
                    self.set_state(VmState::Paused);
                    return Event::Stopped { vcpu, exit };
                }
                Woken::Ended(ending) => return Event::Ended(self.last(ending)),
            }
        }
    }
}

impl<H: Hypervisor> Landlord<'_, H>
where
    <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
{
    /// Gives the machine to a debugger until it is gone.
    pub(super) fn debug(&mut self, session: &Session) {
        let shared = self.shared.clone();
        let _hold = Hold(&shared);
        let peer = &session.peer;
        match self.try_debug(session) {
            Ok(End::Detached) => tracing::info!("the debugger ({peer}) detached"),
            Ok(End::Gone) => tracing::info!("the debugger ({peer}) is gone"),
            Ok(End::Ended) => tracing::info!("the machine ended under the debugger ({peer})"),
            Err(e) => tracing::warn!("the debugger ({peer}) was sent away: {e}"),
        }
    }

    fn try_debug(&mut self, session: &Session) -> Result<End, Refusal> {
        self.between.check()?;
        self.settle()?;
        let before = self.state().ok_or(Refusal::NoVm)?;
        let shared = self.shared.clone();
        let starts_over = self.starts_over();
        let machine = self.machine_in(before, "debugged")?;
        let debugged = machine
            .debug()
            .map_err(|e| Refusal::Failed(e.to_string()))?;
        let mut patient = Patient {
            debugged,
            session,
            shared: &shared,
            starts_over,
        };
        if let Some(info) = &mut shared.known().info {
            info.state = VmState::Paused;
            info.reason = Some(format!("a debugger has it ({})", session.peer));
        }
        let served = gdb::serve(&mut patient, &session.stream);
        drop(patient);
        // A machine that has ended is to say so by its run.
        let after = match machine.has_ended() {
            true => VmState::Running,
            false => before,
        };
        if let Some(info) = &mut shared.known().info {
            info.state = after;
            info.reason = None;
        }
        served.map_err(|e| Refusal::Failed(e.to_string()))
    }
}
