//! How fast a guest that stands still goes from one memory to another over loopback: `cargo xtask bench migration-native`.
//!
//! All of it is as in a migration: [`migration::depart`] on one side, [`migration::Receiver`] on the other, TCP of `transport`
//! between them, nothing compressed. Beside it stands a plain copy, in the same run and by turns: the same bytes from the same
//! memory written to as many sockets and read into the same memory, with no record, no check and no tags. The tags are those of a
//! Python interpreter with a tagged heap. As a test it sends little, and no figure is judged.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroU8;
use std::ops::Range;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use migration::{
    Arriving, Closer, Departing, Departure, Dial, Listen, MachineError, Options, Peer, Pending,
    Progress, Receiver, SavedState, Wire, depart,
};
use mte::TagPage;
use stream::{Batch, Compression, Metadata, PAGE_SIZE, Page, PageSet, PageSink, PageSource};
use transport::{Address, Connection, Listener, Unprotected, connect};

/// Pages that are sent: 1 GiB.
const PAGES: u64 = 1 << 18;
/// Pages of a chunk, and of what a plain copy writes and reads at once.
const AT_ONCE: usize = 64;
const ROUNDS: usize = 9;
const GOAL: f64 = 0.7;
const SOON: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let is_test = !std::env::args().any(|arg| arg == "--bench");
    let (pages, rounds) = if is_test {
        (1 << 10, 1)
    } else {
        (PAGES, ROUNDS)
    };
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "{} MiB over loopback TCP, medians of {rounds} rounds by turns, load at first {}",
        (pages as usize * PAGE_SIZE) >> 20,
        load.trim()
    );
    println!("                       plain copy   migration   migration/plain copy");
    let mut met = true;
    for (what, metadata) in [
        ("data", Metadata::None),
        ("data and tags", Metadata::ArmMte),
    ] {
        let source = Arc::new(Source::new(metadata, pages));
        let sink = Arc::new(Sink::new(metadata, pages));
        for connections in [1, 2] {
            met &= measure(what, &source, &sink, connections, rounds);
        }
    }
    match met || is_test {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn measure(
    what: &str,
    source: &Arc<Source>,
    sink: &Arc<Sink>,
    connections: u8,
    rounds: usize,
) -> bool {
    // Both have touched all memory before time is taken.
    plain_copy(source, sink, connections);
    migrate(source, sink, connections);
    let bytes = size_of_val(source.data.as_slice()) as f64;
    let rounds: Vec<[f64; 2]> = (0..rounds)
        .map(|_| {
            [
                plain_copy(source, sink, connections),
                migrate(source, sink, connections),
            ]
            .map(|time| bytes / 1e9 / time.as_secs_f64())
        })
        .collect();
    let [plain, migration] =
        [0, 1].map(|which| median(rounds.iter().map(|round| round[which]).collect()));
    let ratio = median(rounds.iter().map(|[plain, ours]| ours / plain).collect());
    let goal = match (rounds.len(), ratio >= GOAL) {
        (1, _) => String::new(),
        (_, true) => format!("   goal: at least {GOAL:.2}   reached"),
        (_, false) => format!("   goal: at least {GOAL:.2}   MISSED"),
    };
    let links = if connections == 1 { "link " } else { "links" };
    println!(
        "  {what:13} {connections} {links} {plain:6.2} GB/s {migration:6.2} GB/s {ratio:12.2}{goal}"
    );
    ratio >= GOAL
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Sends all data, each connection its share, and nothing else.
fn plain_copy(source: &Source, sink: &Sink, connections: u8) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
    let address = listener.local_addr().expect("it is bound");
    let share = source.data.len() / usize::from(connections);
    let begun = Instant::now();
    thread::scope(|scope| {
        for part in source.data.chunks(share) {
            scope.spawn(move || {
                let mut to = TcpStream::connect(address).expect("somebody listens");
                to.set_nodelay(true).expect("it is TCP");
                for pages in part.chunks(AT_ONCE) {
                    to.write_all(pages.as_flattened()).expect("it is read");
                }
            });
        }
        for part in sink.blocks.chunks(share / AT_ONCE) {
            let (mut from, _) = listener.accept().expect("somebody connects");
            scope.spawn(move || {
                for block in part {
                    let mut block = block.lock().expect("nothing panics with it");
                    from.read_exact(block.data.as_flattened_mut())
                        .expect("it is written");
                }
            });
        }
    });
    begun.elapsed()
}

/// Moves a guest that has nothing but this memory.
fn migrate(source: &Arc<Source>, sink: &Arc<Sink>, connections: u8) -> Duration {
    let any: Address = "tcp://127.0.0.1:0".parse().expect("it is an address");
    let listener = Listener::bind(&any, None, Unprotected::Refused).expect("loopback has ports");
    let line = Line(listener.local_address().clone());
    let receiver = Receiver::new(Door(listener), SOON).expect("there are threads");
    let options = Options {
        connections: NonZeroU8::new(connections).expect("one or two"),
        compression: Compression::None,
        ..Options::default()
    };
    let begun = Instant::now();
    let time = thread::scope(|scope| {
        scope.spawn(|| {
            let mut guest = Comer(sink.clone());
            let mut held = receiver
                .receive(&mut guest, &Progress::default())
                .expect("nothing breaks");
            held.wait();
            held.attend(None, |_| {});
        });
        let departure = depart(
            &mut Leaver(source.clone()),
            &line,
            &options,
            &Progress::default(),
        );
        let Departure::Gone(report) = departure else {
            panic!("it did not arrive: {departure:?}");
        };
        assert_eq!(report.pages, source.pages().end);
        begun.elapsed()
    });
    sink.is_like(source);
    time
}

/// What a guest's memory is.
struct Source {
    metadata: Metadata,
    data: Vec<Page>,
    tags: Vec<TagPage>,
}

impl Source {
    fn new(metadata: Metadata, pages: u64) -> Self {
        let corpus = corpus();
        let mut state = 1u64;
        let data = (0..pages).map(|_| {
            let mut page = [0; PAGE_SIZE];
            for word in page.as_chunks_mut().0 {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                *word = state.to_le_bytes();
            }
            page
        });
        Self {
            metadata,
            data: data.collect(),
            tags: corpus.into_iter().cycle().take(pages as usize).collect(),
        }
    }

    fn pages(&self) -> Range<u64> {
        0..self.data.len() as u64
    }
}

/// The pages of tagcodec's corpus of Python.
fn corpus() -> Vec<TagPage> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tagcodec/corpora/python3.tags.xz"
    );
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| lzma_rust2::XzReader::new(file, false).read_to_end(&mut bytes))
        .unwrap_or_else(|error| panic!("{path}: {error}"));
    let (mut rest, mut pages) = (bytes.as_slice(), Vec::new());
    // Each mapping: its address and its length.
    while let Some((header, behind)) = rest.split_first_chunk::<16>() {
        let length = u64::from_le_bytes(*header.last_chunk().expect("8 of 16 bytes"));
        let (tags, behind) = behind.split_at(length as usize / 32);
        pages.extend(
            tags.as_chunks()
                .0
                .iter()
                .map(|tags| TagPage::from_packed(*tags)),
        );
        rest = behind;
    }
    pages
}

