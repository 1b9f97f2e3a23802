//! What becomes of the program when nobody reads what it writes.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

fn tagvisor() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tagvisor"));
    command.stdin(Stdio::null());
    command.env("XDG_RUNTIME_DIR", env!("CARGO_TARGET_TMPDIR"));
    command
}

/// A pipe whose reader has left.
fn nobody() -> io::PipeWriter {
    io::pipe().unwrap().1
}

#[test]
fn a_run_that_fails_unheard_still_ends_in_order() {
    let status = tagvisor()
        .args(["run", "--flat", "/nonexistent"])
        .stdout(nobody())
        .stderr(nobody())
        .status()
        .unwrap();

    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_check_whose_reader_leaves_ends_as_any_other_program() {
    let status = tagvisor()
        .arg("check")
        .stdout(nobody())
        .stderr(Stdio::null())
        .status()
        .unwrap();

    assert_eq!(status.signal(), Some(libc::SIGPIPE));
}
