//! In asymmetric mode, reads fault synchronously and writes asynchronously. A program gets the mode where the CPU prefers
//! it (`mte_tcf_preferred` in sysfs) and the program asked for either of the others.

use std::fs;
use std::path::PathBuf;

use mte::MteLevel;
use mte::aarch64::Instructions;
use mte_linux::faults::{self, Fault, SEGV_MTESERR, count_asynchronous};
use mte_linux::{TagChecks, cpus};

use super::{Outcome, Verdict, ended, ensure, failed, granule};

const BEFORE: u64 = 0x1111_2222_3333_4444;
const OTHER: u64 = 0xcccc_dddd_eeee_ffff;

pub fn check(instructions: Instructions) -> Outcome {
    if mte_linux::level() < MteLevel::Mte3 {
        return Err(Verdict::Skip(format!(
            "this machine has {}",
            mte_linux::level()
        )));
    }
    // A thread of its own, since it stays on its CPU.
    ended(std::thread::scope(|scope| {
        scope.spawn(|| on_one_cpu(instructions)).join()
    }))
}

fn on_one_cpu(instructions: Instructions) -> Outcome {
    let cpu = *cpus::available()
        .map_err(failed("list CPUs"))?
        .first()
        .ok_or(Verdict::Fail("no CPU".into()))?;
    cpus::pin_to(cpu).map_err(failed("stay on a CPU"))?;
    let _preference = Preference::set(cpu, "asymm")?;
    let granule = granule(instructions, TagChecks::PreferredByCpu)?;

    granule.set_word(BEFORE);
    // SAFETY: the word is mapped.
    let (value, fault) = unsafe { faults::load(granule.mismatching, OTHER) };
    let expected = Some(Fault {
        code: SEGV_MTESERR,
        address: granule.mismatching as u64,
    });
    ensure!(
        fault == expected,
        "a mismatching load raised {fault:x?}, not {expected:x?}"
    );
    ensure!(
        value == OTHER,
        "a load that faulted changed its register to {value:#x}"
    );

    // SAFETY: the word is mapped and nobody else's; a fault comes later.
    let faults = count_asynchronous(|| unsafe { granule.mismatching.write_volatile(OTHER) });
    ensure!(
        faults == 1,
        "a mismatching store raised {faults} asynchronous faults, not 1"
    );
    ensure!(
        granule.word() == OTHER,
        "a mismatching store did not happen"
    );
    Ok(())
}

/// What a CPU prefers. It prefers again what it did before when this is dropped.
struct Preference {
    file: PathBuf,
    before: String,
}

impl Preference {
    fn set(cpu: usize, mode: &str) -> Result<Self, Verdict> {
        let file = PathBuf::from(format!(
            "/sys/devices/system/cpu/cpu{cpu}/mte_tcf_preferred"
        ));
        let change = || {
            let before = fs::read_to_string(&file)?.trim().to_owned();
            fs::write(&file, mode)?;
            Ok(before)
        };
        let before = change().map_err(failed(
            "change mte_tcf_preferred in sysfs, which root can where it is mounted",
        ))?;
        Ok(Self { file, before })
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // If it cannot be set back, the checks after this one still ask for the mode they mean.
        let _ = fs::write(&self.file, &self.before);
    }
}
