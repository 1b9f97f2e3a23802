//! STZG and DC GZVA zero memory and give it a tag; DC GVA gives it a tag and leaves its data.

use std::arch::asm;

use mte::aarch64::Instructions;
use mte::{GRANULE_SIZE, PageSize, Tag, TagPage, TagSet};
use mte_linux::{TagChecks, TaggedMemory, set_tag_checks, unchecked};

use super::{Outcome, ensure, failed};

const PAGE: usize = PageSize::Kib4.bytes();
/// What the memory holds before.
const PATTERN: u8 = 0xa5;
const OLD_TAG: Tag = Tag::from_low_bits(3);
const NEW_TAG: Tag = Tag::from_low_bits(0xc);

pub fn check(instructions: Instructions) -> Outcome {
    set_tag_checks(TagChecks::Synchronous, TagSet::ALL).map_err(failed("turn tag checks on"))?;
    let memory = TaggedMemory::new(1).map_err(failed("map memory with PROT_MTE"))?;
    let page = memory.start();
    let middle = page.wrapping_add(PAGE / 2);
    let tagged = NEW_TAG.insert_into_pointer(middle);

    fill(instructions, page);
    // SAFETY: the granule is mapped, and nobody else's.
    unsafe { instructions.stzg(middle, NEW_TAG) };
    changed(instructions, page, "STZG", GRANULE_SIZE, true)?;

    let Some(block) = block_size() else {
        return Ok(());
    };
    fill(instructions, page);
    // SAFETY: the block lies in the page, which nobody else has.
    unsafe {
        asm!(".arch_extension memtag", "dc gzva, {tagged}", tagged = in(reg) tagged, options(nostack))
    };
    changed(instructions, page, "DC GZVA", block, true)?;

    fill(instructions, page);
    // SAFETY: as above.
    unsafe {
        asm!(".arch_extension memtag", "dc gva, {tagged}", tagged = in(reg) tagged, options(nostack))
    };
    changed(instructions, page, "DC GVA", block, false)
}

/// Bytes that DC GVA and DC GZVA act on, if programs may use them.
fn block_size() -> Option<usize> {
    const PROHIBITED: u64 = 1 << 4;
    let dczid: u64;
    // SAFETY: programs may read DCZID_EL0.
    unsafe { asm!("mrs {dczid}, dczid_el0", dczid = out(reg) dczid, options(nomem, nostack)) };
    (dczid & PROHIBITED == 0).then(|| 4 << (dczid & 0xf))
}

/// Gives the page the old tag and the pattern.
fn fill(instructions: Instructions, page: *mut u8) {
    // SAFETY: the page is mapped, and nobody else's.
    unsafe {
        instructions.fill_tag_pages(page, 1, OLD_TAG);
        OLD_TAG.insert_into_pointer(page).write_bytes(PATTERN, PAGE);
    }
}

/// Only the `size` bytes from the middle of the page have the new tag and, if `zeroed`, zeros.
fn changed(
    instructions: Instructions,
    page: *mut u8,
    by: &str,
    size: usize,
    zeroed: bool,
) -> Outcome {
    let is_changed = |offset| (PAGE / 2..PAGE / 2 + size).contains(&offset);
    let mut tags = [TagPage::ZERO];
    // SAFETY: the page is mapped.
    unsafe { instructions.read_tag_pages(page, &mut tags) };
    for granule in 0..=u8::MAX {
        let right = if is_changed(usize::from(granule) * GRANULE_SIZE) {
            NEW_TAG
        } else {
            OLD_TAG
        };
        let found = tags[0].get(granule);
        ensure!(
            found == right,
            "after {by}, granule {granule} of the page has tag {found}, not {right}"
        );
    }
    // SAFETY: the page is mapped and nobody else's; its tags do not matter now.
    let data = unchecked(|| unsafe { page.cast::<[u8; PAGE]>().read_volatile() });
    for (offset, found) in data.into_iter().enumerate() {
        let right = if zeroed && is_changed(offset) {
            0
        } else {
            PATTERN
        };
        ensure!(
            found == right,
            "after {by}, byte {offset} of the page is {found:#04x}, not {right:#04x}"
        );
    }
    Ok(())
}
