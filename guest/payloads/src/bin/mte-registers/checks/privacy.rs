//! RGSR_EL1, GCR_EL1, TFSR_EL1 and TFSRE0_EL1 belong to the vCPU.
//!
//! All vCPUs run at once. In each round a vCPU gives its four registers values that no other vCPU has, leaves for the
//! hypervisor in one of several ways, and finds its values again. Then IRG must choose what those values say.

use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

use mte::{GcrEl1, RgsrEl1, Tag, TagGenerator};
use payloads::machine::{Gic, Machine};
use payloads::processors::{MAX_PROCESSORS, run_on_all};
use payloads::registers::TagRegister;
use payloads::report::Report;
use payloads::tagging::random_tag;
use payloads::{console, interrupts, power, println};
use spin::Once;

/// Rounds a vCPU, unless `rounds=` says otherwise.
const ROUNDS: usize = 2000;
/// Microseconds of a sleep.
const SLEEP: u64 = 50;
/// Tags that IRG chooses in a round.
const DRAWS: usize = 8;

/// What each vCPU is to do.
static ROUNDS_TO_DO: AtomicUsize = AtomicUsize::new(0);
static VCPUS: AtomicUsize = AtomicUsize::new(0);
static READY: AtomicUsize = AtomicUsize::new(0);
static GIC: Once<Option<Gic>> = Once::new();

/// The first difference each vCPU found.
static DIFFERENCES: [Once<Difference>; MAX_PROCESSORS] = [const { Once::new() }; MAX_PROCESSORS];

#[derive(Clone, Copy)]
struct Difference {
    round: usize,
    exit: Exit,
    what: What,
    expected: u64,
    actual: u64,
}

#[derive(Clone, Copy)]
enum What {
    Register(TagRegister),
    Irg,
}

/// A way to leave for the hypervisor.
#[derive(Clone, Copy, Debug)]
enum Exit {
    /// HVC, handled by the hypervisor.
    Call,
    /// An access to the serial port, handled by the VMM.
    Device,
    /// WFI until the timer fires: the vCPU is taken off its CPU.
    Sleep,
    /// None but those that the host causes.
    Spin,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Register(register) => register.fmt(f),
            Self::Irg => f.write_str("the tag chosen by IRG"),
        }
    }
}

pub fn check(machine: &Machine, report: &mut Report) {
    let rounds = machine
        .argument("rounds")
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(ROUNDS);
    let vcpus = machine.processors().len();
    ROUNDS_TO_DO.store(rounds, Ordering::Relaxed);
    VCPUS.store(vcpus, Ordering::Relaxed);
    GIC.call_once(|| machine.gic);
    if machine.gic.is_none() {
        println!("mte-registers: no GICv3, so no vCPU sleeps");
    }

    report.check("registers-belong-to-their-vcpu", |check| {
        if let Err((vcpu, error)) = run_on_all(machine, keep_registers) {
            check.that(false, format_args!("vCPU {vcpu} cannot be turned on: {error}"));
        }
        for (vcpu, difference) in DIFFERENCES.iter().enumerate() {
            if let Some(Difference { round, exit, what, expected, actual }) = difference.get() {
                check.that(
                    false,
                    format_args!(
                        "vCPU {vcpu}, round {round}, after {exit:?}: {what} is {actual:#x} and should be {expected:#x}"
                    ),
                );
            }
        }
    });
    println!("mte-registers: {rounds} rounds on each of {vcpus} vCPUs");
}

/// What one vCPU does.
fn keep_registers(vcpu: usize) {
    let gic = GIC.get().copied().flatten();
    if let Some(gic) = gic {
        interrupts::enable_timer(gic);
    }
    READY.fetch_add(1, Ordering::AcqRel);
    while READY.load(Ordering::Acquire) < VCPUS.load(Ordering::Relaxed) {
        core::hint::spin_loop();
    }
    for round in 0..ROUNDS_TO_DO.load(Ordering::Relaxed) {
        let exit = match round % 4 {
            0 => Exit::Call,
            1 => Exit::Device,
            2 if gic.is_some() => Exit::Sleep,
            _ => Exit::Spin,
        };
        if let Some(difference) = one_round(vcpu, round, exit) {
            DIFFERENCES[vcpu].call_once(|| difference);
            break;
        }
    }
}

fn one_round(vcpu: usize, round: usize, exit: Exit) -> Option<Difference> {
    let values = TagRegister::ALL.map(|register| (register, value(vcpu, round, register)));
    for (register, value) in values {
        register.write(value);
    }
    leave(exit);
    let difference = |what, expected, actual| {
        Some(Difference {
            round,
            exit,
            what,
            expected,
            actual,
        })
    };
    for (register, expected) in values {
        let actual = register.read() & register.writable();
        if actual != expected {
            return difference(What::Register(register), expected, actual);
        }
    }

    let [(_, rgsr), (_, gcr), ..] = values;
    let mut model = TagGenerator {
        tag_access: true,
        gcr: GcrEl1::from_bits(gcr),
        rgsr: RgsrEl1::from_bits(rgsr),
    };
    for _ in 0..DRAWS {
        let (actual, expected) = (random_tag(), Tag::of_address(model.irg(0, 0)));
        if actual != expected {
            return difference(What::Irg, expected.value().into(), actual.value().into());
        }
    }
    None
}

/// A value for a register that differs between vCPUs and rounds. GCR_EL1.RRND is 0, so that IRG follows RGSR_EL1.
fn value(vcpu: usize, round: usize, register: TagRegister) -> u64 {
    let number = (vcpu << 32 | round << 2 | register as usize) as u64;
    let scattered = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let rrnd = if register == TagRegister::Control {
        1 << 16
    } else {
        0
    };
    (scattered ^ scattered >> 32) & register.writable() & !rrnd
}

fn leave(exit: Exit) {
    match exit {
        Exit::Call => power::call_hypervisor(),
        Exit::Device => console::touch(),
        Exit::Sleep => interrupts::sleep(SLEEP),
        Exit::Spin => (0..1000).for_each(|_| core::hint::spin_loop()),
    }
}
