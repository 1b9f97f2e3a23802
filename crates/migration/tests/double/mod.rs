//! Two sides in one process: guests that are memory and nothing else, and a network that breaks where it is told to.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{self, Receiver as Queue, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use migration::{
    Arriving, Closer, Departing, Dial, Fill, Filling, Listen, MachineError, Peer, Pending,
    SavedState, Wire,
};
use mte::{Tag, TagPage};
use stream::{Batch, Metadata, PAGE_SIZE, Page, PageSet, PageSink, PageSource};

/// The first page of RAM.
pub const FIRST: u64 = 0x40000;
/// Pages of RAM.
pub const PAGES: u64 = 512;
pub const RAM: Range<u64> = FIRST..FIRST + PAGES;

#[derive(Clone, PartialEq, Eq)]
pub struct Content {
    pub data: Page,
    pub tags: TagPage,
}

/// Memory: what was never populated is not there.
pub struct Memory {
    pages: Mutex<Vec<Option<Box<Content>>>>,
    dirty: Mutex<PageSet>,
    /// Milliseconds that it takes to read from it.
    pub slowness: AtomicU64,
    /// Pages that are written when the first one of them was read, once.
    pub written_when_read: Mutex<Vec<u64>>,
}

impl Memory {
    pub fn empty() -> Arc<Self> {
        Arc::new(Self {
            pages: Mutex::new(vec![None; PAGES as usize]),
            dirty: Mutex::new(PageSet::none(RAM)),
            slowness: AtomicU64::new(0),
            written_when_read: Mutex::default(),
        })
    }

    /// Every second page is there; each differs in data and tags.
    pub fn filled() -> Arc<Self> {
        let memory = Self::empty();
        for page in RAM.step_by(2) {
            memory.write(page, page);
        }
        memory
    }

    pub fn write(&self, page: u64, value: u64) {
        let mut data = [0; PAGE_SIZE];
        // Some pages have tags and no data.
        if !value.is_multiple_of(5) {
            data.chunks_exact_mut(8)
                .for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
        }
        let tags = TagPage::filled(Tag::from_low_bits(value as u8));
        self.pages.lock().unwrap()[(page - FIRST) as usize] =
            Some(Box::new(Content { data, tags }));
        self.dirty.lock().unwrap().insert(page..page + 1);
    }

    pub fn contents(&self) -> Vec<Option<Box<Content>>> {
        self.pages.lock().unwrap().clone()
    }

    fn take_dirty(&self) -> PageSet {
        std::mem::replace(&mut *self.dirty.lock().unwrap(), PageSet::none(RAM))
    }
}

impl PageSource for Memory {
    fn metadata(&self) -> Metadata {
        Metadata::ArmMte
    }

    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let pages = self.pages.lock().unwrap();
        let there = |page: &u64| pages[(*page - FIRST) as usize].is_some();
        Ok((from.max(FIRST)..RAM.end)
            .find(there)
            .map(|page| page..page + 1))
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        thread::sleep(Duration::from_millis(self.slowness.load(SeqCst)));
        let data_len = data.len() as u64;
        let pages = self.pages.lock().unwrap();
        for (i, (data, tags)) in data.iter_mut().zip(tags).enumerate() {
            let content = &pages[(first - FIRST) as usize + i];
            (*data, *tags) = content
                .as_ref()
                .map_or(([0; PAGE_SIZE], TagPage::ZERO), |content| {
                    (content.data, content.tags.clone())
                });
        }
        drop(pages);
        let mut then = self.written_when_read.lock().unwrap();
        let read = first..first + data_len;
        if then.first().is_some_and(|page| read.contains(page)) {
            then.drain(..).for_each(|page| self.write(page, 1 << 20));
        }
        Ok(())
    }
}

/// Memory that refuses pages after so many.
pub struct Sink {
    pub memory: Arc<Memory>,
    room: AtomicU64,
}

impl PageSink for Sink {
    fn metadata(&self) -> Metadata {
        Metadata::ArmMte
    }

    fn place(&self, batch: &Batch) -> io::Result<()> {
        for (page, data, tags) in batch.iter() {
            if !RAM.contains(&page) {
                return Err(io::Error::other("that is no memory"));
            }
            if self.room.fetch_sub(1, SeqCst) == 0 {
                return Err(io::Error::other("there is no memory left"));
            }
            let content = Content {
                data: *data,
                tags: tags.unwrap().clone(),
            };
            self.memory.pages.lock().unwrap()[(page - FIRST) as usize] = Some(Box::new(content));
        }
        Ok(())
    }

    fn discard(&self, _: Range<u64>) -> io::Result<()> {
        panic!("migrations discard nothing")
    }
}

