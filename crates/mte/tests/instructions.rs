//! The instructions of the processor against the software model.
//!
//! Needs aarch64 Linux with MTE, or an emulation of it; elsewhere each test says on stderr why it
//! was skipped. Tags and `GCR_EL1` are those of the thread, so a test sets up its own. RGSR_EL1
//! cannot be read at EL0: what IRG returns is checked for what it must not be.
#![cfg(all(target_arch = "aarch64", target_os = "linux"))]

use std::ptr;

use mte::aarch64::Instructions;
use mte::{
    GRANULE_SIZE, GcrEl1, GranuleOffset, RgsrEl1, Tag, TagGenerator, TagOffset, TagPage, TagSet,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseResult, TestRunner};

const PAGE_SIZE: usize = 4096;
const PROT_MTE: libc::c_int = 0x20;

// linux/prctl.h
const PR_SET_TAGGED_ADDR_CTRL: libc::c_int = 55;
const PR_TAGGED_ADDR_ENABLE: libc::c_ulong = 1;
const PR_MTE_TAG_SHIFT: u32 = 3;
const PR_MTE_TCF_SYNC: libc::c_ulong = 1 << 1;

/// The instructions, if this machine has them.
fn instructions() -> Option<Instructions> {
    // SAFETY: getauxval has no conditions.
    let hwcap2 = unsafe { libc::getauxval(libc::AT_HWCAP2) };
    // SAFETY: it is this process's AT_HWCAP2.
    let instructions = unsafe { Instructions::from_hwcap2(hwcap2) };
    if instructions.is_none() {
        eprintln!("skipped: this machine has no MTE for programs (AT_HWCAP2 is {hwcap2:#x})");
    }
    instructions
}

/// Lets IRG, ADDG and SUBG of this thread choose only these tags. Faults stay off.
fn include(tags: TagSet) {
    control(PR_TAGGED_ADDR_ENABLE | libc::c_ulong::from(tags.bits()) << PR_MTE_TAG_SHIFT);
}

/// Sets how this thread chooses and checks tags.
fn control(control: libc::c_ulong) {
    // SAFETY: the call changes how this thread chooses and uses tagged addresses, of which it has
    // none but those of these tests.
    let result = unsafe { libc::prctl(PR_SET_TAGGED_ADDR_CTRL, control, 0, 0, 0) };
    assert_eq!(
        result,
        0,
        "PR_SET_TAGGED_ADDR_CTRL: {}",
        std::io::Error::last_os_error()
    );
}

/// Fresh pages with tags, gone when dropped.
struct TaggedMemory {
    first: *mut u8,
    pages: usize,
}

impl TaggedMemory {
    fn new(pages: usize) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE | PROT_MTE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let first =
            unsafe { libc::mmap(ptr::null_mut(), pages * PAGE_SIZE, protection, flags, -1, 0) };
        assert_ne!(
            first,
            libc::MAP_FAILED,
            "PROT_MTE memory: {}",
            std::io::Error::last_os_error()
        );
        Self {
            first: first.cast(),
            pages,
        }
    }

    fn granule(&self, index: usize) -> *mut u8 {
        assert!(index < self.pages * PAGE_SIZE / GRANULE_SIZE);
        self.first.wrapping_add(index * GRANULE_SIZE)
    }

    /// The tags, read one by one.
    fn tags(&self, mte: Instructions) -> Vec<Tag> {
        let granules = 0..self.pages * PAGE_SIZE / GRANULE_SIZE;
        // SAFETY: the granules are of this mapping.
        granules
            .map(|index| unsafe { mte.ldg(self.granule(index)) })
            .collect()
    }

    fn read_pages(&self, mte: Instructions) -> Vec<TagPage> {
        let mut tags = vec![TagPage::filled(Tag::MAX); self.pages];
        // SAFETY: the pages are those of this mapping.
        unsafe { mte.read_tag_pages(self.first, &mut tags) };
        tags
    }

    fn data(&self) -> &[u8] {
        // SAFETY: the mapping is readable, lives as long as `self`, and is written only through
        // `granule`, not while this is borrowed.
        unsafe { std::slice::from_raw_parts(self.first, self.pages * PAGE_SIZE) }
    }
}

