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
    Private(PageMap),
    /// A clone has the pages of its base, and in their place or beside them its own.
    Clone {
        /// The memory file that it shares.
        base: File,
        /// Its own.
        own: PageMap,
    },
}

impl Populated {
    /// The first populated range in `range`, which is whole pages; `None` if all of it is a hole.
    ///
    /// # Errors
    /// What the host said.
    pub(super) fn first_in(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        match self {
            Self::File(file) => first_data(file, range),
            Self::Private(pages) => pages.first_in(range),
            Self::Clone { base, own } => {
                let Some(mut found) = first_of_either(base, own, range.clone())? else {
                    return Ok(None);
                };
                while let Some(next) = first_of_either(base, own, found.end..range.end)?
                    && next.start == found.end
                {
                    found.end = next.end;
                }
                Ok(Some(found))
            }
        }
    }

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
            // What is taken away from a clone is the base's again.
            Self::Clone { .. } => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// A range that begins where the first one of `base` or `own` does, and may end before they do.
fn first_of_either(
    base: &File,
    own: &PageMap,
    range: Range<u64>,
) -> io::Result<Option<Range<u64>>> {
    let shared = first_data(base, range.clone())?;
    let before = range.start..shared.as_ref().map_or(range.end, |shared| shared.start);
    Ok(own.first_in(before)?.or(shared))
}

/// By `SEEK_DATA` and `SEEK_HOLE` (`lseek(2)`). The file's position, which they move, means nothing here.
pub(super) fn first_data(file: &File, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(range.start)) {
        Ok(start) if start < range.end => start,
        // Beyond the last data of the file.
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(Some(start..end.min(range.end)))
}

/// The kernel's list of the pages of private memory, which any process may read of itself (Linux
/// `Documentation/admin-guide/mm/pagemap.rst`).
pub(super) struct PageMap {
    /// `/proc/self/pagemap`.
    file: File,
    /// Where the memory is mapped.
    address: u64,
    /// The host's page size.
    page_size: u64,
}

impl PageMap {
    /// Of memory mapped at `address`.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub(super) fn of(address: u64, page_size: u64) -> io::Result<Self> {
        let file = File::open("/proc/self/pagemap")?;
        Ok(Self {
            file,
            address,
            page_size,
        })
    }

    /// The first range of pages in `range` that are present or swapped out.
    fn first_in(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        const ENTRY: usize = 8;
        const POPULATED: u64 = 0b11 << 62;
        let page_size = self.page_size;
        let mut entries = [0; 512 * ENTRY];
        let mut found: Option<Range<u64>> = None;
        let mut at = range.start - range.start % page_size;
        while at < range.end {
            let pages = (range.end - at).div_ceil(page_size).min(512) as usize;
            let entries = &mut entries[..pages * ENTRY];
            let entry = (self.address + at) / page_size * ENTRY as u64;
            self.file.read_exact_at(entries, entry)?;
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
}

fn clip(found: Range<u64>, range: &Range<u64>) -> Range<u64> {
    found.start.max(range.start)..found.end.min(range.end)
}
