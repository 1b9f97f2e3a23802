//! The user's terminal comes back as it was. A process of its own, because the terminal is its standard input.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;
use std::thread;

use vmm::terminal::RawMode;

/// The tests share one standard input.
static STDIN: Mutex<()> = Mutex::new(());

/// Makes a new terminal the standard input.
fn become_a_terminals_user() {
    let (mut user, mut program) = (0, 0);
    // SAFETY: the call fills the two descriptors; nothing else is asked for.
    let opened = unsafe {
        libc::openpty(
            &raw mut user,
            &raw mut program,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    assert_eq!(opened, 0);
    become_standard_input(program);
}

fn become_standard_input(descriptor: RawFd) {
    // SAFETY: descriptor 0 belongs to nobody but standard input, which is meant to change.
    assert_eq!(unsafe { libc::dup2(descriptor, 0) }, 0);
}

/// Whether the terminal edits lines, as it does before raw mode.
fn edits_lines() -> bool {
    let mut attributes = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the structure is writable; the call fills it or fails.
    assert_eq!(unsafe { libc::tcgetattr(0, attributes.as_mut_ptr()) }, 0);
    // SAFETY: filled by the call above.
    unsafe { attributes.assume_init() }.c_lflag & libc::ICANON != 0
}

#[test]
fn the_terminal_is_raw_until_raw_mode_is_dropped() {
    let _alone = STDIN.lock();
    become_a_terminals_user();
    let before = edits_lines();

    let raw = RawMode::enter().unwrap();
    let during = edits_lines();
    drop(raw);

    assert_eq!((before, during, edits_lines()), (true, false, true));
}

#[test]
fn a_panic_gives_the_terminal_back_before_anything_is_dropped() {
    let _alone = STDIN.lock();
    become_a_terminals_user();
    let raw = RawMode::enter().unwrap();

    let panicked = thread::spawn(|| panic!("on purpose")).join();

    assert!(panicked.is_err());
    assert!(edits_lines());
    drop(raw);
}

#[test]
fn what_is_no_terminal_is_refused() {
    let _alone = STDIN.lock();
    let file = File::open("/dev/null").unwrap();
    become_standard_input(file.as_raw_fd());

    assert!(RawMode::enter().is_err());
}
