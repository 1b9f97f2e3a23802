//! How much faster two threads are than one, on a machine that does not always have two CPUs for them.
//!
//! A machine that shares its CPUs with others gives two threads the time of one now and then, whatever they do. What it gives to
//! arithmetic, which nothing but a CPU can slow down, says when: a round counts if arithmetic before it and after it scaled.

use std::hint::{black_box, spin_loop};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// What is measured: it is divided among threads.
pub trait Work: Sync {
    /// What a thread has to do of it.
    type Share;

    /// Makes the share of one of `threads` threads ready.
    fn prepare(&self, thread: usize, threads: usize) -> Self::Share;

    /// Does it: the time of this is measured.
    fn run(&self, share: &mut Self::Share);

    /// Sees that it is done.
    fn check(&self, _: &Self::Share) {}
}

/// How many rounds are to count, and how many are made for them at most.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Rounds that are to count.
    pub counted: usize,
    /// Rounds at most.
    pub attempts: usize,
}

impl Plan {
    /// What gives the same figures each time.
    pub const FULL: Self = Self {
        counted: 15,
        attempts: 150,
    };
    /// What shows that it runs.
    pub const ONCE: Self = Self {
        counted: 1,
        attempts: 1,
    };
}

/// How much faster two threads are at arithmetic in a round that counts.
pub const TWO_CPUS: f64 = 1.9;

/// The rounds that counted.
#[derive(Debug)]
pub struct Rounds {
    counted: Vec<Round>,
    /// How many there were, with those that did not count.
    pub made: usize,
    /// How many were to count.
    wanted: usize,
}

#[derive(Debug)]
struct Round {
    work: Times,
    /// How much faster arithmetic was, before or after: the less of both.
    cpus: f64,
}

/// Medians of the rounds that counted.
#[derive(Clone, Copy, Debug)]
pub struct Medians {
    /// Seconds that the work takes one thread.
    pub one: f64,
    /// Seconds that it takes two.
    pub two: f64,
    /// How much faster two are, round by round.
    pub faster: f64,
    /// How much faster they are at arithmetic.
    pub cpus: f64,
}

impl Rounds {
    /// Measures the same work by one thread and by two.
    pub fn measure(plan: Plan, work: &impl Work) -> Self {
        let mut rounds = Self {
            counted: Vec::new(),
            made: 0,
            wanted: plan.counted,
        };
        let mut before = Times::of(&Arithmetic);
        while rounds.made < plan.attempts && !rounds.are_enough() {
            let work = Times::of(work);
            let after = Times::of(&Arithmetic);
            let cpus = before.faster().min(after.faster());
            if cpus >= TWO_CPUS {
                rounds.counted.push(Round { work, cpus });
            }
            rounds.made += 1;
            before = after;
        }
        rounds
    }

    /// How many counted.
    #[must_use]
    pub const fn counted(&self) -> usize {
        self.counted.len()
    }

    const fn are_enough(&self) -> bool {
        self.counted.len() >= self.wanted
    }

    /// Of those that counted; none if too few did.
    #[must_use]
    pub fn medians(&self) -> Option<Medians> {
        let middle = |of: fn(&Round) -> f64| median(self.counted.iter().map(of).collect());
        self.are_enough().then(|| Medians {
            one: middle(|round| round.work.one),
            two: middle(|round| round.work.two),
            faster: middle(|round| round.work.faster()),
            cpus: middle(|round| round.cpus),
        })
    }
}

/// Seconds that the same work takes one thread, and two.
#[derive(Debug)]
struct Times {
    one: f64,
    two: f64,
}

impl Times {
    fn of(work: &impl Work) -> Self {
        Self {
            one: with_threads(1, work),
            two: with_threads(2, work),
        }
    }

    fn faster(&self) -> f64 {
        self.one / self.two
    }
}

/// Work that needs nothing but a CPU.
struct Arithmetic;

impl Work for Arithmetic {
    /// Steps.
    type Share = u64;

    fn prepare(&self, _: usize, threads: usize) -> u64 {
        (8 << 20) / threads as u64
    }

    fn run(&self, steps: &mut u64) {
        let mut sum = 0u64;
        for step in 0..*steps {
            sum = black_box(sum.wrapping_mul(3) ^ step);
        }
        black_box(sum);
    }
}

/// Seconds until all threads have done their share, each on a CPU of its own as far as there are so many.
pub fn with_threads(threads: usize, work: &impl Work) -> f64 {
    let (ready, awake) = (Barrier::new(threads), AtomicUsize::new(0));
    let cpus = cpus();
    let share = |thread| {
        pin(cpus[thread % cpus.len()]);
        let mut share = work.prepare(thread, threads);
        ready.wait();
        // Who comes from the barrier may have been asleep: nobody begins before all are awake.
        awake.fetch_add(1, Ordering::Relaxed);
        while awake.load(Ordering::Relaxed) < threads {
            spin_loop();
        }
        let begun = Instant::now();
        work.run(&mut share);
        let ended = Instant::now();
        work.check(&share);
        (begun, ended)
    };
    let times: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|thread| {
                let share = &share;
                scope.spawn(move || share(thread))
            })
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().expect("the work does not panic"))
            .collect()
    });
    let begun = times.iter().map(|(begun, _)| *begun).min();
    let ended = times.iter().map(|(_, ended)| *ended).max();
    let elapsed = begun.zip(ended).map(|(begun, ended)| ended - begun);
    elapsed.expect("there are threads").as_secs_f64()
}

/// The CPUs that this program may use.
fn cpus() -> Vec<usize> {
    let set = sched_getaffinity(None).expect("a thread may ask for its CPUs");
    (0..CpuSet::MAX_CPU)
        .filter(|cpu| set.is_set(*cpu))
        .collect()
}

/// Has the calling thread run on this CPU alone. Without that the system may begin two threads on one, and part them when what is
/// measured is over.
fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).expect("a thread may choose among its CPUs");
}

/// The value in the middle.
///
/// # Panics
/// If there are no values, or some that cannot be ordered.
#[must_use]
pub fn median<T: PartialOrd + Copy>(mut values: Vec<T>) -> T {
    values.sort_by(|one, other| one.partial_cmp(other).expect("no NaN is measured"));
    values[values.len() / 2]
}
