//! A snapshot as memory that can be read at random.
//!
//! A chunk is decoded, and all its checks are made, whenever a page of it is wanted; the last few stay decoded, so that going
//! through memory in order decodes each chunk about once, whatever rounds of a live snapshot its pages were written in.

use std::ops::Range;

use engine::VcpuState;
use mte::TagPage;
use stream::{Batch, Location, Page, ReadAt, Run, Snapshot, SnapshotReader, ZERO_PAGE};

use crate::error::Result;
use crate::memory::{TaggedMemory, Visitor};

/// Chunks that stay decoded: more than a live snapshot has rounds. 512 pages each at most, so 17 MiB.
const KEPT: usize = 8;

/// The memory of a snapshot.
pub struct SnapshotMemory<'a, F> {
    snapshot: &'a Snapshot<F>,
    reader: SnapshotReader<'a, F>,
    /// Populated pages, in order, those that touch together.
    populated: Vec<Range<u64>>,
    ram: Range<u64>,
    vcpus: Vec<VcpuState>,
    /// The chunk used last comes last.
    kept: Vec<Decoded>,
}

/// Pages of a chunk.
#[derive(Default)]
struct Decoded {
    chunk: Option<Location>,
    numbers: Vec<u64>,
    data: Vec<Page>,
    tags: Vec<TagPage>,
}

impl Decoded {
    /// Takes what is in `batch`, into the room that is there.
    fn fill(&mut self, chunk: Location, batch: &Batch) {
        self.chunk = Some(chunk);
        self.numbers.clear();
        self.numbers.extend_from_slice(batch.numbers());
        self.data.clear();
        self.data.extend_from_slice(batch.data());
        self.tags.clear();
        self.tags.extend_from_slice(batch.tags());
    }
}

impl<'a, F: ReadAt> SnapshotMemory<'a, F> {
    /// The memory of `snapshot`. `ram` are the pages that were RAM to the guest, if that is known, and `vcpus` its vCPUs.
    pub fn new(snapshot: &'a Snapshot<F>, ram: Option<Range<u64>>, vcpus: Vec<VcpuState>) -> Self {
        let mut populated: Vec<Range<u64>> = Vec::new();
        for run in snapshot.populated() {
            match populated.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => populated.push(run),
            }
        }
        let hull = match (populated.first(), populated.last()) {
            (Some(first), Some(last)) => first.start..last.end,
            _ => 0..0,
        };
        Self {
            snapshot,
            reader: snapshot.reader(),
            populated,
            ram: ram.unwrap_or(hull),
            vcpus,
            kept: Vec::new(),
        }
    }

    /// The chunk, decoded.
    fn decoded(&mut self, chunk: Location) -> Result<&Decoded> {
        let known = self.kept.iter().position(|kept| kept.chunk == Some(chunk));
        let place = match known {
            Some(place) => place,
            None => {
                if self.kept.len() < KEPT {
                    self.kept.insert(0, Decoded::default());
                }
                // What is there may be overwritten before the chunk turns out to be damaged.
                self.kept[0].chunk = None;
                let batch = self.reader.read(chunk)?;
                self.kept[0].fill(chunk, batch);
                0
            }
        };
        self.kept[place..].rotate_left(1);
        Ok(self.kept.last().expect("the chunk was put there"))
    }

    /// How many pages from `first` on, at most `most`, are in the same chunk one after the other, and are copied.
    fn copy(&mut self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> Result<usize> {
        let Some(chunk) = self.snapshot.find(first) else {
            data[0] = ZERO_PAGE;
            if let Some(tags) = tags.first_mut() {
                *tags = TagPage::ZERO;
            }
            return Ok(1);
        };
        let decoded = self.decoded(chunk)?;
        let found = decoded.numbers.binary_search(&first);
        let place =
            found.map_err(|_| stream::Error::Index("a chunk has not the pages that it names"))?;
        let numbers = decoded.numbers[place..].iter().zip(first..);
        let count = numbers
            .take(data.len())
            .take_while(|(number, wanted)| **number == *wanted)
            .count();
        data[..count].copy_from_slice(&decoded.data[place..place + count]);
        if !tags.is_empty() {
            tags[..count].clone_from_slice(&decoded.tags[place..place + count]);
        }
        Ok(count)
    }
}

impl<F: ReadAt> TaggedMemory for SnapshotMemory<'_, F> {
    fn has_tags(&self) -> bool {
        self.snapshot.metadata().has_tags()
    }

    fn ram(&self) -> Range<u64> {
        self.ram.clone()
    }

    fn vcpus(&self) -> &[VcpuState] {
        &self.vcpus
    }

    fn next_run(&mut self, from: u64) -> Result<Option<Range<u64>>> {
        let at = self.populated.partition_point(|run| run.end <= from);
        let run = self.populated.get(at);
        Ok(run.map(|run| run.start.max(from)..run.end))
    }

    fn read(&mut self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> Result<()> {
        let mut done = 0;
        while done < data.len() {
            let page = first.saturating_add(done as u64);
            let tags = tags.get_mut(done..).unwrap_or_default();
            done += self.copy(page, &mut data[done..], tags)?;
        }
        Ok(())
    }

    fn visit(&mut self, pages: Range<u64>, each: Visitor<'_>) -> Result<()> {
        let touches = |run: &Range<u64>| run.start < pages.end && pages.start < run.end;
        let located = self.snapshot.located().filter(|(run, _)| touches(run));
        let mut chunks: Vec<Location> = located.map(|(_, chunk)| chunk).collect();
        chunks.sort_unstable();
        chunks.dedup();
        for chunk in chunks {
            for run in self.reader.read(chunk)?.runs() {
                if let Some(run) = clipped(run, &pages) {
                    each(run)?;
                }
            }
        }
        Ok(())
    }
}

/// The part of a run that is in `pages`.
fn clipped<'a>(run: Run<'a>, pages: &Range<u64>) -> Option<Run<'a>> {
    let there = run.pages();
    let first = there.start.max(pages.start);
    let end = there.end.min(pages.end);
    if first >= end {
        return None;
    }
    let wanted = (first - there.start) as usize..(end - there.start) as usize;
    Some(Run {
        first,
        data: &run.data[wanted.clone()],
        tags: run.tags.get(wanted).unwrap_or_default(),
    })
}
