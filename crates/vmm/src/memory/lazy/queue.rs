//! Which chunks are there, which are on their way and who waits for one: the one place that decides what is done next.
//!
//! A chunk goes from absent to taken (by one thread) to placed. If bringing it fails, it is failed until
//! another try is asked for. If it was written but could not be made visible, it must not be written again, as the guest may
//! have seen, and changed, some of its pages: then only that is left to be done.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::Failure;

/// How far a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    Absent,
    Taken,
    /// Nothing of it was written, or can have been seen.
    Failed,
    /// It is in the file, and perhaps not visible.
    Unseen,
    Placed,
}

/// How far the filling is.
#[derive(Clone, Debug, Default)]
pub(super) enum Phase {
    #[default]
    Filling,
    Failed(Arc<Failure>),
    Complete,
    Abandoned,
}

/// What a thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Bring a chunk.
    Bring(u32),
    /// Make visible a chunk that was written.
    Show(u32),
}

/// Somebody who waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiter {
    pub page: u64,
    pub since: Instant,
}

/// What is to be done for a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The page is in the file: it can be shown.
    Show,
    /// It comes with a chunk that somebody is to bring now.
    Wanted,
    /// It comes with a chunk that is on its way, or failed.
    Waits,
}

pub(super) struct Queue {
    chunks: Vec<Chunk>,
    /// Chunks that somebody waits for, and those to be shown again. Some may have been taken since.
    urgent: VecDeque<u32>,
    waiting: HashMap<u32, Vec<Waiter>>,
    /// Pages that were in the file and could not be shown.
    stuck: Vec<Waiter>,
    /// No chunk before it is absent, but those that failed.
    next: usize,
    /// Chunks for which something is to be done.
    unsettled: usize,
    pub phase: Phase,
}

impl Queue {
    pub(super) fn new(chunks: usize) -> Self {
        Self {
            chunks: vec![Chunk::Absent; chunks],
            urgent: VecDeque::new(),
            waiting: HashMap::new(),
            stuck: Vec::new(),
            next: 0,
            unsettled: chunks,
            phase: Phase::Filling,
        }
    }

