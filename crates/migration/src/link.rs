//! A link between the two sides: a stream in each direction over one connection, half-duplex.
//!
//! The source dials and greets; the destination answers. From then on one side speaks and the other listens, as
//! the protocol has it, so one thread a link is enough, whatever is beneath it.

use std::io::{self, IoSlice, Read, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stream::{
    Batch, Chunk, Compression, Decoder, Encoder, Header, Kind, Metadata, State, StreamReader,
    StreamWriter,
};

use crate::error::{Error, Result};
use crate::message::{Hello, WANTED, WORD, Wanted, Word};
use crate::pace::{Pace, Sent};

/// What bytes are carried by: a socket, with TLS or without, or a test's pipe.
pub trait Wire: Read + Write + Send {
    /// How long a read or write may wait.
    ///
    /// # Errors
    /// The system refuses.
    fn set_patience(&mut self, patience: Duration) -> io::Result<()>;

    /// Ends the wire from another thread: who reads or writes comes back.
    fn closer(&self) -> Closer;

    /// The other side, for messages.
    fn peer(&self) -> String;
}

/// Ends a wire.
pub type Closer = Arc<dyn Fn() + Send + Sync>;

/// Reaches the destination.
pub trait Dial: Sync {
    /// A new connection.
    ///
    /// # Errors
    /// Whatever keeps it from being had.
    fn dial(&self) -> io::Result<Box<dyn Wire>>;

    /// Whom it reaches, for messages.
    fn peer(&self) -> String;
}

/// A connection whose handshake, if it has any, is still to be done, on a thread that may wait for it.
pub type Pending = Box<dyn FnOnce() -> io::Result<Box<dyn Wire>> + Send>;

/// Takes connections.
pub trait Listen: Send + 'static {
    /// The next one.
    ///
    /// # Errors
    /// Nobody will come any more.
    fn accept(&self) -> io::Result<Pending>;

    /// Ends it from another thread: nobody will come any more.
    fn closer(&self) -> Closer;
}

/// Both halves of a wire, which are never used at once.
#[derive(Clone)]
struct Half(Arc<Mutex<Ends>>);

struct Ends {
    wire: Box<dyn Wire>,
    /// Until then all must have been read that is waited for, however it comes.
    deadline: Option<Instant>,
}

impl Half {
    fn new(wire: Box<dyn Wire>) -> Self {
        Self(Arc::new(Mutex::new(Ends {
            wire,
            deadline: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Read for Half {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut ends = self.lock();
        if let Some(deadline) = ends.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            ends.wire.set_patience(left)?;
        }
        ends.wire.read(bytes)
    }
}

impl Write for Half {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().wire.write(bytes)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.lock().wire.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.lock().wire.flush()
    }
}

/// A saved state, in or out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedState {
    /// What it is of.
    pub name: String,
    /// The version of its own format.
    pub version: u32,
    /// The state.
    pub data: Vec<u8>,
}

/// What came over a link.
#[derive(Debug)]
pub(crate) enum Incoming {
    Word(Word),
    /// Pages, in the batch.
    Pages,
    State(SavedState),
    Holes(Vec<Range<u64>>),
    Wanted(Wanted),
    /// The other side will say no more.
    End,
}

impl Incoming {
    /// Its name, for messages about what was expected: what it holds may be long, and is not to be believed.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Word(word) => word.name(),
            Self::Pages => "pages",
            Self::State(_) => "a saved state",
            Self::Holes(_) => "holes",
            Self::Wanted(_) => "a request for pages",
            Self::End => "an end",
        }
    }
}

pub(crate) struct Link {
    wire: Half,
    closer: Closer,
    peer: String,
    reader: StreamReader<Half>,
    writer: Option<StreamWriter<Half>>,
    encoder: Encoder,
    decoder: Decoder,
    chunk: Chunk,
    tag_bytes: u64,
    pace: Pace,
    /// When pages were sent last, if nothing was said since.
    idle_since: Option<Instant>,
    /// Bytes of a writer that is finished.
    finished: u64,
}

