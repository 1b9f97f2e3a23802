//! A disk's writes, kept apart from the image they change: so one image serves many guests at once.
//!
//! An overlay has clusters of 64 KiB, each at its own place behind a header and a map of one bit a cluster. A cluster
//! that is in the map is read from the overlay, any other from the base. A write to part of a cluster that is not
//! there yet copies it up first; one that covers it, zeroes and discards among them, does not. The map and not the
//! file's holes says what is there: a hole can be a cluster of zeroes, and whoever copies the file may fill or make holes.
//!
//! A flush brings the clusters to the medium, then their bits, then the bits to the medium too: after a crash, no bit
//! speaks of a cluster that is not whole. What a guest did not flush can be lost then, as of any disk with a cache.
//! An overlay without a name ends with its machine and never waits for the medium.
//!
//! | offset | bytes | what (little-endian) |
//! |---|---|---|
//! | 0 | 8 | `TVOVRLAY` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | bytes of a cluster, 65536 |
//! | 16 | 8 | bytes of the disk |
//! | 24 | 8 | when the base was last modified, seconds; 0 for a block device |
//! | 32 | 4 | and nanoseconds |
//! | 4096 | | the map, cluster 0 in bit 0 of the first byte |
//! | next multiple of 65536 | bytes of the disk | the clusters |

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags};

use super::image;
use super::{Access, DiskError};
use crate::config::{DiskConfig, OverlayConfig};
use crate::virtio::chain::Buffers;

/// Bytes of a cluster.
pub(super) const CLUSTER: u64 = 64 << 10;
/// Bytes of the header, and of the pieces in which the map is written.
const BLOCK: u64 = 4096;
const MAGIC: &[u8; 8] = b"TVOVRLAY";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 36;
/// The largest disk whose map (128 MiB) is kept in memory.
const MAX_SIZE: u64 = 64 << 40;

/// Why a file is not the overlay of an image.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// Other bytes where the header should be.
    #[error("it is no overlay; name a file that does not exist yet, and it will be made")]
    Foreign,
    /// A later version.
    #[error(
        "it has version {0} and this program knows {VERSION}; use the program that made it, or a newer one"
    )]
    Version(u32),
    /// Nothing where another machine has something.
    #[error("it is empty, and so not the overlay that the guest has; name that one")]
    Empty,
    /// Another size than the image's.
    #[error(
        "it was made for an image of {overlay} bytes and this one has {base}; name its own image"
    )]
    Size {
        /// Bytes of the disk that it was made for.
        overlay: u64,
        /// Bytes of the image.
        base: u64,
    },
    /// The image was modified.
    #[error(
        "the image was modified after it was made, so the two no longer fit together; restore the image as it was \
         (a copy needs the original's time: `cp --preserve=timestamps`)"
    )]
    BaseModified,
    /// Cut short.
    #[error("it is {0} bytes long instead of {1}; restore it from a backup")]
    Length(u64, u64),
    /// Too large.
    #[error(
        "an image of {0} bytes is too large for an overlay, which has at most {MAX_SIZE} bytes"
    )]
    TooLarge(u64),
    /// The host.
    #[error("{0}")]
    Host(#[from] io::Error),
}

/// Where a disk's overlay is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OverlayPlace {
    /// In a file, which is made if it does not exist, and kept.
    File(PathBuf),
    /// In a file without a name, which ends with the machine: in `$TMPDIR`, or `/var/tmp`.
    Temporary,
}

/// What an overlay must know of its base.
#[derive(Clone, Copy, PartialEq, Eq)]
struct BaseStamp {
    size: u64,
    seconds: i64,
    nanoseconds: u32,
}

/// The clusters that a guest wrote.
#[derive(Debug)]
pub(super) struct Overlay {
    path: PathBuf,
    file: File,
    /// Bytes of the disk.
    size: u64,
    /// Offset of cluster 0.
    clusters: u64,
    /// It has a name, by which it outlives the machine.
    kept: bool,
    /// An empty file becomes an overlay.
    may_be_new: bool,
    map: Mutex<Map>,
}

/// Which clusters there are.
#[derive(Debug, Default)]
struct Map {
    bits: Vec<u8>,
    /// Blocks of it that the file does not have yet.
    unsaved: BTreeSet<u64>,
}

