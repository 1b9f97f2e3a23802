//! What can be wrong with a stream.

use std::io;

use crate::wire::{MAX_CHUNK_PAGES, VERSION};
use crate::{Identity, Kind, Metadata};

/// Result of work on a stream.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a stream could not be written or read. What was handed out before an error is right; nothing
/// of the chunk that failed was handed out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file or connection failed.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The source of pages failed.
    #[error("cannot read pages {first:#x} to {last:#x} from their source: {source}")]
    Source {
        /// The first page number.
        first: u64,
        /// The last page number.
        last: u64,
        /// What the source said.
        source: io::Error,
    },
    /// The sink of pages failed.
    #[error("cannot place pages {first:#x} to {last:#x}: {source}")]
    Sink {
        /// The first page number.
        first: u64,
        /// The last page number.
        last: u64,
        /// What the sink said.
        source: io::Error,
    },
    /// The bytes do not begin as a stream does.
    #[error("this is no Tagvisor page stream or snapshot")]
    NotAStream,
    /// A version that this one cannot read.
    #[error("the stream has format version {0}, this Tagvisor reads version {VERSION}")]
    Version(u16),
    /// Flags that must be understood and are not.
    #[error(
        "the stream needs features (flags {0:#x}) that this Tagvisor does not have; a newer one may"
    )]
    Flags(u32),
    /// A page size other than 4 KiB.
    #[error("the stream has pages of 2^{0} bytes, this Tagvisor reads pages of 4096 bytes")]
    PageSize(u8),
    /// A kind of page metadata that is not known.
    #[error("the stream has page metadata of kind {0}, which this Tagvisor does not know")]
    UnknownMetadata(u8),
    /// The header's check is wrong, or its fields contradict each other.
    #[error("the stream's header is damaged")]
    HeaderDamaged,
    /// The end is missing.
    #[error("the stream is cut off: it has {offset} bytes and no end")]
    Truncated {
        /// Bytes that there are.
        offset: u64,
    },
    /// There is something behind the end, or the end is not where it must be.
    #[error("the file does not end with the end of its stream: it is cut off, or was appended to")]
    EndMissing,
    /// A chunk is wrong.
    #[error("chunk {number} at offset {offset}: {problem}")]
    Chunk {
        /// Chunks before it.
        number: u64,
        /// Bytes before it.
        offset: u64,
        /// What is wrong with it.
        problem: ChunkError,
    },
    /// Chunks are missing, or were added or swapped.
    #[error("the stream's end does not fit its chunks: {0}")]
    EndMismatch(&'static str),
    /// The file has no index.
    #[error("the stream has no index: it was not written to a file, and can be read in order only")]
    NotIndexed,
    /// The index is wrong.
    #[error("the index is wrong: {0}")]
    Index(&'static str),
    /// A stream can have no more chunks if it has an index.
    #[error("a stream with an index can have no more than {0} chunks")]
    TooManyChunks(u64),
    /// A delta without its base.
    #[error("the snapshot holds only what changed since snapshot {0}: give that one as its base")]
    BaseMissing(Identity),
    /// A base that is not the one.
    #[error(
        "the snapshot's base is {wanted}, but the one given is {given}{}",
        changed(wanted, given)
    )]
    WrongBase {
        /// What the delta names.
        wanted: Identity,
        /// What was given.
        given: Identity,
    },
    /// A base for what has none.
    #[error("snapshot {0} is whole: it has no base")]
    NoBase(Identity),
    /// Too many files on top of each other.
    #[error("{given} snapshots are based on each other, {limit} may be")]
    ChainTooLong {
        /// How many there are.
        given: usize,
        /// How many there may be.
        limit: usize,
    },
    /// One side has tags and the other does not.
    #[error("{from} has {given}, {to} {taken}: page metadata would be lost or made up")]
    Metadata {
        /// Where pages come from.
        from: &'static str,
        /// What they have.
        given: Metadata,
        /// Where they go.
        to: &'static str,
        /// What it takes.
        taken: Metadata,
    },
    /// More pages than a chunk can have.
    #[error("{0} pages are too many for a chunk: {MAX_CHUNK_PAGES} are the most")]
    TooManyPages(usize),
    /// Page numbers that do not ascend, or are too high.
    #[error("page {page:#x} cannot follow in this chunk: page numbers ascend, and are below 2^52")]
    Order {
        /// The page refused.
        page: u64,
    },
    /// A name of a state that cannot be written, or was written before.
    #[error("'{name}' cannot be the name of a saved state: {problem}")]
    StateName {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Something too long for a chunk.
    #[error("{what} has {given} bytes, {limit} are the most")]
    TooLong {
        /// What it is.
        what: &'static str,
        /// Its bytes.
        given: usize,
        /// How many it may have.
        limit: usize,
    },
    /// Chunks of one stream belong to it alone.
    #[error("a chunk of one stream is of no use in another")]
    ForeignChunk,
    /// A chunk that does not belong here.
    #[error("a chunk of kind {0:?} is not expected here")]
    Unexpected(Kind),
    /// A thread that works on the same stream failed.
    #[error("given up, because another thread failed")]
    Abandoned,
}

fn changed(wanted: &Identity, given: &Identity) -> &'static str {
    if wanted.id == given.id {
        "; it is the same snapshot, but not as it was when the delta was made"
    } else {
        ""
    }
}

/// What is wrong with a chunk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChunkError {
    /// Its head has another check: damage, or a chunk of another stream.
    #[error("its head is damaged, or it belongs to another stream")]
    HeadDamaged,
    /// Its contents have another check.
    #[error("its contents are damaged: their check is wrong")]
    ContentDamaged,
    /// Its pages have another check.
    #[error("data or tags of pages {first:#x} to {last:#x} are damaged: their check is wrong")]
    PagesDamaged {
        /// The first page number that it says it has.
        first: u64,
        /// The last one.
        last: u64,
    },
    /// The data of its pages cannot be decompressed.
    #[error("data of pages {first:#x} to {last:#x} are damaged: they cannot be decompressed")]
    PagesData {
        /// The first page number that it says it has.
        first: u64,
        /// The last one.
        last: u64,
    },
    /// A kind that is not known.
    #[error("its kind, {0}, is unknown")]
    Kind(u8),
    /// A codec that is not known.
    #[error("its codec, {0}, is unknown")]
    Codec(u8),
    /// A kind of chunk that cannot be here.
    #[error("a chunk of kind {0:?} is not expected here")]
    Unexpected(Kind),
    /// A length or count above what the format allows.
    #[error("its {what} is {given}, above the limit {limit}")]
    TooLarge {
        /// Which one.
        what: &'static str,
        /// What it is.
        given: usize,
        /// What it may be.
        limit: usize,
    },
    /// Lengths or counts contradict each other.
    #[error("its lengths contradict each other")]
    Length,
    /// The page numbers are not runs of ascending pages below 2^52.
    #[error("its page numbers are damaged")]
    Runs,
    /// The tags cannot be decoded.
    #[error("its tags: {0}")]
    Tags(tagcodec::Error),
    /// Its data, which are not those of pages, cannot be decompressed.
    #[error("its contents are damaged: they cannot be decompressed")]
    Data,
    /// The name of a saved state is not one.
    #[error("the name of its saved state is damaged")]
    Name,
    /// It is not the chunk that the index names.
    #[error("it is not the chunk that the index names")]
    NotIndexed,
}

/// Gives an I/O error its action.
pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { action, source }
}
