use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;
use vm_memory::{Bytes, GuestAddress};

use super::super::mmio::MmioTransport;
use super::super::testing::{
    BUFFERS, CountedInterrupt, DriverQueue, FakeLine, RAM_START, WRITE, activation, bring_up,
    notify, ram, set_register, wait_until,
};
use super::*;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const MULTIPORT: u64 = 1 << F_MULTIPORT;
/// Room for one control message, and for one piece of data of a test.
const SLOT: u64 = 0x1000;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// A guest with a console device, seen from its driver.
struct Guest {
    transport: MmioTransport,
    memory: Arc<GuestRam>,
    queues: Vec<DriverQueue>,
    /// Control messages taken so far.
    heard: u16,
}

impl Guest {
    fn with_memory(ports: Vec<Port>, memory: Arc<GuestRam>) -> Self {
        let count = queue_of(ports.len() - 1, Side::Transmit).max(CONTROL_TRANSMIT) + 1;
        let device = Console::new("console0", ports).unwrap();
        let line = Arc::new(FakeLine::default());
        let transport = MmioTransport::new(Box::new(device), memory.clone(), line).unwrap();
        let queues = (0..count)
            .map(|index| DriverQueue::new(&memory, index, QUEUE_SIZE))
            .collect();
        Guest {
            transport,
            memory,
            queues,
            heard: 0,
        }
    }

    /// A guest whose driver gave the device buffers for control messages and said that it is ready.
    fn ready(ports: Vec<Port>) -> Self {
        let mut guest = Guest::with_memory(ports, ram());
        bring_up(&guest.transport, VERSION_1 | MULTIPORT, &guest.queues);
        guest.give_control_buffers(QUEUE_SIZE);
        guest.say(0, DEVICE_READY, 1);
        guest
    }

    /// A guest with one port, of which it knows all and which a program has open.
    fn with_open_port(path: &Path) -> Self {
        let mut guest = Guest::ready(vec![Port::listen("org.example.port", path).unwrap()]);
        guest.hear();
        guest.say(0, PORT_READY, 1);
        guest.hear();
        guest.say(0, PORT_OPEN, 1);
        guest
    }

    fn control_slot(index: u16) -> u64 {
        BUFFERS + SLOT * u64::from(index % QUEUE_SIZE)
    }

    /// Gives the device room for its first `count` control messages, or for as many more.
    fn give_control_buffers(&mut self, count: u16) {
        let given = self.queues[CONTROL_RECEIVE].available();
        for index in given..given + count {
            self.queues[CONTROL_RECEIVE].add(&[(Self::control_slot(index), SLOT as u32, WRITE)]);
        }
        notify(&self.transport, CONTROL_RECEIVE);
    }

    /// Sends a control message.
    fn say(&mut self, id: u32, event: u16, value: u16) {
        let address = BUFFERS + SLOT * 40;
        let message = Message { id, event, value }.to_bytes();
        self.transmit(CONTROL_TRANSMIT, address, &message);
        let queue = &self.queues[CONTROL_TRANSMIT];
        let all = queue.available();
        wait_until("the device took the message", || queue.used_index() == all);
    }

