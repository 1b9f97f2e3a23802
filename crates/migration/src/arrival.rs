//! The destination: receives a guest, and holds it until it is known who runs it.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use stream::{Batch, Metadata, PageSet, PageSink};

use crate::error::{Error, MachineError, Result};
use crate::handover::{Destination, DestinationEvent};
use crate::link::{Closer, Greeted, Incoming, Link, Listen, Pending, SavedState};
use crate::message::{Hello, MAX_LINKS, PROTOCOL, Purpose, Session, Word};
use crate::peer::Peer;
use crate::progress::Progress;

/// Connections that have not greeted yet, at most. Others are closed.
const MAX_PENDING: usize = 32;
/// How long a greeting may take, all of it.
const GREETING: Duration = Duration::from_secs(10);
/// How often one who waits looks whether it is still to.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often the source is told where the destination is.
const REPORT_EVERY: Duration = Duration::from_millis(500);
/// Saved states of a machine, at most.
const MAX_STATES: usize = 16;
/// Bytes of them together, at most.
const MAX_STATE_BYTES: usize = 64 << 20;

/// The machine that a guest comes to.
pub trait Arriving {
    /// Its memory.
    type Sink: PageSink + Send + Sync + 'static;

    /// Makes a machine like the one that is offered, which stands still and has no memory yet.
    ///
    /// # Errors
    /// What of it cannot be had here, by name: the source is told.
    fn accept(&mut self, offer: &[SavedState], metadata: Metadata) -> Result<(), MachineError>;

    /// Its memory.
    fn sink(&self) -> Arc<Self::Sink>;

    /// Its page numbers.
    fn pages(&self) -> Range<u64>;

    /// How many pages it fetches at once, should some stay at the source; none if it cannot do that, and why.
    ///
    /// # Errors
    /// The reason, which the source is told.
    fn fetches(&self) -> Result<u8, MachineError>;

    /// Takes the state of the guest that was stopped, and all that only one machine may have, such as locks on disks. Pages that are
    /// missing are had from `missing` from now on. The guest does not run yet.
    ///
    /// # Errors
    /// It does not fit, or something is held by another: the source is told, and keeps the guest.
    fn load(
        &mut self,
        states: &[SavedState],
        missing: Option<Arc<Peer>>,
    ) -> Result<(), MachineError>;
}

/// Somebody who dialled and greeted.
struct Arrived {
    hello: Hello,
    greeted: Greeted,
}

/// What all who take connections know.
#[derive(Default)]
struct Desk {
    /// The migration that is on its way.
    session: Mutex<Option<(Session, Closer)>>,
    pending: AtomicUsize,
}

impl Desk {
    fn session(&self) -> MutexGuard<'_, Option<(Session, Closer)>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for a guest.
pub struct Receiver {
    arrivals: mpsc::Receiver<Arrived>,
    desk: Arc<Desk>,
    patience: Duration,
    close: Closer,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        (self.close)();
    }
}

