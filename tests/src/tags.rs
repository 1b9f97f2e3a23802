//! Tags of a real guest's memory, by both ways that there are on this host.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use engine::Hypervisor;
use engine::kvm::KvmHypervisor;
use libtest_mimic::{Failed, Trial};
use mte::{Tag, TagPage};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm::layout::{PAGE_SIZE, RAM_START};
use vmm::memory::tags::{AliasTags, CopiedTags, TagStore};
use vmm::memory::{GuestMemory, MemoryPlan, TagAccess};

/// Two huge pages and a bit.
const PAGES: usize = 1100;

pub fn tests() -> Vec<Trial> {
    let test = |name: &str, run: fn(&Guest)| {
        Trial::test(name, move || {
            run(&Guest::new().map_err(|e| Failed::from(e.to_string()))?);
            Ok(())
        })
    };
    vec![
        test(
            "tags_are_the_same_by_every_way",
            tags_are_the_same_by_every_way,
        ),
        test(
            "data_and_tags_read_together_are_those_read_apart",
            data_and_tags_read_together_are_those_read_apart,
        ),
        test(
            "reading_tags_leaves_holes_as_they_are",
            reading_tags_leaves_holes_as_they_are,
        ),
        test("data_stay_as_tags_change", data_stay_as_tags_change),
        test(
            "threads_write_and_read_tags_at_once",
            threads_write_and_read_tags_at_once,
        ),
    ]
}

/// The memory of a guest without vCPUs, and all ways to its tags.
struct Guest {
    memory: Arc<GuestMemory>,
    ways: Vec<Box<dyn TagStore>>,
}

impl Guest {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let hypervisor = KvmHypervisor::open("/dev/kvm".as_ref())?;
        let plan = MemoryPlan::choose(hypervisor.capabilities(), true, TagAccess::Auto, false)?;
        let size = PAGES as u64 * PAGE_SIZE;
        let memory = Arc::new(GuestMemory::new(size, plan)?);
        // SAFETY: the VM never has a vCPU.
        let vm = Arc::new(unsafe { memory.new_vm(&hypervisor, true) }?);
        let mut ways: Vec<Box<dyn TagStore>> = vec![Box::new(CopiedTags::new(memory.clone(), vm))];
        if let Some(alias) = AliasTags::new(memory.clone()) {
            ways.push(Box::new(alias));
        }
        Ok(Self { memory, ways })
    }

    /// 512-byte blocks that stand behind the guest's memory, if it is a file.
    fn blocks(&self) -> Option<u64> {
        let region = self.memory.ram().iter().next()?;
        let file = region.file_offset()?.file();
        Some(file.metadata().unwrap().blocks())
    }
}

fn ipa(page: usize) -> u64 {
    RAM_START + page as u64 * PAGE_SIZE
}

/// A page of tags that no other number gives.
fn tags_of(number: usize) -> TagPage {
    let mut tags = TagPage::ZERO;
    for granule in 0..=u8::MAX {
        let mixed = (number * 256 + usize::from(granule)).wrapping_mul(0x9e37_79b9) >> 13;
        tags.set(granule, Tag::from_low_bits(mixed as u8));
    }
    tags
}

fn read(way: &dyn TagStore, first: usize, pages: usize) -> Vec<TagPage> {
    let mut tags = vec![TagPage::filled(Tag::from_low_bits(9)); pages];
    way.read(ipa(first), &mut tags).unwrap();
    tags
}

fn tags_are_the_same_by_every_way(guest: &Guest) {
    for (number, writer) in guest.ways.iter().enumerate() {
        let written: Vec<_> = (0..PAGES).map(|page| tags_of(page + number)).collect();
        writer.write(ipa(0), &written).unwrap();
        for reader in &guest.ways {
            assert!(read(&**reader, 0, PAGES) == written);
        }
    }
}

/// Pages of each tag, pages with one granule that differs, wherever it is, and pages of many tags, in an order in which one
/// kind follows each other.
fn data_and_tags_read_together_are_those_read_apart(guest: &Guest) {
    let pages = 0..PAGES;
    let tags: Vec<_> = pages
        .map(|page| {
            let mut tags = TagPage::filled(Tag::from_low_bits((page / 64) as u8));
            match page % 8 {
                1 | 3 => tags.set((page / 4) as u8, Tag::from_low_bits(page as u8)),
                4 | 5 => tags = tags_of(page),
                _ => {}
            }
            tags
        })
        .collect();
    let mut data = vec![[0; PAGE_SIZE as usize]; PAGES];
    for (number, byte) in data.as_flattened_mut().iter_mut().enumerate() {
        *byte = (number / 7) as u8;
    }
    let ram = guest.memory.ram();
    ram.write_slice(data.as_flattened(), GuestAddress(ipa(0)))
        .unwrap();
    guest.ways[0].write(ipa(0), &tags).unwrap();

    for way in &guest.ways {
        let mut read_data = vec![[0xff; PAGE_SIZE as usize]; PAGES];
        let mut read_tags = vec![TagPage::filled(Tag::from_low_bits(9)); PAGES];
        way.read_pages(ipa(0), &mut read_data, &mut read_tags)
            .unwrap();

        assert!(read_data == data);
        assert!(read_tags == tags);
        assert!(read(&**way, 0, PAGES) == tags);
    }
}

fn reading_tags_leaves_holes_as_they_are(guest: &Guest) {
    guest.ways[0].write(ipa(700), &[tags_of(1)]).unwrap();
    let (blocks, populated) = (guest.blocks(), populated_pages(guest));

    for way in &guest.ways {
        let mut tags = vec![TagPage::filled(Tag::from_low_bits(9)); PAGES];
        let present = way.read(ipa(0), &mut tags).unwrap();

        assert!(
            present
                .iter()
                .any(|range| range.contains(&ipa(700)) && !range.contains(&ipa(0)))
        );
        assert!(tags[700] == tags_of(1));
        assert!(tags[..512].iter().all(|page| *page == TagPage::ZERO));
    }

    assert_eq!(guest.blocks(), blocks);
    assert_eq!(populated_pages(guest), populated);
}

fn populated_pages(guest: &Guest) -> u64 {
    let all = guest.memory.populated(ipa(0)..ipa(PAGES));
    all.map(|range| range.unwrap())
        .map(|range| (range.end - range.start) / PAGE_SIZE)
        .sum()
}

fn data_stay_as_tags_change(guest: &Guest) {
    let data: Vec<u8> = (0..PAGE_SIZE).map(|byte| byte as u8).collect();
    let address = GuestAddress(ipa(3));
    guest.memory.ram().write_slice(&data, address).unwrap();

    for way in &guest.ways {
        way.write(ipa(3), &[tags_of(3)]).unwrap();
        let mut after = vec![0; data.len()];
        guest.memory.ram().read_slice(&mut after, address).unwrap();
        assert!(after == data);
    }
}

fn threads_write_and_read_tags_at_once(guest: &Guest) {
    const THREADS: usize = 4;
    const SHARE: usize = PAGES / THREADS;
    for way in &guest.ways {
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || {
                    for round in 0..10 {
                        let first = thread * SHARE;
                        let written: Vec<_> = (0..SHARE)
                            .map(|page| tags_of(first + page + round))
                            .collect();
                        way.write(ipa(first), &written).unwrap();
                        assert!(read(&**way, first, SHARE) == written);
                    }
                });
            }
        });
    }
}
