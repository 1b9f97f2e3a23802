//! `tagvisor core`: a machine as an ELF core.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args as ClapArgs;
use inspect::core::{Summary, Vmcoreinfo, save};

use super::target::TargetArgs;
use super::text::{bytes, count};

/// Which machine, and which file.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    target: TargetArgs,
    /// The file to write; an older one is replaced when the new one is complete
    file: PathBuf,
    /// Print JSON, for scripts
    #[arg(long)]
    json: bool,
}

/// Writes a core.
///
/// # Errors
/// The snapshot is damaged, the machine cannot be looked at, or the file cannot be written.
pub fn core(args: &Args) -> super::Result {
    let mut target = args.target.open()?;
    let summary = save(&mut *target.memory(), &args.file)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        println!("{}: {}", args.file.display(), in_words(&summary));
    }
    Ok(ExitCode::SUCCESS)
}

fn in_words(summary: &Summary) -> String {
    let tags = if summary.tags { "with" } else { "without" };
    let vmcoreinfo = match summary.vmcoreinfo {
        Vmcoreinfo::Found => "with the guest's VMCOREINFO",
        Vmcoreinfo::Missing => "without VMCOREINFO, which the guest does not have",
        Vmcoreinfo::Ambiguous => {
            "without VMCOREINFO, as the guest's memory has several that differ"
        }
    };
    format!(
        "{} pages in {} segments {tags} tags, {} vCPUs, {vmcoreinfo}; {} with the holes of the file",
        count(summary.pages),
        count(summary.segments as u64),
        summary.vcpus,
        bytes(summary.bytes)
    )
}
