//! Who may run the guest: the two state machines of a hand-over, one at each side.
//!
//! They decide, and nothing else does: [`crate::departure`] and [`crate::arrival`] tell them what happened and do what
//! the new state says. Neither looks at a clock or a connection, so `tests/handover.rs` can go through every order in
//! which messages arrive, links break and processes die, and see that never two sides run the guest, and that no guest is
//! lost that a living side could still run.
//!
//! ```text
//! source                                            destination
//! Sending     the guest runs here                   Receiving   pages arrive
//!    | the guest is stopped
//! Stopped     state and last pages are sent  ---->     | all that it needs is here
//!    |                                       <Ready-  Ready       the guest could run
//!    | THE COMMIT: from here on the source
//!    | does not run the guest by itself
//! Committed                                  --Run->   | THE TAKE-OVER
//!    |                                     <Running-  Running     pages are still at the source (post-copy)
//! Serving     pages are fetched from here              | all pages are here
//!    |                                    <Complete-  Complete    all of the guest is here
//! Gone        nothing is left here
//! ```
//!
//! A failure before the commit costs nothing: the source goes on ([`Source::Kept`]), and the destination, if it was ready, does
//! not know that ([`Destination::Undecided`]): it runs nothing until it is told. A failure between the commit and its
//! answer leaves a source that does not know whether the guest runs ([`Source::Undecided`]): it runs nothing either. A
//! failure in post-copy leaves a half at each side ([`Source::Separated`], [`Destination::Separated`]). All three end as soon as
//! the sides can talk again, or by somebody who knows what became of the other side.
//!
//! A guest that ends while it runs in post-copy needs no more pages ([`Destination::Ended`]): the source lets go of them.

use std::fmt;

/// The side that the guest leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The guest runs; its memory is being sent.
    Sending,
    /// The guest stands still; the last of it is being sent.
    Stopped,
    /// The destination may run the guest: it was told to, or is about to be.
    Committed {
        /// Pages stay behind, and are fetched from here.
        pages_stay: bool,
    },
    /// The destination may run the guest, and cannot be asked.
    Undecided {
        /// Pages stay behind.
        pages_stay: bool,
    },
    /// The guest runs at the destination, which fetches pages from here.
    Serving,
    /// It ran at the destination, and needs pages from here; the link is broken.
    Separated,
    /// The migration failed, or was given up: the guest runs here, as before.
    Kept,
    /// The guest is at the destination, all of it; or it ended there, and needs nothing of what was here.
    Gone,
}

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The guest was stopped for the hand-over.
    Stop,
    /// The destination has all that it needs.
    Ready {
        /// But for pages that stay here.
        pages_stay: bool,
    },
    /// The destination says where it is.
    Found(Destination),
    /// The link broke, the destination refused, or somebody gave the migration up.
    Failed,
    /// Somebody made sure that the destination does not run the guest, and never did.
    TakeBack,
    /// Somebody made sure that the guest is not needed here.
    Forget,
}

impl Source {
    /// The state that follows; none if this cannot happen here.
    #[must_use]
    pub const fn on(self, event: SourceEvent) -> Option<Self> {
        use SourceEvent::{Failed, Forget, Found, Ready, Stop, TakeBack};
        Some(match (self, event) {
            (Self::Sending, Stop) => Self::Stopped,
            (Self::Sending | Self::Stopped, Failed) => Self::Kept,
            (Self::Stopped, Ready { pages_stay }) => Self::Committed { pages_stay },
            (Self::Committed { pages_stay }, Failed) => Self::Undecided { pages_stay },
            (Self::Serving, Failed) => Self::Separated,
            (
                Self::Committed { .. } | Self::Undecided { .. } | Self::Serving | Self::Separated,
                Found(Destination::Complete),
            ) => Self::Gone,
            (
                Self::Committed { pages_stay: true }
                | Self::Undecided { pages_stay: true }
                | Self::Serving
                | Self::Separated,
                Found(Destination::Running | Destination::Separated),
            ) => Self::Serving,
            // Only a guest that ran can have ended, and only one whose pages stay here needs this to be said.
            (
                Self::Committed { pages_stay: true }
                | Self::Undecided { pages_stay: true }
                | Self::Serving
                | Self::Separated,
                Found(Destination::Ended),
            ) => Self::Gone,
            // It never heard that it may run: it is told again.
            (
                Self::Undecided { pages_stay },
                Found(Destination::Ready { .. } | Destination::Undecided { .. }),
            ) => Self::Committed { pages_stay },
            (Self::Undecided { .. }, TakeBack) => Self::Kept,
            (Self::Undecided { .. } | Self::Separated, Forget) => Self::Gone,
            _ => return None,
        })
    }

