//! What can be looked at: the seam between a machine, saved or running, and everything that shows something of it.

use std::ops::Range;

use engine::VcpuState;
use mte::TagPage;
use stream::{Page, Run};

use crate::error::{Error, Result};

/// What takes pages that were read.
pub type Visitor<'a> = &'a mut dyn FnMut(Run<'_>) -> Result<()>;

/// What takes tags that were read, and the number of the first page that has them.
pub type TagVisitor<'a> = &'a mut dyn FnMut(u64, &[TagPage]) -> Result<()>;

/// A machine's memory, with tags, that can be read at random while it does not change, and its vCPUs.
///
/// Pages are of [`stream::PAGE_SIZE`] bytes, and their numbers guest-physical addresses divided by that. Populated pages
/// are those that the guest's memory has; the others are holes, which read as zeros with tag 0.
pub trait TaggedMemory {
    /// Whether its pages have tags.
    fn has_tags(&self) -> bool;

    /// The pages that are RAM to the guest, populated or not.
    fn ram(&self) -> Range<u64>;

    /// The vCPUs, in order; none if it is memory alone.
    fn vcpus(&self) -> &[VcpuState];

    /// The first run of populated pages at or after `from`, or the part of it from there on. Runs that touch are one.
    ///
    /// # Errors
    /// Whatever keeps it from telling.
    fn next_run(&mut self, from: u64) -> Result<Option<Range<u64>>>;

    /// Copies pages `first` and following. `tags` has as many pages as `data`, or none if the memory has none.
    ///
    /// # Errors
    /// Whatever keeps it from reading.
    fn read(&mut self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> Result<()>;

    /// Gives each populated page of `pages` to `each` once, in the order that costs least.
    ///
    /// # Errors
    /// Whatever keeps it from reading; what `each` returns.
    fn visit(&mut self, pages: Range<u64>, each: Visitor<'_>) -> Result<()>;

    /// The same for tags alone. Memory that can be read so without its data is.
    ///
    /// # Errors
    /// [`Error::NoTags`] if there are none; as for [`Self::visit`].
    fn visit_tags(&mut self, pages: Range<u64>, each: TagVisitor<'_>) -> Result<()> {
        if !self.has_tags() {
            return Err(Error::NoTags);
        }
        self.visit(pages, &mut |run| each(run.first, run.tags))
    }
}

impl<T: TaggedMemory + ?Sized> TaggedMemory for &mut T {
    fn has_tags(&self) -> bool {
        (**self).has_tags()
    }

    fn ram(&self) -> Range<u64> {
        (**self).ram()
    }

    fn vcpus(&self) -> &[VcpuState] {
        (**self).vcpus()
    }

    fn next_run(&mut self, from: u64) -> Result<Option<Range<u64>>> {
        (**self).next_run(from)
    }

    fn read(&mut self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> Result<()> {
        (**self).read(first, data, tags)
    }

    fn visit(&mut self, pages: Range<u64>, each: Visitor<'_>) -> Result<()> {
        (**self).visit(pages, each)
    }

    fn visit_tags(&mut self, pages: Range<u64>, each: TagVisitor<'_>) -> Result<()> {
        (**self).visit_tags(pages, each)
    }
}
