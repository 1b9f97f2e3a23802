//! The Linux kernels of the lab: Debian's for the host, a second release's for guests, or any
//! that the user names; with the part of their modules that an initial root file system needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::command;
use crate::cpio::Archive;
use crate::debian::{self, Tree};
use crate::modules;
use crate::progress::say;
use crate::tools::Tools;

/// Modules with which the host reaches its ports and its Debian tree. Some are built in, depending
/// on the release.
const HOST_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
];
/// Modules for the devices of a guest, and what tests in it want.
const GUEST_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "zram",
    "crc32c_generic",
    "ext4",
];

/// What the host's tree holds beside its kernel: what tests and people use, and the QEMU that
/// benchmarks compare with.
const HOST_PACKAGES: &str = "\
    base-files bash binutils busybox-static coreutils curl dash diffutils e2fsprogs findutils gdb grep gzip hostname \
    iproute2 iputils-ping jq kmod less libc-bin linux-image-arm64 lldb lua5.4 mawk mount ncurses-base perl procps python3 \
    qemu-system-arm sed socat sqlite3 strace tar util-linux xz-utils zstd";

/// The applets of busybox that the lab's scripts and people in guests use.
const APPLETS: &str = "\
    awk basename blkdiscard cat chmod cmp cp cttyhack cut date dd df dirname dmesg du echo env expr false find free grep head \
    hexdump hostname id ifconfig insmod ip kill killall ln ls lsmod md5sum mkdir mknod mkswap modprobe more \
    mount mv nc nproc od pidof ping poweroff printf ps pwd readlink reboot rm rmdir rmmod sed seq setsid sh sha256sum \
    sleep sort stat stty swapoff swapon switch_root sync tail taskset tee test time timeout top touch tr true udhcpc \
    umount uname uniq uptime usleep vi wc wget which xargs yes";

/// A kernel with what belongs to it.
#[derive(Clone)]
pub struct Kernel {
    /// An uncompressed arm64 `Image`.
    pub image: PathBuf,
    /// As `uname -r` says.
    pub version: String,
    /// `lib/modules/VERSION`, where it is known.
    pub modules: Option<PathBuf>,
    /// Where the cache keeps what is derived from this kernel: a name.
    name: String,
}

/// Returns the Debian tree of the host; its kernel is [`of_tree`].
pub fn host_tree(cache: &Cache, tools: &Tools) -> Result<PathBuf> {
    let tree = Tree {
        name: "host",
        suite: "trixie",
        architectures: "arm64",
        packages: HOST_PACKAGES,
        security: false,
        revision: 1,
    };
    debian::tree(cache, &tree, |root| {
        complete_tree(root)?;
        index_modules(tools, root)
    })
}

/// Debian 12's kernel, 6.1.
pub fn bookworm(cache: &Cache, tools: &Tools) -> Result<Kernel> {
    let tree = Tree {
        name: "kernel-bookworm",
        suite: "bookworm",
        architectures: "arm64",
        packages: "linux-image-arm64",
        security: false,
        revision: 1,
    };
    let root = debian::tree(cache, &tree, |root| {
        // Releases before 13 have their modules in /lib.
        fs::create_dir_all(root.join("usr/lib"))?;
        fs::rename(root.join("lib/modules"), root.join("usr/lib/modules"))?;
        index_modules(tools, root)
    })?;
    of_tree("bookworm", &root)
}

/// The kernel of a Debian tree.
pub fn of_tree(name: &str, root: &Path) -> Result<Kernel> {
    let modules = root.join("usr/lib/modules");
    let version = only_entry(&modules)?;
    Ok(Kernel {
        image: root.join(format!("boot/vmlinuz-{version}")),
        modules: Some(modules.join(&version)),
        name: format!("{name}-{version}"),
        version,
    })
}

/// The kernel of a package file, which is unpacked into `folder`.
pub fn of_package(tools: &Tools, package: &Path, folder: &Path) -> Result<Kernel> {
    command::output(Command::new("dpkg-deb").arg("-x").arg(package).arg(folder))
        .with_context(|| format!("cannot unpack {}", package.display()))?;
    let old = folder.join("lib/modules");
    if old.exists() {
        fs::create_dir_all(folder.join("usr/lib"))?;
        fs::rename(old, folder.join("usr/lib/modules"))?;
    }
    index_modules(tools, folder)
        .with_context(|| format!("{} is no linux-image package", package.display()))?;
    of_tree("package", folder)
}

