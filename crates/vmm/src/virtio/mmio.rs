//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2.2).
//!
//! [`MmioTransport`] shows one device to the guest as a page of registers. vCPU threads call
//! [`read`](MmioTransport::read) and [`write`](MmioTransport::write) with what they trapped. Behind
//! the registers are three things with locks of their own, so that the common accesses never wait
//! for a reset: the kicks (no lock), the interrupt with its line (`Signals`), and all else
//! (`Registers`), the device included.
//!
//! The transport drives the device: `DRIVER_OK` activates it with queues built from what the driver
//! wrote, a reset deactivates it. [`pause`](MmioTransport::pause) deactivates it too, but keeps the
//! rings' positions, from which [`resume`](MmioTransport::resume) builds the queues again; a
//! snapshot is taken in between with [`state`](MmioTransport::state).
//!
//! An access that the specification forbids is ignored, and logged once for each kind. A queue
//! that cannot be, such as one outside guest memory, sets `DEVICE_NEEDS_RESET`.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, DeviceState, Error, Interrupt, IrqLine, VirtioDevice};
use crate::memory::GuestRam;

/// Bytes of guest physical address space that a transport fills: registers, then configuration.
pub const MMIO_SIZE: u64 = 0x200;
/// Offset of the register `QueueNotify`, to which an index of [`MmioTransport::kicks`] is written.
pub const QUEUE_NOTIFY: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// `MagicValue`: «virt».
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// `Version`: not the legacy interface.
const VERSION: u32 = 2;
/// `VendorID`. Drivers attach no meaning to it.
const VENDOR: u32 = u32::from_le_bytes(*b"TAGV");
/// What both halves of the length and of the base of a shared memory region that does not exist
/// read as (virtio 1.2, 4.2.2.1). No device here has one.
const NO_REGION: u32 = u32::MAX;
/// Where configuration space begins.
const CONFIG: u64 = reg::VIRTIO_MMIO_CONFIG as u64;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
/// The bits a driver sets one after the other on its way to a running device (virtio 1.2, 3.1.1).
const STEPS: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// The features of every device here.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// One virtio device in the guest's physical address space.
pub struct MmioTransport {
    name: String,
    kicks: Vec<EventFd>,
    interrupt: Arc<MmioInterrupt>,
    registers: Mutex<Registers>,
    /// The kinds of misuse already logged, one bit each.
    logged: AtomicU32,
}

/// A transport and its device in a snapshot. It holds only what the guest can see or has given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// The virtio device ID.
    pub device_id: u32,
    /// The register `Status`, `DEVICE_NEEDS_RESET` included.
    pub status: u32,
    /// The register `DeviceFeaturesSel`.
    pub device_features_select: u32,
    /// The register `DriverFeaturesSel`.
    pub driver_features_select: u32,
    /// The features the driver accepted, all 64.
    pub driver_features: u64,
    /// The register `QueueSel`.
    pub queue_select: u32,
    /// The register `InterruptStatus`.
    pub interrupt_status: u32,
    /// The register `ConfigGeneration`.
    pub config_generation: u32,
    /// Every queue of the device.
    pub queues: Vec<QueueState>,
    /// What the device itself remembers.
    pub device: DeviceState,
}

/// A queue as its driver set it up, unchecked, and how far the device has come in its rings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// The register `QueueNum`: entries.
    pub size: u32,
    /// The register `QueueReady`.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest physical address of the driver area, the available ring.
    pub available_ring: u64,
    /// Guest physical address of the device area, the used ring.
    pub used_ring: u64,
    /// The next entry of the available ring that the device takes.
    pub next_available: u16,
    /// The next entry of the used ring that the device writes.
    pub next_used: u16,
}