    /// Whether the guest may run here.
    #[must_use]
    pub const fn may_run(self) -> bool {
        matches!(self, Self::Sending | Self::Kept)
    }
}

/// The side that the guest comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Destination {
    /// Pages arrive; the guest is not here yet.
    Receiving,
    /// The guest could run, and waits for the word.
    Ready {
        /// Pages are still at the source.
        pages_missing: bool,
    },
    /// The guest could run, and the source cannot be asked whether it may.
    Undecided {
        /// Pages are still at the source.
        pages_missing: bool,
    },
    /// The guest runs; pages are still at the source.
    Running,
    /// The guest waits for pages that are at the source; the link is broken.
    Separated,
    /// All of the guest is here.
    Complete,
    /// The guest ended here, and the pages that are still at the source are needed no more.
    Ended,
    /// The guest is not here, and will not be.
    Discarded,
}

/// What happens to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// All that is needed to run the guest is here.
    Loaded {
        /// But for pages that are still at the source.
        pages_missing: bool,
    },
    /// The source committed itself: the guest may run here.
    Run,
    /// The source keeps the guest.
    Abort,
    /// The last page came.
    AllThere,
    /// The link to the source broke.
    Failed,
    /// The source is back, and its pages can be fetched.
    Found,
    /// The guest ended its machine, or somebody did.
    End,
    /// Somebody made sure that the source does not run the guest.
    TakeOver,
    /// Somebody made sure that the guest is not needed here.
    Forget,
}

impl Destination {
    /// The state that follows; none if this cannot happen here.
    #[must_use]
    pub const fn on(self, event: DestinationEvent) -> Option<Self> {
        use DestinationEvent::{
            Abort, AllThere, End, Failed, Forget, Found, Loaded, Run, TakeOver,
        };
        Some(match (self, event) {
            (Self::Receiving, Loaded { pages_missing }) => Self::Ready { pages_missing },
            (Self::Receiving, Failed) => Self::Discarded,
            (
                Self::Ready {
                    pages_missing: true,
                }
                | Self::Undecided {
                    pages_missing: true,
                },
                Run,
            ) => Self::Running,
            (
                Self::Ready {
                    pages_missing: false,
                }
                | Self::Undecided {
                    pages_missing: false,
                },
                Run,
            )
            | (
                Self::Undecided {
                    pages_missing: false,
                },
                TakeOver,
            )
            | (Self::Running | Self::Separated, AllThere) => Self::Complete,
            (Self::Receiving | Self::Ready { .. } | Self::Undecided { .. }, Abort)
            | (Self::Undecided { .. } | Self::Separated, Forget) => Self::Discarded,
            (Self::Ready { pages_missing }, Failed) => Self::Undecided { pages_missing },
            (Self::Running, Failed) => Self::Separated,
            (Self::Separated, Found) => Self::Running,
            (Self::Running | Self::Separated, End) => Self::Ended,
            _ => return None,
        })
    }

    /// Whether the guest may run here.
    #[must_use]
    pub const fn may_run(self) -> bool {
        matches!(self, Self::Running | Self::Complete)
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Receiving => "still receiving",
            Self::Ready { .. } => "ready to run the guest",
            Self::Undecided { .. } => "ready, and waiting to hear whether it may run the guest",
            Self::Running => "running the guest, some of whose pages are still at the source",
            Self::Separated => "waiting for pages that are still at the source",
            Self::Complete => "running the guest",
            Self::Ended => "without the guest, which ended there",
            Self::Discarded => "without the guest, which it discarded",
        })
    }
}
