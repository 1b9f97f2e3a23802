//! Valid tags are kept whatever the VMM does with its memslots and mappings (seed 000).

use engine::{Memslot, Vm};
use mte::TagPage;

use super::{Guest, IPA, SLOT, give, page, pattern, require_shared_memory, slot_of};
use crate::{Backing, GuestCpu, Testbed, Verdict};

/// Where memslots go that move.
const ELSEWHERE: u64 = IPA + 0x1000_0000;

pub fn tags_outlive_a_memslot_that_goes_and_comes_back_elsewhere<T: Testbed>(
    testbed: &T,
) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 1)?;
    guest.cpu.set_page_tags(IPA, &pattern(1))?;

    guest.vm.delete_memslot(SLOT)?;
    let elsewhere = Memslot {
        ipa: ELSEWHERE,
        ..slot_of(&guest.memory)
    };
    give(&*guest.vm, &elsewhere)?;

    assert_eq!(guest.cpu.page_tags(ELSEWHERE)?, pattern(1));
    Ok(())
}

pub fn tags_outlive_the_move_of_a_memslot<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 1)?;
    guest.cpu.set_page_tags(IPA, &pattern(2))?;

    let moved = Memslot {
        ipa: ELSEWHERE,
        ..slot_of(&guest.memory)
    };
    give(&*guest.vm, &moved)?;

    assert_eq!(guest.cpu.page_tags(ELSEWHERE)?, pattern(2));
    Ok(())
}

pub fn tags_outlive_the_beginning_and_the_end_of_logging<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 1)?;
    guest.cpu.set_page_tags(IPA, &pattern(3))?;
    let silent = slot_of(&guest.memory);

    let logging = Memslot {
        log_dirty: true,
        ..silent
    };
    give(&*guest.vm, &logging)?;
    let while_logging = guest.cpu.page_tags(IPA)?;
    give(&*guest.vm, &silent)?;

    assert_eq!(while_logging, pattern(3));
    assert_eq!(guest.cpu.page_tags(IPA)?, pattern(3));
    Ok(())
}

pub fn tags_outlive_a_new_mapping_of_the_same_private_memory<T: Testbed>(testbed: &T) -> Verdict {
    let file = testbed.memory_file(1)?;
    testbed.set_file_tags(&file, 0, &pattern(4))?;
    let memory = testbed.map(Backing::Private(&file), 1)?;
    let mut guest = Guest::with(testbed, memory)?;
    let before = guest.cpu.page_tags(IPA)?;

    testbed.remap(&guest.memory, 0, Backing::Private(&file))?;

    assert_eq!(before, pattern(4));
    assert_eq!(guest.cpu.page_tags(IPA)?, pattern(4));
    Ok(())
}

pub fn tags_outlive_a_new_mapping_of_the_same_shared_memory<T: Testbed>(testbed: &T) -> Verdict {
    require_shared_memory(testbed)?;
    let file = testbed.memory_file(1)?;
    let memory = testbed.map(Backing::Shared(&file), 1)?;
    let mut guest = Guest::with(testbed, memory)?;
    guest.cpu.set_page_tags(IPA, &pattern(5))?;

    testbed.remap(&guest.memory, 0, Backing::Shared(&file))?;

    assert_eq!(guest.cpu.page_tags(IPA)?, pattern(5));
    Ok(())
}

pub fn other_memory_at_the_same_address_has_its_own_tags<T: Testbed>(testbed: &T) -> Verdict {
    let file = testbed.memory_file(2)?;
    testbed.set_file_tags(&file, 0, &pattern(6))?;
    let mut guest = Guest::with_private_memory(testbed, 2)?;
    guest.cpu.set_page_tags(IPA, &pattern(7))?;
    guest.cpu.set_page_tags(page(1), &pattern(8))?;

    testbed.remap(&guest.memory, 0, Backing::Private(&file))?;

    assert_eq!(guest.cpu.page_tags(IPA)?, pattern(6));
    assert_eq!(guest.cpu.page_tags(page(1))?, TagPage::ZERO);
    Ok(())
}
