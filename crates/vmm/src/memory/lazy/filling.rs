//! Brings chunks and answers faults: what the threads of a lazy filling do.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use stream::{Batch, Run};

use super::latency::Latencies;
use super::provider::{ChunkReader, PageProvider};
use super::queue::{Fault, Phase, Queue, Waiter, Work};
use super::userfault::Userfault;
use super::{Event, Failure};
use crate::layout::{PAGE_SIZE, RAM_START};
use crate::memory::GuestMemory;
use crate::memory::tags::TagStore;
use crate::memory::untagged::Untagged;

/// How long the reading of faults rests after the host refused it.
const PAUSE: Duration = Duration::from_secs(1);

/// The pages of a memory by number, and the chunks that bring them.
pub(super) struct Plan {
    /// In order.
    pub runs: Vec<(Range<u64>, u32)>,
    /// How many pages each chunk has.
    pub sizes: Vec<u64>,
    /// The ranges, as offsets into RAM, in which all pages are; holes besides.
    pub ranges: Vec<Range<u64>>,
}

impl Plan {
    /// The chunk that brings a page.
    fn chunk_of(&self, page: u64) -> Option<u32> {
        let behind = self.runs.partition_point(|(run, _)| run.start <= page);
        let (run, chunk) = self.runs.get(behind.checked_sub(1)?)?;
        run.contains(&page).then_some(*chunk)
    }
}

pub(super) struct Filling {
    pub memory: Arc<GuestMemory>,
    pub file: File,
    pub tags: Option<Box<dyn TagStore>>,
    /// What need not be written of them.
    pub untagged: Arc<Untagged>,
    /// Closed with this value, which the thread that reads faults holds until all is over: nobody finds zeros
    /// where pages are missing.
    pub userfault: Userfault,
    pub plan: Plan,
    pub on_event: Box<dyn Fn(Event) + Send + Sync>,
    pub queue: Mutex<Queue>,
    /// There is more to do.
    pub more: Condvar,
    /// The phase is another.
    pub changed: Condvar,
    /// Ends the reading of faults.
    pub end: OwnedFd,
    pub placed: AtomicU64,
    pub fault_times: Latencies,
}

