//! What is in a stream, with every check of it made.

use std::io::Read;

use mte::{Tag, TagPage};

use crate::batch::{Batch, ZERO_PAGE};
use crate::chunk::{Chunk, Decoder};
use crate::error::{Error, Result, io};
use crate::header::{Header, Identity};
use crate::index::{Index, IndexBuilder};
use crate::reader::StreamReader;
use crate::wire::Kind;

/// What [`inspect`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The header.
    pub header: Header,
    /// What a delta on it would name as its base.
    pub identity: Identity,
    /// All bytes, header and chunks.
    pub bytes: u64,
    /// Chunks, the end not counted.
    pub chunks: u64,
    /// Records of pages: a page that was written twice counts twice.
    pub pages: u64,
    /// Of these, records that a later one replaced. Known for files alone.
    pub replaced: u64,
    /// Of all records, those whose data are zeros.
    pub zero_pages: u64,
    /// Of all records, those whose tags are all 0.
    pub untagged_pages: u64,
    /// Of all records, those with one tag other than 0.
    pub uniform_pages: u64,
    /// Of all records, those with several tags.
    pub mixed_pages: u64,
    /// Pages said to be not populated, or no longer.
    pub holes: u64,
    /// Messages.
    pub messages: u64,
    /// The saved states.
    pub states: Vec<StateSummary>,
    /// Bytes of pages' numbers and tags, coded.
    pub metadata_bytes: u64,
    /// Bytes of pages' data, coded.
    pub data_bytes: u64,
    /// Bytes of the index.
    pub index_bytes: u64,
}

/// A saved state found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateSummary {
    /// What it is of.
    pub name: String,
    /// The version of its format.
    pub version: u32,
    /// Its bytes, decoded.
    pub bytes: usize,
}

/// Reads a stream from its header to its end, decodes everything in it, makes every check, and
/// compares its index with what is there. Nothing may follow the end.
///
/// # Errors
/// The first thing that is wrong.
pub fn inspect(from: impl Read) -> Result<Summary> {
    let mut from = from;
    let mut reader = StreamReader::new(&mut from)?;
    let mut inspection = Inspection::new(&reader);
    let mut chunk = Chunk::new();
    while reader.read(&mut chunk)? {
        inspection.add(&chunk)?;
    }
    let identity = reader.identity().ok_or(Error::EndMissing)?;
    let (chunks, bytes) = (reader.progress().chunks, reader.bytes());
    let mut behind = Vec::new();
    from.take(1)
        .read_to_end(&mut behind)
        .map_err(io("read the stream"))?;
    if !behind.is_empty() {
        return Err(Error::EndMissing);
    }
    inspection.finish(identity, chunks, bytes)
}

struct Inspection {
    summary: Summary,
    decoder: Decoder,
    batch: Batch,
    found: Option<IndexBuilder>,
    claimed: Index,
}

impl Inspection {
    fn new<R: Read>(reader: &StreamReader<R>) -> Self {
        let header = reader.header().clone();
        let identity = Identity {
            id: header.id,
            check: 0,
        };
        Self {
            decoder: reader.decoder(),
            batch: Batch::new(header.metadata),
            found: header.indexed.then(|| IndexBuilder::new(&header)),
            claimed: Index::default(),
            summary: Summary {
                header,
                identity,
                bytes: 0,
                chunks: 0,
                pages: 0,
                replaced: 0,
                zero_pages: 0,
                untagged_pages: 0,
                uniform_pages: 0,
                mixed_pages: 0,
                holes: 0,
                messages: 0,
                states: Vec::new(),
                metadata_bytes: 0,
                data_bytes: 0,
                index_bytes: 0,
            },
        }
    }

    fn add(&mut self, chunk: &Chunk) -> Result<()> {
        match chunk.kind() {
            Kind::Pages => self.add_pages(chunk)?,
            Kind::Holes => {
                let runs = self.decoder.holes(chunk)?;
                self.summary.holes += runs.iter().map(|run| run.end - run.start).sum::<u64>();
            }
            Kind::State => {
                let state = self.decoder.state(chunk)?;
                self.summary.states.push(StateSummary {
                    name: state.name.to_owned(),
                    version: state.version,
                    bytes: state.data.len(),
                });
            }
            Kind::IndexChunks | Kind::IndexPages => {
                self.summary.index_bytes += chunk.bytes().len() as u64;
                let header = &self.summary.header;
                return self.claimed.read(chunk, &mut self.decoder, header);
            }
            Kind::Message(_) => {
                self.decoder.message(chunk)?;
                self.summary.messages += 1;
            }
            Kind::End => {}
        }
        match &mut self.found {
            Some(found) => found.add(chunk),
            None => Ok(()),
        }
    }

    fn add_pages(&mut self, chunk: &Chunk) -> Result<()> {
        self.decoder.pages(chunk, &mut self.batch)?;
        let summary = &mut self.summary;
        summary.pages += self.batch.len() as u64;
        summary.metadata_bytes += chunk.head.meta_len as u64;
        summary.data_bytes += chunk.head.data_len as u64;
        let zeros = self.batch.data().iter().filter(|data| **data == ZERO_PAGE);
        summary.zero_pages += zeros.count() as u64;
        for tags in self.batch.tags().iter().map(TagPage::uniform) {
            match tags {
                Some(Tag::ZERO) => summary.untagged_pages += 1,
                Some(_) => summary.uniform_pages += 1,
                None => summary.mixed_pages += 1,
            }
        }
        Ok(())
    }

    fn finish(self, identity: Identity, chunks: u64, bytes: u64) -> Result<Summary> {
        let mut summary = self.summary;
        if let Some(found) = self.found.map(IndexBuilder::finish) {
            if found != self.claimed {
                return Err(Error::Index("it is not that of the chunks before it"));
            }
            let is_pages = |chunk: u32| found.chunks[chunk as usize].kind == Kind::Pages;
            let live = found.pages.iter().filter(|(_, chunk)| is_pages(*chunk));
            let live: u64 = live.map(|(run, _)| run.end - run.start).sum();
            summary.replaced = summary.pages - live;
        }
        Ok(Summary {
            identity,
            chunks,
            bytes,
            ..summary
        })
    }
}
