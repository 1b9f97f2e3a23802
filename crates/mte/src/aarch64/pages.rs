//! The tags of whole pages, packed as they are read and unpacked as they are written, and their data.
//!
//! LDG puts a tag into bits 59:56 of a register and leaves the other bits alone; STG takes it from
//! there. So a register that is rotated by one tag between two LDGs collects sixteen of them, in
//! order, and one that is rotated before each STG gives them out: two instructions a granule, and
//! nothing to mask. Reading the tags of a 4 KiB page takes 510 instructions, writing them 516, or
//! 460 where others go before them; giving a whole page one tag takes 176.

use core::arch::asm;

use super::Instructions;
use crate::granule::PageSize;
use crate::page::TagPage;
use crate::tag::Tag;

const PAGE_SIZE: usize = PageSize::Kib4.bytes();

impl Instructions {
    /// Reads the tags of the `tags.len()` pages of 4 KiB from `first` on.
    ///
    /// Each tag is read by itself: what others write meanwhile is seen for some granules and not
    /// for others.
    ///
    /// # Safety
    ///
    /// `first` is a multiple of 4 KiB, and that many pages from there on are mapped and readable.
    pub unsafe fn read_tag_pages(self, first: *const u8, tags: &mut [TagPage]) {
        debug_assert!(first.addr().is_multiple_of(PAGE_SIZE));
        if tags.is_empty() {
            return;
        }
        // Each LDG waits for the rotation before it, so eight words are collected side by side. A
        // word begins with its granule 15: fifteen rotations later that tag has come around to bits
        // 63:60, and no further one is needed.
        // SAFETY: `self` says that the instructions exist. The loop reads tags from `first` to
        // `end`, which the caller vouches for, and writes 64 bytes for each 2 KiB of them: 128 a
        // page, just the bytes of `tags`.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "2:",
                "ldg {w0}, [{page}, #0x0f0]",
                "ldg {w1}, [{page}, #0x1f0]",
                "ldg {w2}, [{page}, #0x2f0]",
                "ldg {w3}, [{page}, #0x3f0]",
                "ldg {w4}, [{page}, #0x4f0]",
                "ldg {w5}, [{page}, #0x5f0]",
                "ldg {w6}, [{page}, #0x6f0]",
                "ldg {w7}, [{page}, #0x7f0]",
                ".irp granule, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14",
                "ror {w0}, {w0}, #4",
                "ror {w1}, {w1}, #4",
                "ror {w2}, {w2}, #4",
                "ror {w3}, {w3}, #4",
                "ror {w4}, {w4}, #4",
                "ror {w5}, {w5}, #4",
                "ror {w6}, {w6}, #4",
                "ror {w7}, {w7}, #4",
                "ldg {w0}, [{page}, #(0x000 + 16 * \\granule)]",
                "ldg {w1}, [{page}, #(0x100 + 16 * \\granule)]",
                "ldg {w2}, [{page}, #(0x200 + 16 * \\granule)]",
                "ldg {w3}, [{page}, #(0x300 + 16 * \\granule)]",
                "ldg {w4}, [{page}, #(0x400 + 16 * \\granule)]",
                "ldg {w5}, [{page}, #(0x500 + 16 * \\granule)]",
                "ldg {w6}, [{page}, #(0x600 + 16 * \\granule)]",
                "ldg {w7}, [{page}, #(0x700 + 16 * \\granule)]",
                ".endr",
                "stp {w0}, {w1}, [{tags}], #16",
                "stp {w2}, {w3}, [{tags}], #16",
                "stp {w4}, {w5}, [{tags}], #16",
                "stp {w6}, {w7}, [{tags}], #16",
                "add {page}, {page}, #0x800",
                "cmp {page}, {end}",
                "b.ne 2b",
                page = inout(reg) first => _,
                tags = inout(reg) tags.as_mut_ptr() => _,
                end = in(reg) first.wrapping_add(tags.len() * PAGE_SIZE),
                w0 = out(reg) _,
                w1 = out(reg) _,
                w2 = out(reg) _,
                w3 = out(reg) _,
                w4 = out(reg) _,
                w5 = out(reg) _,
                w6 = out(reg) _,
                w7 = out(reg) _,
                options(nostack),
            );
        }
    }

    /// Copies the data of the `data.len()` pages of 4 KiB from `first` on. No load is checked, whatever
    /// the thread's mode, so tags matter neither in memory nor in the pointer.
    ///
    /// What others write meanwhile is seen for some bytes and not for others.
    ///
    /// # Safety
    ///
    /// `first` is a multiple of 4 KiB, and that many pages from there on are mapped and readable.
    pub unsafe fn copy_pages(self, first: *const u8, data: &mut [[u8; PAGE_SIZE]]) {
        debug_assert!(first.addr().is_multiple_of(PAGE_SIZE));
        if data.is_empty() {
            return;
        }
        // SAFETY: `self` says that PSTATE.TCO exists; it is put back. The loop reads the pages that
        // the caller vouches for, 128 bytes at a time, and writes as many, just those of `data`.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "mrs {tco}, tco",
                "msr tco, #1",
                "2:",
                "ld1 {{v0.16b-v3.16b}}, [{from}], #64",
                "ld1 {{v4.16b-v7.16b}}, [{from}], #64",
                "st1 {{v0.16b-v3.16b}}, [{to}], #64",
                "st1 {{v4.16b-v7.16b}}, [{to}], #64",
                "cmp {to}, {end}",
                "b.ne 2b",
                "msr tco, {tco}",
                from = inout(reg) first => _,
                to = inout(reg) data.as_mut_ptr() => _,
                end = in(reg) data.as_mut_ptr_range().end,
                tco = out(reg) _,
                out("v0") _,
                out("v1") _,
                out("v2") _,
                out("v3") _,
                out("v4") _,
                out("v5") _,
                out("v6") _,
                out("v7") _,
                options(nostack),
            );
        }
    }

    /// Gives the `tags.len()` pages of 4 KiB from `first` on these tags. Their data stay.
    ///
    /// # Safety
    ///
    /// `first` is a multiple of 4 KiB, and that many pages from there on are mapped and writable.
    pub unsafe fn write_tag_pages(self, first: *mut u8, tags: &[TagPage]) {
        debug_assert!(first.addr().is_multiple_of(PAGE_SIZE));
        let [first_tags, others @ ..] = tags else {
            return;
        };
        let second = first.wrapping_add(PAGE_SIZE);
        // Rotated right by 4 * granule + 8, a word has the tag of that granule in bits 59:56.
        // Granule 14 is there from the start.
        // SAFETY: `self` says that the instructions exist. The loop reads 32 bytes for each 1 KiB
        // of memory, just those of the first page's tags, and writes tags from `first` to `second`,
        // which the caller vouches for.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "2:",
                "ldp {w0}, {w1}, [{tags}], #16",
                "ldp {w2}, {w3}, [{tags}], #16",
                ".irp granule, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13",
                "ror {t0}, {w0}, #(4 * \\granule + 8)",
                "ror {t1}, {w1}, #(4 * \\granule + 8)",
                "ror {t2}, {w2}, #(4 * \\granule + 8)",
                "ror {t3}, {w3}, #(4 * \\granule + 8)",
                "stg {t0}, [{page}, #(0x000 + 16 * \\granule)]",
                "stg {t1}, [{page}, #(0x100 + 16 * \\granule)]",
                "stg {t2}, [{page}, #(0x200 + 16 * \\granule)]",
                "stg {t3}, [{page}, #(0x300 + 16 * \\granule)]",
                ".endr",
                "stg {w0}, [{page}, #0x0e0]",
                "stg {w1}, [{page}, #0x1e0]",
                "stg {w2}, [{page}, #0x2e0]",
                "stg {w3}, [{page}, #0x3e0]",
                "ror {t0}, {w0}, #4",
                "ror {t1}, {w1}, #4",
                "ror {t2}, {w2}, #4",
                "ror {t3}, {w3}, #4",
                "stg {t0}, [{page}, #0x0f0]",
                "stg {t1}, [{page}, #0x1f0]",
                "stg {t2}, [{page}, #0x2f0]",
                "stg {t3}, [{page}, #0x3f0]",
                "add {page}, {page}, #0x400",
                "cmp {page}, {end}",
                "b.ne 2b",
                page = inout(reg) first => _,
                tags = inout(reg) first_tags.as_packed().as_ptr() => _,
                end = in(reg) second,
                w0 = out(reg) _,
                w1 = out(reg) _,
                w2 = out(reg) _,
                w3 = out(reg) _,
                t0 = out(reg) _,
                t1 = out(reg) _,
                t2 = out(reg) _,
                t3 = out(reg) _,
                options(nostack),
            );
        }
        if others.is_empty() {
            return;
        }
        // A word that is loaded from seven bytes before a byte of tags has that byte on top: its
        // even granule is where STG looks, its odd one is a shift away, and two such words come with
        // one load: seven instructions for four granules. Behind the first page, the seven bytes
        // before are tags too.
        let top = |byte: usize| {
            let tags = tags.as_ptr().cast::<u8>();
            tags.wrapping_add(size_of::<TagPage>() + byte - 7)
        };
        // SAFETY: `self` says that the instructions exist. The loop reads 32 bytes for each 1 KiB
        // of memory behind `second`, from each of eight places in turn: the first 7 bytes before
        // the tags of the second page, which are tags of the first, the last there, so that the
        // last word ends where `tags` does. It writes tags from `second` to `end`, which the caller
        // vouches for.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "2:",
                ".irp byte, 0, 1, 2, 3, 4, 5, 6, 7",
                "ldp {w2}, {w3}, [x\\byte, #16]",
                "ldp {w0}, {w1}, [x\\byte], #32",
                "stg {w0}, [{page}, #(0x000 + 32 * \\byte)]",
                "stg {w1}, [{page}, #(0x100 + 32 * \\byte)]",
                "stg {w2}, [{page}, #(0x200 + 32 * \\byte)]",
                "stg {w3}, [{page}, #(0x300 + 32 * \\byte)]",
                "lsr {w0}, {w0}, #4",
                "lsr {w1}, {w1}, #4",
                "lsr {w2}, {w2}, #4",
                "lsr {w3}, {w3}, #4",
                "stg {w0}, [{page}, #(0x010 + 32 * \\byte)]",
                "stg {w1}, [{page}, #(0x110 + 32 * \\byte)]",
                "stg {w2}, [{page}, #(0x210 + 32 * \\byte)]",
                "stg {w3}, [{page}, #(0x310 + 32 * \\byte)]",
                ".endr",
                "add {page}, {page}, #0x400",
                "cmp {page}, {end}",
                "b.ne 2b",
                page = inout(reg) second => _,
                end = in(reg) first.wrapping_add(tags.len() * PAGE_SIZE),
                w0 = out(reg) _,
                w1 = out(reg) _,
                w2 = out(reg) _,
                w3 = out(reg) _,
                inout("x0") top(0) => _,
                inout("x1") top(1) => _,
                inout("x2") top(2) => _,
                inout("x3") top(3) => _,
                inout("x4") top(4) => _,
                inout("x5") top(5) => _,
                inout("x6") top(6) => _,
                inout("x7") top(7) => _,
                options(nostack),
            );
        }
    }

    /// Gives all granules of `pages` pages of 4 KiB from `first` on this tag. Their data stay.
    ///
    /// # Safety
    ///
    /// `first` is a multiple of 4 KiB, and that many pages from there on are mapped and writable.
    pub unsafe fn fill_tag_pages(self, first: *mut u8, pages: usize, tag: Tag) {
        debug_assert!(first.addr().is_multiple_of(PAGE_SIZE));
        if pages == 0 {
            return;
        }
        // SAFETY: `self` says that the instructions exist. The loop writes tags from `first` to
        // `end`, which the caller vouches for.
        unsafe {
            asm!(
                ".arch_extension memtag",
                "2:",
                ".irp pair, 0, 1, 2, 3, 4, 5, 6, 7",
                "st2g {tagged}, [{page}, #(32 * \\pair)]",
                ".endr",
                "add {page}, {page}, #0x100",
                "cmp {page}, {end}",
                "b.ne 2b",
                page = inout(reg) first => _,
                end = in(reg) first.wrapping_add(pages * PAGE_SIZE),
                tagged = in(reg) tag.insert_into(0),
                options(nostack),
            );
        }
    }
}
