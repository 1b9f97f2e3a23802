//! Ctrl-C and SIGTERM. They set a flag; whoever waits for something looks at it, ends what it has
//! started and returns an error, so that nothing is left behind.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

struct Signals {
    /// The number of the signal that asks for the end, or 0.
    end: Arc<AtomicUsize>,
}

static SIGNALS: OnceLock<Signals> = OnceLock::new();

/// Starts to listen for signals. Called once, first of all.
pub fn listen() -> Result<()> {
    let signals = Signals {
        end: Arc::default(),
    };
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_usize(signal, Arc::clone(&signals.end), signal as usize)
            .context("cannot listen for signals")?;
    }
    SIGNALS.get_or_init(|| signals);
    Ok(())
}

/// Fails when a signal has asked for the end.
pub fn check() -> Result<()> {
    if let Some(signal) = signal() {
        bail!("interrupted by signal {signal}");
    }
    Ok(())
}

/// The signal that has asked for the end.
pub fn signal() -> Option<u8> {
    let number = SIGNALS.get()?.end.load(Ordering::Relaxed);
    u8::try_from(number).ok().filter(|number| *number != 0)
}
