//! Streams from connections, and files in order.

use std::io::{self, Read};

use zerocopy::FromBytes;
use zerocopy::byteorder::little_endian::U64;

use crate::batch::{Batch, same_metadata};
use crate::check::matches;
use crate::chunk::{Chunk, Decoder, Place, State};
use crate::error::{ChunkError, Error, Result, io};
use crate::header::{Header, Identity};
use crate::source::{PageSink, discard, place};
use crate::wire::{Codec, HEAD_LEN, Head, Kind, RawEnd};
use crate::writer::Progress;

/// Reads a stream in order.
pub struct StreamReader<R> {
    from: R,
    header: Header,
    seed: u64,
    progress: Progress,
    end: Option<Identity>,
}

impl<R: Read> StreamReader<R> {
    /// Reads the header. What it says besides its format is the caller's to judge: metadata, base.
    ///
    /// # Errors
    /// [`Error::NotAStream`], [`Error::Version`], [`Error::HeaderDamaged`], [`Error::Flags`],
    /// [`Error::PageSize`], [`Error::UnknownMetadata`], looked for in this order; [`Error::Io`].
    pub fn new(mut from: R) -> Result<Self> {
        let (header, seed) = Header::read(&mut from)?;
        Ok(Self {
            from,
            header,
            seed,
            progress: Progress::new(seed),
            end: None,
        })
    }

    /// The header.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// A decoder for its chunks; each thread can have one.
    pub fn decoder(&self) -> Decoder {
        Decoder::with_seed(self.header.metadata, self.seed)
    }

    /// What was read, once the end was.
    pub const fn identity(&self) -> Option<Identity> {
        self.end
    }

    /// Bytes read so far.
    pub const fn bytes(&self) -> u64 {
        self.progress.bytes
    }

    pub(crate) const fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Reads the next chunk; no more are there if the answer is `false`: the end was read and is
    /// right. What is behind it is not looked at.
    ///
    /// # Errors
    /// [`Error::Truncated`], [`Error::Chunk`], [`Error::EndMismatch`], [`Error::Io`]. The chunk is then
    /// empty, and the stream of no more use.
    pub fn read(&mut self, chunk: &mut Chunk) -> Result<bool> {
        self.read_only(chunk, |_| true)
    }

    /// Reads the next chunk, which must be the end or of a kind that `wanted` accepts. The body of another one is not
    /// read: a peer that is not trusted yet costs no more memory than what it may send.
    ///
    /// # Errors
    /// Those of [`Self::read`]; [`ChunkError::Unexpected`] for a kind that is not wanted.
    pub fn read_only(&mut self, chunk: &mut Chunk, wanted: impl Fn(Kind) -> bool) -> Result<bool> {
        if self.end.is_some() {
            return Ok(false);
        }
        self.read_chunk(chunk, wanted)
            .inspect_err(|_| *chunk = Chunk::new())
    }

    /// Reads the next chunk and, if it is one of pages, decodes these into `batch`: as [`Self::read`] and [`Decoder::pages`] do, but data that
    /// are not compressed are read to where they belong, and are not in the chunk.
    ///
    /// # Errors
    /// Those of both.
    pub fn read_decoded(
        &mut self,
        chunk: &mut Chunk,
        decoder: &mut Decoder,
        batch: &mut Batch,
    ) -> Result<bool> {
        if self.end.is_some() {
            return Ok(false);
        }
        let read = self.read_head(chunk, |_| true).and_then(|()| {
            if chunk.kind() != Kind::Pages {
                return self.read_rest(chunk);
            }
            if chunk.head.codec != Codec::Raw {
                let more = self.read_rest(chunk)?;
                return decoder.pages(chunk, batch).map(|()| more);
            }
            self.read_body(chunk, chunk.head.meta_len)?;
            let mut arrived = Ok(());
            let decoded = decoder.pages_with(chunk, batch, |_, data| {
                arrived = self.from.read_exact(data);
                arrived.is_ok().then_some(())
            });
            self.whole(arrived, chunk.bytes.len())?;
            decoded?;
            self.progress.add(chunk);
            Ok(true)
        });
        read.inspect_err(|_| {
            *chunk = Chunk::new();
            batch.clear();
        })
    }

    fn read_chunk(&mut self, chunk: &mut Chunk, wanted: impl Fn(Kind) -> bool) -> Result<bool> {
        self.read_head(chunk, wanted)?;
        self.read_rest(chunk)
    }

