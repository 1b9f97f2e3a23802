//! Guest memory as a source and a sink of pages with their tags (`stream`).
//!
//! A page's data are written by the data mapping and its tags by the [`TagStore`]; it reads both. A guest that has tags has them in every page; one that has none gives none.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use mte::TagPage;
use stream::{Batch, Metadata, Page, PageSink, PageSource};
use vm_memory::{Bytes, GuestAddress};

use super::GuestMemory;
use super::tags::TagStore;
use super::untagged::Untagged;
use crate::layout::{PAGE_SIZE, RAM_START};

/// The pages of guest memory. A page's number is its guest-physical address divided by 4096.
pub struct GuestPages {
    memory: Arc<GuestMemory>,
    tags: Option<Box<dyn TagStore>>,
    /// Of a memory that was just made.
    untagged: Option<Arc<Untagged>>,
}

impl GuestPages {
    /// The pages of `memory`, with `tags` if its guest has MTE.
    pub fn new(memory: Arc<GuestMemory>, tags: Option<Box<dyn TagStore>>) -> Self {
        Self {
            memory,
            tags,
            untagged: None,
        }
    }

    /// The same of a memory that was just made: only pages are placed in it, and its guest does not run before all is there.
    /// `untagged` notes what tags they got.
    pub fn of_new(
        memory: Arc<GuestMemory>,
        tags: Option<Box<dyn TagStore>>,
        untagged: Arc<Untagged>,
    ) -> Self {
        Self {
            untagged: Some(untagged),
            ..Self::new(memory, tags)
        }
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn metadata(&self) -> Metadata {
        match self.tags {
            Some(_) => Metadata::ArmMte,
            None => Metadata::None,
        }
    }

    /// The numbers of the pages of RAM.
    pub fn ram(&self) -> Range<u64> {
        pages(RAM_START..RAM_START + self.memory.size())
    }

    /// Refuses pages that are not RAM, whatever they are.
    fn check(&self, wanted: &Range<u64>) -> io::Result<()> {
        let all = self.ram();
        if wanted.start < all.start || wanted.end > all.end || wanted.start > wanted.end {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "they are not memory of this machine, whose pages are {:#x} to {:#x}",
                    all.start,
                    all.end - 1
                ),
            ));
        }
        Ok(())
    }
}

fn pages(addresses: Range<u64>) -> Range<u64> {
    addresses.start / PAGE_SIZE..addresses.end / PAGE_SIZE
}

fn address(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE_SIZE)
}

impl PageSource for GuestPages {
    fn metadata(&self) -> Metadata {
        self.metadata()
    }

    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let all = self.ram();
        let from = from.max(all.start);
        if from >= all.end {
            return Ok(None);
        }
        let rest = from * PAGE_SIZE..all.end * PAGE_SIZE;
        self.memory
            .populated(rest)
            .next()
            .map(|run| run.map(pages))
            .transpose()
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        self.check(&(first..first.saturating_add(data.len() as u64)))?;
        let at = address(first);
        match &self.tags {
            Some(store) => store.read_pages(at.0, data, tags).map_err(io::Error::other),
            None => {
                let ram = self.memory.ram();
                ram.read_slice(data.as_flattened_mut(), at)
                    .map_err(io::Error::other)
            }
        }
    }

    fn read_tags(&self, first: u64, tags: &mut [TagPage]) -> io::Result<()> {
        self.check(&(first..first.saturating_add(tags.len() as u64)))?;
        match &self.tags {
            Some(store) => store
                .read_populated(address(first).0, tags)
                .map_err(io::Error::other),
            None => Ok(()),
        }
    }
}

impl PageSink for GuestPages {
    fn metadata(&self) -> Metadata {
        self.metadata()
    }

    /// No vCPU runs: between a page's data and its tags there is a moment.
    fn place(&self, batch: &Batch) -> io::Result<()> {
        for run in batch.runs() {
            self.check(&run.pages())?;
        }
        let ram = self.memory.ram();
        for run in batch.runs() {
            let at = address(run.first);
            ram.write_slice(run.data.as_flattened(), at)
                .map_err(io::Error::other)?;
            if let Some(store) = &self.tags {
                match &self.untagged {
                    Some(untagged) => untagged.write(&**store, at.0, run.tags),
                    None => store.write(at.0, run.tags),
                }
                .map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    fn discard(&self, gone: Range<u64>) -> io::Result<()> {
        self.check(&gone)?;
        self.memory
            .discard(gone.start * PAGE_SIZE..gone.end * PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryPlan;

    const FIRST: u64 = RAM_START / PAGE_SIZE;
    const PLAN: MemoryPlan = MemoryPlan {
        memory_file: true,
        huge_pages: false,
        tags: None,
    };

    fn memory(plan: MemoryPlan) -> GuestPages {
        GuestPages::new(Arc::new(GuestMemory::new(4 << 20, plan).unwrap()), None)
    }

    fn batch(numbers: &[u64]) -> Batch {
        let mut batch = Batch::new(Metadata::None);
        for number in numbers {
            batch.push(*number, &[*number as u8; 4096], None).unwrap();
        }
        batch
    }

    fn first_byte(pages: &GuestPages, page: u64) -> u8 {
        let mut data = [[0; 4096]];
        pages.read(page, &mut data, &mut []).unwrap();
        data[0][0]
    }

    #[test]
    fn pages_are_placed_by_their_number() {
        let pages = memory(PLAN);
        pages
            .place(&batch(&[FIRST, FIRST + 7, FIRST + 1023]))
            .unwrap();

        assert_eq!(first_byte(&pages, FIRST + 7), (FIRST + 7) as u8);
        assert_eq!(first_byte(&pages, FIRST + 1023), (FIRST + 1023) as u8);
        assert_eq!(pages.next_run(0).unwrap().unwrap().start, FIRST);
    }

    #[test]
    fn a_batch_with_a_page_that_is_no_ram_places_none() {
        let pages = memory(PLAN);
        for numbers in [
            [FIRST - 1, FIRST],
            [FIRST, FIRST + 1024],
            [FIRST, (1 << 52) - 1],
        ] {
            let refusal = pages.place(&batch(&numbers)).unwrap_err();
            assert_eq!(refusal.kind(), io::ErrorKind::InvalidInput);
        }
        assert_eq!(pages.next_run(0).unwrap(), None);
    }

    #[test]
    fn discarded_pages_are_holes_again_and_others_stay() {
        for memory_file in [true, false] {
            let pages = memory(MemoryPlan {
                memory_file,
                ..PLAN
            });
            pages.place(&batch(&[FIRST + 511, FIRST + 512])).unwrap();
            pages.discard(FIRST + 512..FIRST + 1024).unwrap();

            assert_eq!(first_byte(&pages, FIRST + 511), (FIRST + 511) as u8);
            assert_eq!(pages.next_run(FIRST + 512).unwrap(), None);
            assert!(pages.discard(FIRST + 1024..FIRST + 1025).is_err());
            assert!(pages.discard(0..u64::MAX).is_err());
        }
    }
}
