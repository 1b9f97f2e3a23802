//! The lab's own QEMU and kmod: Debian 13's, in a tree in the cache, run through that tree's own
//! dynamic loader so that the machine's release and packages do not matter.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::command;
use crate::debian::{self, Tree};

/// Before version 8, QEMU keeps memory tags per page rather than per granule.
const OLDEST_QEMU: u32 = 8;

/// The tree of tools.
pub struct Tools {
    root: PathBuf,
}

impl Tools {
    /// Finds the tools, downloading them if need be.
    pub fn open(cache: &Cache) -> Result<Self> {
        let tree = Tree {
            name: "tools",
            suite: "trixie",
            architectures: debian::architecture()?,
            packages: "kmod qemu-system-arm qemu-user",
            security: false,
            revision: 1,
        };
        Ok(Self {
            root: debian::tree(cache, &tree, remove_other_emulators)?,
        })
    }

    /// The system emulator: ours, or the one that `TAGVISOR_QEMU` names.
    pub fn qemu(&self) -> Result<Command> {
        if let Some(own) = std::env::var_os("TAGVISOR_QEMU") {
            check_version(Path::new(&own))?;
            return Ok(Command::new(own));
        }
        let mut command = through_loader(&self.root, "usr/bin/qemu-system-aarch64", None)?;
        // Without this, QEMU would load the modules of the machine's own QEMU and abort.
        let modules = library_folders(&self.root)?
            .into_iter()
            .map(|folder| folder.join("qemu"))
            .find(|folder| folder.is_dir());
        command.env("QEMU_MODULE_DIR", modules.unwrap_or_default());
        command.arg("-L").arg(self.root.join("usr/share/qemu"));
        Ok(command)
    }

    /// The emulator of single programs, a static binary.
    pub fn qemu_user(&self) -> PathBuf {
        self.root.join("usr/bin/qemu-aarch64")
    }

    /// Writes `modules.dep` and its kin for kernel `version` of the tree `root`.
    pub fn depmod(&self, root: &Path, version: &str) -> Result<()> {
        let mut command = through_loader(&self.root, "usr/bin/kmod", Some("depmod"))?;
        command::output(
            command
                .arg("-b")
                .arg(root)
                .args(["-m", "/usr/lib/modules", version]),
        )?;
        Ok(())
    }
}

/// A command that runs `program` of the tree `root`, under another name if one is given.
pub fn through_loader(root: &Path, program: &str, name: Option<&str>) -> Result<Command> {
    let mut command = Command::new(loader(root)?);
    if let Some(name) = name {
        command.args(["--argv0", name]);
    }
    let path = std::env::join_paths(library_folders(root)?)
        .context("the cache's path has a colon: set XDG_CACHE_HOME")?;
    command
        .arg("--library-path")
        .arg(path)
        .arg(root.join(program));
    Ok(command)
}

/// The dynamic loader of the tree `root`, which is of this machine's architecture. Not by its usual
/// name, which may be a link to an absolute path: the machine's own.
pub fn loader(root: &Path) -> Result<PathBuf> {
    let name = match debian::architecture()? {
        "amd64" => "ld-linux-x86-64.so.2",
        _ => "ld-linux-aarch64.so.1",
    };
    let found = library_folders(root)?
        .into_iter()
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!(
            "{} has no dynamic loader: remove it and try again",
            root.display()
        )
    })
}

/// Where the libraries of the tree `root` are, which is of this machine's architecture.
pub fn library_folders(root: &Path) -> Result<Vec<PathBuf>> {
    let triplet = match debian::architecture()? {
        "amd64" => "x86_64-linux-gnu",
        _ => "aarch64-linux-gnu",
    };
    let places = [
        format!("usr/lib/{triplet}"),
        format!("usr/lib/{triplet}/pulseaudio"),
        format!("lib/{triplet}"),
    ];
    Ok(places
        .iter()
        .map(|place| root.join(place))
        .filter(|folder| folder.is_dir())
        .collect())
}

/// The package `qemu-user` emulates every architecture, in half a gigabyte; the lab wants one.
fn remove_other_emulators(root: &Path) -> Result<()> {
    let folder = root.join("usr/bin");
    for entry in
        fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("qemu-")
            && !["qemu-aarch64", "qemu-system-aarch64"].contains(&name.as_str())
        {
            fs::remove_file(entry.path()).with_context(|| format!("cannot remove {name}"))?;
        }
    }
    Ok(())
}

fn check_version(qemu: &Path) -> Result<()> {
    let text = command::output(Command::new(qemu).arg("--version"))
        .context("TAGVISOR_QEMU must name a qemu-system-aarch64")?;
    match major_version(&text) {
        Some(version) if version >= OLDEST_QEMU => Ok(()),
        Some(version) => bail!(
            "{} is QEMU {version}, which keeps memory tags per page: the lab needs QEMU {OLDEST_QEMU} or newer; unset TAGVISOR_QEMU to use the lab's own",
            qemu.display()
        ),
        None => bail!("{} does not say which QEMU it is", qemu.display()),
    }
}

/// The major version in the first line of `qemu-system-… --version`.
fn major_version(text: &str) -> Option<u32> {
    let (_, rest) = text.lines().next()?.split_once("version ")?;
    rest.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_distributions_and_plain_builds() {
        assert_eq!(
            major_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\n"),
            Some(7)
        );
        assert_eq!(
            major_version("QEMU emulator version 10.0.13\nCopyright"),
            Some(10)
        );
        assert_eq!(major_version("something else"), None);
    }
}
