//! The raw image behind a disk: a file or a block device, opened, checked and locked.
//!
//! The locks are those of QEMU, so that either program keeps out the other: open file description
//! locks on single bytes, one for each thing done to the image and one for each thing that nobody
//! else may do (`RAW_LOCK_PERM_BASE`, `RAW_LOCK_SHARED_BASE` in QEMU's block/file-posix.c). One writer, or
//! any number of readers, and the images below overlays have readers alone. The locks end with the file descriptor, however the process ends.
//!
//! A guest that migrates takes its disks along. The machine that awaits it opens them while the other one has them still,
//! and claims them, that is, locks them and reads what it must know, once that one has let them go.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::Advice;

use super::DiskError;
use super::overlay::{Overlay, OverlayPlace};
use crate::virtio::chain::Buffers;

/// The unit of virtio-blk's sector numbers and lengths, in bytes (virtio 1.2, 5.2.4).
pub const SECTOR_SIZE: u64 = 512;

/// The first byte of the locks that say what is done to the image.
const LOCK_DOES: i64 = 100;
/// The first byte of the locks that say what nobody else may do.
const LOCK_FORBIDS: i64 = 200;
/// QEMU's permissions, as bits: what a lock byte stands for.
const READ: u8 = 1 << 0;
const WRITE: u8 = 1 << 1;
const RESIZE: u8 = 1 << 3;

/// What the guest may do to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it; others may read it too.
    ReadOnly,
    /// Read and write it, alone.
    ReadWrite,
}

impl Access {
    pub(super) fn purpose(self) -> &'static str {
        match self {
            Access::ReadOnly => "reading",
            Access::ReadWrite => "writing",
        }
    }

    pub(super) fn alternative(self) -> &'static str {
        match self {
            Access::ReadOnly => "",
            Access::ReadWrite => ", or attach the image read-only",
        }
    }

    /// What is done to the image.
    fn does(self) -> u8 {
        match self {
            Access::ReadOnly => READ,
            Access::ReadWrite => READ | WRITE,
        }
    }

    /// What nobody else may do meanwhile.
    fn forbids(self) -> u8 {
        WRITE | RESIZE
    }
}

/// A raw disk image, open, and locked while it is claimed.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    pub(super) file: File,
    sectors: u64,
    access: Access,
    /// Where writes go instead.
    overlay: Option<Overlay>,
    claimed: AtomicBool,
}

