//! The packed tags of a 4 KiB page.
//!
//! 4 KiB is the unit in which tags are stored and sent, whatever the host's page size: a page of 16
//! or 64 KiB has 4 or 16 [`TagPage`]s in a row. The layout is the one of `LDGM`/`STGM` and of the
//! `PT_AARCH64_MEMTAG_MTE` segments of Linux cores.

use core::fmt;

use crate::granule::{GRANULE_SIZE, PageSize, TAGS_PER_BYTE};
use crate::tag::Tag;

const PACKED_BYTES: usize = PageSize::Kib4.packed_bytes();
const GRANULES: usize = PageSize::Kib4.granules();

/// The 256 tags of a 4 KiB page in 128 bytes: granule 2*n* in bits 3:0 of byte *n*, granule 2*n* +
/// 1 in bits 7:4.
///
/// A granule is named by its index in the page, which is exactly a `u8`. The alignment lets the
/// tags be moved as 64-bit words where alignment is checked.
#[derive(Clone, PartialEq, Eq, Hash)]
#[repr(C, align(8))]
pub struct TagPage([u8; PACKED_BYTES]);

impl TagPage {
    /// A page with no tag but 0.
    pub const ZERO: Self = Self::filled(Tag::ZERO);

    /// A page whose granules all have this tag.
    pub const fn filled(tag: Tag) -> Self {
        Self([tag.value() * 0x11; PACKED_BYTES])
    }

    /// A page of packed tags. Every pattern of bits is one.
    pub const fn from_packed(packed: [u8; PACKED_BYTES]) -> Self {
        Self(packed)
    }

    /// The packed tags.
    pub const fn as_packed(&self) -> &[u8; PACKED_BYTES] {
        &self.0
    }

    /// The packed tags, to be overwritten.
    pub const fn as_packed_mut(&mut self) -> &mut [u8; PACKED_BYTES] {
        &mut self.0
    }

    /// A page of tags given as one byte a tag, the format of `KVM_ARM_MTE_COPY_TAGS` and
    /// `PTRACE_PEEKMTETAGS`. Only bits 3:0 of a byte count, as in the kernel.
    pub fn pack(tags: &[u8; GRANULES]) -> Self {
        let (pairs, _) = tags.as_chunks::<TAGS_PER_BYTE>();
        let mut packed = [0; PACKED_BYTES];
        for (byte, [low, high]) in packed.iter_mut().zip(pairs) {
            *byte = low & 0xf | high << 4;
        }
        Self(packed)
    }

    /// Its tags as one byte a tag, bits 7:4 of each zero.
    pub fn unpack(&self) -> [u8; GRANULES] {
        let mut tags = [0; GRANULES];
        let (pairs, _) = tags.as_chunks_mut::<TAGS_PER_BYTE>();
        for ([low, high], byte) in pairs.iter_mut().zip(&self.0) {
            *low = byte & 0xf;
            *high = byte >> 4;
        }
        tags
    }

    /// The index in its page of the granule that holds `address`. A logical tag in the address does
    /// not matter.
    pub const fn index_of(address: u64) -> u8 {
        (address / GRANULE_SIZE as u64) as u8
    }

    /// The tag of a granule.
    pub const fn get(&self, granule: u8) -> Tag {
        Tag::from_low_bits(self.0[granule as usize / TAGS_PER_BYTE] >> Self::nibble_shift(granule))
    }

    /// Gives a granule a tag.
    pub const fn set(&mut self, granule: u8, tag: Tag) {
        let shift = Self::nibble_shift(granule);
        let byte = &mut self.0[granule as usize / TAGS_PER_BYTE];
        *byte = *byte & !(0xf << shift) | tag.value() << shift;
    }

    /// Gives every granule this tag.
    pub const fn fill(&mut self, tag: Tag) {
        *self = Self::filled(tag);
    }

    /// Whether no granule has a tag but 0. Most pages are so, and are asked first of all: it looks at words, not at bytes.
    #[inline]
    pub fn is_untagged(&self) -> bool {
        let (words, _) = self.0.as_chunks();
        let any = words
            .iter()
            .fold(0, |any, word| any | u128::from_ne_bytes(*word));
        any == 0
    }

