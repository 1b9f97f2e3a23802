//! `cargo xtask test`: the tests that run natively, those of single aarch64 programs, and the
//! scripts of `tests/lab`, which run in the lab's host ([`in_lab`]).

mod in_lab;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use crate::compile::{Profile, Workspace};
use crate::lab::Lab;
use crate::progress::say;
use crate::toolchain::Toolchain;
use crate::{command, interrupt};

/// Crates whose tests need aarch64, or MTE, but no machine around it.
const SINGLE_PROGRAM_CRATES: &[&str] = &["mte", "tagcodec"];
/// Crates in which loom checks interleavings: built apart, with its own locks and atomics.
const LOOM_CRATES: &[&str] = &["engine"];

/// Which tests to run
#[derive(Args)]
pub struct Arguments {
    /// Only the tests that need no lab
    #[arg(long, conflicts_with = "lab")]
    native: bool,
    /// Only the tests that run in the lab's host
    #[arg(long)]
    lab: bool,
    /// Only the test that breaks migrations in the lab, and so many times
    #[arg(long, value_name = "N", conflicts_with_all = ["native", "filter"])]
    faults: Option<u32>,
    /// At instants that follow from this
    #[arg(long, value_name = "S", requires = "faults")]
    seed: Option<u16>,
    /// Only the tests that move a guest again and again, and so many times
    #[arg(long, value_name = "N", conflicts_with_all = ["native", "faults"])]
    moves: Option<u32>,
    /// Only the tests that save and restore a guest again and again, and so many times
    #[arg(long, value_name = "N", conflicts_with_all = ["native", "faults", "moves"])]
    restores: Option<u32>,
    /// So many of the lab's hosts at once [default: as many as this machine has CPUs and memory for]
    #[arg(long, value_name = "N")]
    hosts_at_once: Option<NonZeroUsize>,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// What some tests of the lab do again and again, so often as was asked.
struct Repeats {
    number: u32,
    /// By which of their variables they are told.
    variable: &'static str,
    tests: &'static [&'static str],
}

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(
            formatter,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

impl Arguments {
    /// What is to be done how often, if that was said.
    fn repeats(&self) -> Option<Repeats> {
        let moving: &[_] = &["migration", "migration-at-work", "migration-two-hosts"];
        let kinds: [(_, _, &[_]); _] = [
            (self.faults, "FAULTS", &["migration-faults"]),
            (self.moves, "MOVES", moving),
            (self.restores, "RESTORES", &["heaps", "snapshots"]),
        ];
        kinds.into_iter().find_map(|(number, variable, tests)| {
            Some(Repeats {
                number: number?,
                variable,
                tests,
            })
        })
    }
}

/// Runs the tests; the status is 1 if any failed.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let filter = arguments.filter.as_deref();
    let only_lab = arguments.lab || arguments.repeats().is_some();
    let mut parts = Vec::new();
    if !only_lab {
        parts.push(("native", native(filter)?));
    }
    if !arguments.native {
        match Lab::open(Profile::Lab, true) {
            Ok(lab) => {
                if !only_lab {
                    parts.push(("aarch64", single_programs(&lab, filter)?));
                }
                parts.push(("lab", in_lab::run(&lab, filter, arguments)?));
            }
            Err(error) => {
                interrupt::check()?;
                say(&format!("error: {error:#}"));
                parts.push((
                    "lab",
                    (
                        Tally {
                            failed: 1,
                            ..Tally::default()
                        },
                        0.0,
                    ),
                ));
            }
        }
    }
    let mut total = Tally::default();
    println!();
    for (name, (tally, seconds)) in &parts {
        println!("{name:>8}: {tally} ({seconds:.0} s)");
        total.add(*tally);
    }
    println!("{total}");
    Ok(u8::from(total.failed > 0))
}

type Part = (Tally, f64);

