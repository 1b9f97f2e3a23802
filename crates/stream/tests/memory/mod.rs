//! A memory for tests: what a guest's would be, with pages that are populated or not.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use mte::{Tag, TagPage};
use proptest::collection::vec;
use proptest::prelude::*;
use stream::{
    Batch, Compression, Header, Identity, Metadata, Page, PageSink, PageSource, Sending, Snapshot,
    StreamId, StreamReader, StreamWriter, ZERO_PAGE, receive, send,
};

pub const COMPRESSIONS: [Compression; 3] =
    [Compression::None, Compression::Lz4, Compression::Zstd(1)];

/// Populated pages, by number.
pub type Pages = BTreeMap<u64, (Box<Page>, TagPage)>;

/// Pages that can be read and placed.
#[derive(Debug)]
pub struct Memory {
    metadata: Metadata,
    pages: Mutex<Pages>,
}

impl Memory {
    pub fn new(metadata: Metadata) -> Self {
        Self::with(metadata, Pages::new())
    }

    pub fn tagged(pages: Pages) -> Self {
        Self::with(Metadata::ArmMte, pages)
    }

    pub fn with(metadata: Metadata, pages: Pages) -> Self {
        Self {
            metadata,
            pages: Mutex::new(pages),
        }
    }

    pub fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().expect("no test panics with it")
    }

    pub fn into_pages(self) -> Pages {
        self.pages.into_inner().expect("no test panics with it")
    }
}

impl PageSource for Memory {
    fn metadata(&self) -> Metadata {
        self.metadata
    }

    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let pages = self.pages();
        let mut numbers = pages.range(from..).map(|(number, _)| *number);
        Ok(numbers.next().map(|first| {
            let follow = (first + 1..)
                .zip(numbers)
                .take_while(|(wanted, found)| wanted == found);
            first..first + 1 + follow.count() as u64
        }))
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        let pages = self.pages();
        for (number, data) in (first..).zip(&mut *data) {
            let (found, _) = pages.get(&number).ok_or(io::ErrorKind::NotFound)?;
            *data = **found;
        }
        for (number, tags) in (first..).zip(tags) {
            *tags = pages[&number].1.clone();
        }
        Ok(())
    }
}

impl PageSink for Memory {
    fn metadata(&self) -> Metadata {
        self.metadata
    }

    fn place(&self, batch: &Batch) -> io::Result<()> {
        let mut pages = self.pages();
        for (number, data, tags) in batch.iter() {
            let tags = tags.cloned().unwrap_or(TagPage::ZERO);
            pages.insert(number, (Box::new(*data), tags));
        }
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.pages().retain(|number, _| !range.contains(number));
        Ok(())
    }
}

pub fn header(id: u8, metadata: Metadata, base: Option<Identity>) -> Header {
    Header {
        id: StreamId([id; 16]),
        metadata,
        base,
        indexed: true,
    }
}

pub fn sending(compression: Compression, chunk_pages: usize) -> Sending {
    Sending {
        compression,
        chunk_pages,
        threads: NonZeroUsize::MIN,
    }
}

/// A file with all pages of the memory.
pub fn file(header: &Header, memory: &Memory, sending: &Sending) -> (Vec<u8>, Identity) {
    let mut writer = StreamWriter::new(Vec::new(), header.clone()).expect("memory takes all");
    send(memory, &mut writer, sending).expect("memory gives all");
    writer.finish().expect("memory takes all")
}

/// The pages of a stream, read in order onto those of a base.
pub fn in_order(bytes: &[u8], base: Pages) -> stream::Result<Pages> {
    let mut reader = StreamReader::new(bytes)?;
    let memory = Memory::with(reader.header().metadata, base);
    receive(&mut reader, &memory, |_| Ok(()))?;
    Ok(memory.into_pages())
}

/// The pages of a snapshot, read by its index.
pub fn by_index(snapshot: &Snapshot<Vec<u8>>) -> stream::Result<Pages> {
    let memory = Memory::new(snapshot.metadata());
    let two = NonZeroUsize::new(2).expect("two are more than none");
    stream::restore(snapshot, &memory, two)?;
    Ok(memory.into_pages())
}

pub fn data(seed: u64) -> Box<Page> {
    let mut page = Box::new(ZERO_PAGE);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for byte in page.iter_mut() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state as u8;
    }
    page
}

pub fn tags(seed: u8) -> TagPage {
    let mut page = TagPage::filled(Tag::from_low_bits(seed));
    for granule in (0..=u8::MAX).step_by(3 + usize::from(seed % 7)) {
        page.set(granule, Tag::from_low_bits(granule ^ seed));
    }
    page
}

/// Zeros, data that can be compressed, data that cannot.
fn any_data() -> impl Strategy<Value = Box<Page>> {
    prop_oneof![
        Just(Box::new(ZERO_PAGE)),
        any::<u8>().prop_map(|byte| Box::new([byte; 4096])),
        any::<u64>().prop_map(data),
        (0usize..4096, any::<u8>()).prop_map(|(at, byte)| {
            let mut page = Box::new(ZERO_PAGE);
            page[at] = byte;
            page
        }),
    ]
}

fn any_tags() -> impl Strategy<Value = TagPage> {
    prop_oneof![
        Just(TagPage::ZERO),
        (0u8..16).prop_map(|tag| TagPage::filled(Tag::from_low_bits(tag))),
        any::<u8>().prop_map(tags),
        any::<[u8; 128]>().prop_map(TagPage::from_packed),
    ]
}

/// Runs of pages with holes between them, some far away.
pub fn any_pages() -> impl Strategy<Value = Pages> {
    let gap = prop_oneof![
        4 => Just(0u64),
        2 => 1u64..5,
        1 => 1u64..1 << 40,
    ];
    vec((gap, any_data(), any_tags()), 0..90).prop_map(|pages| {
        let mut next = 0;
        let mut numbered = Pages::new();
        for (gap, data, tags) in pages {
            numbered.insert(next + gap, (data, tags));
            next += gap + 1;
        }
        numbered
    })
}

/// Of a few pages: 0 to 4 and 100, with all sorts of data and tags.
pub fn sample() -> Pages {
    let uniform = TagPage::filled(Tag::from_low_bits(7));
    Pages::from([
        (0, (Box::new(ZERO_PAGE), TagPage::ZERO)),
        (1, (data(1), TagPage::ZERO)),
        (2, (Box::new(ZERO_PAGE), tags(5))),
        (3, (Box::new([0xaa; 4096]), uniform)),
        (4, (data(4), tags(9))),
        (100, (Box::new([3; 4096]), tags(2))),
    ])
}
