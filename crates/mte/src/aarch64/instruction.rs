//! One instruction a function (Arm ARM C6.2), with the operands and results of the software model
//! where there is one.

use core::arch::asm;

use super::Instructions;
use crate::tag::Tag;

impl Instructions {
    /// IRG: `address` with a random tag that neither `exclude` (bits 15:0) nor `GCR_EL1` excludes.
    /// In a Linux program `GCR_EL1` is what `PR_SET_TAGGED_ADDR_CTRL` set for the thread.
    pub fn irg(self, address: u64, exclude: u64) -> u64 {
        let tagged;
        // SAFETY: `self` says that the instruction exists. It calculates from registers, of which
        // RGSR_EL1 is not Rust's.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "irg {tagged}, {address}, {exclude}",
                tagged = lateout(reg) tagged,
                address = in(reg) address,
                exclude = in(reg) exclude,
                options(nomem, nostack, preserves_flags),
            );
        }
        tagged
    }

    /// ADDG: `address` plus `GRANULES` (0 to 63) granules, with the tag `TAGS` (0 to 15) allowed
    /// tags after its own.
    pub fn addg<const GRANULES: u8, const TAGS: u8>(self, address: u64) -> u64 {
        const { assert!(GRANULES < 64 && TAGS < 16, "beyond the immediates of ADDG") };
        let result;
        // SAFETY: `self` says that the instruction exists. It calculates from registers.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "addg {result}, {address}, #(16 * {granules}), #{tags}",
                result = lateout(reg) result,
                address = in(reg) address,
                granules = const GRANULES,
                tags = const TAGS,
                options(nomem, nostack, preserves_flags),
            );
        }
        result
    }

    /// SUBG: `address` minus `GRANULES` (0 to 63) granules, with the tag `TAGS` (0 to 15) allowed
    /// tags after its own.
    pub fn subg<const GRANULES: u8, const TAGS: u8>(self, address: u64) -> u64 {
        const { assert!(GRANULES < 64 && TAGS < 16, "beyond the immediates of SUBG") };
        let result;
        // SAFETY: `self` says that the instruction exists. It calculates from registers.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "subg {result}, {address}, #(16 * {granules}), #{tags}",
                result = lateout(reg) result,
                address = in(reg) address,
                granules = const GRANULES,
                tags = const TAGS,
                options(nomem, nostack, preserves_flags),
            );
        }
        result
    }

    /// GMI: `mask` with the tag of `address` added.
    pub fn gmi(self, address: u64, mask: u64) -> u64 {
        let result;
        // SAFETY: `self` says that the instruction exists. It calculates from its operands.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "gmi {result}, {address}, {mask}",
                result = lateout(reg) result,
                address = in(reg) address,
                mask = in(reg) mask,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        result
    }

    /// SUBP: the bytes from `subtrahend` to `minuend`, whatever their top bytes hold.
    pub fn subp(self, minuend: u64, subtrahend: u64) -> u64 {
        let difference;
        // SAFETY: `self` says that the instruction exists. It calculates from its operands.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "subp {difference}, {minuend}, {subtrahend}",
                difference = lateout(reg) difference,
                minuend = in(reg) minuend,
                subtrahend = in(reg) subtrahend,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        difference
    }

    /// LDG: the allocation tag of the granule that holds `address`.
    ///
    /// # Safety
    ///
    /// The granule is mapped and readable.
    pub unsafe fn ldg(self, address: *const u8) -> Tag {
        let mut tagged: u64 = 0;
        // SAFETY: `self` says that the instruction exists, the caller that the memory does. It is
        // not changed.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "ldg {tagged}, [{address}]",
                tagged = inout(reg) tagged,
                address = in(reg) address,
                options(readonly, nostack, preserves_flags),
            );
        }
        Tag::of_address(tagged)
    }

    /// STG: gives the granule at `granule` this tag. Its data stay.
    ///
    /// Whoever then reaches the granule through a pointer with another tag, while checks are on,
    /// faults.
    ///
    /// # Safety
    ///
    /// `granule` is a multiple of 16, and its 16 bytes are mapped and writable.
    pub unsafe fn stg(self, granule: *mut u8, tag: Tag) {
        // SAFETY: `self` says that the instruction exists, the caller that the memory does. Its
        // data, which are Rust's, are not changed.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "stg {tagged}, [{granule}]",
                tagged = in(reg) tag.insert_into(0),
                granule = in(reg) granule,
                options(nostack, preserves_flags),
            );
        }
    }

    /// ST2G: gives the granule at `granule` and the next one this tag. Their data stay.
    ///
    /// # Safety
    ///
    /// As for [`stg`](Self::stg), with 32 bytes.
    pub unsafe fn st2g(self, granule: *mut u8, tag: Tag) {
        // SAFETY: as for `stg`.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "st2g {tagged}, [{granule}]",
                tagged = in(reg) tag.insert_into(0),
                granule = in(reg) granule,
                options(nostack, preserves_flags),
            );
        }
    }

    /// STZG: gives the granule at `granule` this tag, and zeroes its 16 bytes.
    ///
    /// # Safety
    ///
    /// As for [`stg`](Self::stg); and the caller may write to the 16 bytes.
    pub unsafe fn stzg(self, granule: *mut u8, tag: Tag) {
        // SAFETY: `self` says that the instruction exists, the caller that the memory does and that
        // it may be written.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "stzg {tagged}, [{granule}]",
                tagged = in(reg) tag.insert_into(0),
                granule = in(reg) granule,
                options(nostack, preserves_flags),
            );
        }
    }
}
