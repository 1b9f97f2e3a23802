//! What kind of host the model is.

use mte::MteFeatures;

use crate::{Capabilities, MteSupport};

/// What distinguishes one host from another: what it offers, and where Linux changed over the years.
///
/// The conformance suite holds kernels to the rules of their version: `docs/hypervisors.md` has the
/// versions at which each was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRules {
    /// The MTE that guests see; `None` for a host that has none to give.
    pub mte: Option<MteFeatures>,
    /// Shared mappings of memory files may be memory of a guest with MTE.
    pub shared_memory: bool,
    /// Huge pages may be memory of a guest with MTE.
    pub huge_pages: bool,
    /// Any private mapping may be, even of a file on a disk.
    pub private_disk_files: bool,
    /// Tags cannot be written in bulk while a memslot logs dirty pages.
    pub guards_dirty_log: bool,
    /// If the buffer of a bulk write faults within a page, the page has lost all of its tags;
    /// otherwise it has some of the new ones and some of its own.
    pub clears_half_written_pages: bool,
    /// Most bytes of guest memory in one bulk copy.
    pub longest_copy: u64,
    /// A bulk write and the first touch of a page wait for each other. Otherwise either may undo
    /// the other; the model is never so careless.
    pub guards_first_touch: bool,
    /// EL1 in AArch32.
    pub aarch32_el1: bool,
    /// Bits of a guest-physical address.
    pub ipa_bits: u8,
    /// Most vCPUs of one VM.
    pub max_vcpus: u32,
    /// Memory, in pages.
    pub memory_pages: u64,
    /// Of how many swapped pages the host can keep the tags. Linux keeps them in memory.
    pub swapped_tag_pages: u64,
}

/// `ID_AA64PFR1_EL1` of a processor with MTE3.
const MTE3: u64 = 3 << 8;

impl HostRules {
    /// A host with this version of Linux, from 5.14 on, and MTE3.
    pub fn linux(major: u32, minor: u32) -> Self {
        let since = |first| (major, minor) >= first;
        Self {
            mte: Some(MteFeatures::from_id_registers(MTE3, 0)),
            shared_memory: since((6, 2)),
            huge_pages: since((6, 13)),
            private_disk_files: !since((6, 2)),
            guards_dirty_log: since((6, 12)),
            clears_half_written_pages: since((6, 2)),
            longest_copy: match since((6, 3)) {
                true => i32::MAX as u64,
                false => u64::MAX,
            },
            guards_first_touch: since((6, 2)),
            aarch32_el1: true,
            ipa_bits: 48,
            max_vcpus: 512,
            memory_pages: 1 << 20,
            swapped_tag_pages: u64::MAX,
        }
    }

    /// The same host without MTE.
    #[must_use]
    pub fn without_mte(self) -> Self {
        Self { mte: None, ..self }
    }

    /// What such a host says of itself.
    pub(super) fn capabilities(&self) -> Capabilities {
        Capabilities {
            ipa_bits: self.ipa_bits,
            max_vcpus: self.max_vcpus,
            max_memslots: 512,
            mte: self.mte.map(|features| MteSupport {
                features,
                shared_memory: self.shared_memory,
                huge_pages: self.huge_pages,
            }),
            sve: false,
            pointer_authentication: false,
            pmu: false,
            aarch32_el1: self.aarch32_el1,
            gic_v3: true,
            counter_hz: 62_500_000,
        }
    }
}
