//! A running machine's memory, or whatever else pages are read from, as memory that can be looked at.
//!
//! Which pages are populated is asked once, at the beginning. So memory that changes meanwhile has the same pages to the end,
//! and what was a hole is not touched, which would populate it.

use std::ops::Range;

use engine::VcpuState;
use mte::TagPage;
use stream::{Page, PageSet, PageSource, Run, ZERO_PAGE};

use crate::error::{Error, Result};
use crate::memory::{TagVisitor, TaggedMemory, Visitor};

/// Pages read at once when all are visited: 1 MiB.
const BATCH: u64 = 256;

/// The memory of a source.
pub struct SourceMemory<S> {
    source: S,
    populated: PageSet,
    vcpus: Vec<VcpuState>,
    data: Vec<Page>,
    tags: Vec<TagPage>,
}

impl<S: PageSource> SourceMemory<S> {
    /// The memory of `source`, all of it in the pages `ram`, for each of which there is a bit; and its vCPUs.
    ///
    /// # Errors
    /// [`Error::Source`].
    pub fn new(source: S, ram: Range<u64>, vcpus: Vec<VcpuState>) -> Result<Self> {
        let mut populated = PageSet::none(ram);
        let mut at = populated.range().start;
        while at < populated.range().end {
            let run = source.next_run(at);
            let run = run.map_err(|source| Error::Source { page: at, source })?;
            let Some(run) = run.filter(|run| run.end > at) else {
                break;
            };
            at = run.end;
            populated.insert(run);
        }
        Ok(Self {
            source,
            populated,
            vcpus,
            data: Vec::new(),
            tags: Vec::new(),
        })
    }

    /// The first run of populated pages among `pages`; if there is none, an empty one at their end.
    fn run_in(&self, pages: Range<u64>) -> Range<u64> {
        let run = self.populated.next_run(pages.start);
        match run.filter(|run| run.start < pages.end) {
            Some(run) => run.start..run.end.min(pages.end),
            None => pages.end..pages.end,
        }
    }

    /// Gives `each` the populated pages among `pages`, some at a time: the first, and how many.
    fn each_batch(
        &self,
        pages: Range<u64>,
        each: &mut dyn FnMut(u64, usize) -> Result<()>,
    ) -> Result<()> {
        let mut at = pages.start;
        while at < pages.end {
            let run = self.run_in(at..pages.end);
            let end = run.end.min(run.start.saturating_add(BATCH));
            if run.start < end {
                each(run.start, (end - run.start) as usize)?;
            }
            at = end;
        }
        Ok(())
    }

    fn copy(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> Result<()> {
        self.source
            .read(first, data, tags)
            .map_err(|source| Error::Source {
                page: first,
                source,
            })
    }
}

impl<S: PageSource> TaggedMemory for SourceMemory<S> {
    fn has_tags(&self) -> bool {
        self.source.metadata().has_tags()
    }

    fn ram(&self) -> Range<u64> {
        self.populated.range().clone()
    }

    fn vcpus(&self) -> &[VcpuState] {
        &self.vcpus
    }

    fn next_run(&mut self, from: u64) -> Result<Option<Range<u64>>> {
        Ok(self.populated.next_run(from))
    }