impl Receiver {
    /// Takes connections from `listen`, on threads of its own. A source that says nothing for `patience` is given up.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn new(listen: impl Listen, patience: Duration) -> Result<Self> {
        let (arrived, arrivals) = mpsc::sync_channel(2 * MAX_LINKS as usize);
        let desk = Arc::new(Desk::default());
        let at_desk = desk.clone();
        let close = listen.closer();
        thread::Builder::new()
            .name("migration-listen".into())
            .spawn(move || take_connections(&listen, &at_desk, &arrived, patience))
            .map_err(Error::Thread)?;
        Ok(Self {
            arrivals,
            desk,
            patience,
            close,
        })
    }

    /// Receives a guest. A source whose machine cannot be had here is told so, and the next one is waited for.
    ///
    /// # Errors
    /// The migration failed when the machine was there already, whose memory is worth nothing then; it was cancelled; no
    /// one can dial any more.
    pub fn receive<G: Arriving>(mut self, guest: &mut G, progress: &Progress) -> Result<Held> {
        loop {
            let arrived = self.next(None, progress)?;
            match self.begin(arrived, guest) {
                Ok((mut control, pages, session)) => {
                    progress.close_on_cancel(control.closer());
                    return match self.take(&mut control, pages, guest, progress) {
                        Ok((missing, peer)) => Ok(Held {
                            receiver: self,
                            session,
                            control: Some(control),
                            reported: None,
                            state: Shared::new(Destination::Ready {
                                pages_missing: !missing.is_empty(),
                            }),
                            peer,
                            is_mended: false,
                        }),
                        Err(error) => {
                            *self.desk.session() = None;
                            match progress.is_cancelled() {
                                true => Err(Error::Cancelled),
                                false => Err(error),
                            }
                        }
                    };
                }
                Err(error) => {
                    *self.desk.session() = None;
                    tracing::warn!("a guest was offered and not taken: {error}");
                }
            }
        }
    }

    /// The next one who comes.
    fn next(&self, patience: Option<Duration>, progress: &Progress) -> Result<Arrived> {
        let begun = Instant::now();
        loop {
            if progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            match self.arrivals.recv_timeout(LOOK_EVERY) {
                Ok(arrived) => return Ok(arrived),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Listen(std::io::ErrorKind::NotConnected.into()));
                }
                Err(RecvTimeoutError::Timeout) => match patience {
                    Some(waited) if begun.elapsed() > waited => {
                        return Err(Error::Awaited {
                            what: "another connection of the source",
                            waited,
                        });
                    }
                    _ => {}
                },
            }
        }
    }

    /// Hears what is offered, and makes a machine like that.
    fn begin<G: Arriving>(
        &self,
        Arrived { hello, greeted }: Arrived,
        guest: &mut G,
    ) -> Result<(Link, u8, Session)> {
        let Purpose::Migrate { pages, post_copy } = hello.purpose else {
            greeted.refuse("that migration has ended here".into());
            return Err(Error::State("a link came without a migration".into()));
        };
        if !(1..=MAX_LINKS).contains(&pages) {
            greeted.refuse(format!("{pages} connections: 1 to {MAX_LINKS} can be had"));
            return Err(Error::State(
                "no or too many connections were asked for".into(),
            ));
        }
        *self.desk.session() = Some((hello.session, greeted.closer()));
        tracing::info!(
            "{} offers a guest, Tagvisor {}",
            greeted.peer(),
            hello.tagvisor
        );
        let metadata = greeted.metadata();
        let deadline = Deadline::new(greeted.closer(), self.patience)?;
        let offer = greeted
            .welcome()
            .and_then(|mut control| Ok((read_offer(&mut control)?, control)));
        let (offer, mut control) = match offer {
            Err(_) if deadline.has_passed() => {
                return Err(Error::Awaited {
                    what: "the whole of its offer",
                    waited: self.patience,
                });
            }
            offer => offer?,
        };
        drop(deadline);
        let accepted = guest
            .accept(&offer, metadata)
            .and_then(|()| match post_copy {
                true => guest.fetches().map(drop),
                false => Ok(()),
            });
        match accepted {
            Ok(()) => Ok((control, pages, hello.session)),
            Err(reason) => {
                let reason = reason.to_string();
                // Who hears this may offer another guest at once.
                *self.desk.session() = None;
                control.say(&Word::Refused {
                    reason: reason.clone(),
                })?;
                Err(Error::State(format!("this host cannot have it: {reason}")))
            }
        }
    }

    /// Links of this purpose, as many.
    fn links(&self, purpose: Purpose, count: u8, progress: &Progress) -> Result<Vec<Link>> {
        let mut links = Vec::new();
        while links.len() < usize::from(count) {
            let Arrived { hello, greeted } = self.next(Some(self.patience), progress)?;
            if hello.purpose == purpose {
                links.push(greeted.welcome()?);
            } else {
                greeted.refuse("that is not what is waited for".into());
            }
        }
        Ok(links)
    }

    /// Takes memory and state.
    fn take<G: Arriving>(
        &mut self,
        control: &mut Link,
        pages: u8,
        guest: &mut G,
        progress: &Progress,
    ) -> Result<(PageSet, Option<Arc<Peer>>)> {
        // Whether it can fetch pages matters to a source that may leave some behind, which knows it already.
        let fetches = guest.fetches();
        let requests = fetches.as_ref().copied().unwrap_or(1);
        control.say(&Word::Accept { requests })?;
        let tally = Arc::new(Tally::new(pages.into()));
        let sink = guest.sink();
        let mut threads = Vec::new();
        let mut closers = Vec::new();
        for (number, link) in self
            .links(Purpose::Pages, pages, progress)?
            .into_iter()
            .enumerate()
        {
            closers.push(link.closer());
            let (sink, tally) = (sink.clone(), tally.clone());
            threads.extend(place_on_a_thread(link, number, sink, tally)?);
        }
        let received = self
            .rounds(control, &tally, guest.pages(), &fetches, progress)
            .and_then(|handed| {
                // Their ends were sent before the word of the hand-over was.
                tally
                    .wait_for_ends(self.patience)
                    .map_err(|reason| refuse(control, reason.into()))?;
                let peer = match handed.missing.is_empty() {
                    true => None,
                    false => Some(self.peer(control, &handed.missing, handed.asking)?),
                };
                Ok((handed.states, handed.missing, peer))
            });
        closers.iter().for_each(|close| close());
        join(&mut threads);
        let (states, missing, peer) = received?;
        if let Err(reason) = guest.load(&states, peer.clone()) {
            return Err(refuse(control, reason));
        }
        control.say(&Word::Ready)?;
        Ok((missing, peer))
    }

    fn peer(&self, control: &Link, missing: &PageSet, links: Vec<Link>) -> Result<Arc<Peer>> {
        if links.is_empty() {
            return Err(control.unexpected("pages that stay behind", "links to ask for them"));
        }
        Peer::set_patience(&links, self.patience)?;
        Ok(Arc::new(Peer::new(control.metadata(), missing, links)))
    }

    /// Acknowledges rounds until the guest is handed over. Pages can stay behind if it `fetches`, by so many links.
    fn rounds(
        &self,
        control: &mut Link,
        tally: &Tally,
        pages: Range<u64>,
        fetches: &Result<u8, MachineError>,
        progress: &Progress,
    ) -> Result<HandedOver> {
        let mut states = States::default();
        let mut missing = PageSet::none(pages.clone());
        let mut asking = Vec::new();
        let mut none = Batch::new(control.metadata());
        loop {
            if progress.is_cancelled() {
                return Err(refuse(control, Error::Cancelled.into()));
            }
            match control.next(&mut none)? {
                Incoming::State(state) => states.add(state, control)?,
                Incoming::Holes(runs) => {
                    for run in runs {
                        if run.start < pages.start || run.end > pages.end {
                            return Err(control.unexpected("pages that are no memory", "others"));
                        }
                        missing.insert(run);
                    }
                }
                Incoming::Word(Word::Sending) => {
                    progress.pages_done.store(tally.pages(), Ordering::Relaxed);
                }
                Incoming::Word(Word::RoundEnd { round }) => {
                    progress.round.store(round, Ordering::Relaxed);
                    match tally.wait_for(round, self.patience) {
                        Ok(pages) => {
                            progress.pages_done.store(pages, Ordering::Relaxed);
                            control.say(&Word::RoundDone { round, pages })?;
                        }
                        Err(reason) => return Err(refuse(control, reason.into())),
                    }
                }
                Incoming::Word(Word::PostCopy) if asking.is_empty() => {
                    asking = match fetches {
                        Ok(requests) => self.links(Purpose::Requests, *requests, progress)?,
                        Err(reason) => return Err(refuse(control, reason.to_string().into())),
                    };
                }
                Incoming::Word(Word::HandOver) => {
                    return Ok(HandedOver {
                        states: states.list,
                        missing,
                        asking,
                    });
                }
                Incoming::Word(Word::Abort) => return Err(given_up(control)),
                other => return Err(control.unexpected(other.name(), "a round")),
            }
        }
    }
}

