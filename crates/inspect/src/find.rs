//! Granules with a tag, or with any other.

use std::ops::Range;

use mte::{GRANULE_SIZE, Tag};

use crate::dump::granules;
use crate::error::Result;
use crate::view::{Gap, Part, View};

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Populated granules with this tag.
    Tag(Tag),
    /// Addresses at which an access by a pointer with this tag does not find it: other tags, and gaps.
    Mismatch(Tag),
}

impl Wanted {
    fn is(self, tag: Tag) -> bool {
        match self {
            Self::Tag(wanted) => tag == wanted,
            Self::Mismatch(expected) => tag != expected,
        }
    }

    fn is_gap(self) -> bool {
        matches!(self, Self::Mismatch(_))
    }
}

/// Gives the granules that are wanted to `each` in the order of addresses, those together that follow each other and have the
/// same tag, or are in the same gap.
///
/// # Errors
/// [`crate::Error::NoTags`]; whatever keeps the memory from being read; what `each` returns.
pub fn find(
    view: &mut View<'_>,
    wanted: Wanted,
    each: &mut dyn FnMut(Range<u64>, Result<Tag, Gap>) -> Result<()>,
) -> Result<()> {
    view.must_have_tags()?;
    let range = view.range();
    let mut open: Option<(Range<u64>, Result<Tag, Gap>)> = None;
    let mut add = |found: Range<u64>, what: Result<Tag, Gap>| -> Result<()> {
        match &mut open {
            Some((before, same)) if before.end == found.start && *same == what => {
                before.end = found.end;
                Ok(())
            }
            _ => match open.replace((found, what)) {
                Some((before, what)) => each(before, what),
                None => Ok(()),
            },
        }
    };
    view.visit_in_order(&mut |part| match part {
        Part::Pages { address, tags, .. } => {
            granules(address, tags, &range, &mut |address, tags| {
                let mut at = address;
                for same in tags.chunk_by(|one, next| one == next) {
                    let end = at + (same.len() * GRANULE_SIZE) as u64;
                    let tag = Tag::from_low_bits(same[0]);
                    if wanted.is(tag) {
                        add(at..end, Ok(tag))?;
                    }
                    at = end;
                }
                Ok(())
            })
        }
        Part::Gap(gap, kind) if wanted.is_gap() => add(
            gap.start.max(range.start)..gap.end.min(range.end),
            Err(kind),
        ),
        Part::Gap(..) => Ok(()),
    })?;
    match open {
        Some((found, what)) => each(found, what),
        None => Ok(()),
    }
}
