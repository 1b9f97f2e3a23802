//! Two memories, or one at two times, compared: data and tags.

use std::ops::Range;

use mte::{GRANULE_SIZE, TagPage};
use serde::Serialize;
use stream::{Page, ZERO_PAGE};

use crate::error::{Error, Result};
use crate::memory::TaggedMemory;
use crate::view::PAGE;

/// Pages compared at once.
const BATCH: u64 = 64;

/// What is other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Data alone.
    Data,
    /// Tags alone.
    Tags,
    /// Both.
    Both,
}

/// Pages one after the other with the same change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Their guest-physical addresses.
    pub range: Range<u64>,
    /// What is other in each of them.
    pub change: Change,
    /// Granules with other data.
    pub data_granules: u64,
    /// Granules with another tag.
    pub tag_granules: u64,
}

/// All that was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Pages populated in either.
    pub pages: u64,
    /// Of these, populated in the first alone.
    pub only_first: u64,
    /// Populated in the second alone.
    pub only_second: u64,
    /// Pages with other data and the same tags.
    pub data: u64,
    /// Pages with other tags and the same data.
    pub tags: u64,
    /// Pages with other data and other tags.
    pub both: u64,
    /// Granules with other data.
    pub data_granules: u64,
    /// Granules with another tag.
    pub tag_granules: u64,
}

/// Compares guest-physical memory and gives what is other to `each`, in the order of addresses. A page that is populated in
/// one alone is compared with zeros and tag 0, which is what a guest reads there.
///
/// # Errors
/// [`Error::Incomparable`] if only one of them has tags; whatever keeps them from being read; what `each` returns.
pub fn differences(
    first: &mut dyn TaggedMemory,
    second: &mut dyn TaggedMemory,
    range: Range<u64>,
    each: &mut dyn FnMut(Difference) -> Result<()>,
) -> Result<Totals> {
    if first.has_tags() != second.has_tags() {
        return Err(Error::Incomparable);
    }
    let mut sides = [Side::new(first), Side::new(second)];
    let mut totals = Totals::default();
    let mut open: Option<Difference> = None;
    let pages = range.start / PAGE..range.end.div_ceil(PAGE);
    let mut at = pages.start;
    while at < pages.end {
        let [one, other] = &mut sides;
        let runs = [one.memory.next_run(at)?, other.memory.next_run(at)?];
        let Some(start) = runs.iter().flatten().map(|run| run.start).min() else {
            break;
        };
        // Up to where a side becomes populated or no longer is.
        let ends = runs.iter().flatten().flat_map(|run| [run.start, run.end]);
        let end = ends.filter(|end| *end > start).min().unwrap_or(start);
        let end = end.min(start + BATCH).min(pages.end);
        if start >= end {
            break;
        }
        let there = runs.map(|run| run.is_some_and(|run| run.start <= start));
        totals.pages += end - start;
        match there {
            [true, false] => totals.only_first += end - start,
            [false, true] => totals.only_second += end - start,
            _ => {}
        }
        for side in &mut sides {
            side.read(start, (end - start) as usize)?;
        }
        for (page, place) in (start..end).zip(0..) {
            let Some(found) = compared(&sides, page, place) else {
                continue;
            };
            totals.add(&found);
            match &mut open {
                Some(open) if open.goes_on_with(&found) => open.join(&found),
                _ => {
                    if let Some(whole) = open.replace(found) {
                        each(whole)?;
                    }
                }
            }
        }
        at = end;
    }
    if let Some(last) = open {
        each(last)?;
    }
    Ok(totals)
}

impl Totals {
    fn add(&mut self, found: &Difference) {
        match found.change {
            Change::Data => self.data += 1,
            Change::Tags => self.tags += 1,
            Change::Both => self.both += 1,
        }
        self.data_granules += found.data_granules;
        self.tag_granules += found.tag_granules;
    }
}

impl Difference {
    fn goes_on_with(&self, next: &Self) -> bool {
        self.range.end == next.range.start && self.change == next.change
    }

    fn join(&mut self, next: &Self) {
        self.range.end = next.range.end;
        self.data_granules += next.data_granules;
        self.tag_granules += next.tag_granules;
    }
}

/// One of the two, and the pages of it that are compared now.
struct Side<'a> {
    memory: &'a mut dyn TaggedMemory,
    data: Vec<Page>,
    tags: Vec<TagPage>,
}

impl<'a> Side<'a> {
    fn new(memory: &'a mut dyn TaggedMemory) -> Self {
        let tags = if memory.has_tags() { BATCH as usize } else { 0 };
        Self {
            memory,
            data: vec![ZERO_PAGE; BATCH as usize],
            tags: vec![TagPage::ZERO; tags],
        }
    }

    fn read(&mut self, first: u64, count: usize) -> Result<()> {
        let tags = self.tags.get_mut(..count).unwrap_or_default();
        self.memory.read(first, &mut self.data[..count], tags)
    }
}

fn compared(sides: &[Side<'_>; 2], page: u64, place: usize) -> Option<Difference> {
    let [one, other] = sides.each_ref().map(|side| &side.data[place]);
    let data_granules = if one == other {
        0
    } else {
        let granules = one.chunks(GRANULE_SIZE).zip(other.chunks(GRANULE_SIZE));
        granules.filter(|(one, other)| one != other).count() as u64
    };
    let tag_granules = match sides.each_ref().map(|side| side.tags.get(place)) {
        [Some(one), Some(other)] if one != other => {
            let granules = one.iter().zip(other.iter());
            granules.filter(|(one, other)| one != other).count() as u64
        }
        _ => 0,
    };
    let change = match (data_granules, tag_granules) {
        (0, 0) => return None,
        (_, 0) => Change::Data,
        (0, _) => Change::Tags,
        _ => Change::Both,
    };
    Some(Difference {
        range: page * PAGE..(page + 1).saturating_mul(PAGE),
        change,
        data_granules,
        tag_granules,
    })
}
