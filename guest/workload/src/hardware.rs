//! Tagged memory of the machine.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use mte::aarch64::Instructions;
use mte::{GRANULE_SIZE, Tag, TagPage, TagSet};
use mte_linux::faults::{self, Fault, SEGV_MTESERR};
use mte_linux::{TaggedMemory, unchecked};

use crate::memory::Memory;
use crate::page::{Data, GRANULES, GRANULES_PER_WORD};

/// Pages of tagged memory, of which a thread uses its own.
pub struct TaggedPages<'a> {
    memory: &'a TaggedMemory,
    instructions: Instructions,
}

thread_local! {
    /// The thread's number and the page it is at, for a fault's message.
    static PLACE: Cell<(usize, usize)> = const { Cell::new((usize::MAX, usize::MAX)) };
}
/// Messages are JSON.
static JSON: AtomicBool = AtomicBool::new(false);

impl<'a> TaggedPages<'a> {
    /// `memory` as the thread with this number sees it.
    pub fn new(memory: &'a TaggedMemory, instructions: Instructions, thread: usize) -> Self {
        PLACE.set((thread, usize::MAX));
        Self {
            memory,
            instructions,
        }
    }

    fn granule_pointer(&self, page: usize, granule: u8) -> *mut u8 {
        self.memory
            .page(page)
            .wrapping_add(usize::from(granule) * GRANULE_SIZE)
    }

    /// A granule's address with a tag. As one number of 16 bytes, a granule is moved by one instruction and checked once.
    fn tagged(&self, page: usize, granule: u8, tag: Tag) -> *mut u128 {
        tag.insert_into_pointer(self.granule_pointer(page, granule))
            .cast()
    }

    /// Does something with the address of each granule of a page, which carries the granule's tag, and its data.
    ///
    /// This is where the program spends its time. While tag checks are on, an emulator checks each access, so the loop
    /// makes none but those of `access` and one for the tags of sixteen granules.
    #[inline(always)]
    fn for_each_granule(
        &self,
        page: usize,
        tags: &TagPage,
        data: Data,
        mut access: impl FnMut(*mut u128, u128),
    ) {
        PLACE.set((PLACE.get().0, page));
        let first = self.memory.page(page).cast::<u128>();
        let mut words = data.words();
        for (index, packed) in tags.as_packed().as_chunks::<8>().0.iter().enumerate() {
            let packed = u64::from_le_bytes(*packed);
            for n in 0..GRANULES_PER_WORD {
                let tag = Tag::from_low_bits((packed >> (4 * n)) as u8);
                let granule = first.wrapping_add(index * GRANULES_PER_WORD + n);
                access(
                    tag.insert_into_pointer(granule),
                    joined(words.next_granule()),
                );
            }
        }
    }
}

