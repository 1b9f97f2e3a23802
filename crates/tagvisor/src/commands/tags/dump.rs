//! `tagvisor tags dump`: the tags of a range, one by one.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{Args as ClapArgs, ValueEnum};

use super::super::Result;
use super::super::addresses::Addresses;
use super::super::target::TargetArgs;
use super::lines;

/// Which memory, and in which form.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    addresses: Addresses,
    /// In which form
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A digit a granule, 64 a line
    Text,
    /// Two tags a byte, the lower address in the low half
    Binary,
    /// Spans of granules with the same tag
    Json,
}

pub fn dump(args: &Args) -> Result {
    if args.format == Format::Binary && io::stdout().is_terminal() {
        return Err("a binary dump is not for a terminal: send it to a file".into());
    }
    let mut target = args.target.open()?;
    let mut memory = target.memory();
    let mut view = args.addresses.view(&mut *memory)?;
    let format = match args.format {
        Format::Text => inspect::Format::Text,
        Format::Binary => inspect::Format::Binary,
        Format::Json => inspect::Format::Json,
    };
    inspect::dump(&mut view, format, &mut lines())?;
    Ok(ExitCode::SUCCESS)
}
