//! What older registers have gained for MTE: the fields that turn it on, say which addresses are
//! checked, and what a fault does.
//!
//! Only the fields that concern MTE are here; the types keep the other bits. Arm ARM D24.2.62
//! (HCR_EL2), D24.2.175 (SCTLR_EL1), D24.2.194 (TCR_EL1), D24.2.45 (ESR_ELx). With `HCR_EL2.E2H`
//! set, SCTLR_EL2 and TCR_EL2 are laid out as their EL1 namesakes are here.

use crate::register::{register_value, with_bits};

/// `PSTATE.TCO`, as a bit of an SPSR: accesses are not checked while it is set. Taking an exception
/// sets it.
pub const PSTATE_TCO: u64 = 1 << 25;

/// The attribute byte of `MAIR_ELx` that makes memory tagged: Normal, Write-Back, Read- and
/// Write-Allocate, Tagged. At stage 1 no other does.
pub const MAIR_NORMAL_TAGGED: u8 = 0xf0;

/// One of the two ranges of virtual addresses at EL1 and EL0, told apart by bit 55. Each has a set
/// of controls and a fault bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VaRange {
    /// Translated by TTBR0; controls and bits whose names end in 0.
    Lower,
    /// Translated by TTBR1; controls and bits whose names end in 1.
    Upper,
}

impl VaRange {
    /// The range of an address.
    pub const fn of_address(address: u64) -> Self {
        if address >> 55 & 1 == 0 {
            Self::Lower
        } else {
            Self::Upper
        }
    }
}

/// What a tag check fault does: `SCTLR_ELx.TCF` and `TCF0`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TagCheckFaultMode {
    /// Nothing.
    #[default]
    Ignored,
    /// A synchronous exception; the access does not happen.
    Synchronous,
    /// A bit in a TFSR; the access happens. Needs `FEAT_MTE_ASYNC`.
    Asynchronous,
    /// Synchronous for reads, asynchronous for writes. Needs MTE3.
    Asymmetric,
}

impl TagCheckFaultMode {
    const fn from_field(field: u64) -> Self {
        match field & 0b11 {
            0b00 => Self::Ignored,
            0b01 => Self::Synchronous,
            0b10 => Self::Asynchronous,
            _ => Self::Asymmetric,
        }
    }

    const fn field(self) -> u64 {
        match self {
            Self::Ignored => 0b00,
            Self::Synchronous => 0b01,
            Self::Asynchronous => 0b10,
            Self::Asymmetric => 0b11,
        }
    }
}

