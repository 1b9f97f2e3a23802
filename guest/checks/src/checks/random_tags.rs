//! IRG chooses from the tags that its thread includes, on every CPU, while threads on the same and on other CPUs include
//! others: GCR_EL1 belongs to the vCPU and, through the kernel, to the thread.

use std::thread;
use std::time::Duration;

use mte::aarch64::Instructions;
use mte::{Tag, TagSet};
use mte_linux::{TagChecks, cpus, set_tag_checks};

use super::{Outcome, ended, ensure, failed};

/// The tags that threads include. With none, IRG chooses 0.
const INCLUDED: [u16; 8] = [
    0x0001, 0xfffe, 0x8000, 0x5555, 0x0000, 0xaaaa, 0x00f0, 0xffff,
];
/// Threads on each CPU.
const THREADS_PER_CPU: usize = 2;
const ROUNDS: usize = 1000;
const DRAWS_PER_ROUND: usize = 16;

pub fn check(instructions: Instructions) -> Outcome {
    let cpus = cpus::available().map_err(failed("list CPUs"))?;
    let on_cpus = cpus
        .iter()
        .flat_map(|&cpu| std::iter::repeat_n(cpu, THREADS_PER_CPU));
    thread::scope(|scope| {
        let threads: Vec<_> = on_cpus
            .zip(INCLUDED.into_iter().cycle().map(TagSet::from_bits))
            .map(|(cpu, include)| scope.spawn(move || draw(instructions, cpu, include)))
            .collect();
        threads
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .try_for_each(ended)
    })
}

fn draw(instructions: Instructions, cpu: usize, include: TagSet) -> Outcome {
    cpus::pin_to(cpu).map_err(failed("stay on a CPU"))?;
    set_tag_checks(TagChecks::Synchronous, include).map_err(failed("turn tag checks on"))?;
    let allowed = if include == TagSet::EMPTY {
        TagSet::EMPTY.with(Tag::ZERO)
    } else {
        include
    };
    let mut drawn = TagSet::EMPTY;
    for round in 0..ROUNDS {
        for _ in 0..DRAWS_PER_ROUND {
            let tag = Tag::of_address(instructions.irg(0, 0));
            ensure!(
                allowed.contains(tag),
                "on CPU {cpu}, round {round}, IRG chose {tag} and not one of {allowed:?}"
            );
            drawn = drawn.with(tag);
        }
        leave(round);
    }
    ensure!(
        drawn == allowed,
        "on CPU {cpu} IRG chose only {drawn:?} of {allowed:?}"
    );
    Ok(())
}

/// Lets the other threads, or nobody, have the CPU.
fn leave(round: usize) {
    match round % 16 {
        0 => thread::sleep(Duration::from_micros(200)),
        1..8 => thread::yield_now(),
        _ => std::hint::spin_loop(),
    }
}
