//! Pages shared between mappings: by guests with each other and with a process (seed 001).

use engine::Error;

use super::refusal::assert_memory_fault;
use super::{
    Guest, IPA, TAG, copied_tags, give, mte_support, pattern, require_shared_memory, slot_of,
    vm_with_mte,
};
use crate::{Backing, GuestCpu, Testbed, Verdict, require};

pub fn shared_memory_is_taken_where_the_host_announces_it<T: Testbed>(testbed: &T) -> Verdict {
    let announced = mte_support(testbed)?.shared_memory;
    let file = testbed.memory_file(1)?;
    let memory = testbed.map(Backing::Shared(&file), 1)?;
    let vm = vm_with_mte(testbed)?;

    let taken = give(&*vm, &slot_of(&memory));

    let refused = matches!(taken, Err(Error::MemoryWithoutTags { .. }));
    assert_eq!((taken.is_ok(), refused), (announced, !announced));
    drop(vm);
    Ok(())
}

pub fn shared_memory_that_came_later_is_found_at_the_fault<T: Testbed>(testbed: &T) -> Verdict {
    let support = mte_support(testbed)?;
    require(
        !support.shared_memory,
        "this host gives shared memory to guests with MTE",
    )?;
    let file = testbed.memory_file(1)?;
    let mut guest = Guest::with_private_memory(testbed, 1)?;
    guest.cpu.stg(IPA, TAG)?;

    testbed.remap(&guest.memory, 0, Backing::Shared(&file))?;

    assert_memory_fault(&guest.cpu.load(IPA));
    Ok(())
}

pub fn two_guests_see_each_others_tags_in_shared_memory<T: Testbed>(testbed: &T) -> Verdict {
    require_shared_memory(testbed)?;
    let file = testbed.memory_file(1)?;
    let mut first = Guest::with(testbed, testbed.map(Backing::Shared(&file), 1)?)?;
    first.cpu.set_page_tags(IPA, &pattern(1))?;

    let mut second = Guest::with(testbed, testbed.map(Backing::Shared(&file), 1)?)?;
    let seen = second.cpu.page_tags(IPA)?;
    second.cpu.set_page_tags(IPA, &pattern(2))?;

    assert_eq!(seen, pattern(1));
    assert_eq!(first.cpu.page_tags(IPA)?, pattern(2));
    Ok(())
}

pub fn a_guests_tags_are_seen_by_a_process_and_the_other_way_round<T: Testbed>(
    testbed: &T,
) -> Verdict {
    require_shared_memory(testbed)?;
    let file = testbed.memory_file(1)?;
    let mut guest = Guest::with(testbed, testbed.map(Backing::Shared(&file), 1)?)?;
    guest.cpu.set_page_tags(IPA, &pattern(3))?;

    let seen = testbed.file_tags(&file, 0)?;
    testbed.set_file_tags(&file, 0, &pattern(4))?;

    assert_eq!(seen, pattern(3));
    assert_eq!(guest.cpu.page_tags(IPA)?, pattern(4));
    assert_eq!(copied_tags(&*guest.vm, IPA)?, pattern(4));
    Ok(())
}
