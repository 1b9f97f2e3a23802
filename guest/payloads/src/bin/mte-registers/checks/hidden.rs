//! Without MTE, a guest's ID register has no trace of it and its registers are undefined instructions.

use core::arch::asm;

use mte::MteLevel;
use payloads::exceptions::{Exception, attempt};
use payloads::report::Report;
use payloads::tagging::features;

/// Attempts a read (`mrs`) and a write (`msr`) of a register.
macro_rules! attempts {
    ($register:literal) => {
        (
            // SAFETY: the exception is expected and skipped; the handler changes only the registers declared here.
            attempt(|| unsafe { asm!(concat!("mrs x0, ", $register), out("x0") _, clobber_abi("C")) }).1,
            // SAFETY: as above; if it did not fault, the register would be given its value after reset.
            attempt(|| unsafe { asm!(concat!("msr ", $register, ", xzr"), clobber_abi("C")) }).1,
        )
    };
}

pub fn check(report: &mut Report) {
    report.check("mte-hidden-in-id-register", |check| {
        check.that(
            features().level() == MteLevel::None,
            format_args!("it says: {}", features().level()),
        );
    });
    undefined(report, "rgsr-undefined", attempts!("S3_0_C1_C0_5"));
    undefined(report, "gcr-undefined", attempts!("S3_0_C1_C0_6"));
    undefined(report, "tfsr-undefined", attempts!("S3_0_C5_C6_0"));
    undefined(report, "tfsre0-undefined", attempts!("S3_0_C5_C6_1"));
}

fn undefined(
    report: &mut Report,
    name: &'static str,
    (read, write): (Option<Exception>, Option<Exception>),
) {
    report.check(name, |check| {
        for (access, exception) in [("read", read), ("write", write)] {
            let is_undefined = exception.is_some_and(|exception| exception.class() == 0);
            check.that(
                is_undefined,
                format_args!("a {access} is not undefined but raised {exception:x?}"),
            );
        }
    });
}