/// What a guest is when it was handed over.
struct HandedOver {
    states: Vec<SavedState>,
    /// Pages that stay at the source.
    missing: PageSet,
    /// Links that they can be asked for on.
    asking: Vec<Link>,
}

fn given_up(control: &Link) -> Error {
    Error::Refused {
        peer: control.peer().into(),
        reason: "the source gave the migration up, and keeps the guest".into(),
    }
}

/// Tells the source why it does not go on. The source may be gone.
fn refuse(control: &mut Link, reason: MachineError) -> Error {
    let _ = control.say(&Word::Refused {
        reason: reason.to_string(),
    });
    Error::Machine(reason)
}

/// Saved states as they come, bounded.
#[derive(Default)]
struct States {
    list: Vec<SavedState>,
    bytes: usize,
}

impl States {
    fn add(&mut self, state: SavedState, control: &Link) -> Result<()> {
        self.bytes += state.data.len();
        self.list.push(state);
        if self.list.len() > MAX_STATES || self.bytes > MAX_STATE_BYTES {
            return Err(
                control.unexpected("more saved states than a machine has", "an end of them")
            );
        }
        Ok(())
    }
}

/// Ends a link if something takes too long, however busy the link is: who says a byte now and then keeps others out.
struct Deadline {
    has_passed: Arc<AtomicBool>,
    /// Dropped when it is done.
    _in_time: mpsc::Sender<()>,
}

