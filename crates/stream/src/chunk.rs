//! A chunk as it is in a file or on a wire, and how a batch of pages, a saved state or a message
//! becomes one and is one again.
//!
//! [`Encoder`] and [`Decoder`] know nothing of the chunks before, so that each thread can have its
//! own; they and [`Chunk`] keep their room, so that nothing is allocated for each chunk.

use std::borrow::Cow;
use std::ops::Range;
use std::time::{Duration, Instant};

use mte::TagPage;
use tagcodec::{Effort, decode_batch, max_batch_len};
use zerocopy::IntoBytes;

use crate::batch::{Batch, Page, ZERO_PAGE, same_metadata};
use crate::check::{PagesCheck, matches, of_content};
use crate::compression::{Compression, Compressor, Decompressor};
use crate::error::{ChunkError, Error, Result, io};
use crate::header::{Header, Metadata};
use crate::wire::{
    Codec, HEAD_LEN, Head, Kind, MAX_HOLE_RUNS, MAX_MESSAGE_LEN, MAX_NAME_LEN, MAX_PAGE,
    MAX_STATE_LEN, PAGE_SIZE, put_run, take_run,
};

/// Bytes of a chunk: head and body. The head was found right; the body is checked when it is
/// decoded.
#[derive(Clone, Debug)]
pub struct Chunk {
    pub(crate) head: Head,
    pub(crate) bytes: Vec<u8>,
    /// Of the stream it belongs to.
    pub(crate) seed: u64,
    pub(crate) place: Place,
    tag_bytes: usize,
}

/// Where a chunk was read: for errors.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place {
    pub number: u64,
    pub offset: u64,
}

impl Place {
    pub(crate) fn fault(self, problem: ChunkError) -> Error {
        Error::Chunk {
            number: self.number,
            offset: self.offset,
            problem,
        }
    }
}

impl Default for Chunk {
    fn default() -> Self {
        Self::new()
    }
}

impl Chunk {
    /// Room for a chunk.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            head: Head {
                kind: Kind::Message(0),
                codec: Codec::Raw,
                count: 0,
                meta_len: 0,
                data_len: 0,
                decoded_len: 0,
                content_check: 0,
                check: 0,
            },
            bytes: Vec::new(),
            seed: 0,
            place: Place {
                number: 0,
                offset: 0,
            },
            tag_bytes: 0,
        }
    }

    /// What it holds.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.head.kind
    }

    /// How many pages it says it has; 0 for what is no chunk of pages.
    #[must_use]
    pub const fn pages(&self) -> usize {
        match self.head.kind {
            Kind::Pages => self.head.count,
            _ => 0,
        }
    }

    /// How many of its bytes are tags; 0 of a chunk that was read.
    #[must_use]
    pub const fn tag_bytes(&self) -> usize {
        self.tag_bytes
    }

    /// Its bytes in the stream.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many bytes of the stream it is.
    pub(crate) const fn len(&self) -> usize {
        HEAD_LEN + self.head.body_len()
    }

    fn body(&self) -> &[u8] {
        self.bytes.get(HEAD_LEN..).unwrap_or_default()
    }

    pub(crate) fn meta(&self) -> &[u8] {
        &self.body()[..self.head.meta_len]
    }

    fn data(&self) -> &[u8] {
        &self.body()[self.head.meta_len..]
    }

    pub(crate) fn must_be(&self, kind: Kind) -> Result<()> {
        if self.head.kind != kind {
            return Err(self.place.fault(ChunkError::Unexpected(self.head.kind)));
        }
        Ok(())
    }

    /// The page numbers that it says it has: of pages or holes. They are in order, and within the
    /// limits of the format; nothing else of it was checked.
    ///
    /// # Errors
    /// [`Error::Chunk`] if it has none or they are wrong.
    pub fn page_runs(&self) -> Result<Vec<Range<u64>>> {
        let runs = match self.head.kind {
            Kind::Pages => take_page_runs(&mut self.meta(), self.head.count),
            Kind::Holes => take_hole_runs(self.meta(), self.head.count),
            kind => Err(ChunkError::Unexpected(kind)),
        };
        runs.map_err(|problem| self.place.fault(problem))
    }
}

