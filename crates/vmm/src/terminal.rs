//! The user's terminal as the guest's console.
//!
//! In raw mode every key goes to the guest, Ctrl-C among them. One key is kept back: after
//! Ctrl-], the next key is for Tagvisor ([`Escape`]). Whatever ends the program, the terminal is
//! given back as it was: dropping [`RawMode`] does it, and so do a panic and the signals of a fault.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Mutex, Once, PoisonError};

use vmm_sys_util::signal::register_signal_handler;

/// How the terminal was before [`RawMode`].
static SAVED: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Standard input, a terminal, in raw mode.
pub struct RawMode(());

impl RawMode {
    /// Puts the terminal at standard input into raw mode.
    ///
    /// # Errors
    /// It is no terminal, or refuses.
    pub fn enter() -> io::Result<Self> {
        restore_on_panic();
        restore_on_fault();
        let saved = attributes(io::stdin().as_fd())?;
        let mut raw = saved;
        // SAFETY: changes fields of the structure and nothing else.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // Messages of our own still begin at the left margin.
        raw.c_oflag |= libc::OPOST | libc::ONLCR;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        set_attributes(io::stdin().as_fd(), &raw)?;
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back as it was before [`RawMode::enter`]. For those who end the program without dropping things.
pub fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(saved) = saved
        && let Err(e) = set_attributes(io::stdin().as_fd(), &saved)
    {
        tracing::warn!("cannot restore the terminal: {e}");
    }
}

/// Where a panic aborts, nothing is dropped; where it unwinds, its message is readable before all threads have ended.
fn restore_on_panic() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            report(panic);
        }));
    });
}

/// A fault of the program ends it by the signal. SIGBUS need not be a defect: it is how a host says that it has no
/// memory left for the guest's.
fn restore_on_fault() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        for signal in [libc::SIGBUS, libc::SIGSEGV, libc::SIGILL] {
            if let Err(e) = register_signal_handler(signal, die_of) {
                tracing::warn!("signal {signal}: {e}");
            }
        }
    });
}

extern "C" fn die_of(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Only what is allowed in a signal handler: the lock is tried and not waited for.
    if let Ok(mut saved) = SAVED.try_lock()
        && let Some(saved) = saved.take()
    {
        let _ = set_attributes(io::stdin().as_fd(), &saved);
    }
    // SAFETY: back to the signal's default action; the instruction that faulted is executed again and then ends the
    // program, for a fault, or `raise` does, for a signal that was sent.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

fn attributes(terminal: BorrowedFd<'_>) -> io::Result<libc::termios> {
    let mut attributes = std::mem::MaybeUninit::uninit();
    // SAFETY: the structure is writable; the call fills it or fails.
    if unsafe { libc::tcgetattr(terminal.as_raw_fd(), attributes.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above succeeded and filled it.
    Ok(unsafe { attributes.assume_init() })
}

fn set_attributes(terminal: BorrowedFd<'_>, attributes: &libc::termios) -> io::Result<()> {
    // SAFETY: reads a whole structure.
    match unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, attributes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What the user asks of Tagvisor rather than of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// End the machine.
    Quit,
    /// Say which keys there are.
    Help,
}

/// Ctrl-].
const ESCAPE: u8 = 0x1d;

/// What to tell a user who asks for help, and at the start.
pub const HELP: &str = "Ctrl-] q ends the machine, Ctrl-] Ctrl-] sends Ctrl-] to the guest";

/// Tells the user's keys for Tagvisor from those for the guest.
#[derive(Debug, Default)]
pub struct Escape {
    escaped: bool,
}

impl Escape {
    /// Takes input apart: what is for the guest is appended to `guest`, the last command is returned.
    pub fn filter(&mut self, input: &[u8], guest: &mut Vec<u8>) -> Option<Command> {
        let mut command = None;
        for &byte in input {
            match (self.escaped, byte) {
                (false, ESCAPE) => self.escaped = true,
                (false, byte) => guest.push(byte),
                (true, byte) => {
                    self.escaped = false;
                    match byte {
                        b'q' => command = Some(Command::Quit),
                        ESCAPE => guest.push(ESCAPE),
                        _ => command = command.or(Some(Command::Help)),
                    }
                }
            }
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(inputs: &[&[u8]]) -> (Vec<u8>, Vec<Option<Command>>) {
        let mut escape = Escape::default();
        let mut guest = Vec::new();
        let commands = inputs
            .iter()
            .map(|input| escape.filter(input, &mut guest))
            .collect();
        (guest, commands)
    }

    #[test]
    fn ordinary_keys_and_ctrl_c_go_to_the_guest() {
        assert_eq!(filtered(&[b"ls\r\x03"]), (b"ls\r\x03".to_vec(), vec![None]));
    }

    #[test]
    fn escape_and_q_end_the_machine_even_in_two_reads() {
        assert_eq!(
            filtered(&[b"a\x1d", b"qb"]),
            (b"ab".to_vec(), vec![None, Some(Command::Quit)])
        );
    }

    #[test]
    fn the_escape_key_twice_is_one_for_the_guest() {
        assert_eq!(filtered(&[b"\x1d\x1d"]), (vec![ESCAPE], vec![None]));
    }

    #[test]
    fn any_other_key_after_the_escape_asks_for_help() {
        assert_eq!(filtered(&[b"\x1dx"]), (vec![], vec![Some(Command::Help)]));
    }
}
