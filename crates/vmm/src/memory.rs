//! Guest memory.
//!
//! RAM is one range of guest-physical addresses. Where the host allows it, a memory file stands
//! behind it, mapped twice: the *data mapping* (shared, not `PROT_MTE`) is the memslot and all that
//! devices, loaders and a debugger see, so that no access of theirs is ever tag-checked (seed 000);
//! the *tag mapping* (`PROT_MTE`) is touched by LDG and STG, and by copies with checks off, alone.
//! Hosts before Linux 6.2 refuse shared memory to a guest with MTE (seed 001): there it is private anonymous memory, and tags are
//! reached by the engine's bulk copy. [`tags`] has the two ways behind one trait. Clones share the
//! memory of a [`base`] until they write; their tags too are reached by the bulk copy.

pub mod base;
pub mod dirty;
pub mod file;
pub mod lazy;
pub mod outside;
pub mod pages;
mod populated;
pub mod tags;
pub mod untagged;

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use engine::{Capabilities, Hypervisor, Memslot, Vm, VmBuilder};
use serde::{Deserialize, Serialize};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion};

use crate::layout::{self, PAGE_SIZE, RAM_START};
use base::Base;
use populated::{PageMap, Populated};

/// Guest memory as the devices see it: the data mapping, never tag-checked, with the bitmap of
/// pages that the VMM itself wrote (the host's dirty log knows only what the guest wrote).
pub type GuestRam = vm_memory::GuestMemoryMmap<AtomicBitmap>;

const HUGE_PAGE_SIZE: u64 = 2 << 20;
/// `PROT_MTE`: the mapping has tags (Linux `arch/arm64/include/uapi/asm/mman.h`).
const PROT_MTE: libc::c_int = 0x20;
const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// How the VMM reaches the tags of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TagAccess {
    /// The tag mapping where the host allows it, else the bulk copy.
    #[default]
    Auto,
    /// A second mapping of the same memory, read and written with LDG and STG.
    Alias,
    /// The engine's bulk copy (`KVM_ARM_MTE_COPY_TAGS`): one byte a tag, serialised by the host,
    /// refused into a guest while its writes are logged.
    Ioctl,
}

/// How a guest's tags are reached in fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TagMethod {
    /// By the tag mapping.
    Alias,
    /// By the bulk copy.
    Ioctl,
}

/// What stands behind guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// A memory file, mapped shared; otherwise private anonymous memory.
    pub memory_file: bool,
    /// In pages of 2 MiB.
    pub huge_pages: bool,
    /// How tags are reached; `None` without MTE.
    pub tags: Option<TagMethod>,
}

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size is no whole number of pages.
    #[error("--memory: {size} bytes: it must be a multiple of {page} bytes{}, and more than none", if *.page == HUGE_PAGE_SIZE { " with huge pages" } else { "" })]
    Size {
        /// Bytes asked for.
        size: u64,
        /// The page's size.
        page: u64,
    },
    /// `--tag-access` for a guest without tags.
    #[error("--tag-access: a guest with --mte off has no tags to reach")]
    NoTags,
    /// `--tag-access alias` where the host cannot.
    #[error(
        "--tag-access alias: this host's kernel refuses shared memory to a guest with MTE (it is older than Linux 6.2), so there is \
         nothing a second mapping could be made of; use --tag-access ioctl or auto"
    )]
    AliasUnsupported,
    /// Huge pages for a guest with MTE where the host cannot.
    #[error(
        "huge pages: this host's kernel refuses them to a guest with MTE (it is older than Linux 6.13); run without --huge-pages or with --mte off"
    )]
    HugePagesUnsupported,
    /// Huge pages and the bulk copy of tags.
    #[error(
        "huge pages with --tag-access ioctl: Linux marks a whole huge page as tagged after the copy wrote one small page of it, \
         so tags could be lost; use --tag-access alias, or run without --huge-pages"
    )]
    HugePagesWithIoctl,
    /// `--tag-access alias` for a clone.
    #[error(
        "--tag-access alias: what a clone writes goes to pages of its own, and a second mapping of its base would show the base's \
         tags; use --tag-access ioctl or auto"
    )]
    CloneAlias,
    /// Huge pages for a clone.
    #[error(
        "huge pages: a clone shares the pages of its base and copies 4 KiB where it writes; run it without --huge-pages"
    )]
    CloneHugePages,
    /// Memory that cannot become a base.
    #[error("this memory cannot be the base of clones: {0}")]
    NoBase(&'static str),
    /// The host refused.
    #[error("{size} MiB of guest memory: {step}: {source}{hint}")]
    Host {
        /// MiB asked for.
        size: u64,
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
        /// What the user can do, if that is known.
        hint: &'static str,
    },
}

