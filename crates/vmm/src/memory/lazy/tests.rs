//! With a real userfaultfd. Where the host has none that serves, they say so and pass.
#![expect(
    clippy::single_range_in_vec_init,
    reason = "a source of one run of pages"
)]

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Seek, Write};
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;
use std::time::Duration;

use mte::{Tag, TagPage};
use stream::{Batch, Compression, Encoder, Header, Page, Snapshot, StreamId, StreamWriter};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::memory::populated::PageMap;

const FIRST: u64 = RAM_START / PAGE_SIZE;
const CHUNK: u64 = 32;
/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);
/// Long enough for what must not happen.
const SHORT: Duration = Duration::from_millis(100);

const PLAN: MemoryPlan = MemoryPlan {
    memory_file: true,
    huge_pages: false,
    tags: None,
};

/// Memory of so many pages, if this host can fill it lazily.
fn memory(pages: u64) -> Option<Arc<GuestMemory>> {
    match support(PLAN) {
        Ok(()) => Some(Arc::new(GuestMemory::new(pages * PAGE_SIZE, PLAN).unwrap())),
        Err(why) => {
            eprintln!("skipped: {why}");
            None
        }
    }
}

/// What the source has of a page: no two pages have a word alike, and none is zero.
fn content(page: u64) -> Page {
    let mut data = [0; PAGE_SIZE as usize];
    for (number, word) in (1u64..).zip(data.as_chunks_mut().0) {
        *word = (page << 16 | number).to_ne_bytes();
    }
    data
}

/// What is done before a chunk is read.
type Hook = Box<dyn Fn(u32) -> stream::Result<()> + Send + Sync>;

struct Source {
    metadata: Metadata,
    /// Relative to the first page of RAM.
    runs: Vec<(Range<u64>, u32)>,
    hook: Hook,
}

/// Chunks of [`CHUNK`] pages over `runs`.
fn source(
    runs: &[Range<u64>],
    hook: impl Fn(u32) -> stream::Result<()> + Send + Sync + 'static,
) -> Source {
    let cut = |run: &Range<u64>| {
        let end = run.end;
        run.clone()
            .step_by(CHUNK as usize)
            .map(move |start| start..end.min(start + CHUNK))
            .collect::<Vec<_>>()
    };
    Source {
        metadata: Metadata::None,
        runs: runs.iter().flat_map(cut).zip(0..).collect(),
        hook: Box::new(hook),
    }
}

struct Reader<'a> {
    source: &'a Source,
    batch: Batch,
}

impl PageProvider for Source {
    type Reader<'a> = Reader<'a>;

    fn metadata(&self) -> Metadata {
        self.metadata
    }

    fn runs(&self) -> impl Iterator<Item = (Range<u64>, u32)> {
        let runs = self.runs.iter();
        runs.map(|(run, chunk)| (FIRST + run.start..FIRST + run.end, *chunk))
    }

    fn reader(&self) -> Reader<'_> {
        Reader {
            source: self,
            batch: Batch::new(self.metadata),
        }
    }
}

impl ChunkReader for Reader<'_> {
    fn read(&mut self, chunk: u32) -> stream::Result<&Batch> {
        (self.source.hook)(chunk)?;
        self.batch.clear();
        let tags = self.source.metadata.has_tags().then_some(&TAGS);
        for (run, _) in self.source.runs.iter().filter(|(_, own)| *own == chunk) {
            for page in run.clone() {
                self.batch.push(FIRST + page, &content(page), tags)?;
            }
        }
        Ok(&self.batch)
    }
}

static TAGS: TagPage = TagPage::filled(Tag::from_low_bits(5));

/// A filling of memory that nobody has touched, whose events nobody hears.
fn started<S: PageProvider>(memory: &Arc<GuestMemory>, source: S) -> Result<LazyFill, Error> {
    LazyFill::start(
        memory.clone(),
        source,
        Before::Untouched,
        Threads::DEFAULT,
        |_| {},
    )
}

