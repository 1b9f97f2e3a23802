//! Streams to files and connections.

use std::io::Write;

use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::U64;

use crate::check::chained;
use crate::chunk::{Chunk, seal_raw};
use crate::error::{Error, Result, io};
use crate::header::{Header, Identity};
use crate::index::IndexBuilder;
use crate::wire::{HEADER_LEN, Kind, RawEnd};

/// What a stream has had so far: what its end says.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    pub chunks: u64,
    pub pages: u64,
    /// Bytes, the header's among them.
    pub bytes: u64,
    pub index_offset: u64,
    pub index_check: u64,
    pub stream_check: u64,
}

impl Progress {
    pub(crate) const fn new(seed: u64) -> Self {
        Self {
            chunks: 0,
            pages: 0,
            bytes: HEADER_LEN as u64,
            index_offset: 0,
            index_check: seed,
            stream_check: seed,
        }
    }

    pub(crate) fn add(&mut self, chunk: &Chunk) {
        let check = chunk.head.check;
        if matches!(chunk.kind(), Kind::IndexChunks | Kind::IndexPages) {
            if self.index_offset == 0 {
                self.index_offset = self.bytes;
            }
            self.index_check = chained(self.index_check, check);
        }
        self.chunks += 1;
        self.pages += chunk.pages() as u64;
        self.bytes += chunk.bytes.len() as u64;
        self.stream_check = chained(self.stream_check, check);
    }

    pub(crate) const fn end(&self) -> RawEnd {
        RawEnd {
            chunks: U64::new(self.chunks),
            pages: U64::new(self.pages),
            index_offset: U64::new(self.index_offset),
            index_check: U64::new(self.index_check),
            stream_check: U64::new(self.stream_check),
        }
    }
}

/// Writes a stream. Each chunk is one write, so nothing need buffer them; a reader finds the stream
/// cut off until [`Self::finish`] was called.
pub struct StreamWriter<W> {
    to: W,
    header: Header,
    seed: u64,
    progress: Progress,
    index: Option<IndexBuilder>,
    failed: bool,
}

impl<W: Write> StreamWriter<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(mut to: W, header: Header) -> Result<Self> {
        to.write_all(&header.to_bytes())
            .map_err(io("write the header of the stream"))?;
        let seed = header.seed();
        Ok(Self {
            to,
            seed,
            progress: Progress::new(seed),
            index: header.indexed.then(|| IndexBuilder::new(&header)),
            header,
            failed: false,
        })
    }

    /// The header.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes written so far.
    pub const fn bytes(&self) -> u64 {
        self.progress.bytes
    }

    /// Pages written so far, each as often as it was written.
    pub const fn pages(&self) -> u64 {
        self.progress.pages
    }

    /// Writes a chunk.
    ///
    /// # Errors
    /// [`Error::ForeignChunk`] if it was made for another stream; [`Error::StateName`] if the file
    /// has a state of its name; [`Error::TooManyChunks`]; [`Error::Unexpected`] if it is not for
    /// writers, or a message to a file. [`Error::Io`]; then, and from then on, the stream cannot be
    /// finished.
    pub fn write(&mut self, chunk: &Chunk) -> Result<()> {
        if chunk.seed != self.seed {
            return Err(Error::ForeignChunk);
        }
        match chunk.kind() {
            Kind::Pages | Kind::Holes | Kind::State => {}
            Kind::Message(_) if !self.header.indexed => {}
            kind => return Err(Error::Unexpected(kind)),
        }
        self.may_go_on()?;
        if let Some(index) = &mut self.index {
            index.add(chunk)?;
        }
        self.put(chunk)
    }

    /// Pushes out what the layers below hold back.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn flush(&mut self) -> Result<()> {
        self.may_go_on()?;
        let flushed = self.to.flush().map_err(io("write the stream"));
        self.failed = flushed.is_err();
        flushed
    }

    /// Writes index and end. Returns where it wrote them, which is flushed but not synced, and what
    /// the stream is now.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Abandoned`] if a write failed before.
    pub fn finish(mut self) -> Result<(W, Identity)> {
        self.may_go_on()?;
        if let Some(index) = self.index.take() {
            index.finish().write(self.seed, |chunk| self.put(chunk))?;
        }
        let mut end = Chunk::new();
        seal_raw(
            Kind::End,
            self.progress.end().as_bytes(),
            self.seed,
            &mut end,
        );
        self.put(&end)?;
        self.flush()?;
        let identity = Identity {
            id: self.header.id,
            check: end.head.check,
        };
        Ok((self.to, identity))
    }

    const fn may_go_on(&self) -> Result<()> {
        if self.failed {
            return Err(Error::Abandoned);
        }
        Ok(())
    }

    fn put(&mut self, chunk: &Chunk) -> Result<()> {
        if let Err(error) = self.to.write_all(&chunk.bytes) {
            self.failed = true;
            return Err(io("write the stream")(error));
        }
        self.progress.add(chunk);
        Ok(())
    }
}
