use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::thread;

use proptest::prelude::*;

use super::super::testing::{
    self, BUFFERS, DriverQueue, FakeLine, INDIRECT, RAM_START, WRITE, bring_up, negotiate, notify,
    register, set_register, wait_until,
};
use super::super::worker::{self, Handler, HandlerError, Outcome, Poll, Progress, Worker};
use super::*;
use vm_memory::Bytes;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const OWN_FEATURE: u64 = 1 << 5;
const QUEUE_SIZE: u16 = 16;
/// What a live device's status reads as.
const LIVE: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
const ID: u32 = 42;

/// A device with two queues that uses every chain, with its length as the written bytes, but only
/// while its gate is open.
struct Gated {
    gate: Arc<Gate>,
    worker: Option<Worker<GatedHandler>>,
    config: [u8; 8],
    refuses: bool,
}

struct Gate {
    opened: EventFd,
}

struct GatedHandler {
    memory: Arc<GuestRam>,
    queues: Vec<Queue>,
    interrupt: Arc<dyn Interrupt>,
    gate: Arc<Gate>,
    open: bool,
}

impl VirtioDevice for Gated {
    fn device_id(&self) -> u32 {
        ID
    }
    fn name(&self) -> &str {
        "gated0"
    }
    fn features(&self) -> u64 {
        OWN_FEATURE
    }
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::super::read_config_space(&self.config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Some(byte) = self.config.get_mut(offset as usize) {
            *byte = data[0];
        }
    }
    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        if self.refuses {
            return Err(io::Error::other("refused for the test"));
        }
        let handler = GatedHandler {
            memory: activation.memory,
            queues: activation.queues,
            interrupt: activation.interrupt.clone(),
            gate: self.gate.clone(),
            open: false,
        };
        let worker = Worker::start("gated0", handler, activation.kicks, activation.interrupt);
        self.worker = Some(worker.map_err(|not_started| not_started.error)?);
        Ok(())
    }
    fn deactivate(&mut self) -> Option<Vec<Queue>> {
        self.worker.take().map(|worker| worker.stop().queues)
    }
}

impl Handler for GatedHandler {
    fn start(&mut self, poll: &Poll) -> Result<(), HandlerError> {
        Ok(poll.watch(&self.gate.opened, 0, vmm_sys_util::epoll::EventSet::IN)?)
    }
    fn queue_kicked(&mut self, index: usize, _poll: &Poll) -> Result<Progress, HandlerError> {
        let open = self.open;
        worker::serve(
            &mut self.queues[index],
            &self.memory,
            &*self.interrupt,
            |chain| {
                let length = chain.map(|descriptor| descriptor.len()).sum();
                Ok(if open {
                    Outcome::Used(length)
                } else {
                    Outcome::Later
                })
            },
        )
    }
    fn backend_ready(
        &mut self,
        _token: u32,
        _events: vmm_sys_util::epoll::EventSet,
        poll: &Poll,
    ) -> Result<(), HandlerError> {
        poll.forget(&self.gate.opened)?;
        self.open = true;
        self.queue_kicked(0, poll)?;
        self.queue_kicked(1, poll)?;
        Ok(())
    }
}

/// A transport and all around it.
struct Board {
    transport: Arc<MmioTransport>,
    line: Arc<FakeLine>,
    memory: Arc<GuestRam>,
    gate: Arc<Gate>,
}

impl Board {
    fn with_memory(memory: Arc<GuestRam>, refuses: bool) -> Self {
        let gate = Arc::new(Gate {
            opened: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        });
        let device = Gated {
            gate: gate.clone(),
            worker: None,
            config: [1, 2, 3, 4, 5, 6, 7, 8],
            refuses,
        };
        let line = Arc::new(FakeLine::default());
        let transport = MmioTransport::new(Box::new(device), memory.clone(), line.clone()).unwrap();
        Board {
            transport: Arc::new(transport),
            line,
            memory,
            gate,
        }
    }