impl MemoryPlan {
    /// Chooses what stands behind the memory of a guest on this host.
    ///
    /// # Errors
    /// What was asked for cannot be had here, with the reason.
    pub fn choose(
        host: &Capabilities,
        mte: bool,
        access: TagAccess,
        huge_pages: bool,
    ) -> Result<Self, Error> {
        let Some(support) = host.mte.filter(|_| mte) else {
            if access != TagAccess::Auto {
                return Err(Error::NoTags);
            }
            return Ok(Self {
                memory_file: true,
                huge_pages,
                tags: None,
            });
        };
        if huge_pages && !support.huge_pages {
            return Err(Error::HugePagesUnsupported);
        }
        let method = match access {
            TagAccess::Alias if !support.shared_memory => return Err(Error::AliasUnsupported),
            TagAccess::Auto if !support.shared_memory => TagMethod::Ioctl,
            TagAccess::Auto | TagAccess::Alias => TagMethod::Alias,
            TagAccess::Ioctl => TagMethod::Ioctl,
        };
        if huge_pages && method == TagMethod::Ioctl {
            return Err(Error::HugePagesWithIoctl);
        }
        Ok(Self {
            memory_file: support.shared_memory,
            huge_pages,
            tags: Some(method),
        })
    }

    /// How the tags of a clone are reached on this host, `None` without MTE. What stands behind its memory is
    /// its base.
    ///
    /// # Errors
    /// What was asked for cannot be had of a clone, with the reason.
    pub fn choose_for_clone(
        mte: bool,
        access: TagAccess,
        huge_pages: bool,
    ) -> Result<Option<TagMethod>, Error> {
        match (mte, access) {
            _ if huge_pages => Err(Error::CloneHugePages),
            (false, TagAccess::Auto) => Ok(None),
            (false, _) => Err(Error::NoTags),
            (true, TagAccess::Alias) => Err(Error::CloneAlias),
            (true, TagAccess::Auto | TagAccess::Ioctl) => Ok(Some(TagMethod::Ioctl)),
        }
    }
}

/// The RAM of a machine.
pub struct GuestMemory {
    ram: Arc<GuestRam>,
    size: u64,
    host_address: NonNull<u8>,
    tag_mapping: Option<TagMapping>,
    populated: Populated,
    plan: MemoryPlan,
}

