//! Names of running machines.
//!
//! A machine that runs holds the lock of a file in the runtime directory, `NAME/lock` in
//! `/run/tagvisor` or, for an ordinary user, `$XDG_RUNTIME_DIR/tagvisor`. The kernel drops the lock
//! when the program dies, however it dies, so what a killed machine left behind is in nobody's way.
//! The file goes with the machine, so the lock counts only while the file that is locked is the one
//! that is there ([`is_at`]). The machine's control socket is beside it, `NAME/api.sock`.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// How often a lock is tried that somebody holds: who only asks whether a machine runs holds it for a moment.
const LOCK_TRIES: u32 = 5;

/// How long to wait between two tries.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

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
    #[error("cannot use the runtime directory {path}: {source}{}", remedy(.source))]
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

fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        ErrorKind::PermissionDenied => {
            "; set XDG_RUNTIME_DIR to a directory of your own, or run this as root"
        }
        _ => "",
    }
}

/// A name, held. Dropping it gives it back.
#[derive(Debug)]
pub struct Name {
    directory: PathBuf,
    lock: File,
}

impl Name {
    /// Takes `name` for this process.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn take(name: &str) -> Result<Self, Error> {
        Self::take_in(&runtime_directory(), name, || {})
    }

    /// Takes `name` in the directory `runtime`. `before_lock` is called between opening the file and locking it.
    fn take_in(runtime: &Path, name: &str, mut before_lock: impl FnMut()) -> Result<Self, Error> {
        if !is_valid(name) {
            return Err(Error::Invalid(name.into()));
        }
        let directory = runtime.join(name);
        let error = |source| Error::Directory {
            path: directory.clone(),
            source,
        };
        let mut lock = loop {
            let Some(lock) = open(&directory).map_err(error)? else {
                continue;
            };
            before_lock();
            try_lock(&lock).map_err(|e| match e {
                TryLockError::WouldBlock => Error::InUse {
                    name: name.into(),
                    holder: fs::read_to_string(lock_path(&directory)).unwrap_or_default(),
                },
                TryLockError::Error(source) => error(source),
            })?;
            if is_at(&lock, &lock_path(&directory)).map_err(error)? {
                break lock;
            }
        };
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(error)?;
        Ok(Self { directory, lock })
    }

    /// Where the machine's control socket belongs.
    pub fn socket(&self) -> PathBuf {
        socket_path(&self.directory)
    }

    fn give_back(&self) -> io::Result<()> {
        // Whoever removed the file left the name to others.
        if !is_at(&self.lock, &lock_path(&self.directory))? {
            return Ok(());
        }
        // Its server removes it before, unless it was killed.
        match fs::remove_file(self.socket()) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        fs::remove_file(lock_path(&self.directory))?;
        match fs::remove_dir(&self.directory) {
            // The next machine of this name uses it already, or has gone as well.
            Err(e) if matches!(e.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::NotFound) => {
                Ok(())
            }
            removed => removed,
        }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        // While the lock is still held, so that nobody else's files are removed.
        if let Err(e) = self.give_back() {
            tracing::warn!("cannot remove {}: {e}", self.directory.display());
        }
    }
}

fn lock_path(directory: &Path) -> PathBuf {
    directory.join("lock")
}

fn socket_path(directory: &Path) -> PathBuf {
    directory.join("api.sock")
}

fn try_lock(lock: &File) -> Result<(), TryLockError> {
    for _ in 1..LOCK_TRIES {
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_PAUSE),
            result => return result,
        }
    }
    lock.try_lock()
}

/// A machine that runs, as others find it.
#[derive(Debug)]
pub struct Running {
    /// Its name.
    pub name: String,
    directory: PathBuf,
    lock: File,
}

impl Running {
    /// The machine `name`, if it runs.
    ///
    /// # Errors
    /// The runtime directory cannot be read.
    pub fn find(runtime: &Path, name: &str) -> Result<Option<Self>, Error> {
        if !is_valid(name) {
            return Err(Error::Invalid(name.into()));
        }
        let directory = runtime.join(name);
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(lock_path(&directory));
        let lock = match opened {
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            lock => lock.map_err(|source| Error::Directory {
                path: directory.clone(),
                source,
            })?,
        };
        let running = Self {
            name: name.into(),
            directory,
            lock,
        };
        Ok(running.is_running().then_some(running))
    }