    fn new() -> Self {
        Board::with_memory(testing::ram(), false)
    }

    /// A device that does its work at once.
    fn open() -> Self {
        let board = Board::new();
        board.open_gate();
        board
    }

    fn open_gate(&self) {
        self.gate.opened.write(1).unwrap();
    }

    /// The device does nothing once it starts the next time.
    fn close_gate(&self) {
        self.gate.opened.read().unwrap();
    }

    fn queues(&self) -> [DriverQueue; 2] {
        [0, 1].map(|index| DriverQueue::new(&self.memory, index, QUEUE_SIZE))
    }

    fn status(&self) -> u32 {
        register(&self.transport, reg::VIRTIO_MMIO_STATUS)
    }

    fn set_status(&self, status: u32) {
        set_register(&self.transport, reg::VIRTIO_MMIO_STATUS, status);
    }

    fn read(&self, offset: u32) -> u32 {
        register(&self.transport, offset)
    }

    fn write(&self, offset: u32, value: u32) {
        set_register(&self.transport, offset, value);
    }

    fn wait_for_reset_request(&self) {
        wait_until("the device needs a reset", || {
            self.status() & NEEDS_RESET != 0
        });
    }
}

#[test]
fn a_driver_finds_the_registers_of_the_specification() {
    let board = Board::new();

    assert_eq!(board.read(0x000), 0x7472_6976);
    assert_eq!(board.read(0x004), 2);
    assert_eq!(board.read(0x008), ID);
    assert_eq!(board.read(0x010), (OWN_FEATURE | TRANSPORT_FEATURES) as u32);
    board.write(0x014, 1);
    assert_eq!(board.read(0x010), 1);
    board.write(0x014, 2);
    assert_eq!(board.read(0x010), 0);
    assert_eq!(board.read(0x034), u32::from(QUEUE_SIZE));
    board.write(0x030, 2);
    assert_eq!(board.read(0x034), 0, "a queue that does not exist");
    board.write(0x0ac, 7);
    assert_eq!(
        [0x0b0, 0x0b4, 0x0b8, 0x0bc].map(|offset| board.read(offset)),
        [u32::MAX; 4]
    );
    assert_eq!(board.read(0x070), 0);
}

#[test]
fn a_driver_that_does_all_in_order_has_its_buffers_used_and_is_interrupted() {
    let board = Board::open();
    let mut queues = board.queues();
    bring_up(&board.transport, VERSION_1 | OWN_FEATURE, &queues);

    let head = queues[1].add(&[(BUFFERS, 8, 0), (BUFFERS, 30, WRITE)]);
    notify(&board.transport, 1);

    wait_until("the chain is used", || queues[1].used_index() == 1);
    assert_eq!(queues[1].used(0), (head.into(), 38));
    wait_until("the guest is interrupted", || board.line.is_high());
    assert_eq!(board.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), USED_BUFFERS);
    board.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, USED_BUFFERS);
    assert!(!board.line.is_high());
    assert_eq!(board.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(board.status(), LIVE);
}

#[test]
fn buffers_offered_before_driver_ok_are_used_without_a_kick() {
    let board = Board::open();
    let mut queues = board.queues();
    queues[0].add(&[(BUFFERS, 8, 0)]);

    bring_up(&board.transport, VERSION_1, &queues);

    wait_until("the chain is used", || queues[0].used_index() == 1);
}

#[test]
fn with_event_idx_the_guest_is_interrupted_only_where_it_asked() {
    let board = Board::open();
    let mut queues = board.queues();
    bring_up(&board.transport, VERSION_1 | EVENT_IDX, &queues);
    queues[0].set_used_event(1);

    queues[0].add(&[(BUFFERS, 8, 0)]);
    notify(&board.transport, 0);
    wait_until("the first chain is used", || queues[0].used_index() == 1);
    board.transport.pause();
    let after_first = board.line.is_high();
    board.transport.resume().unwrap();
    queues[0].add(&[(BUFFERS, 8, 0)]);
    notify(&board.transport, 0);
    wait_until("the second chain is used", || queues[0].used_index() == 2);

    assert!(!after_first);
    wait_until("the guest is interrupted", || board.line.is_high());
}