impl PageSource for Source {
    fn metadata(&self) -> Metadata {
        self.metadata
    }

    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let end = self.pages().end;
        Ok((from < end).then_some(from..end))
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        let first = first as usize;
        data.copy_from_slice(&self.data[first..first + data.len()]);
        tags.clone_from_slice(&self.tags[first..first + tags.len()]);
        Ok(())
    }
}

/// Memory that pages are placed in: in blocks, so that several threads can.
struct Sink {
    metadata: Metadata,
    blocks: Vec<Mutex<Block>>,
}

struct Block {
    data: Box<[Page; AT_ONCE]>,
    tags: Vec<TagPage>,
}

impl Sink {
    fn new(metadata: Metadata, pages: u64) -> Self {
        let block = || {
            let data = vec![[0; PAGE_SIZE]; AT_ONCE].into_boxed_slice();
            Mutex::new(Block {
                data: data.try_into().expect("it has as many"),
                tags: vec![TagPage::ZERO; AT_ONCE],
            })
        };
        Self {
            metadata,
            blocks: (0..pages as usize / AT_ONCE).map(|_| block()).collect(),
        }
    }

    fn is_like(&self, source: &Source) {
        for (i, block) in self.blocks.iter().enumerate() {
            let block = block.lock().expect("nothing panics with it");
            let pages = i * AT_ONCE..(i + 1) * AT_ONCE;
            assert!(*block.data == source.data[pages.clone()]);
            assert!(!self.metadata.has_tags() || block.tags == source.tags[pages]);
        }
    }
}

