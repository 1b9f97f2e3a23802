//! The instructions themselves.
//!
//! A processor without MTE does not know them, so they are methods of [`Instructions`], which
//! exists only where somebody has vouched that they are there. Those that only calculate are then
//! safe. Those that reach tags in memory ask for memory that is mapped, and do the right thing only
//! if it is mapped as tagged (`PROT_MTE` on Linux): elsewhere tags are read as 0 and stores of tags
//! are lost. None of them is itself tag-checked, so the logical tag of the pointer given does not
//! matter.
//!
//! `instruction` has them one by one, `pages` the tags of whole pages. Programs (EL0) have no LDGM
//! and STGM, so pages too are read by LDG and written by STG.

mod instruction;
mod pages;

use crate::level::MteLevel;

/// The right to use the instructions of MTE on this machine.
#[derive(Clone, Copy, Debug)]
pub struct Instructions(());

impl Instructions {
    /// Takes it on trust.
    ///
    /// # Safety
    ///
    /// Every processor that this program may run on has `FEAT_MTE`.
    pub const unsafe fn assume_present() -> Self {
        Self(())
    }

    /// Has them if Linux says so.
    ///
    /// # Safety
    ///
    /// `hwcap2` is what `getauxval(AT_HWCAP2)` returned to this process.
    pub unsafe fn from_hwcap2(hwcap2: u64) -> Option<Self> {
        MteLevel::from_hwcap2(hwcap2)
            .has_tagged_memory()
            .then_some(Self(()))
    }
}
