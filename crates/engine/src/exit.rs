//! Why a vCPU stopped running the guest.

use crate::DebugExit;

/// Why a vCPU stopped running the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit<'a> {
    /// The guest reads memory that no memslot covers. The VMM fills `data`, 1 to 8 bytes.
    MmioRead {
        /// Guest-physical address.
        ipa: u64,
        /// The value to be read, little-endian.
        data: &'a mut [u8],
    },
    /// The guest writes memory that no memslot covers.
    MmioWrite {
        /// Guest-physical address.
        ipa: u64,
        /// The value written, little-endian, 1 to 8 bytes.
        data: &'a [u8],
    },
    /// The guest asks something of the machine as a whole.
    System(SystemEvent),
    /// The vCPU's debugger wanted to know ([`Vcpu::set_debug`](crate::Vcpu::set_debug)). Nothing is left unfinished.
    Debug(DebugExit),
    /// Somebody interrupted the vCPU, or a signal did. Nothing is left unfinished.
    Interrupted,
}

/// What a guest asks of the machine as a whole, by PSCI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemEvent {
    /// `SYSTEM_OFF`.
    Off,
    /// `SYSTEM_RESET` or `SYSTEM_RESET2`.
    Reset,
}
