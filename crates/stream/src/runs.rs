//! Which value each page has, for pages that are known all at once: runs in a sorted vector. That is made in a fraction of the
//! time of a [`RangeMap`], which counts where a guest waits for it.

use std::ops::Range;

use rangemap::RangeMap;

/// Runs of page numbers in order, which do not overlap, each with a value; neighbours with the same value are one run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Runs<T>(Vec<(Range<u64>, T)>);

impl<T> Default for Runs<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy + PartialEq> Runs<T> {
    /// Where the last run ends; 0 if there is none.
    pub(crate) fn end(&self) -> u64 {
        self.0.last().map_or(0, |(run, _)| run.end)
    }

    /// Adds a run that begins where the last one ends, or behind that.
    pub(crate) fn push(&mut self, run: Range<u64>, value: T) {
        debug_assert!(self.end() <= run.start && run.start < run.end);
        match self.0.last_mut() {
            Some((last, of_last)) if last.end == run.start && *of_last == value => {
                last.end = run.end;
            }
            _ => self.0.push((run, value)),
        }
    }

    /// The value of a page.
    pub(crate) fn get(&self, page: u64) -> Option<T> {
        let behind = self.0.partition_point(|(run, _)| run.start <= page);
        let (run, value) = self.0.get(behind.checked_sub(1)?)?;
        run.contains(&page).then_some(*value)
    }

    /// The runs in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Range<u64>, T)> {
        self.0.iter().map(|(run, value)| (run, *value))
    }
}

impl<T: Copy + Eq> From<&RangeMap<u64, T>> for Runs<T> {
    fn from(map: &RangeMap<u64, T>) -> Self {
        let mut runs = Self::default();
        for (run, value) in map.iter() {
            runs.push(run.clone(), *value);
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_the_value_of_its_run_and_none_between_runs() {
        let mut runs = Runs::default();
        runs.push(2..4, 'a');
        runs.push(4..5, 'b');
        runs.push(8..9, 'b');

        let values: String = (0..10).map(|page| runs.get(page).unwrap_or('.')).collect();

        assert_eq!(values, "..aab...b.");
    }

    #[test]
    fn neighbours_with_the_same_value_are_one_run() {
        let mut runs = Runs::default();
        runs.push(2..4, 'a');
        runs.push(4..5, 'a');
        runs.push(6..7, 'a');

        let found: Vec<_> = runs.iter().collect();

        assert_eq!(found, [(&(2..5), 'a'), (&(6..7), 'a')]);
    }
}
