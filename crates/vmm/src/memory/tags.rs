//! Tags of guest memory, reached from outside of the guest.
//!
//! [`TagStore`] reads and writes packed tag pages by one of two ways: [`AliasTags`] with LDG and STG
//! on the tag mapping, with no lock and no system call, and [`CopiedTags`] with the engine's bulk
//! copy. Both give the same tags. Who wants a page's data too has them with less work together.

#[cfg(target_arch = "aarch64")]
mod alias;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use engine::{TagCopyError, Vm};
use mte::TagPage;
use stream::Page;
use vm_memory::{Bytes, GuestAddress};

use super::{GuestMemory, host_page_size};
use crate::layout::{PAGE_SIZE, RAM_START};
#[cfg(target_arch = "aarch64")]
pub use alias::AliasTags;
#[cfg(target_arch = "aarch64")]
pub(super) use alias::instructions;

/// Why tags could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pages are not guest memory.
    #[error("{pages} pages at guest address {ipa:#x}: not whole pages of the guest's memory")]
    Range {
        /// First guest-physical address.
        ipa: u64,
        /// How many pages of 4 KiB.
        pages: usize,
    },
    /// The host does not say which pages exist.
    #[error("guest address {ipa:#x}: finding out which pages exist: {source}")]
    Populated {
        /// First guest-physical address asked for.
        ipa: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The engine's copy failed.
    #[error(transparent)]
    Copy(#[from] TagCopyError),
}

/// The tags of guest memory, a packed page at a time.
///
/// Any number of threads may read and write at once, while the guest runs: each granule's tag is then one that it had at
/// some time of the call.
pub trait TagStore: Send + Sync {
    /// Reads the tags of the `tags.len()` pages of 4 KiB from `ipa` on, all of which are populated
    /// ([`GuestMemory::populated`]): reading others would populate them.
    ///
    /// # Errors
    /// See [`Error`].
    fn read_populated(&self, ipa: u64, tags: &mut [TagPage]) -> Result<(), Error>;

    /// Reads the data, and the tags, of the `tags.len()` pages of 4 KiB from `ipa` on, all of which are populated.
    ///
    /// # Errors
    /// See [`Error`].
    fn read_pages(&self, ipa: u64, data: &mut [Page], tags: &mut [TagPage]) -> Result<(), Error> {
        let pages = data.len();
        let outside = |_| Error::Range { ipa, pages };
        let (ram, at) = (self.memory().ram(), GuestAddress(ipa));
        ram.read_slice(data.as_flattened_mut(), at)
            .map_err(outside)?;
        self.read_populated(ipa, tags)
    }

    /// The memory whose tags these are.
    fn memory(&self) -> &GuestMemory;

    /// Reads the tags of the `tags.len()` pages of 4 KiB from `ipa` on, and returns which of them exist, as ranges of
    /// guest-physical addresses, the lowest first. The others are holes: they stay holes, and get tag 0 here.
    ///
    /// # Errors
    /// See [`Error`].
    fn read(&self, ipa: u64, tags: &mut [TagPage]) -> Result<Vec<Range<u64>>, Error> {
        offset_in_ram(self.memory(), ipa, tags.len())?;
        let end = ipa + tags.len() as u64 * PAGE_SIZE;
        let mut present = Vec::new();
        let mut hole = ipa;
        for range in self.memory().populated(ipa..end) {
            let range = range.map_err(|source| Error::Populated { ipa, source })?;
            tags[pages_between(ipa, hole)..pages_between(ipa, range.start)].fill(TagPage::ZERO);
            let tags = &mut tags[pages_between(ipa, range.start)..pages_between(ipa, range.end)];
            self.read_populated(range.start, tags)?;
            hole = range.end;
            present.push(range);
        }
        tags[pages_between(ipa, hole)..].fill(TagPage::ZERO);
        Ok(present)
    }

    /// Writes the tags of the `tags.len()` pages of 4 KiB from `ipa` on. Data stay as they are.
    ///
    /// # Errors
    /// See [`Error`].
    fn write(&self, ipa: u64, tags: &[TagPage]) -> Result<(), Error>;
}

/// The tags of `memory`, which is RAM of `vm`, by the tag mapping if it has one and by the engine's bulk copy otherwise.
pub fn tag_store<V: Vm>(memory: Arc<GuestMemory>, vm: Arc<V>) -> Box<dyn TagStore> {
    #[cfg(target_arch = "aarch64")]
    if let Some(alias) = AliasTags::new(memory.clone()) {
        return Box::new(alias);
    }
    Box::new(CopiedTags::new(memory, vm))
}

/// How many pages there are from `from` to `to`.
fn pages_between(from: u64, to: u64) -> usize {
    ((to - from) / PAGE_SIZE) as usize
}

/// The offset into RAM of `pages` pages at `ipa`.
fn offset_in_ram(memory: &GuestMemory, ipa: u64, pages: usize) -> Result<u64, Error> {
    let outside = || Error::Range { ipa, pages };
    let offset = ipa.checked_sub(RAM_START).ok_or_else(outside)?;
    let size = (pages as u64).checked_mul(PAGE_SIZE).ok_or_else(outside)?;
    let end = offset.checked_add(size).ok_or_else(outside)?;
    if end > memory.size() || !offset.is_multiple_of(PAGE_SIZE) {
        return Err(outside());
    }
    Ok(offset)
}

/// Tags reached by the engine's bulk copy, which knows only whole pages of the host: on a host with
/// pages of 16 or 64 KiB, addresses and counts are multiples of those.
pub struct CopiedTags<V> {
    memory: Arc<GuestMemory>,
    vm: Arc<V>,
}

/// Pages copied by one call: the host holds a lock of the VM meanwhile.
const PAGES_A_CALL: usize = 64;
const GRANULES: usize = PAGE_SIZE as usize / mte::GRANULE_SIZE;

/// As [`offset_in_ram`], of pages that are whole pages of the host.
fn check_host_pages(memory: &GuestMemory, ipa: u64, pages: usize) -> Result<(), Error> {
    let offset = offset_in_ram(memory, ipa, pages)?;
    let host_page = host_page_size();
    let whole = (offset | (pages as u64 * PAGE_SIZE)).is_multiple_of(host_page);
    whole.then_some(()).ok_or(Error::Range { ipa, pages })
}

impl<V: Vm> CopiedTags<V> {
    /// Tags of `memory`, which is RAM of `vm`.
    pub fn new(memory: Arc<GuestMemory>, vm: Arc<V>) -> Self {
        Self { memory, vm }
    }
}

impl<V: Vm> TagStore for CopiedTags<V> {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn read_populated(&self, mut ipa: u64, tags: &mut [TagPage]) -> Result<(), Error> {
        check_host_pages(&self.memory, ipa, tags.len())?;
        let mut buffer = [0; PAGES_A_CALL * GRANULES];
        for chunk in tags.chunks_mut(PAGES_A_CALL) {
            let bytes = &mut buffer[..chunk.len() * GRANULES];
            copy_whole(ipa, bytes.len(), |ipa, done| {
                self.vm.copy_tags_from_guest(ipa, &mut bytes[done..])
            })?;
            for (page, tags) in chunk.iter_mut().zip(bytes.as_chunks::<GRANULES>().0) {
                *page = TagPage::pack(tags);
            }
            ipa += chunk.len() as u64 * PAGE_SIZE;
        }
        Ok(())
    }

    fn write(&self, mut ipa: u64, tags: &[TagPage]) -> Result<(), Error> {
        check_host_pages(&self.memory, ipa, tags.len())?;
        for chunk in tags.chunks(PAGES_A_CALL) {
            let bytes: Vec<u8> = chunk.iter().flat_map(TagPage::unpack).collect();
            copy_whole(ipa, bytes.len(), |ipa, done| {
                self.vm.copy_tags_to_guest(ipa, &bytes[done..])
            })?;
            ipa += chunk.len() as u64 * PAGE_SIZE;
        }
        Ok(())
    }
}

/// Calls `copy` until all `granules` tags from `ipa` on are copied: the host may stop short, and
/// says why only when it is asked for the rest.
fn copy_whole(
    ipa: u64,
    granules: usize,
    mut copy: impl FnMut(u64, usize) -> engine::TagCopyResult,
) -> Result<(), Error> {
    let mut done = 0;
    while done < granules {
        let at = ipa + (done * mte::GRANULE_SIZE) as u64;
        match copy(at, done)? as usize / mte::GRANULE_SIZE {
            0 => return Err(TagCopyError::NoMemory { ipa: at }.into()),
            copied => done += copied,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryPlan;

    fn memory() -> GuestMemory {
        let plan = MemoryPlan {
            memory_file: true,
            huge_pages: false,
            tags: None,
        };
        GuestMemory::new(16 * PAGE_SIZE, plan).unwrap()
    }

    #[test]
    fn only_whole_pages_of_ram_have_an_offset() {
        let memory = memory();
        let offset = |ipa, pages| offset_in_ram(&memory, ipa, pages).ok();
        assert_eq!(offset(RAM_START, 16), Some(0));
        assert_eq!(offset(RAM_START + 15 * PAGE_SIZE, 1), Some(15 * PAGE_SIZE));
        assert_eq!(offset(RAM_START, 17), None);
        assert_eq!(offset(RAM_START + 8, 1), None);
        assert_eq!(offset(RAM_START - PAGE_SIZE, 1), None);
        assert_eq!(offset(u64::MAX - 4095, usize::MAX), None);
    }

    #[test]
    fn a_copy_that_stops_short_is_continued_where_it_stopped() {
        let mut calls = Vec::new();
        copy_whole(0x1000, 3 * GRANULES, |ipa, done| {
            calls.push((ipa, done));
            Ok(PAGE_SIZE)
        })
        .unwrap();
        assert_eq!(
            calls,
            [(0x1000, 0), (0x2000, GRANULES), (0x3000, 2 * GRANULES)]
        );
    }

    #[test]
    fn a_copy_that_makes_no_progress_is_an_error_and_not_an_endless_loop() {
        assert!(copy_whole(0x1000, GRANULES, |_, _| Ok(0)).is_err());
    }
}