impl Drop for TaggedMemory {
    fn drop(&mut self) {
        // SAFETY: nothing that points into the mapping outlives `self`.
        unsafe { libc::munmap(self.first.cast(), self.pages * PAGE_SIZE) };
    }
}

fn any_pages(pages: usize) -> impl Strategy<Value = Vec<TagPage>> {
    let page = any::<[u8; 128]>().prop_map(TagPage::from_packed);
    prop::collection::vec(page, pages)
}

fn any_tag() -> impl Strategy<Value = Tag> {
    (0u8..16).prop_map(Tag::from_low_bits)
}

/// Runs `test` on many of `cases`. Nothing is written to the disk: the machine may have no sources.
fn for_any<S: Strategy>(cases: S, test: impl Fn(S::Value) -> TestCaseResult) {
    let config = Config {
        failure_persistence: None,
        ..Config::default()
    };
    if let Err(failure) = TestRunner::new(config).run(&cases, test) {
        panic!("{failure}");
    }
}

/// The model of this thread's instructions while it includes these tags.
fn model(included: TagSet) -> TagGenerator {
    let gcr = GcrEl1::default().with_exclude(included.complement());
    TagGenerator {
        tag_access: true,
        gcr,
        rgsr: RgsrEl1::default(),
    }
}

#[test]
fn irg_chooses_allowed_tags_only_and_each_of_them() {
    let Some(mte) = instructions() else { return };
    for included in [
        0xffff, 0xfffe, 0x0001, 0x8000, 0x5555, 0x0ff0, 0x8001, 0x0000,
    ]
    .map(TagSet::from_bits)
    {
        include(included);
        for excluded in [0x0000, 0x0001, 0xff00, 0x7fff, 0xffff].map(TagSet::from_bits) {
            let address = 0xa000_1234_5678_9abc;
            let addresses = || (0..1000).map(|_| mte.irg(address, excluded.bits().into()));
            let chosen: TagSet = addresses().map(Tag::of_address).collect();
            let allowed = included.complement().union(excluded).complement();
            let expected = if allowed == TagSet::EMPTY {
                TagSet::EMPTY.with(Tag::ZERO)
            } else {
                allowed
            };
            assert_eq!(
                chosen, expected,
                "included {included:?}, excluded {excluded:?}"
            );
            assert!(addresses().all(|tagged| Tag::ZERO.insert_into(tagged) == address));
        }
    }
}

/// Both instructions with some immediates, on the processor and in the model.
macro_rules! compare_with_immediates {
    ($mte:expr, $model:expr, $address:expr, $(($granules:literal, $tags:literal)),* $(,)?) => {
        $({
            let offset = GranuleOffset::new($granules).unwrap();
            let tag_offset = TagOffset::new($tags).unwrap();
            prop_assert_eq!(
                $mte.addg::<$granules, $tags>($address),
                $model.addg($address, offset, tag_offset),
                "ADDG {:#x}, {} granules, {} tags, {:?}", $address, $granules, $tags, $model.gcr
            );
            prop_assert_eq!(
                $mte.subg::<$granules, $tags>($address),
                $model.subg($address, offset, tag_offset),
                "SUBG {:#x}, {} granules, {} tags, {:?}", $address, $granules, $tags, $model.gcr
            );
        })*
    };
}

