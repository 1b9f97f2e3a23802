//! What the guest starts from: a Linux kernel or a bare-metal payload, and where they lie in RAM.
//!
//! A kernel is an arm64 `Image` (Linux `Documentation/arch/arm64/booting.rst`), as it is or
//! compressed with gzip or zstd, or wrapped in an EFI executable that decompresses itself
//! (`CONFIG_EFI_ZBOOT`); `image` reads its header and `compression` unpacks it. RAM then holds,
//! from its start: the kernel with the space it asks for beyond its file, the initrd, and in the
//! last 2 MiB the device tree. A payload lies at the start of RAM and the device tree is where it
//! would be for a kernel.

mod compression;
mod image;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

pub use self::image::PageSize;
use crate::layout::{PAGE_SIZE, RAM_START};
use crate::memory::GuestRam;

/// The kernel wants to start at a multiple of this, and finds a device tree only where it does not cross one.
const TWO_MIB: u64 = 2 << 20;
/// Space kept for the device tree at the end of RAM.
pub const DEVICE_TREE_SIZE: u64 = TWO_MIB;
/// Longest command line of an arm64 kernel in bytes, without the zero byte at its end
/// (`COMMAND_LINE_SIZE` in Linux `arch/arm64/include/uapi/asm/setup.h`).
pub const MAX_COMMAND_LINE: usize = 2047;
/// A decompressed kernel goes into RAM in pieces of at most this size.
const PIECE_SIZE: usize = 64 << 10;

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
    /// What should be a file is a pipe, a terminal or the like: it has no size, and may never have an end.
    #[error(
        "{what} {path}: neither a regular file nor a block device; if it is a pipe, write its content to a file first"
    )]
    NotAFile {
        /// What the file was to be.
        what: &'static str,
        /// Which file.
        path: PathBuf,
    },
    /// There is nothing in the file.
    #[error("{what} {path}: it is empty")]
    Empty {
        /// What the file was to be.
        what: &'static str,
        /// Which file.
        path: PathBuf,
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
    /// The kernel is one of a kind that is not started here.
    #[error("kernel {path}: {reason}; only little-endian kernels since Linux 3.17 are started")]
    UnsupportedKernel {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The kernel is compressed in a way that is unknown here.
    #[error(
        "kernel {path}: it is compressed with {name:?}, and only gzip and zstd are understood; \
         give its uncompressed `Image`"
    )]
    UnknownCompression {
        /// Which file.
        path: PathBuf,
        /// The compression, by the name that the file has for it.
        name: String,
    },
    /// The kernel's compressed form is damaged, or too large.
    #[error("kernel {path}: cannot decompress it: {reason}")]
    Decompress {
        /// Which file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The kernel would cut off the end of its command line, and say nothing.
    #[error(
        "--cmdline: it has {length} bytes, and an arm64 kernel drops what is beyond {MAX_COMMAND_LINE}; shorten it"
    )]
    CommandLineTooLong {
        /// Bytes of the command line.
        length: usize,
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
    /// The page size that the kernel was built for and the CPU has to have; none for a payload,
    /// or if the kernel's header does not say.
    pub page_size: Option<PageSize>,
}

/// A file that is to go into RAM. It is never empty.
struct Input<'a> {
    what: &'static str,
    path: &'a Path,
    file: File,
    /// Bytes when it was opened.
    size: u64,
}

impl<'a> Input<'a> {
    /// Opens a file. Whatever is there, this returns at once.
    fn open(what: &'static str, path: &'a Path) -> Result<Self, Error> {
        let error = |source| Error::File {
            what,
            path: path.into(),
            source,
        };
        // The flag keeps the open of a pipe from waiting for its other end.
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(error)?;
        let kind = file.metadata().map_err(error)?.file_type();
        if kind.is_dir() {
            return Err(error(io::ErrorKind::IsADirectory.into()));
        }
        if !kind.is_file() && !kind.is_block_device() {
            let path = path.into();
            return Err(Error::NotAFile { what, path });
        }
        let size = file.seek(SeekFrom::End(0)).map_err(error)?;
        if size == 0 {
            let path = path.into();
            return Err(Error::Empty { what, path });
        }
        file.rewind().map_err(error)?;
        Ok(Self {
            what,
            path,
            file,
            size,
        })
    }

