//! From the first instruction to the payload.
//!
//! 1. `_start` (first vCPU) and `secondary_start` (the others, by PSCI `CPU_ON`) turn the MMU on before they touch
//!    memory: until then every access is Device memory, which faults on unaligned addresses and does not see what other
//!    vCPUs hold in their caches.
//! 2. The first vCPU clears `.bss` and applies the image's relocations, so that the image runs wherever RAM starts.
//! 3. Each vCPU gets its stack and its number, and enters Rust.
//!
//! The translation table is one page of 1 GiB blocks, mapped to themselves: the first GiB is Device memory (where this
//! machine keeps its devices), the rest up to 512 GiB is Normal memory, Tagged where the vCPU has MTE. Tag checks are
//! off until a payload asks for them (SCTLR_EL1.TCF), tags can be accessed (ATA), the top byte of an address is ignored
//! (TCR_EL1.TBI0).

use dtoolkit::fdt::Fdt;

use crate::console;
use crate::machine::Machine;
use crate::power;
use crate::println;
use crate::processors::{self, MAX_PROCESSORS};
use crate::report::{self, Report};

/// Bytes of stack of one vCPU.
const STACK_SIZE: usize = 32 * 1024;

#[repr(C, align(4096))]
struct Stacks([[u8; STACK_SIZE]; MAX_PROCESSORS]);

// SAFETY: the name is used by the start code below and by nothing else.
#[unsafe(no_mangle)]
static mut STACKS: Stacks = Stacks([[0; STACK_SIZE]; MAX_PROCESSORS]);

#[repr(C, align(4096))]
struct TranslationTable([u64; 512]);

// SAFETY: the name is used by the start code below and by nothing else.
#[unsafe(no_mangle)]
static TRANSLATION_TABLE: TranslationTable = TranslationTable(identity_map());

/// A level-1 table for a 39-bit address space: 512 blocks of 1 GiB, each at its own address.
const fn identity_map() -> [u64; 512] {
    const BLOCK: u64 = 0b01;
    const NORMAL: u64 = 0 << 2; // index into MAIR_EL1
    const DEVICE: u64 = 1 << 2;
    const INNER_SHAREABLE: u64 = 0b11 << 8;
    const ACCESS_FLAG: u64 = 1 << 10;
    const EXECUTE_NEVER: u64 = 0b11 << 53;

    let mut table = [0; 512];
    table[0] = BLOCK | DEVICE | ACCESS_FLAG | EXECUTE_NEVER;
    let mut gigabyte = 1;
    while gigabyte < table.len() {
        table[gigabyte] =
            ((gigabyte as u64) << 30) | BLOCK | NORMAL | INNER_SHAREABLE | ACCESS_FLAG;
        gigabyte += 1;
    }
    table
}

/// Memory attributes: index 0 Normal write-back, index 1 Device-nGnRE. The Tagged kind of Normal memory (0xF0) exists
/// only with FEAT_MTE2.
const MAIR_UNTAGGED: u64 = 0x04FF;
const MAIR_TAGGED: u64 = 0x04F0;

/// TCR_EL1 without the physical address size: 39 bits in TTBR0 alone, 4 KiB granule, write-back inner-shareable table
/// walks, TBI0.
const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 0b11 << 12 | 1 << 23 | 1 << 37;

/// SCTLR_EL1: the bits that are one in every Armv8.0 kernel's setting, and M, C, I.
const SCTLR: u64 = 1 << 29
    | 1 << 28
    | 1 << 23
    | 1 << 22
    | 1 << 20
    | 1 << 12
    | 1 << 11
    | 1 << 8
    | 1 << 7
    | 1 << 2
    | 1;
/// SCTLR_EL1.ATA and ATA0.
const SCTLR_TAG_ACCESS: u64 = 1 << 43 | 1 << 42;

