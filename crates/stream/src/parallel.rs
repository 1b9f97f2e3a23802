//! Whole memories by many threads: encoded, and written in order; read out of order, and placed.

use std::io::Write;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::batch::{Batch, same_metadata};
use crate::chunk::{Chunk, Encoder};
use crate::compression::Compression;
use crate::error::{Error, Result};
use crate::header::Identity;
use crate::snapshot::{Changes, Location, ReadAt, Snapshot};
use crate::source::{Cursor, PageSink, PageSource, place};
use crate::writer::StreamWriter;

/// How [`send`] goes about it.
#[derive(Clone, Copy, Debug)]
pub struct Sending {
    /// What is made of data.
    pub compression: Compression,
    /// Pages of a chunk, at most [`crate::MAX_CHUNK_PAGES`]. Lazy restore reads whole chunks.
    pub chunk_pages: usize,
    /// Threads that read and encode.
    pub threads: NonZeroUsize,
}

impl Default for Sending {
    fn default() -> Self {
        Self {
            compression: Compression::default(),
            chunk_pages: 64,
            threads: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
        }
    }
}

/// Writes all pages of a source once, in order.
///
/// # Errors
/// [`Error::Metadata`] if source and stream differ; [`Error::Source`]; those of
/// [`StreamWriter::write`]. The stream then lacks pages and must not be finished.
pub fn send<S, W>(source: &S, writer: &mut StreamWriter<W>, sending: &Sending) -> Result<()>
where
    S: PageSource + Sync,
    W: Write + Send,
{
    send_some(source, None::<&Snapshot<Vec<u8>>>, writer, sending)
}

/// Writes what has changed since `base`, data or tags: pages that are other than there, pages that are
/// not there, and holes for those that the source does not have any more. Both sides are read and
/// compared; that a page's data are the same says nothing of its tags.
///
/// # Errors
/// Those of [`send`]; [`Error::NoBase`] or [`Error::WrongBase`] if the stream's header does not name
/// this base; those of [`crate::SnapshotReader::read`].
pub fn send_changes<S, F, W>(
    source: &S,
    base: &Snapshot<F>,
    writer: &mut StreamWriter<W>,
    sending: &Sending,
) -> Result<()>
where
    S: PageSource + Sync,
    F: ReadAt,
    W: Write + Send,
{
    let header = writer.header().clone();
    let given = base.identity();
    match header.base {
        Some(wanted) if wanted == given => {}
        Some(wanted) => return Err(Error::WrongBase { wanted, given }),
        None => {
            return Err(Error::NoBase(Identity {
                id: header.id,
                check: 0,
            }));
        }
    }
    // Before the pages: one that becomes populated meanwhile is in a later chunk, which counts.
    let holes = base.not_in(source)?;
    let mut encoder = Encoder::new(&header, sending.compression)?;
    let mut chunk = Chunk::new();
    let mut rest = holes.as_slice();
    while !rest.is_empty() {
        let taken = encoder.holes(rest, &mut chunk)?;
        writer.write(&chunk)?;
        rest = &rest[taken..];
    }
    send_some(source, Some(base), writer, sending)
}

/// Writes the pages of a source, if there is a `base` those that have changed since.
fn send_some<S, F, W>(
    source: &S,
    base: Option<&Snapshot<F>>,
    writer: &mut StreamWriter<W>,
    sending: &Sending,
) -> Result<()>
where
    S: PageSource + Sync,
    F: ReadAt,
    W: Write + Send,
{
    let header = writer.header().clone();
    same_metadata(
        "the source",
        source.metadata(),
        "the stream",
        header.metadata,
    )?;
    let encoders: Vec<_> = (0..sending.threads.get())
        .map(|_| Encoder::new(&header, sending.compression))
        .collect::<Result<_>>()?;
    let line = Line {
        source,
        base,
        batches: Mutex::new((0, Cursor::new(sending.chunk_pages)?)),
        turn: Mutex::new((0, writer)),
        changed: Condvar::new(),
        failed: AtomicBool::new(false),
    };
    together(encoders, |encoder| line.work(encoder))
}