// SAFETY: the addresses are of mappings that live as long as this value; access to them is through
// vm-memory's volatile operations and the tag instructions, both of which allow concurrency.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// RAM of `size` bytes as planned. It is not populated: untouched pages cost nothing.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(size: u64, plan: MemoryPlan) -> Result<Self, Error> {
        let page = if plan.huge_pages {
            HUGE_PAGE_SIZE
        } else {
            PAGE_SIZE.max(host_page_size())
        };
        if size == 0 || !size.is_multiple_of(page) {
            return Err(Error::Size { size, page });
        }
        let host = |step, source| Error::Host {
            size: size >> 20,
            step,
            source,
            hint: hint(plan),
        };
        let file = plan
            .memory_file
            .then(|| file::of_size(size, plan.huge_pages))
            .transpose()
            .map_err(|e| host("making a memory file", e))?;
        // The data mapping comes first: it is the one that reserves huge pages.
        let region =
            map_data(size, file.as_ref(), plan.huge_pages).map_err(|e| host("mapping it", e))?;
        let tag_mapping = match (&file, plan.tags) {
            (Some(file), Some(TagMethod::Alias)) => {
                let mapping =
                    TagMapping::of(file, size).map_err(|e| host("mapping its tags", e))?;
                Some(mapping)
            }
            _ => None,
        };
        if !plan.huge_pages {
            // For hosts that give transparent huge pages to those who ask.
            advise(region.as_ptr(), region.size(), libc::MADV_HUGEPAGE);
        }
        let populated = match file {
            Some(file) => Populated::File(file),
            None => Populated::Private(
                page_map(&region).map_err(|e| host("opening /proc/self/pagemap", e))?,
            ),
        };
        Self::of_region(region, tag_mapping, populated, plan).map_err(|e| host("placing it", e))
    }

    /// RAM that shares the pages of `base`, data and tags, until they are written. It has no tag mapping: what is
    /// written are pages of its own, which a second mapping would not show.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn clone_of(base: &Base) -> Result<Self, Error> {
        let size = base.size();
        let page = PAGE_SIZE.max(host_page_size());
        if size == 0 || !size.is_multiple_of(page) {
            return Err(Error::Size { size, page });
        }
        let host = |step, source| Error::Host {
            size: size >> 20,
            step,
            source,
            hint: "",
        };
        let region = map_clone(base).map_err(|e| host("mapping the base of a clone", e))?;
        let own = page_map(&region).map_err(|e| host("opening /proc/self/pagemap", e))?;
        let base = base.file().try_clone();
        let base = base.map_err(|e| host("keeping the base of a clone", e))?;
        let plan = MemoryPlan {
            memory_file: false,
            huge_pages: false,
            tags: None,
        };
        Self::of_region(region, None, Populated::Clone { base, own }, plan)
            .map_err(|e| host("placing it", e))
    }

    fn of_region(
        region: vm_memory::MmapRegion<AtomicBitmap>,
        tag_mapping: Option<TagMapping>,
        populated: Populated,
        plan: MemoryPlan,
    ) -> io::Result<Self> {
        let size = region.size() as u64;
        let host_address = NonNull::new(region.as_ptr()).ok_or(io::ErrorKind::OutOfMemory)?;
        let region = GuestRegionMmap::new(region, GuestAddress(RAM_START))
            .ok_or(io::ErrorKind::InvalidInput)?;
        let ram = GuestRam::from_regions(vec![region]).map_err(io::Error::other)?;
        Ok(Self {
            ram: Arc::new(ram),
            size,
            host_address,
            tag_mapping,
            populated,
            plan,
        })
    }

    /// What stands behind it. A clone's has no file that a page could be written to unseen.
    pub const fn plan(&self) -> MemoryPlan {
        self.plan
    }

    /// The populated ranges of guest-physical addresses within `range`, which is whole pages of RAM, the lowest first.
    /// What is between them are holes: never touched, all zero, without tags. Asking populates none.
    ///
    /// # Errors
    /// Each item can be what the host said instead; it is the last then.
    pub fn populated(
        &self,
        range: Range<u64>,
    ) -> impl Iterator<Item = io::Result<Range<u64>>> + '_ {
        let end = range.end.saturating_sub(RAM_START).min(self.size);
        let mut at = range.start.saturating_sub(RAM_START);
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let found = self.populated.first_in(at..end).transpose()?;
            at = found.as_ref().map_or(end, |found| found.end);
            Some(found.map(|found| RAM_START + found.start..RAM_START + found.end))
        })
    }

    /// The pages that the VMM wrote since it was asked last, a bit for each 4 KiB from the start of RAM.
    pub fn take_vmm_writes(&self) -> Vec<u64> {
        let region = self.ram.iter().next();
        region.map_or_else(Vec::new, |region| {
            MmapRegion::bitmap(region).get_and_reset()
        })
    }

    /// Makes a range, which is whole pages of the host, unpopulated: it reads as zeros with tag 0.
    ///
    /// # Errors
    /// What the host said.
    pub fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let start = range.start.checked_sub(RAM_START);
        let Some(start) =
            start.filter(|_| range.start <= range.end && range.end - RAM_START <= self.size)
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        self.populated
            .discard(self.host_address, start..range.end - RAM_START)
    }

    /// The data mapping.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The memslot that gives all of RAM to the guest.
    pub fn memslot(&self) -> Memslot {
        Memslot {
            slot: 0,
            ipa: RAM_START,
            size: self.size,
            host_address: self.host_address,
            log_dirty: false,
            read_only: false,
        }
    }

    /// A new VM on `hypervisor`, with MTE or without, whose RAM this is. It has no vCPU yet.
    ///
    /// # Safety
    /// A vCPU of the VM must not run once this value is gone, unless the memslot was deleted before.
    ///
    /// # Errors
    /// The hypervisor refuses the VM, MTE or the memory.
    pub unsafe fn new_vm<H: Hypervisor>(
        &self,
        hypervisor: &H,
        mte: bool,
    ) -> engine::Result<<H::VmBuilder as VmBuilder>::Vm> {
        let mut builder = hypervisor.new_vm(layout::ipa_bits(self.size))?;
        if mte {
            builder.enable_mte()?;
        }
        let vm = builder.build()?;
        // SAFETY: the mapping is `size` bytes that hold guest RAM alone; the caller vouches for its life.
        unsafe { vm.set_memslot(&self.memslot()) }?;
        Ok(vm)
    }

    /// The memory file, for another process to read it ([`outside`]), data and tags: opened anew, so that nothing can be
    /// changed through it. `None` of memory that others cannot read so: private memory, a clone's, and where tags are to be
    /// reached by the bulk copy.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub fn readable_file(&self) -> io::Result<Option<File>> {
        match &self.populated {
            Populated::File(file) if self.plan.tags != Some(TagMethod::Ioctl) => {
                File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The tag mapping, where there is one.
    pub fn tag_mapping(&self) -> Option<&TagMapping> {
        self.tag_mapping.as_ref()
    }
}

fn hint(plan: MemoryPlan) -> &'static str {
    if plan.huge_pages {
        "; are as many huge pages reserved? (/proc/sys/vm/nr_hugepages, 2 MiB each)"
    } else {
        ""
    }
}

