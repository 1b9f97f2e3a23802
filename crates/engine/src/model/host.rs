//! The model's host: memory files, and the address space of the process that is the VMM.
//!
//! [`ModelHost`] does what Linux does for a process: maps, replaces and unmaps, gives pages when
//! they are first touched, copies private pages when they are written, swaps. Its addresses are no
//! real ones: they begin at [`FIRST_ADDRESS`], where no process has memory, so a memslot can name
//! either memory of the model or real memory of this process, and which it is shows in the address.
//!
//! Real memory ([`ModelHost::adopt`]) keeps its data where they are. The model holds its tags, by
//! address: what is mapped twice has two sets of tags. Who maps what there is between the process
//! and its own host, and the model neither knows nor checks it.
//!
//! An access holds the address space for reading all the while. So once memory was unmapped or
//! replaced no access to it is under way, which on Linux the MMU notifiers see to.

use std::collections::BTreeMap;
use std::io;
use std::num::NonZero;
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use mte::{GRANULE_SIZE, Tag};

use super::HostRules;
use super::frame::{Frame, FramePool, PAGE_SIZE};
use super::page::{HostPage, OutOfMemory, SwapOut, TagStorage};
use super::sync;

/// The lowest address of the model's host: above what any process has, below what tags reach.
pub const FIRST_ADDRESS: u64 = 1 << 60;

/// What a memory file is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// Memory alone: a memfd, or a file on tmpfs.
    Memory,
    /// Reserved huge pages of memory (hugetlbfs).
    HugePages,
    /// A disk's file system, whose pages cannot hold a guest's tags.
    Disk,
}

/// A file that can be mapped.
#[derive(Clone)]
pub struct MemoryFile {
    kind: FileKind,
    pages: Arc<[HostPage]>,
}

impl MemoryFile {
    /// A file of `pages` pages, all of them holes.
    pub fn new(kind: FileKind, pages: usize) -> Self {
        Self {
            kind,
            pages: (0..pages).map(|_| HostPage::default()).collect(),
        }
    }

    /// Makes `pages` pages from `first` on holes again (`FALLOC_FL_PUNCH_HOLE`).
    ///
    /// # Panics
    /// The file is shorter.
    pub fn punch_hole(&self, first: usize, pages: usize) {
        self.pages[first..first + pages]
            .iter()
            .for_each(HostPage::discard);
    }
}

/// What a mapping shows.
#[derive(Clone)]
pub enum Backing {
    /// Memory of the process alone.
    Anonymous,
    /// A file from this page on, shared with all others who map it.
    Shared(MemoryFile, usize),
    /// A file from this page on, until the process writes: then a copy.
    Private(MemoryFile, usize),
}

impl Backing {
    fn file(&self) -> Option<(&MemoryFile, usize)> {
        match self {
            Self::Anonymous => None,
            Self::Shared(file, first) | Self::Private(file, first) => Some((file, *first)),
        }
    }
}

/// Whether the process can reach a mapping's tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// It cannot. That goes for the process: a guest's access is another matter.
    Plain,
    /// It can, and its accesses may be tag-checked (`PROT_MTE`).
    Tagged,
}

/// Why an access failed: no mapping, none that a guest with MTE may have, or no memory (`EFAULT`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HostFault;

impl From<OutOfMemory> for HostFault {
    fn from(_: OutOfMemory) -> Self {
        Self
    }
}

/// What an access does to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    Read,
    Write,
}

/// A page as an access finds it.
pub(super) enum Found {
    Frame(sync::Arc<Frame>),
    /// The page of zeros that stands for all private pages that nobody wrote. Its tags are 0.
    Zeros,
}

/// Mapped memory, in one piece when it was mapped.
pub(super) struct Area {
    backing: Backing,
    protection: Protection,
    /// Where the data are, if they are in real memory of this process.
    real: Option<NonNull<u8>>,
    /// The area's own pages: all of them unless it shows a file shared.
    own: Box<[HostPage]>,
}

