//! Tags that a former owner left in host memory are never seen (seed 000).
//!
//! Each check fills host pages with a tag, frees them, and makes sure that pages of the guest are
//! among those freed: a host that happened to give others would show nothing.

use mte::{Tag, TagPage};

use super::{Guest, STALE, TAG, copied_tags, page, require_shared_memory};
use crate::{Backing, GuestCpu, PAGE, Stop, Testbed, Verdict, require};

/// As many as make it certain that some are handed out again, whatever processor asks for them.
const FREED: usize = 2048;
const PAGES: usize = 256;
/// Of how many recycled pages the guest then loads the tags.
const LOOKED_AT: usize = 16;

/// Those pages of the guest that carry stale tags unless somebody cleared them.
fn recycled<T: Testbed>(
    testbed: &T,
    freed: &[u64],
    memory: &T::Mapping,
) -> Result<Vec<usize>, Stop> {
    let is_recycled = |frame: &Option<u64>| frame.is_some_and(|frame| freed.contains(&frame));
    let pages: Vec<usize> = testbed
        .frames(memory)?
        .iter()
        .enumerate()
        .filter(|(_, frame)| is_recycled(frame))
        .map(|(page, _)| page)
        .take(LOOKED_AT)
        .collect();
    require(
        !pages.is_empty(),
        "the host handed none of the freed pages out again",
    )?;
    Ok(pages)
}

fn assert_clean<T: Testbed>(testbed: &T, freed: &[u64], guest: &mut Guest<T>) -> Verdict {
    for index in recycled(testbed, freed, &guest.memory)? {
        assert_eq!(guest.cpu.page_tags(page(index))?, TagPage::ZERO);
    }
    Ok(())
}

pub fn memory_that_the_guest_touches_first_shows_no_stale_tags<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, PAGES)?;
    let freed = testbed.free_tagged_pages(FREED, STALE)?;

    for index in 0..PAGES {
        guest.cpu.store(page(index), 1)?;
    }

    assert_clean(testbed, &freed, &mut guest)
}

pub fn memory_that_the_vmm_wrote_first_shows_no_stale_tags<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, PAGES)?;
    let freed = testbed.free_tagged_pages(FREED, STALE)?;

    for index in 0..PAGES {
        testbed.device_writes(&guest.memory, index as u64 * PAGE, 1)?;
    }

    assert_clean(testbed, &freed, &mut guest)
}

pub fn shared_memory_shows_no_stale_tags<T: Testbed>(testbed: &T) -> Verdict {
    require_shared_memory(testbed)?;
    let file = testbed.memory_file(PAGES)?;
    let memory = testbed.map(Backing::Shared(&file), PAGES)?;
    let mut guest = Guest::with(testbed, memory)?;
    let freed = testbed.free_tagged_pages(FREED, STALE)?;

    for index in 0..PAGES {
        guest.cpu.store(page(index), 1)?;
    }
    // The process has to map what the guest touched, to be told which pages they are.
    for index in 0..PAGES {
        testbed.device_reads(&guest.memory, index as u64 * PAGE)?;
    }

    assert_clean(testbed, &freed, &mut guest)
}

pub fn the_tag_copy_shows_no_stale_tags<T: Testbed>(testbed: &T) -> Verdict {
    let guest = Guest::with_private_memory(testbed, PAGES)?;
    let freed = testbed.free_tagged_pages(FREED, STALE)?;

    for index in 0..PAGES {
        testbed.device_writes(&guest.memory, index as u64 * PAGE, 1)?;
    }

    for index in recycled(testbed, &freed, &guest.memory)? {
        assert_eq!(copied_tags(&*guest.vm, page(index))?, TagPage::ZERO);
    }
    Ok(())
}

pub fn a_tag_store_as_first_touch_leaves_no_stale_tags_around_it<T: Testbed>(
    testbed: &T,
) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, PAGES)?;
    let freed = testbed.free_tagged_pages(FREED, STALE)?;
    let mut expected = TagPage::filled(Tag::ZERO);
    expected.set(1, TAG);

    guest.cpu.stg_each(page(0) + 16, PAGE, PAGES as u64, TAG)?;

    for index in recycled(testbed, &freed, &guest.memory)? {
        assert_eq!(guest.cpu.page_tags(page(index))?, expected);
    }
    Ok(())
}
