//! How a tag is chosen: IRG, ADDG and SUBG.
//!
//! [`choose_non_excluded`] counts on from a tag and skips those that are excluded. ADDG and SUBG
//! count as far as their immediate says, IRG as far as four bits of a 16-bit linear-feedback shift
//! register say, whose state is in `RGSR_EL1`. A [`TagGenerator`] is the part of a processor that
//! does it. Arm ARM J1.1.3, `AArch64.ChooseNonExcludedTag`, `AArch64.RandomTag`,
//! `AArch64.NextRandomTagBit`.

use crate::arithmetic::{GranuleOffset, TagOffset};
use crate::register::{GcrEl1, RgsrEl1};
use crate::tag::{Tag, TagSet};

/// The tag `offset` tags after `tag`, where excluded tags are not counted; tag 0 if all are
/// excluded.
///
/// An offset of 0 leads to `tag` itself or, if it is excluded, to the next one that is not.
pub fn choose_non_excluded(tag: Tag, offset: TagOffset, exclude: TagSet) -> Tag {
    if exclude == TagSet::ALL {
        return Tag::ZERO;
    }
    if offset.tags() == 0 {
        return first_allowed(tag, exclude);
    }
    (0..offset.tags()).fold(tag, |tag, _| first_allowed(tag.successor(), exclude))
}

/// `tag`, or the first after it that is not excluded. Some tag must not be.
fn first_allowed(mut tag: Tag, exclude: TagSet) -> Tag {
    while exclude.contains(tag) {
        tag = tag.successor();
    }
    tag
}

impl RgsrEl1 {
    /// Shifts the seed by one bit and returns the bit that came in.
    fn next_random_tag_bit(&mut self) -> u16 {
        let lfsr = self.seed();
        let top = (lfsr >> 5 ^ lfsr >> 3 ^ lfsr >> 2 ^ lfsr) & 1;
        *self = self.with_seed(top << 15 | lfsr >> 1);
        top
    }

    /// Four new bits, the first the lowest.
    fn random_tag_offset(&mut self) -> TagOffset {
        let bits = (0..4).fold(0, |bits, position| {
            bits | self.next_random_tag_bit() << position
        });
        TagOffset::from_low_bits(bits as u8)
    }
}

/// The part of a processor that puts tags into addresses, at one exception level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TagGenerator {
    /// Are tags used at this exception level (`SCTLR_ELx.ATA` and its like; Arm ARM D10.5)? If not,
    /// every tag chosen is 0.
    pub tag_access: bool,
    /// Which tags may be chosen.
    pub gcr: GcrEl1,
    /// The state of IRG.
    pub rgsr: RgsrEl1,
}

impl TagGenerator {
    /// IRG, Insert Random Tag (Arm ARM C6.2.176): `address` with a tag that neither `exclude` (bits
    /// 15:0) nor `GCR_EL1` excludes.
    ///
    /// With `GCR_EL1.RRND` clear the tag is the one that every processor would choose from this
    /// state. With it set, the architecture leaves the choice to the implementation; this one then
    /// goes on as before, but from a seed that is never 0, so that tags vary even if software wrote
    /// none.
    pub fn irg(&mut self, address: u64, exclude: u64) -> u64 {
        let exclude = TagSet::from_register(exclude).union(self.gcr.exclude());
        self.random_tag(exclude).insert_into(address)
    }

    fn random_tag(&mut self, exclude: TagSet) -> Tag {
        if !self.tag_access {
            return Tag::ZERO;
        }
        if self.gcr.rrnd() && self.rgsr.seed() == 0 {
            self.rgsr = self.rgsr.with_seed(1);
        }
        let start = self.rgsr.tag();
        let offset = self.rgsr.random_tag_offset();
        let tag = choose_non_excluded(start, offset, exclude);
        self.rgsr = self.rgsr.with_tag(tag);
        tag
    }

    /// ADDG, Add with Tag (Arm ARM C6.2.7): `address` plus an offset, with the tag so many tags
    /// after its own.
    #[must_use]
    pub fn addg(&self, address: u64, offset: GranuleOffset, tag_offset: TagOffset) -> u64 {
        self.next_tag(address, tag_offset)
            .insert_into(address.wrapping_add(offset.bytes()))
    }

    /// SUBG, Subtract with Tag (Arm ARM C6.2.457): `address` minus an offset, with the tag so many
    /// tags *after* its own.
    #[must_use]
    pub fn subg(&self, address: u64, offset: GranuleOffset, tag_offset: TagOffset) -> u64 {
        self.next_tag(address, tag_offset)
            .insert_into(address.wrapping_sub(offset.bytes()))
    }

