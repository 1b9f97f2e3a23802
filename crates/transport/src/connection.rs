//! A connection that is established: plain bytes, or TLS's records around them.
//!
//! Received bytes are read ahead into one buffer, since TLS asks for little at a time; longer plain reads go past it. Sent ones are not
//! gathered: what is written is on its way when `write` returns.

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;

use crate::greeting::verdict;
use crate::link::{Closer, Link, Shared};
use crate::{Error, RateLimit, Result};

/// Bytes that are read ahead.
const READ_AHEAD: usize = 128 << 10;
/// Bytes that a write under TLS turns into records before they are sent.
const SEND_AT_ONCE: usize = 128 << 10;

/// A connection to a peer that is who it should be. It is used by one thread, in one direction at a time.
///
/// What goes wrong in reading and writing is an [`io::Error`] around an [`Error`]. After one, the connection is good for no more.
#[derive(Debug)]
pub struct Connection {
    link: BufReader<Link>,
    session: Option<Box<rustls::Connection>>,
    /// Why what was last taken for sending could not be sent.
    failed: Option<io::Error>,
}

impl Connection {
    /// Not yet established: neither TLS nor greeting has happened.
    pub(crate) fn new(shared: Arc<Shared>, peer: String, deadline: Instant) -> Self {
        let mut link = Link::new(shared, peer);
        link.set_deadline(Some(deadline));
        Self {
            link: BufReader::with_capacity(READ_AHEAD, link),
            session: None,
            failed: None,
        }
    }

    /// Does TLS's handshake, after which [`Connection::peer`] has the name in the peer's certificate.
    pub(crate) fn protect(&mut self, mut session: rustls::Connection) -> Result<()> {
        session.set_buffer_limit(Some(SEND_AT_ONCE));
        let session = self.session.insert(Box::new(session));
        let link = &mut self.link;
        link.get_mut().set_waiting_for("TLS's handshake");
        let shaken = shake_hands(session, link);
        shaken.map_err(|e| Error::from_io(e, link.get_ref().peer(), "do TLS's handshake with"))?;
        if let Some(name) = session.peer_certificates().and_then(first_name) {
            link.get_mut().describe_peer(&name);
        }
        Ok(())
    }

    /// Greets by `greeting`; then the connection is established.
    pub(crate) fn greet(&mut self, greeting: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.set_waiting_for("the greeting");
        greeting(self)?;
        self.set_waiting_for("data");
        self.set_deadline(None);
        Ok(())
    }

    /// Lets the peer read why it is refused.
    pub(crate) fn part(&mut self) {
        self.link.get_mut().part();
    }

    /// The peer's address, and with TLS the first name in its certificate.
    #[must_use]
    pub fn peer(&self) -> &str {
        self.link.get_ref().peer()
    }

    /// Whether it is TLS.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        self.session.is_some()
    }

    /// How long one call may wait in which nothing at all comes, or goes. No bound with `None`, as at first.
    pub fn set_patience(&mut self, patience: Option<Duration>) {
        self.link.get_mut().set_patience(patience);
    }

    /// Until when all that follows must be done, however much comes or goes meanwhile. No bound with `None`, as at first. This
    /// is what keeps a peer that sends a byte a second from holding up a message for ever.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.link.get_mut().set_deadline(deadline);
    }

    /// What [`Error::TimedOut`] says was waited for.
    pub fn set_waiting_for(&mut self, what: &'static str) {
        self.link.get_mut().set_waiting_for(what);
    }

    /// Sends no faster than `limit`, which others may share.
    #[must_use]
    pub fn limited(mut self, limit: Arc<RateLimit>) -> Self {
        self.link.get_mut().set_limit(Some(limit));
        self
    }

    /// What closes this connection from another thread.
    #[must_use]
    pub fn closer(&self) -> Closer {
        Closer::new(self.link.get_ref().shared())
    }

    /// Ends what this side sends, so that the peer's reader sees an end and not a cut. What the peer sends can still be read.
    ///
    /// # Errors
    /// As in writing.
    pub fn finish(&mut self) -> io::Result<()> {
        if let Some(session) = &mut self.session {
            session.send_close_notify();
        }
        self.flush()?;
        self.link.get_ref().end_sending()
    }

    /// The error to report, instead of doing anything more.
    fn check(&mut self) -> io::Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }
}

impl Read for Connection {
    /// With TLS, the end of the connection without an end of TLS is [`io::ErrorKind::UnexpectedEof`]; without TLS a cut cannot be told from an
    /// end.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(session) = &mut self.session else {
            return self.link.read(buf);
        };
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            match session.reader().read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    receive(session, &mut self.link)?;
                }
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(cut(&self.link, "the end of what it sends"));
                }
                read => return read,
            }
        }
    }
}

impl Write for Connection {
    /// With TLS, an error may be reported by the next call, since what was turned into records counts as written.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.check()?;
        let Some(session) = &mut self.session else {
            return self.link.get_mut().write_vectored(bufs);
        };
        let link = self.link.get_mut();
        send(session, link)?;
        let written = session.writer().write_vectored(bufs)?;
        self.failed = send(session, link).err();
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.check()?;
        match &mut self.session {
            Some(session) => send(session, self.link.get_mut()),
            None => Ok(()),
        }
    }
}

fn shake_hands(session: &mut rustls::Connection, link: &mut BufReader<Link>) -> io::Result<()> {
    while session.is_handshaking() {
        send(session, link.get_mut())?;
        if session.is_handshaking() && !receive(session, link)? {
            return Err(cut(link, "TLS's handshake was done"));
        }
    }
    send(session, link.get_mut())
}

fn cut(link: &BufReader<Link>, what: &'static str) -> io::Error {
    let peer = link.get_ref().peer().into();
    Error::Gone { peer, what }.into()
}

/// Sends all records there are.
fn send(session: &mut rustls::Connection, link: &mut Link) -> io::Result<()> {
    while session.wants_write() {
        session.write_tls(link)?;
    }
    Ok(())
}

/// Takes in some bytes; whether there were any.
fn receive(session: &mut rustls::Connection, link: &mut BufReader<Link>) -> io::Result<bool> {
    let received = session.read_tls(link)?;
    if let Err(e) = session.process_new_packets() {
        // The alert that says why; that it cannot be sent is of no more interest.
        let _ = send(session, link.get_mut());
        return Err(verdict(link.get_ref().peer(), e).into());
    }
    Ok(received != 0)
}

/// The first host's name in the peer's certificate.
fn first_name(certificates: &[CertificateDer<'_>]) -> Option<String> {
    let own = webpki::EndEntityCert::try_from(certificates.first()?).ok()?;
    own.valid_dns_names().next().map(String::from)
}
