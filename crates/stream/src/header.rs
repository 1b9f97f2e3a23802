//! What a stream says about itself before its first chunk.

use std::fmt;
use std::io::{self, Read};

use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32, U64};

use crate::error::{Error, Result, io};
use crate::wire::{
    CHECK_LEN, FLAG_DELTA, FLAG_INDEXED, HEADER_LEN, KNOWN_FLAGS, MAGIC, MANDATORY_FLAGS,
    PAGE_SIZE_LOG2, RawHeader, VERSION,
};

/// What pages have besides data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Metadata {
    /// Nothing.
    None,
    /// Allocation tags of Arm's Memory Tagging Extension: 1/32 of the data.
    ArmMte,
}

impl Metadata {
    const fn code(self) -> u8 {
        match self {
            Self::None => 1,
            Self::ArmMte => 2,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::None),
            2 => Some(Self::ArmMte),
            _ => None,
        }
    }

    /// Whether pages have tags.
    #[must_use]
    pub const fn has_tags(self) -> bool {
        matches!(self, Self::ArmMte)
    }
}

impl fmt::Display for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no memory tags",
            Self::ArmMte => "Arm memory tags",
        })
    }
}

/// The number that tells a stream from all others: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamId(pub [u8; 16]);

impl StreamId {
    /// A new one.
    ///
    /// # Errors
    /// [`Error::Io`] if the system has no random numbers.
    pub fn random() -> Result<Self> {
        let mut id = [0; 16];
        getrandom::fill(&mut id)
            .map_err(io::Error::from)
            .map_err(io("get random numbers"))?;
        Ok(Self(id))
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A stream with these contents and no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Which stream.
    pub id: StreamId,
    /// The check of its end, which covers all that is in it.
    pub check: u64,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016x}", self.id, self.check)
    }
}

/// The header of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which stream.
    pub id: StreamId,
    /// What its pages have besides data.
    pub metadata: Metadata,
    /// What it must be applied to, if it holds only what changed.
    pub base: Option<Identity>,
    /// Whether an index stands before its end, so that it can be read out of order.
    pub indexed: bool,
}

impl Header {
    /// The header of a file: indexed, with an identity of its own.
    ///
    /// # Errors
    /// [`Error::Io`] if the system has no random numbers.
    pub fn of_file(metadata: Metadata, base: Option<Identity>) -> Result<Self> {
        Ok(Self {
            id: StreamId::random()?,
            metadata,
            base,
            indexed: true,
        })
    }

    /// The header of a connection: not indexed, with an identity of its own.
    ///
    /// # Errors
    /// [`Error::Io`] if the system has no random numbers.
    pub fn of_connection(metadata: Metadata) -> Result<Self> {
        Ok(Self {
            indexed: false,
            ..Self::of_file(metadata, None)?
        })
    }

    /// What all checks of the stream begin with: the header's own check. So every chunk is bound to
    /// its stream.
    pub(crate) fn seed(&self) -> u64 {
        self.to_raw().check.get()
    }

    pub(crate) fn to_bytes(&self) -> [u8; HEADER_LEN] {
        zerocopy::transmute!(self.to_raw())
    }

    fn to_raw(&self) -> RawHeader {
        let flag = |set, flag| if set { flag } else { 0 };
        let base = self.base.unwrap_or(Identity {
            id: StreamId([0; 16]),
            check: 0,
        });
        let mut raw = RawHeader {
            magic: MAGIC,
            version: U16::new(VERSION),
            metadata: self.metadata.code(),
            page_size_log2: PAGE_SIZE_LOG2,
            flags: U32::new(
                flag(self.base.is_some(), FLAG_DELTA) | flag(self.indexed, FLAG_INDEXED),
            ),
            id: self.id.0,
            base_id: base.id.0,
            base_check: U64::new(base.check),
            check: U64::ZERO,
        };
        raw.check = U64::new(check(&raw));
        raw
    }

    /// Reads a header and its seed, see [`Self::parse`].
    pub(crate) fn read(from: &mut impl Read) -> Result<(Self, u64)> {
        let mut bytes = [0; HEADER_LEN];
        from.read_exact(&mut bytes)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => Error::NotAStream,
                _ => io("read the header")(error),
            })?;
        Self::parse(&bytes)
    }

    /// A header and its seed, which is not that of [`Self::seed`] if the header has optional flags:
    /// these are not kept.
    pub(crate) fn parse(bytes: &[u8; HEADER_LEN]) -> Result<(Self, u64)> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(Error::NotAStream);
        }
        if raw.version.get() != VERSION {
            return Err(Error::Version(raw.version.get()));
        }
        if !crate::check::matches(raw.check.get(), check(&raw)) {
            return Err(Error::HeaderDamaged);
        }
        let flags = raw.flags.get();
        let unknown = flags & MANDATORY_FLAGS & !KNOWN_FLAGS;
        if unknown != 0 {
            return Err(Error::Flags(unknown));
        }
        if raw.page_size_log2 != PAGE_SIZE_LOG2 {
            return Err(Error::PageSize(raw.page_size_log2));
        }
        let metadata =
            Metadata::from_code(raw.metadata).ok_or(Error::UnknownMetadata(raw.metadata))?;
        let base = Identity {
            id: StreamId(raw.base_id),
            check: raw.base_check.get(),
        };
        let delta = flags & FLAG_DELTA != 0;
        if !delta && (base.id.0 != [0; 16] || base.check != 0) {
            return Err(Error::HeaderDamaged);
        }
        let header = Self {
            id: StreamId(raw.id),
            metadata,
            base: delta.then_some(base),
            indexed: flags & FLAG_INDEXED != 0,
        };
        Ok((header, raw.check.get()))
    }
}

fn check(raw: &RawHeader) -> u64 {
    crate::check::seeded(0, &raw.as_bytes()[..HEADER_LEN - CHECK_LEN])
}
