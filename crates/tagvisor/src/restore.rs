//! `tagvisor restore`: takes up a machine from a snapshot and runs it to its end.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args as ClapArgs;
use vmm::console::ConsoleConfig;
use vmm::machine::snapshot::{self, SavedMachine};

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
    let name = match args.name {
        Some(name) => Some(name),
        None => saved_name(&args)?,
    };
    let restored_name = name.clone();
    let console = args.console;
    let restoration = Restoration {
        request: RestoreRequest {
            file: std::path::absolute(&args.file)?,
            bases: args.bases,
            lazy: args.lazy,
            paused: args.paused,
        },
        change: Box::new(move |config| {
            config.name = restored_name;
            if let Some(console) = console {
                config.console = console;
            }
        }),
    };
    until_its_end(&args.kvm, name.as_deref(), Beginning::Restore(restoration))
}

/// The name that the machine had. It is taken before anything else is done, so it is read on its own.
fn saved_name(args: &Args) -> Result<Option<String>, Box<dyn std::error::Error>> {
    let saved = snapshot::open(&args.file, &args.bases)
        .map_err(snapshot::ReadError::from)
        .and_then(|snapshot| SavedMachine::read(&snapshot))
        .map_err(|e| format!("snapshot {}: {e}", args.file.display()))?;
    Ok(saved.config.name)
}
