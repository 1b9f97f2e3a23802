//! The memory file behind guest memory.
//!
//! A memfd's pages are small ones unless the administrator said otherwise in `shmem_enabled`, whose
//! default is `never`; a guest on small pages takes a fault for each of them and walks longer page
//! tables ever after. A tmpfs of our own decides for itself.

use std::fs::{self, File};
use std::io;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// Where the host says which memory it gives in huge pages of its own accord.
const TRANSPARENT_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// A file of `size` bytes in memory, all of it a hole. With `huge_pages` it is made of reserved
/// ones; otherwise of transparent huge pages where they can be had.
///
/// # Errors
/// What the host said.
pub(super) fn of_size(size: u64, huge_pages: bool) -> io::Result<File> {
    let file = if huge_pages {
        memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)
    } else {
        of_transparent_huge_pages().or_else(|why| {
            tracing::debug!("guest memory will be of small pages: {why}");
            memfd(MemfdFlags::empty())
        })
    }?;
    file.set_len(size)?;
    Ok(file)
}

fn memfd(flags: MemfdFlags) -> io::Result<File> {
    let file = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC | flags)?;
    Ok(file.into())
}

/// A file on a tmpfs of its own, which is mounted nowhere and goes with the file.
///
/// # Errors
/// The caller may not mount (`CAP_SYS_ADMIN`), or the host gives nobody transparent huge pages: what
/// counts is its policy for anonymous memory, of which other VMMs' guests are made.
pub fn of_transparent_huge_pages() -> io::Result<File> {
    let policy = fs::read_to_string(TRANSPARENT_HUGE_PAGES)?;
    if policy.contains("[never]") {
        return Err(io::Error::other(format!(
            "{TRANSPARENT_HUGE_PAGES} is never"
        )));
    }
    let tmpfs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&tmpfs, "huge", "always")?;
    // No limit, as a memfd has none; a tmpfs' own would be half of the host's memory.
    rustix::mount::fsconfig_set_string(&tmpfs, "size", "0")?;
    rustix::mount::fsconfig_set_string(&tmpfs, "mode", "0700")?;
    rustix::mount::fsconfig_create(&tmpfs)?;
    let mount = rustix::mount::fsmount(
        &tmpfs,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?;
    let file = rustix::fs::openat(
        &mount,
        ".",
        OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
        Mode::RUSR | Mode::WUSR,
    )?;
    Ok(file.into())
}
