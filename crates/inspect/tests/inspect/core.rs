//! Cores, read back by readers that are not ours.

use std::fs::{self, File};
use std::process::Command;

use engine::{RegisterId, RegisterValue, VcpuState};
use inspect::SnapshotMemory;
use inspect::core::{Error, PT_AARCH64_MEMTAG_MTE, Summary, Vmcoreinfo, save, write};
use mte::TagPage;
use object::LittleEndian;
use object::elf::{FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};
use stream::{Metadata, Snapshot, ZERO_PAGE};

use crate::machine::{RAM, TestPage, counting, memory, page, snapshot, tag, tagged, vcpu};

const LE: LittleEndian = LittleEndian;

/// A segment as `object` sees it.
#[derive(Debug, PartialEq, Eq)]
struct Segment {
    kind: u32,
    vaddr: u64,
    paddr: u64,
    memsz: u64,
    data: Vec<u8>,
}

fn segments(file: &[u8]) -> Vec<Segment> {
    let header = FileHeader64::<LittleEndian>::parse(file).unwrap();
    let all = header.program_headers(LE, file).unwrap();
    let segment = |it: &object::elf::ProgramHeader64<LittleEndian>| Segment {
        kind: it.p_type(LE).0,
        vaddr: it.p_vaddr(LE),
        paddr: it.p_paddr(LE),
        memsz: it.p_memsz(LE),
        data: it.data(LE, file).unwrap().to_vec(),
    };
    all.iter().map(segment).collect()
}

/// Owner, type and contents of each note.
fn notes(file: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let header = FileHeader64::<LittleEndian>::parse(file).unwrap();
    let all = header.program_headers(LE, file).unwrap();
    let note = all.iter().find(|it| it.p_type(LE) == PT_NOTE).unwrap();
    let mut notes = note.notes(LE, file).unwrap().unwrap();
    std::iter::from_fn(|| notes.next().unwrap())
        .map(|note| {
            let owner = String::from_utf8_lossy(note.name()).into_owned();
            (owner, note.n_type(LE).0, note.desc().to_vec())
        })
        .collect()
}

fn core_of(snapshot: &Snapshot<Vec<u8>>, vcpus: Vec<VcpuState>) -> (Vec<u8>, Summary) {
    let mut memory = SnapshotMemory::new(snapshot, Some(RAM..RAM + 64), vcpus);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let summary = write(&mut memory, file.as_file_mut()).unwrap();
    (fs::read(file.path()).unwrap(), summary)
}

fn kinds(segments: &[Segment], kind: u32) -> Vec<&Segment> {
    segments
        .iter()
        .filter(|segment| segment.kind == kind)
        .collect()
}

#[test]
fn memory_and_tags_come_back_and_holes_are_in_no_segment() {
    // Two chunks, the second one with a page between those of the first.
    let first = [
        page(RAM, 1, counting()),
        page(RAM + 2, 0, TagPage::filled(tag(9))),
    ];
    let second = [
        page(RAM + 1, 2, TagPage::ZERO),
        page(RAM + 9, 3, counting()),
    ];
    let snapshot = tagged(&[&first, &second]);

    let (file, summary) = core_of(&snapshot, Vec::new());

    let all = segments(&file);
    let [low, high] = kinds(&all, PT_LOAD.0)[..] else {
        panic!("two pieces of memory: {summary:?}")
    };
    assert_eq!(
        (low.paddr, low.vaddr, low.memsz),
        (RAM << 12, RAM << 12, 3 * 4096)
    );
    assert_eq!(low.data, [[1; 4096], [2; 4096], ZERO_PAGE].as_flattened());
    assert_eq!((high.paddr, high.memsz), ((RAM + 9) << 12, 4096));
    let [low_tags, high_tags] = kinds(&all, PT_AARCH64_MEMTAG_MTE)[..] else {
        panic!("tags for both: {summary:?}")
    };
    let tags = [counting(), TagPage::ZERO, TagPage::filled(tag(9))];
    let packed: Vec<u8> = tags.iter().flat_map(|tags| *tags.as_packed()).collect();
    assert_eq!((low_tags.vaddr, low_tags.memsz), (low.vaddr, low.memsz));
    assert_eq!(low_tags.data, packed);
    assert_eq!(high_tags.data, counting().as_packed());
    assert_eq!(low_tags.data.len() as u64, low.memsz / 32);
    assert_eq!((summary.pages, summary.segments), (4, 2));
    assert_eq!(summary.bytes, file.len() as u64);
}

#[test]
fn memory_without_tags_has_no_segments_of_them() {
    let snapshot = snapshot(Metadata::None, &[&[page(RAM, 1, TagPage::ZERO)]]);
    let (file, summary) = core_of(&snapshot, Vec::new());
    assert!(kinds(&segments(&file), PT_AARCH64_MEMTAG_MTE).is_empty());
    assert!(!summary.tags);
}

