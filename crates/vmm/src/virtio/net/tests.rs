//! A driver's side of the interface: frames through real rings and a real thread, to and from a
//! socket pair in the tap's place, and through a real tap where there can be one.

use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::testing::{
    BUFFERS, CountedInterrupt, DriverQueue, FakeLine, RAM_SIZE, RAM_START, WRITE, activation,
    bring_up, ram, wait_until,
};

const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A link over one end of a socket pair, which keeps the borders of frames as a tap does.
struct SocketLink {
    file: File,
    has_uso: bool,
    offloads: Arc<Mutex<Option<Offloads>>>,
}

impl Link for SocketLink {
    fn frames(&self) -> &File {
        &self.file
    }
    fn has_uso(&self) -> bool {
        self.has_uso
    }
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        *self.offloads.lock().unwrap() = Some(offloads);
        Ok(())
    }
}

/// An interface, its driver, and the other end of its link.
struct Driver<L: Link = SocketLink> {
    memory: Arc<GuestRam>,
    queues: [DriverQueue; 2],
    interrupt: Arc<CountedInterrupt>,
    kicks: Vec<EventFd>,
    net: Net<L>,
}

fn mac() -> MacAddr {
    "02:00:00:12:34:56".parse().unwrap()
}

/// An interface on a socket pair, the other end, and what offloads it sets.
fn interface() -> (Net<SocketLink>, UnixDatagram, Arc<Mutex<Option<Offloads>>>) {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let offloads = Arc::default();
    let link = SocketLink {
        file: File::from(OwnedFd::from(near)),
        has_uso: true,
        offloads: Arc::clone(&offloads),
    };
    (
        Net::new("net0", link, mac(), Some(1400)).unwrap(),
        far,
        offloads,
    )
}

impl<L: Link> Driver<L> {
    /// A driver that has not started its device.
    fn idle(net: Net<L>) -> Self {
        let memory = ram();
        let queues = [0, 1].map(|index| DriverQueue::new(&memory, index, 256));
        Driver {
            memory,
            queues,
            interrupt: Arc::default(),
            kicks: Vec::new(),
            net,
        }
    }

    fn started(net: Net<L>, features: u64) -> Self {
        let mut driver = Driver::idle(net);
        driver.start(features, false);
        driver
    }

    fn start(&mut self, features: u64, event_idx: bool) {
        let (mut activation, kicks) =
            activation(&self.memory, &self.queues, &self.interrupt, features);
        for queue in &mut activation.queues {
            queue.set_event_idx(event_idx);
        }
        self.kicks = kicks;
        self.net.activate(activation).unwrap();
    }

    fn go_on(&mut self, features: u64, queues: Vec<Queue>) {
        let (mut activation, kicks) =
            activation(&self.memory, &self.queues, &self.interrupt, features);
        activation.queues = queues;
        self.kicks = kicks;
        self.net.activate(activation).unwrap();
    }

    fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
    }

    /// Whether the device has yet to see the last kick of a queue.
    fn is_kicked(&self, queue: usize) -> bool {
        is_readable(&self.kicks[queue])
    }

    /// Waits until the device holds all frames that were sent to it.
    fn wait_for_read(&self) {
        wait_until("the link is read", || !is_readable(self.net.link.frames()));
    }

    /// Offers `count` buffers of `len` bytes, the first as number `first`.
    fn offer(&mut self, first: u64, count: u64, len: u32) {
        for index in first..first + count {
            self.queues[RECEIVE].add(&[(BUFFERS + index * 0x1000, len, WRITE)]);
        }
        self.kick(RECEIVE);
    }

    fn wait_for_received(&self, count: u16) {
        wait_until("the frame is received", || {
            self.queues[RECEIVE].used_index() == count
        });
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Sends `frame` in pieces of the given lengths.
    fn send(&mut self, frame: &[u8], pieces: &[u32]) {
        let slot = u64::from(self.queues[TRANSMIT].used_index() % 8);
        let start = BUFFERS + 0x100000 + slot * 0x10000;
        self.memory.write_slice(frame, GuestAddress(start)).unwrap();
        let mut at = start;
        let buffers: Vec<_> = pieces
            .iter()
            .map(|&len| {
                at += u64::from(len);
                (at - u64::from(len), len, 0)
            })
            .collect();
        self.queues[TRANSMIT].add(&buffers);
        self.kick(TRANSMIT);
    }

    fn wait_for_sent(&self, count: u16) {
        wait_until("the frame is sent", || {
            self.queues[TRANSMIT].used_index() == count
        });
    }
}

