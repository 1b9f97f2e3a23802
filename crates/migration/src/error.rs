//! Why a migration did not go on.

use std::io;
use std::time::Duration;

/// Result of a step of a migration.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a guest's machine says when it cannot do what is asked of it.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// Why a migration did not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The other side cannot be reached.
    #[error("cannot reach {peer}: {source}")]
    Connect {
        /// Where it was to be.
        peer: String,
        /// What the system said.
        source: io::Error,
    },
    /// A connection cannot be taken.
    #[error("cannot listen for a migration: {0}")]
    Listen(io::Error),
    /// The link broke, or says what is no stream of this version.
    #[error("the link to {peer}: {source}")]
    Link {
        /// To whom.
        peer: String,
        /// What is wrong.
        source: stream::Error,
    },
    /// The other side ended the link between two messages.
    #[error("{peer} ended the link")]
    Ended {
        /// Who.
        peer: String,
    },
    /// The other side said something that has no meaning there.
    #[error("{peer} broke the protocol: {what}")]
    Protocol {
        /// Who.
        peer: String,
        /// What was wrong.
        what: String,
    },
    /// The other side will not go on, and said why.
    #[error("{peer} refused: {reason}")]
    Refused {
        /// Who.
        peer: String,
        /// Why, in its words.
        reason: String,
    },
    /// The machine of this side cannot do it.
    #[error("{0}")]
    Machine(MachineError),
    /// The pages of this side cannot be read or placed.
    #[error("{0}")]
    Pages(stream::Error),
    /// Somebody gave it up.
    #[error("the migration was cancelled")]
    Cancelled,
    /// It took longer than it may.
    #[error("it took longer than --timeout allows, {} s: {figures}", .after.as_secs())]
    TimedOut {
        /// What was allowed.
        after: Duration,
        /// How it stood.
        figures: String,
    },
    /// The guest writes faster than pages can be sent.
    #[error(
        "it does not converge: {0}; allow a longer --max-downtime, more --bandwidth, or --postcopy auto"
    )]
    DoesNotConverge(String),
    /// No connection came in time.
    #[error("waited {} s for {what}", .waited.as_secs())]
    Awaited {
        /// For what.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// A side says what cannot be, after what it said before.
    #[error("the hand-over cannot go on from here: {0}")]
    State(String),
    /// The system has no random numbers.
    #[error("making a session: {0}")]
    Session(stream::Error),
    /// A thread could not be started.
    #[error("starting a thread: {0}")]
    Thread(io::Error),
}
