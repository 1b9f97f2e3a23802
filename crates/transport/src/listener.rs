//! The receiver's way to connections. One thread accepts; each connection is established on a thread of its own, so that a peer that
//! is slow, or never means to finish, holds up nobody else. No more than [`MAX_PENDING`] can be at that at once: when
//! another comes, the oldest has to go. So silent peers, however many there are, cost a bounded amount and keep nobody out who knows
//! what to say.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{SocketAddrAny, SocketFlags, sockopt};
use rustls::{ServerConfig, ServerConnection};

use crate::connecting::resolve;
use crate::connection::Connection;
use crate::greeting::{self, verdict};
use crate::link::{Closer, Shared, tune};
use crate::unix::{self, SocketFile};
use crate::{Address, Error, Host, Result, ServerIdentity};

/// Connections that are accepted and not yet established, of one [`Listener`].
pub const MAX_PENDING: usize = 64;

/// How long the resolver may take for the name of our own host.
const RESOLVE: Duration = Duration::from_secs(10);
/// Between attempts to accept when the host lacks descriptors or memory.
const LACK: Duration = Duration::from_millis(50);
/// How long one that has to go may take for it, before the next oldest is told to go as well.
const LEAVING: Duration = Duration::from_secs(1);

/// Whether a listener that other hosts can reach may do without TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unprotected {
    /// It may not.
    Refused,
    /// It may: somebody said that the network is trusted.
    Allowed,
}

/// Listens at an address until it is dropped.
#[derive(Debug)]
pub struct Listener {
    shared: Arc<Shared>,
    address: Address,
    config: Option<Arc<ServerConfig>>,
    places: Arc<Places>,
    _file: Option<SocketFile>,
}

impl Listener {
    /// Listens at `address`, with TLS if there is an `identity`. Port 0 has the kernel choose one. A Unix socket's file is made for its
    /// owner alone; see [`unix::listen`].
    ///
    /// # Errors
    /// [`Error::Unprotected`] if other hosts can reach the address, there is no TLS, and that is not allowed; others when the host
    /// does not let us listen.
    pub fn bind(
        address: &Address,
        identity: Option<&ServerIdentity>,
        unprotected: Unprotected,
    ) -> Result<Self> {
        let is_open = identity.is_none() && unprotected == Unprotected::Refused;
        let (socket, address, file) = match address {
            Address::Tcp { host, port } => {
                let addresses = own_addresses(address, host, *port)?;
                if is_open && !addresses.iter().all(|a| Address::from(*a).is_local()) {
                    return Err(Error::Unprotected {
                        address: address.clone(),
                    });
                }
                let (socket, address) = bind_tcp(&addresses).map_err(|e| cannot(address, e))?;
                (socket, address, None)
            }
            Address::Unix(path) => {
                let (socket, file) = unix::listen(path)?;
                socket
                    .set_nonblocking(true)
                    .map_err(|e| cannot(address, e))?;
                (socket.into(), address.clone(), Some(file))
            }
        };
        Ok(Self {
            shared: Shared::new(socket),
            address,
            config: identity.map(|identity| identity.config().clone()),
            places: Arc::default(),
            _file: file,
        })
    }

    /// Where it listens, with the port that the kernel chose.
    #[must_use]
    pub fn local_address(&self) -> &Address {
        &self.address
    }

    /// What ends [`Listener::accept`] from another thread.
    #[must_use]
    pub fn closer(&self) -> Closer {
        Closer::new(&self.shared)
    }

    /// Waits for the next connection, until `deadline` if there is one. Nothing is read from it yet.
    ///
    /// # Errors
    /// [`Error::TimedOut`], [`Error::Closed`], and [`Error::Listen`] if the host fails us.
    pub fn accept(&self, deadline: Option<Instant>) -> Result<Pending> {
        let since = Instant::now();
        loop {
            self.wait(since, deadline)?;
            let place = Places::take(&self.places);
            let flags = SocketFlags::CLOEXEC;
            match rustix::net::acceptfrom_with(&self.shared.socket, flags) {
                Ok((socket, from)) => return self.pending(socket, from, place),
                // Another thread has it, or it is gone again.
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED | Errno::PROTO) => {}
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    std::thread::sleep(LACK);
                }
                Err(e) => {
                    self.shared.check(&self.address.to_string())?;
                    return Err(cannot(&self.address, e.into()));
                }
            }
        }
    }

    /// Until somebody wants in.
    fn wait(&self, since: Instant, deadline: Option<Instant>) -> Result<()> {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let ready = self
            .shared
            .poll(PollFlags::IN, left)
            .map_err(|e| cannot(&self.address, e.into()))?;
        self.shared.check(&self.address.to_string())?;
        if !ready || left.is_some_and(|left| left.is_zero()) {
            return Err(Error::TimedOut {
                peer: self.address.to_string(),
                waited: since.elapsed(),
                doing: "accept",
                what: "a connection",
            });
        }
        Ok(())
    }

    fn pending(
        &self,
        socket: OwnedFd,
        from: Option<SocketAddrAny>,
        place: Place,
    ) -> Result<Pending> {
        let from = from.and_then(|from| SocketAddr::try_from(from).ok());
        let peer = match from {
            Some(from) => Address::from(from).to_string(),
            None => format!("{} ({})", self.address, process(&socket)),
        };
        let shared = Shared::new(socket);
        place.give(&shared);
        Ok(Pending {
            shared,
            peer,
            is_tcp: from.is_some(),
            config: self.config.clone(),
            place,
        })
    }
}

