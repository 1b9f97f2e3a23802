//! The payload `tag-fault`: writes by a pointer whose tag is not that of memory, and has a handler that resets the machine, as a kernel
//! that panics does. It says which pointer, so that what the VMM says of its death can be compared. With `end=stuck` it reads two registers
//! of a device at once instead, which no hypervisor can take apart: its vCPU cannot go on.
#![cfg_attr(all(target_arch = "aarch64", panic = "abort"), no_std, no_main)]

#[cfg(all(target_arch = "aarch64", panic = "abort"))]
mod tag_fault {
    use core::arch::{asm, global_asm};

    use mte::{Tag, TagCheckFaultMode};
    use payloads::machine::Machine;
    use payloads::report::Report;
    use payloads::tagging::{Page, set_fault_mode};
    use payloads::{println, write_register};

    static PAGE: Page = Page::new();

    // Synchronous exceptions of EL1 with SP_EL1: PSCI SYSTEM_RESET.
    global_asm!(
        r#"
        .balign 2048
    reset_at_once:
        .space 0x200
        mov w0, #0x0009
        movk w0, #0x8400, lsl #16
        hvc #0
    1:  wfi
        b 1b
    "#
    );

    pub fn run(machine: &Machine, _: &mut Report) {
        if machine.argument("end") == Some("stuck") {
            // SAFETY: where the serial port is no Rust object lies.
            unsafe { asm!("ldp x1, x2, [{0}]", in(reg) 0x0900_0000_u64, out("x1") _, out("x2") _) };
        }
        for granule in 0..16 {
            PAGE.set_tag(granule, Tag::from_low_bits(granule));
        }
        let granule = PAGE.pointer() as u64 + 5 * mte::GRANULE_SIZE as u64;
        let pointer = Tag::from_low_bits(0xb).insert_into(granule) + 8;
        println!("tag-fault: pointer {pointer:#018x}");
        let vectors: u64;
        // SAFETY: only an address is formed.
        unsafe {
            asm!("adr {0}, reset_at_once", out(reg) vectors, options(nomem, nostack));
        }
        write_register!("vbar_el1", vectors);
        set_fault_mode(TagCheckFaultMode::Synchronous);
        // SAFETY: the store does not happen: it faults, and the machine is reset.
        unsafe { asm!("str xzr, [{0}]", in(reg) pointer, options(nostack)) };
    }
}

#[cfg(all(target_arch = "aarch64", panic = "abort"))]
payloads::payload!(tag_fault::run);

#[cfg(not(all(target_arch = "aarch64", panic = "abort")))]
fn main() {}
