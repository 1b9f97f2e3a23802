//! The thread of an active device.
//!
//! A device splits in two: the [`VirtioDevice`](super::VirtioDevice), which the vCPU threads reach
//! through the transport, and a [`Handler`], which lives on the device's own thread with the queues
//! and the backend. [`Worker`] is that thread: it waits for kicks of the queues, for the backend's
//! file descriptors that the handler [`watches`](Poll::watch), and for the order to stop, which
//! gives the handler back whole. [`serve`] is the loop that most handlers need over one queue.
//!
//! No event may keep a thread for long, since a reset or a pause waits for it: a handler does a
//! bounded piece of work and says [`Progress::More`] if there is more.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use crate::memory::GuestRam;

/// Why a handler cannot go on. The driver is told to reset the device.
#[derive(Debug, thiserror::Error)]
pub enum HandlerError {
    /// The driver's rings are broken.
    #[error("its ring is broken: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A descriptor chain is none.
    #[error("its descriptor chain at {head} is broken: {why}")]
    Chain {
        /// The chain's first descriptor.
        head: u16,
        /// What is wrong with it.
        why: String,
    },
    /// The device's backend failed for good.
    #[error("its backend failed: {0}")]
    Backend(#[from] io::Error),
}

impl HandlerError {
    /// The chain at `head` is broken.
    pub(crate) fn chain(head: u16, why: &impl ToString) -> Self {
        HandlerError::Chain {
            head,
            why: why.to_string(),
        }
    }
}

/// Whether a handler is done with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is left to do until the next event.
    Done,
    /// More can be done now: the queue's handler wants to be called again once other events, the
    /// order to stop among them, had their turn.
    More,
}

/// The part of a device that runs on its own thread and owns its queues.
pub trait Handler: Send + 'static {
    /// Begins: the place to watch backend file descriptors. Every queue is then treated as kicked.
    ///
    /// # Errors
    /// The device cannot work; its driver is told to reset it.
    fn start(&mut self, _poll: &Poll) -> Result<(), HandlerError> {
        Ok(())
    }

    /// The driver kicked queue `index`. Also called at the start, and for queues that are not `ready()`.
    ///
    /// # Errors
    /// The device cannot go on; its driver is told to reset it.
    fn queue_kicked(&mut self, index: usize, poll: &Poll) -> Result<Progress, HandlerError>;

    /// A watched file descriptor is ready for some of the `events` it is watched for, or was hung
    /// up. A call may come too late, when the reason is gone or the descriptor was just forgotten:
    /// descriptors are non-blocking.
    ///
    /// # Errors
    /// The device cannot go on; its driver is told to reset it.
    fn backend_ready(
        &mut self,
        _token: u32,
        _events: EventSet,
        _poll: &Poll,
    ) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// The file descriptors a handler watches, level-triggered.
///
/// The kernel reports hang-ups and errors of a watched descriptor even when its event set is
/// empty: a handler that cannot act on them must [`forget`](Poll::forget) the descriptor meanwhile.
pub struct Poll {
    epoll: Epoll,
}

impl Poll {
    /// Begins to watch `fd`; [`Handler::backend_ready`] is called with `token`. The caller forgets
    /// the descriptor before it closes it, or closes its last duplicate.
    ///
    /// # Errors
    /// The kernel's: watched already, not pollable, or out of memory.
    pub fn watch(&self, fd: &impl AsRawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(
            ControlOperation::Add,
            fd,
            EpollEvent::new(events, BACKEND | u64::from(token)),
        )
    }

    /// Changes what a watched `fd` is watched for.
    ///
    /// # Errors
    /// The kernel's: not watched.
    pub fn change(&self, fd: &impl AsRawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(
            ControlOperation::Modify,
            fd,
            EpollEvent::new(events, BACKEND | u64::from(token)),
        )
    }

    /// Ceases to watch `fd`.
    ///
    /// # Errors
    /// The kernel's: not watched.
    pub fn forget(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd, EpollEvent::default())
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: &impl AsRawFd,
        event: EpollEvent,
    ) -> io::Result<()> {
        self.epoll.ctl(operation, fd.as_raw_fd(), event)
    }
}

/// Epoll data of the order to stop.
const STOP: u64 = u64::MAX;
/// Epoll data of backends has this bit; that of queues is the queue's index.
const BACKEND: u64 = 1 << 32;
/// Events taken from the kernel at once.
const EVENTS: usize = 16;

/// A running device thread, named after its device. Dropping it stops the thread.
pub struct Worker<H> {
    stop: EventFd,
    /// Where the handler comes back, once the thread has nothing more to do with it.
    back: mpsc::Receiver<H>,
    thread: Option<JoinHandle<()>>,
}