fn cannot(address: &Address, source: io::Error) -> Error {
    Error::Listen {
        address: address.clone(),
        source,
    }
}

fn own_addresses(address: &Address, host: &Host, port: u16) -> Result<Vec<SocketAddr>> {
    match host {
        Host::Ip(ip) => Ok(vec![SocketAddr::new(*ip, port)]),
        Host::Name(name) => resolve(address, name, port, Instant::now() + RESOLVE),
    }
}

fn bind_tcp(addresses: &[SocketAddr]) -> io::Result<(OwnedFd, Address)> {
    let listener = TcpListener::bind(addresses)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?.into();
    Ok((listener.into(), address))
}

/// The process at the other end of a Unix socket, for messages.
fn process(socket: &OwnedFd) -> String {
    match sockopt::socket_peercred(socket) {
        Ok(peer) => format!("process {}", peer.pid.as_raw_pid()),
        Err(_) => "unknown process".into(),
    }
}

/// Somebody who wants in.
#[derive(Debug)]
pub struct Pending {
    shared: Arc<Shared>,
    peer: String,
    is_tcp: bool,
    config: Option<Arc<ServerConfig>>,
    place: Place,
}

impl Pending {
    /// Who it is, by address.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// What ends [`Pending::establish`] from another thread.
    #[must_use]
    pub fn closer(&self) -> Closer {
        Closer::new(&self.shared)
    }

    /// Finds out who it is and makes a connection of it, by `deadline`, however the peer behaves. A peer that is refused may take up to a
    /// second of that to read why. The connection then has neither deadline nor patience.
    ///
    /// # Errors
    /// [`Error`] says who is at the other end, what it did or did not do, and what to do.
    pub fn establish(self, deadline: Instant) -> Result<Connection> {
        self.check_user()?;
        let mut connection = Connection::new(self.shared.clone(), self.peer.clone(), deadline);
        let established = self.protect_and_greet(&mut connection);
        if established.is_err() {
            connection.part();
        }
        established?;
        // From here on nobody can displace it; until here somebody may have.
        drop(self.place);
        let (shared, peer) = (self.shared, self.peer);
        shared.check(&peer)?;
        Ok(connection)
    }

    fn check_user(&self) -> Result<()> {
        if self.is_tcp {
            return Ok(());
        }
        match unix::foreign_user(&self.shared.socket).map_err(|e| self.failed(e))? {
            None => Ok(()),
            Some(uid) => Err(Error::ForeignUser {
                peer: self.peer.clone(),
                uid,
            }),
        }
    }

    fn protect_and_greet(&self, connection: &mut Connection) -> Result<()> {
        if self.is_tcp {
            tune(&self.shared.socket).map_err(|e| self.failed(e.into()))?;
        }
        if let Some(config) = &self.config {
            let session =
                ServerConnection::new(config.clone()).map_err(|e| verdict(&self.peer, e))?;
            connection.protect(session.into())?;
        }
        connection.greet(greeting::answer)
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Io {
            peer: self.peer.clone(),
            doing: "set up the connection",
            source,
        }
    }
}

/// The places of connections that are not established.
#[derive(Debug, Default)]
struct Places {
    state: Mutex<Taken>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Taken {
    count: usize,
    next: u64,
    /// Who can be told to go, the oldest first.
    oldest: VecDeque<(u64, Weak<Shared>)>,
}

impl Places {
    /// Takes a place, in the stead of the oldest if there is none left.
    fn take(places: &Arc<Self>) -> Place {
        let mut taken = places.lock();
        while taken.count >= MAX_PENDING {
            if let Some((_, oldest)) = taken.oldest.pop_front()
                && let Some(shared) = oldest.upgrade()
            {
                shared.displace();
            }
            taken = places
                .freed
                .wait_timeout(taken, LEAVING)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        taken.count += 1;
        taken.next += 1;
        Place {
            id: taken.next,
            places: places.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place that is taken, until this is dropped.
#[derive(Debug)]
struct Place {
    id: u64,
    places: Arc<Places>,
}

impl Place {
    fn give(&self, shared: &Arc<Shared>) {
        let entry = (self.id, Arc::downgrade(shared));
        self.places.lock().oldest.push_back(entry);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.count -= 1;
        taken.oldest.retain(|(id, _)| *id != self.id);
        drop(taken);
        self.places.freed.notify_all();
    }
}
