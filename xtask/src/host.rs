//! `cargo xtask host`: a command, or a shell, in the lab's host.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use crate::compile::Profile;
use crate::lab::{Choice, Lab};
use crate::machine::{Input, Outcome, quoted};
use crate::{ports, progress, terminal};

/// As `timeout` says it.
const TIMED_OUT: u8 = 124;
/// As a shell says it of a program that SIGPIPE ended.
const READER_GONE: u8 = 141;

/// The host's machine and the command
#[derive(Args)]
pub struct Arguments {
    /// 2 starts a second host on a network with this one, where `peer COMMAND` runs commands
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=2))]
    hosts: u32,
    /// CPUs of the host
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=512))]
    cpus: u32,
    /// Memory of the host, as QEMU writes it
    #[arg(long, value_name = "SIZE", default_value = "4G")]
    memory: String,
    /// Memory of the second host [default: as much]
    #[arg(long, value_name = "SIZE")]
    peer_memory: Option<String>,
    /// One CPU whose time counts instructions: figures that repeat
    #[arg(long)]
    icount: bool,
    /// One more word for the command line of the host's kernel; can be repeated
    #[arg(long = "append", value_name = "WORD", allow_hyphen_values = true)]
    kernel_args: Vec<String>,
    /// One more argument for QEMU; can be repeated
    #[arg(long = "qemu-arg", value_name = "ARG", allow_hyphen_values = true)]
    qemu_args: Vec<String>,
    /// A folder to see at /share in the host, read-write
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,
    /// The host's kernel: trixie, bookworm, a Debian linux-image package, or an arm64 Image
    #[arg(long, value_name = "DEB|IMAGE")]
    kernel: Option<String>,
    /// End the host after this many seconds, with status 124
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Programs as users get them, which benchmarks measure, not as tests have them
    #[arg(long)]
    release: bool,
    /// Take the programs as they are, without building them
    #[arg(long)]
    no_build: bool,
    /// The command and its arguments; a shell if there is none
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the command and returns its exit status.
pub fn run(arguments: &Arguments) -> Result<u8> {
    if arguments.command.is_empty() && !terminal::is_interactive() {
        bail!("a shell needs a terminal: name a command after --");
    }
    let profile = match arguments.release {
        true => Profile::Release,
        false => Profile::Lab,
    };
    let lab = Lab::open(profile, !arguments.no_build)?;
    let choice = Choice {
        hosts: arguments.hosts,
        cpus: arguments.cpus,
        memory: arguments.memory.clone(),
        peer_memory: arguments.peer_memory.clone(),
        icount: arguments.icount,
        kernel_args: arguments.kernel_args.clone(),
        qemu_args: arguments.qemu_args.clone(),
        share: arguments.share.clone(),
        kernel: arguments.kernel.clone(),
    };
    let (out, err) = (
        ports::sink(std::io::stdout()),
        ports::sink(std::io::stderr()),
    );
    if arguments.command.is_empty() {
        let mut host = lab.boot(&choice, Input::Terminal, out, err, |_| Ok(()))?;
        let _raw = terminal::Raw::enter()?;
        return Ok(status(&host.machine.shell()?));
    }
    let mut host = lab.boot(&choice, Input::Stdin, out, err, |_| Ok(()))?;
    let script = script(&arguments.command, arguments.share.is_some());
    let limit = arguments.timeout.map(Duration::from_secs);
    Ok(status(&host.machine.run(&script, limit)?))
}

/// A script that becomes `command`, in the shared folder if there is one.
fn script(command: &[String], shared: bool) -> String {
    let folder = if shared { "/share" } else { "/root" };
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    format!("cd {folder}\nexec {}\n", words.join(" "))
}

fn status(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::Exit(status) => *status,
        Outcome::ReaderGone => READER_GONE,
        Outcome::TimedOut => {
            progress::say("the time is up; the host was ended");
            TIMED_OUT
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_the_command_stays_one_word() {
        let command = ["echo", "a b", "it's"].map(str::to_owned);

        assert_eq!(
            script(&command, false),
            "cd /root\nexec 'echo' 'a b' 'it'\\''s'\n"
        );
    }

    #[test]
    fn a_command_starts_in_the_shared_folder() {
        assert!(script(&["true".to_owned()], true).starts_with("cd /share\n"));
    }
}
