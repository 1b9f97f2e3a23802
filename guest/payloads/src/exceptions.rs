//! Exceptions: those that a check provokes, and those that nobody wanted.
//!
//! A check runs one instruction through [`attempt`] (or the helpers [`load`] and [`store`]). If it raises a synchronous
//! exception, the handler notes the syndrome and goes on after the instruction. Any other exception is reported with its
//! syndrome and ends the payload.
//!
//! The vectors save the general-purpose registers that a Rust function may change; the floating-point ones are not
//! saved, so the instruction's `asm!` block declares them clobbered (`clobber_abi("C")`).

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mte::TagCheckFaultSyndrome;

use crate::processors::{MAX_PROCESSORS, current};
use crate::report;
use crate::{println, read_register, write_register};

/// An exception that an attempted instruction raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// ESR_EL1.
    pub syndrome: u64,
    /// FAR_EL1.
    pub address: u64,
}

impl Exception {
    /// ESR_EL1.EC, the class of the exception. 0 is an undefined instruction.
    pub fn class(self) -> u64 {
        self.syndrome >> 26 & 0x3f
    }

    /// The synchronous tag check fault that it is, if it is one.
    pub fn tag_check_fault(self) -> Option<TagCheckFaultSyndrome> {
        TagCheckFaultSyndrome::from_esr(self.syndrome)
    }
}

/// What the handler and [`attempt`] tell each other, on one vCPU.
struct Attempt {
    under_way: AtomicBool,
    raised: AtomicBool,
    syndrome: AtomicU64,
    address: AtomicU64,
}

static ATTEMPTS: [Attempt; MAX_PROCESSORS] = [const {
    Attempt {
        under_way: AtomicBool::new(false),
        raised: AtomicBool::new(false),
        syndrome: AtomicU64::new(0),
        address: AtomicU64::new(0),
    }
}; MAX_PROCESSORS];

/// Runs `instruction`, in which one instruction may raise a synchronous exception that is then skipped. Says which
/// exception that was.
pub fn attempt<T>(instruction: impl FnOnce() -> T) -> (T, Option<Exception>) {
    let attempt = &ATTEMPTS[current()];
    attempt.raised.store(false, Ordering::SeqCst);
    attempt.under_way.store(true, Ordering::SeqCst);
    let result = instruction();
    attempt.under_way.store(false, Ordering::SeqCst);
    let exception = attempt.raised.load(Ordering::SeqCst).then(|| Exception {
        syndrome: attempt.syndrome.load(Ordering::SeqCst),
        address: attempt.address.load(Ordering::SeqCst),
    });
    (result, exception)
}

/// Loads a word that may fault. If it does, `unloaded` is what the register held before and still holds.
pub fn load(address: *const u64, unloaded: u64) -> (u64, Option<Exception>) {
    attempt(|| {
        let mut value = unloaded;
        // SAFETY: the callers' addresses lie in memory of theirs; a fault is skipped by the handler, which changes only
        // the registers declared here.
        unsafe { asm!("ldr x1, [x0]", in("x0") address, inout("x1") value, clobber_abi("C")) };
        value
    })
}

/// Stores a word, which may fault.
pub fn store(address: *mut u64, value: u64) -> Option<Exception> {
    attempt(|| {
        // SAFETY: as in `load`.
        unsafe { asm!("str x1, [x0]", in("x0") address, in("x1") value, clobber_abi("C")) };
    })
    .1
}

global_asm!(
    r#"
    .macro vector
        .balign 0x80
        sub sp, sp, #192
        stp x0, x1, [sp]
        b save_registers
    .endm

    .section .text.exceptions, "ax"
    .balign 0x800
    .global exception_vectors
    exception_vectors:
    .rept 16
        vector
    .endr

    save_registers:
        stp x2, x3, [sp, #16]
        stp x4, x5, [sp, #32]
        stp x6, x7, [sp, #48]
        stp x8, x9, [sp, #64]
        stp x10, x11, [sp, #80]
        stp x12, x13, [sp, #96]
        stp x14, x15, [sp, #112]
        stp x16, x17, [sp, #128]
        stp x18, x29, [sp, #144]
        str x30, [sp, #160]
        bl handle_exception
        ldp x2, x3, [sp, #16]
        ldp x4, x5, [sp, #32]
        ldp x6, x7, [sp, #48]
        ldp x8, x9, [sp, #64]
        ldp x10, x11, [sp, #80]
        ldp x12, x13, [sp, #96]
        ldp x14, x15, [sp, #112]
        ldp x16, x17, [sp, #128]
        ldp x18, x29, [sp, #144]
        ldr x30, [sp, #160]
        ldp x0, x1, [sp]
        add sp, sp, #192
        eret
    "#
);

// SAFETY: the name is used by the vectors above and by nothing else.
#[unsafe(no_mangle)]
extern "C" fn handle_exception() {
    let syndrome = read_register!("esr_el1");
    let address = read_register!("far_el1");
    let instruction = read_register!("elr_el1");
    let attempt = &ATTEMPTS[current()];
    if !attempt.under_way.load(Ordering::SeqCst) || attempt.raised.load(Ordering::SeqCst) {
        println!(
            "FAIL exception on vCPU {}: ESR_EL1 {syndrome:#x} ELR_EL1 {instruction:#x} FAR_EL1 {address:#x}",
            current()
        );
        report::end(false)
    }
    attempt.syndrome.store(syndrome, Ordering::SeqCst);
    attempt.address.store(address, Ordering::SeqCst);
    attempt.raised.store(true, Ordering::SeqCst);
    write_register!("elr_el1", instruction + 4);
}
