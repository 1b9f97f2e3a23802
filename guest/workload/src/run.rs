//! The program: threads, what they are told, and what is printed of them.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use mte::TagSet;
use mte::aarch64::Instructions;
use mte_linux::{TagChecks, TaggedMemory, cpus, set_tag_checks};

use crate::arguments::{ArgumentError, Arguments, USAGE};
use crate::asynchronous;
use crate::clock::Clocks;
use crate::difference::Difference;
use crate::hardware::{TaggedPages, install_diagnosis};
use crate::progress::Progress;
use crate::worker::{Counters, Setting, Worker};

/// How often a line is printed.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// How often is looked whether to end.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How often a thread that has ended its pass looks whether the others have.
const LOOK_AT_OTHERS_EVERY: Duration = Duration::from_micros(100);

/// Exit status of a program that could not work.
const CANNOT_WORK: u8 = 2;

/// Set when all threads are to finish: by SIGTERM and SIGINT too.
static STOP: AtomicBool = AtomicBool::new(false);

/// Why the program cannot work.
#[derive(Debug, thiserror::Error)]
enum SetUpError {
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    #[error(
        "this machine offers programs no MTE: start the guest with MTE, and a kernel with CONFIG_ARM64_MTE"
    )]
    NoMte,
    #[error("cannot {what}: {error}")]
    System {
        what: &'static str,
        error: io::Error,
    },
}

/// Names what could not be done.
fn system(what: &'static str) -> impl Fn(io::Error) -> SetUpError {
    move |error| SetUpError::System { what, error }
}

/// How a thread ended.
type Outcome = Result<Result<(), Difference>, SetUpError>;

/// What all threads share.
struct Shared<'a> {
    arguments: &'a Arguments,
    memory: &'a TaggedMemory,
    instructions: Instructions,
    clocks: Clocks,
    counters: Vec<Counters>,
    asynchronous_faults: AtomicU64,
    seed: u64,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args_os().skip(1)) {
        Ok(Some(arguments)) => arguments,
        Ok(None) => {
            print(USAGE);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            complain(&error.into());
            return ExitCode::from(CANNOT_WORK);
        }
    };
    match work(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(CANNOT_WORK)
        }
    }
}

fn complain(error: &SetUpError) {
    eprintln!("tag-workload: {error}");
}

fn work(arguments: &Arguments) -> Result<(), SetUpError> {
    let instructions = mte_linux::instructions().ok_or(SetUpError::NoMte)?;
    install_diagnosis(arguments.json).map_err(system("handle SIGSEGV"))?;
    stop_on_signals().map_err(system("handle SIGTERM"))?;
    let threads = match arguments.threads {
        Some(threads) => threads,
        None => cpus::available().map_err(system("count CPUs"))?.len(),
    };
    let memory = TaggedMemory::new(arguments.pages).map_err(system("map memory with PROT_MTE"))?;
    let shared = Shared {
        arguments,
        memory: &memory,
        instructions,
        clocks: Clocks::default(),
        counters: (0..threads).map(|_| Counters::default()).collect(),
        asynchronous_faults: AtomicU64::new(0),
        seed: arguments.seed.unwrap_or_else(|| fastrand::u64(..)),
    };
    announce(&shared);

    let (ended, endings) = mpsc::channel();
    thread::scope(|scope| {
        let shared = &shared;
        for thread in 0..threads {
            let ended = ended.clone();
            // The main thread stays for as long as it listens.
            scope.spawn(move || ended.send(work_on_own_pages(shared, thread)));
        }
        scope.spawn(move || ended.send(watch_asynchronous_faults(shared, threads)));
        supervise(shared, &endings)
    })
}

fn announce(shared: &Shared<'_>) {
    let Shared {
        arguments,
        memory,
        seed,
        counters,
        ..
    } = shared;
    let (pages, threads, start) = (arguments.pages, counters.len(), memory.start() as u64);
    print(&if arguments.json {
        format!(
            r#"{{"event":"start","pages":{pages},"address":"{start:#x}","threads":{threads},"seed":{seed}}}"#
        )
    } else {
        format!("workload: {pages} pages at {start:#x}, {threads} threads, seed {seed}")
    });
}

