//! In synchronous mode, an access by an address whose tag is not the memory's raises SIGSEGV with `SEGV_MTESERR` and the
//! access's address, and does not happen. Every other access does. The kernel checks too, when it accesses memory for a
//! program.

use std::io;
use std::os::fd::AsRawFd;

use mte::Tag;
use mte::aarch64::Instructions;
use mte_linux::TagChecks;
use mte_linux::faults::{self, Fault, SEGV_MTESERR};

use super::{Outcome, ensure, failed, granule};

const BEFORE: u64 = 0x1111_2222_3333_4444;
const OTHER: u64 = 0xcccc_dddd_eeee_ffff;

pub fn check(instructions: Instructions) -> Outcome {
    let granule = granule(instructions, TagChecks::Synchronous)?;
    let start = Tag::ZERO.insert_into_pointer(granule.matching);
    for memory in Tag::all() {
        // SAFETY: the granule is mapped.
        unsafe { instructions.stg(start.cast(), memory) };
        for address in Tag::all() {
            accesses(
                memory.insert_into_pointer(start),
                address.insert_into_pointer(start),
            )?;
        }
    }
    // SAFETY: as above.
    unsafe { instructions.stg(start.cast(), super::MEMORY_TAG) };
    kernel_checks_too(granule.matching, granule.mismatching)
}

/// A load and a store by `address`, to memory that `matching` matches.
fn accesses(matching: *mut u64, address: *mut u64) -> Outcome {
    let expected = (matching != address).then_some(Fault {
        code: SEGV_MTESERR,
        address: address as u64,
    });
    // SAFETY: the word is mapped and nobody else's.
    unsafe { matching.write_volatile(BEFORE) };
    // SAFETY: as above.
    let (value, fault) = unsafe { faults::load(address, OTHER) };
    ensure!(
        fault == expected,
        "a load by {address:p} from {matching:p} raised {fault:x?}, not {expected:x?}"
    );
    let right = if fault.is_some() { OTHER } else { BEFORE };
    ensure!(
        value == right,
        "after a load by {address:p} from {matching:p} the register is {value:#x}, not {right:#x}"
    );

    // SAFETY: as above.
    let fault = unsafe { faults::store(address, OTHER) };
    ensure!(
        fault == expected,
        "a store by {address:p} to {matching:p} raised {fault:x?}, not {expected:x?}"
    );
    // SAFETY: as above.
    let word = unsafe { matching.read_volatile() };
    let right = if fault.is_some() { BEFORE } else { OTHER };
    ensure!(
        word == right,
        "after a store by {address:p} to {matching:p} the word is {word:#x}, not {right:#x}"
    );
    Ok(())
}

fn kernel_checks_too(matching: *mut u64, mismatching: *mut u64) -> Outcome {
    let (_reader, writer) = io::pipe().map_err(failed("make a pipe"))?;
    // SAFETY: the word is mapped; where the tag does not match, the kernel says so.
    let written = |pointer: *mut u64| unsafe { libc::write(writer.as_raw_fd(), pointer.cast(), 8) };
    let by_mismatching = written(mismatching);
    let error = io::Error::last_os_error();
    let by_matching = written(matching);
    ensure!(
        by_mismatching == -1 && error.raw_os_error() == Some(libc::EFAULT),
        "write(2) from mismatching memory returned {by_mismatching} ({error}), not EFAULT"
    );
    ensure!(
        by_matching == 8,
        "write(2) from matching memory returned {by_matching}, not 8"
    );
    Ok(())
}
