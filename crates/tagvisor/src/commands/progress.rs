//! Shows on a terminal how far long work has come.

use std::io::IsTerminal;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::api::Client;

/// How long to wait between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// Shows the work of the VMM that `client` asks until `done` brings something, which is returned. `None` if it never will.
pub fn watch<T>(client: &Client, done: &Receiver<T>) -> Option<T> {
    if !std::io::stderr().is_terminal() {
        return done.recv().ok();
    }
    let style =
        ProgressStyle::with_template("{msg} {wide_bar} {human_pos} of {human_len} pages {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(0).with_style(style);
    let client = client.clone().patient(Duration::from_secs(1));
    loop {
        match done.recv_timeout(PAUSE) {
            Ok(outcome) => {
                bar.finish_and_clear();
                return Some(outcome);
            }
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => show(&client, &bar),
        }
    }
}

/// Where the work of the moment is. A look that brings nothing changes nothing.
fn show(client: &Client, bar: &ProgressBar) {
    if let Ok(info) = client.info()
        && let Some(work) = info.work
    {
        bar.set_message(super::text::printable(&work.what));
        bar.set_length(work.pages_total);
        bar.set_position(work.pages_done);
    }
}
