//! The terminal under an interactive shell: its keys go to the host one by one and unchanged,
//! Ctrl-C among them, and the shell learns its size.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

static RESIZED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// The terminal in raw mode, until this is dropped.
pub struct Raw(Termios);

impl Raw {
    /// Puts the terminal of standard input in raw mode.
    pub fn enter() -> Result<Self> {
        let before = tcgetattr(std::io::stdin()).context("cannot read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw)
            .context("cannot change the terminal's settings")?;
        let resized = RESIZED.get_or_init(Arc::default);
        signal_hook::flag::register(signal_hook::consts::SIGWINCH, Arc::clone(resized))
            .context("cannot listen for changes of the terminal's size")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // If the terminal has gone there is nothing to restore.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Whether both ends of a conversation are a terminal.
pub fn is_interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Rows and columns of the terminal.
pub fn size() -> (u16, u16) {
    match tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => (24, 80),
    }
}

/// Whether the size has changed since the last call.
pub fn take_resized() -> bool {
    RESIZED
        .get()
        .is_some_and(|resized| resized.swap(false, Ordering::Relaxed))
}
