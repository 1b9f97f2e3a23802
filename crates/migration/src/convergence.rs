//! When to stop the guest: what the rounds so far say of the time that it would stand still.
//!
//! After each round it is known how fast pages go and how many changed since they were sent. The guest is stopped when sending
//! these would take no longer than it may stand still, and another round would not make them much fewer. If they do not become
//! fewer, that is done which was asked for: post-copy, or slowing the guest down step by step, or giving up with the figures.

use std::fmt;
use std::time::Duration;

/// What to do if pages change faster than they can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Otherwise {
    /// Let the guest run at the destination and fetch the rest from here.
    PostCopy,
    /// Keep its vCPUs from running for more and more of the time.
    Slow,
    /// Give up.
    GiveUp,
}

/// A round that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Pages sent.
    pub pages: u64,
    /// From the first page to the receipt for the last.
    pub time: Duration,
    /// Pages that changed after they were sent, or are new.
    pub changed: u64,
    /// Pages that the guest wrote meanwhile, those that were not sent yet among them.
    pub written: u64,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another round.
    Round,
    /// Another round, with the vCPUs kept from running for this percentage of the time.
    Slow(u8),
    /// The guest is stopped, and the rest is sent.
    Stop,
    /// The guest is stopped, and fetches the rest from the destination.
    PostCopy,
    /// It will not converge.
    GiveUp,
}

/// How the vCPUs are slowed down: percent of the time that they may not run.
const SLOWER: [u8; 6] = [20, 40, 60, 80, 95, 99];
/// So few pages that another round gains nothing.
const FEW: u64 = 64;
/// Rounds that are worth it if each leaves less, at most.
const MAX_ROUNDS: u32 = 32;
/// Rounds of fewer pages say nothing of how fast pages go.
const TELLING: u64 = 256;
/// Rounds that do not leave much less, before something else is tried.
const PATIENCE: u32 = 2;

/// Judges rounds.
#[derive(Clone, Debug)]
pub struct Convergence {
    max_downtime: Duration,
    otherwise: Otherwise,
    /// Pages a second.
    rate: f64,
    last: Option<Round>,
    rounds: u32,
    stalled: u32,
    step: usize,
}

impl Convergence {
    /// For a guest that may stand still for `max_downtime`.
    pub const fn new(max_downtime: Duration, otherwise: Otherwise) -> Self {
        Self {
            max_downtime,
            otherwise,
            rate: 0.0,
            last: None,
            rounds: 0,
            stalled: 0,
            step: 0,
        }
    }

    /// Pages that can be sent in a second, by the rounds so far.
    pub const fn pages_per_second(&self) -> f64 {
        self.rate
    }

    /// Pages that the guest changes in a second, by the last round.
    pub fn changes_per_second(&self) -> f64 {
        self.last
            .map_or(0.0, |round| per_second(round.written, round.time))
    }

    /// For how long the guest would stand still if it were stopped now.
    pub fn downtime(&self) -> Duration {
        let changed = self.last.map_or(0, |round| round.changed);
        if self.rate <= 0.0 {
            return if changed == 0 {
                Duration::ZERO
            } else {
                Duration::MAX
            };
        }
        Duration::try_from_secs_f64(changed as f64 / self.rate).unwrap_or(Duration::MAX)
    }

    /// What to do after this round.
    pub fn after(&mut self, round: Round) -> Next {
        let before = self.last.map_or(round.pages, |last| last.changed);
        if round.pages >= TELLING || self.rate == 0.0 {
            self.rate = per_second(round.pages, round.time);
        }
        self.last = Some(round);
        self.rounds += 1;
        let leaves_less = round.changed * 4 <= before * 3;
        if self.downtime() <= self.max_downtime {
            // It may stand still for this long: another round, which takes as long, is to spare it half of that.
            let halves = round.changed * 2 <= before;
            let worth_it = round.changed > FEW && halves && self.rounds < MAX_ROUNDS;
            return if worth_it { Next::Round } else { Next::Stop };
        }
        if leaves_less && self.rounds < MAX_ROUNDS {
            self.stalled = 0;
            return Next::Round;
        }
        self.stalled += 1;
        if self.stalled < PATIENCE {
            return Next::Round;
        }
        self.stalled = 0;
        match self.otherwise {
            Otherwise::PostCopy => Next::PostCopy,
            Otherwise::GiveUp => Next::GiveUp,
            Otherwise::Slow => {
                let slower = SLOWER.get(self.step).copied();
                self.step += 1;
                slower.map_or(Next::GiveUp, Next::Slow)
            }
        }
    }
}