impl Image {
    /// Opens the image at `path` and locks it.
    ///
    /// # Errors
    /// It cannot be opened, is no image, is not a whole and non-zero number of sectors, or is in use.
    pub fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let image = Self::unclaimed(path, access)?;
        image.lock()?;
        image.take_up()?;
        warn_of_other_formats(path, &image.file);
        Ok(image)
    }

    /// Opens the image at `path` for reading, below an overlay, which takes what is written to it.
    ///
    /// # Errors
    /// Those of [`Image::open`], of image and overlay; or the overlay is not one of this image.
    pub fn open_below(path: &Path, overlay: &OverlayPlace) -> Result<Self, DiskError> {
        let below = Self::open(path, Access::ReadOnly)?;
        let overlay = Overlay::open(overlay, below.sectors * SECTOR_SIZE)?;
        let image = below.with(overlay);
        image.lock()?;
        image.take_up()?;
        Ok(image)
    }

    /// Opens the image at `path`, which another machine may have locked, and reads nothing of it. To be used, it must be
    /// claimed.
    ///
    /// # Errors
    /// Those of [`Image::open`], but that it is in use.
    pub fn unclaimed(path: &Path, access: Access) -> Result<Self, DiskError> {
        let file = open_file(path, access)?;
        check_kind(path, &file, access)?;
        Ok(Image {
            sectors: count_sectors(path, &file, access)?,
            path: path.to_owned(),
            file,
            access,
            overlay: None,
            claimed: AtomicBool::new(false),
        })
    }

    /// Opens the image at `path` and its overlay, which is there, as [`Image::unclaimed`] does.
    ///
    /// # Errors
    /// Those of [`Image::unclaimed`], of image and overlay.
    pub fn unclaimed_below(path: &Path, overlay: &Path) -> Result<Self, DiskError> {
        let below = Self::unclaimed(path, Access::ReadOnly)?;
        let overlay = Overlay::of_another(overlay, below.sectors * SECTOR_SIZE)?;
        Ok(below.with(overlay))
    }

    fn with(self, overlay: Overlay) -> Self {
        Image {
            overlay: Some(overlay),
            access: Access::ReadWrite,
            claimed: AtomicBool::new(false),
            ..self
        }
    }

    /// Locks the image, and its overlay, and learns what others wrote to them meanwhile. Nothing happens if it is claimed.
    ///
    /// # Errors
    /// It is in use, or no longer what it was when it was opened. It is not locked then.
    pub fn claim(&self) -> Result<(), DiskError> {
        if self.is_claimed() {
            return Ok(());
        }
        let claimed = self
            .lock()
            .and_then(|()| self.forget_cached())
            .and_then(|()| self.take_up());
        if claimed.is_err() {
            self.unlock()?;
        }
        claimed
    }

    /// Brings everything written to the medium, and lets others claim the image and its overlay. Nothing may be read or
    /// written until it is claimed again.
    ///
    /// # Errors
    /// The medium's; or the overlay has no name by which others could open it. It is still claimed then.
    pub fn release(&self) -> Result<(), DiskError> {
        if !self.is_claimed() {
            return Ok(());
        }
        if self
            .overlay
            .as_ref()
            .is_some_and(|overlay| !overlay.is_kept())
        {
            return Err(DiskError::NamelessOverlay {
                path: self.path.clone(),
            });
        }
        if self.access == Access::ReadWrite {
            self.flush().map_err(|source| DiskError::Flush {
                path: self.path.clone(),
                source,
            })?;
        }
        self.claimed.store(false, Ordering::SeqCst);
        self.unlock()
    }

    /// Whether it can be read and written.
    pub fn is_claimed(&self) -> bool {
        self.claimed.load(Ordering::SeqCst)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is done to the file of the image: nobody writes to one below an overlay.
    pub(super) fn file_access(&self) -> Access {
        match self.overlay {
            Some(_) => Access::ReadOnly,
            None => self.access,
        }
    }

    fn lock(&self) -> Result<(), DiskError> {
        lock(&self.path, &self.file, self.file_access())?;
        self.overlay.as_ref().map_or(Ok(()), Overlay::lock)
    }

    fn unlock(&self) -> Result<(), DiskError> {
        unlock(&self.path, &self.file)?;
        self.overlay.as_ref().map_or(Ok(()), Overlay::unlock)
    }

    fn forget_cached(&self) -> Result<(), DiskError> {
        forget_cached(&self.path, &self.file)?;
        self.overlay.as_ref().map_or(Ok(()), Overlay::forget_cached)
    }

    /// Begins to use what is locked.
    fn take_up(&self) -> Result<(), DiskError> {
        let now = count_sectors(&self.path, &self.file, self.file_access())?;
        if now != self.sectors {
            return Err(DiskError::Resized {
                path: self.path.clone(),
                before: self.sectors * SECTOR_SIZE,
                now: now * SECTOR_SIZE,
            });
        }
        if let Some(overlay) = &self.overlay {
            overlay.take_up(&self.file)?;
        }
        self.claimed.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// The size in sectors of [`SECTOR_SIZE`] bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// What the guest may do to it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Fills `data` with the content from byte `offset` on.
    ///
    /// # Errors
    /// The medium's. Part of the memory may be written then.
    pub(super) fn read(&self, offset: u64, data: Buffers<'_>) -> io::Result<()> {
        match &self.overlay {
            Some(overlay) => overlay.read(&self.file, offset, data),
            None => data.fill_from_file(self.file.as_fd(), offset),
        }
    }

    /// Writes all of `data` from byte `offset` on.
    ///
    /// # Errors
    /// The medium's. Part of it may be written then.
    pub(super) fn write(&self, offset: u64, data: Buffers<'_>) -> io::Result<()> {
        match &self.overlay {
            Some(overlay) => overlay.write(&self.file, offset, data),
            None => data.write_to_file(self.file.as_fd(), offset),
        }
    }

    /// Brings everything written to the medium.
    ///
    /// # Errors
    /// The medium's. What was written since the last flush may be lost.
    pub fn flush(&self) -> io::Result<()> {
        match &self.overlay {
            Some(overlay) => overlay.flush(),
            None => self.file.sync_data(),
        }
    }

    /// Gives up the content of a range in bytes, where the file can: it then reads as zeroes.
    ///
    /// # Errors
    /// The file system's, except that it cannot: then the content stays, as virtio allows.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match &self.overlay {
            Some(overlay) => overlay.discard(offset, len),
            None => punch_hole(&self.file, offset, len).map(|_punched| ()),
        }
    }

    /// Makes a range in bytes read as zeroes; `unmap` allows to give its space back.
    ///
    /// # Errors
    /// The file system's.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        match &self.overlay {
            Some(overlay) => overlay.write_zeroes(&self.file, offset, len, unmap),
            None => write_zeroes(&self.file, offset, len, unmap),
        }
    }
}

