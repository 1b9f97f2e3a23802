//! vCPU threads.
//!
//! Each vCPU runs on a thread of its own until it is told to stop. What the machine wants of it
//! ([`RunState`]) stands in a [`Gate`]; changing it interrupts every vCPU, and a vCPU looks at the
//! gate whenever it comes back with [`Exit::Interrupted`]: at that moment nothing of an earlier
//! exit is left unfinished, so a paused vCPU is whole.
//!
//! A vCPU that waits at the gate can be asked something ([`VcpuThreads::ask`]). Its own thread answers, so that all of them
//! do at the same time and none has to end.
//!
//! A gate can be throttled besides: then vCPUs that the machine wants to run wait at it all the same, and are as whole there
//! as paused ones. The two conditions know nothing of each other, so whatever the machine wants holds at every moment. The
//! [`Throttler`] throttles the gate for a share of the time.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use engine::{DebugExit, Exit, Interrupter, SystemEvent, Vcpu};

use crate::bus::Bus;

/// What the machine wants of its vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Run the guest.
    Running,
    /// Wait, whole, outside of the guest.
    Paused,
    /// End the thread.
    Stopped,
}

/// Why a vCPU's thread has something to say.
#[derive(Debug)]
pub enum VcpuEvent {
    /// The guest asked something of the machine. The vCPU waits for the gate to change.
    System(SystemEvent),
    /// It came to what its debugger waits for. The vCPU waits for the gate to change.
    Debug {
        /// Its number.
        vcpu: usize,
        /// To what.
        exit: DebugExit,
    },
    /// The vCPU cannot run on.
    Failed(engine::Error),
    /// The vCPU's thread panicked and is gone.
    Panicked,
}

/// Where the machine says what it wants of its vCPUs, and where they wait.
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    parked: Condvar,
}

struct GateState {
    wanted: RunState,
    /// Nobody passes for the moment who otherwise could.
    throttled: bool,
    /// How many vCPUs wait here, or will never run again.
    parked: usize,
    /// How often the vCPUs were asked something.
    asked: u64,
}

impl GateState {
    fn holds(&self) -> bool {
        match self.wanted {
            RunState::Running => self.throttled,
            RunState::Paused => true,
            RunState::Stopped => false,
        }
    }
}

