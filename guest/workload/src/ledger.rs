//! What one thread knows of its pages: tags packed to 1/32 of the memory, data as a seed, when and how it was written.

use std::time::Duration;

use mte::TagPage;

use crate::difference::{Difference, GranuleDifference};
use crate::memory::Memory;
use crate::page::Data;

/// One page of a thread.
pub struct Entry {
    /// Its index in the memory.
    pub page: usize,
    /// What was written to it; nothing if it was never touched.
    pub written: Option<Written>,
}

/// What was written to a page.
pub struct Written {
    /// Its tags.
    pub tags: TagPage,
    /// Its data.
    pub data: Data,
    /// How it was written last.
    pub how: &'static str,
    /// When that was, on CLOCK_MONOTONIC.
    pub when: Duration,
}

impl Entry {
    /// A page that was never touched.
    pub const fn untouched(page: usize) -> Self {
        Self {
            page,
            written: None,
        }
    }

    /// Finds the page in `memory` as it was left.
    ///
    /// # Errors
    /// The first granule that is different.
    pub fn verify(
        &self,
        memory: &impl Memory,
        thread: usize,
        now: impl FnOnce() -> Duration,
    ) -> Result<(), Difference> {
        let (expected_tags, data) = self.expected();
        let tags = memory.tags(self.page);
        // Data is read through tagged pointers only where the tags are right.
        if tags == *expected_tags && memory.holds(self.page, expected_tags, data) {
            return Ok(());
        }
        Err(self.difference(memory, &tags, thread, now()))
    }

    fn expected(&self) -> (&TagPage, Data) {
        self.written
            .as_ref()
            .map_or((&TagPage::ZERO, Data::Zero), |written| {
                (&written.tags, written.data)
            })
    }

    fn difference(
        &self,
        memory: &impl Memory,
        tags: &TagPage,
        thread: usize,
        now: Duration,
    ) -> Difference {
        let (expected_tags, data) = self.expected();
        let expected: Vec<_> = expected_tags.iter().zip(data.granules()).collect();
        let expected = |granule: u8| expected[usize::from(granule)];
        let actual = |granule| (tags.get(granule), memory.granule(self.page, granule));
        let mut differing = (0..=u8::MAX).filter(|&granule| expected(granule) != actual(granule));
        let Some(first) = differing.next() else {
            let what = format!(
                "page {} was different when it was read first, and is not any more",
                self.page
            );
            return Difference::Fault { thread, what };
        };
        Difference::Granule(Box::new(GranuleDifference {
            address: memory.address(self.page, first),
            page: self.page,
            granule: first,
            thread,
            expected: expected(first),
            actual: actual(first),
            written: self
                .written
                .as_ref()
                .map(|written| (written.how, now.saturating_sub(written.when))),
            differing: 1 + differing.count(),
        }))
    }
}
