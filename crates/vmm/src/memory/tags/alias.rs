//! Tags reached by the tag mapping, with the instructions of MTE.
//!
//! Who wants data and tags gets both by this mapping: a page that is in it need not be in the data mapping too, which saves a
//! fault and a walk of other tables.

use std::sync::Arc;

use mte::TagPage;
use mte::aarch64::Instructions;
use stream::Page;

use super::{Error, TagStore, offset_in_ram};
use crate::memory::GuestMemory;

/// Tags reached by the tag mapping.
pub struct AliasTags {
    memory: Arc<GuestMemory>,
    instructions: Instructions,
}

/// The tag instructions, on a host whose programs have MTE.
pub(in crate::memory) fn instructions() -> Option<Instructions> {
    // SAFETY: a query without demands.
    let hwcap2 = unsafe { libc::getauxval(libc::AT_HWCAP2) };
    // SAFETY: the value is what the kernel gave this process.
    unsafe { Instructions::from_hwcap2(hwcap2) }
}

impl AliasTags {
    /// Tags of memory that has a tag mapping, on a host whose programs have MTE. `None` otherwise.
    pub fn new(memory: Arc<GuestMemory>) -> Option<Self> {
        memory.tag_mapping()?;
        Some(Self {
            memory,
            instructions: instructions()?,
        })
    }

    /// Where the tags of `pages` pages at `ipa` are in the tag mapping.
    fn locate(&self, ipa: u64, pages: usize) -> Result<*mut u8, Error> {
        let offset = offset_in_ram(&self.memory, ipa, pages)?;
        let mapping = self
            .memory
            .tag_mapping()
            .ok_or(Error::Range { ipa, pages })?;
        // SAFETY: the offset is within RAM, and the mapping is as long as RAM.
        Ok(unsafe { mapping.address().as_ptr().add(offset as usize) })
    }
}

impl TagStore for AliasTags {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn read_populated(&self, ipa: u64, tags: &mut [TagPage]) -> Result<(), Error> {
        let first = self.locate(ipa, tags.len())?;
        // SAFETY: `locate` checked that this many whole pages are within the tag mapping, which
        // lives as long as `self.memory`.
        unsafe { self.instructions.read_tag_pages(first, tags) };
        Ok(())
    }

    fn read_pages(&self, ipa: u64, data: &mut [Page], tags: &mut [TagPage]) -> Result<(), Error> {
        let first = self.locate(ipa, data.len().max(tags.len()))?;
        // SAFETY: as for tags alone.
        unsafe {
            self.instructions.copy_pages(first, data);
            self.instructions.read_tag_pages(first, tags);
        }
        Ok(())
    }

    fn write(&self, ipa: u64, tags: &[TagPage]) -> Result<(), Error> {
        let first = self.locate(ipa, tags.len())?;
        // SAFETY: as for reading; the mapping is writable.
        unsafe { self.instructions.write_tag_pages(first, tags) };
        Ok(())
    }
}
