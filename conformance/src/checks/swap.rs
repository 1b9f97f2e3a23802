//! Tags outlive swap (seed 003).

use std::sync::Barrier;
use std::thread;

use mte::TagPage;

use super::{
    Guest, STALE, TAG, copied_tags, copy_tags, give, page, pattern, require_shared_memory, slot_of,
    vm_with_mte,
};
use crate::{Backing, GRANULES, GuestCpu, PAGE, Testbed, Verdict};

const PAGES: usize = 4;

fn assert_outlive_swap<T: Testbed>(testbed: &T, memory: T::Mapping) -> Verdict {
    let mut guest = Guest::with(testbed, memory)?;
    for index in 0..PAGES {
        let tags = pattern(index as u8);
        guest.cpu.set_page_tags(page(index), &tags)?;
        guest.cpu.store(page(index), index as u64)?;
    }

    testbed.swap_out(&guest.memory)?;
    testbed.free_tagged_pages(PAGES, STALE)?;

    for index in 0..PAGES {
        assert_eq!(guest.cpu.page_tags(page(index))?, pattern(index as u8));
        assert_eq!(guest.cpu.load(page(index))?, index as u64);
    }
    Ok(())
}

pub fn tags_of_private_memory_outlive_swap<T: Testbed>(testbed: &T) -> Verdict {
    let memory = testbed.map(Backing::Anonymous, PAGES)?;

    assert_outlive_swap(testbed, memory)
}

pub fn tags_of_shared_memory_outlive_swap<T: Testbed>(testbed: &T) -> Verdict {
    require_shared_memory(testbed)?;
    let file = testbed.memory_file(PAGES)?;
    let memory = testbed.map(Backing::Shared(&file), PAGES)?;

    assert_outlive_swap(testbed, memory)
}

pub fn untagged_memory_that_was_swapped_shows_no_stale_tags<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, PAGES)?;
    for index in 0..PAGES {
        testbed.device_writes(&guest.memory, index as u64 * PAGE, 1)?;
    }

    testbed.swap_out(&guest.memory)?;
    testbed.free_tagged_pages(GRANULES, STALE)?;

    for index in 0..PAGES {
        assert_eq!(guest.cpu.page_tags(page(index))?, TagPage::ZERO);
    }
    Ok(())
}

pub fn tags_are_copied_out_of_swapped_memory<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 1)?;
    guest.cpu.set_page_tags(page(0), &pattern(1))?;

    testbed.swap_out(&guest.memory)?;

    assert_eq!(copied_tags(&*guest.vm, page(0))?, pattern(1));
    Ok(())
}

pub fn tags_are_copied_into_swapped_memory<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 1)?;
    guest.cpu.set_page_tags(page(0), &pattern(1))?;
    guest.cpu.store(page(0), 0x1234)?;

    testbed.swap_out(&guest.memory)?;
    copy_tags(&*guest.vm, page(0), &pattern(2))?;

    assert_eq!(guest.cpu.page_tags(page(0))?, pattern(2));
    assert_eq!(guest.cpu.load(page(0))?, 0x1234);
    Ok(())
}

/// How often the pages are tagged anew while they are being swapped out.
const ROUNDS: u64 = 8;
const CROWD: usize = 32;

pub fn memory_is_swapped_while_two_vcpus_tag_it<T: Testbed>(testbed: &T) -> Verdict {
    let memory = testbed.map(Backing::Anonymous, CROWD)?;
    let vm = vm_with_mte(testbed)?;
    give(&*vm, &slot_of(&memory))?;
    let (first, second) = (testbed.cpu(&vm, 0)?, testbed.cpu(&vm, 1)?);
    let start = Barrier::new(3);
    // Each vCPU has a granule of its own in every page.
    let tag_all = |mut cpu: T::Cpu, granule: u64| {
        start.wait();
        for _ in 0..ROUNDS {
            cpu.stg_each(page(0) + granule * 16, PAGE, CROWD as u64, TAG)?;
        }
        Verdict::Ok(())
    };
    let mut expected = TagPage::ZERO;
    expected.set(0, TAG);
    expected.set(1, TAG);

    thread::scope(|scope| {
        let threads = [
            scope.spawn(|| tag_all(first, 0)),
            scope.spawn(|| tag_all(second, 1)),
        ];
        start.wait();
        while threads.iter().any(|thread| !thread.is_finished()) {
            testbed.swap_some(&memory)?;
        }
        for thread in threads {
            thread.join().expect("a vCPU's thread")?;
        }
        Verdict::Ok(())
    })?;

    for index in 0..CROWD {
        assert_eq!(copied_tags(&*vm, page(index))?, expected);
    }
    drop(vm);
    Ok(())
}