/// Runs with this many pages together.
fn take_page_runs(bytes: &mut &[u8], pages: usize) -> Result<Vec<Range<u64>>, ChunkError> {
    let mut runs = Vec::new();
    let (mut left, mut end) = (pages as u64, 0);
    while left > 0 {
        let run = take_run(bytes, end).ok_or(ChunkError::Runs)?;
        left = left
            .checked_sub(run.end - run.start)
            .ok_or(ChunkError::Runs)?;
        end = run.end;
        runs.push(run);
    }
    Ok(runs)
}

/// This many runs, and nothing behind them.
fn take_hole_runs(mut bytes: &[u8], count: usize) -> Result<Vec<Range<u64>>, ChunkError> {
    let mut runs = Vec::new();
    let mut end = 0;
    for _ in 0..count {
        let run = take_run(&mut bytes, end).ok_or(ChunkError::Runs)?;
        end = run.end;
        runs.push(run);
    }
    if !bytes.is_empty() {
        return Err(ChunkError::Length);
    }
    Ok(runs)
}

/// A saved state, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State<'a> {
    /// What it is of.
    pub name: &'a str,
    /// The version of its own format.
    pub version: u32,
    /// The state.
    pub data: Cow<'a, [u8]>,
}

/// Whether this can name a saved state: 1 to 64 lower-case letters, digits, `-`, `_`, `.`.
fn is_name(name: &[u8]) -> bool {
    let letter = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.');
    (1..=MAX_NAME_LEN).contains(&name.len()) && name.iter().all(letter)
}

/// Makes chunks of one stream.
pub struct Encoder {
    metadata: Metadata,
    seed: u64,
    compressor: Compressor,
    tags: Box<tagcodec::Encoder>,
    effort: Effort,
    tag_time: Duration,
    check: PagesCheck,
    /// Data of pages that are not zero, if others are between them.
    gathered: Vec<u8>,
}

impl Encoder {
    /// An encoder for the stream with this header.
    ///
    /// # Errors
    /// [`Error::Io`] if the compressor cannot be set up.
    pub fn new(header: &Header, compression: Compression) -> Result<Self> {
        let seed = header.seed();
        Ok(Self {
            metadata: header.metadata,
            seed,
            compressor: Compressor::new(compression).map_err(io("set up the compressor"))?,
            tags: Box::default(),
            effort: Effort::Full,
            tag_time: Duration::ZERO,
            check: PagesCheck::new(seed),
            gathered: Vec::new(),
        })
    }

    /// How much is to be made of tags from now on.
    pub const fn set_tag_effort(&mut self, effort: Effort) {
        self.effort = effort;
    }

    /// How long it took to make something of the tags of the last chunk of pages.
    #[must_use]
    pub const fn tag_time(&self) -> Duration {
        self.tag_time
    }

    /// Makes a chunk of pages.
    ///
    /// # Errors
    /// [`Error::Metadata`] if the batch has other metadata than the stream.
    pub fn pages(&mut self, batch: &Batch, chunk: &mut Chunk) -> Result<()> {
        let data = self.pages_apart(batch, chunk)?;
        chunk.bytes.extend_from_slice(data);
        Ok(())
    }

