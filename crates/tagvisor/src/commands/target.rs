//! What `tagvisor tags` and `tagvisor core` look at: a snapshot, with its bases.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use engine::VcpuState;
use inspect::SnapshotMemory;
use stream::Snapshot;
use vmm::layout::{PAGE_SIZE, RAM_START, max_ram};
use vmm::machine::snapshot::{self, ReadError, SavedMachine};

use crate::name;

/// Why it cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is a machine that runs.
    #[error(
        "`{0}` is a machine that runs, and only snapshots can be looked at: save one first, with `tagvisor snapshot {0} FILE`, and give FILE"
    )]
    Running(String),
    /// There is no such file, nor a machine of that name.
    #[error("snapshot {path}: {source}")]
    Open {
        /// Which.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It is damaged, or no snapshot.
    #[error("snapshot {path}: {source}")]
    Unsound {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        source: ReadError,
    },
}

/// A snapshot, opened.
pub struct Target {
    snapshot: Snapshot<File>,
    /// Pages; none if it is memory alone, without a machine.
    ram: Option<Range<u64>>,
    vcpus: Vec<VcpuState>,
}

impl Target {
    /// Opens a snapshot. Those that it is based on are looked for beside it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        must_be_file(path)?;
        let unsound = |source| Error::Unsound {
            path: path.into(),
            source,
        };
        let snapshot = snapshot::open(path, &[]).map_err(|e| unsound(e.into()))?;
        match SavedMachine::read(&snapshot) {
            Ok(saved) => {
                let first = RAM_START / PAGE_SIZE;
                // What the file says is not to be believed.
                let pages = saved.config.memory.0.min(max_ram(52)) / PAGE_SIZE;
                Ok(Self {
                    snapshot,
                    ram: Some(first..first + pages),
                    vcpus: saved.state.vcpus,
                })
            }
            Err(ReadError::StateMissing(_)) => Ok(Self {
                snapshot,
                ram: None,
                vcpus: Vec::new(),
            }),
            Err(error) => Err(unsound(error)),
        }
    }

    /// Its memory.
    pub fn memory(&self) -> SnapshotMemory<'_, File> {
        SnapshotMemory::new(&self.snapshot, self.ram.clone(), self.vcpus.clone())
    }
}

/// A socket is a machine's, and so is what is no file but the name of a machine.
fn must_be_file(path: &Path) -> Result<(), Error> {
    let running = || Error::Running(path.display().to_string());
    match path.metadata() {
        Ok(there) if there.file_type().is_socket() => Err(running()),
        Ok(_) => Ok(()),
        Err(source) => {
            let named = path.to_str().filter(|name| !name.contains('/'));
            let runs = named.is_some_and(|name| {
                name::Running::find(&name::runtime_directory(), name).is_ok_and(|it| it.is_some())
            });
            if runs {
                return Err(running());
            }
            Err(Error::Open {
                path: path.into(),
                source,
            })
        }
    }
}