fn start(memory: &Arc<GuestMemory>, source: Source) -> (LazyFill, mpsc::Receiver<Event>) {
    let (send, events) = mpsc::channel();
    let fill = LazyFill::start(
        memory.clone(),
        source,
        Before::Untouched,
        Threads::DEFAULT,
        move |event| {
            let _ = send.send(event);
        },
    );
    (fill.unwrap(), events)
}

fn broken() -> stream::Error {
    stream::Error::Io {
        action: "read the snapshot",
        source: io::Error::from_raw_os_error(libc::EIO),
    }
}

fn address(page: u64) -> GuestAddress {
    GuestAddress(RAM_START + page * PAGE_SIZE)
}

/// Touches a page.
fn read(memory: &GuestMemory, page: u64) -> Page {
    let mut data = [0; PAGE_SIZE as usize];
    memory.ram().read_slice(&mut data, address(page)).unwrap();
    data
}

/// All numbers below `count`, in an order that depends on `seed`.
fn shuffled(count: u64, seed: u64) -> Vec<u64> {
    let mut numbers: Vec<u64> = (0..count).collect();
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    for i in (1..numbers.len()).rev() {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        numbers.swap(i, (state >> 33) as usize % (i + 1));
    }
    numbers
}

/// In another thread: what `page` holds, as soon as it is there.
fn touch(memory: &Arc<GuestMemory>, page: u64) -> mpsc::Receiver<Page> {
    let (send, touched) = mpsc::channel();
    let memory = memory.clone();
    // The test may have ended.
    thread::spawn(move || _ = send.send(read(&memory, page)));
    touched
}

/// A gate that lets nobody through until it is opened.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let open = self.open.lock().unwrap();
        let waited = self.changed.wait_timeout_while(open, LONG, |open| !*open);
        assert!(!waited.unwrap().1.timed_out(), "the gate stayed closed");
    }
}

#[test]
fn whoever_touches_pages_in_any_order_finds_what_was_there() {
    const PAGES: u64 = 4096;
    let Some(memory) = memory(PAGES) else { return };
    let runs = [0..1, 3..700, 1024..1025, 2000..2048, 3000..4096];
    let (fill, _) = start(&memory, source(&runs, |_| Ok(())));

    thread::scope(|scope| {
        for seed in 0..4 {
            let (memory, runs) = (&memory, &runs);
            scope.spawn(move || {
                for page in shuffled(PAGES, seed) {
                    let expected = match runs.iter().any(|run| run.contains(&page)) {
                        true => content(page),
                        false => [0; PAGE_SIZE as usize],
                    };
                    assert!(read(memory, page) == expected, "page {page}");
                }
            });
        }
    });

    fill.wait().unwrap();
    assert_eq!(fill.progress().placed, 1 + 697 + 1 + 48 + 1096);
}

#[test]
fn what_is_written_to_a_page_that_came_stays_there() {
    const PAGES: u64 = 4096;
    let Some(memory) = memory(PAGES) else { return };
    // The first half comes, the other one is holes in blocks that are watched.
    let runs: Vec<_> = (0..PAGES).step_by(64).map(|at| at..at + 32).collect();
    let (fill, _) = start(&memory, source(&runs, |_| Ok(())));

    // Four threads fault on the same pages at the same time; each has its own word there.
    thread::scope(|scope| {
        for thread in 0..4 {
            let memory = &memory;
            scope.spawn(move || {
                for page in shuffled(PAGES, 1) {
                    let word = address(page).0 + 8 * thread;
                    memory.ram().write_obj(!page, GuestAddress(word)).unwrap();
                }
            });
        }
    });
    fill.wait().unwrap();

    for page in 0..PAGES {
        let held = page % 64 < 32;
        let mut expected = if held {
            content(page)
        } else {
            [0; PAGE_SIZE as usize]
        };
        expected[..32].copy_from_slice((!page).to_ne_bytes().repeat(4).as_slice());
        assert!(read(&memory, page) == expected, "page {page}");
    }
}

