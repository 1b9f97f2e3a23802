//! Guest memory.

use vm_memory::bitmap::AtomicBitmap;

/// Guest memory as the devices see it: the data mapping, never tag-checked, with the bitmap of
/// pages that the VMM itself wrote (KVM's dirty log knows only what the guest wrote).
pub type GuestRam = vm_memory::GuestMemoryMmap<AtomicBitmap>;
