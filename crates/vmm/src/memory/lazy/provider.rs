//! Where the pages of a lazily filled memory come from: a snapshot, or a peer that still has them.

use std::ops::Range;

use stream::{Batch, Location, Metadata, ReadAt, Snapshot, SnapshotReader};

/// Pages that come in chunks: all pages of a chunk at once, checked. Chunks are numbered from 0 on, and each page
/// is in one at most. What pages there are, and in which chunk, does not change.
///
/// A chunk is what one access brings: of a file what was compressed as one, of a peer what is asked for by one message.
pub trait PageProvider: Send + Sync + 'static {
    /// What a thread needs to bring chunks.
    type Reader<'a>: ChunkReader
    where
        Self: 'a;

    /// What its pages have besides data.
    fn metadata(&self) -> Metadata;

    /// The runs of page numbers that it has, each with the number of the chunk that they are in. All others are holes.
    fn runs(&self) -> impl Iterator<Item = (Range<u64>, u32)>;

    /// For a thread of its own.
    fn reader(&self) -> Self::Reader<'_>;
}

/// Brings chunks, one at a time. Threads have one each, so that nobody waits for another's chunk.
pub trait ChunkReader {
    /// How many chunks, at most, it wants to know before they are read.
    const AHEAD: usize = 0;

    /// Which chunks are to be read next, most likely. They are told before each is read.
    fn expect(&mut self, chunks: impl Iterator<Item = u32>) {
        let _ = chunks;
    }

    /// All pages of a chunk. It may take as long as it takes; an error is final until somebody asks for
    /// another try.
    ///
    /// # Errors
    /// Whatever keeps it from bringing them. Nothing of the chunk is used then.
    fn read(&mut self, chunk: u32) -> stream::Result<&Batch>;
}

/// The pages of a snapshot.
pub struct SnapshotPages<F> {
    snapshot: Snapshot<F>,
    /// In ascending order: a chunk's number is its place here.
    chunks: Vec<Location>,
}

impl<F: ReadAt> SnapshotPages<F> {
    /// All pages of a snapshot and its bases.
    pub fn new(snapshot: Snapshot<F>) -> Self {
        let chunks = snapshot.chunks().collect();
        Self { snapshot, chunks }
    }
}

impl<F: ReadAt + 'static> PageProvider for SnapshotPages<F> {
    type Reader<'a> = SnapshotChunks<'a, F>;

    fn metadata(&self) -> Metadata {
        self.snapshot.metadata()
    }

    fn runs(&self) -> impl Iterator<Item = (Range<u64>, u32)> {
        self.snapshot.located().filter_map(|(run, location)| {
            let chunk = self.chunks.binary_search(&location).ok()?;
            Some((run, chunk as u32))
        })
    }

    fn reader(&self) -> SnapshotChunks<'_, F> {
        SnapshotChunks {
            reader: self.snapshot.reader(),
            chunks: &self.chunks,
        }
    }
}

/// Reads chunks of a snapshot.
pub struct SnapshotChunks<'a, F> {
    reader: SnapshotReader<'a, F>,
    chunks: &'a [Location],
}

impl<F: ReadAt> ChunkReader for SnapshotChunks<'_, F> {
    fn read(&mut self, chunk: u32) -> stream::Result<&Batch> {
        let location = self
            .chunks
            .get(chunk as usize)
            .ok_or(stream::Error::ForeignChunk)?;
        self.reader.read(*location)
    }
}