#[test]
fn indirect_descriptors_are_followed() {
    let board = Board::open();
    let mut queues = board.queues();
    let table = BUFFERS + 0x1000;
    queues[0].write_descriptor(table, 0, (BUFFERS, 100, testing::NEXT, 1));
    queues[0].write_descriptor(table, 1, (BUFFERS, 11, WRITE, 0));
    bring_up(
        &board.transport,
        VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC,
        &queues,
    );

    let head = queues[0].add(&[(table, 32, INDIRECT)]);
    notify(&board.transport, 0);

    wait_until("the chain is used", || queues[0].used_index() == 1);
    assert_eq!(queues[0].used(0), (head.into(), 111));
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let board = Board::new();

    let status = negotiate(&board.transport, VERSION_1 | 1 << 6);

    assert_eq!(status, ACKNOWLEDGE | DRIVER);
}

#[test]
fn a_legacy_driver_is_refused() {
    let board = Board::new();

    let status = negotiate(&board.transport, OWN_FEATURE);

    assert_eq!(status, ACKNOWLEDGE | DRIVER);
}

#[test]
fn features_cannot_change_once_they_are_agreed() {
    let board = Board::new();
    negotiate(&board.transport, VERSION_1);

    board.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    board.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, OWN_FEATURE as u32);
    board.transport.pause();

    assert_eq!(board.transport.state().unwrap().driver_features, VERSION_1);
}

#[test]
fn status_bits_out_of_order_are_ignored() {
    let board = Board::new();

    board.set_status(DRIVER);
    assert_eq!(board.status(), 0);
    board.set_status(ACKNOWLEDGE);
    board.set_status(ACKNOWLEDGE | DRIVER_OK);
    assert_eq!(board.status(), ACKNOWLEDGE);
    board.set_status(ACKNOWLEDGE | 0x10);
    assert_eq!(board.status(), ACKNOWLEDGE);
    board.set_status(ACKNOWLEDGE | DRIVER);
    board.set_status(DRIVER);
    assert_eq!(
        board.status(),
        ACKNOWLEDGE | DRIVER,
        "bits are not taken back"
    );
}

