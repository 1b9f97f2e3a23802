//! Runs other programs: with their output kept, so that it can be shown when they fail, and so
//! that they end when xtask is interrupted.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::interrupt;

/// Runs `command` to its end and returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let program = name(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let status = wait(&mut child)?;
    let stdout = stdout.join().unwrap_or_default();
    let stderr = stderr.join().unwrap_or_default();
    if !status.success() {
        bail!("{program} failed ({status}): {}", last_lines(&stderr, 15));
    }
    Ok(stdout)
}

/// Runs `command` with xtask's own standard streams; says whether it succeeded.
pub fn passes(command: &mut Command) -> Result<bool> {
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {}", name(command)))?;
    Ok(wait(&mut child)?.success())
}

/// Waits for `child`; ends it when xtask is interrupted.
pub fn wait(child: &mut Child) -> Result<std::process::ExitStatus> {
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a program")? {
            return Ok(status);
        }
        if let Err(interrupted) = interrupt::check() {
            terminate(child);
            return Err(interrupted);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Asks `child` and all it has started to end, and waits until it has, so that it can remove what
/// it made. All of them, because mmdebstrap waits for those it has started.
fn terminate(child: &mut Child) {
    for _ in 0..10 {
        // More than once: a shell's child that has not become its program yet loses the signal
        // in the shell's handler.
        ask_to_end(&with_descendants(child.id()));
        for _ in 0..40 {
            if matches!(child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(25));
        }
    }
    let _ = child.kill();
    let _ = child.wait();
}

fn ask_to_end(processes: &[u32]) {
    let refused: Vec<String> = processes
        .iter()
        .filter(|pid| signal(**pid) == Err(Errno::PERM))
        .map(ToString::to_string)
        .collect();
    if !refused.is_empty() {
        // They run by sudo, which can end them too. They may have ended in the meantime.
        let _ = Command::new("sudo")
            .args(["-n", "kill", "-TERM"])
            .args(refused)
            .status();
    }
}

fn signal(pid: u32) -> std::result::Result<(), Errno> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(Errno::SRCH)?;
    kill_process(pid, Signal::TERM)
}

/// A process, its children, theirs, and so on.
fn with_descendants(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(parent) = found.get(next) {
        let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
        let children = children.unwrap_or_default();
        found.extend(
            children
                .split_whitespace()
                .filter_map(|child| child.parse::<u32>().ok()),
        );
        next += 1;
    }
    found
}

/// Whether the search path has `program`.
pub fn exists(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Administrators' programs are not on every user's path.
    let more = ["/usr/sbin".into(), "/sbin".into()];
    std::env::split_paths(&path)
        .chain(more)
        .any(|directory| directory.join(program).is_file())
}

/// The last `count` lines of `text`.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

pub fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

pub fn collect<R: Read + Send + 'static>(stream: Option<R>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // What was read before an error is still worth showing.
            let _ = stream.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn output_of_a_program_is_returned() {
        let text = output(Command::new("echo").arg("one two")).unwrap();

        assert_eq!(text, "one two\n");
    }

    #[test]
    fn a_failing_program_is_reported_with_what_it_said() {
        let error =
            output(Command::new("sh").args(["-c", "echo no luck >&2; exit 3"])).unwrap_err();

        let text = error.to_string();
        assert!(text.contains("no luck"), "{text}");
        assert!(text.contains('3'), "{text}");
    }

    #[test]
    fn a_program_that_waits_for_another_ends_with_it() {
        let script = "trap : TERM; sleep 1000; exit 7";
        let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        while with_descendants(child.id()).len() < 2 {
            std::thread::sleep(Duration::from_millis(1));
        }

        terminate(&mut child);

        assert_eq!(child.wait().unwrap().code(), Some(7));
    }

    #[test]
    fn a_program_that_misses_the_first_request_ends_by_the_next() {
        let script = "trap 'trap - TERM' TERM; echo ready; while :; do sleep 0.01; done";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdout
            .take()
            .unwrap()
            .read_exact(&mut [0; 6])
            .unwrap();

        terminate(&mut child);

        assert_eq!(child.wait().unwrap().signal(), Some(Signal::TERM.as_raw()));
    }

    #[test]
    fn last_lines_keeps_the_end() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines("a", 2), "a");
    }
}
