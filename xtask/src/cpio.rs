//! Writes cpio archives in the "newc" form that the kernel unpacks as an initial root file system
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Archives may simply follow one another: what is the same in every run is kept in the cache, and
//! what differs (scripts, programs) is a second archive appended to it.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use anyhow::{Result, bail};

const DIRECTORY: u32 = 0o040_755;
const SYMLINK: u32 = 0o120_777;
const REGULAR: u32 = 0o100_000;

/// One archive being written in memory.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    next_inode: u32,
}

impl Archive {
    /// Adds the directory `path` and those above it.
    pub fn directory(&mut self, path: &str) -> Result<()> {
        let mut prefix = String::new();
        for component in Path::new(path).components() {
            let Component::Normal(name) = component else {
                bail!("'{path}' is not a plain relative path");
            };
            if !prefix.is_empty() {
                prefix.push('/');
            }
            prefix.push_str(&name.to_string_lossy());
            if self.directories.insert(prefix.clone()) {
                self.entry(&prefix, DIRECTORY, &[])?;
            }
        }
        Ok(())
    }

    /// Adds a regular file with these permission bits, and the directories above it.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> Result<()> {
        self.parents(path)?;
        self.entry(path, REGULAR | permissions, content)
    }

    /// Adds a symbolic link to `target`, and the directories above it.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.parents(path)?;
        self.entry(path, SYMLINK, target.as_bytes())
    }

    /// Ends the archive and returns its bytes, a multiple of 512 long, so that another can follow.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        Ok(self.bytes)
    }

    fn parents(&mut self, path: &str) -> Result<()> {
        match Path::new(path).parent().and_then(Path::to_str) {
            Some(parent) if !parent.is_empty() => self.directory(parent),
            _ => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let Ok(size) = u32::try_from(content.len()) else {
            bail!("'{path}' is larger than the 4 GiB a cpio archive can hold");
        };
        self.next_inode += 1;
        let name_size = path.len() + 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        // Magic, inode, mode, uid, gid, links, mtime, size, device and rdevice (major, minor),
        // length of the name with its NUL, checksum (unused).
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}",
            self.next_inode, 0, 0, 0, 0, 0, 0, 0, 0
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(bytes: &[u8], index: usize) -> u32 {
        let start = 6 + index * 8;
        let text = std::str::from_utf8(&bytes[start..start + 8]).unwrap();
        u32::from_str_radix(text, 16).unwrap()
    }

    #[test]
    fn a_file_has_its_mode_size_name_and_padded_content() {
        let mut archive = Archive::default();

        archive.file("init", 0o755, b"hello").unwrap();

        let bytes = archive.finish().unwrap();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(field(&bytes, 1), 0o100_755);
        assert_eq!(field(&bytes, 6), 5);
        assert_eq!(field(&bytes, 11), 5);
        assert_eq!(&bytes[110..115], b"init\0");
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
    }

    #[test]
    fn directories_above_a_file_are_added_once() {
        let mut archive = Archive::default();

        archive.file("lib/a/x", 0o644, b"").unwrap();
        archive.file("lib/a/y", 0o644, b"").unwrap();

        let text = String::from_utf8(archive.finish().unwrap()).unwrap();
        assert_eq!(text.matches("lib\0").count(), 1);
        assert_eq!(text.matches("lib/a\0").count(), 1);
        assert!(text.find("lib\0") < text.find("lib/a\0"));
    }

    #[test]
    fn a_path_that_climbs_is_refused() {
        let mut archive = Archive::default();

        assert!(archive.file("../init", 0o755, b"").is_err());
    }

    #[test]
    fn an_archive_ends_with_its_trailer_on_a_sector_boundary() {
        let bytes = Archive::default().finish().unwrap();

        assert_eq!(bytes.len(), 512);
        assert_eq!(&bytes[110..120], b"TRAILER!!!");
    }
}