    /// The next control message and what follows it.
    fn hear(&mut self) -> (u32, u16, u16, Vec<u8>) {
        let index = self.heard;
        self.heard += 1;
        let queue = &self.queues[CONTROL_RECEIVE];
        wait_until("a control message came", || queue.used_index() > index);
        let length = queue.used(index).1 as usize;
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(Self::control_slot(index)))
            .unwrap();
        let rest = bytes.split_off(Message::LENGTH);
        let message = Message::from_bytes(bytes.try_into().unwrap());
        (message.id, message.event, message.value, rest)
    }

    fn transmit(&mut self, queue: usize, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
        self.queues[queue].add(&[(address, bytes.len() as u32, 0)]);
        notify(&self.transport, queue);
    }

    /// Gives port 0 a buffer to receive into.
    fn give_buffer(&mut self, address: u64, length: u32) {
        self.queues[0].add(&[(address, length, WRITE)]);
        notify(&self.transport, 0);
    }

    /// What the device put into the buffer at `address`, which was the one given as `index`.
    fn received(&self, index: u16, address: u64) -> Vec<u8> {
        wait_until("data came", || self.queues[0].used_index() > index);
        let mut bytes = vec![0; self.queues[0].used(index).1 as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

/// A folder for the sockets of a test.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Connects, with reads that end after a while.
fn connect(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    client
}

fn read_exactly(client: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    client.read_exact(&mut bytes).unwrap();
    bytes
}

/// Bytes that differ from their neighbours and from page to page.
fn pattern(count: usize) -> Vec<u8> {
    (0..count)
        .map(|index| (index ^ index >> 8 ^ index >> 16) as u8)
        .collect()
}

#[test]
fn the_guest_learns_of_ports_their_names_and_their_clients() {
    let folder = folder();
    let paths = ["one", "two"].map(|name| folder.path().join(name));
    let ports = vec![
        Port::listen("one", &paths[0]).unwrap(),
        Port::listen("two", &paths[1]).unwrap(),
    ];
    let mut guest = Guest::ready(ports);

    assert_eq!(guest.hear(), (0, DEVICE_ADD, 0, vec![]));
    assert_eq!(guest.hear(), (1, DEVICE_ADD, 0, vec![]));
    guest.say(1, PORT_READY, 1);
    assert_eq!(guest.hear(), (1, PORT_NAME, 1, b"two".to_vec()));
    guest.say(0, PORT_READY, 1);
    assert_eq!(guest.hear(), (0, PORT_NAME, 1, b"one".to_vec()));
    let client = connect(&paths[1]);
    assert_eq!(guest.hear(), (1, PORT_OPEN, 1, vec![]));
    drop(client);
    assert_eq!(guest.hear(), (1, PORT_OPEN, 0, vec![]));
}

#[test]
fn the_number_of_ports_is_in_configuration_space() {
    let folder = folder();
    let ports = ["a", "b", "c"].map(|name| Port::listen(name, folder.path().join(name)).unwrap());
    let guest = Guest::with_memory(ports.into(), ram());
    let mut ports = [0; 4];

    guest.transport.read(0x104, &mut ports);

    assert_eq!(ports, [3, 0, 0, 0]);
    assert_eq!(guest.queues.len(), 8);
}

#[test]
fn bytes_go_both_ways() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);
    let mut client = connect(&path);

    client.write_all(b"from the host").unwrap();
    guest.give_buffer(BUFFERS + SLOT * 50, 100);
    guest.transmit(1, BUFFERS + SLOT * 60, b"from the guest");

    assert_eq!(guest.received(0, BUFFERS + SLOT * 50), b"from the host");
    assert_eq!(read_exactly(&mut client, 14), b"from the guest");
}

#[test]
fn bytes_wait_for_the_guest_to_open_the_port_and_to_give_buffers() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);
    guest.say(0, PORT_OPEN, 0);
    guest.give_buffer(BUFFERS + SLOT * 50, 4);
    let mut client = connect(&path);
    client.write_all(b"abcdefgh").unwrap();
    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]));
    let used_while_closed = guest.queues[0].used_index();

    guest.say(0, PORT_OPEN, 1);
    let first = guest.received(0, BUFFERS + SLOT * 50);
    guest.give_buffer(BUFFERS + SLOT * 51, 100);
    let second = guest.received(1, BUFFERS + SLOT * 51);

    assert_eq!(used_while_closed, 0);
    assert_eq!((first, second), (b"abcd".to_vec(), b"efgh".to_vec()));
}

#[test]
fn what_a_client_sent_before_it_left_still_arrives() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);
    let mut client = connect(&path);
    client.write_all(b"last words").unwrap();
    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]));
    drop(client);

    guest.give_buffer(BUFFERS + SLOT * 50, 100);

    assert_eq!(guest.received(0, BUFFERS + SLOT * 50), b"last words");
    guest.give_buffer(BUFFERS + SLOT * 51, 100);
    assert_eq!(guest.hear(), (0, PORT_OPEN, 0, vec![]));
}

#[test]
fn a_client_waits_until_the_guest_has_read_the_words_of_the_last_one() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);
    let mut first = connect(&path);
    first.write_all(b"first").unwrap();
    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]));
    drop(first);
    let mut second = connect(&path);
    second.write_all(b"second").unwrap();
    second.set_nonblocking(true).unwrap();
    let answer = second.read(&mut [0; 1]).unwrap_err().kind();

    guest.give_buffer(BUFFERS + SLOT * 50, 100);
    guest.give_buffer(BUFFERS + SLOT * 51, 100);

    assert_eq!(answer, ErrorKind::WouldBlock, "it is not turned away");
    assert_eq!(guest.received(0, BUFFERS + SLOT * 50), b"first");
    assert_eq!(guest.received(1, BUFFERS + SLOT * 51), b"second");
    assert_eq!(guest.hear(), (0, PORT_OPEN, 0, vec![]));
    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]));
}

