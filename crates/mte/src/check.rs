//! The check of an access: is it checked at all, does its tag match, and what follows if not.
//!
//! [`CheckContext`] is the state of a processor that decides it, for software at EL1 or EL0 in
//! AArch64 (the EL1&0 translation regime). It is asked about an [`Access`] and asks in turn how
//! each granule is tagged. Arm ARM D10.4 and D10.7; J1.1.3, `AArch64.AccessIsTagChecked`,
//! `AArch64.CheckTag`; J1.1.2, `AArch64.EffectiveTCF`.
//!
//! Whatever the state says, some accesses are never checked: those of LDG, STG and their like, of
//! the instruction fetch and of the page table walk, and those of loads and stores whose base is the
//! PC, or SP with no offset but an immediate. Whoever asks knows the instruction and does not ask about them.

use crate::control::{HcrEl2, SctlrEl1, TagCheckFaultMode, TcrEl1, VaRange};
use crate::granule::granules;
use crate::level::{MteFeatures, MteLevel};
use crate::tag::Tag;

/// The exception level of the software that makes an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExceptionLevel {
    /// Programs. Also the level of unprivileged loads and stores (LDTR, STTR) of a kernel.
    El0,
    /// A kernel.
    El1,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// Reads only.
    Read,
    /// Writes only.
    Write,
    /// Both, as atomic instructions do.
    ReadWrite,
}

impl AccessKind {
    fn reads(self) -> bool {
        self != Self::Write
    }

    fn writes(self) -> bool {
        self != Self::Read
    }
}

/// One access to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The first virtual address, with its logical tag.
    pub address: u64,
    /// Bytes. An access of none counts as one of one byte.
    pub size: u64,
    /// Read, write or both.
    pub kind: AccessKind,
}

/// How a granule of memory is tagged (Arm ARM D10.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tagging {
    /// Mapped with an attribute other than [`MAIR_NORMAL_TAGGED`](crate::MAIR_NORMAL_TAGGED).
    Untagged,
    /// Mapped as tagged, with this allocation tag.
    Tagged(Tag),
}

/// The outcome of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagCheck {
    /// The access is not checked.
    Unchecked(Unchecked),
    /// Every granule that was checked has the tag of the address.
    Match,
    /// A granule has another one.
    Mismatch(Mismatch),
}

/// Why an access is not checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unchecked {
    /// Tags are not used at this exception level: no MTE2, or an `ATA` bit is clear.
    NoTagAccess,
    /// `PSTATE.TCO` is set.
    Overridden,
    /// Only writes are checked (`TCSO`, `TCSO0`), and this is none.
    StoreOnly,
    /// Addresses of this range carry no tag (`TBI0`, `TBI1`, `MTX0`, `MTX1`).
    NoAddressTag,
    /// The tag is the one that this range does not check: 0 with `TCMA0`, 15 with `TCMA1`.
    MatchAll,
    /// None of the memory is tagged.
    UntaggedMemory,
}

/// A mismatch, and what it leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The lowest address of the access that is in the first granule with another tag, with the tag
    /// of the access: FAR of a synchronous fault. (The architecture allows any address of the
    /// access that mismatches.)
    pub address: u64,
    /// The tag of the address.
    pub logical: Tag,
    /// The tag of the memory.
    pub allocation: Tag,
    /// What happens.
    pub effect: FaultEffect,
}

/// What a tag check fault does to the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultEffect {
    /// Nothing; the access happens.
    Ignored,
    /// An exception; the access does not happen.
    Synchronous,
    /// The bit of this range is set in TFSR_EL1 or, for EL0, TFSRE0_EL1; the access happens.
    Asynchronous(VaRange),
}

/// The state of a processor that decides about checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckContext {
    /// What the processor has of MTE.
    pub features: MteFeatures,
    /// Who makes the access.
    pub level: ExceptionLevel,
    /// `PSTATE.TCO`.
    pub tco: bool,
    /// `SCTLR_EL1`.
    pub sctlr: SctlrEl1,
    /// `TCR_EL1`.
    pub tcr: TcrEl1,
    /// `HCR_EL2`.
    pub hcr: HcrEl2,
}

