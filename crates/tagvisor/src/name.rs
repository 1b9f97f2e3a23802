//! Names of running machines.
//!
//! A machine that runs holds the lock of a file in the runtime directory, `NAME/lock` in
//! `/run/tagvisor` or, for an ordinary user, `$XDG_RUNTIME_DIR/tagvisor`. The kernel drops the lock
//! when the program dies, however it dies, so what a killed machine left behind is in nobody's way.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Why a name cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no name.
    #[error("name `{0}`: use 1 to 64 letters, digits, `-`, `_` and `.`, the first no `-` or `.`")]
    Invalid(String),
    /// A machine of that name runs.
    #[error("name `{name}` is in use: a machine of that name runs{}; choose another with --name", process(.holder))]
    InUse {
        /// The name.
        name: String,
        /// What its lock file says of its process.
        holder: String,
    },
    /// The runtime directory cannot be used.
    #[error("cannot use the runtime directory {path}: {source}")]
    Directory {
        /// Which directory or file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

fn process(holder: &str) -> String {
    match holder.trim() {
        "" => String::new(),
        id => format!(" as process {id}"),
    }
}

/// A name, held. Dropping it gives it back.
#[derive(Debug)]
pub struct Name {
    directory: PathBuf,
    _lock: File,
}

impl Name {
    /// Takes `name` for this process.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn take(name: &str) -> Result<Self, Error> {
        Self::take_in(&runtime_directory(), name)
    }

    fn take_in(runtime: &Path, name: &str) -> Result<Self, Error> {
        if !is_valid(name) {
            return Err(Error::Invalid(name.into()));
        }
        let directory = runtime.join(name);
        let error = |source| Error::Directory {
            path: directory.clone(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(error)?;
        let path = directory.join("lock");
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(error)?;
        lock.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => Error::InUse {
                name: name.into(),
                holder: fs::read_to_string(&path).unwrap_or_default(),
            },
            TryLockError::Error(source) => error(source),
        })?;
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(error)?;
        Ok(Self {
            directory,
            _lock: lock,
        })
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        // While the lock is still held, so that nobody else's files are removed.
        if let Err(e) = fs::remove_dir_all(&self.directory) {
            tracing::warn!("cannot remove {}: {e}", self.directory.display());
        }
    }
}

fn is_valid(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=64).contains(&name.len()) && name.chars().all(allowed) && !name.starts_with(['-', '.'])
}

fn runtime_directory() -> PathBuf {
    // SAFETY: a query without demands.
    let root = unsafe { libc::geteuid() } == 0;
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) if !root && !directory.is_empty() => {
            PathBuf::from(directory).join("tagvisor")
        }
        _ => PathBuf::from("/run/tagvisor"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_held_until_it_is_dropped_and_leaves_nothing() {
        let runtime = tempfile::tempdir().unwrap();
        let first = Name::take_in(runtime.path(), "web").unwrap();

        let while_held = Name::take_in(runtime.path(), "web").unwrap_err();
        drop(first);
        let afterwards = Name::take_in(runtime.path(), "web");

        let expected = format!(
            "name `web` is in use: a machine of that name runs as process {}; choose another with --name",
            std::process::id()
        );
        assert_eq!(while_held.to_string(), expected);
        assert!(afterwards.is_ok());
        drop(afterwards);
        assert_eq!(fs::read_dir(runtime.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_machine_left_is_taken_over() {
        let runtime = tempfile::tempdir().unwrap();
        fs::create_dir(runtime.path().join("web")).unwrap();
        fs::write(runtime.path().join("web/lock"), "4711\n").unwrap();

        assert!(Name::take_in(runtime.path(), "web").is_ok());
    }

    #[test]
    fn names_that_leave_the_directory_or_hide_in_it_are_refused() {
        let runtime = tempfile::tempdir().unwrap();
        let refused = ["", "..", ".x", "a/b", "-x", "a b", &"x".repeat(65)]
            .map(|name| matches!(Name::take_in(runtime.path(), name), Err(Error::Invalid(_))));
        assert_eq!(refused, [true; 7]);
    }
}