#[test]
fn a_client_that_sends_no_more_still_gets_the_answer() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);
    let mut client = connect(&path);
    client.write_all(b"question").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    guest.give_buffer(BUFFERS + SLOT * 50, 100);
    guest.give_buffer(BUFFERS + SLOT * 51, 100);
    guest.received(0, BUFFERS + SLOT * 50);

    guest.transmit(1, BUFFERS + SLOT * 60, b"answer");

    assert_eq!(read_exactly(&mut client, 6), b"answer");
}

#[test]
fn a_second_client_is_turned_away_and_the_first_goes_on() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);
    let mut first = connect(&path);
    guest.hear();

    let mut second = connect(&path);
    let end = second.read(&mut [0; 1]).unwrap();
    guest.transmit(1, BUFFERS + SLOT * 60, b"still here");

    assert_eq!(end, 0);
    assert_eq!(read_exactly(&mut first, 10), b"still here");
}

#[test]
fn the_next_client_is_taken_after_the_guest_knows_that_the_last_one_left() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);
    drop(connect(&path));
    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]));
    assert_eq!(guest.hear(), (0, PORT_OPEN, 0, vec![]));

    let mut next = connect(&path);
    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]));
    guest.transmit(1, BUFFERS + SLOT * 60, b"welcome");

    assert_eq!(read_exactly(&mut next, 7), b"welcome");
}

#[test]
fn a_change_of_clients_is_told_to_a_guest_that_had_no_buffers_for_it() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_memory(vec![Port::listen("port", &path).unwrap()], ram());
    bring_up(&guest.transport, VERSION_1 | MULTIPORT, &guest.queues);
    guest.give_control_buffers(3);
    guest.say(0, DEVICE_READY, 1);
    guest.say(0, PORT_READY, 1);
    guest.say(0, PORT_OPEN, 1);
    let first = connect(&path);
    let told = [(); 3].map(|()| guest.hear().1);
    drop(first);
    let mut second = connect(&path);
    second.write_all(b"second").unwrap();
    // The device has seen all that by the time it has used this.
    guest.transmit(1, BUFFERS + SLOT * 60, b"for the first");
    wait_until("the chain is used", || guest.queues[1].used_index() == 1);

    guest.give_control_buffers(2);
    guest.give_buffer(BUFFERS + SLOT * 50, 100);

    assert_eq!(told, [DEVICE_ADD, PORT_NAME, PORT_OPEN]);
    assert_eq!(guest.hear(), (0, PORT_OPEN, 0, vec![]));
    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]));
    assert_eq!(guest.received(0, BUFFERS + SLOT * 50), b"second");
}

#[test]
fn a_long_chain_is_sent_in_turns() {
    let folder = folder();
    let path = folder.path().join("port");
    let memory = ram();
    let mut queue = DriverQueue::new(&memory, 1, QUEUE_SIZE);
    queue.add(&[(RAM_START, 3 << 20, 0); 8]);
    let mut device_queue = queue.device_queue();
    let port = Port::listen("port", &path).unwrap();
    let mut channel = Channel::new(port.name, port.socket);
    let mut client = connect(&path);
    channel.start();
    channel.accept();
    let reader = std::thread::spawn(move || std::io::copy(&mut client, &mut std::io::sink()));
    let interrupt = CountedInterrupt::default();
    let mut turns = Vec::new();

    while queue.used_index() == 0 {
        let before = channel.state.sent;
        channel.client_ready(EventSet::OUT);
        channel
            .transmit(&mut device_queue, &memory, &interrupt)
            .unwrap();
        turns.push(channel.state.sent.saturating_sub(before) as usize);
    }
    drop(channel);

    assert_eq!(reader.join().unwrap().unwrap(), 24 << 20);
    assert!(
        turns.iter().all(|&turn| turn <= port::BYTES_A_TURN),
        "{turns:?}"
    );
}

#[test]
fn what_the_guest_writes_while_nobody_is_there_is_dropped() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);

    guest.transmit(1, BUFFERS + SLOT * 60, b"lost");
    wait_until("the chain is used", || guest.queues[1].used_index() == 1);
    let mut client = connect(&path);
    guest.hear();
    guest.transmit(1, BUFFERS + SLOT * 60, b"heard");

    assert_eq!(read_exactly(&mut client, 5), b"heard");
}

