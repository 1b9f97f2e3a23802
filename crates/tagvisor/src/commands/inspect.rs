//! `tagvisor snapshot inspect`: what is in a snapshot, every checksum of which is verified.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args as ClapArgs;
use serde::Serialize;
use stream::{Metadata, StateSummary, Summary};

use super::text::{bytes, count, printable, table};

/// Bytes read at once.
const READ_SIZE: usize = 1 << 20;

/// Which file, and how to say it.
#[derive(ClapArgs)]
pub struct Args {
    /// A snapshot
    file: PathBuf,
    /// Print JSON, for scripts
    #[arg(long)]
    json: bool,
}

/// Why a file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be opened.
    #[error("snapshot {file}: {source}")]
    Open {
        /// Which.
        file: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It is not a sound snapshot.
    #[error("snapshot {file}: {source}")]
    Unsound {
        /// Which.
        file: PathBuf,
        /// The first thing that is wrong.
        source: stream::Error,
    },
}

/// What is in a snapshot.
#[derive(Serialize)]
struct Contents {
    /// What a snapshot based on this one names.
    identity: String,
    /// The identity of the snapshot that this one is based on.
    base: Option<String>,
    /// Whether its pages have tags.
    tags: bool,
    /// Of the file.
    bytes: u64,
    chunks: u64,
    pages: Pages,
    /// Pages that were never populated, or no longer are.
    holes: u64,
    /// Bytes of pages' numbers and tags, coded.
    metadata_bytes: u64,
    /// Bytes of pages' data, coded.
    data_bytes: u64,
    index_bytes: u64,
    states: Vec<SavedState>,
}

/// Pages written, each as often as it was.
#[derive(Serialize)]
struct Pages {
    all: u64,
    /// Those that were written again later.
    replaced: u64,
    /// Those whose data are zeros.
    zero: u64,
    /// Those whose tags are all 0.
    untagged: u64,
    /// Those with one tag other than 0.
    uniform: u64,
    /// Those with several tags.
    mixed: u64,
}

#[derive(Serialize)]
struct SavedState {
    name: String,
    version: u32,
    bytes: usize,
}

impl From<StateSummary> for SavedState {
    fn from(state: StateSummary) -> Self {
        Self {
            name: state.name,
            version: state.version,
            bytes: state.bytes,
        }
    }
}

impl From<Summary> for Contents {
    fn from(summary: Summary) -> Self {
        Self {
            identity: summary.identity.to_string(),
            base: summary.header.base.map(|base| base.to_string()),
            tags: summary.header.metadata == Metadata::ArmMte,
            bytes: summary.bytes,
            chunks: summary.chunks,
            pages: Pages {
                all: summary.pages,
                replaced: summary.replaced,
                zero: summary.zero_pages,
                untagged: summary.untagged_pages,
                uniform: summary.uniform_pages,
                mixed: summary.mixed_pages,
            },
            holes: summary.holes,
            metadata_bytes: summary.metadata_bytes,
            data_bytes: summary.data_bytes,
            index_bytes: summary.index_bytes,
            states: summary.states.into_iter().map(SavedState::from).collect(),
        }
    }
}

/// Says what is in a snapshot.
///
/// # Errors
/// See [`Error`]; standard output cannot be written.
pub fn inspect(args: &Args) -> super::Result {
    let contents = read(&args.file)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&contents)?);
    } else {
        print!("{}", in_words(&contents));
    }
    Ok(ExitCode::SUCCESS)
}

fn read(file: &PathBuf) -> Result<Contents, Error> {
    let opened = File::open(file).map_err(|source| Error::Open {
        file: file.clone(),
        source,
    })?;
    let summary = stream::inspect(BufReader::with_capacity(READ_SIZE, opened));
    summary
        .map(Contents::from)
        .map_err(|source| Error::Unsound {
            file: file.clone(),
            source,
        })
}

fn in_words(contents: &Contents) -> String {
    let pages = &contents.pages;
    let mut rows = vec![
        ["identity".into(), contents.identity.clone()],
        [
            "base".into(),
            contents
                .base
                .clone()
                .unwrap_or_else(|| "none: it is complete".into()),
        ],
        ["size".into(), bytes(contents.bytes)],
        ["chunks".into(), count(contents.chunks)],
        ["pages".into(), count(pages.all)],
        ["  replaced later".into(), count(pages.replaced)],
        ["  of zeros".into(), count(pages.zero)],
    ];
    if contents.tags {
        rows.extend([
            ["  without tags".into(), count(pages.untagged)],
            ["  of one tag".into(), count(pages.uniform)],
            ["  of several tags".into(), count(pages.mixed)],
        ]);
    } else {
        rows.push(["tags".into(), "none: the guest had no MTE".into()]);
    }
    rows.extend([
        ["holes".into(), format!("{} pages", count(contents.holes))],
        ["data".into(), bytes(contents.data_bytes)],
        ["numbers and tags".into(), bytes(contents.metadata_bytes)],
        ["index".into(), bytes(contents.index_bytes)],
        ["states".into(), count(contents.states.len() as u64)],
    ]);
    rows.extend(contents.states.iter().map(|state| {
        let name = printable(&state.name);
        let what = format!("version {}, {}", state.version, bytes(state.bytes as u64));
        [format!("  {name}"), what]
    }));
    table(&rows) + "every checksum is right\n"
}
