//! Tag check faults as signals.
//!
//! [`install`] sets the process's handler of SIGSEGV. A thread then provokes a synchronous fault by [`load`] or [`store`],
//! which say whether it came, and counts asynchronous ones by [`count_asynchronous`]. A fault that no thread asked for is
//! given to the function that `install` was called with; what it does not end is left to the signal's default action.

use std::arch::asm;
use std::cell::Cell;
use std::fmt::{self, Write};
use std::io;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t};

/// SIGSEGV of an asynchronous tag check fault.
pub const SEGV_MTEAERR: c_int = 8;
/// SIGSEGV of a synchronous tag check fault.
pub const SEGV_MTESERR: c_int = 9;
/// Asks the kernel for the whole address, its tag too.
const SA_EXPOSE_TAGBITS: c_int = 0x800;

/// A SIGSEGV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// `si_code`.
    pub code: c_int,
    /// `si_addr`, with the tag in bits 59:56. 0 for an asynchronous fault.
    pub address: u64,
}

static ON_UNEXPECTED: OnceLock<fn(Fault)> = OnceLock::new();

thread_local! {
    /// A single instruction that may fault is under way.
    static ATTEMPT: Cell<bool> = const { Cell::new(false) };
    /// The fault that it raised.
    static RAISED: Cell<Option<Fault>> = const { Cell::new(None) };
    /// How many asynchronous faults arrived, while they are counted.
    static ASYNCHRONOUS: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Handles SIGSEGV in this process from now on. `on_unexpected` is called from the signal handler, so it may do only what
/// signal-safety(7) allows.
///
/// # Errors
/// What the kernel answers to sigaction.
pub fn install(on_unexpected: fn(Fault)) -> io::Result<()> {
    ON_UNEXPECTED.get_or_init(|| on_unexpected);
    // SAFETY: all zeros is a valid sigaction, filled in below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | SA_EXPOSE_TAGBITS;
    // SAFETY: the handler has the type that SA_SIGINFO asks for.
    if unsafe { libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Loads a word by an instruction that may fault synchronously. If it does, the first value is `unloaded`, which the
/// register held before.
///
/// # Safety
/// The word is mapped and readable.
pub unsafe fn load(address: *const u64, unloaded: u64) -> (u64, Option<Fault>) {
    let mut value = unloaded;
    // SAFETY: the caller vouches for the memory; if the load faults, the handler goes on after it.
    let fault = attempt(|| unsafe {
        asm!("ldr {value}, [{address}]", value = inout(reg) value, address = in(reg) address)
    });
    (value, fault)
}

/// Stores a word by an instruction that may fault synchronously.
///
/// # Safety
/// The word is mapped and may be written.
pub unsafe fn store(address: *mut u64, value: u64) -> Option<Fault> {
    // SAFETY: the caller vouches for the memory; if the store faults, the handler goes on after it.
    attempt(|| unsafe {
        asm!("str {value}, [{address}]", value = in(reg) value, address = in(reg) address)
    })
}

fn attempt(instruction: impl FnOnce()) -> Option<Fault> {
    RAISED.set(None);
    ATTEMPT.set(true);
    instruction();
    ATTEMPT.set(false);
    RAISED.take()
}

/// Does something, and then a system call, and says how many asynchronous faults this thread met meanwhile.
pub fn count_asynchronous(work: impl FnOnce()) -> u64 {
    ASYNCHRONOUS.set(Some(0));
    work();
    // SAFETY: getppid only returns a number. The kernel reports asynchronous faults when it is entered.
    unsafe { libc::syscall(libc::SYS_getppid) };
    ASYNCHRONOUS.take().unwrap_or(0)
}

extern "C" fn handle(_signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a SIGSEGV handler a siginfo with an address.
    let fault = unsafe {
        Fault {
            code: (*info).si_code,
            address: (*info).si_addr() as u64,
        }
    };
    match (fault.code, ASYNCHRONOUS.get()) {
        (SEGV_MTEAERR, Some(count)) => ASYNCHRONOUS.set(Some(count + 1)),
        (SEGV_MTESERR, _) if ATTEMPT.get() && RAISED.get().is_none() => {
            RAISED.set(Some(fault));
            // SAFETY: the kernel gives a handler with SA_SIGINFO the context that it will return to. The instruction
            // that faulted is the one in `load` or `store`, four bytes long, and can be left out.
            unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.pc += 4 };
        }
        _ => unexpected(fault),
    }
}

fn unexpected(fault: Fault) {
    if let Some(on_unexpected) = ON_UNEXPECTED.get() {
        on_unexpected(fault);
    }
    // SAFETY: the default action is always there. A synchronous fault then happens again and ends the process; an
    // asynchronous one is sent again.
    unsafe {
        libc::signal(libc::SIGSEGV, libc::SIG_DFL);
        if fault.code == SEGV_MTEAERR {
            libc::raise(libc::SIGSEGV);
        }
    }
}

/// Writes a message to standard output and ends the process at once, as a signal handler may.
pub fn exit_with_message(message: fmt::Arguments<'_>, status: c_int) -> ! {
    let mut line = Line {
        bytes: [0; 512],
        length: 0,
    };
    // What does not fit is left out.
    let _ = line.write_fmt(message);
    // SAFETY: the bytes are those of the line; _exit ends the process without running any more of its code.
    unsafe {
        libc::write(libc::STDOUT_FILENO, line.bytes.as_ptr().cast(), line.length);
        libc::_exit(status)
    }
}

/// A line put together without allocating.
struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let free = &mut self.bytes[self.length..];
        let fitting = text.len().min(free.len());
        free[..fitting].copy_from_slice(&text.as_bytes()[..fitting]);
        self.length += fitting;
        Ok(())
    }
}
