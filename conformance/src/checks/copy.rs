//! Tags copied in bulk: what is copied, short counts, errors (seed 003; Linux api.rst 4.130).

use engine::{Memslot, TagCopyError, Vm};
use mte::{Tag, TagPage};

use super::{Guest, IPA, SLOT, TAG, copied_tags, copy_tags, give, page, pattern, slot_of};
use crate::{GRANULES, GuestCpu, PAGE, Testbed, Verdict, require};

pub fn what_was_copied_in_is_what_the_guest_loads<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 2)?;
    guest.cpu.stg(IPA, TAG)?;
    let tags = [pattern(1).unpack(), pattern(2).unpack()].concat();

    let covered = guest.vm.copy_tags_to_guest(IPA, &tags)?;

    assert_eq!(covered, 2 * PAGE);
    assert_eq!(guest.cpu.page_tags(page(0))?, pattern(1));
    assert_eq!(guest.cpu.page_tags(page(1))?, pattern(2));
    Ok(())
}

pub fn what_the_guest_stored_is_what_is_copied_out<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 2)?;
    guest.cpu.set_page_tags(page(0), &pattern(3))?;
    guest.cpu.set_page_tags(page(1), &pattern(4))?;
    let mut tags = [0xff; 2 * GRANULES];

    let covered = guest.vm.copy_tags_from_guest(IPA, &mut tags)?;

    assert_eq!(covered, 2 * PAGE);
    assert_eq!(tags[..GRANULES], pattern(3).unpack());
    assert_eq!(tags[GRANULES..], pattern(4).unpack());
    Ok(())
}

pub fn tags_copied_in_before_the_first_touch_are_kept<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 1)?;

    copy_tags(&*guest.vm, IPA, &pattern(5))?;

    assert_eq!(guest.cpu.page_tags(IPA)?, pattern(5));
    assert_eq!(guest.cpu.load(IPA)?, 0);
    Ok(())
}

pub fn untouched_memory_has_tags_of_zero<T: Testbed>(testbed: &T) -> Verdict {
    let guest = Guest::with_private_memory(testbed, 1)?;

    let tags = copied_tags(&*guest.vm, IPA)?;

    assert_eq!(tags, TagPage::ZERO);
    Ok(())
}

pub fn only_the_low_four_bits_count<T: Testbed>(testbed: &T) -> Verdict {
    let guest = Guest::with_private_memory(testbed, 1)?;
    let noisy = pattern(6).unpack().map(|tag| tag | 0xa0);

    guest.vm.copy_tags_to_guest(IPA, &noisy)?;

    assert_eq!(copied_tags(&*guest.vm, IPA)?, pattern(6));
    Ok(())
}

pub fn parts_of_pages_are_refused<T: Testbed>(testbed: &T) -> Verdict {
    let guest = Guest::with_private_memory(testbed, 2)?;
    let mut tags = [0; GRANULES];

    let outcomes = [
        guest.vm.copy_tags_from_guest(IPA + 16, &mut tags),
        guest.vm.copy_tags_to_guest(IPA + 16, &tags),
        guest.vm.copy_tags_from_guest(IPA, &mut tags[1..]),
        guest.vm.copy_tags_to_guest(IPA, &tags[1..]),
    ];

    for outcome in outcomes {
        assert!(
            matches!(outcome, Err(TagCopyError::Range { .. })),
            "{outcome:?}"
        );
    }
    Ok(())
}

pub fn more_than_two_gib_are_refused<T: Testbed>(testbed: &T) -> Verdict {
    require(
        testbed.rules().longest_copy < 1 << 31,
        "this host copies the tags of as much memory as it is asked for",
    )?;
    let guest = Guest::with_private_memory(testbed, 1)?;
    let tags = vec![0; (1 << 31) / 16];

    let outcome = guest.vm.copy_tags_to_guest(IPA, &tags);

    assert!(
        matches!(outcome, Err(TagCopyError::Range { .. })),
        "{outcome:?}"
    );
    Ok(())
}

pub fn nothing_to_copy_is_no_error<T: Testbed>(testbed: &T) -> Verdict {
    let guest = Guest::with_private_memory(testbed, 1)?;

    let out = guest.vm.copy_tags_from_guest(IPA, &mut [])?;
    let nowhere = guest.vm.copy_tags_to_guest(0, &[])?;

    assert_eq!((out, nowhere), (0, 0));
    Ok(())
}

