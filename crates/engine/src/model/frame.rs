//! Frames of host memory: data, tags, and the state of the tags.
//!
//! A [`Frame`] is one allocated page. Its storage comes from a [`FramePool`] and goes back there
//! when the last reference is dropped, the tags as they were: like hardware, the model clears data
//! of a page that is handed out and leaves its tags to whoever gives the page a use for them. The
//! page freed last is handed out first, so that a test can count on getting stale tags.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering as DataOrdering};
use std::sync::{Arc, Mutex, PoisonError};

use mte::{GRANULE_SIZE, Tag, TagPage};

use super::page_state::PageState;
use super::sync::atomic::{AtomicU8, Ordering};

/// Bytes of a page of the model's host.
pub const PAGE_SIZE: u64 = 4096;

/// Granules of a page. Two are all that interleavings need, and as many as loom gets through.
pub const GRANULES: usize = if cfg!(loom) {
    2
} else {
    PAGE_SIZE as usize / GRANULE_SIZE
};

const WORDS: usize = PAGE_SIZE as usize / size_of::<u64>();

/// Tags that no owner wrote: those of memory since the machine was switched on.
const NEVER_WRITTEN: Tag = Tag::from_low_bits(0xb);

type Words = [AtomicU64; WORDS];

/// Where a frame's data are.
enum Data {
    /// In the model.
    Own(Box<Words>),
    /// In real memory of this process.
    Real(NonNull<Words>),
}

// SAFETY: the words are atomic, and what the pointer points to lives as long as the frame (`Frame::real`).
unsafe impl Send for Data {}
// SAFETY: as above.
unsafe impl Sync for Data {}

/// Data and tags of a page, whoever uses it.
struct Storage {
    number: u64,
    data: Data,
    tags: Box<[AtomicU8; GRANULES]>,
}

impl Storage {
    fn new(number: u64, data: Data) -> Self {
        Self {
            number,
            data,
            tags: Box::new(std::array::from_fn(|_| {
                AtomicU8::new(NEVER_WRITTEN.value())
            })),
        }
    }

    fn words(&self) -> &Words {
        match &self.data {
            Data::Own(words) => words,
            // SAFETY: `Frame::real`'s caller vouches for memory of this size and alignment that
            // outlives the frame and is accessed in ways that allow for concurrency.
            Data::Real(words) => unsafe { words.as_ref() },
        }
    }
}

/// The memory of the model's host.
pub struct FramePool(Mutex<Pool>);

struct Pool {
    free: Vec<Storage>,
    made: u64,
    limit: u64,
}

impl FramePool {
    /// Memory of `limit` pages. They are made as they are first wanted.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Pool {
            free: Vec::new(),
            made: 0,
            limit,
        })))
    }

    /// A page of zeros with a former owner's tags; `None` if all memory is in use.
    pub fn allocate(self: &Arc<Self>) -> Option<Frame> {
        let storage = self.take()?;
        for word in storage.words() {
            word.store(0, DataOrdering::Relaxed);
        }
        Some(Frame {
            state: PageState::new(),
            storage: Some(storage),
            pool: Some(Arc::clone(self)),
        })
    }

    fn take(&self) -> Option<Storage> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(storage) = pool.free.pop() {
            return Some(storage);
        }
        if pool.made == pool.limit {
            return None;
        }
        pool.made += 1;
        let data = Box::new(std::array::from_fn(|_| AtomicU64::new(0)));
        Some(Storage::new(pool.made, Data::Own(data)))
    }

    fn give_back(&self, storage: Storage) {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pool.free.push(storage);
    }
}

/// One page of host memory while it is allocated.
pub struct Frame {
    state: PageState,
    /// Gone only while the frame is being dropped.
    storage: Option<Storage>,
    pool: Option<Arc<FramePool>>,
}

impl Frame {
    /// A frame whose data are a page of real memory of this process. Its tags are the model's.
    ///
    /// # Safety
    /// `page` is a multiple of [`PAGE_SIZE`] and points to so many bytes of readable and writable
    /// memory that stay as long as the frame, and that Rust code does not hold references to.
    pub unsafe fn real(page: NonNull<u8>) -> Self {
        Self {
            state: PageState::new(),
            storage: Some(Storage::new(
                page.addr().get() as u64 / PAGE_SIZE,
                Data::Real(page.cast()),
            )),
            pool: None,
        }
    }

    /// A frame that belongs to no pool and has this tag left over from a former owner.
    #[cfg(all(test, loom))]
    pub fn stale(tag: Tag) -> Self {
        let words = Box::new(std::array::from_fn(|_| AtomicU64::new(0)));
        let storage = Storage::new(0, Data::Own(words));
        storage.fill(tag);
        Self {
            state: PageState::new(),
            storage: Some(storage),
            pool: None,
        }
    }

    fn storage(&self) -> &Storage {
        self.storage.as_ref().expect("a frame in use has storage")
    }

