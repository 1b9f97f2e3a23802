//! `tagvisor tags`: what a machine's memory tags are.

mod at;
mod diff;
mod dump;
mod faults;
mod find;
mod map;
mod stat;

use std::io::{BufWriter, StdoutLock, Write};

use clap::{Args as ClapArgs, Subcommand};

/// What is asked.
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    question: Question,
}

#[derive(Subcommand)]
enum Question {
    /// How much memory is tagged, and how.
    Stat(stat::Args),
    /// A picture of memory by tag, in the terminal or as a PNG file.
    Map(map::Args),
    /// The tags of a range, one by one.
    Dump(dump::Args),
    /// Where a tag is, or where a pointer's tag does not match.
    Find(find::Args),
    /// Where a pointer points: the tags and the data there.
    At(at::Args),
    /// The last exception of each vCPU, and the panic of the kernel.
    Faults(faults::Args),
    /// What differs between two snapshots, or a snapshot and a machine: data, tags, or both.
    Diff(diff::Args),
}

/// Answers.
///
/// # Errors
/// The snapshot is damaged, or the machine cannot be looked at; addresses that it has not; standard output cannot be written.
pub fn tags(args: &Args) -> super::Result {
    match &args.question {
        Question::Stat(args) => stat::stat(args),
        Question::Map(args) => map::map(args),
        Question::Dump(args) => dump::dump(args),
        Question::Find(args) => find::find(args),
        Question::At(args) => at::at(args),
        Question::Faults(args) => faults::faults(args),
        Question::Diff(args) => diff::diff(args),
    }
}

/// Standard output for many lines.
fn lines() -> BufWriter<StdoutLock<'static>> {
    BufWriter::new(std::io::stdout().lock())
}

/// Gives an error of standard output the form of those of memory.
fn printed(result: std::io::Result<()>) -> inspect::Result<()> {
    result.map_err(|source| inspect::Error::Output {
        action: "print",
        source,
    })
}

/// Writes what is still held back.
fn finished(mut out: impl Write) -> super::Result {
    out.flush()?;
    Ok(std::process::ExitCode::SUCCESS)
}
