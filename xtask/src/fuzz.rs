//! `cargo xtask fuzz`: the fuzz targets of the crates, each crate's in a workspace of its own,
//! `crates/<crate>/fuzz`, laid out as cargo-fuzz wants it. Here they are built with the installed
//! compiler, stable or not: LLVM's coverage instrumentation needs flags of the compiler alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::command;
use crate::compile::Workspace;
use crate::progress::say;

/// What libFuzzer needs of the compiler, as cargo-fuzz passes it.
const INSTRUMENTATION: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1";

/// Which target to fuzz, and how long
#[derive(Args)]
pub struct Arguments {
    /// A fuzz target; without one the targets are listed
    target: Option<String>,
    /// How many cases to run
    #[arg(long, default_value_t = 1_000_000)]
    cases: u64,
}

/// Runs a target; the status is 1 if it found something. Cases that reached new code are kept in
/// the crate's `fuzz/corpus`, findings in `fuzz/artifacts`.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let workspace = Workspace::open()?;
    let targets = targets(&workspace.workspace_root.join("crates"))?;
    let Some(name) = &arguments.target else {
        targets
            .iter()
            .for_each(|target| println!("{}", target.name));
        return Ok(0);
    };
    let Some(target) = targets.iter().find(|target| target.name == *name) else {
        let names: Vec<_> = targets.iter().map(|target| target.name.as_str()).collect();
        bail!(
            "there is no fuzz target '{name}'; there are: {}",
            names.join(", ")
        );
    };
    let corpus = target.folder.join("corpus").join(name);
    let artifacts = target.folder.join("artifacts").join(name);
    for folder in [&corpus, &artifacts] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    say(&format!("fuzzing {name}: {} cases", arguments.cases));
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // With a target named, the flags are not for build scripts.
    cargo
        .args([
            "run",
            "--release",
            "--quiet",
            "--target",
            &host()?,
            "--bin",
            name,
        ])
        .arg("--manifest-path")
        .arg(target.folder.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(workspace.target_directory.join("fuzz"))
        .env("RUSTFLAGS", INSTRUMENTATION)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .arg("--")
        .arg(format!("-runs={}", arguments.cases))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-max_len=4096", "-print_final_stats=1"])
        .arg(&corpus);
    Ok(u8::from(!command::passes(&mut cargo)?))
}

/// A fuzz target and the package it is in.
struct Target {
    name: String,
    folder: PathBuf,
}

/// The fuzz targets under `crates`: what the manifests of `*/fuzz` name as programs.
fn targets(crates: &Path) -> Result<Vec<Target>> {
    let mut targets = Vec::new();
    for entry in
        fs::read_dir(crates).with_context(|| format!("cannot read {}", crates.display()))?
    {
        let folder = entry?.path().join("fuzz");
        let Ok(manifest) = fs::read_to_string(folder.join("Cargo.toml")) else {
            continue;
        };
        let programs = manifest.split("[[bin]]").skip(1);
        targets.extend(programs.filter_map(|program| {
            let name = program
                .split_once("name = \"")?
                .1
                .split_once('"')?
                .0
                .to_owned();
            Some(Target {
                name,
                folder: folder.clone(),
            })
        }));
    }
    targets.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(targets)
}

fn host() -> Result<String> {
    let about = command::output(Command::new("rustc").arg("-vV"))?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host
        .context("rustc does not say what it runs on")?
        .to_owned())
}