    /// All machines that run, by their names.
    ///
    /// # Errors
    /// The runtime directory cannot be read.
    pub fn all(runtime: &Path) -> Result<Vec<Self>, Error> {
        let error = |source| Error::Directory {
            path: runtime.into(),
            source,
        };
        let entries = match fs::read_dir(runtime) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(error)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.map_err(error)?.file_name();
            if let Some(name) = name.to_str().filter(|name| is_valid(name)) {
                found.extend(Self::find(runtime, name)?);
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Whether it still does: somebody holds its lock.
    pub fn is_running(&self) -> bool {
        match self.lock.try_lock_shared() {
            Err(TryLockError::WouldBlock) => true,
            Err(TryLockError::Error(_)) => false,
            Ok(()) => {
                let _ = self.lock.unlock();
                false
            }
        }
    }

    /// Its control socket.
    pub fn socket(&self) -> PathBuf {
        socket_path(&self.directory)
    }

    /// Its process, as it says itself.
    pub fn process(&self) -> Option<i32> {
        let text = fs::read_to_string(lock_path(&self.directory)).ok()?;
        text.trim().parse().ok().filter(|id| *id > 0)
    }

    /// Whether the process `id` has the lock's file open, so that it is not just another one that was given the number
    /// of one that died.
    pub fn is_of(&self, id: i32) -> io::Result<bool> {
        let lock = self.lock.metadata()?;
        for entry in fs::read_dir(format!("/proc/{id}/fd"))? {
            // A descriptor may be closed meanwhile.
            if let Ok(file) = fs::metadata(entry?.path())
                && (file.dev(), file.ino()) == (lock.dev(), lock.ino())
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Opens the lock file of a directory, and makes both if need be. `None` if the directory's last
/// user removed it meanwhile.
fn open(directory: &Path) -> io::Result<Option<File>> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(lock_path(directory));
    match opened {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        lock => lock.map(Some),
    }
}

/// Whether `file` is the one at `path`, and not one that was there before.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        there => Ok(identity(there?) == identity(file.metadata()?)),
    }
}

fn is_valid(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=64).contains(&name.len()) && name.chars().all(allowed) && !name.starts_with(['-', '.'])
}

/// Where this user's machines are.
pub fn runtime_directory() -> PathBuf {
    let root = rustix::process::geteuid().is_root();
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

    fn take_in(runtime: &tempfile::TempDir, name: &str) -> Result<Name, Error> {
        Name::take_in(runtime.path(), name, || {})
    }

    #[test]
    fn a_name_is_held_until_it_is_dropped_and_leaves_nothing() {
        let runtime = tempfile::tempdir().unwrap();
        let first = take_in(&runtime, "web").unwrap();

        let while_held = take_in(&runtime, "web").unwrap_err();
        drop(first);
        let afterwards = take_in(&runtime, "web");

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

        assert!(take_in(&runtime, "web").is_ok());
    }

    #[test]
    fn names_that_leave_the_directory_or_hide_in_it_are_refused() {
        let runtime = tempfile::tempdir().unwrap();
        let refused = ["", "..", ".x", "a/b", "-x", "a b", &"x".repeat(65)]
            .map(|name| matches!(take_in(&runtime, name), Err(Error::Invalid(_))));
        assert_eq!(refused, [true; 7]);
    }

    #[test]
    fn a_lock_on_a_file_that_was_removed_meanwhile_is_taken_again() {
        let runtime = tempfile::tempdir().unwrap();
        let mut leaving = Some(take_in(&runtime, "web").unwrap());

        let name = Name::take_in(runtime.path(), "web", || drop(leaving.take())).unwrap();

        assert!(is_at(&name.lock, &runtime.path().join("web/lock")).unwrap());
        assert!(matches!(take_in(&runtime, "web"), Err(Error::InUse { .. })));
    }

    #[test]
    fn of_two_who_come_as_a_machine_leaves_one_gets_its_name() {
        let runtime = tempfile::tempdir().unwrap();
        let mut leaving = Some(take_in(&runtime, "web").unwrap());
        let mut quicker = None;

        let slower = Name::take_in(runtime.path(), "web", || {
            drop(leaving.take());
            quicker.get_or_insert_with(|| take_in(&runtime, "web").unwrap());
        });

        assert!(matches!(slower, Err(Error::InUse { .. })));
        assert!(is_at(&quicker.unwrap().lock, &runtime.path().join("web/lock")).unwrap());
    }

    #[test]
    fn a_machine_whose_files_were_removed_leaves_those_of_the_next_alone() {
        let runtime = tempfile::tempdir().unwrap();
        let first = take_in(&runtime, "web").unwrap();
        fs::remove_dir_all(runtime.path().join("web")).unwrap();
        let second = take_in(&runtime, "web").unwrap();

        drop(first);

        assert!(is_at(&second.lock, &runtime.path().join("web/lock")).unwrap());
    }

    #[test]
    fn a_name_is_given_back_with_and_without_its_socket() {
        let runtime = tempfile::tempdir().unwrap();
        let without = take_in(&runtime, "a").unwrap();
        let with = take_in(&runtime, "b").unwrap();
        fs::write(with.socket(), "").unwrap();

        drop((without, with));

        assert_eq!(fs::read_dir(runtime.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_machine_is_found_while_it_runs() {
        let runtime = tempfile::tempdir().unwrap();
        let name = take_in(&runtime, "web").unwrap();
        let running = Running::find(runtime.path(), "web").unwrap().unwrap();
        let id = std::process::id().cast_signed();

        assert_eq!(running.process(), Some(id));
        assert!(running.is_of(id).unwrap());
        assert_eq!(running.socket(), name.socket());
        drop(name);
        assert!(!running.is_running());
        assert!(Running::find(runtime.path(), "web").unwrap().is_none());
    }

    #[test]
    fn a_name_is_taken_though_somebody_just_asks_for_it() {
        let runtime = tempfile::tempdir().unwrap();
        fs::create_dir(runtime.path().join("web")).unwrap();
        let asking = File::create(runtime.path().join("web/lock")).unwrap();
        asking.lock_shared().unwrap();
        let ends = thread::spawn(move || {
            thread::sleep(LOCK_PAUSE);
            drop(asking);
        });

        let taken = take_in(&runtime, "web");

        ends.join().unwrap();
        assert!(taken.is_ok());
    }

    #[test]
    fn a_user_without_a_runtime_directory_is_told_what_to_do() {
        let error = Error::Directory {
            path: "/run/tagvisor/web".into(),
            source: ErrorKind::PermissionDenied.into(),
        };

        assert_eq!(
            error.to_string(),
            "cannot use the runtime directory /run/tagvisor/web: permission denied; \
             set XDG_RUNTIME_DIR to a directory of your own, or run this as root"
        );
    }
}
