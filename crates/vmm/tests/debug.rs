//! A machine on the reference model in a debugger's hands.

use std::fs;
use std::thread;
use std::time::Duration;

use engine::model::{Guest, HostRules, ModelHypervisor, ModelVcpu, Step};
use engine::{DebugExit, GuestDebug, PowerState, RegisterId, Result, SystemEvent, Vcpu};
use mte::{Tag, TagPage};
use tempfile::TempDir;
use vmm::config::{MachineConfig, MemorySize};
use vmm::console::{Console, ConsoleConfig};
use vmm::layout::{PAGE_SIZE, RAM_START};
use vmm::machine::debug::{Debugged, Woken};
use vmm::machine::{Ending, Machine};
use vmm::memory::TagAccess;

/// Where nothing is.
const FREE: u64 = RAM_START + (16 << 20);
const COUNT: RegisterId = RegisterId::x(1);
/// What the guest is to do.
const ORDER: RegisterId = RegisterId::x(2);
const STEP: DebugExit = DebugExit {
    syndrome: 0x32 << 26,
    far: 0,
};
const BRK: DebugExit = DebugExit {
    syndrome: 0x3c << 26,
    far: 0,
};

/// Counts in a register, and comes to a BRK at each hundred that a debugger hears of. With order 1 it switches the machine off.
struct Counting;

impl Guest for Counting {
    fn step(&self, vcpu: &mut ModelVcpu) -> Result<Step> {
        if vcpu.register_u64(ORDER)? == 1 {
            return Ok(Step::System(SystemEvent::Off));
        }
        let count = vcpu.register_u64(COUNT)? + 1;
        vcpu.set_register_u64(COUNT, count)?;
        let debug = vcpu.debug();
        Ok(match count % 100 {
            _ if debug.single_step => Step::Debug(STEP),
            0 if debug.software_breakpoints => Step::Debug(BRK),
            _ => Step::Continue,
        })
    }
}

/// A machine of two vCPUs, both on.
struct Host {
    _folder: TempDir,
    _console: Console,
    machine: Machine<ModelHypervisor>,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let payload = folder.path().join("payload");
        fs::write(&payload, [0; 8]).unwrap();
        let config = MachineConfig {
            flat: Some(payload),
            memory: MemorySize(32 << 20),
            tag_access: TagAccess::Ioctl,
            console: ConsoleConfig::Off,
            cpus: 2,
            ..MachineConfig::default()
        };
        let hypervisor = ModelHypervisor::new(HostRules::linux(6, 12)).with_guest(Counting);
        let mut console = Console::open(&ConsoleConfig::Off).unwrap();
        let mut machine = Machine::new(&hypervisor, &config, &mut console).unwrap();
        let debugged = machine.debug().unwrap();
        for number in 0..2 {
            let vcpu = debugged.vcpu(number).unwrap();
            vcpu.set_power_state(PowerState::On).unwrap();
            vcpu.set_register_u64(ORDER, 0).unwrap();
            vcpu.set_register_u64(COUNT, 0).unwrap();
        }
        drop(debugged);
        Self {
            _folder: folder,
            _console: console,
            machine,
        }
    }
}

type Hands<'m> = Debugged<'m, ModelHypervisor>;

fn count(debugged: &Hands<'_>, number: usize) -> u64 {
    let vcpu = debugged.vcpu(number).unwrap();
    vcpu.register_u64(COUNT).unwrap()
}

fn set(debugged: &Hands<'_>, number: usize, debug: &GuestDebug) {
    debugged.vcpu(number).unwrap().set_debug(debug).unwrap();
}

fn stepping() -> GuestDebug {
    GuestDebug {
        single_step: true,
        ..GuestDebug::default()
    }
}

fn breaking() -> GuestDebug {
    GuestDebug {
        software_breakpoints: true,
        ..GuestDebug::default()
    }
}

#[test]
fn a_vcpu_steps_while_the_others_stand() {
    let mut host = Host::new();
    let mut debugged = host.machine.debug().unwrap();
    set(&debugged, 1, &stepping());

    debugged.resume(&[1]).unwrap();
    let woken = debugged.wait();

    assert_eq!(
        woken,
        Woken::Stopped {
            vcpu: 1,
            exit: STEP
        }
    );
    assert_eq!((count(&debugged, 0), count(&debugged, 1)), (0, 1));
}

#[test]
fn all_vcpus_stop_where_one_comes_to_a_breakpoint() {
    let mut host = Host::new();
    let mut debugged = host.machine.debug().unwrap();
    set(&debugged, 0, &breaking());

    debugged.resume(&[0, 1]).unwrap();
    assert!(debugged.vcpu(0).is_none() && debugged.vcpu(1).is_none());
    let woken = debugged.wait();
    let other = count(&debugged, 1);
    thread::sleep(Duration::from_millis(20));

    assert_eq!(woken, Woken::Stopped { vcpu: 0, exit: BRK });
    assert_eq!(count(&debugged, 0), 100);
    assert_eq!(count(&debugged, 1), other);
}

