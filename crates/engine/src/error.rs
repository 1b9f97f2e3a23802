//! Why a hypervisor did not do what was asked.

use std::io;

use crate::{Memslot, RegisterId};

/// Result of a call to the hypervisor.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a hypervisor did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hypervisor cannot be opened.
    #[error("cannot open {path}: {source}; {remedy}")]
    Open {
        /// What was opened.
        path: String,
        /// What the host said.
        source: io::Error,
        /// What the user can do.
        remedy: &'static str,
    },
    /// The hypervisor is there, but speaks another version of its interface.
    #[error("{path} speaks API version {found}, Tagvisor needs {needed}")]
    ApiVersion {
        /// What was opened.
        path: String,
        /// The version found.
        found: i32,
        /// The version needed.
        needed: i32,
    },
    /// The host cannot give a guest memory tagging.
    #[error(
        "this host cannot give a guest memory tagging (MTE): it needs a CPU with MTE2 or later, a kernel \
         with CONFIG_ARM64_MTE, and neither `arm64.nomte` nor `kvm-arm.mode=protected` on the kernel's command line; \
         `tagvisor check` shows what it has, `--mte off` runs the guest without"
    )]
    MteUnsupported,
    /// The host's guest-physical addresses are too short.
    #[error("the guest needs {needed} bits of guest-physical address, this host offers {offered}")]
    IpaBits {
        /// Bits needed.
        needed: u8,
        /// Bits offered.
        offered: u8,
    },
    /// The memory given to a guest with MTE cannot hold tags.
    #[error(
        "{slot}: the host memory behind it cannot hold tags, so a guest with MTE may not have it: it must be anonymous \
         memory, or a shared mapping of a memory file (memfd, tmpfs) on Linux 6.2 or later, or huge pages on 6.13 or later"
    )]
    MemoryWithoutTags {
        /// The memslot refused.
        slot: Memslot,
    },
    /// A memslot was refused.
    #[error("{slot}: {source}")]
    Memslot {
        /// The memslot refused.
        slot: Memslot,
        /// What the host said.
        source: io::Error,
    },
    /// A memslot could not be taken away.
    #[error("memslot {slot}: cannot take it from the guest: {source}")]
    DeleteMemslot {
        /// The memslot's number.
        slot: u32,
        /// What the host said.
        source: io::Error,
    },
    /// A 32-bit vCPU in a VM with MTE.
    #[error(
        "vCPU {index}: AArch32 has no memory tagging, so a VM with MTE cannot have a vCPU whose EL1 is AArch32"
    )]
    Aarch32WithMte {
        /// The vCPU.
        index: u32,
    },
    /// A vCPU could not be made.
    #[error("vCPU {index}: {step}: {source}")]
    Vcpu {
        /// The vCPU.
        index: u32,
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The guest touched memory that the host could not give it.
    #[error(
        "vCPU {index} at pc {pc:#x}: the host could not give the guest the memory it touched: the mapping behind a memslot is gone, \
         or was replaced by one that cannot hold tags, or the host is out of memory"
    )]
    GuestMemoryFault {
        /// The vCPU.
        index: u32,
        /// Where it stands.
        pc: u64,
    },
    /// A vCPU cannot run on.
    #[error("vCPU {index} at pc {pc:#x}: cannot run on: {reason}")]
    Run {
        /// The vCPU.
        index: u32,
        /// Where it stands.
        pc: u64,
        /// Why not.
        reason: String,
    },
    /// A register could not be read or written.
    #[error("vCPU {index}: cannot {action} register {id}: {source}")]
    Register {
        /// The vCPU.
        index: u32,
        /// `read` or `write`.
        action: &'static str,
        /// The register.
        id: RegisterId,
        /// What the host said.
        source: io::Error,
    },
    /// The vCPU's list of registers could not be had.
    #[error("vCPU {index}: cannot list its registers: {source}")]
    RegisterList {
        /// The vCPU.
        index: u32,
        /// What the host said.
        source: io::Error,
    },
    /// The interrupt controller could not be made.
    #[error("interrupt controller: {step}: {source}")]
    Gic {
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// A saved register does not fit this host.
    #[error("register {id}: {why}; the guest cannot go on here with the CPU it had")]
    ForeignRegister {
        /// The register.
        id: RegisterId,
        /// What does not fit.
        why: String,
    },
    /// A saved interrupt controller does not fit this one.
    #[error(
        "the saved interrupt controller has other registers than the one of this machine: other interrupts, CPUs or priorities"
    )]
    ForeignGic,
    /// The dirty log could not be read.
    #[error("memslot {slot}: cannot read the dirty log: {source}")]
    DirtyLog {
        /// The memslot.
        slot: u32,
        /// What the host said.
        source: io::Error,
    },
    /// Any other refusal of the host.
    #[error("{step}: {source}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
}