impl Gate {
    /// A gate that lets nobody pass yet.
    pub fn closed() -> Self {
        Self {
            state: Mutex::new(GateState {
                wanted: RunState::Paused,
                throttled: false,
                parked: 0,
                asked: 0,
            }),
            changed: Condvar::new(),
            parked: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what is wanted from now on. vCPUs that are in the guest must be interrupted to notice.
    fn set(&self, wanted: RunState) {
        self.lock().wanted = wanted;
        self.changed.notify_all();
    }

    /// Lets nobody back into the guest, and has whoever waits, or comes, answer. vCPUs that are in the guest must be
    /// interrupted to notice.
    fn ask(&self) {
        let mut state = self.lock();
        state.wanted = RunState::Paused;
        state.asked += 1;
        self.changed.notify_all();
    }

    /// Lets nobody back into the guest, unless the threads are to end anyway.
    fn close(&self) {
        let mut state = self.lock();
        if state.wanted == RunState::Running {
            state.wanted = RunState::Paused;
        }
    }

    /// Waits until the guest may run (true) or the thread is to end (false), and answers meanwhile what is asked.
    fn pass(&self, answer: impl Fn()) -> bool {
        let mut state = self.lock();
        if state.holds() {
            state.parked += 1;
            self.parked.notify_all();
            let mut answered = 0;
            loop {
                state = self
                    .changed
                    .wait_while(state, |state| answered == state.asked && state.holds())
                    .unwrap_or_else(PoisonError::into_inner);
                if answered == state.asked {
                    break;
                }
                answered = state.asked;
                drop(state);
                answer();
                state = self.lock();
            }
            state.parked -= 1;
        }
        state.wanted == RunState::Running
    }

    /// Keeps vCPUs out of the guest that may run, or does not any more. vCPUs that are in the guest must be interrupted to
    /// notice. `false` once the threads are to end.
    fn throttle(&self, throttled: bool) -> bool {
        let mut state = self.lock();
        state.throttled = throttled;
        if !throttled {
            self.changed.notify_all();
        }
        state.wanted != RunState::Stopped
    }

    /// Lets nobody back into the guest, and counts the calling vCPU as parked for good.
    fn give_up(&self) {
        self.close();
        self.lock().parked += 1;
        self.parked.notify_all();
    }

    /// Waits until `count` vCPUs are parked.
    fn wait_parked(&self, count: usize) {
        let _state = self
            .parked
            .wait_while(self.lock(), |state| state.parked < count)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

/// What a vCPU's thread is asked to do with it.
type Question<V> = Box<dyn FnOnce(&V) + Send>;

/// The vCPU threads of a machine.
pub struct VcpuThreads<V: Vcpu> {
    gate: Arc<Gate>,
    interrupters: Vec<V::Interrupter>,
    threads: Vec<JoinHandle<V>>,
    /// One a thread.
    questions: Vec<mpsc::Sender<Question<V>>>,
}

/// What the vCPUs of some threads say, each when it is ready.
pub struct Answers<R>(Vec<mpsc::Receiver<R>>);

impl<R> Answers<R> {
    /// Waits for all answers, and returns them in the vCPUs' order, without those of vCPUs whose threads panicked.
    pub fn wait(self) -> Vec<R> {
        self.0
            .into_iter()
            .filter_map(|answer| answer.recv().ok())
            .collect()
    }
}

impl<V: Vcpu + 'static> VcpuThreads<V> {
    /// Starts a thread a vCPU, `tv-vcpu0` and on. They wait until [`VcpuThreads::resume`].
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn start(
        vcpus: Vec<V>,
        bus: &Arc<Bus>,
        report: impl Fn(VcpuEvent) + Clone + Send + 'static,
    ) -> std::io::Result<Self> {
        Self::start_some(vcpus.into_iter().enumerate().collect(), bus, report)
    }

    /// Starts a thread for each of some of a machine's vCPUs, which are given with their numbers.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn start_some(
        vcpus: Vec<(usize, V)>,
        bus: &Arc<Bus>,
        report: impl Fn(VcpuEvent) + Clone + Send + 'static,
    ) -> std::io::Result<Self> {
        let gate = Arc::new(Gate::closed());
        let mut started = Self {
            gate: gate.clone(),
            interrupters: vcpus.iter().map(|(_, vcpu)| vcpu.interrupter()).collect(),
            threads: Vec::with_capacity(vcpus.len()),
            questions: Vec::with_capacity(vcpus.len()),
        };
        for (index, vcpu) in vcpus {
            let (gate, bus, report) = (gate.clone(), bus.clone(), report.clone());
            let (ask, asked) = mpsc::channel();
            let thread = thread::Builder::new()
                .name(format!("tv-vcpu{index}"))
                .spawn(move || run(index, vcpu, &gate, &asked, &bus, report))?;
            started.threads.push(thread);
            started.questions.push(ask);
        }
        Ok(started)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.threads.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.gate.set(RunState::Running);
    }

    /// Stops the vCPUs where they are, without waiting for one that the host does not let out.
    pub fn hold(&self) {
        self.request(RunState::Paused);
    }

    /// Stops the vCPUs where they are, and returns when all of them wait.
    pub fn pause(&self) {
        self.request(RunState::Paused);
        self.gate.wait_parked(self.threads.len());
    }

    /// Stops the vCPUs where they are, and returns when all of them wait, or answer: each is given, whole, to `answer`, with its
    /// place among these threads, on its own thread. None goes on before it has answered.
    pub fn ask<R: Send + 'static>(
        &self,
        answer: impl Fn(usize, &V) -> R + Clone + Send + 'static,
    ) -> Answers<R> {
        let mut answers = Vec::with_capacity(self.questions.len());
        for (place, question) in self.questions.iter().enumerate() {
            let (give, take) = mpsc::sync_channel(1);
            let answer = answer.clone();
            // A thread that is gone is told by the answer that does not come.
            let _ = question.send(Box::new(move |vcpu: &V| {
                let _ = give.send(answer(place, vcpu));
            }));
            answers.push(take);
        }
        self.gate.ask();
        self.interrupt();
        self.gate.wait_parked(self.threads.len());
        Answers(answers)
    }

    /// A handle by which the vCPUs get less time, at first all of it.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn throttler(&self) -> std::io::Result<Throttler> {
        let (gate, interrupters) = (self.gate.clone(), self.interrupters.clone());
        let (shares, wanted) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("tv-throttle".into())
            .spawn(move || throttle(&gate, &interrupters, &wanted))?;
        Ok(Throttler {
            shares: Some(shares),
            thread: Some(thread),
        })
    }

    /// Ends the threads and gives the vCPUs back, in order, without those whose threads panicked.
    pub fn stop(mut self) -> Vec<V> {
        self.end()
    }
}