impl PageSink for Sink {
    fn metadata(&self) -> Metadata {
        self.metadata
    }

    fn place(&self, pages: &Batch) -> io::Result<()> {
        for run in pages.runs() {
            let (mut first, mut data, mut tags) = (run.first as usize, run.data, run.tags);
            while !data.is_empty() {
                let placed = first % AT_ONCE..AT_ONCE.min(first % AT_ONCE + data.len());
                let mut block = self.blocks[first / AT_ONCE]
                    .lock()
                    .expect("nothing panics with it");
                let (here, rest) = data.split_at(placed.len());
                block.data[placed.clone()].copy_from_slice(here);
                if self.metadata.has_tags() {
                    let (here, rest) = tags.split_at(placed.len());
                    block.tags[placed].clone_from_slice(here);
                    tags = rest;
                }
                first += here.len();
                data = rest;
            }
        }
        Ok(())
    }

    fn discard(&self, _: Range<u64>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

struct Leaver(Arc<Source>);

impl Departing for Leaver {
    type Pages = Source;

    fn pages(&self) -> Arc<Source> {
        self.0.clone()
    }

    fn offer(&mut self) -> Result<Vec<SavedState>, MachineError> {
        Ok(Vec::new())
    }

    fn watch(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn changes(&mut self) -> Result<PageSet, MachineError> {
        Ok(PageSet::none(self.0.pages()))
    }

    fn slow(&mut self, _: u8) {}

    fn stop(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<SavedState>, MachineError> {
        Ok(Vec::new())
    }

    fn go_on(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}

struct Comer(Arc<Sink>);

impl Arriving for Comer {
    type Sink = Sink;

    fn accept(&mut self, _: &[SavedState], _: Metadata) -> Result<(), MachineError> {
        Ok(())
    }

    fn sink(&self) -> Arc<Sink> {
        self.0.clone()
    }

    fn pages(&self) -> Range<u64> {
        0..(self.0.blocks.len() * AT_ONCE) as u64
    }

    fn fetches(&self) -> Result<u8, MachineError> {
        Ok(1)
    }

    fn load(&mut self, _: &[SavedState], _: Option<Arc<Peer>>) -> Result<(), MachineError> {
        Ok(())
    }
}

struct Carried(Connection);

impl Read for Carried {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Carried {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Wire for Carried {
    fn set_patience(&mut self, patience: Duration) -> io::Result<()> {
        self.0.set_patience(Some(patience));
        Ok(())
    }

    fn closer(&self) -> Closer {
        let closer = self.0.closer();
        Arc::new(move || closer.close())
    }

    fn peer(&self) -> String {
        self.0.peer().to_owned()
    }
}

struct Line(Address);

impl Dial for Line {
    fn dial(&self) -> io::Result<Box<dyn Wire>> {
        let connection = connect(&self.0, None, Instant::now() + SOON)?;
        Ok(Box::new(Carried(connection)))
    }

    fn peer(&self) -> String {
        self.0.to_string()
    }
}

struct Door(Listener);

impl Listen for Door {
    fn accept(&self) -> io::Result<Pending> {
        let pending = self.0.accept(None)?;
        Ok(Box::new(move || {
            let connection = pending.establish(Instant::now() + SOON)?;
            Ok(Box::new(Carried(connection)) as Box<dyn Wire>)
        }))
    }

    fn closer(&self) -> Closer {
        let closer = self.0.closer();
        Arc::new(move || closer.close())
    }
}