#[test]
fn a_client_that_does_not_read_holds_up_its_port_alone_and_loses_nothing() {
    let folder = folder();
    let paths = ["slow", "quick"].map(|name| folder.path().join(name));
    let ports = vec![
        Port::listen("slow", &paths[0]).unwrap(),
        Port::listen("quick", &paths[1]).unwrap(),
    ];
    let mut guest = Guest::ready(ports);
    let [mut slow, mut quick] = paths.each_ref().map(|path| connect(path));
    for port in [0, 1] {
        guest.say(port, PORT_READY, 1);
        guest.say(port, PORT_OPEN, 1);
    }
    let everything = pattern(1 << 20);
    let start = BUFFERS + SLOT * 64;
    guest
        .memory
        .write_slice(&everything, GuestAddress(start))
        .unwrap();
    let piece = everything.len() as u32 / 4;
    for number in 0..4 {
        guest.queues[1].add(&[(start + u64::from(number * piece), piece, 0)]);
    }
    notify(&guest.transport, 1);

    let quick_transmit = queue_of(1, Side::Transmit);
    guest.transmit(quick_transmit, BUFFERS + SLOT * 60, b"not held up");
    let quick_heard = read_exactly(&mut quick, 11);
    let slow_used = guest.queues[1].used_index();
    let slow_heard = read_exactly(&mut slow, everything.len());

    assert_eq!(quick_heard, b"not held up");
    assert!(slow_used < 4, "the socket cannot have taken 1 MiB");
    assert!(slow_heard == everything);
    wait_until("all chains are used", || guest.queues[1].used_index() == 4);
}

#[test]
fn a_guest_that_gives_few_buffers_gets_a_flood_whole() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);
    let everything = pattern(600_000);
    let mut client = connect(&path);
    let writer = std::thread::spawn({
        let everything = everything.clone();
        move || client.write_all(&everything)
    });
    let mut heard = Vec::new();

    for index in 0.. {
        guest.give_buffer(BUFFERS + SLOT * 50, 3 * SLOT as u32);
        heard.extend(guest.received(index, BUFFERS + SLOT * 50));
        if heard.len() >= everything.len() {
            break;
        }
    }

    writer.join().unwrap().unwrap();
    assert!(heard == everything);
}

#[test]
fn a_paused_port_goes_on_in_the_middle_of_a_chain() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);
    let mut client = connect(&path);
    guest.hear();
    let everything = pattern(1 << 20);
    let start = BUFFERS + SLOT * 64;
    guest.transmit(1, start, &everything);
    let mut heard = read_exactly(&mut client, 100_000);

    guest.transport.pause();
    let state = guest.transport.state().unwrap();
    guest.transport.resume().unwrap();
    heard.extend(read_exactly(&mut client, everything.len() - heard.len()));

    let DeviceState::Console(state) = state.device else {
        panic!("not a console's state")
    };
    assert!(
        (100_000..1 << 20).contains(&state.ports[0].sent),
        "{}",
        state.ports[0].sent
    );
    assert!(heard == everything);
    wait_until("the chain is used", || guest.queues[1].used_index() == 1);
}

#[test]
fn a_restored_guest_is_told_that_its_client_did_not_come_along() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut source = Guest::with_open_port(&path);
    let _client = connect(&path);
    assert_eq!(source.hear(), (0, PORT_OPEN, 1, vec![]));
    source.transport.pause();
    let state = source.transport.state().unwrap();

    let there = folder.path().join("there");
    let port = Port::listen("org.example.port", &there).unwrap();
    let mut destination = Guest::with_memory(vec![port], source.memory.clone());
    destination.queues = std::mem::take(&mut source.queues);
    destination.heard = source.heard;
    destination.transport.restore(&state).unwrap();
    destination.transport.resume().unwrap();

    assert_eq!(destination.hear(), (0, PORT_OPEN, 0, vec![]));
    let mut client = connect(&there);
    assert_eq!(destination.hear(), (0, PORT_OPEN, 1, vec![]));
    client.write_all(b"hello again").unwrap();
    destination.give_buffer(BUFFERS + SLOT * 50, 100);
    assert_eq!(destination.received(0, BUFFERS + SLOT * 50), b"hello again");
}