/// Threads take batches in order, encode them side by side, and write them in that order.
struct Line<'a, S, F, W> {
    source: &'a S,
    base: Option<&'a Snapshot<F>>,
    /// The number of the next batch.
    batches: Mutex<(u64, Cursor)>,
    /// The number of the batch to be written next.
    turn: Mutex<(u64, &'a mut StreamWriter<W>)>,
    changed: Condvar,
    failed: AtomicBool,
}

impl<S: PageSource, F: ReadAt, W: Write> Line<'_, S, F, W> {
    fn work(&self, encoder: Encoder) -> Result<()> {
        let worked = catch_unwind(AssertUnwindSafe(|| self.batches(encoder)));
        if !matches!(worked, Ok(Ok(()))) {
            // With the turn held, so that nobody begins to wait for one that will not come.
            let turn = lock(&self.turn);
            self.failed.store(true, Ordering::Relaxed);
            drop(turn);
            self.changed.notify_all();
        }
        worked.unwrap_or_else(|panic| resume_unwind(panic))
    }

    fn batches(&self, mut encoder: Encoder) -> Result<()> {
        let mut batch = Batch::new(self.source.metadata());
        let mut chunk = Chunk::new();
        let mut runs = Vec::new();
        let mut changes = self.base.map(Changes::since);
        while let Some(number) = self.next(&mut runs)? {
            batch.read(self.source, &runs)?;
            if let Some(changes) = &mut changes {
                changes.keep(&mut batch)?;
            }
            if batch.is_empty() {
                self.write(number, None)?;
            } else {
                encoder.pages(&batch, &mut chunk)?;
                self.write(number, Some(&chunk))?;
            }
        }
        Ok(())
    }

    fn next(&self, runs: &mut Vec<Range<u64>>) -> Result<Option<u64>> {
        let (next, cursor) = &mut *lock(&self.batches);
        cursor.next(self.source, runs)?;
        if runs.is_empty() {
            return Ok(None);
        }
        *next += 1;
        Ok(Some(*next - 1))
    }

    /// Writes what became of batch `number`, if it is its turn.
    fn write(&self, number: u64, chunk: Option<&Chunk>) -> Result<()> {
        let waiting = lock(&self.turn);
        let mut turn = self
            .changed
            .wait_while(waiting, |(turn, _)| {
                *turn != number && !self.failed.load(Ordering::Relaxed)
            })
            .unwrap_or_else(PoisonError::into_inner);
        if self.failed.load(Ordering::Relaxed) {
            return Err(Error::Abandoned);
        }
        let (turn, writer) = &mut *turn;
        if let Some(chunk) = chunk {
            writer.write(chunk)?;
        }
        *turn += 1;
        self.changed.notify_all();
        Ok(())
    }
}

/// Places all pages of a snapshot, each once and in no particular order. Pages that it does not have
/// are not touched: the sink must be unpopulated before. The guest may run only if this succeeds.
///
/// # Errors
/// [`Error::Metadata`] if snapshot and sink differ; [`Error::Sink`]; those of
/// [`crate::SnapshotReader::read`].
pub fn restore<F, S>(snapshot: &Snapshot<F>, sink: &S, threads: NonZeroUsize) -> Result<()>
where
    F: ReadAt,
    S: PageSink + Sync,
{
    same_metadata(
        "the snapshot",
        snapshot.metadata(),
        "the sink",
        sink.metadata(),
    )?;
    let chunks: Vec<Location> = snapshot.chunks().collect();
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = |()| {
        let mut reader = snapshot.reader();
        while let Some(location) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failed.load(Ordering::Relaxed) {
                return Err(Error::Abandoned);
            }
            let placed = reader.read(*location).and_then(|batch| place(sink, batch));
            placed.inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    };
    together(vec![(); threads.get()], work)
}

/// Runs `work` in a thread for each of `with`. Of several errors, the one that made the others give
/// up is returned.
fn together<T: Send>(with: Vec<T>, work: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = with
            .into_iter()
            .map(|with| scope.spawn(move || work(with)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    });
    let (abandoned, others): (Vec<_>, Vec<_>) = results
        .into_iter()
        .partition(|result| matches!(result, Err(Error::Abandoned)));
    others.into_iter().chain(abandoned).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
