//! The virtio network device over a tap (virtio 1.2, 5.1).
//!
//! [`Tap`] is the host's side, opened by name or passed in as a descriptor. [`Net`] is the device as
//! the transport sees it. While it is active a worker thread moves frames: out of the guest's
//! buffers straight into the tap, and from the tap through one buffer of its own into the guest
//! (`receive`), since how many of the guest's buffers a frame needs is known only once it was read.
//! A frame that finds no buffer waits, and the frames behind it wait in the tap.
//!
//! A third queue is for the driver's commands, of which there is one: that it has announced its guest (`announce`).

mod announce;
mod error;
mod mac;
mod receive;
mod tap;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_OK,
    VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::epoll::EventSet;

use super::chain::Chain;
use super::worker::{self, Handler, HandlerError, Outcome, Poll, Progress, Worker};
use super::{Activation, Interrupt, VirtioDevice, read_config_space};
use crate::memory::GuestRam;
use announce::OwnAnnouncement;
use receive::Placed;

pub use announce::{Announcement, Announcer};
pub use error::NetError;
pub use mac::MacAddr;
pub use tap::{Offloads, Tap, TapSource};

/// Length of the header before each frame (`struct virtio_net_hdr_v1`), in bytes.
pub const HEADER_LEN: usize = 12;

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Indexes of the queues.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
/// The longest that a driver may send: a header, and an Ethernet frame around 64 KiB.
const LONGEST_SENT: usize = HEADER_LEN + 18 + (64 << 10);
/// Room for a frame from the link, with some to spare: one that fills it was cut.
const FRAME_ROOM: usize = 68 << 10;
/// Frames received before other events get their turn.
const FRAMES_A_TURN: usize = 64;
/// The smallest MTU that virtio allows.
const MIN_MTU: u16 = 68;
/// Names the link to the worker's poll.
const LINK: u32 = 0;

/// Where frames go to and come from. In production a [`Tap`].
pub trait Link: Send + Sync + 'static {
    /// Each read and each write of this non-blocking file is one frame after a header of
    /// [`HEADER_LEN`] bytes.
    fn frames(&self) -> &File;
    /// Whether joined UDP segments can go either way.
    fn has_uso(&self) -> bool;
    /// Says what frames to the guest may leave undone.
    ///
    /// # Errors
    /// The kernel's.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

/// A network interface of the guest.
pub struct Net<L = Tap> {
    name: String,
    link: Arc<L>,
    mac: MacAddr,
    mtu: Option<u16>,
    announcement: Arc<OwnAnnouncement>,
    worker: Option<Worker<Frames<L>>>,
    /// A frame read from the link that had found no room when the worker stopped.
    waiting: Vec<u8>,
}

impl<L: Link> Net<L> {
    /// An interface called `name` in threads and messages, with address `mac`; `mtu` in bytes, if
    /// the guest is to be told one.
    ///
    /// # Errors
    /// [`NetError::Mtu`] for an MTU that virtio does not allow.
    pub fn new(
        name: impl Into<String>,
        link: L,
        mac: MacAddr,
        mtu: Option<u16>,
    ) -> Result<Self, NetError> {
        match mtu {
            Some(mtu) if mtu < MIN_MTU => Err(NetError::Mtu(mtu)),
            _ => Ok(Net {
                name: name.into(),
                link: Arc::new(link),
                mac,
                mtu,
                announcement: Arc::default(),
                worker: None,
                waiting: Vec::new(),
            }),
        }
    }

    /// Tells the network where the guest is.
    pub fn announcer(&self) -> Announcer {
        Announcer {
            name: self.name.clone(),
            link: self.link.clone(),
            mac: self.mac,
            own: self.announcement.clone(),
        }
    }
}