impl QueueState {
    /// The device's side of the queue, checked against the device's limit and guest memory.
    fn build(&self, max_size: u16, event_idx: bool, memory: &GuestRam) -> Result<Queue, String> {
        let broken = |error: virtio_queue::Error| error.to_string();
        let mut queue = Queue::new(max_size).map_err(broken)?;
        if !self.ready {
            return Ok(queue);
        }
        let size = u16::try_from(self.size).unwrap_or(0);
        queue
            .try_set_size(size)
            .map_err(|_| format!("size {} is no power of two up to {max_size}", self.size))?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptor_table))
            .map_err(broken)?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.available_ring))
            .map_err(broken)?;
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring))
            .map_err(broken)?;
        queue.set_next_avail(self.next_available);
        queue.set_next_used(self.next_used);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(format!(
                "its rings at {:#x}, {:#x} and {:#x} are not in guest memory",
                self.descriptor_table, self.available_ring, self.used_ring
            ));
        }
        Ok(queue)
    }
}

/// Why an access is ignored.
#[derive(Clone, Copy, Debug)]
enum Misuse {
    Width,
    Offset,
    Direction,
    State,
    Value,
}

impl MmioTransport {
    /// A transport for `device`, reset, that interrupts the guest by `line`.
    ///
    /// # Errors
    /// The process has no descriptor left for the kicks.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestRam>,
        line: Arc<dyn IrqLine>,
    ) -> Result<Self, Error> {
        let name = device.name().to_owned();
        let kicks = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<io::Result<Vec<_>>>()
            .map_err(|source| Error::Kick {
                device: name.clone(),
                source,
            })?;
        Ok(MmioTransport {
            name,
            kicks,
            interrupt: Arc::new(MmioInterrupt {
                line,
                signals: Mutex::default(),
            }),
            registers: Mutex::new(Registers::new(device, memory)),
            logged: AtomicU32::new(0),
        })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One eventfd a queue, for a hypervisor that can signal it on a write of the queue's index to
    /// [`QUEUE_NOTIFY`] without leaving the kernel.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The guest reads `data.len()` bytes at `offset` of the transport. What cannot be read is zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            if self.is_config_access(offset, data.len()) {
                self.registers().device.read_config(offset - CONFIG, data);
            }
        } else if !offset.is_multiple_of(4) {
            self.ignore(Misuse::Offset, offset);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset).to_le_bytes();
        } else {
            self.ignore(Misuse::Width, offset);
        }
    }

    /// The guest writes `data` at `offset` of the transport.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            if self.is_config_access(offset, data.len()) {
                self.write_config(offset - CONFIG, data);
            }
        } else if !offset.is_multiple_of(4) {
            self.ignore(Misuse::Offset, offset);
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        } else {
            self.ignore(Misuse::Width, offset);
        }
    }

    /// Stops the device's work, with every request either not begun or completed, until
    /// [`resume`](Self::resume). The guest's vCPUs should be stopped before.
    pub fn pause(&self) {
        let mut registers = self.registers();
        self.stop(&mut registers);
        registers.paused = true;
    }

    /// Lets the device go on after [`pause`](Self::pause) or [`restore`](Self::restore).
    ///
    /// # Errors
    /// The device could not start. The guest's driver is told, so that the guest can go on.
    pub fn resume(&self) -> Result<(), Error> {
        let mut registers = self.registers();
        registers.paused = false;
        if !registers.should_run() || self.interrupt.needs_reset() {
            return Ok(());
        }
        self.start(&mut registers).map_err(|source| Error::Resume {
            device: self.name.clone(),
            source,
        })
    }

    /// What a snapshot must hold of this device.
    ///
    /// # Errors
    /// [`Error::NotPaused`].
    pub fn state(&self) -> Result<TransportState, Error> {
        let registers = self.registers();
        if !registers.paused {
            return Err(Error::NotPaused {
                device: self.name.clone(),
            });
        }
        let signals = self.interrupt.signals();
        Ok(TransportState {
            device_id: registers.device.device_id(),
            status: registers.status | signals.needs_reset_bit(),
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            interrupt_status: signals.status,
            config_generation: signals.config_generation,
            queues: registers.queues.clone(),
            device: registers.device.state(),
        })
    }

    /// Takes up the state of a snapshot, interrupt line included, and stays paused: the device goes
    /// on with [`resume`](Self::resume). Guest memory must be reachable by then.
    ///
    /// # Errors
    /// [`Error::Unfit`] when the state is not one of this device, [`Error::NotPaused`] when it runs.
    pub fn restore(&self, state: &TransportState) -> Result<(), Error> {
        let mut registers = self.registers();
        if registers.running {
            return Err(Error::NotPaused {
                device: self.name.clone(),
            });
        }
        registers
            .check(state)
            .map_err(|why| Error::unfit(&self.name, why))?;
        registers.device.restore(&state.device)?;
        registers.paused = true;
        registers.status = state.status & !NEEDS_RESET;
        registers.device_features_select = state.device_features_select;
        registers.driver_features_select = state.driver_features_select;
        registers.driver_features = state.driver_features;
        registers.queue_select = state.queue_select;
        let queues = registers.queues.len();
        registers.queues.clone_from(&state.queues);
        registers.queues.resize(queues, QueueState::default());
        self.interrupt.replace(Signals {
            status: state.interrupt_status,
            needs_reset: state.status & NEEDS_RESET != 0,
            config_generation: state.config_generation,
        });
        Ok(())
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn ignore(&self, misuse: Misuse, offset: u64) {
        let bit = 1 << misuse as u32;
        if self.logged.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            tracing::debug!(
                "virtio device \"{}\" ignores an access at {offset:#x}, and others like it: {misuse:?}",
                self.name
            );
        }
    }

    /// Whether configuration space can be accessed there; logs it if not.
    fn is_config_access(&self, offset: u64, len: usize) -> bool {
        if offset >= MMIO_SIZE {
            self.ignore(Misuse::Offset, offset);
            return false;
        }
        if !matches!(len, 1 | 2 | 4 | 8) {
            self.ignore(Misuse::Width, offset);
            return false;
        }
        true
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut registers = self.registers();
        if registers.status & (DRIVER | FAILED) == DRIVER {
            registers.device.write_config(offset, data);
        } else {
            self.ignore(Misuse::State, CONFIG + offset);
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        // Below 0x100.
        match offset as u32 {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.registers().device.device_id(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => self.registers().offered_word(),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => self.registers().selected_max_size(),
            reg::VIRTIO_MMIO_QUEUE_READY => {
                let mut registers = self.registers();
                registers
                    .selected_queue()
                    .is_some_and(|queue| queue.ready)
                    .into()
            }
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.signals().status,
            reg::VIRTIO_MMIO_STATUS => {
                let registers = self.registers();
                registers.status | self.interrupt.signals().needs_reset_bit()
            }
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => NO_REGION,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.signals().config_generation,
            _ => {
                self.ignore(Misuse::Direction, offset);
                0
            }
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        // Below 0x100.
        match offset as u32 {
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::VIRTIO_MMIO_STATUS => self.write_status(value),
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers().device_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers().driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => {
                if !self.registers().accept_features(value) {
                    self.ignore(Misuse::State, offset);
                }
            }
            reg::VIRTIO_MMIO_QUEUE_SEL => self.registers().queue_select = value,
            // No region exists, whichever is selected.
            reg::VIRTIO_MMIO_SHM_SEL => {}
            reg::VIRTIO_MMIO_QUEUE_READY => self.write_queue_ready(value),
            reg::VIRTIO_MMIO_QUEUE_NUM => self.set_up_queue(offset, |queue| queue.size = value),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => {
                self.set_up_queue(offset, |queue| set_low(&mut queue.descriptor_table, value));
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                self.set_up_queue(offset, |queue| set_high(&mut queue.descriptor_table, value));
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                self.set_up_queue(offset, |queue| set_low(&mut queue.available_ring, value));
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                self.set_up_queue(offset, |queue| set_high(&mut queue.available_ring, value));
            }
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => {
                self.set_up_queue(offset, |queue| set_low(&mut queue.used_ring, value));
            }
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                self.set_up_queue(offset, |queue| set_high(&mut queue.used_ring, value));
            }
            _ => self.ignore(Misuse::Direction, offset),
        }
    }

    fn notify(&self, queue: u32) {
        match self.kicks.get(queue as usize) {
            // An eventfd at its limit is kicked already.
            Some(kick) => drop(kick.write(1)),
            None => self.ignore(Misuse::Value, QUEUE_NOTIFY),
        }
    }

    /// Changes the selected queue, which is possible only while it is not ready and the device is
    /// being set up.
    fn set_up_queue(&self, offset: u64, change: impl FnOnce(&mut QueueState)) {
        let mut registers = self.registers();
        let set_up = registers.queues_can_be_set_up();
        match registers.selected_queue() {
            Some(queue) if set_up && !queue.ready => change(queue),
            _ => self.ignore(Misuse::State, offset),
        }
    }

    fn write_queue_ready(&self, value: u32) {
        let mut registers = self.registers();
        let set_up = registers.queues_can_be_set_up();
        let live = registers.status & DRIVER_OK != 0;
        match registers.selected_queue() {
            Some(queue) if set_up && value <= 1 => queue.ready = value == 1,
            Some(queue) if live && value == 0 && queue.ready => self.retire_queue(&mut registers),
            _ => self.ignore(Misuse::State, reg::VIRTIO_MMIO_QUEUE_READY.into()),
        }
    }

    /// Takes the selected queue from a live device, which goes on with the others.
    fn retire_queue(&self, registers: &mut Registers) {
        let ran = registers.running;
        self.stop(registers);
        if let Some(queue) = registers.selected_queue() {
            queue.ready = false;
        }
        if ran && !self.interrupt.needs_reset() {
            // A failure is told to the driver.
            let _ = self.start(registers);
        }
    }

    /// Takes the driver's next steps (virtio 1.2, 2.1 and 3.1.1), several at once if it likes.
    fn write_status(&self, value: u32) {
        let mut registers = self.registers();
        if value == 0 {
            self.reset(&mut registers);
            return;
        }
        let current = registers.status;
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | NEEDS_RESET | FAILED;
        // Bits are only added.
        if value & !known != 0 || current & !value != 0 {
            self.ignore(Misuse::Value, reg::VIRTIO_MMIO_STATUS.into());
            return;
        }
        if value & FAILED != 0 {
            // From here there is only reset.
            registers.status |= FAILED;
            self.stop(&mut registers);
            return;
        }
        for step in STEPS
            .into_iter()
            .filter(|step| value & !current & step != 0)
        {
            if !registers.can_take(step) {
                self.ignore(Misuse::State, reg::VIRTIO_MMIO_STATUS.into());
                return;
            }
            registers.status |= step;
        }
        if registers.status & !current & DRIVER_OK != 0 && registers.should_run() {
            // A failure is told to the driver.
            let _ = self.start(&mut registers);
        }
    }

    fn reset(&self, registers: &mut Registers) {
        self.stop(registers);
        registers.forget_driver();
        self.interrupt.reset();
        for kick in &self.kicks {
            // Empty is what it should be.
            let _ = kick.read();
        }
    }

    /// Activates the device with the queues as they stand. A failure sets `DEVICE_NEEDS_RESET`.
    fn start(&self, registers: &mut Registers) -> io::Result<()> {
        let started = self.activate(registers);
        if let Err(why) = &started {
            tracing::warn!("virtio device \"{}\" does not start: {why}", self.name);
            self.interrupt.device_needs_reset();
        }
        started
    }

    fn activate(&self, registers: &mut Registers) -> io::Result<()> {
        let queues = registers
            .build_queues(&registers.queues, registers.driver_features)
            .map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, why))?;
        let kicks = self
            .kicks
            .iter()
            .map(EventFd::try_clone)
            .collect::<io::Result<_>>()?;
        let activation = Activation {
            memory: registers.memory.clone(),
            queues,
            kicks,
            interrupt: self.interrupt.clone(),
            features: registers.driver_features,
        };
        registers.device.activate(activation)?;
        registers.running = true;
        Ok(())
    }

    /// Deactivates the device, if it runs, and notes how far it has come.
    fn stop(&self, registers: &mut Registers) {
        if !registers.running {
            return;
        }
        registers.running = false;
        match registers.device.deactivate() {
            Some(queues) => registers.note_progress(&queues),
            // Its queues are lost, and with them the way to go on.
            None => self.interrupt.device_needs_reset(),
        }
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}