pub fn memory_that_is_not_the_guests_is_an_error<T: Testbed>(testbed: &T) -> Verdict {
    let guest = Guest::with_private_memory(testbed, 1)?;
    let mut tags = [0; 2 * GRANULES];

    let outcomes = [
        guest.vm.copy_tags_from_guest(IPA - PAGE, &mut tags),
        guest.vm.copy_tags_to_guest(IPA - PAGE, &tags),
    ];

    for outcome in outcomes {
        assert!(
            matches!(outcome, Err(TagCopyError::NoMemory { .. })),
            "{outcome:?}"
        );
    }
    Ok(())
}

pub fn the_count_is_short_where_the_guests_memory_ends<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 2)?;
    let tags = [pattern(7).unpack(), pattern(8).unpack(), [0; GRANULES]].concat();
    let mut back = tags.clone();

    let written = guest.vm.copy_tags_to_guest(IPA, &tags)?;
    let read = guest.vm.copy_tags_from_guest(IPA, &mut back)?;

    assert_eq!((written, read), (2 * PAGE, 2 * PAGE));
    assert_eq!(back, tags);
    assert_eq!(guest.cpu.page_tags(page(1))?, pattern(8));
    Ok(())
}

pub fn a_read_only_memslot_gives_tags_and_takes_none<T: Testbed>(testbed: &T) -> Verdict {
    let guest = Guest::with_private_memory(testbed, 1)?;
    copy_tags(&*guest.vm, IPA, &pattern(9))?;
    guest.vm.delete_memslot(SLOT)?;
    let read_only = Memslot {
        read_only: true,
        ..slot_of(&guest.memory)
    };
    give(&*guest.vm, &read_only)?;

    let outcome = guest.vm.copy_tags_to_guest(IPA, &[0; GRANULES]);

    assert!(
        matches!(outcome, Err(TagCopyError::NoMemory { .. })),
        "{outcome:?}"
    );
    assert_eq!(copied_tags(&*guest.vm, IPA)?, pattern(9));
    Ok(())
}

pub fn a_buffer_that_faults_in_the_first_page_is_an_error<T: Testbed>(testbed: &T) -> Verdict {
    let guest = Guest::with_private_memory(testbed, 2)?;
    let half = &pattern(10).unpack()[..GRANULES / 2];

    let outcome = testbed.copy_tags_from_short_buffer(&guest.vm, IPA, 2 * PAGE, half)?;

    assert!(
        matches!(outcome, Err(TagCopyError::NoMemory { .. })),
        "{outcome:?}"
    );
    Ok(())
}

pub fn a_buffer_that_faults_later_makes_the_count_short<T: Testbed>(testbed: &T) -> Verdict {
    let guest = Guest::with_private_memory(testbed, 3)?;
    let tags = [pattern(11).unpack(), pattern(12).unpack()].concat();
    let (one_page, page_and_half) = (&tags[..GRANULES], &tags[..GRANULES * 3 / 2]);

    let first = testbed.copy_tags_from_short_buffer(&guest.vm, IPA, 3 * PAGE, one_page)?;
    let second = testbed.copy_tags_from_short_buffer(&guest.vm, IPA, 3 * PAGE, page_and_half)?;

    assert_eq!((first?, second?), (PAGE, PAGE));
    assert_eq!(copied_tags(&*guest.vm, page(0))?, pattern(11));
    Ok(())
}

pub fn a_page_whose_buffer_faulted_has_no_stale_tags<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 1)?;
    guest.cpu.stg_each(IPA, 16, GRANULES as u64, TAG)?;
    let half = [0x3; GRANULES / 2];
    let expected = HALF_WRITTEN[usize::from(testbed.rules().clears_half_written_pages)];

    let outcome = testbed.copy_tags_from_short_buffer(&guest.vm, IPA, PAGE, &half)?;

    assert!(outcome.is_err(), "{outcome:?}");
    let tags = guest.cpu.page_tags(IPA)?;
    assert_eq!((tags.get(0), tags.get(255)), expected);
    Ok(())
}

/// The first and last tag of such a page: where hosts leave it as it is, and where they clear it.
const HALF_WRITTEN: [(Tag, Tag); 2] = [(Tag::from_low_bits(3), TAG), (Tag::ZERO, Tag::ZERO)];