impl<V: Vcpu> VcpuThreads<V> {
    fn request(&self, wanted: RunState) {
        self.gate.set(wanted);
        self.interrupt();
    }

    fn interrupt(&self) {
        for interrupter in &self.interrupters {
            interrupter.interrupt();
        }
    }

    fn end(&mut self) -> Vec<V> {
        self.request(RunState::Stopped);
        self.threads
            .drain(..)
            .filter_map(|thread| thread.join().ok())
            .collect()
    }
}

impl<V: Vcpu> Drop for VcpuThreads<V> {
    fn drop(&mut self) {
        self.end();
    }
}

/// How often vCPUs are kept out of the guest: long against what stopping them costs, short against what people notice.
const THROTTLE_PERIOD: Duration = Duration::from_millis(20);

/// Gives the vCPUs of some threads less time, while they run. It decides only about vCPUs that the machine wants to run,
/// and ends with those threads. Dropping it gives the vCPUs all their time again.
pub struct Throttler {
    /// `None` only while it is dropped.
    shares: Option<mpsc::Sender<u8>>,
    thread: Option<JoinHandle<()>>,
}

impl Throttler {
    /// Keeps the vCPUs out of the guest for so many hundredths of each period of 20 ms; more than 99 is 99.
    pub fn set(&self, percent: u8) {
        if let Some(shares) = &self.shares {
            // Nobody hears it once the threads have ended.
            let _ = shares.send(percent.min(99));
        }
    }
}

impl Drop for Throttler {
    fn drop(&mut self) {
        drop(self.shares.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Throttles until the shares end, or the vCPUs' threads do.
fn throttle<I: Interrupter>(gate: &Gate, interrupters: &[I], shares: &mpsc::Receiver<u8>) {
    while let Ok(mut percent) = shares.recv() {
        while percent != 0 {
            match throttle_once(gate, interrupters, shares, percent) {
                Ok(wanted) => percent = wanted,
                Err(Ended) => return,
            }
        }
    }
}

/// Nobody is left to be throttled, or nobody who wants it.
struct Ended;

/// Throttles for one period, or until another share is wanted. Returns the share for the next one.
fn throttle_once<I: Interrupter>(
    gate: &Gate,
    interrupters: &[I],
    shares: &mpsc::Receiver<u8>,
    percent: u8,
) -> Result<u8, Ended> {
    let out = THROTTLE_PERIOD * u32::from(percent) / 100;
    if !gate.throttle(true) {
        return Err(Ended);
    }
    for interrupter in interrupters {
        interrupter.interrupt();
    }
    let mut wanted = shares.recv_timeout(out);
    gate.throttle(false);
    if wanted == Err(RecvTimeoutError::Timeout) {
        wanted = shares.recv_timeout(THROTTLE_PERIOD - out);
    }
    match wanted {
        Ok(percent) => Ok(percent),
        Err(RecvTimeoutError::Timeout) => Ok(percent),
        Err(RecvTimeoutError::Disconnected) => Err(Ended),
    }
}

fn run<V: Vcpu>(
    index: usize,
    mut vcpu: V,
    gate: &Gate,
    questions: &mpsc::Receiver<Question<V>>,
    bus: &Bus,
    report: impl Fn(VcpuEvent),
) -> V {
    let _on_panic = ReportPanic {
        gate,
        report: &report,
    };
    while gate.pass(|| questions.try_iter().for_each(|question| question(&vcpu))) {
        if let Some(event) = run_until_interrupted(index, &mut vcpu, bus) {
            gate.close();
            report(event);
        }
    }
    vcpu
}

/// Speaks for a vCPU whose thread panics. Otherwise the machine would wait for it without end.
struct ReportPanic<'a, R: Fn(VcpuEvent)> {
    gate: &'a Gate,
    report: &'a R,
}

impl<R: Fn(VcpuEvent)> Drop for ReportPanic<'_, R> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.gate.give_up();
            (self.report)(VcpuEvent::Panicked);
        }
    }
}

