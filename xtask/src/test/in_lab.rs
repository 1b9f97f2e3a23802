//! The scripts of `tests/lab`, each in a host of the lab.
//!
//! A script passes with status 0 and is skipped with 77, its last line saying why. Scripts share
//! one host unless their header asks for another; a script that hangs or ends its host fails, and
//! those after it get a new host. Several hosts run at once where the machine bears that.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};

use super::{Arguments, Part, Tally};
use crate::lab::{Choice, Host, Lab};
use crate::machine::{Input, Outcome, console_tail};
use crate::script::{self, Script};
use crate::{command, interrupt, ports};

/// As automake says it.
const SKIPPED: u8 = 77;
/// What a move, whole or broken, or a restore, takes at most, on a machine that is not busy.
const A_REPEAT: Duration = Duration::from_secs(60);
/// The CPUs of this machine that one of the lab's hosts keeps at work: with fewer, each takes as much longer as there are more.
const CPUS_A_HOST: usize = 2;
/// The memory of this machine that one of the lab's hosts, or a pair of them, may want.
const MEMORY_A_HOST: u64 = 10 << 30;

/// Runs those whose name contains `filter`.
pub fn run(lab: &Lab, filter: Option<&str>, arguments: &Arguments) -> Result<Part> {
    let started = Instant::now();
    let mut scripts = script::in_folder(&lab.workspace.workspace_root.join("tests/lab"))?;
    if let Some(filter) = filter {
        scripts.retain(|script| script.name.contains(filter));
    }
    let repeats = arguments.repeats();
    let mut variables = String::new();
    if let Some(repeats) = &repeats {
        writeln!(variables, "export {}={}", repeats.variable, repeats.number)?;
        scripts.retain(|script| repeats.tests.contains(&&*script.name));
        for script in &mut scripts {
            script.wants.limit = script.wants.limit.max(A_REPEAT * (repeats.number + 1));
        }
    }
    if let Some(seed) = arguments.seed {
        writeln!(variables, "export SEED={seed}")?;
    }
    let at_once = match arguments.hosts_at_once {
        Some(hosts) => hosts.get(),
        // Who reads what they print reads one after the other.
        None if repeats.is_some() => 1,
        None => bearable(),
    };
    for script in &mut scripts {
        // Which is that of a host alone.
        script.wants.limit *= at_once as u32;
    }
    let queue = Queue::of(scripts);
    let session = || Session {
        lab,
        host: None,
        output: Output {
            // Who has something done many times wants to see it.
            tells: repeats.is_some(),
            ..Output::default()
        },
        variables: &variables,
    };
    let tally = std::thread::scope(|scope| {
        let others: Vec<_> = (1..at_once)
            .map(|_| scope.spawn(|| session().tests(|| queue.last())))
            .collect();
        let mut tally = session().tests(|| queue.first())?;
        for other in others {
            let result = other.join();
            tally.add(result.map_err(|_| anyhow::anyhow!("a thread that runs tests panicked"))??);
        }
        Ok::<_, Error>(tally)
    })?;
    Ok((tally, started.elapsed().as_secs_f64()))
}

/// How many hosts this machine bears at once.
fn bearable() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, Into::into);
    let system = rustix::system::sysinfo();
    let memory = u64::from(system.mem_unit) * system.totalram;
    (cpus / CPUS_A_HOST)
        .min((memory / MEMORY_A_HOST) as usize)
        .max(1)
}

/// Scripts that nobody runs yet. Those that share a host come first and are taken from that end, so that it boots once.
struct Queue(Mutex<VecDeque<Script>>);

impl Queue {
    fn of(mut scripts: Vec<Script>) -> Self {
        scripts.sort_by_key(|script| !script.wants.can_share());
        Self(Mutex::new(scripts.into()))
    }

    fn first(&self) -> Option<Script> {
        self.lock().pop_front()
    }

    fn last(&self) -> Option<Script> {
        self.lock().pop_back()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Script>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host that scripts share, while there is one.
struct Session<'a> {
    lab: &'a Lab,
    host: Option<Host>,
    output: Output,
    /// What scripts find in their environment.
    variables: &'a str,
}

impl Session<'_> {
    /// Runs one script after the other while there is a next.
    fn tests(mut self, next: impl Fn() -> Option<Script>) -> Result<Tally> {
        let mut tally = Tally::default();
        while let Some(script) = next() {
            tally.add(self.test(&script)?);
        }
        Ok(tally)
    }

    fn test(&mut self, script: &Script) -> Result<Tally> {
        let started = Instant::now();
        let result = self.attempt(script);
        interrupt::check()?;
        let seconds = started.elapsed().as_secs_f64();
        let text = self.output.take();
        let (word, reason, tally) = verdict(&result, script, &text);
        let mut report = format!("{word} {seconds:7.1} s  {}{reason}\n", script.name);
        if tally.failed > 0 {
            report += &self.evidence(script, &text, result.as_ref().err());
        }
        // At once, as others report too.
        print!("{report}");
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
            &format!("{}{}", self.variables, job(&script.name)),
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

    fn evidence(&self, script: &Script, text: &str, error: Option<&Error>) -> String {
        let mut evidence = block(&format!("output of {}", script.name), text);
        let Some(host) = &self.host else {
            // It did not even start.
            let error = error.map_or_else(String::new, |error| format!("{error:#}"));
            return evidence + &block("the host", &error);
        };
        for (title, console) in host.machine.consoles() {
            evidence += &block(title, &console);
        }
        let left = host.jobs_folder().join(&script.name);
        for entry in std::fs::read_dir(&left).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".console") {
                evidence += &block(&name, &console_tail(&entry.path(), 60));
            }
        }
        evidence
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

fn block(title: &str, text: &str) -> String {
    match text.trim() {
        "" => format!("--- {title}: empty ---\n"),
        text => format!("--- {title} ---\n{text}\n--- end of {title} ---\n"),
    }
}

/// The output of a script, kept until it is known whether anyone wants it.
#[derive(Clone, Default)]
struct Output {
    kept: Arc<Mutex<Vec<u8>>>,
    /// Whether it is shown as it comes, too.
    tells: bool,
}

impl Output {
    fn take(&self) -> String {
        let bytes = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.tells {
            io::stdout().write_all(bytes)?;
        }
        self.kept
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
    fn scripts_that_share_a_host_are_taken_from_one_end() {
        let folder = tempfile::tempdir().unwrap();
        for (name, header) in [
            ("a", "own-host"),
            ("b", "timeout=5"),
            ("c", "cpus=4"),
            ("d", ""),
        ] {
            let text = format!("#!/bin/bash\n# lab: {header}\n");
            std::fs::write(folder.path().join(name).with_extension("sh"), text).unwrap();
        }
        let queue = Queue::of(script::in_folder(folder.path()).unwrap());

        let first = std::iter::from_fn(|| queue.first()).take(2);
        let first: Vec<_> = first.map(|script| script.name).collect();
        let last: Vec<_> = std::iter::from_fn(|| queue.last())
            .map(|script| script.name)
            .collect();

        assert_eq!(first, ["b", "d"]);
        assert_eq!(last, ["c", "a"]);
    }
}