/// A bare `Image`. If it is of the version of one of the `known` kernels, it gets that one's modules.
pub fn of_image(image: &Path, known: &[&Kernel]) -> Result<Kernel> {
    let bytes = fs::read(image).with_context(|| {
        format!(
            "cannot read the kernel {}; trixie and bookworm are known by name",
            image.display()
        )
    })?;
    // Linux Documentation/arch/arm64/booting.rst: the magic number of the header.
    if bytes.get(56..60) != Some(b"ARM\x64") {
        bail!(
            "{} is neither a .deb nor an uncompressed arm64 Image",
            image.display()
        );
    }
    let version = image_version(&bytes).unwrap_or_else(|| "unknown".to_owned());
    let modules = known
        .iter()
        .find(|kernel| kernel.version == version)
        .and_then(|kernel| kernel.modules.clone());
    if modules.is_none() {
        say(&format!(
            "kernel {version} comes without modules: virtio-pci, virtio-console, 9p and overlayfs must be built in"
        ));
    }
    let name = format!("image-{version}");
    Ok(Kernel {
        image: image.to_owned(),
        version,
        modules,
        name,
    })
}

/// What follows "Linux version " in the kernel's banner.
fn image_version(image: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let start = image
        .windows(BANNER.len())
        .position(|window| window == BANNER)?
        + BANNER.len();
    let rest = image.get(start..)?;
    let end = rest.iter().position(|byte| byte.is_ascii_whitespace())?;
    String::from_utf8(rest.get(..end)?.to_vec()).ok()
}

/// A cpio archive with busybox and the modules with which the host starts.
pub fn host_archive(cache: &Cache, kernel: &Kernel, busybox: &Path) -> Result<Vec<u8>> {
    base_archive(cache, "host-initrd", kernel, busybox, HOST_MODULES)
}

/// A cpio archive with busybox and the modules that guests want.
pub fn guest_archive(cache: &Cache, kernel: &Kernel, busybox: &Path) -> Result<Vec<u8>> {
    base_archive(cache, "guest-initrd", kernel, busybox, GUEST_MODULES)
}

fn base_archive(
    cache: &Cache,
    kind: &str,
    kernel: &Kernel,
    busybox: &Path,
    wanted: &[&str],
) -> Result<Vec<u8>> {
    let Some(modules) = &kernel.modules else {
        // A kernel of the user's own has them built in, or starts without.
        return applets(busybox)?.finish();
    };
    // A folder of modules that is not in the cache belongs to this run alone.
    if !modules.starts_with(cache.folder()) {
        return with_modules(kernel, modules, busybox, wanted);
    }
    let recipe = format!(
        "{} {} {} {APPLETS}",
        modules.display(),
        busybox.display(),
        wanted.join(" ")
    );
    let entry = cache.entry(&format!("{kind}-{}", kernel.name), &recipe, |folder| {
        Ok(fs::write(
            folder.join("cpio"),
            with_modules(kernel, modules, busybox, wanted)?,
        )?)
    })?;
    Ok(fs::read(entry.join("cpio"))?)
}

fn with_modules(
    kernel: &Kernel,
    modules: &Path,
    busybox: &Path,
    wanted: &[&str],
) -> Result<Vec<u8>> {
    let mut archive = applets(busybox)?;
    modules::add(&mut archive, modules, &kernel.version, wanted)?;
    archive.finish()
}

fn applets(busybox: &Path) -> Result<Archive> {
    let mut archive = Archive::default();
    let content =
        fs::read(busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    archive.file("bin/busybox", 0o755, &content)?;
    for applet in APPLETS.split_whitespace() {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    // Where the kernel itself looks for it.
    archive.symlink("sbin/modprobe", "../bin/busybox")?;
    Ok(archive)
}

/// Adds what the maintainer scripts of Debian's packages would have made.
fn complete_tree(root: &Path) -> Result<()> {
    for name in ["bin", "sbin", "lib"] {
        let link = root.join(name);
        if !link.exists() {
            std::os::unix::fs::symlink(format!("usr/{name}"), link)?;
        }
    }
    let links = [
        ("usr/bin/awk", "mawk"),
        ("usr/bin/lua", "lua5.4"),
        ("usr/bin/pager", "less"),
    ];
    for (link, target) in links {
        if fs::symlink_metadata(root.join(link)).is_err() {
            std::os::unix::fs::symlink(target, root.join(link))?;
        }
    }
    for (file, content) in [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
        ),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        (
            "etc/hosts",
            "127.0.0.1 localhost tagvisor-lab\n::1 localhost\n",
        ),
        (
            "etc/nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files dns\n",
        ),
    ] {
        fs::write(root.join(file), content)?;
    }
    Ok(())
}

fn index_modules(tools: &Tools, root: &Path) -> Result<()> {
    tools.depmod(root, &only_entry(&root.join("usr/lib/modules"))?)
}

fn only_entry(folder: &Path) -> Result<String> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names: Vec<String> = names.collect::<Result<_>>()?;
    match names.as_slice() {
        [name] => Ok(name.clone()),
        _ => bail!(
            "{} holds {} kernels, not one",
            folder.display(),
            names.len()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_the_banner_of_an_image() {
        let image = b"\0\0Linux version 6.12.107+deb13-arm64 (debian-kernel@example)\0";

        assert_eq!(
            image_version(image).as_deref(),
            Some("6.12.107+deb13-arm64")
        );
        assert_eq!(image_version(b"no banner here"), None);
    }
}
