//! Which MTE a machine has, and whether it has what another one needs.
//!
//! The architecture tells in `ID_AA64PFR1_EL1` and `ID_AA64PFR2_EL1` (Arm ARM D24.2), where a VMM
//! reads it from a vCPU; Linux tells its programs in `AT_HWCAP2`. [`MteLevel`] is the first of the
//! fields, [`MteFeatures`] is all of them.

use core::fmt;

/// `ID_AA64PFR1_EL1.MTE`: how much of MTE there is. Each level has all of the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MteLevel {
    /// Nothing.
    #[default]
    None,
    /// `FEAT_MTE`: the instructions exist, memory has no tags.
    Mte1,
    /// `FEAT_MTE2`: memory has tags, and accesses are checked.
    Mte2,
    /// `FEAT_MTE3`: reads can be checked synchronously while writes are checked asynchronously.
    Mte3,
}

/// `HWCAP2_MTE` of Linux: `FEAT_MTE2`, usable by programs.
const HWCAP2_MTE: u64 = 1 << 18;
/// `HWCAP2_MTE3` of Linux.
const HWCAP2_MTE3: u64 = 1 << 22;

impl MteLevel {
    /// The level in `ID_AA64PFR1_EL1`. Values that the architecture has yet to define have at least
    /// MTE3, by its rule for ID registers (Arm ARM D24.1.3).
    pub const fn from_id_aa64pfr1(register: u64) -> Self {
        match id_field(register, PFR1_MTE) {
            0 => Self::None,
            1 => Self::Mte1,
            2 => Self::Mte2,
            _ => Self::Mte3,
        }
    }

    /// The level that Linux offers to programs, from `getauxval(AT_HWCAP2)`. It does not tell of
    /// MTE1, which programs cannot use.
    pub const fn from_hwcap2(hwcap2: u64) -> Self {
        match (hwcap2 & HWCAP2_MTE != 0, hwcap2 & HWCAP2_MTE3 != 0) {
            (false, _) => Self::None,
            (true, false) => Self::Mte2,
            (true, true) => Self::Mte3,
        }
    }

    /// Does memory have tags?
    pub fn has_tagged_memory(self) -> bool {
        self >= Self::Mte2
    }

    const fn id_field(self) -> u64 {
        match self {
            Self::None => 0,
            Self::Mte1 => 1,
            Self::Mte2 => 2,
            Self::Mte3 => 3,
        }
    }
}

impl fmt::Display for MteLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no MTE",
            Self::Mte1 => "MTE1 (instructions only)",
            Self::Mte2 => "MTE2",
            Self::Mte3 => "MTE3 (asymmetric)",
        })
    }
}

// The lowest bits of the four-bit fields.
const PFR1_MTE: u32 = 8;
const PFR1_MTE_FRAC: u32 = 40;
const PFR1_MTEX: u32 = 52;
const PFR2_MTEPERM: u32 = 0;
const PFR2_MTESTOREONLY: u32 = 4;
const PFR2_MTEFAR: u32 = 8;

/// `MTE_frac` where asynchronous faults exist, and where they do not. Other values are reserved.
const FRAC_ASYNC: u64 = 0b0000;
const FRAC_NO_ASYNC: u64 = 0b1111;

const fn id_field(register: u64, lowest_bit: u32) -> u64 {
    register >> lowest_bit & 0xf
}

const fn with_id_field(register: u64, lowest_bit: u32, value: u64) -> u64 {
    register & !(0xf << lowest_bit) | value << lowest_bit
}

/// All that the ID registers say of MTE: the level, and the options that come with MTE2 and MTE3.
///
/// The options are only there with tagged memory, as the architecture demands; what a register
/// claims beyond that is not taken over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MteFeatures {
    level: MteLevel,
    asynchronous: bool,
    canonical_tags: bool,
    tagged_far: bool,
    store_only: bool,
    tag_permissions: bool,
}

impl MteFeatures {
    /// A machine without MTE.
    pub const NONE: Self = Self {
        level: MteLevel::None,
        asynchronous: false,
        canonical_tags: false,
        tagged_far: false,
        store_only: false,
        tag_permissions: false,
    };

    /// What `ID_AA64PFR1_EL1` and `ID_AA64PFR2_EL1` say.
    pub fn from_id_registers(id_aa64pfr1: u64, id_aa64pfr2: u64) -> Self {
        let level = MteLevel::from_id_aa64pfr1(id_aa64pfr1);
        if !level.has_tagged_memory() {
            return Self {
                level,
                ..Self::NONE
            };
        }
        let asynchronous = id_field(id_aa64pfr1, PFR1_MTE_FRAC) == FRAC_ASYNC;
        Self {
            level,
            asynchronous: asynchronous || level >= MteLevel::Mte3,
            canonical_tags: id_field(id_aa64pfr1, PFR1_MTEX) != 0,
            tagged_far: id_field(id_aa64pfr2, PFR2_MTEFAR) != 0,
            store_only: id_field(id_aa64pfr2, PFR2_MTESTOREONLY) != 0,
            tag_permissions: id_field(id_aa64pfr2, PFR2_MTEPERM) != 0,
        }
    }

