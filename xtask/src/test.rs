//! `cargo xtask test`: the tests that run natively, those of single aarch64 programs, and the
//! scripts of `tests/lab`, which run in the lab's host.
//!
//! A script passes with status 0 and is skipped with 77, its last line saying why. Scripts share
//! one host unless their header asks for another; a script that hangs or ends its host fails, and
//! those after it get a new host.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};
use clap::Args;

use crate::compile::Workspace;
use crate::lab::{Choice, Host, Lab};
use crate::machine::{Input, Outcome, console_tail};
use crate::progress::say;
use crate::script::{self, Script};
use crate::toolchain::Toolchain;
use crate::{command, interrupt, ports};

/// As automake says it.
const SKIPPED: u8 = 77;
/// Crates whose tests need aarch64 with MTE, but no machine around it.
const SINGLE_PROGRAM_CRATES: &[&str] = &["mte"];
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
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// The test that breaks migrations.
const FAULTS: &str = "migration-faults";
/// What one of them, or a move, takes at most, on a machine that is not busy.
const A_FAULT: Duration = Duration::from_secs(60);
/// The tests that move a guest again and again.
const MOVING: &[&str] = &["migration", "migration-at-work", "migration-two-hosts"];

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
    /// How often something happens in the tests that were asked for, if that was said.
    fn repeats(&self) -> Option<u32> {
        self.faults.or(self.moves)
    }
}

/// Runs the tests; the status is 1 if any failed.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let filter = match arguments.faults {
        Some(_) => Some(FAULTS),
        None => arguments.filter.as_deref(),
    };
    let only_lab = arguments.lab || arguments.repeats().is_some();
    let mut parts = Vec::new();
    if !only_lab {
        parts.push(("native", native(filter)?));
    }
    if !arguments.native {
        match Lab::open(true) {
            Ok(lab) => {
                if !only_lab {
                    parts.push(("aarch64", single_programs(&lab, filter)?));
                }
                parts.push(("lab", in_host(&lab, filter, arguments)?));
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

fn in_host(lab: &Lab, filter: Option<&str>, arguments: &Arguments) -> Result<Part> {
    let started = Instant::now();
    let mut scripts = script::in_folder(&lab.workspace.workspace_root.join("tests/lab"))?;
    if let Some(filter) = filter {
        scripts.retain(|script| script.name.contains(filter));
    }
    // Those that share a host first, so that it boots once.
    scripts.sort_by_key(|script| !script.wants.can_share());
    if arguments.moves.is_some() {
        scripts.retain(|script| MOVING.contains(&&*script.name));
    }
    let mut variables = String::new();
    for (name, value) in [
        ("FAULTS", arguments.faults),
        ("MOVES", arguments.moves),
        ("SEED", arguments.seed.map(u32::from)),
    ] {
        if let Some(value) = value {
            variables += &format!("export {name}={value}\n");
        }
    }
    if let Some(repeats) = arguments.repeats() {
        for script in &mut scripts {
            script.wants.limit = script.wants.limit.max(A_FAULT * (repeats + 1));
        }
    }
    let mut tally = Tally::default();
    let mut session = Session {
        lab,
        host: None,
        output: Output::default(),
        variables,
        tells: arguments.repeats().is_some(),
    };
    for script in &scripts {
        tally.add(session.test(script)?);
    }
    Ok((tally, started.elapsed().as_secs_f64()))
}

/// The host that scripts share, while there is one.
struct Session<'a> {
    lab: &'a Lab,
    host: Option<Host>,
    output: Output,
    /// What scripts find in their environment.
    variables: String,
    /// Whether their output is shown also if they pass.
    tells: bool,
}

impl Session<'_> {
    fn test(&mut self, script: &Script) -> Result<Tally> {
        let started = Instant::now();
        let result = self.attempt(script);
        interrupt::check()?;
        let seconds = started.elapsed().as_secs_f64();
        let text = self.output.take();
        let (word, reason, tally) = verdict(&result, script, &text);
        println!("{word} {seconds:7.1} s  {}{reason}", script.name);
        if tally.failed == 0 && self.tells {
            print_block(&format!("output of {}", script.name), &text);
        }
        if tally.failed > 0 {
            self.show_evidence(script, &text, result.as_ref().err());
        }
        let host_is_usable = matches!(result, Ok(Outcome::Exit(_)));
        if !host_is_usable || !script.wants.can_share() {
            self.host = None;
        }
        Ok(tally)
    }

    fn attempt(&mut self, script: &Script) -> Result<Outcome> {
        if self.host.is_none() || !script.wants.can_share() {
            // The old host ends before the new one needs its memory.
            self.host = None;
            self.host = Some(self.boot(&script.wants.host)?);
        }
        let host = self.host.as_mut().context("there is no host")?;
        std::fs::create_dir_all(host.jobs_folder().join(&script.name))?;
        host.machine.run(
            &(self.variables.clone() + &job(&script.name)),
            Some(script.wants.limit),
        )
    }

    fn boot(&self, choice: &Choice) -> Result<Host> {
        let output = ports::sink(self.output.clone());
        let prepare = |lab: &Path| {
            crate::lab::copy_folder(
                &self.lab.workspace.workspace_root.join("tests/lab"),
                &lab.join("tests"),
            )
        };
        self.lab
            .boot(choice, Input::Nothing, Arc::clone(&output), output, prepare)
    }

    fn show_evidence(&self, script: &Script, text: &str, error: Option<&Error>) {
        print_block(&format!("output of {}", script.name), text);
        let Some(host) = &self.host else {
            // It did not even start.
            print_block(
                "the host",
                &error.map_or_else(String::new, |error| format!("{error:#}")),
            );
            return;
        };
        for (title, console) in host.machine.consoles() {
            print_block(title, &console);
        }
        let left = host.jobs_folder().join(&script.name);
        for entry in std::fs::read_dir(&left).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".console") {
                print_block(&name, &console_tail(&entry.path(), 60));
            }
        }
    }
}