impl CheckContext {
    /// Checks `access`. `tagging` tells of the granule at an address, which it is given with the
    /// tag of the access.
    ///
    /// Granules are visited from the lowest on, up to the first mismatch. The work grows with the
    /// size of the access, which an architecture bounds and a caller should.
    pub fn check(&self, access: Access, mut tagging: impl FnMut(u64) -> Tagging) -> TagCheck {
        if let Some(reason) = self.unchecked(access) {
            return TagCheck::Unchecked(reason);
        }
        let logical = Tag::of_address(access.address);
        let mut outcome = TagCheck::Unchecked(Unchecked::UntaggedMemory);
        for (index, granule) in granules(access.address, access.size.max(1)).enumerate() {
            // A carry out of the address does not reach the tag, which stays the one of the first
            // byte.
            let granule = logical.insert_into(granule);
            let Some(allocation) = self.expected_tag(granule, tagging(granule)) else {
                continue;
            };
            if allocation != logical {
                let address = if index == 0 { access.address } else { granule };
                let effect = self.effect(access);
                return TagCheck::Mismatch(Mismatch {
                    address,
                    logical,
                    allocation,
                    effect,
                });
            }
            outcome = TagCheck::Match;
        }
        outcome
    }

    /// Why `access` is not checked, if that does not depend on the memory.
    fn unchecked(&self, access: Access) -> Option<Unchecked> {
        let range = VaRange::of_address(access.address);
        if !self.has_tag_access() {
            Some(Unchecked::NoTagAccess)
        } else if self.tco {
            Some(Unchecked::Overridden)
        } else if self.checks_only_writes() && !access.kind.writes() {
            Some(Unchecked::StoreOnly)
        } else if !self.tcr.tbi(range) && !self.extended_checking(range) {
            Some(Unchecked::NoAddressTag)
        } else if self.tcr.tcma(range) && Tag::of_address(access.address) == canonical_tag(range) {
            Some(Unchecked::MatchAll)
        } else {
            None
        }
    }

    fn has_tag_access(&self) -> bool {
        let enabled_here = match self.level {
            ExceptionLevel::El0 => self.sctlr.ata0(),
            ExceptionLevel::El1 => self.sctlr.ata(),
        };
        self.features.level().has_tagged_memory() && self.hcr.ata() && enabled_here
    }

    fn checks_only_writes(&self) -> bool {
        let chosen = match self.level {
            ExceptionLevel::El0 => self.sctlr.tcso0(),
            ExceptionLevel::El1 => self.sctlr.tcso(),
        };
        self.features.store_only() && chosen
    }

    fn extended_checking(&self, range: VaRange) -> bool {
        self.features.canonical_tags() && self.tcr.mtx(range)
    }

    /// The tag that an access to this granule must have; `None` if any will do.
    fn expected_tag(&self, granule: u64, tagging: Tagging) -> Option<Tag> {
        let range = VaRange::of_address(granule);
        match tagging {
            Tagging::Tagged(allocation) => Some(allocation),
            Tagging::Untagged => self
                .extended_checking(range)
                .then_some(canonical_tag(range)),
        }
    }

    fn effect(&self, access: Access) -> FaultEffect {
        let mode = match self.level {
            ExceptionLevel::El0 => self.sctlr.tcf0(),
            ExceptionLevel::El1 => self.sctlr.tcf(),
        };
        let recorded = FaultEffect::Asynchronous(VaRange::of_address(access.address));
        match mode {
            TagCheckFaultMode::Synchronous => FaultEffect::Synchronous,
            TagCheckFaultMode::Asynchronous if self.features.asynchronous() => recorded,
            TagCheckFaultMode::Asymmetric if self.features.level() < MteLevel::Mte3 => {
                FaultEffect::Ignored
            }
            TagCheckFaultMode::Asymmetric if access.kind.reads() => FaultEffect::Synchronous,
            TagCheckFaultMode::Asymmetric => recorded,
            TagCheckFaultMode::Ignored | TagCheckFaultMode::Asynchronous => FaultEffect::Ignored,
        }
    }
}

