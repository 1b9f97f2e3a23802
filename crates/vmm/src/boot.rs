//! What the guest starts from: a Linux kernel or a bare-metal payload, and where they lie in RAM.
//!
//! A kernel is an arm64 `Image` (Linux `Documentation/arch/arm64/booting.rst`), as it is or
//! compressed with gzip or zstd, or wrapped in an EFI executable that decompresses itself
//! (`CONFIG_EFI_ZBOOT`). RAM then holds, from its start: the kernel with the space it asks for
//! beyond its file, the initrd, and in the last 2 MiB the device tree. A payload lies at the start
//! of RAM and the device tree is where it would be for a kernel.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use crate::layout::{PAGE_SIZE, RAM_START};
use crate::memory::GuestRam;

/// The kernel wants to start at a multiple of this, and finds a device tree only where it does not cross one.
const TWO_MIB: u64 = 2 << 20;
/// Space kept for the device tree at the end of RAM.
pub const DEVICE_TREE_SIZE: u64 = TWO_MIB;

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be opened or read.
    #[error("{what} {path}: {source}")]
    File {
        /// What the file was to be.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The kernel is none.
    #[error(
        "kernel {path}: not an arm64 Linux kernel: it has neither the magic number of an `Image` nor is it one \
         compressed with gzip or zstd. A distribution's /boot/vmlinuz-* of an arm64 system will do; \
         a bare-metal program is started with --flat"
    )]
    NotAKernel {
        /// Which file.
        path: PathBuf,
    },
    /// The kernel's compressed form is damaged or of a kind unknown here.
    #[error("kernel {path}: cannot decompress it: {reason}")]
    Decompress {
        /// Which file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// RAM cannot hold all that is to be loaded.
    #[error(
        "{what}: it ends {over} KiB beyond the {available} MiB of memory it may have; give the guest more with --memory"
    )]
    TooLarge {
        /// What does not fit.
        what: String,
        /// By how much it does not, in KiB, rounded up.
        over: u64,
        /// The RAM's size less the device tree's, in MiB.
        available: u64,
    },
    /// RAM is too small even for the device tree.
    #[error(
        "{size} KiB of memory are too few: the device tree alone takes {min} KiB of them, and the guest needs some; give it more with --memory"
    )]
    NoRoomForDeviceTree {
        /// The RAM's size in KiB.
        size: u64,
        /// What the device tree takes, in KiB.
        min: u64,
    },
}

/// Where execution and data begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The first instruction.
    pub entry: u64,
    /// Where the device tree is to be written; [`DEVICE_TREE_SIZE`] bytes are free there.
    pub device_tree: u64,
    /// Guest-physical start and end of the initrd.
    pub initrd: Option<(u64, u64)>,
}

/// RAM and what is already placed in it.
struct Placement<'a> {
    ram: &'a GuestRam,
    /// End of what the guest's programs may fill: the device tree begins there.
    end: u64,
}

impl<'a> Placement<'a> {
    fn new(ram: &'a GuestRam, ram_size: u64) -> Result<Self, Error> {
        let end = (RAM_START + ram_size).saturating_sub(DEVICE_TREE_SIZE) / TWO_MIB * TWO_MIB;
        if end <= RAM_START {
            return Err(Error::NoRoomForDeviceTree {
                size: ram_size / 1024,
                min: DEVICE_TREE_SIZE / 1024,
            });
        }
        Ok(Self { ram, end })
    }

    /// Where `size` bytes from `start` end, if they fit.
    fn reserve(
        &self,
        what: &'static str,
        path: &Path,
        start: u64,
        size: u64,
    ) -> Result<u64, Error> {
        let end = start.saturating_add(size);
        if end > self.end {
            return Err(Error::TooLarge {
                what: format!("{what} {}", path.display()),
                over: (end - self.end).div_ceil(1024),
                available: (self.end - RAM_START) >> 20,
            });
        }
        Ok(end)
    }

    /// Reads a whole file to `start`, and returns where it ends.
    fn load_file(&self, what: &'static str, path: &Path, start: u64) -> Result<u64, Error> {
        let error = |source| Error::File {
            what,
            path: path.into(),
            source,
        };
        let mut file = open(what, path)?;
        let size = file.seek(SeekFrom::End(0)).map_err(error)?;
        file.rewind().map_err(error)?;
        let end = self.reserve(what, path, start, size)?;
        // Sizes within RAM fit the host's address space.
        self.ram
            .read_exact_volatile_from(GuestAddress(start), &mut file, size as usize)
            .map_err(|e| error(io::Error::other(e)))?;
        Ok(end)
    }
}

