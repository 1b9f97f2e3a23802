//! `tagvisor snapshot`: writes a machine to a file while it runs, or says what is in such a file.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;

use clap::{Args as ClapArgs, Subcommand};

use super::machine::{Error, Machine};
use super::text::{bytes, count, microseconds};
use super::{absolute, inspect, progress};
use crate::api::model::{SnapshotConfig, parse_compression};
use crate::control::SnapshotReport;

const NAMED_INSPECT: &str = "\
A machine called `inspect` is reached by its socket's path, as every machine is: RUNTIME_DIRECTORY/inspect/api.sock,
or behind two dashes: `tagvisor snapshot -- inspect FILE`.";

/// What to write, or which file to look at.
#[derive(ClapArgs)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, arg_required_else_help = true, after_help = NAMED_INSPECT)]
pub struct Args {
    #[command(subcommand)]
    look: Option<Look>,
    #[command(flatten)]
    write: Option<Write>,
}

#[derive(Subcommand)]
enum Look {
    /// Says what is in a snapshot, and verifies every checksum in it.
    Inspect(inspect::Args),
}

/// What to write.
#[derive(ClapArgs)]
struct Write {
    /// The machine's name, or the path of a control socket: whatever contains a `/`
    name: String,
    /// The file to write; an older one is replaced when the new one is complete
    file: PathBuf,
    /// Write only what changed since this snapshot
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
    /// How to make data smaller: none, lz4, zstd or zstd:LEVEL (1 to 22) [default: lz4]
    #[arg(long, value_name = "METHOD", value_parser = check_compression)]
    compress: Option<String>,
    /// Print JSON, for scripts
    #[arg(long)]
    json: bool,
}

/// That a text names a compression.
///
/// # Errors
/// It does not.
pub fn check_compression(text: &str) -> Result<String, String> {
    parse_compression(text).map(|_| text.to_owned())
}

/// Writes a snapshot, or looks at one.
///
/// # Errors
/// It was not written; what is wrong with it.
pub fn snapshot(args: Args) -> super::Result {
    match (args.look, args.write) {
        (Some(Look::Inspect(args)), _) => inspect::inspect(&args),
        (None, Some(write)) => take(&write),
        (None, None) => Err("give a machine's name and a file, or `inspect` and a file".into()),
    }
}

fn take(args: &Write) -> super::Result {
    let machine = Machine::find(&args.name)?;
    let config = SnapshotConfig {
        destination_url: url(&args.file)?,
        base: args.base.as_deref().map(url).transpose()?,
        compression: args.compress.clone(),
        report: true,
    };
    let report = watched(&machine, &config)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{}: {}", args.file.display(), in_words(&report));
    }
    Ok(ExitCode::SUCCESS)
}

fn url(path: &Path) -> Result<String, Box<dyn std::error::Error>> {
    Ok(format!("file://{}", absolute(path)?))
}

fn watched(machine: &Machine, config: &SnapshotConfig) -> Result<SnapshotReport, Error> {
    let (send, done) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            // Nobody else sends, and the receiver waits for this.
            let _ = send.send(machine.ask(|client| client.snapshot(config)));
        });
        progress::watch(&machine.client, &done).expect("the thread above sends before it ends")
    })
}

fn in_words(report: &SnapshotReport) -> String {
    let blackout = match report.blackout_us {
        0 => "the guest was paused".into(),
        us => format!("the guest stood still for {}", microseconds(us)),
    };
    format!(
        "{} in {}, {} pages in {} rounds, {blackout}\nidentity {}",
        bytes(report.bytes),
        microseconds(report.total_us),
        count(report.pages),
        report.rounds,
        report.identity,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::serve;
    use crate::api::tests::double::{Double, report};
    use crate::control::Refusal;

    fn config() -> SnapshotConfig {
        SnapshotConfig {
            destination_url: "file:///n/a".into(),
            base: None,
            compression: Some("zstd:3".into()),
            report: true,
        }
    }

    #[test]
    fn a_snapshot_is_asked_for_and_reported() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        let _server = serve(&socket, Double::running()).unwrap();
        let machine = Machine::find(socket.to_str().unwrap()).unwrap();

        let written = watched(&machine, &config()).unwrap();

        assert_eq!(written, report());
        assert_eq!(
            in_words(&written),
            "1.00 MiB in 41.0 ms, 300 pages in 3 rounds, the guest stood still for 900 µs\nidentity 00ff-01"
        );
    }

    #[test]
    fn a_snapshot_that_fails_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        let vmm = Double::running();
        vmm.refuse(Refusal::Failed("the disk is full".into()));
        let _server = serve(&socket, vmm).unwrap();
        let machine = Machine::find(socket.to_str().unwrap()).unwrap();

        let error = watched(&machine, &config()).unwrap_err().to_string();

        assert!(
            error.ends_with("The VM could not be snapshotted: the disk is full"),
            "{error}"
        );
    }
}
