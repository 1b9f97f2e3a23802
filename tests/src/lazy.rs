//! Memory that comes as it is touched: data and tags of each page at once, for threads and for a Linux guest at work.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use engine::kvm::KvmHypervisor;
use libtest_mimic::{Failed, Trial};
use mte::{Tag, TagPage};
use stream::{
    Batch, Chunk, Compression, Encoder, Header, Metadata, Page, ReadAt, Snapshot, StreamId,
    StreamWriter,
};
use vm_memory::{Bytes, GuestAddress};
use vmm::layout::{PAGE_SIZE, RAM_START};
use vmm::machine::{Ending, Machine};
use vmm::memory::lazy::{Before, Event, LazyFill, Progress, SnapshotPages, Threads};
use vmm::memory::tags::{AliasTags, TagStore};
use vmm::memory::{GuestMemory, MemoryPlan, TagAccess};

use crate::life::{self, Result};

const FIRST: u64 = RAM_START / PAGE_SIZE;
const CHUNK: u64 = 64;

pub fn tests() -> Vec<Trial> {
    let test = |name: &str, run: fn() -> Result<()>| {
        Trial::test(name, move || run().map_err(|e| Failed::from(e.to_string())))
    };
    vec![
        test(
            "lazily_filled_memory_is_right_at_the_first_touch",
            right_at_the_first_touch,
        ),
        test(
            "lazily_filled_memory_serves_a_busy_guest",
            serves_a_busy_guest,
        ),
        test(
            "a_busy_guest_waits_while_lazily_filled_memory_has_no_source",
            waits_while_there_is_no_source,
        ),
    ]
}

/// A snapshot in memory, which takes its time, and fails when told to.
struct File {
    bytes: Vec<u8>,
    delay: Duration,
    broken: Arc<AtomicBool>,
}

impl ReadAt for File {
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        thread::sleep(self.delay);
        if self.broken.load(Ordering::Relaxed) {
            return Err(io::Error::other("the disk is gone"));
        }
        self.bytes.read_exact_at(bytes, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.bytes.size()
    }
}

fn header() -> Header {
    Header {
        id: StreamId(*b"a lazy lab test "),
        metadata: Metadata::ArmMte,
        base: None,
        indexed: true,
    }
}

/// A snapshot of the pages of `runs`, in chunks of at most [`CHUNK`] pages, with what `read` gives of them.
fn snapshot(
    runs: impl IntoIterator<Item = std::ops::Range<u64>>,
    mut read: impl FnMut(u64) -> Result<(Page, TagPage)>,
) -> Result<Vec<u8>> {
    let mut encoder = Encoder::new(&header(), Compression::Lz4)?;
    let mut writer = StreamWriter::new(Vec::new(), header())?;
    let mut chunk = Chunk::new();
    for run in runs {
        for start in run.clone().step_by(CHUNK as usize) {
            let mut batch = Batch::new(Metadata::ArmMte);
            for page in start..run.end.min(start + CHUNK) {
                let (data, tags) = read(page)?;
                batch.push(page, &data, Some(&tags))?;
            }
            encoder.pages(&batch, &mut chunk)?;
            writer.write(&chunk)?;
        }
    }
    Ok(writer.finish()?.0)
}

