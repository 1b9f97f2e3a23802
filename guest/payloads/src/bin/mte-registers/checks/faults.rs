//! What a mismatch between an address's tag and the memory's does at EL1, in each of the modes of SCTLR_EL1.TCF.

use mte::{MteLevel, Tag, TagCheckFaultMode, Tfsr, VaRange};
use payloads::exceptions::{Exception, load, store};
use payloads::registers::TagRegister;
use payloads::report::{Check, Report};
use payloads::tagging::{Page, features, set_fault_mode, unchecked};

static PAGE: Page = Page::new();

/// What the word holds before a check.
const BEFORE: u64 = 0x1111_2222_3333_4444;
/// What a register holds before a load, and what a store writes.
const OTHER: u64 = 0xcccc_dddd_eeee_ffff;

/// The tag of the memory.
const MEMORY_TAG: Tag = Tag::from_low_bits(3);
/// The tag of an address that does not match.
const OTHER_TAG: Tag = Tag::from_low_bits(9);

/// What becomes of one access.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// An exception; the access does not happen.
    Exception,
    /// The access happens and TFSR_EL1.TF0 is set.
    Noted,
    /// The access happens.
    Nothing,
}

pub fn check(report: &mut Report) {
    use Outcome::{Exception, Noted, Nothing};
    use TagCheckFaultMode::{Asymmetric, Asynchronous, Ignored, Synchronous};

    PAGE.set_tag(0, MEMORY_TAG);
    let matching = MEMORY_TAG.insert_into_pointer(PAGE.pointer());
    let mismatching = OTHER_TAG.insert_into_pointer(PAGE.pointer());

    both(
        report,
        "matching-tag-passes",
        Synchronous,
        matching,
        [Nothing, Nothing],
    );
    both(
        report,
        "mismatch-ignored",
        Ignored,
        mismatching,
        [Nothing, Nothing],
    );
    both(
        report,
        "mismatch-synchronous",
        Synchronous,
        mismatching,
        [Exception, Exception],
    );
    unchecked(|| {
        both(
            report,
            "mismatch-overridden-by-tco",
            Synchronous,
            mismatching,
            [Nothing, Nothing],
        )
    });
    if features().asynchronous() {
        both(
            report,
            "mismatch-asynchronous",
            Asynchronous,
            mismatching,
            [Noted, Noted],
        );
    } else {
        report.skip("mismatch-asynchronous", "this vCPU lacks FEAT_MTE_ASYNC");
    }
    if features().level() >= MteLevel::Mte3 {
        both(
            report,
            "mismatch-asymmetric",
            Asymmetric,
            mismatching,
            [Exception, Noted],
        );
    } else {
        report.skip("mismatch-asymmetric", "this vCPU lacks MTE3");
    }
}

/// Checks a load and a store.
fn both(
    report: &mut Report,
    name: &'static str,
    mode: TagCheckFaultMode,
    address: *mut u64,
    outcomes: [Outcome; 2],
) {
    let [on_load, on_store] = outcomes;
    report.check(name, |check| {
        set_fault_mode(mode);
        loaded_with(check, address, on_load);
        stored_with(check, address, on_store);
        set_fault_mode(TagCheckFaultMode::Ignored);
    });
}

fn loaded_with(check: &mut Check, address: *mut u64, outcome: Outcome) {
    set_word(BEFORE);
    let (value, exception) = load(address, OTHER);
    check.equal(
        "the loaded value",
        value,
        if outcome == Outcome::Exception {
            OTHER
        } else {
            BEFORE
        },
    );
    effect(check, "load", exception, address, outcome);
}

fn stored_with(check: &mut Check, address: *mut u64, outcome: Outcome) {
    set_word(BEFORE);
    let exception = store(address, OTHER);
    check.equal(
        "the word after a store",
        word(),
        if outcome == Outcome::Exception {
            BEFORE
        } else {
            OTHER
        },
    );
    effect(check, "store", exception, address, outcome);
}

fn effect(
    check: &mut Check,
    access: &str,
    exception: Option<Exception>,
    address: *mut u64,
    outcome: Outcome,
) {
    match (exception, outcome) {
        (Some(exception), Outcome::Exception) => {
            let fault = exception.tag_check_fault();
            let as_expected = fault
                .is_some_and(|fault| fault.write == (access == "store") && !fault.from_lower_level);
            check.that(
                as_expected,
                format_args!("a {access} raised {exception:x?}, which is no tag check fault of it"),
            );
            // Bits 63:60 of FAR_EL1 are unknown without FEAT_MTE_TAGGED_FAR.
            check.equal("FAR_EL1", exception.address << 4, (address as u64) << 4);
        }
        (Some(exception), _) => check.that(false, format_args!("a {access} raised {exception:x?}")),
        (None, Outcome::Exception) => {
            check.that(false, format_args!("a {access} raised no exception"))
        }
        (None, _) => {}
    }
    let noted = Tfsr::from_bits(fault_status()).faulted(VaRange::Lower);
    check.that(
        noted == (outcome == Outcome::Noted),
        format_args!("TFSR_EL1.TF0 is {} after a {access}", u8::from(noted)),
    );
}

/// TFSR_EL1 with all faults so far in it, which it then has no more.
fn fault_status() -> u64 {
    // SAFETY: a barrier changes nothing. It completes the accesses whose faults are to be in TFSR_EL1.
    unsafe { core::arch::asm!("dsb nsh", "isb", options(nostack)) };
    let status = TagRegister::FaultStatus.read();
    TagRegister::FaultStatus.write(0);
    status
}

fn set_word(value: u64) {
    // SAFETY: the page is this module's, and one vCPU runs.
    unchecked(|| unsafe { PAGE.pointer().write_volatile(value) });
}

fn word() -> u64 {
    // SAFETY: as in `set_word`.
    unchecked(|| unsafe { PAGE.pointer().read_volatile() })
}
