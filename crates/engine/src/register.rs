//! Names of a vCPU's registers.
//!
//! A register is named as KVM names it (`Documentation/virt/kvm/api.rst`, `KVM_SET_ONE_REG`): 64
//! bits that hold the architecture, the size, the class and, for a system register, its encoding.
//! The naming is stable ABI and says enough for another engine to understand it, so saved state uses it as it is.

use std::fmt;

use mte::SystemRegister;
use serde::{Deserialize, Serialize};

/// The registers of a vCPU, in the order in which the host names them.
pub type RegisterList = Vec<RegisterId>;

/// The name of one register.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RegisterId(u64);

const ARM64: u64 = 0x6000_0000_0000_0000;
const SIZE_SHIFT: u32 = 52;
const SIZE_MASK: u64 = 0x00f0_0000_0000_0000;
const SIZE_U64: u64 = 3 << SIZE_SHIFT;
const CLASS_SHIFT: u32 = 16;
const CLASS_MASK: u64 = 0x0fff_0000;
const CLASS_CORE: u64 = 0x10;
const CLASS_SYSTEM: u64 = 0x13;

impl RegisterId {
    /// The register that KVM names `id`.
    pub const fn from_kvm(id: u64) -> Self {
        Self(id)
    }

    /// Its name in KVM.
    pub const fn to_kvm(self) -> u64 {
        self.0
    }

    /// A system register by its encoding (Arm ARM C5.1.2), as in `MRS Xt, S<op0>_<op1>_<Cn>_<Cm>_<op2>`.
    pub const fn system(op0: u8, op1: u8, crn: u8, crm: u8, op2: u8) -> Self {
        assert!(op0 < 4 && op1 < 8 && crn < 16 && crm < 16 && op2 < 8);
        Self(
            ARM64
                | SIZE_U64
                | CLASS_SYSTEM << CLASS_SHIFT
                | (op0 as u64) << 14
                | (op1 as u64) << 11
                | (crn as u64) << 7
                | (crm as u64) << 3
                | op2 as u64,
        )
    }

    /// General-purpose register `number`, 0 to 30.
    pub const fn x(number: u8) -> Self {
        assert!(number <= 30);
        Self::core(number as u64 * 2)
    }

    /// The 64-bit register at `offset` 32-bit words into `struct kvm_regs`.
    const fn core(offset: u64) -> Self {
        Self(ARM64 | SIZE_U64 | CLASS_CORE << CLASS_SHIFT | offset)
    }

    /// `SP_EL0`.
    pub const SP: Self = Self::core(31 * 2);
    /// The program counter.
    pub const PC: Self = Self::core(32 * 2);
    /// `PSTATE`, laid out as in SPSR.
    pub const PSTATE: Self = Self::core(33 * 2);
    /// `SP_EL1`.
    pub const SP_EL1: Self = Self::core(34 * 2);
    /// `ELR_EL1`.
    pub const ELR_EL1: Self = Self::core(35 * 2);
    /// `SPSR_EL1`.
    pub const SPSR_EL1: Self = Self::core(36 * 2);
    /// `MIDR_EL1`, which says who made the CPU.
    pub const MIDR_EL1: Self = Self::system(3, 0, 0, 0, 0);
    /// `MPIDR_EL1`.
    pub const MPIDR_EL1: Self = Self::system(3, 0, 0, 0, 5);
    /// `ID_AA64PFR1_EL1`, in which a guest finds its MTE level.
    pub const ID_AA64PFR1_EL1: Self = Self::system(3, 0, 0, 4, 1);
    /// `ID_AA64ISAR2_EL1`, in which a guest finds whether its CPU can wait with a time limit.
    pub const ID_AA64ISAR2_EL1: Self = Self::system(3, 0, 0, 6, 2);
    /// `ID_AA64MMFR0_EL1`, which names the page sizes that the CPU has.
    pub const ID_AA64MMFR0_EL1: Self = Self::system(3, 0, 0, 7, 0);
    /// `ID_AA64DFR0_EL1`, which says how many breakpoints and watchpoints the CPU has.
    pub const ID_AA64DFR0_EL1: Self = Self::system(3, 0, 0, 5, 0);
    /// `ID_AA64PFR2_EL1`.
    pub const ID_AA64PFR2_EL1: Self = Self::system(3, 0, 0, 4, 2);

    /// Its size in bytes.
    pub const fn size(self) -> usize {
        1 << ((self.0 & SIZE_MASK) >> SIZE_SHIFT)
    }

    /// Op0, Op1, CRn, CRm, Op2 if it is a system register.
    pub const fn encoding(self) -> Option<(u8, u8, u8, u8, u8)> {
        if (self.0 & CLASS_MASK) >> CLASS_SHIFT != CLASS_SYSTEM {
            return None;
        }
        Some((
            (self.0 >> 14 & 3) as u8,
            (self.0 >> 11 & 7) as u8,
            (self.0 >> 7 & 15) as u8,
            (self.0 >> 3 & 15) as u8,
            (self.0 & 7) as u8,
        ))
    }
}

impl From<SystemRegister> for RegisterId {
    fn from(register: SystemRegister) -> Self {
        let SystemRegister {
            op0,
            op1,
            crn,
            crm,
            op2,
        } = register;
        Self::system(op0, op1, crn, crm, op2)
    }
}

impl fmt::Display for RegisterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.encoding() {
            Some((op0, op1, crn, crm, op2)) => write!(f, "S{op0}_{op1}_C{crn}_C{crm}_{op2}"),
            None if *self == Self::PC => f.write_str("PC"),
            None if *self == Self::PSTATE => f.write_str("PSTATE"),
            None if *self == Self::SP => f.write_str("SP_EL0"),
            None => write!(f, "{:#018x}", self.0),
        }
    }
}

impl fmt::Debug for RegisterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegisterId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_register_has_the_name_that_kvm_gives_it() {
        // ARM64_SYS_REG(3, 0, 1, 0, 6), GCR_EL1, as the kernel's macro computes it.
        assert_eq!(
            RegisterId::system(3, 0, 1, 0, 6).to_kvm(),
            0x6030_0000_0013_c086
        );
        assert_eq!(
            RegisterId::system(3, 0, 1, 0, 6).to_string(),
            "S3_0_C1_C0_6"
        );
    }

    #[test]
    fn core_registers_have_the_names_that_kvm_gives_them() {
        assert_eq!(RegisterId::x(0).to_kvm(), 0x6030_0000_0010_0000);
        assert_eq!(RegisterId::PC.to_kvm(), 0x6030_0000_0010_0040);
        assert_eq!(RegisterId::PSTATE.to_kvm(), 0x6030_0000_0010_0042);
        assert_eq!(RegisterId::SPSR_EL1.to_kvm(), 0x6030_0000_0010_0048);
    }

    #[test]
    fn the_size_is_read_from_the_name() {
        assert_eq!(RegisterId::PC.size(), 8);
        assert_eq!(RegisterId::from_kvm(0x6040_0000_0010_0054).size(), 16);
    }
}