    /// Makes a chunk of pages whose data are not in its bytes yet, unless they were compressed, and returns those.
    pub(crate) fn pages_apart<'a>(
        &'a mut self,
        batch: &'a Batch,
        chunk: &mut Chunk,
    ) -> Result<&'a [u8]> {
        same_metadata("the batch", batch.metadata(), "the stream", self.metadata)?;
        let bytes = begin(chunk);
        let mut end = 0;
        for run in batch.runs() {
            put_run(&run.pages(), end, bytes);
            end = run.pages().end;
        }
        self.check.begin();
        let plane = bytes.len();
        bytes.resize(plane + batch.len().div_ceil(8), 0);
        let mut zeros = false;
        for (i, (number, data, tags)) in batch.iter().enumerate() {
            let zero = *data == ZERO_PAGE;
            zeros |= zero;
            bytes[plane + i / 8] |= u8::from(!zero) << (i % 8);
            self.check.add(number, (!zero).then_some(data), tags);
        }
        let before_tags = bytes.len();
        let begun = Instant::now();
        put_tags(&mut self.tags, self.effort, batch.tags(), bytes);
        self.tag_time = begun.elapsed();
        let tag_bytes = bytes.len() - before_tags;
        let data = if zeros {
            self.gathered.clear();
            for (i, data) in batch.data().iter().enumerate() {
                if is_set(&bytes[plane..], i) {
                    self.gathered.extend_from_slice(data);
                }
            }
            &self.gathered
        } else {
            batch.data().as_flattened()
        };
        let content = Content {
            kind: Kind::Pages,
            count: batch.len(),
            check: self.check.end(),
            data,
        };
        let apart = finish_apart(chunk, &content, self.seed, &mut self.compressor);
        chunk.tag_bytes = tag_bytes;
        Ok(apart)
    }

    /// Makes a chunk of holes: pages that are not populated, or no longer. Takes as many of the runs
    /// as a chunk may have, and returns how many these are.
    ///
    /// # Errors
    /// [`Error::Order`] if the runs are not in order, empty, or too high.
    pub fn holes(&mut self, runs: &[Range<u64>], chunk: &mut Chunk) -> Result<usize> {
        let runs = &runs[..runs.len().min(MAX_HOLE_RUNS)];
        let bytes = begin(chunk);
        let mut end = 0;
        for run in runs {
            if run.start < end || run.is_empty() || run.end > MAX_PAGE {
                return Err(Error::Order { page: run.start });
            }
            put_run(run, end, bytes);
            end = run.end;
        }
        self.seal(Kind::Holes, runs.len(), &[], chunk);
        Ok(runs.len())
    }

    /// Makes a chunk of a saved state: everything but memory, as the caller writes it, with a
    /// version of its own.
    ///
    /// # Errors
    /// [`Error::StateName`]; [`Error::TooLong`] if the state is longer than [`MAX_STATE_LEN`].
    pub fn state(&mut self, state: &State<'_>, chunk: &mut Chunk) -> Result<()> {
        if !is_name(state.name.as_bytes()) {
            return Err(Error::StateName {
                name: state.name.to_owned(),
                problem: "1 to 64 lower-case letters, digits, '-', '_' and '.' can",
            });
        }
        fits("a saved state", &state.data, MAX_STATE_LEN)?;
        let bytes = begin(chunk);
        bytes.extend_from_slice(&state.version.to_le_bytes());
        bytes.push(state.name.len() as u8);
        bytes.extend_from_slice(state.name.as_bytes());
        self.seal(Kind::State, 0, &state.data, chunk);
        Ok(())
    }

    /// Makes a chunk of a message, which is not compressed.
    ///
    /// # Errors
    /// [`Error::TooLong`] if it is longer than [`MAX_MESSAGE_LEN`]; [`Error::Unexpected`] if its
    /// number is above 127.
    pub fn message(&mut self, number: u8, message: &[u8], chunk: &mut Chunk) -> Result<()> {
        let kind = Kind::Message(number);
        if Kind::from_code(kind.code()) != Some(kind) {
            return Err(Error::Unexpected(kind));
        }
        fits("a message", message, MAX_MESSAGE_LEN)?;
        seal_raw(kind, message, self.seed, chunk);
        Ok(())
    }

    /// Ends a chunk whose metadata are written.
    fn seal(&mut self, kind: Kind, count: usize, data: &[u8], chunk: &mut Chunk) {
        let content = Content {
            kind,
            count,
            check: of_content(self.seed, &chunk.bytes[HEAD_LEN..], data),
            data,
        };
        finish(chunk, &content, self.seed, &mut self.compressor);
    }
}

/// Makes a chunk of data alone, as they are.
pub(crate) fn seal_raw(kind: Kind, data: &[u8], seed: u64, chunk: &mut Chunk) {
    begin(chunk);
    let content = Content {
        kind,
        count: 0,
        check: of_content(seed, &[], data),
        data,
    };
    finish(chunk, &content, seed, &mut Compressor::None);
}

fn fits(what: &'static str, bytes: &[u8], limit: usize) -> Result<()> {
    if bytes.len() > limit {
        return Err(Error::TooLong {
            what,
            given: bytes.len(),
            limit,
        });
    }
    Ok(())
}

/// What a chunk gets besides its metadata.
struct Content<'a> {
    kind: Kind,
    count: usize,
    check: u64,
    data: &'a [u8],
}

/// Leaves room for the head; metadata go behind it.
fn begin(chunk: &mut Chunk) -> &mut Vec<u8> {
    let mut bytes = std::mem::take(&mut chunk.bytes);
    bytes.clear();
    bytes.resize(HEAD_LEN, 0);
    // It is not a chunk of any stream until it is finished.
    *chunk = Chunk {
        bytes,
        ..Chunk::new()
    };
    &mut chunk.bytes
}

