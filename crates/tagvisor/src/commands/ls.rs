//! `tagvisor ls`: the machines that run.

use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Args as ClapArgs;
use serde::Serialize;

use super::machine::{Error, Machine};
use super::text::{bytes, printable, table};
use crate::api::client;
use crate::control::VmState;
use crate::name::{self, Running};

/// For how long a machine is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// How to say it.
#[derive(ClapArgs)]
pub struct Args {
    /// Print JSON, for scripts
    #[arg(long)]
    json: bool,
}

/// A machine that runs.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Line {
    name: String,
    /// Its process.
    pid: Option<i32>,
    /// What there is to say of it, or why there is nothing.
    #[serde(flatten)]
    answer: Answer,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum Answer {
    Heard {
        state: VmState,
        cpus: u32,
        /// In bytes.
        memory: u64,
        mte: Option<String>,
    },
    /// It has no configuration yet.
    Empty {
        state: (),
    },
    Unheard {
        error: String,
    },
}

/// Lists the machines that run.
///
/// # Errors
/// The runtime directory cannot be read, or standard output not written.
pub fn ls(args: &Args) -> super::Result {
    let lines = lines(&name::runtime_directory())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&lines)?);
    } else {
        print!("{}", in_words(&lines));
    }
    Ok(ExitCode::SUCCESS)
}

fn lines(runtime: &Path) -> Result<Vec<Line>, Error> {
    let machines = Running::all(runtime)?;
    // At once, so that several that are silent take no longer than one.
    Ok(thread::scope(|scope| {
        let asked: Vec<_> = machines
            .into_iter()
            .map(|running| scope.spawn(|| line(running)))
            .collect();
        asked
            .into_iter()
            .filter_map(|line| line.join().ok())
            .collect()
    }))
}

fn line(running: Running) -> Line {
    let pid = running.process();
    let machine = Machine::from(running);
    let info = machine.client.clone().patient(PATIENCE).info();
    Line {
        name: machine.name,
        pid,
        answer: match info {
            Ok(info) => Answer::Heard {
                state: info.state,
                cpus: info.config.cpus.boot_vcpus,
                memory: info.memory_actual_size,
                mte: info.mte,
            },
            Err(client::Error::Refused { status: 404, .. }) => Answer::Empty { state: () },
            Err(e) => Answer::Unheard {
                error: e.to_string(),
            },
        },
    }
}

fn in_words(lines: &[Line]) -> String {
    if lines.is_empty() {
        return "no machine runs\n".into();
    }
    let head = ["NAME", "PID", "STATE", "CPUS", "MEMORY", "MTE"].map(String::from);
    let rows = lines.iter().map(|line| {
        let pid = line.pid.map(|pid| pid.to_string()).unwrap_or_default();
        let [state, cpus, memory, mte] = match &line.answer {
            Answer::Heard {
                state,
                cpus,
                memory,
                mte,
            } => [
                format!("{state:?}"),
                cpus.to_string(),
                bytes(*memory),
                mte.as_deref().map_or("off".into(), printable),
            ],
            Answer::Empty { .. } => ["no VM", "", "", ""].map(String::from),
            Answer::Unheard { .. } => ["does not answer", "", "", ""].map(String::from),
        };
        [line.name.clone(), pid, state, cpus, memory, mte]
    });
    table(&[head].into_iter().chain(rows).collect::<Vec<_>>())
}
