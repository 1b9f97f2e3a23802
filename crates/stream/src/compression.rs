//! Blocks of data to fewer bytes and back, with room that is kept from block to block.

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use crate::wire::Codec;

/// What a writer makes of data. What does not become shorter is left as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Nothing.
    None,
    /// LZ4 blocks: fast.
    #[default]
    Lz4,
    /// Zstandard frames, level 1 to 22: smaller, slower.
    Zstd(i32),
}

impl Compression {
    /// Zstandard's fastest level but those below 1.
    pub const ZSTD: Self = Self::Zstd(1);
}

pub(crate) enum Compressor {
    None,
    Lz4(Box<CompressTable>),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    pub(crate) fn new(compression: Compression) -> std::io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::None,
            Compression::Lz4 => Self::Lz4(Box::new(CompressTable::large())),
            Compression::Zstd(level) => Self::Zstd(zstd::bulk::Compressor::new(level)?),
        })
    }

    /// Appends data compressed; nothing if they would not become shorter.
    pub(crate) fn append_shorter(&mut self, data: &[u8], out: &mut Vec<u8>) -> Option<Codec> {
        let before = out.len();
        let shorter = match self {
            Self::None => None,
            Self::Lz4(table) => {
                out.resize(before + get_maximum_output_size(data.len()), 0);
                compress_into_with_table(data, &mut out[before..], table)
                    .ok()
                    .map(|len| (Codec::Lz4, len))
            }
            Self::Zstd(compressor) => {
                out.resize(before + data.len(), 0);
                compressor
                    .compress_to_buffer(data, &mut out[before..])
                    .ok()
                    .map(|len| (Codec::Zstd, len))
            }
        };
        let shorter = shorter.filter(|(_, len)| *len < data.len());
        out.truncate(before + shorter.map_or(0, |(_, len)| len));
        shorter.map(|(codec, _)| codec)
    }
}

/// Decompresses blocks of any codec.
#[derive(Default)]
pub(crate) struct Decompressor(Option<zstd::bulk::Decompressor<'static>>);

impl Decompressor {
    /// Fills `out`, which must be what the data become: `None` if it is not.
    pub(crate) fn fill(&mut self, codec: Codec, data: &[u8], out: &mut [u8]) -> Option<()> {
        let filled = match codec {
            Codec::Raw if data.len() == out.len() => {
                out.copy_from_slice(data);
                Some(data.len())
            }
            Codec::Raw => None,
            Codec::Lz4 => decompress_into(data, out).ok(),
            Codec::Zstd => self
                .0
                .get_or_insert_default()
                .decompress_to_buffer(data, out)
                .ok(),
        };
        (filled == Some(out.len())).then_some(())
    }
}
