//! A small runtime for bare-metal guests, and the payloads (`src/bin`) that stand on it.
//!
//! A payload is a flat image that `tagvisor run --flat` loads at the start of RAM and enters at its first byte: EL1, MMU
//! off, `x0` the address of the device tree. [`start`] turns the MMU on with all memory Normal-Tagged, reads the device
//! tree ([`machine`]), opens the serial port it names ([`console`]) and calls the payload. A payload reports each check
//! with a line ([`report`]) and ends with `payload: ok` or `payload: failed` and PSCI `SYSTEM_OFF` ([`power`]).
//! [`processors`] brings the other vCPUs up, [`interrupts`] lets a vCPU sleep until its timer fires, [`exceptions`]
//! catches the faults that a check provokes, [`registers`] reaches system registers.
//!
//! Arguments come from the device tree's `bootargs`, as `name=value` words.
//!
//! Payloads also run directly under a machine emulator that follows the same boot protocol; both ns16550a and PL011
//! serial ports are driven for that reason.
#![no_std]
#![cfg(target_arch = "aarch64")]

pub mod console;
pub mod exceptions;
pub mod interrupts;
pub mod machine;
#[cfg(panic = "abort")]
mod memory_functions;
pub mod power;
pub mod processors;
pub mod registers;
pub mod report;
#[cfg(panic = "abort")]
pub mod start;
pub mod tagging;

/// Makes `run`, a `fn(&Machine, &mut Report)`, the body of this payload.
#[macro_export]
macro_rules! payload {
    ($run:path) => {
        /// Called by the runtime once the MMU and the console are up.
        // SAFETY: no other symbol of this name exists in a payload; the runtime declares it with this signature.
        #[unsafe(no_mangle)]
        extern "Rust" fn payload_main(
            machine: &$crate::machine::Machine,
            report: &mut $crate::report::Report,
        ) {
            let run: fn(&$crate::machine::Machine, &mut $crate::report::Report) = $run;
            run(machine, report);
        }

        #[panic_handler]
        fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
            $crate::println!("FAIL {info}");
            $crate::report::end(false)
        }
    };
}
