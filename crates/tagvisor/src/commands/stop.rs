//! `tagvisor stop`: asks a machine to end, and waits until it is gone.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;

use super::Named;
use super::machine::{Error, Machine};
use crate::api::client;

/// How long to wait between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Which machine, and how long to wait.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    named: Named,
    /// For how many seconds to wait until it is gone
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u32,
}

/// It is still there.
#[derive(Debug, thiserror::Error)]
#[error(
    "machine `{name}` was asked to end and is still there after {seconds} s; `tagvisor kill {name}` ends it at once"
)]
pub struct StillThere {
    name: String,
    seconds: u32,
}

/// Ends a machine, as pulling its plug does, with its disks flushed, and its VMM.
///
/// # Errors
/// It does not answer, or does not end in time.
pub fn stop(args: &Args) -> super::Result {
    let machine = args.named.machine()?;
    let timeout = Duration::from_secs(args.timeout.into());
    let deadline = Instant::now() + timeout;
    ask(&machine, timeout)?;
    while is_there(&machine) {
        if Instant::now() >= deadline {
            return Err(StillThere {
                name: machine.name,
                seconds: args.timeout,
            }
            .into());
        }
        thread::sleep(PAUSE);
    }
    Ok(ExitCode::SUCCESS)
}

fn ask(machine: &Machine, timeout: Duration) -> Result<(), Error> {
    let patience = timeout.max(Duration::from_secs(1));
    match machine.ask(|client| client.clone().patient(patience).shut_down_vmm()) {
        // It ended before it could be asked.
        Err(Error::Asked {
            source: client::Error::Nobody(_),
            ..
        }) if machine.running.is_some() && !is_there(machine) => Ok(()),
        asked => asked,
    }
}

fn is_there(machine: &Machine) -> bool {
    match &machine.running {
        Some(running) => running.is_running(),
        None => machine.client.process().is_ok(),
    }
}
