//! Tagged memory.

use std::io;
use std::ptr::{self, NonNull};

use mte::PageSize;

const PROT_MTE: libc::c_int = 0x20;

/// Private anonymous memory mapped with `PROT_MTE`: zeros, with tag 0. Given back when dropped.
///
/// It is mapped in small pages, so that a page which is never touched is never populated.
pub struct TaggedMemory {
    start: NonNull<u8>,
    pages: usize,
}

// SAFETY: it is a mapping of the process, not of a thread; who accesses it answers for that.
unsafe impl Send for TaggedMemory {}
// SAFETY: as above: its methods change nothing.
unsafe impl Sync for TaggedMemory {}

impl TaggedMemory {
    /// Maps this many pages of 4 KiB.
    ///
    /// # Errors
    /// What the kernel answers to mmap or madvise.
    pub fn new(pages: usize) -> io::Result<Self> {
        let length = pages * PageSize::Kib4.bytes();
        let protection = libc::PROT_READ | libc::PROT_WRITE | PROT_MTE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let memory = Self { start, pages };
        // SAFETY: the range is the mapping made above.
        if unsafe { libc::madvise(start.as_ptr().cast(), length, libc::MADV_NOHUGEPAGE) } != 0 {
            let error = io::Error::last_os_error();
            // A kernel without huge pages says EINVAL.
            if error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
        }
        Ok(memory)
    }

    /// Its first byte; the address has tag 0.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// How many pages of 4 KiB it has.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The first byte of a page.
    ///
    /// # Panics
    /// There is no such page.
    pub fn page(&self, index: usize) -> *mut u8 {
        assert!(index < self.pages, "page {index} of {}", self.pages);
        self.start().wrapping_add(index * PageSize::Kib4.bytes())
    }
}

impl Drop for TaggedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and nobody can reach it after this.
        unsafe { libc::munmap(self.start().cast(), self.pages * PageSize::Kib4.bytes()) };
    }
}
