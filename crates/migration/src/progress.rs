//! How far a migration is, for others to see, and whether they want it to be given up.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::link::Closer;

/// Counts as they are now.
#[derive(Default)]
pub struct Progress {
    pub(crate) round: AtomicU32,
    pub(crate) pages_done: AtomicU64,
    pub(crate) pages_total: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) tag_bytes: AtomicU64,
    pub(crate) pages_per_second: AtomicU64,
    pub(crate) changes_per_second: AtomicU64,
    pub(crate) expected_downtime_us: AtomicU64,
    pub(crate) slowed: AtomicU8,
    pub(crate) post_copy: AtomicBool,
    cancelled: AtomicBool,
    on_cancel: Mutex<Vec<Closer>>,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(&self.figures(), f)
    }
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Which time memory is gone through, from 1 on.
    pub round: u32,
    /// Pages sent, or fetched, each as often as it was.
    pub pages_done: u64,
    /// Pages to be sent, as far as is known.
    pub pages_total: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Those of them that are tags.
    pub tag_bytes: u64,
    /// Pages that can be sent in a second.
    pub pages_per_second: u64,
    /// Pages that the guest changes in a second.
    pub changes_per_second: u64,
    /// For how long the guest would stand still if it were stopped now.
    pub expected_downtime: Duration,
    /// For how much of the time the vCPUs are kept from running, in percent.
    pub slowed: u8,
    /// The guest runs at the destination and fetches pages.
    pub post_copy: bool,
}

impl Progress {
    /// Gives the migration up, if it is not too late: before the commit.
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
        for close in self.closers().drain(..) {
            close();
        }
    }

    /// What is to be closed when it is given up, so that nobody waits for it any more.
    pub(crate) fn close_on_cancel(&self, closer: Closer) {
        self.closers().push(closer);
        if self.is_cancelled() {
            self.cancel();
        }
    }

    fn closers(&self) -> MutexGuard<'_, Vec<Closer>> {
        self.on_cancel
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Relaxed)
    }

    /// The counts.
    pub fn figures(&self) -> Figures {
        Figures {
            round: self.round.load(Relaxed),
            pages_done: self.pages_done.load(Relaxed),
            pages_total: self.pages_total.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            tag_bytes: self.tag_bytes.load(Relaxed),
            pages_per_second: self.pages_per_second.load(Relaxed),
            changes_per_second: self.changes_per_second.load(Relaxed),
            expected_downtime: Duration::from_micros(self.expected_downtime_us.load(Relaxed)),
            slowed: self.slowed.load(Relaxed),
            post_copy: self.post_copy.load(Relaxed),
        }
    }
}
