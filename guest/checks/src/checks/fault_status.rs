//! The asynchronous faults of one thread, which wait in its vCPU's TFSRE0_EL1, are seen by that thread and by no other, be
//! it on the same CPU or elsewhere.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use mte::aarch64::Instructions;
use mte_linux::faults::count_asynchronous;
use mte_linux::{TagChecks, cpus};

use super::{Granule, Outcome, Verdict, ended, ensure, failed, granule};

const ROUNDS: usize = 2000;

pub fn check(instructions: Instructions) -> Outcome {
    let cpus = cpus::available().map_err(failed("list CPUs"))?;
    let first = *cpus.first().ok_or(Verdict::Fail("no CPU".into()))?;
    let done = &AtomicBool::new(false);
    thread::scope(|scope| {
        let bystanders: Vec<_> = cpus
            .iter()
            .map(|&cpu| scope.spawn(move || never_faults(instructions, cpu, done)))
            .collect();
        let culprit = scope
            .spawn(move || faults_each_round(instructions, first))
            .join();
        done.store(true, Ordering::Relaxed);
        let bystanders = bystanders.into_iter().map(thread::ScopedJoinHandle::join);
        std::iter::once(culprit)
            .chain(bystanders)
            .try_for_each(ended)
    })
}

fn on(instructions: Instructions, cpu: usize) -> Result<Granule, Verdict> {
    cpus::pin_to(cpu).map_err(failed("stay on a CPU"))?;
    granule(instructions, TagChecks::Asynchronous)
}

fn faults_each_round(instructions: Instructions, cpu: usize) -> Outcome {
    let granule = on(instructions, cpu)?;
    for round in 0..ROUNDS {
        let faults = count_asynchronous(|| {
            // SAFETY: the word is mapped and nobody else's; a fault comes later.
            unsafe { granule.mismatching.write_volatile(0) };
            // With the fault waiting, time passes or another thread gets the CPU.
            if round % 2 == 0 {
                thread::yield_now()
            } else {
                (0..500).for_each(|_| std::hint::spin_loop())
            }
        });
        ensure!(
            faults == 1,
            "in round {round} a mismatching store raised {faults} asynchronous faults, not 1"
        );
    }
    Ok(())
}

fn never_faults(instructions: Instructions, cpu: usize, done: &AtomicBool) -> Outcome {
    let granule = on(instructions, cpu)?;
    for round in 0.. {
        if done.load(Ordering::Relaxed) {
            break;
        }
        let faults = count_asynchronous(|| {
            granule.set_word(round);
            thread::yield_now();
        });
        ensure!(
            faults == 0,
            "on CPU {cpu} a thread that did no wrong met {faults} asynchronous faults"
        );
    }
    Ok(())
}
