//! The registers of a model vCPU: what there is, what it holds at reset, what may be written.

use std::collections::BTreeMap;
use std::io;

use mte::{MteFeatures, SWITCHED_REGISTERS};

use crate::RegisterId;

/// What a register without a defined reset value holds: nothing that anyone should rely on.
const UNKNOWN: u64 = 0x1de7_ec7e_dbad_c0de;

/// `PSTATE` at reset: EL1h, all exceptions masked.
const PSTATE_RESET: u64 = 0x3c5;

/// `ID_AA64MMFR0_EL1`: 48 bits of physical address, 16 of ASID; pages of 4 KiB alone.
const ID_AA64MMFR0: u64 = 0xf << 24 | 2 << 4 | 5;
/// `ID_AA64PFR0_EL1`: EL1 and EL0 in AArch64, a GICv3.
const ID_AA64PFR0: u64 = 1 << 24 | 1 << 4 | 1;
/// `ID_AA64DFR0_EL1`: six breakpoints, four watchpoints, the debug architecture of Armv8.0.
const ID_AA64DFR0: u64 = 3 << 20 | 5 << 12 | 6;
/// `CLIDR_EL1`: one level of unified cache, and the level of coherency behind it.
const CLIDR: u64 = 1 << 24 | 4;
/// `CLIDR_EL1.Ttype1`: the cache holds tags beside data.
const CLIDR_UNIFIED_TAGS: u64 = 2 << 33;

const CLIDR_EL1: RegisterId = RegisterId::system(3, 1, 0, 0, 1);
const ID_AA64PFR0_EL1: RegisterId = RegisterId::system(3, 0, 0, 4, 0);

/// Registers of EL1 and EL0 that an operating system sets.
const PLAIN: &[RegisterId] = &[
    RegisterId::SP_EL1,
    RegisterId::ELR_EL1,
    RegisterId::SPSR_EL1,
    RegisterId::system(3, 0, 1, 0, 0),  // SCTLR_EL1
    RegisterId::system(3, 0, 1, 0, 2),  // CPACR_EL1
    RegisterId::system(3, 0, 2, 0, 0),  // TTBR0_EL1
    RegisterId::system(3, 0, 2, 0, 1),  // TTBR1_EL1
    RegisterId::system(3, 0, 2, 0, 2),  // TCR_EL1
    RegisterId::system(3, 0, 5, 2, 0),  // ESR_EL1
    RegisterId::system(3, 0, 6, 0, 0),  // FAR_EL1
    RegisterId::system(3, 0, 10, 2, 0), // MAIR_EL1
    RegisterId::system(3, 0, 12, 0, 0), // VBAR_EL1
    RegisterId::system(3, 0, 13, 0, 4), // TPIDR_EL1
    RegisterId::system(3, 3, 13, 0, 2), // TPIDR_EL0
    RegisterId::system(3, 3, 13, 0, 3), // TPIDRRO_EL0
];

#[derive(Clone, Copy)]
struct Register {
    value: u64,
    /// A fact about the machine: writing anything else is refused.
    fixed: bool,
}

/// The registers of one vCPU.
pub struct Registers(BTreeMap<RegisterId, Register>);

impl Registers {
    /// Those of vCPU `index` after reset. The registers of MTE exist only with `mte`.
    pub fn new(index: u32, mte: Option<MteFeatures>) -> Self {
        let features = mte.unwrap_or(MteFeatures::NONE);
        let tags = if mte.is_some() { CLIDR_UNIFIED_TAGS } else { 0 };
        let fixed = [
            (ID_AA64PFR0_EL1, ID_AA64PFR0),
            (RegisterId::ID_AA64PFR1_EL1, features.write_id_aa64pfr1(0)),
            (RegisterId::ID_AA64PFR2_EL1, features.write_id_aa64pfr2(0)),
            (RegisterId::ID_AA64MMFR0_EL1, ID_AA64MMFR0),
            (RegisterId::ID_AA64DFR0_EL1, ID_AA64DFR0),
            (CLIDR_EL1, CLIDR | tags),
        ];
        let general = (0..=30)
            .map(|number| (RegisterId::x(number), 0))
            .chain([
                (RegisterId::SP, 0),
                (RegisterId::PC, 0),
                (RegisterId::PSTATE, PSTATE_RESET),
                (RegisterId::MPIDR_EL1, affinity(index)),
            ])
            .chain(PLAIN.iter().map(|id| (*id, UNKNOWN)));
        let switched = mte
            .iter()
            .flat_map(|_| SWITCHED_REGISTERS)
            .map(|register| (RegisterId::from(register), UNKNOWN));
        let register = |fixed| move |(id, value)| (id, Register { value, fixed });
        Self(
            general
                .chain(switched)
                .map(register(false))
                .chain(fixed.into_iter().map(register(true)))
                .collect(),
        )
    }

    /// What there is.
    pub fn ids(&self) -> impl Iterator<Item = RegisterId> {
        self.0.keys().copied()
    }

    /// What a register holds. `NotFound` if there is none of this name.
    pub fn get(&self, id: RegisterId) -> io::Result<u64> {
        self.0
            .get(&id)
            .map(|register| register.value)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Writes a register. `NotFound`, or `InvalidInput` for a fact that the vCPU cannot change.
    pub fn set(&mut self, id: RegisterId, value: u64) -> io::Result<()> {
        let register = self.0.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
        if register.fixed && register.value != value {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        register.value = value;
        Ok(())
    }
}

/// `MPIDR_EL1` as KVM numbers vCPUs: sixteen in affinity level 0.
fn affinity(index: u32) -> u64 {
    let index = u64::from(index);
    1 << 31 | (index >> 12 & 0xff) << 16 | (index >> 4 & 0xff) << 8 | index & 0xf
}
