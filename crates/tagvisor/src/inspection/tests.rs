//! Reader and VMM, each at an end of a socket.

use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use engine::{PendingSError, PowerState, RegisterId, RegisterValue};
use inspect::TaggedMemory;
use mte::TagPage;
use stream::{Metadata, Page};
use vmm::layout::{PAGE_SIZE, RAM_START};

use super::*;

const FIRST: u64 = RAM_START / PAGE_SIZE;
/// More pages than one answer has.
const PAGES: u64 = 600;

/// 600 pages behind a hole of one page, each full of the low byte of its number, with tags of its own.
struct Source;

impl PageSource for Source {
    fn metadata(&self) -> Metadata {
        Metadata::ArmMte
    }

    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let start = from.max(FIRST + 1);
        let end = FIRST + 1 + PAGES;
        Ok((start < end).then_some(start..end))
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        if first + data.len() as u64 > FIRST + 1 + PAGES {
            return Err(io::Error::other("it is no memory of this machine"));
        }
        for ((data, tags), page) in data.iter_mut().zip(tags).zip(first..) {
            data.fill(page as u8);
            *tags = TagPage::pack(&[page as u8 & 0xf; 256]);
        }
        Ok(())
    }
}

fn vcpu(pc: u64) -> VcpuState {
    VcpuState {
        registers: vec![RegisterValue {
            id: RegisterId::PC,
            value: pc.to_le_bytes().to_vec(),
        }],
        power: PowerState::On,
        serror: PendingSError::default(),
    }
}

/// A lease, and what hears of its end.
fn lease() -> (Lease, mpsc::Receiver<()>) {
    let (done, released) = mpsc::channel();
    let lease = Lease {
        ram: FIRST..FIRST + 1024,
        vcpus: vec![vcpu(0x1000), vcpu(0x2000)],
        pages: Box::new(Source),
        file: None,
        hold: Some(Hold::new(done)),
    };
    (lease, released)
}

/// Serves a lease on a thread of its own; the other end of its connection.
fn served(lease: Lease) -> UnixStream {
    let (here, there) = UnixStream::pair().unwrap();
    thread::spawn(move || serve(&lease, &there));
    here
}

#[test]
fn a_reader_sees_the_vcpus_and_the_pages_with_their_tags() {
    let (lease, _released) = lease();
    let vcpus = lease.vcpus.clone();
    let mut memory = Reader::new(served(lease)).unwrap().memory().unwrap();
    let mut data = vec![[0xff; 4096]; 602];
    let mut tags = vec![TagPage::ZERO; 602];

    memory.read(FIRST, &mut data, &mut tags).unwrap();

    assert_eq!(memory.vcpus(), vcpus);
    assert!(memory.has_tags());
    assert_eq!(memory.ram(), FIRST..FIRST + 1024);
    assert_eq!(memory.next_run(0).unwrap(), Some(FIRST + 1..FIRST + 601));
    let right = (0..602).all(|page| {
        let expected = if (1..601).contains(&page) {
            (FIRST + page) as u8
        } else {
            0
        };
        data[page as usize] == [expected; 4096]
            && tags[page as usize] == TagPage::pack(&[expected & 0xf; 256])
    });
    assert!(right);
}

#[test]
fn a_reader_that_wants_tags_alone_gets_them() {
    let (lease, _released) = lease();
    let mut memory = Reader::new(served(lease)).unwrap().memory().unwrap();
    let mut seen = 0;

    let visited = memory.visit_tags(FIRST..FIRST + 1024, &mut |first, tags| {
        let right = tags
            .iter()
            .zip(first..)
            .all(|(tags, page)| *tags == TagPage::pack(&[page as u8 & 0xf; 256]));
        assert!(right, "those from page {first:#x} on");
        seen += tags.len() as u64;
        Ok(())
    });

    assert!(visited.is_ok());
    assert_eq!(seen, PAGES);
}

#[test]
fn a_memory_file_is_read_without_the_vmm() {
    let (mut lease, _released) = lease();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1024 * PAGE_SIZE).unwrap();
    file.write_all_at(&[0xab; 4096], 3 * PAGE_SIZE).unwrap();
    lease.file = Some(file);
    lease.pages = Box::new(Untagged);
    let mut memory = Reader::new(served(lease)).unwrap().memory().unwrap();
    let mut data = [[0; 4096]];

    memory.read(FIRST + 3, &mut data, &mut []).unwrap();

    assert_eq!(data, [[0xab; 4096]]);
    assert!(!memory.has_tags());
}

/// A source that must not be asked.
struct Untagged;

impl PageSource for Untagged {
    fn metadata(&self) -> Metadata {
        Metadata::None
    }

    fn next_run(&self, _: u64) -> io::Result<Option<Range<u64>>> {
        Err(io::Error::other("asked"))
    }

    fn read(&self, _: u64, _: &mut [Page], _: &mut [TagPage]) -> io::Result<()> {
        Err(io::Error::other("asked"))
    }
}

#[test]
fn the_guest_is_held_until_the_reader_is_gone() {
    let (lease, released) = lease();
    let memory = Reader::new(served(lease)).unwrap().memory().unwrap();
    assert_eq!(released.try_recv(), Err(mpsc::TryRecvError::Empty));

    drop(memory);

    assert_eq!(released.recv_timeout(Duration::from_secs(20)), Ok(()));
}

#[test]
fn a_reader_that_sends_garbage_gets_refusals_and_holds_the_guest_no_longer_than_it_stays() {
    let (lease, released) = lease();
    let mut reader = served(lease);
    let mut answer = Vec::new();

    for garbage in [
        [0xff; 16],
        [4, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [2; 16],
    ] {
        reader.write_all(&garbage).unwrap();
    }
    reader.write_all(&[7; 5]).unwrap();
    reader.shutdown(std::net::Shutdown::Write).unwrap();
    io::Read::read_to_end(&mut reader, &mut answer).unwrap();

    let text = String::from_utf8_lossy(&answer);
    assert_eq!(text.matches("this is not understood").count(), 2);
    assert_eq!(text.matches("too many pages at once").count(), 1);
    assert_eq!(released.recv_timeout(Duration::from_secs(20)), Ok(()));
}

#[test]
fn a_vmm_that_is_gone_is_said_to_be() {
    let (here, there) = UnixStream::pair().unwrap();
    drop(there);
    let error = Reader::new(here).map(drop).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the machine ended while it was looked at"
    );
}

#[test]
fn a_vmm_that_describes_a_machine_that_cannot_be_is_not_believed() {
    let (lease, _released) = lease();
    let lease = Lease {
        ram: 0..1 << 60,
        ..lease
    };
    let error = Reader::new(served(lease)).map(drop).unwrap_err();
    assert!(
        error.to_string().contains("a machine that cannot be"),
        "{error}"
    );
}