fn map_data(
    size: u64,
    file: Option<&File>,
    huge_pages: bool,
) -> io::Result<vm_memory::MmapRegion<AtomicBitmap>> {
    let length = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
    // Huge pages are reserved, so that too few of them are an error here and not a fault later.
    let reserve = if huge_pages { 0 } else { libc::MAP_NORESERVE };
    let builder = region_builder(length)?;
    build(match file {
        Some(file) => builder
            .with_mmap_flags(libc::MAP_SHARED | reserve)
            .with_file_offset(FileOffset::new(file.try_clone()?, 0)),
        None => {
            builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        }
    })
}

fn region_builder(length: usize) -> io::Result<MmapRegionBuilder<AtomicBitmap>> {
    let page = NonZeroUsize::new(PAGE_SIZE as usize).ok_or(io::ErrorKind::InvalidInput)?;
    let bitmap = AtomicBitmap::new(length, page);
    Ok(MmapRegionBuilder::new_with_bitmap(length, bitmap).with_mmap_prot(READ_WRITE))
}

fn build(
    builder: MmapRegionBuilder<AtomicBitmap>,
) -> io::Result<vm_memory::MmapRegion<AtomicBitmap>> {
    builder.build().map_err(|e| match e {
        vm_memory::mmap::MmapRegionError::Mmap(e) => e,
        e => io::Error::other(e),
    })
}