impl Overlay {
    /// Opens an overlay of an image of `size` bytes, or a file for it. To be used, it must be locked, but for one without a
    /// name, and taken up.
    pub fn open(place: &OverlayPlace, size: u64) -> Result<Self, DiskError> {
        match place {
            OverlayPlace::File(path) => Self::in_file(path, open_or_create(path), size, true),
            OverlayPlace::Temporary => {
                let folder = temporary_folder();
                Self::in_file(&folder, without_a_name(&folder), size, true)
            }
        }
    }

    /// Opens the overlay that another machine has made of an image of `size` bytes. Otherwise like [`Overlay::open`].
    pub fn of_another(path: &Path, size: u64) -> Result<Self, DiskError> {
        Self::in_file(path, open_if_there(path), size, false)
    }

    fn in_file(
        path: &Path,
        file: io::Result<File>,
        size: u64,
        may_be_new: bool,
    ) -> Result<Self, DiskError> {
        let open = || {
            let file = file?;
            if size > MAX_SIZE {
                return Err(OverlayError::TooLarge(size));
            }
            let stamp = BaseStamp::of_size(size);
            Ok(Self {
                path: path.to_owned(),
                size,
                clusters: stamp.clusters(),
                kept: file.metadata()?.nlink() > 0,
                file,
                may_be_new,
                map: Mutex::default(),
            })
        };
        open().map_err(|why| failed(path, why))
    }

    /// Whether it has a name, by which others can open it.
    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// Locks it for writing.
    pub fn lock(&self) -> Result<(), DiskError> {
        image::lock(&self.path, &self.file, Access::ReadWrite)
    }

    /// Lets go of the lock.
    pub fn unlock(&self) -> Result<(), DiskError> {
        image::unlock(&self.path, &self.file)
    }

    /// As [`image::forget_cached`].
    pub fn forget_cached(&self) -> Result<(), DiskError> {
        image::forget_cached(&self.path, &self.file)
    }

    /// Learns which clusters there are, or makes an empty file an overlay of `base`.
    pub fn take_up(&self, base: &File) -> Result<(), DiskError> {
        self.read_map(base).map_err(|why| failed(&self.path, why))
    }

    fn read_map(&self, base: &File) -> Result<(), OverlayError> {
        let stamp = BaseStamp::of(base, self.size)?;
        let mut bits = vec![0; stamp.map_length() as usize];
        match (self.file.metadata()?.len(), self.may_be_new) {
            (0, false) => return Err(OverlayError::Empty),
            (0, true) => {
                self.file.set_len(stamp.file_length())?;
                self.file.write_all_at(&stamp.header(), 0)?;
                if self.kept {
                    self.file.sync_all()?;
                    sync_folder_of(&self.path)?;
                }
            }
            _ => {
                stamp.check(&self.file)?;
                self.file.read_exact_at(&mut bits, BLOCK)?;
            }
        }
        *self.map() = Map {
            bits,
            unsaved: BTreeSet::new(),
        };
        Ok(())
    }

    /// Fills `data` with what the disk has from `offset` on.
    pub fn read(&self, base: &File, mut offset: u64, mut data: Buffers<'_>) -> io::Result<()> {
        while data.len() > 0 {
            let (length, is_here) = self.run(offset, data.len() as u64);
            let part = take(&mut data, length)?;
            if is_here {
                part.fill_from_file(self.file.as_fd(), self.clusters + offset)?;
            } else {
                part.fill_from_file(base.as_fd(), offset)?;
            }
            offset += length;
        }
        Ok(())
    }

    /// Writes `data` to the disk from `offset` on.
    pub fn write(&self, base: &File, offset: u64, mut data: Buffers<'_>) -> io::Result<()> {
        for part in self.parts(offset..offset + data.len() as u64) {
            let covers = self.covers(&part);
            if !covers {
                self.copy_up(base, part.start / CLUSTER)?;
            }
            let bytes = take(&mut data, part.end - part.start)?;
            bytes.write_to_file(self.file.as_fd(), self.clusters + part.start)?;
            if covers {
                self.add(part.start / CLUSTER..part.start / CLUSTER + 1);
            }
        }
        Ok(())
    }

    /// Makes a range in bytes read as zeroes; `unmap` allows to give its space back.
    pub fn write_zeroes(&self, base: &File, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        for part in self.parts(offset..offset + len) {
            let covers = self.covers(&part);
            if !covers {
                self.copy_up(base, part.start / CLUSTER)?;
            }
            let at = self.clusters + part.start;
            image::write_zeroes(&self.file, at, part.end - part.start, unmap)?;
            if covers {
                self.add(part.start / CLUSTER..part.start / CLUSTER + 1);
            }
        }
        Ok(())
    }

