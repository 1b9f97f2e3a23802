//! In asynchronous mode, an access by a mismatching address happens, and SIGSEGV with `SEGV_MTEAERR` arrives when the
//! kernel is entered next, once for all accesses before.

use mte::aarch64::Instructions;
use mte_linux::TagChecks;
use mte_linux::faults::count_asynchronous;

use super::{Outcome, ensure, granule};

pub fn check(instructions: Instructions) -> Outcome {
    let granule = granule(instructions, TagChecks::Asynchronous)?;
    for round in 1..=100 {
        granule.set_word(round);
        let mut value = 0;
        // SAFETY: the word is mapped and nobody else's; a fault comes later.
        let faults = count_asynchronous(|| value = unsafe { granule.mismatching.read_volatile() });
        ensure!(
            faults == 1,
            "a mismatching load raised {faults} asynchronous faults, not 1"
        );
        ensure!(
            value == round,
            "a mismatching load returned {value}, not {round}"
        );

        // SAFETY: as above.
        let faults = count_asynchronous(|| unsafe { granule.mismatching.write_volatile(!round) });
        ensure!(
            faults == 1,
            "a mismatching store raised {faults} asynchronous faults, not 1"
        );
        ensure!(
            granule.word() == !round,
            "a mismatching store did not happen"
        );

        let faults = count_asynchronous(|| granule.set_word(0));
        ensure!(
            faults == 0,
            "a matching store raised {faults} asynchronous faults, not 0"
        );
    }
    Ok(())
}