// In the SAFETY comments: the pages are mapped, readable and writable for as long as the mapping is borrowed, `page` is
// checked against its size, no reference points into it, and each page is used by one thread.
impl Memory for TaggedPages<'_> {
    fn address(&self, page: usize, granule: u8) -> u64 {
        self.granule_pointer(page, granule) as u64
    }

    fn random_tag(&mut self, excluded: TagSet) -> Tag {
        Tag::of_address(self.instructions.irg(0, excluded.bits().into()))
    }

    fn tags(&self, page: usize) -> TagPage {
        let mut tags = [TagPage::ZERO];
        // SAFETY: the page is mapped.
        unsafe {
            self.instructions
                .read_tag_pages(self.memory.page(page), &mut tags)
        };
        let [tags] = tags;
        tags
    }

    fn set_tags(&mut self, page: usize, tags: &TagPage) {
        let pointer = self.memory.page(page);
        match tags.uniform() {
            // SAFETY: the page is mapped.
            Some(tag) => unsafe { self.instructions.fill_tag_pages(pointer, 1, tag) },
            // SAFETY: the page is mapped.
            None => unsafe {
                self.instructions
                    .write_tag_pages(pointer, std::slice::from_ref(tags))
            },
        }
    }

    fn set_tag(&mut self, page: usize, granule: u8, tag: Tag) {
        // SAFETY: the granule is mapped.
        unsafe {
            self.instructions
                .stg(self.granule_pointer(page, granule), tag)
        };
    }

    fn set_tags_and_zero(&mut self, page: usize, tags: &TagPage) {
        for (granule, tag) in (0..=u8::MAX).zip(tags.iter()) {
            // SAFETY: the granule is mapped, and this thread's to write.
            unsafe {
                self.instructions
                    .stzg(self.granule_pointer(page, granule), tag)
            };
        }
    }

    fn write(&mut self, page: usize, tags: &TagPage, data: Data) {
        self.for_each_granule(page, tags, data, |granule, data| {
            // SAFETY: the granule is mapped, and this thread's to write. If its tag is another one, the program ends.
            unsafe { granule.write_volatile(data) }
        });
    }

    fn holds(&self, page: usize, tags: &TagPage, data: Data) -> bool {
        let mut differing = 0;
        self.for_each_granule(page, tags, data, |granule, data| {
            // SAFETY: the granule is mapped. If its tag is another one, the program ends.
            differing |= unsafe { granule.read_volatile() } ^ data;
        });
        differing == 0
    }

    fn granule(&self, page: usize, granule: u8) -> [u64; 2] {
        let pointer = self.tagged(page, granule, Tag::ZERO);
        // SAFETY: the granule is mapped, and its tag does not matter now.
        let found = unchecked(|| unsafe { pointer.read_volatile() });
        [found as u64, (found >> 64) as u64]
    }

    fn mismatch(&self, page: usize, memory: Tag) -> Result<(), &'static str> {
        const UNLOADED: u64 = 0x5ca1_ab1e_5ca1_ab1e;
        let other = Tag::from_low_bits(memory.value() + 1);
        let pointer = self.tagged(page, 0, other);
        // SAFETY: the word is mapped.
        match unsafe { faults::load(pointer.cast(), UNLOADED) } {
            (
                UNLOADED,
                Some(Fault {
                    code: SEGV_MTESERR,
                    address,
                }),
            ) if address == pointer as u64 => Ok(()),
            (_, None) => Err("a load by an address with a mismatching tag did not fault"),
            (UNLOADED, Some(_)) => {
                Err("a load by an address with a mismatching tag raised another fault than its own")
            }
            (_, Some(_)) => Err("a load that faulted changed its register"),
        }
    }
}

/// The two words of a granule as they lie in memory, the first one at the lower address.
const fn joined([first, second]: [u64; 2]) -> u128 {
    first as u128 | (second as u128) << 64
}

/// Handles SIGSEGV: a fault that was not provoked ends the program with a diagnosis.
///
/// # Errors
/// What the kernel answers.
pub fn install_diagnosis(json: bool) -> std::io::Result<()> {
    JSON.store(json, Ordering::Relaxed);
    faults::install(diagnose)
}

/// Runs in the signal handler.
fn diagnose(fault: Fault) {
    if fault.code != SEGV_MTESERR {
        return;
    }
    let (thread, page) = PLACE.get();
    let expected = Tag::of_address(fault.address);
    let granule = (fault.address as usize / GRANULE_SIZE) % GRANULES;
    // SAFETY: a tag check fault is raised for memory that is mapped and tagged, so the instructions are there.
    let actual = unsafe {
        Instructions::assume_present().ldg(Tag::ZERO.insert_into(fault.address) as *const u8)
    };
    let (before, after) = if JSON.load(Ordering::Relaxed) {
        (r#"{"event":"difference","message":""#, "\"}")
    } else {
        ("workload: difference: ", "")
    };
    faults::exit_with_message(
        format_args!(
            "{before}tag check fault at {:#x}, granule {granule} of page {page}: expected tag {expected}, actual tag {actual}; thread {thread}{after}\n",
            Tag::ZERO.insert_into(fault.address),
        ),
        1,
    )
}
