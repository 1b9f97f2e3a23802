//! A machine: built from its configuration, run to its end, taken down in order.

mod assembly;
pub mod cpu;
pub mod debug;
mod dirty_log;
pub mod migration;
pub mod snapshot;

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use engine::{GicState, Hypervisor, SystemEvent, Vcpu, VcpuState, Vm, VmBuilder};
use mte::{MteFeatures, MteLevel};
use serde::{Deserialize, Serialize};

use crate::bus::Bus;
use crate::config::{MachineConfig, MemorySize};
use crate::console::{Connection, Console};
use crate::devices::generation::{Generation, GenerationId};
use crate::devices::rtc::{ClockState, RealTimeClock};
use crate::devices::serial::{SerialPortState, TooMuchInput};
use crate::memory::GuestMemory;
use crate::memory::base::Base;
use crate::memory::pages::GuestPages;
use crate::memory::tags::{TagStore, tag_store};
use crate::memory::untagged::Untagged;
use crate::terminal::Command;
use crate::vcpu::{Answers, Throttler, VcpuEvent, VcpuThreads};
use crate::virtio::block::{DiskError, Image, ImageIdentity};
use crate::virtio::mmio::{MmioTransport, TransportState};
use crate::virtio::net::{Announcement, Announcer};
use crate::{boot, console, memory, virtio};
use assembly::{MachinePort, SpiLine, Start};

