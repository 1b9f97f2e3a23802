//! `tagvisor`: runs Arm virtual machines whose memory tags survive everything that happens to the machine.

// On other machines the program only says where it would run. Its parts are compiled and tested there all the same.
#![cfg_attr(not(target_arch = "aarch64"), allow(dead_code))]

mod api;
mod check;
mod clone;
mod commands;
mod configuration;
mod control;
mod inspection;
mod life;
mod name;
mod receive;
mod restore;
mod run;
mod signals;
mod wire;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs Arm virtual machines whose memory tags survive everything that happens to the machine.
///
/// A guest with the Memory Tagging Extension (MTE) has a 4-bit tag for every 16 bytes of its memory
/// and checks it on every access. Tagvisor gives Linux guests MTE under KVM on arm64 hosts.
#[derive(Parser)]
#[command(name = "tagvisor", version, max_term_width = 100, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Begin with `tagvisor check`: it says what this host can do. Then, with the kernel of any arm64 distribution:

  tagvisor run --kernel /boot/vmlinuz --initrd initrd.cpio --cmdline 'console=ttyS0' --memory 1G

The environment variable TAGVISOR_LOG sets what is logged to standard error (error, warn, info, debug).";

/// What to say where there is nothing that machines could run on.
#[cfg(not(target_arch = "aarch64"))]
const NOT_AN_ARM_HOST: &str = "machines run on arm64 hosts with KVM, and this is another kind of machine; \
     `cargo xtask host` emulates such a host on it";

#[derive(Subcommand)]
enum Command {
    /// Says what this host can do, what that means, and how to get what is missing.
    Check(check::Args),
    /// Starts a machine and runs it to its end.
    Run(Box<run::Args>),
    /// Takes up a machine from a snapshot, with all of its tags, and runs it to its end.
    Restore(restore::Args),
    /// Waits for a guest that migrates here, with all of its tags, and runs it to its end.
    Receive(Box<receive::Args>),
    /// Starts many machines from one snapshot, or from a machine, which share its memory until they write.
    Clone(clone::Args),
    /// One clone, in a process of its own.
    #[command(hide = true)]
    CloneMachine(clone::OneArgs),
    /// Starts a VMM without a machine, to be driven over its control socket.
    Api(commands::api::Args),
    /// Lists the machines that run.
    Ls(commands::ls::Args),
    /// Says what a machine is and does.
    Info(commands::info::Args),
    /// Stops a machine's guest where it is.
    Pause(commands::Named),
    /// Lets a paused guest go on.
    Resume(commands::Named),
    /// Ends a machine, as pulling its plug does, with its disks flushed, and waits until it is gone.
    Stop(commands::stop::Args),
    /// Ends the process of a machine at once, whatever it does.
    Kill(commands::Named),
    /// Writes a machine to a file, with its memory and tags, while it runs.
    Snapshot(commands::snapshot::Args),
    /// Shows the memory tags of a machine or a snapshot: figures, a picture, dumps, searches, differences.
    Tags(commands::tags::Args),
    /// Writes a machine or a snapshot as an ELF core, with its tags, for debuggers.
    Core(commands::core::Args),
    /// Lets gdb debug a machine's guest, with its memory tags.
    Gdb(commands::gdb::Args),
    /// Sends a machine's guest to another host, with its memory and tags, while it runs.
    Migrate(Box<commands::migrate::Args>),
}

impl Command {
    const fn runs_machines(&self) -> bool {
        matches!(
            self,
            Self::Run(_)
                | Self::Restore(_)
                | Self::Receive(_)
                | Self::CloneMachine(_)
                | Self::Api(_)
        )
    }
}

fn main() -> ExitCode {
    init_log();
    let command = Cli::parse().command;
    if !command.runs_machines() {
        // A reader who leaves early (`tagvisor check | head`) ends us as any other program, not by a panic.
        // It does not end a machine that runs.
        signals::restore_broken_pipe();
    }
    let result = match command {
        Command::Check(args) => check::check(&args),
        Command::Run(args) => run::run(*args),
        Command::Restore(args) => restore::restore(args),
        Command::Receive(args) => receive::receive(*args),
        Command::Clone(args) => clone::clone(&args),
        Command::CloneMachine(args) => clone::run_one(&args),
        Command::Api(args) => commands::api::api(&args),
        Command::Ls(args) => commands::ls::ls(&args),
        Command::Info(args) => commands::info::info(&args),
        Command::Pause(named) => commands::pause(&named),
        Command::Resume(named) => commands::resume(&named),
        Command::Stop(args) => commands::stop::stop(&args),
        Command::Kill(named) => commands::kill::kill(&named),
        Command::Snapshot(args) => commands::snapshot::snapshot(args),
        Command::Tags(args) => commands::tags::tags(&args),
        Command::Core(args) => commands::core::core(&args),
        Command::Gdb(args) => commands::gdb::gdb(&args),
        Command::Migrate(args) => commands::migrate::migrate(*args),
    };
    result.unwrap_or_else(|e| {
        // `eprintln!` panics where nobody reads standard error.
        let _ = writeln!(std::io::stderr(), "tagvisor: {e}");
        ExitCode::FAILURE
    })
}

fn init_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TAGVISOR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        // They would go to standard error as well, by a panic.
        .log_internal_errors(false)
        .init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
