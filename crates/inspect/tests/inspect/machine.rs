//! Machines for tests: snapshots of given pages, memory that is no snapshot, vCPUs of given registers.

use std::collections::BTreeMap;
use std::ops::Range;

use engine::{PendingSError, PowerState, RegisterId, RegisterValue, VcpuState};
use inspect::{Result, SnapshotMemory, TaggedMemory, Visitor};
use mte::{Tag, TagPage};
use stream::{
    Batch, Chunk, Compression, Encoder, Header, Metadata, Page, Run, Snapshot, StreamId,
    StreamWriter, ZERO_PAGE,
};

/// The first page of RAM.
pub const RAM: u64 = 0x40000;

pub type TestPage = (u64, Page, TagPage);

pub fn tag(value: u8) -> Tag {
    Tag::new(value).unwrap()
}

/// A page whose data are this byte.
pub fn page(number: u64, data: u8, tags: TagPage) -> TestPage {
    (number, [data; stream::PAGE_SIZE], tags)
}

/// Tags that are all different from their neighbours.
pub fn counting() -> TagPage {
    TagPage::pack(&std::array::from_fn(|granule| granule as u8))
}

/// A snapshot whose chunks have these pages, one after the other.
pub fn snapshot(metadata: Metadata, chunks: &[&[TestPage]]) -> Snapshot<Vec<u8>> {
    let header = Header {
        id: StreamId([7; 16]),
        metadata,
        base: None,
        indexed: true,
    };
    let mut encoder = Encoder::new(&header, Compression::Lz4).unwrap();
    let mut writer = StreamWriter::new(Vec::new(), header).unwrap();
    let mut encoded = Chunk::new();
    for chunk in chunks {
        let mut batch = Batch::new(metadata);
        for (number, data, tags) in *chunk {
            let tags = metadata.has_tags().then_some(tags);
            batch.push(*number, data, tags).unwrap();
        }
        encoder.pages(&batch, &mut encoded).unwrap();
        writer.write(&encoded).unwrap();
    }
    let (file, _) = writer.finish().unwrap();
    Snapshot::open_whole(file).unwrap()
}

pub fn tagged(chunks: &[&[TestPage]]) -> Snapshot<Vec<u8>> {
    snapshot(Metadata::ArmMte, chunks)
}

/// The memory of a machine with this many pages of RAM and no vCPUs.
pub fn memory(snapshot: &Snapshot<Vec<u8>>, pages: u64) -> SnapshotMemory<'_, Vec<u8>> {
    SnapshotMemory::new(snapshot, Some(RAM..RAM + pages), Vec::new())
}

/// Memory that is no snapshot: pages here and there, without RAM around them.
#[derive(Default)]
pub struct Scattered {
    pub pages: BTreeMap<u64, Page>,
}

impl Scattered {
    /// Writes 64 bits.
    pub fn put(&mut self, address: u64, value: u64) {
        let page = self.pages.entry(address / 4096).or_insert(ZERO_PAGE);
        let at = (address % 4096) as usize;
        page[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    pub fn get(&self, address: u64) -> u64 {
        let at = (address % 4096) as usize;
        let page = self.pages.get(&(address / 4096)).unwrap_or(&ZERO_PAGE);
        u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
    }
}

impl TaggedMemory for Scattered {
    fn has_tags(&self) -> bool {
        true
    }

    fn ram(&self) -> Range<u64> {
        0..0
    }

    fn vcpus(&self) -> &[VcpuState] {
        &[]
    }

    fn next_run(&mut self, from: u64) -> Result<Option<Range<u64>>> {
        let page = self.pages.range(from..).next();
        Ok(page.map(|(page, _)| *page..page + 1))
    }

    fn read(&mut self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> Result<()> {
        tags.fill(TagPage::ZERO);
        for (to, page) in data.iter_mut().zip(first..) {
            *to = self.pages.get(&page).copied().unwrap_or(ZERO_PAGE);
        }
        Ok(())
    }

    fn visit(&mut self, pages: Range<u64>, each: Visitor<'_>) -> Result<()> {
        for (first, data) in self.pages.range(pages) {
            each(Run {
                first: *first,
                data: std::slice::from_ref(data),
                tags: &[TagPage::ZERO],
            })?;
        }
        Ok(())
    }
}

/// A vCPU with these registers of 64 bits.
pub fn vcpu(registers: &[(RegisterId, u64)]) -> VcpuState {
    let register = |(id, value): &(RegisterId, u64)| RegisterValue {
        id: *id,
        value: value.to_le_bytes()[..id.size()].to_vec(),
    };
    VcpuState {
        registers: registers.iter().map(register).collect(),
        power: PowerState::On,
        serror: PendingSError::default(),
    }
}
