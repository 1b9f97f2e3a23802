//! What Linux offers a program of MTE (`Documentation/arch/arm64/memory-tagging-extension.rst`), for the guest programs.
//!
//! A program asks which MTE it has ([`level`]), maps tagged memory ([`TaggedMemory`]), says for each thread what a tag
//! check fault does and which tags IRG may choose ([`set_tag_checks`]), and meets the faults as SIGSEGV ([`faults`]).
//! [`cpus`] pins threads to CPUs.
//!
//! All of it exists on aarch64 Linux alone; elsewhere the crate is empty, so that programs which use it can still be
//! checked.
#![cfg(all(target_arch = "aarch64", target_os = "linux"))]

pub mod cpus;
pub mod faults;
mod memory;

use std::io;

use mte::aarch64::Instructions;
use mte::{MteLevel, TagSet};

pub use memory::TaggedMemory;

/// Which MTE the kernel lets programs use.
pub fn level() -> MteLevel {
    MteLevel::from_hwcap2(hwcap2())
}

/// The instructions of MTE, if programs may use them.
pub fn instructions() -> Option<Instructions> {
    // SAFETY: this is what the kernel told this process.
    unsafe { Instructions::from_hwcap2(hwcap2()) }
}

fn hwcap2() -> u64 {
    // SAFETY: getauxval reads what the kernel gave the process at its start.
    unsafe { libc::getauxval(libc::AT_HWCAP2) }
}

/// What a tag check fault of a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagChecks {
    /// SIGSEGV with `SEGV_MTESERR`, instead of the access.
    Synchronous,
    /// SIGSEGV with `SEGV_MTEAERR`, some time after the access.
    Asynchronous,
    /// The one of these two, or the asymmetric mode, that the CPU's `mte_tcf_preferred` in sysfs names.
    PreferredByCpu,
}

impl TagChecks {
    const fn flags(self) -> u64 {
        match self {
            Self::Synchronous => PR_MTE_TCF_SYNC,
            Self::Asynchronous => PR_MTE_TCF_ASYNC,
            Self::PreferredByCpu => PR_MTE_TCF_SYNC | PR_MTE_TCF_ASYNC,
        }
    }
}

const PR_MTE_TCF_SYNC: u64 = 1 << 1;
const PR_MTE_TCF_ASYNC: u64 = 1 << 2;
const PR_MTE_TAG_SHIFT: u32 = 3;

/// Turns this thread's tag checks on, and lets IRG choose the tags of `include` (with none, it always chooses 0).
///
/// # Errors
/// What the kernel answers; EINVAL if it offers no MTE.
pub fn set_tag_checks(checks: TagChecks, include: TagSet) -> io::Result<()> {
    let control = libc::PR_TAGGED_ADDR_ENABLE
        | checks.flags()
        | u64::from(include.bits()) << PR_MTE_TAG_SHIFT;
    // SAFETY: this prctl changes what tags of addresses mean to this thread. Its memory so far has tag 0, as have its
    // addresses.
    let result = unsafe { libc::prctl(libc::PR_SET_TAGGED_ADDR_CTRL, control, 0, 0, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes accesses of this thread that are not checked, by PSTATE.TCO.
pub fn unchecked<T>(accesses: impl FnOnce() -> T) -> T {
    set_tag_check_override(true);
    let result = accesses();
    set_tag_check_override(false);
    result
}

fn set_tag_check_override(on: bool) {
    let value = if on { mte::PSTATE_TCO } else { 0 };
    // SAFETY: TCO changes whether tags are checked and nothing else. Who calls this has MTE.
    unsafe { std::arch::asm!("msr S3_3_C4_C2_7, {value}", value = in(reg) value) };
}