    /// Gives up the content of a range in bytes: whole clusters then read as zeroes where the file can have holes. What is the
    /// base's part of a cluster stays.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        for part in self.parts(offset..offset + len) {
            let cluster = part.start / CLUSTER;
            let covers = self.covers(&part);
            if !covers && !self.has(cluster) {
                continue;
            }
            let at = self.clusters + part.start;
            if image::punch_hole(&self.file, at, part.end - part.start)? && covers {
                self.add(cluster..cluster + 1);
            }
        }
        Ok(())
    }

    /// Brings everything written to the medium, or, where nothing survives the machine, to the file.
    pub fn flush(&self) -> io::Result<()> {
        let mut map = self.map();
        self.sync()?;
        if map.unsaved.is_empty() {
            return Ok(());
        }
        for block in &map.unsaved {
            let start = (block * BLOCK) as usize;
            let end = map.bits.len().min(start + BLOCK as usize);
            self.file
                .write_all_at(&map.bits[start..end], BLOCK + block * BLOCK)?;
        }
        self.sync()?;
        map.unsaved.clear();
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.kept {
            self.file.sync_data()?;
        }
        Ok(())
    }

    /// Copies a cluster from the base, unless it is here.
    fn copy_up(&self, base: &File, cluster: u64) -> io::Result<()> {
        if self.has(cluster) {
            return Ok(());
        }
        let start = cluster * CLUSTER;
        let mut bytes = vec![0; CLUSTER.min(self.size - start) as usize];
        base.read_exact_at(&mut bytes, start)?;
        self.file.write_all_at(&bytes, self.clusters + start)?;
        self.add(cluster..cluster + 1);
        Ok(())
    }

    /// A range of the disk cut at the clusters' borders.
    fn parts(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let part = at..((at / CLUSTER + 1) * CLUSTER).min(range.end);
            at = part.end;
            (!part.is_empty()).then_some(part)
        })
    }

    /// Whether a part is all of its cluster.
    fn covers(&self, part: &Range<u64>) -> bool {
        let cluster = part.start / CLUSTER * CLUSTER;
        part.start == cluster && part.end == (cluster + CLUSTER).min(self.size)
    }

    /// How many of the `length` bytes from `offset` on are at one place, and whether that is here.
    fn run(&self, offset: u64, length: u64) -> (u64, bool) {
        let map = self.map();
        let is_here = map.has(offset / CLUSTER);
        let end = self
            .parts(offset..offset + length)
            .take_while(|part| map.has(part.start / CLUSTER) == is_here)
            .last()
            .map_or(offset, |part| part.end);
        (end - offset, is_here)
    }

    fn has(&self, cluster: u64) -> bool {
        self.map().has(cluster)
    }

    fn add(&self, clusters: Range<u64>) {
        let mut map = self.map();
        for cluster in clusters {
            map.bits[(cluster / 8) as usize] |= 1 << (cluster % 8);
            map.unsaved.insert(cluster / 8 / BLOCK);
        }
    }

    fn map(&self) -> MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Map {
    fn has(&self, cluster: u64) -> bool {
        self.bits[(cluster / 8) as usize] & 1 << (cluster % 8) != 0
    }
}

impl BaseStamp {
    fn of(base: &File, size: u64) -> io::Result<Self> {
        let metadata = base.metadata()?;
        if !metadata.is_file() {
            return Ok(Self::of_size(size));
        }
        Ok(Self {
            seconds: metadata.mtime(),
            nanoseconds: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
            ..Self::of_size(size)
        })
    }

    /// That of a base which does not say when it was modified.
    const fn of_size(size: u64) -> Self {
        Self {
            size,
            seconds: 0,
            nanoseconds: 0,
        }
    }

    fn map_length(&self) -> u64 {
        self.size.div_ceil(CLUSTER).div_ceil(8)
    }

    /// Offset of cluster 0.
    fn clusters(&self) -> u64 {
        (BLOCK + self.map_length()).next_multiple_of(CLUSTER)
    }

    fn file_length(&self) -> u64 {
        self.clusters() + self.size
    }

