//! Virtio devices over virtio-mmio (virtio 1.2, 4.2).
//!
//! The transport ([`mmio`]) owns what every device has: feature negotiation, queue set-up, status,
//! interrupts. A [`VirtioDevice`] is what differs between a disk and a network card. Each active
//! device has a thread of its own ([`worker`]) that owns its queues: the vCPU that writes
//! `QueueNotify` only signals an eventfd. Stopping the thread gives the queues back, which is how a
//! device is reset and how it is paused for a snapshot.
//!
//! Everything a driver writes is hostile. A driver that breaks its rings ends with
//! `DEVICE_NEEDS_RESET` on that one device; the VMM and the other devices go on.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;

pub mod block;
pub(crate) mod chain;
pub mod console;
pub mod mmio;
pub mod net;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod worker;

/// A level-triggered interrupt line into the guest's interrupt controller.
pub trait IrqLine: Send + Sync {
    /// Raises (`true`) or lowers (`false`) the line. Repeating a level changes nothing.
    fn set_level(&self, high: bool);
}

/// A device's way to interrupt the guest.
pub trait Interrupt: Send + Sync {
    /// A queue has used buffers.
    fn used_buffers(&self);
    /// The device's configuration space changed.
    fn config_changed(&self);
    /// The device cannot go on until the driver resets it: sets `DEVICE_NEEDS_RESET` and tells the
    /// driver by a configuration interrupt (virtio 1.2, 2.1.2).
    fn device_needs_reset(&self);
}

/// What a device is given when its driver sets `DRIVER_OK`, and again when it goes on after a pause.
pub struct Activation {
    /// Guest memory. Addresses from the guest are checked by it, on every access.
    pub memory: Arc<GuestRam>,
    /// One entry a queue of [`VirtioDevice::queue_sizes`]; a queue the driver left out is not `ready()`.
    pub queues: Vec<Queue>,
    /// Readable when the driver notified the queue of the same index. Non-blocking.
    pub kicks: Vec<EventFd>,
    /// Interrupts the guest.
    pub interrupt: Arc<dyn Interrupt>,
    /// The features both sides agreed on.
    pub features: u64,
}

impl Activation {
    /// Whether both sides agreed on the feature with this bit number.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// A virtio device without its transport.
pub trait VirtioDevice: Send {
    /// The virtio device ID (virtio 1.2, 5).
    fn device_id(&self) -> u32;
    /// A short name for threads and messages, such as `disk0`.
    fn name(&self) -> &str;
    /// The device-specific features offered. The transport adds `VIRTIO_F_VERSION_1` and the ring features.
    fn features(&self) -> u64;
    /// The largest size of each queue: powers of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];
    /// How many queues it had in the earliest saved states that it takes up. Later ones come last, and nothing of a guest
    /// that never saw them is in them.
    fn least_queues(&self) -> usize {
        self.queue_sizes().len()
    }
    /// Reads configuration space. Bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space. Most devices have nothing to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Starts the device's work. Buffers may already be waiting in the queues, with no kick to come:
    /// [`worker::Worker`] looks at every queue when it starts.
    ///
    /// # Errors
    /// The device cannot start; the transport sets `DEVICE_NEEDS_RESET`. The device stays whole: it
    /// can be activated again after a reset.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;
    /// Stops the device's work and gives the queues back, with every request either not begun or
    /// completed. `None` when it was not active.
    fn deactivate(&mut self) -> Option<Vec<Queue>>;
    /// Forgets what the driver has set in the device, as a device reset asks. Called while not
    /// active. Backends (files, sockets) stay open.
    fn reset(&mut self) {}
    /// What the device must remember in a snapshot beyond its queues and features. Called while
    /// not active.
    fn state(&self) -> DeviceState {
        DeviceState::Stateless
    }
    /// Takes up the state of a snapshot. Called while not active.
    ///
    /// # Errors
    /// The state is that of another kind of device, or does not fit this one.
    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        match state {
            DeviceState::Stateless => Ok(()),
            DeviceState::Console(_) => Err(Error::unfit(
                self.name(),
                "its device state is that of another device",
            )),
        }
    }
}

/// The state of a device beyond that of its transport, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Queues and features are all there is.
    Stateless,
    /// The ports of a console device.
    Console(console::ConsoleState),
}

/// Why a virtio device could not be built, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No eventfd for a queue.
    #[error("cannot create the notifications of virtio device \"{device}\": {source}")]
    Kick {
        /// The device's name.
        device: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device runs: its queues change while they would be read.
    #[error(
        "the state of virtio device \"{device}\" can be read or replaced only while it is paused"
    )]
    NotPaused {
        /// The device's name.
        device: String,
    },
    /// A saved state does not belong to this device.
    #[error(
        "cannot restore virtio device \"{device}\": {why}; start it with the configuration it was saved with"
    )]
    Unfit {
        /// The device's name.
        device: String,
        /// What does not fit.
        why: String,
    },
    /// The device could not be started again after a pause.
    #[error("cannot resume virtio device \"{device}\": {source}; its driver was told to reset it")]
    Resume {
        /// The device's name.
        device: String,
        /// Why it did not start.
        source: io::Error,
    },
    /// A console port's socket could not be made.
    #[error("cannot listen on {path:?} for console port \"{port}\": {source}")]
    PortSocket {
        /// The port's name.
        port: String,
        /// Where the socket should be.
        path: std::path::PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The ports asked for cannot be offered to a guest.
    #[error("cannot offer console port \"{port}\": {why}")]
    Port {
        /// The port's name.
        port: String,
        /// What is wrong with it.
        why: String,
    },
}

impl Error {
    pub(crate) fn unfit(device: &str, why: impl Into<String>) -> Self {
        Error::Unfit {
            device: device.to_owned(),
            why: why.into(),
        }
    }
}

/// Reads a device's configuration space, given whole, at `offset`. Bytes past its end are zero.
pub(crate) fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..))
        .unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}