/// A thread that could not be started, with the handler it would have run.
#[derive(Debug)]
pub struct NotStarted<H> {
    /// Why.
    pub error: io::Error,
    /// The handler, untouched.
    pub handler: H,
}

impl<H: Handler> Worker<H> {
    /// Starts the thread «tv-`name`», which serves `kicks` (index by index) and what `handler` watches.
    ///
    /// # Errors
    /// The kernel gives no thread or no descriptors. The handler comes back with the error.
    pub fn start(
        name: &str,
        handler: H,
        kicks: Vec<EventFd>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, NotStarted<H>> {
        // The handler is given to the thread once it exists, so that no failure can lose it.
        let (give, take) = mpsc::sync_channel(1);
        match spawn(name, take, kicks, interrupt) {
            Ok(worker) => {
                give.send(handler)
                    .expect("the new thread waits for its handler");
                Ok(worker)
            }
            Err(error) => Err(NotStarted { error, handler }),
        }
    }

    /// Stops the thread, after the event it is at, and gives the handler back. Nobody waits for the host to clear the thread
    /// away: a guest may stand still meanwhile.
    ///
    /// # Panics
    /// When the thread panicked.
    pub fn stop(mut self) -> H {
        let thread = self
            .thread
            .take()
            .expect("only stop and drop take the thread");
        self.order_stop();
        self.back.recv().unwrap_or_else(|_| {
            let panic = thread.join().expect_err("it gives its handler back");
            std::panic::resume_unwind(panic)
        })
    }
}

impl<H> Worker<H> {
    fn order_stop(&self) {
        self.stop
            .write(1)
            .expect("an eventfd written once takes the write");
    }
}

impl<H> Drop for Worker<H> {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.order_stop();
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn spawn<H: Handler>(
    name: &str,
    take: mpsc::Receiver<H>,
    kicks: Vec<EventFd>,
    interrupt: Arc<dyn Interrupt>,
) -> io::Result<Worker<H>> {
    let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let poll = Poll {
        epoll: Epoll::new()?,
    };
    poll.control(
        ControlOperation::Add,
        &stop,
        EpollEvent::new(EventSet::IN, STOP),
    )?;
    for (index, kick) in (0..).zip(&kicks) {
        poll.control(
            ControlOperation::Add,
            kick,
            EpollEvent::new(EventSet::IN, index),
        )?;
    }
    let rounds = Rounds {
        device: name.to_owned(),
        poll,
        kicks,
        interrupt,
    };
    let (give_back, back) = mpsc::sync_channel(1);
    let thread = thread::Builder::new()
        .name(format!("tv-{name}"))
        .spawn(move || {
            let mut handler = take.recv().expect("a started worker is given its handler");
            rounds.serve(&mut handler);
            // Its descriptors are closed by then.
            drop(rounds);
            let _ = give_back.send(handler);
        })?;
    Ok(Worker {
        stop,
        back,
        thread: Some(thread),
    })
}

/// What a device thread waits on.
struct Rounds {
    device: String,
    poll: Poll,
    kicks: Vec<EventFd>,
    interrupt: Arc<dyn Interrupt>,
}

impl Rounds {
    /// Serves until the order to stop, or until the handler cannot go on.
    fn serve(&self, handler: &mut impl Handler) {
        if let Err(why) = self.serve_until_stopped(handler) {
            tracing::warn!(
                "virtio device \"{}\" stops until its driver resets it: {why}",
                self.device
            );
            self.interrupt.device_needs_reset();
        }
    }

    fn serve_until_stopped(&self, handler: &mut impl Handler) -> Result<(), HandlerError> {
        handler.start(&self.poll)?;
        // Buffers may have been waiting since before this thread was.
        let mut kicked = vec![true; self.kicks.len()];
        loop {
            if !self.take_events(handler, &mut kicked)? {
                return Ok(());
            }
            for (index, kicked) in kicked.iter_mut().enumerate().filter(|(_, kicked)| **kicked) {
                *kicked = handler.queue_kicked(index, &self.poll)? == Progress::More;
            }
        }
    }