    fn read(&mut self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> Result<()> {
        let end = first.saturating_add(data.len() as u64);
        let mut at = first;
        while at < end {
            let run = self.run_in(at..end);
            let [hole, there] = [at..run.start, run.clone()].map(|pages| places(&pages, first));
            data[hole.clone()].fill(ZERO_PAGE);
            if let Some(tags) = tags.get_mut(hole) {
                tags.fill(TagPage::ZERO);
            }
            if !there.is_empty() {
                let tags = tags.get_mut(there.clone()).unwrap_or_default();
                self.copy(run.start, &mut data[there], tags)?;
            }
            at = run.end;
        }
        Ok(())
    }

    fn visit(&mut self, pages: Range<u64>, each: Visitor<'_>) -> Result<()> {
        let mut data = std::mem::take(&mut self.data);
        let mut tags = std::mem::take(&mut self.tags);
        data.resize(BATCH as usize, ZERO_PAGE);
        if self.has_tags() {
            tags.resize(BATCH as usize, TagPage::ZERO);
        }
        self.each_batch(pages, &mut |first, count| {
            let tags = tags.get_mut(..count).unwrap_or_default();
            self.copy(first, &mut data[..count], tags)?;
            each(Run {
                first,
                data: &data[..count],
                tags,
            })
        })?;
        (self.data, self.tags) = (data, tags);
        Ok(())
    }

    fn visit_tags(&mut self, pages: Range<u64>, each: TagVisitor<'_>) -> Result<()> {
        if !self.has_tags() {
            return Err(Error::NoTags);
        }
        let mut tags = std::mem::take(&mut self.tags);
        tags.resize(BATCH as usize, TagPage::ZERO);
        self.each_batch(pages, &mut |first, count| {
            let tags = &mut tags[..count];
            let read = self.source.read_tags(first, tags);
            read.map_err(|source| Error::Source {
                page: first,
                source,
            })?;
            each(first, tags)
        })?;
        self.tags = tags;
        Ok(())
    }
}

/// Where pages are in a buffer that begins with page `first`.
fn places(pages: &Range<u64>, first: u64) -> Range<usize> {
    (pages.start - first) as usize..(pages.end - first) as usize
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io;

    use stream::Metadata;

    use super::*;

    /// Pages 4 to 7 and 9, each full of its number, with its number's tags. It remembers what was read.
    #[derive(Default)]
    struct Source {
        read: RefCell<Vec<Range<u64>>>,
        has_no_tags: bool,
    }

    impl PageSource for &Source {
        fn metadata(&self) -> Metadata {
            match self.has_no_tags {
                false => Metadata::ArmMte,
                true => Metadata::None,
            }
        }

        fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
            let runs = [4..6, 6..8, 9..10];
            let run = runs.into_iter().find(|run| run.end > from);
            Ok(run.map(|run| run.start.max(from)..run.end))
        }

        fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
            self.read
                .borrow_mut()
                .push(first..first + data.len() as u64);
            for ((data, tags), page) in data.iter_mut().zip(tags).zip(first..) {
                data.fill(page as u8);
                *tags = TagPage::pack(&[page as u8; 256]);
            }
            Ok(())
        }

        fn read_tags(&self, first: u64, tags: &mut [TagPage]) -> io::Result<()> {
            for (tags, page) in tags.iter_mut().zip(first..) {
                *tags = TagPage::pack(&[page as u8; 256]);
            }
            Ok(())
        }
    }

    fn memory(source: &Source) -> SourceMemory<&Source> {
        SourceMemory::new(source, 2..12, Vec::new()).unwrap()
    }

    #[test]
    fn runs_that_touch_are_one() {
        let source = Source::default();
        let mut memory = memory(&source);
        assert_eq!(memory.next_run(0).unwrap(), Some(4..8));
        assert_eq!(memory.next_run(5).unwrap(), Some(5..8));
        assert_eq!(memory.next_run(8).unwrap(), Some(9..10));
        assert_eq!(memory.next_run(10).unwrap(), None);
    }

    #[test]
    fn holes_read_as_zeros_with_tag_0_and_are_not_touched() {
        let source = Source::default();
        let mut data = [[0xff; 4096]; 8];
        let mut tags = vec![TagPage::pack(&[15; 256]); 8];

        memory(&source).read(3, &mut data, &mut tags).unwrap();

        let first_bytes = data.map(|page| page[0]);
        assert_eq!(first_bytes, [0, 4, 5, 6, 7, 0, 9, 0]);
        let first_tags: Vec<u8> = tags.iter().map(|tags| tags.unpack()[0]).collect();
        assert_eq!(first_tags, [0, 4, 5, 6, 7, 0, 9, 0]);
        assert_eq!(*source.read.borrow(), [4..8, 9..10]);
    }

    #[test]
    fn a_visit_of_tags_reads_no_data() {
        let source = Source::default();
        let mut seen = Vec::new();

        let visited = memory(&source).visit_tags(5..100, &mut |first, tags| {
            assert_eq!(tags[0].unpack()[0], first as u8);
            seen.push(first..first + tags.len() as u64);
            Ok(())
        });

        assert!(visited.is_ok());
        assert_eq!(seen, [5..8, 9..10]);
        assert_eq!(*source.read.borrow(), []);
    }

    #[test]
    fn a_machine_without_tags_shows_none() {
        let source = Source {
            has_no_tags: true,
            ..Source::default()
        };
        let visited = memory(&source).visit_tags(0..100, &mut |_, _| Ok(()));
        assert!(matches!(visited, Err(Error::NoTags)));
    }

    #[test]
    fn a_visit_gives_each_populated_page_once() {
        let source = Source::default();
        let mut seen = Vec::new();

        let visited = memory(&source).visit(5..100, &mut |run| {
            assert_eq!(run.data[0][0], run.first as u8);
            assert_eq!(run.tags.len(), run.data.len());
            seen.push(run.pages());
            Ok(())
        });

        assert!(visited.is_ok());
        assert_eq!(seen, [5..8, 9..10]);
    }
}