/// A guest that leaves. While it runs it writes data and tags.
pub struct Leaver {
    pub memory: Arc<Memory>,
    pub runs: Arc<AtomicBool>,
    writer: Option<thread::JoinHandle<()>>,
    /// Pages written in a millisecond.
    busy: u64,
    pub slowed: u8,
    /// Why its state cannot be had.
    pub secret: Option<&'static str>,
}

impl Leaver {
    pub fn new(busy: u64) -> Self {
        let mut this = Self {
            memory: Memory::filled(),
            runs: Arc::new(AtomicBool::new(false)),
            writer: None,
            busy,
            slowed: 0,
            secret: None,
        };
        this.run();
        this
    }

    fn run(&mut self) {
        self.runs.store(true, SeqCst);
        let (memory, runs, busy) = (self.memory.clone(), self.runs.clone(), self.busy);
        self.writer = Some(thread::spawn(move || {
            let mut value = 1;
            while runs.load(SeqCst) {
                for _ in 0..busy {
                    memory.write(FIRST + value * 7 % PAGES, value);
                    value += 1;
                }
                thread::sleep(Duration::from_millis(1));
            }
        }));
    }

    pub fn halt(&mut self) {
        self.runs.store(false, SeqCst);
        if let Some(writer) = self.writer.take() {
            writer.join().unwrap();
        }
    }
}

fn state(name: &str, data: &[u8]) -> SavedState {
    SavedState {
        name: name.into(),
        version: 1,
        data: data.into(),
    }
}

impl Departing for Leaver {
    type Pages = Memory;

    fn pages(&self) -> Arc<Memory> {
        self.memory.clone()
    }

    fn offer(&mut self) -> Result<Vec<SavedState>, MachineError> {
        Ok(vec![state("config", b"one cpu")])
    }

    fn watch(&mut self) -> Result<(), MachineError> {
        self.memory.take_dirty();
        Ok(())
    }

    fn changes(&mut self) -> Result<PageSet, MachineError> {
        Ok(self.memory.take_dirty())
    }

    fn slow(&mut self, percent: u8) {
        self.slowed = percent;
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        self.halt();
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<SavedState>, MachineError> {
        match self.secret {
            Some(reason) => Err(reason.into()),
            None => Ok(vec![state("machine", b"registers")]),
        }
    }

    fn go_on(&mut self) -> Result<(), MachineError> {
        if !self.runs.load(SeqCst) {
            self.run();
        }
        Ok(())
    }
}

impl Drop for Leaver {
    fn drop(&mut self) {
        self.halt();
    }
}

/// A machine that a guest comes to.
pub struct Comer {
    sink: Arc<Sink>,
    pub refusal: Option<&'static str>,
    pub load_refusal: Option<&'static str>,
    pub fetch_refusal: Option<&'static str>,
    pub filling: Option<Fetching>,
    /// A guest was offered that can be had.
    pub accepted: Arc<AtomicBool>,
}

impl Comer {
    pub fn new(room: u64) -> Self {
        Self {
            sink: Arc::new(Sink {
                memory: Memory::empty(),
                room: AtomicU64::new(room),
            }),
            refusal: None,
            load_refusal: None,
            fetch_refusal: None,
            filling: None,
            accepted: Arc::default(),
        }
    }

    pub fn memory(&self) -> Arc<Memory> {
        self.sink.memory.clone()
    }
}

impl Arriving for Comer {
    type Sink = Sink;

    fn accept(&mut self, offer: &[SavedState], metadata: Metadata) -> Result<(), MachineError> {
        assert_eq!(offer, [state("config", b"one cpu")]);
        assert_eq!(metadata, Metadata::ArmMte);
        if let Some(reason) = self.refusal.take() {
            return Err(reason.into());
        }
        self.accepted.store(true, SeqCst);
        Ok(())
    }

    fn sink(&self) -> Arc<Sink> {
        self.sink.clone()
    }

    fn pages(&self) -> Range<u64> {
        RAM
    }

    fn fetches(&self) -> Result<u8, MachineError> {
        match self.fetch_refusal {
            Some(reason) => Err(reason.into()),
            None => Ok(2),
        }
    }

