//! `tagvisor tags at`: where a pointer points, what is there, and whether its tag is that of memory.

use clap::Args as ClapArgs;
use inspect::Place;

use super::super::Result;
use super::super::addresses::{SpaceArgs, parse_address};
use super::super::target::TargetArgs;

/// Which pointer.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    target: TargetArgs,
    /// An address, with a tag in bits 59 to 56 or without: 0x0b00ffff12345670
    #[arg(value_parser = parse_address)]
    pointer: u64,
    #[command(flatten)]
    space: SpaceArgs,
    /// Print JSON, for scripts
    #[arg(long)]
    json: bool,
}

pub fn at(args: &Args) -> Result {
    let mut target = args.target.open()?;
    let mut memory = target.memory();
    let walker = args.space.walker(&*memory)?;
    let place = Place::of(&mut *memory, walker, args.pointer)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&place)?);
    } else {
        println!("{place}");
    }
    Ok(std::process::ExitCode::SUCCESS)
}