    fn error(&self, source: io::Error) -> Error {
        Error::File {
            what: self.what,
            path: self.path.into(),
            source,
        }
    }

    fn not_a_kernel(&self) -> Error {
        Error::NotAKernel {
            path: self.path.into(),
        }
    }

    fn not_decompressed(&self, reason: &dyn fmt::Display) -> Error {
        Error::Decompress {
            path: self.path.into(),
            reason: reason.to_string(),
        }
    }
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

    fn available_mib(&self) -> u64 {
        (self.end - RAM_START) >> 20
    }

    /// Where `size` bytes from `start` end, if they fit.
    fn reserve(&self, input: &Input<'_>, start: u64, size: u64) -> Result<u64, Error> {
        let end = start.saturating_add(size);
        if end > self.end {
            return Err(Error::TooLarge {
                what: format!("{} {}", input.what, input.path.display()),
                over: (end - self.end).div_ceil(1024),
                available: self.available_mib(),
            });
        }
        Ok(end)
    }

    /// Reads a whole file to `start`, and returns where it ends.
    fn load(&self, input: &Input<'_>, start: u64) -> Result<u64, Error> {
        let end = self.reserve(input, start, input.size)?;
        let mut file = &input.file;
        file.rewind().map_err(|e| input.error(e))?;
        // Sizes within RAM fit the host's address space.
        self.ram
            .read_exact_volatile_from(GuestAddress(start), &mut file, input.size as usize)
            .map_err(|e| input.error(io::Error::other(e)))?;
        Ok(end)
    }

    /// Writes what a decompressor gives to `start`, piece by piece, and returns where it ends.
    fn stream(
        &self,
        input: &Input<'_>,
        decompressed: &mut dyn Read,
        start: u64,
    ) -> Result<u64, Error> {
        let mut piece = vec![0; PIECE_SIZE];
        let mut end = start;
        loop {
            let length = decompressed
                .read(&mut piece)
                .map_err(|e| input.not_decompressed(&e))?;
            if length == 0 {
                return Ok(end);
            }
            if length as u64 > self.end - end {
                return Err(input.not_decompressed(&format_args!(
                    "it is larger than the guest's memory ({} MiB); give it more with --memory",
                    self.available_mib()
                )));
            }
            self.ram
                .write_slice(&piece[..length], GuestAddress(end))
                .map_err(|e| input.error(io::Error::other(e)))?;
            end += length as u64;
        }
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
    let kernel = image::load(&placement, &Input::open("kernel", kernel)?)?;
    let initrd = initrd
        .map(|path| {
            let start = kernel.end.next_multiple_of(PAGE_SIZE);
            let end = placement.load(&Input::open("initrd", path)?, start)?;
            Ok((start, end))
        })
        .transpose()?;
    Ok(Loaded {
        entry: kernel.entry,
        device_tree: placement.end,
        initrd,
        page_size: kernel.page_size,
    })
}

/// Loads a bare-metal payload at the start of RAM, where it is also entered.
///
/// # Errors
/// See [`Error`].
pub fn load_flat(ram: &GuestRam, ram_size: u64, payload: &Path) -> Result<Loaded, Error> {
    let placement = Placement::new(ram, ram_size)?;
    placement.load(&Input::open("payload", payload)?, RAM_START)?;
    Ok(Loaded {
        entry: RAM_START,
        device_tree: placement.end,
        initrd: None,
        page_size: None,
    })
}

/// Checks that a kernel will take all of its command line. A payload has no such limit.
///
/// # Errors
/// [`Error::CommandLineTooLong`].
pub fn check_command_line(cmdline: &str) -> Result<(), Error> {
    if cmdline.len() > MAX_COMMAND_LINE {
        return Err(Error::CommandLineTooLong {
            length: cmdline.len(),
        });
    }
    Ok(())
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
    use std::process::Command;

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
        image[24..32].fill(0);
        image[56..60].copy_from_slice(b"ARM\x64");
        image
    }

    /// The same with other flags in its header.
    fn image_with_flags(flags: u64) -> Vec<u8> {
        let mut image = image();
        image[24..32].copy_from_slice(&flags.to_le_bytes());
        image
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
    }

