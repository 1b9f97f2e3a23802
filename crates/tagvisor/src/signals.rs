//! Signals: the ones that ask the program to end, and the one that must not surprise it.

use std::io;
use std::mem::MaybeUninit;
use std::thread;

const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Signals that ask for the end, held back from every thread that is started afterwards.
pub struct EndingSignals(libc::sigset_t);

impl EndingSignals {
    /// Holds them back in this thread and all that it starts.
    ///
    /// # Errors
    /// The host refuses.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: initialises the set.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: initialised by the call above.
        let mut set = unsafe { set.assume_init() };
        for signal in ENDING {
            // SAFETY: the set is initialised and the signals exist.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        // SAFETY: the set is initialised; the previous one is not asked for.
        match unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
        } {
            0 => Ok(Self(set)),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Calls `action` on each of them, from a thread of its own.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn on_each(self, action: impl Fn() + Send + 'static) -> io::Result<()> {
        thread::Builder::new()
            .name("tv-signals".into())
            .spawn(move || {
                loop {
                    let mut signal = 0;
                    // SAFETY: the set is initialised, and its signals are blocked in every thread.
                    if unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } == 0 {
                        action();
                    }
                }
            })?;
        Ok(())
    }
}

/// Lets a write to a pipe that nobody reads end the program, which Rust's runtime has switched off.
pub fn restore_broken_pipe() {
    // SAFETY: sets a default action, before any other thread exists.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}
