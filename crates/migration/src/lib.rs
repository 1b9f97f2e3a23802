#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod arrival;
mod convergence;
mod departure;
mod error;
pub mod handover;
mod link;
mod message;
mod pace;
mod peer;
mod progress;

pub use arrival::{Arriving, Decider, Fill, Filling, Happening, Held, Receiver, Verdict};
pub use convergence::{Convergence, Next, Otherwise, Round};
pub use departure::{Away, Departing, Departure, Options, PostCopy, Report, depart};
pub use error::{Error, MachineError, Result};
pub use link::{Closer, Dial, Listen, Pending, SavedState, Wire};
pub use message::{MAX_LINKS, PROTOCOL, Session};
pub use peer::{Fetcher, MOST_AHEAD, Peer};
pub use progress::{Figures, Progress};