    /// The tag that all granules have, if they all have the same.
    pub fn uniform(&self) -> Option<Tag> {
        let tag = self.get(0);
        (*self == Self::filled(tag)).then_some(tag)
    }

    /// The tags, the lowest address first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Tag> {
        (0..=u8::MAX).map(|granule| self.get(granule))
    }

    const fn nibble_shift(granule: u8) -> u32 {
        (granule as u32 & 1) * 4
    }
}

impl Default for TagPage {
    fn default() -> Self {
        Self::ZERO
    }
}

/// One hexadecimal digit a tag, the lowest address first.
impl fmt::Debug for TagPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TagPage(")?;
        self.iter().try_for_each(|tag| write!(f, "{tag}"))?;
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use proptest::prelude::*;
    use std::format;

    fn any_page() -> impl Strategy<Value = TagPage> {
        any::<[u8; PACKED_BYTES]>().prop_map(TagPage::from_packed)
    }

    #[test]
    fn the_lower_address_is_in_the_lower_nibble() {
        let mut page = TagPage::ZERO;
        page.set(0, Tag::from_low_bits(1));
        page.set(1, Tag::from_low_bits(2));
        page.set(255, Tag::from_low_bits(0xc));
        assert_eq!(page.as_packed()[0], 0x21);
        assert_eq!(page.as_packed()[127], 0xc0);
    }

    #[test]
    fn an_address_finds_its_granule_whatever_its_tag() {
        assert_eq!(TagPage::index_of(0x0500_0000_4000_0000), 0);
        assert_eq!(TagPage::index_of(0x4000_0fff), 255);
        assert_eq!(TagPage::index_of(0x4000_1010), 1);
    }

    #[test]
    fn a_filled_page_is_uniform() {
        for tag in Tag::all() {
            assert_eq!(TagPage::filled(tag).uniform(), Some(tag));
            assert_eq!(TagPage::filled(tag).is_untagged(), tag == Tag::ZERO);
        }
    }

    #[test]
    fn debug_shows_a_digit_a_tag() {
        let shown = format!("{:?}", TagPage::filled(Tag::from_low_bits(0xb)));
        assert_eq!(shown, format!("TagPage({})", "b".repeat(256)));
    }

    proptest! {
        #[test]
        fn setting_a_tag_changes_that_tag_and_no_other(before in any_page(), granule: u8, value in 0u8..16) {
            let mut after = before.clone();
            after.set(granule, Tag::from_low_bits(value));
            prop_assert_eq!(after.get(granule).value(), value);
            for other in (0..=u8::MAX).filter(|other| *other != granule) {
                prop_assert_eq!(after.get(other), before.get(other));
            }
        }

        #[test]
        fn one_tag_makes_a_page_not_untagged(granule: u8, value in 1u8..16) {
            let mut page = TagPage::ZERO;
            page.set(granule, Tag::from_low_bits(value));
            prop_assert!(!page.is_untagged());
        }

        #[test]
        fn one_different_tag_makes_a_page_not_uniform(granule: u8, value in 0u8..16, flip in 1u8..16) {
            let mut page = TagPage::filled(Tag::from_low_bits(value));
            page.set(granule, Tag::from_low_bits(value ^ flip));
            prop_assert_eq!(page.uniform(), None);
        }

        #[test]
        fn unpacked_tags_are_those_of_the_granules_and_pack_to_the_same_page(page in any_page()) {
            let unpacked = page.unpack();
            prop_assert!(unpacked.iter().copied().eq(page.iter().map(Tag::value)));
            prop_assert_eq!(TagPage::pack(&unpacked), page);
        }

        #[test]
        fn the_upper_bits_of_an_unpacked_tag_do_not_count(page in any_page(), noise in 0u8..16) {
            let noisy = page.unpack().map(|tag| tag | noise << 4);
            prop_assert_eq!(TagPage::pack(&noisy), page);
        }
    }
}
