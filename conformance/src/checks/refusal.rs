//! Memory that a guest with MTE may not have is refused with an error that can be understood: at
//! the memslot, and at the fault if it came there later (seeds 000 and 001).

use engine::Error;
use mte::{Tag, TagPage};

use super::{
    Guest, IPA, TAG, copied_tags, give, mte_support, page, pattern, slot_of, vm_with_mte,
    vm_without_mte,
};
use crate::{Backing, GuestCpu, GuestFault, Testbed, Verdict, require};

/// Skips what is about files on disks on hosts that look only at whether memory is private.
fn require_refusal<T: Testbed>(testbed: &T) -> Verdict {
    require(
        !testbed.rules().private_disk_files,
        "this host gives any private memory to guests with MTE",
    )
}

pub fn a_disks_file_is_refused_at_the_memslot<T: Testbed>(testbed: &T) -> Verdict {
    require_refusal(testbed)?;
    let vm = vm_with_mte(testbed)?;
    let memory = testbed.map(Backing::Disk, 1)?;

    let refused = give(&*vm, &slot_of(&memory));

    assert!(
        matches!(refused, Err(Error::MemoryWithoutTags { .. })),
        "{refused:?}"
    );
    Ok(())
}

pub fn a_disks_file_is_welcome_without_mte<T: Testbed>(testbed: &T) -> Verdict {
    let memory = testbed.map(Backing::Disk, 1)?;
    let vm = vm_without_mte(testbed)?;

    give(&*vm, &slot_of(&memory))?;

    drop(vm);
    Ok(())
}

pub fn a_memslot_of_which_a_part_cannot_hold_tags_is_refused<T: Testbed>(testbed: &T) -> Verdict {
    require_refusal(testbed)?;
    let vm = vm_with_mte(testbed)?;
    let memory = testbed.map(Backing::Anonymous, 3)?;
    testbed.remap(&memory, 2, Backing::Disk)?;

    let refused = give(&*vm, &slot_of(&memory));

    assert!(
        matches!(refused, Err(Error::MemoryWithoutTags { .. })),
        "{refused:?}"
    );
    Ok(())
}

pub fn a_disks_file_that_came_later_is_found_at_the_fault<T: Testbed>(testbed: &T) -> Verdict {
    require_refusal(testbed)?;
    let mut guest = Guest::with_private_memory(testbed, 2)?;
    guest.cpu.stg(page(1), TAG)?;

    testbed.remap(&guest.memory, 1, Backing::Disk)?;
    let fault = guest.cpu.load(page(1));

    assert_memory_fault(&fault);
    assert_eq!(guest.cpu.ldg(IPA)?, Tag::ZERO);
    Ok(())
}

pub fn memory_that_is_gone_is_found_at_the_fault<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 2)?;
    guest.cpu.stg(page(1), TAG)?;

    testbed.remap(&guest.memory, 1, Backing::Nothing)?;
    let fault = guest.cpu.load(page(1));

    assert_memory_fault(&fault);
    Ok(())
}

pub fn a_vmm_that_mends_the_mapping_can_go_on<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 2)?;
    testbed.remap(&guest.memory, 1, Backing::Nothing)?;
    assert_memory_fault(&guest.cpu.stg(page(1), TAG).map(|()| 0));

    testbed.remap(&guest.memory, 1, Backing::Anonymous)?;
    guest.cpu.stg(page(1), TAG)?;

    assert_eq!(guest.cpu.ldg(page(1))?, TAG);
    Ok(())
}

pub fn tags_work_in_a_private_disks_file_where_the_host_gives_it<T: Testbed>(
    testbed: &T,
) -> Verdict {
    require(
        testbed.rules().private_disk_files,
        "this host refuses files on disks to guests with MTE",
    )?;
    let mut guest = Guest::with(testbed, testbed.map(Backing::Disk, 1)?)?;
    let before = guest.cpu.page_tags(IPA)?;

    guest.cpu.set_page_tags(IPA, &pattern(1))?;

    assert_eq!(before, TagPage::ZERO);
    assert_eq!(guest.cpu.page_tags(IPA)?, pattern(1));
    assert_eq!(copied_tags(&*guest.vm, IPA)?, pattern(1));
    Ok(())
}

pub fn huge_pages_are_taken_where_the_host_announces_them<T: Testbed>(testbed: &T) -> Verdict {
    let announced = mte_support(testbed)?.huge_pages;
    let memory = testbed.map(Backing::HugePages, 1)?;
    let vm = vm_with_mte(testbed)?;

    let taken = give(&*vm, &slot_of(&memory));

    assert_eq!(taken.is_ok(), announced, "{taken:?}");
    drop(vm);
    Ok(())
}

pub fn assert_memory_fault(result: &Result<u64, GuestFault>) {
    assert!(
        matches!(result, Err(GuestFault::Run(Error::GuestMemoryFault { .. }))),
        "{result:?} instead of a fault of guest memory"
    );
}
