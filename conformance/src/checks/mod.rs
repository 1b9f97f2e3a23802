//! The checks, a module for each row of the seeds or part of one, and what they arrange alike.

pub mod asking;
pub mod copy;
pub mod copy_on_write;
pub mod devices;
pub mod dirty_log;
pub mod races;
pub mod refusal;
pub mod registers;
pub mod remapping;
pub mod sharing;
pub mod stale;
pub mod swap;
pub mod visibility;
pub mod width;

use std::sync::Arc;

use engine::{Hypervisor, Memslot, MteSupport, Vm, VmBuilder};
use mte::{Tag, TagPage};

use crate::{Backing, GRANULES, Mapping, PAGE, Stop, Testbed, VmOf, require};

/// Where the guests have their memory.
const IPA: u64 = 0x8000_0000;
const IPA_BITS: u8 = 40;
const SLOT: u32 = 0;

/// The tag that is left over in recycled memory.
const STALE: Tag = Tag::from_low_bits(0xa);
/// A tag that a guest stores.
const TAG: Tag = Tag::from_low_bits(7);

/// A guest with one vCPU and one memslot. Its parts are dropped in this order.
struct Guest<T: Testbed> {
    cpu: T::Cpu,
    vm: Arc<VmOf<T>>,
    memory: T::Mapping,
}

impl<T: Testbed> Guest<T> {
    /// A guest with MTE that has this memory.
    fn with(testbed: &T, memory: T::Mapping) -> Result<Self, Stop> {
        let vm = vm_with_mte(testbed)?;
        give(&*vm, &slot_of(&memory))?;
        let cpu = testbed.cpu(&vm, 0)?;
        Ok(Self { cpu, vm, memory })
    }

    /// A guest with MTE that has so many pages of private memory.
    fn with_private_memory(testbed: &T, pages: usize) -> Result<Self, Stop> {
        Self::with(testbed, testbed.map(Backing::Anonymous, pages)?)
    }
}

fn vm_with_mte<T: Testbed>(testbed: &T) -> Result<Arc<VmOf<T>>, Stop> {
    let mut builder = testbed.hypervisor().new_vm(IPA_BITS)?;
    builder.enable_mte()?;
    Ok(Arc::new(builder.build()?))
}

fn vm_without_mte<T: Testbed>(testbed: &T) -> Result<Arc<VmOf<T>>, Stop> {
    Ok(Arc::new(testbed.hypervisor().new_vm(IPA_BITS)?.build()?))
}

/// The memslot that gives all of `memory` to the guest.
fn slot_of(memory: &impl Mapping) -> Memslot {
    Memslot {
        slot: SLOT,
        ipa: IPA,
        size: memory.size(),
        host_address: memory.address(),
        log_dirty: false,
        read_only: false,
    }
}

fn give(vm: &impl Vm, memslot: &Memslot) -> engine::Result<()> {
    // SAFETY: the testbeds' memory holds nothing but patterns of the checks, and all access to it
    // allows for a guest that writes it. A guest whose memory is gone gets a fault and reaches nothing else.
    unsafe { vm.set_memslot(memslot) }
}

fn page(index: usize) -> u64 {
    IPA + index as u64 * PAGE
}

fn mte_support<T: Testbed>(testbed: &T) -> Result<MteSupport, Stop> {
    let support = testbed.hypervisor().capabilities().mte;
    support.ok_or_else(|| Stop::Fail("the host has no MTE for guests".to_owned()))
}

fn require_shared_memory<T: Testbed>(testbed: &T) -> Result<(), Stop> {
    let support = mte_support(testbed)?;
    require(
        support.shared_memory,
        "this host refuses shared memory to guests with MTE",
    )
}

/// Tags of a page, different ones side by side.
fn pattern(seed: u8) -> TagPage {
    let mut tags = TagPage::ZERO;
    for granule in 0..=u8::MAX {
        let value = granule.wrapping_mul(7).wrapping_add(granule >> 4);
        tags.set(granule, Tag::from_low_bits(value.wrapping_add(seed)));
    }
    tags
}

/// The tags of a page by the bulk copy.
fn copied_tags(vm: &impl Vm, ipa: u64) -> Result<TagPage, Stop> {
    let mut tags = [0; GRANULES];
    let covered = vm.copy_tags_from_guest(ipa, &mut tags)?;
    assert_eq!(covered, PAGE, "bytes covered");
    Ok(TagPage::pack(&tags))
}

/// Writes the tags of a page by the bulk copy.
fn copy_tags(vm: &impl Vm, ipa: u64, tags: &TagPage) -> Result<(), Stop> {
    let covered = vm.copy_tags_to_guest(ipa, &tags.unpack())?;
    assert_eq!(covered, PAGE, "bytes covered");
    Ok(())
}
