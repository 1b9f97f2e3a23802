//! The virtio block device: a raw image as the guest's disk (virtio 1.2, 5.2).
//!
//! [`Image`] is the file or block device, opened, checked and locked, below an overlay that takes the writes
//! if it is shared with others (`overlay`), and is known again at another host (`identity`). [`Block`] is the device as the
//! transport sees it; while it is active, a worker thread takes requests from its one queue and
//! executes them in order (`request`). A driver that agrees to `VIRTIO_BLK_F_FLUSH` gets a writeback
//! cache, the host's page cache, and flushes it with `fdatasync`; for any other driver each write is
//! on the medium before it is answered.

mod error;
mod identity;
mod image;
mod overlay;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::Queue;

use super::chain::Chain;
use super::worker::{self, Handler, HandlerError, Outcome, Poll, Progress, Worker};
use super::{Activation, Interrupt, VirtioDevice, read_config_space};
use crate::memory::GuestRam;

use request::{Disk, RequestError};

pub use error::DiskError;
pub use identity::ImageIdentity;
pub use image::{Access, Image, SECTOR_SIZE};
pub use overlay::{OverlayError, OverlayPlace, hold_temporary};

const QUEUE_SIZE: u16 = 256;
/// A request's data has at most as many descriptors as the queue has beside header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Physical blocks of 4 KiB: what the host's page cache works in. The guest then aligns to them.
const PHYSICAL_BLOCK_EXP: u8 = 3;
/// After this time other events, the order to stop among them, get their turn.
const TURN: Duration = Duration::from_millis(10);
/// Length of `struct virtio_blk_config` up to the write-zeroes fields.
const CONFIG_LEN: usize = 60;

/// The string by which a guest tells its disks apart (`/dev/disk/by-id/virtio-…`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Serial([u8; VIRTIO_BLK_ID_BYTES as usize]);

impl Serial {
    /// A serial of at most 20 printable ASCII characters other than space. It may be empty.
    ///
    /// # Errors
    /// [`DiskError::Serial`] for anything else.
    pub fn new(serial: &str) -> Result<Self, DiskError> {
        let mut bytes = [0; VIRTIO_BLK_ID_BYTES as usize];
        let fits = serial.len() <= bytes.len();
        if !fits || !serial.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(DiskError::Serial {
                serial: serial.to_owned(),
            });
        }
        bytes[..serial.len()].copy_from_slice(serial.as_bytes());
        Ok(Serial(bytes))
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A disk of the guest.
pub struct Block {
    name: String,
    image: Arc<Image>,
    serial: Serial,
    worker: Option<Worker<Requests>>,
}

impl Block {
    /// A disk called `name` in threads and messages, with the content of `image`, which is to be claimed before the disk is
    /// activated.
    pub fn new(name: impl Into<String>, image: impl Into<Arc<Image>>, serial: Serial) -> Self {
        Block {
            name: name.into(),
            image: image.into(),
            serial,
            worker: None,
        }
    }

    fn config_space(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &self.image.sectors().to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR_SIZE as u32).to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXP]);
        put(34, &1_u16.to_le_bytes());
        if self.image.access() == Access::ReadWrite {
            put(36, &request::DISCARD.sectors.to_le_bytes());
            put(40, &request::DISCARD.segments.to_le_bytes());
            put(44, &(1_u32 << PHYSICAL_BLOCK_EXP).to_le_bytes());
            put(48, &request::WRITE_ZEROES.sectors.to_le_bytes());
            put(52, &request::WRITE_ZEROES.segments.to_le_bytes());
            put(56, &[1]);
        }
        config
    }
}

impl Drop for Block {
    /// What the guest wrote and did not flush outlives the host's power as well.
    fn drop(&mut self) {
        drop(self.worker.take());
        if self.image.is_claimed()
            && self.image.access() == Access::ReadWrite
            && let Err(why) = self.image.flush()
        {
            tracing::error!("disk \"{}\": its last writes may be lost: {why}", self.name);
        }
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY;
        match self.image.access() {
            Access::ReadOnly => always | 1 << VIRTIO_BLK_F_RO,
            Access::ReadWrite => {
                always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            }
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config_space(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let write_through = !activation.has_feature(VIRTIO_BLK_F_FLUSH);
        let Activation {
            memory,
            queues,
            kicks,
            interrupt,
            ..
        } = activation;
        let handler = Requests {
            name: self.name.clone(),
            image: Arc::clone(&self.image),
            serial: self.serial.clone(),
            write_through,
            memory,
            queues,
            interrupt: Arc::clone(&interrupt),
            failed: false,
        };
        let worker = Worker::start(&self.name, handler, kicks, interrupt)
            .map_err(|not_started| not_started.error)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn deactivate(&mut self) -> Option<Vec<Queue>> {
        self.worker.take().map(|worker| worker.stop().queues)
    }
}

/// The part of an active disk that lives on its thread.
struct Requests {
    name: String,
    image: Arc<Image>,
    serial: Serial,
    write_through: bool,
    memory: Arc<GuestRam>,
    queues: Vec<Queue>,
    interrupt: Arc<dyn Interrupt>,
    /// A request failed before: later ones are no news.
    failed: bool,
}

impl Handler for Requests {
    fn queue_kicked(&mut self, index: usize, _poll: &Poll) -> Result<Progress, HandlerError> {
        let disk = Disk {
            image: &self.image,
            serial: &self.serial,
            write_through: self.write_through,
        };
        let memory = &*self.memory;
        let start = Instant::now();
        let mut turn_over = false;
        let Some(queue) = self.queues.get_mut(index) else {
            return Ok(Progress::Done);
        };
        let progress = worker::serve(queue, memory, &*self.interrupt, |descriptors| {
            turn_over = start.elapsed() >= TURN;
            if turn_over {
                return Ok(Outcome::Later);
            }
            let head = descriptors.head_index();
            let chain =
                Chain::parse(memory, descriptors).map_err(|why| HandlerError::chain(head, &why))?;
            let (used, result) = request::serve(chain, &disk);
            if let Err(why) = result {
                report(&self.name, &mut self.failed, &why);
            }
            Ok(Outcome::Used(used))
        })?;
        Ok(if turn_over { Progress::More } else { progress })
    }
}

/// The first failure is worth the operator's attention; a guest can cause as many as it likes.
fn report(name: &str, failed: &mut bool, why: &RequestError) {
    if std::mem::replace(failed, true) {
        tracing::debug!("a request to disk \"{name}\" fails: {why}");
    } else {
        tracing::warn!("a request to disk \"{name}\" fails: {why}; further ones are not reported");
    }
}
