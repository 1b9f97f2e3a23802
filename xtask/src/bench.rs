//! `cargo xtask bench`: native programs, and the scripts of `benches`, each in a host of its own, as
//! its header wants it.

use std::num::NonZeroU16;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use clap::Args;

use crate::command;
use crate::compile::{Profile, Workspace};
use crate::lab::{Lab, copy_folder};
use crate::machine::{Input, Outcome};
use crate::ports;
use crate::progress::say;
use crate::script::{self, Script};

/// Which benchmarks to run
#[derive(Args)]
pub struct Arguments {
    /// How often those in the lab that repeat what they measure do so [default: what they hold enough]
    #[arg(long, value_name = "N")]
    rounds: Option<NonZeroU16>,
    /// A benchmark, or what comes before the dash in the names of several; all if there is none
    name: Option<String>,
}

/// Benchmarks that need no lab, with what cargo is to do. That of the codec stands outside the
/// workspace, so that what it compares with is not for the other programs.
const NATIVE: &[Native] = &[
    Native {
        name: "codec",
        cargo: &[
            "run",
            "--release",
            "--manifest-path",
            "crates/tagcodec/bench/Cargo.toml",
        ],
    },
    Native {
        name: "faults-model",
        cargo: &["bench", "-p", "benches", "--bench", "page_state"],
    },
    Native {
        name: "inspect",
        cargo: &[
            "run",
            "--release",
            "-p",
            "benches",
            "--bin",
            "bench-inspect",
        ],
    },
    Native {
        name: "migration-native",
        cargo: &["bench", "-p", "migration", "--bench", "throughput"],
    },
];

struct Native {
    name: &'static str,
    cargo: &'static [&'static str],
}

/// Runs the benchmarks; the status is 1 if any failed.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let workspace = Workspace::open()?;
    let folder = workspace.workspace_root.join("benches");
    let (native, scripts) = chosen(script::in_folder(&folder)?, arguments.name.as_deref())?;
    let mut failed = 0;
    for benchmark in native {
        say(&format!("benchmark {}", benchmark.name));
        failed += u8::from(!benchmark.passes(&workspace)?);
    }
    let in_lab = if scripts.is_empty() {
        0
    } else {
        in_lab(&folder, &scripts, arguments.rounds)?
    };
    Ok(u8::from(failed + in_lab > 0))
}

impl Native {
    fn passes(&self, workspace: &Workspace) -> Result<bool> {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(self.cargo).arg("--quiet");
        cargo.current_dir(&workspace.workspace_root);
        cargo
            .arg("--target-dir")
            .arg(workspace.target_directory.join("bench"));
        command::passes(&mut cargo)
    }
}

/// Runs scripts, each in a host of its own. Returns how many failed.
fn in_lab(folder: &Path, scripts: &[Script], rounds: Option<NonZeroU16>) -> Result<u8> {
    let lab = Lab::open(Profile::Release, true)?;
    let rounds = rounds.map(|rounds| format!("export ROUNDS={rounds}\n"));
    let rounds = rounds.as_deref().unwrap_or_default();
    let mut failed = 0;
    for script in scripts {
        say(&format!("benchmark {}", script.name));
        let (out, err) = (
            ports::sink(std::io::stdout()),
            ports::sink(std::io::stderr()),
        );
        let mut host = lab.boot(&script.wants.host, Input::Nothing, out, err, |lab| {
            copy_folder(folder, &lab.join("benches"))
        })?;
        let job = format!(
            "{rounds}cd /tmp\nexec bash /lab/benches/{}.sh\n",
            script.name
        );
        match host.machine.run(&job, Some(script.wants.limit))? {
            Outcome::Exit(0) => {}
            Outcome::Exit(status) => {
                say(&format!(
                    "benchmark {} failed with status {status}",
                    script.name
                ));
                failed += 1;
            }
            Outcome::TimedOut => {
                say(&format!(
                    "benchmark {} took longer than {} s",
                    script.name,
                    script.wants.limit.as_secs()
                ));
                failed += 1;
            }
            Outcome::ReaderGone => return Ok(1),
        }
    }
    Ok(failed)
}

type Chosen = (Vec<&'static Native>, Vec<Script>);

fn chosen(mut scripts: Vec<Script>, name: Option<&str>) -> Result<Chosen> {
    let mut native: Vec<_> = NATIVE.iter().collect();
    let Some(name) = name else {
        return Ok((native, scripts));
    };
    let native_names = native.iter().map(|native| native.name);
    let names: Vec<String> = native_names
        .chain(scripts.iter().map(|script| script.name.as_str()))
        .map(str::to_owned)
        .collect();
    native.retain(|native| is_meant(native.name, name));
    scripts.retain(|script| is_meant(&script.name, name));
    if native.is_empty() && scripts.is_empty() {
        bail!(
            "there is no benchmark '{name}'; there are: {}",
            names.join(", ")
        );
    }
    Ok((native, scripts))
}

/// Whether the user, who says `asked`, means the benchmark `name`.
fn is_meant(name: &str, asked: &str) -> bool {
    let rest = name.strip_prefix(asked);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_before_the_dash_means_all_of_the_kind() {
        assert!(is_meant("tags", "tags"));
        assert!(is_meant("tags-scaling", "tags"));
        assert!(!is_meant("tags", "tags-scaling"));
        assert!(!is_meant("tagsoup", "tags"));
    }
}
