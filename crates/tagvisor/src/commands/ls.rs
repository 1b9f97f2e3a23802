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

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    use super::*;
    use crate::api::serve;
    use crate::api::tests::double::Double;

    /// Makes a machine's directory, and holds its lock.
    fn held(runtime: &tempfile::TempDir, name: &str) -> File {
        let directory = runtime.path().join(name);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("lock"), "4711\n").unwrap();
        let lock = File::open(directory.join("lock")).unwrap();
        lock.lock().unwrap();
        lock
    }

    #[test]
    fn those_that_run_are_listed_and_what_killed_ones_left_is_not() {
        let runtime = tempfile::tempdir().unwrap();
        let _locks = [held(&runtime, "web"), held(&runtime, "empty")];
        drop(held(&runtime, "stale"));
        fs::create_dir(runtime.path().join(".hidden")).unwrap();
        fs::write(runtime.path().join("file"), "").unwrap();
        let _web = serve(&runtime.path().join("web/api.sock"), Double::running()).unwrap();
        let empty = std::sync::Arc::<Double>::default();
        let _empty = serve(&runtime.path().join("empty/api.sock"), empty).unwrap();

        let listed = in_words(&lines(runtime.path()).unwrap());

        assert_eq!(
            listed,
            "NAME   PID   STATE    CPUS  MEMORY      MTE\n\
             empty  4711  no VM\n\
             web    4711  Running  2     512.00 MiB  MTE3\n"
        );
    }

    #[test]
    fn machines_that_do_not_answer_are_listed_as_such_after_a_second() {
        let runtime = tempfile::tempdir().unwrap();
        let names = ["a", "b", "c"];
        let _locks = names.map(|name| held(&runtime, name));
        let _deaf = names
            .map(|name| UnixListener::bind(runtime.path().join(name).join("api.sock")).unwrap());

        let started = Instant::now();
        let lines = lines(runtime.path()).unwrap();

        assert!(started.elapsed() < 3 * PATIENCE, "{:?}", started.elapsed());
        assert_eq!(in_words(&lines).matches("does not answer").count(), 3);
    }

    #[test]
    fn json_has_state_or_error_of_each() {
        let runtime = tempfile::tempdir().unwrap();
        let _locks = [held(&runtime, "mute"), held(&runtime, "web")];
        let _web = serve(&runtime.path().join("web/api.sock"), Double::running()).unwrap();

        let json = serde_json::to_value(lines(runtime.path()).unwrap()).unwrap();

        assert_eq!(json[0]["name"], "mute");
        assert!(
            json[0]["error"]
                .as_str()
                .unwrap()
                .starts_with("no VMM listens at")
        );
        assert_eq!(json[1]["state"], "Running");
        assert_eq!(json[1]["memory"], 512 << 20);
    }

    #[test]
    fn a_runtime_directory_that_was_never_made_has_no_machines() {
        let lines = lines(Path::new("/nonexistent/tagvisor")).unwrap();
        assert_eq!(in_words(&lines), "no machine runs\n");
    }
}
