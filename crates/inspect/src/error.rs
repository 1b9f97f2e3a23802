//! Why something cannot be looked at.

use std::io;

use crate::walk::Fault;

/// The result of looking.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why it cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The snapshot, or a part of it that is read now.
    #[error(transparent)]
    Stream(#[from] stream::Error),
    /// Pages of a running machine.
    #[error("memory at {address:#x}: {source}", address = page.saturating_mul(4096))]
    Source {
        /// The first page asked for.
        page: u64,
        /// Why it does not come.
        source: io::Error,
    },
    /// There is nothing to see.
    #[error("its memory has no tags: the guest ran without MTE")]
    NoTags,
    /// There is no memory at all.
    #[error("it has no memory: neither RAM nor a page is in it")]
    NoMemory,
    /// A range that is none.
    #[error("the range {start:#x}..{end:#x} is empty")]
    EmptyRange {
        /// Its first byte.
        start: u64,
        /// The byte behind its last.
        end: u64,
    },
    /// A vCPU that is not there.
    #[error("there is no vCPU {wanted}: {there}", there = those_there_are(*known))]
    NoVcpu {
        /// The one asked for, from 0 on.
        wanted: usize,
        /// How many are there.
        known: usize,
    },
    /// A process of the guest's that no vCPU runs, or that none is known to.
    #[error(
        "no vCPU runs process {wanted}: {}; where its tables are is known while a vCPU runs it, of a Linux guest that says so \
         (CONFIG_PID_IN_CONTEXTIDR): look again when it does, or give its first table with --ttbr",
        what_they_run(.running)
    )]
    NoProcess {
        /// The one asked for.
        wanted: u32,
        /// What each vCPU runs; 0 if it is idle or that is not known.
        running: Vec<u32>,
    },
    /// The saved state of a vCPU lacks a register.
    #[error("the saved state of the vCPU has no {0}")]
    NoRegister(&'static str),
    /// The translation tables of the guest are not to be understood.
    #[error("virtual address {address:#x}: {fault}")]
    Translation {
        /// What was to be translated.
        address: u64,
        /// Why it is not.
        fault: Fault,
    },
    /// The guest's tables map so much that going on would take for ever.
    #[error(
        "the range has more than {0} mappings: the guest's tables lead in circles, or the range is too large; give a smaller one"
    )]
    TooManyMappings(u64),
    /// A dump without addresses of a range that is not all memory.
    #[error(
        "nothing is mapped at {0:#x}: a binary dump has no way to say so; take text or JSON, or a smaller range"
    )]
    NotInBinary(u64),
    /// A range that no binary dump can have.
    #[error(
        "a binary dump has whole bytes of two tags: begin and end the range at multiples of 32"
    )]
    HalfByte,
    /// Two machines that cannot be compared.
    #[error("one of the two has memory tags and the other has none")]
    Incomparable,
    /// Output.
    #[error("cannot {action}: {source}")]
    Output {
        /// What was tried.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

fn those_there_are(known: usize) -> String {
    match known {
        0 => "no vCPU's state is saved with this memory".into(),
        1 => "the machine has one, 0".into(),
        known => format!("the machine has 0 to {}", known - 1),
    }
}

fn what_they_run(running: &[u32]) -> String {
    let known = running
        .iter()
        .enumerate()
        .filter(|(_, process)| **process != 0);
    let known: Vec<String> = known
        .map(|(vcpu, process)| format!("{process} (vCPU {vcpu})"))
        .collect();
    match known.as_slice() {
        [] => "they are idle, or do not say what they run".into(),
        known => format!("they run {}", known.join(" and ")),
    }
}

/// Gives an I/O error its action.
pub(crate) fn output(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Output { action, source }
}
