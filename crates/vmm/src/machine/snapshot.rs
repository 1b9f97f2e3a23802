//! Snapshots of machines: a file of pages with their tags (`stream`), and four saved states.
//!
//! | state | what |
//! |---|---|
//! | `config` | the [`MachineConfig`], JSON |
//! | `platform` | what the guest saw of its machine ([`Platform`]), JSON |
//! | `machine` | all but memory ([`MachineState`]), JSON |
//! | `disks` | the disks as they were ([`Disks`]), JSON |
//!
//! What is on the disks is not in a snapshot. A guest that goes on from one must find its disks as they were, so a
//! restore is refused when a file of theirs was written since.
//!
//! A guest that runs goes on while its memory is written: first all of it, then, by the dirty log, what
//! changed meanwhile, until that is little or does not become less; then it stands still for as long as its
//! vCPUs tell their state and, at the same time, the last pages are copied aside, which are written when it runs
//! again. Of a page that was written several times the last counts, so what is in the file is memory as it was at that
//! moment.
//!
//! The file comes into being under another name, is synced, and takes its own name last.

use std::fs::{self, File};
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use engine::{Capabilities, Hypervisor, Vcpu, Vm};
use mte::TagPage;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use stream::{
    Batch, Chunk, Compression, Cursor, Encoder, Header, Identity, Only, Page, PageSet, PageSource,
    ReadAt, Sending, Snapshot, State, StreamReader, StreamWriter, send, send_changes,
};
use tempfile::NamedTempFile;

use super::dirty_log::DirtyLog;
use super::{Machine, MachineState, VcpuOf, cpu};
use crate::config::{DiskConfig, MachineConfig, OverlayConfig};
use crate::memory::base::Base;
use crate::memory::dirty::dirty_pages;
use crate::memory::pages::GuestPages;
#[cfg(target_arch = "aarch64")]
use crate::memory::tags::AliasTags;
use crate::memory::tags::TagStore;
use crate::memory::untagged::Untagged;
use crate::memory::{GuestMemory, MemoryPlan};

/// The version of the states' formats: 2 has the values of registers in hexadecimal, 1 had lists of numbers.
pub(super) const STATE_VERSION: u32 = 2;
/// Those that can be read.
pub(super) const READABLE: RangeInclusive<u32> = 1..=STATE_VERSION;
pub(super) const CONFIG: &str = "config";
pub(super) const PLATFORM: &str = "platform";
pub(super) const MACHINE: &str = "machine";
const DISKS: &str = "disks";

/// So few pages that it pays to stop the guest for them, rather than to go through them while it runs.
const FEW: u64 = 16;
/// How many pages are copied aside for the time that the guest stands still, at most: 64 MiB.
const HELD: u64 = 16384;
/// How often memory is gone through while the guest runs, at most.
const MAX_ROUNDS: u32 = 6;

/// Why a snapshot was not written. The guest goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("snapshot {path}: cannot {action}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// There is something there that is no file.
    #[error("snapshot {0}: it is there, and no regular file; choose another name")]
    NoFile(PathBuf),
    /// Pages or the stream.
    #[error("snapshot {path}: {source}")]
    Stream {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: stream::Error,
    },
    /// The machine.
    #[error(transparent)]
    Machine(#[from] super::Error),
    /// A disk whose contents would be lost.
    #[error(
        "disk {0} has an overlay without a name, which ends with its machine: nobody could go on from a snapshot; start the machine with overlay=FILE"
    )]
    TemporaryOverlay(PathBuf),
    /// There is no machine any more that could be saved.
    #[error("the machine ended while its snapshot was written")]
    Ended,
}

