//! The other vCPUs: brought up once, each given the same function, and awaited.

use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

#[cfg(panic = "abort")]
use crate::{machine::Machine, start::secondary_entry};
use crate::{power, read_register};

/// The most vCPUs that payloads have room for.
pub const MAX_PROCESSORS: usize = 32;

/// What the other vCPUs are to do, a `fn(usize)`.
static WORK: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
/// How many of them have done it.
static DONE: AtomicUsize = AtomicUsize::new(0);

/// The number of this vCPU: 0 for the one that booted.
pub fn current() -> usize {
    read_register!("tpidr_el1") as usize
}

/// Runs `work` on every vCPU at once, with the vCPU's number, and returns when all have done it. Can be used once: the
/// other vCPUs turn themselves off afterwards.
///
/// # Errors
/// The number of the vCPU that could not be turned on, and PSCI's answer.
#[cfg(panic = "abort")]
pub fn run_on_all(
    machine: &Machine,
    work: fn(usize),
) -> Result<(), (usize, smccc::psci::error::Error)> {
    WORK.store(work as *mut (), Ordering::Release);
    for (number, &affinity) in machine.processors().iter().enumerate().skip(1) {
        power::processor_on(affinity, secondary_entry(), number as u64)
            .map_err(|error| (number, error))?;
    }
    work(0);
    while DONE.load(Ordering::Acquire) < machine.processors().len() - 1 {
        core::hint::spin_loop();
    }
    Ok(())
}

/// The life of a vCPU other than the first.
pub fn work(number: usize) -> ! {
    let address: *mut () = WORK.load(Ordering::Acquire);
    // SAFETY: `run_on_all` stored a function of this type before it turned this vCPU on.
    let work: fn(usize) = unsafe { core::mem::transmute(address) };
    work(number);
    DONE.fetch_add(1, Ordering::Release);
    power::processor_off()
}
