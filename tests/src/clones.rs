//! Guests that share the memory of one base, data and tags, until they write.

use std::fs;
use std::sync::Arc;

use engine::kvm::{KvmHypervisor, KvmVm};
use engine::{Exit, RegisterId, Vcpu, VcpuFeatures, Vm};
use libtest_mimic::{Failed, Trial};
use mte::{Tag, TagPage};
use vm_memory::{Bytes, GuestAddress};
use vmm::layout::{PAGE_SIZE, RAM_START};
use vmm::memory::base::Base;
use vmm::memory::tags::{AliasTags, TagStore, tag_store};
use vmm::memory::{GuestMemory, MemoryPlan};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Bytes of a guest's RAM.
const SIZE: u64 = 32 << 20;
/// Pages of the base that are written; the others are one hole.
const FILLED: u64 = 2048;
/// Where a guest writes to end its run: no memslot is there.
const END: u64 = 0x1000;

/// `again: ldr x2, [x0]; add x0, x0, x3; cmp x0, x1; b.lo again; str xzr, [x4]`
const READS: [u32; 5] = [
    0xf940_0002,
    0x8b03_0000,
    0xeb01_001f,
    0x54ff_ffa3,
    0xf900_009f,
];
/// The same with `str x2, [x0]`.
const WRITES: [u32; 5] = [
    0xf900_0002,
    0x8b03_0000,
    0xeb01_001f,
    0x54ff_ffa3,
    0xf900_009f,
];
/// The page with the program that reads; the next one has the one that writes.
const READER: u64 = 0;
const WRITER: u64 = 1;

pub fn tests() -> Vec<Trial> {
    let test = |name: &str, run: fn(&Base) -> Result<()>| {
        Trial::test(format!("clones::{name}"), move || {
            base()
                .and_then(|base| run(&base))
                .map_err(|e| Failed::from(e.to_string()))
        })
    };
    vec![
        test(
            "a_clone_has_the_data_and_tags_of_its_base",
            a_clone_has_the_data_and_tags_of_its_base,
        ),
        test(
            "a_data_write_of_the_vmm_keeps_the_tags_of_the_page",
            a_data_write_of_the_vmm_keeps_the_tags_of_the_page,
        ),
        test(
            "a_data_write_of_the_guest_keeps_the_tags_of_the_page",
            a_data_write_of_the_guest_keeps_the_tags_of_the_page,
        ),
        test(
            "tags_written_to_a_clone_are_that_clones_alone",
            tags_written_to_a_clone_are_that_clones_alone,
        ),
        test(
            "tags_are_written_where_the_base_has_a_hole",
            tags_are_written_where_the_base_has_a_hole,
        ),
        test(
            "a_guest_that_reads_owns_no_page",
            a_guest_that_reads_owns_no_page,
        ),
        test(
            "a_guest_owns_the_pages_that_it_wrote",
            a_guest_owns_the_pages_that_it_wrote,
        ),
        test(
            "pages_swapped_out_stay_populated_and_keep_their_tags",
            pages_swapped_out_stay_populated_and_keep_their_tags,
        ),
    ]
}

/// Each of the first pages holds its number, but for the two programs, and has tags that no other has.
fn base() -> Result<Base> {
    let memory = Arc::new(GuestMemory::new(SIZE, MemoryPlan::of_base(true))?);
    let tags = AliasTags::new(memory.clone()).ok_or("this process has no MTE")?;
    for page in 0..FILLED {
        memory.ram().write_obj(page, GuestAddress(ipa(page)))?;
        tags.write(ipa(page), &[tags_of(page)])?;
    }
    for (page, program) in [(READER, READS), (WRITER, WRITES)] {
        for (instruction, at) in program.iter().zip((ipa(page)..).step_by(4)) {
            memory.ram().write_obj(*instruction, GuestAddress(at))?;
        }
    }
    drop(tags);
    let memory = Arc::into_inner(memory).ok_or("somebody else has the memory")?;
    Ok(memory.into_base()?)
}

