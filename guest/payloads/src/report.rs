//! What a payload says of its checks: a line each, `PASS name`, `SKIP name: why` or `FAIL name: why`, and a last line
//! `payload: ok` or `payload: failed`.

use core::fmt;

use crate::power;
use crate::println;

/// The outcome of all checks so far.
pub struct Report {
    failed: bool,
}

/// One check under way. The first thing that does not hold fails it and is printed.
pub struct Check {
    name: &'static str,
    failed: bool,
}

impl Report {
    /// A report on nothing yet.
    #[expect(
        clippy::new_without_default,
        reason = "a report is begun once, by the runtime"
    )]
    pub fn new() -> Self {
        Self { failed: false }
    }

    /// Runs a check and reports on it.
    pub fn check(&mut self, name: &'static str, body: impl FnOnce(&mut Check)) {
        let mut check = Check {
            name,
            failed: false,
        };
        body(&mut check);
        if check.failed {
            self.failed = true;
        } else {
            println!("PASS {name}");
        }
    }

    /// Says that a check cannot be made on this machine.
    pub fn skip(&mut self, name: &'static str, why: &str) {
        println!("SKIP {name}: {why}");
    }

    /// Has nothing failed?
    pub fn all_passed(&self) -> bool {
        !self.failed
    }
}

impl Check {
    /// Fails the check unless `holds`.
    pub fn that(&mut self, holds: bool, otherwise: fmt::Arguments<'_>) {
        if !holds && !self.failed {
            self.failed = true;
            println!("FAIL {}: {otherwise}", self.name);
        }
    }

    /// Fails the check unless two values are the same.
    pub fn equal(&mut self, what: &str, actual: u64, expected: u64) {
        self.that(
            actual == expected,
            format_args!("{what} is {actual:#x} and should be {expected:#x}"),
        );
    }
}

/// Says how the payload ended and turns the machine off.
pub fn end(all_passed: bool) -> ! {
    println!("payload: {}", if all_passed { "ok" } else { "failed" });
    power::off()
}
