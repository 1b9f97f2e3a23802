//! Machines as the two ends of a live migration (`migration`).
//!
//! | state | when | what |
//! |---|---|---|
//! | `config` | offered | the [`MachineConfig`], JSON |
//! | `platform` | offered | what the guest sees of its machine ([`Platform`]), JSON |
//! | `cpu` | offered | the ID registers that the guest sees, JSON |
//! | `disks` | offered | what each disk's image is known by ([`ImageIdentity`]), JSON |
//! | `machine` | handed over | all but memory ([`MachineState`]), JSON |
//! | `life` | handed over | whether the guest ran ([`Life`]), JSON |
//!
//! The destination builds its machine from what is offered, before a page is sent: whatever it cannot have is refused by name, and
//! nothing is left to be built while the guest stands still. Disks are opened there without their locks, which the source gives up
//! when its guest has stopped.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use ::migration::{Arriving, Departing, Fetcher, MOST_AHEAD, MachineError, Peer, SavedState};
use engine::{Capabilities, Hypervisor, Vcpu, VcpuState};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use stream::{Batch, Metadata, PageSet};

use super::dirty_log::DirtyLog;
use super::snapshot::{ARCHITECTURE, CONFIG, MACHINE, PLATFORM, Platform, READABLE, STATE_VERSION};
use super::{Machine, MachineState, Standing, VcpuOf, VmOf};
use crate::config::{MachineConfig, OverlayConfig};
use crate::memory::lazy::{self, Before, ChunkReader, Event, LazyFill, PageProvider, Threads};
use crate::memory::pages::GuestPages;
use crate::memory::untagged::Untagged;
use crate::vcpu::Throttler;
use crate::virtio::block::ImageIdentity;

const CPU: &str = "cpu";
const DISKS: &str = "disks";
const LIFE: &str = "life";

/// Why a machine cannot leave, or come.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A disk whose contents would be lost.
    #[error(
        "disk {0} has an overlay without a name, which is a file of this process alone; start the machine with overlay=FILE on \
         storage that both hosts have"
    )]
    TemporaryOverlay(PathBuf),
    /// The guest ended its machine.
    #[error("the guest ended its machine while it was migrated")]
    Ended,
    /// What was sent lacks something.
    #[error("what was sent has no state `{0}`: the source is no Tagvisor of this version")]
    StateMissing(&'static str),
    /// A state of a version that this Tagvisor does not know.
    #[error(
        "the state `{name}` that was sent has version {version}, this Tagvisor reads versions {} to {}",
        READABLE.start(), READABLE.end()
    )]
    StateVersion {
        /// Which.
        name: &'static str,
        /// Its version.
        version: u32,
    },
    /// A state says nothing.
    #[error("the state `{name}` that was sent is wrong: {source}")]
    State {
        /// Which.
        name: &'static str,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// It is of another kind of machine.
    #[error("the guest's machine has architecture {0}, this Tagvisor has {ARCHITECTURE}")]
    Architecture(String),
    /// The guest has tags and its memory here would not, or the other way round.
    #[error("the guest has {sent}, a machine like it has {here} on this host")]
    Metadata {
        /// What the stream has.
        sent: Metadata,
        /// What the memory here has.
        here: Metadata,
    },
    /// A disk is not the guest's.
    #[error(
        "disk {path} of this host {what}: both hosts must see the same file; --disk tells `receive` where it is"
    )]
    Disk {
        /// Where it was looked for.
        path: PathBuf,
        /// What is different.
        what: &'static str,
    },
    /// What is known of disks does not fit the configuration.
    #[error("{offered} disks were offered, and the machine has {here}")]
    DiskCount {
        /// Those that something is known of.
        offered: usize,
        /// Those of the configuration that came with it.
        here: usize,
    },
    /// Pages cannot follow a guest that runs.
    #[error("post-copy is not possible to this host: {0}; migrate without --postcopy")]
    PostCopy(#[source] lazy::Unsupported),
    /// There is no machine yet.
    #[error("no machine was offered")]
    NotOffered,
}

/// What of a guest's life is not in its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// Somebody paused it: it is not to run at the destination before somebody resumes it.
    pub paused: bool,
}

fn saved<T: Serialize>(name: &str, value: &T) -> SavedState {
    SavedState {
        name: name.into(),
        version: STATE_VERSION,
        data: serde_json::to_vec(value).expect("it is made of what JSON has"),
    }
}

fn parse<T: DeserializeOwned>(states: &[SavedState], name: &'static str) -> Result<T, Error> {
    let found = states.iter().find(|state| state.name == name);
    let state = found.ok_or(Error::StateMissing(name))?;
    if !READABLE.contains(&state.version) {
        return Err(Error::StateVersion {
            name,
            version: state.version,
        });
    }
    serde_json::from_slice(&state.data).map_err(|source| Error::State { name, source })
}