core::arch::global_asm!(
    r#"
    .macro load register, value
        movz \register, #((\value) & 0xffff)
        movk \register, #(((\value) >> 16) & 0xffff), lsl #16
        movk \register, #(((\value) >> 32) & 0xffff), lsl #32
    .endm

    .section .text.start, "ax"
    .global _start
    _start:
        mov x19, x0
        bl enable_mmu

        adrp x1, bss_start
        add x1, x1, :lo12:bss_start
        adrp x2, bss_end
        add x2, x2, :lo12:bss_end
    1:  stp xzr, xzr, [x1], #16
        cmp x1, x2
        b.lo 1b

        // R_AARCH64_RELATIVE: the word at (offset + bias) becomes (addend + bias).
        adrp x1, rela_start
        add x1, x1, :lo12:rela_start
        adrp x2, rela_end
        add x2, x2, :lo12:rela_end
        adr x3, _start
        load x4, {link_address}
        sub x3, x3, x4
    2:  cmp x1, x2
        b.hs 3f
        ldp x5, x6, [x1]
        ldr x7, [x1, #16]
        add x1, x1, #24
        cmp w6, #{relative}
        b.ne 2b
        add x7, x7, x3
        str x7, [x5, x3]
        b 2b

    3:  mov x20, #0
        bl take_stack
        mov x0, x19
        bl first_processor

    .global secondary_start
    secondary_start:
        mov x20, x0
        bl enable_mmu
        bl take_stack
        mov x0, x20
        bl secondary_processor

    // sp = the top of stack number x20
    take_stack:
        adrp x1, STACKS
        add x1, x1, :lo12:STACKS
        mov x2, #{stack_size}
        add x3, x20, #1
        madd x1, x2, x3, x1
        mov sp, x1
        msr tpidr_el1, x20
        ret

    // Uses x1 to x5 and no memory.
    enable_mmu:
        msr daifset, #15
        mov x1, #(3 << 20)              // floating point, which compiled code uses to move memory
        msr cpacr_el1, x1

        mrs x1, id_aa64pfr1_el1
        ubfx x1, x1, #8, #4             // MTE
        cmp x1, #2
        load x2, {mair_untagged}
        load x3, {mair_tagged}
        csel x2, x3, x2, hs
        msr mair_el1, x2
        load x4, {sctlr}
        load x5, {sctlr_tag_access}
        csel x5, x5, xzr, hs
        orr x4, x4, x5

        mrs x1, id_aa64mmfr0_el1
        and x1, x1, #0xf                // PARange
        mov x2, #5
        cmp x1, x2
        csel x1, x1, x2, lo
        load x2, {tcr}
        orr x2, x2, x1, lsl #32         // IPS
        msr tcr_el1, x2

        adrp x1, TRANSLATION_TABLE
        add x1, x1, :lo12:TRANSLATION_TABLE
        msr ttbr0_el1, x1
        adrp x1, exception_vectors
        add x1, x1, :lo12:exception_vectors
        msr vbar_el1, x1

        isb
        tlbi vmalle1
        dsb nsh
        isb
        msr sctlr_el1, x4
        isb
        ret
    "#,
    link_address = const 0x4000_0000_u64,
    relative = const 1027,
    stack_size = const STACK_SIZE,
    mair_untagged = const MAIR_UNTAGGED,
    mair_tagged = const MAIR_TAGGED,
    tcr = const TCR,
    sctlr = const SCTLR,
    sctlr_tag_access = const SCTLR_TAG_ACCESS,
);

unsafe extern "Rust" {
    /// Defined by the `payload!` macro.
    safe fn payload_main(machine: &Machine, report: &mut Report);
}

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
    fn secondary_start();
}

/// The addresses this image occupies, its `.bss` included.
pub fn image() -> core::ops::Range<u64> {
    (&raw const image_start) as u64..(&raw const image_end) as u64
}

/// Where a vCPU other than the first begins, with its number in `x0`.
pub fn secondary_entry() -> u64 {
    secondary_start as *const () as u64
}

// SAFETY: the name is used by the start code above and by nothing else.
#[unsafe(no_mangle)]
extern "C" fn first_processor(device_tree: u64) -> ! {
    // SAFETY: the boot protocol puts the address of a device tree in x0; its memory is mapped and nothing writes to it.
    let Ok(tree) = (unsafe { Fdt::from_raw(device_tree as *const u8) }) else {
        // There is no console to complain on.
        power::off()
    };
    console::open(tree);
    match Machine::describe(tree, device_tree) {
        Ok(machine) => {
            let mut report = Report::new();
            payload_main(&machine, &mut report);
            report::end(report.all_passed())
        }
        Err(error) => {
            println!("FAIL device-tree: {error}");
            report::end(false)
        }
    }
}

// SAFETY: the name is used by the start code above and by nothing else.
#[unsafe(no_mangle)]
extern "C" fn secondary_processor(number: usize) -> ! {
    processors::work(number)
}
