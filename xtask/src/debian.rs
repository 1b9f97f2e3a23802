//! Debian file trees in the cache, unpacked by `mmdebstrap` from the machine's own mirror. Nothing
//! of them is installed on the machine and none of their maintainer scripts run. `apt`, which
//! mmdebstrap drives, checks the signature of all it downloads.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::command;
use crate::folder::RunFolder;
use crate::progress::Step;

/// What a tree holds.
pub struct Tree<'a> {
    pub name: &'a str,
    /// A release of Debian, such as `trixie`.
    pub suite: &'a str,
    /// Debian's names of its architectures, the first being the tree's own.
    pub architectures: &'a str,
    /// Names separated by spaces.
    pub packages: &'a str,
    /// Whether packages may come from the release's security archive too.
    pub security: bool,
    /// Raised when what is added to the unpacked packages changes.
    pub revision: u32,
}

/// Returns the folder of `tree`, after downloading it if need be. `complete` is called once, with
/// the unpacked folder, to add what the packages' own scripts would have made.
pub fn tree(
    cache: &Cache,
    tree: &Tree,
    complete: impl FnOnce(&Path) -> Result<()>,
) -> Result<std::path::PathBuf> {
    let packages = tree
        .packages
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(",");
    let recipe = format!(
        "{} {} {packages} {} {}",
        tree.suite, tree.architectures, tree.security, tree.revision
    );
    cache.entry(tree.name, &recipe, |folder| {
        unpack(tree, &packages, folder)?;
        complete(folder)
    })
}

/// Installs `packages`, names separated by spaces, on the machine unless what is wanted of them is
/// `present`.
pub fn require(present: bool, packages: &str) -> Result<()> {
    if present {
        return Ok(());
    }
    if !command::exists("apt-get") {
        bail!("this machine has no apt-get: install by hand what Debian calls {packages}");
    }
    let step = Step::start(&format!("installing {packages}"));
    // A fresh machine may have no package lists yet, an old one outdated ones.
    if install(packages).is_err() {
        let remedy = || format!("install them by hand: apt-get install {packages}");
        command::output(as_root("apt-get")?.arg("update")).with_context(remedy)?;
        install(packages).with_context(remedy)?;
    }
    step.done();
    Ok(())
}

fn install(packages: &str) -> Result<()> {
    let mut command = as_root("apt-get")?;
    command
        .args(["install", "-y", "--no-install-recommends"])
        .args(packages.split_whitespace());
    command::output(&mut command).map(drop)
}

/// A command that runs `program` as root.
fn as_root(program: &str) -> Result<Command> {
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new(program)
    } else if command::exists("sudo") {
        // The password is asked for here, since the command itself may have no terminal to ask on.
        if !command::passes(Command::new("sudo").arg("--validate"))? {
            bail!("sudo refuses to run {program} as root: run as root");
        }
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "--", "env", "DEBIAN_FRONTEND=noninteractive", program]);
        sudo
    } else {
        bail!("{program} needs root: run as root, or install sudo");
    };
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C");
    Ok(command)
}

/// The architecture of this machine in Debian's words.
pub fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("the lab runs on x86-64 and arm64 machines, not on {other}"),
    }
}

fn unpack(tree: &Tree, packages: &str, folder: &Path) -> Result<()> {
    require(
        command::exists("mmdebstrap"),
        "mmdebstrap debian-archive-keyring",
    )?;
    let mut bootstrap = bootstrap_command()?;
    // What an interrupted mmdebstrap leaves goes with this folder.
    let temporary = RunFolder::create()?;
    if rustix::process::geteuid().is_root() {
        // apt downloads as a user of its own.
        fs::set_permissions(temporary.path(), fs::Permissions::from_mode(0o755))?;
        bootstrap.env("TMPDIR", temporary.path());
    }
    bootstrap
        .arg(format!("--architectures={}", tree.architectures))
        .args(["--variant=extract", "--format=tar"])
        .arg(format!("--include={packages}"))
        .args([tree.suite, "-"])
        .args(sources(tree)?)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // When mmdebstrap fails, it ends its whole process group.
        .process_group(0);
    let mut download = bootstrap.spawn().context("cannot run mmdebstrap")?;
    let messages = command::collect(download.stderr.take());
    let extracted = extract(&mut download, folder);
    let status = command::wait(&mut download)?;
    let messages = messages.join().unwrap_or_default();
    if !status.success() {
        bail!(
            "mmdebstrap failed ({status}): {}\n{}",
            reasons(&messages),
            remedy(&messages)
        );
    }
    extracted
}

