//! Tag checks at EL1, and a page of memory to try them on.

use core::cell::UnsafeCell;

use mte::aarch64::Instructions;
use mte::{GRANULE_SIZE, MteFeatures, PSTATE_TCO, SctlrEl1, Tag, TagCheckFaultMode};

use crate::{read_register, write_register};

/// What this vCPU's ID registers say of MTE.
pub fn features() -> MteFeatures {
    // ID_AA64PFR1_EL1 and ID_AA64PFR2_EL1.
    MteFeatures::from_id_registers(
        read_register!("S3_0_C0_C4_1"),
        read_register!("S3_0_C0_C4_2"),
    )
}

/// The instructions of MTE. A vCPU that does not have them raises an exception, which is reported and ends the payload.
pub fn instructions() -> Instructions {
    // SAFETY: no harm is done where they are missing, see above.
    unsafe { Instructions::assume_present() }
}

/// A tag chosen by IRG.
pub fn random_tag() -> Tag {
    Tag::of_address(instructions().irg(0, 0))
}

/// Decides what a tag check fault does on this vCPU.
pub fn set_fault_mode(mode: TagCheckFaultMode) {
    let sctlr = SctlrEl1::from_bits(read_register!("sctlr_el1")).with_tcf(mode);
    write_register!("sctlr_el1", sctlr.bits());
}

/// Makes accesses that are not checked on this vCPU, by PSTATE.TCO.
pub fn unchecked<T>(accesses: impl FnOnce() -> T) -> T {
    let before = read_register!("S3_3_C4_C2_7");
    write_register!("S3_3_C4_C2_7", PSTATE_TCO);
    let result = accesses();
    write_register!("S3_3_C4_C2_7", before);
    result
}

/// A page of memory that nothing but a check uses, on one vCPU.
#[repr(C, align(4096))]
pub struct Page(UnsafeCell<[u64; 512]>);

// SAFETY: its data are reached only by pointer, and who does that says on which vCPU. Tags are not Rust's.
unsafe impl Sync for Page {}

impl Page {
    /// A page of zeros.
    #[expect(clippy::new_without_default, reason = "it is the value of a static")]
    pub const fn new() -> Self {
        Self(UnsafeCell::new([0; 512]))
    }

    /// Its first word.
    pub const fn pointer(&self) -> *mut u64 {
        self.0.get().cast()
    }

    /// The tag of a granule.
    pub fn tag(&self, granule: u8) -> Tag {
        // SAFETY: the granule is one of this page, which is mapped.
        unsafe { instructions().ldg(self.granule(granule)) }
    }

    /// Gives a granule a tag.
    pub fn set_tag(&self, granule: u8, tag: Tag) {
        // SAFETY: as in `tag`.
        unsafe { instructions().stg(self.granule(granule), tag) }
    }

    fn granule(&self, granule: u8) -> *mut u8 {
        self.pointer()
            .cast::<u8>()
            .wrapping_add(usize::from(granule) * GRANULE_SIZE)
    }
}