/// Why a machine could not be built, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a kernel nor a payload, or both.
    #[error("{0}")]
    Boot(&'static str),
    /// The hypervisor refused.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The host has another MTE level than the one asked for.
    #[error(
        "--mte {}: the guest is to have exactly that level, this host offers {offered}; KVM shows every guest the \
         host's own level, so run it on another host, or with --mte on or --mte off", level_number(*.wanted)
    )]
    MteLevel {
        /// The level asked for.
        wanted: MteLevel,
        /// What the host offers.
        offered: MteFeatures,
    },
    /// No vCPU, or too many.
    #[error("--cpus {wanted}: this host gives a guest 1 to {offered}")]
    Cpus {
        /// How many were asked for.
        wanted: u32,
        /// How many there can be.
        offered: u32,
    },
    /// More RAM than the host has guest-physical addresses for.
    #[error("--memory {wanted}: this host gives a guest at most {offered}")]
    MemoryTooLarge {
        /// How much was asked for.
        wanted: MemorySize,
        /// How much there can be.
        offered: MemorySize,
    },
    /// Too many virtio devices.
    #[error("{wanted} disks, network interfaces and the like: a machine has room for {offered}")]
    TooManyDevices {
        /// How many were asked for.
        wanted: usize,
        /// How many there can be.
        offered: u32,
    },
    /// The host's interrupt controller is too old.
    #[error(
        "this host's interrupt controller is no GICv3, and Tagvisor has no other for its guests; no CPU with MTE has an older one"
    )]
    NoGicV3,
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The guest's kernel or payload.
    #[error(transparent)]
    Load(#[from] boot::Error),
    /// The CPU lacks the pages that the kernel was built for.
    #[error(
        "the kernel is built for pages of {0}, which this host's CPU does not have; take one built for pages of 4 KiB"
    )]
    KernelPageSize(boot::PageSize),
    /// The device tree.
    #[error("device tree: {0}; is there a zero byte in --cmdline?")]
    DeviceTree(vm_fdt::Error),
    /// The device tree does not fit.
    #[error(
        "the device tree takes {size} bytes, more than the {} kept for it; is --cmdline very long?",
        boot::DEVICE_TREE_SIZE
    )]
    DeviceTreeTooLarge {
        /// Its size in bytes.
        size: usize,
    },
    /// The console.
    #[error(transparent)]
    Console(#[from] console::Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] virtio::block::DiskError),
    /// A network interface.
    #[error(transparent)]
    Net(#[from] virtio::net::NetError),
    /// Another virtio device.
    #[error(transparent)]
    Virtio(#[from] virtio::Error),
    /// A saved machine has other parts than the one that is to go on with it.
    #[error("the saved machine has {} CPUs and {} virtio devices, this one {} and {}: start it with the configuration it was saved with", .saved.0, .saved.1, .here.0, .here.1)]
    OtherMachine {
        /// vCPUs and virtio devices of the one saved.
        saved: (usize, usize),
        /// And of this one.
        here: (usize, usize),
    },
    /// A saved serial port cannot be taken up.
    #[error(transparent)]
    Serial(#[from] TooMuchInput),
    /// The guest may write to its disks at any moment.
    #[error("the guest runs: its disks can be let go only while it is paused")]
    DisksInUse,
    /// There is no guest in the machine yet.
    #[error("the machine awaits a guest's state, and can do nothing before it has it")]
    Awaiting,
    /// There is a guest in the machine.
    #[error("the machine has a guest already, and cannot take up another's state")]
    NotAwaiting,
    /// The guest's MTE is another than this host's.
    #[error("the guest {}; KVM shows every guest the host's own level, so let it go on on a host with that one", mte::MteDifference { has: *.saved, offered: *.here })]
    OtherMte {
        /// What the guest has seen so far.
        saved: MteFeatures,
        /// What it would see here.
        here: MteFeatures,
    },
    /// The guest's CPU has what this host's has not.
    #[error("the guest's CPU has what this host's has not: {}; let it go on on a host with that", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    MissingFeatures(Vec<cpu::Feature>),
    /// A base of another guest.
    #[error("the base for clones has {base} of memory, the machine {wanted}")]
    OtherBase {
        /// What the base has.
        base: MemorySize,
        /// What the machine is to have.
        wanted: MemorySize,
    },
    /// Memory could not be restored.
    #[error(transparent)]
    Pages(#[from] stream::Error),
    /// Memory cannot be brought when it is touched.
    #[error(transparent)]
    Lazy(#[from] memory::lazy::Error),
    /// A vCPU stopped for a debugger that is not there.
    #[error("a vCPU stopped for a debugger, and none has the machine; please report it")]
    NotDebugged,
    /// A vCPU's thread panicked.
    #[error(
        "a vCPU's thread panicked; what it said before is a defect of Tagvisor's, please report it"
    )]
    VcpuPanicked,
    /// Something else of the host's.
    #[error("{step}: {source}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

fn level_number(level: MteLevel) -> u8 {
    match level {
        MteLevel::None => 0,
        MteLevel::Mte1 => 1,
        MteLevel::Mte2 => 2,
        MteLevel::Mte3 => 3,
    }
}

/// A machine but for its memory, between two instructions of its guest: for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// The vCPUs, in order.
    pub vcpus: Vec<VcpuState>,
    /// The interrupt controller.
    pub gic: GicState,
    /// The virtio devices, in the order of their places.
    pub virtio: Vec<TransportState>,
    /// The serial port.
    pub serial: SerialPortState,
    /// The real-time clock.
    pub clock: ClockState,
    /// What the guest takes for its generation.
    pub generation: GenerationId,
}

/// A guest that stands still, whose vCPUs tell their state.
struct Standing(Answers<engine::Result<VcpuState>>);

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest switched it off.
    Off,
    /// The guest reset it.
    Reset,
    /// The user or a signal asked for it.
    Asked,
    /// It has not: somebody wants its thread.
    Interrupted,
}

enum Event {
    Vcpu(VcpuEvent),
    Quit,
    Interrupt,
}

/// Whether a machine's guest runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Running {
    /// There is none: its state is still to come.
    Awaiting,
    /// It stands at its first instruction.
    NotYet,
    Yes,
    /// vCPUs and devices wait.
    Paused,
}

/// Reaches a machine's thread, from any other.
#[derive(Clone)]
pub struct MachineHandle(Sender<Event>);

impl MachineHandle {
    /// Asks the machine to end: [`Machine::run`] returns, and whoever called it drops the machine, which stops its
    /// vCPUs, completes what its devices have begun, and flushes its disks. Nothing happens if it has ended already.
    pub fn quit(&self) {
        let _ = self.0.send(Event::Quit);
    }

    /// Makes [`Machine::run`] return while the guest goes on: there is something else to do for its thread.
    pub fn interrupt(&self) {
        let _ = self.0.send(Event::Interrupt);
    }
}

/// A machine.
///
/// Dropping it stops the vCPUs, then the devices, and takes the memory from the guest before it is unmapped.
pub struct Machine<H: Hypervisor> {
    /// `None` only while the machine is taken down.
    vcpus: Option<VcpuThreads<VcpuOf<H>>>,
    /// The ID registers of the first of them.
    cpu: VcpuState,
    bus: Arc<Bus>,
    serial: Arc<MachinePort<VmOf<H>>>,
    clock: Arc<RealTimeClock>,
    generation: Generation<SpiLine<VmOf<H>>>,
    virtio: Vec<Arc<MmioTransport>>,
    disks: Vec<Arc<Image>>,
    announcers: Arc<[Announcer]>,
    announcement: Mutex<Option<Announcement>>,
    running: Running,
    events: Receiver<Event>,
    /// An event that was seen before it could be acted on.
    seen: Option<Event>,
    sender: Sender<Event>,
    mte: Option<MteFeatures>,
    /// Of its counters, a second.
    counter_hz: u64,
    vm: Arc<VmOf<H>>,
    memory: Arc<GuestMemory>,
    _console: Connection,
}

type VmOf<H> = <<H as Hypervisor>::VmBuilder as VmBuilder>::Vm;
type VcpuOf<H> = <VmOf<H> as Vm>::Vcpu;

impl<H: Hypervisor> Machine<H>
where
    VcpuOf<H>: Vcpu + 'static,
{
    /// Builds the machine, with its serial port on `console`, one machine at a time. Its vCPUs
    /// stand at the guest's first instruction.
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left behind.
    pub fn new(
        hypervisor: &H,
        config: &MachineConfig,
        console: &mut Console,
    ) -> Result<Self, Error> {
        Self::build(hypervisor, config, Start::Boot, console)
    }

    /// Builds a machine for a guest that is still elsewhere, with the configuration of its machine there. The guest's
    /// memory can be given to it at any time, its state once by [`Machine::load`]; it runs nothing before. Its disks may be
    /// locked by the other machine, until they are to be this one's by [`Machine::claim_disks`].
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left behind.
    pub fn awaiting(
        hypervisor: &H,
        config: &MachineConfig,
        console: &mut Console,
    ) -> Result<Self, Error> {
        Self::build(hypervisor, config, Start::Awaiting, console)
    }

    /// Builds a machine that goes on where the one of `state` stood, with the configuration of that one. `fill`
    /// gives it that one's memory, with all tags. It stands still until [`Machine::resume`] or [`Machine::run`].
    ///
    /// # Errors
    /// See [`Error`]; what `fill` returns. Nothing is left behind.
    pub fn restored(
        hypervisor: &H,
        config: &MachineConfig,
        state: &MachineState,
        console: &mut Console,
        fill: impl FnOnce(&GuestPages) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let mut machine = Self::build(hypervisor, config, Start::Restored, console)?;
        machine.load(state)?;
        let memory = machine.memory.clone();
        let untagged = Arc::new(Untagged::new(memory.size()));
        fill(&GuestPages::of_new(memory, machine.tags(), untagged))?;
        Ok(machine)
    }

    /// Builds a machine that goes on where the one of `state` stood, with the memory of `base`, which it shares with all
    /// other clones until it writes. Otherwise like [`Machine::restored`].
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left behind.
    pub fn cloned(
        hypervisor: &H,
        config: &MachineConfig,
        state: &MachineState,
        console: &mut Console,
        base: &Base,
    ) -> Result<Self, Error> {
        let mut machine = Self::build(hypervisor, config, Start::Cloned(base), console)?;
        machine.load(state)?;
        Ok(machine)
    }

    fn build(
        hypervisor: &H,
        config: &MachineConfig,
        start: Start<'_>,
        console: &mut Console,
    ) -> Result<Self, Error> {
        let (sender, events) = mpsc::channel();
        let handle = MachineHandle(sender.clone());
        let on_command = move |command| {
            if command == Command::Quit {
                handle.quit();
            }
        };
        let parts = assembly::assemble(hypervisor, config, start, console, on_command)?;
        let vcpus = start_threads(parts.vcpus, &parts.bus, &sender)?;
        Ok(Self {
            vcpus: Some(vcpus),
            cpu: parts.cpu,
            bus: parts.bus,
            serial: parts.serial,
            clock: parts.clock,
            running: match start {
                Start::Boot => Running::NotYet,
                Start::Awaiting | Start::Restored | Start::Cloned(_) => Running::Awaiting,
            },
            generation: parts.generation,
            virtio: parts.virtio,
            disks: parts.disks,
            announcers: parts.announcers,
            announcement: Mutex::default(),
            events,
            seen: None,
            sender,
            mte: parts.mte,
            counter_hz: hypervisor.capabilities().counter_hz,
            vm: parts.vm,
            memory: Arc::new(parts.memory),
            _console: parts.console,
        })
    }

    /// A handle by which other threads reach the one that runs the machine.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle(self.sender.clone())
    }

    /// The MTE that the guest sees.
    pub fn mte(&self) -> Option<MteFeatures> {
        self.mte
    }

    /// What the guest sees of its CPUs: the ID registers of the first, without the rest of its state. It is known while the
    /// guest runs.
    pub fn cpu(&self) -> &VcpuState {
        &self.cpu
    }

    /// Whether a guest can go on here that has seen this of its CPUs elsewhere ([`Machine::cpu`], or a saved state). To be
    /// asked of a machine that awaits the guest before anything of it is sent.
    ///
    /// # Errors
    /// [`Error::MissingFeatures`] and [`Error::OtherMte`] name what it cannot have here.
    pub fn check_cpu(&self, guest: &VcpuState) -> Result<(), Error> {
        let missing = cpu::missing(guest, &self.cpu);
        if !missing.is_empty() {
            return Err(Error::MissingFeatures(missing));
        }
        let (saved, here) = (cpu::mte_of(guest), cpu::mte_of(&self.cpu));
        if saved != here {
            return Err(Error::OtherMte { saved, here });
        }
        Ok(())
    }

    /// The guest's RAM.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The tags of the guest's RAM, if it has any.
    pub fn tags(&self) -> Option<Box<dyn TagStore>> {
        self.mte?;
        Some(tag_store(self.memory.clone(), self.vm.clone()))
    }

    /// The guest's pages, with their tags if it has any.
    pub fn pages(&self) -> GuestPages {
        GuestPages::new(self.memory.clone(), self.tags())
    }

    /// Tells the guest, once it runs, that others may go on from the state that it was restored from: its kernel then draws
    /// other random numbers than theirs. For every restore and clone; a guest that migrated is still the only one.
    ///
    /// # Errors
    /// The host has no randomness to give.
    pub fn renew_generation(&self) -> Result<(), Error> {
        self.generation.renew().map_err(|source| Error::Host {
            step: "making a new generation ID for the guest",
            source,
        })
    }

    /// Whether the guest runs, as far as the machine is concerned.
    pub fn is_running(&self) -> bool {
        self.running == Running::Yes
    }

    /// Stops vCPUs and devices where they are, with nothing begun and not completed.
    pub fn pause(&mut self) {
        if !self.is_running() {
            return;
        }
        if let Some(vcpus) = &self.vcpus {
            vcpus.pause();
        }
        self.pause_devices();
    }

    /// Stops those vCPUs that can be stopped, and waits for none: one may be waiting for memory that cannot be had
    /// ([`crate::memory::lazy`]). Until [`Machine::release`], nothing else may be done with the machine.
    pub fn hold(&self) {
        if let Some(vcpus) = &self.vcpus {
            vcpus.hold();
        }
    }

    /// Lets vCPUs go on that were held.
    pub fn release(&mut self) {
        if self.is_running()
            && !self.has_ended()
            && let Some(vcpus) = &self.vcpus
        {
            vcpus.resume();
        }
    }

    /// A handle by which the guest gets less of the CPUs' time while it runs, at first all of it. Whatever else is done with
    /// the machine is done as without it.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn throttler(&self) -> Result<Throttler, Error> {
        let threads = self.vcpus.as_ref().ok_or(Error::VcpuPanicked)?;
        threads.throttler().map_err(|source| Error::Host {
            step: "starting the thread that throttles the guest",
            source,
        })
    }

    fn pause_devices(&mut self) {
        for device in &self.virtio {
            device.pause();
        }
        self.running = Running::Paused;
    }

    /// Lets vCPUs and devices go on, or begin; nothing happens if they do, or if the guest has ended its machine, which
    /// [`Machine::run`] then tells.
    ///
    /// # Errors
    /// A device cannot go on.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.go_on().map(drop)
    }

    /// The same. Returns when the vCPUs went.
    fn go_on(&mut self) -> Result<Instant, Error> {
        // The vCPU that ended it must not be let go on behind its last instruction.
        if self.is_running() || self.has_ended() {
            return Ok(Instant::now());
        }
        self.open()
    }

    /// The vCPUs go first: what they ask of a device waits in its queues until it goes on. Returns when they went.
    fn open(&mut self) -> Result<Instant, Error> {
        if self.running == Running::Awaiting {
            return Err(Error::Awaiting);
        }
        if let Some(disk) = self.disks.iter().find(|disk| !disk.is_claimed()) {
            let path = disk.path().to_owned();
            return Err(DiskError::NotClaimed { path }.into());
        }
        if let Some(vcpus) = &self.vcpus {
            vcpus.resume();
        }
        let went = Instant::now();
        if self.running == Running::Paused {
            let resumed = self.virtio.iter().try_for_each(|device| device.resume());
            if let (Err(_), Some(vcpus)) = (&resumed, &self.vcpus) {
                vcpus.pause();
            }
            resumed?;
        }
        self.running = Running::Yes;
        Ok(went)
    }

    /// Stops vCPUs and devices as [`Machine::pause`] does, and returns their state.
    ///
    /// # Errors
    /// [`Error::Awaiting`]; the host does not tell a state, or a vCPU's thread is gone; only then can the machine not go on.
    pub fn save(&mut self) -> Result<MachineState, Error> {
        let standing = self.stand()?;
        self.state(standing)
    }

    /// Stops vCPUs and devices, and asks the vCPUs for their state, which they tell while something else is done. Memory
    /// is not written any more.
    fn stand(&mut self) -> Result<Standing, Error> {
        if self.running == Running::Awaiting {
            return Err(Error::Awaiting);
        }
        let vcpus = self.vcpus.as_ref().ok_or(Error::VcpuPanicked)?;
        let standing = vcpus.ask(|_, vcpu| VcpuState::of(vcpu));
        self.pause_devices();
        Ok(Standing(standing))
    }

    /// Gives a machine that awaits it the state of its guest, whole: the guest stands where it stood, until
    /// [`Machine::resume`] or [`Machine::run`]. It has the generation ID that it had. No memory is touched.
    ///
    /// # Errors
    /// [`Error::NotAwaiting`]. Or the state does not fit, by the name of what does not: then nothing can be done with the
    /// machine but to drop it.
    pub fn load(&mut self, state: &MachineState) -> Result<(), Error> {
        if self.running != Running::Awaiting {
            return Err(Error::NotAwaiting);
        }
        let here = (self.vcpu_count(), self.virtio.len());
        let saved = (state.vcpus.len(), state.virtio.len());
        if saved != here {
            return Err(Error::OtherMachine { saved, here });
        }
        if let Some(guest) = state.vcpus.first() {
            self.check_cpu(guest)?;
        }
        self.cpu = self.load_parts(state)?;
        self.running = Running::Paused;
        Ok(())
    }

    /// Returns what the guest sees of its CPUs then: hosts can hide some of what they have.
    fn load_parts(&self, state: &MachineState) -> Result<VcpuState, Error> {
        let vcpus = self.vcpus.as_ref().ok_or(Error::VcpuPanicked)?;
        let states = Arc::new(state.vcpus.clone());
        // Each on its own thread, while the devices get theirs: these are hundreds of calls.
        let loaded = vcpus.ask(move |place, vcpu| {
            states[place].apply(vcpu)?;
            (place == 0).then(|| cpu::identity(vcpu)).transpose()
        });
        for (transport, state) in self.virtio.iter().zip(&state.virtio) {
            transport.restore(state)?;
        }
        self.serial.restore(&state.serial)?;
        self.clock.restore(&state.clock);
        self.generation
            .restore(state.generation)
            .map_err(|source| Error::Host {
                step: "giving the guest its generation ID",
                source,
            })?;
        let loaded = loaded.wait();
        if loaded.len() != vcpus.len() {
            return Err(Error::VcpuPanicked);
        }
        let cpus: Vec<_> = loaded.into_iter().collect::<Result<_, _>>()?;
        // Last: the lines that the devices drove just now were high before, and are not edges.
        self.vm.restore_gic(&state.gic)?;
        cpus.into_iter().flatten().next().ok_or(Error::VcpuPanicked)
    }

    fn vcpu_count(&self) -> usize {
        self.vcpus.as_ref().map_or(0, VcpuThreads::len)
    }

    /// Ends the vCPUs' threads, each vCPU whole.
    fn stop_vcpus(&mut self) -> Result<Vec<VcpuOf<H>>, Error> {
        let threads = self.vcpus.take().ok_or(Error::VcpuPanicked)?;
        let wanted = threads.len();
        let vcpus = threads.stop();
        if vcpus.len() == wanted {
            Ok(vcpus)
        } else {
            Err(Error::VcpuPanicked)
        }
    }

    /// Makes the guest's disks this machine's, which another one had until now: locks them, and learns what is on them.
    /// Nothing happens if they are. Before that, a machine that awaits its guest does not run it.
    ///
    /// # Errors
    /// [`Error::Disk`] names one that another machine has, or that is not what it was. Then none of them is this machine's.
    pub fn claim_disks(&self) -> Result<(), Error> {
        let claimed = self.disks.iter().try_for_each(|disk| disk.claim());
        if claimed.is_err() {
            for disk in &self.disks {
                if let Err(e) = disk.release() {
                    tracing::warn!("{e}");
                }
            }
        }
        Ok(claimed?)
    }

    /// What each disk's image is known by, in their order.
    ///
    /// # Errors
    /// [`Error::Host`] if one cannot be read.
    pub fn disk_identities(&self) -> Result<Vec<ImageIdentity>, Error> {
        let identities = self.disks.iter().map(|disk| disk.identity());
        identities
            .collect::<std::io::Result<_>>()
            .map_err(|source| Error::Host {
                step: "looking at a disk",
                source,
            })
    }

    /// Lets another machine have the disks of a guest that is paused: all that it wrote is brought to the medium, and the
    /// locks are given up. Until [`Machine::claim_disks`] takes them back, the guest does not run.
    ///
    /// # Errors
    /// [`Error::DisksInUse`]; or [`Error::Disk`] where the medium fails, or nobody else could open an overlay. Then all of
    /// them are still this machine's.
    pub fn release_disks(&self) -> Result<(), Error> {
        if self.is_running() {
            return Err(Error::DisksInUse);
        }
        let released = self.disks.iter().try_for_each(|disk| disk.release());
        if released.is_err() {
            self.claim_disks()?;
        }
        Ok(released?)
    }

    /// Tells the network that the guest is here, which was elsewhere until now: on each interface, at once and four times
    /// more within a second, by frames of its address, and by its own announcement where its driver can make one. For a guest
    /// that runs again after it has moved; what is being told of an earlier call is told no more.
    ///
    /// # Errors
    /// The host cannot start a thread. A link that takes no frames is logged.
    pub fn announce(&self) -> Result<(), Error> {
        if self.announcers.is_empty() {
            return Ok(());
        }
        let started = Announcement::start(self.announcers.clone());
        let announcement = started.map_err(|source| Error::Host {
            step: "starting the thread that announces the guest",
            source,
        })?;
        let mut current = self
            .announcement
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *current = Some(announcement);
        Ok(())
    }

    /// Whether the guest ended the machine, or cannot go on, and [`Machine::run`] has yet to say so.
    pub fn has_ended(&mut self) -> bool {
        while self.seen.is_none() {
            match self.events.try_recv() {
                // Whoever wanted it is answered by the end of what is being done.
                Ok(Event::Interrupt) => {}
                Ok(event) => self.seen = Some(event),
                Err(_) => return false,
            }
        }
        true
    }

    /// The state of the machine, whose vCPUs and devices stand still.
    fn state(&self, standing: Standing) -> Result<MachineState, Error> {
        let virtio: Result<_, _> = self.virtio.iter().map(|device| device.state()).collect();
        let vcpus = standing.0.wait();
        if vcpus.len() != self.vcpu_count() {
            return Err(Error::VcpuPanicked);
        }
        Ok(MachineState {
            vcpus: vcpus.into_iter().collect::<Result<_, _>>()?,
            // Its registers can be read only while no vCPU's are.
            gic: self.vm.gic_state()?,
            virtio: virtio?,
            serial: self.serial.state(),
            clock: self.clock.state(),
            generation: self.generation.id(),
        })
    }

    /// Runs the guest to the machine's end, or until it is asked to end or interrupted; not at all if it was before.
    /// Once interrupted, it can be run again, and its guest runs all the while.
    ///
    /// # Errors
    /// A vCPU or a device cannot go on.
    pub fn run(&mut self) -> Result<Ending, Error> {
        if let Some(event) = self.seen.take().or_else(|| self.events.try_recv().ok()) {
            return event.ending();
        }
        if !self.is_running() {
            self.open()?;
        }
        // The channel cannot close: `sender` keeps it open.
        self.events.recv().map_or(Ok(Ending::Asked), Event::ending)
    }
}