impl<L: Link> VirtioDevice for Net<L> {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let bits = |bits: &[u32]| bits.iter().fold(0, |features, bit| features | 1_u64 << bit);
        let mut features = bits(&[
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
        ]);
        if self.link.has_uso() {
            features |= bits(&[
                VIRTIO_NET_F_HOST_USO,
                VIRTIO_NET_F_GUEST_USO4,
                VIRTIO_NET_F_GUEST_USO6,
            ]);
        }
        if self.mtu.is_some() {
            features |= bits(&[VIRTIO_NET_F_MTU]);
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, CONTROL_QUEUE_SIZE]
    }

    /// The control queue came later.
    fn least_queues(&self) -> usize {
        CONTROL
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_net_config: address, status, pairs of queues, MTU.
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac.bytes());
        let status = VIRTIO_NET_S_LINK_UP as u16 | self.announcement.status();
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&1_u16.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        read_config_space(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.link
            .set_offloads(Offloads::from_features(activation.features))?;
        let merge = activation.has_feature(VIRTIO_NET_F_MRG_RXBUF);
        let announces = activation.has_feature(VIRTIO_NET_F_GUEST_ANNOUNCE);
        let Activation {
            memory,
            queues,
            kicks,
            interrupt,
            ..
        } = activation;
        let mut frame = std::mem::take(&mut self.waiting);
        let frame_len = frame.len();
        frame.resize(FRAME_ROOM, 0);
        let handler = Frames {
            name: self.name.clone(),
            link: Arc::clone(&self.link),
            memory,
            queues,
            interrupt: Arc::clone(&interrupt),
            announcement: Arc::clone(&self.announcement),
            merge,
            frame,
            frame_len,
            is_full: false,
            is_blocked: false,
            is_gone: false,
            watched: EventSet::empty(),
            failed: false,
        };
        let worker = Worker::start(&self.name, handler, kicks, Arc::clone(&interrupt))
            .map_err(|not_started| not_started.error)?;
        self.worker = Some(worker);
        self.announcement
            .set_interrupt(announces.then_some(interrupt));
        Ok(())
    }

    fn deactivate(&mut self) -> Option<Vec<Queue>> {
        self.announcement.set_interrupt(None);
        let mut handler = self.worker.take()?.stop();
        handler.frame.truncate(handler.frame_len);
        self.waiting = handler.frame;
        Some(handler.queues)
    }

    fn reset(&mut self) {
        self.announcement.settle();
        self.waiting.clear();
    }
}

/// The part of an active interface that lives on its thread.
struct Frames<L> {
    name: String,
    link: Arc<L>,
    memory: Arc<GuestRam>,
    queues: Vec<Queue>,
    interrupt: Arc<dyn Interrupt>,
    announcement: Arc<OwnAnnouncement>,
    /// A frame may fill several buffers.
    merge: bool,
    /// The frame on its way to the guest is the first `frame_len` bytes; none when that is zero.
    frame: Vec<u8>,
    frame_len: usize,
    /// The receive queue has no room for the frame.
    is_full: bool,
    /// The link takes no frame at present.
    is_blocked: bool,
    /// The link was taken away.
    is_gone: bool,
    /// What the link is watched for.
    watched: EventSet,
    /// A failure was reported before: later ones are no news.
    failed: bool,
}

impl<L: Link> Handler for Frames<L> {
    fn queue_kicked(&mut self, index: usize, poll: &Poll) -> Result<Progress, HandlerError> {
        let progress = match index {
            RECEIVE => self.receive()?,
            TRANSMIT => self.transmit()?,
            CONTROL => self.obey()?,
            _ => Progress::Done,
        };
        self.watch(poll)?;
        Ok(progress)
    }

    fn backend_ready(
        &mut self,
        _token: u32,
        events: EventSet,
        poll: &Poll,
    ) -> Result<(), HandlerError> {
        if events.contains(EventSet::OUT) && self.is_blocked {
            // With more to send, the link is watched on: it calls again at once.
            self.is_blocked |= self.transmit()? == Progress::More;
        }
        if events.contains(EventSet::IN) {
            self.receive()?;
        } else if events.intersects(EventSet::ERROR | EventSet::HANG_UP) {
            self.lose_link("it was hung up");
        }
        self.watch(poll)
    }
}

impl<L: Link> Frames<L> {
    /// Moves frames from the link to the guest until there is no frame, no room or no time.
    fn receive(&mut self) -> Result<Progress, HandlerError> {
        if !self.queues[RECEIVE].ready() {
            self.is_full = true;
            return Ok(Progress::Done);
        }
        self.queues[RECEIVE].disable_notification(&*self.memory)?;
        let before = self.queues[RECEIVE].next_used();
        let progress = self.receive_turn()?;
        if receive::wants_interrupt(&self.queues[RECEIVE], &self.memory, before)? {
            self.interrupt.used_buffers();
        }
        Ok(progress)
    }

    fn receive_turn(&mut self) -> Result<Progress, HandlerError> {
        for _ in 0..FRAMES_A_TURN {
            if self.frame_len == 0 && !self.read_frame() {
                self.is_full = false;
                return Ok(Progress::Done);
            }
            let frame = &mut self.frame[..self.frame_len];
            let queue = &mut self.queues[RECEIVE];
            match receive::place(queue, &self.memory, self.merge, frame)? {
                Placed::Whole => self.frame_len = 0,
                Placed::TooLong => {
                    let len = std::mem::take(&mut self.frame_len);
                    self.report(format_args!("a frame of {len} bytes fits no buffer"));
                }
                Placed::NoRoom => {
                    self.is_full = true;
                    return Ok(Progress::Done);
                }
            }
        }
        Ok(Progress::More)
    }

