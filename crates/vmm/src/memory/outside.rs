//! A machine's memory, read by another process that has its memory file.
//!
//! Data are read by `pread`, tags by LDG through a mapping of the reader's own, which is `PROT_MTE` and read-only. Neither the
//! machine nor its VMM is asked for anything, and a file that is opened read-only lets nothing be changed.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
#[cfg(target_arch = "aarch64")]
use std::sync::{Mutex, PoisonError};

use mte::TagPage;
use stream::{Metadata, Page, PageSource};

#[cfg(target_arch = "aarch64")]
use super::TagMapping;
use super::populated::first_data;
use crate::layout::{PAGE_SIZE, RAM_START};

/// The memory of a machine that runs in another process.
pub struct MemoryFile {
    file: File,
    /// Bytes.
    size: u64,
    tags: Option<Tags>,
}

impl MemoryFile {
    /// The first `size` bytes of a machine's memory file, with tags or without.
    ///
    /// # Errors
    /// The file is smaller; this host has no MTE for programs, or cannot map.
    pub fn new(file: File, size: u64, tags: bool) -> io::Result<Self> {
        if file.metadata()?.len() < size {
            let why = "the memory file is smaller than the machine's memory";
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let tags = tags.then(|| Tags::of(&file, size)).transpose()?;
        Ok(Self { file, size, tags })
    }

    /// Where pages are in the file.
    fn offset(&self, first: u64, count: usize) -> io::Result<u64> {
        let outside = || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is no memory of the machine",
            )
        };
        let offset = first.checked_sub(RAM_START / PAGE_SIZE);
        let offset = offset.and_then(|page| page.checked_mul(PAGE_SIZE));
        let offset = offset.ok_or_else(outside)?;
        let end = offset.checked_add(count as u64 * PAGE_SIZE);
        end.filter(|end| *end <= self.size).ok_or_else(outside)?;
        Ok(offset)
    }
}

impl PageSource for MemoryFile {
    fn metadata(&self) -> Metadata {
        match self.tags {
            Some(_) => Metadata::ArmMte,
            None => Metadata::None,
        }
    }

    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let first = RAM_START / PAGE_SIZE;
        let start = from.saturating_sub(first).saturating_mul(PAGE_SIZE);
        if start >= self.size {
            return Ok(None);
        }
        let run = first_data(&self.file, start..self.size)?;
        Ok(run.map(|run| first + run.start / PAGE_SIZE..first + run.end / PAGE_SIZE))
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        let offset = self.offset(first, data.len().max(tags.len()))?;
        self.file.read_exact_at(data.as_flattened_mut(), offset)?;
        match &self.tags {
            Some(store) => store.read(offset, tags),
            None => Ok(()),
        }
    }

    fn read_tags(&self, first: u64, tags: &mut [TagPage]) -> io::Result<()> {
        self.read(first, &mut [], tags)
    }
}

/// The tags of a memory file. Of all of it a window is mapped, so that neither what is mapped nor the tables for it grow with
/// the machine.
#[cfg(target_arch = "aarch64")]
struct Tags {
    file: File,
    size: u64,
    window: Mutex<Option<Window>>,
    instructions: mte::aarch64::Instructions,
}

#[cfg(target_arch = "aarch64")]
struct Window {
    start: u64,
    mapping: TagMapping,
}

#[cfg(target_arch = "aarch64")]
impl Tags {
    /// Bytes of a window: a multiple of every page.
    const WINDOW: u64 = 16 << 20;

    fn of(file: &File, size: u64) -> io::Result<Self> {
        Ok(Self {
            file: file.try_clone()?,
            size,
            window: Mutex::default(),
            instructions: super::tags::instructions().ok_or_else(no_mte)?,
        })
    }

    /// Those of the pages at `offset`, which are within the file and populated.
    fn read(&self, mut offset: u64, mut tags: &mut [TagPage]) -> io::Result<()> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        while !tags.is_empty() {
            let start = offset / Self::WINDOW * Self::WINDOW;
            let window = match &mut *window {
                Some(window) if window.start == start => window,
                other => {
                    // Before the next one is there.
                    *other = None;
                    let part = start..self.size.min(start + Self::WINDOW);
                    let mapping = TagMapping::read_only(&self.file, part)?;
                    other.insert(Window { start, mapping })
                }
            };
            let left = window.mapping.size() as u64 - (offset - start);
            let count = tags.len().min((left / PAGE_SIZE) as usize);
            let (now, later) = std::mem::take(&mut tags).split_at_mut(count);
            // SAFETY: `now` are whole pages of the window, which is `PROT_MTE` and stays while it is locked. LDG faults on none
            // of them: the file is at least as large, and nobody but its VMM could cut it, which never does.
            unsafe {
                let first = window
                    .mapping
                    .address()
                    .as_ptr()
                    .add((offset - start) as usize);
                self.instructions.read_tag_pages(first, now);
            }
            offset += count as u64 * PAGE_SIZE;
            tags = later;
        }
        Ok(())
    }
}

/// There are no tags to be had elsewhere.
#[cfg(not(target_arch = "aarch64"))]
struct Tags;

#[cfg(not(target_arch = "aarch64"))]
impl Tags {
    fn of(_: &File, _: u64) -> io::Result<Self> {
        Err(no_mte())
    }

    fn read(&self, _: u64, _: &mut [TagPage]) -> io::Result<()> {
        Err(no_mte())
    }
}

fn no_mte() -> io::Error {
    let why = "the machine's memory has tags, and programs have no MTE here";
    io::Error::new(io::ErrorKind::Unsupported, why)
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;

    use super::*;

    const FIRST: u64 = RAM_START / PAGE_SIZE;

    /// 16 pages, of which 4 and 5 are populated.
    fn memory() -> MemoryFile {
        // Of small pages, whatever the host makes the memory of guests of.
        let file = File::from(rustix::fs::memfd_create("outside", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(16 * PAGE_SIZE).unwrap();
        file.write_all_at(&[7; 2 * PAGE_SIZE as usize], 4 * PAGE_SIZE)
            .unwrap();
        MemoryFile::new(file, 16 * PAGE_SIZE, false).unwrap()
    }

    fn first_byte(memory: &MemoryFile, page: u64) -> io::Result<u8> {
        let mut data = [[0xff; PAGE_SIZE as usize]];
        memory.read(page, &mut data, &mut [])?;
        Ok(data[0][0])
    }

    #[test]
    fn only_populated_pages_are_in_runs_and_reading_others_does_not_populate_them() {
        let memory = memory();
        assert_eq!(first_byte(&memory, FIRST).unwrap(), 0);
        assert_eq!(first_byte(&memory, FIRST + 5).unwrap(), 7);
        assert_eq!(memory.next_run(0).unwrap(), Some(FIRST + 4..FIRST + 6));
        assert_eq!(
            memory.next_run(FIRST + 5).unwrap(),
            Some(FIRST + 5..FIRST + 6)
        );
        assert_eq!(memory.next_run(FIRST + 6).unwrap(), None);
        assert_eq!(memory.next_run(u64::MAX).unwrap(), None);
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        let memory = memory();
        for page in [0, FIRST - 1, FIRST + 16, u64::MAX] {
            let refused = first_byte(&memory, page).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
