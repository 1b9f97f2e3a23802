//! The user's cache folder: `$XDG_CACHE_HOME/tagvisor` or `~/.cache/tagvisor`.
//!
//! An entry is a folder named after what it is and a hash of its recipe, so that a changed recipe
//! makes a new entry. It is built under a temporary name and renamed when whole; a lock lets one
//! xtask build at a time, and whoever has the lock removes what an interrupted build left.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::interrupt;
use crate::progress::{Step, say};

const UNFINISHED: &str = "unfinished-";

/// The cache folder.
#[derive(Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// Finds the cache folder and creates it if need be.
    pub fn open() -> Result<Self> {
        let base = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
            (Some(cache), _) if Path::new(&cache).is_absolute() => PathBuf::from(cache),
            (_, Some(home)) => Path::new(&home).join(".cache"),
            _ => bail!(
                "neither HOME nor XDG_CACHE_HOME is set: set one, the lab keeps its downloads there"
            ),
        };
        Self::at(base.join("tagvisor"))
    }

    fn at(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder).with_context(|| {
            format!(
                "cannot create the cache folder {}: make it writable or set XDG_CACHE_HOME",
                folder.display()
            )
        })?;
        Ok(Self { folder })
    }

    /// Where the cache is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the entry `name` made by `recipe`, after calling `build` with an empty folder to
    /// fill if there is none yet.
    pub fn entry(
        &self,
        name: &str,
        recipe: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let entry = self.folder.join(format!("{name}-{}", short_hash(recipe)));
        if entry.exists() {
            return Ok(entry);
        }
        let _lock = self.lock()?;
        // Another xtask may have built it while this one waited for the lock.
        if entry.exists() {
            return Ok(entry);
        }
        self.remove_unfinished()?;
        let unfinished = self.folder.join(format!("{UNFINISHED}{name}"));
        fs::create_dir(&unfinished)
            .with_context(|| format!("cannot create {}", unfinished.display()))?;
        let step = Step::start(&format!("setting up {name}"));
        if let Err(error) = build(&unfinished) {
            drop(step);
            // The next build removes what cannot be removed now.
            let _ = fs::remove_dir_all(&unfinished);
            return Err(error.context(format!("cannot set up {name}")));
        }
        fs::rename(&unfinished, &entry).with_context(|| {
            format!(
                "cannot rename {} to {}",
                unfinished.display(),
                entry.display()
            )
        })?;
        step.done();
        Ok(entry)
    }

    /// Removes every entry.
    pub fn clear(&self) -> Result<()> {
        let _lock = self.lock()?;
        for item in fs::read_dir(&self.folder)? {
            let item = item?;
            if item.file_type()?.is_dir() {
                fs::remove_dir_all(item.path())
                    .with_context(|| format!("cannot remove {}", item.path().display()))?;
            }
        }
        Ok(())
    }

    fn lock(&self) -> Result<File> {
        let path = self.folder.join("lock");
        let file =
            File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(file);
        }
        say("another xtask is setting up the lab; waiting for it");
        while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            interrupt::check()?;
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        Ok(file)
    }

    fn remove_unfinished(&self) -> Result<()> {
        for item in fs::read_dir(&self.folder)? {
            let item = item?;
            if item.file_name().to_string_lossy().starts_with(UNFINISHED) {
                fs::remove_dir_all(item.path())
                    .with_context(|| format!("cannot remove {}", item.path().display()))?;
            }
        }
        Ok(())
    }
}

fn short_hash(recipe: &str) -> String {
    let digest = Sha256::digest(recipe.as_bytes());
    digest
        .iter()
        .take(5)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("tagvisor")).unwrap();
        (folder, cache)
    }

    #[test]
    fn an_entry_is_built_once() {
        let (_folder, cache) = cache();

        let first = cache
            .entry("thing", "v1", |path| Ok(fs::write(path.join("x"), "1")?))
            .unwrap();
        let second = cache
            .entry("thing", "v1", |_| bail!("built twice"))
            .unwrap();

        assert_eq!(first, second);
        assert_eq!(fs::read_to_string(second.join("x")).unwrap(), "1");
    }

    #[test]
    fn a_changed_recipe_makes_another_entry() {
        let (_folder, cache) = cache();

        let first = cache.entry("thing", "v1", |_| Ok(())).unwrap();
        let second = cache.entry("thing", "v2", |_| Ok(())).unwrap();

        assert_ne!(first, second);
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let (_folder, cache) = cache();

        let result = cache.entry("thing", "v1", |path| {
            fs::write(path.join("x"), "1")?;
            bail!("no network")
        });

        assert!(format!("{:#}", result.unwrap_err()).contains("no network"));
        let names: Vec<_> = fs::read_dir(cache.folder())
            .unwrap()
            .map(|item| item.unwrap().file_name())
            .collect();
        assert_eq!(names, ["lock"]);
    }

    #[test]
    fn what_a_killed_build_left_is_removed_by_the_next() {
        let (_folder, cache) = cache();
        let left = cache.folder().join("unfinished-other");
        fs::create_dir(&left).unwrap();

        cache.entry("thing", "v1", |_| Ok(())).unwrap();

        assert!(!left.exists());
    }
}