    /// Reads the next frame from the link; `false` when there is none.
    fn read_frame(&mut self) -> bool {
        while !self.is_gone {
            match self.link.frames().read(&mut self.frame) {
                Ok(0) => self.lose_link("its other end was closed"),
                // A frame with no more than a header, or cut at the buffer's end, is none.
                Ok(len) if (HEADER_LEN + 1..FRAME_ROOM).contains(&len) => {
                    self.frame_len = len;
                    return true;
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => self.lose_link(&error.to_string()),
            }
        }
        false
    }

    /// Moves frames from the guest to the link. What the link refuses is lost, as on any network.
    fn transmit(&mut self) -> Result<Progress, HandlerError> {
        let memory = &*self.memory;
        let link = &self.link;
        let mut is_blocked = false;
        let mut refused = None;
        let progress = worker::serve(
            &mut self.queues[TRANSMIT],
            memory,
            &*self.interrupt,
            |descriptors| {
                let head = descriptors.head_index();
                let chain = Chain::parse(memory, descriptors)
                    .map_err(|why| HandlerError::chain(head, &why))?;
                match send(&**link, &chain) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        is_blocked = true;
                        return Ok(Outcome::Later);
                    }
                    Err(error) => refused = Some(error),
                    Ok(()) => {}
                }
                Ok(Outcome::Used(0))
            },
        )?;
        self.is_blocked = is_blocked;
        if let Some(error) = refused {
            self.report(format_args!(
                "the tap does not take a frame: {error} (`ip link set TAP up` if it is down)"
            ));
        }
        Ok(progress)
    }

    /// Takes the driver's commands (virtio 1.2, 5.1.6.5): class, command, and room for the answer.
    fn obey(&mut self) -> Result<Progress, HandlerError> {
        const ANNOUNCED: [u8; 2] = [
            VIRTIO_NET_CTRL_ANNOUNCE as u8,
            VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8,
        ];
        let memory = &*self.memory;
        let announcement = &self.announcement;
        worker::serve(
            &mut self.queues[CONTROL],
            memory,
            &*self.interrupt,
            |descriptors| {
                let head = descriptors.head_index();
                let chain = Chain::parse(memory, descriptors)
                    .map_err(|why| HandlerError::chain(head, &why))?;
                let mut command = [u8::MAX; 2];
                chain.readable.copy_to(&mut command);
                let answer = if command == ANNOUNCED {
                    announcement.settle();
                    VIRTIO_NET_OK
                } else {
                    VIRTIO_NET_ERR
                };
                let written = chain.writable.copy_from(&[answer as u8]);
                Ok(Outcome::Used(written as u32))
            },
        )
    }

    fn lose_link(&mut self, why: &str) {
        self.is_gone = true;
        self.report(format_args!("the tap is gone: {why}"));
    }

    /// Watches the link for what can be done: a link that is ready for more would keep the thread
    /// awake for nothing.
    fn watch(&mut self, poll: &Poll) -> Result<(), HandlerError> {
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::IN, !self.is_full && !self.is_gone);
        wanted.set(EventSet::OUT, self.is_blocked && !self.is_gone);
        let link = self.link.frames();
        match (self.watched.is_empty(), wanted.is_empty()) {
            _ if self.watched == wanted => {}
            (true, _) => poll.watch(link, LINK, wanted)?,
            (false, true) => poll.forget(link)?,
            (false, false) => poll.change(link, LINK, wanted)?,
        }
        self.watched = wanted;
        Ok(())
    }

    /// The first failure is worth the operator's attention; a guest can cause as many as it likes.
    fn report(&mut self, what: impl std::fmt::Display) {
        let name = &self.name;
        if std::mem::replace(&mut self.failed, true) {
            tracing::debug!("network device \"{name}\": {what}");
        } else {
            tracing::warn!("network device \"{name}\": {what}; further failures are not reported");
        }
    }
}

/// Sends one frame from the guest's memory.
fn send(link: &impl Link, chain: &Chain<'_>) -> io::Result<()> {
    if !(HEADER_LEN + 1..=LONGEST_SENT).contains(&chain.readable.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    chain.readable.send(link.frames().as_fd()).map(|_sent| ())
}