/// A private mapping of a base, but for its large holes: those are anonymous memory, of which a page written is one
/// page and not two ([`Base`]).
fn map_clone(base: &Base) -> io::Result<vm_memory::MmapRegion<AtomicBitmap>> {
    let length = usize::try_from(base.size()).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let file = FileOffset::new(base.file().try_clone()?, 0);
    let region = build(
        region_builder(length)?
            .with_mmap_flags(flags)
            .with_file_offset(file),
    )?;
    for hole in base.large_holes()? {
        let length = (hole.end - hole.start) as usize;
        // SAFETY: the hole is within the region, which nobody has seen yet, and made of whole pages.
        let mapped = unsafe {
            libc::mmap(
                region.as_ptr().add(hole.start as usize).cast(),
                length,
                READ_WRITE,
                flags | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A clone is to cost what it writes, and not 2 MiB where it writes a byte.
        advise(mapped.cast(), length, libc::MADV_NOHUGEPAGE);
    }
    Ok(region)
}

fn page_map(region: &vm_memory::MmapRegion<AtomicBitmap>) -> io::Result<PageMap> {
    PageMap::of(region.as_ptr().addr() as u64, host_page_size())
}

/// Advises the host about huge pages in a mapping of guest memory.
fn advise(start: *mut u8, length: usize, advice: libc::c_int) {
    // SAFETY: the callers' mappings hold guest memory alone, and the advice changes no contents.
    let result = unsafe { libc::madvise(start.cast(), length, advice) };
    if result != 0 {
        tracing::debug!("madvise {advice}: {}", io::Error::last_os_error());
    }
}

/// The page size of this host's kernel.
pub fn host_page_size() -> u64 {
    // SAFETY: a query without demands.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(PAGE_SIZE)
}

/// A `PROT_MTE` mapping of guest memory, for tag instructions alone. Reading or writing data
/// through it could be tag-checked, and is done nowhere.
pub struct TagMapping {
    address: NonNull<u8>,
    size: usize,
}

// SAFETY: tag instructions are atomic to each granule, whichever thread executes them.
unsafe impl Send for TagMapping {}
// SAFETY: as above.
unsafe impl Sync for TagMapping {}

impl TagMapping {
    /// Maps the tags of the first `size` bytes of a memory file.
    ///
    /// # Errors
    /// The host has no MTE for this process, or cannot map.
    pub fn of(file: &File, size: u64) -> io::Result<Self> {
        Self::map(file, 0..size, READ_WRITE)
    }

    /// Maps the tags of a part of a memory file, which may be opened for reading alone, to be read. The part begins at a
    /// page of the file's.
    ///
    /// # Errors
    /// As those of [`Self::of`].
    pub fn read_only(file: &File, part: Range<u64>) -> io::Result<Self> {
        Self::map(file, part, libc::PROT_READ)
    }

    fn map(file: &File, part: Range<u64>, protection: libc::c_int) -> io::Result<Self> {
        let too_large = |_| io::ErrorKind::OutOfMemory;
        let offset = libc::off_t::try_from(part.start).map_err(too_large)?;
        let size = part.end - part.start;
        let size = usize::try_from(size).map_err(too_large)?;
        // SAFETY: a new mapping where the kernel likes replaces nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                protection | PROT_MTE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        match NonNull::new(address.cast()) {
            Some(mapped) if address != libc::MAP_FAILED => Ok(Self {
                address: mapped,
                size,
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// First byte of the mapping.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Bytes of memory mapped.
    pub fn size(&self) -> usize {
        self.size
    }
}

impl Drop for TagMapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of` with this size, and nothing refers to it any more.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.size) };
    }
}

#[cfg(test)]
pub(super) mod tests {
    use engine::MteSupport;
    use mte::MteFeatures;
    use vm_memory::Bytes;

    use super::*;

    fn host(mte: Option<(bool, bool)>) -> Capabilities {
        Capabilities {
            ipa_bits: 40,
            max_vcpus: 8,
            max_memslots: 32,
            mte: mte.map(|(shared_memory, huge_pages)| MteSupport {
                features: MteFeatures::from_id_registers(0x300, 0),
                shared_memory,
                huge_pages,
            }),
            sve: false,
            pointer_authentication: false,
            pmu: false,
            aarch32_el1: false,
            gic_v3: true,
            counter_hz: 62_500_000,
        }
    }

    const NEW: Option<(bool, bool)> = Some((true, true));
    const LINUX_6_12: Option<(bool, bool)> = Some((true, false));
    const LINUX_6_1: Option<(bool, bool)> = Some((false, false));

    #[test]
    fn tags_are_reached_by_the_alias_where_the_host_allows_shared_memory() {
        let plan = MemoryPlan::choose(&host(LINUX_6_12), true, TagAccess::Auto, false).unwrap();
        assert_eq!(
            plan,
            MemoryPlan {
                memory_file: true,
                huge_pages: false,
                tags: Some(TagMethod::Alias)
            }
        );
    }

    #[test]
    fn an_old_host_gets_private_memory_and_the_bulk_copy() {
        let plan = MemoryPlan::choose(&host(LINUX_6_1), true, TagAccess::Auto, false).unwrap();
        assert_eq!(
            plan,
            MemoryPlan {
                memory_file: false,
                huge_pages: false,
                tags: Some(TagMethod::Ioctl)
            }
        );
    }

    #[test]
    fn the_alias_is_refused_on_an_old_host() {
        let error =
            MemoryPlan::choose(&host(LINUX_6_1), true, TagAccess::Alias, false).unwrap_err();
        assert!(matches!(error, Error::AliasUnsupported));
    }

    #[test]
    fn the_bulk_copy_can_be_forced() {
        let plan = MemoryPlan::choose(&host(NEW), true, TagAccess::Ioctl, false).unwrap();
        assert_eq!(plan.tags, Some(TagMethod::Ioctl));
    }

    #[test]
    fn huge_pages_with_mte_are_refused_before_linux_6_13() {
        let error = MemoryPlan::choose(&host(LINUX_6_12), true, TagAccess::Auto, true).unwrap_err();
        assert!(matches!(error, Error::HugePagesUnsupported));
    }

    #[test]
    fn huge_pages_with_the_bulk_copy_are_refused() {
        let error = MemoryPlan::choose(&host(NEW), true, TagAccess::Ioctl, true).unwrap_err();
        assert!(matches!(error, Error::HugePagesWithIoctl));
    }

    #[test]
    fn a_guest_without_mte_has_no_tags_and_may_have_huge_pages_anywhere() {
        let plan = MemoryPlan::choose(&host(None), false, TagAccess::Auto, true).unwrap();
        assert_eq!(
            plan,
            MemoryPlan {
                memory_file: true,
                huge_pages: true,
                tags: None
            }
        );
    }

    #[test]
    fn a_way_to_tags_is_refused_for_a_guest_without_them() {
        let error = MemoryPlan::choose(&host(NEW), false, TagAccess::Alias, false).unwrap_err();
        assert!(matches!(error, Error::NoTags));
    }

    #[test]
    fn huge_pages_that_are_not_reserved_are_an_error_at_once() {
        let plan = MemoryPlan {
            memory_file: true,
            huge_pages: true,
            tags: None,
        };
        // No host of tests reserves 64 TiB.
        let error = GuestMemory::new(64 << 40, plan).err().unwrap().to_string();
        assert!(
            error.contains("are as many huge pages reserved?"),
            "{error}"
        );
    }

    #[test]
    fn memory_that_is_no_multiple_of_a_page_is_refused() {
        let plan = MemoryPlan {
            memory_file: true,
            huge_pages: false,
            tags: None,
        };
        let error = GuestMemory::new((64 << 20) + 1, plan).err().unwrap();
        assert!(
            error
                .to_string()
                .contains("must be a multiple of 4096 bytes"),
            "{error}"
        );
    }

    /// The populated ranges in pages from the start of RAM.
    pub fn populated_pages(memory: &GuestMemory) -> Vec<Range<u64>> {
        let page = |ipa| (ipa - RAM_START) / PAGE_SIZE;
        let ranges = memory.populated(RAM_START..RAM_START + memory.size());
        ranges
            .map(|range| range.map(|range| page(range.start)..page(range.end)))
            .collect::<io::Result<_>>()
            .unwrap()
    }

    /// The same of small pages, where a page written is a page populated: huge ones come by the 512.
    pub fn with_small_pages(memory: GuestMemory) -> GuestMemory {
        // SAFETY: the range is the mapping's; the advice changes no contents.
        let advised = unsafe {
            libc::madvise(
                memory.host_address.as_ptr().cast(),
                memory.size as usize,
                libc::MADV_NOHUGEPAGE,
            )
        };
        assert_eq!(advised, 0);
        memory
    }

    fn memory_with_pages_written(memory_file: bool, pages: &[u64]) -> GuestMemory {
        let plan = MemoryPlan {
            memory_file,
            huge_pages: false,
            tags: None,
        };
        let memory = with_small_pages(GuestMemory::new(8 << 20, plan).unwrap());
        for page in pages {
            let address = GuestAddress(RAM_START + page * PAGE_SIZE);
            memory.ram().write_obj(1u64, address).unwrap();
        }
        memory
    }

    #[test]
    fn a_clones_tags_are_reached_by_the_bulk_copy_alone() {
        let choose = |access| MemoryPlan::choose_for_clone(true, access, false);
        assert_eq!(choose(TagAccess::Auto).unwrap(), Some(TagMethod::Ioctl));
        assert_eq!(choose(TagAccess::Ioctl).unwrap(), Some(TagMethod::Ioctl));
        assert!(matches!(choose(TagAccess::Alias), Err(Error::CloneAlias)));
    }

    #[test]
    fn a_clone_without_mte_has_no_way_to_tags() {
        let choose = |access| MemoryPlan::choose_for_clone(false, access, false);
        assert_eq!(choose(TagAccess::Auto).unwrap(), None);
        assert!(matches!(choose(TagAccess::Ioctl), Err(Error::NoTags)));
    }

    #[test]
    fn a_clone_of_huge_pages_is_refused() {
        let error = MemoryPlan::choose_for_clone(true, TagAccess::Auto, true).unwrap_err();
        assert!(matches!(error, Error::CloneHugePages));
    }

    #[test]
    fn a_memory_file_has_the_pages_that_were_written() {
        let memory = memory_with_pages_written(true, &[0, 7, 8, 2047]);
        assert_eq!(populated_pages(&memory), [0..1, 7..9, 2047..2048]);
    }

    #[test]
    fn private_memory_has_the_pages_that_were_written() {
        let memory = memory_with_pages_written(false, &[0, 7, 8, 511, 512, 2047]);
        assert_eq!(populated_pages(&memory), [0..1, 7..9, 511..513, 2047..2048]);
    }

    #[test]
    fn untouched_memory_is_one_hole_and_stays_it_when_asked_about() {
        for memory_file in [true, false] {
            let memory = memory_with_pages_written(memory_file, &[]);
            populated_pages(&memory);
            assert_eq!(populated_pages(&memory), []);
        }
    }

    #[test]
    fn only_what_was_asked_about_is_said_to_be_populated() {
        for memory_file in [true, false] {
            let memory = memory_with_pages_written(memory_file, &[1, 2, 3, 4]);
            let asked = RAM_START + 2 * PAGE_SIZE..RAM_START + 4 * PAGE_SIZE;
            let found: Vec<_> = memory
                .populated(asked.clone())
                .map(Result::unwrap)
                .collect();
            assert_eq!(found, [asked]);
        }
    }

    #[test]
    fn fresh_memory_reads_as_zero_and_what_the_vmm_writes_is_marked_dirty() {
        use vm_memory::bitmap::Bitmap;
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        let plan = MemoryPlan {
            memory_file: true,
            huge_pages: false,
            tags: None,
        };
        let memory = GuestMemory::new(4 << 20, plan).unwrap();
        let address = GuestAddress(RAM_START + 3 * PAGE_SIZE);

        let before: u64 = memory.ram().read_obj(address).unwrap();
        memory.ram().write_obj(1u64, address).unwrap();

        let region = memory.ram().find_region(address).unwrap();
        assert_eq!(before, 0);
        assert!(region.bitmap().dirty_at(3 * PAGE_SIZE as usize));
        assert!(!region.bitmap().dirty_at(2 * PAGE_SIZE as usize));
    }
}