fn is_readable(fd: &impl AsRawFd) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: the call reads and writes one pollfd.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

/// A frame of `len` bytes behind an empty header.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend((0..len).map(|index| (index as u8).wrapping_mul(3).wrapping_add(seed)));
    frame
}

fn receive_from(far: &UnixDatagram) -> Vec<u8> {
    let mut bytes = vec![0; FRAME_ROOM];
    let len = far.recv(&mut bytes).unwrap();
    bytes.truncate(len);
    bytes
}

fn num_buffers(header: &[u8]) -> u16 {
    u16::from_le_bytes([header[10], header[11]])
}

#[test]
fn an_address_reads_back_as_it_was_written() {
    let text = "02:ab:0c:12:34:ef";

    let mac: MacAddr = text.parse().unwrap();

    assert_eq!(mac.to_string(), text);
    assert_eq!(mac.bytes(), [0x02, 0xab, 0x0c, 0x12, 0x34, 0xef]);
}

#[test]
fn what_is_no_unicast_address_is_refused_with_an_example() {
    let texts = [
        "",
        "02:00:00:12:34",
        "02:00:00:12:34:56:78",
        "02-00-00-12-34-56",
        "2:0:0:12:34:56",
        "+2:00:00:12:34:56",
        "0g:00:00:12:34:56",
        "ff:ff:ff:ff:ff:ff",
        "01:00:5e:00:00:01",
        "00:00:00:00:00:00",
    ];

    for text in texts {
        let message = text.parse::<MacAddr>().unwrap_err().to_string();
        assert!(
            message.contains("write it as 02:00:00:12:34:56"),
            "{message}"
        );
    }
}

#[test]
fn random_addresses_are_unicast_local_and_differ() {
    let macs = [(); 8].map(|()| MacAddr::random());

    assert!(macs.iter().all(|mac| mac.bytes()[0] & 0x03 == 0x02));
    assert!(macs.windows(2).all(|pair| pair[0] != pair[1]));
}

#[test]
fn the_configuration_holds_address_link_and_mtu() {
    let (net, ..) = interface();
    let mut config = [0xff; 16];

    net.read_config(0, &mut config);

    let expected = [
        2, 0, 0, 0x12, 0x34, 0x56, 1, 0, 1, 0, 0x78, 0x05, 0, 0, 0, 0,
    ];
    assert_eq!(config, expected);
}

#[test]
fn an_mtu_below_68_is_refused() {
    let (near, _far) = UnixDatagram::pair().unwrap();
    let link = SocketLink {
        file: File::from(OwnedFd::from(near)),
        has_uso: false,
        offloads: Arc::default(),
    };

    let error = Net::new("net0", link, mac(), Some(67)).err().unwrap();

    assert!(error.to_string().contains("from 68"), "{error}");
}

#[test]
fn udp_segmentation_is_offered_only_where_the_link_has_it() {
    let (near, _far) = UnixDatagram::pair().unwrap();
    let link = SocketLink {
        file: File::from(OwnedFd::from(near)),
        has_uso: false,
        offloads: Arc::default(),
    };
    let without = Net::new("net0", link, mac(), None).unwrap();
    let (with, ..) = interface();

    let uso = 1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4;

    assert_eq!(without.features() & uso, 0);
    assert_eq!(with.features() & uso, uso);
}

#[test]
fn the_link_is_told_what_the_driver_takes() {
    let (net, _far, offloads) = interface();
    let features = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;

    let _driver = Driver::started(net, features);

    assert_eq!(
        *offloads.lock().unwrap(),
        Some(Offloads::CSUM | Offloads::TSO4)
    );
}

#[test]
fn nothing_is_left_undone_for_a_driver_that_checks_no_checksums() {
    let features = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_ECN;

    assert_eq!(Offloads::from_features(features), Offloads::empty());
}

