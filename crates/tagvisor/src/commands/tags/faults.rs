//! `tagvisor tags faults`: the last exception of each vCPU, and what the kernel said.

use std::io::Write;

use clap::Args as ClapArgs;
use inspect::{Death, End, kernel_log};

use super::super::Result;
use super::super::target::TargetArgs;
use super::super::text::printable;
use super::{finished, lines};

/// Which machine.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    target: TargetArgs,
    /// Print the last lines of the kernel's log before, so many
    #[arg(long, value_name = "LINES", default_value_t = 0)]
    log: usize,
}

pub fn faults(args: &Args) -> Result {
    let mut target = args.target.open()?;
    let mut memory = target.memory();
    let mut out = lines();
    if args.log > 0 {
        let log = kernel_log(&mut *memory, args.log)?;
        let log = log.ok_or("the guest is no Linux, or does not say where its log is")?;
        for line in log {
            writeln!(out, "{}", printable(&line))?;
        }
    }
    // As of a guest that cannot go on: all exceptions are told.
    match Death::of(&mut *memory, End::Stuck)? {
        Some(death) => writeln!(out, "{death}")?,
        None => writeln!(out, "no vCPU's state is saved with this memory")?,
    }
    finished(out)
}
