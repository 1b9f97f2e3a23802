//! A range of memory, by the addresses that somebody sees it at, gone through in pieces.

use std::ops::Range;

use mte::{GRANULE_SIZE, TagPage};
use stream::{Page, ZERO_PAGE};

use crate::error::{Error, Result};
use crate::memory::TaggedMemory;
use crate::walk::{Extent, Walker};

/// Bytes of a page.
pub(crate) const PAGE: u64 = stream::PAGE_SIZE as u64;
/// Pages read at once.
const BATCH: usize = 64;

/// Whose addresses.
pub enum Space {
    /// Guest-physical ones.
    Physical,
    /// Virtual ones, of EL1 and EL0.
    Virtual(Box<Walker>),
}

/// Why there are no pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gap {
    /// Memory that was never populated: it reads as zeros with tag 0.
    Hole,
    /// No memory of the guest's is there.
    NoMemory,
    /// A virtual address that is not mapped.
    Unmapped,
}

/// A part of a range.
pub enum Part<'a> {
    /// Pages.
    Pages {
        /// Of the first.
        address: u64,
        /// Their data; none if only tags were asked for.
        data: &'a [Page],
        /// Their tags; none if the machine has none.
        tags: &'a [TagPage],
    },
    /// Addresses without pages.
    Gap(Range<u64>, Gap),
}

/// Takes parts.
type EachPart<'a> = &'a mut dyn FnMut(Part<'_>) -> Result<()>;

/// A range of a machine's memory.
pub struct View<'a> {
    memory: &'a mut dyn TaggedMemory,
    space: Space,
    range: Range<u64>,
    data: Vec<Page>,
    tags: Vec<TagPage>,
}

impl<'a> View<'a> {
    /// These addresses, in whole granules. Virtual ones must be canonical ([`Walker::canonical_range`]). The last granule of
    /// all 64-bit addresses is in no range.
    ///
    /// # Errors
    /// [`Error::EmptyRange`].
    pub fn new(memory: &'a mut dyn TaggedMemory, space: Space, range: Range<u64>) -> Result<Self> {
        let granule = GRANULE_SIZE as u64;
        let start = range.start / granule * granule;
        let end = range.end.checked_next_multiple_of(granule);
        let end = end.unwrap_or(u64::MAX / granule * granule);
        if range.start >= range.end || start >= end {
            return Err(Error::EmptyRange {
                start: range.start,
                end: range.end,
            });
        }
        Ok(Self {
            memory,
            space,
            range: start..end,
            data: Vec::new(),
            tags: Vec::new(),
        })
    }

    /// All of the machine's memory: RAM, and pages elsewhere if there are any.
    ///
    /// # Errors
    /// [`Error::NoMemory`]; what keeps the memory from telling.
    pub fn whole(memory: &'a mut dyn TaggedMemory) -> Result<Self> {
        let mut pages = memory.ram();
        let mut at = 0;
        while let Some(run) = memory.next_run(at)? {
            if pages.is_empty() {
                pages = run.clone();
            }
            pages = pages.start.min(run.start)..pages.end.max(run.end);
            at = run.end;
        }
        if pages.is_empty() {
            return Err(Error::NoMemory);
        }
        // Page numbers are below 2^52, so the last page of all has no end.
        let end = pages.end.saturating_mul(PAGE);
        Self::new(memory, Space::Physical, pages.start * PAGE..end)
    }

    /// The addresses, in whole granules.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// # Errors
    /// [`Error::NoTags`] if there are none to be seen.
    pub(crate) fn must_have_tags(&self) -> Result<()> {
        if !self.memory.has_tags() {
            return Err(Error::NoTags);
        }
        Ok(())
    }