    fn header(&self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(CLUSTER as u32).to_le_bytes());
        header[16..24].copy_from_slice(&self.size.to_le_bytes());
        header[24..32].copy_from_slice(&self.seconds.to_le_bytes());
        header[32..36].copy_from_slice(&self.nanoseconds.to_le_bytes());
        header
    }

    /// Whether `file` is an overlay of this base.
    fn check(&self, file: &File) -> Result<(), OverlayError> {
        let mut header = [0; HEADER_LEN];
        match file.read_exact_at(&mut header, 0) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(OverlayError::Foreign),
            read => Ok(read?),
        }?;
        let expected = self.header();
        let size = u64::from_le_bytes(header[16..24].try_into().unwrap_or_default());
        let version = u32::from_le_bytes(header[8..12].try_into().unwrap_or_default());
        let length = file.metadata()?.len();
        if header[..8] != expected[..8] {
            return Err(OverlayError::Foreign);
        }
        if header[8..16] != expected[8..16] {
            return Err(OverlayError::Version(version));
        }
        if size != self.size {
            return Err(OverlayError::Size {
                overlay: size,
                base: self.size,
            });
        }
        if header != expected {
            return Err(OverlayError::BaseModified);
        }
        if length != self.file_length() {
            return Err(OverlayError::Length(length, self.file_length()));
        }
        Ok(())
    }
}

/// Makes the files of overlays without a name, and names them in the configuration by their descriptors. So they last for as
/// long as the files that are returned, through resets of the guest, each of which makes a new machine.
///
/// # Errors
/// [`DiskError::Overlay`] where the file cannot be made.
pub fn hold_temporary(disks: &mut [DiskConfig]) -> Result<Vec<File>, DiskError> {
    let folder = temporary_folder();
    let mut held = Vec::new();
    for disk in disks {
        if disk.overlay == Some(OverlayConfig::Temporary) {
            let file = without_a_name(&folder).map_err(|e| failed(&folder, e.into()))?;
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            disk.overlay = Some(OverlayConfig::File(path.into()));
            held.push(file);
        }
    }
    Ok(held)
}

fn failed(path: &Path, why: OverlayError) -> DiskError {
    DiskError::Overlay {
        path: path.to_owned(),
        why,
    }
}

fn take<'m>(data: &mut Buffers<'m>, length: u64) -> io::Result<Buffers<'m>> {
    data.take_front(length as usize)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn open_or_create(path: &Path) -> io::Result<File> {
    for_writing().create(true).mode(0o600).open(path)
}

fn open_if_there(path: &Path) -> io::Result<File> {
    for_writing().open(path)
}

fn for_writing() -> OpenOptions {
    let mut options = OpenOptions::new();
    // A pipe must not hold up the start, and a device is no place for an overlay.
    let flags = libc::O_NONBLOCK;
    options.read(true).write(true).truncate(false);
    options.custom_flags(flags);
    options
}

fn temporary_folder() -> PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

fn without_a_name(folder: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR)?;
    Ok(file.into())
}

