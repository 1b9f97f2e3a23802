//! The format as bytes: header, chunk head, kinds, limits, varints. The crate's README describes
//! all of it; nothing outside this module knows an offset.

use std::ops::Range;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::ChunkError;

/// Bytes of a page, the unit of records: 4 KiB, whatever the host's page size.
pub const PAGE_SIZE: usize = 4096;
/// The most pages a chunk may have.
pub const MAX_CHUNK_PAGES: usize = 512;
/// Page numbers are below this: a guest physical address has at most 64 bits.
pub const MAX_PAGE: u64 = 1 << 52;
/// The most bytes of a saved state.
pub const MAX_STATE_LEN: usize = 16 << 20;
/// The most bytes of the name of a saved state.
pub const MAX_NAME_LEN: usize = 64;
/// The most bytes of a message.
pub const MAX_MESSAGE_LEN: usize = 64 << 10;
/// The most chunks of a stream that has an index: 64 pages each are 1 TiB.
pub const MAX_INDEXED_CHUNKS: u64 = 1 << 22;

/// The most runs that a chunk of holes may have.
pub(crate) const MAX_HOLE_RUNS: usize = 4096;
/// The most bytes of a part of the index.
pub(crate) const MAX_INDEX_PART: usize = 1 << 20;

pub(crate) const MAGIC: [u8; 8] = *b"\x89TVS\r\n\x1a\n";
/// The version written and understood.
pub const VERSION: u16 = 1;
pub(crate) const PAGE_SIZE_LOG2: u8 = PAGE_SIZE.ilog2() as u8;

/// Flags below this bit must be understood by a reader; it may ignore the others.
pub(crate) const MANDATORY_FLAGS: u32 = 0xffff;
/// The stream holds only what differs from its base.
pub(crate) const FLAG_DELTA: u32 = 1;
/// An index stands before the end.
pub(crate) const FLAG_INDEXED: u32 = 2;
pub(crate) const KNOWN_FLAGS: u32 = FLAG_DELTA | FLAG_INDEXED;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub magic: [u8; 8],
    pub version: U16,
    pub metadata: u8,
    pub page_size_log2: u8,
    pub flags: U32,
    pub id: [u8; 16],
    pub base_id: [u8; 16],
    pub base_check: U64,
    /// Over the bytes above.
    pub check: U64,
}

pub(crate) const HEADER_LEN: usize = size_of::<RawHeader>();

/// What stands before the body of a chunk.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawHead {
    pub kind: u8,
    pub codec: u8,
    /// Pages of a chunk of pages, runs of a chunk of holes, otherwise 0.
    pub count: U16,
    /// Bytes of the body before the data.
    pub meta_len: U32,
    /// Bytes of the data as they are in the body.
    pub data_len: U32,
    /// Bytes of the data when decoded.
    pub decoded_len: U32,
    /// Over the contents.
    pub content_check: U64,
    /// Over the bytes above.
    pub check: U64,
}

pub(crate) const HEAD_LEN: usize = size_of::<RawHead>();
/// Bytes of a structure before its own check, which is its last field.
pub(crate) const CHECK_LEN: usize = size_of::<U64>();

/// The data of the last chunk.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawEnd {
    /// Chunks before this one.
    pub chunks: U64,
    /// Pages in all chunks of pages.
    pub pages: U64,
    /// Where the index begins, counted from the header's first byte; 0 if there is none.
    pub index_offset: U64,
    /// Over the checks of all heads of the index, in order.
    pub index_check: U64,
    /// Over the checks of all heads, in order.
    pub stream_check: U64,
}

/// Bytes of the chunk that ends a stream.
pub(crate) const END_LEN: usize = HEAD_LEN + size_of::<RawEnd>();

/// A chunk in the index's first table.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawIndexed {
    pub kind: u8,
    pub reserved: [u8; 3],
    /// Bytes of head and body.
    pub len: U32,
    /// The check of its head.
    pub check: U64,
}

/// What a chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Pages: data and tags.
    Pages,
    /// Pages that are not populated, or no longer.
    Holes,
    /// A saved state.
    State,
    /// Part of the index: the chunks before it.
    IndexChunks,
    /// Part of the index: which pages are in which chunk.
    IndexPages,
    /// The end of the stream.
    End,
    /// A message of a protocol that rides the stream, 0 to 127. This crate does not look at it.
    Message(u8),
}

impl Kind {
    const MESSAGE: u8 = 0x80;

    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Pages => 1,
            Self::Holes => 2,
            Self::State => 3,
            Self::IndexChunks => 4,
            Self::IndexPages => 5,
            Self::End => 6,
            Self::Message(number) => Self::MESSAGE | number,
        }
    }

    pub(crate) const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Pages),
            2 => Some(Self::Holes),
            3 => Some(Self::State),
            4 => Some(Self::IndexChunks),
            5 => Some(Self::IndexPages),
            6 => Some(Self::End),
            Self::MESSAGE.. => Some(Self::Message(code & !Self::MESSAGE)),
            _ => None,
        }
    }

    /// The most bytes a chunk of this kind may have.
    pub(crate) const fn max_len(self) -> usize {
        let limits = self.limits();
        HEAD_LEN + limits.meta + limits.data
    }

    /// The most bytes that metadata and decoded data may have, and the highest count.
    const fn limits(self) -> Limits {
        let (count, meta, data) = match self {
            Self::Pages => (
                MAX_CHUNK_PAGES,
                pages_meta_limit(MAX_CHUNK_PAGES),
                MAX_CHUNK_PAGES * PAGE_SIZE,
            ),
            Self::Holes => (MAX_HOLE_RUNS, MAX_HOLE_RUNS * MAX_RUN_LEN, 0),
            Self::State => (0, state_meta_len(MAX_NAME_LEN), MAX_STATE_LEN),
            Self::IndexChunks | Self::IndexPages => (0, 0, MAX_INDEX_PART),
            Self::End => (0, 0, size_of::<RawEnd>()),
            Self::Message(_) => (0, 0, MAX_MESSAGE_LEN),
        };
        Limits { count, meta, data }
    }
}

