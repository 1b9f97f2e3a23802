//! First touches of pages on many threads: the tag state of each page against one mutex for all.
//!
//! Seed 001's objection to one lock was that start-up, resume and migration fault pages in on many
//! CPUs at once. Here each thread makes the tags of pages of its own valid, as a fault handler does
//! on first touch: claims the page, clears its 256 tags, publishes them. Prints pages a second by
//! number of threads, then how two threads scale in rounds in which the machine had two CPUs, and
//! ends with status 1 if the goal is missed. As a test it makes one round, and measures nothing.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use benches::scaling::{Plan, Rounds, TWO_CPUS, Work, with_threads};
use engine::model::PageState;

const PAGES: usize = 1 << 15;
const GRANULES: usize = 256;
/// For each number of threads; the best counts.
const RUNS: usize = 100;
/// Two threads against one.
const GOAL: f64 = 1.8;

/// A page's tags and their state.
struct Page {
    state: PageState,
    tags: [AtomicU8; GRANULES],
}

impl Page {
    fn stale() -> Self {
        Self {
            state: PageState::new(),
            tags: std::array::from_fn(|_| AtomicU8::new(0xa)),
        }
    }

    fn clear(&self) {
        for tag in &self.tags {
            tag.store(0, Ordering::Relaxed);
        }
    }
}

fn with_page_state(page: &Page) {
    page.state.initialise(|| page.clear());
}

/// What the page state replaces: one lock, under which a page that is not tagged becomes so.
fn with_one_mutex(lock: &Mutex<()>, page: &Page) {
    let _guard = lock.lock().expect("no thread panics");
    with_page_state(page);
}

/// An equal share of the pages for each thread, touched once.
struct FirstTouches<T>(T);

impl<T: Fn(&Page) + Sync> Work for FirstTouches<T> {
    type Share = Vec<Page>;

    fn prepare(&self, _: usize, threads: usize) -> Vec<Page> {
        (0..PAGES / threads).map(|_| Page::stale()).collect()
    }

    fn run(&self, pages: &mut Vec<Page>) {
        pages.iter().for_each(&self.0);
    }

    fn check(&self, pages: &Vec<Page>) {
        assert!(pages.iter().all(|page| page.state.is_tagged()));
    }
}

/// Million pages a second in the best of so many runs.
fn rate(runs: usize, threads: usize, touches: &impl Work) -> f64 {
    let run = |_| with_threads(threads, touches);
    let shortest = (0..runs).map(run).fold(f64::INFINITY, f64::min);
    (PAGES / threads * threads) as f64 / shortest / 1e6
}

fn main() -> ExitCode {
    let is_test = !std::env::args().any(|arg| arg == "--bench");
    let (runs, plan) = match is_test {
        true => (1, Plan::ONCE),
        false => (RUNS, Plan::FULL),
    };
    let lock = Mutex::new(());
    let page_state = FirstTouches(with_page_state);
    let one_mutex = FirstTouches(|page: &Page| with_one_mutex(&lock, page));
    let most = thread::available_parallelism()
        .map_or(2, usize::from)
        .max(2);
    println!("First touches, million pages a second (best of {runs} runs)");
    println!("threads   page state         one mutex");
    for threads in (1..=most).filter(|threads| threads.is_power_of_two() || *threads == most) {
        let state = rate(runs, threads, &page_state);
        let mutex = rate(runs, threads, &one_mutex);
        println!("{threads:>7} {state:>12.2} {mutex:>17.2}");
    }
    println!("Two threads against one, medians of rounds in which arithmetic scaled by {TWO_CPUS}");
    let ways = [
        ("page state", Rounds::measure(plan, &page_state), true),
        ("one mutex", Rounds::measure(plan, &one_mutex), false),
    ];
    let mut met = true;
    for (name, rounds, has_goal) in ways {
        let (counted, made) = (rounds.counted(), rounds.made);
        let Some(medians) = rounds.medians() else {
            println!("  {name:12} not measured: two CPUs were there in {counted} of {made} rounds");
            met &= !has_goal;
            continue;
        };
        let faster = medians.faster;
        let goal = match has_goal {
            true => format!("   goal: at least {GOAL:.1}"),
            false => String::new(),
        };
        println!("  {name:12} {faster:.2}   ({counted} of {made} rounds){goal}");
        met &= !has_goal || faster >= GOAL;
    }
    match met || is_test {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