    /// `data` as one stored block of a zstd frame whose window is 2 to the power `window_log`.
    fn zstd_with_window(window_log: u8, data: &[u8]) -> Vec<u8> {
        let last_raw_block = (data.len() as u32) << 3 | 1;
        let mut frame = b"\x28\xb5\x2f\xfd\0".to_vec();
        frame.push((window_log - 10) << 3);
        frame.extend(&last_raw_block.to_le_bytes()[..3]);
        frame.extend(data);
        frame
    }

    /// Data that does not compress: `length` bytes of a xorshift generator.
    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1u64;
        std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .take(length)
        .collect()
    }

    fn zboot(name: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut wrapped = vec![0; 64];
        wrapped[..2].copy_from_slice(b"MZ");
        wrapped[4..8].copy_from_slice(b"zimg");
        wrapped[8..12].copy_from_slice(&64u32.to_le_bytes());
        wrapped[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        wrapped[24..24 + name.len()].copy_from_slice(name);
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
    fn an_image_that_does_not_say_how_much_memory_it_needs_is_refused() {
        let mut old = image();
        old[16..24].fill(0);

        let error = load_kernel(&ram(), RAM_SIZE, file(&old).path(), None).unwrap_err();

        assert!(
            error.to_string().contains("older than Linux 3.17"),
            "{error}"
        );
    }

    #[test]
    fn a_big_endian_kernel_is_refused() {
        let kernel = file(&image_with_flags(1));
        let error = load_kernel(&ram(), RAM_SIZE, kernel.path(), None).unwrap_err();
        assert!(error.to_string().contains("big-endian"), "{error}");
    }

    #[test]
    fn the_page_size_that_a_kernel_was_built_for_is_told() {
        let ram = ram();
        let sizes = [0b1000, 0b1010, 0b1100, 0b1110].map(|flags| {
            let kernel = file(&image_with_flags(flags));
            load_kernel(&ram, RAM_SIZE, kernel.path(), None)
                .unwrap()
                .page_size
        });
        assert_eq!(
            sizes,
            [
                None,
                Some(PageSize::Kib4),
                Some(PageSize::Kib16),
                Some(PageSize::Kib64)
            ]
        );
    }

    #[test]
    fn a_kernel_compressed_with_gzip_is_loaded_like_a_plain_one() {
        let ram = ram();

        let loaded = load_kernel(&ram, RAM_SIZE, file(&gzip(&image())).path(), None).unwrap();

        assert_eq!(content(&ram, loaded.entry, 0x10000), image());
    }

    #[test]
    fn a_kernel_compressed_with_zstd_is_loaded_like_a_plain_one() {
        let ram = ram();

        let loaded = load_kernel(&ram, RAM_SIZE, file(&zstd(&image())).path(), None).unwrap();

        assert_eq!(content(&ram, loaded.entry, 0x10000), image());
    }

    #[test]
    fn a_kernel_in_an_efi_wrapper_is_loaded_like_a_plain_one() {
        let ram = ram();
        let images = [
            zboot(b"gzip", &gzip(&image())),
            zboot(b"zstd", &zstd(&image())),
            zboot(b"zstd22", &zstd(&image())),
        ]
        .map(|wrapped| {
            ram.write_slice(&[0; 0x10000], GuestAddress(RAM_START))
                .unwrap();
            let loaded = load_kernel(&ram, RAM_SIZE, file(&wrapped).path(), None).unwrap();
            content(&ram, loaded.entry, 0x10000)
        });
        assert_eq!(images, [image(), image(), image()]);
    }

    #[test]
    fn a_kernel_that_is_compressed_in_an_unknown_way_is_refused_with_the_ways_name() {
        let errors = [
            zboot(b"xzkern", b"\xfd7zXZ\0"),
            b"\x02\x21\x4c\x18".to_vec(),
        ]
        .map(|kernel| {
            load_kernel(&ram(), RAM_SIZE, file(&kernel).path(), None)
                .unwrap_err()
                .to_string()
        });
        assert!(
            errors[0].contains("compressed with \"xzkern\""),
            "{}",
            errors[0]
        );
        assert!(
            errors[1].contains("compressed with \"lz4\""),
            "{}",
            errors[1]
        );
    }

    #[test]
    fn a_zstd_window_is_taken_as_large_as_linux_makes_it_and_no_larger() {
        let (linux, larger) = (
            file(&zstd_with_window(27, &image())),
            file(&zstd_with_window(28, &image())),
        );

        load_kernel(&ram(), RAM_SIZE, linux.path(), None).unwrap();
        let error = load_kernel(&ram(), RAM_SIZE, larger.path(), None).unwrap_err();

        assert!(matches!(error, Error::Decompress { .. }), "{error}");
    }

    #[test]
    fn a_zstd_kernel_with_a_wrong_checksum_is_refused() {
        let mut damaged = zstd(&image());
        *damaged.last_mut().unwrap() ^= 1;
        let error = load_kernel(&ram(), RAM_SIZE, file(&damaged).path(), None).unwrap_err();
        assert!(
            error.to_string().contains("its checksum is wrong"),
            "{error}"
        );
    }

    #[test]
    fn a_kernel_is_decompressed_right_into_memory() {
        let mut large = image();
        large.extend(noise(1 << 20));
        let compressed = gzip(&large);
        let truncated = file(&compressed[..compressed.len() / 2]);
        let ram = ram();

        load_kernel(&ram, RAM_SIZE, truncated.path(), None).unwrap_err();

        assert_eq!(content(&ram, RAM_START, 0x40000), large[..0x40000]);
    }

    #[test]
    fn what_a_compressed_kernel_asks_for_is_checked_before_the_rest_of_it_is_decompressed() {
        let mut greedy = image();
        greedy[16..24].copy_from_slice(&RAM_SIZE.to_le_bytes());
        greedy.extend(noise(1 << 20));
        let compressed = gzip(&greedy);
        let truncated = file(&compressed[..compressed.len() / 2]);

        let error = load_kernel(&ram(), RAM_SIZE, truncated.path(), None).unwrap_err();

        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
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
    fn a_kernel_that_decompresses_beyond_memory_is_refused() {
        let mut larger = image();
        larger.resize(RAM_SIZE as usize, 0);
        let bomb = gzip(&larger);
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
        let error = load_flat(&ram(), DEVICE_TREE_SIZE, file(b"payload").path()).unwrap_err();
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

    #[test]
    fn an_empty_file_is_refused_whatever_it_was_to_be() {
        let (ram, empty, kernel) = (ram(), file(b""), file(&image()));
        let errors = [
            load_flat(&ram, RAM_SIZE, empty.path()),
            load_kernel(&ram, RAM_SIZE, empty.path(), None),
            load_kernel(&ram, RAM_SIZE, kernel.path(), Some(empty.path())),
        ]
        .map(|loaded| loaded.unwrap_err().to_string());
        let path = empty.path().display();
        assert_eq!(
            errors,
            ["payload", "kernel", "initrd"].map(|what| format!("{what} {path}: it is empty"))
        );
    }

    #[test]
    fn a_pipe_that_nobody_writes_to_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        let made = Command::new("mkfifo").arg(&path).status().unwrap();

        let error = load_flat(&ram(), RAM_SIZE, &path).unwrap_err();

        assert!(made.success());
        assert!(matches!(error, Error::NotAFile { .. }), "{error}");
    }

    #[test]
    fn a_device_without_an_end_is_refused() {
        let error = load_flat(&ram(), RAM_SIZE, Path::new("/dev/zero")).unwrap_err();
        assert!(matches!(error, Error::NotAFile { .. }), "{error}");
    }

    #[test]
    fn a_command_line_of_2047_bytes_is_taken_and_a_longer_one_refused() {
        let error = check_command_line(&"a".repeat(2048)).unwrap_err();
        assert!(check_command_line(&"a".repeat(2047)).is_ok());
        assert!(
            error
                .to_string()
                .starts_with("--cmdline: it has 2048 bytes"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn any_file_is_loaded_or_refused(content in proptest::collection::vec(any::<u8>(), 64..200), magic in 0..5) {
            let (offset, magic) = [
                (56, &b"ARM\x64"[..]),
                (0, b"\x1f\x8b\x08"),
                (0, b"\x28\xb5\x2f\xfd"),
                (0, b"MZ\0\0zimg"),
                (0, b""),
            ][magic as usize];
            let mut content = content;
            content[offset..offset + magic.len()].copy_from_slice(magic);
            let _ = load_kernel(&ram(), RAM_SIZE, file(&content).path(), None);
        }
    }
}