// SAFETY: the pointer is only given to `Frame::real`, whose accesses allow for concurrency.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    fn new(backing: Backing, protection: Protection, pages: usize) -> Self {
        let own = if matches!(backing, Backing::Shared(..)) {
            0
        } else {
            pages
        };
        Self {
            backing,
            protection,
            real: None,
            own: (0..own).map(|_| HostPage::default()).collect(),
        }
    }

    /// Whether a guest with MTE may have it (Linux's `VM_MTE_ALLOWED`; until 6.1 all but `VM_SHARED`).
    fn may_hold_tags(&self, rules: &HostRules) -> bool {
        let kind = self.backing.file().map(|(file, _)| file.kind);
        let shared = matches!(self.backing, Backing::Shared(..));
        let of_this_kind = match kind {
            None | Some(FileKind::Memory) => true,
            Some(FileKind::HugePages) => rules.huge_pages,
            Some(FileKind::Disk) => rules.private_disk_files,
        };
        of_this_kind && (rules.shared_memory || !shared)
    }

    /// The page that the access finds, made if need be.
    fn find(&self, page: usize, touch: Touch, pool: &Arc<FramePool>) -> Result<Found, OutOfMemory> {
        let allocate = || pool.allocate();
        if let Some(first) = self.real {
            return self.find_real(page, first);
        }
        let frame = match (&self.backing, touch) {
            (Backing::Anonymous, Touch::Read) => match self.own[page].find(allocate)? {
                Some(frame) => frame,
                None => return Ok(Found::Zeros),
            },
            (Backing::Anonymous, Touch::Write) => self.own[page].find_or_fill(allocate, |_| ())?,
            (Backing::Shared(file, first), _) => {
                file.pages[first + page].find_or_fill(allocate, |_| ())?
            }
            (Backing::Private(file, first), _) => {
                let original = &file.pages[first + page];
                self.find_private(page, touch, original, pool)?
            }
        };
        Ok(Found::Frame(frame))
    }

    fn find_private(
        &self,
        page: usize,
        touch: Touch,
        original: &HostPage,
        pool: &Arc<FramePool>,
    ) -> Result<sync::Arc<Frame>, OutOfMemory> {
        let allocate = || pool.allocate();
        if let Some(copy) = self.own[page].find(allocate)? {
            return Ok(copy);
        }
        let original = original.find_or_fill(allocate, |_| ())?;
        match touch {
            Touch::Read => Ok(original),
            Touch::Write => self.own[page].find_or_fill(allocate, |copy| copy.copy_from(&original)),
        }
    }

    fn find_real(&self, page: usize, first: NonNull<u8>) -> Result<Found, OutOfMemory> {
        let make = || {
            // SAFETY: within the range that `adopt`'s caller vouched for, since the area has a page
            // for each of the range.
            let address = unsafe { first.add(page * PAGE_SIZE as usize) };
            // SAFETY: that caller also vouched for how it is accessed, and for it to stay as long as
            // the area, of which this frame is a part.
            Some(unsafe { Frame::real(address) })
        };
        let frame = self.own[page].find_or_fill(make, |_| ())?;
        Ok(Found::Frame(frame))
    }
}

/// A piece of an area in the address space.
#[derive(Clone)]
struct Vma {
    pages: usize,
    area: Arc<Area>,
    /// The page of the area with which it begins.
    first: usize,
}

/// What is mapped where, by number of page.
struct AddressSpace {
    vmas: BTreeMap<u64, Vma>,
    next: u64,
}

impl AddressSpace {
    /// The area at a page, and the page's index in it.
    fn find(&self, page: u64) -> Option<(&Arc<Area>, usize)> {
        let (start, vma) = self.vmas.range(..=page).next_back()?;
        let index = usize::try_from(page - start).ok()?;
        (index < vma.pages).then_some((&vma.area, vma.first + index))
    }

    fn unmap(&mut self, first: u64, pages: usize) {
        let end = first + pages as u64;
        let touched: Vec<u64> = self
            .vmas
            .range(..end)
            .filter(|(start, vma)| **start + vma.pages as u64 > first)
            .map(|(start, _)| *start)
            .collect();
        for start in touched {
            if let Some(vma) = self.vmas.remove(&start) {
                self.keep_outside(start, &vma, first..end);
            }
        }
    }

    /// Puts back what of `vma` lies outside of the unmapped range, and frees the private pages within.
    fn keep_outside(&mut self, start: u64, vma: &Vma, unmapped: std::ops::Range<u64>) {
        let end = start + vma.pages as u64;
        let piece = |from: u64, to: u64| Vma {
            pages: (to - from) as usize,
            area: Arc::clone(&vma.area),
            first: vma.first + (from - start) as usize,
        };
        if start < unmapped.start {
            self.vmas.insert(start, piece(start, unmapped.start));
        }
        if unmapped.end < end {
            self.vmas.insert(unmapped.end, piece(unmapped.end, end));
        }
        let gone = piece(unmapped.start.max(start), unmapped.end.min(end));
        let own = vma.area.own.iter().skip(gone.first).take(gone.pages);
        own.for_each(HostPage::discard);
    }
}

/// The model's host. Clones are the same host.
#[derive(Clone)]
pub struct ModelHost(Arc<Host>);

