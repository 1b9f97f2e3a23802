//! Other processes, by ptrace.

use std::ffi::{CString, OsString, c_void};
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::ptr;

use libc::{c_int, pid_t};
use mte_linux::faults::{SEGV_MTEAERR, SEGV_MTESERR};

/// `PTRACE_POKEMTETAGS` of arm64 Linux.
const PTRACE_POKEMTETAGS: libc::c_uint = 34;

/// What did not go as it should.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The program ended some other way.
    #[error("the program {0}")]
    NoTagFault(String),
    /// The kernel refused.
    #[error("cannot {what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        error: io::Error,
    },
    /// A word of the command line holds a byte 0.
    #[error("{0:?} has a byte 0 in it")]
    ZeroByte(OsString),
}

/// A tag check fault that ended a program.
#[derive(Clone, Copy, Debug)]
pub enum TagFault {
    /// At this address.
    Synchronous(u64),
    /// At no known address.
    Asynchronous,
}

impl fmt::Display for TagFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Synchronous(address) => write!(f, "SEGV_MTESERR at {address:#x}"),
            Self::Asynchronous => f.write_str("SEGV_MTEAERR"),
        }
    }
}

fn system(what: &'static str) -> TraceError {
    TraceError::System {
        what,
        error: io::Error::last_os_error(),
    }
}

/// Gives one granule of another process's memory a tag.
///
/// # Errors
/// What the kernel answers.
pub fn poke_tag(pid: pid_t, address: u64, tag: u8) -> Result<(), TraceError> {
    let none = ptr::null_mut::<c_void>();
    // SAFETY: the requests touch no memory of this process but `tags` and `vector`, of which the kernel reads the first
    // and counts in the second.
    unsafe {
        if libc::ptrace(libc::PTRACE_ATTACH, pid, none, none) != 0 {
            return Err(system("attach to the process"));
        }
        wait(pid)?;
        let mut tags = [tag];
        let mut vector = libc::iovec {
            iov_base: tags.as_mut_ptr().cast(),
            iov_len: tags.len(),
        };
        let poked = libc::ptrace(
            PTRACE_POKEMTETAGS,
            pid,
            address as *mut c_void,
            &raw mut vector,
        );
        let result = if poked == 0 && vector.iov_len == 1 {
            Ok(())
        } else {
            Err(system("write a tag of the process"))
        };
        libc::ptrace(libc::PTRACE_DETACH, pid, none, none);
        result
    }
}

/// Runs a program that has to die of a tag check fault, and says which it was.
///
/// # Errors
/// How it ended instead, or what the kernel answers.
pub fn run_to_tag_fault(
    program: OsString,
    arguments: Vec<OsString>,
) -> Result<TagFault, TraceError> {
    let pid = start(program, arguments)?;
    let mut last_fault = None;
    loop {
        let status = wait(pid)?;
        if libc::WIFSTOPPED(status) {
            let signal = libc::WSTOPSIG(status);
            if signal == libc::SIGSEGV {
                last_fault = tag_fault(pid)?;
            }
            // The stop after execve is not for the program to know.
            let passed_on = if signal == libc::SIGTRAP { 0 } else { signal };
            // SAFETY: the request touches no memory of this process.
            if unsafe { libc::ptrace(libc::PTRACE_CONT, pid, 0, passed_on) } != 0 {
                return Err(system("let the program go on"));
            }
        } else if libc::WIFSIGNALED(status) {
            let signal = libc::WTERMSIG(status);
            let other = || {
                TraceError::NoTagFault(format!(
                    "died of signal {signal}, and not of a tag check fault"
                ))
            };
            return last_fault
                .filter(|_| signal == libc::SIGSEGV)
                .ok_or_else(other);
        } else if libc::WIFEXITED(status) {
            return Err(TraceError::NoTagFault(format!(
                "lived, and ended with status {}",
                libc::WEXITSTATUS(status)
            )));
        }
    }
}

fn start(program: OsString, arguments: Vec<OsString>) -> Result<pid_t, TraceError> {
    let words = std::iter::once(program).chain(arguments).map(|word| {
        let bytes = word.clone().into_vec();
        CString::new(bytes).map_err(|_| TraceError::ZeroByte(word))
    });
    let words = words.collect::<Result<Vec<_>, _>>()?;
    let mut pointers: Vec<_> = words.iter().map(|word| word.as_ptr()).collect();
    pointers.push(ptr::null());
    // SAFETY: this process has one thread, so the child may do as it likes.
    match unsafe { libc::fork() } {
        -1 => Err(system("start a process")),
        0 => {
            // SAFETY: the words and the array of them end as execvp expects; it returns only if it failed.
            unsafe {
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
                libc::execvp(pointers[0], pointers.as_ptr());
            }
            eprintln!(
                "mte-checks: cannot run {:?}: {}",
                words[0],
                io::Error::last_os_error()
            );
            std::process::exit(127)
        }
        pid => Ok(pid),
    }
}

fn wait(pid: pid_t) -> Result<c_int, TraceError> {
    let mut status = 0;
    // SAFETY: the kernel writes one int.
    if unsafe { libc::waitpid(pid, &mut status, libc::__WALL) } == -1 {
        return Err(system("wait for the process"));
    }
    Ok(status)
}

/// The tag check fault that stopped a process with SIGSEGV, if it was one.
fn tag_fault(pid: pid_t) -> Result<Option<TagFault>, TraceError> {
    // SAFETY: all zeros is a valid siginfo_t, which the kernel then fills in.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    if unsafe { libc::ptrace(libc::PTRACE_GETSIGINFO, pid, 0, &raw mut info) } != 0 {
        return Err(system("ask for the signal's cause"));
    }
    Ok(match info.si_code {
        // SAFETY: SIGSEGV has an address.
        SEGV_MTESERR => Some(TagFault::Synchronous(unsafe { info.si_addr() } as u64)),
        SEGV_MTEAERR => Some(TagFault::Asynchronous),
        _ => None,
    })
}