#[test]
fn congestion_marks_without_tcp_segments_are_not_asked_for() {
    let features = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_ECN;

    assert_eq!(Offloads::from_features(features), Offloads::CSUM);
}

#[test]
fn a_frame_arrives_in_one_buffer_with_its_header() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, MERGE);
    driver.offer(0, 1, 2048);

    far.send(&frame(100, 1)).unwrap();
    driver.wait_for_received(1);

    let received = driver.bytes(BUFFERS, 112);
    assert_eq!(driver.queues[RECEIVE].used(0), (0, 112));
    assert_eq!(num_buffers(&received), 1);
    assert_eq!(received[HEADER_LEN..], frame(100, 1)[HEADER_LEN..]);
}

#[test]
fn a_long_frame_is_spread_over_several_buffers() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, MERGE);
    driver.offer(0, 4, 1000);

    far.send(&frame(2488, 2)).unwrap();
    driver.wait_for_received(3);

    let lens = [0, 1, 2].map(|index| driver.queues[RECEIVE].used(index));
    assert_eq!(lens, [(0, 1000), (1, 1000), (2, 500)]);
    let received: Vec<u8> = [(0, 1000), (1, 1000), (2, 500)]
        .iter()
        .flat_map(|&(index, len)| driver.bytes(BUFFERS + index * 0x1000, len))
        .collect();
    assert_eq!(num_buffers(&received), 3);
    assert_eq!(received[HEADER_LEN..], frame(2488, 2)[HEADER_LEN..]);
}

#[test]
fn a_header_may_lie_across_tiny_buffers() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, MERGE);
    driver.offer(0, 24, 5);

    far.send(&frame(100, 3)).unwrap();
    driver.wait_for_received(23);

    let pieces = [0, 1, 2].map(|index| driver.bytes(BUFFERS + index * 0x1000, 5));
    assert_eq!(num_buffers(&pieces.concat()), 23);
}

#[test]
fn the_driver_never_sees_a_part_of_a_spread_frame() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, MERGE);
    driver.offer(0, 240, 100);
    // The used index is watched from here while the frames come from another thread.
    let sender = thread::spawn(move || {
        (0..60).for_each(|_| {
            far.send(&frame(388, 4)).unwrap();
        });
        far
    });

    let mut seen = Vec::new();
    wait_until("all frames are received", || {
        seen.extend((0..2000).map(|_| driver.queues[RECEIVE].used_index()));
        seen.last() == Some(&240)
    });

    drop(sender.join().unwrap());
    assert!(seen.iter().all(|index| index % 4 == 0));
}

#[test]
fn frames_wait_for_buffers_and_arrive_in_order() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, MERGE);
    far.send(&frame(60, 0)).unwrap();
    driver.wait_for_read();
    for seed in 1..5 {
        far.send(&frame(60, seed)).unwrap();
    }
    assert_eq!(driver.queues[RECEIVE].used_index(), 0);

    driver.offer(0, 5, 2048);
    driver.wait_for_received(5);

    for seed in 0..5 {
        let received = driver.bytes(BUFFERS + u64::from(seed) * 0x1000, 72);
        assert_eq!(received[HEADER_LEN..], frame(60, seed)[HEADER_LEN..]);
    }
}

#[test]
fn a_frame_with_too_few_buffers_waits_and_the_driver_is_asked_to_kick_for_the_next() {
    let (net, far, _) = interface();
    let mut driver = Driver::idle(net);
    driver.start(MERGE, true);
    driver.offer(0, 2, 1000);
    far.send(&frame(2488, 5)).unwrap();

    // The avail_event field: a driver kicks when it passes this index.
    let event = driver.queues[RECEIVE].used_ring() + 4 + 8 * 256;
    wait_until("the device asks for a third buffer", || {
        driver
            .memory
            .load::<u16>(GuestAddress(event), Ordering::Acquire)
            .unwrap()
            == 2
    });
    assert_eq!(driver.queues[RECEIVE].used_index(), 0);
    driver.offer(2, 1, 1000);

    driver.wait_for_received(3);
}

