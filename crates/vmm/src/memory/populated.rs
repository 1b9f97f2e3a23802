//! Which pages of guest memory exist: that somebody wrote or touched, be they in memory or swapped out.
//!
//! All others are holes. They hold zeroes and no tags, and reading them would make the host give them
//! pages: so whoever reads all of a guest's memory asks here first. A guest that runs can populate a page
//! right afterwards; its dirty log then says so.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

/// Finds the populated ranges of guest memory, in bytes from its start.
pub(super) enum Populated {
    /// A memory file knows its holes.
    File(File),
    /// Private memory has its pages listed by the kernel.
    Private {
        /// `/proc/self/pagemap`.
        page_map: File,
        /// Where the memory is mapped.
        address: u64,
        /// The host's page size.
        page_size: u64,
    },
}

impl Populated {
    /// Of private memory mapped at `address`.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub(super) fn of_private(address: u64, page_size: u64) -> io::Result<Self> {
        let page_map = File::open("/proc/self/pagemap")?;
        Ok(Self::Private {
            page_map,
            address,
            page_size,
        })
    }

    /// The first populated range in `range`, which is whole pages; `None` if all of it is a hole.
    ///
    /// # Errors
    /// What the host said.
    pub(super) fn first_in(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        match self {
            Self::File(file) => first_data(file, range),
            Self::Private {
                page_map,
                address,
                page_size,
            } => first_mapped(page_map, *address, *page_size, range),
        }
    }
}

impl Populated {
    /// Takes the pages of `range`, which is bytes from the start of the memory mapped at `mapping`, away.
    ///
    /// # Errors
    /// What the host said.
    pub(super) fn discard(&self, mapping: NonNull<u8>, range: Range<u64>) -> io::Result<()> {
        let length = range.end - range.start;
        match self {
            Self::File(file) => {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                Ok(rustix::fs::fallocate(file, hole, range.start, length)?)
            }
            Self::Private { .. } => {
                // SAFETY: the range is within the mapping, which is guest memory: its bytes may change at any time.
                let result = unsafe {
                    let first = mapping.as_ptr().add(range.start as usize);
                    libc::madvise(first.cast(), length as usize, libc::MADV_DONTNEED)
                };
                if result != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            }
        }
    }
}

/// By `SEEK_DATA` and `SEEK_HOLE` (`lseek(2)`). The file's position, which they move, means nothing here.
fn first_data(file: &File, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(range.start)) {
        Ok(start) if start < range.end => start,
        // Beyond the last data of the file.
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(Some(start..end.min(range.end)))
}

/// By the bits "present" and "swapped" of `/proc/self/pagemap` (Linux
/// `Documentation/admin-guide/mm/pagemap.rst`), which any process may read of itself.
fn first_mapped(
    page_map: &File,
    address: u64,
    page_size: u64,
    range: Range<u64>,
) -> io::Result<Option<Range<u64>>> {
    const ENTRY: usize = 8;
    const POPULATED: u64 = 0b11 << 62;
    let mut entries = [0; 512 * ENTRY];
    let mut found: Option<Range<u64>> = None;
    let mut at = range.start - range.start % page_size;
    while at < range.end {
        let pages = (range.end - at).div_ceil(page_size).min(512) as usize;
        let entries = &mut entries[..pages * ENTRY];
        page_map.read_exact_at(entries, (address + at) / page_size * ENTRY as u64)?;
        for entry in entries.as_chunks::<ENTRY>().0 {
            let populated = u64::from_ne_bytes(*entry) & POPULATED != 0;
            match (&mut found, populated) {
                (None, true) => found = Some(at..at + page_size),
                (Some(found), true) => found.end = at + page_size,
                (Some(_), false) => return Ok(found.map(|found| clip(found, &range))),
                (None, false) => {}
            }
            at += page_size;
        }
    }
    Ok(found.map(|found| clip(found, &range)))
}

fn clip(found: Range<u64>, range: &Range<u64>) -> Range<u64> {
    found.start.max(range.start)..found.end.min(range.end)
}
