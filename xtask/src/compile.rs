//! Builds what runs in the lab: `tagvisor`, `conformance`, `peer`, the programs of `benches` and `tests`, and the workspace's
//! members under `guest/`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::command;
use crate::flat;
use crate::toolchain::{TARGET, Toolchain};

/// A program for the lab.
pub struct Program {
    /// Its name on the host's search path.
    pub name: String,
    pub path: PathBuf,
    /// What runs it.
    pub runs: Runs,
}

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Runs {
    /// In the host.
    Host,
    /// In a guest's Linux, and in the host for those who want that.
    Guest,
    /// On a guest's bare machine: a flat image.
    Bare,
}

/// How programs for Linux are built. Those for bare machines, where nothing can unwind, are always as released.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Profile {
    /// Quick to build: for tests.
    Lab,
    /// What users get: for figures.
    Release,
}

impl Profile {
    /// Cargo's name for it.
    fn name(self) -> &'static str {
        match self {
            Self::Lab => "lab",
            Self::Release => "release",
        }
    }

    /// That of a program, if this is that of programs for Linux.
    fn of(self, runs: Runs) -> Self {
        match runs {
            Runs::Host | Runs::Guest => self,
            Runs::Bare => Self::Release,
        }
    }
}

/// What this workspace is, from cargo.
#[derive(Deserialize)]
pub struct Workspace {
    pub workspace_root: PathBuf,
    pub target_directory: PathBuf,
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    targets: Vec<Target>,
    metadata: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

impl Workspace {
    /// Asks cargo.
    pub fn open() -> Result<Self> {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["metadata", "--no-deps", "--format-version", "1"]);
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        let text = command::output(&mut cargo).context("cannot ask cargo for the workspace")?;
        serde_json::from_str(&text)
            .context("cargo's description of the workspace is not understood")
    }

    /// The packages to build, with where their programs run. Those that are tests have no figures.
    fn wanted(&self, profile: Profile) -> Vec<(&Package, Runs)> {
        let guests = self.workspace_root.join("guest");
        let place = |package: &Package| match package.name.as_str() {
            "tagvisor" | "benches" | "peer" => Some(Runs::Host),
            "conformance" | "lab-tests" => (profile == Profile::Lab).then_some(Runs::Host),
            _ if package.manifest_path.starts_with(&guests) => Some(package.guest_kind()),
            _ => None,
        };
        self.packages
            .iter()
            .filter_map(|package| Some((package, place(package)?)))
            .collect()
    }
}

impl Package {
    fn guest_kind(&self) -> Runs {
        let metadata = self.metadata.as_ref();
        match metadata
            .and_then(|value| value.pointer("/tagvisor/kind"))
            .and_then(|kind| kind.as_str())
        {
            Some("flat") => Runs::Bare,
            _ => Runs::Guest,
        }
    }

    fn programs(&self) -> impl Iterator<Item = &str> {
        self.targets
            .iter()
            .filter(|target| target.kind.iter().any(|kind| kind == "bin"))
            .map(|target| target.name.as_str())
    }
}

/// Builds everything that is out of date and returns all programs.
pub fn build(
    workspace: &Workspace,
    toolchain: &Toolchain,
    profile: Profile,
) -> Result<Vec<Program>> {
    let (bare, linux) = workspace
        .wanted(profile)
        .into_iter()
        .partition(|(_, runs)| *runs == Runs::Bare);
    build_with(workspace, toolchain, profile, linux)?;
    build_with(workspace, toolchain, profile.of(Runs::Bare), bare)?;
    programs(workspace, toolchain, profile)
}

fn build_with(
    workspace: &Workspace,
    toolchain: &Toolchain,
    profile: Profile,
    wanted: Vec<(&Package, Runs)>,
) -> Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    let mut cargo = toolchain.cargo("build");
    cargo
        .args(["--profile", profile.name(), "--bins"])
        .current_dir(&workspace.workspace_root);
    cargo
        .arg("--target-dir")
        .arg(workspace.target_directory.join(toolchain.name));
    for (package, _) in wanted {
        cargo.args(["-p", &package.name]);
    }
    // Cargo's own progress is for a terminal; elsewhere a build that works says nothing.
    if !std::io::stderr().is_terminal() {
        cargo.arg("--quiet");
    }
    if !command::passes(&mut cargo)? {
        bail!("the programs for the lab do not build");
    }
    Ok(())
}

/// The programs as they were last built.
pub fn programs(
    workspace: &Workspace,
    toolchain: &Toolchain,
    profile: Profile,
) -> Result<Vec<Program>> {
    let folder = workspace.target_directory.join(toolchain.name).join(TARGET);
    let mut programs = Vec::new();
    for (package, runs) in workspace.wanted(profile) {
        for name in package.programs() {
            let path = folder.join(profile.of(runs).name()).join(name);
            if path.exists() {
                programs.push(Program {
                    name: name.to_owned(),
                    path,
                    runs,
                });
            }
        }
    }
    Ok(programs)
}

impl Program {
    /// The file's name and content as the lab sees them.
    pub fn content(&self) -> Result<(String, Vec<u8>)> {
        let bytes = std::fs::read(&self.path)
            .with_context(|| format!("cannot read {}", self.path.display()))?;
        if self.runs != Runs::Bare {
            return Ok((self.name.clone(), bytes));
        }
        let image = flat::from_elf(&bytes)
            .with_context(|| format!("cannot flatten {}", self.path.display()))?;
        Ok((format!("{}.bin", self.name), image))
    }
}
