//! Without MTE, nothing of it is to be seen: no hardware capability, nothing in the ID register that the kernel emulates
//! for programs, no tag checks and no tagged memory.

use std::arch::asm;
use std::io;
use std::ptr;

use mte::{MteFeatures, MteLevel, PageSize, TagSet};
use mte_linux::{TagChecks, set_tag_checks};

use super::{Outcome, ensure, failed};

const PROT_MTE: libc::c_int = 0x20;

pub fn check() -> Outcome {
    let level = mte_linux::level();
    ensure!(
        level == MteLevel::None,
        "the hardware capabilities say: {level}"
    );
    if has_id_registers() {
        let level = id_register_features().level();
        ensure!(level == MteLevel::None, "ID_AA64PFR1_EL1 says: {level}");
    }
    let refused = |result: io::Result<()>| {
        result.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
    };
    let checks = set_tag_checks(TagChecks::Synchronous, TagSet::ALL);
    ensure!(refused(checks), "tag checks can be turned on");
    let tagged = protect_with_tags()?;
    ensure!(refused(tagged), "memory can be protected with PROT_MTE");
    Ok(())
}

/// Does the kernel emulate reads of ID registers?
fn has_id_registers() -> bool {
    // SAFETY: getauxval reads what the kernel gave the process at its start.
    unsafe { libc::getauxval(libc::AT_HWCAP) & libc::HWCAP_CPUID != 0 }
}

fn id_register_features() -> MteFeatures {
    let pfr1: u64;
    // SAFETY: the kernel emulates the read, as HWCAP_CPUID says.
    unsafe { asm!("mrs {pfr1}, S3_0_C0_C4_1", pfr1 = out(reg) pfr1, options(nomem, nostack)) };
    MteFeatures::from_id_registers(pfr1, 0)
}

/// What the kernel says to `PROT_MTE` in mprotect. (In mmap it may disregard it.)
fn protect_with_tags() -> Result<io::Result<()>, super::Verdict> {
    let size = PageSize::Kib64.bytes();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let memory = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return Err(failed("map memory")(io::Error::last_os_error()));
    }
    // SAFETY: the mapping made above, which nobody uses.
    let result = unsafe { libc::mprotect(memory, size, protection | PROT_MTE) };
    Ok(if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    })
}
