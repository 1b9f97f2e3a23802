//! The stub against a client that follows a script, on vCPUs of the model. What the guest does is in the script as well: the model
//! executes nothing.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use engine::model::{HostRules, ModelHypervisor, ModelVcpu, ModelVm};
use engine::{DebugExit, GuestDebug, Hypervisor, RegisterId, Vcpu, VcpuFeatures, Vm, VmBuilder};
use gdbstub::common::Tid;
use gdbstub::target::ext::base::multithread::{
    MultiThreadResume, MultiThreadSchedulerLocking, MultiThreadSingleStep,
};
use gdbstub::target::ext::breakpoints::SwBreakpoint;
use mte::TagPage;
use proptest::prelude::*;

use super::breakpoints::BRK;
use super::{Debuggee, End, Error, Event, Last, serve};
use crate::registers::{SCTLR_EL1, TCR_EL1, TTBR0_EL1};
use crate::view::PAGE;

const RAM: u64 = 0x4000_0000;
const PAGES: usize = 4;
const VBAR: u64 = RAM + 0x800;
const VBAR_EL1: RegisterId = RegisterId::system(3, 0, 12, 0, 0);
const ESR_EL1: RegisterId = RegisterId::system(3, 0, 5, 2, 0);

/// Four pages of memory with MMUs off, and two vCPUs.
struct Machine {
    _vm: ModelVm,
    vcpus: Vec<ModelVcpu>,
    memory: Vec<u8>,
    tags: Vec<TagPage>,
    script: VecDeque<Event>,
    /// The vCPUs that went on each time, with what was to stop them, and what was in the first words of memory then.
    resumed: Vec<(Vec<usize>, GuestDebug, [u8; 8])>,
    runs: bool,
}