impl Deadline {
    fn new(close: Closer, after: Duration) -> Result<Self> {
        let has_passed = Arc::<AtomicBool>::default();
        let (in_time, done) = mpsc::channel::<()>();
        let passed = has_passed.clone();
        let watch = move || {
            if done.recv_timeout(after) == Err(RecvTimeoutError::Timeout) {
                passed.store(true, Ordering::Relaxed);
                close();
            }
        };
        // A fuzzer's links say at once all that they will.
        if !cfg!(fuzzing) {
            thread::Builder::new()
                .name("migration-deadline".into())
                .spawn(watch)
                .map_err(Error::Thread)?;
        }
        Ok(Self {
            has_passed,
            _in_time: in_time,
        })
    }

    fn has_passed(&self) -> bool {
        self.has_passed.load(Ordering::Relaxed)
    }
}

/// Reads what is offered.
fn read_offer(control: &mut Link) -> Result<Vec<SavedState>> {
    let mut states = States::default();
    let mut none = Batch::new(control.metadata());
    loop {
        match control.next(&mut none)? {
            Incoming::State(state) => states.add(state, control)?,
            Incoming::Word(Word::Offer) => return Ok(states.list),
            other => return Err(control.unexpected(other.name(), "an offer")),
        }
    }
}

/// How far the links for pages are.
struct Tally {
    counts: Mutex<Counts>,
    changed: Condvar,
}

struct Counts {
    /// The round that each link has ended.
    rounds: Vec<u32>,
    /// Links that nothing more comes on.
    ended: usize,
    pages: u64,
    failed: Option<String>,
}

impl Tally {
    fn new(links: usize) -> Self {
        Self {
            counts: Mutex::new(Counts {
                rounds: vec![0; links],
                ended: 0,
                pages: 0,
                failed: None,
            }),
            changed: Condvar::new(),
        }
    }

    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Pages placed since the beginning.
    fn pages(&self) -> u64 {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.pages
    }

    /// Waits until all links have ended a round; returns how many pages were placed since the beginning.
    fn wait_for(&self, round: u32, patience: Duration) -> std::result::Result<u64, String> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let (counts, waited) = self
            .changed
            .wait_timeout_while(counts, patience, |counts| {
                counts.failed.is_none() && counts.rounds.iter().any(|ended| *ended < round)
            })
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(failed) = &counts.failed {
            return Err(failed.clone());
        }
        if waited.timed_out() {
            return Err(format!("round {round} did not come to its end"));
        }
        Ok(counts.pages)
    }

    /// Waits until nothing more comes on any link.
    fn wait_for_ends(&self, patience: Duration) -> std::result::Result<(), String> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let (counts, _) = self
            .changed
            .wait_timeout_while(counts, patience, |counts| {
                counts.ended < counts.rounds.len()
            })
            .unwrap_or_else(PoisonError::into_inner);
        match counts.ended == counts.rounds.len() {
            true => Ok(()),
            false => Err("a link for pages did not come to its end".into()),
        }
    }
}

/// Places the pages that come over a link, until its end. A fuzzer knows all that comes, and needs no thread.
fn place_on_a_thread<S: PageSink + Send + Sync + 'static>(
    mut link: Link,
    number: usize,
    sink: Arc<S>,
    tally: Arc<Tally>,
) -> Result<Option<JoinHandle<()>>> {
    if cfg!(fuzzing) {
        place_until_its_end(&mut link, number, &*sink, &tally);
        return Ok(None);
    }
    thread::Builder::new()
        .name(format!("migration-{number}"))
        .spawn(move || place_until_its_end(&mut link, number, &*sink, &tally))
        .map(Some)
        .map_err(Error::Thread)
}