#[test]
fn the_kernel_finds_what_was_there_too() {
    let Some(memory) = memory(1024) else { return };
    let gate = Arc::new(Gate::default());
    let closed = gate.clone();
    let (fill, _) = start(
        &memory,
        source(&[0..1024], move |chunk| {
            if chunk == 0 {
                closed.pass();
            }
            Ok(())
        }),
    );
    let mut file = tempfile::tempfile().unwrap();
    let slice = memory.ram().get_slice(address(512), 2 * PAGE_SIZE as usize);

    // SAFETY: the slice lives as long as the memory.
    let bytes = unsafe {
        let slice = slice.unwrap();
        std::slice::from_raw_parts(slice.ptr_guard().as_ptr(), slice.len())
    };
    file.write_all(bytes).unwrap();

    let mut written = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut written).unwrap();
    assert!(written == [content(512), content(513)].concat());
    gate.open();
    fill.wait().unwrap();
}

#[test]
fn a_page_that_is_touched_comes_before_the_rest() {
    let Some(memory) = memory(2048) else { return };
    let gate = Arc::new(Gate::default());
    let closed = gate.clone();
    let background = move |chunk| {
        if chunk == 0 {
            closed.pass();
        }
        Ok(())
    };
    let (fill, _) = start(&memory, source(&[0..2048], background));

    assert!(read(&memory, 2047) == content(2047));
    assert!(read(&memory, 1000) == content(1000));

    assert!(fill.progress().placed <= 2 * CHUNK);
    gate.open();
    fill.wait().unwrap();
    assert_eq!(fill.progress().faults.count(), 2);
}

#[test]
fn who_waits_for_one_chunk_does_not_wait_for_another() {
    let Some(memory) = memory(2048) else { return };
    // Each of these three comes only when the next one is there.
    let gates: Arc<[Gate; 4]> = Arc::default();
    gates[3].open();
    let closed = gates.clone();
    let chain = move |chunk| {
        match chunk {
            0 => closed[0].pass(),
            10 => closed[1].pass(),
            20 => closed[2].pass(),
            _ => {}
        }
        Ok(())
    };
    let (fill, _) = start(&memory, source(&[0..2048], chain));

    let first = touch(&memory, 10 * CHUNK);
    let second = touch(&memory, 20 * CHUNK);
    assert!(first.recv_timeout(SHORT).is_err());
    assert!(read(&memory, 30 * CHUNK) == content(30 * CHUNK));
    gates[2].open();
    assert!(second.recv_timeout(LONG).unwrap() == content(20 * CHUNK));
    gates[1].open();
    assert!(first.recv_timeout(LONG).unwrap() == content(10 * CHUNK));

    gates[0].open();
    fill.wait().unwrap();
}

#[test]
fn a_chunk_is_brought_once_however_many_wait_for_it() {
    let Some(memory) = memory(2048) else { return };
    let reads = Arc::new(Mutex::new(Vec::new()));
    let seen = reads.clone();
    let (fill, _) = start(
        &memory,
        source(&[0..2048], move |chunk| {
            seen.lock().unwrap().push(chunk);
            thread::sleep(Duration::from_micros(100));
            Ok(())
        }),
    );
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                shuffled(2048, 7)
                    .into_iter()
                    .for_each(|page| _ = read(&memory, page))
            });
        }
    });
    fill.wait().unwrap();

    let mut reads = reads.lock().unwrap().clone();
    reads.sort_unstable();
    assert_eq!(reads, (0..64).collect::<Vec<_>>());
}

