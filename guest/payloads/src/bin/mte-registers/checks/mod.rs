//! The checks, by what they are about, and which of them a command line asks for.

mod faults;
mod hidden;
mod privacy;
mod visible;

use payloads::machine::Machine;
use payloads::report::Report;

/// Makes the checks that the command line asks for.
pub fn run(machine: &Machine, report: &mut Report) {
    match machine.argument("mte") {
        Some("on") => {
            visible::check(machine, report);
            faults::check(report);
            privacy::check(machine, report);
        }
        Some("off") => hidden::check(report),
        _ => report.check("arguments", |check| {
            check.that(
                false,
                format_args!(
                    "give mte=on or mte=off in bootargs, not '{}'",
                    machine.bootargs()
                ),
            );
        }),
    }
}