#[test]
fn addg_and_subg_are_those_of_the_model() {
    let Some(mte) = instructions() else { return };
    let cases = (any::<u64>(), any::<u16>().prop_map(TagSet::from_bits));
    for_any(cases, |(address, included)| {
        include(included);
        let model = model(included);
        compare_with_immediates!(
            mte,
            model,
            address,
            (0, 0),
            (0, 1),
            (0, 15),
            (1, 0),
            (1, 1),
            (2, 2),
            (3, 3),
            (4, 4),
            (5, 5),
            (6, 6),
            (7, 7),
            (8, 8),
            (15, 9),
            (16, 10),
            (31, 11),
            (32, 12),
            (33, 13),
            (62, 14),
            (63, 0),
            (63, 15),
        );
        Ok(())
    });
}

#[test]
fn gmi_and_subp_are_those_of_the_model() {
    let Some(mte) = instructions() else { return };
    for_any(any::<(u64, u64)>(), |(address, other)| {
        prop_assert_eq!(
            mte.gmi(address, other),
            mte::insert_into_mask(address, other)
        );
        prop_assert_eq!(
            mte.subp(address, other),
            mte::address_difference(address, other)
        );
        Ok(())
    });
}

#[test]
fn new_memory_has_tag_0() {
    let Some(mte) = instructions() else { return };
    let memory = TaggedMemory::new(3);
    assert_eq!(
        memory.read_pages(mte),
        [TagPage::ZERO, TagPage::ZERO, TagPage::ZERO]
    );
}

#[test]
fn stg_tags_one_granule_and_st2g_two_and_neither_touches_data() {
    let Some(mte) = instructions() else { return };
    let cases = (any_pages(2), 0usize..511, any_tag(), any_tag());
    for_any(cases, |(before, index, one, two)| {
        let memory = TaggedMemory::new(2);
        // SAFETY: the memory is this test's alone, and the two granules are inside of it.
        unsafe {
            memory.first.write_bytes(0xa5, 2 * PAGE_SIZE);
            mte.write_tag_pages(memory.first, &before);
            mte.st2g(memory.granule(index), two);
            mte.stg(memory.granule(index), one);
        }
        let mut expected: Vec<Tag> = before.iter().flat_map(TagPage::iter).collect();
        expected[index] = one;
        expected[index + 1] = two;
        prop_assert_eq!(memory.tags(mte), expected);
        prop_assert!(memory.data().iter().all(|byte| *byte == 0xa5));
        Ok(())
    });
}

#[test]
fn stzg_tags_and_zeroes_its_granule_and_no_other() {
    let Some(mte) = instructions() else { return };
    for_any((0usize..256, any_tag()), |(index, tag)| {
        let memory = TaggedMemory::new(1);
        // SAFETY: the memory is this test's alone, and the granule is inside of it.
        unsafe {
            memory.first.write_bytes(0xa5, PAGE_SIZE);
            mte.stzg(memory.granule(index), tag);
        }
        let mut tags = TagPage::ZERO;
        tags.set(index as u8, tag);
        let mut data = vec![0xa5; PAGE_SIZE];
        data[index * GRANULE_SIZE..][..GRANULE_SIZE].fill(0);
        prop_assert_eq!(memory.read_pages(mte), [tags]);
        prop_assert_eq!(memory.data(), data);
        Ok(())
    });
}

#[test]
fn ldg_sees_the_granule_that_holds_the_address_whatever_the_pointers_tag() {
    let Some(mte) = instructions() else { return };
    let memory = TaggedMemory::new(1);
    let seven = Tag::from_low_bits(7);
    // The kernel accepts tagged addresses in its own calls only; the processor does in any case.
    for byte in 0..GRANULE_SIZE {
        let pointer = Tag::MAX.insert_into_pointer(memory.granule(9).wrapping_add(byte));
        // SAFETY: the granule is in the memory, which is this test's alone.
        let tag = unsafe {
            mte.stg(memory.granule(9), seven);
            mte.ldg(pointer)
        };
        assert_eq!(tag, seven);
    }
}