#[test]
fn who_touches_what_the_source_cannot_give_waits_until_it_can() {
    let Some(memory) = memory(2048) else { return };
    let bad: Arc<Mutex<HashSet<u32>>> = Arc::new(Mutex::new([3, 40].into()));
    let failing = bad.clone();
    let (fill, events) = start(
        &memory,
        source(&[0..2048], move |chunk| {
            match failing.lock().unwrap().contains(&chunk) {
                true => Err(broken()),
                false => Ok(()),
            }
        }),
    );
    let waiting = touch(&memory, 3 * CHUNK + 5);

    // Told once, and the others come nevertheless.
    let failure = fill.wait().unwrap_err();
    assert!(
        failure
            .to_string()
            .contains("read the snapshot: Input/output error"),
        "{failure}"
    );
    assert!(matches!(events.recv_timeout(LONG), Ok(Event::Failed(_))));
    let other = touch(&memory, 40 * CHUNK);
    assert!(read(&memory, 63 * CHUNK) == content(63 * CHUNK));
    assert!(waiting.recv_timeout(SHORT).is_err());
    assert!(other.recv_timeout(SHORT).is_err());
    assert!(matches!(fill.state(), State::Failed(_)));
    assert!(!fill.is_complete());
    assert!(events.try_recv().is_err());

    // It can be in vain.
    bad.lock().unwrap().remove(&40);
    fill.retry();
    assert!(other.recv_timeout(LONG).unwrap() == content(40 * CHUNK));
    assert!(matches!(events.recv_timeout(LONG), Ok(Event::Failed(_))));
    assert!(waiting.recv_timeout(SHORT).is_err());

    bad.lock().unwrap().clear();
    fill.retry();
    assert!(waiting.recv_timeout(LONG).unwrap() == content(3 * CHUNK + 5));
    fill.wait().unwrap();
    assert!(matches!(events.recv_timeout(LONG), Ok(Event::Complete)));
    assert!((0..2048).all(|page| read(&memory, page) == content(page)));
}

/// A source that says other things of its chunks than it gives.
struct Liar(Source);

impl PageProvider for Liar {
    type Reader<'a> = Reader<'a>;

    fn metadata(&self) -> Metadata {
        self.0.metadata
    }

    fn runs(&self) -> impl Iterator<Item = (Range<u64>, u32)> {
        [(FIRST..FIRST + 64, 0), (FIRST + 64..FIRST + 128, 1)].into_iter()
    }

    fn reader(&self) -> Reader<'_> {
        self.0.reader()
    }
}

#[test]
fn a_chunk_with_other_pages_than_its_own_is_not_placed() {
    for given in [0..63, 0..65, 1..65] {
        let Some(memory) = memory(2048) else { return };
        let mut truth = source(&[], |_| Ok(()));
        truth.runs = vec![(given, 0), (64..128, 1)];
        let fill = started(&memory, Liar(truth)).unwrap();

        let failure = fill.wait().unwrap_err();
        assert!(matches!(*failure, Failure::OtherPages { chunk: 0 }));
        assert!(touch(&memory, 5).recv_timeout(SHORT).is_err());
    }
}

/// The flags of the mapping that a page is in (`/proc/self/smaps`).
fn mapping_flags(memory: &GuestMemory, page: u64) -> String {
    let wanted = memory.host_address.addr().get() as u64 + page * PAGE_SIZE;
    let mut inside = false;
    for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let bounds = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let parse = |text| u64::from_str_radix(text, 16).ok();
        if let Some((Some(start), Some(end))) = bounds.map(|(s, e)| (parse(s), parse(e))) {
            inside = (start..end).contains(&wanted);
        }
        if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
            return format!("{flags} ");
        }
    }
    panic!("page {page} is not mapped");
}

#[test]
fn memory_is_ordinary_memory_once_all_is_there() {
    let Some(memory) = memory(4096) else { return };
    let gate = Arc::new(Gate::default());
    let closed = gate.clone();
    let (fill, events) = start(
        &memory,
        source(&[2048..3072], move |_| {
            closed.pass();
            Ok(())
        }),
    );
    let watched = |page| mapping_flags(&memory, page).contains(" um ");

    // Only where something is to come.
    assert_eq!(
        [0, 2047, 2048, 3071, 3072].map(watched),
        [false, false, true, true, false]
    );
    assert!(events.try_recv().is_err());
    gate.open();
    fill.wait().unwrap();

    assert!(matches!(events.recv_timeout(LONG), Ok(Event::Complete)));
    assert!(matches!(fill.state(), State::Complete));
    assert_eq!([2048, 3071].map(watched), [false, false]);
    // The threads are gone, and their hold on the memory with them.
    drop(fill);
    let begun = std::time::Instant::now();
    while Arc::strong_count(&memory) > 1 {
        assert!(begun.elapsed() < LONG);
        thread::sleep(Duration::from_millis(1));
    }
}

