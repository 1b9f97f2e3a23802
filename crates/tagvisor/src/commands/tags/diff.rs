//! `tagvisor tags diff`: what differs between two snapshots, a snapshot and a machine, or two machines.

use std::io::Write;
use std::path::PathBuf;

use clap::Args as ClapArgs;
use inspect::{Change, Difference, Totals, differences};
use serde::Serialize;

use super::super::Result;
use super::super::addresses::AddressRange;
use super::super::target::{How, Target};
use super::super::text::{count, table};
use super::{finished, lines, printed};

/// Which two, and how to say it.
#[derive(ClapArgs)]
pub struct Args {
    /// A machine's name, or a snapshot's file
    first: PathBuf,
    /// Another one
    second: PathBuf,
    #[command(flatten)]
    how: How,
    /// These guest-physical addresses alone, as START..END or START+SIZE
    #[arg(long, value_name = "RANGE")]
    range: Option<AddressRange>,
    /// Print the sums alone
    #[arg(long)]
    summary: bool,
    /// Print JSON, one object a line, the sums last
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Line {
    address: String,
    bytes: u64,
    change: Change,
    data_granules: u64,
    tag_granules: u64,
}

impl From<&Difference> for Line {
    fn from(found: &Difference) -> Self {
        Self {
            address: format!("{:#x}", found.range.start),
            bytes: found.range.end - found.range.start,
            change: found.change,
            data_granules: found.data_granules,
            tag_granules: found.tag_granules,
        }
    }
}

pub fn diff(args: &Args) -> Result {
    let mut targets = Target::open_both(&args.first, &args.second, args.how)?;
    let [mut first, mut second] = targets.each_mut().map(Target::memory);
    let range = args
        .range
        .as_ref()
        .map_or(0..u64::MAX, |range| range.0.clone());
    let mut out = lines();
    let totals = differences(&mut *first, &mut *second, range, &mut |found| {
        printed(match (args.summary, args.json) {
            (true, _) => Ok(()),
            (false, true) => serde_json::to_string(&Line::from(&found))
                .map_err(std::io::Error::from)
                .and_then(|line| writeln!(out, "{line}")),
            (false, false) => writeln!(out, "{}", in_words(&found)),
        })
    })?;
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&totals)?)?;
    } else {
        write!(out, "{}", sums(&totals))?;
    }
    finished(out)
}

fn in_words(found: &Difference) -> String {
    let what = match found.change {
        Change::Data => "data",
        Change::Tags => "tags",
        Change::Both => "data and tags",
    };
    format!(
        "{:#018x}  {:>#10x} bytes  {what:13}  granules: data {}, tags {}",
        found.range.start,
        found.range.end - found.range.start,
        count(found.data_granules),
        count(found.tag_granules)
    )
}

fn sums(totals: &Totals) -> String {
    let row = |name: &str, value: u64| [name.into(), count(value)];
    table(&[
        row("pages compared", totals.pages),
        row("  populated in the first alone", totals.only_first),
        row("  populated in the second alone", totals.only_second),
        row("pages with other data alone", totals.data),
        row("pages with other tags alone", totals.tags),
        row("pages with other data and tags", totals.both),
        row("granules with other data", totals.data_granules),
        row("granules with another tag", totals.tag_granules),
    ])
}