#[test]
fn a_frame_longer_than_the_only_buffer_is_dropped_without_merging_and_the_next_arrives() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, 0);
    driver.offer(0, 2, 100);

    far.send(&frame(500, 6)).unwrap();
    far.send(&frame(50, 7)).unwrap();
    driver.wait_for_received(2);

    assert_eq!(driver.queues[RECEIVE].used(0), (0, 0));
    assert_eq!(driver.queues[RECEIVE].used(1), (1, 62));
    assert_eq!(num_buffers(&driver.bytes(BUFFERS + 0x1000, 62)), 1);
}

#[test]
fn a_frame_longer_than_a_full_ring_is_dropped_and_the_next_arrives() {
    let (net, far, _) = interface();
    let mut driver = Driver::idle(net);
    driver.queues[RECEIVE] = DriverQueue::new(&driver.memory, RECEIVE, 4);
    driver.start(MERGE, false);
    driver.offer(0, 4, 100);

    far.send(&frame(500, 8)).unwrap();
    far.send(&frame(50, 9)).unwrap();
    driver.wait_for_received(1);

    let received = driver.bytes(BUFFERS, 62);
    assert_eq!(received[HEADER_LEN..], frame(50, 9)[HEADER_LEN..]);
}

#[test]
fn a_link_with_frames_does_not_keep_a_full_interface_busy() {
    let (mut net, far, _) = interface();
    net.name = "idle0".into();
    let driver = Driver::started(net, MERGE);
    far.send(&frame(60, 1)).unwrap();
    driver.wait_for_read();
    far.send(&frame(60, 2)).unwrap();

    // The kernel counts it for sure only when the thread gives its CPU up.
    wait_until("the thread's time is counted", || {
        cpu_time_of("tv-idle0") > Duration::ZERO
    });
    let before = cpu_time_of("tv-idle0");
    thread::sleep(Duration::from_millis(100));

    assert!(cpu_time_of("tv-idle0") - before < Duration::from_millis(5));
}

/// The time the thread of this process called `name` has spent on a CPU.
fn cpu_time_of(name: &str) -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let nanoseconds = threads
        .filter_map(|thread| {
            let thread = thread.ok()?.path();
            let comm = std::fs::read_to_string(thread.join("comm")).ok()?;
            let schedstat = std::fs::read_to_string(thread.join("schedstat")).ok()?;
            (comm.trim() == name).then(|| schedstat.split(' ').next()?.parse::<u64>().ok())?
        })
        .sum();
    Duration::from_nanos(nanoseconds)
}

#[test]
fn a_driver_that_wants_no_interrupt_yet_gets_none_for_received_frames() {
    let (net, far, _) = interface();
    let mut driver = Driver::idle(net);
    driver.queues[RECEIVE].set_used_event(1);
    driver.start(MERGE, true);
    driver.offer(0, 2, 2048);

    far.send(&frame(60, 1)).unwrap();
    driver.wait_for_received(1);
    thread::sleep(Duration::from_millis(20));
    let after_first = driver.interrupt.used.load(Ordering::SeqCst);
    far.send(&frame(60, 2)).unwrap();
    driver.wait_for_received(2);

    wait_until("the second frame interrupts", || {
        driver.interrupt.used.load(Ordering::SeqCst) == 1
    });
    assert_eq!(after_first, 0);
}

#[test]
fn a_frame_in_pieces_leaves_as_one() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, MERGE);
    let sent = frame(1000, 1);

    driver.send(&sent, &[12, 14, 486, 500]);

    assert_eq!(receive_from(&far), sent);
    driver.wait_for_sent(1);
    assert_eq!(driver.queues[TRANSMIT].used(0), (0, 0));
}

#[test]
fn a_frame_of_64_kib_leaves_whole() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, MERGE);
    let sent = frame((64 << 10) + 18, 1);

    driver.send(&sent, &[sent.len() as u32]);

    assert_eq!(receive_from(&far), sent);
}

#[test]
fn frames_too_long_or_too_short_are_dropped_and_the_next_leaves() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, MERGE);

    driver.send(&[0; LONGEST_SENT + 1], &[LONGEST_SENT as u32 + 1]);
    driver.wait_for_sent(1);
    driver.send(&[0; HEADER_LEN], &[HEADER_LEN as u32]);
    driver.wait_for_sent(2);
    driver.send(&[0; 4], &[4]);
    driver.wait_for_sent(3);
    driver.send(&frame(60, 1), &[72]);

    assert_eq!(receive_from(&far), frame(60, 1));
}