/// Why a file is not one that a machine can be restored from.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The stream.
    #[error(transparent)]
    Stream(#[from] stream::Error),
    /// A state is missing: it is a stream of something else.
    #[error("it has no saved state `{0}`: it is no snapshot of a machine")]
    StateMissing(&'static str),
    /// A state of a version that this Tagvisor does not know.
    #[error(
        "its saved state `{name}` has version {version}, this Tagvisor reads versions {} to {}",
        READABLE.start(), READABLE.end()
    )]
    StateVersion {
        /// Which.
        name: &'static str,
        /// Its version.
        version: u32,
    },
    /// A state says nothing.
    #[error("its saved state `{name}` is wrong: {source}")]
    State {
        /// Which.
        name: &'static str,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A disk is not as it was.
    #[error(
        "disk file {path} {what} since the snapshot was taken, whose guest remembers other contents; restore with the disk as it was: pause a machine, save it, and copy or keep its disks before it goes on"
    )]
    Disk {
        /// Which file.
        path: PathBuf,
        /// What happened to it.
        what: &'static str,
    },
    /// Its memory cannot be had.
    #[error(transparent)]
    Memory(Box<super::Error>),
    /// The guest's clocks would go wrong.
    #[error(transparent)]
    Counter(#[from] OtherCounter),
    /// It is of another kind of machine.
    #[error("it is of a machine with architecture {0}, this Tagvisor has aarch64")]
    Architecture(String),
}

/// What a snapshot is to be.
pub struct Options<'a, F> {
    /// The machine's configuration, as whoever restores it is to have it.
    pub config: &'a MachineConfig,
    /// Write what changed since this snapshot, and no more.
    pub base: Option<&'a Snapshot<F>>,
    /// What is made of data.
    pub compression: Compression,
    /// How far it is, for others to see, and whether they want it to be given up.
    pub progress: &'a Progress,
}

/// How far a snapshot is.
#[derive(Debug, Default)]
pub struct Progress {
    /// Pages read.
    pub pages_done: AtomicU64,
    /// Pages to be read, as far as is known.
    pub pages_total: AtomicU64,
    /// Bytes written.
    pub bytes: AtomicU64,
    /// It is to be given up.
    pub cancelled: AtomicBool,
}

/// What a snapshot became.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// What a delta on it names as its base.
    pub identity: Identity,
    /// Bytes of the file.
    pub bytes: u64,
    /// Pages written, each as often as it was.
    pub pages: u64,
    /// How often memory was gone through.
    pub rounds: u32,
    /// From the first page to the synced file.
    pub total: Duration,
    /// For how long the guest stood still; none if it was paused before.
    pub blackout: Option<Duration>,
}

/// What the guest saw of its machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Of its CPUs.
    pub architecture: String,
    /// Its MTE, in words.
    pub mte: Option<String>,
    /// What its CPUs have, by name, with a level where that says more.
    pub cpu_features: Vec<String>,
    /// The version of the Tagvisor that wrote it.
    pub tagvisor: String,
    /// How often its counters count in a second; none of a Tagvisor that did not say.
    #[serde(default)]
    pub counter_hz: Option<u64>,
}

impl Platform {
    /// Whether the guest's counters would go on here as fast as it takes for granted.
    ///
    /// # Errors
    /// They would not.
    pub fn check_counter(&self, host: &Capabilities) -> Result<(), OtherCounter> {
        match self.counter_hz {
            Some(guest) if guest != host.counter_hz => Err(OtherCounter {
                guest,
                here: host.counter_hz,
            }),
            _ => Ok(()),
        }
    }
}

/// The counter of this host has another frequency than the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest's counter counts {guest} times a second and this host's {here}: its clocks would go wrong; let it go on on a host \
     with the same counter"
)]
pub struct OtherCounter {
    /// What the guest has seen so far.
    pub guest: u64,
    /// What it would see here.
    pub here: u64,
}

/// A machine but for its memory, as it is in a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedMachine {
    /// Its configuration.
    pub config: MachineConfig,
    /// What its guest saw.
    pub platform: Platform,
    /// Its state.
    pub state: MachineState,
    /// Its disks' files as they were.
    pub disks: Disks,
}

/// The files of a machine's disks, in the order of disks, each with its overlay if it has one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disks(Vec<Vec<DiskFile>>);

/// When a file was written last, and its size. A copy that keeps times (`cp --preserve`) passes for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DiskFile {
    bytes: u64,
    /// Seconds and nanoseconds since 1970; none of a block device, which does not say.
    modified: Option<(i64, i64)>,
}

impl Disks {
    /// The files of these disks, as they are now.
    fn of(disks: &[DiskConfig]) -> Result<Self, (PathBuf, io::Error)> {
        let files = |disk| {
            let stamp = |path: &PathBuf| DiskFile::of(path).map_err(|e| (path.clone(), e));
            disk_files(disk).iter().map(stamp).collect()
        };
        Ok(Self(disks.iter().map(files).collect::<Result<_, _>>()?))
    }
}