#[test]
fn memory_in_too_many_pieces_is_joined_over_the_smallest_holes() {
    let far = 3;
    let pages: Vec<TestPage> = (0..10_000)
        .map(|n| page(RAM + n * far, 1, counting()))
        .collect();
    let chunks: Vec<&[TestPage]> = pages.chunks(512).collect();
    let snapshot = tagged(&chunks);

    let (file, summary) = core_of(&snapshot, Vec::new());

    assert_eq!((summary.pages, summary.segments), (10_000, 1));
    let all = segments(&file);
    let last = &kinds(&all, PT_LOAD.0)[0].data;
    assert_eq!(last[4096..3 * 4096], [0; 2 * 4096]);
    assert_eq!(last[last.len() - 1], 1);
    let tags = &kinds(&all, PT_AARCH64_MEMTAG_MTE)[0].data;
    assert_eq!(tags[128..3 * 128], [0; 2 * 128]);
    assert_eq!(&tags[tags.len() - 128..], counting().as_packed());
}

/// All that a thread has: general-purpose registers, and those of SIMD.
fn running(pc: u64, pstate: u64) -> VcpuState {
    let mut registers: Vec<_> = (0..=30)
        .map(|x| (RegisterId::x(x), 100 + u64::from(x)))
        .collect();
    registers.extend([
        (RegisterId::SP, 0x5000),
        (RegisterId::from_kvm(0x6030_0000_0010_0044), 0x51),
        (RegisterId::PC, pc),
        (RegisterId::PSTATE, pstate),
        (RegisterId::from_kvm(0x6020_0000_0010_00d4), 0x11),
        (RegisterId::from_kvm(0x6020_0000_0010_00d5), 0x22),
    ]);
    let mut vcpu = vcpu(&registers);
    let vectors = (0..32).map(|v| RegisterValue {
        id: RegisterId::from_kvm(0x6040_0000_0010_0054 + 4 * v),
        value: vec![v as u8; 16],
    });
    vcpu.registers.extend(vectors);
    vcpu
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn each_vcpu_is_a_thread_with_its_registers() {
    let snapshot = tagged(&[&[page(RAM, 1, counting())]]);
    let vcpus = vec![running(0x8000, 0x3c5), running(0x9000, 0)];

    let (file, _) = core_of(&snapshot, vcpus);

    let notes = notes(&file);
    let kinds: Vec<_> = notes
        .iter()
        .map(|(owner, kind, _)| (owner.as_str(), *kind))
        .collect();
    assert_eq!(kinds, [("CORE", 1), ("CORE", 2), ("CORE", 1), ("CORE", 2)]);
    let (first, second) = (&notes[0].2, &notes[2].2);
    assert_eq!((first.len(), notes[1].2.len()), (392, 528));
    assert_eq!([first[32], second[32]], [1, 2]);
    let registers = |status: &[u8]| {
        (0..34)
            .map(|n| word(status, 112 + 8 * n))
            .collect::<Vec<_>>()
    };
    let general: Vec<u64> = (100..131).collect();
    assert_eq!(registers(first)[..31], general);
    // EL1h has its own stack pointer, EL0 the other.
    assert_eq!(registers(first)[31..], [0x51, 0x8000, 0x3c5]);
    assert_eq!(registers(second)[31..], [0x5000, 0x9000, 0]);
    assert_eq!(notes[1].2[16 * 31..512], [31; 16]);
    assert_eq!(word(&notes[1].2, 512), 0x22 << 32 | 0x11);
}

#[test]
fn the_vectors_of_a_vcpu_with_sve_are_the_low_ends_of_its_own() {
    let snapshot = tagged(&[&[page(RAM, 1, counting())]]);
    let mut saved = running(0x8000, 0);
    saved
        .registers
        .retain(|register| register.value.len() != 16);
    let vectors = (0..32).map(|z| {
        let mut value = vec![0xee; 256];
        value[..16].fill(z as u8 + 1);
        let id = RegisterId::from_kvm(0x6080_0000_0015_0000 | z << 5);
        RegisterValue { id, value }
    });
    saved.registers.extend(vectors);

    let (file, _) = core_of(&snapshot, vec![saved]);

    assert_eq!(notes(&file)[1].2[16..32], [2; 16]);
}

/// A page that begins with the note that Linux makes.
fn with_vmcoreinfo(number: u64, text: &str) -> TestPage {
    let mut data = ZERO_PAGE;
    let head: Vec<u8> = [11, text.len() as u32, 0]
        .iter()
        .flat_map(|it| it.to_le_bytes())
        .collect();
    data[..12].copy_from_slice(&head);
    data[12..23].copy_from_slice(b"VMCOREINFO\0");
    data[24..24 + text.len()].copy_from_slice(text.as_bytes());
    (number, data, TagPage::ZERO)
}

const TEXT: &str = "OSRELEASE=6.12.48\nPAGESIZE=4096\nNUMBER(VA_BITS)=48\n";

#[test]
fn the_guests_description_of_its_kernel_is_found() {
    let snapshot = tagged(&[&[page(RAM, 1, counting()), with_vmcoreinfo(RAM + 7, TEXT)]]);
    let (file, summary) = core_of(&snapshot, Vec::new());
    assert_eq!(summary.vmcoreinfo, Vmcoreinfo::Found);
    assert_eq!(
        notes(&file),
        [("VMCOREINFO".into(), 0, TEXT.as_bytes().to_vec())]
    );
}

#[test]
fn what_only_looks_like_a_description_is_left_out() {
    let other = TEXT.replace("6.12", "6.13");
    let found = |pages: &[TestPage]| core_of(&tagged(&[pages]), Vec::new()).1.vmcoreinfo;

    let nonsense = found(&[with_vmcoreinfo(RAM, "hello\n")]);
    let two = found(&[with_vmcoreinfo(RAM, TEXT), with_vmcoreinfo(RAM + 1, &other)]);
    let copies = found(&[with_vmcoreinfo(RAM, TEXT), with_vmcoreinfo(RAM + 1, TEXT)]);

    assert_eq!(nonsense, Vmcoreinfo::Missing);
    assert_eq!(two, Vmcoreinfo::Ambiguous);
    assert_eq!(copies, Vmcoreinfo::Found);
}

#[test]
fn a_description_that_claims_more_than_there_can_be_is_no_danger() {
    let mut huge = with_vmcoreinfo(RAM, TEXT);
    huge.1[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut long = with_vmcoreinfo(RAM + 1, TEXT);
    long.1[4..8].copy_from_slice(&65536_u32.to_le_bytes());

    let (_, summary) = core_of(&tagged(&[&[huge, long]]), Vec::new());

    // The long one has the memory behind it, which is zeros, and so text.
    assert_eq!(summary.vmcoreinfo, Vmcoreinfo::Found);
}

#[test]
fn a_core_has_its_name_when_it_is_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("core");
    fs::write(&path, "an older file").unwrap();
    let snapshot = tagged(&[&[page(RAM, 1, counting())]]);
    let without_registers = vec![vcpu(&[])];
    let mut broken = SnapshotMemory::new(&snapshot, None, without_registers);

    let failed = save(&mut broken, &path);
    let before = fs::read(&path).unwrap();
    save(&mut memory(&snapshot, 1), &path).unwrap();

    assert!(failed.is_err());
    assert_eq!(before, b"an older file");
    assert!(fs::read(&path).unwrap().starts_with(b"\x7fELF"));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn what_is_no_file_is_not_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let snapshot = tagged(&[&[page(RAM, 1, counting())]]);
    let refused = save(&mut memory(&snapshot, 1), directory.path());
    assert!(matches!(refused, Err(Error::NoFile(_))));
}

#[test]
fn a_core_takes_no_more_room_than_what_is_in_it() {
    use std::os::unix::fs::MetadataExt;
    let mut pages = vec![page(RAM, 1, counting())];
    pages.extend((1..512).map(|n| page(RAM + n, 0, TagPage::ZERO)));
    let snapshot = tagged(&[&pages]);
    let mut file = tempfile::NamedTempFile::new().unwrap();

    write(&mut memory(&snapshot, 512), file.as_file_mut()).unwrap();

    let metadata = File::open(file.path()).unwrap().metadata().unwrap();
    assert!(metadata.len() > 512 * 4096);
    assert!(
        metadata.blocks() * 512 < 128 << 10,
        "{} blocks",
        metadata.blocks()
    );
}

#[test]
fn readelf_sees_the_same_segments_and_threads() {
    let snapshot = tagged(&[&[page(RAM, 1, counting())]]);
    let (file, _) = core_of(&snapshot, vec![running(0x8000, 0)]);
    let stored = tempfile::NamedTempFile::new().unwrap();
    fs::write(stored.path(), file).unwrap();
    let readelf = Command::new("readelf")
        .args(["-lnW"])
        .arg(stored.path())
        .output();
    // Where binutils are not installed the other tests must do.
    let Ok(output) = readelf else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    let wanted = [
        "LOAD",
        "0x0000000040000000",
        "AARCH64_MEMTAG",
        "NT_PRSTATUS",
        "NT_FPREGSET",
    ];
    let missing: Vec<_> = wanted.iter().filter(|it| !text.contains(**it)).collect();
    assert!(
        missing.is_empty() && output.stderr.is_empty(),
        "{missing:?} in {text}"
    );
}
