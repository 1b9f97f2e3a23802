//! `cargo xtask demo`: `demo/demo.sh`, in the lab's host, or on this machine if it is itself an
//! arm64 host whose KVM gives guests MTE.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;
use crate::compile::Profile;
use crate::folder::RunFolder;
use crate::lab::{Lab, copy_folder};
use crate::machine::{Input, Outcome};
use crate::progress::say;
use crate::{ports, script};

/// Runs the demo and returns its exit status.
pub fn run() -> Result<u8> {
    let lab = Lab::open(Profile::Lab, true)?;
    let folder = lab.workspace.workspace_root.join("demo");
    let prepare = |lab: &Path| copy_folder(&folder, &lab.join("demo"));
    let wants = script::read(&folder.join("demo.sh"))?.wants;
    if has_mte_guests(&lab) {
        say("this machine gives guests MTE: no emulation is needed");
        return run_here(&lab, prepare);
    }
    let (out, err) = (
        ports::sink(std::io::stdout()),
        ports::sink(std::io::stderr()),
    );
    let mut host = lab.boot(&wants.host, Input::Nothing, out, err, prepare)?;
    match host
        .machine
        .run("cd /tmp\nexec bash /lab/demo/demo.sh\n", Some(wants.limit))?
    {
        Outcome::Exit(status) => Ok(status),
        Outcome::ReaderGone => Ok(1),
        Outcome::TimedOut => {
            say(&format!(
                "the demo took longer than {} s",
                wants.limit.as_secs()
            ));
            Ok(1)
        }
    }
}

/// Whether `tagvisor check` finds on this very machine all that the demo needs.
fn has_mte_guests(lab: &Lab) -> bool {
    if std::env::consts::ARCH != "aarch64" || !Path::new("/dev/kvm").exists() {
        return false;
    }
    let Some(tagvisor) = lab.program("tagvisor") else {
        return false;
    };
    let report = command::output(Command::new(tagvisor).args(["check", "--json"]));
    report.is_ok_and(|report| offers_mte(&report))
}

/// Whether a report of `tagvisor check --json` says that guests can have MTE.
fn offers_mte(report: &str) -> bool {
    let Ok(report) = serde_json::from_str::<serde_json::Value>(report) else {
        return false;
    };
    report
        .pointer("/mte_guests")
        .and_then(serde_json::Value::as_bool)
        == Some(true)
}

fn run_here(lab: &Lab, prepare: impl FnOnce(&Path) -> Result<()>) -> Result<u8> {
    let folder = RunFolder::create()?;
    let place = folder.path().join("lab");
    lab.fill(&place)?;
    prepare(&place)?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut demo = Command::new("bash");
    demo.arg(place.join("demo/demo.sh"))
        .env("LAB", &place)
        .env("PATH", format!("{}:{path}", place.join("bin").display()));
    let mut child = demo.spawn().context("cannot run bash")?;
    let status = command::wait(&mut child)?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_report_that_says_so_offers_mte() {
        assert!(offers_mte(r#"{"mte_guests": true, "findings": []}"#));
        assert!(!offers_mte(r#"{"mte_guests": false}"#));
        assert!(!offers_mte("no report"));
    }
}