#[test]
fn a_state_with_other_ports_is_refused() {
    let folder = folder();
    let source = Guest::with_open_port(&folder.path().join("port"));
    source.transport.pause();
    let state = source.transport.state().unwrap();
    let other = Port::listen("other", folder.path().join("other")).unwrap();

    let result = Guest::with_memory(vec![other], ram())
        .transport
        .restore(&state);

    assert!(matches!(result, Err(Error::Unfit { .. })), "{result:?}");
}

#[test]
fn a_driver_starts_over_after_a_reset() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);
    let _client = connect(&path);
    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]));

    set_register(&guest.transport, VIRTIO_MMIO_STATUS, 0);
    let memory = guest.memory.clone();
    guest.queues = (0..4)
        .map(|index| DriverQueue::new(&memory, index, QUEUE_SIZE))
        .collect();
    memory
        .write_slice(&[0; 0x1_0000], GuestAddress(RAM_START))
        .unwrap();
    guest.heard = 0;
    bring_up(&guest.transport, VERSION_1 | MULTIPORT, &guest.queues);
    guest.give_control_buffers(QUEUE_SIZE);
    guest.say(0, DEVICE_READY, 1);

    assert_eq!(guest.hear(), (0, DEVICE_ADD, 0, vec![]));
    guest.say(0, PORT_READY, 1);
    assert_eq!(guest.hear().1, PORT_NAME);
    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]), "the client stayed");
}

#[test]
fn a_driver_without_multiport_has_the_first_port_open() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_memory(vec![Port::listen("port", &path).unwrap()], ram());
    bring_up(&guest.transport, VERSION_1, &guest.queues[..2]);
    let mut client = connect(&path);

    client.write_all(b"plain").unwrap();
    guest.give_buffer(BUFFERS + SLOT * 50, 100);

    assert_eq!(guest.received(0, BUFFERS + SLOT * 50), b"plain");
}

#[test]
fn nonsense_on_the_control_queue_is_ignored() {
    let folder = folder();
    let path = folder.path().join("port");
    let mut guest = Guest::with_open_port(&path);

    guest.say(7, PORT_OPEN, 1);
    guest.say(u32::MAX, PORT_READY, 1);
    guest.say(0, 0xffff, 0xffff);
    guest.transmit(CONTROL_TRANSMIT, BUFFERS + SLOT * 40, b"short");
    guest.queues[CONTROL_TRANSMIT].add(&[(BUFFERS, 100, WRITE)]);
    notify(&guest.transport, CONTROL_TRANSMIT);
    let _client = connect(&path);

    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]));
}

/// Starts a console over hostile queues and waits for it to give up.
fn expect_reset_request(spoil: impl FnOnce(&GuestRam, &mut [DriverQueue])) {
    let folder = folder();
    let port = Port::listen("port", folder.path().join("port")).unwrap();
    let _client = connect(&folder.path().join("port"));
    let memory = ram();
    let mut queues: Vec<_> = (0..4)
        .map(|index| DriverQueue::new(&memory, index, QUEUE_SIZE))
        .collect();
    spoil(&memory, &mut queues);
    let interrupt = Arc::new(CountedInterrupt::default());
    let (activation, _kicks) = activation(&memory, &queues, &interrupt, VERSION_1 | MULTIPORT);
    let mut console = Console::new("console0", vec![port]).unwrap();

    console.activate(activation).unwrap();

    wait_until("the device asks for a reset", || {
        interrupt.needs_reset.load(Ordering::SeqCst)
    });
    assert!(console.deactivate().is_some());
}

#[test]
fn broken_chains_stop_the_device() {
    expect_reset_request(|_, queues| {
        queues[1].add(&[(0, 100, 0)]);
    });
    expect_reset_request(|_, queues| {
        queues[CONTROL_TRANSMIT].add(&[(u64::MAX, 100, 0)]);
    });
    expect_reset_request(|_, queues| queues[CONTROL_TRANSMIT].make_available(999));
    expect_reset_request(|_, queues| queues[1].set_available_index(999));
}

#[test]
fn a_control_buffer_without_room_stops_the_device() {
    let ready = Message {
        id: 0,
        event: DEVICE_READY,
        value: 1,
    }
    .to_bytes();
    expect_reset_request(|memory, queues| {
        memory.write_slice(&ready, GuestAddress(BUFFERS)).unwrap();
        queues[CONTROL_TRANSMIT].add(&[(BUFFERS, 8, 0)]);
        queues[CONTROL_RECEIVE].add(&[(BUFFERS + SLOT, 4, WRITE)]);
    });
}

