//! Rust for aarch64, from one of two places: the toolchain manager where it has the target or can
//! fetch it, else Debian's packages, unpacked into the cache. `TAGVISOR_TOOLCHAIN` set to `rustup`
//! or `debian` chooses. On an arm64 machine the native toolchain does.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::command;
use crate::debian::{self, Tree};
use crate::progress::Step;
use crate::tools;

/// The target of all that runs in the lab.
pub const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
/// What a static program is linked with.
const CROSS_LIBC: &str = "/usr/aarch64-linux-gnu/lib/libc.a";

/// How to compile for [`TARGET`].
pub struct Toolchain {
    /// The compiler to give to cargo; `None` for cargo's own choice.
    rustc: Option<PathBuf>,
    /// Tells apart what different compilers have built.
    pub name: &'static str,
}

impl Toolchain {
    /// Finds a toolchain, setting it up if need be.
    pub fn open(cache: &Cache) -> Result<Self> {
        if debian::architecture()? != "arm64" {
            let present = command::exists(LINKER) && Path::new(CROSS_LIBC).exists();
            debian::require(present, "gcc-aarch64-linux-gnu libc6-dev-arm64-cross")?;
        }
        let choice = std::env::var("TAGVISOR_TOOLCHAIN").ok();
        match choice.as_deref() {
            Some("rustup") => {
                rustup_target().context("TAGVISOR_TOOLCHAIN=rustup")?;
                Ok(Self::rustup())
            }
            Some("debian") => Self::debian(cache),
            Some(other) => bail!("TAGVISOR_TOOLCHAIN is '{other}': it can be 'rustup' or 'debian'"),
            None if rustup_target().is_ok() => Ok(Self::rustup()),
            None => Self::debian(cache),
        }
    }

    /// Cargo set up to build static programs for [`TARGET`].
    pub fn cargo(&self, subcommand: &str) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.arg(subcommand).args(["--target", TARGET]);
        let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
        command.env(
            "RUSTFLAGS",
            format!("{flags} -C target-feature=+crt-static").trim(),
        );
        command.env_remove("CARGO_ENCODED_RUSTFLAGS");
        if std::env::consts::ARCH != "aarch64" {
            command.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER);
        }
        if let Some(rustc) = &self.rustc {
            command.env("RUSTC", rustc);
        }
        command
    }

    fn rustup() -> Self {
        Self {
            rustc: None,
            name: "lab",
        }
    }

    fn debian(cache: &Cache) -> Result<Self> {
        let native = debian::architecture()?;
        let both = format!("{native},arm64");
        let tree = Tree {
            name: "rust",
            suite: "bookworm",
            architectures: if native == "arm64" { native } else { &both },
            packages: "rustc-web libstd-rust-web-dev:arm64",
            security: true,
            revision: 3,
        };
        let root = debian::tree(cache, &tree, write_wrapper)?;
        Ok(Self {
            rustc: Some(root.join("rustc")),
            name: "lab-debian",
        })
    }
}

/// Whether the toolchain in use has the target, after asking the toolchain manager for it.
fn rustup_target() -> Result<()> {
    if has_target() {
        return Ok(());
    }
    if !command::exists("rustup") {
        bail!("rustc has no {TARGET} and there is no rustup to add it");
    }
    let step = Step::start(&format!("adding {TARGET} with rustup"));
    command::output(Command::new("rustup").args(["target", "add", TARGET]))?;
    step.done();
    if has_target() {
        Ok(())
    } else {
        bail!("rustup added {TARGET}, but rustc does not see it")
    }
}

fn has_target() -> bool {
    let mut rustc = Command::new("rustc");
    rustc.args(["--print", "target-libdir", "--target", TARGET]);
    let Ok(folder) = command::output(&mut rustc) else {
        return false;
    };
    let Ok(mut files) = fs::read_dir(folder.trim()) else {
        return false;
    };
    files.any(|file| {
        file.is_ok_and(|file| file.file_name().to_string_lossy().starts_with("libstd-"))
    })
}

/// Writes `rustc` into `root`: a script that runs the tree's compiler by the tree's own loader. It
/// finds its root from its own place, for the folder is renamed when it is whole.
fn write_wrapper(root: &Path) -> Result<()> {
    let relative = |path: &Path| -> Result<String> {
        let path = path
            .strip_prefix(root)
            .context("a file is outside its tree")?;
        Ok(format!("$root/{}", path.display()))
    };
    let loader = relative(&tools::loader(root)?)?;
    let folders = tools::library_folders(root)?;
    let libraries = folders
        .iter()
        .map(|folder| relative(folder))
        .collect::<Result<Vec<_>>>()?
        .join(":");
    let script = format!(
        r#"#!/bin/sh
root=$(dirname "$(readlink -f "$0")")
exec "{loader}" --library-path "{libraries}" "$root/usr/bin/rustc" --sysroot "$root/usr" "$@"
"#
    );
    let path = root.join("rustc");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    command::output(Command::new(&path).arg("--version"))
        .context("Debian's rustc does not run here")?;
    Ok(())
}
