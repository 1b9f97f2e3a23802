//! How long stores took: those that waited for something, apart from the others.

use std::fmt;
use std::time::Duration;

/// A store that takes longer has waited. An exit to the hypervisor for a page that is there takes less, even under emulation.
const WAIT: Duration = Duration::from_micros(500);

/// The stores of a while.
#[derive(Default)]
pub struct Waits {
    stores: u64,
    /// In microseconds.
    waits: Vec<u128>,
}

impl Waits {
    /// Counts a store that took so long.
    pub fn add(&mut self, took: Duration) {
        self.stores += 1;
        if took > WAIT {
            self.waits.push(took.as_micros());
        }
    }
}

impl fmt::Display for Waits {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "pages={} waits={}",
            self.stores,
            self.waits.len()
        )?;
        let mut sorted = self.waits.clone();
        sorted.sort_unstable();
        let Some(longest) = sorted.last() else {
            return Ok(());
        };
        // The smallest that so many of 100 do not exceed.
        let percentile = |percent: usize| sorted[(sorted.len() * percent).div_ceil(100) - 1];
        write!(
            formatter,
            " median_us={} p99_us={} longest_us={longest}",
            percentile(50),
            percentile(99)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stores_that_waited_are_told_of() {
        let mut waits = Waits::default();

        for microseconds in [1, 600, 2, 800, 700, 3] {
            waits.add(Duration::from_micros(microseconds));
        }

        assert_eq!(
            waits.to_string(),
            "pages=6 waits=3 median_us=700 p99_us=800 longest_us=800"
        );
    }

    #[test]
    fn without_waits_there_are_no_figures() {
        assert_eq!(Waits::default().to_string(), "pages=0 waits=0");
    }
}