/// Whether the thread of this name sleeps. One that never waits is not asleep at any time, however
/// little of the processor it gets.
fn sleeps(thread: &str) -> bool {
    let of_task = |task: fs::DirEntry| {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        name.trim() == thread && status.contains("State:\tS")
    };
    let mut tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks.any(|task| of_task(task.unwrap()))
}

#[test]
fn a_port_that_can_only_wait_uses_no_processor_time() {
    let folder = folder();
    let names = ["unread", "gone", "ended", "stalled"];
    let paths = names.map(|name| folder.path().join(name));
    let ports: Vec<_> = (0..4)
        .map(|port| Port::listen(names[port], &paths[port]).unwrap())
        .collect();
    let memory = ram();
    let queues: Vec<_> = (0..10)
        .map(|index| DriverQueue::new(&memory, index, QUEUE_SIZE))
        .collect();
    let mut console = Console::new("waiting0", ports).unwrap();
    console
        .ports
        .iter_mut()
        .for_each(|port| port.state.guest_open = port.state.name != "unread");
    let interrupt = Arc::new(CountedInterrupt::default());
    let mut clients = paths.each_ref().map(|path| connect(path));
    let [unread, gone, ended, stalled] = &mut clients;
    unread.write_all(b"the guest is not listening").unwrap();
    gone.write_all(b"the guest gave no buffers").unwrap();
    gone.shutdown(std::net::Shutdown::Both).unwrap();
    ended.shutdown(std::net::Shutdown::Write).unwrap();
    stalled.write_all(b"the guest gave no buffers").unwrap();
    let mut queues = queues;
    queues[queue_of(3, Side::Transmit)].add(&[(RAM_START, 2 << 20, 0)]);
    queues[queue_of(2, Side::Receive)].add(&[(BUFFERS, 8, WRITE)]);
    let (activation, _kicks) = activation(&memory, &queues, &interrupt, VERSION_1 | MULTIPORT);
    console.activate(activation).unwrap();

    wait_until("the thread rests for a while", || {
        (0..40).all(|_| {
            std::thread::sleep(Duration::from_millis(5));
            sleeps("tv-waiting0")
        })
    });

    assert!(!interrupt.needs_reset.load(Ordering::SeqCst));
}

#[test]
fn the_socket_is_for_its_owner_and_goes_with_the_port() {
    let folder = folder();
    let path = folder.path().join("port");

    let port = Port::listen("port", &path).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    drop(port);

    assert_eq!(mode, 0o600);
    assert!(!path.exists());
}

#[test]
fn a_stale_socket_is_replaced() {
    let folder = folder();
    let path = folder.path().join("port");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());

    let _port = Port::listen("port", &path).unwrap();

    connect(&path);
}

#[test]
fn a_socket_that_somebody_listens_on_is_left_alone_and_not_disturbed() {
    let folder = folder();
    let path = folder.path().join("port");
    let owner = UnixListener::bind(&path).unwrap();
    owner.set_nonblocking(true).unwrap();

    let error = Port::listen("port", &path).err().unwrap();

    let Error::PortSocket { source, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(source.kind(), ErrorKind::AddrInUse);
    assert_eq!(owner.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(path.exists());
}

#[test]
fn a_file_in_the_place_of_the_socket_is_left_alone() {
    let folder = folder();
    let path = folder.path().join("port");
    fs::write(&path, "precious").unwrap();

    let error = Port::listen("port", &path).err().unwrap();

    assert!(error.to_string().contains("no socket"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_socket_that_took_our_place_is_not_removed() {
    let folder = folder();
    let path = folder.path().join("port");
    let port = Port::listen("port", &path).unwrap();
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();

    drop(port);

    assert!(path.exists());
}

#[test]
fn ports_that_no_guest_could_have_are_refused() {
    let folder = folder();
    let listen =
        |name: &str, number: usize| Port::listen(name, folder.path().join(number.to_string()));

    for name in ["", ".", "..", "a/b", "a b", "ä", &"x".repeat(65)] {
        assert!(matches!(listen(name, 0), Err(Error::Port { .. })), "{name}");
    }
    assert!(Console::new("console0", Vec::new()).is_err());
    let twins = vec![listen("twin", 1).unwrap(), listen("twin", 2).unwrap()];
    assert!(Console::new("console0", twins).is_err());
    let many = (0..9)
        .map(|number| listen(&format!("port{number}"), number).unwrap())
        .collect();
    assert!(Console::new("console0", many).is_err());
}
