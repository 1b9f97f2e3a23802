//! One connected socket, TCP or Unix, below TLS: bytes in and out, no longer than allowed and no faster than allowed, until
//! somebody closes it. The socket is used without blocking and waited for with `poll`, so that a bound on the time needs no socket
//! option that would have to be set anew before each call.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, sockopt};

use crate::{Error, RateLimit};

const OPEN: u8 = 0;
const CLOSED: u8 = 1;
const DISPLACED: u8 = 2;

/// How long a side that refuses its peer waits for it to have read why.
const PARTING: Duration = Duration::from_secs(1);

/// A peer whose host is gone is noticed after 10 + 3 · 5 seconds of silence, even if nobody sends.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// A socket, and whether somebody closed it.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) socket: OwnedFd,
    state: AtomicU8,
}

impl Shared {
    pub(crate) fn new(socket: OwnedFd) -> Arc<Self> {
        Arc::new(Self {
            socket,
            state: AtomicU8::new(OPEN),
        })
    }

    /// Makes room for another, see [`Error::Displaced`].
    pub(crate) fn displace(&self) {
        self.end(DISPLACED);
    }

    fn end(&self, state: u8) {
        let _ = self
            .state
            .compare_exchange(OPEN, state, Ordering::SeqCst, Ordering::SeqCst);
        // That there is nothing to shut down any more is as good.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// The error to report, if somebody closed it.
    pub(crate) fn check(&self, peer: &str) -> Result<(), Error> {
        match self.state.load(Ordering::SeqCst) {
            OPEN => Ok(()),
            DISPLACED => Err(Error::Displaced { peer: peer.into() }),
            _ => Err(Error::Closed { peer: peer.into() }),
        }
    }

    /// Waits until the socket is ready or `left` has passed; whether it is ready.
    pub(crate) fn poll(
        &self,
        events: PollFlags,
        left: Option<Duration>,
    ) -> rustix::io::Result<bool> {
        // A time that `poll` cannot hold is as good as none.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let mut polled = [PollFd::new(&self.socket, events)];
        match rustix::event::poll(&mut polled, left.as_ref()) {
            Ok(0) => Ok(false),
            // The caller looks again, and at the clock.
            Ok(_) | Err(Errno::INTR) => Ok(true),
            Err(e) => Err(e),
        }
    }
}

/// Closes a connection, or a listener, from any thread: whoever waits in it returns at once with [`Error::Closed`], and the peer
/// sees the connection end without having been finished. It does not keep the connection open.
#[derive(Debug, Clone)]
pub struct Closer(Weak<Shared>);

impl Closer {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Self(Arc::downgrade(shared))
    }

