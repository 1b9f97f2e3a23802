//! Why a disk cannot be attached, in words for the one who asked for it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::Access;
use super::overlay::OverlayError;

/// Why a disk cannot be attached.
#[derive(Debug, Error)]
pub enum DiskError {
    /// No such file.
    #[error(
        "cannot open disk image {path:?}: there is no such file; \
         correct the path, or create an image with `truncate -s 8G FILE`"
    )]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// The file's permissions forbid it.
    #[error(
        "cannot open disk image {path:?} for {}: permission denied; \
         change its owner or mode{}",
        .access.purpose(), .access.alternative()
    )]
    Permission {
        /// The image.
        path: PathBuf,
        /// What it was opened for.
        access: Access,
    },
    /// The kernel's other reasons.
    #[error("cannot open disk image {path:?} for {}: {source}{}", .access.purpose(), .access.alternative())]
    Open {
        /// The image.
        path: PathBuf,
        /// What it was opened for.
        access: Access,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory, a pipe, a terminal.
    #[error(
        "cannot use {path:?} as a disk image: it is {kind}; give a regular file or a block device"
    )]
    Kind {
        /// What was given as image.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Nothing in it.
    #[error(
        "cannot use disk image {path:?}: it is empty; give it a size, for example with `truncate -s 8G FILE`"
    )]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// Not whole sectors.
    #[error(
        "cannot use disk image {path:?}: its size of {size} bytes is not a multiple of 512 bytes; \
         a raw image is whole sectors: if this is one, extend it with `truncate -s %512 FILE`"
    )]
    Unaligned {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Somebody else uses it.
    #[error(
        "cannot lock disk image {path:?} for {}: another process, or another disk of this guest, \
         holds a lock on it; stop that one, or attach the image read-only to all of them",
        .access.purpose()
    )]
    Locked {
        /// The image.
        path: PathBuf,
        /// What it was to be locked for.
        access: Access,
    },
    /// The file system cannot lock.
    #[error(
        "cannot lock disk image {path:?}: {source}; \
         put it on a file system with open file description locks"
    )]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It changed before it was claimed.
    #[error(
        "cannot go on with disk image {path:?}: it had {before} bytes when it was opened and has {now} now; \
         a guest's disk must not change while the guest moves"
    )]
    Resized {
        /// The image.
        path: PathBuf,
        /// Its size in bytes when it was opened.
        before: u64,
        /// And when it was to be used.
        now: u64,
    },
    /// What the kernel has in its cache may be old.
    #[error("cannot have the kernel forget what it has read of disk image {path:?}: {source}")]
    Cached {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The last writes are not on the medium.
    #[error(
        "cannot bring the last writes to disk image {path:?}: {source}; the guest still has it"
    )]
    Flush {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is another machine's, or about to be.
    #[error(
        "the guest cannot run: disk image {path:?} was not claimed for it, or was let go for another machine to take"
    )]
    NotClaimed {
        /// The image.
        path: PathBuf,
    },
    /// Nobody else could find the overlay.
    #[error(
        "disk {path:?} has an overlay without a name, which ends with its machine and cannot go with the guest; \
         start the machine with overlay=FILE"
    )]
    NamelessOverlay {
        /// The image.
        path: PathBuf,
    },
    /// The overlay.
    #[error("cannot use {path:?} for the overlay of a disk image: {why}")]
    Overlay {
        /// The overlay, or the folder where it was to be.
        path: PathBuf,
        /// Why not.
        why: OverlayError,
    },
    /// Nothing would be written to the overlay.
    #[error(
        "cannot give the read-only disk {path:?} an overlay: the guest writes nothing; leave one of the two out"
    )]
    ReadOnlyOverlay {
        /// The image.
        path: PathBuf,
    },
    /// A serial that the guest could not read back as it was given.
    #[error(
        "cannot give a disk the serial {serial:?}: \
         a serial is at most 20 printable ASCII characters without spaces; choose another"
    )]
    Serial {
        /// The serial asked for.
        serial: String,
    },
}
