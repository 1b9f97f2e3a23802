//! Sets of pages, and sources that have no others.

use std::io;
use std::ops::Range;

use mte::TagPage;

use crate::batch::Page;
use crate::header::Metadata;
use crate::source::PageSource;

/// Pages out of a range, a bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    /// Which pages there may be in it.
    range: Range<u64>,
    words: Vec<u64>,
}

impl PageSet {
    /// None of the pages of `range`.
    #[must_use]
    pub fn none(range: Range<u64>) -> Self {
        let pages = range.end.saturating_sub(range.start);
        Self {
            words: vec![0; pages.div_ceil(64) as usize],
            range,
        }
    }

    /// The range that its pages are in.
    #[must_use]
    pub const fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// Adds pages, and says how many of them it did not have. Those outside of its range are left out.
    pub fn insert(&mut self, pages: Range<u64>) -> u64 {
        let mut new = 0;
        let mut page = pages.start.max(self.range.start);
        let end = pages.end.min(self.range.end);
        while page < end {
            let bit = page - self.range.start;
            let in_word = (64 - bit % 64).min(end - page);
            let mask = (u64::MAX >> (64 - in_word)) << (bit % 64);
            let word = &mut self.words[(bit / 64) as usize];
            new += u64::from((mask & !*word).count_ones());
            *word |= mask;
            page += in_word;
        }
        new
    }

    /// Adds all of `other`, which has the same range.
    pub fn add(&mut self, other: &Self) {
        debug_assert_eq!(self.range, other.range);
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
    }

    /// Removes all of `other`, which has the same range.
    pub fn remove(&mut self, other: &Self) {
        debug_assert_eq!(self.range, other.range);
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    /// Takes its first pages out of it: so many, or all.
    #[must_use]
    pub fn split_first(&mut self, pages: u64) -> Self {
        let mut first = Self::none(self.range.clone());
        let mut wanted = pages;
        for (from, to) in self.words.iter_mut().zip(&mut first.words) {
            let there = u64::from(from.count_ones());
            if there <= wanted {
                *to = std::mem::take(from);
                wanted -= there;
                continue;
            }
            for _ in 0..wanted {
                *to |= *from & from.wrapping_neg();
                *from &= *from - 1;
            }
            break;
        }
        first
    }

    /// Whether it has a page.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        self.range.contains(&page) && {
            let bit = page - self.range.start;
            self.words[(bit / 64) as usize] >> (bit % 64) & 1 == 1
        }
    }

    /// How many pages it has.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The first page at or after `from`, with those that follow at once.
    #[must_use]
    pub fn next_run(&self, from: u64) -> Option<Range<u64>> {
        let start = self.next(from.max(self.range.start), false)?;
        let end = self.next(start, true).unwrap_or(self.range.end);
        Some(start..end)
    }

    /// All runs of pages, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut from = self.range.start;
        std::iter::from_fn(move || {
            let run = self.next_run(from)?;
            from = run.end;
            Some(run)
        })
    }

    /// The first page at or after `from` that it has, or has not.
    fn next(&self, from: u64, absent: bool) -> Option<u64> {
        if from >= self.range.end {
            return None;
        }
        let bit = from - self.range.start;
        let flip = if absent { u64::MAX } else { 0 };
        let mut index = (bit / 64) as usize;
        let mut word = (self.words[index] ^ flip) & (u64::MAX << (bit % 64));
        while word == 0 {
            index += 1;
            word = self.words.get(index)? ^ flip;
        }
        let page = self.range.start + index as u64 * 64 + u64::from(word.trailing_zeros());
        (page < self.range.end).then_some(page)
    }
}

/// The pages of a source that are in a set. They are taken to exist.
pub struct Only<'a, S> {
    source: &'a S,
    pages: &'a PageSet,
}

impl<'a, S> Only<'a, S> {
    /// Those of `source` that `pages` has.
    pub const fn new(source: &'a S, pages: &'a PageSet) -> Self {
        Self { source, pages }
    }
}

impl<S: PageSource> PageSource for Only<'_, S> {
    fn metadata(&self) -> Metadata {
        self.source.metadata()
    }

    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        Ok(self.pages.next_run(from))
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        self.source.read(first, data, tags)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_has_the_pages_that_were_inserted_and_no_others(
            first in 0u64..1000,
            size in 1u64..400,
            inserted in prop::collection::vec((0u64..1500, 0u64..80), 0..20),
        ) {
            let range = first..first + size;
            let mut set = PageSet::none(range.clone());
            let mut expected = std::collections::BTreeSet::new();
            for (start, length) in inserted {
                let before = expected.len();
                let new = set.insert(start..start + length);
                expected.extend((start..start + length).filter(|page| range.contains(page)));
                prop_assert_eq!(new, (expected.len() - before) as u64);
            }

            prop_assert_eq!(set.len(), expected.len() as u64);
            prop_assert_eq!(set.is_empty(), expected.is_empty());
            let listed: Vec<u64> = set.runs().flatten().collect();
            prop_assert_eq!(listed, expected.iter().copied().collect::<Vec<_>>());
            prop_assert!((0..1500).all(|page| set.contains(page) == expected.contains(&page)));
        }
    }

    proptest! {
        #[test]
        fn what_is_split_off_a_set_are_its_first_pages(
            pages in prop::collection::btree_set(5u64..300, 0..200),
            wanted in 0u64..250,
        ) {
            let mut set = PageSet::none(5..300);
            for page in &pages {
                set.insert(*page..page + 1);
            }
            let whole = set.clone();

            let first = set.split_first(wanted);

            let listed = |set: &PageSet| set.runs().flatten().collect::<Vec<u64>>();
            let expected: Vec<u64> = pages.iter().copied().take(wanted as usize).collect();
            prop_assert_eq!(listed(&first), expected);
            let expected: Vec<u64> = pages.into_iter().skip(wanted as usize).collect();
            prop_assert_eq!(listed(&set), expected);
            let mut rest = whole;
            rest.remove(&first);
            prop_assert_eq!(rest, set);
        }
    }

    #[test]
    fn neighbours_are_one_run_across_words() {
        let mut set = PageSet::none(10..300);
        set.insert(70..75);
        set.insert(75..140);

        assert_eq!(set.next_run(0), Some(70..140));
        assert_eq!(set.next_run(100), Some(100..140));
        assert_eq!(set.next_run(140), None);
    }

    #[test]
    fn two_sets_are_put_together() {
        let mut one = PageSet::none(0..128);
        one.insert(3..4);
        let mut other = PageSet::none(0..128);
        other.insert(63..65);
        one.add(&other);

        assert_eq!(one.runs().collect::<Vec<_>>(), [3..4, 63..65]);
    }
}
