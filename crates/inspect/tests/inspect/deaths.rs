//! What a guest died of: kernel logs as Linux lays them out, and as it does not; the last exceptions of vCPUs.

use engine::RegisterId;
use inspect::{Death, End, Error, Place, Report, SnapshotMemory, kernel_log};
use mte::TagPage;
use stream::{Page, Snapshot, ZERO_PAGE};

use crate::machine::{RAM, TestPage, counting, memory, page, tag, tagged, vcpu};

/// Guest-physical address of the first page of RAM.
const START: u64 = RAM * 4096;
const PRB: u64 = START + 0x1000;
const DESCRIPTORS: u64 = START + 0x2000;
const INFOS: u64 = START + 0x3000;
const TEXT: u64 = START + 0x4000;
/// Bytes of a `struct prb_desc`.
const DESCRIPTOR: u64 = 24;
/// Bytes of a `struct printk_info`.
const INFO: u64 = 88;
/// Of the ring of text.
const SIZE_BITS: u64 = 12;

const VMCOREINFO: &str = "OSRELEASE=6.12.0
PAGESIZE=4096
SYMBOL(prb)=40001f00
OFFSET(printk_ringbuffer.desc_ring)=0
OFFSET(printk_ringbuffer.text_data_ring)=48
OFFSET(prb_desc_ring.count_bits)=0
OFFSET(prb_desc_ring.descs)=8
OFFSET(prb_desc_ring.infos)=16
OFFSET(prb_desc_ring.head_id)=24
OFFSET(prb_desc_ring.tail_id)=32
OFFSET(prb_data_ring.size_bits)=0
OFFSET(prb_data_ring.data)=8
SIZE(prb_desc)=24
OFFSET(prb_desc.state_var)=0
OFFSET(prb_desc.text_blk_lpos)=8
OFFSET(prb_data_blk_lpos.begin)=0
OFFSET(prb_data_blk_lpos.next)=8
SIZE(printk_info)=88
OFFSET(printk_info.text_len)=16
";

/// A page being written.
struct Writing(Page);

impl Writing {
    fn put(&mut self, address: u64, bytes: &[u8]) {
        let at = (address % 4096) as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn number(&mut self, address: u64, value: u64) {
        self.put(address, &value.to_le_bytes());
    }
}

/// A kernel that logged these records, of which the first has number 5, in a ring of 8.
fn logged(vmcoreinfo: &str, records: &[&str]) -> Vec<TestPage> {
    let mut pages: [Writing; 5] = std::array::from_fn(|_| Writing(ZERO_PAGE));
    let [note, prb, descriptors, infos, text] = &mut pages;
    note.put(0, &11_u32.to_le_bytes());
    note.put(4, &(vmcoreinfo.len() as u32).to_le_bytes());
    note.put(12, b"VMCOREINFO\0");
    note.put(24, vmcoreinfo.as_bytes());
    let last = 5 + records.len() as u64 - 1;
    prb.number(PRB + 0xf00, PRB);
    for (offset, value) in [(0, 3), (8, DESCRIPTORS), (16, INFOS), (24, last), (32, 5)] {
        prb.number(PRB + offset, value);
    }
    prb.number(PRB + 48, SIZE_BITS);
    prb.number(PRB + 56, TEXT);
    // The ring has gone around once.
    let mut begin = 1 << SIZE_BITS;
    for (record, id) in records.iter().zip(5..) {
        let next = begin + (8 + record.len() as u64).next_multiple_of(8);
        let descriptor = DESCRIPTORS + id % 8 * DESCRIPTOR;
        descriptors.number(descriptor, 2 << 62 | id);
        descriptors.number(descriptor + 8, begin);
        descriptors.number(descriptor + 16, next);
        infos.put(
            INFOS + id % 8 * INFO + 16,
            &(record.len() as u16).to_le_bytes(),
        );
        text.put(begin + 8, record.as_bytes());
        begin = next;
    }
    pages
        .into_iter()
        .zip(RAM..)
        .map(|(page, number)| (number, page.0, TagPage::ZERO))
        .collect()
}

const ESR_EL1: RegisterId = RegisterId::system(3, 0, 5, 2, 0);
const FAR_EL1: RegisterId = RegisterId::system(3, 0, 6, 0, 0);

/// A machine with these pages and one vCPU, whose MMU is off.
fn machine(
    snapshot: &Snapshot<Vec<u8>>,
    syndrome: u64,
    address: u64,
) -> SnapshotMemory<'_, Vec<u8>> {
    let registers = [
        (RegisterId::PC, 0x4000_1234),
        (RegisterId::PSTATE, 0x3c5),
        (RegisterId::system(3, 0, 1, 0, 0), 0),
        (RegisterId::system(3, 0, 2, 0, 0), 0),
        (RegisterId::system(3, 0, 2, 0, 1), 0),
        (RegisterId::system(3, 0, 2, 0, 2), 0),
        (RegisterId::from_kvm(0x6030_0000_0010_0046), 0x4000_1000),
        (ESR_EL1, syndrome),
        (FAR_EL1, address),
    ];
    SnapshotMemory::new(snapshot, Some(RAM..RAM + 64), vec![vcpu(&registers)])
}

const CALL: u64 = 0x5600_0000;
const TAG_CHECK: u64 = 0x9600_0051;

#[test]
fn a_kernels_log_is_read_from_its_memory() {
    let records = [
        "one",
        "two and more",
        "Kernel panic - not syncing: on purpose",
        "---",
    ];
    let pages = logged(VMCOREINFO, &records);
    let snapshot = tagged(&[&pages]);
    let log = kernel_log(&mut machine(&snapshot, CALL, 0), 100).unwrap();
    assert_eq!(log.unwrap(), records);
    let last = kernel_log(&mut machine(&snapshot, CALL, 0), 2).unwrap();
    assert_eq!(last.unwrap(), records[2..]);
}