/// Whether the disks of a machine are those that were offered, as far as that can be known.
fn check_disks<H: Hypervisor>(
    machine: &Machine<H>,
    offered: &[ImageIdentity],
) -> Result<(), MachineError> {
    let here = machine.disk_identities()?;
    if here.len() != offered.len() {
        return Err(Error::DiskCount {
            offered: offered.len(),
            here: here.len(),
        }
        .into());
    }
    for ((disk, here), offered) in machine.disks.iter().zip(&here).zip(offered) {
        if let Some(what) = here.difference(offered) {
            let path = disk.path().to_owned();
            return Err(Error::Disk { path, what }.into());
        }
    }
    Ok(())
}

/// A machine whose guest leaves.
pub struct Leaving<'a, H: Hypervisor> {
    machine: &'a mut Machine<H>,
    config: &'a MachineConfig,
    pages: Arc<GuestPages>,
    ran: bool,
    log: Option<DirtyLog<VmOf<H>>>,
    throttler: Option<Throttler>,
    /// Once it was stopped, until its state is asked for.
    standing: Option<Standing>,
}

impl<'a, H: Hypervisor> Leaving<'a, H>
where
    VcpuOf<H>: Vcpu + 'static,
{
    /// The guest of `machine`, which the destination is to build from `config`.
    pub fn new(machine: &'a mut Machine<H>, config: &'a MachineConfig) -> Self {
        let pages = machine.pages();
        Self {
            ran: machine.is_running(),
            machine,
            config,
            pages: Arc::new(pages),
            log: None,
            throttler: None,
            standing: None,
        }
    }
}

impl<H: Hypervisor> Departing for Leaving<'_, H>
where
    VcpuOf<H>: Vcpu + 'static,
{
    type Pages = GuestPages;

    fn pages(&self) -> Arc<GuestPages> {
        self.pages.clone()
    }

    fn offer(&mut self) -> Result<Vec<SavedState>, MachineError> {
        for disk in &self.config.disk {
            if disk.overlay == Some(OverlayConfig::Temporary) {
                return Err(Error::TemporaryOverlay(disk.path.clone()).into());
            }
        }
        Ok(vec![
            saved(CONFIG, self.config),
            saved(PLATFORM, &self.machine.platform()),
            saved(CPU, self.machine.cpu()),
            saved(DISKS, &self.machine.disk_identities()?),
        ])
    }

    fn watch(&mut self) -> Result<(), MachineError> {
        self.log = Some(self.machine.log_dirty_pages()?);
        Ok(())
    }

    fn changes(&mut self) -> Result<PageSet, MachineError> {
        let log = self.log.as_ref().expect("it is watched before it is asked");
        Ok(log.take()?)
    }

    fn slow(&mut self, percent: u8) {
        if self.throttler.is_none() {
            match self.machine.throttler() {
                Ok(throttler) => self.throttler = Some(throttler),
                Err(e) => tracing::warn!("the guest cannot be slowed down: {e}"),
            }
        }
        if let Some(throttler) = &self.throttler {
            throttler.set(percent);
        }
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        self.standing = Some(self.machine.stand()?);
        if let Some(throttler) = &self.throttler {
            throttler.set(0);
        }
        if self.machine.has_ended() {
            return Err(Error::Ended.into());
        }
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<SavedState>, MachineError> {
        let standing = self.standing.take();
        let state = self
            .machine
            .state(standing.expect("it is stopped before its state is asked for"))?;
        self.machine.release_disks()?;
        let life = Life { paused: !self.ran };
        Ok(vec![saved(MACHINE, &state), saved(LIFE, &life)])
    }

    fn go_on(&mut self) -> Result<(), MachineError> {
        self.throttler = None;
        self.standing = None;
        self.machine.claim_disks()?;
        if self.ran {
            self.machine.resume()?;
        }
        self.log = None;
        Ok(())
    }
}

/// Makes the machine that a guest comes to, from the configuration that was offered: it awaits its state.
pub type Build<'a, H> = dyn FnMut(&MachineConfig) -> Result<Machine<H>, super::Error> + 'a;

/// A machine that a guest comes to.
pub struct Coming<'a, H: Hypervisor, E> {
    host: &'a Capabilities,
    build: &'a mut Build<'a, H>,
    on_event: E,
    machine: Option<(Machine<H>, Arc<GuestPages>)>,
    /// What tags its memory got.
    untagged: Arc<Untagged>,
    /// What of the guest's life came with it.
    life: Option<Life>,
    fill: Option<Arc<LazyFill>>,
}

/// A guest that has come, and stands still.
pub struct Arrived<H: Hypervisor> {
    /// Its machine.
    pub machine: Machine<H>,
    /// Whether somebody had paused it.
    pub paused: bool,
    /// Its memory, if that is still coming.
    pub fill: Option<Arc<LazyFill>>,
}

