//! The system registers that MTE adds.
//!
//! Four of them are state of a vCPU and are switched with it ([`SWITCHED_REGISTERS`]). Each type
//! keeps all 64 bits of its register, the reserved ones too: what was saved is what is restored.
//! Arm ARM D24.2.53, D24.2.54, D24.2.157, D24.2.199 to D24.2.202.

use core::fmt;

use crate::control::VaRange;
use crate::tag::{Tag, TagSet};

/// The encoding of a system register, the operands of `MRS Xt, S<op0>_<op1>_<CRn>_<CRm>_<op2>` (Arm
/// ARM C5.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SystemRegister {
    /// 2 or 3.
    pub op0: u8,
    /// 0 to 7.
    pub op1: u8,
    /// 0 to 15.
    pub crn: u8,
    /// 0 to 15.
    pub crm: u8,
    /// 0 to 7.
    pub op2: u8,
}

impl SystemRegister {
    /// The seed and the last tag of IRG.
    pub const RGSR_EL1: Self = Self::new(3, 0, 1, 0, 5);
    /// What IRG, ADDG and SUBG may choose.
    pub const GCR_EL1: Self = Self::new(3, 0, 1, 0, 6);
    /// Asynchronous tag check faults at EL1.
    pub const TFSR_EL1: Self = Self::new(3, 0, 5, 6, 0);
    /// Asynchronous tag check faults at EL0.
    pub const TFSRE0_EL1: Self = Self::new(3, 0, 5, 6, 1);
    /// Asynchronous tag check faults at EL2.
    pub const TFSR_EL2: Self = Self::new(3, 4, 5, 6, 0);
    /// `TFSR_EL1` as a VHE hypervisor names it.
    pub const TFSR_EL12: Self = Self::new(3, 5, 5, 6, 0);
    /// The block size of LDGM and STGM.
    pub const GMID_EL1: Self = Self::new(3, 1, 0, 0, 4);
    /// The MTE level and some of its options.
    pub const ID_AA64PFR1_EL1: Self = Self::new(3, 0, 0, 4, 1);
    /// The other options.
    pub const ID_AA64PFR2_EL1: Self = Self::new(3, 0, 0, 4, 2);

    const fn new(op0: u8, op1: u8, crn: u8, crm: u8, op2: u8) -> Self {
        Self {
            op0,
            op1,
            crn,
            crm,
            op2,
        }
    }

    /// The five fields as bits 15:0 of one number, op0 the highest: the low half of the register's
    /// identifier in KVM (`ARM64_SYS_REG`).
    pub const fn packed(self) -> u16 {
        (self.op0 as u16) << 14
            | (self.op1 as u16) << 11
            | (self.crn as u16) << 7
            | (self.crm as u16) << 3
            | self.op2 as u16
    }
}

impl fmt::Display for SystemRegister {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            op0,
            op1,
            crn,
            crm,
            op2,
        } = self;
        write!(f, "S{op0}_{op1}_C{crn}_C{crm}_{op2}")
    }
}

/// The registers that belong to a vCPU with MTE: switched with it, saved and restored (seeds 000
/// and 004).
pub const SWITCHED_REGISTERS: [SystemRegister; 4] = [
    SystemRegister::RGSR_EL1,
    SystemRegister::GCR_EL1,
    SystemRegister::TFSR_EL1,
    SystemRegister::TFSRE0_EL1,
];

