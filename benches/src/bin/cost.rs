//! `bench-cost COMMAND…`: runs a command, whose output is of no interest, and prints the microseconds that it took from its
//! start to its end, and the most memory that it had, in KiB.

use std::io;
use std::mem::MaybeUninit;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

fn main() -> ExitCode {
    match measure() {
        Ok((microseconds, kib)) => {
            println!("{microseconds} {kib}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bench-cost: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<(u128, i64), Box<dyn std::error::Error>> {
    let mut words = std::env::args_os().skip(1);
    let mut command = Command::new(words.next().ok_or("no command")?);
    command
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let begun = Instant::now();
    let status = command.status()?;
    let elapsed = begun.elapsed();
    if !status.success() {
        return Err(format!("the command ended with {status}").into());
    }
    Ok((elapsed.as_micros(), peak_of_children()?))
}

/// The most memory that a child of this process had which has been waited for, in KiB. What this process has itself, which is
/// less than any, counts as its child's until that becomes another program.
fn peak_of_children() -> io::Result<i64> {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the kernel writes one `rusage` to where there is room for one.
    let failed = unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so that all of it was written.
    Ok(unsafe { usage.assume_init() }.ru_maxrss)
}
