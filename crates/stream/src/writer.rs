//! Streams to files and connections.

use std::io::{self, IoSlice, Write};

use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::U64;

use crate::batch::Batch;
use crate::check::chained;
use crate::chunk::{Chunk, Encoder, seal_raw};
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
        self.bytes += chunk.len() as u64;
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
        self.write_with(chunk, &[])
    }

    /// Makes a chunk of pages, in the room of `chunk`, and writes it. It is the same as [`Encoder::pages`] and [`Self::write`], but data that
    /// are not compressed go from the batch to what is written to.
    ///
    /// # Errors
    /// Those of both.
    pub fn write_pages(
        &mut self,
        encoder: &mut Encoder,
        batch: &Batch,
        chunk: &mut Chunk,
    ) -> Result<()> {
        let data = encoder.pages_apart(batch, chunk)?;
        self.write_with(chunk, data)
    }

    fn write_with(&mut self, chunk: &Chunk, data: &[u8]) -> Result<()> {
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
        self.put_with(chunk, data)
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
        self.put_with(chunk, &[])
    }

    fn put_with(&mut self, chunk: &Chunk, data: &[u8]) -> Result<()> {
        if let Err(error) = write_both(&mut self.to, &chunk.bytes, data) {
            self.failed = true;
            return Err(io("write the stream")(error));
        }
        self.progress.add(chunk);
        Ok(())
    }
}

fn write_both(to: &mut impl Write, one: &[u8], other: &[u8]) -> io::Result<()> {
    let mut parts = [one, other].map(IoSlice::new);
    let mut rest = &mut parts[..];
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        match to.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut rest, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use mte::{Tag, TagPage};

    use super::*;
    use crate::batch::ZERO_PAGE;
    use crate::{Compression, Metadata, PAGE_SIZE, StreamReader};

    fn batch() -> Batch {
        let mut batch = Batch::new(Metadata::ArmMte);
        for (number, data) in [(3, [7; PAGE_SIZE]), (4, ZERO_PAGE), (9, [8; PAGE_SIZE])] {
            let tags = TagPage::filled(Tag::from_low_bits(number as u8));
            batch.push(number, &data, Some(&tags)).unwrap();
        }
        batch
    }

    #[test]
    fn pages_are_the_same_bytes_however_they_are_written() {
        for compression in [Compression::None, Compression::Lz4] {
            let header = Header::of_file(Metadata::ArmMte, None).unwrap();
            let mut encoder = Encoder::new(&header, compression).unwrap();
            let mut chunk = Chunk::new();
            let mut one = StreamWriter::new(Vec::new(), header.clone()).unwrap();
            encoder.pages(&batch(), &mut chunk).unwrap();
            one.write(&chunk).unwrap();
            let mut other = StreamWriter::new(Vec::new(), header).unwrap();
            other
                .write_pages(&mut encoder, &batch(), &mut chunk)
                .unwrap();

            assert_eq!(one.finish().unwrap(), other.finish().unwrap());
        }
    }

    #[test]
    fn pages_are_the_same_however_they_are_read() {
        for compression in [Compression::None, Compression::Lz4] {
            let header = Header::of_connection(Metadata::ArmMte).unwrap();
            let mut encoder = Encoder::new(&header, compression).unwrap();
            let mut chunk = Chunk::new();
            let mut writer = StreamWriter::new(Vec::new(), header).unwrap();
            writer
                .write_pages(&mut encoder, &batch(), &mut chunk)
                .unwrap();
            let (bytes, identity) = writer.finish().unwrap();
            let mut reader = StreamReader::new(&bytes[..]).unwrap();
            let mut decoder = reader.decoder();
            let mut read = Batch::new(Metadata::ArmMte);

            let more = reader.read_decoded(&mut chunk, &mut decoder, &mut read);

            assert!(more.unwrap());
            assert!(batch().iter().eq(read.iter()));
            let more = reader.read_decoded(&mut chunk, &mut decoder, &mut read);
            assert!(!more.unwrap());
            assert_eq!(reader.identity(), Some(identity));
        }
    }

    #[test]
    fn damaged_or_cut_off_pages_are_not_in_the_batch() {
        let header = Header::of_connection(Metadata::ArmMte).unwrap();
        let mut encoder = Encoder::new(&header, Compression::None).unwrap();
        let mut chunk = Chunk::new();
        let mut bytes = Vec::new();
        let mut writer = StreamWriter::new(&mut bytes, header).unwrap();
        writer
            .write_pages(&mut encoder, &batch(), &mut chunk)
            .unwrap();
        let mut damaged = bytes.clone();
        *damaged.last_mut().unwrap() ^= 1;
        let cut = &bytes[..bytes.len() - 1];
        for bytes in [&damaged, cut] {
            let mut reader = StreamReader::new(bytes).unwrap();
            let mut decoder = reader.decoder();
            let mut read = batch();

            let result = reader.read_decoded(&mut chunk, &mut decoder, &mut read);

            assert!(matches!(
                result,
                Err(Error::Chunk { .. } | Error::Truncated { .. })
            ));
            assert!(read.is_empty());
        }
    }
}