/// Defines a getter and a `with_` setter for a bit of a register value.
macro_rules! bit {
    ($(#[$doc:meta])* $bit:literal, $get:ident, $with:ident) => {
        $(#[$doc])*
        pub const fn $get(self) -> bool {
            self.0 >> $bit & 1 == 1
        }

        #[doc = concat!("With [`", stringify!($get), "`](Self::", stringify!($get), ") so.")]
        #[must_use]
        pub const fn $with(self, set: bool) -> Self {
            Self(with_bits(self.0, 1 << $bit, set))
        }
    };
}

register_value! {
    /// `SCTLR_EL1`, System Control Register: whether tags are used at EL1 and EL0, and what a fault
    /// does.
    SctlrEl1
}

impl SctlrEl1 {
    const TCF_SHIFT: u32 = 40;
    const TCF0_SHIFT: u32 = 38;

    bit!(
        /// `ATA`: tags are used at EL1.
        43, ata, with_ata
    );
    bit!(
        /// `ATA0`: tags are used at EL0.
        42, ata0, with_ata0
    );
    bit!(
        /// `ITFSB`: asynchronous faults are in their TFSR when an exception has been taken to EL1.
        37, itfsb, with_itfsb
    );
    bit!(
        /// `TCSO`: at EL1 only writes are checked.
        59, tcso, with_tcso
    );
    bit!(
        /// `TCSO0`: at EL0 only writes are checked.
        58, tcso0, with_tcso0
    );

    /// `TCF`: what a fault at EL1 does.
    pub const fn tcf(self) -> TagCheckFaultMode {
        TagCheckFaultMode::from_field(self.0 >> Self::TCF_SHIFT)
    }

    /// With this `TCF`.
    #[must_use]
    pub const fn with_tcf(self, mode: TagCheckFaultMode) -> Self {
        Self(self.0 & !(0b11 << Self::TCF_SHIFT) | mode.field() << Self::TCF_SHIFT)
    }

    /// `TCF0`: what a fault at EL0 does.
    pub const fn tcf0(self) -> TagCheckFaultMode {
        TagCheckFaultMode::from_field(self.0 >> Self::TCF0_SHIFT)
    }

    /// With this `TCF0`.
    #[must_use]
    pub const fn with_tcf0(self, mode: TagCheckFaultMode) -> Self {
        Self(self.0 & !(0b11 << Self::TCF0_SHIFT) | mode.field() << Self::TCF0_SHIFT)
    }
}

register_value! {
    /// `TCR_EL1`, Translation Control Register: which addresses carry a tag, and which of them are
    /// not checked.
    TcrEl1
}

impl TcrEl1 {
    bit!(
        /// `TBI0`: the top byte of a lower address is ignored by translation, so it can hold a tag.
        37, tbi0, with_tbi0
    );
    bit!(
        /// `TBI1`: the same for an upper address.
        38, tbi1, with_tbi1
    );
    bit!(
        /// `TCMA0`: a lower address with tag 0 is not checked.
        57, tcma0, with_tcma0
    );
    bit!(
        /// `TCMA1`: an upper address with tag 15 is not checked.
        58, tcma1, with_tcma1
    );
    bit!(
        /// `MTX0`: bits 59:56 of a lower address hold a tag whatever `TBI0` says, and untagged
        /// memory is checked canonically.
        60, mtx0, with_mtx0
    );
    bit!(
        /// `MTX1`: the same for an upper address.
        61, mtx1, with_mtx1
    );

    /// `TBI0` or `TBI1`.
    pub const fn tbi(self, range: VaRange) -> bool {
        match range {
            VaRange::Lower => self.tbi0(),
            VaRange::Upper => self.tbi1(),
        }
    }

    /// `TCMA0` or `TCMA1`.
    pub const fn tcma(self, range: VaRange) -> bool {
        match range {
            VaRange::Lower => self.tcma0(),
            VaRange::Upper => self.tcma1(),
        }
    }

    /// `MTX0` or `MTX1`.
    pub const fn mtx(self, range: VaRange) -> bool {
        match range {
            VaRange::Lower => self.mtx0(),
            VaRange::Upper => self.mtx1(),
        }
    }
}

register_value! {
    /// `HCR_EL2`, Hypervisor Configuration Register: what a hypervisor lets its guest have of MTE.
    HcrEl2
}

impl HcrEl2 {
    bit!(
        /// `ATA`: tags are used at EL1 and EL0. If clear, the registers of
        /// [`SWITCHED_REGISTERS`](crate::SWITCHED_REGISTERS) trap, tags are read as 0, tag stores
        /// do nothing, and nothing is checked.
        56, ata, with_ata
    );
    bit!(
        /// `DCT`: with `HCR_EL2.DC`, memory is tagged while the guest's stage 1 is off.
        57, dct, with_dct
    );
    bit!(
        /// `TID5`: reads of `GMID_EL1` trap.
        58, tid5, with_tid5
    );
}

/// The syndrome of a synchronous tag check fault: a Data Abort whose `DFSC` is 0b010001.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TagCheckFaultSyndrome {
    /// The exception was taken from a lower exception level.
    pub from_lower_level: bool,
    /// The access was a write, and not a read or both.
    pub write: bool,
}

impl TagCheckFaultSyndrome {
    const EC_SHIFT: u32 = 26;
    const EC_DATA_ABORT_LOWER: u64 = 0x24;
    const EC_DATA_ABORT_SAME: u64 = 0x25;
    const IL: u64 = 1 << 25;
    const WNR: u64 = 1 << 6;
    const DFSC: u64 = 0x3f;
    const DFSC_TAG_CHECK: u64 = 0b01_0001;

    /// What `ESR_ELx` says, if it says that there was a synchronous tag check fault.
    pub const fn from_esr(esr: u64) -> Option<Self> {
        let from_lower_level = match esr >> Self::EC_SHIFT & 0x3f {
            Self::EC_DATA_ABORT_LOWER => true,
            Self::EC_DATA_ABORT_SAME => false,
            _ => return None,
        };
        if esr & Self::DFSC != Self::DFSC_TAG_CHECK {
            return None;
        }
        Some(Self {
            from_lower_level,
            write: esr & Self::WNR != 0,
        })
    }

    /// `ESR_ELx` for this fault.
    pub const fn to_esr(self) -> u64 {
        let class = if self.from_lower_level {
            Self::EC_DATA_ABORT_LOWER
        } else {
            Self::EC_DATA_ABORT_SAME
        };
        with_bits(
            class << Self::EC_SHIFT | Self::IL | Self::DFSC_TAG_CHECK,
            Self::WNR,
            self.write,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_range_of_addresses_is_known_by_bit_55() {
        assert_eq!(VaRange::of_address(0xff7f_ffff_ffff_ffff), VaRange::Lower);
        assert_eq!(VaRange::of_address(0x0080_0000_0000_0000), VaRange::Upper);
    }

    #[test]
    fn sctlr_fields_are_where_the_architecture_has_them() {
        let zero = SctlrEl1::default();
        assert_eq!(zero.with_ata(true).bits(), 1 << 43);
        assert_eq!(zero.with_ata0(true).bits(), 1 << 42);
        assert_eq!(zero.with_tcf(TagCheckFaultMode::Asymmetric).bits(), 3 << 40);
        assert_eq!(
            zero.with_tcf0(TagCheckFaultMode::Asymmetric).bits(),
            3 << 38
        );
        assert_eq!(zero.with_itfsb(true).bits(), 1 << 37);
        assert_eq!(zero.with_tcso(true).bits(), 1 << 59);
        assert_eq!(zero.with_tcso0(true).bits(), 1 << 58);
    }

    #[test]
    fn every_fault_mode_is_read_back() {
        let modes = [
            TagCheckFaultMode::Ignored,
            TagCheckFaultMode::Synchronous,
            TagCheckFaultMode::Asynchronous,
            TagCheckFaultMode::Asymmetric,
        ];
        for mode in modes {
            let ones = SctlrEl1::from_bits(u64::MAX);
            assert_eq!(ones.with_tcf(mode).tcf(), mode);
            assert_eq!(ones.with_tcf0(mode).tcf0(), mode);
        }
    }

    #[test]
    fn tcr_fields_belong_to_their_range() {
        let zero = TcrEl1::default();
        assert_eq!(zero.with_tbi0(true).bits(), 1 << 37);
        assert_eq!(zero.with_tbi1(true).bits(), 1 << 38);
        assert_eq!(zero.with_tcma0(true).bits(), 1 << 57);
        assert_eq!(zero.with_tcma1(true).bits(), 1 << 58);
        assert_eq!(zero.with_mtx0(true).bits(), 1 << 60);
        assert_eq!(zero.with_mtx1(true).bits(), 1 << 61);
        assert!(zero.with_tcma1(true).tcma(VaRange::Upper));
        assert!(!zero.with_tcma1(true).tcma(VaRange::Lower));
    }

    #[test]
    fn hcr_fields_are_where_the_architecture_has_them() {
        let zero = HcrEl2::default();
        assert_eq!(zero.with_ata(true).bits(), 1 << 56);
        assert_eq!(zero.with_dct(true).bits(), 1 << 57);
        assert_eq!(zero.with_tid5(true).bits(), 1 << 58);
    }

    #[test]
    fn a_tag_check_fault_is_known_by_class_and_status() {
        let read = TagCheckFaultSyndrome {
            from_lower_level: true,
            write: false,
        };
        let write = TagCheckFaultSyndrome {
            from_lower_level: false,
            write: true,
        };
        assert_eq!(read.to_esr(), 0x9200_0011);
        assert_eq!(write.to_esr(), 0x9600_0051);
        assert_eq!(TagCheckFaultSyndrome::from_esr(0x9200_0011), Some(read));
        assert_eq!(TagCheckFaultSyndrome::from_esr(0x9600_0051), Some(write));
    }

    #[test]
    fn another_abort_is_no_tag_check_fault() {
        let translation_fault = 0x9200_0007;
        let instruction_abort = 0x8200_0011;
        assert_eq!(TagCheckFaultSyndrome::from_esr(translation_fault), None);
        assert_eq!(TagCheckFaultSyndrome::from_esr(instruction_abort), None);
    }
}
