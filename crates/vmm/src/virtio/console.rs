//! The console device (virtio 1.2, 5.3) as a channel between host and guest: named ports, no
//! terminal.
//!
//! Each [`Port`] is a Unix socket on the host and `/dev/virtio-ports/NAME` in the guest. One client
//! at a time is connected to it; the guest is told when one comes or leaves. Bytes are copied
//! straight between the client's socket and the guest's buffers: when one side does not read, the
//! other side's bytes stay where they are (in its socket, in its queue), so that nothing is lost
//! and nothing grows. What the guest writes while no client is there is dropped.
//!
//! `control` is the handshake by which the guest learns of the ports, `port` the flow of data and
//! `socket` the host's end.
//! A driver that does not know `VIRTIO_CONSOLE_F_MULTIPORT` gets the first port alone, always open.

mod control;
mod port;
mod socket;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::{DescriptorChain, Queue};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use self::control::Message;
use self::port::{Channel, Side};
use self::socket::PortSocket;
use super::chain::Chain;
use super::worker::{self, Handler, HandlerError, Outcome, Poll, Progress, Worker};
use super::{Activation, DeviceState, Error, Interrupt, VirtioDevice, read_config_space};
use crate::memory::GuestRam;

pub use self::control::PortState;

/// The most ports of one device.
pub const MAX_PORTS: usize = 8;
/// The longest name of a port, in bytes.
pub const MAX_PORT_NAME: usize = 64;

/// `VIRTIO_CONSOLE_F_MULTIPORT` (virtio 1.2, 5.3.3).
const F_MULTIPORT: u32 = 1;
/// Entries in each queue. A driver fills a receive queue with a page an entry.
const QUEUE_SIZE: u16 = 32;
/// Queue indices (virtio 1.2, 5.3.2): those of port 0, of control, then of port 1 and so on.
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;

/// A named port that listens on a Unix socket, which is removed when the port is dropped.
pub struct Port {
    name: String,
    socket: PortSocket,
}

impl Port {
    /// A port that the guest knows by `name` (1 to [`MAX_PORT_NAME`] letters, digits, `.`, `_` or
    /// `-`, not beginning with a dot) and that listens at `path`. Only the user may connect to it.
    /// A socket left there that nobody listens on is replaced.
    ///
    /// # Errors
    /// [`Error::Port`] for the name, [`Error::PortSocket`] when there is something else at `path`,
    /// or no socket can be made.
    pub fn listen(name: &str, path: impl Into<PathBuf>) -> Result<Self, Error> {
        let refused = |why: &str| Error::Port {
            port: name.to_owned(),
            why: why.to_owned(),
        };
        let letters = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if name.is_empty() || name.len() > MAX_PORT_NAME {
            return Err(refused("its name must have 1 to 64 characters"));
        }
        if name.starts_with('.') || !name.bytes().all(letters) {
            return Err(refused(
                "its name may hold letters, digits, '.', '_' and '-', and begins with no dot",
            ));
        }
        let path = path.into();
        let socket = PortSocket::listen(path.clone()).map_err(|source| Error::PortSocket {
            port: name.to_owned(),
            path,
            source,
        })?;
        Ok(Port {
            name: name.to_owned(),
            socket,
        })
    }
}

/// A console device.
pub struct Console {
    name: String,
    queue_sizes: Vec<u16>,
    ports: Vec<Channel>,
    driver_ready: bool,
    worker: Option<Worker<ConsoleHandler>>,
}

/// What a console device remembers in a snapshot. Clients do not move with the guest: it is told
/// that they left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Whether the driver said `DEVICE_READY`.
    pub driver_ready: bool,
    /// Every port, in order.
    pub ports: Vec<PortState>,
}

impl Console {
    /// A console device of this name with `ports`, whose IDs are their places.
    ///
    /// # Errors
    /// [`Error::Port`] when there is none, one too many, or two of one name.
    pub fn new(name: impl Into<String>, ports: Vec<Port>) -> Result<Self, Error> {
        let name = name.into();
        let refused = |port: &str, why: &str| Error::Port {
            port: port.to_owned(),
            why: why.to_owned(),
        };
        if ports.is_empty() {
            return Err(refused(&name, "a console device needs at least one port"));
        }
        for (index, port) in ports.iter().enumerate() {
            if index == MAX_PORTS {
                return Err(refused(&port.name, "a console device has at most 8 ports"));
            }
            if ports[..index].iter().any(|other| other.name == port.name) {
                return Err(refused(&port.name, "another port has the same name"));
            }
        }
        let queues = queue_of(ports.len() - 1, Side::Transmit) + 1;
        Ok(Console {
            name,
            queue_sizes: vec![QUEUE_SIZE; queues.max(CONTROL_TRANSMIT + 1)],
            ports: ports
                .into_iter()
                .map(|port| Channel::new(port.name, port.socket))
                .collect(),
            driver_ready: false,
            worker: None,
        })
    }

