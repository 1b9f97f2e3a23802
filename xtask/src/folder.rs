//! The temporary folder of a run: sockets, logs, and what the host sees at `/lab`. It goes with
//! its value. A lock on it tells whether its run still lives, so that what a killed run left is
//! removed by the next.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

const PREFIX: &str = "tagvisor-lab-";

/// The folder of this run.
pub struct RunFolder {
    folder: TempDir,
    _lock: File,
}

impl RunFolder {
    /// Creates it where `TMPDIR` says.
    pub fn create() -> Result<Self> {
        Self::create_in(&std::env::temp_dir())
    }

    fn create_in(place: &Path) -> Result<Self> {
        remove_abandoned(place);
        let folder = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(place)
            .with_context(|| {
                format!(
                    "cannot create a folder in {}: TMPDIR chooses another place",
                    place.display()
                )
            })?;
        let lock = lock(folder.path()).context("cannot lock a new folder")?;
        Ok(Self {
            folder,
            _lock: lock,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

fn lock(folder: &Path) -> Result<File> {
    let file = File::open(folder)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

/// Removes folders whose run is no more. What cannot be removed, such as another user's, stays.
fn remove_abandoned(place: &Path) {
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if ours && is_older_than_a_minute(&entry) && lock(&entry.path()).is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A younger one may be about to be locked.
fn is_older_than_a_minute(entry: &fs::DirEntry) -> bool {
    let age = entry
        .metadata()
        .ok()
        .and_then(|metadata| metadata.modified().ok()?.elapsed().ok());
    age.is_some_and(|age| age.as_secs() > 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    fn make_old(path: &Path) {
        let old = SystemTime::now() - Duration::from_secs(3600);
        File::open(path).unwrap().set_modified(old).unwrap();
    }

    #[test]
    fn an_abandoned_folder_is_removed_by_the_next_run() {
        let place = tempfile::tempdir().unwrap();
        let abandoned = place.path().join("tagvisor-lab-x");
        fs::create_dir(&abandoned).unwrap();
        make_old(&abandoned);

        let run = RunFolder::create_in(place.path()).unwrap();

        assert!(!abandoned.exists());
        assert!(run.path().exists());
    }

    #[test]
    fn a_folder_in_use_is_kept() {
        let place = tempfile::tempdir().unwrap();
        let first = RunFolder::create_in(place.path()).unwrap();
        make_old(first.path());

        let _second = RunFolder::create_in(place.path()).unwrap();

        assert!(first.path().exists());
    }
}
