//! One port: a client's socket on one side, two queues on the other, and no buffer between them.
//!
//! [`Channel`] remembers of each side whether it may have, or take, something. Data moves while
//! both sides can ([`Channel::can_move`]); the side that cannot is then waited for, by a kick of its
//! queue or by watching its socket ([`Channel::watch`]).

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use virtio_queue::{DescriptorChain, Queue};
use vmm_sys_util::epoll::EventSet;

use super::control::PortState;
use super::socket::PortSocket;
use crate::memory::GuestRam;
use crate::virtio::Interrupt;
use crate::virtio::chain::Chain;
use crate::virtio::worker::{self, HandlerError, Outcome, Poll, Progress};

/// Bytes moved by one system call.
const PIECE: usize = 16 << 10;
/// Bytes moved one way before other events, the order to stop among them, get their turn.
pub(super) const BYTES_A_TURN: usize = 256 << 10;

/// The directions of a port's data, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// To the guest.
    Receive,
    /// From the guest.
    Transmit,
}

/// What a port watches on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Listener,
    Client,
}

fn token(place: usize, end: End) -> u32 {
    // Places are below MAX_PORTS.
    2 * place as u32 + u32::from(end == End::Client)
}

/// The port's place and what of it is ready.
pub(super) fn token_parts(token: u32) -> (usize, End) {
    let end = if token.is_multiple_of(2) {
        End::Listener
    } else {
        End::Client
    };
    (token as usize / 2, end)
}

/// A port, its client and what both sides wait for.
pub(super) struct Channel {
    pub state: PortState,
    socket: PortSocket,
    listener_watch: Watch,
    /// False once the listener failed, until the device starts again.
    listening: bool,
    client: Option<Client>,
    /// The guest may have given buffers to receive into.
    has_room: bool,
    /// The guest may have given buffers to transmit.
    has_output: bool,
}

struct Client {
    stream: UnixStream,
    watch: Watch,
    /// It may have sent something, or its end.
    readable: bool,
    /// It may take something.
    writable: bool,
    /// It sends nothing more, and everything it sent was read.
    ended: bool,
    /// It is gone. What it sent before is still read.
    hung_up: bool,
}

/// What a descriptor is watched for now, if it is.
struct Watch(Option<EventSet>);

impl Watch {
    fn set(
        &mut self,
        poll: &Poll,
        fd: &impl AsRawFd,
        token: u32,
        wanted: Option<EventSet>,
    ) -> io::Result<()> {
        match (self.0, wanted) {
            (now, wanted) if now == wanted => return Ok(()),
            (_, None) => poll.forget(fd)?,
            (None, Some(events)) => poll.watch(fd, token, events)?,
            (Some(_), Some(events)) => poll.change(fd, token, events)?,
        }
        self.0 = wanted;
        Ok(())
    }
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        Client {
            stream,
            watch: Watch(None),
            readable: true,
            writable: true,
            ended: false,
            hung_up: false,
        }
    }

    fn hang_up(&mut self) {
        self.hung_up = true;
        self.readable = true;
        self.ended |= !holds_data(&self.stream);
    }

    /// Reads what there is, at most `bytes.len()`. `None` when there is nothing for now or for good.
    fn read(&mut self, bytes: &mut [u8]) -> Option<usize> {
        match retry(|| self.stream.read(bytes)) {
            Ok(0) => self.ended = true,
            Ok(count) => return Some(count),
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            Err(_) => {
                self.ended = true;
                self.hung_up = true;
            }
        }
        None
    }

    /// Writes what it takes of `bytes`. `None` when that is nothing for now or for good.
    fn write(&mut self, bytes: &[u8]) -> Option<usize> {
        match retry(|| self.stream.write(bytes)) {
            Ok(count) => return Some(count),
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
            Err(_) => self.hang_up(),
        }
        None
    }
}

impl Channel {
    pub fn new(name: String, socket: PortSocket) -> Self {
        Channel {
            state: PortState {
                name,
                ..PortState::default()
            },
            socket,
            listener_watch: Watch(None),
            listening: true,
            client: None,
            has_room: false,
            has_output: false,
        }
    }

    /// Begins on a new thread, with all to be looked at.
    pub fn start(&mut self) {
        self.listening = true;
        self.listener_watch = Watch(None);
        self.has_room = true;
        self.has_output = true;
        if let Some(client) = &mut self.client {
            client.watch = Watch(None);
            client.readable = true;
            client.writable = true;
        }
    }

    /// Back to what a driver finds first. The client stays.
    pub fn forget_driver(&mut self) {
        self.state.forget_driver();
    }

    /// Whether the guest is to see the port as open on the host.
    pub fn has_client(&self) -> bool {
        self.client.is_some()
    }

    /// The guest kicked the queue of this side.
    pub fn kicked(&mut self, side: Side) {
        match side {
            Side::Receive => self.has_room = true,
            Side::Transmit => self.has_output = true,
        }
    }