/// The tag of an address of this range into which no tag was put: bit 55, four times.
const fn canonical_tag(range: VaRange) -> Tag {
    match range {
        VaRange::Lower => Tag::ZERO,
        VaRange::Upper => Tag::MAX,
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    const MTE2_WITHOUT_ASYNC: u64 = 2 << 8 | 0xf << 40;
    const MTE3_AND_MTEX: u64 = 3 << 8 | 1 << 52;
    const STORE_ONLY: u64 = 1 << 4;

    const TAG: u64 = 0x0500_0000_0000_0000;
    const UPPER: u64 = 0xf0ff_ffff_ffff_0000;

    /// Everything there is and on, checked synchronously at EL1.
    fn context() -> CheckContext {
        CheckContext {
            features: MteFeatures::from_id_registers(MTE3_AND_MTEX, STORE_ONLY),
            level: ExceptionLevel::El1,
            tco: false,
            sctlr: SctlrEl1::default()
                .with_ata(true)
                .with_tcf(TagCheckFaultMode::Synchronous),
            tcr: TcrEl1::default().with_tbi0(true).with_tbi1(true),
            hcr: HcrEl2::default().with_ata(true),
        }
    }

    fn read(address: u64, size: u64) -> Access {
        Access {
            address,
            size,
            kind: AccessKind::Read,
        }
    }

    fn tagged(value: u8) -> impl Fn(u64) -> Tagging {
        move |_| Tagging::Tagged(Tag::from_low_bits(value))
    }

    fn effect(context: CheckContext, kind: AccessKind, address: u64) -> FaultEffect {
        let logical = Tag::of_address(address);
        let other = move |_| Tagging::Tagged(Tag::from_low_bits(logical.value() ^ 1));
        match context.check(
            Access {
                address,
                size: 8,
                kind,
            },
            other,
        ) {
            TagCheck::Mismatch(mismatch) => mismatch.effect,
            outcome => panic!("{outcome:?}"),
        }
    }

    #[test]
    fn equal_tags_match() {
        for tag in Tag::all() {
            let access = read(tag.insert_into(0x1008), 8);
            assert_eq!(
                context().check(access, |_| Tagging::Tagged(tag)),
                TagCheck::Match
            );
        }
    }

    #[test]
    fn different_tags_do_not_match() {
        for (logical, flip) in Tag::all().zip((1..16).cycle()) {
            let allocation = Tag::from_low_bits(logical.value() ^ flip);
            let address = logical.insert_into(0x1008);
            let effect = FaultEffect::Synchronous;
            let expected = Mismatch {
                address,
                logical,
                allocation,
                effect,
            };
            assert_eq!(
                context().check(read(address, 8), |_| Tagging::Tagged(allocation)),
                TagCheck::Mismatch(expected)
            );
        }
    }

    #[test]
    fn each_control_turns_the_check_off_for_its_own_reason() {
        let on = context();
        let off = [
            (
                CheckContext {
                    features: MteFeatures::from_id_registers(1 << 8, 0),
                    ..on
                },
                Unchecked::NoTagAccess,
            ),
            (
                CheckContext {
                    hcr: on.hcr.with_ata(false),
                    ..on
                },
                Unchecked::NoTagAccess,
            ),
            (
                CheckContext {
                    sctlr: on.sctlr.with_ata(false),
                    ..on
                },
                Unchecked::NoTagAccess,
            ),
            (
                CheckContext {
                    level: ExceptionLevel::El0,
                    ..on
                },
                Unchecked::NoTagAccess,
            ),
            (CheckContext { tco: true, ..on }, Unchecked::Overridden),
            (
                CheckContext {
                    sctlr: on.sctlr.with_tcso(true),
                    ..on
                },
                Unchecked::StoreOnly,
            ),
            (
                CheckContext {
                    tcr: on.tcr.with_tbi0(false),
                    ..on
                },
                Unchecked::NoAddressTag,
            ),
        ];
        for (context, reason) in off {
            assert_eq!(
                context.check(read(TAG, 8), tagged(6)),
                TagCheck::Unchecked(reason)
            );
        }
    }

    #[test]
    fn memory_that_is_not_tagged_is_not_checked() {
        let outcome = context().check(read(TAG, 8), |_| Tagging::Untagged);
        assert_eq!(outcome, TagCheck::Unchecked(Unchecked::UntaggedMemory));
    }

    #[test]
    fn with_tcma0_only_tag_0_of_the_lower_range_is_not_checked() {
        let context = CheckContext {
            tcr: context().tcr.with_tcma0(true),
            ..context()
        };
        let unchecked = TagCheck::Unchecked(Unchecked::MatchAll);
        assert_eq!(context.check(read(0x1000, 8), tagged(6)), unchecked);
        assert_ne!(context.check(read(TAG, 8), tagged(6)), unchecked);
        assert_ne!(
            context.check(read(Tag::ZERO.insert_into(UPPER), 8), tagged(6)),
            unchecked
        );
        assert_ne!(
            context.check(read(Tag::MAX.insert_into(UPPER), 8), tagged(6)),
            unchecked
        );
    }

    #[test]
    fn with_tcma1_only_tag_15_of_the_upper_range_is_not_checked() {
        let context = CheckContext {
            tcr: context().tcr.with_tcma1(true),
            ..context()
        };
        let unchecked = TagCheck::Unchecked(Unchecked::MatchAll);
        assert_eq!(
            context.check(read(Tag::MAX.insert_into(UPPER), 8), tagged(6)),
            unchecked
        );
        assert_ne!(
            context.check(read(Tag::ZERO.insert_into(UPPER), 8), tagged(6)),
            unchecked
        );
        assert_ne!(
            context.check(read(Tag::MAX.insert_into(0x1000), 8), tagged(6)),
            unchecked
        );
    }

    #[test]
    fn store_only_checks_writes_and_atomics() {
        let context = CheckContext {
            sctlr: context().sctlr.with_tcso(true),
            ..context()
        };
        assert_eq!(
            effect(context, AccessKind::Write, TAG),
            FaultEffect::Synchronous
        );
        assert_eq!(
            effect(context, AccessKind::ReadWrite, TAG),
            FaultEffect::Synchronous
        );
    }

    #[test]
    fn store_only_bits_do_nothing_on_a_processor_without_the_option() {
        let on = context();
        let features = MteFeatures::from_id_registers(MTE3_AND_MTEX, 0);
        let context = CheckContext {
            features,
            sctlr: on.sctlr.with_tcso(true),
            ..on
        };
        assert_eq!(
            effect(context, AccessKind::Read, TAG),
            FaultEffect::Synchronous
        );
    }

    #[test]
    fn asymmetric_faults_are_synchronous_unless_the_access_only_writes() {
        let context = CheckContext {
            sctlr: context().sctlr.with_tcf(TagCheckFaultMode::Asymmetric),
            ..context()
        };
        assert_eq!(
            effect(context, AccessKind::Read, TAG),
            FaultEffect::Synchronous
        );
        assert_eq!(
            effect(context, AccessKind::ReadWrite, TAG),
            FaultEffect::Synchronous
        );
        assert_eq!(
            effect(context, AccessKind::Write, TAG),
            FaultEffect::Asynchronous(VaRange::Lower)
        );
    }

    #[test]
    fn asynchronous_faults_are_recorded_for_their_range() {
        let context = CheckContext {
            sctlr: context().sctlr.with_tcf(TagCheckFaultMode::Asynchronous),
            ..context()
        };
        assert_eq!(
            effect(context, AccessKind::Read, TAG),
            FaultEffect::Asynchronous(VaRange::Lower)
        );
        assert_eq!(
            effect(context, AccessKind::Read, UPPER),
            FaultEffect::Asynchronous(VaRange::Upper)
        );
    }

    #[test]
    fn modes_that_the_processor_lacks_ignore_faults() {
        let features = MteFeatures::from_id_registers(MTE2_WITHOUT_ASYNC, 0);
        for mode in [
            TagCheckFaultMode::Ignored,
            TagCheckFaultMode::Asynchronous,
            TagCheckFaultMode::Asymmetric,
        ] {
            let context = CheckContext {
                features,
                sctlr: context().sctlr.with_tcf(mode),
                ..context()
            };
            assert_eq!(effect(context, AccessKind::Read, TAG), FaultEffect::Ignored);
        }
    }

    #[test]
    fn el0_has_its_own_controls() {
        let sctlr = SctlrEl1::default()
            .with_ata0(true)
            .with_tcf0(TagCheckFaultMode::Asynchronous)
            .with_tcf(TagCheckFaultMode::Synchronous);
        let context = CheckContext {
            level: ExceptionLevel::El0,
            sctlr,
            ..context()
        };
        assert_eq!(
            effect(context, AccessKind::Read, TAG),
            FaultEffect::Asynchronous(VaRange::Lower)
        );
    }

    #[test]
    fn with_mtx_untagged_memory_is_checked_canonically_even_without_tbi() {
        let context = CheckContext {
            tcr: TcrEl1::default().with_mtx0(true).with_mtx1(true),
            ..context()
        };
        let check = |address| context.check(read(address, 8), |_| Tagging::Untagged);
        assert_eq!(check(Tag::ZERO.insert_into(0x1000)), TagCheck::Match);
        assert_eq!(check(Tag::MAX.insert_into(UPPER)), TagCheck::Match);
        assert!(matches!(
            check(TAG),
            TagCheck::Mismatch(Mismatch {
                allocation: Tag::ZERO,
                ..
            })
        ));
        assert!(matches!(
            check(Tag::ZERO.insert_into(UPPER)),
            TagCheck::Mismatch(Mismatch {
                allocation: Tag::MAX,
                ..
            })
        ));
    }

    #[test]
    fn a_later_granule_faults_at_its_first_byte_and_the_first_at_the_address() {
        let second_differs =
            |granule: u64| Tagging::Tagged(Tag::from_low_bits(5 + (granule >> 4 & 1) as u8));
        let fault_address = |access| match context().check(access, second_differs) {
            TagCheck::Mismatch(mismatch) => mismatch.address,
            outcome => panic!("{outcome:?}"),
        };
        assert_eq!(fault_address(read(TAG | 0x100c, 8)), TAG | 0x1010);
        assert_eq!(fault_address(read(TAG | 0x101c, 8)), TAG | 0x101c);
    }

    #[test]
    fn untagged_and_tagged_granules_of_one_access_are_judged_each() {
        let second_page_tagged = |granule: u64| match granule & 0x1000 {
            0 => Tagging::Untagged,
            _ => Tagging::Tagged(Tag::from_low_bits(5)),
        };
        assert_eq!(
            context().check(read(TAG | 0xff8, 16), second_page_tagged),
            TagCheck::Match
        );
    }

    proptest! {
        #[test]
        fn every_granule_of_an_access_is_visited_until_one_differs(
            address in 0u64..1 << 48,
            size in 1u64..300,
            differing in 0usize..20,
        ) {
            let mut visited = Vec::new();
            let outcome = context().check(read(TAG | address, size), |granule| {
                let tag = if visited.len() == differing { 6 } else { 5 };
                visited.push(granule);
                Tagging::Tagged(Tag::from_low_bits(tag))
            });
            let touched: Vec<u64> = granules(TAG | address, size).take(differing + 1).collect();
            prop_assert_eq!(visited, touched.clone());
            prop_assert_eq!(matches!(outcome, TagCheck::Mismatch(_)), touched.len() > differing);
        }
    }
}