impl Event {
    /// What a machine's run comes to by this; none if it fails.
    const fn known_ending(&self) -> Option<Ending> {
        match self {
            Self::Vcpu(VcpuEvent::System(SystemEvent::Off)) => Some(Ending::Off),
            Self::Vcpu(VcpuEvent::System(SystemEvent::Reset)) => Some(Ending::Reset),
            Self::Vcpu(_) => None,
            Self::Quit => Some(Ending::Asked),
            Self::Interrupt => Some(Ending::Interrupted),
        }
    }

    fn ending(self) -> Result<Ending, Error> {
        match self {
            Self::Vcpu(VcpuEvent::Failed(e)) => Err(e.into()),
            Self::Vcpu(VcpuEvent::Panicked) => Err(Error::VcpuPanicked),
            other => other.known_ending().ok_or(Error::NotDebugged),
        }
    }
}

fn start_threads<V: Vcpu + 'static>(
    vcpus: Vec<V>,
    bus: &Arc<Bus>,
    sender: &Sender<Event>,
) -> Result<VcpuThreads<V>, Error> {
    let report = sender.clone();
    let report = move |event| {
        let _ = report.send(Event::Vcpu(event));
    };
    VcpuThreads::start(vcpus, bus, report).map_err(|source| Error::Host {
        step: "starting the vCPU threads",
        source,
    })
}

impl<H: Hypervisor> Drop for Machine<H> {
    fn drop(&mut self) {
        drop(self.vcpus.take());
        for device in &self.virtio {
            device.pause();
        }
        for memslot in [self.memory.memslot(), self.generation.memslot()] {
            if let Err(e) = self.vm.delete_memslot(memslot.slot) {
                tracing::warn!("{e}");
            }
        }
    }
}
