//! Host memory that is a guest's memory.

use std::fmt;
use std::ptr::NonNull;

/// A range of guest-physical memory and the host memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memslot {
    /// The slot's number, chosen by the VMM.
    pub slot: u32,
    /// Guest-physical address, a multiple of the host's page size.
    pub ipa: u64,
    /// Bytes, a multiple of the host's page size.
    pub size: u64,
    /// Where the memory is mapped in this process. That mapping is never tag-checked: it is the
    /// data mapping, not `PROT_MTE`.
    pub host_address: NonNull<u8>,
    /// The host logs which pages the guest writes.
    pub log_dirty: bool,
    /// The guest's writes become MMIO exits.
    pub read_only: bool,
}

// SAFETY: a memslot describes memory and gives no access to it.
unsafe impl Send for Memslot {}
// SAFETY: as above.
unsafe impl Sync for Memslot {}

impl fmt::Display for Memslot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "memslot {} ({} KiB at guest address {:#x})",
            self.slot,
            self.size / 1024,
            self.ipa
        )
    }
}