#[test]
fn a_descriptor_that_was_used_again_has_no_old_record() {
    let mut pages = logged(VMCOREINFO, &["one", "two", "three"]);
    let place = (6 * DESCRIPTOR) as usize;
    pages[2].1[place..place + 8].copy_from_slice(&(2 << 62 | 14_u64).to_le_bytes());
    let snapshot = tagged(&[&pages]);
    let log = kernel_log(&mut machine(&snapshot, CALL, 0), 100).unwrap();
    assert_eq!(log.unwrap(), ["one", "three"]);
}

#[test]
fn a_kernel_that_panicked_says_so() {
    let records = ["a", "Kernel panic - not syncing: on purpose\u{1b}[31m", "b"];
    let pages = logged(VMCOREINFO, &records);
    let snapshot = tagged(&[&pages]);
    let death = Death::of(&mut machine(&snapshot, CALL, 0), End::Asked).unwrap();
    assert_eq!(
        death.unwrap().to_string(),
        "its kernel panicked: on purpose [31m\nvCPU 0 stands at 0x40001234 in EL1"
    );
}

#[test]
fn a_guest_that_only_reset_its_machine_has_not_died() {
    let pages = logged(VMCOREINFO, &["reboot: Restarting system"]);
    let snapshot = tagged(&[&pages]);
    for syndrome in [CALL, 0x9200_0047, 0x9600_0006, 0x9200_0051] {
        let death = Death::of(&mut machine(&snapshot, syndrome, 0), End::Asked).unwrap();
        assert!(death.is_none(), "{syndrome:#x}");
    }
}

#[test]
fn a_tag_fault_is_told_with_the_tags_around_it() {
    let snapshot = tagged(&[&[page(RAM, 0x41, counting())]]);
    let pointer = tag(0xb).insert_into(START + 0x258);
    let death = Death::of(&mut machine(&snapshot, TAG_CHECK, pointer), End::Asked).unwrap();
    assert_eq!(
        death.unwrap().to_string(),
        "its kernel says nothing of a panic
vCPU 0 stands at 0x40001234 in EL1; its last exception was a tag check fault: a write by a pointer whose tag is not that of the memory
ESR_EL1 0x96000051, from EL1 at 0x40001000 unless an interrupt came since (ELR_EL1)
pointer 0x0b00000040000258, tag b, is guest-physical 0x40000258, memory tag 5: they do not match
tags from 0x00000000400001d0, a granule of 16 bytes each:
  d e f 0 1 2 3 4[5]6 7 8 9 a b c
0x0000000040000250  41 41 41 41 41 41 41 41 41 41 41 41 41 41 41 41  AAAAAAAAAAAAAAAA
0x0000000040000260  41 41 41 41 41 41 41 41 41 41 41 41 41 41 41 41  AAAAAAAAAAAAAAAA
0x0000000040000270  41 41 41 41 41 41 41 41 41 41 41 41 41 41 41 41  AAAAAAAAAAAAAAAA
0x0000000040000280  41 41 41 41 41 41 41 41 41 41 41 41 41 41 41 41  AAAAAAAAAAAAAAAA"
    );
}

#[test]
fn of_a_vcpu_that_cannot_go_on_every_exception_is_told() {
    let snapshot = tagged(&[&[page(RAM, 0, counting())]]);
    let death = Death::of(&mut machine(&snapshot, CALL, 0), End::Stuck).unwrap();
    let words = death.unwrap().to_string();
    assert!(
        words.contains("its last exception was a system call"),
        "{words}"
    );
}

#[test]
fn a_log_that_is_none_is_not_read() {
    for (from, to) in [
        ("SYMBOL(prb)=40001f00", "SYMBOL(prb)=ffff000040001f00"),
        ("SYMBOL(prb)", "SYMBOL(other)"),
        ("SIZE(prb_desc)=24", "SIZE(prb_desc)=0"),
        (
            "OFFSET(prb_desc_ring.descs)=8",
            "OFFSET(prb_desc_ring.descs)=99999999999",
        ),
        (
            "OFFSET(prb_desc_ring.count_bits)=0",
            "OFFSET(prb_desc_ring.count_bits)=8",
        ),
    ] {
        let pages = logged(&VMCOREINFO.replace(from, to), &["one"]);
        let snapshot = tagged(&[&pages]);
        let log = kernel_log(&mut machine(&snapshot, CALL, 0), 100).unwrap();
        assert_eq!(log.unwrap_or_default(), [""; 0], "{to}");
    }
}

#[test]
fn a_pointer_at_the_end_of_ram_shows_what_there_is() {
    let snapshot = tagged(&[&[page(RAM, 7, counting())]]);
    let place = Place::of(&mut memory(&snapshot, 1), None, START + 0xff8).unwrap();
    assert_eq!(place.memory_tag(), Some(tag(0xf)));
    assert_eq!(place.data, [7; 16]);
    assert_eq!(place.tags.iter().flatten().count(), 9);
}

#[test]
fn a_vcpu_that_is_not_there_has_no_report() {
    let snapshot = tagged(&[&[page(RAM, 7, counting())]]);
    let error = Report::of(&mut memory(&snapshot, 1), 3).unwrap_err();
    assert!(matches!(
        error,
        Error::NoVcpu {
            wanted: 3,
            known: 0
        }
    ));
}