    /// The client's socket is ready.
    pub fn client_ready(&mut self, events: EventSet) {
        let Some(client) = &mut self.client else {
            return;
        };
        client.readable |= events.contains(EventSet::IN);
        client.writable |= events.contains(EventSet::OUT);
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            client.hang_up();
        }
    }

    /// Somebody connected. Takes the client, or turns it away when there is one.
    pub fn accept(&mut self) {
        if !self.takes_connections() {
            return;
        }
        match self.socket.accept() {
            Ok(Some(stream)) if self.client.is_none() => self.client = Some(Client::new(stream)),
            // Another client is there: dropping this one closes it.
            Ok(_) => {}
            Err(error) => {
                self.listening = false;
                let name = &self.state.name;
                tracing::warn!("console port \"{name}\" takes no more clients: {error}");
            }
        }
    }

    /// Whether a new connection is answered now: by turning it away while a client is there, and by
    /// taking it once the guest knows that the last client left. In between it waits.
    fn takes_connections(&self) -> bool {
        let answered = match &self.client {
            Some(client) => !client.hung_up,
            None => !self.state.told_open,
        };
        self.listening && answered
    }

    /// Whether data can move this way now.
    pub fn can_move(&self, side: Side) -> bool {
        match (side, &self.client) {
            (Side::Receive, None) => false,
            (Side::Receive, Some(client)) => {
                self.has_room && self.state.guest_open && client.readable && !client.ended
            }
            // What nobody hears is dropped.
            (Side::Transmit, None) => self.has_output,
            (Side::Transmit, Some(client)) => {
                self.has_output && (client.writable || client.hung_up)
            }
        }
    }

    /// Moves data from the client to the guest.
    pub fn receive(
        &mut self,
        queue: &mut Queue,
        memory: &GuestRam,
        interrupt: &dyn Interrupt,
    ) -> Result<Progress, HandlerError> {
        let Some(client) = &mut self.client else {
            return Ok(Progress::Done);
        };
        let mut held = false;
        let progress = worker::serve(queue, memory, interrupt, |chain| {
            let outcome = receive_one(client, memory, chain)?;
            held = outcome == Outcome::Later;
            Ok(outcome)
        })?;
        self.has_room = held || progress == Progress::More;
        Ok(progress)
    }

    /// Moves data from the guest to the client, or nowhere.
    pub fn transmit(
        &mut self,
        queue: &mut Queue,
        memory: &GuestRam,
        interrupt: &dyn Interrupt,
    ) -> Result<Progress, HandlerError> {
        let (client, sent) = (&mut self.client, &mut self.state.sent);
        let mut left = BYTES_A_TURN;
        let mut held = false;
        let progress = worker::serve(queue, memory, interrupt, |chain| {
            let outcome = transmit_one(client.as_mut(), sent, &mut left, memory, chain)?;
            held = outcome == Outcome::Later;
            Ok(outcome)
        })?;
        self.has_output = held || progress == Progress::More;
        Ok(if left == 0 { Progress::More } else { progress })
    }

    /// Lets go of a client that is gone and was read to its end.
    pub fn settle_client(&mut self) {
        if self
            .client
            .as_ref()
            .is_some_and(|client| client.hung_up && client.ended)
        {
            self.client = None;
            // The rest of what it was being sent is nobody's.
        }
    }

    /// Watches what must be waited for, and no more: what is ready but cannot be used would wake
    /// the thread for ever.
    pub fn watch(&mut self, place: usize, poll: &Poll) -> io::Result<()> {
        let listen = self.takes_connections().then_some(EventSet::IN);
        self.listener_watch
            .set(poll, &self.socket, token(place, End::Listener), listen)?;
        let Some(client) = &mut self.client else {
            return Ok(());
        };
        let mut events = EventSet::empty();
        events.set(EventSet::IN, !client.readable);
        events.set(EventSet::OUT, !client.writable);
        // A hang-up comes with any set, and again and again.
        let events = (!client.hung_up).then_some(events);
        client
            .watch
            .set(poll, &client.stream, token(place, End::Client), events)
    }
}

fn receive_one<'m>(
    client: &mut Client,
    memory: &'m GuestRam,
    chain: DescriptorChain<&'m GuestRam>,
) -> Result<Outcome, HandlerError> {
    let head = chain.head_index();
    let room = Chain::parse(memory, chain)
        .map_err(|why| HandlerError::chain(head, &why))?
        .writable;
    let mut bytes = [0; PIECE];
    let wanted = room.len().min(PIECE);
    if wanted == 0 {
        return Ok(Outcome::Used(0));
    }
    Ok(match client.read(&mut bytes[..wanted]) {
        // At most PIECE.
        Some(count) => Outcome::Used(room.copy_from(&bytes[..count]) as u32),
        None => Outcome::Later,
    })
}

/// Sends a chain from byte `sent` on, at most `left` bytes. A chain that is not done yet stays in
/// the ring, with `sent` to go on from.
fn transmit_one<'m>(
    mut client: Option<&mut Client>,
    sent: &mut u32,
    left: &mut usize,
    memory: &'m GuestRam,
    chain: DescriptorChain<&'m GuestRam>,
) -> Result<Outcome, HandlerError> {
    let head = chain.head_index();
    let mut data = Chain::parse(memory, chain)
        .map_err(|why| HandlerError::chain(head, &why))?
        .readable;
    // Less than was sent is there only if the driver changed it meanwhile.
    let rest = data.take_front(*sent as usize).is_some();
    while let Some(client) = client
        .as_deref_mut()
        .filter(|client| rest && !client.hung_up)
    {
        if data.len() == 0 {
            break;
        }
        if *left == 0 {
            return Ok(Outcome::Later);
        }
        let mut bytes = [0; PIECE];
        let most = PIECE.min(*left);
        let count = data.copy_to(&mut bytes[..most]);
        match client.write(&bytes[..count]) {
            Some(taken) => {
                *left -= taken;
                // A chain is shorter than 4 GiB.
                *sent += taken as u32;
                data.take_front(taken);
            }
            None if client.hung_up => break,
            None => return Ok(Outcome::Later),
        }
    }
    *sent = 0;
    Ok(Outcome::Used(0))
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Whether something is left to read.
fn holds_data(stream: &UnixStream) -> bool {
    let mut byte = 0_u8;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the descriptor is open as long as `stream` lives, and the kernel writes at most the
    // one byte of `byte`.
    let count = unsafe { libc::recv(stream.as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
    count > 0
}
