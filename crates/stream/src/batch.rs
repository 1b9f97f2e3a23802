//! Pages in memory, each one record: number, data, tags. What a chunk is made of and what it
//! becomes. A batch keeps its room when it is cleared, so that the next one allocates nothing.

use std::ops::Range;

use mte::TagPage;

use crate::error::{Error, Result};
use crate::header::Metadata;
use crate::source::PageSource;
use crate::wire::{MAX_CHUNK_PAGES, MAX_PAGE, PAGE_SIZE};

/// The data of a page.
pub type Page = [u8; PAGE_SIZE];

/// The data of a page of zeros.
pub const ZERO_PAGE: Page = [0; PAGE_SIZE];

/// At most [`MAX_CHUNK_PAGES`] pages in ascending order. A page's number is its guest physical
/// address divided by [`PAGE_SIZE`].
#[derive(Debug)]
pub struct Batch {
    metadata: Metadata,
    pub(crate) numbers: Vec<u64>,
    /// At least as many as numbers.
    pub(crate) data: Vec<Page>,
    /// As many as numbers, or none if the pages have no tags.
    pub(crate) tags: Vec<TagPage>,
}

/// Pages with consecutive numbers.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The number of the first.
    pub first: u64,
    /// Their data.
    pub data: &'a [Page],
    /// Their tags; none if the pages have no tags.
    pub tags: &'a [TagPage],
}

impl Run<'_> {
    /// The page numbers.
    #[must_use]
    pub const fn pages(&self) -> Range<u64> {
        self.first..self.first + self.data.len() as u64
    }
}

impl Batch {
    /// An empty batch.
    #[must_use]
    pub const fn new(metadata: Metadata) -> Self {
        Self {
            metadata,
            numbers: Vec::new(),
            data: Vec::new(),
            tags: Vec::new(),
        }
    }

    /// An empty batch whose first pages, so many, find their memory already there.
    #[must_use]
    pub fn with_room(metadata: Metadata, pages: usize) -> Self {
        let mut batch = Self::new(metadata);
        // What is only allocated is not there before it is written.
        batch.data.resize(pages, ZERO_PAGE);
        batch.numbers.reserve(pages);
        if metadata.has_tags() {
            batch.tags.resize(pages, TagPage::ZERO);
            batch.tags.clear();
        }
        batch
    }

    /// What its pages have besides data.
    #[must_use]
    pub const fn metadata(&self) -> Metadata {
        self.metadata
    }

    /// How many pages it has.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether it has no pages.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// The page numbers, ascending.
    #[must_use]
    pub fn numbers(&self) -> &[u64] {
        &self.numbers
    }

    /// The data, a page for each number.
    #[must_use]
    pub fn data(&self) -> &[Page] {
        &self.data[..self.numbers.len()]
    }

    /// The tags, a page for each number, or none if the pages have no tags.
    #[must_use]
    pub fn tags(&self) -> &[TagPage] {
        &self.tags
    }

    /// Removes all pages.
    pub fn clear(&mut self) {
        self.numbers.clear();
        self.tags.clear();
    }

    /// Adds a page.
    ///
    /// # Errors
    /// [`Error::TooManyPages`]; [`Error::Order`]; [`Error::Metadata`] if there are tags and there may
    /// not be, or the other way round.
    pub fn push(&mut self, number: u64, data: &Page, tags: Option<&TagPage>) -> Result<()> {
        self.metadata_must_be(match tags {
            Some(_) => Metadata::ArmMte,
            None => Metadata::None,
        })?;
        self.add_numbers(number..number.saturating_add(1))?;
        let last = self.numbers.len() - 1;
        self.data[last] = *data;
        self.tags.extend(tags.cloned());
        Ok(())
    }

    /// Replaces its pages by those of a source.
    ///
    /// # Errors
    /// [`Error::Metadata`] if the source has other metadata; [`Error::TooManyPages`];
    /// [`Error::Order`]; [`Error::Source`]. The batch is then empty.
    pub fn read(&mut self, source: &impl PageSource, runs: &[Range<u64>]) -> Result<()> {
        self.clear();
        self.metadata_must_be(source.metadata())?;
        let read = runs
            .iter()
            .try_for_each(|run| self.read_run(source, run.clone()));
        if read.is_err() {
            self.clear();
        }
        read
    }

    fn read_run(&mut self, source: &impl PageSource, run: Range<u64>) -> Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        let before = self.numbers.len();
        self.add_numbers(run.clone())?;
        let pages = before..self.numbers.len();
        if self.metadata.has_tags() {
            self.tags.resize(pages.end, TagPage::ZERO);
        }
        let tags = self.tags.get_mut(pages.clone()).unwrap_or_default();
        source
            .read(run.start, &mut self.data[pages], tags)
            .map_err(|source| Error::Source {
                first: run.start,
                last: run.end - 1,
                source,
            })
    }

    /// Adds page numbers, and makes room for the data.
    fn add_numbers(&mut self, run: Range<u64>) -> Result<()> {
        let follows = self.numbers.last().is_none_or(|last| *last < run.start);
        if !follows || run.end > MAX_PAGE || run.start >= run.end {
            return Err(Error::Order { page: run.start });
        }
        let room = (MAX_CHUNK_PAGES - self.numbers.len()) as u64;
        let more = run.end - run.start;
        if more > room {
            let all = self.numbers.len() as u64 + more;
            return Err(Error::TooManyPages(all as usize));
        }
        self.numbers.extend(run);
        self.make_room();
        Ok(())
    }

    /// Room for the data of all numbers.
    pub(crate) fn make_room(&mut self) {
        if self.data.len() < self.numbers.len() {
            self.data.resize(self.numbers.len(), ZERO_PAGE);
        }
    }

    /// Removes the pages whose number does not fulfil the condition.
    pub fn retain(&mut self, mut keep: impl FnMut(u64) -> bool) {
        let mut kept = 0;
        for i in 0..self.numbers.len() {
            if !keep(self.numbers[i]) {
                continue;
            }
            if kept != i {
                self.numbers[kept] = self.numbers[i];
                self.data.copy_within(i..=i, kept);
                if self.metadata.has_tags() {
                    self.tags.swap(kept, i);
                }
            }
            kept += 1;
        }
        self.numbers.truncate(kept);
        self.tags.truncate(kept);
    }

    /// Its pages, those with consecutive numbers together.
    pub fn runs(&self) -> impl Iterator<Item = Run<'_>> {
        let mut done = 0;
        self.numbers
            .chunk_by(|before, next| before + 1 == *next)
            .map(move |numbers| {
                let pages = done..done + numbers.len();
                done = pages.end;
                Run {
                    first: numbers[0],
                    data: &self.data[pages.clone()],
                    tags: self.tags.get(pages).unwrap_or_default(),
                }
            })
    }

    /// Its pages one by one.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Page, Option<&TagPage>)> {
        let tags = (0..self.numbers.len()).map(|i| self.tags.get(i));
        self.numbers
            .iter()
            .zip(&self.data)
            .zip(tags)
            .map(|((number, data), tags)| (*number, data, tags))
    }

    pub(crate) fn metadata_must_be(&self, given: Metadata) -> Result<()> {
        same_metadata("the source", given, "the batch", self.metadata)
    }
}

/// Rule: no tag is lost or made up silently.
pub(crate) fn same_metadata(
    from: &'static str,
    given: Metadata,
    to: &'static str,
    taken: Metadata,
) -> Result<()> {
    if given == taken {
        return Ok(());
    }
    Err(Error::Metadata {
        from,
        given,
        to,
        taken,
    })
}
