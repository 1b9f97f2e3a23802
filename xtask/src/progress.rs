//! Says on standard error what takes long: a spinner on a terminal, plain lines elsewhere, and
//! how many seconds it took.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// One long step. It ends when it is dropped.
pub struct Step {
    what: String,
    started: Instant,
    spinner: Option<ProgressBar>,
}

impl Step {
    /// Starts a step; `what` completes "lab: …".
    pub fn start(what: &str) -> Self {
        let spinner = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("lab: {msg} {spinner} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = ProgressBar::new_spinner()
                .with_style(style)
                .with_message(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if spinner.is_none() {
            eprintln!("lab: {what} ...");
        }
        Self {
            what: what.to_owned(),
            started: Instant::now(),
            spinner,
        }
    }

    /// Ends the step with success.
    pub fn done(self) {
        let Self {
            what,
            started,
            spinner,
        } = &self;
        if let Some(bar) = spinner {
            bar.finish_and_clear();
        }
        eprintln!(
            "lab: {what}: done in {:.1} s",
            started.elapsed().as_secs_f64()
        );
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.spinner {
            bar.finish_and_clear();
        }
    }
}

/// A line on standard error.
pub fn say(text: &str) {
    eprintln!("lab: {text}");
}