/// Runs the guest until somebody wants this vCPU, or it has something to say.
fn run_until_interrupted(index: usize, vcpu: &mut impl Vcpu, bus: &Bus) -> Option<VcpuEvent> {
    loop {
        match vcpu.run() {
            Ok(Exit::MmioRead { ipa, data }) => bus.read(ipa, data),
            Ok(Exit::MmioWrite { ipa, data }) => bus.write(ipa, data),
            Ok(Exit::Interrupted) => return None,
            Ok(Exit::System(event)) => return Some(VcpuEvent::System(event)),
            Ok(Exit::Debug(exit)) => return Some(VcpuEvent::Debug { vcpu: index, exit }),
            Err(e) => return Some(VcpuEvent::Failed(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use engine::{Ppi, RegisterId, RegisterList};

    use super::*;
    use crate::bus::MmioDevice;

    /// A vCPU that counts how often it ran, and asks for the machine's end after `off_after` runs.
    struct Counter {
        runs: Arc<AtomicU64>,
        off_after: u64,
        interrupted: Flag,
    }

    #[derive(Clone, Default)]
    struct Flag(Arc<AtomicBool>);

    impl Interrupter for Flag {
        fn interrupt(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    impl Counter {
        fn new(off_after: u64) -> (Self, Arc<AtomicU64>) {
            let runs = Arc::new(AtomicU64::new(0));
            let vcpu = Self {
                runs: runs.clone(),
                off_after,
                interrupted: Flag::default(),
            };
            (vcpu, runs)
        }
    }

    impl Vcpu for Counter {
        type Interrupter = Flag;

        fn run(&mut self) -> engine::Result<Exit<'_>> {
            if self.interrupted.0.swap(false, Ordering::SeqCst) {
                return Ok(Exit::Interrupted);
            }
            let runs = self.runs.fetch_add(1, Ordering::SeqCst) + 1;
            if runs == self.off_after {
                return Ok(Exit::System(SystemEvent::Off));
            }
            Ok(Exit::MmioWrite { ipa: 0, data: &[0] })
        }
        fn interrupter(&self) -> Flag {
            self.interrupted.clone()
        }
        fn init_pmu(&self, _: Ppi) -> engine::Result<()> {
            Ok(())
        }
        fn power_state(&self) -> engine::Result<engine::PowerState> {
            Ok(engine::PowerState::On)
        }
        fn set_power_state(&self, _: engine::PowerState) -> engine::Result<()> {
            Ok(())
        }
        fn pending_serror(&self) -> engine::Result<engine::PendingSError> {
            Ok(engine::PendingSError::default())
        }
        fn set_pending_serror(&self, _: engine::PendingSError) -> engine::Result<()> {
            Ok(())
        }
        fn set_debug(&self, _: &engine::GuestDebug) -> engine::Result<()> {
            Ok(())
        }
        fn registers(&self) -> engine::Result<RegisterList> {
            Ok(Vec::new())
        }
        fn register(&self, _: RegisterId, _: &mut [u8]) -> engine::Result<()> {
            Ok(())
        }
        fn set_register(&self, _: RegisterId, _: &[u8]) -> engine::Result<()> {
            Ok(())
        }
    }

    type Started = (
        VcpuThreads<Counter>,
        Arc<AtomicU64>,
        mpsc::Receiver<VcpuEvent>,
    );

    fn started(off_after: u64) -> Started {
        started_on(&Arc::default(), off_after)
    }

    fn started_on(bus: &Arc<Bus>, off_after: u64) -> Started {
        let (vcpu, runs) = Counter::new(off_after);
        let (sender, events) = mpsc::channel();
        let threads = VcpuThreads::start(vec![vcpu], bus, move |event| {
            sender.send(event).unwrap();
        })
        .unwrap();
        (threads, runs, events)
    }

    /// A device with a defect.
    struct Defective;

    impl MmioDevice for Defective {
        fn read(&self, _: u64, _: &mut [u8]) {}
        fn write(&self, _: u64, _: &[u8]) {
            panic!("on purpose");
        }
    }

    fn wait_for_more_runs(runs: &AtomicU64) {
        let before = runs.load(Ordering::SeqCst);
        while runs.load(Ordering::SeqCst) == before {
            thread::yield_now();
        }
    }

    #[test]
    fn a_vcpu_does_not_run_before_it_is_resumed() {
        let (threads, runs, _events) = started(u64::MAX);
        let vcpus = threads.stop();
        assert_eq!(runs.load(Ordering::SeqCst), 0);
        assert_eq!(vcpus.len(), 1);
    }

    #[test]
    fn a_paused_vcpu_does_not_run_until_it_is_resumed() {
        let (threads, runs, _events) = started(u64::MAX);
        threads.resume();
        wait_for_more_runs(&runs);

        threads.pause();
        let paused_at = runs.load(Ordering::SeqCst);
        thread::sleep(Duration::from_millis(20));
        let later = runs.load(Ordering::SeqCst);
        threads.resume();
        wait_for_more_runs(&runs);

        assert_eq!(paused_at, later);
    }

    #[test]
    fn a_vcpu_that_asks_for_the_machines_end_is_heard_once_and_waits() {
        let (threads, runs, events) = started(100);
        threads.resume();

        let event = events.recv_timeout(Duration::from_secs(10)).unwrap();
        threads.pause();

        assert!(matches!(event, VcpuEvent::System(SystemEvent::Off)));
        assert_eq!(runs.load(Ordering::SeqCst), 100);
        assert!(events.try_recv().is_err());
    }

    /// Throttled by hand, for as long as a test likes.
    fn throttle_now(threads: &VcpuThreads<Counter>) {
        threads.gate.throttle(true);
        threads.interrupters.iter().for_each(Interrupter::interrupt);
        threads.gate.wait_parked(threads.len());
    }

    fn runs_within(runs: &AtomicU64, time: Duration) -> u64 {
        let before = runs.load(Ordering::SeqCst);
        thread::sleep(time);
        runs.load(Ordering::SeqCst) - before
    }

    const A_WHILE: Duration = Duration::from_millis(20);

    #[test]
    fn a_throttled_vcpu_waits_until_it_is_throttled_no_more() {
        let (threads, runs, _events) = started(u64::MAX);
        threads.resume();
        wait_for_more_runs(&runs);

        throttle_now(&threads);
        let throttled = runs_within(&runs, A_WHILE);
        threads.gate.throttle(false);

        assert_eq!(throttled, 0);
        wait_for_more_runs(&runs);
    }

    #[test]
    fn a_vcpu_that_is_paused_while_it_is_throttled_stays_so_when_that_ends() {
        let (threads, runs, _events) = started(u64::MAX);
        threads.resume();
        throttle_now(&threads);

        threads.pause();
        threads.gate.throttle(false);
        let paused = runs_within(&runs, A_WHILE);
        threads.resume();

        assert_eq!(paused, 0);
        wait_for_more_runs(&runs);
    }

    #[test]
    fn a_vcpu_that_is_resumed_while_it_is_throttled_runs_when_that_ends() {
        let (threads, runs, _events) = started(u64::MAX);
        throttle_now(&threads);

        threads.resume();
        let throttled = runs_within(&runs, A_WHILE);
        threads.gate.throttle(false);

        assert_eq!(throttled, 0);
        wait_for_more_runs(&runs);
    }

    #[test]
    fn throttled_threads_stop() {
        let (threads, _runs, _events) = started(u64::MAX);
        threads.resume();
        throttle_now(&threads);

        assert_eq!(threads.stop().len(), 1);
    }

    #[test]
    fn a_throttler_takes_its_share_of_the_time_and_gives_it_back() {
        let window = Duration::from_millis(100);
        let (threads, runs, _events) = started(u64::MAX);
        threads.resume();
        let best = |_| runs_within(&runs, window);
        let free = (0..3).map(best).max().unwrap();

        let throttler = threads.throttler().unwrap();
        throttler.set(90);
        let throttled = (0..3).map(best).min().unwrap();
        throttler.set(0);
        let again = (0..3).map(best).max().unwrap();

        assert!(throttled > 0);
        assert!(throttled < free / 3, "{throttled} of {free}");
        assert!(again > 2 * throttled, "{throttled}, then {again}");
    }

    #[test]
    fn a_throttler_that_is_dropped_lets_the_vcpus_go() {
        let (threads, runs, _events) = started(u64::MAX);
        threads.resume();
        let throttler = threads.throttler().unwrap();
        throttler.set(99);
        wait_for_more_runs(&runs);

        drop(throttler);

        assert!(!threads.gate.lock().throttled);
        wait_for_more_runs(&runs);
    }

    #[test]
    fn under_a_throttler_paused_is_paused_at_every_moment() {
        let (threads, runs, _events) = started(u64::MAX);
        let throttler = threads.throttler().unwrap();
        throttler.set(50);

        for moment in 0..100 {
            threads.resume();
            thread::sleep(Duration::from_micros(moment * 7));
            threads.pause();
            assert_eq!(runs_within(&runs, Duration::from_micros(500)), 0);
        }
    }

    #[test]
    fn a_throttler_ends_with_the_threads_that_it_was_made_for() {
        let (threads, runs, _events) = started(u64::MAX);
        threads.resume();
        let throttler = threads.throttler().unwrap();
        throttler.set(99);
        wait_for_more_runs(&runs);

        let vcpus = threads.stop();
        let thread = throttler.thread.as_ref().unwrap();
        while !thread.is_finished() {
            thread::yield_now();
        }
        throttler.set(50);

        assert_eq!(vcpus.len(), 1);
    }

    /// Three vCPUs.
    fn three() -> (VcpuThreads<Counter>, [Arc<AtomicU64>; 3]) {
        let (vcpus, runs): (Vec<_>, Vec<_>) = (0..3).map(|_| Counter::new(u64::MAX)).unzip();
        let threads = VcpuThreads::start(vcpus, &Arc::default(), |_| {}).unwrap();
        (threads, runs.try_into().unwrap())
    }

    #[test]
    fn each_vcpu_that_is_asked_answers_for_itself_and_on_its_own_thread() {
        let (threads, runs) = three();
        threads.resume();
        runs.iter().for_each(|runs| wait_for_more_runs(runs));

        let answers = threads.ask(|place, vcpu| {
            let thread = thread::current().name().map(str::to_owned);
            (place, thread.unwrap(), vcpu.runs.load(Ordering::SeqCst))
        });

        let names = ["tv-vcpu0", "tv-vcpu1", "tv-vcpu2"];
        let expected = (0..3).map(|i| (i, names[i].into(), runs[i].load(Ordering::SeqCst)));
        assert_eq!(answers.wait(), expected.collect::<Vec<_>>());
    }

    #[test]
    fn vcpus_that_were_asked_do_not_run_until_they_are_resumed() {
        let (threads, runs, _events) = started(u64::MAX);
        threads.resume();
        wait_for_more_runs(&runs);

        for _ in 0..20 {
            let answers = threads.ask(|_, _| thread::sleep(Duration::from_millis(1)));
            let outside = runs_within(&runs, Duration::from_micros(500));
            let answered = answers.wait().len();
            assert_eq!((outside, answered), (0, 1));
            assert_eq!(runs_within(&runs, Duration::from_micros(500)), 0);
            threads.resume();
            wait_for_more_runs(&runs);
        }
    }

    #[test]
    fn a_vcpu_that_is_resumed_at_once_answers_before_it_runs() {
        let (threads, runs, _events) = started(u64::MAX);
        threads.resume();

        for _ in 0..100 {
            wait_for_more_runs(&runs);
            let seen = runs.clone();
            let answers = threads.ask(move |_, _| {
                let before = seen.load(Ordering::SeqCst);
                thread::yield_now();
                seen.load(Ordering::SeqCst) - before
            });
            threads.resume();
            assert_eq!(answers.wait(), [0]);
        }
    }

    #[test]
    fn vcpus_that_are_paused_or_throttled_or_never_ran_answer() {
        let (threads, runs, _events) = started(u64::MAX);
        assert_eq!(threads.ask(|_, _| 'n').wait(), ['n']);

        threads.resume();
        wait_for_more_runs(&runs);
        threads.pause();
        assert_eq!(threads.ask(|_, _| 'p').wait(), ['p']);

        threads.resume();
        throttle_now(&threads);
        assert_eq!(threads.ask(|_, _| 't').wait(), ['t']);
        threads.gate.throttle(false);
        assert_eq!(runs_within(&runs, A_WHILE), 0);
    }

    #[test]
    fn a_vcpu_whose_thread_is_gone_does_not_answer() {
        let mut bus = Bus::default();
        bus.add(0, 8, Arc::new(Defective));
        let (threads, _runs, events) = started_on(&Arc::new(bus), u64::MAX);
        threads.resume();
        events.recv_timeout(Duration::from_secs(10)).unwrap();

        let answers = threads.ask(|_, _| ());

        assert!(answers.wait().is_empty());
    }

    #[test]
    fn a_vcpu_whose_thread_panics_is_heard_and_holds_up_no_pause() {
        let mut bus = Bus::default();
        bus.add(0, 8, Arc::new(Defective));
        let (threads, _runs, events) = started_on(&Arc::new(bus), u64::MAX);
        threads.resume();

        let event = events.recv_timeout(Duration::from_secs(10));
        threads.pause();

        assert!(matches!(event, Ok(VcpuEvent::Panicked)));
        assert!(threads.stop().is_empty());
    }

    #[test]
    fn threads_that_are_dropped_end() {
        let (threads, runs, events) = started(u64::MAX);
        threads.resume();
        wait_for_more_runs(&runs);

        drop(threads);

        assert!(matches!(events.recv(), Err(mpsc::RecvError)));
    }
}
