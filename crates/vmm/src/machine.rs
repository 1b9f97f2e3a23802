//! A machine: built from its configuration, run to its end, taken down in order.

mod assembly;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use engine::{GicState, Hypervisor, SystemEvent, Vcpu, VcpuState, Vm, VmBuilder};
use mte::{MteFeatures, MteLevel};
use serde::{Deserialize, Serialize};

use crate::bus::Bus;
use crate::config::{MachineConfig, MemorySize};
use crate::console::{Connection, Console};
use crate::devices::rtc::{ClockState, RealTimeClock};
use crate::devices::serial::SerialPortState;
use crate::memory::GuestMemory;
use crate::memory::tags::{TagStore, tag_store};
use crate::terminal::Command;
use crate::vcpu::{VcpuEvent, VcpuThreads};
use crate::virtio::mmio::{MmioTransport, TransportState};
use crate::{boot, console, memory, virtio};
use assembly::{MachinePort, Start};

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
}

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest switched it off.
    Off,
    /// The guest reset it.
    Reset,
    /// The user or a signal asked for it.
    Asked,
}

enum Event {
    Vcpu(VcpuEvent),
    Stop,
}

/// Asks a machine to end, from any thread.
#[derive(Clone)]
pub struct StopHandle(Sender<Event>);

impl StopHandle {
    /// Asks the machine to end. It then stops its vCPUs, completes what its devices have begun,
    /// and flushes its disks. Nothing happens if it has ended already.
    pub fn stop(&self) {
        let _ = self.0.send(Event::Stop);
    }
}

/// A machine.
///
/// Dropping it stops the vCPUs, then the devices, and takes the memory from the guest before it is unmapped.
pub struct Machine<H: Hypervisor> {
    /// `None` only while the machine is taken down.
    vcpus: Option<VcpuThreads<VcpuOf<H>>>,
    bus: Arc<Bus>,
    serial: Arc<MachinePort<VmOf<H>>>,
    clock: Arc<RealTimeClock>,
    virtio: Vec<Arc<MmioTransport>>,
    /// The devices wait, as the vCPUs do.
    paused: bool,
    events: Receiver<Event>,
    sender: Sender<Event>,
    mte: Option<MteFeatures>,
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

    /// Builds a machine that goes on where the one of `state` stood, with the configuration of that one.
    /// It has its memory yet to be given, and stands still until [`Machine::run`].
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left behind.
    pub fn restored(
        hypervisor: &H,
        config: &MachineConfig,
        state: &MachineState,
        console: &mut Console,
    ) -> Result<Self, Error> {
        Self::build(hypervisor, config, Start::Restored(state), console)
    }

    fn build(
        hypervisor: &H,
        config: &MachineConfig,
        start: Start<'_>,
        console: &mut Console,
    ) -> Result<Self, Error> {
        let (sender, events) = mpsc::channel();
        let handle = StopHandle(sender.clone());
        let on_command = move |command| {
            if command == Command::Quit {
                handle.stop();
            }
        };
        let parts = assembly::assemble(hypervisor, config, start, console, on_command)?;
        let vcpus = start_threads(parts.vcpus, &parts.bus, &sender)?;
        Ok(Self {
            vcpus: Some(vcpus),
            bus: parts.bus,
            serial: parts.serial,
            clock: parts.clock,
            paused: matches!(start, Start::Restored(_)),
            virtio: parts.virtio,
            events,
            sender,
            mte: parts.mte,
            vm: parts.vm,
            memory: Arc::new(parts.memory),
            _console: parts.console,
        })
    }

    /// A handle by which other threads end the machine.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(self.sender.clone())
    }

    /// The MTE that the guest sees.
    pub fn mte(&self) -> Option<MteFeatures> {
        self.mte
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

    /// Stops vCPUs and devices, with nothing begun and not completed, and returns their state. [`Machine::run`] lets them
    /// go on, after an error too unless a thread is gone.
    ///
    /// # Errors
    /// The host does not tell a state, or a vCPU's thread is gone.
    pub fn save(&mut self) -> Result<MachineState, Error> {
        let Some(threads) = self.vcpus.take() else {
            return Err(Error::VcpuPanicked);
        };
        let wanted = threads.len();
        let vcpus = threads.stop();
        if vcpus.len() != wanted {
            return Err(Error::VcpuPanicked);
        }
        for device in &self.virtio {
            device.pause();
        }
        self.paused = true;
        let state = self.state(&vcpus);
        self.vcpus = Some(start_threads(vcpus, &self.bus, &self.sender)?);
        state
    }

    /// The state of the machine, whose vCPUs and devices stand still.
    fn state(&self, vcpus: &[VcpuOf<H>]) -> Result<MachineState, Error> {
        let virtio: Result<_, _> = self.virtio.iter().map(|device| device.state()).collect();
        Ok(MachineState {
            vcpus: vcpus.iter().map(VcpuState::of).collect::<Result<_, _>>()?,
            gic: self.vm.gic_state()?,
            virtio: virtio?,
            serial: self.serial.state(),
            clock: self.clock.state(),
        })
    }

    /// Runs the guest to the machine's end, or until it is asked to end; not at all if it was before. Once
    /// asked, it can be run again.
    ///
    /// # Errors
    /// A vCPU or a device cannot go on.
    pub fn run(&mut self) -> Result<Ending, Error> {
        if let Ok(Event::Stop) = self.events.try_recv() {
            return Ok(Ending::Asked);
        }
        if std::mem::take(&mut self.paused) {
            self.virtio.iter().try_for_each(|device| device.resume())?;
        }
        if let Some(vcpus) = &self.vcpus {
            vcpus.resume();
        }
        // The channel cannot close: `sender` keeps it open.
        match self.events.recv() {
            Ok(Event::Vcpu(VcpuEvent::System(SystemEvent::Off))) => Ok(Ending::Off),
            Ok(Event::Vcpu(VcpuEvent::System(SystemEvent::Reset))) => Ok(Ending::Reset),
            Ok(Event::Vcpu(VcpuEvent::Failed(e))) => Err(e.into()),
            Ok(Event::Vcpu(VcpuEvent::Panicked)) => Err(Error::VcpuPanicked),
            Ok(Event::Stop) | Err(_) => Ok(Ending::Asked),
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
        if let Err(e) = self.vm.delete_memslot(self.memory.memslot().slot) {
            tracing::warn!("{e}");
        }
    }
}