impl DiskFile {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            bytes: metadata.len(),
            modified: metadata
                .is_file()
                .then(|| (metadata.mtime(), metadata.mtime_nsec())),
        })
    }
}

fn disk_files(disk: &DiskConfig) -> Vec<PathBuf> {
    let overlay = match &disk.overlay {
        Some(OverlayConfig::File(path)) => Some(path.clone()),
        Some(OverlayConfig::Temporary) | None => None,
    };
    [disk.path.clone()].into_iter().chain(overlay).collect()
}

impl SavedMachine {
    /// Reads a snapshot's states.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn read<F: ReadAt>(snapshot: &Snapshot<F>) -> Result<Self, ReadError> {
        let mut states = Vec::new();
        snapshot.states(|state| {
            states.push((
                state.name.to_owned(),
                state.version,
                state.data.into_owned(),
            ));
            Ok(())
        })?;
        let platform: Platform = parse(&states, PLATFORM)?;
        if platform.architecture != ARCHITECTURE {
            return Err(ReadError::Architecture(platform.architecture));
        }
        Ok(Self {
            config: parse(&states, CONFIG)?,
            platform,
            state: parse(&states, MACHINE)?,
            disks: parse(&states, DISKS)?,
        })
    }

    /// Whether it can go on on this host, as far as is known without building a machine.
    ///
    /// # Errors
    /// [`ReadError::Counter`].
    pub fn check_host(&self, host: &Capabilities) -> Result<(), ReadError> {
        Ok(self.platform.check_counter(host)?)
    }

    /// Whether the disks of its configuration are as they were.
    ///
    /// # Errors
    /// [`ReadError::Disk`].
    pub fn check_disks(&self) -> Result<(), ReadError> {
        let changed = |(path, what)| Err(ReadError::Disk { path, what });
        for (disk, files) in self.config.disk.iter().zip(&self.disks.0) {
            for (path, then) in disk_files(disk).into_iter().zip(files) {
                match DiskFile::of(&path) {
                    Err(_) => return changed((path, "is gone or cannot be read")),
                    Ok(now) if now != *then => return changed((path, "was written")),
                    Ok(_) => {}
                }
            }
        }
        Ok(())
    }
}

pub(super) const ARCHITECTURE: &str = "aarch64";

fn parse<T: DeserializeOwned>(
    states: &[(String, u32, Vec<u8>)],
    name: &'static str,
) -> Result<T, ReadError> {
    let found = states.iter().find(|(found, ..)| found == name);
    let (_, version, data) = found.ok_or(ReadError::StateMissing(name))?;
    if !READABLE.contains(version) {
        return Err(ReadError::StateVersion {
            name,
            version: *version,
        });
    }
    serde_json::from_slice(data).map_err(|source| ReadError::State { name, source })
}

/// Opens a snapshot. The snapshots it is based on are looked for among `bases`, then beside it and beside those, whatever
/// their names: a snapshot is known by its identity.
///
/// # Errors
/// Those of [`Snapshot::open`].
pub fn open(path: &Path, bases: &[PathBuf]) -> stream::Result<Snapshot<File>> {
    let mut candidates = bases.to_vec();
    for near in [path].into_iter().chain(bases.iter().map(PathBuf::as_path)) {
        let entries = fs::read_dir(directory(near))
            .into_iter()
            .flatten()
            .flatten();
        let files = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
        candidates.extend(files.map(|entry| entry.path()));
    }
    let open = |path: &Path| {
        File::open(path).map_err(|source| stream::Error::Io {
            action: "open the snapshot",
            source,
        })
    };
    Snapshot::open(open(path)?, |wanted| {
        let is_wanted = |path: &&PathBuf| {
            let header = File::open(path)
                .ok()
                .and_then(|file| StreamReader::new(file).ok());
            header.is_some_and(|reader| reader.header().id == wanted.id)
        };
        candidates
            .iter()
            .find(is_wanted)
            .map(|path| open(path))
            .transpose()
    })
}