fn advise(memory: &GuestMemory, page: u64, advice: libc::c_int) {
    // SAFETY: the page is the memory's; what it holds is the test's affair.
    let result = unsafe {
        let start = memory
            .host_address
            .as_ptr()
            .add((page * PAGE_SIZE) as usize);
        libc::madvise(start.cast(), PAGE_SIZE as usize, advice)
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

#[test]
fn a_page_that_the_host_unmaps_again_is_found_again() {
    let Some(memory) = memory(1024) else { return };
    let gate = Arc::new(Gate::default());
    let closed = gate.clone();
    let (fill, _) = start(
        &memory,
        source(&[0..1024], move |chunk| {
            if chunk == 0 {
                closed.pass();
            }
            Ok(())
        }),
    );
    memory.ram().write_obj(7u64, address(600)).unwrap();

    advise(&memory, 600, libc::MADV_DONTNEED);
    let kept: u64 = memory.ram().read_obj(address(600)).unwrap();
    advise(&memory, 601, libc::MADV_REMOVE);
    let given_away = read(&memory, 601);

    assert_eq!(kept, 7);
    assert!(given_away == [0; PAGE_SIZE as usize]);
    gate.open();
    fill.wait().unwrap();
}

#[test]
fn letting_go_of_the_filling_leaves_nobody_behind() {
    let Some(memory) = memory(1024) else { return };
    let (fill, events) = start(
        &memory,
        source(&[0..1024], |_| {
            thread::sleep(Duration::from_millis(1));
            Ok(())
        }),
    );
    drop(fill);
    assert!(read(&memory, 1000) == content(1000));
    assert!(matches!(events.recv_timeout(LONG), Ok(Event::Complete)));
    assert!((0..1024).all(|page| read(&memory, page) == content(page)));
}

#[test]
fn who_waits_when_all_have_gone_is_never_given_zeros() {
    let Some(memory) = memory(1024) else { return };
    let (fill, events) = start(&memory, source(&[0..1024], |_| Err(broken())));
    let waiting = touch(&memory, 5);
    assert!(matches!(events.recv_timeout(LONG), Ok(Event::Failed(_))));
    drop(fill);
    assert!(waiting.recv_timeout(SHORT).is_err());
}

#[test]
fn given_up_memory_reads_as_zeros_where_nothing_came() {
    let Some(memory) = memory(1024) else { return };
    let (fill, events) = start(&memory, source(&[0..1024], |_| Err(broken())));
    assert!(matches!(events.recv_timeout(LONG), Ok(Event::Failed(_))));
    fill.abandon();
    let zeros = touch(&memory, 5).recv_timeout(LONG).unwrap();
    assert!(zeros == [0; PAGE_SIZE as usize]);
}

#[test]
fn without_pages_it_is_complete_at_once() {
    let Some(memory) = memory(1024) else { return };
    let (fill, events) = start(&memory, source(&[], |_| Ok(())));
    assert!(fill.is_complete());
    assert!(matches!(events.try_recv(), Ok(Event::Complete)));
}

/// Tags that are written nowhere, but it is looked who could see their pages then.
struct Watched {
    memory: Arc<GuestMemory>,
    written: AtomicUsize,
    seen_early: AtomicUsize,
}

impl TagStore for Arc<Watched> {
    fn read_populated(&self, _: u64, _: &mut [TagPage]) -> Result<(), tags::Error> {
        Ok(())
    }

    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn write(&self, ipa: u64, tags: &[TagPage]) -> Result<(), tags::Error> {
        let address = self.memory.host_address.addr().get() as u64 + (ipa - RAM_START);
        let mapped = Populated::Private(PageMap::of(address, PAGE_SIZE).unwrap());
        let size = tags.len() as u64 * PAGE_SIZE;
        // Data are in the file; nobody has them in page tables.
        let seen = mapped.first_in(0..size).unwrap().is_some();
        self.seen_early.fetch_add(seen.into(), Ordering::Relaxed);
        self.written.fetch_add(tags.len(), Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn a_page_is_not_seen_before_its_tags_are_written() {
    let Some(memory) = memory(1024) else { return };
    let tags = Arc::new(Watched {
        memory: memory.clone(),
        written: AtomicUsize::new(0),
        seen_early: AtomicUsize::new(0),
    });
    let mut source = source(&[0..1024], |_| Ok(()));
    source.metadata = Metadata::ArmMte;
    let fill = LazyFill::start_with(
        memory.clone(),
        Some(Box::new(tags.clone())),
        source,
        Before::Untouched,
        Threads::DEFAULT,
        Box::new(|_| {}),
    )
    .unwrap();
    assert!(read(&memory, 500) == content(500));
    fill.wait().unwrap();
    assert_eq!(tags.written.load(Ordering::Relaxed), 1024);
    assert_eq!(tags.seen_early.load(Ordering::Relaxed), 0);
}

/// A snapshot file whose pages are the first `pages` of RAM.
fn snapshot_file(pages: u64) -> tempfile::NamedTempFile {
    let header = Header {
        id: StreamId(*b"lazy filling of "),
        metadata: Metadata::None,
        base: None,
        indexed: true,
    };
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let mut encoder = Encoder::new(&header, Compression::Lz4).unwrap();
    let mut writer = StreamWriter::new(&mut file, header).unwrap();
    let mut chunk = stream::Chunk::new();
    for start in (0..pages).step_by(CHUNK as usize) {
        let mut batch = Batch::new(Metadata::None);
        for page in start..start + CHUNK {
            batch.push(FIRST + page, &content(page), None).unwrap();
        }
        encoder.pages(&batch, &mut chunk).unwrap();
        writer.write(&chunk).unwrap();
    }
    writer.finish().unwrap();
    file
}

#[test]
fn a_snapshot_whose_file_was_deleted_is_restored() {
    let Some(memory) = memory(1024) else { return };
    let file = snapshot_file(1024);
    let snapshot = Snapshot::open_whole(file.reopen().unwrap()).unwrap();
    file.close().unwrap();
    let pages = SnapshotPages::new(snapshot);
    let fill = started(&memory, pages).unwrap();
    assert!(read(&memory, 900) == content(900));
    fill.wait().unwrap();
    assert!((0..1024).all(|page| read(&memory, page) == content(page)));
}

#[test]
fn of_a_snapshot_that_is_damaged_meanwhile_nothing_wrong_is_placed() {
    let Some(memory) = memory(1024) else { return };
    let mut file = snapshot_file(1024);
    let snapshot = Snapshot::open_whole(file.reopen().unwrap()).unwrap();
    let whole = fs::read(file.path()).unwrap();
    let middle = whole.len() / 2;
    let mut damaged = whole.clone();
    damaged[middle] ^= 1;
    file.rewind().unwrap();
    file.write_all(&damaged).unwrap();

    let pages = SnapshotPages::new(snapshot);
    let fill = started(&memory, pages).unwrap();
    let failure = fill.wait().unwrap_err();
    assert!(failure.to_string().contains("damaged"), "{failure}");

    file.rewind().unwrap();
    file.write_all(&whole).unwrap();
    fill.retry();
    fill.wait().unwrap();
    assert!((0..1024).all(|page| read(&memory, page) == content(page)));
}

#[test]
fn of_a_snapshot_that_is_cut_off_meanwhile_the_rest_is_waited_for() {
    let Some(memory) = memory(1024) else { return };
    let file = snapshot_file(1024);
    let snapshot = Snapshot::open_whole(file.reopen().unwrap()).unwrap();
    file.as_file()
        .set_len(file.as_file().metadata().unwrap().len() / 2)
        .unwrap();

    let pages = SnapshotPages::new(snapshot);
    let fill = started(&memory, pages).unwrap();
    let failure = fill.wait().unwrap_err();
    assert!(failure.to_string().contains("cut off"), "{failure}");
    assert!(touch(&memory, 1023).recv_timeout(SHORT).is_err());
    assert!(read(&memory, 0) == content(0));
}

fn refused(memory: &Arc<GuestMemory>, source: Source) -> Error {
    started(memory, source).err().unwrap()
}

#[test]
fn memory_that_was_touched_is_refused() {
    let Some(memory) = memory(1024) else { return };
    memory.ram().write_obj(1u8, address(700)).unwrap();
    let error = refused(&memory, source(&[0..1], |_| Ok(())));
    assert!(matches!(error, Error::InUse { .. }), "{error}");
}

#[test]
fn older_contents_are_replaced_where_the_source_has_newer_ones() {
    const PAGES: u64 = 2048;
    let Some(memory) = memory(PAGES) else { return };
    for page in 0..PAGES {
        let old = GuestAddress(address(page).0 + 8);
        memory.ram().write_obj(page, old).unwrap();
    }
    let before = Before::Placed(Arc::new(Untagged::new(memory.size())));
    let runs: Vec<_> = (0..1024).step_by(4).map(|at| at..at + 1).collect();
    let source = source(&runs, |_| Ok(()));
    let fill = LazyFill::start(memory.clone(), source, before, Threads::DEFAULT, |_| {}).unwrap();

    for page in shuffled(PAGES, 3) {
        let replaced = page < 1024 && page % 4 == 0;
        let mut old = [0; PAGE_SIZE as usize];
        old[8..16].copy_from_slice(&page.to_ne_bytes());
        let expected = if replaced { content(page) } else { old };
        assert!(read(&memory, page) == expected, "page {page}");
    }
    fill.wait().unwrap();
}

#[test]
fn pages_outside_of_memory_are_refused() {
    let Some(memory) = memory(1024) else { return };
    let error = refused(&memory, source(&[1000..1025], |_| Ok(())));
    assert_eq!(
        error.to_string(),
        "pages 0x403e8 to 0x40400 are not all in the guest's 4 MiB of memory"
    );
}

#[test]
fn a_page_from_two_places_is_refused() {
    let Some(memory) = memory(1024) else { return };
    let error = refused(&memory, source(&[0..10, 9..12], |_| Ok(())));
    assert!(matches!(error, Error::Twice { .. }), "{error}");
}

#[test]
fn tags_are_refused_where_there_is_no_tag_mapping() {
    let Some(memory) = memory(1024) else { return };
    let mut tagged = source(&[0..10], |_| Ok(()));
    tagged.metadata = Metadata::ArmMte;
    let error = refused(&memory, tagged);
    assert!(
        matches!(error, Error::Unsupported(Unsupported::TagCopy)),
        "{error}"
    );
}

#[test]
fn private_memory_is_refused() {
    let plan = MemoryPlan {
        memory_file: false,
        ..PLAN
    };
    let memory = Arc::new(GuestMemory::new(4 << 20, plan).unwrap());
    let error = refused(&memory, source(&[0..10], |_| Ok(())));
    assert!(matches!(
        error,
        Error::Unsupported(Unsupported::PrivateMemory)
    ));
    assert!(matches!(support(plan), Err(Unsupported::PrivateMemory)));
}

#[test]
fn the_bulk_copy_of_tags_is_refused() {
    let plan = MemoryPlan {
        tags: Some(TagMethod::Ioctl),
        ..PLAN
    };
    assert!(matches!(support(plan), Err(Unsupported::TagCopy)));
}

#[test]
fn reserved_huge_pages_are_refused() {
    let plan = MemoryPlan {
        huge_pages: true,
        ..PLAN
    };
    assert!(matches!(support(plan), Err(Unsupported::HugePages)));
}

#[test]
fn memory_of_any_size_is_watched_in_few_blocks() {
    assert_eq!(block_size(512 << 20), 2 << 20);
    assert_eq!(block_size(16 << 30), 2 << 20);
    assert_eq!(block_size((16 << 30) + PAGE_SIZE), 2 << 20);
    assert_eq!(block_size(1 << 40), 128 << 20);
}