#[test]
fn a_status_that_takes_bits_back_is_ignored() {
    let board = Board::new();
    negotiate(&board.transport, VERSION_1);

    board.set_status(DRIVER_OK);

    assert_eq!(board.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

#[test]
fn queues_can_be_set_up_only_between_features_ok_and_driver_ok() {
    let board = Board::open();
    let queues = board.queues();
    testing::set_up_queue(&board.transport, 0, &queues[0]);
    assert_eq!(board.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);

    bring_up(&board.transport, VERSION_1, &queues[..1]);
    testing::set_up_queue(&board.transport, 1, &queues[1]);

    assert_eq!(board.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    assert_eq!(board.status(), LIVE);
}

#[test]
fn a_ready_queue_keeps_its_addresses() {
    let board = Board::new();
    let queues = board.queues();
    negotiate(&board.transport, VERSION_1);
    testing::set_up_queue(&board.transport, 0, &queues[0]);

    board.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0);
    board.write(reg::VIRTIO_MMIO_QUEUE_NUM, 4);
    board.transport.pause();

    let state = board.transport.state().unwrap();
    assert_eq!(state.queues[0].descriptor_table, queues[0].descriptors());
    assert_eq!(state.queues[0].size, u32::from(QUEUE_SIZE));
}

#[test]
fn a_live_device_goes_on_without_a_queue_that_its_driver_takes_back() {
    let board = Board::open();
    let mut queues = board.queues();
    bring_up(&board.transport, VERSION_1, &queues);

    board.write(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
    board.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    queues[0].add(&[(BUFFERS, 8, 0)]);
    notify(&board.transport, 0);
    queues[1].add(&[(BUFFERS, 8, 0)]);
    notify(&board.transport, 1);

    wait_until("the other queue's chain is used", || {
        queues[1].used_index() == 1
    });
    assert_eq!(board.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    assert_eq!(queues[0].used_index(), 0);
    assert_eq!(board.status(), LIVE);
}

#[test]
fn accesses_of_wrong_width_or_alignment_do_nothing() {
    let board = Board::new();
    let mut two = [0xff; 2];
    let mut eight = [0xff; 8];
    let mut four = [0xff; 4];

    board.transport.write(0x70, &[1]);
    board.transport.write(0x70, &[1, 0, 0, 0, 0, 0, 0, 0]);
    board.transport.write(0x71, &[1, 0, 0, 0]);
    board.transport.write(0x70, &[]);
    board.transport.read(0, &mut two);
    board.transport.read(0, &mut eight);
    board.transport.read(2, &mut four);
    board.transport.read(MMIO_SIZE, &mut []);

    assert_eq!(board.status(), 0);
    assert_eq!((two, eight, four), ([0; 2], [0; 8], [0; 4]));
}

#[test]
fn configuration_space_is_read_in_any_width_and_ends_in_zeros() {
    let board = Board::new();
    let mut byte = [0xff];
    let mut eight = [0xff; 8];
    let mut beyond = [0xff; 4];

    board.transport.read(0x103, &mut byte);
    board.transport.read(0x104, &mut eight);
    board.transport.read(0x200, &mut beyond);

    assert_eq!(byte, [4]);
    assert_eq!(eight, [5, 6, 7, 8, 0, 0, 0, 0]);
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn configuration_space_is_written_only_by_a_driver() {
    let board = Board::new();
    let mut byte = [0];

    board.transport.write(0x100, &[0xaa]);
    board.transport.read(0x100, &mut byte);
    assert_eq!(byte, [1]);

    board.set_status(ACKNOWLEDGE | DRIVER);
    board.transport.write(0x100, &[0xaa]);
    board.transport.read(0x100, &mut byte);
    assert_eq!(byte, [0xaa]);
}

#[test]
fn a_reset_stops_the_device_and_returns_it_to_its_first_state() {
    let board = Board::open();
    board.transport.pause();
    let fresh = board.transport.state().unwrap();
    board.transport.resume().unwrap();
    let mut queues = board.queues();
    bring_up(&board.transport, VERSION_1 | OWN_FEATURE, &queues);
    queues[0].add(&[(BUFFERS, 8, 0)]);
    notify(&board.transport, 0);
    wait_until("the guest is interrupted", || board.line.is_high());

    board.set_status(0);

    assert_eq!(board.status(), 0);
    assert!(!board.line.is_high());
    queues[0].add(&[(BUFFERS, 8, 0)]);
    notify(&board.transport, 0);
    board.transport.pause();
    assert_eq!(board.transport.state().unwrap(), fresh);
    assert_eq!(
        queues[0].used_index(),
        1,
        "a device in reset uses no buffers"
    );
}

#[test]
fn a_device_works_again_after_a_reset() {
    let board = Board::open();
    bring_up(&board.transport, VERSION_1, &board.queues());
    board.set_status(0);
    board
        .memory
        .write_slice(&[0; 0x8000], GuestAddress(RAM_START))
        .unwrap();
    let mut queues = board.queues();

    bring_up(&board.transport, VERSION_1, &queues);
    queues[0].add(&[(BUFFERS, 8, 0)]);
    notify(&board.transport, 0);

    wait_until("the chain is used", || queues[0].used_index() == 1);
}

#[test]
fn a_driver_that_failed_can_only_reset() {
    let board = Board::open();
    bring_up(&board.transport, VERSION_1, &board.queues());

    board.set_status(LIVE | FAILED);
    let ran = board.transport.registers().running;
    board.set_status(LIVE);
    assert_eq!(board.status(), LIVE | FAILED);
    board.set_status(0);

    assert!(!ran);
    assert_eq!(board.status(), 0);
}

#[test]
fn a_device_that_does_not_start_needs_a_reset() {
    let board = Board::with_memory(testing::ram(), true);

    bring_up(&board.transport, VERSION_1, &board.queues());

    assert_eq!(board.status(), LIVE | NEEDS_RESET);
    assert_eq!(
        board.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS),
        CONFIG_CHANGED
    );
    assert!(board.line.is_high());
}

/// Brings a device up with one register of queue 0 set wrong, and returns its status then.
fn status_with_wrong_queue(offset: u32, value: u32) -> u32 {
    let board = Board::open();
    let queues = board.queues();
    negotiate(&board.transport, VERSION_1);
    testing::set_up_queue(&board.transport, 0, &queues[0]);
    board.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    board.write(offset, value);
    board.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    board.set_status(LIVE);
    board.status()
}

#[test]
fn a_queue_that_cannot_be_needs_a_reset() {
    use reg::*;
    assert_eq!(
        status_with_wrong_queue(VIRTIO_MMIO_QUEUE_NUM, 8),
        LIVE,
        "half the size is fine"
    );
    for (offset, value) in [
        (VIRTIO_MMIO_QUEUE_NUM, 0),
        (VIRTIO_MMIO_QUEUE_NUM, 3),
        (VIRTIO_MMIO_QUEUE_NUM, 32),
        (VIRTIO_MMIO_QUEUE_NUM, 0x1_0008),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, RAM_START as u32 + 1),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, RAM_START as u32 + 1),
        (VIRTIO_MMIO_QUEUE_USED_LOW, RAM_START as u32 + 2),
        (VIRTIO_MMIO_QUEUE_DESC_HIGH, u32::MAX),
        (VIRTIO_MMIO_QUEUE_AVAIL_HIGH, 1),
        (VIRTIO_MMIO_QUEUE_USED_LOW, 0),
        (
            VIRTIO_MMIO_QUEUE_USED_LOW,
            RAM_START as u32 + testing::RAM_SIZE as u32 - 8,
        ),
    ] {
        let status = status_with_wrong_queue(offset, value);
        assert_eq!(
            status,
            LIVE | NEEDS_RESET,
            "register {offset:#x} = {value:#x}"
        );
    }
}

#[test]
fn an_available_index_that_runs_ahead_needs_a_reset() {
    let board = Board::open();
    let mut queues = board.queues();
    bring_up(&board.transport, VERSION_1, &queues);

    queues[0].set_available_index(QUEUE_SIZE + 1);
    notify(&board.transport, 0);

    board.wait_for_reset_request();
    assert!(board.line.is_high());
    assert_eq!(
        board.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS),
        CONFIG_CHANGED
    );
}

#[test]
fn a_head_outside_the_table_needs_a_reset() {
    let board = Board::open();
    let mut queues = board.queues();
    bring_up(&board.transport, VERSION_1, &queues);

    queues[0].make_available(QUEUE_SIZE);
    notify(&board.transport, 0);

    board.wait_for_reset_request();
}

#[test]
fn a_broken_device_works_again_after_a_reset() {
    let board = Board::open();
    let mut queues = board.queues();
    bring_up(&board.transport, VERSION_1, &queues);
    queues[0].make_available(QUEUE_SIZE);
    notify(&board.transport, 0);
    board.wait_for_reset_request();
    board
        .memory
        .write_slice(&[0; 0x8000], GuestAddress(RAM_START))
        .unwrap();
    let mut queues = board.queues();

    bring_up(&board.transport, VERSION_1, &queues);
    queues[0].add(&[(BUFFERS, 8, 0)]);
    notify(&board.transport, 0);

    wait_until("the chain is used", || queues[0].used_index() == 1);
    assert_eq!(board.status(), LIVE);
}

/// A line that takes its time, as a system call does.
#[derive(Default)]
struct SlowLine {
    high: AtomicBool,
}

impl IrqLine for SlowLine {
    fn set_level(&self, high: bool) {
        for _ in 0..20 {
            thread::yield_now();
        }
        self.high.store(high, Ordering::SeqCst);
    }
}

#[test]
fn line_and_status_agree_after_a_device_and_an_acknowledging_vcpu_met() {
    const ROUNDS: usize = 3_000;
    let line = Arc::new(SlowLine::default());
    let interrupt = Arc::new(MmioInterrupt {
        line: line.clone(),
        signals: Mutex::default(),
    });
    let meeting = Arc::new(Barrier::new(2));
    let device = thread::spawn({
        let (interrupt, meeting) = (interrupt.clone(), meeting.clone());
        move || {
            for _ in 0..ROUNDS {
                meeting.wait();
                interrupt.used_buffers();
                meeting.wait();
            }
        }
    });

    let disagreements = (0..ROUNDS).filter(|_| {
        meeting.wait();
        interrupt.acknowledge(USED_BUFFERS);
        meeting.wait();
        line.high.load(Ordering::SeqCst) != (interrupt.signals().status != 0)
    });
    let disagreements = disagreements.count();
    device.join().unwrap();

    assert_eq!(disagreements, 0);
}

#[test]
fn every_interrupt_reaches_a_vcpu_that_waits_for_the_line() {
    const ROUNDS: usize = 20_000;
    let board = Board::new();
    let interrupt = board.transport.interrupt.clone();
    let seen = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let device = thread::spawn({
        let seen = seen.clone();
        move || {
            for round in 0..ROUNDS {
                interrupt.used_buffers();
                interrupt.config_changed();
                while seen.load(Ordering::SeqCst) <= round {
                    std::hint::spin_loop();
                }
            }
        }
    });

    // The vCPU acknowledges exactly what it saw, as a driver does.
    for round in 0..ROUNDS {
        let mut handled = 0;
        wait_until("both interrupts came", || {
            let status = board.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS);
            board.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, status);
            handled |= status;
            handled == ALL_INTERRUPTS
        });
        seen.store(round + 1, Ordering::SeqCst);
    }
    device.join().unwrap();

    assert!(!board.line.is_high());
    assert_eq!(
        board.read(reg::VIRTIO_MMIO_CONFIG_GENERATION),
        ROUNDS as u32
    );
}

