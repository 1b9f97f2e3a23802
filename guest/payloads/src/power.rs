//! PSCI by HVC: turning the machine and its vCPUs on and off.

use smccc::Hvc;
use smccc::psci;

/// Turns the machine off.
pub fn off() -> ! {
    // An error here leaves nothing to be done but to stay silent.
    let _ = psci::system_off::<Hvc>();
    wait_for_ever()
}

/// Restarts the machine.
pub fn reset() -> ! {
    let _ = psci::system_reset::<Hvc>();
    wait_for_ever()
}

/// Turns this vCPU off.
pub fn processor_off() -> ! {
    let _ = psci::cpu_off::<Hvc>();
    wait_for_ever()
}

/// Turns on the vCPU with this MPIDR affinity, to begin at `entry` with `context` in `x0` and its MMU off.
///
/// # Errors
/// What PSCI answers: no such vCPU, already on, …
pub fn processor_on(affinity: u64, entry: u64, context: u64) -> Result<(), psci::error::Error> {
    psci::cpu_on::<Hvc>(affinity, entry, context)
}

/// Asks for the version of PSCI: the cheapest exit to the hypervisor.
pub fn call_hypervisor() {
    let _ = psci::version::<Hvc>();
}

/// Does nothing until the machine is stopped from outside.
pub fn wait_for_ever() -> ! {
    loop {
        // SAFETY: waiting for an interrupt changes nothing; interrupts are masked.
        unsafe { core::arch::asm!("wfi", options(nomem, nostack)) };
    }
}
