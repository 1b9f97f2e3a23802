//! `tagvisor tags find`: where a tag is, or where a pointer's tag does not match.

use std::io::Write;
use std::ops::Range;

use clap::Args as ClapArgs;
use inspect::{Gap, Wanted};
use mte::Tag;

use super::super::Result;
use super::super::addresses::{AddressRange, SpaceArgs, parse_address, parse_size};
use super::super::target::TargetArgs;
use super::{finished, lines, printed};

/// What to look for.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    target: TargetArgs,
    /// Granules with this tag, 0 to 15 or 0x0 to 0xf
    #[arg(long, value_name = "TAG", value_parser = parse_tag, required_unless_present = "pointer", conflicts_with_all = ["pointer", "length"])]
    tag: Option<Tag>,
    /// Granules whose tag is not that of this pointer, from where it points: 0x0b00ffff12345670
    #[arg(long, value_name = "POINTER", value_parser = parse_address, conflicts_with = "range")]
    pointer: Option<u64>,
    /// Bytes that the pointer is used for
    #[arg(long, value_name = "BYTES", value_parser = parse_size, default_value = "16")]
    length: u64,
    /// These addresses alone, as START..END or START+SIZE
    #[arg(long, value_name = "RANGE")]
    range: Option<AddressRange>,
    #[command(flatten)]
    space: SpaceArgs,
}

fn parse_tag(text: &str) -> std::result::Result<Tag, String> {
    let value = parse_address(text)
        .ok()
        .and_then(|value| u8::try_from(value).ok());
    value
        .and_then(Tag::new)
        .ok_or_else(|| "a tag is 0 to 15, or 0x0 to 0xf".into())
}

pub fn find(args: &Args) -> Result {
    let mut target = args.target.open()?;
    let mut memory = target.memory();
    let (wanted, range) = match (args.tag, args.pointer) {
        (Some(tag), _) => (Wanted::Tag(tag), args.range.as_ref().map(|it| it.0.clone())),
        (None, Some(pointer)) => {
            let start = args.space.address_of(&*memory, pointer)?;
            let end = start.checked_add(args.length.max(1));
            let end = end.ok_or("it points behind all addresses")?;
            (Wanted::Mismatch(Tag::of_address(pointer)), Some(start..end))
        }
        (None, None) => return Err("give --tag or --pointer".into()),
    };
    let mut view = args.space.view(&mut *memory, range)?;
    let mut out = lines();
    let mut found = 0;
    inspect::find(&mut view, wanted, &mut |range, what| {
        found += 1;
        printed(writeln!(out, "{}", in_words(&range, what)))
    })?;
    if found == 0 {
        let nothing = match wanted {
            Wanted::Tag(tag) => format!("no granule has tag {tag}"),
            Wanted::Mismatch(tag) => format!("all of it has tag {tag}, as the pointer"),
        };
        writeln!(out, "{nothing}")?;
    }
    finished(out)
}

fn in_words(range: &Range<u64>, what: std::result::Result<Tag, Gap>) -> String {
    let what = match what {
        Ok(tag) => format!("tag {tag}"),
        Err(Gap::Hole) => "never populated: tag 0".into(),
        Err(Gap::NoMemory) => "no memory".into(),
        Err(Gap::Unmapped) => "not mapped".into(),
    };
    let bytes = range.end - range.start;
    format!("{:#018x}  {bytes:>#10x} bytes  {what}", range.start)
}
