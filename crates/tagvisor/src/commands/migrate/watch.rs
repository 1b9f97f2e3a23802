//! How far a migration is, on standard error: a bar for people, or a line of JSON a second for programs.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::api::Client;
use crate::commands::progress::{PAUSE, poll};
use crate::commands::text::{bytes, count, microseconds};
use crate::control::{MigrationWork, Work};

/// How often programs are told.
const EVERY: Duration = Duration::from_secs(1);

/// Watches the migration of one machine.
#[derive(Clone)]
pub struct Watch {
    client: Client,
    /// Where standard error is a terminal.
    bar: Option<ProgressBar>,
}

impl Watch {
    /// Of the machine that `client` asks.
    pub fn new(client: &Client) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(
                "{wide_bar} {human_pos} of {human_len} pages {elapsed}\n{msg}",
            );
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self {
            client: client.clone(),
            bar,
        }
    }

    /// Shows how far it is until `done` brings something, which is returned. `None` if it never will.
    pub fn until<T>(&self, done: &Receiver<T>) -> Option<T> {
        let mut pace = Pace::default();
        let outcome = match &self.bar {
            Some(bar) => poll(&self.client, done, PAUSE, |work| {
                bar.set_length(work.pages_total);
                bar.set_position(work.pages_done);
                bar.set_message(in_words(work, pace.remaining(work, Instant::now())));
            }),
            None => poll(&self.client, done, EVERY, |work| {
                let line = Line::new(work, pace.remaining(work, Instant::now()));
                if let Ok(line) = serde_json::to_string(&line) {
                    // Who does not read it has the report all the same.
                    let _ = writeln!(std::io::stderr(), "{line}");
                }
            }),
        };
        self.close();
        outcome
    }

    /// Takes the bar off the terminal.
    pub fn close(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How fast pages go, by all looks since the migration began, or since post-copy did.
#[derive(Default)]
struct Pace {
    first: Option<(Instant, u64)>,
    post_copy: bool,
}

impl Pace {
    /// How long the pages that are known will take. `None` if that cannot be told yet.
    fn remaining(&mut self, work: &Work, now: Instant) -> Option<Duration> {
        let post_copy = work.migration.is_some_and(|migration| migration.post_copy);
        if post_copy != self.post_copy {
            self.post_copy = post_copy;
            self.first = None;
        }
        let (since, before) = *self.first.get_or_insert((now, work.pages_done));
        let done = work
            .pages_done
            .checked_sub(before)
            .filter(|done| *done > 0)?;
        let left = work.pages_total.saturating_sub(work.pages_done);
        let seconds = now.duration_since(since).as_secs_f64() * left as f64 / done as f64;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// What a program is told.
#[derive(Serialize)]
struct Line {
    what: String,
    bytes: u64,
    pages_done: u64,
    pages_total: u64,
    #[serde(flatten)]
    migration: Option<MigrationWork>,
    /// Seconds that the pages that are known will take; absent if that cannot be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    remaining_s: Option<f64>,
}

impl Line {
    fn new(work: &Work, remaining: Option<Duration>) -> Self {
        Self {
            what: work.what.clone(),
            bytes: work.bytes,
            pages_done: work.pages_done,
            pages_total: work.pages_total,
            migration: work.migration,
            remaining_s: remaining.map(|time| time.as_secs_f64()),
        }
    }
}

/// What stands below the bar.
fn in_words(work: &Work, remaining: Option<Duration>) -> String {
    let mut parts = vec![bytes(work.bytes)];
    if let Some(migration) = &work.migration {
        parts[0] += &format!(" ({} of tags)", bytes(migration.tag_bytes));
        if migration.post_copy {
            parts.push("the guest runs there and fetches the rest".into());
        } else {
            parts.push(format!("round {}", migration.round));
        }
        if migration.pages_per_second > 0 && !migration.post_copy {
            parts.push(format!(
                "{} pages/s, {} changed/s, {} of downtime if stopped now",
                count(migration.pages_per_second),
                count(migration.changes_per_second),
                microseconds(migration.expected_downtime_us),
            ));
        }
        if migration.slowed > 0 {
            parts.push(format!("slowed down by {} %", migration.slowed));
        }
    }
    if let Some(remaining) = remaining {
        parts.push(format!("{:.0} s left", remaining.as_secs_f64().ceil()));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(pages_done: u64, post_copy: bool) -> Work {
        Work {
            what: "migrate".into(),
            pages_done,
            pages_total: 1000,
            bytes: 3 << 20,
            migration: Some(MigrationWork {
                round: 2,
                tag_bytes: 1 << 10,
                pages_per_second: 25_000,
                changes_per_second: 100,
                expected_downtime_us: 4_000,
                slowed: 20,
                post_copy,
            }),
        }
    }

    #[test]
    fn what_remains_is_told_by_the_pace_so_far() {
        let (mut pace, begun) = (Pace::default(), Instant::now());
        let after = |seconds| begun + Duration::from_secs(seconds);

        assert_eq!(pace.remaining(&work(0, false), begun), None);
        assert_eq!(pace.remaining(&work(0, false), after(1)), None);
        assert_eq!(
            pace.remaining(&work(250, false), after(2)),
            Some(Duration::from_secs(6))
        );
        assert_eq!(
            pace.remaining(&work(1000, false), after(3)),
            Some(Duration::ZERO)
        );
    }

    #[test]
    fn post_copy_has_a_pace_of_its_own() {
        let (mut pace, begun) = (Pace::default(), Instant::now());
        let after = |seconds| begun + Duration::from_secs(seconds);
        pace.remaining(&work(0, false), begun);
        pace.remaining(&work(900, false), after(1));

        assert_eq!(pace.remaining(&work(10, true), after(2)), None);
        assert_eq!(
            pace.remaining(&work(505, true), after(3)),
            Some(Duration::from_secs(1))
        );
    }

    #[test]
    fn people_see_all_that_matters_in_one_line() {
        assert_eq!(
            in_words(&work(250, false), Some(Duration::from_millis(5500))),
            "3.00 MiB (1.00 KiB of tags), round 2, 25,000 pages/s, 100 changed/s, 4.0 ms of downtime if stopped now, slowed down by \
             20 %, 6 s left"
        );
        assert_eq!(
            in_words(&work(250, true), None),
            "3.00 MiB (1.00 KiB of tags), the guest runs there and fetches the rest, slowed down by 20 %"
        );
    }

    #[test]
    fn programs_get_one_flat_object_a_line() {
        let line = Line::new(&work(250, false), Some(Duration::from_secs(6)));
        assert_eq!(
            serde_json::to_value(line).unwrap(),
            serde_json::json!({
                "what": "migrate", "bytes": 3 << 20, "pages_done": 250, "pages_total": 1000, "round": 2, "tag_bytes": 1024,
                "pages_per_second": 25_000, "changes_per_second": 100, "expected_downtime_us": 4000, "slowed": 20,
                "post_copy": false, "remaining_s": 6.0
            })
        );
    }
}
