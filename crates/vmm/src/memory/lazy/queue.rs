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
