//! The tag state of one page of host memory: two bits, and no lock above the page.
//!
//! Whoever first needs a page's tags clears what a former owner left there; everybody else waits
//! until that is done, and from then on nobody may clear them. Linux does it since 6.2 with two
//! flags of `struct page`, `PG_mte_lock` and `PG_mte_tagged`, in place of one lock for all memory
//! (seed 001: start-up, resume and migration fault pages in on many CPUs at once). The flags are
//! set once and last as long as the page is allocated: a freed page begins anew.

use super::sync::atomic::{AtomicU8, Ordering};
use super::sync::spin;

/// Somebody initialises the tags, or did: Linux's `PG_mte_lock`.
const CLAIMED: u8 = 1 << 0;
/// The tags are valid: Linux's `PG_mte_tagged`.
const TAGGED: u8 = 1 << 1;

/// How far a page's tags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagState {
    /// Nobody asked for the page's tags since it was allocated: they are a former owner's.
    Untagged,
    /// Somebody is writing the first valid tags.
    BeingInitialised,
    /// The tags are valid and must not be cleared.
    Tagged,
}

/// The two bits of one page.
#[derive(Debug)]
pub struct PageState(AtomicU8);

impl Default for PageState {
    fn default() -> Self {
        Self::new()
    }
}

impl PageState {
    /// The state of a page that was just allocated.
    pub fn new() -> Self {
        Self(AtomicU8::new(0))
    }

    /// What the bits say at this moment.
    pub fn get(&self) -> TagState {
        match self.0.load(Ordering::Acquire) {
            bits if bits & TAGGED != 0 => TagState::Tagged,
            0 => TagState::Untagged,
            _ => TagState::BeingInitialised,
        }
    }

    /// Whether the tags are valid. If so, they are visible to the caller.
    pub fn is_tagged(&self) -> bool {
        self.get() == TagState::Tagged
    }

    /// Claims the initialisation: `true` for exactly one caller, who writes all tags of the page and
    /// then calls [`finish`](Self::finish). Every other caller waits for that and gets `false`
    /// (`try_page_mte_tagging`).
    ///
    /// The claimant must not wait for anything meanwhile, for others spin.
    #[must_use]
    pub fn begin(&self) -> bool {
        // Relaxed is enough to claim: the claimant writes and does not rely on what it reads.
        if self.0.fetch_or(CLAIMED, Ordering::Relaxed) & CLAIMED == 0 {
            return true;
        }
        while !self.is_tagged() {
            spin();
        }
        false
    }

    /// Makes the tags written so far valid for all who look from now on (`set_page_mte_tagged`).
    pub fn finish(&self) {
        self.0.fetch_or(CLAIMED | TAGGED, Ordering::Release);
    }

    /// Has the tags valid when it returns: by `write_tags` if nobody was first.
    pub fn initialise(&self, write_tags: impl FnOnce()) {
        // The quick way for pages in use: no write, so their cache line stays shared.
        if !self.is_tagged() && self.begin() {
            write_tags();
            self.finish();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_new_page_is_untagged_until_somebody_finished() {
        let state = PageState::new();
        assert_eq!(state.get(), TagState::Untagged);
        assert!(state.begin());
        assert_eq!(state.get(), TagState::BeingInitialised);
        state.finish();
        assert_eq!(state.get(), TagState::Tagged);
    }

    #[test]
    fn valid_tags_are_not_initialised_again() {
        let state = PageState::new();
        state.initialise(|| ());
        state.initialise(|| panic!("valid tags would be lost"));
        assert!(!state.begin());
    }
}
