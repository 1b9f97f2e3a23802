//! Tags and copy-on-write: clones of a tagged base (seed 000).

use super::{Guest, IPA, TAG, copied_tags, copy_tags, pattern};
use crate::{Backing, GuestCpu, PAGE, Stop, Testbed, Verdict};

/// Two guests that have private mappings of one file, whose page has the tags `pattern(1)`.
struct Clones<T: Testbed> {
    first: Guest<T>,
    second: Guest<T>,
    base: T::File,
}

fn two_clones<T: Testbed>(testbed: &T) -> Result<Clones<T>, Stop> {
    let base = testbed.memory_file(1)?;
    testbed.set_file_tags(&base, 0, &pattern(1))?;
    let clone = || Guest::with(testbed, testbed.map(Backing::Private(&base), 1)?);
    let (first, second) = (clone()?, clone()?);
    Ok(Clones {
        first,
        second,
        base,
    })
}

pub fn a_copy_on_write_keeps_the_tags<T: Testbed>(testbed: &T) -> Verdict {
    let Clones {
        mut first,
        mut second,
        base,
    } = two_clones(testbed)?;
    let before = first.cpu.page_tags(IPA)?;

    first.cpu.store(IPA + PAGE - 8, 1)?;

    assert_eq!(before, pattern(1));
    assert_eq!(first.cpu.page_tags(IPA)?, pattern(1));
    assert_eq!(second.cpu.page_tags(IPA)?, pattern(1));
    assert_eq!(second.cpu.load(IPA + PAGE - 8)?, 0);
    assert_eq!(testbed.file_tags(&base, 0)?, pattern(1));
    Ok(())
}

pub fn a_tag_store_in_a_clone_changes_that_clone_alone<T: Testbed>(testbed: &T) -> Verdict {
    let Clones {
        mut first,
        mut second,
        base,
    } = two_clones(testbed)?;
    let mut changed = pattern(1);
    changed.set(3, TAG);

    first.cpu.stg(IPA + 3 * 16, TAG)?;

    assert_ne!(changed, pattern(1));
    assert_eq!(first.cpu.page_tags(IPA)?, changed);
    assert_eq!(second.cpu.page_tags(IPA)?, pattern(1));
    assert_eq!(testbed.file_tags(&base, 0)?, pattern(1));
    Ok(())
}

pub fn the_tag_copy_into_a_clone_changes_that_clone_alone<T: Testbed>(testbed: &T) -> Verdict {
    let Clones {
        mut first,
        mut second,
        base,
    } = two_clones(testbed)?;

    copy_tags(&*first.vm, IPA, &pattern(2))?;

    assert_eq!(first.cpu.page_tags(IPA)?, pattern(2));
    assert_eq!(copied_tags(&*first.vm, IPA)?, pattern(2));
    assert_eq!(second.cpu.page_tags(IPA)?, pattern(1));
    assert_eq!(testbed.file_tags(&base, 0)?, pattern(1));
    Ok(())
}