/// A link whose greeting was read, and that waits for an answer.
pub(crate) struct Greeted {
    wire: Half,
    closer: Closer,
    peer: String,
    reader: StreamReader<Half>,
}

impl Link {
    /// Dials, greets, and hears the answer.
    pub(crate) fn open(
        dial: &dyn Dial,
        hello: &Hello,
        metadata: Metadata,
        compression: Compression,
        patience: Duration,
    ) -> Result<Self> {
        let peer = dial.peer();
        let unreachable = |source| Error::Connect {
            peer: dial.peer(),
            source,
        };
        let mut wire = dial.dial().map_err(unreachable)?;
        wire.set_patience(patience).map_err(unreachable)?;
        let closer = wire.closer();
        let wire = Half::new(wire);
        let broken = |source| Error::Link {
            peer: peer.clone(),
            source,
        };
        let header = Header::of_connection(metadata).map_err(Error::Session)?;
        let mut encoder = Encoder::new(&header, compression).map_err(broken)?;
        let mut writer = StreamWriter::new(wire.clone(), header).map_err(broken)?;
        let mut chunk = Chunk::new();
        put_word(
            &mut writer,
            &mut encoder,
            &mut chunk,
            &Word::Hello(hello.clone()),
        )
        .map_err(broken)?;
        let reader = StreamReader::new(wire.clone()).map_err(broken)?;
        let mut link = Self {
            decoder: reader.decoder(),
            wire,
            closer,
            peer,
            reader,
            writer: Some(writer),
            encoder,
            chunk,
            tag_bytes: 0,
            pace: Pace::default(),
            idle_since: None,
            finished: 0,
        };
        match link.hear()? {
            Word::Welcome => Ok(link),
            other => Err(link.unexpected(other.name(), "a welcome")),
        }
    }

    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    pub(crate) fn metadata(&self) -> Metadata {
        self.reader.header().metadata
    }

    pub(crate) fn closer(&self) -> Closer {
        self.closer.clone()
    }

    /// Bytes written.
    pub(crate) fn bytes(&self) -> u64 {
        self.writer
            .as_ref()
            .map_or(self.finished, StreamWriter::bytes)
    }

    /// Those of them that are tags.
    pub(crate) const fn tag_bytes(&self) -> u64 {
        self.tag_bytes
    }

    pub(crate) fn set_patience(&self, patience: Duration) -> Result<()> {
        self.wire
            .lock()
            .wire
            .set_patience(patience)
            .map_err(|source| Error::Connect {
                peer: self.peer.clone(),
                source,
            })
    }

    fn broken(&self, source: stream::Error) -> Error {
        Error::Link {
            peer: self.peer.clone(),
            source,
        }
    }

    pub(crate) fn unexpected(&self, said: &str, wanted: &str) -> Error {
        Error::Protocol {
            peer: self.peer.clone(),
            what: format!("it said {said} where {wanted} was due"),
        }
    }

    fn put(
        &mut self,
        make: impl FnOnce(&mut Encoder, &mut Chunk) -> stream::Result<()>,
    ) -> Result<()> {
        self.write(|writer, encoder, chunk| {
            make(encoder, chunk)?;
            writer.write(chunk)
        })
    }

    fn write(
        &mut self,
        write: impl FnOnce(&mut StreamWriter<Half>, &mut Encoder, &mut Chunk) -> stream::Result<()>,
    ) -> Result<()> {
        let Some(writer) = &mut self.writer else {
            return Err(self.broken(stream::Error::Abandoned));
        };
        write(writer, &mut self.encoder, &mut self.chunk).map_err(|source| self.broken(source))?;
        self.tag_bytes += self.chunk.tag_bytes() as u64;
        Ok(())
    }

    pub(crate) fn say(&mut self, word: &Word) -> Result<()> {
        self.idle_since = None;
        let bytes = serde_json::to_vec(word).expect("words are made of what JSON has");
        self.put(|encoder, chunk| encoder.message(WORD, &bytes, chunk))?;
        self.flush()
    }