    fn take_back(&mut self, handler: ConsoleHandler) -> Vec<Queue> {
        self.ports = handler.ports;
        self.driver_ready = handler.driver_ready;
        handler.queues
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        1 << F_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_console_config: cols, rows, max_nr_ports, emerg_wr. The queues tell the
        // ports, which live elsewhere while the device is active.
        let ports = (self.queue_sizes.len() - 2) / 2;
        let mut config = [0; 12];
        config[4..8].copy_from_slice(&(ports as u32).to_le_bytes());
        read_config_space(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let again = activation
            .kicks
            .iter()
            .map(EventFd::try_clone)
            .collect::<io::Result<_>>()?;
        let handler = ConsoleHandler {
            multiport: activation.has_feature(F_MULTIPORT),
            memory: activation.memory,
            queues: activation.queues,
            interrupt: activation.interrupt.clone(),
            again,
            ports: std::mem::take(&mut self.ports),
            driver_ready: self.driver_ready,
        };
        match Worker::start(&self.name, handler, activation.kicks, activation.interrupt) {
            Ok(worker) => self.worker = Some(worker),
            Err(not_started) => {
                self.take_back(not_started.handler);
                return Err(not_started.error);
            }
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Option<Vec<Queue>> {
        let handler = self.worker.take()?.stop();
        Some(self.take_back(handler))
    }

    fn reset(&mut self) {
        self.driver_ready = false;
        for port in &mut self.ports {
            port.forget_driver();
        }
    }

    fn state(&self) -> DeviceState {
        DeviceState::Console(ConsoleState {
            driver_ready: self.driver_ready,
            ports: self.ports.iter().map(|port| port.state.clone()).collect(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        let DeviceState::Console(state) = state else {
            return Err(Error::unfit(
                &self.name,
                "its device state is not that of a console",
            ));
        };
        let here = self.ports.iter().map(|port| &port.state.name);
        if !here.eq(state.ports.iter().map(|port| &port.name)) {
            return Err(Error::unfit(&self.name, "it was saved with other ports"));
        }
        self.driver_ready = state.driver_ready;
        for (port, state) in self.ports.iter_mut().zip(&state.ports) {
            port.state.clone_from(state);
        }
        Ok(())
    }
}

/// The queue of one side of a port.
fn queue_of(port: usize, side: Side) -> usize {
    let first = if port == 0 { 0 } else { 2 * port + 2 };
    match side {
        Side::Receive => first,
        Side::Transmit => first + 1,
    }
}

/// The part of an active console that lives on its thread.
struct ConsoleHandler {
    multiport: bool,
    memory: Arc<GuestRam>,
    queues: Vec<Queue>,
    interrupt: Arc<dyn Interrupt>,
    /// The queues' kicks, to call ourselves again.
    again: Vec<EventFd>,
    ports: Vec<Channel>,
    driver_ready: bool,
}

impl Handler for ConsoleHandler {
    fn start(&mut self, poll: &Poll) -> Result<(), HandlerError> {
        for port in &mut self.ports {
            port.start();
        }
        if !self.multiport {
            self.ports[0].state.guest_open = true;
        }
        self.settle(poll)
    }

    fn queue_kicked(&mut self, index: usize, poll: &Poll) -> Result<Progress, HandlerError> {
        let progress = match (index, self.multiport) {
            // The messages to the guest are sent below.
            (CONTROL_RECEIVE, true) => Progress::Done,
            (CONTROL_TRANSMIT, true) => self.hear_driver()?,
            _ => self.note_kick(index),
        };
        self.settle(poll)?;
        Ok(progress)
    }

    fn backend_ready(
        &mut self,
        token: u32,
        events: EventSet,
        poll: &Poll,
    ) -> Result<(), HandlerError> {
        let (place, end) = port::token_parts(token);
        if let Some(port) = self.ports.get_mut(place) {
            match end {
                port::End::Listener => port.accept(),
                port::End::Client => port.client_ready(events),
            }
        }
        self.settle(poll)
    }
}

impl ConsoleHandler {
    /// Notes that there is something to do for the port that queue `index` belongs to.
    fn note_kick(&mut self, index: usize) -> Progress {
        for (place, port) in self.ports.iter_mut().enumerate() {
            for side in [Side::Receive, Side::Transmit] {
                if queue_of(place, side) == index {
                    port.kicked(side);
                }
            }
        }
        Progress::Done
    }

    fn move_data(&mut self, place: usize, side: Side) -> Result<Progress, HandlerError> {
        let port = &mut self.ports[place];
        let queue = &mut self.queues[queue_of(place, side)];
        if !port.can_move(side) {
            return Ok(Progress::Done);
        }
        match side {
            Side::Receive => port.receive(queue, &self.memory, &*self.interrupt),
            Side::Transmit => port.transmit(queue, &self.memory, &*self.interrupt),
        }
    }

    /// Takes the driver's control messages.
    fn hear_driver(&mut self) -> Result<Progress, HandlerError> {
        let (memory, ports, driver_ready) =
            (&*self.memory, &mut self.ports, &mut self.driver_ready);
        worker::serve(
            &mut self.queues[CONTROL_TRANSMIT],
            memory,
            &*self.interrupt,
            |chain| {
                let head = chain.head_index();
                let chain =
                    Chain::parse(memory, chain).map_err(|why| HandlerError::chain(head, &why))?;
                let mut bytes = [0; Message::LENGTH];
                if chain.readable.copy_to(&mut bytes) == bytes.len() {
                    control::hear(Message::from_bytes(bytes), driver_ready, ports);
                }
                Ok(Outcome::Used(0))
            },
        )
    }

    /// Tells the driver what it does not know yet, as far as it gave buffers for that.
    fn tell_driver(&mut self) -> Result<Progress, HandlerError> {
        if !self.multiport || !self.driver_ready {
            return Ok(Progress::Done);
        }
        let (memory, ports) = (&*self.memory, &mut self.ports);
        worker::serve(
            &mut self.queues[CONTROL_RECEIVE],
            memory,
            &*self.interrupt,
            |chain| tell(memory, chain, ports),
        )
    }

    /// After every event: sends what is to be said, moves what can be moved, and watches what must
    /// be waited for.
    fn settle(&mut self, poll: &Poll) -> Result<(), HandlerError> {
        if self.tell_driver()? == Progress::More {
            self.call_again(CONTROL_RECEIVE);
        }
        for place in 0..self.ports.len() {
            for side in [Side::Receive, Side::Transmit] {
                if self.move_data(place, side)? == Progress::More {
                    self.call_again(queue_of(place, side));
                }
            }
            self.ports[place].settle_client();
        }
        // A client may have left just now.
        if self.tell_driver()? == Progress::More {
            self.call_again(CONTROL_RECEIVE);
        }
        for (place, port) in self.ports.iter_mut().enumerate() {
            port.watch(place, poll)?;
        }
        Ok(())
    }

    fn call_again(&self, queue: usize) {
        // An eventfd at its limit is kicked already.
        let _ = self.again[queue].write(1);
    }
}

/// Puts the next message to the driver into `chain`, if there is one.
fn tell<'m>(
    memory: &'m GuestRam,
    chain: DescriptorChain<&'m GuestRam>,
    ports: &mut [Channel],
) -> Result<Outcome, HandlerError> {
    let next = ports.iter_mut().enumerate().find_map(|(id, port)| {
        let message = port.state.next_message(id, port.has_client())?;
        Some((port, message))
    });
    let Some((port, message)) = next else {
        return Ok(Outcome::Later);
    };
    let head = chain.head_index();
    let room = Chain::parse(memory, chain)
        .map_err(|why| HandlerError::chain(head, &why))?
        .writable;
    let bytes = port.state.bytes_of(message);
    if room.copy_from(&bytes) < bytes.len() {
        let why = "it has no room for a control message".to_owned();
        return Err(HandlerError::Chain { head, why });
    }
    port.state.told(message);
    // At most a header and a name.
    Ok(Outcome::Used(bytes.len() as u32))
}