struct Limits {
    count: usize,
    meta: usize,
    data: usize,
}

/// Two varints below 2^52.
pub(crate) const MAX_RUN_LEN: usize = 16;

/// The most bytes of runs, plane and tags.
pub(crate) const fn pages_meta_limit(pages: usize) -> usize {
    pages * MAX_RUN_LEN + pages.div_ceil(8) + tagcodec::max_batch_len(pages)
}

/// Version, and name with its length.
pub(crate) const fn state_meta_len(name: usize) -> usize {
    STATE_NAME + name
}

/// Where the name of a state begins in its metadata: behind version and length.
pub(crate) const STATE_NAME: usize = size_of::<U32>() + 1;

/// How the data of a chunk are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    Raw,
    Lz4,
    Zstd,
}

impl Codec {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Raw => 1,
            Self::Lz4 => 2,
            Self::Zstd => 3,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Raw),
            2 => Some(Self::Lz4),
            3 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A head whose check and lengths were found right: what it says can be allocated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub kind: Kind,
    pub codec: Codec,
    pub count: usize,
    pub meta_len: usize,
    pub data_len: usize,
    pub decoded_len: usize,
    pub content_check: u64,
    /// Over the head.
    pub check: u64,
}

impl Head {
    pub(crate) const fn body_len(&self) -> usize {
        self.meta_len + self.data_len
    }

    /// `seed` is the stream's.
    pub(crate) fn parse(bytes: &[u8; HEAD_LEN], seed: u64) -> Result<Self, ChunkError> {
        let raw: RawHead = zerocopy::transmute!(*bytes);
        let check = crate::check::seeded(seed, &bytes[..HEAD_LEN - CHECK_LEN]);
        if !crate::check::matches(raw.check.get(), check) {
            return Err(ChunkError::HeadDamaged);
        }
        let kind = Kind::from_code(raw.kind).ok_or(ChunkError::Kind(raw.kind))?;
        let codec = Codec::from_code(raw.codec).ok_or(ChunkError::Codec(raw.codec))?;
        let head = Self {
            kind,
            codec,
            count: raw.count.get().into(),
            meta_len: raw.meta_len.get() as usize,
            data_len: raw.data_len.get() as usize,
            decoded_len: raw.decoded_len.get() as usize,
            content_check: raw.content_check.get(),
            check,
        };
        head.within_limits()?;
        Ok(head)
    }

    fn within_limits(&self) -> Result<(), ChunkError> {
        let limits = self.kind.limits();
        let within = |what, given, limit| {
            if given > limit {
                return Err(ChunkError::TooLarge { what, given, limit });
            }
            Ok(())
        };
        within("count", self.count, limits.count)?;
        within("metadata", self.meta_len, limits.meta)?;
        within("decoded data", self.decoded_len, limits.data)?;
        within("data", self.data_len, self.decoded_len)?;
        if self.codec == Codec::Raw && self.data_len != self.decoded_len {
            return Err(ChunkError::Length);
        }
        Ok(())
    }

    pub(crate) fn to_bytes(self, seed: u64) -> [u8; HEAD_LEN] {
        let narrow = |len: usize| U32::new(u32::try_from(len).expect("lengths are within limits"));
        let mut raw = RawHead {
            kind: self.kind.code(),
            codec: self.codec.code(),
            count: U16::new(u16::try_from(self.count).expect("counts are within limits")),
            meta_len: narrow(self.meta_len),
            data_len: narrow(self.data_len),
            decoded_len: narrow(self.decoded_len),
            content_check: U64::new(self.content_check),
            check: U64::ZERO,
        };
        let check = crate::check::seeded(seed, &raw.as_bytes()[..HEAD_LEN - CHECK_LEN]);
        raw.check = U64::new(check);
        zerocopy::transmute!(raw)
    }
}

/// Appends a number: seven bits a byte, lowest first, bit 7 set in all bytes but the last.
pub(crate) fn put_varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Takes a number of at most 56 bits.
pub(crate) fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..56).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Appends a run of pages behind the page number `end`, where the last one ended.
pub(crate) fn put_run(run: &Range<u64>, end: u64, out: &mut Vec<u8>) {
    put_varint(run.start - end, out);
    put_varint(run.end - run.start - 1, out);
}

/// Takes a run behind `end`. It is neither empty nor beyond [`MAX_PAGE`].
pub(crate) fn take_run(bytes: &mut &[u8], end: u64) -> Option<Range<u64>> {
    let start = end + take_varint(bytes)?;
    let end = start + take_varint(bytes)? + 1;
    (end <= MAX_PAGE).then_some(start..end)
}
