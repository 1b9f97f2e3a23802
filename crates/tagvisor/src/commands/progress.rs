//! Shows on a terminal how far long work has come.

use std::io::IsTerminal;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::api::Client;
use crate::control::Work;

/// How long to wait between two looks, for people.
pub const PAUSE: Duration = Duration::from_millis(200);

/// Shows the work of the VMM that `client` asks until `done` brings something, which is returned. `None` if it never will.
pub fn watch<T>(client: &Client, done: &Receiver<T>) -> Option<T> {
    if !std::io::stderr().is_terminal() {
        return done.recv().ok();
    }
    let style =
        ProgressStyle::with_template("{msg} {wide_bar} {human_pos} of {human_len} pages {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(0).with_style(style);
    let outcome = poll(client, done, PAUSE, |work| {
        bar.set_message(super::text::printable(&work.what));
        bar.set_length(work.pages_total);
        bar.set_position(work.pages_done);
    });
    bar.finish_and_clear();
    outcome
}

/// Lets `show` see the work of the moment, after every `pause`, until `done` brings something, which is returned. `None` if it
/// never will. A look that brings nothing changes nothing.
pub fn poll<T>(
    client: &Client,
    done: &Receiver<T>,
    pause: Duration,
    mut show: impl FnMut(&Work),
) -> Option<T> {
    let client = client.clone().patient(Duration::from_secs(1));
    loop {
        match done.recv_timeout(pause) {
            Ok(outcome) => return Some(outcome),
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => {
                if let Ok(info) = client.info()
                    && let Some(work) = info.work
                {
                    show(&work);
                }
            }
        }
    }
}
