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
use super::machine::{self, Machine};

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
    let Some(pid) = process(&machine)? else {
        return Err(NotKilled::Unknown(machine.name).into());
    };
    kill_process(&machine, pid)?;
    Ok(ExitCode::SUCCESS)
}

fn kill_process(machine: &Machine, pid: Pid) -> Result<(), NotKilled> {
    let error = |source: rustix::io::Errno| NotKilled::Io {
        name: machine.name.clone(),
        pid: pid.as_raw_nonzero().get(),
        source: source.into(),
    };
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(error)?;
    if !is_of(machine, pid) {
        return Err(NotKilled::Unknown(machine.name.clone()));
    }
    pidfd_send_signal(&process, Signal::KILL).map_err(error)?;
    if !ends(&process).map_err(error)? {
        return Err(NotKilled::StillThere {
            name: machine.name.clone(),
            pid: pid.as_raw_nonzero().get(),
        });
    }
    Ok(())
}

fn process(machine: &Machine) -> Result<Option<Pid>, machine::Error> {
    match &machine.running {
        Some(running) => Ok(running.process().and_then(Pid::from_raw)),
        None => machine.ask(|client| client.process()).map(Some),
    }
}

/// Whether the machine runs and `pid` is its process.
fn is_of(machine: &Machine, pid: Pid) -> bool {
    match &machine.running {
        Some(running) => {
            let has_lock = running.is_of(pid.as_raw_nonzero().get());
            has_lock.unwrap_or(false) && running.is_running()
        }
        None => machine.client.process().is_ok_and(|found| found == pid),
    }
}

fn ends(process: &OwnedFd) -> rustix::io::Result<bool> {
    let patience = Timespec::try_from(PATIENCE).ok();
    let mut ended = [PollFd::new(process, PollFlags::IN)];
    Ok(poll(&mut ended, patience.as_ref())? == 1)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A directory with the machine `web`, and the file of its lock.
    fn web() -> (tempfile::TempDir, File) {
        let runtime = tempfile::tempdir().unwrap();
        fs::create_dir(runtime.path().join("web")).unwrap();
        let lock = File::create(runtime.path().join("web/lock")).unwrap();
        lock.lock().unwrap();
        (runtime, lock)
    }

    fn sleeping(input: Stdio) -> Child {
        Command::new("sleep")
            .arg("100")
            .stdin(input)
            .spawn()
            .unwrap()
    }

    fn say_process(runtime: &tempfile::TempDir, child: &Child) {
        fs::write(runtime.path().join("web/lock"), format!("{}\n", child.id())).unwrap();
    }

    fn kill_web(runtime: &tempfile::TempDir) -> Result<(), NotKilled> {
        let machine = Machine::find_in(runtime.path(), "web").unwrap();
        kill_process(&machine, process(&machine).unwrap().unwrap())
    }

    #[test]
    fn the_process_that_holds_the_lock_is_killed() {
        let (runtime, lock) = web();
        // The lock goes with its file, which the process inherits.
        let mut machine = sleeping(lock.into());
        say_process(&runtime, &machine);

        let killed = kill_web(&runtime);

        assert!(killed.is_ok(), "{killed:?}");
        assert_eq!(machine.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn another_process_that_was_given_the_number_is_left_alone() {
        let (runtime, _lock) = web();
        let mut other = sleeping(Stdio::null());
        say_process(&runtime, &other);

        let killed = kill_web(&runtime);

        assert!(matches!(killed, Err(NotKilled::Unknown(_))), "{killed:?}");
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn a_machine_that_ended_is_not_there_to_be_killed() {
        let (runtime, lock) = web();
        drop(lock);
        let found = Machine::find_in(runtime.path(), "web");
        assert_eq!(
            found.unwrap_err().to_string(),
            "there is no machine `web`: none runs; start one with `tagvisor run`"
        );
    }
}
