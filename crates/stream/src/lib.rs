#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod batch;
mod check;
mod chunk;
mod compression;
mod error;
mod header;
mod index;
mod inspect;
mod pages;
mod parallel;
mod reader;
mod runs;
mod snapshot;
mod source;
mod wire;
mod writer;

pub use batch::{Batch, Page, Run, ZERO_PAGE};
pub use chunk::{Chunk, Decoder, Encoder, State};
pub use compression::Compression;
pub use error::{ChunkError, Error, Result};
pub use header::{Header, Identity, Metadata, StreamId};
pub use inspect::{StateSummary, Summary, inspect};
pub use pages::{Only, PageSet};
pub use parallel::{Sending, restore, send, send_changes};
pub use reader::{StreamReader, receive};
pub use snapshot::{Location, ReadAt, Snapshot, SnapshotReader};
pub use source::{Cursor, PageSink, PageSource};
pub use tagcodec::Effort as TagEffort;
pub use wire::{
    Kind, MAX_CHUNK_PAGES, MAX_INDEXED_CHUNKS, MAX_MESSAGE_LEN, MAX_NAME_LEN, MAX_PAGE,
    MAX_STATE_LEN, PAGE_SIZE, VERSION,
};
pub use writer::StreamWriter;
