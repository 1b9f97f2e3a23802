//! Which pages a migration has to send is told by the dirty log, tags included (seed 000).

use engine::{Memslot, TagCopyError, Vm};

use super::{Guest, IPA, SLOT, TAG, copied_tags, copy_tags, give, page, pattern, slot_of};
use crate::{Backing, GuestCpu, Stop, Testbed, Verdict};

const PAGES: usize = 8;

/// A guest that has touched all of its memory, of which the writes are logged from now on.
fn logged_guest<T: Testbed>(testbed: &T) -> Result<Guest<T>, Stop> {
    let mut guest = Guest::with(testbed, testbed.map(Backing::Anonymous, PAGES)?)?;
    for index in 0..PAGES {
        guest.cpu.store(page(index), 1)?;
    }
    let logging = Memslot {
        log_dirty: true,
        ..slot_of(&guest.memory)
    };
    give(&*guest.vm, &logging)?;
    guest.vm.take_dirty_log(SLOT)?;
    Ok(guest)
}

pub fn a_store_of_data_is_logged<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = logged_guest(testbed)?;

    guest.cpu.store(page(2), 2)?;
    guest.cpu.store(page(5), 2)?;

    assert_eq!(guest.vm.take_dirty_log(SLOT)?, [0b10_0100]);
    Ok(())
}

pub fn a_store_of_a_tag_alone_is_logged<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = logged_guest(testbed)?;

    guest.cpu.stg(page(3) + 16, TAG)?;

    assert_eq!(guest.vm.take_dirty_log(SLOT)?, [0b1000]);
    assert_eq!(guest.cpu.load(page(3) + 16)?, 0);
    Ok(())
}

pub fn a_load_of_a_tag_is_not_logged<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = logged_guest(testbed)?;

    guest.cpu.ldg(page(3))?;

    assert_eq!(guest.vm.take_dirty_log(SLOT)?, [0]);
    Ok(())
}

pub fn a_page_is_logged_again_after_the_log_was_taken<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = logged_guest(testbed)?;
    guest.cpu.stg(page(6), TAG)?;
    guest.vm.take_dirty_log(SLOT)?;

    let between = guest.vm.take_dirty_log(SLOT)?;
    guest.cpu.stg(page(6), TAG)?;

    assert_eq!(between, [0]);
    assert_eq!(guest.vm.take_dirty_log(SLOT)?, [0b100_0000]);
    Ok(())
}

pub fn tags_cannot_be_copied_in_while_writes_are_logged<T: Testbed>(testbed: &T) -> Verdict {
    let guest = logged_guest(testbed)?;
    let guarded = testbed.rules().guards_dirty_log;

    let outcome = guest.vm.copy_tags_to_guest(IPA, &pattern(1).unpack());

    let refused = matches!(outcome, Err(TagCopyError::DirtyLogging { .. }));
    assert_eq!((outcome.is_ok(), refused), (!guarded, guarded));
    assert_eq!(guest.vm.take_dirty_log(SLOT)?, [0]);
    Ok(())
}

pub fn tags_can_be_copied_out_while_writes_are_logged<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = logged_guest(testbed)?;
    guest.cpu.set_page_tags(page(1), &pattern(2))?;

    let tags = copied_tags(&*guest.vm, page(1))?;

    assert_eq!(tags, pattern(2));
    Ok(())
}

pub fn tags_can_be_copied_in_when_logging_has_ended<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = logged_guest(testbed)?;

    give(&*guest.vm, &slot_of(&guest.memory))?;
    copy_tags(&*guest.vm, page(1), &pattern(3))?;

    assert_eq!(guest.cpu.page_tags(page(1))?, pattern(3));
    Ok(())
}
