//! What kind of host the model is.

use mte::MteFeatures;

use crate::{Capabilities, MteSupport};

/// What distinguishes one host from another: what it offers, and where Linux changed over the years.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRules {
    /// The MTE that guests see; `None` for a host that has none to give.
    pub mte: Option<MteFeatures>,
    /// Shared mappings of memory files may be memory of a guest with MTE (Linux 6.2).
    pub shared_memory: bool,
    /// Huge pages may be memory of a guest with MTE (Linux 6.13).
    pub huge_pages: bool,
    /// Tags cannot be written in bulk while a memslot logs dirty pages (Linux 6.12).
    pub guards_dirty_log: bool,
    /// If the buffer of a bulk write faults within a page, the page has lost all of its tags (Linux
    /// 6.2); before, it has some of the new ones and some of its own.
    pub clears_half_written_pages: bool,
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
    /// Linux 6.1: only private memory for guests with MTE.
    pub fn linux_6_1() -> Self {
        Self {
            mte: Some(MteFeatures::from_id_registers(MTE3, 0)),
            shared_memory: false,
            huge_pages: false,
            guards_dirty_log: false,
            clears_half_written_pages: false,
            aarch32_el1: true,
            ipa_bits: 48,
            max_vcpus: 512,
            memory_pages: 1 << 20,
            swapped_tag_pages: u64::MAX,
        }
    }

    /// Linux 6.12: shared memory too.
    pub fn linux_6_12() -> Self {
        Self {
            shared_memory: true,
            guards_dirty_log: true,
            clears_half_written_pages: true,
            ..Self::linux_6_1()
        }
    }

    /// Linux 6.13 and later: huge pages too.
    pub fn linux_6_13() -> Self {
        Self {
            huge_pages: true,
            ..Self::linux_6_12()
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
        }
    }
}
