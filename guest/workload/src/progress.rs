//! What the program prints while nothing is wrong.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::worker::Counters;

/// The state of all threads together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Passes over all of the memory.
    pub passes: u64,
    /// Pages of the memory.
    pub pages: usize,
    /// Tags compared so far.
    pub tags_checked: u64,
    /// Pages rewritten so far.
    pub pages_rewritten: u64,
    /// Asynchronous faults that came as they should.
    pub asynchronous_faults: u64,
    /// Time since the start.
    pub elapsed: Duration,
}

impl Progress {
    /// Adds up what threads have done.
    pub fn of(
        counters: &[Counters],
        pages: usize,
        asynchronous_faults: u64,
        elapsed: Duration,
    ) -> Self {
        let sum = |get: fn(&Counters) -> u64| counters.iter().map(get).sum();
        Self {
            passes: counters
                .iter()
                .map(|one| one.passes.load(Ordering::Relaxed))
                .min()
                .unwrap_or(0),
            pages,
            tags_checked: sum(|one| one.tags_checked.load(Ordering::Relaxed)),
            pages_rewritten: sum(|one| one.pages_rewritten.load(Ordering::Relaxed)),
            asynchronous_faults,
            elapsed,
        }
    }

    /// As a line of text.
    pub fn to_text(self) -> String {
        format!(
            "workload: {} passes, {} pages, {} tags checked, 0 differences ({} pages rewritten, {} asynchronous faults, {:.1} s)",
            self.passes,
            self.pages,
            self.tags_checked,
            self.pages_rewritten,
            self.asynchronous_faults,
            self.elapsed.as_secs_f64(),
        )
    }

    /// As a line of JSON: `event` is `progress` or, at the end, `summary`.
    pub fn to_json(self, event: &str) -> String {
        format!(
            r#"{{"event":"{event}","passes":{},"pages":{},"tags_checked":{},"differences":0,"pages_rewritten":{},"asynchronous_faults":{},"seconds":{:.3}}}"#,
            self.passes,
            self.pages,
            self.tags_checked,
            self.pages_rewritten,
            self.asynchronous_faults,
            self.elapsed.as_secs_f64(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_those_of_the_slowest_thread_and_all_else_is_a_sum() {
        let counters = [Counters::default(), Counters::default()];
        counters[0].passes.store(12, Ordering::Relaxed);
        counters[1].passes.store(14, Ordering::Relaxed);
        counters[0].tags_checked.store(1000, Ordering::Relaxed);
        counters[1].tags_checked.store(24, Ordering::Relaxed);
        let progress = Progress::of(&counters, 4096, 3, Duration::from_millis(1500));
        assert!(
            progress
                .to_text()
                .starts_with("workload: 12 passes, 4096 pages, 1024 tags checked, 0 differences")
        );
        assert!(
            progress
                .to_json("progress")
                .contains(r#""passes":12,"pages":4096,"tags_checked":1024"#)
        );
    }
}
