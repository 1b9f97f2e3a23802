//! Where pages come from and where they go: a guest's memory, a file, a test's memory.

use std::io;
use std::ops::Range;

use mte::TagPage;

use crate::batch::{Batch, Page, ZERO_PAGE};
use crate::error::{Error, Result};
use crate::header::Metadata;

/// Memory that pages are read from, by many threads at once.
pub trait PageSource {
    /// What its pages have besides data.
    fn metadata(&self) -> Metadata;

    /// The first run of pages at or after `from`, or the part of it from there on. Pages that were
    /// never populated are in none, and what pages hold does not matter: a page of zeros is in a
    /// run. A run may be cut into several.
    ///
    /// # Errors
    /// Whatever keeps it from telling.
    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>>;

    /// Copies pages `first` and following: data and tags. `tags` has as many pages as `data`, or
    /// none if the source has none. If the guest runs meanwhile, a page may be torn; it is then
    /// dirty and will be read again.
    ///
    /// # Errors
    /// Whatever keeps it from reading.
    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()>;

    /// Copies the tags alone of pages `first` and following. A source that can do so without reading
    /// their data does.
    ///
    /// # Errors
    /// Whatever keeps it from reading.
    fn read_tags(&self, first: u64, tags: &mut [TagPage]) -> io::Result<()> {
        self.read(first, &mut vec![ZERO_PAGE; tags.len()], tags)
    }
}

/// Memory that pages are placed in, by many threads at once.
pub trait PageSink {
    /// What its pages have besides data.
    fn metadata(&self) -> Metadata;

    /// Places pages, data and tags of each as one. The numbers come from a file or a peer: those
    /// that the sink does not have it must refuse, before it places any.
    ///
    /// # Errors
    /// Whatever keeps it from placing them.
    fn place(&self, pages: &Batch) -> io::Result<()>;

    /// Makes pages unpopulated: they read as zeros with tag 0. The range comes from a file or a
    /// peer, as in [`Self::place`], and may be huge.
    ///
    /// # Errors
    /// Whatever keeps it from doing so.
    fn discard(&self, pages: Range<u64>) -> io::Result<()>;
}

/// Places a batch, if it has pages.
pub(crate) fn place(sink: &impl PageSink, pages: &Batch) -> Result<()> {
    let ([first, ..], [.., last]) = (pages.numbers(), pages.numbers()) else {
        return Ok(());
    };
    sink.place(pages).map_err(|source| Error::Sink {
        first: *first,
        last: *last,
        source,
    })
}

/// Makes pages unpopulated.
pub(crate) fn discard(sink: &impl PageSink, pages: Range<u64>) -> Result<()> {
    sink.discard(pages.clone()).map_err(|source| Error::Sink {
        first: pages.start,
        last: pages.end - 1,
        source,
    })
}

/// Goes through the runs of a source and cuts them into what chunks hold.
#[derive(Debug)]
pub struct Cursor {
    next: u64,
    chunk_pages: u64,
}

impl Cursor {
    /// At the first page of a source, for chunks of this many pages.
    ///
    /// # Errors
    /// [`Error::TooManyPages`] if no chunk can have so many.
    pub fn new(chunk_pages: usize) -> Result<Self> {
        if chunk_pages > crate::MAX_CHUNK_PAGES {
            return Err(Error::TooManyPages(chunk_pages));
        }
        Ok(Self {
            next: 0,
            chunk_pages: chunk_pages.max(1) as u64,
        })
    }

    /// Replaces `runs` by those of the next chunk: none, if all pages were given.
    ///
    /// # Errors
    /// [`Error::Source`]; [`Error::Order`] if the source gives a run from before or an empty one.
    pub fn next(&mut self, source: &impl PageSource, runs: &mut Vec<Range<u64>>) -> Result<()> {
        runs.clear();
        let mut room = self.chunk_pages;
        while room > 0 {
            let found = source.next_run(self.next).map_err(|source| Error::Source {
                first: self.next,
                last: self.next,
                source,
            })?;
            let Some(run) = found else { break };
            if run.start < self.next || run.is_empty() {
                return Err(Error::Order { page: run.start });
            }
            let end = run.end.min(run.start + room);
            room -= end - run.start;
            self.next = end;
            runs.push(run.start..end);
        }
        Ok(())
    }
}
