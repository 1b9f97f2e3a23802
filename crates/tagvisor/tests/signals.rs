//! Signals, each sent to a process of its own.
//!
//! Apart from the program's other tests, because such a process begins with all of its parent's
//! open files, locked ones among them.

#[allow(dead_code)]
#[path = "../src/signals.rs"]
mod signals;

use std::mem::MaybeUninit;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitStatus;
use std::sync::mpsc;
use std::thread;

use libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, c_int};
use signals::EndingSignals;

/// Runs `body` in a process of its own, and returns how that ended.
fn in_a_process(body: impl FnOnce()) -> ExitStatus {
    // SAFETY: the child has one thread, calls what is tested, and ends without running anything of the parent's.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: ends the child if the test hangs.
        unsafe { libc::alarm(20) };
        let panicked = catch_unwind(AssertUnwindSafe(body)).is_err();
        // SAFETY: ends the child.
        unsafe { libc::_exit(panicked.into()) };
    }
    let mut status = 0;
    // SAFETY: waits for a child of this process; `status` is writable.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(waited, child);
    ExitStatus::from_raw(status)
}

fn send_myself(signal: c_int) {
    // SAFETY: a signal to this process, which expects it.
    unsafe { libc::kill(libc::getpid(), signal) };
}

/// Blocks the signals, sends the first, and returns when it has been acted on.
fn receive_first(signal: c_int) {
    let (sender, received) = mpsc::channel();
    let signals = EndingSignals::block().unwrap();
    signals.on_first(move || sender.send(()).unwrap()).unwrap();
    send_myself(signal);
    received.recv().unwrap();
}

fn is_held_back(signal: c_int) -> bool {
    let mut held_back = MaybeUninit::uninit();
    // SAFETY: changes nothing, and fills the set.
    let result =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), held_back.as_mut_ptr()) };
    assert_eq!(result, 0);
    // SAFETY: the call above filled the set.
    unsafe { libc::sigismember(held_back.as_ptr(), signal) == 1 }
}

#[test]
fn the_first_signal_is_acted_on_whichever_it_is() {
    let statuses =
        [SIGTERM, SIGINT, SIGHUP, SIGQUIT].map(|signal| in_a_process(|| receive_first(signal)));

    assert_eq!(statuses.map(|status| status.code()), [Some(0); 4]);
}

#[test]
fn the_second_signal_ends_the_program_at_once() {
    let status = in_a_process(|| {
        receive_first(SIGINT);
        send_myself(SIGTERM);
        loop {
            thread::park();
        }
    });

    assert_eq!(status.code(), Some(128 + SIGTERM));
}

#[test]
fn a_program_that_takes_its_leave_ends_by_the_first_signal() {
    let status = in_a_process(|| {
        let signals = EndingSignals::block().unwrap();
        signals
            .end_on_first(|| eprintln!("somebody goes on without us"))
            .unwrap();
        send_myself(SIGINT);
        loop {
            thread::park();
        }
    });

    assert_eq!(status.code(), Some(128 + SIGINT));
}

#[test]
fn a_signal_that_nohup_has_us_ignore_stays_ignored() {
    let status = in_a_process(|| {
        // SAFETY: sets an action, in a process without other threads.
        unsafe { libc::signal(SIGHUP, libc::SIG_IGN) };

        let _signals = EndingSignals::block().unwrap();

        assert_eq!([SIGHUP, SIGTERM].map(is_held_back), [false, true]);
    });

    assert_eq!(status.code(), Some(0));
}
