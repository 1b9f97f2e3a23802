//! What stands before the end of a file: where each chunk is, and which chunk has each page. It is
//! built while chunks are written, and built again to inspect a file.
//!
//! A page may be written more than once, as when a guest runs while its memory is saved: the last
//! one counts, and the index names that one only.

use std::collections::HashSet;
use std::ops::Range;

use rangemap::RangeMap;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::chunk::{Chunk, Decoder, seal_raw};
use crate::error::{ChunkError, Error, Result};
use crate::header::Header;
use crate::runs::Runs;
use crate::wire::{
    HEAD_LEN, HEADER_LEN, Kind, MAX_INDEX_PART, MAX_INDEXED_CHUNKS, MAX_RUN_LEN, RawIndexed,
    STATE_NAME, put_run, put_varint, take_run, take_varint,
};

/// A chunk of pages, holes or a state, and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Indexed {
    pub kind: Kind,
    pub offset: u64,
    pub len: usize,
    pub check: u64,
}

/// All chunks, and the pages each has.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Index {
    pub chunks: Vec<Indexed>,
    /// To the number of the chunk.
    pub pages: Runs<u32>,
}

impl Index {
    fn end(&self) -> u64 {
        self.chunks
            .last()
            .map_or(HEADER_LEN as u64, |last| last.offset + last.len as u64)
    }

    /// Adds the next chunk.
    fn add(&mut self, kind: Kind, len: usize, check: u64) {
        self.chunks.push(Indexed {
            kind,
            offset: self.end(),
            len,
            check,
        });
    }
}

/// Makes the index of the chunks that are written.
#[derive(Debug)]
pub(crate) struct IndexBuilder {
    index: Index,
    /// The pages so far: what becomes the index's.
    pages: RangeMap<u64, u32>,
    delta: bool,
    names: HashSet<Vec<u8>>,
}

impl IndexBuilder {
    pub(crate) fn new(header: &Header) -> Self {
        Self {
            index: Index::default(),
            pages: RangeMap::new(),
            delta: header.base.is_some(),
            names: HashSet::new(),
        }
    }

    /// Adds the next chunk of the stream.
    pub(crate) fn add(&mut self, chunk: &Chunk) -> Result<()> {
        let number = self.index.chunks.len() as u64;
        if number >= MAX_INDEXED_CHUNKS {
            return Err(Error::TooManyChunks(MAX_INDEXED_CHUNKS));
        }
        match chunk.kind() {
            Kind::Pages => self.insert(chunk.page_runs()?, number),
            Kind::Holes if self.delta => self.insert(chunk.page_runs()?, number),
            Kind::Holes => {
                let runs = chunk.page_runs()?;
                runs.into_iter().for_each(|run| self.pages.remove(run));
            }
            Kind::State => {
                let name = chunk.meta().get(STATE_NAME..).unwrap_or_default();
                if !self.names.insert(name.to_vec()) {
                    return Err(Error::StateName {
                        name: String::from_utf8_lossy(name).into_owned(),
                        problem: "there is one already",
                    });
                }
            }
            kind => return Err(chunk.place.fault(ChunkError::Unexpected(kind))),
        }
        self.index.add(chunk.kind(), chunk.len(), chunk.head.check);
        Ok(())
    }

    fn insert(&mut self, runs: Vec<Range<u64>>, number: u64) {
        for run in runs {
            self.pages.insert(run, number as u32);
        }
    }

    pub(crate) fn finish(self) -> Index {
        Index {
            pages: Runs::from(&self.pages),
            ..self.index
        }
    }
}

impl Index {
    /// Gives the chunks that hold the index to `write`, one after the other.
    pub(crate) fn write(
        &self,
        seed: u64,
        mut write: impl FnMut(&Chunk) -> Result<()>,
    ) -> Result<()> {
        let mut chunk = Chunk::new();
        let mut data: Vec<u8> = Vec::new();
        let per_part = MAX_INDEX_PART / size_of::<RawIndexed>();
        for part in self.chunks.chunks(per_part) {
            data.clear();
            for indexed in part {
                data.extend_from_slice(indexed.to_raw().as_bytes());
            }
            seal_raw(Kind::IndexChunks, &data, seed, &mut chunk);
            write(&chunk)?;
        }
        data.clear();
        let mut end = 0;
        for (run, number) in self.pages.iter() {
            put_run(run, end, &mut data);
            put_varint(number.into(), &mut data);
            end = run.end;
            if data.len() + MAX_RUN_LEN + size_of::<u64>() > MAX_INDEX_PART {
                seal_raw(Kind::IndexPages, &data, seed, &mut chunk);
                write(&chunk)?;
                data.clear();
                end = 0;
            }
        }
        // There is a last part, empty or not: an indexed stream without chunks has an index too.
        seal_raw(Kind::IndexPages, &data, seed, &mut chunk);
        write(&chunk)
    }

    /// Takes what the next chunk of the index says.
    pub(crate) fn read(
        &mut self,
        chunk: &Chunk,
        decoder: &mut Decoder,
        header: &Header,
    ) -> Result<()> {
        let data = decoder.content(chunk)?;
        match chunk.kind() {
            Kind::IndexChunks => self.read_chunks(&data),
            Kind::IndexPages => self.read_pages(&data, header.base.is_some()),
            kind => Err(chunk.place.fault(ChunkError::Unexpected(kind))),
        }
    }

    fn read_chunks(&mut self, data: &[u8]) -> Result<()> {
        let table =
            <[RawIndexed]>::ref_from_bytes(data).map_err(|_| Error::Index("a chunk is cut off"))?;
        if (self.chunks.len() + table.len()) as u64 > MAX_INDEXED_CHUNKS {
            return Err(Error::TooManyChunks(MAX_INDEXED_CHUNKS));
        }
        for raw in table {
            let kind = Kind::from_code(raw.kind)
                .filter(|kind| matches!(kind, Kind::Pages | Kind::Holes | Kind::State))
                .ok_or(Error::Index("a chunk is of a kind that files do not have"))?;
            let len = raw.len.get() as usize;
            if !(HEAD_LEN..=kind.max_len()).contains(&len) {
                return Err(Error::Index("a chunk is longer or shorter than it may be"));
            }
            self.add(kind, len, raw.check.get());
        }
        Ok(())
    }

    fn read_pages(&mut self, mut data: &[u8], delta: bool) -> Result<()> {
        let wrong = Error::Index("its page numbers are damaged");
        let before = self.pages.end();
        let mut end = 0;
        while !data.is_empty() {
            let run = take_run(&mut data, end).filter(|run| run.start >= before);
            let number = take_varint(&mut data);
            let (Some(run), Some(number)) = (run, number) else {
                return Err(wrong);
            };
            let has_pages = usize::try_from(number)
                .ok()
                .and_then(|number| self.chunks.get(number))
                .is_some_and(|chunk| match chunk.kind {
                    Kind::Pages => true,
                    Kind::Holes => delta,
                    _ => false,
                });
            if !has_pages {
                return Err(Error::Index("pages are in a chunk that has none"));
            }
            end = run.end;
            self.pages.push(run, number as u32);
        }
        Ok(())
    }

    /// Whether the chunks go from the header to where the index begins.
    pub(crate) fn ends_at(&self, offset: u64) -> bool {
        self.end() == offset
    }
}

impl Indexed {
    const fn to_raw(self) -> RawIndexed {
        RawIndexed {
            kind: self.kind.code(),
            reserved: [0; 3],
            len: U32::new(self.len as u32),
            check: U64::new(self.check),
        }
    }
}
