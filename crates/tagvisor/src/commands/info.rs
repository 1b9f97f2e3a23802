//! `tagvisor info`: one machine as it is.

use std::process::ExitCode;

use clap::Args as ClapArgs;

use super::Named;
use super::text::{bytes, count, printable, table};
use crate::api::model::VmInfo;

/// Which machine, and how to say it.
#[derive(ClapArgs)]
pub struct Args {
    #[command(flatten)]
    named: Named,
    /// Print JSON, as the socket's `vm.info` answers
    #[arg(long)]
    json: bool,
}

/// Says what a machine is and does.
///
/// # Errors
/// It does not answer, or standard output cannot be written.
pub fn info(args: &Args) -> super::Result {
    let info = args.named.machine()?.ask(|client| client.info())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&info)?);
    } else {
        print!("{}", in_words(&info));
    }
    Ok(ExitCode::SUCCESS)
}

fn in_words(info: &VmInfo) -> String {
    let mut rows = vec![
        ["state", &format!("{:?}", info.state)].map(String::from),
        ["cpus", &info.config.cpus.boot_vcpus.to_string()].map(String::from),
        ["memory".into(), bytes(info.memory_actual_size)],
        [
            "mte".into(),
            info.mte.as_deref().map_or("off".into(), printable),
        ],
    ];
    if let Some(name) = &info.config.name {
        rows.insert(0, ["name".into(), printable(name)]);
    }
    if let Some(reason) = &info.reason {
        rows.push(["paused because".into(), printable(reason)]);
    }
    if let Some(work) = &info.work {
        let so_far = format!(
            "{}: {} of {} pages, {}",
            printable(&work.what),
            count(work.pages_done),
            count(work.pages_total),
            bytes(work.bytes)
        );
        rows.push(["work".into(), so_far]);
        if let Some(migration) = &work.migration {
            let figures = format!(
                "round {}, {} of tags, {} pages/s, {} changed/s, slowed down by {} %{}",
                migration.round,
                bytes(migration.tag_bytes),
                count(migration.pages_per_second),
                count(migration.changes_per_second),
                migration.slowed,
                if migration.post_copy {
                    ", post-copy"
                } else {
                    ""
                },
            );
            rows.push(["".into(), figures]);
        }
    }
    table(&rows)
}
