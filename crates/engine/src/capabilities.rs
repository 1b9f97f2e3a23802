//! What a hypervisor can do on this machine.

use mte::MteFeatures;

/// What the hypervisor can do on this machine, found by asking it and not by its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Bits of a guest-physical address.
    pub ipa_bits: u8,
    /// Most vCPUs of one VM.
    pub max_vcpus: u32,
    /// Most memslots of one VM.
    pub max_memslots: u32,
    /// Memory tagging for guests; `None` where the host has none to give.
    pub mte: Option<MteSupport>,
    /// Scalable vectors for guests.
    pub sve: bool,
    /// Pointer authentication for guests.
    pub pointer_authentication: bool,
    /// A PMU for guests.
    pub pmu: bool,
    /// EL1 in AArch32.
    pub aarch32_el1: bool,
    /// The interrupt controller is a GICv3.
    pub gic_v3: bool,
    /// How often the guest's counters count in a second (CNTFRQ_EL0, Arm ARM D24.10.2). It is the host's own, and a guest
    /// that has read it once takes it for granted.
    pub counter_hz: u64,
}

/// How far memory tagging for guests goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MteSupport {
    /// The MTE that a guest sees. The host decides it; it cannot be lowered.
    pub features: MteFeatures,
    /// Shared mappings of memory files may be memory of a guest with MTE (Linux 6.2 and later; seed 001).
    pub shared_memory: bool,
    /// Huge pages may be memory of a guest with MTE (Linux 6.13 and later).
    pub huge_pages: bool,
}
