//! The outcome of copying tags in bulk (seed 003; Linux `Documentation/virt/kvm/api.rst` 4.130).

use std::io;

/// Bytes of guest memory covered, or why none was.
pub type TagCopyResult = std::result::Result<u64, TagCopyError>;

/// Why no tag was copied.
#[derive(Debug, thiserror::Error)]
pub enum TagCopyError {
    /// The VM was built without MTE (`EINVAL`).
    #[error("the VM has no MTE, so its memory has no tags")]
    NoMte,
    /// Address or length is not a multiple of the host's page size, or the length is above 2³¹ − 1 (`EINVAL`).
    #[error(
        "{length:#x} bytes at {ipa:#x}: tags are copied in whole pages, at most 2 GiB at a time"
    )]
    Range {
        /// First guest-physical address.
        ipa: u64,
        /// Bytes of guest memory.
        length: u64,
    },
    /// The first page is not memory of the guest, cannot hold tags, or is read-only and was to be written (`EFAULT`).
    #[error("guest address {ipa:#x}: no memory there whose tags could be reached")]
    NoMemory {
        /// The page's guest-physical address.
        ipa: u64,
    },
    /// Tags may not be written while a memslot of the VM logs dirty pages (`EBUSY`, Linux 6.12 and later):
    /// the write would not be in the log, and a migration would miss it.
    #[error(
        "guest address {ipa:#x}: tags cannot be written while the guest's writes are being logged"
    )]
    DirtyLogging {
        /// First guest-physical address.
        ipa: u64,
    },
    /// Whatever else the host said.
    #[error("guest address {ipa:#x}: copying tags: {source}")]
    Host {
        /// First guest-physical address.
        ipa: u64,
        /// What the host said.
        source: io::Error,
    },
}