#[test]
fn a_paused_device_keeps_its_requests_and_does_them_when_it_goes_on() {
    let board = Board::new();
    let mut queues = board.queues();
    bring_up(&board.transport, VERSION_1, &queues);
    let heads = [1, 2, 3].map(|length| queues[0].add(&[(BUFFERS, length, 0)]));
    notify(&board.transport, 0);

    board.transport.pause();
    board.open_gate();
    notify(&board.transport, 0);
    let used_while_paused = queues[0].used_index();
    board.transport.resume().unwrap();

    wait_until("the chains are used", || queues[0].used_index() == 3);
    assert_eq!(used_while_paused, 0);
    let used = [0, 1, 2].map(|index| queues[0].used(index));
    assert_eq!(
        used,
        [
            (heads[0].into(), 1),
            (heads[1].into(), 2),
            (heads[2].into(), 3)
        ]
    );
}

#[test]
fn a_device_whose_driver_starts_it_while_it_is_paused_begins_when_it_goes_on() {
    let board = Board::open();
    let mut queues = board.queues();
    board.transport.pause();
    bring_up(&board.transport, VERSION_1, &queues);
    queues[0].add(&[(BUFFERS, 8, 0)]);
    notify(&board.transport, 0);

    let ran_while_paused = board.transport.registers().running;
    board.transport.resume().unwrap();

    assert!(!ran_while_paused);
    wait_until("the chain is used", || queues[0].used_index() == 1);
}

