//! Bytes over a Unix stream, each step of which is done by its deadline or not at all.

use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::SendFlags;

/// Bytes asked for at once.
const READ_SIZE: usize = 16 << 10;

/// When something has to be done; `None` is whenever it is.
pub type Deadline = Option<Instant>;

/// One end of a stream, and what came and has not been used yet.
pub struct Wire {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Wire {
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            received: Vec::new(),
        }
    }

    /// The stream, without what came and has not been used.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// What came and has not been used yet.
    pub fn received(&self) -> &[u8] {
        &self.received
    }

    /// Takes the first `count` bytes of what came, which must be there.
    pub fn take(&mut self, count: usize) -> Vec<u8> {
        let rest = self.received.split_off(count);
        std::mem::replace(&mut self.received, rest)
    }

    /// Waits for more and says how many bytes came: 0 if none ever will.
    ///
    /// # Errors
    /// `TimedOut` at the deadline, and whatever the host says.
    pub fn receive(&mut self, deadline: Deadline) -> io::Result<usize> {
        let before = self.received.len();
        self.received.resize(before + READ_SIZE, 0);
        let count = loop {
            match self.read_once(before, deadline) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        self.received
            .truncate(before + count.as_ref().unwrap_or(&0));
        count
    }

    fn read_once(&mut self, from: usize, deadline: Deadline) -> io::Result<usize> {
        self.stream.set_read_timeout(time_until(deadline)?)?;
        self.stream
            .read(&mut self.received[from..])
            .map_err(as_timeout)
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// `TimedOut` at the deadline, and whatever the host says.
    pub fn send(&mut self, mut bytes: &[u8], deadline: Deadline) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(time_until(deadline)?)?;
            // Whatever the program made of SIGPIPE: a peer that left is no reason to end.
            let sent = rustix::net::send(&self.stream, bytes, SendFlags::NOSIGNAL);
            match sent.map_err(|e| as_timeout(e.into())) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Says that no more will be sent, and throws away what still comes until the peer has read what was: closing a
    /// socket with unread bytes would cut the peer short as it writes, before it reads why it was refused.
    pub fn linger(&mut self, deadline: Deadline) {
        if self.stream.shutdown(std::net::Shutdown::Write).is_err() {
            return;
        }
        loop {
            self.received.clear();
            if !matches!(self.receive(deadline), Ok(1..)) {
                return;
            }
        }
    }
}

fn time_until(deadline: Deadline) -> io::Result<Option<Duration>> {
    let Some(deadline) = deadline else {
        return Ok(None);
    };
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ErrorKind::TimedOut.into());
    }
    Ok(Some(left))
}

/// A socket's own time limit is reported as if it were not to block.
fn as_timeout(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => error,
    }
}
