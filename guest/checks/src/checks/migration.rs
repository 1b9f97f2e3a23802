//! The tags of memory, the checks of a thread's accesses and the tags it includes stay while it moves from CPU to CPU.

use mte::aarch64::Instructions;
use mte::{GRANULE_SIZE, Tag, TagPage, TagSet};
use mte_linux::faults::{self, SEGV_MTESERR};
use mte_linux::{TagChecks, TaggedMemory, cpus, set_tag_checks};

use super::{Outcome, Verdict, ended, ensure, failed};

const PAGES: usize = 64;
const ROUNDS: usize = 400;
const INCLUDE: TagSet = TagSet::from_bits(0x0ff0);

pub fn check(instructions: Instructions) -> Outcome {
    let cpus = cpus::available().map_err(failed("list CPUs"))?;
    if cpus.len() < 2 {
        return Err(Verdict::Skip("there is one CPU only".into()));
    }
    ended(std::thread::scope(|scope| {
        scope.spawn(|| move_around(instructions, &cpus)).join()
    }))
}

fn move_around(instructions: Instructions, cpus: &[usize]) -> Outcome {
    set_tag_checks(TagChecks::Synchronous, INCLUDE).map_err(failed("turn tag checks on"))?;
    let memory = TaggedMemory::new(PAGES).map_err(failed("map memory with PROT_MTE"))?;
    // Every tag in every place modulo 16, a different order in each page.
    let mut expected: Vec<TagPage> = (0..PAGES)
        .map(|page| {
            TagPage::pack(&std::array::from_fn(|granule| {
                (granule * (2 * page + 1) + page) as u8
            }))
        })
        .collect();
    // SAFETY: the pages are mapped, and nobody else's.
    unsafe { instructions.write_tag_pages(memory.start(), &expected) };

    for (round, &cpu) in cpus.iter().cycle().take(ROUNDS).enumerate() {
        cpus::pin_to(cpu).map_err(failed("move to another CPU"))?;
        let mut found = vec![TagPage::ZERO; PAGES];
        // SAFETY: as above.
        unsafe { instructions.read_tag_pages(memory.start(), &mut found) };
        let wrong = (0..PAGES).find(|&page| found[page] != expected[page]);
        if let Some(page) = wrong {
            let (found, expected) = (&found[page], &expected[page]);
            return Err(Verdict::Fail(format!(
                "on CPU {cpu}, round {round}, page {page}: {found:?}, not {expected:?}"
            )));
        }

        let tag = Tag::of_address(instructions.irg(0, 0));
        ensure!(
            INCLUDE.contains(tag),
            "on CPU {cpu}, round {round}, IRG chose {tag}, not one of {INCLUDE:?}"
        );

        let (page, granule) = (round % PAGES, (round * 7) as u8);
        let old = expected[page].get(granule);
        let place = memory
            .page(page)
            .wrapping_add(usize::from(granule) * GRANULE_SIZE);
        checked(place.cast(), old, cpu)?;
        let new = Tag::from_low_bits(old.value() + 1);
        // SAFETY: as above.
        unsafe { instructions.stg(place, new) };
        expected[page].set(granule, new);
        checked(place.cast(), new, cpu)?;
    }
    Ok(())
}

/// Loads by a matching and by a mismatching address.
fn checked(word: *mut u64, memory: Tag, cpu: usize) -> Outcome {
    let load = |tag: Tag| {
        // SAFETY: the word is mapped.
        let (_, fault) = unsafe { faults::load(tag.insert_into_pointer(word), 0) };
        fault.map(|fault| fault.code)
    };
    let (matching, mismatching) = (load(memory), load(Tag::from_low_bits(memory.value() + 8)));
    ensure!(
        matching.is_none(),
        "on CPU {cpu} a load by an address with the memory's tag {memory} faulted"
    );
    ensure!(
        mismatching == Some(SEGV_MTESERR),
        "on CPU {cpu} a load by an address with another tag did not fault"
    );
    Ok(())
}