/// Makes a base for clones of a snapshot's memory, data and tags.
///
/// # Errors
/// The host has not the memory, or no MTE where the guest has it; the snapshot is damaged.
pub fn base_of<F: ReadAt>(
    snapshot: &Snapshot<F>,
    saved: &SavedMachine,
) -> Result<Base, super::Error> {
    let mte = snapshot.metadata().has_tags();
    let memory = GuestMemory::new(saved.config.memory.0, MemoryPlan::of_base(mte))?;
    let memory = Arc::new(memory);
    let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let tags = mte.then(|| base_tags(&memory)).transpose()?;
    let untagged = Arc::new(Untagged::new(memory.size()));
    let pages = GuestPages::of_new(memory.clone(), tags, untagged);
    stream::restore(snapshot, &pages, threads)?;
    drop(pages);
    let memory = Arc::into_inner(memory).expect("what shared it was dropped");
    Ok(memory.into_base()?)
}

#[cfg(target_arch = "aarch64")]
fn base_tags(memory: &Arc<GuestMemory>) -> Result<Box<dyn TagStore>, super::Error> {
    let tags = AliasTags::new(memory.clone()).ok_or(engine::Error::MteUnsupported)?;
    Ok(Box::new(tags))
}

#[cfg(not(target_arch = "aarch64"))]
fn base_tags(_: &Arc<GuestMemory>) -> Result<Box<dyn TagStore>, super::Error> {
    Err(engine::Error::MteUnsupported.into())
}

/// A file that has its name only when it is whole.
struct Target<'a> {
    file: NamedTempFile,
    path: &'a Path,
}

impl<'a> Target<'a> {
    fn create(path: &'a Path) -> Result<Self, Error> {
        match fs::symlink_metadata(path) {
            Ok(there) if !there.is_file() => return Err(Error::NoFile(path.into())),
            _ => {}
        }
        let name = path.file_name().ok_or_else(|| Error::NoFile(path.into()))?;
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let file = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(".part")
            .tempfile_in(directory(path))
            .map_err(|source| Error::File {
                path: path.into(),
                action: "create a file beside it",
                source,
            })?;
        Ok(Self { file, path })
    }

    /// Gives the file its name, for good.
    fn commit(self) -> Result<(), Error> {
        let error = |action| {
            move |source| Error::File {
                path: self.path.into(),
                action,
                source,
            }
        };
        self.file.as_file().sync_all().map_err(error("sync it"))?;
        self.file
            .persist(self.path)
            .map_err(|e| error("give it its name")(e.error))?;
        File::open(directory(self.path))
            .and_then(|directory| directory.sync_all())
            .map_err(error("sync its directory"))
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Counts what is written.
struct Counted<'a> {
    to: &'a File,
    progress: &'a Progress,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.progress
            .bytes
            .fetch_add(written as u64, Ordering::Relaxed);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Counts the pages that are read, and reads none once the snapshot is to be given up.
struct Watched<'a, S> {
    source: S,
    progress: &'a Progress,
}

impl<S: PageSource> PageSource for Watched<'_, S> {
    fn metadata(&self) -> stream::Metadata {
        self.source.metadata()
    }

    fn next_run(&self, from: u64) -> io::Result<Option<std::ops::Range<u64>>> {
        self.source.next_run(from)
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        if self.progress.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::other(
                "it was given up, as the machine is to end",
            ));
        }
        self.progress
            .pages_done
            .fetch_add(data.len() as u64, Ordering::Relaxed);
        self.source.read(first, data, tags)
    }
}

impl Progress {
    fn expect<S: PageSource>(&self, source: &S) -> io::Result<()> {
        let (mut from, mut pages) = (0, 0);
        while let Some(run) = source.next_run(from)? {
            pages += run.end - run.start;
            from = run.end;
        }
        self.pages_total.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }
}