    fn read_head(&mut self, chunk: &mut Chunk, wanted: impl Fn(Kind) -> bool) -> Result<()> {
        chunk.place = Place {
            number: self.progress.chunks,
            offset: self.progress.bytes,
        };
        chunk.seed = self.seed;
        let mut head = [0; HEAD_LEN];
        let read = self.from.read_exact(&mut head);
        self.whole(read, 0)?;
        chunk.head = Head::parse(&head, self.seed).map_err(|problem| chunk.place.fault(problem))?;
        self.expect(chunk)?;
        if chunk.kind() != Kind::End && !wanted(chunk.kind()) {
            return Err(chunk.place.fault(ChunkError::Unexpected(chunk.kind())));
        }
        chunk.bytes.clear();
        chunk.bytes.extend_from_slice(&head);
        Ok(())
    }

    /// Reads so much of the body. Room grows with what arrives, not with what the head claims.
    fn read_body(&mut self, chunk: &mut Chunk, len: usize) -> Result<()> {
        let mut body = self.from.by_ref().take(len as u64);
        let read = match body.read_to_end(&mut chunk.bytes) {
            Ok(read) if read == len => Ok(()),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => Err(error),
        };
        self.whole(read, chunk.bytes.len())
    }

    /// Reads the body; whether there is more behind it.
    fn read_rest(&mut self, chunk: &mut Chunk) -> Result<bool> {
        self.read_body(chunk, chunk.head.body_len())?;
        if chunk.kind() == Kind::End {
            self.check_end(chunk)?;
            return Ok(false);
        }
        self.progress.add(chunk);
        Ok(true)
    }

    /// `read` bytes of the chunk are there, and this came of reading more.
    fn whole(&self, result: io::Result<()>, read: usize) -> Result<()> {
        result.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::Truncated {
                offset: self.progress.bytes + read as u64,
            },
            _ => io("read the stream")(error),
        })
    }

    /// Only the end and more of the index can follow a part of the index; messages are not in files.
    fn expect(&self, chunk: &Chunk) -> Result<()> {
        let expected = match chunk.kind() {
            Kind::IndexChunks | Kind::IndexPages => self.header.indexed,
            Kind::End => true,
            Kind::Message(_) => !self.header.indexed,
            Kind::Pages | Kind::Holes | Kind::State => self.progress.index_offset == 0,
        };
        if !expected {
            return Err(chunk.place.fault(ChunkError::Unexpected(chunk.kind())));
        }
        Ok(())
    }

    fn check_end(&mut self, chunk: &Chunk) -> Result<()> {
        let content = self.decoder().content(chunk)?;
        let end =
            RawEnd::read_from_bytes(&content).map_err(|_| chunk.place.fault(ChunkError::Length))?;
        let found = self.progress.end();
        let right = |what, right: bool| {
            if !right {
                return Err(Error::EndMismatch(what));
            }
            Ok(())
        };
        let same = |what, one, other| right(what, one == other);
        let fits = |what, one: U64, other: U64| right(what, matches(one.get(), other.get()));
        same("the number of chunks differs", end.chunks, found.chunks)?;
        same("the number of pages differs", end.pages, found.pages)?;
        same(
            "the index is somewhere else",
            end.index_offset,
            found.index_offset,
        )?;
        fits("the index is another", end.index_check, found.index_check)?;
        fits(
            "chunks were changed, swapped or left out",
            end.stream_check,
            found.stream_check,
        )?;
        if self.header.indexed && self.progress.index_offset == 0 {
            return Err(Error::EndMismatch("the index is missing"));
        }
        self.progress.bytes += chunk.bytes.len() as u64;
        self.end = Some(Identity {
            id: self.header.id,
            check: chunk.head.check,
        });
        Ok(())
    }
}

/// Reads a stream to its end: places its pages in order, and gives its saved states to `state`.
/// What was placed is right even if an error follows, but then not all of it: the guest may run only
/// if this succeeds. A delta is placed on what the sink has.
///
/// # Errors
/// Those of [`StreamReader::read`] and [`Decoder`]; [`Error::Sink`]; [`Error::Metadata`]; what
/// `state` returns; [`Error::Unexpected`] for a message.
pub fn receive<R: Read>(
    reader: &mut StreamReader<R>,
    sink: &impl PageSink,
    mut state: impl FnMut(State<'_>) -> Result<()>,
) -> Result<Identity> {
    let metadata = reader.header().metadata;
    same_metadata("the stream", metadata, "the sink", sink.metadata())?;
    let mut decoder = reader.decoder();
    let mut batch = Batch::new(metadata);
    let mut chunk = Chunk::new();
    while reader.read(&mut chunk)? {
        match chunk.kind() {
            Kind::Pages => {
                decoder.pages(&chunk, &mut batch)?;
                place(sink, &batch)?;
            }
            Kind::Holes => {
                for run in decoder.holes(&chunk)? {
                    discard(sink, run)?;
                }
            }
            Kind::State => state(decoder.state(&chunk)?)?,
            Kind::IndexChunks | Kind::IndexPages => {}
            kind @ (Kind::End | Kind::Message(_)) => return Err(Error::Unexpected(kind)),
        }
    }
    reader.identity().ok_or(Error::EndMissing)
}