    fn load(
        &mut self,
        states: &[SavedState],
        missing: Option<Arc<Peer>>,
    ) -> Result<(), MachineError> {
        assert_eq!(states, [state("machine", b"registers")]);
        if let Some(reason) = self.load_refusal {
            return Err(reason.into());
        }
        self.filling = missing.map(|peer| Fetching::start(peer, self.sink.clone()));
        Ok(())
    }
}

/// Pages that come while the guest runs: what `memory::lazy` is to a machine.
#[derive(Clone)]
pub struct Fetching(Arc<Fetched>);

struct Fetched {
    peer: Arc<Peer>,
    sink: Arc<Sink>,
    left: Mutex<VecDeque<u32>>,
    fill: Mutex<Fill>,
    on_way: AtomicUsize,
}

impl Fetching {
    fn start(peer: Arc<Peer>, sink: Arc<Sink>) -> Self {
        let groups: std::collections::BTreeSet<u32> = peer.runs().map(|(_, group)| group).collect();
        let this = Self(Arc::new(Fetched {
            peer,
            sink,
            left: Mutex::new(groups.into_iter().collect()),
            fill: Mutex::new(Fill::Filling(0)),
            on_way: AtomicUsize::new(0),
        }));
        this.go_on();
        this
    }

    /// Brings what is left, on two threads.
    fn go_on(&self) {
        *self.0.fill.lock().unwrap() = Fill::Filling(0);
        self.0.on_way.store(2, SeqCst);
        for _ in 0..2 {
            let fetched = self.0.clone();
            thread::spawn(move || fetched.bring());
        }
    }
}

impl Filling for Fetching {
    fn state(&self) -> Fill {
        self.0.fill.lock().unwrap().clone()
    }

    fn retry(&self) {
        if let Fill::Failed(_) = self.state() {
            while self.0.on_way.load(SeqCst) > 0 {
                thread::yield_now();
            }
            self.go_on();
        }
    }
}

impl Fetched {
    fn bring(&self) {
        let mut fetcher = self.peer.fetcher();
        loop {
            let mut left = self.left.lock().unwrap();
            let Some(group) = left.pop_front() else {
                break;
            };
            fetcher.expect([group].into_iter().chain(left.iter().copied().take(3)));
            drop(left);
            match fetcher.fetch(group) {
                Ok(batch) => self.sink.place(batch).unwrap(),
                Err(error) => {
                    // One of the two hears of it when the link may be mended already.
                    if group % 2 == 0 {
                        thread::sleep(Duration::from_millis(30));
                    }
                    self.left.lock().unwrap().push_front(group);
                    *self.fill.lock().unwrap() = Fill::Failed(error.to_string());
                    break;
                }
            }
        }
        let last = self.on_way.fetch_sub(1, SeqCst) == 1;
        if last && self.left.lock().unwrap().is_empty() {
            *self.fill.lock().unwrap() = Fill::Complete;
        }
    }
}

/// What becomes of a message at which the network breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    Arrives,
    IsLost,
    /// It is lost, and all after it, and nobody is told.
    Stalls,
}

/// A network that breaks, all of it, at a message.
pub struct Network {
    incoming: Mutex<Option<Sender<PipeEnd>>>,
    /// Messages so far.
    pub messages: AtomicUsize,
    break_at: Mutex<Option<(usize, Last)>>,
    broken: AtomicBool,
    stalled: AtomicBool,
    /// Reads bring few bytes, late, each connection at a pace of its own.
    pub crumbles: AtomicBool,
    dialled: AtomicUsize,
    /// How often it broke: connections from before are dead.
    breaks: AtomicUsize,
    change: Mutex<u64>,
    changed: Condvar,
}

impl Network {
    pub fn new() -> (Arc<Self>, Door) {
        let (send, receive) = mpsc::channel();
        let network = Arc::new(Self {
            incoming: Mutex::new(Some(send)),
            messages: AtomicUsize::new(0),
            break_at: Mutex::new(None),
            broken: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            crumbles: AtomicBool::new(false),
            dialled: AtomicUsize::new(0),
            breaks: AtomicUsize::new(0),
            change: Mutex::new(0),
            changed: Condvar::new(),
        });
        (network, Door(Mutex::new(receive)))
    }

    pub fn break_at(&self, message: usize, last: Last) {
        *self.break_at.lock().unwrap() = Some((message, last));
    }

    pub fn is_broken(&self) -> bool {
        self.broken.load(SeqCst) || self.stalled.load(SeqCst)
    }

    /// New connections work; those from before stay broken.
    pub fn mend(&self) {
        *self.break_at.lock().unwrap() = None;
        if self.stalled.swap(false, SeqCst) {
            self.breaks.fetch_add(1, SeqCst);
        }
        self.broken.store(false, SeqCst);
    }

    pub fn cut(&self) {
        self.breaks.fetch_add(1, SeqCst);
        self.broken.store(true, SeqCst);
        self.tell();
    }

    fn tell(&self) {
        *self.change.lock().unwrap() += 1;
        self.changed.notify_all();
    }

