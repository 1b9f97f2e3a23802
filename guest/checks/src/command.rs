//! The command line.

use std::ffi::OsString;
use std::process::ExitCode;

use lexopt::prelude::*;

use crate::checks::{self, Check, Verdict};
use crate::trace::{self, TraceError};

const USAGE: &str = "\
mte-checks: whether MTE does in this guest what the architecture and Linux say

Usage: mte-checks [CHECK]…            (all but `absent` if none is named)
       mte-checks tag-fault PROGRAM [ARGUMENT]…
       mte-checks poke-tag PID ADDRESS TAG

Checks:
  sync       synchronous faults arrive, and the access does not happen
  async      asynchronous faults arrive, and the access happens
  asymm      reads fault synchronously, writes asynchronously (needs MTE3, root and sysfs)
  irg        on every CPU IRG chooses the tags that its thread includes, while others include others
  tfsr       the asynchronous faults of one thread are seen by no other, on its CPU or elsewhere
  migration  tags, tag checks and the included tags stay while a thread moves from CPU to CPU
  zeroing    STZG and DC GZVA zero data and set tags, DC GVA sets tags
  absent     there is no MTE: no hardware capability, none in the ID register, no tagged memory

tag-fault runs a program that has to die of a tag check fault.
poke-tag gives the granule at ADDRESS of process PID another tag.

Exit status: 0 nothing failed; 1 something did; 2 it could not be tried.";

/// What a command line asks for.
enum Command {
    Help,
    Checks(Vec<Check>),
    TagFault {
        program: OsString,
        arguments: Vec<OsString>,
    },
    PokeTag {
        pid: i32,
        address: u64,
        tag: u8,
    },
}

/// What is wrong with a command line.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error("{0}; see --help")]
    Syntax(#[from] lexopt::Error),
    #[error("there is no check \"{0}\"; see --help")]
    NoSuchCheck(String),
}

/// Runs the program.
pub fn main() -> ExitCode {
    match parse() {
        Ok(Command::Help) => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        Ok(Command::Checks(checks)) => make(&checks),
        Ok(Command::TagFault { program, arguments }) => tag_fault(program, arguments),
        Ok(Command::PokeTag { pid, address, tag }) => match trace::poke_tag(pid, address, tag) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => cannot_try(&error),
        },
        Err(error) => cannot_try(&error),
    }
}

fn cannot_try(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("mte-checks: {error}");
    ExitCode::from(2)
}

fn parse() -> Result<Command, CommandError> {
    let mut parser = lexopt::Parser::from_env();
    let mut checks = Vec::new();
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Help),
            Value(word) if checks.is_empty() && word == "tag-fault" => {
                let program = parser.value()?;
                return Ok(Command::TagFault {
                    program,
                    arguments: parser.raw_args()?.collect(),
                });
            }
            Value(word) if checks.is_empty() && word == "poke-tag" => {
                let pid = parser.value()?.parse()?;
                let address = parser.value()?.parse_with(hexadecimal)?;
                let tag = parser
                    .value()?
                    .parse_with(|word| u8::from_str_radix(word, 16))?;
                return Ok(Command::PokeTag { pid, address, tag });
            }
            Value(word) => {
                let name = word.string()?;
                checks.push(Check::named(&name).ok_or(CommandError::NoSuchCheck(name))?);
            }
            _ => return Err(argument.unexpected().into()),
        }
    }
    if checks.is_empty() {
        checks.extend(
            Check::ALL
                .into_iter()
                .filter(|&check| check != Check::Absent),
        );
    }
    Ok(Command::Checks(checks))
}

fn hexadecimal(word: &str) -> Result<u64, std::num::ParseIntError> {
    u64::from_str_radix(word.strip_prefix("0x").unwrap_or(word), 16)
}

fn make(checks: &[Check]) -> ExitCode {
    let mut failed = false;
    for check in checks {
        match checks::make(*check) {
            Ok(()) => println!("ok {check}"),
            Err(Verdict::Skip(why)) => println!("skip {check}: {why}"),
            Err(Verdict::Fail(why)) => {
                println!("FAIL {check}: {why}");
                failed = true;
            }
        }
    }
    ExitCode::from(u8::from(failed))
}

fn tag_fault(program: OsString, arguments: Vec<OsString>) -> ExitCode {
    match trace::run_to_tag_fault(program, arguments) {
        Ok(address) => {
            println!("ok tag-fault: {address}");
            ExitCode::SUCCESS
        }
        Err(error @ TraceError::NoTagFault(_)) => {
            println!("FAIL tag-fault: {error}");
            ExitCode::from(1)
        }
        Err(error) => cannot_try(&error),
    }
}
