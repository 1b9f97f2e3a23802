//! What `tagvisor tags` and `tagvisor core` look at: a machine that runs, or a snapshot with its bases.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use engine::VcpuState;
use inspect::{SnapshotMemory, TaggedMemory};
use stream::Snapshot;
use vmm::layout::{PAGE_SIZE, RAM_START, max_ram};
use vmm::machine::snapshot::{self, ReadError, SavedMachine};

use super::machine::{self, Machine};
use crate::api::model::InspectConfig;
use crate::inspection::Memory;
use crate::name;

/// Which machine or snapshot.
#[derive(ClapArgs)]
pub struct TargetArgs {
    /// A machine's name, or a snapshot's file; the path of a control socket is a machine's, too
    target: PathBuf,
    #[command(flatten)]
    how: How,
}

/// How a machine is looked at.
#[derive(Clone, Copy, ClapArgs)]
pub struct How {
    /// Let a machine's guest run on meanwhile: what is seen is then of different moments. Otherwise it stands still for as
    /// long as the command takes
    #[arg(long)]
    live: bool,
}

impl TargetArgs {
    /// Opens what is meant.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(&self) -> Result<Target, Error> {
        Target::find(&self.target)?.open(self.how)
    }
}

/// Why it cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is a machine, and a file.
    #[error(
        "`{0}` is a machine that runs, and a file is called so too: give ./{0} for the file, and the path of its control socket, \
         {socket}, for the machine", socket = .1.display()
    )]
    Ambiguous(String, PathBuf),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// What the machine lends cannot be read.
    #[error("machine `{name}`: {source}")]
    Memory {
        /// The machine.
        name: String,
        /// What is wrong.
        source: inspect::Error,
    },
    /// `--live` of a file.
    #[error("--live: {0} is a snapshot, in which nothing runs")]
    NotLive(PathBuf),
    /// A machine, compared with itself.
    #[error(
        "both are the machine `{0}`: save it first, with `tagvisor snapshot {0} FILE`, and compare the file with it"
    )]
    SameMachine(String),
    /// There is no such file, nor a machine of that name.
    #[error("there is no file `{name}` here, and {source}")]
    Neither {
        /// The name.
        name: String,
        /// Why it is no machine.
        source: machine::Error,
    },
    /// There is no such file.
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

/// What a user means, which is not yet opened.
enum Found {
    Machine(Machine),
    File(PathBuf),
}

/// A machine or a snapshot, opened. A machine's guest stands still until it is dropped.
pub enum Target {
    /// A machine.
    Machine(Box<Memory>),
    /// A snapshot.
    Snapshot(Saved),
}

/// A snapshot, opened.
pub struct Saved {
    snapshot: Snapshot<File>,
    /// Pages; none if it is memory alone, without a machine.
    ram: Option<Range<u64>>,
    vcpus: Vec<VcpuState>,
}

impl Target {
    /// Finds what is meant by `path`: a path with a `/`, and what is a file, is a file, or the control socket of a machine;
    /// anything else is a machine's name.
    fn find(path: &Path) -> Result<Found, Error> {
        let there = path.metadata();
        let name = path.to_str().filter(|name| !name.contains('/'));
        let is_socket = |there: &std::fs::Metadata| there.file_type().is_socket();
        match (name, there) {
            (_, Ok(there)) if is_socket(&there) => {
                let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
                Ok(Found::Machine(Machine::find(&path.to_string_lossy())?))
            }
            (Some(name), Ok(_)) => {
                let running = name::Running::find(&name::runtime_directory(), name);
                match running {
                    Ok(Some(running)) => Err(Error::Ambiguous(name.into(), running.socket())),
                    _ => Ok(Found::File(path.into())),
                }
            }
            (Some(name), Err(_)) => match Machine::find(name) {
                Ok(machine) => Ok(Found::Machine(machine)),
                Err(source) => Err(Error::Neither {
                    name: name.into(),
                    source,
                }),
            },
            (None, _) => Ok(Found::File(path.into())),
        }
    }

    /// Two that are to be compared, each of which may be a machine, but not both the same one.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open_both(first: &Path, second: &Path, how: How) -> Result<[Self; 2], Error> {
        let [first, second] = [Self::find(first)?, Self::find(second)?];
        let how_of = |found: &Found| match found {
            Found::Machine(_) => how,
            Found::File(_) => How { live: false },
        };
        let hows = [how_of(&first), how_of(&second)];
        if let (Found::File(path), Found::File(_)) = (&first, &second)
            && how.live
        {
            return Err(Error::NotLive(path.clone()));
        }
        let reversed = match (&first, &second) {
            (Found::Machine(one), Found::Machine(other)) => {
                let [one_socket, other_socket] =
                    [one, other].map(|machine| machine.client.identity());
                if one_socket == other_socket {
                    return Err(Error::SameMachine(one.name.clone()));
                }
                // In the same order whoever asks: two readers of two machines would otherwise wait for each other.
                one_socket > other_socket
            }
            _ => false,
        };
        if reversed {
            let second = second.open(hows[1])?;
            return Ok([first.open(hows[0])?, second]);
        }
        Ok([first.open(hows[0])?, second.open(hows[1])?])
    }

    /// Its memory.
    pub fn memory(&mut self) -> Box<dyn TaggedMemory + '_> {
        match self {
            Self::Machine(memory) => Box::new(memory.as_mut()),
            Self::Snapshot(saved) => Box::new(SnapshotMemory::new(
                &saved.snapshot,
                saved.ram.clone(),
                saved.vcpus.clone(),
            )),
        }
    }
}

impl Found {
    fn open(self, how: How) -> Result<Target, Error> {
        match self {
            Self::Machine(machine) => {
                let memory = |source| Error::Memory {
                    name: machine.name.clone(),
                    source,
                };
                let config = InspectConfig {
                    live: how.live,
                    reader: Some(format!("process {}", std::process::id())),
                };
                let reader = machine.ask(|client| client.inspect(&config))?;
                Ok(Target::Machine(Box::new(reader.memory().map_err(memory)?)))
            }
            Self::File(path) if how.live => Err(Error::NotLive(path)),
            Self::File(path) => Ok(Target::Snapshot(Saved::open(&path)?)),
        }
    }
}

impl Saved {
    /// Opens a snapshot. Those that it is based on are looked for beside it.
    fn open(path: &Path) -> Result<Self, Error> {
        let unsound = |source| Error::Unsound {
            path: path.into(),
            source,
        };
        if let Err(source) = path.metadata() {
            return Err(Error::Open {
                path: path.into(),
                source,
            });
        }
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
}
