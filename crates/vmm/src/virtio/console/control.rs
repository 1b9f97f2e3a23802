//! The control queues of a console device (virtio 1.2, 5.3.6.2).
//!
//! No list of messages to send is kept. A [`PortState`] holds what the driver was told of a port;
//! what it must be told next follows from that and from how things are. A client that comes and
//! leaves while the driver gives no buffers costs nothing.

use serde::{Deserialize, Serialize};

use super::port::Channel;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// `struct virtio_console_control`: a header that only [`PORT_NAME`] has more behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// The port's place.
    pub id: u32,
    pub event: u16,
    pub value: u16,
}

impl Message {
    /// Bytes of the header.
    pub const LENGTH: usize = 8;

    pub fn from_bytes(bytes: [u8; Self::LENGTH]) -> Self {
        let [a, b, c, d, event_low, event_high, value_low, value_high] = bytes;
        Message {
            id: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([event_low, event_high]),
            value: u16::from_le_bytes([value_low, value_high]),
        }
    }

    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = self.id.to_le_bytes().to_vec();
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes
    }
}

/// A port as its driver knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// The port's name.
    pub name: String,
    /// The driver was told that the port exists.
    pub added: bool,
    /// The driver can use it.
    pub ready: bool,
    /// The driver was told its name.
    pub named: bool,
    /// What the driver was told last: whether a client is connected.
    pub told_open: bool,
    /// A program in the guest has the port open.
    pub guest_open: bool,
    /// Bytes of the first chain in the transmit queue that the client has already got.
    pub sent: u32,
}

impl PortState {
    /// What to tell the driver next of port `id`, once it said `DEVICE_READY`.
    pub(super) fn next_message(&self, id: usize, client: bool) -> Option<Message> {
        // IDs are below MAX_PORTS.
        let message = |event, value| Message {
            id: id as u32,
            event,
            value,
        };
        if !self.added {
            Some(message(DEVICE_ADD, 0))
        } else if !self.ready {
            None
        } else if !self.named {
            Some(message(PORT_NAME, 1))
        } else if self.told_open != client {
            Some(message(PORT_OPEN, client.into()))
        } else {
            None
        }
    }

    /// The message as it is sent.
    pub(super) fn bytes_of(&self, message: Message) -> Vec<u8> {
        let mut bytes = message.to_bytes();
        if message.event == PORT_NAME {
            // No NUL at the end (virtio 1.2, 5.3.6.2).
            bytes.extend(self.name.as_bytes());
        }
        bytes
    }

    /// Notes that the driver got `message`.
    pub(super) fn told(&mut self, message: Message) {
        match message.event {
            DEVICE_ADD => self.added = true,
            PORT_NAME => self.named = true,
            _ => self.told_open = message.value != 0,
        }
    }

    /// Back to what a driver finds first.
    pub(super) fn forget_driver(&mut self) {
        let name = std::mem::take(&mut self.name);
        *self = PortState {
            name,
            ..PortState::default()
        };
    }
}

/// Takes a message of the driver. What it may not say is ignored.
pub(super) fn hear(message: Message, driver_ready: &mut bool, ports: &mut [Channel]) {
    let yes = message.value != 0;
    if message.event == DEVICE_READY {
        *driver_ready = yes;
        return;
    }
    let Some(port) = ports.get_mut(message.id as usize) else {
        return;
    };
    match message.event {
        PORT_READY => port.state.ready = yes,
        PORT_OPEN => port.state.guest_open = yes,
        _ => {}
    }
}
