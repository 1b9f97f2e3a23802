//! `rewrite`: rewrites memory at a set rate, so that whoever moves the guest has pages to send again, and tells how long
//! stores to pages had to wait, as those do whose page must come from elsewhere first.
//!
//! Each page gets new random data and, with `--tags`, a random tag a granule ([`memory`]). It does so in the same order pass after
//! pass, jumping about. A guest that was halted goes on at its rate and does not catch up. Each second it prints what it did
//! ([`waits`]).
//!
//! One thread does all of it: what is measured is the machine below, not how threads of the guest meet.

mod arguments;
mod memory;
mod waits;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::arguments::{ArgumentError, Arguments, USAGE};
use crate::memory::{MemoryError, Pages, Words};
use crate::waits::Waits;

/// How often pages are rewritten, and so how evenly.
const TICK: Duration = Duration::from_millis(10);
/// A guest that is later than this was halted.
const HALT: Duration = Duration::from_millis(500);
const LINE_EVERY: Duration = Duration::from_secs(1);
/// Steps from page to page: a prime, so that a pass meets each page once, unless their number is a multiple of it.
const STRIDE: usize = 7919;

/// Why the program cannot work.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

fn main() -> ExitCode {
    match Arguments::parse(std::env::args_os().skip(1)) {
        Ok(None) => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        Ok(Some(arguments)) => failed(work(&arguments)),
        Err(error) => failed(Err(error.into())),
    }
}

/// It ends only when it cannot work.
fn failed(error: Result<std::convert::Infallible, Error>) -> ExitCode {
    let Err(error) = error;
    eprintln!("rewrite: {error}");
    ExitCode::from(2)
}

fn work(arguments: &Arguments) -> Result<std::convert::Infallible, Error> {
    let mut pages = Pages::new(arguments.pages, arguments.tags)?;
    let mut words = Words::new();
    for index in 0..arguments.pages {
        pages.rewrite(index, &mut words);
    }
    println!("rewrite: {} pages filled", arguments.pages);
    let mut pace = Pace::new(arguments.pages_per_second, Instant::now());
    let mut page = 0;
    let mut waits = Waits::default();
    let mut line_at = Instant::now() + LINE_EVERY;
    loop {
        for _ in 0..pace.due(Instant::now()) {
            page = (page + STRIDE) % arguments.pages;
            waits.add(pages.rewrite(page, &mut words));
        }
        let now = Instant::now();
        if now >= line_at {
            println!("rewrite: {waits}");
            waits = Waits::default();
            line_at = now + LINE_EVERY;
        }
        std::thread::sleep(TICK);
    }
}

/// How many pages are due when.
struct Pace {
    per_second: u64,
    since: Instant,
    done: u64,
}

impl Pace {
    fn new(per_second: u64, now: Instant) -> Self {
        Self {
            per_second,
            since: now,
            done: 0,
        }
    }

    /// The pages to rewrite now.
    fn due(&mut self, now: Instant) -> u64 {
        let all = |pace: &Self| {
            let elapsed = now.saturating_duration_since(pace.since);
            (elapsed.as_secs_f64() * pace.per_second as f64) as u64
        };
        let mut due = all(self).saturating_sub(self.done);
        if due > (HALT.as_secs_f64() * self.per_second as f64) as u64 {
            *self = Self::new(self.per_second, now);
            due = 0;
        }
        self.done += due;
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_fall_due_at_the_rate() {
        let start = Instant::now();
        let mut pace = Pace::new(1000, start);

        assert_eq!(pace.due(start + Duration::from_millis(10)), 10);
        assert_eq!(pace.due(start + Duration::from_millis(15)), 5);
        assert_eq!(pace.due(start + Duration::from_millis(15)), 0);
    }

    #[test]
    fn what_was_missed_in_a_halt_is_not_made_up_for() {
        let start = Instant::now();
        let mut pace = Pace::new(1000, start);

        assert_eq!(pace.due(start + Duration::from_secs(60)), 0);
        assert_eq!(pace.due(start + Duration::from_millis(60_010)), 10);
    }
}