/// How a test ended: in a word, why, and as a figure.
fn verdict(result: &Result<Outcome>, script: &Script, text: &str) -> (&'static str, String, Tally) {
    let failed = |reason: String| {
        (
            "FAIL",
            reason,
            Tally {
                failed: 1,
                ..Tally::default()
            },
        )
    };
    match result {
        Ok(Outcome::Exit(0)) => (
            "PASS",
            String::new(),
            Tally {
                passed: 1,
                ..Tally::default()
            },
        ),
        Ok(Outcome::Exit(SKIPPED)) => {
            let reason = format!(": {}", command::last_lines(text, 1));
            (
                "SKIP",
                reason,
                Tally {
                    skipped: 1,
                    ..Tally::default()
                },
            )
        }
        Ok(Outcome::Exit(status)) => failed(format!(": status {status}")),
        Ok(Outcome::TimedOut) => failed(format!(
            ": took longer than {} s",
            script.wants.limit.as_secs()
        )),
        Ok(Outcome::ReaderGone) => failed(": its output could not be kept".to_owned()),
        // The console that follows in the error is shown with the rest of the evidence.
        Err(error) => failed(format!(
            ": {}",
            format!("{error:#}").lines().next().unwrap_or_default()
        )),
    }
}

/// What runs a test script: in an empty folder of its own, `$OUT` being a folder for consoles and
/// what else helps to understand a failure.
fn job(name: &str) -> String {
    format!(
        "export OUT=/lab/jobs/{name}\nmkdir -p /tmp/{name}\ncd /tmp/{name}\nexec bash /lab/tests/{name}.sh 2>&1 < /dev/null\n"
    )
}

fn print_block(title: &str, text: &str) {
    if text.trim().is_empty() {
        say(&format!("{title}: empty"));
        return;
    }
    println!("--- {title} ---");
    println!("{}", text.trim_end());
    println!("--- end of {title} ---");
}

/// The output of a script, kept until it is known whether anyone wants it.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    fn take(&self) -> String {
        let bytes = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
