//! Tags that need not be written, because the memory has them already.
//!
//! Memory that was just made has no tags but 0 (the kernel clears those of a page as it is first mapped where tags can be
//! reached), and most pages of most guests have no others. Writing 0 over 0 would touch each page by the tag mapping once more: a
//! fault and as many stores as the page has granules. So whoever fills new memory notes which pages got tags.

use std::sync::atomic::{AtomicU64, Ordering};

use mte::TagPage;

use super::tags::{Error, TagStore};
use crate::layout::{PAGE_SIZE, RAM_START};

/// Which pages of a new memory have no tags yet, as long as nobody else writes tags there: its guest has not run, or cannot
/// have touched those pages.
pub struct Untagged {
    /// A bit for each page of RAM that may have tags.
    tagged: Vec<AtomicU64>,
}

impl Untagged {
    /// A memory of `size` bytes without any tags.
    pub fn new(size: u64) -> Self {
        let words = (size / PAGE_SIZE).div_ceil(64);
        Self {
            tagged: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Gives the `tags.len()` pages of 4 KiB from `ipa` on these tags, by `store`, as far as they do not have them.
    ///
    /// # Errors
    /// As [`TagStore::write`].
    pub fn write(&self, store: &dyn TagStore, ipa: u64, tags: &[TagPage]) -> Result<(), Error> {
        let mut written = 0;
        let is_needed = |i: usize, tags: &TagPage| self.note(ipa + i as u64 * PAGE_SIZE, tags);
        let needed: Vec<bool> = (0..)
            .zip(tags)
            .map(|(i, tags)| is_needed(i, tags))
            .collect();
        for run in needed.chunk_by(|one, next| one == next) {
            let end = written + run.len();
            if run[0] {
                store.write(ipa + written as u64 * PAGE_SIZE, &tags[written..end])?;
            }
            written = end;
        }
        Ok(())
    }

    /// Whether the tags of a page have to be written; it has tags then.
    fn note(&self, ipa: u64, tags: &TagPage) -> bool {
        let page = (ipa.wrapping_sub(RAM_START) / PAGE_SIZE) as usize;
        // What is no RAM is for the store to refuse.
        let Some(word) = self.tagged.get(page / 64) else {
            return true;
        };
        let bit = 1 << (page % 64);
        if tags.is_untagged() {
            return word.load(Ordering::Relaxed) & bit != 0;
        }
        word.fetch_or(bit, Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use mte::Tag;

    use super::*;
    use crate::memory::{GuestMemory, MemoryPlan};

    /// Notes what is written.
    struct Noted {
        memory: GuestMemory,
        written: Mutex<Vec<(u64, usize)>>,
    }

    impl TagStore for Noted {
        fn memory(&self) -> &GuestMemory {
            &self.memory
        }

        fn read_populated(&self, _: u64, tags: &mut [TagPage]) -> Result<(), Error> {
            tags.fill(TagPage::ZERO);
            Ok(())
        }

        fn write(&self, ipa: u64, tags: &[TagPage]) -> Result<(), Error> {
            self.written.lock().unwrap().push((ipa, tags.len()));
            Ok(())
        }
    }

    fn noted() -> (Noted, Untagged) {
        let plan = MemoryPlan {
            memory_file: true,
            huge_pages: false,
            tags: None,
        };
        let size = 1 << 20;
        let memory = GuestMemory::new(size, plan).unwrap();
        let written = Mutex::default();
        (Noted { memory, written }, Untagged::new(size))
    }

    const NONE: TagPage = TagPage::ZERO;
    const SOME: TagPage = TagPage::filled(Tag::from_low_bits(5));

    #[test]
    fn no_tags_are_written_over_none() {
        let (store, untagged) = noted();
        untagged.write(&store, RAM_START, &[NONE; 4]).unwrap();
        assert_eq!(*store.written.lock().unwrap(), []);
    }

    #[test]
    fn tags_are_written_in_runs() {
        let (store, untagged) = noted();
        let tags = [NONE, SOME, SOME, NONE, SOME];
        untagged.write(&store, RAM_START, &tags).unwrap();
        let runs = [(RAM_START + PAGE_SIZE, 2), (RAM_START + 4 * PAGE_SIZE, 1)];
        assert_eq!(*store.written.lock().unwrap(), runs);
    }

    #[test]
    fn tags_that_were_written_are_cleared_again() {
        let (store, untagged) = noted();
        untagged.write(&store, RAM_START, &[NONE, SOME]).unwrap();
        untagged.write(&store, RAM_START, &[NONE, NONE]).unwrap();
        let writes = [(RAM_START + PAGE_SIZE, 1); 2];
        assert_eq!(*store.written.lock().unwrap(), writes);
    }

    #[test]
    fn what_is_no_ram_is_left_to_the_store() {
        let (store, untagged) = noted();
        untagged.write(&store, 0, &[NONE]).unwrap();
        assert_eq!(*store.written.lock().unwrap(), [(0, 1)]);
    }
}