#[test]
fn vcpus_that_run_are_stopped_where_they_are_and_somebodys_call_is_not_lost() {
    let mut host = Host::new();
    let handle = host.machine.handle();
    let mut debugged = host.machine.debug().unwrap();

    debugged.resume(&[0, 1]).unwrap();
    handle.interrupt();
    assert_eq!(debugged.wait(), Woken::Interrupted);
    handle.interrupt();
    debugged.stop();

    assert_eq!(debugged.wait(), Woken::Interrupted);
    assert!(debugged.vcpu(0).is_some() && debugged.vcpu(1).is_some());
}

#[test]
fn a_machine_without_its_debugger_goes_on_and_stops_at_nothing() {
    let mut host = Host::new();
    host.machine.resume().unwrap();
    let debugged = host.machine.debug().unwrap();
    set(&debugged, 0, &stepping());
    let before = count(&debugged, 0);
    drop(debugged);

    thread::sleep(Duration::from_millis(20));
    let debugged = host.machine.debug().unwrap();

    assert!(count(&debugged, 0) > before);
    assert_eq!(debugged.vcpu(0).unwrap().debug(), GuestDebug::default());
}

#[test]
fn a_machine_that_did_not_run_does_not_when_its_debugger_is_gone() {
    let mut host = Host::new();
    let mut debugged = host.machine.debug().unwrap();
    set(&debugged, 0, &stepping());
    debugged.resume(&[0]).unwrap();
    debugged.wait();
    drop(debugged);

    thread::sleep(Duration::from_millis(20));

    assert!(!host.machine.is_running());
    assert_eq!(count(&host.machine.debug().unwrap(), 0), 1);
}

#[test]
fn a_guest_that_ends_its_machine_ends_the_debugging_and_the_machine_says_so() {
    let mut host = Host::new();
    let mut debugged = host.machine.debug().unwrap();
    let vcpu = debugged.vcpu(1).unwrap();
    vcpu.set_register_u64(ORDER, 1).unwrap();

    debugged.resume(&[0, 1]).unwrap();
    let woken = debugged.wait();
    drop(debugged);

    assert_eq!(woken, Woken::Ended(Some(Ending::Off)));
    assert_eq!(host.machine.run().unwrap(), Ending::Off);
}

#[test]
fn memory_is_written_and_read() {
    let mut host = Host::new();
    let mut debugged = host.machine.debug().unwrap();
    let mut data = [0xff; 16];

    debugged.write(FREE + 8, b"written").unwrap();
    debugged.read(FREE + 6, &mut data).unwrap();

    assert_eq!(&data, b"\0\0written\0\0\0\0\0\0\0");
}

#[test]
fn a_hole_is_read_as_zeros_and_stays_one() {
    let mut host = Host::new();
    let memory = host.machine.memory().clone();
    let debugged = host.machine.debug().unwrap();
    let mut data = [0xff; 8];

    debugged.read(FREE + PAGE_SIZE - 4, &mut data).unwrap();

    assert_eq!(data, [0; 8]);
    let mut populated = memory.populated(FREE..FREE + 2 * PAGE_SIZE);
    assert!(populated.next().is_none());
}

#[test]
fn a_page_whose_tags_are_written_has_them_and_counts_as_written() {
    let mut host = Host::new();
    let memory = host.machine.memory().clone();
    let mut debugged = host.machine.debug().unwrap();
    let mut tags = TagPage::ZERO;
    tags.set(7, Tag::MAX);
    memory.take_vmm_writes();

    debugged.write_tags(FREE / PAGE_SIZE, &tags).unwrap();
    let mut read = TagPage::ZERO;
    debugged.read_tags(FREE / PAGE_SIZE, &mut read).unwrap();

    let page = (FREE - RAM_START) / PAGE_SIZE;
    let written = memory.take_vmm_writes()[page as usize / 64];
    assert_eq!(read, tags);
    assert_eq!(written, 1 << (page % 64));
}

#[test]
fn what_is_no_ram_is_refused() {
    let mut host = Host::new();
    let mut debugged = host.machine.debug().unwrap();
    let end = debugged.ram().end;
    let mut tags = TagPage::ZERO;

    let refusals = [
        debugged.read(RAM_START - 1, &mut [0; 2]),
        debugged.read(end - 1, &mut [0; 2]),
        debugged.read(u64::MAX, &mut [0; 2]),
        debugged.write(end, &[0]),
        debugged.read_tags(0, &mut tags),
        debugged.read_tags(u64::MAX, &mut tags),
        debugged.write_tags(end / PAGE_SIZE, &TagPage::ZERO),
    ];

    assert!(refusals.iter().all(std::result::Result::is_err));
}
