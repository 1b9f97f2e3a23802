//! Pages that changed: what the guest wrote, by the engine's dirty log, and what the VMM wrote, by the
//! bitmap of the data mapping. Neither knows the other's writes. A store of a tag alone is a write.

use std::io;
use std::ops::Range;

use mte::TagPage;
use stream::{Metadata, Page, PageSource};

use super::host_page_size;
use crate::layout::{PAGE_SIZE, RAM_START};

/// Pages of 4 KiB, a bit each, from the start of RAM; whole pages of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    words: Vec<u64>,
    /// Pages of RAM.
    pages: u64,
}

impl DirtyPages {
    /// None of the pages of `size` bytes of RAM.
    pub fn none(size: u64) -> Self {
        let pages = size / PAGE_SIZE;
        Self {
            words: vec![0; pages.div_ceil(64) as usize],
            pages,
        }
    }

    /// Adds pages of the host's size, a bit each.
    pub fn add_host_pages(&mut self, log: &[u64]) {
        self.add_blocks(log, host_page_size() / PAGE_SIZE);
    }

    /// Adds pages of 4 KiB, a bit each, and what else is in the host's pages that they are in: tags are
    /// reached by whole pages of the host.
    pub fn add_pages(&mut self, bitmap: &[u64]) {
        let block = host_page_size() / PAGE_SIZE;
        for page in bits(bitmap) {
            let first = page - page % block;
            self.insert(first..first + block);
        }
    }

    /// Adds blocks of pages, a bit each.
    fn add_blocks(&mut self, bitmap: &[u64], pages: u64) {
        for block in bits(bitmap) {
            self.insert(block * pages..(block + 1) * pages);
        }
    }

    /// Adds all of `other`.
    pub fn add(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
    }

    fn insert(&mut self, range: Range<u64>) {
        for page in range.start..range.end.min(self.pages) {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The first of them at or after `from`, with those that follow at once, as page numbers from the start of RAM.
    fn run(&self, from: u64) -> Option<Range<u64>> {
        let start = self.next(from, false)?;
        let end = self.next(start, true).unwrap_or(self.pages);
        Some(start..end)
    }

    /// The first page at or after `from` that is among them, or that is not.
    fn next(&self, from: u64, absent: bool) -> Option<u64> {
        if from >= self.pages {
            return None;
        }
        let flip = if absent { u64::MAX } else { 0 };
        let first = (from / 64) as usize;
        let mut word = (self.words[first] ^ flip) & (u64::MAX << (from % 64));
        let mut index = first;
        while word == 0 {
            index += 1;
            word = self.words.get(index)? ^ flip;
        }
        let page = index as u64 * 64 + u64::from(word.trailing_zeros());
        (page < self.pages).then_some(page)
    }
}

/// The numbers of the bits that are set, the lowest first.
fn bits(words: &[u64]) -> impl Iterator<Item = u64> {
    (0..).zip(words).flat_map(|(index, word)| {
        let mut rest = *word;
        std::iter::from_fn(move || {
            let bit = (rest != 0).then(|| rest.trailing_zeros())?;
            rest &= rest - 1;
            Some(index * 64 + u64::from(bit))
        })
    })
}

/// The dirty pages of a source.
pub struct DirtySource<'a, S> {
    source: &'a S,
    dirty: &'a DirtyPages,
}

impl<'a, S> DirtySource<'a, S> {
    /// Those of `source` that `dirty` has.
    pub fn new(source: &'a S, dirty: &'a DirtyPages) -> Self {
        Self { source, dirty }
    }
}

impl<S: PageSource> PageSource for DirtySource<'_, S> {
    fn metadata(&self) -> Metadata {
        self.source.metadata()
    }

    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        const FIRST: u64 = RAM_START / PAGE_SIZE;
        let run = self.dirty.run(from.saturating_sub(FIRST));
        Ok(run.map(|run| run.start + FIRST..run.end + FIRST))
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        self.source.read(first, data, tags)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Nothing;

    impl PageSource for Nothing {
        fn metadata(&self) -> Metadata {
            Metadata::None
        }
        fn next_run(&self, _: u64) -> io::Result<Option<Range<u64>>> {
            Ok(None)
        }
        fn read(&self, _: u64, _: &mut [Page], _: &mut [TagPage]) -> io::Result<()> {
            Ok(())
        }
    }

    /// The pages of a source, counted from the start of RAM.
    fn listed(source: &impl PageSource) -> Vec<u64> {
        let mut pages = Vec::new();
        let mut from = 0;
        while let Some(run) = source.next_run(from).unwrap() {
            from = run.end;
            pages.extend(run.map(|page| page - RAM_START / PAGE_SIZE));
        }
        pages
    }

    proptest! {
        #[test]
        fn a_source_of_dirty_pages_has_those_and_no_others(
            size in 1u64..400,
            pages in prop::collection::btree_set(0u64..400, 0..80),
        ) {
            let mut dirty = DirtyPages::none(size * PAGE_SIZE);
            let mut bitmap = vec![0u64; 7];
            for page in &pages {
                bitmap[(page / 64) as usize] |= 1 << (page % 64);
            }
            dirty.add_pages(&bitmap);

            let expected: Vec<u64> = pages.into_iter().filter(|page| *page < size).collect();
            prop_assert_eq!(dirty.len(), expected.len() as u64);
            prop_assert_eq!(listed(&DirtySource::new(&Nothing, &dirty)), expected);
        }
    }

    #[test]
    fn what_guest_and_vmm_wrote_is_put_together() {
        let mut dirty = DirtyPages::none(128 * PAGE_SIZE);
        dirty.add_pages(&[1 << 3, 1]);
        let mut other = DirtyPages::none(128 * PAGE_SIZE);
        other.add_pages(&[1 << 63, 0]);
        dirty.add(&other);

        assert_eq!(listed(&DirtySource::new(&Nothing, &dirty)), [3, 63, 64]);
    }

    #[test]
    fn a_dirty_page_of_a_larger_host_page_makes_all_of_it_dirty() {
        let mut dirty = DirtyPages::none(40 * PAGE_SIZE);
        dirty.add_blocks(&[0b101], 16);

        let expected: Vec<u64> = (0..16).chain(32..40).collect();
        assert_eq!(listed(&DirtySource::new(&Nothing, &dirty)), expected);
    }
}
