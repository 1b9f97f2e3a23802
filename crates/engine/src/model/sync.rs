//! Locks and atomics of the parts whose interleavings are checked: loom's own under `--cfg loom`,
//! the standard library's otherwise.

#[cfg(loom)]
pub use loom::sync::{Arc, Mutex, MutexGuard, atomic};
#[cfg(not(loom))]
pub use std::sync::{Arc, Mutex, MutexGuard, atomic};

/// Waits a moment for another thread: the body of a loop that spins.
#[cfg(not(loom))]
pub fn spin() {
    std::thread::yield_now();
}

/// As above. Loom then runs this execution to its end, but explores no more of it: that somebody
/// looks in vain before it looks with success adds nothing to the latter, and has no end.
#[cfg(loom)]
pub fn spin() {
    loom::skip_branch();
    loom::thread::yield_now();
}