    /// Asks for pages, when it is flushed.
    pub(crate) fn ask(&mut self, wanted: Wanted) -> Result<()> {
        self.put(|encoder, chunk| encoder.message(WANTED, &wanted.to_bytes(), chunk))
    }

    pub(crate) fn pages(&mut self, batch: &Batch) -> Result<()> {
        let (effort, before) = (self.pace.effort(), self.bytes());
        let begun = self.idle_since.take().unwrap_or_else(Instant::now);
        self.write(|writer, encoder, chunk| {
            encoder.set_tag_effort(effort);
            writer.write_pages(encoder, batch, chunk)
        })?;
        let now = Instant::now();
        self.idle_since = Some(now);
        self.pace.learn(Sent {
            pages: batch.tags().len(),
            bytes: (self.bytes() - before) as usize,
            tag_bytes: self.chunk.tag_bytes(),
            time: now - begun,
            tag_time: self.encoder.tag_time(),
        });
        Ok(())
    }

    pub(crate) fn state(&mut self, state: &SavedState) -> Result<()> {
        let state = State {
            name: &state.name,
            version: state.version,
            data: (&*state.data).into(),
        };
        self.put(|encoder, chunk| encoder.state(&state, chunk))
    }

    /// Pages that stay behind.
    pub(crate) fn holes(&mut self, mut runs: &[Range<u64>]) -> Result<()> {
        while !runs.is_empty() {
            let mut taken = 0;
            self.put(|encoder, chunk| {
                taken = encoder.holes(runs, chunk)?;
                Ok(())
            })?;
            runs = &runs[taken..];
        }
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        let flushed = self.writer.as_mut().map_or(Ok(()), StreamWriter::flush);
        flushed.map_err(|source| self.broken(source))
    }

    /// Says no more.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let Some(writer) = self.writer.take() else {
            return Ok(());
        };
        self.finished = writer.bytes();
        writer
            .finish()
            .map(drop)
            .map_err(|source| self.broken(source))
    }

    /// What comes next, pages into `batch`.
    pub(crate) fn next(&mut self, batch: &mut Batch) -> Result<Incoming> {
        let more = self
            .reader
            .read_decoded(&mut self.chunk, &mut self.decoder, batch);
        self.incoming(more)
    }

    fn incoming(&mut self, more: stream::Result<bool>) -> Result<Incoming> {
        let at_a_boundary = self.reader.bytes();
        let read = more.map_err(|source| match source {
            stream::Error::Truncated { offset } if offset == at_a_boundary => Error::Ended {
                peer: self.peer.clone(),
            },
            source => self.broken(source),
        });
        if !read? {
            return Ok(Incoming::End);
        }
        let (decoder, chunk) = (&mut self.decoder, &self.chunk);
        let decoded = match chunk.kind() {
            Kind::Pages => Ok(Incoming::Pages),
            Kind::Holes => decoder.holes(chunk).map(Incoming::Holes),
            Kind::State => decoder.state(chunk).map(|state| {
                Incoming::State(SavedState {
                    name: state.name.to_owned(),
                    version: state.version,
                    data: state.data.into_owned(),
                })
            }),
            Kind::Message(WORD) => {
                let bytes = decoder.message(chunk);
                return self.parse_word(bytes.map(std::borrow::Cow::into_owned));
            }
            Kind::Message(WANTED) => {
                let bytes = decoder.message(chunk);
                let wanted = bytes.map(|bytes| Wanted::from_bytes(&bytes));
                return match wanted.map_err(|source| self.broken(source))? {
                    Some(wanted) => Ok(Incoming::Wanted(wanted)),
                    None => Err(self.unexpected("a request that makes no sense", "one for pages")),
                };
            }
            _ => return Err(self.unexpected("something unknown", "something else")),
        };
        decoded.map_err(|source| self.broken(source))
    }

    fn parse_word(&self, bytes: stream::Result<Vec<u8>>) -> Result<Incoming> {
        let bytes = bytes.map_err(|source| self.broken(source))?;
        serde_json::from_slice(&bytes)
            .map(Incoming::Word)
            .map_err(|problem| Error::Protocol {
                peer: self.peer.clone(),
                what: format!("it said what is no word of the protocol: {problem}"),
            })
    }

    /// The next word; a refusal is an error.
    pub(crate) fn hear(&mut self) -> Result<Word> {
        let more = self
            .reader
            .read_only(&mut self.chunk, |kind| kind == Kind::Message(WORD));
        match self.incoming(more)? {
            Incoming::Word(Word::Refused { reason }) => Err(Error::Refused {
                peer: self.peer.clone(),
                reason,
            }),
            Incoming::Word(word) => Ok(word),
            Incoming::End => Err(Error::Ended {
                peer: self.peer.clone(),
            }),
            other => Err(self.unexpected(other.name(), "a word")),
        }
    }
}