/// So that the file is found after a crash.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use proptest::prelude::*;
    use tempfile::TempDir;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::Image;
    use super::*;
    use crate::memory::GuestRam;
    use crate::virtio::testing::{BUFFERS, ram};

    /// Three clusters and a bit.
    const SIZE: usize = 3 * CLUSTER as usize + 5 * 512;

    /// A base, and where its overlay is.
    struct Disk {
        folder: TempDir,
        memory: Arc<GuestRam>,
    }

    impl Disk {
        fn new() -> Self {
            let disk = Self {
                folder: TempDir::new().unwrap(),
                memory: ram(),
            };
            fs::write(disk.base(), base_content()).unwrap();
            disk
        }

        fn base(&self) -> PathBuf {
            self.folder.path().join("base")
        }

        fn overlay(&self) -> PathBuf {
            self.folder.path().join("overlay")
        }

        fn open(&self) -> Image {
            self.try_open().unwrap()
        }

        fn try_open(&self) -> Result<Image, DiskError> {
            Image::open_below(&self.base(), &OverlayPlace::File(self.overlay()))
        }

        fn refusal(&self) -> String {
            self.try_open().unwrap_err().to_string()
        }

        fn write(&self, image: &Image, offset: usize, bytes: &[u8]) {
            for (piece, at) in bytes.chunks(PIECE).zip((offset..).step_by(PIECE)) {
                let address = GuestAddress(BUFFERS);
                self.memory.write_slice(piece, address).unwrap();
                let data = Buffers::of(&self.memory, BUFFERS, piece.len());
                image.write(at as u64, data).unwrap();
            }
        }

        fn read(&self, image: &Image, offset: usize, length: usize) -> Vec<u8> {
            let mut bytes = vec![0; length];
            for (piece, at) in bytes.chunks_mut(PIECE).zip((offset..).step_by(PIECE)) {
                let data = Buffers::of(&self.memory, BUFFERS, piece.len());
                image.read(at as u64, data).unwrap();
                let address = GuestAddress(BUFFERS);
                self.memory.read_slice(piece, address).unwrap();
            }
            bytes
        }

        fn content(&self, image: &Image) -> Vec<u8> {
            self.read(image, 0, SIZE)
        }
    }

    /// No whole number of clusters, and within the memory of tests.
    const PIECE: usize = 200 * 512;

    fn base_content() -> Vec<u8> {
        (0..SIZE)
            .map(|byte| (byte / 512 * 7 + byte) as u8)
            .collect()
    }

    fn with(mut content: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
        content[offset..][..bytes.len()].copy_from_slice(bytes);
        content
    }

    #[test]
    fn a_new_overlay_shows_the_base() {
        let disk = Disk::new();
        let image = disk.open();
        assert_eq!(disk.content(&image), base_content());
        assert_eq!(image.sectors() * 512, SIZE as u64);
        assert_eq!(image.access(), Access::ReadWrite);
    }

    #[test]
    fn what_is_written_is_read_back_and_its_neighbours_are_the_bases() {
        let disk = Disk::new();
        let image = disk.open();

        disk.write(&image, CLUSTER as usize - 512, &[1; 1024]);

        let expected = with(base_content(), CLUSTER as usize - 512, &[1; 1024]);
        assert_eq!(disk.content(&image), expected);
        assert_eq!(fs::read(disk.base()).unwrap(), base_content());
    }

    #[test]
    fn what_was_flushed_is_there_when_the_overlay_is_opened_again() {
        let disk = Disk::new();
        let image = disk.open();
        disk.write(&image, SIZE - 512, &[1; 512]);
        image.flush().unwrap();
        drop(image);

        let again = disk.open();

        let expected = with(base_content(), SIZE - 512, &[1; 512]);
        assert_eq!(disk.content(&again), expected);
    }

    #[test]
    fn a_cluster_that_was_not_flushed_is_the_bases_whole() {
        let disk = Disk::new();
        let image = disk.open();
        disk.write(&image, 512, &[1; 512]);
        // As a crash leaves it: nothing is flushed.
        drop(image);

        assert_eq!(disk.content(&disk.open()), base_content());
    }

    #[test]
    fn zeroes_over_a_cluster_hide_what_an_earlier_crash_left_in_its_place() {
        let disk = Disk::new();
        let image = disk.open();
        disk.write(&image, 0, &[1; CLUSTER as usize]);
        drop(image);
        let image = disk.open();

        image.write_zeroes(0, CLUSTER, true).unwrap();

        let expected = with(base_content(), 0, &[0; CLUSTER as usize]);
        assert_eq!(disk.content(&image), expected);
    }

    #[test]
    fn holes_that_are_made_by_a_copy_stay_zeroes_of_the_overlay() {
        let disk = Disk::new();
        let image = disk.open();
        disk.write(&image, CLUSTER as usize, &[0; CLUSTER as usize]);
        image.flush().unwrap();
        drop(image);
        let file = fs::read(disk.overlay()).unwrap();
        let clusters = file.len() - SIZE;
        let copy = File::create(disk.overlay()).unwrap();
        copy.set_len(file.len() as u64).unwrap();
        copy.write_all_at(&file[..clusters], 0).unwrap();

        let again = disk.open();

        let zeroes = [0; CLUSTER as usize];
        assert_eq!(
            disk.content(&again),
            with(base_content(), CLUSTER as usize, &zeroes)
        );
    }

    #[test]
    fn a_discarded_cluster_reads_as_zeroes_and_the_bases_part_of_one_stays() {
        let disk = Disk::new();
        let image = disk.open();

        image.discard(512, 2 * CLUSTER - 512).unwrap();

        let zeroes = [0; CLUSTER as usize];
        assert_eq!(
            disk.content(&image),
            with(base_content(), CLUSTER as usize, &zeroes)
        );
    }

    #[test]
    fn the_file_has_the_clusters_that_were_written_and_no_others() {
        use std::os::unix::fs::MetadataExt;
        let disk = Disk::new();
        let image = disk.open();
        let before = fs::metadata(disk.overlay()).unwrap().blocks();

        disk.write(&image, CLUSTER as usize, &[1; 512]);
        image.flush().unwrap();

        let after = fs::metadata(disk.overlay()).unwrap().blocks();
        // The cluster, and its block of the map.
        assert!((after - before) * 512 <= CLUSTER + 2 * BLOCK);
    }

    #[test]
    fn many_overlays_share_a_base_that_nobody_may_write_meanwhile() {
        let disk = Disk::new();
        let overlays: Vec<_> = (0..16)
            .map(|number| OverlayPlace::File(disk.folder.path().join(number.to_string())))
            .map(|overlay| Image::open_below(&disk.base(), &overlay).unwrap())
            .collect();
        let temporary = Image::open_below(&disk.base(), &OverlayPlace::Temporary).unwrap();

        disk.write(&overlays[3], 0, &[3; 512]);
        disk.write(&temporary, 0, &[4; 512]);

        let writer = Image::open(&disk.base(), Access::ReadWrite).unwrap_err();
        assert!(matches!(writer, DiskError::Locked { .. }));
        assert_eq!(disk.read(&overlays[3], 0, 512), [3; 512]);
        assert_eq!(disk.read(&temporary, 0, 512), [4; 512]);
        assert_eq!(disk.content(&overlays[4]), base_content());
    }

    #[test]
    fn an_overlay_without_a_name_lasts_as_long_as_it_is_held() {
        let disk = Disk::new();
        let mut disks = ["a,overlay", "b,overlay=c", "d"].map(|text| text.parse().unwrap());
        let held = hold_temporary(&mut disks).unwrap();
        let [
            DiskConfig {
                overlay: Some(OverlayConfig::File(path)),
                ..
            },
            named,
            bare,
        ] = disks
        else {
            panic!("{disks:?}");
        };
        let place = OverlayPlace::File(path);
        let image = Image::open_below(&disk.base(), &place).unwrap();
        disk.write(&image, 0, &[1; 512]);
        image.flush().unwrap();
        drop(image);

        let again = Image::open_below(&disk.base(), &place).unwrap();

        assert_eq!(disk.read(&again, 0, 512), [1; 512]);
        assert_eq!(held.len(), 1);
        assert_eq!(named, "b,overlay=c".parse().unwrap());
        assert_eq!(bare, "d".parse().unwrap());
    }

    #[test]
    fn an_overlay_in_use_is_refused_and_so_is_the_base_as_its_own() {
        let disk = Disk::new();
        let _user = disk.open();
        let own = Image::open_below(&disk.base(), &OverlayPlace::File(disk.base())).unwrap_err();
        assert!(matches!(disk.try_open(), Err(DiskError::Locked { .. })));
        assert!(matches!(own, DiskError::Locked { .. }));
    }

    #[test]
    fn an_overlay_goes_to_another_machine_with_all_that_was_written_and_comes_back() {
        let disk = Disk::new();
        let source = disk.open();
        disk.write(&source, 0, &[1; 512]);
        let destination = Image::unclaimed_below(&disk.base(), &disk.overlay()).unwrap();
        disk.write(&source, CLUSTER as usize, &[2; 512]);

        let early = destination.claim().unwrap_err().to_string();
        source.release().unwrap();
        destination.claim().unwrap();
        let there = disk.content(&destination);
        disk.write(&destination, 2 * CLUSTER as usize, &[3; 512]);
        destination.release().unwrap();
        source.claim().unwrap();

        let both = with(
            with(base_content(), 0, &[1; 512]),
            CLUSTER as usize,
            &[2; 512],
        );
        assert!(early.contains("overlay"), "{early}");
        assert_eq!(there, both);
        assert_eq!(
            disk.content(&source),
            with(both, 2 * CLUSTER as usize, &[3; 512])
        );
    }

    #[test]
    fn an_overlay_that_another_machine_has_is_neither_made_nor_found_empty() {
        let disk = Disk::new();
        let missing = Image::unclaimed_below(&disk.base(), &disk.overlay()).unwrap_err();
        fs::write(disk.overlay(), []).unwrap();
        let empty = Image::unclaimed_below(&disk.base(), &disk.overlay()).unwrap();

        let refusal = empty.claim().unwrap_err().to_string();

        assert!(missing.to_string().contains("No such file"), "{missing}");
        assert!(refusal.contains("it is empty"), "{refusal}");
        disk.open();
    }

    #[test]
    fn an_overlay_without_a_name_is_not_let_go() {
        let disk = Disk::new();
        let image = Image::open_below(&disk.base(), &OverlayPlace::Temporary).unwrap();

        let refusal = image.release().unwrap_err().to_string();

        assert!(refusal.contains("overlay=FILE"), "{refusal}");
        assert!(image.is_claimed());
    }

    #[test]
    fn an_overlay_of_a_base_that_was_modified_is_refused() {
        let disk = Disk::new();
        drop(disk.open());
        let base = File::options().write(true).open(disk.base()).unwrap();
        base.set_modified(std::time::UNIX_EPOCH).unwrap();
        let refusal = disk.refusal();
        assert!(refusal.contains("was modified after"), "{refusal}");
    }

    #[test]
    fn an_overlay_of_a_larger_base_is_refused_with_both_sizes() {
        let disk = Disk::new();
        drop(disk.open());
        fs::write(disk.base(), [0; 512]).unwrap();
        let refusal = disk.refusal();
        assert!(
            refusal.contains(&format!("{SIZE} bytes and this one has 512")),
            "{refusal}"
        );
    }

    #[test]
    fn another_file_and_a_later_version_and_one_cut_short_are_refused() {
        let disk = Disk::new();
        drop(disk.open());
        let overlay = fs::read(disk.overlay()).unwrap();
        let refusal_of = |bytes: &[u8]| {
            fs::write(disk.overlay(), bytes).unwrap();
            disk.refusal()
        };

        let foreign = refusal_of(b"#!/bin/sh");
        let later = refusal_of(&with(overlay.clone(), 8, &[2]));
        let cut = refusal_of(&overlay[..overlay.len() - 1]);

        assert!(foreign.contains("it is no overlay"), "{foreign}");
        assert!(later.contains("it has version 2"), "{later}");
        assert!(cut.contains("bytes long instead of"), "{cut}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(usize, usize, u8),
        Zero(usize, usize, bool),
        Discard(usize, usize),
        Flush,
        Reopen,
    }

    /// Ranges of sectors, half of which begin and end at clusters.
    fn range() -> impl Strategy<Value = (usize, usize)> {
        let sector = prop_oneof![
            0..=SIZE / 512,
            (0..=3_usize).prop_map(|cluster| cluster * CLUSTER as usize / 512),
        ];
        (sector.clone(), sector)
            .prop_map(|(a, b)| (a.min(b) * 512, a.max(b) * 512))
            .prop_filter("empty", |(from, to)| from < to)
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (range(), 1..=u8::MAX).prop_map(|((from, to), byte)| Step::Write(from, to, byte)),
            2 => (range(), any::<bool>()).prop_map(|((from, to), unmap)| Step::Zero(from, to, unmap)),
            1 => range().prop_map(|(from, to)| Step::Discard(from, to)),
            1 => Just(Step::Flush),
            1 => Just(Step::Reopen),
        ]
    }

    /// Whether a byte that a discard covered is as it may be then: what it was, or zero.
    fn settle_discard(model: &mut [u8], content: &[u8], range: Range<usize>) {
        for at in range {
            assert!(content[at] == model[at] || content[at] == 0);
            model[at] = content[at];
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn an_overlaid_disk_is_as_a_flat_one_and_its_base_stays(
            steps in proptest::collection::vec(step(), 1..20),
        ) {
            let disk = Disk::new();
            let mut image = disk.open();
            let mut model = base_content();
            for step in steps {
                match step {
                    Step::Write(from, to, byte) => {
                        disk.write(&image, from, &vec![byte; to - from]);
                        model[from..to].fill(byte);
                    }
                    Step::Zero(from, to, unmap) => {
                        image.write_zeroes(from as u64, (to - from) as u64, unmap).unwrap();
                        model[from..to].fill(0);
                    }
                    Step::Discard(from, to) => {
                        image.discard(from as u64, (to - from) as u64).unwrap();
                        settle_discard(&mut model, &disk.content(&image), from..to);
                    }
                    Step::Flush => image.flush().unwrap(),
                    Step::Reopen => {
                        image.flush().unwrap();
                        drop(image);
                        image = disk.open();
                    }
                }
                prop_assert!(disk.content(&image) == model);
            }
            prop_assert!(fs::read(disk.base()).unwrap() == base_content());
        }
    }
}