impl Filling {
    pub(super) fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads faults until all is over.
    pub(super) fn answer_faults(&self) {
        while !self.lock().is_over() {
            let read = self.wait_for_faults().and_then(|()| {
                self.userfault
                    .read(|address| self.answer(self.page_at(address)))
            });
            if let Err(error) = read {
                self.report(Failure::Faults(error));
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn wait_for_faults(&self) -> io::Result<()> {
        let mut files = [
            PollFd::new(&self.userfault, PollFlags::IN),
            PollFd::new(&self.end, PollFlags::IN),
        ];
        match rustix::event::poll(&mut files, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn answer(&self, page: u64) {
        let waiter = Waiter {
            page,
            since: Instant::now(),
        };
        let fault = match self.plan.chunk_of(page) {
            Some(chunk) => self.lock().fault(chunk, waiter),
            None => Fault::Show,
        };
        match fault {
            Fault::Show => self.let_go(&[waiter]),
            Fault::Wanted => self.more.notify_one(),
            Fault::Waits => {}
        }
    }

    /// Lets go on who waits for pages that are in the file, or are holes.
    pub(super) fn let_go(&self, waiters: &[Waiter]) {
        for waiter in waiters {
            match self.show_or_make(waiter.page) {
                Ok(()) => self.fault_times.add(waiter.since.elapsed()),
                Err(failure) => {
                    self.lock().stick(*waiter);
                    self.report(failure);
                }
            }
        }
    }

    fn show_or_make(&self, page: u64) -> Result<(), Failure> {
        let shown = match self.show(page..page + 1) {
            // Neither written nor touched: a hole. Nobody's data are changed by making room.
            Err(Errno::FAULT) => self.make(page).and_then(|()| self.show(page..page + 1)),
            shown => shown,
        };
        match shown {
            // As all was placed, the range became ordinary memory, and who waited went on.
            Err(Errno::NOENT) if self.lock().is_over() => Ok(()),
            shown => shown.map_err(|error| Failure::show(page..page + 1, error)),
        }
    }

    fn make(&self, page: u64) -> Result<(), Errno> {
        let offset = page * PAGE_SIZE - RAM_START;
        rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, PAGE_SIZE)
    }

    fn show(&self, pages: Range<u64>) -> Result<(), Errno> {
        self.userfault
            .show(self.address_of(pages.start)..self.address_of(pages.end))
    }

    fn address_of(&self, page: u64) -> u64 {
        self.start() + (page * PAGE_SIZE - RAM_START)
    }

    fn page_at(&self, address: u64) -> u64 {
        (address - self.start() + RAM_START) / PAGE_SIZE
    }

    /// Where the data mapping is.
    fn start(&self) -> u64 {
        self.memory.host_address.addr().get() as u64
    }

    /// Brings chunks until all is over: those that somebody waits for, and in the background all others.
    pub(super) fn fill(&self, source: &impl PageProvider, background: bool) {
        let mut reader = source.reader();
        while let Some(work) = self.next(background) {
            if background {
                self.look_ahead(&mut reader, work);
            }
            match self.work(&mut reader, work) {
                Ok(chunk) => self.placed(chunk),
                Err((work, failure)) => {
                    self.lock().failed(work);
                    self.report(failure);
                }
            }
        }
    }

    fn look_ahead<R: ChunkReader>(&self, reader: &mut R, work: Work) {
        if R::AHEAD == 0 {
            return;
        }
        if let Work::Bring(chunk) = work {
            let ahead: Vec<u32> = self.lock().ahead().take(R::AHEAD - 1).collect();
            reader.expect([chunk].into_iter().chain(ahead));
        }
    }

    /// Waits for something to do; nothing, if all is over.
    fn next(&self, background: bool) -> Option<Work> {
        let mut queue = self.lock();
        while !queue.is_over() {
            if let Some(work) = queue.take(background) {
                return Some(work);
            }
            queue = self
                .more
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// Returns the chunk that is visible now; or, beside the failure, what is left to be done.
    fn work(&self, reader: &mut impl ChunkReader, work: Work) -> Result<u32, (Work, Failure)> {
        match work {
            Work::Bring(chunk) => {
                let batch = reader
                    .read(chunk)
                    .map_err(Failure::Source)
                    .and_then(|batch| self.write(chunk, batch).map(|()| batch))
                    .map_err(|failure| (work, failure))?;
                self.show_all(batch.runs().map(|run| run.pages()))
                    .map_err(|failure| (Work::Show(chunk), failure))?;
                Ok(chunk)
            }
            Work::Show(chunk) => {
                let runs = self.plan.runs.iter();
                self.show_all(runs.filter(|run| run.1 == chunk).map(|run| run.0.clone()))
                    .map_err(|failure| (work, failure))?;
                Ok(chunk)
            }
        }
    }

    /// Writes data and tags to the file, where nobody can see them yet.
    fn write(&self, chunk: u32, batch: &Batch) -> Result<(), Failure> {
        self.check(chunk, batch)?;
        batch.runs().try_for_each(|run| self.write_run(&run))?;
        // All of it comes before the page table entries. Older kernels leave that to their callers.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// A chunk has its own pages, all of them and no others.
    fn check(&self, chunk: u32, batch: &Batch) -> Result<(), Failure> {
        let expected = self.plan.sizes[chunk as usize];
        let own = |page: &u64| self.plan.chunk_of(*page) == Some(chunk);
        let right = batch.len() as u64 == expected && batch.numbers().iter().all(own);
        if !right || batch.metadata().has_tags() != self.tags.is_some() {
            return Err(Failure::OtherPages { chunk });
        }
        Ok(())
    }

    fn write_run(&self, run: &Run<'_>) -> Result<(), Failure> {
        let ipa = run.first * PAGE_SIZE;
        self.file
            .write_all_at(run.data.as_flattened(), ipa - RAM_START)
            .map_err(|source| Failure::Memory {
                step: "writing",
                pages: run.pages(),
                source,
            })?;
        if let Some(tags) = &self.tags {
            self.untagged.write(&**tags, ipa, run.tags)?;
        }
        Ok(())
    }

    fn show_all(&self, mut runs: impl Iterator<Item = Range<u64>>) -> Result<(), Failure> {
        runs.try_for_each(|run| {
            self.show(run.clone())
                .map_err(|error| Failure::show(run, error))
        })
    }

    fn placed(&self, chunk: u32) {
        let pages = self.plan.sizes[chunk as usize];
        let waiters = self.lock().placed(chunk);
        self.placed.fetch_add(pages, Ordering::Relaxed);
        self.let_go(&waiters);
        self.lock().settled();
        self.end_if_complete();
    }

    /// As soon as all is placed, memory is ordinary memory.
    pub(super) fn end_if_complete(&self) {
        let mut queue = self.lock();
        if queue.is_over() || !queue.is_all_done() {
            return;
        }
        queue.phase = Phase::Complete;
        drop(queue);
        for range in &self.plan.ranges {
            let start = self.start();
            if let Err(error) = self
                .userfault
                .unregister(start + range.start..start + range.end)
            {
                // Closing it, as the last one lets go of it, does the same.
                tracing::debug!("guest memory is filled, unregistering a range of it: {error}");
            }
        }
        self.wake_all();
        (self.on_event)(Event::Complete);
    }

    /// Makes all threads look at the phase.
    pub(super) fn wake_all(&self) {
        self.more.notify_all();
        self.changed.notify_all();
        if let Err(error) = rustix::io::write(&self.end, &1u64.to_ne_bytes()) {
            tracing::debug!("waking the thread that reads page faults: {error}");
        }
    }

    /// The first failure, and the first one after another try was asked for, is told.
    fn report(&self, failure: Failure) {
        let mut queue = self.lock();
        let Phase::Filling = queue.phase else {
            tracing::debug!("filling guest memory failed again: {failure}");
            return;
        };
        let failure = Arc::new(failure);
        queue.phase = Phase::Failed(failure.clone());
        drop(queue);
        self.changed.notify_all();
        (self.on_event)(Event::Failed(failure));
    }
}