impl<'a, H, E> Coming<'a, H, E>
where
    H: Hypervisor,
    VcpuOf<H>: Vcpu + 'static,
    E: Fn(Event) + Clone + Send + Sync + 'static,
{
    /// A guest whose machine `build` makes on `host`. What happens to its memory, should some of that stay behind, is told to
    /// `on_event`.
    pub fn new(host: &'a Capabilities, build: &'a mut Build<'a, H>, on_event: E) -> Self {
        Self {
            host,
            build,
            on_event,
            machine: None,
            untagged: Arc::new(Untagged::new(0)),
            life: None,
            fill: None,
        }
    }

    /// The guest, once its state was loaded.
    pub fn arrived(self) -> Option<Arrived<H>> {
        let (machine, _) = self.machine?;
        Some(Arrived {
            machine,
            paused: self.life?.paused,
            fill: self.fill,
        })
    }

    fn there(&mut self) -> Result<&mut (Machine<H>, Arc<GuestPages>), Error> {
        self.machine.as_mut().ok_or(Error::NotOffered)
    }

    fn make(&mut self, offer: &[SavedState], sent: Metadata) -> Result<(), MachineError> {
        let platform: Platform = parse(offer, PLATFORM)?;
        if platform.architecture != ARCHITECTURE {
            return Err(Error::Architecture(platform.architecture).into());
        }
        let guest: VcpuState = parse(offer, CPU)?;
        platform.check_counter(self.host)?;
        let machine = (self.build)(&parse(offer, CONFIG)?)?;
        machine.check_cpu(&guest)?;
        check_disks(&machine, &parse::<Vec<ImageIdentity>>(offer, DISKS)?)?;
        let memory = machine.memory.clone();
        self.untagged = Arc::new(Untagged::new(memory.size()));
        let pages = GuestPages::of_new(memory, machine.tags(), self.untagged.clone());
        let here = stream::PageSink::metadata(&pages);
        if here != sent {
            return Err(Error::Metadata { sent, here }.into());
        }
        self.machine = Some((machine, Arc::new(pages)));
        Ok(())
    }
}

impl<H, E> Arriving for Coming<'_, H, E>
where
    H: Hypervisor,
    VcpuOf<H>: Vcpu + 'static,
    E: Fn(Event) + Clone + Send + Sync + 'static,
{
    type Sink = GuestPages;

    fn accept(&mut self, offer: &[SavedState], metadata: Metadata) -> Result<(), MachineError> {
        // Of an offer that came to nothing.
        self.machine = None;
        self.make(offer, metadata)
    }

    fn sink(&self) -> Arc<GuestPages> {
        let (_, pages) = self
            .machine
            .as_ref()
            .expect("pages come after the offer was accepted");
        pages.clone()
    }

    fn pages(&self) -> Range<u64> {
        self.sink().ram()
    }

    fn fetches(&self) -> Result<u8, MachineError> {
        lazy::support(self.sink().memory().plan()).map_err(Error::PostCopy)?;
        Ok(Threads::DEFAULT.all() as u8)
    }

    fn load(
        &mut self,
        states: &[SavedState],
        missing: Option<Arc<Peer>>,
    ) -> Result<(), MachineError> {
        let state: MachineState = parse(states, MACHINE)?;
        let life: Life = parse(states, LIFE)?;
        let on_event = self.on_event.clone();
        let before = Before::Placed(self.untagged.clone());
        let (machine, _) = self.there()?;
        machine.load(&state)?;
        machine.claim_disks()?;
        let memory = machine.memory.clone();
        self.fill = match missing {
            Some(peer) => Some(Arc::new(LazyFill::start(
                memory,
                PeerPages(peer),
                before,
                Threads::DEFAULT,
                on_event,
            )?)),
            None => None,
        };
        self.life = Some(life);
        Ok(())
    }
}

/// Pages that are still at the source.
struct PeerPages(Arc<Peer>);

impl PageProvider for PeerPages {
    type Reader<'a> = PeerGroups<'a>;

    fn metadata(&self) -> Metadata {
        self.0.metadata()
    }

    fn runs(&self) -> impl Iterator<Item = (Range<u64>, u32)> {
        self.0.runs()
    }

    fn reader(&self) -> PeerGroups<'_> {
        PeerGroups(self.0.fetcher())
    }
}

/// Fetches groups of pages from a peer.
struct PeerGroups<'a>(Fetcher<'a>);

impl ChunkReader for PeerGroups<'_> {
    const AHEAD: usize = MOST_AHEAD;

    fn read(&mut self, chunk: u32) -> stream::Result<&Batch> {
        self.0.fetch(chunk).map_err(|error| stream::Error::Io {
            action: "fetch pages from the source of the migration",
            source: std::io::Error::other(error),
        })
    }

    fn expect(&mut self, chunks: impl Iterator<Item = u32>) {
        self.0.expect(chunks);
    }
}
