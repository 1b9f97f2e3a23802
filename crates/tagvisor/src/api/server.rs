//! The server: takes up connections, and gives each a thread of its own, which serves one request after the other.
//!
//! ```text
//! acceptor ── who is it? ── how many are there? ── thread: request → route → answer, and again
//! ```
//!
//! What a client can do to others is bounded there: only the owner of the process and root are let in, there are so many
//! connections and no more, and each request and each answer has its time. What was asked for is carried out to its end
//! even if the client has left.

use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::SendFlags;

use super::http::{Connection, Patience, Response, Status, Unreadable};
use super::routes::{self, Outcome};
use super::socket::{self, SocketFile};
use super::wire::Wire;
use crate::control::Vmm;
use crate::inspection;

/// What a client is allowed.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time.
    pub connections: usize,
    /// How long each may take.
    pub patience: Patience,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 32,
            patience: Patience {
                request: Duration::from_secs(5),
                idle: Duration::from_secs(10),
            },
        }
    }
}

/// For how long a server that is dropped waits for answers on their way.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long to wait when the host has nothing left for another connection.
const EXHAUSTED: Duration = Duration::from_millis(50);

/// A server. Dropping it ends it: nobody else is let in, who waits is sent away, answers on their way are awaited for a
/// second, and the socket's file is removed.
pub struct Server {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    /// Closing it wakes the acceptor.
    alive: Option<UnixStream>,
    _file: SocketFile,
}

struct Shared {
    vmm: Arc<dyn Vmm>,
    limits: Limits,
    connections: Mutex<Connections>,
    left: Condvar,
}

#[derive(Default)]
struct Connections {
    closing: bool,
    next: u64,
    /// A second handle of each, to wake its thread by.
    open: HashMap<u64, UnixStream>,
}

/// Serves `vmm` at the socket `path`.
///
/// # Errors
/// The socket cannot be had.
pub fn serve(path: &Path, vmm: Arc<dyn Vmm>) -> Result<Server, socket::Error> {
    serve_within(path, vmm, Limits::default())
}

/// Serves `vmm` at the socket `path`, within limits of one's own.
///
/// # Errors
/// The socket cannot be had.
pub fn serve_within(
    path: &Path,
    vmm: Arc<dyn Vmm>,
    limits: Limits,
) -> Result<Server, socket::Error> {
    let (listener, file) = socket::listen(path)?;
    let error = |source| socket::Error::Io {
        path: path.into(),
        source,
    };
    listener.set_nonblocking(true).map_err(error)?;
    let (alive, wake) = UnixStream::pair().map_err(error)?;
    let shared = Arc::new(Shared {
        vmm,
        limits,
        connections: Mutex::default(),
        left: Condvar::new(),
    });
    let accepting = shared.clone();
    let acceptor = thread::Builder::new()
        .name("tv-api".into())
        .spawn(move || accepting.accept(&listener, &wake))
        .map_err(error)?;
    Ok(Server {
        shared,
        acceptor: Some(acceptor),
        alive: Some(alive),
        _file: file,
    })
}

impl Drop for Server {
    fn drop(&mut self) {
        self.alive = None;
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let mut connections = self.shared.lock();
        connections.closing = true;
        for stream in connections.open.values() {
            // Who waits for a request finds the end of them; who answers one is not disturbed.
            let _ = stream.shutdown(Shutdown::Read);
        }
        let _ = self
            .shared
            .left
            .wait_timeout_while(connections, FAREWELL, |connections| {
                !connections.open.is_empty()
            });
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>, listener: &UnixListener, wake: &UnixStream) {
        loop {
            let mut ready = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(wake, PollFlags::IN),
            ];
            // Interrupted or refused for lack of memory: what is ready then is nothing.
            let _ = poll(&mut ready, None);
            if !ready[1].revents().is_empty() {
                return;
            }
            match listener.accept() {
                Ok((stream, _)) => self.clone().admit(stream),
                Err(e) if is_transient(&e) => {}
                Err(e) => {
                    tracing::warn!("control socket: cannot take up a connection: {e}");
                    thread::sleep(EXHAUSTED);
                }
            }
        }
    }

    fn admit(self: Arc<Self>, stream: UnixStream) {
        if stream.set_nonblocking(false).is_err() {
            return;
        }
        if !is_allowed(&stream) {
            turn_away(
                &stream,
                Status::Forbidden,
                "only the VM's owner may talk to it",
            );
            return;
        }
        let Some(visit) = self.register(&stream) else {
            let why = "there are too many connections: try again later";
            turn_away(&stream, Status::ServiceUnavailable, why);
            return;
        };
        // Where no thread can be had the client finds its connection closed.
        let _ = thread::Builder::new()
            .name("tv-api-client".into())
            .spawn(move || visit.shared.converse(stream));
    }

    fn register(self: &Arc<Self>, stream: &UnixStream) -> Option<Visit> {
        let handle = stream.try_clone().ok()?;
        let mut connections = self.lock();
        if connections.open.len() >= self.limits.connections {
            return None;
        }
        let id = connections.next;
        connections.next += 1;
        connections.open.insert(id, handle);
        Some(Visit {
            shared: self.clone(),
            id,
        })
    }

    fn converse(&self, stream: UnixStream) {
        let mut connection = Connection::new(Wire::new(stream), self.limits.patience);
        loop {
            let request = match connection.read_request() {
                Ok(request) => request,
                Err(Unreadable::Gone) => return,
                Err(Unreadable::Refused(status, why)) => {
                    if connection.answer(&Response::error(status, &[why]), true) {
                        connection.linger();
                    }
                    return;
                }
            };
            let Outcome {
                response,
                ends,
                lease,
            } = routes::dispatch(&*self.vmm, &request);
            if let Some(lease) = lease {
                if connection.answer(&response, false) {
                    inspection::serve(&lease, &connection.into_stream());
                }
                return;
            }
            let closing = ends || !request.keep_alive || self.lock().closing;
            let answered = connection.answer(&response, closing);
            if ends {
                // After the answer, which the end would cut off, and whether it came across or not.
                self.vmm.shut_down_vmm();
            }
            if closing || !answered {
                return;
            }
        }
    }
}

/// A connection that counts, until this is dropped.
struct Visit {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.shared.lock().open.remove(&self.id);
        self.shared.left.notify_all();
    }
}

fn is_transient(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

/// The file's mode keeps others out as well; but a directory may be changed, and a descriptor passed on.
fn is_allowed(stream: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(stream)
        .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

/// Says why, if that can be said without waiting: nobody who is not served takes the acceptor's time.
fn turn_away(stream: &UnixStream, status: Status, why: &str) {
    let response = Response::error(status, &[why]).to_bytes(true);
    let _ = rustix::net::send(stream, &response, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
}
