//! `bench-first-byte COMMAND…`: starts a command, prints the microseconds until the first byte of its output, and ends it.

use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    match measure() {
        Ok(elapsed) => {
            println!("{}", elapsed.as_micros());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bench-first-byte: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<Duration, Box<dyn std::error::Error>> {
    let mut words = std::env::args_os().skip(1);
    let mut command = Command::new(words.next().ok_or("no command")?);
    command
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let begun = Instant::now();
    let mut child = command.spawn()?;
    let read = child.stdout.take().ok_or("no output")?.read_exact(&mut [0]);
    let elapsed = begun.elapsed();
    child.kill()?;
    child.wait()?;
    read.map_err(|_| "the command ended without a word")?;
    Ok(elapsed)
}