/// What the driver has set, and the device.
struct Registers {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestRam>,
    /// The driver's status bits. `DEVICE_NEEDS_RESET` is the device's and is in `Signals`.
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    /// One entry a queue of the device.
    queues: Vec<QueueState>,
    /// Whether the device is active.
    running: bool,
    /// Whether it must not be activated now.
    paused: bool,
}

impl Registers {
    fn new(device: Box<dyn VirtioDevice>, memory: Arc<GuestRam>) -> Self {
        let queues = vec![QueueState::default(); device.queue_sizes().len()];
        Registers {
            device,
            memory,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            running: false,
            paused: false,
        }
    }

    /// Back to what a driver finds first.
    fn forget_driver(&mut self) {
        self.device.reset();
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues.fill(QueueState::default());
    }

    fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    /// The 32 offered features that are selected.
    fn offered_word(&self) -> u32 {
        match self.device_features_select {
            0 => self.offered() as u32,
            1 => (self.offered() >> 32) as u32,
            _ => 0,
        }
    }

    /// Sets the selected 32 accepted features. `false` when it is too late for that, or too early.
    fn accept_features(&mut self, value: u32) -> bool {
        if self.status & (DRIVER | FEATURES_OK | FAILED) != DRIVER {
            return false;
        }
        match self.driver_features_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            // None of them is offered: drivers write zero, if they write at all.
            _ => return value == 0,
        }
        true
    }

    fn selected_queue(&mut self) -> Option<&mut QueueState> {
        self.queues.get_mut(self.queue_select as usize)
    }

    fn selected_max_size(&self) -> u32 {
        let sizes = self.device.queue_sizes();
        sizes
            .get(self.queue_select as usize)
            .copied()
            .unwrap_or(0)
            .into()
    }

    fn queues_can_be_set_up(&self) -> bool {
        self.status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK
    }

    /// Whether the driver may set this status bit, having set the current ones.
    fn can_take(&self, step: u32) -> bool {
        follows(self.status, step)
            && (step != FEATURES_OK || acceptable(self.driver_features, self.offered()))
    }

    fn should_run(&self) -> bool {
        self.status & (DRIVER_OK | FAILED) == DRIVER_OK && !self.paused
    }

    fn build_queues(&self, queues: &[QueueState], features: u64) -> Result<Vec<Queue>, String> {
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let build = |(index, (queue, &max_size)): (usize, (&QueueState, &u16))| {
            queue
                .build(max_size, event_idx, &self.memory)
                .map_err(|why| format!("queue {index}: {why}"))
        };
        queues
            .iter()
            .zip(self.device.queue_sizes())
            .enumerate()
            .map(build)
            .collect()
    }

    fn note_progress(&mut self, queues: &[Queue]) {
        for (state, queue) in self.queues.iter_mut().zip(queues) {
            state.next_available = queue.next_avail();
            state.next_used = queue.next_used();
        }
    }

    /// Whether `state` can be one of this device; if not, why.
    fn check(&self, state: &TransportState) -> Result<(), String> {
        let id = self.device.device_id();
        if state.device_id != id {
            return Err(format!(
                "the saved device has virtio ID {}, this one {id}",
                state.device_id
            ));
        }
        let (saved, here) = (state.queues.len(), self.queues.len());
        if !(self.device.least_queues()..=here).contains(&saved) {
            return Err(format!(
                "the saved device has {saved} queues, this one {here}"
            ));
        }
        check_status(state.status)?;
        if state.status & FEATURES_OK != 0 && !acceptable(state.driver_features, self.offered()) {
            let (saved, here) = (state.driver_features, self.offered());
            return Err(format!(
                "its driver uses features {saved:#x}, this device offers {here:#x}"
            ));
        }
        if state.interrupt_status & !ALL_INTERRUPTS != 0 {
            return Err(format!(
                "interrupt status {:#x} does not exist",
                state.interrupt_status
            ));
        }
        if state.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK {
            self.build_queues(&state.queues, state.driver_features)?;
        }
        Ok(())
    }
}