/// Data and tags that no other page has. Page 7 is of zeros with tags, page 8 of data without.
fn content(page: u64) -> (Page, TagPage) {
    let mut data = [0; PAGE_SIZE as usize];
    let mut tags = TagPage::ZERO;
    for granule in 0..=u8::MAX {
        let at = usize::from(granule) * 16;
        let word = page << 16 | u64::from(granule) << 1 | 1;
        data[at..at + 8].copy_from_slice(&word.to_ne_bytes());
        let mixed = (word >> 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60;
        tags.set(granule, Tag::from_low_bits(mixed as u8));
    }
    match page - FIRST {
        7 => ([0; PAGE_SIZE as usize], tags),
        8 => (data, TagPage::ZERO),
        _ => (data, tags),
    }
}

fn right_at_the_first_touch() -> Result<()> {
    const PAGES: u64 = 8192;
    let hypervisor = KvmHypervisor::open(KvmHypervisor::DEFAULT_PATH.as_ref())?;
    let capabilities = engine::Hypervisor::capabilities(&hypervisor);
    let plan = MemoryPlan::choose(capabilities, true, TagAccess::Auto, false)?;
    let memory = Arc::new(GuestMemory::new(PAGES * PAGE_SIZE, plan)?);
    // SAFETY: the VM never has a vCPU.
    let _vm = unsafe { memory.new_vm(&hypervisor, true) }?;
    let runs =
        [0..700, 701..702, 2000..2048, 4096..8000].map(|run| FIRST + run.start..FIRST + run.end);
    let file = File {
        bytes: snapshot(runs.clone(), |page| Ok(content(page)))?,
        delay: Duration::from_millis(1),
        broken: Arc::default(),
    };
    let source = SnapshotPages::new(Snapshot::open_whole(file)?);
    let fill = LazyFill::start(
        memory.clone(),
        source,
        Before::Untouched,
        Threads::DEFAULT,
        |_| {},
    )?;
    let tags = AliasTags::new(memory.clone()).ok_or("the memory has no tag mapping")?;

    thread::scope(|scope| {
        for step in [4801, 1237, 3163, 7919] {
            let (memory, tags, runs) = (&memory, &tags, &runs);
            scope.spawn(move || {
                for number in 0..PAGES {
                    let page = FIRST + number * step % PAGES;
                    let held = runs.iter().any(|run| run.contains(&page));
                    let hole = ([0; PAGE_SIZE as usize], TagPage::ZERO);
                    let expected = if held { content(page) } else { hole };
                    // The data first: it is they that wait.
                    let found = (read_data(memory, page), read_tags(tags, page));
                    assert!(found == expected, "page {page:#x}");
                }
            });
        }
    });
    fill.wait()?;
    say(&fill.progress());
    Ok(())
}

fn read_data(memory: &GuestMemory, page: u64) -> Page {
    let mut data = [0; PAGE_SIZE as usize];
    let address = GuestAddress(page * PAGE_SIZE);
    memory.ram().read_slice(&mut data, address).unwrap();
    data
}

fn read_tags(tags: &dyn TagStore, page: u64) -> TagPage {
    let mut found = [TagPage::ZERO];
    tags.read_populated(page * PAGE_SIZE, &mut found).unwrap();
    let [found] = found;
    found
}

fn say(progress: &Progress) {
    let faults = &progress.faults;
    println!(
        "{} of {} pages placed, {} faults: median {:?}, p99 {:?}",
        progress.placed,
        progress.pages,
        faults.count(),
        faults.quantile(0.5).unwrap_or_default(),
        faults.quantile(0.99).unwrap_or_default()
    );
}

/// Moves a guest at work into another machine, whose memory comes as it is touched, from a source that takes `delay` for each
/// chunk and fails while `broken`. `at_work` runs beside the guest, and is told what happens.
fn move_lazily(
    delay: Duration,
    broken: &Arc<AtomicBool>,
    at_work: impl FnOnce(&LazyFill, mpsc::Receiver<Event>) + Send,
) -> Result<Progress> {
    let hypervisor = KvmHypervisor::open(KvmHypervisor::DEFAULT_PATH.as_ref())?;
    let name = format!("lazy-console-{}", delay.as_millis());
    let paths = [0, 1].map(|number| PathBuf::from(format!("{name}-{number}")));
    let mut console = life::open(&paths[0])?;
    let config = life::config("tag-workload --passes 8", 2);
    let mut machine = Machine::new(&hypervisor, &config, &mut console)?;
    life::run_until(&mut machine, &paths[0], 1)?;
    let state = machine.save()?;
    let file = File {
        bytes: snapshot_of(&machine)?,
        delay,
        broken: broken.clone(),
    };
    drop((machine, console));

    let mut console = life::open(&paths[1])?;
    let source = SnapshotPages::new(Snapshot::open_whole(file)?);
    let (send, events) = mpsc::channel();
    let told = move |event| _ = send.send(event);
    let mut fill = None;
    let mut machine = Machine::restored(&hypervisor, &config, &state, &mut console, |pages| {
        let memory = pages.memory().clone();
        fill = Some(LazyFill::start(
            memory,
            source,
            Before::Untouched,
            Threads::DEFAULT,
            told,
        )?);
        Ok(())
    })?;
    let fill = fill.ok_or("the machine was not given its memory")?;
    let ending = thread::scope(|scope| {
        scope.spawn(|| at_work(&fill, events));
        machine.run()
    })?;
    fill.wait()?;
    drop((machine, console));

    let text = std::fs::read_to_string(&paths[1])?;
    assert_eq!(ending, Ending::Off, "{text}");
    assert!(text.contains(" 0 differences"), "{text}");
    assert!(text.contains("guest: exit 0"), "{text}");
    let progress = fill.progress();
    say(&progress);
    Ok(progress)
}

fn snapshot_of(machine: &Machine<KvmHypervisor>) -> Result<Vec<u8>> {
    let memory = machine.memory();
    let tags = machine.tags().ok_or("the guest has no tags")?;
    let all = memory.populated(RAM_START..RAM_START + memory.size());
    let runs: io::Result<Vec<_>> = all
        .map(|range| range.map(|range| range.start / PAGE_SIZE..range.end / PAGE_SIZE))
        .collect();
    snapshot(runs?, |page| {
        Ok((read_data(memory, page), read_tags(&*tags, page)))
    })
}

fn serves_a_busy_guest() -> Result<()> {
    let delay = Duration::from_millis(3);
    let progress = move_lazily(delay, &Arc::default(), |fill, events| {
        fill.wait().unwrap();
        assert!(matches!(events.recv(), Ok(Event::Complete)));
    })?;
    assert_eq!(progress.placed, progress.pages);
    assert!(progress.faults.count() > 100, "{progress:?}");
    Ok(())
}

fn waits_while_there_is_no_source() -> Result<()> {
    let broken = Arc::new(AtomicBool::new(false));
    let delay = Duration::from_millis(4);
    let switch = broken.clone();
    let progress = move_lazily(delay, &broken, move |fill, events| {
        thread::sleep(Duration::from_millis(200));
        switch.store(true, Ordering::Relaxed);
        let failed = events.recv().unwrap();
        assert!(
            matches!(failed, Event::Failed(ref why) if why.to_string().contains("the disk is gone"))
        );
        thread::sleep(Duration::from_secs(1));
        let stood = fill.progress();
        switch.store(false, Ordering::Relaxed);
        fill.retry();
        fill.wait().unwrap();
        assert!(stood.placed < fill.progress().placed);
        assert!(matches!(events.recv(), Ok(Event::Complete)));
    })?;
    assert_eq!(progress.placed, progress.pages);
    Ok(())
}