fn finish(chunk: &mut Chunk, content: &Content<'_>, seed: u64, compressor: &mut Compressor) {
    let data = finish_apart(chunk, content, seed, compressor);
    chunk.bytes.extend_from_slice(data);
}

/// Returns the data that belong behind the bytes, unless they were compressed.
fn finish_apart<'a>(
    chunk: &mut Chunk,
    content: &Content<'a>,
    seed: u64,
    compressor: &mut Compressor,
) -> &'a [u8] {
    let meta_end = chunk.bytes.len();
    let compressed = compressor.append_shorter(content.data, &mut chunk.bytes);
    let apart = match compressed {
        Some(_) => &[],
        None => content.data,
    };
    let mut head = Head {
        kind: content.kind,
        codec: compressed.unwrap_or(Codec::Raw),
        count: content.count,
        meta_len: meta_end - HEAD_LEN,
        data_len: chunk.bytes.len() - meta_end + apart.len(),
        decoded_len: content.data.len(),
        content_check: content.check,
        check: 0,
    };
    head.write(seed, &mut chunk.bytes);
    chunk.head = head;
    chunk.seed = seed;
    apart
}

/// The first and last of page numbers, 0 if there are none.
fn ends(numbers: &[u64]) -> (u64, u64) {
    let page = |page: Option<&u64>| page.copied().unwrap_or(0);
    (page(numbers.first()), page(numbers.last()))
}

fn put_tags(
    encoder: &mut tagcodec::Encoder,
    effort: Effort,
    tags: &[TagPage],
    bytes: &mut Vec<u8>,
) {
    let before = bytes.len();
    bytes.resize(before + max_batch_len(tags.len()), 0);
    let len = encoder
        .batch_with(effort, tags, &mut bytes[before..])
        .expect("there is room for any tags");
    bytes.truncate(before + len);
}

/// Reads chunks of one stream.
pub struct Decoder {
    metadata: Metadata,
    seed: u64,
    decompressor: Decompressor,
    check: PagesCheck,
}

impl Decoder {
    pub(crate) fn with_seed(metadata: Metadata, seed: u64) -> Self {
        Self {
            metadata,
            seed,
            decompressor: Decompressor::default(),
            check: PagesCheck::new(seed),
        }
    }

    /// Decodes a chunk of pages, replacing those of the batch. They are in it only if all of them
    /// are right; otherwise it is empty.
    ///
    /// # Errors
    /// [`Error::Chunk`]; [`Error::Metadata`] if the batch has other metadata than the stream.
    pub fn pages(&mut self, chunk: &Chunk, batch: &mut Batch) -> Result<()> {
        self.pages_with(chunk, batch, |decompressor, out| {
            decompressor.fill(chunk.head.codec, chunk.data(), out)
        })
    }

    /// The same, with data that `fill` has.
    pub(crate) fn pages_with(
        &mut self,
        chunk: &Chunk,
        batch: &mut Batch,
        fill: impl FnOnce(&mut Decompressor, &mut [u8]) -> Option<()>,
    ) -> Result<()> {
        batch.clear();
        chunk.must_be(Kind::Pages)?;
        same_metadata("the stream", self.metadata, "the batch", batch.metadata())?;
        self.decode_pages(chunk, batch, fill).map_err(|problem| {
            batch.clear();
            chunk.place.fault(problem)
        })
    }

    fn decode_pages(
        &mut self,
        chunk: &Chunk,
        batch: &mut Batch,
        fill: impl FnOnce(&mut Decompressor, &mut [u8]) -> Option<()>,
    ) -> Result<(), ChunkError> {
        let head = &chunk.head;
        let mut meta = chunk.meta();
        let mut end = 0;
        while batch.numbers.len() < head.count {
            let run = take_run(&mut meta, end).ok_or(ChunkError::Runs)?;
            let left = (head.count - batch.numbers.len()) as u64;
            if run.end - run.start > left {
                return Err(ChunkError::Runs);
            }
            end = run.end;
            batch.numbers.extend(run);
        }
        let (plane, coded_tags) = meta
            .split_at_checked(head.count.div_ceil(8))
            .ok_or(ChunkError::Length)?;
        let has_data = |i| is_set(plane, i);
        let with_data = (0..head.count).filter(|i| has_data(*i)).count();
        if head.decoded_len != with_data * PAGE_SIZE {
            return Err(ChunkError::Length);
        }
        if self.metadata.has_tags() {
            batch.tags.resize(head.count, TagPage::ZERO);
        }
        let used = decode_batch(coded_tags, &mut batch.tags).map_err(ChunkError::Tags)?;
        if used != coded_tags.len() {
            return Err(ChunkError::Length);
        }
        batch.make_room();
        let decoded = batch.data[..with_data].as_flattened_mut();
        let (first, last) = ends(&batch.numbers);
        fill(&mut self.decompressor, decoded).ok_or(ChunkError::PagesData { first, last })?;
        spread(&mut batch.data[..head.count], with_data, has_data);
        self.verify(head, batch, has_data)
    }