/// Unpacks the archive that `download` writes. As a stream, so that its files belong to the user
/// whoever downloads them.
fn extract(download: &mut Child, folder: &Path) -> Result<()> {
    let archive = download.stdout.take().context("mmdebstrap has no output")?;
    let tar = Command::new("tar")
        .arg("-x")
        .arg("-C")
        .arg(folder)
        .args(["--no-same-owner", "--exclude=./dev/*"])
        .stdin(archive)
        .stderr(Stdio::piped())
        .spawn();
    let mut tar = tar.context("cannot run tar")?;
    let messages = command::collect(tar.stderr.take());
    let status = command::wait(&mut tar)?;
    if !status.success() {
        let messages = messages.join().unwrap_or_default();
        bail!(
            "tar failed ({status}): {}\n{}",
            command::last_lines(&messages, 5),
            remedy(&messages)
        );
    }
    Ok(())
}

/// mmdebstrap as root, by a user namespace, or by sudo: whichever this user can do.
fn bootstrap_command() -> Result<Command> {
    if rustix::process::geteuid().is_root() {
        let mut command = Command::new("mmdebstrap");
        command.arg("--mode=root");
        return Ok(command);
    }
    if can_unshare() {
        let mut command = Command::new("mmdebstrap");
        command.arg("--mode=unshare");
        return Ok(command);
    }
    let mut command = as_root("mmdebstrap").context(
        "mmdebstrap needs root, sudo, or user namespaces (package uidmap and lines for this user in /etc/subuid and /etc/subgid)",
    )?;
    command.arg("--mode=root");
    Ok(command)
}

fn can_unshare() -> bool {
    let ranges = std::fs::read_to_string("/etc/subuid").unwrap_or_default();
    let user = std::env::var("USER").unwrap_or_default();
    let uid = rustix::process::geteuid().as_raw().to_string();
    let has_range = ranges.lines().any(|line| {
        line.split(':')
            .next()
            .is_some_and(|owner| owner == uid || (!user.is_empty() && owner == user))
    });
    has_range
        && command::exists("newuidmap")
        && command::output(Command::new("unshare").args(["--user", "--map-root-user", "true"]))
            .is_ok()
}

/// The mirrors as arguments of mmdebstrap; none for mmdebstrap's own choice.
fn sources(tree: &Tree) -> Result<Vec<String>> {
    let found = match std::env::var("TAGVISOR_DEBIAN_MIRROR") {
        Ok(mirror) => Mirrors {
            main: Some(mirror.clone()),
            security: Some(security_beside(&mirror)),
        },
        Err(_) => machine_mirrors()?,
    };
    let Some(main) = found.main else {
        return Ok(Vec::new());
    };
    let suite = tree.suite;
    let mut lines = vec![format!("deb {main} {suite} main")];
    if tree.security {
        let security = found.security.unwrap_or_else(|| security_beside(&main));
        lines.push(format!("deb {security} {suite}-security main"));
    }
    Ok(lines)
}

#[derive(Debug, Default, PartialEq)]
struct Mirrors {
    main: Option<String>,
    security: Option<String>,
}

/// Debian's convention: the security archive stands beside the main one.
fn security_beside(main: &str) -> String {
    format!("{}-security/", main.trim_end_matches('/'))
}

/// The mirrors that apt on this machine uses, if they are Debian's.
fn machine_mirrors() -> Result<Mirrors> {
    if !command::exists("apt-get") {
        return Ok(Mirrors::default());
    }
    let targets = command::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE)",
        "Created-By: Packages",
    ]))?;
    if !std::fs::read_to_string("/etc/os-release")?
        .lines()
        .any(|line| line == "ID=debian")
    {
        return Ok(Mirrors::default());
    }
    Ok(debian_mirrors(&targets))
}