struct Host {
    rules: HostRules,
    pool: Arc<FramePool>,
    space: RwLock<AddressSpace>,
    real: RwLock<Vec<RealRange>>,
    swapped_tags: Arc<TagStorage>,
}

/// Adopted memory, as long as somebody holds it.
struct RealRange {
    first: u64,
    pages: usize,
    area: Weak<Area>,
}

/// Real memory of this process whose tags the model keeps.
#[must_use = "the tags go with it, unless a memslot has the memory"]
pub struct AdoptedMemory {
    _area: Arc<Area>,
}

/// What stands behind a memslot.
#[derive(Clone)]
pub(super) enum SlotMemory {
    /// Addresses of the model, whatever is mapped there at the time of an access.
    Mapped,
    /// Real memory: an area, and the slot's first page in it.
    Real(Arc<Area>, usize),
}

impl ModelHost {
    /// A host of this kind.
    pub fn new(rules: HostRules) -> Self {
        Self(Arc::new(Host {
            rules,
            pool: FramePool::new(rules.memory_pages),
            space: RwLock::new(AddressSpace {
                vmas: BTreeMap::new(),
                next: FIRST_ADDRESS / PAGE_SIZE,
            }),
            real: RwLock::default(),
            swapped_tags: TagStorage::new(rules.swapped_tag_pages),
        }))
    }

    /// What kind of host it is.
    pub fn rules(&self) -> &HostRules {
        &self.0.rules
    }

    fn space(&self) -> RwLockReadGuard<'_, AddressSpace> {
        self.0.space.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_space(&self) -> RwLockWriteGuard<'_, AddressSpace> {
        self.0.space.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `pages` pages where nothing is mapped, with an unmapped page behind them.
    ///
    /// # Errors
    /// `InvalidInput`: no page, or the file is shorter.
    pub fn map(
        &self,
        backing: Backing,
        pages: usize,
        protection: Protection,
    ) -> io::Result<NonNull<u8>> {
        let mut space = self.change_space();
        let first = space.next;
        map(&mut space, first, backing, pages, protection)?;
        space.next += pages as u64 + 1;
        Ok(address_of(first))
    }

    /// Maps `pages` pages at `address` in place of what is there (`MAP_FIXED`).
    ///
    /// # Errors
    /// `InvalidInput`: no page, the file is shorter, or `address` is not one that [`map`](Self::map) gave.
    pub fn map_at(
        &self,
        address: NonNull<u8>,
        backing: Backing,
        pages: usize,
        protection: Protection,
    ) -> io::Result<()> {
        let mut space = self.change_space();
        let first = own_range(&space, address, pages)?;
        map(&mut space, first, backing, pages, protection)
    }

    /// Unmaps `pages` pages at `address`. Memory that nobody else has is free then.
    ///
    /// # Errors
    /// `InvalidInput`: `address` is not one that [`map`](Self::map) gave.
    pub fn unmap(&self, address: NonNull<u8>, pages: usize) -> io::Result<()> {
        let mut space = self.change_space();
        let first = own_range(&space, address, pages)?;
        space.unmap(first, pages);
        Ok(())
    }

    /// Makes `pages` pages of real memory at `address` memory that can be a guest's: data stay
    /// there, tags are the model's and begin untagged. A memslot with memory that nobody adopted
    /// adopts it; doing it beforehand keeps the tags when the memslot goes.
    ///
    /// # Errors
    /// `InvalidInput`: no whole pages. `AddrInUse`: memory that is adopted in part.
    ///
    /// # Safety
    /// So much memory is mapped there, readable and writable, and stays until the result is dropped
    /// and no memslot has it. No Rust reference to it exists while a guest or the tag copy may
    /// access it, only accesses that allow for concurrency.
    pub unsafe fn adopt(&self, address: NonNull<u8>, pages: usize) -> io::Result<AdoptedMemory> {
        // SAFETY: the caller vouches for the memory.
        let (area, _) = unsafe { self.adopt_range(address, pages) }?;
        Ok(AdoptedMemory { _area: area })
    }

    /// # Safety
    /// As for [`adopt`](Self::adopt).
    unsafe fn adopt_range(
        &self,
        address: NonNull<u8>,
        pages: usize,
    ) -> io::Result<(Arc<Area>, usize)> {
        let first = page_of(address)?;
        let end = first
            .checked_add(pages as u64)
            .filter(|_| pages > 0)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let mut ranges = self.0.real.write().unwrap_or_else(PoisonError::into_inner);
        ranges.retain(|range| range.area.strong_count() > 0);
        for range in ranges.iter() {
            let (range_end, Some(area)) = (range.first + range.pages as u64, range.area.upgrade())
            else {
                continue;
            };
            if range.first <= first && end <= range_end {
                return Ok((area, (first - range.first) as usize));
            }
            if range.first < end && first < range_end {
                return Err(io::ErrorKind::AddrInUse.into());
            }
        }
        let mut area = Area::new(Backing::Anonymous, Protection::Plain, pages);
        area.real = Some(address);
        let area = Arc::new(area);
        ranges.push(RealRange {
            first,
            pages,
            area: Arc::downgrade(&area),
        });
        Ok((area, 0))
    }