#[test]
fn a_batch_of_frames_interrupts_once() {
    let (net, far, _) = interface();
    let mut driver = Driver::idle(net);
    driver
        .memory
        .write_slice(&frame(60, 1), GuestAddress(BUFFERS))
        .unwrap();
    (0..5).for_each(|_| {
        driver.queues[TRANSMIT].add(&[(BUFFERS, 72, 0)]);
    });

    driver.start(MERGE, false);
    (0..5).for_each(|_| assert_eq!(receive_from(&far), frame(60, 1)));

    wait_until("the batch interrupts", || {
        driver.interrupt.used.load(Ordering::SeqCst) == 1
    });
    thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.interrupt.used.load(Ordering::SeqCst), 1);
}

#[test]
fn frames_wait_for_a_link_that_is_full_and_leave_in_order() {
    let (net, far, _) = interface();
    let mut driver = Driver::idle(net);
    let frames: Vec<Vec<u8>> = (0..200).map(|seed| frame(4000, seed)).collect();
    for (index, frame) in (0..).zip(&frames) {
        let address = BUFFERS + index * 0x1000;
        driver
            .memory
            .write_slice(frame, GuestAddress(address))
            .unwrap();
        driver.queues[TRANSMIT].add(&[(address, frame.len() as u32, 0)]);
    }

    driver.start(MERGE, false);
    thread::sleep(Duration::from_millis(20));
    let before_reading = driver.queues[TRANSMIT].used_index();
    let received: Vec<Vec<u8>> = frames.iter().map(|_| receive_from(&far)).collect();

    assert!(before_reading < 200, "the link was never full");
    assert_eq!(received, frames);
    driver.wait_for_sent(200);
}

#[test]
fn a_closed_link_drops_frames_and_the_device_goes_on() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, MERGE);
    drop(far);

    driver.send(&frame(60, 1), &[72]);
    driver.wait_for_sent(1);
    driver.send(&frame(60, 2), &[72]);

    driver.wait_for_sent(2);
    assert!(!driver.interrupt.needs_reset.load(Ordering::SeqCst));
}

#[test]
fn a_buffer_outside_guest_memory_ends_the_device_until_its_reset() {
    for queue in [RECEIVE, TRANSMIT] {
        let (net, far, _) = interface();
        let mut driver = Driver::started(net, MERGE);
        let flags = [WRITE, 0][queue];
        driver.queues[queue].add(&[(RAM_START + RAM_SIZE as u64 - 10, 100, flags)]);

        far.send(&frame(60, 1)).unwrap();
        driver.kick(queue);

        wait_until("the device asks for a reset", || {
            driver.interrupt.needs_reset.load(Ordering::SeqCst)
        });
    }
}

#[test]
fn an_interface_goes_on_after_a_pause_exactly_where_it_stopped() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, MERGE);
    driver.offer(0, 1, 2048);
    far.send(&frame(60, 1)).unwrap();
    driver.wait_for_received(1);
    // This one finds no buffer and waits in the device; the next waits in the link.
    far.send(&frame(60, 2)).unwrap();
    driver.wait_for_read();
    far.send(&frame(60, 3)).unwrap();

    let queues = driver.net.deactivate().unwrap();
    driver.go_on(MERGE, queues);
    driver.offer(1, 2, 2048);
    driver.wait_for_received(3);

    for seed in [1, 2, 3] {
        let received = driver.bytes(BUFFERS + u64::from(seed - 1) * 0x1000, 72);
        assert_eq!(received[HEADER_LEN..], frame(60, seed)[HEADER_LEN..]);
    }
}

#[test]
fn a_reset_forgets_the_frame_that_waited() {
    let (net, far, _) = interface();
    let mut driver = Driver::started(net, MERGE);
    far.send(&frame(60, 1)).unwrap();
    driver.wait_for_read();
    driver.net.deactivate().unwrap();
    driver.net.reset();

    driver.start(MERGE, false);
    driver.offer(0, 1, 2048);
    far.send(&frame(60, 2)).unwrap();
    driver.wait_for_received(1);

    assert_eq!(
        driver.bytes(BUFFERS, 72)[HEADER_LEN..],
        frame(60, 2)[HEADER_LEN..]
    );
}

