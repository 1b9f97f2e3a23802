//! Tells the network where a guest is that has just moved.
//!
//! Switches send frames for an address to where they last saw one from it, which for a guest that migrated is the wrong
//! host. So its new host sends some in its name: RARP frames ("who am I?", which nobody answers), several, since some
//! may be lost before the link is ready. A guest whose driver has agreed to `VIRTIO_NET_F_GUEST_ANNOUNCE` is asked to send
//! its own announcement each time: it alone knows its IP addresses (gratuitous ARP, unsolicited neighbour advertisements).

use std::io::{self, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use virtio_bindings::virtio_net::VIRTIO_NET_S_ANNOUNCE;

use super::{HEADER_LEN, Link, MacAddr};
use crate::virtio::Interrupt;

/// Between one announcement and the next, the first of which is made at once. Those of QEMU.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(350),
];
/// The shortest Ethernet frame, without its checksum.
const SHORTEST_FRAME: usize = 60;

/// The announcement that the driver can make.
#[derive(Default)]
pub(super) struct OwnAnnouncement(Mutex<Own>);

#[derive(Default)]
struct Own {
    /// It was asked for, and the driver has not said that it was made.
    wanted: bool,
    /// While the device is active with a driver that can make it.
    interrupt: Option<Arc<dyn Interrupt>>,
}

impl OwnAnnouncement {
    /// Says by which interrupt the driver can be asked, if it can.
    pub fn set_interrupt(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        self.lock().interrupt = interrupt;
    }

    /// The bit of the configuration's status that asks for it.
    pub fn status(&self) -> u16 {
        if self.lock().wanted {
            VIRTIO_NET_S_ANNOUNCE as u16
        } else {
            0
        }
    }

    /// The driver has made it, or forgotten all.
    pub fn settle(&self) {
        self.lock().wanted = false;
    }

    fn ask(&self) {
        let interrupt = {
            let mut own = self.lock();
            own.wanted = own.interrupt.is_some();
            own.interrupt.clone()
        };
        if let Some(interrupt) = interrupt {
            interrupt.config_changed();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Own> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Announces the guest behind one interface.
pub struct Announcer {
    pub(super) name: String,
    pub(super) link: Arc<dyn Link>,
    pub(super) mac: MacAddr,
    pub(super) own: Arc<OwnAnnouncement>,
}

impl Announcer {
    fn announce(&self) -> io::Result<()> {
        self.own.ask();
        match self.link.frames().write(&rarp_request(self.mac)) {
            // A link that is full has frames of the guest's, which say the same.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            written => written.map(drop),
        }
    }

    fn announce_or_say_why_not(&self) {
        if let Err(why) = self.announce() {
            tracing::warn!(
                "network device \"{}\": the network is not told where the guest is: {why}",
                self.name
            );
        }
    }
}

/// A RARP request of the guest for its own IP address (RFC 903), as a frame to all behind an empty virtio-net header.
fn rarp_request(mac: MacAddr) -> Vec<u8> {
    const TO_ALL: [u8; 6] = [0xff; 6];
    const RARP: [u8; 2] = [0x80, 0x35];
    // Ethernet and IPv4 with their lengths, and «request reverse».
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];
    const NO_IP: [u8; 4] = [0; 4];
    let mac = mac.bytes();
    let mut frame = vec![0; HEADER_LEN];
    for part in [
        &TO_ALL[..],
        &mac,
        &RARP,
        &REQUEST,
        &mac,
        &NO_IP,
        &mac,
        &NO_IP,
    ] {
        frame.extend_from_slice(part);
    }
    frame.resize(HEADER_LEN + SHORTEST_FRAME, 0);
    frame
}

/// A guest that is being announced, on a thread of its own. Dropping it ends that.
pub struct Announcement {
    /// `None` only while it is dropped.
    going: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Announcement {
    /// Announces a guest on all its interfaces, several times.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn start(announcers: Arc<[Announcer]>) -> io::Result<Self> {
        let (going, ended) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("tv-announce".into())
            .spawn(move || announce(&announcers, &ended))?;
        Ok(Self {
            going: Some(going),
            thread: Some(thread),
        })
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        drop(self.going.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn announce(announcers: &[Announcer], ended: &mpsc::Receiver<()>) {
    announcers
        .iter()
        .for_each(Announcer::announce_or_say_why_not);
    for pause in PAUSES {
        if ended.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        announcers
            .iter()
            .for_each(Announcer::announce_or_say_why_not);
    }
}