    /// A message is written, which `arrive` brings to the other side. It does so before the network breaks.
    fn pass(&self, arrive: impl FnOnce()) {
        if self.is_broken() {
            return;
        }
        let number = self.messages.fetch_add(1, SeqCst);
        let breaks = match *self.break_at.lock().unwrap() {
            Some((at, last)) if number == at => Some(last),
            _ => None,
        };
        match breaks {
            None => arrive(),
            Some(Last::Arrives) => {
                arrive();
                self.cut();
            }
            Some(Last::IsLost) => self.cut(),
            Some(Last::Stalls) => self.stalled.store(true, SeqCst),
        }
    }
}

#[derive(Default)]
struct Pipe(Mutex<VecDeque<u8>>);

struct PipeEnd {
    network: Arc<Network>,
    read: Arc<Pipe>,
    write: Arc<Pipe>,
    closed: Arc<AtomicBool>,
    /// The network's breaks when it was dialled.
    breaks: usize,
    patience: Duration,
    /// What its next bytes depend on, if the network crumbles.
    pace: u64,
}

impl PipeEnd {
    /// How many bytes come at once.
    fn most(&mut self) -> usize {
        if !self.network.crumbles.load(SeqCst) {
            return usize::MAX;
        }
        self.pace = self
            .pace
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let random = (self.pace >> 33) as usize;
        if random.is_multiple_of(16) {
            thread::sleep(Duration::from_micros(random as u64 % 2000));
        }
        1 + random % 5000
    }

    fn is_closed(&self) -> bool {
        self.closed.load(SeqCst) || self.network.breaks.load(SeqCst) != self.breaks
    }
}

impl Read for PipeEnd {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let begun = Instant::now();
        let most = self.most();
        loop {
            let change = self.network.change.lock().unwrap();
            let closed = self.is_closed();
            let read = {
                let mut there = self.read.0.lock().unwrap();
                let length = there.len().min(bytes.len()).min(most);
                for (to, from) in bytes.iter_mut().zip(there.drain(..length)) {
                    *to = from;
                }
                length
            };
            if read > 0 || closed {
                return Ok(read);
            }
            if begun.elapsed() > self.patience {
                return Err(io::ErrorKind::TimedOut.into());
            }
            drop(
                self.network
                    .changed
                    .wait_timeout(change, Duration::from_millis(20))
                    .unwrap(),
            );
        }
    }
}

impl Write for PipeEnd {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_closed() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.network
            .pass(|| self.write.0.lock().unwrap().extend(bytes));
        self.network.tell();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Wire for PipeEnd {
    fn set_patience(&mut self, patience: Duration) -> io::Result<()> {
        self.patience = patience;
        Ok(())
    }

    fn closer(&self) -> Closer {
        let (closed, network) = (self.closed.clone(), self.network.clone());
        Arc::new(move || {
            closed.store(true, SeqCst);
            network.tell();
        })
    }

    fn peer(&self) -> String {
        "the other side".into()
    }
}

impl Drop for PipeEnd {
    fn drop(&mut self) {
        self.closed.store(true, SeqCst);
        self.network.tell();
    }
}

/// How the source reaches the destination.
pub struct Line(pub Arc<Network>);

impl Dial for Line {
    fn dial(&self) -> io::Result<Box<dyn Wire>> {
        if self.0.is_broken() {
            return Err(io::ErrorKind::HostUnreachable.into());
        }
        let closed = Arc::new(AtomicBool::new(false));
        let (one, other) = (Arc::<Pipe>::default(), Arc::<Pipe>::default());
        let end = |read: &Arc<Pipe>, write: &Arc<Pipe>| PipeEnd {
            network: self.0.clone(),
            read: read.clone(),
            write: write.clone(),
            closed: closed.clone(),
            breaks: self.0.breaks.load(SeqCst),
            patience: Duration::from_secs(5),
            pace: self.0.dialled.fetch_add(1, SeqCst) as u64,
        };
        let there = end(&one, &other);
        let incoming = self.0.incoming.lock().unwrap();
        let sent = incoming.as_ref().map(|incoming| incoming.send(there));
        match sent {
            Some(Ok(())) => Ok(Box::new(end(&other, &one))),
            _ => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }

    fn peer(&self) -> String {
        "the destination".into()
    }
}

/// Where the destination takes connections.
pub struct Door(Mutex<Queue<PipeEnd>>);

impl Listen for Door {
    fn accept(&self) -> io::Result<Pending> {
        let end = self
            .0
            .lock()
            .unwrap()
            .recv()
            .map_err(|_| io::ErrorKind::NotConnected)?;
        Ok(Box::new(move || Ok(Box::new(end) as Box<dyn Wire>)))
    }

    fn closer(&self) -> Closer {
        Arc::new(|| {})
    }
}