    /// Gives all parts to `each`, pages first, in the order that costs least; their data are not asked for. Pages that the
    /// range cuts are whole.
    pub(crate) fn visit_tags(&mut self, each: EachPart<'_>) -> Result<()> {
        if let Space::Virtual(_) = self.space {
            return self.visit_in_order(each);
        }
        let pages = self.range.start / PAGE..self.range.end.div_ceil(PAGE);
        self.memory.visit_tags(pages.clone(), &mut |first, tags| {
            each(Part::Pages {
                address: first * PAGE,
                data: &[],
                tags,
            })
        })?;
        let mut at = pages.start;
        while at < pages.end {
            let run = self.memory.next_run(at)?;
            let run = run.map_or(pages.end..pages.end, |run| {
                run.start.min(pages.end)..run.end.min(pages.end)
            });
            self.gap(at * PAGE, at..run.start, each)?;
            at = run.end;
        }
        Ok(())
    }

    /// Gives all parts to `each` in the order of addresses. Pages that the range cuts are whole.
    pub(crate) fn visit_in_order(&mut self, each: EachPart<'_>) -> Result<()> {
        let range =
            self.range.start / PAGE * PAGE..self.range.end.div_ceil(PAGE).saturating_mul(PAGE);
        let mut at = range.start;
        while at < range.end {
            let left = range.end - at;
            let extent = match &mut self.space {
                Space::Physical => Extent::Mapped {
                    physical: at,
                    size: left,
                },
                Space::Virtual(walker) => walker.extent(self.memory, at)?,
            };
            let size = extent.size().min(left);
            match extent {
                Extent::Mapped { physical, .. } => {
                    let first = physical / PAGE;
                    self.pages_in_order(at, first..first + size.div_ceil(PAGE), each)?;
                }
                Extent::Unmapped { .. } => each(Part::Gap(at..at + size, Gap::Unmapped))?,
            }
            at += size;
        }
        Ok(())
    }

    /// Physical pages, the first of which is seen at `address`.
    fn pages_in_order(
        &mut self,
        address: u64,
        pages: Range<u64>,
        each: EachPart<'_>,
    ) -> Result<()> {
        let seen_at = |page: u64| address + (page - pages.start) * PAGE;
        let mut at = pages.start;
        while at < pages.end {
            let run = self.memory.next_run(at)?;
            let run = run.map_or(pages.end..pages.end, |run| {
                run.start.min(pages.end)..run.end.min(pages.end)
            });
            self.gap(seen_at(at), at..run.start, each)?;
            let mut first = run.start;
            while first < run.end {
                let count = (run.end - first).min(BATCH as u64) as usize;
                self.read(first, count)?;
                each(Part::Pages {
                    address: seen_at(first),
                    data: &self.data[..count],
                    tags: self.tags.get(..count).unwrap_or_default(),
                })?;
                first += count as u64;
            }
            at = run.end;
        }
        Ok(())
    }

    fn read(&mut self, first: u64, count: usize) -> Result<()> {
        if self.data.len() < count {
            self.data.resize(count, ZERO_PAGE);
        }
        if self.memory.has_tags() && self.tags.len() < count {
            self.tags.resize(count, TagPage::ZERO);
        }
        let tags = self.tags.get_mut(..count).unwrap_or_default();
        self.memory.read(first, &mut self.data[..count], tags)
    }

    /// Pages that are not populated: those that are RAM are holes.
    fn gap(&self, address: u64, pages: Range<u64>, each: EachPart<'_>) -> Result<()> {
        let ram = self.memory.ram();
        let [before, behind] = [ram.start, ram.end].map(|at| at.clamp(pages.start, pages.end));
        let parts = [
            (pages.start..before, Gap::NoMemory),
            (before..behind, Gap::Hole),
            (behind.max(before)..pages.end, Gap::NoMemory),
        ];
        for (part, gap) in parts {
            if !part.is_empty() {
                let seen =
                    |page: u64| address.saturating_add((page - pages.start).saturating_mul(PAGE));
                each(Part::Gap(seen(part.start)..seen(part.end), gap))?;
            }
        }
        Ok(())
    }
}
