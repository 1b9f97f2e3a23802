//! All that can go wrong between two hosts. Inside [`std::io::Error`] too: what a [`Connection`](crate::Connection) reports
//! while it reads or writes holds an [`Error`], and has a fitting [`std::io::ErrorKind`].

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::{Address, unix};

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What failed, on what, and why.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an address.
    #[error(
        "address {text:?}: {why}; it must be tcp://HOST:PORT (an IPv6 address in brackets) or unix:PATH"
    )]
    Address {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Not a rate.
    #[error(
        "rate {text:?}: {why}; it must be bytes per second such as 100M or 512Ki, or bits per second such as 800Mbit"
    )]
    Rate {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Anybody who reaches the address could send a guest, and read along.
    #[error(
        "{address} can be reached from other hosts, and nothing would protect the guest: use TLS (--tls DIR), listen on a loopback \
         address or a Unix socket, or allow it explicitly"
    )]
    Unprotected {
        /// Where it was to listen.
        address: Address,
    },
    /// The name of a host has no address.
    #[error("{address}: the host's name has no address: {source}")]
    Resolve {
        /// Where to.
        address: Address,
        /// What the resolver said.
        source: io::Error,
    },
    /// Nobody is there, or the way is barred.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// Where to.
        address: Address,
        /// What the host said.
        source: io::Error,
    },
    /// The host does not let us listen.
    #[error("cannot listen at {address}: {source}")]
    Listen {
        /// Where.
        address: Address,
        /// What the host said.
        source: io::Error,
    },
    /// The Unix socket cannot be made.
    #[error(transparent)]
    Socket(#[from] unix::Error),
    /// It took too long.
    #[error("{peer}: waited {waited:.1?} to {doing} {what}")]
    TimedOut {
        /// Who was waited for.
        peer: String,
        /// For how long.
        waited: Duration,
        /// `connect to`, `send`, `receive`, `accept`.
        doing: &'static str,
        /// What should have come or gone.
        what: &'static str,
    },
    /// A [`Closer`](crate::Closer) of this side was used.
    #[error("{peer}: the connection was closed from this side")]
    Closed {
        /// Who was at the other end.
        peer: String,
    },
    /// More than [`MAX_PENDING`](crate::MAX_PENDING) peers wanted in at once, and this was the oldest of them.
    #[error("{peer}: not established, as too many newer connections came")]
    Displaced {
        /// Who was at the other end.
        peer: String,
    },
    /// Another user than ours and root is at the other end of a Unix socket.
    #[error("{peer} belongs to user {uid}; only our own and root are trusted")]
    ForeignUser {
        /// Who is at the other end.
        peer: String,
        /// Its user.
        uid: u32,
    },
    /// A file for TLS does not serve.
    #[error("{}: {why}", file.display())]
    Identity {
        /// Which file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A name for a peer is none.
    #[error("{name:?} is neither a host's name nor an IP address, and can be in no certificate")]
    PeerName {
        /// What was given.
        name: String,
    },
    /// A Unix socket says nothing about who should be at the other end.
    #[error("{address} does not say whose certificate to expect: give its name (--tls-peer-name)")]
    NoPeerName {
        /// Where to.
        address: Address,
    },
    /// This side has TLS, the other has not.
    #[error("{peer} does not speak TLS: use TLS at both ends or at neither")]
    PeerWithoutTls {
        /// Who is at the other end.
        peer: String,
    },
    /// The other side has TLS, this one has not.
    #[error(
        "{peer} speaks TLS and this side does not: use TLS at both ends (--tls DIR) or at neither"
    )]
    PeerWithTls {
        /// Who is at the other end.
        peer: String,
    },
    /// Something else is at the other end.
    #[error("{peer} is not a Tagvisor: it does not greet like one")]
    NotTagvisor {
        /// Who is at the other end.
        peer: String,
    },
    /// The peer's certificate does not convince us.
    #[error("the certificate of {peer} is refused: {why}")]
    PeerRefused {
        /// Who is at the other end.
        peer: String,
        /// Why.
        why: String,
    },
    /// Our certificate does not convince the peer.
    #[error("{peer} refuses this side's certificate: {why}")]
    RefusedByPeer {
        /// Who is at the other end.
        peer: String,
        /// Why.
        why: String,
    },
    /// TLS fails in another way.
    #[error("{peer}: TLS fails: {source}")]
    Tls {
        /// Who is at the other end.
        peer: String,
        /// How.
        source: rustls::Error,
    },
    /// The peer ended the connection when more was due.
    #[error("{peer} ended the connection before {what}")]
    Gone {
        /// Who was at the other end.
        peer: String,
        /// What was due.
        what: &'static str,
    },
    /// The host reports an error.
    #[error("{peer}: cannot {doing}: {source}")]
    Io {
        /// Who is at the other end.
        peer: String,
        /// `send`, `receive`, and the like.
        doing: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

impl Error {
    fn kind(&self) -> io::ErrorKind {
        match self {
            Self::TimedOut { .. } => io::ErrorKind::TimedOut,
            Self::Closed { .. } | Self::Displaced { .. } => io::ErrorKind::ConnectionAborted,
            Self::Gone { .. } => io::ErrorKind::UnexpectedEof,
            Self::Io { source, .. } => source.kind(),
            Self::ForeignUser { .. } | Self::PeerRefused { .. } | Self::RefusedByPeer { .. } => {
                io::ErrorKind::PermissionDenied
            }
            _ => io::ErrorKind::InvalidData,
        }
    }

    /// What a reader or writer reported, be it an [`Error`] inside it or not.
    pub(crate) fn from_io(error: io::Error, peer: &str, doing: &'static str) -> Self {
        error.downcast::<Self>().unwrap_or_else(|source| Self::Io {
            peer: peer.into(),
            doing,
            source,
        })
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error)
    }
}
