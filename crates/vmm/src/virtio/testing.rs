//! What the tests of virtio devices share: guest memory, an interrupt that is counted, a driver's
//! side of a queue, and waiting with an end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio as reg;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::mmio::MmioTransport;
use super::{Activation, Interrupt, IrqLine};
use crate::memory::GuestRam;

/// Where guest memory starts.
pub const RAM_START: u64 = 0x4000_0000;
/// How long it is.
pub const RAM_SIZE: usize = 4 << 20;
/// Where a test may put buffers: half of the memory.
pub const BUFFERS: u64 = RAM_START + (2 << 20);
/// Room for one queue of [`DriverQueue`].
const QUEUE_ROOM: u64 = 0x4000;

/// Descriptor flag: the chain goes on.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Fresh guest memory.
pub fn ram() -> Arc<GuestRam> {
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(RAM_START), RAM_SIZE)]).unwrap())
}

/// Waits up to ten seconds until `condition` holds.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        thread::sleep(Duration::from_micros(200));
    }
}

/// An interrupt that only counts.
#[derive(Default)]
pub struct CountedInterrupt {
    /// Calls of `used_buffers`.
    pub used: AtomicUsize,
    /// Calls of `config_changed`.
    pub config: AtomicUsize,
    /// Whether the device asked for a reset.
    pub needs_reset: AtomicBool,
}

impl Interrupt for CountedInterrupt {
    fn used_buffers(&self) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
    fn device_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
    }
}

/// An interrupt line that remembers its level.
#[derive(Default)]
pub struct FakeLine {
    high: AtomicBool,
}

impl FakeLine {
    /// The line's level.
    pub fn is_high(&self) -> bool {
        self.high.load(Ordering::SeqCst)
    }
}

impl IrqLine for FakeLine {
    fn set_level(&self, high: bool) {
        self.high.store(high, Ordering::SeqCst);
    }
}

/// The driver's side of one split queue, placed in guest memory by its index.
pub struct DriverQueue {
    memory: Arc<GuestRam>,
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
}

impl DriverQueue {
    /// Queue `index` of `size` entries (at most 256), empty.
    pub fn new(memory: &Arc<GuestRam>, index: usize, size: u16) -> Self {
        assert!(size.is_power_of_two() && size <= 256);
        let base = RAM_START + QUEUE_ROOM * index as u64;
        DriverQueue {
            memory: memory.clone(),
            base,
            size,
            next_descriptor: 0,
            available: 0,
        }
    }

    /// Entries in the queue.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the descriptor table is.
    pub fn descriptors(&self) -> u64 {
        self.base
    }

    /// Where the available ring is.
    pub fn available_ring(&self) -> u64 {
        self.base + 0x1000
    }

    /// Where the used ring is.
    pub fn used_ring(&self) -> u64 {
        self.base + 0x2000
    }

