//! How long faults took: counts in classes whose bounds are a quarter of an octave apart, so that a quantile is
//! known to 25 %, in a fixed room and without a lock.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Four classes an octave, of microseconds up to 2^32.
const CLASSES: usize = 4 * 32;

/// Counts of durations, added to by many threads at once.
pub(super) struct Latencies([AtomicU64; CLASSES]);

impl Latencies {
    pub(super) const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; CLASSES])
    }

    pub(super) fn add(&self, duration: Duration) {
        self.0[class(duration)].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> FaultTimes {
        FaultTimes(self.0.each_ref().map(|count| count.load(Ordering::Relaxed)))
    }
}

/// How many faults waited how long: from when the fault was seen until its page was there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultTimes([u64; CLASSES]);

impl FaultTimes {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The time that this part of the faults, from 0 to 1, did not exceed: the median for 0.5. It is at most 25 % and
    /// a microsecond too high. `None` if there were none.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let needed = ((self.count() as f64 * part).ceil() as u64).max(1);
        let mut seen = 0;
        let class = self.0.iter().position(|count| {
            seen += count;
            seen >= needed
        })?;
        Some(Duration::from_micros(end(class)))
    }
}

impl fmt::Display for FaultTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = |part| self.quantile(part).unwrap_or_default().as_micros();
        write!(
            f,
            "{} faults waited, median {} us, 99 % at most {} us",
            self.count(),
            us(0.5),
            us(0.99)
        )
    }
}

fn class(duration: Duration) -> usize {
    let microseconds = u32::try_from(duration.as_micros())
        .unwrap_or(u32::MAX)
        .max(1);
    let octave = microseconds.ilog2();
    // The two bits below the highest one.
    let quarter = ((u64::from(microseconds) << 2) >> octave) & 3;
    octave as usize * 4 + quarter as usize
}

/// The first microsecond above a class.
const fn end(class: usize) -> u64 {
    let (octave, quarter) = (class / 4, class as u64 % 4);
    ((5 + quarter) << octave).div_ceil(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_at_most_a_quarter_and_a_microsecond_too_high() {
        for microseconds in (1..100_000).chain([1 << 31, u32::MAX.into()]) {
            let latencies = Latencies::new();
            latencies.add(Duration::from_micros(microseconds));
            let found = latencies.get().quantile(0.5).unwrap().as_micros() as u64;
            assert!(
                (microseconds..=microseconds + microseconds / 4 + 1).contains(&found),
                "{microseconds} became {found}"
            );
        }
    }

    #[test]
    fn of_a_hundred_faults_the_slowest_two_decide_the_last_percent() {
        let latencies = Latencies::new();
        (0..98).for_each(|_| latencies.add(Duration::from_micros(10)));
        (0..2).for_each(|_| latencies.add(Duration::from_millis(10)));
        let times = latencies.get();
        assert_eq!(times.count(), 100);
        assert!(times.quantile(0.5).unwrap() < Duration::from_micros(14));
        assert!(times.quantile(0.99).unwrap() >= Duration::from_millis(10));
    }

    #[test]
    fn without_faults_there_is_no_median() {
        assert_eq!(Latencies::new().get().quantile(0.5), None);
    }

    #[test]
    fn a_fault_of_hours_is_counted() {
        let latencies = Latencies::new();
        latencies.add(Duration::from_secs(100_000));
        assert_eq!(latencies.get().count(), 1);
    }
}