/// Picks Debian's archives out of lines of "URI RELEASE"; other vendors' have other path names.
fn debian_mirrors(targets: &str) -> Mirrors {
    let mut mirrors = Mirrors::default();
    for (uri, release) in targets.lines().filter_map(|line| line.split_once(' ')) {
        let last = uri
            .trim_end_matches('/')
            .rsplit('/')
            .next()
            .unwrap_or_default();
        if last == "debian-security" || release.ends_with("-security") {
            mirrors.security.get_or_insert_with(|| uri.to_owned());
        } else if last == "debian" {
            mirrors.main.get_or_insert_with(|| uri.to_owned());
        }
    }
    mirrors
}

/// The errors among what mmdebstrap and apt said, without those that only repeat a command.
fn reasons(messages: &str) -> String {
    let is_reason = |line: &&str| {
        line.starts_with("E: ") && !line.contains("Status-Fd") && !line.contains("failed to run")
    };
    let reasons: Vec<&str> = messages.lines().filter(is_reason).collect();
    if reasons.is_empty() {
        command::last_lines(messages, 12)
    } else {
        reasons.join("\n")
    }
}

/// What to do about a failure, from what mmdebstrap, apt or tar said.
fn remedy(messages: &str) -> &'static str {
    let said = |words: &[&str]| words.iter().any(|word| messages.contains(word));
    if said(&["No space left"]) {
        "the disk is full: the lab needs 3 GB in the cache folder and 1 GB in /tmp; XDG_CACHE_HOME and TMPDIR choose other places"
    } else if said(&[
        "Could not resolve",
        "Temporary failure resolving",
        "Could not connect",
        "Connection failed",
        "Network is unreachable",
    ]) {
        "the mirror cannot be reached: check the network, or name another mirror in TAGVISOR_DEBIAN_MIRROR"
    } else if said(&["NO_PUBKEY", "not signed", "GPG error"]) {
        "the signature cannot be checked: install a newer debian-archive-keyring"
    } else if said(&["Hash Sum mismatch", "unexpected size"]) {
        "the download is damaged and was thrown away: run the command again, or name another mirror in TAGVISOR_DEBIAN_MIRROR"
    } else if said(&["Permission denied", "Operation not permitted"]) {
        "rights are missing: run as root or with sudo"
    } else {
        "run the command again; TAGVISOR_DEBIAN_MIRROR names another mirror"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn main_and_security_mirrors_are_told_apart() {
        let targets = "http://mirror.example/debian/ bookworm\n\
                       http://mirror.example/debian/ bookworm-updates\n\
                       http://mirror.example/debian-security/ bookworm-security\n";

        let mirrors = debian_mirrors(targets);

        assert_eq!(
            mirrors.main.as_deref(),
            Some("http://mirror.example/debian/")
        );
        assert_eq!(
            mirrors.security.as_deref(),
            Some("http://mirror.example/debian-security/")
        );
    }

    #[test]
    fn other_vendors_archives_are_no_mirrors() {
        let mirrors = debian_mirrors("https://vendor.example/node_20.x/ nodistro\n");

        assert_eq!(mirrors, Mirrors::default());
    }

    #[test]
    fn the_security_archive_stands_beside_the_main_one() {
        assert_eq!(
            security_beside("http://mirror.example/debian/"),
            "http://mirror.example/debian-security/"
        );
    }

    #[test]
    fn the_reasons_of_a_failure_are_found_among_its_messages() {
        let messages = "I: running apt-get update...\nE: Failed to fetch it\n\
                        E: apt-get update -oAPT::Status-Fd=<$fd> failed\nE: mmdebstrap failed to run\n";

        assert_eq!(reasons(messages), "E: Failed to fetch it");
    }

    #[test]
    fn a_full_disk_and_a_dead_network_have_different_remedies() {
        assert!(remedy("tar: x: No space left on device").contains("disk is full"));
        assert!(remedy("E: Temporary failure resolving 'mirror.example'").contains("network"));
    }
}