    fn next_tag(&self, address: u64, offset: TagOffset) -> Tag {
        if !self.tag_access {
            return Tag::ZERO;
        }
        choose_non_excluded(Tag::of_address(address), offset, self.gcr.exclude())
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn generator(exclude: u16, rrnd: bool, seed: u16) -> TagGenerator {
        TagGenerator {
            tag_access: true,
            gcr: GcrEl1::default()
                .with_rrnd(rrnd)
                .with_exclude(TagSet::from_bits(exclude)),
            rgsr: RgsrEl1::default().with_seed(seed),
        }
    }

    fn offsets() -> impl Iterator<Item = TagOffset> {
        (0..16).map(TagOffset::from_low_bits)
    }

    /// The choice, said another way: so many places on in the circle of the tags that are
    /// `allowed`.
    fn nth_allowed(tag: Tag, offset: usize, allowed: &[Tag]) -> Tag {
        let at_or_after = allowed
            .iter()
            .position(|candidate| *candidate >= tag)
            .unwrap_or(0);
        let first_is_a_step = offset > 0 && allowed.binary_search(&tag).is_err();
        allowed[(at_or_after + offset - usize::from(first_is_a_step)) % allowed.len()]
    }

    #[test]
    fn the_choice_is_the_nth_allowed_tag_for_every_mask_tag_and_offset() {
        for exclude in (0..u16::MAX).map(TagSet::from_bits) {
            let allowed: Vec<Tag> = exclude.complement().iter().collect();
            for tag in Tag::all() {
                for offset in [0, 1, 15] {
                    let chosen =
                        choose_non_excluded(tag, TagOffset::from_low_bits(offset), exclude);
                    assert_eq!(
                        chosen,
                        nth_allowed(tag, offset.into(), &allowed),
                        "{tag:?} {offset} {exclude:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn with_all_tags_excluded_the_choice_is_tag_0() {
        for tag in Tag::all() {
            for offset in offsets() {
                assert_eq!(choose_non_excluded(tag, offset, TagSet::ALL), Tag::ZERO);
            }
        }
    }

    #[test]
    fn the_shift_register_visits_every_seed_but_zero_before_it_repeats() {
        let start = RgsrEl1::default().with_seed(1);
        let mut state = start;
        let period = (1u32..)
            .find(|_| {
                state.next_random_tag_bit();
                state == start
            })
            .unwrap();
        assert_eq!(period, u16::MAX.into());
    }

    #[test]
    fn the_first_tags_from_seed_1_are_those_of_the_pseudocode() {
        // Seed 0x0001: the taps give 1, 0, 0, 0 and leave 0x1000; then 0, 0, 0, 0 (0x0100); 0, 0,
        // 0, 1 (0x8010); 0, 1, 1, 0 (0x6801).
        let mut generator = generator(0, false, 1);
        let tags: Vec<u8> = (0..4)
            .map(|_| Tag::of_address(generator.irg(0, 0)).value())
            .collect();
        assert_eq!(tags, [1, 1, 9, 15]);
        assert_eq!(generator.rgsr.bits(), 0x0068_010f);
    }

    #[test]
    fn from_seed_0_every_tag_is_the_same_unless_the_choice_is_the_implementations() {
        let tags = |mut generator: TagGenerator| -> TagSet {
            (0..1000)
                .map(|_| Tag::of_address(generator.irg(0, 0)))
                .collect()
        };
        assert_eq!(tags(generator(0, false, 0)).bits(), 0x0001);
        assert_eq!(tags(generator(0, true, 0)), TagSet::ALL);
    }

    #[test]
    fn irg_chooses_every_allowed_tag_and_no_other() {
        for exclude in [0x0000, 0x0001, 0x5555, 0xfffe, 0x7fff, 0xffff] {
            let mut generator = generator(exclude & 0xff00, false, 0xace1);
            let chosen: TagSet = (0..1000)
                .map(|_| Tag::of_address(generator.irg(0, u64::from(exclude & 0x00ff))))
                .collect();
            let expected = if exclude == 0xffff { 0x0001 } else { !exclude };
            assert_eq!(chosen.bits(), expected);
        }
    }

    #[test]
    fn without_tag_access_every_tag_is_0_and_the_seed_stays() {
        let mut off = TagGenerator {
            tag_access: false,
            ..generator(0x0001, false, 0xace1)
        };
        let before = off;
        let (offset, tag_offset) = (GranuleOffset::default(), TagOffset::from_low_bits(3));
        assert_eq!(off.irg(0x0500_0000_0000_0000, 0), 0);
        assert_eq!(off.addg(0x0500_0000_0000_0000, offset, tag_offset), 0);
        assert_eq!(off.subg(0x0500_0000_0000_0000, offset, tag_offset), 0);
        assert_eq!(off, before);
    }

    #[test]
    fn subg_goes_back_in_memory_and_on_in_tags() {
        let generator = generator(0, false, 1);
        let (offset, tag_offset) = (GranuleOffset::new(2).unwrap(), TagOffset::new(3).unwrap());
        assert_eq!(
            generator.subg(0x0f00_0000_0000_1000, offset, tag_offset),
            0x0200_0000_0000_0fe0
        );
        assert_eq!(
            generator.addg(0x0f00_0000_0000_1000, offset, tag_offset),
            0x0200_0000_0000_1020
        );
    }

    #[test]
    fn a_carry_out_of_the_address_does_not_reach_the_tag() {
        let generator = generator(0, false, 1);
        let (offset, tag_offset) = (GranuleOffset::new(1).unwrap(), TagOffset::default());
        assert_eq!(
            generator.addg(0x05ff_ffff_ffff_fff0, offset, tag_offset),
            0x0500_0000_0000_0000
        );
        assert_eq!(
            generator.subg(0x0500_0000_0000_0000, offset, tag_offset),
            0x05ff_ffff_ffff_fff0
        );
    }

    proptest! {
        #[test]
        fn irg_changes_nothing_but_the_tag(address: u64, exclude: u64, gcr: u64, rgsr: u64) {
            let mut generator =
                TagGenerator { tag_access: true, gcr: GcrEl1::from_bits(gcr), rgsr: RgsrEl1::from_bits(rgsr) };
            let tagged = generator.irg(address, exclude);
            prop_assert_eq!((tagged ^ address) & !(0xf << 56), 0);
            prop_assert_eq!(generator.gcr.bits(), gcr);
            prop_assert_eq!((generator.rgsr.bits() ^ rgsr) & !0x00ff_ff0f, 0);
            prop_assert_eq!(generator.rgsr.tag(), Tag::of_address(tagged));
        }
    }
}