    /// The device's side of this queue, as the transport makes it.
    pub fn device_queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(
            Some(self.descriptors() as u32),
            Some((self.descriptors() >> 32) as u32),
        );
        queue.set_avail_ring_address(
            Some(self.available_ring() as u32),
            Some((self.available_ring() >> 32) as u32),
        );
        queue.set_used_ring_address(
            Some(self.used_ring() as u32),
            Some((self.used_ring() >> 32) as u32),
        );
        queue.set_ready(true);
        queue
    }

    /// Writes descriptor `index` of a table at `table`.
    pub fn write_descriptor(
        &self,
        table: u64,
        index: u16,
        (address, length, flags, next): (u64, u32, u16, u16),
    ) {
        let descriptor = RawDescriptor::from(Descriptor::new(address, length, flags, next));
        self.memory
            .write_obj(descriptor, GuestAddress(table + 16 * u64::from(index)))
            .unwrap();
    }

    /// Makes a chain of `(address, length, WRITE or 0)` available and returns its head. Descriptors
    /// are taken in turn and reused after as many as the queue is long.
    pub fn add(&mut self, buffers: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_descriptor;
        for (position, &(address, length, flags)) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = if position + 1 < buffers.len() {
                NEXT
            } else {
                0
            };
            self.write_descriptor(
                self.descriptors(),
                index,
                (address, length, flags | more, self.next_descriptor),
            );
        }
        self.make_available(head);
        head
    }

    /// Puts `head` into the available ring.
    pub fn make_available(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.memory
            .write_obj(head.to_le(), GuestAddress(slot))
            .unwrap();
        self.set_available_index(self.available.wrapping_add(1));
    }

    /// Sets the index of the available ring, right or wrong.
    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.memory
            .store(
                index.to_le(),
                GuestAddress(self.available_ring() + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    /// Asks for an interrupt when entry `index` of the used ring is used (`VIRTIO_F_EVENT_IDX`).
    pub fn set_used_event(&self, index: u16) {
        let address = self.available_ring() + 4 + 2 * u64::from(self.size);
        self.memory
            .store(index.to_le(), GuestAddress(address), Ordering::Release)
            .unwrap();
    }

    /// How many chains were made available, modulo 65536.
    pub fn available(&self) -> u16 {
        self.available
    }

    /// How many chains were used, modulo 65536.
    pub fn used_index(&self) -> u16 {
        self.memory
            .load::<u16>(GuestAddress(self.used_ring() + 2), Ordering::Acquire)
            .unwrap()
    }

    /// Entry `index` of the used ring: the chain's head and the bytes written into it.
    pub fn used(&self, index: u16) -> (u32, u32) {
        let entry = self.used_ring() + 4 + 8 * u64::from(index % self.size);
        let [head, length]: [u32; 2] =
            [0, 4].map(|offset| self.memory.read_obj(GuestAddress(entry + offset)).unwrap());
        (head, length)
    }
}

/// An activation over the device's side of `queues`, and the kicks that belong to it.
pub fn activation(
    memory: &Arc<GuestRam>,
    queues: &[DriverQueue],
    interrupt: &Arc<CountedInterrupt>,
    features: u64,
) -> (Activation, Vec<EventFd>) {
    let kicks: Vec<EventFd> = queues
        .iter()
        .map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap())
        .collect();
    let activation = Activation {
        memory: memory.clone(),
        queues: queues.iter().map(DriverQueue::device_queue).collect(),
        kicks: kicks.iter().map(|kick| kick.try_clone().unwrap()).collect(),
        interrupt: interrupt.clone(),
        features,
    };
    (activation, kicks)
}

/// Reads a 32-bit register, as a driver does.
pub fn register(transport: &MmioTransport, offset: u32) -> u32 {
    let mut bytes = [0; 4];
    transport.read(offset.into(), &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Writes a 32-bit register, as a driver does.
pub fn set_register(transport: &MmioTransport, offset: u32, value: u32) {
    transport.write(offset.into(), &value.to_le_bytes());
}

/// Goes from reset to `FEATURES_OK` with `features`, and returns the status then.
pub fn negotiate(transport: &MmioTransport, features: u64) -> u32 {
    set_register(transport, reg::VIRTIO_MMIO_STATUS, 0);
    set_register(transport, reg::VIRTIO_MMIO_STATUS, 1);
    set_register(transport, reg::VIRTIO_MMIO_STATUS, 1 | 2);
    for (select, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
        set_register(transport, reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        set_register(transport, reg::VIRTIO_MMIO_DRIVER_FEATURES, word);
    }
    set_register(transport, reg::VIRTIO_MMIO_STATUS, 1 | 2 | 8);
    register(transport, reg::VIRTIO_MMIO_STATUS)
}

/// Tells the device of queue `index`.
pub fn set_up_queue(transport: &MmioTransport, index: usize, queue: &DriverQueue) {
    set_register(transport, reg::VIRTIO_MMIO_QUEUE_SEL, index as u32);
    set_register(transport, reg::VIRTIO_MMIO_QUEUE_NUM, queue.size().into());
    for (low, high, address) in [
        (
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW,
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH,
            queue.descriptors(),
        ),
        (
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
            queue.available_ring(),
        ),
        (
            reg::VIRTIO_MMIO_QUEUE_USED_LOW,
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH,
            queue.used_ring(),
        ),
    ] {
        set_register(transport, low, address as u32);
        set_register(transport, high, (address >> 32) as u32);
    }
    set_register(transport, reg::VIRTIO_MMIO_QUEUE_READY, 1);
}

/// Goes from reset to a live device with `features` and all its `queues`.
pub fn bring_up(transport: &MmioTransport, features: u64, queues: &[DriverQueue]) {
    negotiate(transport, features);
    for (index, queue) in queues.iter().enumerate() {
        set_up_queue(transport, index, queue);
    }
    set_register(transport, reg::VIRTIO_MMIO_STATUS, 1 | 2 | 8 | 4);
}

/// Kicks queue `index`.
pub fn notify(transport: &MmioTransport, index: usize) {
    set_register(transport, reg::VIRTIO_MMIO_QUEUE_NOTIFY, index as u32);
}