#[test]
fn a_device_goes_on_without_a_queue_that_was_taken_back_while_it_was_paused() {
    let board = Board::open();
    let mut queues = board.queues();
    bring_up(&board.transport, VERSION_1, &queues);
    board.transport.pause();

    board.write(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
    board.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    for (index, queue) in queues.iter_mut().enumerate() {
        queue.add(&[(BUFFERS, 8, 0)]);
        notify(&board.transport, index);
    }
    board.transport.resume().unwrap();

    wait_until("the other queue's chain is used", || {
        queues[1].used_index() == 1
    });
    assert_eq!(queues[0].used_index(), 0);
}

#[test]
fn a_restored_device_goes_on_with_the_requests_in_flight() {
    let source = Board::open();
    let mut queues = source.queues();
    bring_up(&source.transport, VERSION_1 | EVENT_IDX, &queues);
    queues[0].add(&[(BUFFERS, 1, 0)]);
    notify(&source.transport, 0);
    wait_until("the guest is interrupted", || source.line.is_high());
    source.transport.pause();
    source.close_gate();
    source.transport.resume().unwrap();
    let head = queues[0].add(&[(BUFFERS, 2, 0)]);
    queues[1].add(&[(BUFFERS, 3, 0)]);
    notify(&source.transport, 0);
    source.transport.pause();
    let state = source.transport.state().unwrap();

    let destination = Board::with_memory(source.memory.clone(), false);
    destination.transport.restore(&state).unwrap();
    let line_after_restore = destination.line.is_high();
    destination.open_gate();
    destination.transport.resume().unwrap();

    wait_until("both chains are used", || {
        queues[0].used_index() == 2 && queues[1].used_index() == 1
    });
    assert!(line_after_restore, "the interrupt was not acknowledged yet");
    assert_eq!(queues[0].used(1), (head.into(), 2));
    assert_eq!(destination.status(), LIVE);
}

#[test]
fn a_saved_state_is_that_of_the_restored_device() {
    let source = Board::open();
    bring_up(&source.transport, VERSION_1 | OWN_FEATURE, &source.queues());
    source.transport.pause();
    let state = source.transport.state().unwrap();
    let destination = Board::with_memory(source.memory.clone(), false);

    destination.transport.restore(&state).unwrap();

    assert_eq!(destination.transport.state().unwrap(), state);
}

#[test]
fn a_device_that_needs_a_reset_does_not_go_on_after_a_pause() {
    let board = Board::open();
    let mut queues = board.queues();
    bring_up(&board.transport, VERSION_1, &queues);
    queues[0].make_available(QUEUE_SIZE);
    notify(&board.transport, 0);
    board.wait_for_reset_request();

    board.transport.pause();
    let state = board.transport.state().unwrap();
    board.transport.resume().unwrap();
    queues[1].add(&[(BUFFERS, 8, 0)]);
    notify(&board.transport, 1);

    assert_eq!(state.status, LIVE | NEEDS_RESET);
    assert_eq!(board.status(), LIVE | NEEDS_RESET);
    assert!(!board.transport.registers().running);
}

#[test]
fn the_state_of_a_running_device_is_not_given() {
    let board = Board::new();

    let state = board.transport.state();

    assert!(matches!(state, Err(Error::NotPaused { .. })));
}

#[test]
fn a_running_device_cannot_be_restored() {
    let board = Board::new();
    board.transport.pause();
    let state = board.transport.state().unwrap();
    board.transport.resume().unwrap();
    bring_up(&board.transport, VERSION_1, &board.queues());

    let restored = board.transport.restore(&state);

    assert!(matches!(restored, Err(Error::NotPaused { .. })));
}

/// Restores a live device's state after `spoil` changed it.
fn restore_spoilt(spoil: impl FnOnce(&mut TransportState)) -> Result<(), Error> {
    let source = Board::open();
    bring_up(&source.transport, VERSION_1, &source.queues());
    source.transport.pause();
    let mut state = source.transport.state().unwrap();
    spoil(&mut state);
    Board::with_memory(source.memory.clone(), false)
        .transport
        .restore(&state)
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    restore_spoilt(|_| ()).unwrap();
    let spoils: [fn(&mut TransportState); 10] = [
        |state| state.device_id = 2,
        |state| state.status = DRIVER_OK,
        |state| state.status |= 0x100,
        |state| state.driver_features |= 1 << 50,
        |state| state.driver_features = 0,
        |state| state.interrupt_status = 4,
        |state| state.queues.truncate(1),
        |state| state.queues[0].size = 3,
        |state| state.queues[1].used_ring = 0,
        |state| {
            state.device = DeviceState::Console(super::super::console::ConsoleState {
                driver_ready: true,
                ports: Vec::new(),
            });
        },
    ];
    for (index, spoil) in spoils.into_iter().enumerate() {
        let result = restore_spoilt(spoil);
        assert!(
            matches!(result, Err(Error::Unfit { .. })),
            "spoil {index}: {result:?}"
        );
    }
}

#[test]
fn a_state_can_be_serialised() {
    fn serialisable<T: Serialize + serde::de::DeserializeOwned>(_: &T) {}
    let board = Board::new();
    board.transport.pause();

    serialisable(&board.transport.state().unwrap());
}

#[derive(Clone, Debug)]
enum Access {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Vec<u8> },
    Register { offset: u32, value: u32 },
    Memory { offset: u64, data: Vec<u8> },
    Pause,
    Resume,
}