impl Greeted {
    /// Hears the greeting on a wire that somebody dialled: all of it within `time`. From then on, the other side may be
    /// silent for `patience`.
    pub(crate) fn accept(
        wire: Box<dyn Wire>,
        time: Duration,
        patience: Duration,
    ) -> Result<(Self, Hello)> {
        let peer = wire.peer();
        let closer = wire.closer();
        let wire = Half::new(wire);
        wire.lock().deadline = Some(Instant::now() + time);
        let broken = |source| Error::Link {
            peer: peer.clone(),
            source,
        };
        let mut reader = StreamReader::new(wire.clone()).map_err(broken)?;
        let mut chunk = Chunk::new();
        reader
            .read_only(&mut chunk, |kind| kind == Kind::Message(WORD))
            .map_err(broken)?;
        let bytes = reader
            .decoder()
            .message(&chunk)
            .map_err(broken)?
            .into_owned();
        let Ok(Word::Hello(hello)) = serde_json::from_slice(&bytes) else {
            return Err(Error::Protocol {
                peer,
                what: "it did not greet".into(),
            });
        };
        let mut ends = wire.lock();
        ends.deadline = None;
        ends.wire.set_patience(patience).map_err(Error::Listen)?;
        drop(ends);
        let greeted = Self {
            wire,
            closer,
            peer,
            reader,
        };
        Ok((greeted, hello))
    }

    pub(crate) fn metadata(&self) -> Metadata {
        self.reader.header().metadata
    }

    pub(crate) fn closer(&self) -> Closer {
        self.closer.clone()
    }

    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// Answers with a welcome.
    pub(crate) fn welcome(self) -> Result<Link> {
        self.answer(&Word::Welcome)
    }

    /// Answers with a refusal. Whoever dialled may be gone.
    pub(crate) fn refuse(self, reason: String) {
        let _ = self.answer(&Word::Refused { reason });
    }

    fn answer(self, word: &Word) -> Result<Link> {
        let broken = |source| Error::Link {
            peer: self.peer.clone(),
            source,
        };
        let header = Header::of_connection(self.metadata()).map_err(Error::Session)?;
        let encoder = Encoder::new(&header, Compression::None).map_err(broken)?;
        let writer = StreamWriter::new(self.wire.clone(), header).map_err(broken)?;
        let mut link = Link {
            decoder: self.reader.decoder(),
            wire: self.wire,
            closer: self.closer,
            peer: self.peer,
            reader: self.reader,
            writer: Some(writer),
            encoder,
            chunk: Chunk::new(),
            tag_bytes: 0,
            pace: Pace::default(),
            idle_since: None,
            finished: 0,
        };
        link.say(word)?;
        Ok(link)
    }
}

fn put_word(
    writer: &mut StreamWriter<Half>,
    encoder: &mut Encoder,
    chunk: &mut Chunk,
    word: &Word,
) -> stream::Result<()> {
    let bytes = serde_json::to_vec(word).expect("words are made of what JSON has");
    encoder.message(WORD, &bytes, chunk)?;
    writer.write(chunk)?;
    writer.flush()
}