fn ipa(page: u64) -> u64 {
    RAM_START + page * PAGE_SIZE
}

fn tags_of(page: u64) -> TagPage {
    let mut tags = TagPage::ZERO;
    for granule in 0..=u8::MAX {
        let mixed = (page * 256 + u64::from(granule)).wrapping_mul(0x9e37_79b9) >> 13;
        tags.set(granule, Tag::from_low_bits(mixed as u8));
    }
    tags
}

struct Guest {
    // Before the memory: a VM must not outlive it.
    vm: Arc<KvmVm>,
    memory: Arc<GuestMemory>,
}

impl Guest {
    fn of(base: &Base) -> Result<Self> {
        let hypervisor = KvmHypervisor::open(KvmHypervisor::DEFAULT_PATH.as_ref())?;
        let memory = Arc::new(GuestMemory::clone_of(base)?);
        // SAFETY: a vCPU runs in `run` alone, which borrows the guest.
        let vm = Arc::new(unsafe { memory.new_vm(&hypervisor, true) }?);
        Ok(Self { vm, memory })
    }

    fn tags(&self) -> Box<dyn TagStore> {
        tag_store(self.memory.clone(), self.vm.clone())
    }

    fn tags_at(&self, page: u64) -> Result<TagPage> {
        let mut tags = TagPage::ZERO;
        self.tags()
            .read(ipa(page), std::slice::from_mut(&mut tags))?;
        Ok(tags)
    }

    fn data_at(&self, page: u64) -> Result<u64> {
        Ok(self.memory.ram().read_obj(GuestAddress(ipa(page)))?)
    }

    /// Has a vCPU execute `program` on the first word of every `step`th page from `first` to `end`.
    fn run(&self, program: u64, first: u64, end: u64, step: u64) -> Result<()> {
        let mut vcpu = self.vm.create_vcpu(0, VcpuFeatures::default())?;
        for (register, value) in [
            (RegisterId::PC, ipa(program)),
            (RegisterId::x(0), ipa(first)),
            (RegisterId::x(1), ipa(end)),
            (RegisterId::x(2), 0xd1f_fe12),
            (RegisterId::x(3), step * PAGE_SIZE),
            (RegisterId::x(4), END),
        ] {
            vcpu.set_register_u64(register, value)?;
        }
        match vcpu.run()? {
            Exit::MmioWrite { ipa: END, .. } => Ok(()),
            exit => Err(format!("the guest ended with {exit:?}").into()),
        }
    }

    /// Pages that are this guest's own and no other's.
    fn own_pages(&self) -> Result<u64> {
        let start = self.memory.memslot().host_address.addr().get() as u64;
        let memory = start..start + self.memory.size();
        let mut within = false;
        let mut kib = 0;
        for line in fs::read_to_string("/proc/self/smaps")?.lines() {
            let first = line.split_whitespace().next().unwrap_or_default();
            if let Some((from, _)) = first.split_once('-') {
                within = memory.contains(&u64::from_str_radix(from, 16)?);
            } else if let (true, Some(size)) = (within, line.strip_prefix("Anonymous:")) {
                kib += size.trim().trim_end_matches(" kB").parse::<u64>()?;
            }
        }
        Ok(kib * 1024 / PAGE_SIZE)
    }

    fn populated_pages(&self) -> Result<u64> {
        let all = self.memory.populated(RAM_START..RAM_START + SIZE);
        all.map(|range| {
            range
                .map(|range| (range.end - range.start) / PAGE_SIZE)
                .map_err(Into::into)
        })
        .sum()
    }
}

fn a_clone_has_the_data_and_tags_of_its_base(base: &Base) -> Result<()> {
    let (first, second) = (Guest::of(base)?, Guest::of(base)?);
    let expected: Vec<_> = (0..FILLED).map(tags_of).collect();
    for guest in [&first, &second] {
        let mut tags = vec![TagPage::ZERO; FILLED as usize];
        guest.tags().read(ipa(0), &mut tags)?;
        assert!(tags == expected);
        assert_eq!(guest.data_at(700)?, 700);
        assert_eq!(guest.own_pages()?, 0);
    }
    Ok(())
}

