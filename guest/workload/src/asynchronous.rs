//! A thread that sees that asynchronous tag check faults arrive once each, and none that it did not cause.
//!
//! Between the store that mismatches and the next entry to the kernel, the fault is nowhere but in the vCPU's TFSRE0_EL1.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use mte::aarch64::Instructions;
use mte::{Tag, TagSet};
use mte_linux::{TagChecks, TaggedMemory, faults, set_tag_checks, unchecked};

use crate::difference::Difference;

/// Rest between two rounds.
const PAUSE: Duration = Duration::from_millis(50);
/// The tag of the memory, and that of a mismatching address.
const MEMORY_TAG: Tag = Tag::from_low_bits(6);
const OTHER_TAG: Tag = Tag::from_low_bits(9);

/// Provokes a fault in each round until `stop`, and counts them in `seen`.
///
/// # Errors
/// What the kernel answers if there can be no such thread; inside it, what was wrong.
pub fn watch(
    thread: usize,
    instructions: Instructions,
    stop: &AtomicBool,
    seen: &AtomicU64,
) -> io::Result<Result<(), Difference>> {
    set_tag_checks(TagChecks::Asynchronous, TagSet::ALL)?;
    let memory = TaggedMemory::new(1)?;
    // SAFETY: the granule is mapped.
    unsafe { instructions.stg(memory.start(), MEMORY_TAG) };
    let store = |tag: Tag, value: u64| {
        let pointer = tag.insert_into_pointer(memory.start()).cast::<u64>();
        // SAFETY: the word is mapped, and nobody else's. A mismatch does not keep the store from happening.
        unsafe { pointer.write_volatile(value) };
        // So that the fault is also pending while the vCPU is away.
        (0..2000).for_each(|n| {
            std::hint::black_box(n);
        });
    };

    let wrong = |what: String| Ok(Err(Difference::Fault { thread, what }));
    for round in 1.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let mismatching = faults::count_asynchronous(|| store(OTHER_TAG, round));
        // SAFETY: as for the store.
        let stored = unchecked(|| unsafe { memory.start().cast::<u64>().read_volatile() });
        let matching = faults::count_asynchronous(|| store(MEMORY_TAG, 0));
        if mismatching != 1 {
            return wrong(format!(
                "one mismatching store raised {mismatching} asynchronous faults"
            ));
        }
        if stored != round {
            return wrong("a store with an asynchronous fault did not happen".into());
        }
        if matching != 0 {
            return wrong(format!(
                "a matching store raised {matching} asynchronous faults"
            ));
        }
        seen.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(PAUSE);
    }
    Ok(Ok(()))
}