    /// Closes it, if it still is.
    pub fn close(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.end(CLOSED);
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Deadline {
    set: Instant,
    at: Instant,
}

#[derive(Debug)]
pub(crate) struct Link {
    shared: Arc<Shared>,
    peer: String,
    patience: Option<Duration>,
    deadline: Option<Deadline>,
    limit: Option<Arc<RateLimit>>,
    waiting_for: &'static str,
}

impl Link {
    pub(crate) fn new(shared: Arc<Shared>, peer: String) -> Self {
        Self {
            shared,
            peer,
            patience: None,
            deadline: None,
            limit: None,
            waiting_for: "data",
        }
    }

    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// Says more about the peer, as it is known now.
    pub(crate) fn describe_peer(&mut self, more: &str) {
        self.peer = format!("{} ({more})", self.peer);
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn set_patience(&mut self, patience: Option<Duration>) {
        self.patience = patience;
    }

    pub(crate) fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline.map(|at| Deadline {
            set: Instant::now(),
            at,
        });
    }

    pub(crate) fn set_waiting_for(&mut self, what: &'static str) {
        self.waiting_for = what;
    }

    pub(crate) fn set_limit(&mut self, limit: Option<Arc<RateLimit>>) {
        self.limit = limit;
    }

    /// Nothing more will be sent.
    pub(crate) fn end_sending(&self) -> io::Result<()> {
        rustix::net::shutdown(&self.shared.socket, Shutdown::Write)
            .map_err(|e| self.failed("end the connection to", e).into())
    }

    /// Ends the connection so that the peer can read what was sent last: closing a socket with unread data in it resets the
    /// connection, which may overtake that.
    pub(crate) fn part(&mut self) {
        let soon = Instant::now() + PARTING;
        let at = self.deadline.map_or(soon, |deadline| deadline.at.min(soon));
        self.set_deadline(Some(at));
        if self.end_sending().is_err() {
            return;
        }
        let mut ignored = [0; 4096];
        while self.read(&mut ignored).is_ok_and(|n| n != 0) {}
    }

    fn failed(&self, doing: &'static str, error: Errno) -> Error {
        Error::Io {
            peer: self.peer.clone(),
            doing,
            source: error.into(),
        }
    }

    fn timed_out(&self, since: Instant, doing: &'static str) -> Error {
        Error::TimedOut {
            peer: self.peer.clone(),
            waited: since.elapsed(),
            doing,
            what: self.waiting_for,
        }
    }

    /// Waits for the socket, or for as long as is left to a call that has waited since `since`.
    fn wait(&self, events: PollFlags, since: Instant, doing: &'static str) -> Result<(), Error> {
        self.check_deadline(doing)?;
        let now = Instant::now();
        let patience = self
            .patience
            .map(|patience| patience.saturating_sub(now.saturating_duration_since(since)));
        if patience.is_some_and(|left| left.is_zero()) {
            return Err(self.timed_out(since, doing));
        }
        let allowed = self
            .deadline
            .map(|deadline| deadline.at.saturating_duration_since(now));
        let left = match (patience, allowed) {
            (Some(patience), Some(allowed)) => Some(patience.min(allowed)),
            (patience, allowed) => patience.or(allowed),
        };
        self.shared
            .poll(events, left)
            .map_err(|e| self.failed(doing, e))?;
        Ok(())
    }

    fn check_deadline(&self, doing: &'static str) -> Result<(), Error> {
        match self.deadline {
            Some(Deadline { set, at }) if Instant::now() >= at => Err(self.timed_out(set, doing)),
            _ => Ok(()),
        }
    }

    /// Repeats `attempt` until it has done something.
    fn persist(
        &self,
        events: PollFlags,
        doing: &'static str,
        mut attempt: impl FnMut(&OwnedFd) -> rustix::io::Result<usize>,
    ) -> io::Result<usize> {
        let since = Instant::now();
        loop {
            self.shared.check(&self.peer)?;
            self.check_deadline(doing)?;
            match attempt(&self.shared.socket) {
                Ok(n) => return Ok(n),
                Err(Errno::AGAIN) => self.wait(events, since, doing)?,
                Err(Errno::INTR) => {}
                Err(e) => {
                    self.shared.check(&self.peer)?;
                    return Err(self.failed(doing, e).into());
                }
            }
        }
    }

    /// How much of `want` the rate allows, once it allows some.
    fn await_grant(&self, limit: &RateLimit, want: usize) -> io::Result<usize> {
        loop {
            self.shared.check(&self.peer)?;
            self.check_deadline("send")?;
            if let Some(granted) = limit.take(want) {
                return Ok(granted);
            }
        }
    }

    fn send(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.persist(PollFlags::OUT, "send", |socket| {
            rustix::net::sendmsg(
                socket,
                slices,
                &mut SendAncillaryBuffer::default(),
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            )
        })
    }
}

impl Read for Link {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.persist(PollFlags::IN, "receive", |socket| {
            rustix::net::recv(socket, &mut *buf, RecvFlags::DONTWAIT).map(|(n, _)| n)
        })?;
        if read == 0 {
            // Closing from this side looks like the end too.
            self.shared.check(&self.peer)?;
        }
        Ok(read)
    }
}

impl Write for Link {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let want = bufs.iter().map(|buf| buf.len()).sum();
        let Some(limit) = &self.limit else {
            return self.send(bufs);
        };
        let granted = self.await_grant(limit, want)?;
        let sent = if granted == want {
            self.send(bufs)
        } else {
            self.send(&first(bufs, granted))
        };
        limit.give_back(granted - sent.as_ref().copied().unwrap_or(0));
        sent
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The first `len` bytes of `bufs`.
fn first<'a>(bufs: &'a [IoSlice<'_>], mut len: usize) -> Vec<IoSlice<'a>> {
    let mut taken = Vec::new();
    for buf in bufs {
        let part = &buf[..buf.len().min(len)];
        len -= part.len();
        taken.push(IoSlice::new(part));
        if len == 0 {
            break;
        }
    }
    taken
}

/// Sends at once what is written, and notices a host that vanished. Buffers are left as they are: the kernel grows those of TCP as the link
/// needs, up to `tcp_wmem` and `tcp_rmem`, and stops doing so when they are set.
pub(crate) fn tune(socket: impl AsFd + Copy) -> rustix::io::Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)
}