    /// Whether nothing is left to do, now or later.
    pub(super) const fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Complete | Phase::Abandoned)
    }

    /// Somebody waits for a page of a chunk.
    pub(super) fn fault(&mut self, chunk: u32, waiter: Waiter) -> Fault {
        let state = self.chunks[chunk as usize];
        if state == Chunk::Placed {
            return Fault::Show;
        }
        self.waiting.entry(chunk).or_default().push(waiter);
        if state != Chunk::Absent {
            return Fault::Waits;
        }
        self.urgent.push_back(chunk);
        Fault::Wanted
    }

    /// A page of the file could not be shown.
    pub(super) fn stick(&mut self, waiter: Waiter) {
        self.stuck.push(waiter);
    }

    /// What is to be done next: that for which somebody waits, then, in the background, the rest. That rest stands still
    /// while a failure was not seen to.
    pub(super) fn take(&mut self, background: bool) -> Option<Work> {
        while let Some(chunk) = self.urgent.pop_front() {
            if let Some(work) = self.start(chunk) {
                return Some(work);
            }
        }
        if !background || !matches!(self.phase, Phase::Filling) {
            return None;
        }
        while self.next < self.chunks.len() {
            self.next += 1;
            if let Some(work) = self.start(self.next as u32 - 1) {
                return Some(work);
            }
        }
        None
    }

    /// What the background is to bring next, if nobody waits for anything else.
    pub(super) fn ahead(&self) -> impl Iterator<Item = u32> {
        let rest = (self.next as u32..).zip(&self.chunks[self.next..]);
        rest.filter(|(_, chunk)| **chunk == Chunk::Absent)
            .map(|(number, _)| number)
    }

    fn start(&mut self, chunk: u32) -> Option<Work> {
        let state = &mut self.chunks[chunk as usize];
        let work = match state {
            Chunk::Absent => Work::Bring(chunk),
            Chunk::Unseen => Work::Show(chunk),
            Chunk::Taken | Chunk::Failed | Chunk::Placed => return None,
        };
        *state = Chunk::Taken;
        Some(work)
    }

    /// A chunk that was taken is visible. Returns those who wait for it still: they faulted after their page was
    /// shown, because the host took it from the page tables again.
    pub(super) fn placed(&mut self, chunk: u32) -> Vec<Waiter> {
        self.chunks[chunk as usize] = Chunk::Placed;
        self.waiting.remove(&chunk).unwrap_or_default()
    }

    /// Nobody waits any more for a chunk that is visible.
    pub(super) const fn settled(&mut self) {
        self.unsettled -= 1;
    }

    /// Whether all chunks are visible and nobody is left to be let go on.
    pub(super) const fn is_all_done(&self) -> bool {
        self.unsettled == 0 && self.stuck.is_empty()
    }

    /// A chunk that was taken could not be brought, or not be shown.
    pub(super) fn failed(&mut self, work: Work) {
        let (chunk, state) = match work {
            Work::Bring(chunk) => (chunk, Chunk::Failed),
            Work::Show(chunk) => (chunk, Chunk::Unseen),
        };
        self.chunks[chunk as usize] = state;
    }

    /// Everything that failed is to be tried again: those first for whom somebody waits. Returns the pages that are in the
    /// file and could not be shown.
    pub(super) fn retry(&mut self) -> Vec<Waiter> {
        self.phase = Phase::Filling;
        self.next = 0;
        for (number, chunk) in (0..).zip(&mut self.chunks) {
            match chunk {
                Chunk::Failed => *chunk = Chunk::Absent,
                Chunk::Unseen => {}
                Chunk::Absent | Chunk::Taken | Chunk::Placed => continue,
            }
            if self.waiting.contains_key(&number) {
                self.urgent.push_back(number);
            }
        }
        std::mem::take(&mut self.stuck)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiters(pages: [u64; 2]) -> [Waiter; 2] {
        let since = Instant::now();
        pages.map(|page| Waiter { page, since })
    }

    fn failure() -> Phase {
        Phase::Failed(Arc::new(Failure::OtherPages { chunk: 0 }))
    }

    #[test]
    fn faults_go_first_also_in_the_background() {
        let mut queue = Queue::new(4);
        let [first, second] = waiters([30, 20]);
        assert_eq!(queue.take(true), Some(Work::Bring(0)));
        assert_eq!(queue.fault(3, first), Fault::Wanted);
        assert_eq!(queue.fault(2, second), Fault::Wanted);
        let taken: Vec<_> = std::iter::from_fn(|| queue.take(true)).collect();
        assert_eq!(taken, [3, 2, 1].map(Work::Bring));
    }

    #[test]
    fn threads_for_faults_leave_the_background_alone() {
        let mut queue = Queue::new(4);
        let [waiter, _] = waiters([0, 0]);
        assert_eq!(queue.take(false), None);
        queue.fault(2, waiter);
        assert_eq!(queue.take(false), Some(Work::Bring(2)));
        assert_eq!(queue.take(false), None);
    }

    #[test]
    fn a_chunk_is_taken_once_whoever_waits_for_it() {
        let mut queue = Queue::new(1);
        let [first, second] = waiters([1, 2]);
        assert_eq!(queue.fault(0, first), Fault::Wanted);
        assert_eq!(queue.fault(0, second), Fault::Wanted);
        assert_eq!(queue.take(true), Some(Work::Bring(0)));
        assert_eq!(queue.take(true), None);
        assert_eq!(queue.placed(0), [first, second]);
    }

    #[test]
    fn who_faults_while_a_chunk_is_on_its_way_is_let_go_with_it_and_later_ones_at_once() {
        let mut queue = Queue::new(1);
        let [early, late] = waiters([1, 2]);
        queue.take(true);
        assert_eq!(queue.fault(0, early), Fault::Waits);
        assert_eq!(queue.placed(0), [early]);
        assert_eq!(queue.fault(0, late), Fault::Show);
    }

    #[test]
    fn it_is_done_when_those_who_waited_went_on() {
        let mut queue = Queue::new(1);
        let [stuck, _] = waiters([1, 2]);
        queue.take(true);
        queue.placed(0);
        assert!(!queue.is_all_done());
        queue.stick(stuck);
        queue.settled();
        assert!(!queue.is_all_done());
        assert_eq!(queue.retry(), [stuck]);
        assert!(queue.is_all_done());
    }

    #[test]
    fn after_a_failure_only_faults_are_served() {
        let mut queue = Queue::new(3);
        let [waiter, _] = waiters([2, 2]);
        queue.take(true);
        queue.failed(Work::Bring(0));
        queue.phase = failure();
        assert_eq!(queue.take(true), None);
        queue.fault(2, waiter);
        assert_eq!(queue.take(true), Some(Work::Bring(2)));
    }

    #[test]
    fn who_waits_for_a_chunk_that_failed_comes_first_when_it_is_tried_again() {
        let mut queue = Queue::new(3);
        let [waiter, _] = waiters([1, 1]);
        (0..3).for_each(|_| _ = queue.take(true));
        (0..3).for_each(|chunk| queue.failed(Work::Bring(chunk)));
        queue.phase = failure();
        assert_eq!(queue.fault(1, waiter), Fault::Waits);
        assert_eq!(queue.take(true), None);

        assert_eq!(queue.retry(), []);
        let taken: Vec<_> = std::iter::from_fn(|| queue.take(true)).collect();
        assert_eq!(taken, [1, 0, 2].map(Work::Bring));
        assert_eq!(queue.placed(1), [waiter]);
    }

    #[test]
    fn a_chunk_that_was_written_is_shown_again_and_never_written_again() {
        let mut queue = Queue::new(1);
        let [waiter, _] = waiters([0, 0]);
        queue.take(true);
        queue.failed(Work::Show(0));
        queue.phase = failure();
        assert_eq!(queue.fault(0, waiter), Fault::Waits);
        queue.retry();
        assert_eq!(queue.take(false), Some(Work::Show(0)));
        queue.failed(Work::Show(0));
        queue.phase = failure();
        queue.retry();
        assert_eq!(queue.take(true), Some(Work::Show(0)));
    }
}