/// Whether a driver that has set `status` may set `step` next.
fn follows(status: u32, step: u32) -> bool {
    STEPS
        .into_iter()
        .take_while(|&before| before != step)
        .all(|before| status & before != 0)
}

/// Whether a driver may accept `features` of `offered`. The legacy interface is not spoken.
fn acceptable(features: u64, offered: u64) -> bool {
    features & !offered == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
}

fn check_status(status: u32) -> Result<(), String> {
    let known = STEPS
        .into_iter()
        .fold(NEEDS_RESET | FAILED, |known, step| known | step);
    let in_order = STEPS
        .into_iter()
        .all(|step| status & step == 0 || follows(status, step));
    if status & !known == 0 && in_order {
        Ok(())
    } else {
        Err(format!("status {status:#x} does not exist"))
    }
}

const USED_BUFFERS: u32 = reg::VIRTIO_MMIO_INT_VRING;
const CONFIG_CHANGED: u32 = reg::VIRTIO_MMIO_INT_CONFIG;
const ALL_INTERRUPTS: u32 = USED_BUFFERS | CONFIG_CHANGED;

/// What the device has to say to the driver.
#[derive(Default)]
struct Signals {
    /// The register `InterruptStatus`.
    status: u32,
    /// `DEVICE_NEEDS_RESET`.
    needs_reset: bool,
    /// The register `ConfigGeneration`. It counts on over resets.
    config_generation: u32,
}

