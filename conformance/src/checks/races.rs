//! Many CPUs fault pages in at once, with no lock above the page (seed 001): two vCPUs touch the
//! same pages first, in memory with stale tags, while a third thread copies tags.

use std::sync::{Arc, Barrier};
use std::thread;

use engine::Vm;
use mte::Tag;

use super::{SLOT, STALE, give, page, require_shared_memory, slot_of, vm_with_mte};
use crate::{Backing, GRANULES, GuestCpu, PAGE, Stop, Testbed, Verdict, VmOf, require};

/// Each round is on fresh memory.
const ROUNDS: usize = 6;
const PAGES: usize = 512;

/// What the first and the second vCPU store, in granules 0 and 1 of every page.
const FIRST: Tag = Tag::from_low_bits(3);
const SECOND: Tag = Tag::from_low_bits(5);
/// What the copy writes everywhere.
const COPIED: Tag = Tag::from_low_bits(9);

/// Lets two vCPUs touch all pages of `memory` while this thread does `meanwhile` until they are done.
fn touch_twice<T: Testbed>(
    [first, second]: [&mut T::Cpu; 2],
    mut meanwhile: impl FnMut() -> Verdict,
) -> Verdict {
    let start = Barrier::new(3);
    let touch = |cpu: &mut T::Cpu, granule: u64, tag| {
        start.wait();
        cpu.stg_each(page(0) + granule * 16, PAGE, PAGES as u64, tag)
    };
    thread::scope(|scope| {
        let threads = [
            scope.spawn(|| touch(first, 0, FIRST)),
            scope.spawn(|| touch(second, 1, SECOND)),
        ];
        start.wait();
        // Once at least, however soon they are done.
        meanwhile()?;
        while threads.iter().any(|thread| !thread.is_finished()) {
            meanwhile()?;
        }
        for thread in threads {
            thread.join().expect("a vCPU's thread")?;
        }
        Ok(())
    })
}

fn copy_out<T: Testbed>(vm: &VmOf<T>) -> Result<Vec<u8>, Stop> {
    let mut tags = vec![0xff; PAGES * GRANULES];
    let covered = vm.copy_tags_from_guest(page(0), &mut tags)?;
    assert_eq!(covered, PAGES as u64 * PAGE);
    Ok(tags)
}

/// One round on fresh private memory, then `check` on the tags of each page.
fn round<T: Testbed>(
    testbed: &T,
    vm: &Arc<VmOf<T>>,
    cpus: [&mut T::Cpu; 2],
    meanwhile: impl FnMut() -> Verdict,
    check: impl Fn(&[u8]),
) -> Verdict {
    let memory = testbed.map(Backing::Anonymous, PAGES)?;
    testbed.free_tagged_pages(2 * PAGES, STALE)?;
    give(&**vm, &slot_of(&memory))?;

    touch_twice::<T>(cpus, meanwhile)?;

    copy_out::<T>(vm)?.chunks(GRANULES).for_each(check);
    Ok(vm.delete_memslot(SLOT)?)
}

pub fn two_vcpus_touch_the_same_pages_first_while_tags_are_copied_out<T: Testbed>(
    testbed: &T,
) -> Verdict {
    let vm = vm_with_mte(testbed)?;
    let (mut first, mut second) = (testbed.cpu(&vm, 0)?, testbed.cpu(&vm, 1)?);
    let look = || {
        for tags in copy_out::<T>(&vm)?.chunks(GRANULES) {
            assert!([0, FIRST.value()].contains(&tags[0]), "{tags:?}");
            assert!([0, SECOND.value()].contains(&tags[1]), "{tags:?}");
            assert!(tags[2..].iter().all(|tag| *tag == 0), "{tags:?}");
        }
        Ok(())
    };

    for _ in 0..ROUNDS {
        round(testbed, &vm, [&mut first, &mut second], look, |tags| {
            assert_eq!(tags[..2], [FIRST.value(), SECOND.value()]);
            assert!(tags[2..].iter().all(|tag| *tag == 0), "{tags:?}");
        })?;
    }
    Ok(())
}

pub fn two_vcpus_touch_pages_first_while_tags_are_copied_in<T: Testbed>(testbed: &T) -> Verdict {
    require(
        testbed.rules().guards_first_touch,
        "on this host a first touch may undo a copy of tags made at the same time",
    )?;
    let vm = vm_with_mte(testbed)?;
    let (mut first, mut second) = (testbed.cpu(&vm, 0)?, testbed.cpu(&vm, 1)?);
    let tags = [COPIED.value(); PAGES * GRANULES];
    let write = || {
        let covered = vm.copy_tags_to_guest(page(0), &tags)?;
        assert_eq!(covered, PAGES as u64 * PAGE);
        Ok(())
    };

    for _ in 0..ROUNDS {
        round(testbed, &vm, [&mut first, &mut second], write, |tags| {
            assert!(
                [FIRST, COPIED].map(Tag::value).contains(&tags[0]),
                "{tags:?}"
            );
            assert!(
                [SECOND, COPIED].map(Tag::value).contains(&tags[1]),
                "{tags:?}"
            );
            assert!(
                tags[2..].iter().all(|tag| *tag == COPIED.value()),
                "{tags:?}"
            );
        })?;
    }
    Ok(())
}

pub fn two_guests_touch_the_same_shared_pages_first<T: Testbed>(testbed: &T) -> Verdict {
    require_shared_memory(testbed)?;
    let (vm, other) = (vm_with_mte(testbed)?, vm_with_mte(testbed)?);
    let (mut first, mut second) = (testbed.cpu(&vm, 0)?, testbed.cpu(&other, 0)?);

    for _ in 0..ROUNDS {
        let file = testbed.memory_file(PAGES)?;
        let (memory, others) = (
            testbed.map(Backing::Shared(&file), PAGES)?,
            testbed.map(Backing::Shared(&file), PAGES)?,
        );
        testbed.free_tagged_pages(2 * PAGES, STALE)?;
        give(&*vm, &slot_of(&memory))?;
        give(&*other, &slot_of(&others))?;

        touch_twice::<T>([&mut first, &mut second], || Ok(()))?;

        for tags in copy_out::<T>(&vm)?.chunks(GRANULES) {
            assert_eq!(tags[..2], [FIRST.value(), SECOND.value()]);
            assert!(tags[2..].iter().all(|tag| *tag == 0), "{tags:?}");
        }
        vm.delete_memslot(SLOT)?;
        other.delete_memslot(SLOT)?;
    }
    Ok(())
}