impl<H: Hypervisor> Machine<H>
where
    VcpuOf<H>: Vcpu + 'static,
{
    /// Writes a snapshot to the file `path`, which is there afterwards or is as it was. A guest that runs goes on.
    ///
    /// # Errors
    /// See [`Error`]; the guest goes on then, too.
    pub fn snapshot<F: ReadAt>(
        &mut self,
        path: &Path,
        options: &Options<'_, F>,
    ) -> Result<Report, Error> {
        let begun = Instant::now();
        for disk in &options.config.disk {
            if disk.overlay == Some(OverlayConfig::Temporary) {
                return Err(Error::TemporaryOverlay(disk.path.clone()));
            }
        }
        let target = Target::create(path)?;
        let was_running = self.is_running();
        let written = self.write_snapshot(target.file.as_file(), path, options);
        if was_running {
            self.resume()?;
        }
        let (mut report, blackout) = written?;
        target.commit()?;
        report.total = begun.elapsed();
        report.blackout = was_running.then_some(blackout);
        Ok(report)
    }

    fn write_snapshot<F: ReadAt>(
        &mut self,
        file: &File,
        path: &Path,
        options: &Options<'_, F>,
    ) -> Result<(Report, Duration), Error> {
        let mut writing = Writing::begin(self.pages(), file, path, options)?;
        let log = match self.is_running() {
            true => Some(self.log_dirty_pages().map_err(super::Error::from)?),
            false => None,
        };
        writing.all(options.base)?;
        let mut dirty = dirty_pages(self.memory.size(), &[], &[]);
        if let Some(log) = &log {
            dirty = writing.changes(log)?;
        }

        let room = writing.room(dirty.len());
        let stopped = Instant::now();
        let standing = self.stand()?;
        if self.has_ended() {
            return Err(Error::Ended);
        }
        if let Some(log) = &log {
            dirty.add(&log.take().map_err(super::Error::from)?);
        }
        let held = writing.last_changes(&dirty, room)?;
        let state = self.state(standing)?;
        // With nothing on its way to them.
        let disks = Disks::of(&options.config.disk).map_err(|(path, source)| Error::File {
            path,
            action: "look at the disk",
            source,
        })?;
        let resumed = match log {
            Some(_) => self.go_on()?,
            None => Instant::now(),
        };
        let blackout = resumed - stopped;
        // Not before: the host takes milliseconds for it.
        drop(log);

        let states = self.states(&state, options.config, &disks);
        Ok((writing.end(&held, states)?, blackout))
    }

    /// What the guest sees of its machine.
    pub(super) fn platform(&self) -> Platform {
        Platform {
            architecture: ARCHITECTURE.into(),
            mte: self.mte.map(|mte| mte.to_string()),
            cpu_features: cpu::features_of(&self.cpu)
                .iter()
                .map(ToString::to_string)
                .collect(),
            tagvisor: env!("CARGO_PKG_VERSION").into(),
            counter_hz: Some(self.counter_hz),
        }
    }

    /// What is saved besides memory, by name.
    fn states(
        &self,
        state: &MachineState,
        config: &MachineConfig,
        disks: &Disks,
    ) -> [(&'static str, Vec<u8>); 4] {
        let platform = self.platform();
        let json = |value: Result<Vec<u8>, _>| value.expect("it is made of what JSON has");
        [
            (CONFIG, json(serde_json::to_vec(config))),
            (PLATFORM, json(serde_json::to_vec(&platform))),
            (MACHINE, json(serde_json::to_vec(state))),
            (DISKS, json(serde_json::to_vec(disks))),
        ]
    }
}

/// A snapshot that is being written.
struct Writing<'a> {
    pages: Watched<'a, GuestPages>,
    writer: StreamWriter<Counted<'a>>,
    sending: Sending,
    rounds: u32,
    path: &'a Path,
}

impl<'a> Writing<'a> {
    fn begin<F: ReadAt>(
        pages: GuestPages,
        file: &'a File,
        path: &'a Path,
        options: &Options<'a, F>,
    ) -> Result<Self, Error> {
        let progress = options.progress;
        let base = options.base.map(Snapshot::identity);
        let writer = Header::of_file(pages.metadata(), base)
            .and_then(|header| StreamWriter::new(Counted { to: file, progress }, header))
            .map_err(stream_error(path))?;
        Ok(Self {
            pages: Watched {
                source: pages,
                progress,
            },
            writer,
            sending: Sending {
                compression: options.compression,
                ..Sending::default()
            },
            rounds: 0,
            path,
        })
    }

    /// Writes all pages, or all that changed since `base`.
    fn all<F: ReadAt>(&mut self, base: Option<&Snapshot<F>>) -> Result<(), Error> {
        self.expect(&self.pages)?;
        self.rounds += 1;
        match base {
            Some(base) => send_changes(&self.pages, base, &mut self.writer, &self.sending),
            None => send(&self.pages, &mut self.writer, &self.sending),
        }
        .map_err(stream_error(self.path))
    }

