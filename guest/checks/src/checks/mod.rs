//! The checks, a file each.

mod absent;
mod asymmetric;
mod asynchronous;
mod fault_status;
mod migration;
mod random_tags;
mod synchronous;
mod zeroing;

use std::fmt;
use std::io;
use std::thread;

use mte::aarch64::Instructions;
use mte::{Tag, TagSet};
use mte_linux::{TagChecks, TaggedMemory, faults, set_tag_checks};

/// A check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// See [`synchronous`].
    Synchronous,
    /// See [`asynchronous`].
    Asynchronous,
    /// See [`asymmetric`].
    Asymmetric,
    /// See [`random_tags`].
    RandomTags,
    /// See [`fault_status`].
    FaultStatus,
    /// See [`migration`].
    Migration,
    /// See [`zeroing`].
    Zeroing,
    /// See [`absent`].
    Absent,
}

impl Check {
    /// All checks.
    pub const ALL: [Self; 8] = [
        Self::Synchronous,
        Self::Asynchronous,
        Self::Asymmetric,
        Self::RandomTags,
        Self::FaultStatus,
        Self::Migration,
        Self::Zeroing,
        Self::Absent,
    ];

    /// The check of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|check| check.to_string() == name)
    }
}

/// Its name on the command line.
impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Synchronous => "sync",
            Self::Asynchronous => "async",
            Self::Asymmetric => "asymm",
            Self::RandomTags => "irg",
            Self::FaultStatus => "tfsr",
            Self::Migration => "migration",
            Self::Zeroing => "zeroing",
            Self::Absent => "absent",
        })
    }
}

/// Why a check did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It cannot be made on this machine.
    Skip(String),
    /// Something is not as it should be.
    Fail(String),
}

/// How a check ends.
pub type Outcome = Result<(), Verdict>;

/// Fails with a message unless something holds.
macro_rules! ensure {
    ($holds:expr, $($message:tt)+) => {
        if !$holds {
            return Err($crate::checks::Verdict::Fail(format!($($message)+)));
        }
    };
}
use ensure;

/// Makes a check.
pub fn make(check: Check) -> Outcome {
    if check == Check::Absent {
        return absent::check();
    }
    let Some(instructions) = mte_linux::instructions() else {
        return Err(Verdict::Fail("this machine offers programs no MTE".into()));
    };
    faults::install(|_| {}).map_err(failed("handle SIGSEGV"))?;
    match check {
        Check::Synchronous => synchronous::check(instructions),
        Check::Asynchronous => asynchronous::check(instructions),
        Check::Asymmetric => asymmetric::check(instructions),
        Check::RandomTags => random_tags::check(instructions),
        Check::FaultStatus => fault_status::check(instructions),
        Check::Migration => migration::check(instructions),
        Check::Zeroing => zeroing::check(instructions),
        Check::Absent => Ok(()),
    }
}

/// Names what the kernel refused.
fn failed(what: &'static str) -> impl Fn(io::Error) -> Verdict {
    move |error| Verdict::Fail(format!("cannot {what}: {error}"))
}

/// How a thread's check ended.
fn ended(outcome: thread::Result<Outcome>) -> Outcome {
    outcome.unwrap_or_else(|_| Err(Verdict::Fail("a thread of the check panicked".into())))
}

/// The tag of the granule of a [`granule`].
const MEMORY_TAG: Tag = Tag::from_low_bits(5);
/// Another.
const OTHER_TAG: Tag = Tag::from_low_bits(10);

/// A page whose first granule has [`MEMORY_TAG`], and pointers to its first word: a matching and a mismatching one.
struct Granule {
    _memory: TaggedMemory,
    matching: *mut u64,
    mismatching: *mut u64,
}

/// Such a page, for a thread with these tag checks.
fn granule(instructions: Instructions, checks: TagChecks) -> Result<Granule, Verdict> {
    set_tag_checks(checks, TagSet::ALL).map_err(failed("turn tag checks on"))?;
    let memory = TaggedMemory::new(1).map_err(failed("map memory with PROT_MTE"))?;
    // SAFETY: the granule is mapped.
    unsafe { instructions.stg(memory.start(), MEMORY_TAG) };
    let pointer = |tag: Tag| tag.insert_into_pointer(memory.start()).cast();
    let (matching, mismatching) = (pointer(MEMORY_TAG), pointer(OTHER_TAG));
    Ok(Granule {
        _memory: memory,
        matching,
        mismatching,
    })
}

impl Granule {
    /// The word.
    fn word(&self) -> u64 {
        // SAFETY: the word is mapped, and the pointer matches.
        unsafe { self.matching.read_volatile() }
    }

    /// Sets the word.
    fn set_word(&self, value: u64) {
        // SAFETY: as for `word`.
        unsafe { self.matching.write_volatile(value) }
    }
}
