//! Host memory for the guests of KVM: made, replaced, looked behind, swapped out.
//!
//! A mapping has inaccessible pages before and behind it, so that the kernel does not join it with
//! others: what `/proc/self/smaps` says of it is of it alone. It is of small pages.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use crate::{Backing, Mapping, PAGE, Stop, require};

const PROT_MTE: libc::c_int = 0x20;
const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const PAGE_BYTES: usize = PAGE as usize;
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// How often the kernel is asked to swap pages out that it does not let go at once: those that wait
/// in a list of another processor's to be put among the reclaimable.
const ATTEMPTS: usize = 2000;

/// A file of memory, or of something else.
pub struct File(fs::File);

impl File {
    /// A memory file of so many pages, all of them holes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn in_memory(pages: usize) -> io::Result<Self> {
        Self::memfd(0, pages * PAGE_BYTES)
    }

    fn memfd(flags: libc::c_uint, size: usize) -> io::Result<Self> {
        // SAFETY: the name is a C string; the call has no other demands.
        let fd = unsafe { libc::memfd_create(c"conformance".as_ptr(), flags | libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        let file = fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(size as u64)?;
        Ok(Self(file))
    }

    /// A file that is on no tmpfs: this program.
    fn on_disk(pages: usize) -> Result<Self, Stop> {
        let file = fs::File::open("/proc/self/exe")?;
        // SAFETY: the structure may hold any bytes.
        let mut status: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open, and the structure is this call's.
        if unsafe { libc::fstatfs(file.as_raw_fd(), &mut status) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
        require(
            status.f_type != libc::TMPFS_MAGIC && file.metadata()?.len() >= pages as u64 * PAGE,
            "this program is no file on a disk",
        )?;
        Ok(Self(file))
    }
}

/// A mapping of host memory.
pub struct HostMapping {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: it is a mapping of the process, not of a thread; data are accessed by volatile operations.
unsafe impl Send for HostMapping {}
// SAFETY: as above.
unsafe impl Sync for HostMapping {}

impl HostMapping {
    /// Maps `backing`.
    ///
    /// # Errors
    /// The kernel refuses, or has no such memory.
    pub fn new(backing: &Backing<'_, File>, pages: usize) -> Result<Self, Stop> {
        if let Backing::HugePages = backing {
            return Self::of_huge_page();
        }
        let mapping = Self::reserve(pages * PAGE_BYTES)?;
        mapping.replace(0, backing)?;
        Ok(mapping)
    }

    /// Anonymous memory with tags.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn tagged(pages: usize) -> io::Result<Self> {
        let mapping = Self::reserve(pages * PAGE_BYTES)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        mapping.map_over(0, READ_WRITE | PROT_MTE, flags, -1, 0)?;
        Ok(mapping)
    }

    /// A page of a memory file, with tags.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn of_tags(file: &File, page: usize) -> io::Result<Self> {
        let mapping = Self::reserve(PAGE_BYTES)?;
        let (fd, offset) = (file.0.as_raw_fd(), page * PAGE_BYTES);
        mapping.map_over(0, READ_WRITE | PROT_MTE, libc::MAP_SHARED, fd, offset)?;
        Ok(mapping)
    }

    /// A page whose last bytes are these, with nothing behind.
    ///
    /// # Errors
    /// What the kernel says.
    ///
    /// # Panics
    /// They are more than a page.
    pub fn ending_in(bytes: &[u8]) -> Result<Self, Stop> {
        let mapping = Self::new(&Backing::Anonymous, 1)?;
        let first = PAGE_BYTES
            .checked_sub(bytes.len())
            .expect("no more than a page");
        // SAFETY: the bytes end where the page does, and nobody else has it.
        unsafe {
            let to = mapping.start().add(first);
            to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        Ok(mapping)
    }

    fn of_huge_page() -> Result<Self, Stop> {
        let flags = libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
        let file = File::memfd(flags, HUGE_PAGE_BYTES)
            .map_err(|e| Stop::Skip(format!("no huge pages on this host: {e}")))?;
        // SAFETY: a new mapping where the kernel likes replaces nothing.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                HUGE_PAGE_BYTES,
                READ_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.0.as_raw_fd(),
                0,
            )
        };
        Self::mapped(start, HUGE_PAGE_BYTES).map_err(Stop::from)
    }

    /// Room for a mapping, between two pages that are never anything.
    fn reserve(size: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel likes replaces nothing.
        let room = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size + 2 * PAGE_BYTES,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        if room == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Self::mapped(room.wrapping_byte_add(PAGE_BYTES), size)
    }

    fn mapped(start: *mut libc::c_void, size: usize) -> io::Result<Self> {
        match NonNull::new(start.cast()) {
            Some(first) if start != libc::MAP_FAILED => Ok(Self { start: first, size }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The first byte.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Maps `backing` in place of the pages from `first` on.
    ///
    /// # Errors
    /// The kernel refuses, or has no such memory.
    pub fn replace(&self, first: usize, backing: &Backing<'_, File>) -> Result<(), Stop> {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let pages = self.size / PAGE_BYTES - first;
        match backing {
            Backing::Anonymous => self.map_over(first, READ_WRITE, anonymous, -1, 0)?,
            Backing::Shared(file) => {
                self.map_over(first, READ_WRITE, libc::MAP_SHARED, file.0.as_raw_fd(), 0)?;
            }
            Backing::Private(file) => {
                self.map_over(first, READ_WRITE, libc::MAP_PRIVATE, file.0.as_raw_fd(), 0)?;
            }
            Backing::Disk => {
                let file = File::on_disk(pages)?;
                self.map_over(first, READ_WRITE, libc::MAP_PRIVATE, file.0.as_raw_fd(), 0)?;
            }
            Backing::Nothing => self.map_over(first, libc::PROT_NONE, anonymous, -1, 0)?,
            Backing::HugePages => {
                return Err(Stop::Skip(
                    "huge pages cannot stand in place of small ones".to_owned(),
                ));
            }
        }
        Ok(())
    }

    fn map_over(
        &self,
        first: usize,
        protection: libc::c_int,
        flags: libc::c_int,
        fd: libc::c_int,
        offset: usize,
    ) -> io::Result<()> {
        let address = self.start().wrapping_add(first * PAGE_BYTES);
        let size = self.size - first * PAGE_BYTES;
        // SAFETY: what is replaced is part of this mapping, to which there are no references.
        let mapped = unsafe {
            libc::mmap(
                address.cast(),
                size,
                protection,
                flags | libc::MAP_FIXED,
                fd,
                offset as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range is the one just mapped; the advice changes no contents.
        match unsafe { libc::madvise(mapped, size, libc::MADV_NOHUGEPAGE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Writes a word.
    ///
    /// # Panics
    /// It is not within the mapping.
    pub fn write(&self, offset: u64, value: u64) {
        assert!(offset.is_multiple_of(8) && offset < self.size as u64);
        // SAFETY: an aligned word of the mapping.
        unsafe {
            self.start()
                .add(offset as usize)
                .cast::<u64>()
                .write_volatile(value)
        };
    }

    /// Reads a word.
    ///
    /// # Panics
    /// It is not within the mapping.
    pub fn read(&self, offset: u64) -> u64 {
        assert!(offset.is_multiple_of(8) && offset < self.size as u64);
        // SAFETY: an aligned word of the mapping.
        unsafe {
            self.start()
                .add(offset as usize)
                .cast::<u64>()
                .read_volatile()
        }
    }

    /// The numbers of the physical pages behind it (Linux `admin-guide/mm/pagemap.rst`).
    ///
    /// # Errors
    /// This process may not know them.
    pub fn frames(&self) -> Result<Vec<Option<u64>>, Stop> {
        const PRESENT: u64 = 1 << 63;
        const NUMBER: u64 = (1 << 55) - 1;
        let first = self.start.addr().get() as u64 / PAGE;
        let mut words = vec![0; self.size / PAGE_BYTES * 8];
        let mut pagemap = fs::File::open("/proc/self/pagemap")?;
        pagemap.seek(SeekFrom::Start(first * 8))?;
        pagemap.read_exact(&mut words)?;
        let (words, _) = words.as_chunks();
        let frames: Vec<Option<u64>> = words
            .iter()
            .map(|word| u64::from_ne_bytes(*word))
            .map(|entry| (entry & PRESENT != 0).then_some(entry & NUMBER))
            .collect();
        // Who lacks CAP_SYS_ADMIN is told that all of them are page 0.
        let told = frames.iter().flatten().all(|number| *number != 0);
        require(told, "only root is told which physical pages are whose")?;
        Ok(frames)
    }

    /// Asks the kernel to swap it out.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn page_out(&self) -> io::Result<()> {
        // SAFETY: the range is the mapping's; the advice changes no contents.
        match unsafe { libc::madvise(self.start().cast(), self.size, libc::MADV_PAGEOUT) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Swaps all of it out.
    ///
    /// # Errors
    /// There is nowhere to swap to, or the kernel will not.
    pub fn swap_out(&self) -> Result<(), Stop> {
        require_swap()?;
        for _ in 0..ATTEMPTS {
            self.page_out()?;
            if self.resident_kib()? == 0 {
                return Ok(());
            }
            std::thread::yield_now();
        }
        Err(Stop::Fail(format!(
            "{} KiB do not leave memory",
            self.resident_kib()?
        )))
    }

    fn resident_kib(&self) -> Result<u64, Stop> {
        let smaps = fs::read_to_string("/proc/self/smaps")?;
        let header = format!("{:x}-", self.start.addr());
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&header));
        let resident = lines
            .find_map(|line| line.strip_prefix("Rss:"))
            .and_then(|text| text.trim().strip_suffix("kB"))
            .and_then(|kib| kib.trim().parse().ok());
        resident.ok_or_else(|| Stop::Fail("/proc/self/smaps is not understood".to_owned()))
    }
}

/// Skips what needs swap on a host that has none.
///
/// # Errors
/// [`Stop::Skip`].
pub fn require_swap() -> Result<(), Stop> {
    // The first line is a heading.
    let swaps = fs::read_to_string("/proc/swaps")?;
    require(swaps.lines().count() > 1, "this host has no swap")
}

impl Mapping for HostMapping {
    fn address(&self) -> NonNull<u8> {
        self.start
    }

    fn size(&self) -> u64 {
        self.size as u64
    }
}

impl Drop for HostMapping {
    fn drop(&mut self) {
        let (start, size) = if self.size == HUGE_PAGE_BYTES {
            (self.start(), self.size)
        } else {
            (
                self.start().wrapping_sub(PAGE_BYTES),
                self.size + 2 * PAGE_BYTES,
            )
        };
        // SAFETY: mapped by this type with this size, and nothing refers to it any more.
        unsafe { libc::munmap(start.cast(), size) };
    }
}