    /// Notes which queues were kicked and serves the backends. Waits only when no queue has work.
    /// `false` when the thread is to stop.
    fn take_events(
        &self,
        handler: &mut impl Handler,
        kicked: &mut [bool],
    ) -> Result<bool, HandlerError> {
        let timeout = if kicked.contains(&true) { 0 } else { -1 };
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.poll.epoll.wait(timeout, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        for event in &events[..count] {
            match event.data() {
                STOP => return Ok(false),
                data if data & BACKEND != 0 => {
                    let ready = EventSet::from_bits_truncate(event.events());
                    // The low half is the handler's token.
                    handler.backend_ready(data as u32, ready, &self.poll)?;
                }
                index => {
                    let index = index as usize;
                    // Only lowers the eventfd; an empty one means that another read was faster.
                    let _ = self.kicks[index].read();
                    kicked[index] = true;
                }
            }
        }
        Ok(true)
    }
}

/// What became of a descriptor chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done, and this many bytes were written into it.
    Used(u32),
    /// It cannot be done now. It goes back to the ring, and no kick is asked for: the handler
    /// serves the queue again when its backend is ready.
    Later,
}

/// Serves the chains available in `queue`, in order, as `serve_one` says, and interrupts the guest
/// when it wants to be. At most as many chains as the queue is long are served in one call. Does
/// nothing when the queue is not ready.
///
/// A chain is not checked: it may be cut, loop, or leave guest memory, and may end without a word
/// where it does.
///
/// # Errors
/// The ring is broken, or `serve_one` failed.
pub fn serve<'m>(
    queue: &mut Queue,
    memory: &'m GuestRam,
    interrupt: &dyn Interrupt,
    mut serve_one: impl FnMut(DescriptorChain<&'m GuestRam>) -> Result<Outcome, HandlerError>,
) -> Result<Progress, HandlerError> {
    if !queue.ready() {
        return Ok(Progress::Done);
    }
    let mut left = queue.size();
    loop {
        queue.disable_notification(memory)?;
        let mut used = false;
        let mut held = false;
        while left > 0 {
            let Some(chain) = queue.iter(memory)?.next() else {
                break;
            };
            let head = chain.head_index();
            match serve_one(chain)? {
                Outcome::Used(written) => queue.add_used(memory, head, written)?,
                Outcome::Later => {
                    queue.go_to_previous_position();
                    held = true;
                    break;
                }
            }
            used = true;
            left -= 1;
        }
        if used && queue.needs_notification(memory)? {
            interrupt.used_buffers();
        }
        if held {
            return Ok(Progress::Done);
        }
        if left == 0 {
            return Ok(Progress::More);
        }
        // Chains made available while notifications were off come without a kick.
        if !queue.enable_notification(memory)? {
            return Ok(Progress::Done);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::AssertUnwindSafe;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use vm_memory::{Bytes, GuestAddress};

    use super::super::testing::{BUFFERS, CountedInterrupt, DriverQueue, ram, wait_until};
    use super::*;

    /// Serves the chains of a queue of 16 once; returns what is left to do, the chains used, and
    /// whether the driver was told that it need not kick.
    fn serve_once(chains: u16, outcome: Outcome) -> (Progress, u16, bool) {
        let memory = ram();
        let mut driver = DriverQueue::new(&memory, 0, 16);
        for _ in 0..chains {
            driver.add(&[(BUFFERS, 8, 0)]);
        }
        let interrupt = CountedInterrupt::default();
        let served = serve(&mut driver.device_queue(), &memory, &interrupt, |_| {
            Ok(outcome)
        });
        let flags = memory
            .read_obj::<u16>(GuestAddress(driver.used_ring()))
            .unwrap();
        (served.unwrap(), driver.used_index(), flags == 1)
    }

    #[test]
    fn kicks_are_asked_for_only_when_every_chain_is_used() {
        assert_eq!(serve_once(3, Outcome::Used(0)), (Progress::Done, 3, false));
        assert_eq!(serve_once(16, Outcome::Used(0)), (Progress::More, 16, true));
        assert_eq!(serve_once(3, Outcome::Later), (Progress::Done, 0, true));
    }

    #[test]
    fn one_interrupt_announces_all_chains_used_together() {
        let memory = ram();
        let mut driver = DriverQueue::new(&memory, 0, 16);
        for length in 1..4 {
            driver.add(&[(BUFFERS, length, 0)]);
        }
        let interrupt = CountedInterrupt::default();

        let mut queue = driver.device_queue();
        serve(&mut queue, &memory, &interrupt, |_| Ok(Outcome::Used(5))).unwrap();
        serve(&mut queue, &memory, &interrupt, |_| Ok(Outcome::Used(5))).unwrap();

        assert_eq!(driver.used(2), (2, 5));
        assert_eq!(interrupt.used.load(Ordering::SeqCst), 1);
    }

    /// Counts its kicks, and answers as it is told.
    struct Counter {
        backend: EventFd,
        answer: fn() -> Result<Progress, HandlerError>,
        kicks: Arc<[AtomicUsize; 2]>,
        readied: Arc<AtomicUsize>,
        named: Arc<AtomicBool>,
    }

    impl Handler for Counter {
        fn start(&mut self, poll: &Poll) -> Result<(), HandlerError> {
            self.named.store(
                thread::current().name() == Some("tv-count0"),
                Ordering::SeqCst,
            );
            Ok(poll.watch(&self.backend, 7, EventSet::IN)?)
        }
        fn queue_kicked(&mut self, index: usize, _poll: &Poll) -> Result<Progress, HandlerError> {
            self.kicks[index].fetch_add(1, Ordering::SeqCst);
            (self.answer)()
        }
        fn backend_ready(&mut self, token: u32, _: EventSet, _: &Poll) -> Result<(), HandlerError> {
            self.backend.read()?;
            self.readied.fetch_add(token as usize, Ordering::SeqCst);
            Ok(())
        }
    }

    /// A running counter and the other ends of all it has.
    struct Bench {
        worker: Worker<Counter>,
        kicks: [EventFd; 2],
        counts: Arc<[AtomicUsize; 2]>,
        backend: EventFd,
        readied: Arc<AtomicUsize>,
        named: Arc<AtomicBool>,
        interrupt: Arc<CountedInterrupt>,
    }

    fn bench(answer: fn() -> Result<Progress, HandlerError>) -> Bench {
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (kicks, backend) = ([eventfd(), eventfd()], eventfd());
        let counts: Arc<[AtomicUsize; 2]> = Arc::default();
        let (readied, named) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let interrupt = Arc::new(CountedInterrupt::default());
        let handler = Counter {
            backend: backend.try_clone().unwrap(),
            answer,
            kicks: counts.clone(),
            readied: readied.clone(),
            named: named.clone(),
        };
        let clones = kicks.each_ref().map(|kick| kick.try_clone().unwrap());
        let worker = Worker::start("count0", handler, clones.into(), interrupt.clone())
            .map_err(|not_started| not_started.error)
            .unwrap();
        Bench {
            worker,
            kicks,
            counts,
            backend,
            readied,
            named,
            interrupt,
        }
    }

    fn count(counts: &[AtomicUsize; 2], index: usize) -> usize {
        counts[index].load(Ordering::SeqCst)
    }

    #[test]
    fn every_queue_is_looked_at_once_at_the_start_and_then_when_it_is_kicked() {
        let bench = bench(|| Ok(Progress::Done));
        wait_until("the start", || count(&bench.counts, 1) == 1);

        bench.kicks[1].write(1).unwrap();
        wait_until("the kick", || count(&bench.counts, 1) == 2);

        bench.worker.stop();
        assert_eq!(count(&bench.counts, 0), 1);
        assert!(bench.named.load(Ordering::SeqCst));
    }

    #[test]
    fn a_watched_backend_is_served_with_its_token() {
        let bench = bench(|| Ok(Progress::Done));

        bench.backend.write(1).unwrap();

        wait_until("the backend's turn", || {
            bench.readied.load(Ordering::SeqCst) == 7
        });
        bench.worker.stop();
    }

    #[test]
    fn work_without_end_delays_neither_the_backend_nor_the_stop() {
        let bench = bench(|| Ok(Progress::More));
        wait_until("much work", || count(&bench.counts, 0) > 100);

        bench.backend.write(1).unwrap();
        wait_until("the backend's turn", || {
            bench.readied.load(Ordering::SeqCst) == 7
        });

        bench.worker.stop();
    }

    #[test]
    fn a_handler_that_cannot_go_on_asks_for_a_reset_and_comes_back() {
        let bench = bench(|| Err(HandlerError::Ring(virtio_queue::Error::InvalidChain)));

        wait_until("the request", || {
            bench.interrupt.needs_reset.load(Ordering::SeqCst)
        });
        bench.kicks[0].write(1).unwrap();
        bench.worker.stop();

        assert_eq!(count(&bench.counts, 0), 1, "it is not called again");
    }

    #[test]
    fn a_panic_of_the_handler_is_one_of_whoever_stops_it() {
        let bench = bench(|| panic!("on purpose"));
        wait_until("the start", || count(&bench.counts, 0) == 1);

        let stopped = std::panic::catch_unwind(AssertUnwindSafe(|| bench.worker.stop()));

        let panic = stopped.err().unwrap();
        assert_eq!(panic.downcast_ref(), Some(&"on purpose"));
    }

    #[test]
    fn a_dropped_worker_has_ended() {
        let bench = bench(|| Ok(Progress::More));

        drop(bench.worker);

        let calls = count(&bench.counts, 0);
        thread::sleep(std::time::Duration::from_millis(10));
        assert_eq!(count(&bench.counts, 0), calls);
    }
}