    /// The memory at the `pages` pages from `address` on, as a memslot holds it.
    ///
    /// # Errors
    /// `InvalidInput`, `AddrInUse`: see [`adopt`](Self::adopt).
    ///
    /// # Safety
    /// As for [`adopt`](Self::adopt) if the address is a real one.
    pub(super) unsafe fn memory_of_slot(
        &self,
        address: NonNull<u8>,
        pages: usize,
    ) -> io::Result<SlotMemory> {
        if address.addr().get() as u64 >= FIRST_ADDRESS {
            page_of(address)?;
            return Ok(SlotMemory::Mapped);
        }
        // SAFETY: the caller vouches for the memory.
        let (area, first) = unsafe { self.adopt_range(address, pages) }?;
        Ok(SlotMemory::Real(area, first))
    }

    /// Whether a guest with MTE may have all that is mapped at these pages. Where nothing is mapped
    /// nothing speaks against it, as in Linux.
    pub(super) fn may_hold_tags(&self, address: NonNull<u8>, pages: usize) -> bool {
        let first = address.addr().get() as u64 / PAGE_SIZE;
        let end = first + pages as u64;
        self.space()
            .vmas
            .range(..end)
            .filter(|(start, vma)| **start + vma.pages as u64 > first)
            .all(|(_, vma)| vma.area.may_hold_tags(&self.0.rules))
    }

    /// Does something with page `page` of a memslot that begins at `address`.
    ///
    /// # Errors
    /// Nothing is mapped there, or nothing that `for_tags` allows, or the host has no memory left.
    pub(super) fn with_slot_page<R>(
        &self,
        memory: &SlotMemory,
        address: NonNull<u8>,
        page: usize,
        touch: Touch,
        for_tags: bool,
        access: impl FnOnce(&Found) -> R,
    ) -> Result<R, HostFault> {
        let space;
        let (area, index) = match memory {
            SlotMemory::Real(area, first) => (area, first + page),
            SlotMemory::Mapped => {
                // Held until the access is over.
                space = self.space();
                let number = address.addr().get() as u64 / PAGE_SIZE + page as u64;
                space.find(number).ok_or(HostFault)?
            }
        };
        if for_tags && !area.may_hold_tags(&self.0.rules) {
            return Err(HostFault);
        }
        Ok(access(&area.find(index, touch, &self.0.pool)?))
    }

    /// Does something with the page at `address`, for the process itself.
    fn with_own_page<R>(
        &self,
        address: NonNull<u8>,
        touch: Touch,
        access: impl FnOnce(&Area, &Found) -> R,
    ) -> io::Result<R> {
        let space = self.space();
        let (area, index) = space
            .find(address.addr().get() as u64 / PAGE_SIZE)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let found = area
            .find(index, touch, &self.0.pool)
            .map_err(|OutOfMemory| io::ErrorKind::OutOfMemory)?;
        if let (Protection::Tagged, Found::Frame(frame)) = (area.protection, &found) {
            frame.validate_tags();
        }
        Ok(access(area, &found))
    }

    /// The process, or a device of its, reads memory within a page. Tags are neither checked nor needed.
    ///
    /// # Errors
    /// `InvalidInput`: nothing is mapped there, or the bytes are not within a page. `OutOfMemory`.
    pub fn load(&self, address: NonNull<u8>, bytes: &mut [u8]) -> io::Result<()> {
        let offset = offset_in_page(address, bytes.len())?;
        self.with_own_page(address, Touch::Read, |_, found| match found {
            Found::Frame(frame) => frame.load(offset, bytes),
            Found::Zeros => bytes.fill(0),
        })
    }