fn place_until_its_end(link: &mut Link, number: usize, sink: &impl PageSink, tally: &Tally) {
    // Rounds may be far apart: the guest is being slowed down, or there is little to send. The control link is what ends it.
    let placed = link
        .set_patience(Duration::from_secs(24 * 3600))
        .and_then(|()| place(link, number, sink, tally));
    if let Err(error) = placed {
        tally.change(|counts| {
            counts.failed.get_or_insert(error.to_string());
        });
        // The source notices, and asks why.
        link.closer()();
    }
    tally.change(|counts| counts.ended += 1);
}

fn place(link: &mut Link, number: usize, sink: &impl PageSink, tally: &Tally) -> Result<()> {
    let mut batch = Batch::new(sink.metadata());
    loop {
        match link.next(&mut batch)? {
            Incoming::Pages => {
                let (Some(first), Some(last)) = (batch.numbers().first(), batch.numbers().last())
                else {
                    continue;
                };
                sink.place(&batch).map_err(|source| {
                    Error::Pages(stream::Error::Sink {
                        first: *first,
                        last: *last,
                        source,
                    })
                })?;
                tally.change(|counts| counts.pages += batch.len() as u64);
            }
            Incoming::Word(Word::RoundEnd { round }) => {
                tally.change(|counts| counts.rounds[number] = round);
            }
            Incoming::End => return Ok(()),
            other => return Err(link.unexpected(other.name(), "pages")),
        }
    }
}

fn join(threads: &mut Vec<JoinHandle<()>>) {
    for thread in threads.drain(..) {
        // One that panicked has said so, and its round does not end.
        let _ = thread.join();
    }
}

