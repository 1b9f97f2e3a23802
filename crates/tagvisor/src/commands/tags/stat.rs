//! `tagvisor tags stat`: how much memory is tagged, and how.

use std::fmt::Write as _;
use std::process::ExitCode;

use clap::Args as ClapArgs;
use inspect::{Counts, Statistics};

use super::super::Result;
use super::super::addresses::Addresses;
use super::super::target::TargetArgs;
use super::super::text::{bytes, count, table};

/// Which memory, and how to say it.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    addresses: Addresses,
    /// Print JSON, for scripts
    #[arg(long)]
    json: bool,
}

pub fn stat(args: &Args) -> Result {
    let mut target = args.target.open()?;
    let mut memory = target.memory();
    let mut view = args.addresses.view(&mut *memory)?;
    let statistics = Statistics::of(&mut view)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&statistics)?);
    } else {
        print!("{}", in_words(&statistics));
    }
    Ok(ExitCode::SUCCESS)
}

fn in_words(statistics: &Statistics) -> String {
    let total = &statistics.total;
    let size = bytes(statistics.end - statistics.start);
    let mut text = format!("{:#x}..{:#x}, {size}\n\n", statistics.start, statistics.end);
    let pages = |name: &str, pages: u64| [name.into(), count(pages), of(pages, total.populated())];
    text += &table(&[
        [
            "pages populated".into(),
            count(total.populated()),
            String::new(),
        ],
        pages("  without tags", total.untagged),
        pages("  of one tag", total.uniform),
        pages("  of several tags", total.mixed),
        [
            "pages never populated".into(),
            count(total.holes),
            String::new(),
        ],
    ]);
    if total.unmapped > 0 {
        let _ = writeln!(text, "pages not mapped  {}", count(total.unmapped));
    }
    let populated = total.populated() * stream::PAGE_SIZE as u64;
    let _ = writeln!(
        text,
        "\ntagged: {}, {} of populated memory\nentropy, bits a granule: {:.3}; of tagged granules {:.3}; beside a known neighbour {:.3}",
        bytes(total.tagged_bytes()),
        of(total.tagged_bytes(), populated),
        total.entropy(),
        total.entropy_of_tagged(),
        total.entropy_beside_neighbour(),
    );
    text += "\n";
    text += &by_tag(total);
    text += "\n";
    text += &by_region(statistics);
    text
}

/// A share in percent.
fn of(part: u64, whole: u64) -> String {
    match whole {
        0 => "0 %".into(),
        _ => format!("{:.1} %", part as f64 * 100.0 / whole as f64),
    }
}

fn by_tag(total: &Counts) -> String {
    let granules = total.granules();
    let all: u64 = granules.iter().sum();
    let row =
        |(tag, granules): (usize, &u64)| [format!("{tag:x}"), count(*granules), of(*granules, all)];
    let head = ["TAG", "GRANULES", "SHARE"].map(String::from);
    let rows: Vec<_> = [head]
        .into_iter()
        .chain(granules.iter().enumerate().map(row))
        .collect();
    table(&rows)
}

fn by_region(statistics: &Statistics) -> String {
    let head = [
        "REGION",
        "POPULATED",
        "UNTAGGED",
        "ONE TAG",
        "SEVERAL",
        "HOLES",
        "TAGGED",
    ];
    let rows = statistics.regions.iter().map(|region| {
        let counts = &region.counts;
        [
            format!("{:#x}", region.start),
            count(counts.populated()),
            count(counts.untagged),
            count(counts.uniform),
            count(counts.mixed),
            count(counts.holes),
            bytes(counts.tagged_bytes()),
        ]
    });
    let rows: Vec<_> = [head.map(String::from)].into_iter().chain(rows).collect();
    table(&rows)
}