/// Loads a kernel and, if there is one, an initrd.
///
/// # Errors
/// See [`Error`].
pub fn load_kernel(
    ram: &GuestRam,
    ram_size: u64,
    kernel: &Path,
    initrd: Option<&Path>,
) -> Result<Loaded, Error> {
    let placement = Placement::new(ram, ram_size)?;
    let (entry, kernel_end) = load_image(&placement, kernel)?;
    let initrd = initrd
        .map(|path| {
            let start = kernel_end.next_multiple_of(PAGE_SIZE);
            placement
                .load_file("initrd", path, start)
                .map(|end| (start, end))
        })
        .transpose()?;
    Ok(Loaded {
        entry,
        device_tree: placement.end,
        initrd,
    })
}

/// Loads a bare-metal payload at the start of RAM, where it is also entered.
///
/// # Errors
/// See [`Error`].
pub fn load_flat(ram: &GuestRam, ram_size: u64, payload: &Path) -> Result<Loaded, Error> {
    let placement = Placement::new(ram, ram_size)?;
    placement.load_file("payload", payload, RAM_START)?;
    Ok(Loaded {
        entry: RAM_START,
        device_tree: placement.end,
        initrd: None,
    })
}

fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    let error = |source| Error::File {
        what,
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(error)?;
    if file.metadata().map_err(error)?.is_dir() {
        return Err(error(io::ErrorKind::IsADirectory.into()));
    }
    Ok(file)
}

/// The header of an arm64 `Image`, as far as loading needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ImageHeader {
    text_offset: u64,
    image_size: u64,
}

impl ImageHeader {
    const SIZE: usize = 64;
    /// "ARM\x64" at byte 56.
    const MAGIC: &[u8] = b"ARM\x64";

    fn parse(start: &[u8]) -> Option<Self> {
        if start.get(56..60)? != Self::MAGIC {
            return None;
        }
        let image_size = u64_at(start, 16)?;
        Some(Self {
            // Kernels before 3.17 have no size and a fixed offset.
            text_offset: if image_size == 0 {
                0x80000
            } else {
                u64_at(start, 8)?
            },
            image_size,
        })
    }
}

/// Loads an `Image` and returns its entry point and the end of the memory that it uses.
fn load_image(placement: &Placement<'_>, path: &Path) -> Result<(u64, u64), Error> {
    let error = |source| Error::File {
        what: "kernel",
        path: path.into(),
        source,
    };
    let mut file = open("kernel", path)?;
    let mut start = Vec::new();
    file.by_ref()
        .take(ImageHeader::SIZE as u64)
        .read_to_end(&mut start)
        .map_err(error)?;
    if let Some(header) = ImageHeader::parse(&start) {
        let (entry, memory_end) = place_image(placement, path, header)?;
        let file_end = placement.load_file("kernel", path, entry)?;
        return Ok((entry, memory_end.max(file_end)));
    }
    let (compression, payload) = Compression::find(&mut file, &start)
        .map_err(error)?
        .ok_or_else(|| Error::NotAKernel { path: path.into() })?;
    let limit = placement.end - RAM_START;
    let image = compression
        .decompress(payload, limit)
        .map_err(|reason| Error::Decompress {
            path: path.into(),
            reason,
        })?;
    let header =
        ImageHeader::parse(&image).ok_or_else(|| Error::NotAKernel { path: path.into() })?;
    let (entry, memory_end) = place_image(placement, path, header)?;
    let file_end = placement.reserve("kernel", path, entry, image.len() as u64)?;
    placement
        .ram
        .write_slice(&image, GuestAddress(entry))
        .map_err(|e| error(io::Error::other(e)))?;
    Ok((entry, memory_end.max(file_end)))
}

fn place_image(
    placement: &Placement<'_>,
    path: &Path,
    header: ImageHeader,
) -> Result<(u64, u64), Error> {
    let entry = placement.reserve("kernel", path, RAM_START, header.text_offset)?;
    let end = placement.reserve("kernel", path, entry, header.image_size)?;
    Ok((entry, end))
}

