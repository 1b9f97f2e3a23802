//! Signals: the ones that ask the program to end, and the one that must not surprise it.

use std::io;
use std::mem::MaybeUninit;
use std::thread;

const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// The host refuses what signals need.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}: {source}")]
pub struct Error {
    step: &'static str,
    source: io::Error,
}

/// Signals that ask for the end, held back from every thread that is started afterwards.
pub struct EndingSignals(libc::sigset_t);

impl EndingSignals {
    /// Holds them back in this thread and all that it starts, but for those that whoever started
    /// the program has it ignore, as `nohup` does with SIGHUP.
    ///
    /// # Errors
    /// The host refuses.
    pub fn block() -> Result<Self, Error> {
        let error = |source| Error {
            step: "hold signals back",
            source,
        };
        let mut set = MaybeUninit::uninit();
        // SAFETY: initialises the set.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: initialised by the call above.
        let mut set = unsafe { set.assume_init() };
        for signal in ENDING {
            if !is_ignored(signal).map_err(error)? {
                // SAFETY: the set is initialised and the signals exist.
                unsafe { libc::sigaddset(&raw mut set, signal) };
            }
        }
        // SAFETY: the set is initialised; the previous one is not asked for.
        match unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
        } {
            0 => Ok(Self(set)),
            number => Err(error(io::Error::from_raw_os_error(number))),
        }
    }

    /// Calls `action` on the first of them, from a thread of its own. The second ends the program
    /// at once, for whoever finds that the first takes too long.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn on_first(self, action: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        thread::Builder::new()
            .name("tv-signals".into())
            .spawn(move || {
                self.wait();
                action();
                end_by(self.wait())
            })
            .map_err(|source| Error {
                step: "start the thread for signals",
                source,
            })?;
        Ok(())
    }

    /// Calls `farewell` on the first of them, from a thread of its own, and ends the program.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn end_on_first(self, farewell: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        thread::Builder::new()
            .name("tv-signals".into())
            .spawn(move || {
                let signal = self.wait();
                farewell();
                end_by(signal)
            })
            .map_err(|source| Error {
                step: "start the thread for signals",
                source,
            })?;
        Ok(())
    }

    fn wait(&self) -> libc::c_int {
        let mut signal = 0;
        // SAFETY: the set is initialised, and its signals are blocked in every thread.
        while unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } != 0 {}
        signal
    }
}

fn is_ignored(signal: libc::c_int) -> io::Result<bool> {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: changes nothing; the structure is writable, and the call fills it or fails.
    if unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above succeeded and filled it.
    Ok(unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN)
}

/// Ends the program with the status that shells give to one that `signal` ended.
fn end_by(signal: libc::c_int) -> ! {
    vmm::terminal::restore();
    // SAFETY: ends the process, whatever its other threads do.
    unsafe { libc::_exit(128 + signal) }
}

/// Lets a write to a pipe that nobody reads end the program, which Rust's runtime has switched off.
pub fn restore_broken_pipe() {
    // SAFETY: sets a default action, before any other thread exists.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