    /// `register`, a value of `ID_AA64PFR1_EL1`, made to say this of MTE and what it said of all
    /// else.
    #[must_use]
    pub fn write_id_aa64pfr1(self, register: u64) -> u64 {
        let no_async = self.level.has_tagged_memory() && !self.asynchronous;
        let frac = if no_async { FRAC_NO_ASYNC } else { FRAC_ASYNC };
        let register = with_id_field(register, PFR1_MTE, self.level.id_field());
        let register = with_id_field(register, PFR1_MTE_FRAC, frac);
        with_id_field(register, PFR1_MTEX, self.canonical_tags.into())
    }

    /// `register`, a value of `ID_AA64PFR2_EL1`, made to say this of MTE and what it said of all
    /// else.
    #[must_use]
    pub fn write_id_aa64pfr2(self, register: u64) -> u64 {
        let register = with_id_field(register, PFR2_MTEFAR, self.tagged_far.into());
        let register = with_id_field(register, PFR2_MTESTOREONLY, self.store_only.into());
        with_id_field(register, PFR2_MTEPERM, self.tag_permissions.into())
    }

    /// The level.
    pub const fn level(self) -> MteLevel {
        self.level
    }

    /// `FEAT_MTE_ASYNC`: tag check faults can be accumulated in the TFSRs. MTE2 may lack it.
    pub const fn asynchronous(self) -> bool {
        self.asynchronous
    }

    /// `FEAT_MTE_CANONICAL_TAGS` and `FEAT_MTE_NO_ADDRESS_TAGS`: untagged memory can be checked
    /// against the tag that bit 55 of the address implies, and memory can be tagged where addresses
    /// are not.
    pub const fn canonical_tags(self) -> bool {
        self.canonical_tags
    }

    /// `FEAT_MTE_TAGGED_FAR`: after a tag check fault, bits 63:60 of FAR are those of the address.
    pub const fn tagged_far(self) -> bool {
        self.tagged_far
    }

    /// `FEAT_MTE_STORE_ONLY`: checking can be limited to writes.
    pub const fn store_only(self) -> bool {
        self.store_only
    }

    /// `FEAT_MTE_PERM`: a hypervisor can refuse a guest the tags of a page at stage 2.
    pub const fn tag_permissions(self) -> bool {
        self.tag_permissions
    }

    /// Can software that was started with these features go on where there is `offered`? It can if
    /// nothing is missing there.
    ///
    /// An engine that shows its guests all it has (KVM does so with the level) has to ask for
    /// equality instead.
    ///
    /// # Errors
    ///
    /// Both sets of features, if something is missing.
    pub fn check_offered_by(self, offered: Self) -> Result<(), MteDifference> {
        let missing = self.level > offered.level
            || self
                .options()
                .zip(offered.options())
                .any(|((needed, _), (there, _))| needed && !there);
        if missing {
            Err(MteDifference { has: self, offered })
        } else {
            Ok(())
        }
    }

    /// The options that the level does not imply, and what to call them.
    fn options(self) -> impl Iterator<Item = (bool, &'static str)> {
        [
            (self.asynchronous, "asynchronous faults"),
            (self.canonical_tags, "canonical tags"),
            (self.tagged_far, "tagged fault addresses"),
            (self.store_only, "store-only checks"),
            (self.tag_permissions, "tag permissions"),
        ]
        .into_iter()
    }
}

/// `MTE3 (asymmetric) + store-only checks`. Asynchronous faults are taken for granted; MTE2 without
/// them is `MTE2 (synchronous only)`.
impl fmt::Display for MteFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.level)?;
        if self.level.has_tagged_memory() && !self.asynchronous {
            f.write_str(" (synchronous only)")?;
        }
        self.options()
            .skip(1)
            .filter(|(present, _)| *present)
            .try_for_each(|(_, name)| write!(f, " + {name}"))
    }
}

/// Software has one MTE, a machine offers another. Shown as `has MTE3 (asymmetric), this host
/// offers MTE2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MteDifference {
    /// What the software was started with.
    pub has: MteFeatures,
    /// What the machine offers.
    pub offered: MteFeatures,
}

impl fmt::Display for MteDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "has {}, this host offers {}", self.has, self.offered)
    }
}

