//! `tagvisor stop`: asks a machine to end, and waits until it is gone.

use std::io::ErrorKind;
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

/// Why a machine was not stopped.
#[derive(Debug, thiserror::Error)]
pub enum NotStopped {
    /// It was asked in vain.
    #[error(transparent)]
    Asked(#[from] Error),
    /// It is still there.
    #[error(
        "machine `{name}` was asked to end and is still there after {seconds} s; \
         `tagvisor kill {name}` ends it at once"
    )]
    StillThere {
        /// The machine.
        name: String,
        /// For how long it was waited for.
        seconds: u64,
    },
}

/// Ends a machine, as pulling its plug does, with its disks flushed, and its VMM.
///
/// # Errors
/// It does not answer, or does not end in time.
pub fn stop(args: &Args) -> super::Result {
    let timeout = Duration::from_secs(args.timeout.into());
    stop_within(&args.named.machine()?, timeout)?;
    Ok(ExitCode::SUCCESS)
}

fn stop_within(machine: &Machine, timeout: Duration) -> Result<(), NotStopped> {
    let deadline = Instant::now() + timeout;
    let cut_off = match ask(machine, timeout) {
        // It was ending when it was asked.
        Err(e) if was_cut_off(&e) => Some(e),
        asked => {
            asked?;
            None
        }
    };
    while is_there(machine) {
        if Instant::now() >= deadline {
            let still_there = NotStopped::StillThere {
                name: machine.name.clone(),
                seconds: timeout.as_secs(),
            };
            return Err(cut_off.map_or(still_there, NotStopped::Asked));
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn was_cut_off(error: &Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error {
        Error::Asked {
            source: client::Error::Io { source, .. },
            ..
        } => matches!(source.kind(), BrokenPipe | ConnectionReset | UnexpectedEof),
        _ => false,
    }
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
        // One that takes up no connection is not gone.
        None => {
            let client = machine.client.clone().patient(PAUSE);
            !matches!(client.process(), Err(client::Error::Nobody(_)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;
    use crate::api::serve;
    use crate::api::tests::double::{Call, Double};

    /// A directory with the machine `web`, its lock, and the VMM that answers for it.
    fn web() -> (tempfile::TempDir, File, Arc<Double>) {
        let runtime = tempfile::tempdir().unwrap();
        fs::create_dir(runtime.path().join("web")).unwrap();
        let lock = File::create(runtime.path().join("web/lock")).unwrap();
        lock.lock().unwrap();
        (runtime, lock, Double::running())
    }

    #[test]
    fn a_machine_is_stopped_when_it_was_asked_and_its_lock_is_free() {
        let (runtime, lock, vmm) = web();
        let _server = serve(&runtime.path().join("web/api.sock"), vmm.clone()).unwrap();
        let machine = Machine::find_in(runtime.path(), "web").unwrap();
        let asked = vmm.clone();
        let ending = thread::spawn(move || {
            while asked.calls().is_empty() {
                thread::sleep(PAUSE);
            }
            drop(lock);
        });

        let stopped = stop_within(&machine, Duration::from_secs(20));

        ending.join().unwrap();
        assert!(stopped.is_ok(), "{stopped:?}");
        assert_eq!(vmm.calls(), [Call::ShutDownVmm]);
    }

    #[test]
    fn a_machine_named_by_its_socket_is_stopped_when_nobody_listens_there() {
        let (runtime, _lock, vmm) = web();
        let socket = runtime.path().join("web/api.sock");
        let server = serve(&socket, vmm.clone()).unwrap();
        let machine = Machine::find(socket.to_str().unwrap()).unwrap();
        let ending = thread::spawn(move || {
            while vmm.calls().is_empty() {
                thread::sleep(PAUSE);
            }
            drop(server);
        });

        let stopped = stop_within(&machine, Duration::from_secs(20));

        ending.join().unwrap();
        assert!(stopped.is_ok(), "{stopped:?}");
    }

    #[test]
    fn a_machine_that_was_ending_when_it_was_asked_is_waited_for() {
        let (runtime, lock, _) = web();
        let listener = UnixListener::bind(runtime.path().join("web/api.sock")).unwrap();
        let machine = Machine::find_in(runtime.path(), "web").unwrap();
        let ending = thread::spawn(move || {
            let (asked, _) = listener.accept().unwrap();
            // What was sent is there, so that the sender finds its connection reset.
            let mut ready = [PollFd::new(&asked, PollFlags::IN)];
            poll(&mut ready, None).unwrap();
            drop(asked);
            drop(listener);
            thread::sleep(PAUSE);
            drop(lock);
        });

        let stopped = stop_within(&machine, Duration::from_secs(20));

        ending.join().unwrap();
        assert!(stopped.is_ok(), "{stopped:?}");
    }

    #[test]
    fn a_machine_that_does_not_end_is_reported_with_what_helps() {
        let (runtime, _lock, vmm) = web();
        let _server = serve(&runtime.path().join("web/api.sock"), vmm).unwrap();
        let machine = Machine::find_in(runtime.path(), "web").unwrap();

        let stopped = stop_within(&machine, Duration::from_millis(50));

        assert_eq!(
            stopped.unwrap_err().to_string(),
            "machine `web` was asked to end and is still there after 0 s; `tagvisor kill web` ends it at once"
        );
    }

    #[test]
    fn a_machine_without_a_socket_says_that_nobody_listens() {
        let (runtime, _lock, _) = web();
        let machine = Machine::find_in(runtime.path(), "web").unwrap();
        let stopped = stop_within(&machine, Duration::ZERO).unwrap_err();
        assert!(
            stopped
                .to_string()
                .starts_with("machine `web`: no VMM listens at"),
            "{stopped}"
        );
    }
}