#[test]
fn a_tap_that_does_not_exist_is_refused_with_the_way_to_make_it() {
    let error = Tap::open(TapSource::Name("tv-missing0".into())).unwrap_err();

    let message = error.to_string();
    assert!(
        message.contains("ip tuntap add dev tv-missing0 mode tap"),
        "{message}"
    );
}

#[test]
fn names_that_no_interface_can_have_are_refused() {
    for name in ["", "sixteen-letters0", "a b", "a/b", "tap%d"] {
        let error = Tap::open(TapSource::Name(name.into())).unwrap_err();
        assert!(matches!(error, NetError::Name { .. }), "{error}");
    }
}

#[test]
fn a_descriptor_that_is_no_tap_is_refused() {
    let (socket, _other) = UnixDatagram::pair().unwrap();

    let error = Tap::open(TapSource::Fd(socket.into())).unwrap_err();

    assert!(
        error.to_string().contains("it is no attached tap"),
        "{error}"
    );
}

/// Runs `test` in a network namespace of its own with a tap called `tap0`, or says why it cannot.
fn with_tap(options: &'static [&'static str], test: impl FnOnce() + Send + 'static) {
    let on_own_thread = thread::spawn(move || {
        // SAFETY: the call takes a number and changes this thread's namespace alone.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            eprintln!(
                "skipped: no network namespace: {}",
                io::Error::last_os_error()
            );
            return;
        }
        let add = [&["tuntap", "add", "dev", "tap0", "mode", "tap"], options].concat();
        let made = Command::new("ip").args(add).output();
        match made {
            Ok(output) if output.status.success() => test(),
            Ok(output) => {
                eprintln!(
                    "skipped: no tap: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            Err(error) => eprintln!("skipped: `ip` cannot be run: {error}"),
        }
    });
    on_own_thread.join().unwrap();
}

fn open_tap0() -> Result<Tap, NetError> {
    Tap::open(TapSource::Name("tap0".into()))
}

#[test]
fn a_tap_that_is_in_use_is_refused() {
    with_tap(&[], || {
        let _first = open_tap0().unwrap();

        let error = open_tap0().unwrap_err();

        assert!(matches!(error, NetError::Busy { .. }), "{error}");
    });
}

#[test]
fn an_interface_that_is_no_tap_is_refused() {
    with_tap(&[], || {
        let error = Tap::open(TapSource::Name("lo".into())).unwrap_err();

        assert!(matches!(error, NetError::Kind { .. }), "{error}");
    });
}

#[test]
fn a_tap_of_another_user_is_refused() {
    with_tap(&["user", "1"], || {
        // Another user without capabilities, who may open /dev/net/tun all the same.
        // SAFETY: the calls take numbers and change this thread's identity alone.
        unsafe {
            libc::syscall(libc::SYS_setresuid, -1, 65534, -1);
            libc::setfsuid(0);
        }

        let error = open_tap0().unwrap_err();

        assert!(matches!(error, NetError::Permission { .. }), "{error}");
    });
}

#[test]
fn a_tap_opened_by_another_program_is_taken_over_with_its_name() {
    with_tap(&[], || {
        let opened = open_tap0().unwrap();
        let passed = opened.frames().try_clone().unwrap();
        drop(opened);

        let tap = Tap::open(TapSource::Fd(passed.into())).unwrap();

        assert_eq!(tap.name(), "tap0");
    });
}

#[test]
fn a_guest_that_moved_is_announced_by_rarp_frames_of_its_address() {
    let (net, far, _offloads) = interface();

    let _announcement = Announcement::start([net.announcer()].into()).unwrap();
    let frames = [(); 5].map(|()| receive_from(&far));

    let frame = &frames[0][HEADER_LEN..];
    let mac = mac().bytes();
    assert_eq!(frames[0][..HEADER_LEN], [0; HEADER_LEN]);
    assert_eq!(frame.len(), 60);
    assert_eq!(frame[..6], [0xff; 6]);
    assert_eq!(frame[6..12], mac);
    assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
    assert!(frames.iter().all(|other| *other == frames[0]));
    assert!(!is_readable(&far));
}