/// Waits for the end, prints lines, and ends the process at the first difference.
fn supervise(shared: &Shared<'_>, endings: &mpsc::Receiver<Outcome>) -> Result<(), SetUpError> {
    let start = Instant::now();
    let mut next_line = LINE_EVERY;
    loop {
        match endings.recv_timeout(LOOK_EVERY) {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(difference))) => report(&difference, shared.arguments.json),
            Ok(Err(error)) => {
                complain(&error);
                std::process::exit(CANNOT_WORK.into());
            }
            Err(RecvTimeoutError::Timeout) => {}
            // All have ended, and none with a difference.
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if let Err(difference) = shared.clocks.now() {
            report(&difference, shared.arguments.json);
        }
        let progress = progress(shared, start);
        let passes_made = shared
            .arguments
            .passes
            .is_some_and(|passes| progress.passes >= passes);
        let time_is_up = shared
            .arguments
            .duration
            .is_some_and(|duration| progress.elapsed >= duration);
        if passes_made || time_is_up {
            STOP.store(true, Ordering::Relaxed);
        }
        if progress.elapsed >= next_line {
            print(&if shared.arguments.json {
                progress.to_json("progress")
            } else {
                progress.to_text()
            });
            next_line = progress.elapsed + LINE_EVERY;
        }
    }
    let progress = progress(shared, start);
    print(&if shared.arguments.json {
        progress.to_json("summary")
    } else {
        format!("{}\nworkload: ok", progress.to_text())
    });
    Ok(())
}

fn progress(shared: &Shared<'_>, start: Instant) -> Progress {
    let faults = shared.asynchronous_faults.load(Ordering::Relaxed);
    Progress::of(
        &shared.counters,
        shared.arguments.pages,
        faults,
        start.elapsed(),
    )
}

fn report(difference: &Difference, json: bool) -> ! {
    print(&if json {
        difference.to_json()
    } else {
        format!("workload: difference: {difference}")
    });
    std::process::exit(1)
}

/// Prints a line at once. A reader that has gone away is no reason to end.
fn print(line: &str) {
    let mut output = io::stdout().lock();
    let _ = writeln!(output, "{line}").and_then(|()| output.flush());
}

fn work_on_own_pages(shared: &Shared<'_>, thread: usize) -> Outcome {
    let (arguments, threads) = (shared.arguments, shared.counters.len());
    let mut rng = Rng::with_seed(shared.seed.wrapping_add(thread as u64));
    let include = included_tags(thread, &mut rng);
    set_tag_checks(TagChecks::Synchronous, include).map_err(system("turn tag checks on"))?;

    let memory = TaggedPages::new(shared.memory, shared.instructions, thread);
    let pages = (thread..arguments.pages).step_by(threads).collect();
    let setting = Setting {
        thread,
        include,
        rewritten_percent: arguments.rewritten_percent,
        seed: rng.u64(..),
    };
    let mut worker = Worker::new(
        &setting,
        memory,
        pages,
        &shared.clocks,
        &shared.counters[thread],
    );
    let stopped = || STOP.load(Ordering::Relaxed);
    let mut until_stopped = || {
        worker.populate(never_touched)?;
        while !stopped() {
            worker.pass(stopped)?;
            thread::sleep(arguments.pause);
            while !stopped() && !all_have_ended_the_pass_of(shared, thread) {
                thread::sleep(LOOK_AT_OTHERS_EVERY);
            }
        }
        worker.finish()
    };
    Ok(until_stopped())
}

/// Nobody begins a pass before, so that each pass is one over all of the memory: when two more have been made, every page was
/// looked at since.
fn all_have_ended_the_pass_of(shared: &Shared<'_>, thread: usize) -> bool {
    let passes = |counters: &Counters| counters.passes.load(Ordering::Relaxed);
    let own = passes(&shared.counters[thread]);
    shared.counters.iter().all(|other| passes(other) >= own)
}

fn watch_asynchronous_faults(shared: &Shared<'_>, thread: usize) -> Outcome {
    asynchronous::watch(
        thread,
        shared.instructions,
        &STOP,
        &shared.asynchronous_faults,
    )
    .map_err(system("watch asynchronous faults"))
}

/// The tags that a thread lets IRG choose: different ones for each, so that a vCPU that runs with another's GCR_EL1 is
/// found out.
fn included_tags(thread: usize, rng: &mut Rng) -> TagSet {
    match thread {
        0 => TagSet::ALL,
        // What glibc does.
        1 => TagSet::from_bits(0xfffe),
        _ => TagSet::from_bits(rng.u16(1..)),
    }
}

/// One eighth of the memory, 64 KiB at a time.
fn never_touched(page: usize) -> bool {
    page / 16 % 8 == 7
}

fn stop_on_signals() -> io::Result<()> {
    extern "C" fn stop(_signal: libc::c_int) {
        STOP.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the handler only stores to an atomic.
        if unsafe { libc::signal(signal, stop as *const () as libc::sighandler_t) } == libc::SIG_ERR
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