impl core::error::Error for MteDifference {}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    const MTE2: u64 = 2 << PFR1_MTE;
    const MTE3: u64 = 3 << PFR1_MTE;
    const NO_ASYNC: u64 = FRAC_NO_ASYNC << PFR1_MTE_FRAC;

    #[test]
    fn the_level_is_bits_11_to_8_and_unknown_ones_are_at_least_mte3() {
        assert_eq!(
            MteLevel::from_id_aa64pfr1(0xffff_ffff_ffff_f0ff),
            MteLevel::None
        );
        assert_eq!(MteLevel::from_id_aa64pfr1(0x100), MteLevel::Mte1);
        assert_eq!(MteLevel::from_id_aa64pfr1(0x200), MteLevel::Mte2);
        assert_eq!(MteLevel::from_id_aa64pfr1(0x300), MteLevel::Mte3);
        assert_eq!(MteLevel::from_id_aa64pfr1(0xf00), MteLevel::Mte3);
    }

    #[test]
    fn linux_tells_of_mte2_and_mte3() {
        assert_eq!(
            MteLevel::from_hwcap2(!(HWCAP2_MTE | HWCAP2_MTE3)),
            MteLevel::None
        );
        assert_eq!(MteLevel::from_hwcap2(1 << 18), MteLevel::Mte2);
        assert_eq!(MteLevel::from_hwcap2(1 << 18 | 1 << 22), MteLevel::Mte3);
    }

    #[test]
    fn without_tagged_memory_there_are_no_options() {
        let features = MteFeatures::from_id_registers(0x0010_0000_0000_0100, 0x111);
        assert_eq!(
            features,
            MteFeatures {
                level: MteLevel::Mte1,
                ..MteFeatures::NONE
            }
        );
    }

    #[test]
    fn each_option_is_read_from_its_own_field() {
        assert!(MteFeatures::from_id_registers(MTE2, 0).asynchronous());
        assert!(!MteFeatures::from_id_registers(MTE2 | NO_ASYNC, 0).asynchronous());
        assert!(MteFeatures::from_id_registers(MTE2 | 1 << 52, 0).canonical_tags());
        assert!(MteFeatures::from_id_registers(MTE2, 0x100).tagged_far());
        assert!(MteFeatures::from_id_registers(MTE2, 0x010).store_only());
        assert!(MteFeatures::from_id_registers(MTE2, 0x001).tag_permissions());
    }

    #[test]
    fn mte3_has_asynchronous_faults_whatever_its_fraction_says() {
        assert!(MteFeatures::from_id_registers(MTE3 | NO_ASYNC, 0).asynchronous());
    }

    #[test]
    fn features_are_shown_in_words() {
        assert_eq!(MteFeatures::NONE.to_string(), "no MTE");
        assert_eq!(
            MteFeatures::from_id_registers(MTE2 | NO_ASYNC, 0).to_string(),
            "MTE2 (synchronous only)"
        );
        assert_eq!(
            MteFeatures::from_id_registers(MTE3, 0x110).to_string(),
            "MTE3 (asymmetric) + tagged fault addresses + store-only checks"
        );
    }

    #[test]
    fn a_lower_level_is_refused_in_words() {
        let guest = MteFeatures::from_id_registers(MTE3, 0);
        let host = MteFeatures::from_id_registers(MTE2, 0);
        let refusal = guest.check_offered_by(host).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "has MTE3 (asymmetric), this host offers MTE2"
        );
        assert_eq!(host.check_offered_by(guest), Ok(()));
    }

    #[test]
    fn a_missing_option_is_refused() {
        let host = MteFeatures::from_id_registers(MTE2 | NO_ASYNC, 0);
        for (pfr1, pfr2) in [
            (MTE2, 0),
            (MTE2 | NO_ASYNC | 1 << 52, 0),
            (MTE2 | NO_ASYNC, 0x10),
        ] {
            let guest = MteFeatures::from_id_registers(pfr1, pfr2);
            assert_eq!(
                guest.check_offered_by(host),
                Err(MteDifference {
                    has: guest,
                    offered: host
                })
            );
        }
    }

    proptest! {
        #[test]
        fn features_written_to_id_registers_are_read_back(from: (u64, u64), other: (u64, u64)) {
            let features = MteFeatures::from_id_registers(from.0, from.1);
            let pfr1 = features.write_id_aa64pfr1(other.0);
            let pfr2 = features.write_id_aa64pfr2(other.1);
            prop_assert_eq!(MteFeatures::from_id_registers(pfr1, pfr2), features);
            prop_assert_eq!((pfr1 ^ other.0) & !0x00f0_0f00_0000_0f00, 0);
            prop_assert_eq!((pfr2 ^ other.1) & !0xfff, 0);
        }

        #[test]
        fn a_machine_offers_what_it_has(pfr1: u64, pfr2: u64) {
            let features = MteFeatures::from_id_registers(pfr1, pfr2);
            prop_assert_eq!(features.check_offered_by(features), Ok(()));
            prop_assert_eq!(MteFeatures::NONE.check_offered_by(features), Ok(()));
        }
    }
}