    fn verify(
        &mut self,
        head: &Head,
        batch: &Batch,
        has_data: impl Fn(usize) -> bool,
    ) -> Result<(), ChunkError> {
        self.check.begin();
        for (i, (number, data, tags)) in batch.iter().enumerate() {
            self.check.add(number, has_data(i).then_some(data), tags);
        }
        if !matches(self.check.end(), head.content_check) {
            let (first, last) = ends(&batch.numbers);
            return Err(ChunkError::PagesDamaged { first, last });
        }
        Ok(())
    }

    /// Decodes a chunk of holes.
    ///
    /// # Errors
    /// [`Error::Chunk`].
    pub fn holes(&mut self, chunk: &Chunk) -> Result<Vec<Range<u64>>> {
        chunk.must_be(Kind::Holes)?;
        self.content(chunk)?;
        chunk.page_runs()
    }

    /// Decodes a saved state. Its bytes are as they were written; what they mean is the caller's to
    /// check.
    ///
    /// # Errors
    /// [`Error::Chunk`].
    pub fn state<'a>(&mut self, chunk: &'a Chunk) -> Result<State<'a>> {
        chunk.must_be(Kind::State)?;
        let data = self.content(chunk)?;
        let parts = chunk
            .meta()
            .split_first_chunk()
            .and_then(|(version, name)| {
                let (len, name) = name.split_first()?;
                let right = usize::from(*len) == name.len() && is_name(name);
                Some((*version, std::str::from_utf8(name).ok().filter(|_| right)?))
            });
        let (version, name) = parts.ok_or_else(|| chunk.place.fault(ChunkError::Name))?;
        Ok(State {
            name,
            version: u32::from_le_bytes(version),
            data,
        })
    }

    /// The bytes of a message, as they were written.
    ///
    /// # Errors
    /// [`Error::Chunk`].
    pub fn message<'a>(&mut self, chunk: &'a Chunk) -> Result<Cow<'a, [u8]>> {
        match chunk.kind() {
            Kind::Message(_) => self.content(chunk),
            kind => Err(chunk.place.fault(ChunkError::Unexpected(kind))),
        }
    }

    /// The data of a chunk that has no pages.
    pub(crate) fn content<'a>(&mut self, chunk: &'a Chunk) -> Result<Cow<'a, [u8]>> {
        let data = match chunk.head.codec {
            Codec::Raw => Cow::Borrowed(chunk.data()),
            codec => {
                let mut data = vec![0; chunk.head.decoded_len];
                self.decompressor
                    .fill(codec, chunk.data(), &mut data)
                    .ok_or_else(|| chunk.place.fault(ChunkError::Data))?;
                Cow::Owned(data)
            }
        };
        let found = of_content(self.seed, chunk.meta(), &data);
        if !matches(found, chunk.head.content_check) {
            return Err(chunk.place.fault(ChunkError::ContentDamaged));
        }
        Ok(data)
    }
}

/// Whether a plane of bits, a page each, has that of page `i`.
const fn is_set(plane: &[u8], i: usize) -> bool {
    plane[i / 8] >> (i % 8) & 1 != 0
}

/// Moves the first pages to those that have data, and clears the others.
fn spread(pages: &mut [Page], with_data: usize, has_data: impl Fn(usize) -> bool) {
    let mut left = with_data;
    for i in (0..pages.len()).rev() {
        if !has_data(i) {
            pages[i].fill(0);
        } else {
            left -= 1;
            if left != i {
                pages.copy_within(left..=left, i);
            }
        }
    }
}

impl Head {
    /// Puts its own check in, and itself in front of the body.
    fn write(&mut self, seed: u64, bytes: &mut [u8]) {
        let head = self.to_bytes(seed);
        bytes[..HEAD_LEN].copy_from_slice(head.as_bytes());
        *self = Self::parse(&head, seed).expect("what is written can be read");
    }
}