#[test]
fn an_announcement_ends_when_it_is_dropped() {
    let (net, far, _offloads) = interface();
    let announcement = Announcement::start([net.announcer()].into()).unwrap();
    receive_from(&far);

    drop(announcement);
    let sent_by_then = std::iter::from_fn(|| is_readable(&far).then(|| receive_from(&far))).count();
    thread::sleep(Duration::from_millis(200));

    assert!(sent_by_then < 4);
    assert!(!is_readable(&far));
}

fn status(net: &Net<SocketLink>) -> u8 {
    let mut status = [0; 2];
    net.read_config(6, &mut status);
    assert_eq!(status[1], 0);
    status[0]
}

#[test]
fn a_driver_that_can_is_asked_for_its_own_announcement_until_it_has_made_it() {
    let (net, _far, _offloads) = interface();
    let mut driver = Driver::idle(net);
    let mut control = DriverQueue::new(&driver.memory, CONTROL, 16);
    let features = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
    let queues = [0, 1].map(|index| DriverQueue::new(&driver.memory, index, 256));
    let (mut activation, _kicks) = activation(&driver.memory, &queues, &driver.interrupt, features);
    let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    activation.queues.push(control.device_queue());
    activation.kicks.push(kick.try_clone().unwrap());
    driver.net.activate(activation).unwrap();
    let mut command = |bytes: [u8; 2]| {
        let memory = &driver.memory;
        memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        control.add(&[(BUFFERS, 2, 0), (BUFFERS + 8, 1, WRITE)]);
        kick.write(1).unwrap();
        wait_until("the command is obeyed", || {
            control.used_index() == control.available()
        });
        driver
            .memory
            .read_obj::<u8>(GuestAddress(BUFFERS + 8))
            .unwrap()
    };

    let before = status(&driver.net);
    let _announcement = Announcement::start([driver.net.announcer()].into()).unwrap();
    wait_until("the driver is asked", || {
        driver.interrupt.config.load(Ordering::SeqCst) == 5
    });
    let asked = status(&driver.net);
    let unknown = command([3, 1]);
    let still = status(&driver.net);
    let known = command([3, 0]);

    assert_eq!((before, asked, still, status(&driver.net)), (1, 3, 3, 1));
    assert_eq!((unknown, known), (1, 0));
}

#[test]
fn a_driver_that_cannot_announce_itself_is_not_asked() {
    let (net, far, _offloads) = interface();
    let driver = Driver::started(net, MERGE);

    let _announcement = Announcement::start([driver.net.announcer()].into()).unwrap();
    receive_from(&far);

    assert_eq!(status(&driver.net), 1);
    assert_eq!(driver.interrupt.config.load(Ordering::SeqCst), 0);
}

#[test]
fn a_guest_that_was_saved_when_there_was_no_control_queue_goes_on() {
    let (net, ..) = interface();
    let (other, ..) = interface();
    let memory = ram();
    let transport = |net| {
        let line = Arc::new(FakeLine::default());
        MmioTransport::new(Box::new(net), memory.clone(), line).unwrap()
    };
    let (saved, restored) = (transport(net), transport(other));
    let queues = [0, 1].map(|index| DriverQueue::new(&memory, index, 256));
    bring_up(&saved, 1 << VIRTIO_F_VERSION_1 | MERGE, &queues);
    saved.pause();
    let mut state = saved.state().unwrap();
    state.queues.truncate(2);

    restored.restore(&state).unwrap();
    restored.resume().unwrap();
    restored.pause();

    let again = restored.state().unwrap();
    assert_eq!(again.queues[..2], state.queues);
    assert_eq!(again.queues.len(), 3);
    assert_eq!(again.status, state.status);
}

