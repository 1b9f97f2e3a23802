//! Kernel modules for an initial root file system: a chosen few with all they depend on,
//! uncompressed, because busybox's `modprobe` knows dependencies and aliases but no compression.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cpio::Archive;

/// Adds to `archive` the modules `wanted` and all they depend on, from `folder`, the
/// `lib/modules/VERSION` of a kernel, with what `modprobe` reads. What is built in is left out.
pub fn add(archive: &mut Archive, folder: &Path, version: &str, wanted: &[&str]) -> Result<()> {
    let read_text = |name: &str| {
        let path = folder.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let (dependencies, aliases) = (read_text("modules.dep")?, read_text("modules.alias")?);
    let index = Index::parse(&dependencies);
    let files = index.closure(wanted);
    let place = format!("lib/modules/{version}");
    for file in &files {
        archive.file(
            &format!("{place}/{}", base(file)),
            0o644,
            &read(folder, file)?,
        )?;
    }
    let names: Vec<String> = files.iter().map(|file| name(file)).collect();
    archive.file(
        &format!("{place}/modules.dep"),
        0o644,
        index.subset(&files).as_bytes(),
    )?;
    archive.file(
        &format!("{place}/modules.alias"),
        0o644,
        aliases_of(&names, &aliases).as_bytes(),
    )
}

/// The uncompressed content of a module.
fn read(folder: &Path, file: &str) -> Result<Vec<u8>> {
    let path = folder.join(file);
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    if !file.ends_with(".xz") {
        return Ok(bytes);
    }
    let mut content = Vec::new();
    lzma_rust2::XzReader::new(bytes.as_slice(), true)
        .read_to_end(&mut content)
        .with_context(|| format!("cannot decompress {}", path.display()))?;
    Ok(content)
}

/// `modules.dep`: a line a module, "FILE: FILES IT NEEDS", all that is needed and not only the next.
struct Index<'a> {
    needs: BTreeMap<String, (&'a str, Vec<&'a str>)>,
}

impl<'a> Index<'a> {
    fn parse(text: &'a str) -> Self {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        let needs =
            lines.map(|(file, needed)| (name(file), (file, needed.split_whitespace().collect())));
        Self {
            needs: needs.collect(),
        }
    }

    /// The files of the modules `wanted` and of all they need, each once.
    fn closure(&self, wanted: &[&str]) -> Vec<&'a str> {
        let mut files = Vec::new();
        for (file, needed) in wanted
            .iter()
            .filter_map(|module| self.needs.get(&name(module)))
        {
            for file in needed.iter().chain([file]) {
                if !files.contains(file) {
                    files.push(file);
                }
            }
        }
        files
    }

    /// The index of `files` alone, which all lie in one folder, uncompressed.
    fn subset(&self, files: &[&str]) -> String {
        let chosen = files.iter().filter_map(|file| self.needs.get(&name(file)));
        let line = |(file, needed): &(&str, Vec<&str>)| {
            let needed: String = needed
                .iter()
                .map(|file| format!(" {}", base(file)))
                .collect();
            format!("{}:{needed}\n", base(file))
        };
        chosen.map(line).collect()
    }
}

/// The lines "alias PATTERN MODULE" of `aliases` for these modules.
fn aliases_of(names: &[String], aliases: &str) -> String {
    let wanted = |line: &&str| {
        line.rsplit(' ')
            .next()
            .is_some_and(|module| names.iter().any(|name| name == module))
    };
    aliases
        .lines()
        .filter(wanted)
        .map(|line| format!("{line}\n"))
        .collect()
}

/// The file name of a module without its folders and its compression's ending.
fn base(file: &str) -> &str {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.strip_suffix(".xz").unwrap_or(base)
}

/// The name of a module, whose file may be spelt with `-` where others write `_`.
fn name(file: &str) -> String {
    let base = base(file);
    base.split('.').next().unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "kernel/fs/9p/9p.ko.xz: kernel/fs/netfs/netfs.ko.xz kernel/net/9p/9pnet.ko.xz\n\
                         kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz\n\
                         kernel/net/9p/9pnet.ko.xz:\n\
                         kernel/drivers/char/hw_random/virtio-rng.ko.xz:\n";

    #[test]
    fn what_a_module_needs_comes_with_it_and_once() {
        let files = Index::parse(INDEX).closure(&["9pnet_virtio", "9p"]);

        assert_eq!(
            files,
            [
                "kernel/net/9p/9pnet.ko.xz",
                "kernel/net/9p/9pnet_virtio.ko.xz",
                "kernel/fs/netfs/netfs.ko.xz",
                "kernel/fs/9p/9p.ko.xz"
            ]
        );
    }

    #[test]
    fn the_index_of_a_few_modules_names_uncompressed_files_in_one_folder() {
        let index = Index::parse(INDEX);

        let subset = index.subset(&index.closure(&["9p"]));

        assert_eq!(subset, "9pnet.ko:\n9p.ko: netfs.ko 9pnet.ko\n");
    }

    #[test]
    fn dashes_and_underscores_name_the_same_module() {
        let files = Index::parse(INDEX).closure(&["virtio_rng"]);

        assert_eq!(files, ["kernel/drivers/char/hw_random/virtio-rng.ko.xz"]);
    }

    #[test]
    fn a_module_that_is_built_in_is_left_out() {
        assert!(Index::parse(INDEX).closure(&["virtio_pci"]).is_empty());
    }

    #[test]
    fn only_aliases_of_chosen_modules_are_kept() {
        let aliases =
            "# comment\nalias virtio:d00000004v* virtio_rng\nalias virtio:d00000002v* virtio_blk\n";

        assert_eq!(
            aliases_of(&["virtio_rng".to_owned()], aliases),
            "alias virtio:d00000004v* virtio_rng\n"
        );
    }
}
