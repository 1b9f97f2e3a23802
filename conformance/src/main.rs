//! `conformance`: runs the checks on this machine's hypervisor, or on the model, and prints a line
//! for each.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use conformance::model::ModelTestbed;
use conformance::{Check, Stop, Testbed, checks};
use engine::model::HostRules;

/// What a hypervisor owes a guest with MTE and its VMM, checked
#[derive(Parser)]
struct Arguments {
    /// Checks the reference model as this version of Linux, such as 6.12, instead of this host's KVM
    #[arg(long, value_name = "VERSION", value_parser = version)]
    model: Option<(u32, u32)>,
    /// Only checks whose name or row contains this
    #[arg(long)]
    filter: Option<String>,
    /// Names the checks and runs none
    #[arg(long)]
    list: bool,
}

fn version(text: &str) -> Result<(u32, u32), String> {
    let parse = || {
        let (major, minor) = text.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    parse().ok_or_else(|| "a version is two numbers with a dot between them".to_owned())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        // The same for every testbed, and this one is on every machine.
        for check in chosen::<ModelTestbed>(&arguments) {
            println!("{:>13} {}", check.row, check.name);
        }
        return ExitCode::SUCCESS;
    }
    match arguments.model {
        None => check_kvm(&arguments),
        Some((major, minor)) => {
            let rules = HostRules::linux(major, minor);
            check(&arguments, &ModelTestbed::new(rules))
        }
    }
}

#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
fn check_kvm(arguments: &Arguments) -> ExitCode {
    match conformance::kvm::KvmTestbed::open() {
        Ok(testbed) => check(arguments, &testbed),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "aarch64")))]
fn check_kvm(_: &Arguments) -> ExitCode {
    eprintln!("error: KVM on arm64 is not on this machine; there is --model 6.12");
    ExitCode::from(2)
}

/// The checks that the filter leaves.
fn chosen<T: Testbed>(arguments: &Arguments) -> Vec<Check<T>> {
    let filter = arguments.filter.as_deref().unwrap_or_default();
    let mut checks = checks::<T>();
    checks.retain(|check| check.name.contains(filter) || check.row.to_string().contains(filter));
    checks
}

fn check<T: Testbed>(arguments: &Arguments, testbed: &T) -> ExitCode {
    let checks = chosen::<T>(arguments);
    // The line of a check says all that its panic would.
    std::panic::set_hook(Box::new(|_| ()));
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for check in &checks {
        match run(check, testbed) {
            Ok(()) => passed += 1,
            Err(Stop::Skip(_)) => skipped += 1,
            Err(Stop::Fail(_)) => failed += 1,
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    // None at all would be a filter that no check has, and no success.
    ExitCode::from(u8::from(failed > 0 || passed + skipped == 0))
}

fn run<T: Testbed>(check: &Check<T>, testbed: &T) -> conformance::Verdict {
    let started = Instant::now();
    let verdict = check.run(testbed);
    let seconds = started.elapsed().as_secs_f64();
    let (word, reason) = match &verdict {
        Ok(()) => ("pass", String::new()),
        Err(Stop::Skip(reason)) => ("skipped", format!(": {reason}")),
        Err(Stop::Fail(reason)) => ("FAIL", format!(": {}", reason.replace('\n', " "))),
    };
    println!(
        "{word:<7} {seconds:6.2} s {:>13} {}{reason}",
        check.row, check.name
    );
    verdict
}