/// How a kernel is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    /// Recognises a compressed kernel by the first bytes of its file, and returns a reader of the compressed part.
    fn find<'a>(
        file: &'a mut File,
        start: &[u8],
    ) -> io::Result<Option<(Self, Box<dyn Read + 'a>)>> {
        file.rewind()?;
        if let Some(compression) = Self::by_magic(start) {
            return Ok(Some((compression, Box::new(file))));
        }
        // struct linux_efi_zboot_header: "MZ", "zimg" at 4, offset and size of the payload, and
        // the name of its compression (Linux drivers/firmware/efi/libstub/zboot-header.S).
        if start.get(..2) != Some(b"MZ") || start.get(4..8) != Some(b"zimg") {
            return Ok(None);
        }
        let (Some(offset), Some(size)) = (u32_at(start, 8), u32_at(start, 12)) else {
            return Ok(None);
        };
        let compression = match start.get(24..28) {
            Some(b"gzip") => Self::Gzip,
            Some(b"zstd") => Self::Zstd,
            _ => return Ok(None),
        };
        file.seek(SeekFrom::Start(offset.into()))?;
        Ok(Some((compression, Box::new(file.take(size.into())))))
    }

    fn by_magic(start: &[u8]) -> Option<Self> {
        match start {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            _ => None,
        }
    }

    /// Decompresses up to `limit` bytes: what is larger than the guest's memory is of no use to it.
    fn decompress(self, compressed: Box<dyn Read + '_>, limit: u64) -> Result<Vec<u8>, String> {
        let mut image = Vec::new();
        let mut reader: Box<dyn Read> = match self {
            Self::Gzip => Box::new(flate2::read::GzDecoder::new(compressed)),
            Self::Zstd => Box::new(
                ruzstd::decoding::StreamingDecoder::new(compressed).map_err(|e| e.to_string())?,
            ),
        };
        reader
            .by_ref()
            .take(limit + 1)
            .read_to_end(&mut image)
            .map_err(|e| e.to_string())?;
        if image.len() as u64 > limit {
            return Err(format!(
                "it is larger than the guest's memory ({} MiB); give it more with --memory",
                limit >> 20
            ));
        }
        Ok(image)
    }
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    let field = bytes.get(offset..offset + 8)?;
    Some(u64::from_le_bytes(field.try_into().ok()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..offset + 4)?;
    Some(u32::from_le_bytes(field.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use tempfile::NamedTempFile;
    use vm_memory::GuestAddress;

    use super::*;

    const RAM_SIZE: u64 = 16 << 20;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(RAM_START), RAM_SIZE as usize)]).unwrap()
    }

    fn file(content: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    /// An `Image` of 64 KiB that asks for 1 MiB.
    fn image() -> Vec<u8> {
        let mut image = vec![0xa5; 0x10000];
        image[8..16].copy_from_slice(&0u64.to_le_bytes());
        image[16..24].copy_from_slice(&0x10_0000u64.to_le_bytes());
        image[56..60].copy_from_slice(b"ARM\x64");
        image
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zboot(name: &[u8; 4], payload: &[u8]) -> Vec<u8> {
        let mut wrapped = vec![0; 64];
        wrapped[..2].copy_from_slice(b"MZ");
        wrapped[4..8].copy_from_slice(b"zimg");
        wrapped[8..12].copy_from_slice(&64u32.to_le_bytes());
        wrapped[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        wrapped[24..28].copy_from_slice(name);
        wrapped.extend(payload);
        wrapped
    }

    fn content(ram: &GuestRam, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn a_plain_image_is_loaded_at_its_offset_and_the_initrd_behind_the_memory_it_asks_for() {
        let ram = ram();
        let (kernel, initrd) = (file(&image()), file(b"initrd"));

        let loaded = load_kernel(&ram, RAM_SIZE, kernel.path(), Some(initrd.path())).unwrap();

        assert_eq!(loaded.entry, RAM_START);
        assert_eq!(
            loaded.initrd,
            Some((RAM_START + 0x10_0000, RAM_START + 0x10_0006))
        );
        assert_eq!(loaded.device_tree, RAM_START + RAM_SIZE - DEVICE_TREE_SIZE);
        assert_eq!(content(&ram, RAM_START, 0x10000), image());
        assert_eq!(content(&ram, RAM_START + 0x10_0000, 6), b"initrd");
    }

    #[test]
    fn an_image_of_an_old_kernel_without_a_size_is_loaded_at_the_fixed_offset() {
        let mut old = image();
        old[16..24].fill(0);
        let ram = ram();

        let loaded = load_kernel(&ram, RAM_SIZE, file(&old).path(), None).unwrap();

        assert_eq!(loaded.entry, RAM_START + 0x80000);
    }

    #[test]
    fn a_kernel_compressed_with_gzip_is_loaded_like_a_plain_one() {
        let ram = ram();

        let loaded = load_kernel(&ram, RAM_SIZE, file(&gzip(&image())).path(), None).unwrap();

        assert_eq!(content(&ram, loaded.entry, 0x10000), image());
    }

    #[test]
    fn a_kernel_compressed_with_zstd_is_loaded_like_a_plain_one() {
        let compressed = ruzstd::encoding::compress_to_vec(
            image().as_slice(),
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        let ram = ram();

        let loaded = load_kernel(&ram, RAM_SIZE, file(&compressed).path(), None).unwrap();

        assert_eq!(content(&ram, loaded.entry, 0x10000), image());
    }

    #[test]
    fn a_kernel_in_an_efi_wrapper_is_loaded_like_a_plain_one() {
        let wrapped = zboot(b"gzip", &gzip(&image()));
        let ram = ram();

        let loaded = load_kernel(&ram, RAM_SIZE, file(&wrapped).path(), None).unwrap();

        assert_eq!(content(&ram, loaded.entry, 0x10000), image());
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused() {
        let error = load_kernel(&ram(), RAM_SIZE, file(b"#!/bin/sh\n").path(), None).unwrap_err();
        assert!(matches!(error, Error::NotAKernel { .. }), "{error}");
    }

    #[test]
    fn a_gzip_file_that_holds_no_kernel_is_refused() {
        let error = load_kernel(&ram(), RAM_SIZE, file(&gzip(b"text")).path(), None).unwrap_err();
        assert!(matches!(error, Error::NotAKernel { .. }), "{error}");
    }

    #[test]
    fn a_truncated_gzip_kernel_is_refused() {
        let compressed = gzip(&image());
        let error = load_kernel(
            &ram(),
            RAM_SIZE,
            file(&compressed[..compressed.len() / 2]).path(),
            None,
        )
        .unwrap_err();
        assert!(matches!(error, Error::Decompress { .. }), "{error}");
    }

    #[test]
    fn a_kernel_that_decompresses_beyond_memory_is_refused_without_holding_it_all() {
        let bomb = gzip(&vec![0; 64 << 20]);
        let error = load_kernel(&ram(), RAM_SIZE, file(&bomb).path(), None).unwrap_err();
        assert!(
            error.to_string().contains("larger than the guest's memory"),
            "{error}"
        );
    }

    #[test]
    fn an_initrd_larger_than_memory_is_refused() {
        let (kernel, initrd) = (file(&image()), NamedTempFile::new().unwrap());
        initrd.as_file().set_len(RAM_SIZE).unwrap();

        let error = load_kernel(&ram(), RAM_SIZE, kernel.path(), Some(initrd.path())).unwrap_err();

        assert!(error.to_string().starts_with("initrd "), "{error}");
        assert!(
            matches!(
                error,
                Error::TooLarge {
                    over: 3072,
                    available: 14,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn a_kernel_that_asks_for_more_than_memory_is_refused() {
        let mut greedy = image();
        greedy[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        let error = load_kernel(&ram(), RAM_SIZE, file(&greedy).path(), None).unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    }

    #[test]
    fn memory_without_room_for_a_device_tree_is_refused() {
        let error = load_flat(&ram(), DEVICE_TREE_SIZE, file(b"").path()).unwrap_err();
        assert!(
            matches!(error, Error::NoRoomForDeviceTree { .. }),
            "{error}"
        );
    }

    #[test]
    fn a_directory_or_a_missing_file_is_named_in_the_error() {
        let directory = load_flat(&ram(), RAM_SIZE, Path::new("/"))
            .unwrap_err()
            .to_string();
        let missing = load_flat(&ram(), RAM_SIZE, Path::new("/no/such"))
            .unwrap_err()
            .to_string();
        assert!(
            directory.starts_with("payload /: is a directory"),
            "{directory}"
        );
        assert!(
            missing.starts_with("payload /no/such: No such file"),
            "{missing}"
        );
    }

    proptest! {
        #[test]
        fn any_file_is_loaded_or_refused(content in proptest::collection::vec(any::<u8>(), 0..200), magic in 0..5) {
            let mut content = content;
            let magic: &[u8] = [&b""[..], b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"MZ\0\0zimg", b"ARM"][magic as usize];
            content.splice(..magic.len().min(content.len()), magic.iter().copied());
            let _ = load_kernel(&ram(), RAM_SIZE, file(&content).path(), None);
        }
    }
}
