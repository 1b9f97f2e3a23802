//! `cargo xtask bench`: the scripts of `benches`, each in a host of its own, as its header wants it.

use anyhow::{Result, bail};
use clap::Args;

use crate::lab::{Lab, copy_folder};
use crate::machine::{Input, Outcome};
use crate::ports;
use crate::progress::say;
use crate::script::{self, Script};

/// Which benchmarks to run
#[derive(Args)]
pub struct Arguments {
    /// A benchmark, or what comes before the dash in the names of several; all if there is none
    name: Option<String>,
}

/// Runs the benchmarks; the status is 1 if any failed.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let workspace = crate::compile::Workspace::open()?;
    let folder = workspace.workspace_root.join("benches");
    let scripts = chosen(script::in_folder(&folder)?, arguments.name.as_deref())?;
    let lab = Lab::open(true)?;
    let mut failed = 0;
    for script in &scripts {
        say(&format!("benchmark {}", script.name));
        let (out, err) = (
            ports::sink(std::io::stdout()),
            ports::sink(std::io::stderr()),
        );
        let mut host = lab.boot(&script.wants.host, Input::Nothing, out, err, |lab| {
            copy_folder(&folder, &lab.join("benches"))
        })?;
        let job = format!("cd /tmp\nexec bash /lab/benches/{}.sh\n", script.name);
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
    Ok(u8::from(failed > 0))
}

fn chosen(mut scripts: Vec<Script>, name: Option<&str>) -> Result<Vec<Script>> {
    let Some(name) = name else { return Ok(scripts) };
    let names: Vec<String> = scripts.iter().map(|script| script.name.clone()).collect();
    let is_meant = |script: &Script| {
        let rest = script.name.strip_prefix(name);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    scripts.retain(is_meant);
    if scripts.is_empty() {
        bail!(
            "there is no benchmark '{name}'; there are: {}",
            names.join(", ")
        );
    }
    Ok(scripts)
}