/// Values that mean something to some register, and any other.
fn value() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(3),
        Just(11),
        Just(LIVE),
        0..0x100_u32,
        (0..0x40_u32).prop_map(|page| RAM_START as u32 + page * 0x100),
        any::<u32>(),
    ]
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![0..0x210_u64, any::<u64>()];
    let data = proptest::collection::vec(any::<u8>(), 0..10);
    prop_oneof![
        1 => (offset.clone(), 0..10_usize).prop_map(|(offset, len)| Access::Read { offset, len }),
        1 => (offset, data.clone()).prop_map(|(offset, data)| Access::Write { offset, data }),
        8 => (0..0x40_u32, value()).prop_map(|(word, value)| Access::Register { offset: word * 4, value }),
        2 => (0..0x4000_u64, data).prop_map(|(offset, data)| Access::Memory { offset, data }),
        1 => Just(Access::Pause),
        1 => Just(Access::Resume),
    ]
}

fn perform(board: &Board, access: Access) {
    match access {
        Access::Read { offset, len } => board.transport.read(offset, &mut vec![0; len]),
        Access::Write { offset, data } => board.transport.write(offset, &data),
        Access::Register { offset, value } => board.write(offset, value),
        Access::Memory { offset, data } => {
            board
                .memory
                .write_slice(&data, GuestAddress(RAM_START + offset))
                .unwrap();
        }
        Access::Pause => board.transport.pause(),
        Access::Resume => drop(board.transport.resume()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_access_harms_more_than_the_device(
        live in any::<bool>(),
        accesses in proptest::collection::vec(access(), 0..80),
    ) {
        let board = Board::open();
        if live {
            bring_up(&board.transport, VERSION_1 | EVENT_IDX, &board.queues());
        }

        for access in accesses {
            perform(&board, access);
        }
        board.transport.resume().ok();
        board.set_status(0);

        prop_assert_eq!(board.status(), 0);
        prop_assert!(!board.line.is_high());
    }
}