fn native(filter: Option<&str>) -> Result<Part> {
    let started = Instant::now();
    let cargo = || Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let mut tally = Tally::default();
    let mut tests = cargo();
    if command::exists("cargo-nextest") {
        tests.args(["nextest", "run", "--no-tests=pass", "--no-fail-fast"]);
    } else {
        tests.args(["test", "--no-fail-fast", "--lib", "--bins", "--tests"]);
    }
    tally.add(cargo_tests(tests.args(filter))?);
    if filter.is_none() {
        // As tests they count none, and can only fail.
        let mut benchmarks = cargo();
        tally.add(cargo_tests(benchmarks.args([
            "test",
            "--no-fail-fast",
            "--bench",
            "*",
        ]))?);
    }
    let mut examples = cargo();
    tally.add(cargo_tests(
        examples
            .args(["test", "--no-fail-fast", "--doc", "--quiet"])
            .args(filter),
    )?);
    let workspace = Workspace::open()?;
    for name in LOOM_CRATES {
        let mut interleavings = cargo();
        interleavings
            .args(["test", "--profile", "lab", "--lib", "--package", name])
            .arg("--target-dir")
            .arg(workspace.target_directory.join("loom"))
            .env("RUSTFLAGS", "--cfg loom")
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        tally.add(cargo_tests(interleavings.args(filter))?);
    }
    if filter.is_some() {
        // Those that the filter left out are counted as skipped too.
        tally.skipped = 0;
    }
    Ok((tally, started.elapsed().as_secs_f64()))
}

fn single_programs(lab: &Lab, filter: Option<&str>) -> Result<Part> {
    let started = Instant::now();
    let toolchain = Toolchain::open(&lab.cache)?;
    let mut cargo = toolchain.cargo("test");
    cargo
        .arg("--no-fail-fast")
        .args(["--lib", "--tests"])
        .arg("--target-dir");
    cargo.arg(lab.workspace.target_directory.join(toolchain.name));
    for name in SINGLE_PROGRAM_CRATES {
        cargo.args(["-p", name]);
    }
    let mut runner = lab.tools.qemu_user().into_os_string();
    runner.push(" -cpu max");
    cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", runner);
    let tally = cargo_tests(cargo.args(filter))?;
    Ok((tally, started.elapsed().as_secs_f64()))
}

/// Runs cargo on tests, passes its output on and counts. A failure that is no failed test, such as
/// code that does not compile, counts as one.
fn cargo_tests(cargo: &mut Command) -> Result<Tally> {
    let mut child = cargo
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let counts = [
        count(
            child.stdout.take().context("cargo has no output")?,
            io::stdout(),
        ),
        count(
            child.stderr.take().context("cargo has no output")?,
            io::stderr(),
        ),
    ];
    let status = command::wait(&mut child)?;
    let mut tally = Tally::default();
    for count in counts {
        tally.add(count.join().unwrap_or_default());
    }
    if !status.success() && tally.failed == 0 {
        tally.failed = 1;
    }
    Ok(tally)
}

fn count(
    input: impl Read + Send + 'static,
    mut output: impl Write + Send + 'static,
) -> std::thread::JoinHandle<Tally> {
    std::thread::spawn(move || {
        let mut tally = Tally::default();
        for line in BufReader::new(input).split(b'\n').map_while(io::Result::ok) {
            // Who does not read the output may still want the count.
            let _ = output
                .write_all(&line)
                .and_then(|()| output.write_all(b"\n"));
            tally.add(summary(&String::from_utf8_lossy(&line)));
        }
        tally
    })
}

/// The figures in a summary line of cargo's or nextest's.
fn summary(line: &str) -> Tally {
    // nextest shows what a failed test printed, indented: its own summary is not another one.
    if !line.starts_with("test result:") && !line.trim_start().starts_with("Summary [") {
        return Tally::default();
    }
    let words: Vec<&str> = line
        .split([' ', ',', ';', ':'])
        .filter(|word| !word.is_empty())
        .collect();
    let figure = |name: &str| {
        words
            .windows(2)
            .find(|pair| pair[1] == name)
            .and_then(|pair| pair[0].parse().ok())
            .unwrap_or(0)
    };
    Tally {
        passed: figure("passed"),
        failed: figure("failed") + figure("timed"),
        skipped: figure("ignored") + figure("skipped"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_failed_test_printed_is_no_summary() {
        let printed = "    test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured";
        assert_eq!(summary(printed), Tally::default());
    }

    #[test]
    fn cargos_summary_is_counted() {
        let line = "test result: ok. 12 passed; 1 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.00s";

        assert_eq!(
            summary(line),
            Tally {
                passed: 12,
                failed: 1,
                skipped: 3
            }
        );
    }

    #[test]
    fn nextests_summary_is_counted() {
        let line = "     Summary [   0.012s] 5 tests run: 4 passed, 1 failed, 2 skipped";

        assert_eq!(
            summary(line),
            Tally {
                passed: 4,
                failed: 1,
                skipped: 2
            }
        );
    }

    #[test]
    fn other_lines_count_nothing() {
        assert_eq!(summary("3 passed the river"), Tally::default());
    }
}