/// Defines a type for the value of a 64-bit register that keeps every bit.
macro_rules! register_value {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The register with this value.
            pub const fn from_bits(bits: u64) -> Self {
                Self(bits)
            }

            /// Its value.
            pub const fn bits(self) -> u64 {
                self.0
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}
pub(crate) use register_value;

/// `register` with the bits of `mask` all set or all clear.
pub(crate) const fn with_bits(register: u64, mask: u64, set: bool) -> u64 {
    if set {
        register | mask
    } else {
        register & !mask
    }
}

register_value! {
    /// `GCR_EL1`, Tag Control Register: how tags are chosen.
    GcrEl1
}

impl GcrEl1 {
    const RRND: u64 = 1 << 16;
    const EXCLUDE: u64 = 0xffff;

    /// May IRG choose tags by a method of the implementation's own? If not, RGSR_EL1 decides them.
    pub const fn rrnd(self) -> bool {
        self.0 & Self::RRND != 0
    }

    /// With `RRND`.
    #[must_use]
    pub const fn with_rrnd(self, rrnd: bool) -> Self {
        Self(with_bits(self.0, Self::RRND, rrnd))
    }

    /// The tags that IRG, ADDG and SUBG do not choose.
    pub const fn exclude(self) -> TagSet {
        TagSet::from_register(self.0)
    }

    /// With these tags excluded.
    #[must_use]
    pub const fn with_exclude(self, exclude: TagSet) -> Self {
        Self(self.0 & !Self::EXCLUDE | exclude.bits() as u64)
    }
}

register_value! {
    /// `RGSR_EL1`, Random Allocation Tag Seed Register: the state of IRG.
    ///
    /// The fields mean something while `GCR_EL1.RRND` is 0. While it is 1, bits 55:8 are the
    /// implementation's own.
    RgsrEl1
}

impl RgsrEl1 {
    const SEED_SHIFT: u32 = 8;
    const SEED: u64 = 0xffff << Self::SEED_SHIFT;
    const TAG: u64 = 0xf;

    /// The state of the shift register. From 0 it never changes, so IRG then returns the same tag
    /// for ever.
    pub const fn seed(self) -> u16 {
        (self.0 >> Self::SEED_SHIFT) as u16
    }

    /// With this seed.
    #[must_use]
    pub const fn with_seed(self, seed: u16) -> Self {
        Self(self.0 & !Self::SEED | (seed as u64) << Self::SEED_SHIFT)
    }

    /// The tag that IRG chose last.
    pub const fn tag(self) -> Tag {
        Tag::from_low_bits(self.0 as u8)
    }

    /// With this as the last tag.
    #[must_use]
    pub const fn with_tag(self, tag: Tag) -> Self {
        Self(self.0 & !Self::TAG | tag.value() as u64)
    }
}

register_value! {
    /// `TFSR_EL1`, `TFSR_EL2` and `TFSRE0_EL1`, Tag Fault Status Registers: the asynchronous tag
    /// check faults so far at one exception level.
    Tfsr
}

impl Tfsr {
    const fn bit(range: VaRange) -> u64 {
        match range {
            VaRange::Lower => 1 << 0,
            VaRange::Upper => 1 << 1,
        }
    }

    /// Was there a fault in this range of addresses? TF0 for the lower, TF1 for the upper.
    pub const fn faulted(self, range: VaRange) -> bool {
        self.0 & Self::bit(range) != 0
    }

    /// With a fault in this range (Arm ARM, `AArch64.ReportTagCheckFault`).
    #[must_use]
    pub const fn with_fault(self, range: VaRange) -> Self {
        Self(self.0 | Self::bit(range))
    }
}

register_value! {
    /// `GMID_EL1`, Multiple tag transfer ID Register.
    GmidEl1
}

impl GmidEl1 {
    /// Bytes of memory whose tags one LDGM or STGM moves, 16 to 256. `None` for a value that the
    /// architecture does not allow.
    pub const fn block_bytes(self) -> Option<usize> {
        match self.0 & 0xf {
            words_log2 @ 2..=6 => Some(4 << words_log2),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn the_switched_registers_have_the_encodings_of_the_architecture() {
        let names = SWITCHED_REGISTERS.map(|register| register.to_string());
        assert_eq!(
            names,
            [
                "S3_0_C1_C0_5",
                "S3_0_C1_C0_6",
                "S3_0_C5_C6_0",
                "S3_0_C5_C6_1"
            ]
        );
    }

    #[test]
    fn a_packed_encoding_is_the_low_half_of_kvms_identifier() {
        assert_eq!(SystemRegister::GCR_EL1.packed(), 0xc086);
        assert_eq!(SystemRegister::ID_AA64PFR1_EL1.packed(), 0xc021);
    }

    #[test]
    fn gcr_has_rrnd_above_the_excluded_tags() {
        let gcr = GcrEl1::default()
            .with_rrnd(true)
            .with_exclude(TagSet::from_bits(0x8001));
        assert_eq!(gcr.bits(), 0x1_8001);
        assert_eq!(gcr.with_rrnd(false).bits(), 0x8001);
    }

    #[test]
    fn rgsr_has_the_seed_in_bits_23_to_8_and_the_tag_in_bits_3_to_0() {
        let rgsr = RgsrEl1::default()
            .with_seed(0xabcd)
            .with_tag(Tag::from_low_bits(7));
        assert_eq!(rgsr.bits(), 0x00ab_cd07);
    }

    #[test]
    fn a_fault_in_one_range_is_not_one_in_the_other() {
        let lower = Tfsr::default().with_fault(VaRange::Lower);
        let upper = Tfsr::default().with_fault(VaRange::Upper);
        assert_eq!((lower.bits(), upper.bits()), (1, 2));
        assert!(lower.faulted(VaRange::Lower) && !lower.faulted(VaRange::Upper));
    }

    #[test]
    fn gmid_gives_16_to_256_bytes() {
        let sizes = [1, 2, 3, 4, 5, 6, 7].map(|bs| GmidEl1::from_bits(bs).block_bytes());
        assert_eq!(
            sizes,
            [
                None,
                Some(16),
                Some(32),
                Some(64),
                Some(128),
                Some(256),
                None
            ]
        );
    }

    proptest! {
        #[test]
        fn writing_a_field_keeps_all_other_bits(bits: u64, seed: u16, exclude: u16, value in 0u8..16) {
            let rgsr = RgsrEl1::from_bits(bits).with_seed(seed).with_tag(Tag::from_low_bits(value));
            prop_assert_eq!((rgsr.bits() ^ bits) & !0x00ff_ff0f, 0);
            prop_assert_eq!((rgsr.seed(), rgsr.tag().value()), (seed, value));
            let gcr = GcrEl1::from_bits(bits).with_exclude(TagSet::from_bits(exclude));
            prop_assert_eq!((gcr.bits() ^ bits) & !0xffff, 0);
            prop_assert_eq!(gcr.exclude().bits(), exclude);
        }
    }
}