/// Makes a range in bytes of a file read as zeroes; `unmap` allows to give its space back.
pub(super) fn write_zeroes(file: &File, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    if unmap && punch_hole(file, offset, len)? {
        return Ok(());
    }
    let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    if fallocate(file, mode, offset, len)? {
        return Ok(());
    }
    overwrite_with_zeroes(file, offset, len)
}

/// Makes a range in bytes of a file a hole; `false` where it cannot have any.
pub(super) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    fallocate(file, mode, offset, len)
}

/// Changes how a range is allocated; `false` where the file cannot.
fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<bool> {
    let offset = to_off_t(offset)?;
    let len = to_off_t(len)?;
    loop {
        // SAFETY: the descriptor is open; no memory is passed.
        let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) };
        if result == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            // EINVAL: a block device whose own sectors are larger than the range's alignment.
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => return Ok(false),
            _ => return Err(error),
        }
    }
}

pub(super) fn overwrite_with_zeroes(file: &File, offset: u64, len: u64) -> io::Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    let mut done = 0;
    while done < len {
        let count = (len - done).min(ZEROES.len() as u64);
        file.write_all_at(&ZEROES[..count as usize], offset + done)?;
        done += count;
    }
    Ok(())
}

fn open_file(path: &Path, access: Access) -> Result<File, DiskError> {
    OpenOptions::new()
        .read(true)
        .write(access == Access::ReadWrite)
        // A pipe without a writer must not hold up the start.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound => DiskError::Missing { path },
                io::ErrorKind::PermissionDenied => DiskError::Permission { path, access },
                io::ErrorKind::IsADirectory => DiskError::Kind {
                    path,
                    kind: "a directory",
                },
                _ => DiskError::Open {
                    path,
                    access,
                    source,
                },
            }
        })
}

fn check_kind(path: &Path, file: &File, access: Access) -> Result<(), DiskError> {
    let metadata = file.metadata().map_err(|source| DiskError::Open {
        path: path.to_owned(),
        access,
        source,
    })?;
    let file_type = metadata.file_type();
    if file_type.is_file() || file_type.is_block_device() {
        return Ok(());
    }
    let kind = if file_type.is_dir() {
        "a directory"
    } else if file_type.is_char_device() {
        "a character device"
    } else {
        "a pipe or a socket"
    };
    Err(DiskError::Kind {
        path: path.to_owned(),
        kind,
    })
}

fn count_sectors(path: &Path, mut file: &File, access: Access) -> Result<u64, DiskError> {
    // The end of a block device is its size too, which its metadata do not tell.
    let size = file
        .seek(SeekFrom::End(0))
        .map_err(|source| DiskError::Open {
            path: path.to_owned(),
            access,
            source,
        })?;
    let path = path.to_owned();
    match (size / SECTOR_SIZE, size % SECTOR_SIZE) {
        (0, 0) => Err(DiskError::Empty { path }),
        (sectors, 0) => Ok(sectors),
        _ => Err(DiskError::Unaligned { path, size }),
    }
}