    /// The process, or a device of its, writes memory within a page. Tags stay as they are.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn store(&self, address: NonNull<u8>, bytes: &[u8]) -> io::Result<()> {
        let offset = offset_in_page(address, bytes.len())?;
        self.with_own_page(address, Touch::Write, |_, found| {
            if let Found::Frame(frame) = found {
                frame.store(offset, bytes);
            }
        })
    }

    /// The process loads the tag at `address`; 0 from a mapping that is not [`Protection::Tagged`].
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn ldg(&self, address: NonNull<u8>) -> io::Result<Tag> {
        let granule = offset_in_page(address, 1)? / GRANULE_SIZE;
        self.with_own_page(address, Touch::Read, |area, found| match found {
            Found::Frame(frame) if area.protection == Protection::Tagged => frame.tag(granule),
            _ => Tag::ZERO,
        })
    }

    /// The process stores the tag at `address`; nothing happens in a mapping that is not
    /// [`Protection::Tagged`].
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn stg(&self, address: NonNull<u8>, tag: Tag) -> io::Result<()> {
        let granule = offset_in_page(address, 1)? / GRANULE_SIZE;
        self.with_own_page(address, Touch::Write, |area, found| match found {
            Found::Frame(frame) if area.protection == Protection::Tagged => {
                frame.set_tag(granule, tag);
            }
            _ => (),
        })
    }

    /// Swaps out the page at `address`, after the accesses that are under way. `false` if it is in
    /// no frame: not there, or swapped out already.
    ///
    /// # Errors
    /// `InvalidInput`: nothing is mapped there. `OutOfMemory`: the host cannot keep the page's tags,
    /// and so keeps the page. `Unsupported`: memory that is not the model's.
    pub fn swap_out(&self, address: NonNull<u8>) -> io::Result<bool> {
        loop {
            match self.try_swap_out(address)? {
                SwapOut::Done => return Ok(true),
                SwapOut::NothingThere => return Ok(false),
                SwapOut::Busy => std::thread::yield_now(),
                SwapOut::NoRoomForTags => return Err(io::ErrorKind::OutOfMemory.into()),
            }
        }
    }

    fn try_swap_out(&self, address: NonNull<u8>) -> io::Result<SwapOut> {
        self.on_resident_page(address, |page| page.swap_out(&self.0.swapped_tags))
            .map(|outcome| outcome.unwrap_or(SwapOut::NothingThere))
    }

    /// The number of the frame behind the page at `address`, if it is in one.
    ///
    /// # Errors
    /// `InvalidInput`: nothing is mapped there. `Unsupported`: memory that is not the model's.
    pub fn frame_number(&self, address: NonNull<u8>) -> io::Result<Option<u64>> {
        self.on_resident_page(address, HostPage::frame_number)
            .map(Option::flatten)
    }

    /// Does something with the page at `address` where its contents are kept: in the area if it
    /// has its own, else in the file.
    fn on_resident_page<R>(
        &self,
        address: NonNull<u8>,
        act: impl FnOnce(&HostPage) -> R,
    ) -> io::Result<Option<R>> {
        if (address.addr().get() as u64) < FIRST_ADDRESS {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let space = self.space();
        let (area, index) = space
            .find(address.addr().get() as u64 / PAGE_SIZE)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let own = area.own.get(index).filter(|page| !page.is_absent());
        let page = own.or_else(|| {
            let (file, first) = area.backing.file()?;
            Some(&file.pages[first + index])
        });
        Ok(page.map(act))
    }
}

fn map(
    space: &mut AddressSpace,
    first: u64,
    backing: Backing,
    pages: usize,
    protection: Protection,
) -> io::Result<()> {
    let fits = backing
        .file()
        .is_none_or(|(file, from)| file.pages.len().saturating_sub(from) >= pages);
    if pages == 0 || !fits {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    space.unmap(first, pages);
    let vma = Vma {
        pages,
        area: Arc::new(Area::new(backing, protection, pages)),
        first: 0,
    };
    space.vmas.insert(first, vma);
    Ok(())
}

/// The first page of a range within what was ever mapped.
fn own_range(space: &AddressSpace, address: NonNull<u8>, pages: usize) -> io::Result<u64> {
    let first = page_of(address)?;
    let inside = first >= FIRST_ADDRESS / PAGE_SIZE
        && first
            .checked_add(pages as u64)
            .is_some_and(|end| end <= space.next);
    inside
        .then_some(first)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn page_of(address: NonNull<u8>) -> io::Result<u64> {
    let address = address.addr().get() as u64;
    address
        .is_multiple_of(PAGE_SIZE)
        .then_some(address / PAGE_SIZE)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn offset_in_page(address: NonNull<u8>, length: usize) -> io::Result<usize> {
    let offset = address.addr().get() % PAGE_SIZE as usize;
    (offset + length <= PAGE_SIZE as usize)
        .then_some(offset)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn address_of(page: u64) -> NonNull<u8> {
    let address = NonZero::new((page * PAGE_SIZE) as usize).unwrap_or(NonZero::<usize>::MAX);
    NonNull::without_provenance(address)
}
