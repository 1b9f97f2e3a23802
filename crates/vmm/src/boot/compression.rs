//! Compressed kernels: which kinds there are, and a reader of what is inside.
//!
//! A kernel's file says how it is compressed either by its first bytes, or, where it is an EFI
//! executable that decompresses itself (`CONFIG_EFI_ZBOOT`), by name in that executable's header
//! (Linux `drivers/firmware/efi/libstub/zboot-header.S`). gzip and zstd are understood; the other
//! kinds are known by name only, so that a user is told what is in the way.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use flate2::read::GzDecoder;
use ruzstd::decoding::StreamingDecoder;

use super::u32_at;

/// Linux compresses with `zstd --ultra -22`, whose window is 128 MiB. The decoder keeps a window in
/// memory, so that a larger one is not granted to a file.
const ZSTD_WINDOW: u64 = 128 << 20;

/// The first bytes of a compressed file, and the compression's name.
const MAGIC: [(&[u8], &str); 7] = [
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x89LZO\0", "lzo"),
    (b"\x5d\0\0", "lzma"),
    (b"BZh", "bzip2"),
];

/// A compressed kernel within a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Compressed {
    /// The compression's name, as the file has it.
    pub name: String,
    /// First byte of the compressed part.
    offset: u64,
    /// Most bytes of the compressed part.
    size: u64,
}

impl Compressed {
    /// Recognises a compressed kernel by the first 64 bytes of its file.
    pub fn recognise(start: &[u8]) -> Option<Self> {
        Self::by_magic(start).or_else(|| Self::in_efi_executable(start))
    }

    fn by_magic(start: &[u8]) -> Option<Self> {
        let (_, name) = MAGIC.iter().find(|(magic, _)| start.starts_with(magic))?;
        Some(Self {
            name: (*name).to_owned(),
            offset: 0,
            size: u64::MAX,
        })
    }

    /// `struct linux_efi_zboot_header`: "MZ", "zimg" at 4, offset and size of the compressed part,
    /// and from 24 on the compression's name, which ends with a zero byte.
    fn in_efi_executable(start: &[u8]) -> Option<Self> {
        if !start.starts_with(b"MZ") || start.get(4..8)? != b"zimg" {
            return None;
        }
        let name = start.get(24..56)?.split(|byte| *byte == 0).next()?;
        Some(Self {
            name: String::from_utf8_lossy(name).into_owned(),
            offset: u32_at(start, 8)?.into(),
            size: u32_at(start, 12)?.into(),
        })
    }

    /// A reader of the decompressed kernel; none if the compression is not understood.
    ///
    /// # Errors
    /// The compressed part does not begin as it should.
    pub fn reader<'a>(&self, mut file: &'a File) -> io::Result<Option<Box<dyn Read + 'a>>> {
        file.seek(SeekFrom::Start(self.offset))?;
        let compressed = file.take(self.size);
        Ok(match self.name.as_str() {
            "gzip" => Some(Box::new(GzDecoder::new(compressed))),
            // Older kernels name it with its level.
            "zstd" | "zstd22" => Some(Box::new(Zstd::new(compressed)?)),
            _ => None,
        })
    }
}

/// The content of a zstd frame. The decoder computes the frame's checksum; this compares it.
struct Zstd<R: Read>(StreamingDecoder<R, ruzstd::decoding::FrameDecoder>);

impl<R: Read> Zstd<R> {
    fn new(compressed: R) -> io::Result<Self> {
        StreamingDecoder::new_with_max_window_size(compressed, ZSTD_WINDOW)
            .map(Self)
            .map_err(io::Error::other)
    }
}

impl<R: Read> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.0.read(buffer)?;
        let at_end = length == 0 && !buffer.is_empty();
        let decoder = &self.0.decoder;
        match decoder.get_checksum_from_data() {
            Some(expected) if at_end && decoder.get_calculated_checksum() != Some(expected) => {
                Err(io::Error::other("its checksum is wrong: it is damaged"))
            }
            _ => Ok(length),
        }
    }
}
