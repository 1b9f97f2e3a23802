//! The lab put together: cache, tools, kernels and programs, and a machine booted from them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::compile::{self, Profile, Program, Runs, Workspace};
use crate::cpio::Archive;
use crate::folder::RunFolder;
use crate::kernel::{self, Kernel};
use crate::machine::{Config, Input, Machine, Network};
use crate::ports::Sink;
use crate::toolchain::Toolchain;
use crate::tools::Tools;

/// All that a host is made of.
pub struct Lab {
    pub cache: Cache,
    pub tools: Tools,
    pub workspace: Workspace,
    tree: PathBuf,
    trixie: Kernel,
    bookworm: Kernel,
    programs: Vec<Program>,
}

/// What the user may choose about a host.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// 1, or 2 that are joined by a network.
    pub hosts: u32,
    /// CPUs of each.
    pub cpus: u32,
    pub memory: String,
    /// Memory of the second host, if it is not to have as much as the first.
    pub peer_memory: Option<String>,
    pub icount: bool,
    pub kernel_args: Vec<String>,
    pub qemu_args: Vec<String>,
    pub share: Option<PathBuf>,
    pub kernel: Option<String>,
}

impl Default for Choice {
    fn default() -> Self {
        Self {
            hosts: 1,
            cpus: 2,
            memory: "4G".to_owned(),
            peer_memory: None,
            icount: false,
            kernel_args: Vec::new(),
            qemu_args: Vec::new(),
            share: None,
            kernel: None,
        }
    }
}

/// A booted host with its folder, which goes when it goes, and with the second host if there are two.
pub struct Host {
    // Before the folder, so that QEMU ends first.
    pub machine: Machine,
    folder: RunFolder,
}

impl Host {
    /// What the host sees at `/lab/jobs`.
    pub fn jobs_folder(&self) -> PathBuf {
        self.folder.path().join("lab/jobs")
    }
}

impl Lab {
    /// Sets up what is missing and, unless `build` is false, builds the programs.
    pub fn open(profile: Profile, build: bool) -> Result<Self> {
        let cache = Cache::open()?;
        let workspace = Workspace::open()?;
        let toolchain = Toolchain::open(&cache)?;
        let programs = if build {
            compile::build(&workspace, &toolchain, profile)?
        } else {
            compile::programs(&workspace, &toolchain, profile)?
        };
        let tools = Tools::open(&cache)?;
        let tree = kernel::host_tree(&cache, &tools)?;
        let trixie = kernel::of_tree("trixie", &tree)?;
        let bookworm = kernel::bookworm(&cache, &tools)?;
        Ok(Self {
            cache,
            tools,
            workspace,
            tree,
            trixie,
            bookworm,
            programs,
        })
    }

    /// Boots a host, or two. `prepare` may add to the folder that the host sees at `/lab`.
    pub fn boot(
        &self,
        choice: &Choice,
        input: Input,
        out: Sink,
        err: Sink,
        prepare: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Host> {
        let folder = RunFolder::create()?;
        let place = folder.path().join("lab");
        self.fill(&place)?;
        prepare(&place)?;
        let kernel = self.host_kernel(choice.kernel.as_deref(), folder.path())?;
        let share = choice
            .share
            .as_ref()
            .map(|share| share_folder(share))
            .transpose()?;
        anyhow::ensure!(
            choice.hosts == 1 || !choice.icount,
            "time that counts instructions is one host's own: choose --icount or two hosts"
        );
        let peer_folder = folder.path().join("host2");
        fs::create_dir(&peer_folder)?;
        let config = Config {
            cpus: choice.cpus,
            memory: &choice.memory,
            icount: choice.icount,
            kernel_args: &choice.kernel_args,
            qemu_args: &choice.qemu_args,
            kernel: &kernel,
            initrd: kernel::host_archive(&self.cache, &kernel, &self.busybox())?,
            tree: &self.tree,
            folder: folder.path(),
            lab: &place,
            network: (choice.hosts == 2).then_some(Network {
                number: 1,
                folder: folder.path(),
            }),
            share: share.as_deref(),
            input,
            out,
            err,
        };
        let peer = config.network.map(|network| Config {
            memory: choice.peer_memory.as_deref().unwrap_or(&choice.memory),
            // What the user adds, such as a monitor, can mostly be there only once.
            qemu_args: &[],
            initrd: config.initrd.clone(),
            folder: &peer_folder,
            network: Some(Network {
                number: 2,
                ..network
            }),
            input: Input::Nothing,
            out: Arc::clone(&config.out),
            err: Arc::clone(&config.err),
            ..config
        });
        let machine = Machine::boot(&self.tools.qemu()?, &config, peer.as_ref())?;
        Ok(Host { machine, folder })
    }

    /// The file of the program `name`.
    pub fn program(&self, name: &str) -> Option<&Path> {
        self.programs
            .iter()
            .find(|program| program.name == name)
            .map(|program| program.path.as_path())
    }

    fn busybox(&self) -> PathBuf {
        self.tree.join("usr/bin/busybox")
    }

    fn host_kernel(&self, wanted: Option<&str>, folder: &Path) -> Result<Kernel> {
        match wanted {
            None | Some("trixie") => Ok(self.trixie.clone()),
            Some("bookworm") => Ok(self.bookworm.clone()),
            Some(path) if path.ends_with(".deb") => {
                let unpacked = folder.join("kernel");
                fs::create_dir(&unpacked)?;
                kernel::of_package(&self.tools, Path::new(path), &unpacked)
            }
            Some(path) => kernel::of_image(Path::new(path), &[&self.trixie, &self.bookworm]),
        }
    }

    /// Fills what the host sees at `/lab`.
    pub fn fill(&self, lab: &Path) -> Result<()> {
        let bin = lab.join("bin");
        fs::create_dir_all(&bin)?;
        let mut guest = Archive::default();
        guest.file("init", 0o755, include_bytes!("../lab/guest-init.sh"))?;
        for program in &self.programs {
            let (name, content) = program.content()?;
            write_program(&bin.join(&name), &content)?;
            if program.runs == Runs::Guest {
                guest.file(&format!("bin/{name}"), 0o755, &content)?;
            }
        }
        let guest = guest.finish()?;
        let scripts = self.workspace.workspace_root.join("guest/programs");
        if scripts.exists() {
            copy_folder(&scripts, &lab.join("programs"))?;
        }
        for (name, kernel) in [("trixie", &self.trixie), ("bookworm", &self.bookworm)] {
            let folder = lab.join("kernels").join(name);
            fs::create_dir_all(&folder)?;
            let image = folder.join("Image");
            fs::copy(&kernel.image, &image)
                .with_context(|| format!("cannot copy {}", kernel.image.display()))?;
            let mut initrd = kernel::guest_archive(&self.cache, kernel, &self.busybox())?;
            initrd.extend_from_slice(&guest);
            fs::write(folder.join("initrd.cpio"), initrd)?;
        }
        Ok(())
    }
}

fn write_program(path: &Path, content: &[u8]) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o755),
    )?)
}

fn share_folder(path: &Path) -> Result<PathBuf> {
    let folder = path
        .canonicalize()
        .with_context(|| format!("cannot share {}", path.display()))?;
    anyhow::ensure!(
        folder.is_dir(),
        "cannot share {}: it is no folder",
        folder.display()
    );
    Ok(folder)
}

/// Copies the files of `from`, and of folders in it, to `to`.
pub fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)
                .with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}
