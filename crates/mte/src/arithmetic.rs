//! Addresses and tags, without a choice: the offsets of ADDG and SUBG, GMI and SUBP.
//!
//! The instructions that do choose a tag are in `random.rs`.

use crate::granule::GRANULE_SIZE;
use crate::tag::{Tag, TagSet};

/// The address offset of ADDG and SUBG: 0 to 63 granules, 0 to 1008 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct GranuleOffset(u8);

impl GranuleOffset {
    /// The offset of so many granules, if an instruction can hold it.
    pub const fn new(granules: u8) -> Option<Self> {
        if granules < 64 {
            Some(Self(granules))
        } else {
            None
        }
    }

    /// In granules.
    pub const fn granules(self) -> u8 {
        self.0
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0 as u64 * GRANULE_SIZE as u64
    }
}

/// The tag offset of ADDG and SUBG: how many tags to go on, 0 to 15. Excluded tags are skipped
/// without being counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TagOffset(u8);

impl TagOffset {
    /// This offset, if an instruction can hold it.
    pub const fn new(tags: u8) -> Option<Self> {
        if tags < 16 { Some(Self(tags)) } else { None }
    }

    /// The offset in bits 3:0.
    pub(crate) const fn from_low_bits(byte: u8) -> Self {
        Self(byte & 0xf)
    }

    /// In tags.
    pub const fn tags(self) -> u8 {
        self.0
    }
}

/// GMI, Tag mask insert: `mask`, a set of tags to exclude in bits 15:0 of a register, with the tag
/// of `address` added (Arm ARM C6.2.171).
pub const fn insert_into_mask(address: u64, mask: u64) -> u64 {
    mask | TagSet::EMPTY.with(Tag::of_address(address)).bits() as u64
}

/// SUBP, Subtract pointer: the bytes from `subtrahend` to `minuend`, whatever bits 63:56 of either
/// hold (Arm ARM C6.2.459).
pub const fn address_difference(minuend: u64, subtrahend: u64) -> u64 {
    sign_extend_address(minuend).wrapping_sub(sign_extend_address(subtrahend))
}

const fn sign_extend_address(address: u64) -> u64 {
    ((address << 8).cast_signed() >> 8).cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn offsets_beyond_the_immediates_do_not_exist() {
        assert_eq!(GranuleOffset::new(63).map(GranuleOffset::bytes), Some(1008));
        assert_eq!(GranuleOffset::new(64), None);
        assert_eq!(TagOffset::new(15).map(TagOffset::tags), Some(15));
        assert_eq!(TagOffset::new(16), None);
    }

    #[test]
    fn gmi_adds_the_tag_of_the_address_and_keeps_the_rest_of_the_register() {
        assert_eq!(
            insert_into_mask(0x0300_0000_0000_0000, 0xffff_0000_0000_0001),
            0xffff_0000_0000_0009
        );
    }

    #[test]
    fn upper_addresses_are_negative_to_subp() {
        assert_eq!(address_difference(0, 0x00ff_ffff_ffff_fff0), 16);
    }

    proptest! {
        #[test]
        fn subp_does_not_see_the_top_byte(address in 0u64..1 << 54, distance in 0u64..1 << 54, tops: (u8, u8)) {
            let minuend = (address + distance) | u64::from(tops.0) << 56;
            let subtrahend = address | u64::from(tops.1) << 56;
            prop_assert_eq!(address_difference(minuend, subtrahend), distance);
        }
    }
}