fn a_data_write_of_the_vmm_keeps_the_tags_of_the_page(base: &Base) -> Result<()> {
    let (first, second) = (Guest::of(base)?, Guest::of(base)?);

    first
        .memory
        .ram()
        .write_obj(1_u64, GuestAddress(ipa(700)))?;

    assert_eq!((first.data_at(700)?, second.data_at(700)?), (1, 700));
    assert_eq!(first.tags_at(700)?, tags_of(700));
    assert_eq!(second.tags_at(700)?, tags_of(700));
    Ok(())
}

fn a_data_write_of_the_guest_keeps_the_tags_of_the_page(base: &Base) -> Result<()> {
    let (first, second) = (Guest::of(base)?, Guest::of(base)?);

    first.run(WRITER, 700, 701, 1)?;

    assert_eq!(
        (first.data_at(700)?, second.data_at(700)?),
        (0xd1f_fe12, 700)
    );
    assert_eq!(first.tags_at(700)?, tags_of(700));
    assert_eq!(second.tags_at(700)?, tags_of(700));
    Ok(())
}

fn tags_written_to_a_clone_are_that_clones_alone(base: &Base) -> Result<()> {
    let (first, second) = (Guest::of(base)?, Guest::of(base)?);

    first.tags().write(ipa(700), &[tags_of(9)])?;

    let later = Guest::of(base)?;
    assert_eq!(first.tags_at(700)?, tags_of(9));
    assert_eq!(first.data_at(700)?, 700);
    assert_eq!(second.tags_at(700)?, tags_of(700));
    assert_eq!(later.tags_at(700)?, tags_of(700));
    Ok(())
}

fn tags_are_written_where_the_base_has_a_hole(base: &Base) -> Result<()> {
    let (first, second) = (Guest::of(base)?, Guest::of(base)?);

    first.tags().write(ipa(FILLED + 100), &[tags_of(9)])?;

    assert_eq!(first.tags_at(FILLED + 100)?, tags_of(9));
    assert_eq!(second.tags_at(FILLED + 100)?, TagPage::ZERO);
    assert_eq!(first.populated_pages()?, FILLED + 1);
    assert_eq!(second.populated_pages()?, FILLED);
    Ok(())
}

fn a_guest_that_reads_owns_no_page(base: &Base) -> Result<()> {
    let guest = Guest::of(base)?;

    guest.run(READER, 0, FILLED, 1)?;

    assert_eq!(guest.own_pages()?, 0);
    Ok(())
}

fn a_guest_owns_the_pages_that_it_wrote(base: &Base) -> Result<()> {
    let guest = Guest::of(base)?;

    guest.run(WRITER, 600, FILLED + 600, 100)?;

    assert_eq!(guest.own_pages()?, FILLED.div_ceil(100));
    assert_eq!(guest.data_at(FILLED + 552)?, 0xd1f_fe12);
    Ok(())
}

fn pages_swapped_out_stay_populated_and_keep_their_tags(base: &Base) -> Result<()> {
    let guest = Guest::of(base)?;
    let written: Vec<_> = (0..200).map(|page| tags_of(page + 1)).collect();
    for first in [700, FILLED + 700] {
        guest.tags().write(ipa(first), &written)?;
    }
    let own = guest.own_pages()?;
    let populated = guest.populated_pages()?;

    // SAFETY: the range is the mapping's; the advice changes no contents.
    let advised = unsafe {
        libc::madvise(
            guest.memory.memslot().host_address.as_ptr().cast(),
            SIZE as usize,
            libc::MADV_PAGEOUT,
        )
    };
    let left = guest.own_pages()?;

    assert_eq!((advised, own), (0, 400));
    assert!(left < own);
    assert_eq!(guest.populated_pages()?, populated);
    for first in [700, FILLED + 700] {
        let mut tags = vec![TagPage::ZERO; written.len()];
        guest.tags().read(ipa(first), &mut tags)?;
        assert!(tags == written);
    }
    Ok(())
}