/// Takes connections until nobody can dial any more.
fn take_connections(
    listen: &impl Listen,
    desk: &Arc<Desk>,
    arrived: &SyncSender<Arrived>,
    patience: Duration,
) {
    while let Ok(pending) = listen.accept() {
        if desk.pending.fetch_add(1, Ordering::Relaxed) >= MAX_PENDING {
            desk.pending.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (at_desk, arrived) = (desk.clone(), arrived.clone());
        let started = thread::Builder::new()
            .name("migration-greet".into())
            .spawn(move || {
                if let Err(error) = greet(pending, &at_desk, &arrived, patience) {
                    tracing::debug!("somebody dialled: {error}");
                }
                at_desk.pending.fetch_sub(1, Ordering::Relaxed);
            });
        if started.is_err() {
            desk.pending.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Hears who comes, and sends away who is not waited for.
fn greet(
    pending: Pending,
    desk: &Desk,
    arrived: &SyncSender<Arrived>,
    patience: Duration,
) -> Result<()> {
    let wire = pending().map_err(Error::Listen)?;
    let (greeted, hello) = Greeted::accept(wire, GREETING, patience)?;
    if let Err(reason) = is_expected(&hello, desk) {
        greeted.refuse(reason);
        return Ok(());
    }
    match arrived.try_send(Arrived { hello, greeted }) {
        Ok(()) => {}
        Err(TrySendError::Full(arrived) | TrySendError::Disconnected(arrived)) => {
            arrived.greeted.refuse("too many are waiting here".into());
        }
    }
    Ok(())
}

fn is_expected(hello: &Hello, desk: &Desk) -> std::result::Result<(), String> {
    if hello.protocol != PROTOCOL {
        return Err(format!(
            "Tagvisor {} speaks version {} of the migration protocol, this is Tagvisor {}, which speaks version {PROTOCOL}",
            hello.tagvisor,
            hello.protocol,
            env!("CARGO_PKG_VERSION"),
        ));
    }
    let session = desk.session();
    match (&*session, hello.purpose) {
        (None, Purpose::Migrate { .. }) => Ok(()),
        (Some(_), Purpose::Migrate { .. }) => Err("another guest is arriving here".into()),
        (Some((expected, close)), purpose) if *expected == hello.session => {
            if let Purpose::Back { .. } = purpose {
                // The old link is dead, whether this side knows it or not.
                close();
            }
            Ok(())
        }
        _ => Err("that migration is not known here".into()),
    }
}

/// Where the destination is: for all who have to know.
#[derive(Clone)]
struct Shared(Arc<Mutex<Destination>>);

impl Shared {
    fn new(state: Destination) -> Self {
        Self(Arc::new(Mutex::new(state)))
    }

    fn get(&self) -> Destination {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn step(&self, event: DestinationEvent) -> Result<Destination> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match state.on(event) {
            Some(next) => {
                tracing::debug!("migration: destination: {state:?}, {event:?}: {next:?}");
                *state = next;
                Ok(next)
            }
            None => Err(Error::State(format!(
                "the destination is {state} and hears {event:?}"
            ))),
        }
    }
}

/// What is to be done with a guest that was received.
#[derive(Debug)]
pub enum Verdict {
    /// It runs here.
    Run,
    /// It does not: the source has it.
    Discard,
    /// That is not known: it stands still until [`Held::wait_again`] or a [`Decider`] says so.
    Undecided(Error),
}

/// A guest that was received.
pub struct Held {
    receiver: Receiver,
    session: Session,
    control: Option<Link>,
    /// What the source was told last over this control link, and when.
    reported: Option<(Destination, Instant)>,
    state: Shared,
    peer: Option<Arc<Peer>>,
    /// The source came back, and no failure to fetch pages was heard of since.
    is_mended: bool,
}

/// Decides for a destination that cannot ask its source, by somebody who made sure of that one, or says that its guest has ended.
#[derive(Clone)]
pub struct Decider(Shared);

impl Decider {
    /// Where the destination is.
    #[must_use]
    pub fn state(&self) -> Destination {
        self.0.get()
    }

    /// The guest runs here: the source does not run it, and has not gone on with it.
    ///
    /// # Errors
    /// There is nothing to decide, or pages are still at the source.
    pub fn take_over(&self) -> Result<()> {
        self.0.step(DestinationEvent::TakeOver).map(drop)
    }

    /// The guest is not needed here.
    ///
    /// # Errors
    /// There is nothing to decide.
    pub fn forget(&self) -> Result<()> {
        self.0.step(DestinationEvent::Forget).map(drop)
    }

    /// The guest that ran here has ended: pages that are still at the source are needed no more, and [`Held::attend`] tells it.
    ///
    /// # Errors
    /// No pages are at the source, or the guest does not run here.
    pub fn end(&self) -> Result<()> {
        self.0.step(DestinationEvent::End).map(drop)
    }
}

/// How far a guest is that fetches its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Pages come; so many have.
    Filling(u64),
    /// Pages could not be had.
    Failed(String),
    /// All are there.
    Complete,
}

/// Who fetches the pages of a guest that runs already.
pub trait Filling {
    /// How far that is.
    fn state(&self) -> Fill;

    /// Tries again what failed, if something did. When this returns, [`Self::state`] is [`Fill::Failed`] only if it failed again.
    fn retry(&self);
}

/// What happens to a guest that fetches its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// The link broke, for this reason: it waits for pages that are at the source.
    Separated(String),
    /// The link is there again, and pages that failed are being tried again.
    Found,
    /// All its pages are here.
    Complete,
}

impl Held {
    /// Where the destination is.
    #[must_use]
    pub fn state(&self) -> Destination {
        self.state.get()
    }

    /// Which migration it was.
    #[must_use]
    pub const fn session(&self) -> Session {
        self.session
    }

    /// A handle for who decides while this waits.
    #[must_use]
    pub fn decider(&self) -> Decider {
        Decider(self.state.clone())
    }

    /// Hears whether the guest runs here.
    pub fn wait(&mut self) -> Verdict {
        let word = match &mut self.control {
            Some(control) => control.hear(),
            None => Err(Error::Ended {
                peer: "the source".into(),
            }),
        };
        let event = match word {
            Ok(Word::Run) => DestinationEvent::Run,
            Ok(Word::Abort) => DestinationEvent::Abort,
            Ok(other) => {
                let control = self.control.take();
                let what = control.map(|link| link.unexpected(other.name(), "the word to run"));
                return self.lose(what.unwrap_or(Error::Cancelled));
            }
            Err(error) => return self.lose(error),
        };
        self.verdict(event)
    }

    fn verdict(&self, event: DestinationEvent) -> Verdict {
        match self.state.step(event) {
            Ok(state) if state.may_run() => Verdict::Run,
            Ok(_) => Verdict::Discard,
            Err(error) => Verdict::Undecided(error),
        }
    }

    fn lose(&mut self, error: Error) -> Verdict {
        self.control = None;
        // It may be undecided already.
        let _ = self.state.step(DestinationEvent::Failed);
        Verdict::Undecided(error)
    }

    /// Waits for the source to come back, or for somebody to decide.
    pub fn wait_again(&mut self) -> Verdict {
        loop {
            match self.state() {
                state if state.may_run() => return Verdict::Run,
                Destination::Discarded => return Verdict::Discard,
                _ => {}
            }
            let came = self.come_back();
            if let Some(verdict) = self.hear_again(came) {
                return verdict;
            }
        }
    }

    /// What a source says that came back, if it did.
    fn hear_again(&mut self, came: Result<bool>) -> Option<Verdict> {
        match came {
            Ok(true) => return Some(self.verdict(DestinationEvent::Abort)),
            Ok(false) => match self.wait() {
                Verdict::Undecided(error) => {
                    tracing::warn!("the source came back, and went: {error}");
                }
                verdict => return Some(verdict),
            },
            Err(Error::Cancelled) => {}
            Err(error) => tracing::warn!("the source tried to come back: {error}"),
        }
        None
    }

    /// Takes the source back, if it has dialled; [`Error::Cancelled`] if it has not. Returns whether it keeps the guest.
    fn come_back(&mut self) -> Result<bool> {
        match self.receiver.arrivals.recv_timeout(LOOK_EVERY) {
            Ok(arrived) => self.take_back(arrived),
            Err(RecvTimeoutError::Timeout) => Err(Error::Cancelled),
            Err(RecvTimeoutError::Disconnected) => {
                thread::sleep(REPORT_EVERY);
                Err(Error::Cancelled)
            }
        }
    }

    fn take_back(&mut self, arrived: Arrived) -> Result<bool> {
        let Purpose::Back { kept } = arrived.hello.purpose else {
            arrived
                .greeted
                .refuse("that is not what is waited for".into());
            return Err(Error::Cancelled);
        };
        if let Some((_, closer)) = &mut *self.receiver.desk.session() {
            *closer = arrived.greeted.closer();
        }
        let mut control = arrived.greeted.welcome()?;
        if kept {
            match control.hear()? {
                Word::Abort => return Ok(true),
                other => return Err(control.unexpected(other.name(), "the word to give up")),
            }
        }
        self.meet(&mut control)?;
        self.control = Some(control);
        Ok(false)
    }

    /// The source is back: new links, and where this side is.
    fn meet(&mut self, control: &mut Link) -> Result<()> {
        let requests = match (&self.peer, self.state()) {
            (Some(_), Destination::Complete | Destination::Ended) | (None, _) => 0,
            (Some(peer), _) => peer.links(),
        };
        control.say(&Word::Accept { requests })?;
        let never = Progress::default();
        let links = self.receiver.links(Purpose::Requests, requests, &never)?;
        if let Some(peer) = &self.peer {
            Peer::set_patience(&links, self.receiver.patience)?;
            peer.add(links);
            self.is_mended = true;
        }
        if self.state() == Destination::Separated {
            self.state.step(DestinationEvent::Found)?;
        }
        let state = self.state();
        control.say(&Word::State { state, fetched: 0 })?;
        self.reported = Some((state, Instant::now()));
        Ok(())
    }

    /// After the guest was let run: tells the source, and sees to it that the pages that are still there come here. Comes back
    /// when all of the guest is here, or it has ended, and the source knows. Without a `filling` it is here already.
    pub fn attend(mut self, filling: Option<&dyn Filling>, happens: impl Fn(Happening)) {
        loop {
            let error = match self.watch(filling, &happens) {
                Ok(()) => return,
                Err(error) => error,
            };
            self.separate(&error, &happens);
            while self.control.is_none() {
                if self.state() == Destination::Separated
                    && fill_of(filling) == Fill::Complete
                    && self.state.step(DestinationEvent::AllThere).is_ok()
                {
                    happens(Happening::Complete);
                }
                match self.come_back() {
                    Ok(false) if self.state() == Destination::Running => {
                        try_again(filling, &happens)
                    }
                    Ok(_) | Err(Error::Cancelled) => {}
                    Err(error) => tracing::warn!("the source tried to come back: {error}"),
                }
            }
        }
    }

    fn separate(&mut self, error: &Error, happens: &impl Fn(Happening)) {
        self.control = None;
        self.reported = None;
        if let Some(peer) = &self.peer {
            peer.close();
        }
        if self.state.step(DestinationEvent::Failed).is_ok() {
            happens(Happening::Separated(error.to_string()));
        }
    }

    /// Tells the source where this side is until nothing is needed of it.
    fn watch(&mut self, filling: Option<&dyn Filling>, happens: &impl Fn(Happening)) -> Result<()> {
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        loop {
            let mut fetched = 0;
            if self.state.get() == Destination::Running {
                match fill_of(filling) {
                    Fill::Filling(pages) => fetched = pages,
                    // Of the link that was there before, perhaps: that is heard of at any time.
                    Fill::Failed(_) if self.is_mended => {
                        self.is_mended = false;
                        try_again(filling, happens);
                    }
                    Fill::Failed(reason) => return Err(Error::Machine(reason.into())),
                    // The guest may have ended in this moment.
                    Fill::Complete => {
                        if self.state.step(DestinationEvent::AllThere).is_ok() {
                            happens(Happening::Complete);
                        }
                    }
                }
            }
            let state = self.state.get();
            let is_last = matches!(state, Destination::Complete | Destination::Ended);
            let is_known = self.reported.is_some_and(|(known, when)| {
                known == state && (is_last || when.elapsed() < REPORT_EVERY)
            });
            if !is_known {
                control.say(&Word::State { state, fetched })?;
                self.reported = Some((state, Instant::now()));
            }
            if is_last {
                let mut none = Batch::new(control.metadata());
                return match control.next(&mut none)? {
                    Incoming::End => Ok(()),
                    other => Err(control.unexpected(other.name(), "an end")),
                };
            }
            thread::sleep(LOOK_EVERY / 5);
        }
    }
}

fn fill_of(filling: Option<&dyn Filling>) -> Fill {
    filling.map_or(Fill::Complete, Filling::state)
}

/// There are new links: what failed for want of them is tried again, and whoever paused the guest for that is told.
fn try_again(filling: Option<&dyn Filling>, happens: &impl Fn(Happening)) {
    if let Some(filling) = filling {
        filling.retry();
    }
    happens(Happening::Found);
}

/// What a fuzzer calls instead of what waits: everybody who will dial has, and has said all that they will.
#[cfg(fuzzing)]
impl Receiver {
    /// Greets who dialled, in order: the first for a migration of any number, the others for `session`.
    pub fn of(wires: Vec<Box<dyn crate::link::Wire>>, session: Session) -> Self {
        let (arrived, arrivals) = mpsc::sync_channel(2 * MAX_LINKS as usize);
        let desk = Arc::new(Desk::default());
        let close: Closer = Arc::new(|| {});
        for wire in wires {
            let _ = greet(Box::new(|| Ok(wire)), &desk, &arrived, Duration::ZERO);
            *desk.session() = Some((session, close.clone()));
        }
        Self {
            arrivals,
            desk,
            patience: Duration::ZERO,
            close,
        }
    }
}

#[cfg(fuzzing)]
impl Held {
    /// [`Held::wait_again`], as long as there is somebody who came back.
    pub fn hear_all_who_came_back(&mut self) -> Option<Verdict> {
        while let Ok(arrived) = self.receiver.arrivals.try_recv() {
            let came = self.take_back(arrived);
            if let Some(verdict) = self.hear_again(came) {
                return Some(verdict);
            }
        }
        None
    }

    /// [`Held::attend`], as long as there is somebody who came back. `filling` must not say [`Fill::Filling`] for ever.
    pub fn attend_all_who_came_back(&mut self, filling: &dyn Filling) {
        loop {
            let error = match self.watch(Some(filling), &|_| {}) {
                Ok(()) => return,
                Err(error) => error,
            };
            self.separate(&error, &|_| {});
            while self.control.is_none() {
                let Ok(arrived) = self.receiver.arrivals.try_recv() else {
                    return;
                };
                let _ = self.take_back(arrived);
            }
        }
    }
}