    /// Which page of the host's memory it is.
    pub fn number(&self) -> u64 {
        self.storage().number
    }

    /// The state of its tags.
    pub fn state(&self) -> &PageState {
        &self.state
    }

    /// Makes its tags valid: clears those of a former owner, and nobody else's (Linux's
    /// `sanitise_mte_tags`).
    pub fn validate_tags(&self) {
        self.state.initialise(|| self.storage().fill(Tag::ZERO));
    }

    /// Gives it valid tags chosen by the caller, whether or not it had some: `write_tags` is called
    /// while no one else can take the page for untagged, and the page is tagged afterwards.
    pub fn overwrite_tags(&self, write_tags: impl FnOnce()) {
        // Whether this caller or another one initialised the tags makes no difference: all of
        // them are overwritten.
        let _ = self.state.begin();
        write_tags();
        self.state.finish();
    }

    /// The tag of a granule, valid or not.
    pub fn tag(&self, granule: usize) -> Tag {
        Tag::from_low_bits(self.storage().tags[granule].load(Ordering::Relaxed))
    }

    /// Gives a granule a tag.
    pub fn set_tag(&self, granule: usize, tag: Tag) {
        self.storage().tags[granule].store(tag.value(), Ordering::Relaxed);
    }

    /// Gives all granules this tag.
    pub fn fill_tags(&self, tag: Tag) {
        self.storage().fill(tag);
    }

    /// All tags if they are valid.
    pub fn valid_tags(&self) -> Option<TagPage> {
        self.state.is_tagged().then(|| {
            let mut tags = TagPage::ZERO;
            for granule in 0..GRANULES {
                tags.set(granule as u8, self.tag(granule));
            }
            tags
        })
    }

    /// Makes these its tags.
    pub fn set_tags(&self, tags: &TagPage) {
        self.overwrite_tags(|| {
            for granule in 0..GRANULES {
                self.set_tag(granule, tags.get(granule as u8));
            }
        });
    }

    /// Takes the data of `source`, and its tags if they are valid (Linux's `copy_highpage`).
    pub fn copy_from(&self, source: &Self) {
        for (word, from) in self.storage().words().iter().zip(source.storage().words()) {
            word.store(from.load(DataOrdering::Relaxed), DataOrdering::Relaxed);
        }
        if let Some(tags) = source.valid_tags() {
            self.set_tags(&tags);
        }
    }

    /// All data, as they are at this moment.
    pub fn data(&self) -> Vec<u64> {
        let load = |word: &AtomicU64| word.load(DataOrdering::Relaxed);
        self.storage().words().iter().map(load).collect()
    }

    /// Makes these its data.
    pub fn set_data(&self, data: &[u64]) {
        for (word, value) in self.storage().words().iter().zip(data) {
            word.store(*value, DataOrdering::Relaxed);
        }
    }

    /// Reads bytes from `offset` on; those of one aligned 8-byte word at once.
    pub fn load(&self, offset: usize, bytes: &mut [u8]) {
        for part in words_of(offset, bytes.len()) {
            let word = self.storage().words()[part.word].load(DataOrdering::Relaxed);
            bytes[part.in_buffer].copy_from_slice(&word.to_le_bytes()[part.in_word]);
        }
    }

    /// Writes bytes from `offset` on; those of one aligned 8-byte word at once.
    pub fn store(&self, offset: usize, bytes: &[u8]) {
        for part in words_of(offset, bytes.len()) {
            let insert = |word: u64| {
                let mut word = word.to_le_bytes();
                word[part.in_word.clone()].copy_from_slice(&bytes[part.in_buffer.clone()]);
                Some(u64::from_le_bytes(word))
            };
            // The neighbours in a word may be written by others at the same time.
            let _ = self.storage().words()[part.word].fetch_update(
                DataOrdering::Relaxed,
                DataOrdering::Relaxed,
                insert,
            );
        }
    }
}

/// The part of an access that lies in one word of a page.
struct Part {
    word: usize,
    in_word: Range<usize>,
    in_buffer: Range<usize>,
}

/// The parts of an access to `length` bytes from `offset` of a page on.
fn words_of(offset: usize, length: usize) -> impl Iterator<Item = Part> {
    const WORD: usize = size_of::<u64>();
    let end = offset + length;
    (offset / WORD..end.div_ceil(WORD)).map(move |word| {
        let first = offset.max(word * WORD);
        let last = end.min((word + 1) * WORD);
        Part {
            word,
            in_word: first - word * WORD..last - word * WORD,
            in_buffer: first - offset..last - offset,
        }
    })
}

impl Storage {
    fn fill(&self, tag: Tag) {
        for granule in self.tags.iter() {
            granule.store(tag.value(), Ordering::Relaxed);
        }
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        if let (Some(pool), Some(storage)) = (&self.pool, self.storage.take()) {
            pool.give_back(storage);
        }
    }
}