fn per_second(pages: u64, time: Duration) -> f64 {
    pages as f64 / time.as_secs_f64().max(1e-6)
}

impl fmt::Display for Convergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "after {} rounds {:.0} pages can be sent in a second and the guest changes {:.0}; it would stand still for {:.0} ms, \
             {:.0} ms are allowed",
            self.rounds,
            self.rate,
            self.changes_per_second(),
            self.downtime().as_secs_f64() * 1e3,
            self.max_downtime.as_secs_f64() * 1e3,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn round(pages: u64, changed: u64) -> Round {
        Round {
            pages,
            time: SECOND,
            changed,
            written: changed,
        }
    }

    fn convergence(otherwise: Otherwise) -> Convergence {
        Convergence::new(Duration::from_millis(300), otherwise)
    }

    #[test]
    fn an_idle_guest_is_stopped_after_one_round() {
        let mut convergence = convergence(Otherwise::GiveUp);
        assert_eq!(convergence.after(round(100_000, 20)), Next::Stop);
    }

    #[test]
    fn another_round_is_sent_while_each_leaves_less() {
        let mut convergence = convergence(Otherwise::GiveUp);
        assert_eq!(convergence.after(round(100_000, 20_000)), Next::Round);
        assert_eq!(convergence.after(round(20_000, 4000)), Next::Round);
        assert_eq!(convergence.after(round(4000, 3900)), Next::Round);
        assert_eq!(convergence.after(round(3900, 3800)), Next::GiveUp);
    }

    #[test]
    fn a_guest_that_writes_steadily_is_stopped_when_that_takes_no_longer_than_it_may() {
        let mut convergence = convergence(Otherwise::GiveUp);
        assert_eq!(convergence.after(round(100_000, 20_000)), Next::Round);
        // 100,000 pages a second: 20,000 would take 200 ms.
        let time = SECOND / 5;
        let steady = Round {
            pages: 20_000,
            time,
            changed: 19_000,
            written: 19_000,
        };
        assert_eq!(convergence.after(steady), Next::Stop);
    }

    #[test]
    fn a_guest_that_may_stand_still_for_what_is_left_gets_no_round_that_spares_it_little() {
        let after = |changed| {
            let mut convergence = convergence(Otherwise::GiveUp);
            // 100,000 pages a second: 10,000 take 100 ms.
            convergence.after(round(100_000, 10_000));
            convergence.after(Round {
                time: SECOND / 10,
                ..round(10_000, changed)
            })
        };
        assert_eq!(after(5000), Next::Round);
        assert_eq!(after(5001), Next::Stop);
    }

    #[test]
    fn a_guest_that_writes_faster_than_pages_go_is_slowed_down_step_by_step_and_then_given_up() {
        let mut convergence = convergence(Otherwise::Slow);
        let steps: Vec<Next> = (0..14)
            .map(|_| convergence.after(round(1000, 1000)))
            .collect();
        let slower: Vec<Next> = steps
            .iter()
            .copied()
            .filter(|next| *next != Next::Round)
            .collect();
        assert_eq!(slower[..6], SLOWER.map(Next::Slow));
        assert_eq!(slower.last(), Some(&Next::GiveUp));
    }

    #[test]
    fn a_guest_that_writes_faster_than_pages_go_continues_by_post_copy_if_that_was_asked_for() {
        let mut convergence = convergence(Otherwise::PostCopy);
        assert_eq!(convergence.after(round(1000, 1000)), Next::Round);
        assert_eq!(convergence.after(round(1000, 1000)), Next::PostCopy);
    }

    #[test]
    fn rounds_end_even_if_each_leaves_a_little_less() {
        let mut convergence = convergence(Otherwise::GiveUp);
        let mut pages = 1u64 << 60;
        let rounds = (0..1000).take_while(|_| {
            let changed = pages / 4 * 3;
            let next = convergence.after(round(pages, changed));
            pages = changed;
            next == Next::Round
        });
        assert!(rounds.count() <= MAX_ROUNDS as usize + 1);
    }

    #[test]
    fn few_pages_say_nothing_of_how_fast_they_go() {
        let mut convergence = convergence(Otherwise::GiveUp);
        convergence.after(round(100_000, 2));
        convergence.after(Round {
            pages: 2,
            time: SECOND,
            changed: 1000,
            written: 1000,
        });
        assert_eq!(convergence.downtime(), Duration::from_millis(10));
    }
}
