//! Ending `KVM_RUN` from another thread.
//!
//! Two things are needed. `immediate_exit` in the vCPU's shared page makes a `KVM_RUN` that has
//! not begun return at once; a signal to the vCPU's thread makes one that has begun return. Setting
//! the first before sending the second leaves no moment at which an interruption is lost: either
//! `KVM_RUN` starts after and sees the flag, or it is under way and gets the signal.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::{Error, Interrupter, Result};

extern "C" fn wake(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Gives the wake-up signal a handler that does nothing: its arrival alone ends `KVM_RUN`.
pub fn install_signal_handler() -> Result<()> {
    register_signal_handler(SIGRTMIN(), wake).map_err(|e| Error::Host {
        step: "installing the signal handler that wakes vCPUs",
        source: e.into(),
    })
}

thread_local! {
    /// This thread's ID, asked for once: every MMIO exit passes here.
    // SAFETY: a query without demands.
    static THREAD: i32 = unsafe { libc::gettid() };
}

/// Ends the `KVM_RUN` of one vCPU.
#[derive(Clone)]
pub struct KvmInterrupter(Arc<Shared>);

struct Shared {
    run: RunPage,
    /// The thread that last called `KVM_RUN`; 0 before the first.
    thread: AtomicI32,
}

impl KvmInterrupter {
    /// An interrupter for the vCPU behind `vcpu`, an open vCPU file.
    pub fn new(vcpu: &impl AsRawFd, index: u32) -> Result<Self> {
        let run = RunPage::map(vcpu).map_err(|source| Error::Vcpu {
            index,
            step: "mapping the page shared with KVM",
            source,
        })?;
        Ok(Self(Arc::new(Shared {
            run,
            thread: AtomicI32::new(0),
        })))
    }

    /// Says that the calling thread is about to run the vCPU.
    pub fn runs_here(&self) {
        self.0.thread.store(THREAD.with(|id| *id), Ordering::SeqCst);
    }

    /// Takes the interruption back, once `KVM_RUN` returned for it.
    pub fn acknowledge(&self) {
        self.0.run.immediate_exit().store(0, Ordering::SeqCst);
    }
}

impl Interrupter for KvmInterrupter {
    fn interrupt(&self) {
        self.0.run.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.0.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: sends a signal whose handler does nothing to a thread of this process. Should
            // that thread be gone, the call fails or another of our threads is woken for nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
        }
    }
}

/// A mapping of its own of the page that a vCPU shares with KVM. It outlives the vCPU, and its bytes
/// are at other addresses than those that kvm-ioctls lends out as `&mut kvm_run`.
struct RunPage(NonNull<kvm_run>);

// SAFETY: only the `immediate_exit` byte is accessed, and that atomically.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn map(vcpu: &impl AsRawFd) -> io::Result<Self> {
        // SAFETY: a new mapping where the kernel likes replaces nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(address.cast()) {
            Some(run) if address != libc::MAP_FAILED => Ok(Self(run)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the mapping lives as long as `self` and holds a `kvm_run`.
        let byte = unsafe { &raw mut (*self.0.as_ptr()).immediate_exit };
        // SAFETY: the byte is valid for `self`'s life, and nothing else in this process accesses it by
        // this address but through this function; the kernel reads it with READ_ONCE.
        unsafe { AtomicU8::from_ptr(byte) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: made by `map` with this size; the last handle is going.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}