impl Machine {
    fn new() -> Self {
        let mut builder = ModelHypervisor::new(HostRules::linux(6, 12))
            .new_vm(40)
            .unwrap();
        builder.enable_mte().unwrap();
        let vm = builder.build().unwrap();
        let vcpus: Vec<_> = (0..2)
            .map(|number| vm.create_vcpu(number, VcpuFeatures::default()).unwrap())
            .collect();
        for vcpu in &vcpus {
            vcpu.set_register_u64(SCTLR_EL1, 0).unwrap();
            vcpu.set_register_u64(RegisterId::PC, RAM).unwrap();
            vcpu.set_register_u64(VBAR_EL1, VBAR).unwrap();
        }
        let mut memory = vec![0; PAGES * PAGE as usize];
        memory[..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        Self {
            _vm: vm,
            vcpus,
            memory,
            tags: vec![TagPage::ZERO; PAGES],
            script: VecDeque::new(),
            resumed: Vec::new(),
            runs: false,
        }
    }

    fn place(&self, address: u64, length: usize) -> io::Result<Range<usize>> {
        let start = address.checked_sub(RAM).ok_or(io::ErrorKind::NotFound)? as usize;
        let end = start + length;
        (end <= self.memory.len())
            .then_some(start..end)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn page(&self, page: u64) -> io::Result<usize> {
        Ok(self.place(page * PAGE, PAGE as usize)?.start / PAGE as usize)
    }

    /// Lets the client say all that, and the guest do that when it has.
    fn debug(&mut self, packets: &[&str]) -> (Result<End, Error>, Vec<String>) {
        for packet in packets {
            self.script.push_back(Event::Input(framed(packet)));
        }
        self.play()
    }

    fn play(&mut self) -> (Result<End, Error>, Vec<String>) {
        let mut sent = Vec::new();
        let end = serve(self, &mut sent);
        (end, bodies(&sent))
    }

    /// The answer to the last of the packets.
    fn answer(&mut self, packets: &[&str]) -> String {
        let (_, answers) = self.debug(packets);
        answers.last().unwrap().clone()
    }

    fn stops(&mut self, vcpu: usize, class: u32, far: u64) {
        let exit = DebugExit {
            syndrome: class << 26,
            far,
        };
        self.script.push_back(Event::Stopped { vcpu, exit });
    }

    fn says(&mut self, packet: &str) {
        self.script.push_back(Event::Input(framed(packet)));
    }
}

fn framed(body: &str) -> Vec<u8> {
    let sum = body.bytes().fold(0_u8, u8::wrapping_add);
    format!("${body}#{sum:02x}").into_bytes()
}

/// The bodies of all packets, with repeated characters as they are meant.
fn bodies(sent: &[u8]) -> Vec<String> {
    let sent = String::from_utf8_lossy(sent);
    let packets = sent.split('$').skip(1);
    packets
        .map(|packet| plain(packet.split('#').next().unwrap()))
        .collect()
}

fn plain(body: &str) -> String {
    let mut plain = String::new();
    let mut characters = body.chars();
    while let Some(character) = characters.next() {
        match character {
            '*' => {
                let times = characters.next().unwrap() as usize - 29;
                let last = plain.chars().last().unwrap();
                plain.extend(std::iter::repeat_n(last, times));
            }
            character => plain.push(character),
        }
    }
    plain
}

impl Debuggee for Machine {
    type Vcpu = ModelVcpu;

    fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }
    fn vcpu(&self, number: usize) -> Option<&ModelVcpu> {
        self.vcpus.get(number).filter(|_| !self.runs)
    }
    fn ram(&self) -> Range<u64> {
        RAM..RAM + self.memory.len() as u64
    }
    fn has_tags(&self) -> bool {
        true
    }
    fn read(&self, address: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(&self.memory[self.place(address, data.len())?]);
        Ok(())
    }
    fn write(&mut self, address: u64, data: &[u8]) -> io::Result<()> {
        let place = self.place(address, data.len())?;
        self.memory[place].copy_from_slice(data);
        Ok(())
    }
    fn read_tags(&self, page: u64, tags: &mut TagPage) -> io::Result<()> {
        tags.clone_from(&self.tags[self.page(page)?]);
        Ok(())
    }
    fn write_tags(&mut self, page: u64, tags: &TagPage) -> io::Result<()> {
        let page = self.page(page)?;
        self.tags[page] = tags.clone();
        Ok(())
    }
    fn resume(&mut self, vcpus: &[usize]) -> io::Result<()> {
        let debug = vcpus.first().map(|first| self.vcpus[*first].debug());
        let words = self.memory[..8].try_into().unwrap();
        self.resumed
            .push((vcpus.to_vec(), debug.unwrap_or_default(), words));
        self.runs = true;
        Ok(())
    }
    fn stop(&mut self) {
        self.runs = false;
    }
    fn wait(&mut self) -> Event {
        let event = self.script.pop_front().unwrap_or(Event::Gone);
        if !matches!(event, Event::Input(_)) {
            self.runs = false;
        }
        event
    }
}

const SUPPORTED: &str = "qSupported:multiprocess+;swbreak+;hwbreak+;memory-tagging+";

#[test]
fn memory_tagging_is_among_what_is_supported() {
    let (end, answers) = Machine::new().debug(&[SUPPORTED, "D;1"]);

    assert_eq!(end.unwrap(), End::Detached);
    assert!(
        answers[0].ends_with(";qXfer:features:read+;memory-tagging+"),
        "{answers:?}"
    );
    assert_eq!(answers[1], "OK");
}

#[test]
fn every_vcpu_is_a_thread() {
    let answer = Machine::new().answer(&[SUPPORTED, "qfThreadInfo"]);

    assert_eq!(answer, "mp01.01,p01.02");
}

#[test]
fn registers_are_read_and_written() {
    let mut machine = Machine::new();

    let (_, answers) = machine.debug(&["Hg2", "P3=8877665544332211", "p3", "p20", "p22"]);

    assert_eq!(
        answers[1..4],
        ["OK", "8877665544332211", "0000004000000000"]
    );
    // The model has no vector registers.
    assert_eq!(answers[4], "x".repeat(32));
    assert_eq!(
        machine.vcpus[1].register_u64(RegisterId::x(3)).unwrap(),
        0x1122_3344_5566_7788
    );
}

#[test]
fn the_stack_pointer_is_the_one_in_use() {
    let mut machine = Machine::new();
    machine.vcpus[0]
        .set_register_u64(RegisterId::SP, 0x11)
        .unwrap();
    machine.vcpus[0]
        .set_register_u64(RegisterId::SP_EL1, 0x22)
        .unwrap();

    let (_, answers) = machine.debug(&["Hg1", "p1f", "P21=c4030000", "p1f"]);

    assert_eq!(answers[1..], ["2200000000000000", "OK", "1100000000000000"]);
}

#[test]
fn memory_is_read_and_written_as_far_as_there_is_any() {
    let mut machine = Machine::new();

    let (_, answers) = machine.debug(&[
        "Hg1",
        "m40000000,4",
        "M40000002,2:aabb",
        "m40000000,4",
        "m40003ffe,4",
        "m40004000,4",
        "M40003fff,2:0102",
        "m0,4",
    ]);

    assert_eq!(
        answers[1..],
        ["01020304", "OK", "0102aabb", "0000", "E0e", "E0e", "E0e"]
    );
}

#[test]
fn a_read_that_fits_no_packet_is_refused() {
    let mut machine = Machine::new();

    let (_, answers) = machine.debug(&["m40000000,ffffffffffffffff", "mffffffffffffffff,2", "mx"]);

    assert_eq!(answers, ["E16", "E16", "E16"]);
}

#[test]
fn tags_are_set_and_read_by_their_packets() {
    let mut machine = Machine::new();

    let (_, answers) = machine.debug(&[
        "QMemTags:40000ff0,20:1:0708",
        "qMemTags:40000fe0,40:1",
        "qMemTags:0500000040000ff8,8:0",
        "qIsAddressTagged:40003fff",
        "qIsAddressTagged:40004000",
        "qMemTags:40003ff0,20:1",
        "qMemTags:40000000,10:2",
        "QMemTags:40000000,10:1:10",
        "QMemTags:40000000,10:0:01",
        "qMemTags:nonsense",
        "qMemTags:40000000,ffffffffffffffff:1",
    ]);

    assert_eq!(
        answers,
        [
            "OK",
            "m00070800",
            "m05",
            "01",
            "00",
            "E0e",
            "E16",
            "E16",
            "E16",
            "E16",
            "E0e"
        ]
    );
    assert_eq!(machine.tags[0].get(255).value(), 7);
    assert_eq!(machine.tags[1].get(0).value(), 8);
}

#[test]
fn lldb_is_told_which_regions_can_have_tags() {
    let mut machine = Machine::new();

    let (_, answers) = machine.debug(&[
        "qMemoryRegionInfo:3",
        "qMemoryRegionInfo:0a00000040001234",
        "qMemoryRegionInfo:40004000",
        "qMemoryRegionInfo:nonsense",
    ]);

    assert_eq!(
        answers,
        [
            "start:0;size:40000000;",
            "start:40001000;size:3000;permissions:rwx;flags:mt;",
            "start:40004000;size:ffffffffbfffbfff;",
            "E16",
        ]
    );
}

#[test]
fn regions_are_those_of_the_vcpus_tables() {
    let mut machine = Machine::new();
    // 39 bits, granules of 4 KiB: the only table maps the second GiB to itself.
    let table = machine.place(RAM + 3 * PAGE + 8, 8).unwrap();
    machine.memory[table].copy_from_slice(&(RAM | 0x401).to_le_bytes());
    for (register, value) in [
        (TCR_EL1, 25 << 16 | 25),
        (TTBR0_EL1, RAM + 3 * PAGE),
        (SCTLR_EL1, 1),
    ] {
        machine.vcpus[0].set_register_u64(register, value).unwrap();
    }

    let (_, answers) = machine.debug(&[
        "qMemoryRegionInfo:1000",
        "qMemoryRegionInfo:40001000",
        "qMemoryRegionInfo:40004000",
    ]);

    assert_eq!(answers[0], "start:1000;size:3ffff000;");
    assert_eq!(
        answers[1],
        "start:40001000;size:3000;permissions:rwx;flags:mt;"
    );
    // What no table can map is not mapped either.
    assert!(
        answers[2].starts_with("start:40004000;size:ffff"),
        "{answers:?}"
    );
}

#[test]
fn a_tagged_pointer_leads_to_the_tags_of_what_it_points_at() {
    let mut machine = Machine::new();

    let answer = machine.answer(&["QMemTags:0a00000040000020,10:1:0a", "qMemTags:40000020,1:1"]);

    assert_eq!(answer, "m0a");
}

#[test]
fn a_software_breakpoint_is_in_memory_and_seen_by_nobody() {
    let mut machine = Machine::new();
    machine.says("Z0,40000004,4");
    machine.says("m40000000,8");
    machine.says("vCont;c");
    machine.vcpus[1]
        .set_register_u64(RegisterId::PC, RAM + 4)
        .unwrap();
    machine.stops(1, 0x3c, 0);
    machine.says("D");

    let (end, answers) = machine.play();

    assert_eq!(end.unwrap(), End::Detached);
    assert_eq!(answers[..2], ["OK", "0102030405060708"]);
    assert_eq!(answers[2], "T05thread:02;swbreak:;");
    let (vcpus, debug, words) = &machine.resumed[0];
    assert_eq!(vcpus[..], [0, 1]);
    assert!(debug.software_breakpoints);
    assert_eq!(words[4..], BRK);
    assert_eq!(machine.memory[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn a_client_that_vanishes_leaves_no_breakpoint() {
    let mut machine = Machine::new();

    let (end, _) = machine.debug(&["Z0,40000000,4", "Z0,40000000,4", "Z0,40000004,4", "vCont;c"]);

    assert_eq!(end.unwrap(), End::Gone);
    assert_eq!(machine.resumed[0].2[..4], BRK);
    assert_eq!(machine.memory[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
    assert!(!machine.runs);
}

#[test]
fn a_breakpoint_that_the_guest_wrote_over_is_left_as_the_guest_wants_it() {
    let mut machine = Machine::new();
    let mut target = super::Stub::new(&mut machine);
    assert!(matches!(target.add_sw_breakpoint(RAM, 4), Ok(true)));

    target.machine().memory[..4].fill(9);
    drop(target);

    assert_eq!(machine.memory[..4], [9; 4]);
}

#[test]
fn a_brk_of_the_guests_own_is_the_guests_and_it_goes_on() {
    let mut machine = Machine::new();
    machine.says("Z0,40000004,4");
    machine.says("vCont;c");
    machine.stops(0, 0x3c, 0);
    machine.says("D");

    let (_, answers) = machine.play();

    let vcpu = &machine.vcpus[0];
    // Of the breakpoint and of the detaching.
    assert_eq!(answers, ["OK", "OK"]);
    assert_eq!(machine.resumed.len(), 2);
    assert_eq!(vcpu.register_u64(RegisterId::PC).unwrap(), VBAR + 0x200);
    assert_eq!(vcpu.register_u64(RegisterId::ELR_EL1).unwrap(), RAM);
    assert_eq!(vcpu.register_u64(ESR_EL1).unwrap(), 0x3c << 26);
}

#[test]
fn one_vcpu_steps_while_the_others_stand() {
    let mut machine = Machine::new();
    machine.says(SUPPORTED);
    machine.says("vCont;s:p1.2");
    machine.stops(1, 0x32, 0);
    machine.says("D;1");

    let (_, answers) = machine.play();

    assert_eq!(machine.resumed[0].0, [1]);
    assert!(machine.resumed[0].1.single_step);
    assert_eq!(answers[1], "T05thread:p01.02;");
}

#[test]
fn a_step_of_el1_masks_interrupts_and_gives_them_back() {
    let mut machine = Machine::new();
    let pstate = |machine: &Machine| machine.vcpus[0].register_u64(RegisterId::PSTATE).unwrap();
    machine.vcpus[0]
        .set_register_u64(RegisterId::PSTATE, 0x5)
        .unwrap();
    let mut target = super::Stub::new(&mut machine);
    target.set_resume_action_step(Tid::MIN, None).unwrap();
    target.set_resume_action_scheduler_lock().unwrap();
    target.resume().unwrap();
    let during = pstate(target.machine());
    target.machine().runs = false;
    target
        .stopped(
            0,
            DebugExit {
                syndrome: 0x32 << 26,
                far: 0,
            },
        )
        .unwrap();
    drop(target);

    assert_eq!(during, 0xc5);
    assert_eq!(pstate(&machine), 0x5);
}

#[test]
fn hardware_breakpoints_and_watchpoints_reach_every_vcpu_up_to_their_number() {
    let mut machine = Machine::new();
    machine.says("Z1,40000008,4");
    for address in ["1000", "1008", "1010", "1018", "1020"] {
        machine.says(&format!("Z2,4000{address},8"));
    }
    machine.says("Z3,40001002,7");
    machine.says("vCont;c");
    machine.stops(0, 0x34, 0x0b00_0000_4000_1012);
    machine.says("D");

    let (_, answers) = machine.play();

    assert_eq!(answers[..7], ["OK", "OK", "OK", "OK", "OK", "E16", "E16"]);
    assert_eq!(answers[7], "T05thread:01;watch:40001012;");
    let debug = &machine.resumed[0].1;
    assert_eq!((debug.breakpoints.len(), debug.watchpoints.len()), (1, 4));
    assert!(!debug.software_breakpoints);
}

#[test]
fn an_interrupt_stops_a_guest_that_runs_and_none_that_stands() {
    let mut machine = Machine::new();
    machine.script.push_back(Event::Input(vec![3]));
    machine.says("vCont;c");
    machine.script.push_back(Event::Input(vec![3]));
    machine.says("p20");

    let (_, answers) = machine.play();

    assert_eq!(answers, ["T02thread:01;", "0000004000000000"]);
    assert_eq!(machine.resumed.len(), 1);
}

#[test]
fn while_the_guest_runs_nothing_of_it_is_told() {
    let (_, answers) = Machine::new().debug(&["vCont;c", "g", "m40000000,4"]);

    assert_eq!(answers, ["E16", "E16"]);
}

#[test]
fn the_end_of_the_machine_is_told() {
    let mut machine = Machine::new();
    machine.says("vCont;c");
    machine.script.push_back(Event::Ended(Last {
        killed: false,
        words: "off".into(),
    }));

    let (end, answers) = machine.play();

    assert_eq!(end.unwrap(), End::Ended);
    // "off" and the end of the line.
    assert_eq!(answers, ["O6f66660a", "W00"]);
}

#[test]
fn a_machine_that_cannot_go_on_was_killed() {
    let mut machine = Machine::new();
    machine.says("vCont;c");
    machine.script.push_back(Event::Ended(Last {
        killed: true,
        words: String::new(),
    }));

    let (_, answers) = machine.play();

    assert_eq!(answers, ["O0a", "X09"]);
}

#[test]
fn a_client_that_waits_for_nothing_is_not_told_of_the_end() {
    let mut machine = Machine::new();
    machine.script.push_back(Event::Ended(Last {
        killed: false,
        words: "off".into(),
    }));

    let (end, answers) = machine.play();

    assert_eq!(end.unwrap(), End::Ended);
    assert!(answers.is_empty(), "{answers:?}");
}

#[test]
fn a_client_cannot_kill_the_machine() {
    let (end, _) = Machine::new().debug(&["k"]);

    assert_eq!(end.unwrap(), End::Detached);
}

#[test]
fn a_packet_with_a_wrong_checksum_ends_the_connection() {
    let mut machine = Machine::new();
    machine.script.push_back(Event::Input(b"$g#00".to_vec()));

    let (end, _) = machine.play();

    assert!(matches!(end, Err(Error::Protocol(_))), "{end:?}");
}

#[test]
fn a_packet_without_end_ends_the_connection() {
    let mut machine = Machine::new();
    machine.script.push_back(Event::Input(vec![b'$'; 5000]));

    let (end, _) = machine.play();

    assert!(matches!(end, Err(Error::Protocol(_))), "{end:?}");
}

proptest! {
    #[test]
    fn whatever_comes_ends_or_is_answered_and_the_guest_is_as_it_was(
        pieces in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40),
            "[a-zA-Z?!]{1,2}[0-9a-f:;,=.+-]{0,30}".prop_map(|body| framed(&body)),
            "(Z0,4000000[048c],4|vCont;[cs]:[12]|qMemTags:[0-9a-f]{1,9},[0-9a-f]{1,5}:[01]|qMemoryRegionInfo:[0-9a-f]{1,16}|D|g)"
                .prop_map(|body| framed(&body)),
        ], 0..20),
    ) {
        let mut machine = Machine::new();
        machine.script.extend(pieces.into_iter().map(Event::Input));

        let _ = machine.play();

        prop_assert!(!machine.runs);
        prop_assert!(!machine.memory.chunks(4).any(|word| word == BRK));
    }
}