    /// Writes what changes while the guest runs, until what is left is little, or does not become less. Returns that.
    fn changes(&mut self, log: &DirtyLog<impl Vm>) -> Result<PageSet, Error> {
        let mut dirty = log.take().map_err(super::Error::from)?;
        while dirty.len() > FEW && self.rounds < MAX_ROUNDS {
            let before = dirty.len();
            self.dirty(&dirty)?;
            dirty = log.take().map_err(super::Error::from)?;
            if dirty.len() > before / 2 {
                break;
            }
        }
        Ok(dirty)
    }

    /// Memory for so many pages and some more, which the host would otherwise have to find while the guest stands still.
    fn room(&self, pages: u64) -> Vec<Batch> {
        if pages > HELD {
            return Vec::new();
        }
        let chunk_pages = self.sending.chunk_pages;
        let batch = |_| Batch::with_room(self.pages.metadata(), chunk_pages);
        (0..=pages / chunk_pages.max(1) as u64).map(batch).collect()
    }

    /// Takes the last pages, of a guest that stands still: copies them aside, to be written when it runs again. Too many
    /// for that are written at once.
    fn last_changes(&mut self, dirty: &PageSet, room: Vec<Batch>) -> Result<Vec<Batch>, Error> {
        if dirty.len() > HELD {
            self.dirty(dirty)?;
            return Ok(Vec::new());
        }
        self.rounds += u32::from(!dirty.is_empty());
        let last = Only::new(&self.pages, dirty);
        self.expect(&last)?;
        hold(&last, self.sending.chunk_pages, room).map_err(stream_error(self.path))
    }

    fn dirty(&mut self, dirty: &PageSet) -> Result<(), Error> {
        let changed = Only::new(&self.pages, dirty);
        self.expect(&changed)?;
        self.rounds += 1;
        send(&changed, &mut self.writer, &self.sending).map_err(stream_error(self.path))
    }

    /// Says how many pages are still to come.
    fn expect(&self, source: &impl PageSource) -> Result<(), Error> {
        let expected = self.pages.progress.expect(source);
        expected.map_err(|source| Error::File {
            path: self.path.into(),
            action: "find out which pages of memory exist",
            source,
        })
    }

    fn end(mut self, held: &[Batch], states: [(&str, Vec<u8>); 4]) -> Result<Report, Error> {
        self.write(held, states).map_err(stream_error(self.path))?;
        let pages = self.writer.pages();
        let (to, identity) = self.writer.finish().map_err(stream_error(self.path))?;
        Ok(Report {
            identity,
            bytes: to.progress.bytes.load(Ordering::Relaxed),
            pages,
            rounds: self.rounds,
            total: Duration::ZERO,
            blackout: None,
        })
    }

    fn write(&mut self, held: &[Batch], states: [(&str, Vec<u8>); 4]) -> stream::Result<()> {
        let mut encoder = Encoder::new(self.writer.header(), self.sending.compression)?;
        let mut chunk = Chunk::new();
        for batch in held {
            encoder.pages(batch, &mut chunk)?;
            self.writer.write(&chunk)?;
        }
        for (name, data) in states {
            let state = State {
                name,
                version: STATE_VERSION,
                data: data.into(),
            };
            encoder.state(&state, &mut chunk)?;
            self.writer.write(&chunk)?;
        }
        Ok(())
    }
}

fn stream_error(path: &Path) -> impl Fn(stream::Error) -> Error {
    move |source| Error::Stream {
        path: path.into(),
        source,
    }
}

/// Reads all pages of a source, at first into the batches of `room`.
fn hold(
    source: &impl PageSource,
    chunk_pages: usize,
    room: Vec<Batch>,
) -> stream::Result<Vec<Batch>> {
    let mut room = room.into_iter();
    let mut cursor = Cursor::new(chunk_pages)?;
    let mut held = Vec::new();
    let mut runs = Vec::new();
    loop {
        cursor.next(source, &mut runs)?;
        if runs.is_empty() {
            return Ok(held);
        }
        let mut batch = room.next().unwrap_or_else(|| Batch::new(source.metadata()));
        batch.read(source, &runs)?;
        held.push(batch);
    }
}