#[test]
fn frames_go_both_ways_through_a_real_tap() {
    with_tap(&[], || {
        let tap = open_tap0().unwrap();
        run_ip(&["link", "set", "tap0", "up"]);
        let host = packet_socket("tap0");
        let net = Net::new("net0", tap, mac(), None).unwrap();
        let features = net.features();
        let mut driver = Driver::started(net, features);
        driver.offer(0, 200, 2048);

        let to_host = ethernet_frame(b"from the guest");
        driver.send(&to_host, &[12, to_host.len() as u32 - 12]);
        let to_guest = ethernet_frame(b"from the host");
        (&host).write_all(&to_guest[HEADER_LEN..]).unwrap();

        wait_until("the host sees the guest's frame", || {
            let mut bytes = [0; 2048];
            let len = (&host).read(&mut bytes).unwrap_or_default();
            bytes[..len] == to_host[HEADER_LEN..]
        });
        wait_until("the guest sees the host's frame", || {
            (0..u64::from(driver.queues[RECEIVE].used_index())).any(|index| {
                let address = BUFFERS + index * 0x1000;
                driver.bytes(address, to_guest.len())[HEADER_LEN..] == to_guest[HEADER_LEN..]
            })
        });
    });
}

#[test]
fn an_interface_whose_tap_is_deleted_goes_on_without_it() {
    with_tap(&[], || {
        let net = Net::new("net0", open_tap0().unwrap(), mac(), None).unwrap();
        let mut driver = Driver::started(net, MERGE);

        run_ip(&["link", "delete", "tap0"]);
        driver.send(&frame(60, 1), &[72]);

        driver.wait_for_sent(1);
        assert!(!driver.interrupt.needs_reset.load(Ordering::SeqCst));
    });
}

fn run_ip(arguments: &[&str]) {
    assert!(
        Command::new("ip")
            .args(arguments)
            .status()
            .unwrap()
            .success()
    );
}

/// A frame of an experimental protocol (IEEE 802 local experimental ethertype 1), so that nobody answers.
fn ethernet_frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend([0xff; 6]);
    frame.extend(mac().bytes());
    frame.extend([0x88, 0xb5]);
    frame.extend(payload);
    frame.resize(HEADER_LEN + 60, 0);
    frame
}

/// The host's end of an interface: reads and writes whole Ethernet frames.
fn packet_socket(interface: &str) -> File {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: the call takes numbers; the new descriptor is owned here alone.
    let socket = unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        OwnedFd::from_raw_fd(libc::socket(libc::AF_PACKET, kind, protocol.into()))
    };
    let name = std::ffi::CString::new(interface).unwrap();
    // SAFETY: sockaddr_ll is plain numbers, and the name and the address live through the calls.
    let bound = unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let len = size_of_val(&address) as libc::socklen_t;
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len)
    };
    assert_eq!(bound, 0);
    File::from(socket)
}

fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        6 => (0..16_u64).prop_map(|part| BUFFERS + part * 0x100),
        2 => Just(RAM_START + RAM_SIZE as u64 - 100),
        1 => RAM_START..RAM_START + 0x7000,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0..2000_u32, 1 => 0..0x20000_u32, 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0..4_u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..8_u16, 1 => any::<u16>()];
    (address, len, flags, next)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_descriptors_leave_an_interface_that_can_be_stopped(
        descriptors in prop::collection::vec(any_descriptor(), 8),
        heads in prop::collection::vec(prop_oneof![9 => 0..8_u16, 1 => any::<u16>()], 1..8),
        lens in prop::collection::vec(1..3000_usize, 4),
        queue in RECEIVE..=TRANSMIT,
        merge in any::<bool>(),
    ) {
        let (net, far, _) = interface();
        far.set_nonblocking(true).unwrap();
        let mut driver = Driver::idle(net);
        for (index, &descriptor) in (0..).zip(&descriptors) {
            let table = driver.queues[queue].descriptors();
            driver.queues[queue].write_descriptor(table, index, descriptor);
        }
        for head in heads {
            driver.queues[queue].make_available(head);
        }
        for len in lens {
            far.send(&frame(len, 1)).unwrap();
        }

        driver.start(u64::from(merge) << VIRTIO_NET_F_MRG_RXBUF, false);
        driver.kick(queue);
        let mut longest = 0;
        let mut bytes = vec![0; FRAME_ROOM];
        wait_until("the kick is taken or the device has ended", || {
            longest = longest.max(far.recv(&mut bytes).unwrap_or_default());
            !driver.is_kicked(queue) || driver.interrupt.needs_reset.load(Ordering::SeqCst)
        });

        prop_assert_eq!(driver.net.deactivate().map(|queues| queues.len()), Some(2));
        prop_assert!(longest <= LONGEST_SENT);
    }
}