impl Signals {
    fn needs_reset_bit(&self) -> u32 {
        if self.needs_reset { NEEDS_RESET } else { 0 }
    }
}

/// The interrupt of one transport. The line is high while the status is not zero. Device threads
/// raise and vCPUs acknowledge at the same time: status and line change under one lock, or a
/// device's raise between an acknowledgement's two steps would be lost.
struct MmioInterrupt {
    line: Arc<dyn IrqLine>,
    signals: Mutex<Signals>,
}

impl MmioInterrupt {
    fn signals(&self) -> MutexGuard<'_, Signals> {
        self.signals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Signals)) {
        let mut signals = self.signals();
        let was_high = signals.status != 0;
        change(&mut signals);
        let high = signals.status != 0;
        // Moving the line is a system call; most changes leave it where it is.
        if high != was_high {
            self.line.set_level(high);
        }
    }

    fn acknowledge(&self, bits: u32) {
        self.change(|signals| signals.status &= !bits);
    }

    fn needs_reset(&self) -> bool {
        self.signals().needs_reset
    }

    /// Takes up the signals of a snapshot, wherever the line may be now.
    fn replace(&self, new: Signals) {
        let mut signals = self.signals();
        *signals = new;
        self.line.set_level(signals.status != 0);
    }

    fn reset(&self) {
        self.change(|signals| {
            signals.status = 0;
            signals.needs_reset = false;
        });
    }
}

impl Interrupt for MmioInterrupt {
    fn used_buffers(&self) {
        self.change(|signals| signals.status |= USED_BUFFERS);
    }

    fn config_changed(&self) {
        self.change(|signals| {
            signals.status |= CONFIG_CHANGED;
            signals.config_generation = signals.config_generation.wrapping_add(1);
        });
    }

    fn device_needs_reset(&self) {
        self.change(|signals| {
            signals.status |= CONFIG_CHANGED;
            signals.needs_reset = true;
        });
    }
}

#[cfg(test)]
mod tests;
