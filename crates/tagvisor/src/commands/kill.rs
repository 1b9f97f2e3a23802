//! `tagvisor kill`: ends the process of a machine at once, whatever it does.
//!
//! A process number alone may by now be that of another program. So the process is taken hold of first (a pidfd), and
//! then it is checked that what has this number is the machine: it has the machine's lock file open, and the lock is
//! held. If the machine died and its number was given away before, the check fails; if that happens afterwards, the
//! signal finds nobody.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::Named;
use super::machine::{Error, Machine};

/// For how long to wait until it is gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a machine was not killed.
#[derive(Debug, thiserror::Error)]
pub enum NotKilled {
    /// Which process it is cannot be said for sure.
    #[error(
        "machine `{0}`: its process cannot be told for sure, so none was killed; try again, or see `tagvisor ls`"
    )]
    Unknown(String),
    /// The host refuses.
    #[error("machine `{name}`, process {pid}: {source}")]
    Io {
        /// The machine.
        name: String,
        /// Its process.
        pid: i32,
        /// What the host said.
        source: io::Error,
    },
    /// The kernel has not ended it.
    #[error(
        "machine `{name}`, process {pid}: it was killed and is still there after 10 s; it waits for the kernel, perhaps for a disk"
    )]
    StillThere {
        /// The machine.
        name: String,
        /// Its process.
        pid: i32,
    },
}

/// Kills the process of a machine.
///
/// # Errors
/// It was not done.
pub fn kill(named: &Named) -> super::Result {
    let machine = named.machine()?;
    let pid = process(&machine)?.ok_or_else(|| NotKilled::Unknown(machine.name.clone()))?;
    let error = |source: rustix::io::Errno| NotKilled::Io {
        name: machine.name.clone(),
        pid: pid.as_raw_nonzero().get(),
        source: source.into(),
    };
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(error)?;
    if !is_of(&machine, pid)? {
        return Err(NotKilled::Unknown(machine.name).into());
    }
    pidfd_send_signal(&process, Signal::KILL).map_err(error)?;
    if !ends(&process).map_err(error)? {
        return Err(NotKilled::StillThere {
            name: machine.name.clone(),
            pid: pid.as_raw_nonzero().get(),
        }
        .into());
    }
    Ok(ExitCode::SUCCESS)
}

fn process(machine: &Machine) -> Result<Option<Pid>, Error> {
    match &machine.running {
        Some(running) => Ok(running.process().and_then(Pid::from_raw)),
        None => machine.ask(|client| client.process()).map(Some),
    }
}

/// Whether the machine runs and `pid` is its process.
fn is_of(machine: &Machine, pid: Pid) -> Result<bool, Error> {
    Ok(match &machine.running {
        Some(running) => {
            running.is_of(pid.as_raw_nonzero().get()).unwrap_or(false) && running.is_running()
        }
        None => machine.ask(|client| client.process())? == pid,
    })
}

fn ends(process: &OwnedFd) -> rustix::io::Result<bool> {
    let patience = Timespec::try_from(PATIENCE).ok();
    let mut ended = [PollFd::new(process, PollFlags::IN)];
    Ok(poll(&mut ended, patience.as_ref())? == 1)
}
