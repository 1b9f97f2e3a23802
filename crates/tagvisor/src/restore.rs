//! `tagvisor restore`: takes up a machine from a snapshot and runs it to its end.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args as ClapArgs;
use vmm::console::ConsoleConfig;

use crate::control::RestoreRequest;
use crate::life::{Beginning, Restoration};
use crate::run::{EXIT_STATUS, parse_console, until_its_end};

/// What to restore.
#[derive(ClapArgs)]
#[command(after_help = EXIT_STATUS)]
pub struct Args {
    /// The snapshot. What it is based on is looked for beside it, whatever the files' names
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// A snapshot that FILE, or one that FILE is based on, is based on; each one given is one more
    #[arg(long = "base", value_name = "FILE")]
    bases: Vec<PathBuf>,
    /// Let the guest run at once; each page comes, with its tags, when it is touched
    #[arg(long)]
    lazy: bool,
    /// Let the guest stand still until `tagvisor resume`
    #[arg(long)]
    paused: bool,
    /// The machine's name, unique among those that run [default: the one it had]
    #[arg(long)]
    name: Option<String>,
    /// The serial console: stdio, off, or file=PATH (output only, behind what is there) [default: the one it had]
    #[arg(long, value_name = "WHERE", value_parser = parse_console)]
    console: Option<ConsoleConfig>,
    /// The hypervisor's device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: PathBuf,
}

/// Restores a machine and runs it to its end.
///
/// # Errors
/// It cannot be restored, or cannot go on.
pub fn restore(args: Args) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut restoration = Restoration::open(RestoreRequest {
        file: std::path::absolute(&args.file)?,
        bases: args.bases,
        lazy: args.lazy,
        paused: args.paused,
    })?;
    let config = &mut restoration.saved.config;
    if args.name.is_some() {
        config.name = args.name;
    }
    if let Some(console) = args.console {
        config.console = console;
    }
    let name = config.name.clone();
    until_its_end(
        &args.kvm,
        name.as_deref(),
        Beginning::Restore(Box::new(restoration)),
    )
}