/// A guest may have any bytes on its disk, so a foreign header is no error; but it is rarely meant.
fn warn_of_other_formats(path: &Path, mut file: &File) {
    let mut magic = [0; 4];
    let read = file
        .seek(SeekFrom::Start(0))
        .and_then(|_| file.read_exact(&mut magic));
    if read.is_ok() && &magic == b"QFI\xfb" {
        tracing::warn!(
            "disk image {path:?} begins like a qcow2 image, but is given to the guest as it is (raw); \
             `qemu-img convert -O raw` converts it"
        );
    }
}

/// Takes the locks first and looks for those of others then: of two that start at the same
/// moment, both may be refused, but never both be let in.
pub(super) fn lock(path: &Path, file: &File, access: Access) -> Result<(), DiskError> {
    let fail = |source: io::Error| DiskError::Lock {
        path: path.to_owned(),
        source,
    };
    let locked = || DiskError::Locked {
        path: path.to_owned(),
        access,
    };
    let mine = bytes_of(LOCK_DOES, access.does()).chain(bytes_of(LOCK_FORBIDS, access.forbids()));
    for byte in mine {
        if !share_byte(file, byte).map_err(fail)? {
            return Err(locked());
        }
    }
    let conflicts =
        bytes_of(LOCK_FORBIDS, access.does()).chain(bytes_of(LOCK_DOES, access.forbids()));
    for byte in conflicts {
        if is_held_by_others(file, byte).map_err(fail)? {
            return Err(locked());
        }
    }
    Ok(())
}

/// Lets go of all locks.
pub(super) fn unlock(path: &Path, file: &File) -> Result<(), DiskError> {
    (0..8)
        .flat_map(|bit| [LOCK_DOES + bit, LOCK_FORBIDS + bit])
        .try_for_each(|byte| lock_call(file, libc::F_OFD_SETLK, libc::F_UNLCK, byte).map(drop))
        .map_err(|source| DiskError::Lock {
            path: path.to_owned(),
            source,
        })
}

/// File systems whose files no other host writes: ext2 to ext4, XFS, Btrfs, tmpfs, F2FS, ZFS, bcachefs (`statfs(2)`).
const OF_ONE_HOST: [u64; 7] = [
    0xef53,
    0x5846_5342,
    0x9123_683e,
    0x0102_1994,
    0xf2f5_2010,
    0x2fc1_2fc1,
    0xca45_1a4e,
];

/// Has this host's kernel forget what it has read of a file that other hosts may have written since: one on a network, or
/// a block device, whatever file system its name is on.
pub(super) fn forget_cached(path: &Path, file: &File) -> Result<(), DiskError> {
    let forget = || {
        let is_file = file.metadata()?.is_file();
        if is_file && OF_ONE_HOST.contains(&(rustix::fs::fstatfs(file)?.f_type as u64)) {
            return Ok(());
        }
        Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?)
    };
    forget().map_err(|source: io::Error| DiskError::Cached {
        path: path.to_owned(),
        source,
    })
}

fn bytes_of(base: i64, permissions: u8) -> impl Iterator<Item = i64> {
    (0..8)
        .filter(move |bit| permissions & (1 << bit) != 0)
        .map(move |bit| base + bit)
}

/// Takes a shared lock on one byte; `false` where another holds it exclusively.
fn share_byte(file: &File, byte: i64) -> io::Result<bool> {
    match lock_call(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn is_held_by_others(file: &File, byte: i64) -> io::Result<bool> {
    let found = lock_call(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)?;
    Ok(found != libc::F_UNLCK)
}

/// One lock call on one byte; returns the lock type the kernel leaves.
fn lock_call(file: &File, command: i32, lock_type: i32, byte: i64) -> io::Result<i32> {
    let mut flock = libc::flock {
        l_type: lock_type as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        // The kernel wants zero with open file description locks.
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and these two commands read and write one flock.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut flock) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(flock.l_type))
}

fn to_off_t(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}