#[test]
fn page_tags_are_read_as_ldg_reads_them() {
    let Some(mte) = instructions() else { return };
    let tags = prop::collection::vec(any_tag(), 3 * 256);
    for_any(tags, |tags| {
        let memory = TaggedMemory::new(3);
        for (index, tag) in tags.iter().enumerate() {
            // SAFETY: the granule is in the memory, which is this test's alone.
            unsafe { mte.stg(memory.granule(index), *tag) };
        }
        prop_assert!(
            memory
                .read_pages(mte)
                .iter()
                .flat_map(TagPage::iter)
                .eq(tags.iter().copied())
        );
        Ok(())
    });
}

#[test]
fn page_tags_are_written_as_stg_writes_them_and_no_further() {
    let Some(mte) = instructions() else { return };
    for_any(
        (any_pages(5), 0usize..4, 0usize..4),
        |(tags, from, pages)| {
            let memory = TaggedMemory::new(5);
            let to = (from + pages).min(4);
            // SAFETY: pages `from` to `to` are in the memory, which is this test's alone.
            unsafe {
                mte.write_tag_pages(memory.first.wrapping_add(from * PAGE_SIZE), &tags[from..to])
            };
            let mut expected = vec![TagPage::ZERO; 5];
            expected[from..to].clone_from_slice(&tags[from..to]);
            prop_assert!(
                memory
                    .tags(mte)
                    .into_iter()
                    .eq(expected.iter().flat_map(TagPage::iter))
            );
            prop_assert_eq!(memory.read_pages(mte), expected);
            Ok(())
        },
    );
}

#[test]
fn a_fill_gives_its_pages_one_tag_and_no_other_page() {
    let Some(mte) = instructions() else { return };
    for tag in Tag::all() {
        for pages in 0..=2 {
            let memory = TaggedMemory::new(4);
            let mut expected = vec![TagPage::ZERO; 4];
            expected[1..=pages].fill(TagPage::filled(tag));
            // SAFETY: the pages are in the memory, which is this test's alone.
            unsafe { mte.fill_tag_pages(memory.first.wrapping_add(PAGE_SIZE), pages, tag) };
            assert_eq!(memory.read_pages(mte), expected);
        }
    }
}

#[test]
fn data_are_untouched_by_reading_and_writing_page_tags() {
    let Some(mte) = instructions() else { return };
    let memory = TaggedMemory::new(2);
    // SAFETY: the memory is this test's alone.
    unsafe {
        memory.first.write_bytes(0x5a, 2 * PAGE_SIZE);
        mte.write_tag_pages(memory.first, &[TagPage::filled(Tag::MAX), TagPage::ZERO]);
        mte.fill_tag_pages(memory.first, 1, Tag::from_low_bits(3));
    }
    let tags = memory.read_pages(mte);
    assert_eq!(
        tags,
        [TagPage::filled(Tag::from_low_bits(3)), TagPage::ZERO]
    );
    assert!(memory.data().iter().all(|byte| *byte == 0x5a));
}

#[test]
fn data_of_pages_are_copied_whatever_their_tags_and_the_threads_checks_are() {
    let Some(mte) = instructions() else { return };
    let memory = TaggedMemory::new(2);
    for byte in 0..2 * PAGE_SIZE {
        // SAFETY: the memory is this test's alone.
        unsafe { memory.first.add(byte).write((byte % 251) as u8) };
    }
    let mut copy = [[0xff; PAGE_SIZE]; 3];
    // SAFETY: as above.
    unsafe {
        mte.fill_tag_pages(memory.first, 1, Tag::MAX);
        control(PR_TAGGED_ADDR_ENABLE | PR_MTE_TCF_SYNC);
        mte.copy_pages(memory.first, &mut copy[..2]);
        control(PR_TAGGED_ADDR_ENABLE);
        mte.copy_pages(memory.first, &mut []);
    }
    assert_eq!(copy[..2].as_flattened(), memory.data());
    assert_eq!(copy[2], [0xff; PAGE_SIZE]);
}
