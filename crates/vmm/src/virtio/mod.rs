//! Virtio devices over virtio-mmio (virtio 1.2, 4.2).
//!
//! The transport (`mmio`) owns what every device has: feature negotiation, queue set-up, status,
//! interrupts. A [`VirtioDevice`] is what differs between a disk and a network card. Each active
//! device has a thread of its own that owns its queues: the vCPU that writes `QueueNotify` only
//! signals an eventfd. Stopping the thread gives the queues back, which is how a device is reset
//! and how it is paused for a snapshot.

use std::io;
use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;

/// A device's way to interrupt the guest.
pub trait Interrupt: Send + Sync {
    /// A queue has used buffers.
    fn used_buffers(&self);
    /// The device's configuration space changed.
    fn config_changed(&self);
}

/// What a device is given when its driver sets `DRIVER_OK`.
pub struct Activation {
    /// Guest memory. Addresses from the guest are checked by it, on every access.
    pub memory: Arc<GuestRam>,
    /// One entry a queue of [`VirtioDevice::queue_sizes`]; a queue the driver left out is not `ready()`.
    pub queues: Vec<Queue>,
    /// Readable when the driver notified the queue of the same index.
    pub kicks: Vec<EventFd>,
    /// Interrupts the guest.
    pub interrupt: Arc<dyn Interrupt>,
    /// The features both sides agreed on.
    pub features: u64,
}

/// A virtio device without its transport.
pub trait VirtioDevice: Send {
    /// The virtio device ID (virtio 1.2, 5).
    fn device_id(&self) -> u32;
    /// A short name for threads and messages, such as `disk0`.
    fn name(&self) -> &str;
    /// The device-specific features offered. The transport adds `VIRTIO_F_VERSION_1` and the ring features.
    fn features(&self) -> u64;
    /// The largest size of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// Reads configuration space. Bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space. Most devices have nothing to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Starts the device's work.
    ///
    /// # Errors
    /// The device cannot start; the transport sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;
    /// Stops the device's work and gives the queues back, with every request either not begun or
    /// completed. `None` when it was not active.
    fn deactivate(&mut self) -> Option<Vec<Queue>>;
}
