//! The source: sends a guest away, or keeps it.

use std::num::NonZeroU8;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use stream::{Batch, Compression, Cursor, Only, PageSet, PageSource};

use crate::convergence::{Convergence, Next, Otherwise, Round};
use crate::error::{Error, MachineError, Result};
use crate::handover::{Destination, Source, SourceEvent};
use crate::link::{Closer, Dial, Incoming, Link, SavedState};
use crate::message::{Hello, MAX_LINKS, PROTOCOL, Purpose, Session, Word};
use crate::progress::Progress;

/// The machine that a guest leaves.
///
/// Its guest runs when it is given to [`depart`], or stands still because somebody paused it.
pub trait Departing {
    /// Its memory.
    type Pages: PageSource + Send + Sync + 'static;

    /// Its memory.
    fn pages(&self) -> Arc<Self::Pages>;

    /// What the destination must have to be the same machine, known while the guest runs.
    ///
    /// # Errors
    /// Why it cannot leave at all.
    fn offer(&mut self) -> Result<Vec<SavedState>, MachineError>;

    /// Begins to note which pages change, by whomever.
    ///
    /// # Errors
    /// The host cannot.
    fn watch(&mut self) -> Result<(), MachineError>;

    /// The pages that changed, data or tags, since this or [`Departing::watch`] was called last.
    ///
    /// # Errors
    /// The host does not tell.
    fn changes(&mut self) -> Result<PageSet, MachineError>;

    /// Keeps the vCPUs from running for this percentage of the time.
    fn slow(&mut self, percent: u8);

    /// Stops the guest. After it, [`Departing::changes`] tells of the last changes, and there are no more.
    ///
    /// # Errors
    /// The guest ended, or cannot be stopped.
    fn stop(&mut self) -> Result<(), MachineError>;

    /// The state of the guest, which was stopped. Lets go of what only one machine may have, such as locks on disks.
    ///
    /// # Errors
    /// Its state cannot be had.
    fn state(&mut self) -> Result<Vec<SavedState>, MachineError>;

    /// The guest stays: undoes [`Departing::watch`], [`Departing::slow`], [`Departing::stop`] and [`Departing::state`], as far as they
    /// were done.
    ///
    /// # Errors
    /// It cannot go on, because something that it needs was taken meanwhile.
    fn go_on(&mut self) -> Result<(), MachineError>;
}

/// When the guest goes on before all its pages are there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PostCopy {
    /// Never.
    #[default]
    Never,
    /// If it changes pages faster than they can be sent.
    Auto,
    /// At once; no pages are sent before.
    Now,
}

/// How a guest is to be sent.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections for pages, with a thread each; at most [`crate::message::MAX_LINKS`].
    pub connections: NonZeroU8,
    /// When the guest goes on before all its pages are there.
    pub post_copy: PostCopy,
    /// Whether the guest is slowed down if it changes pages faster than they can be sent, and may not go on by post-copy.
    pub may_slow: bool,
    /// How long the guest may stand still.
    pub max_downtime: Duration,
    /// What is made of data.
    pub compression: Compression,
    /// After how long it is given up, unless the guest has been handed over.
    pub timeout: Option<Duration>,
    /// How long the other side may say nothing.
    pub patience: Duration,
    /// The same, while the guest stands still.
    pub handover_patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections: NonZeroU8::MIN,
            post_copy: PostCopy::Never,
            may_slow: true,
            max_downtime: Duration::from_millis(300),
            compression: Compression::None,
            timeout: None,
            patience: Duration::from_secs(30),
            handover_patience: Duration::from_secs(10),
        }
    }
}

/// What a migration came to, that arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How often memory was gone through.
    pub rounds: u32,
    /// Pages sent, each as often as it was.
    pub pages: u64,
    /// Pages that the destination fetched after the guest went on there.
    pub fetched: u64,
    /// The guest ended there before all its pages were.
    pub ended: bool,
    /// Bytes sent.
    pub bytes: u64,
    /// Those of them that are tags.
    pub tag_bytes: u64,
    /// From the guest's last instruction here until the destination said that it runs.
    pub downtime: Duration,
    /// From the beginning until nothing was left here.
    pub total: Duration,
    /// How much the guest was slowed down at last, in percent.
    pub slowed: u8,
}

/// How a try to send a guest away ended.
#[derive(Debug)]
pub enum Departure {
    /// The guest is at the destination, or ended there; what is left here is worth nothing.
    Gone(Report),
    /// The guest is here, as before, and goes on if it ran.
    Kept(Error),
    /// It is not known where the guest runs, or a half of it is here: nothing is to be done with it here, until
    /// [`Away::recover`] or somebody who knows more.
    Away(Box<Away>, Error),
}

/// A guest that is neither here nor, as far as is known, all there.
#[derive(Debug)]
pub struct Away {
    session: Session,
    state: Source,
    rounds: u32,
    pages: u64,
    sent: Sent,
    fetched: PageSet,
    missing: PageSet,
    stopped: Option<Instant>,
    downtime: Duration,
    begun: Instant,
    slowed: u8,
}

/// Sends a guest away. Comes back when it has arrived, or will not.
pub fn depart<G: Departing>(
    guest: &mut G,
    dial: &dyn Dial,
    options: &Options,
    progress: &Progress,
) -> Departure {
    let begun = Instant::now();
    let session = match Session::random() {
        Ok(session) => session,
        Err(error) => return Departure::Kept(Error::Session(error)),
    };
    let mut leaving = Leaving {
        guest,
        dial,
        options,
        progress,
        session,
        state: Source::Sending,
        begun,
        rounds: 0,
        pages: 0,
        sent: Sent::default(),
        fetched: PageSet::none(0..0),
        missing: PageSet::none(0..0),
        stopped: None,
        downtime: Duration::ZERO,
        slowed: 0,
        ended: false,
    };
    let left = leaving.leave();
    leaving.end(left)
}

/// What was sent on links that are gone, and those that are there.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    bytes: u64,
    tag_bytes: u64,
}

impl Sent {
    const fn add(&mut self, link: (u64, u64)) {
        self.bytes += link.0;
        self.tag_bytes += link.1;
    }
}

struct Leaving<'a, G: Departing> {
    guest: &'a mut G,
    dial: &'a dyn Dial,
    options: &'a Options,
    progress: &'a Progress,
    session: Session,
    state: Source,
    begun: Instant,
    rounds: u32,
    pages: u64,
    sent: Sent,
    /// Pages that the destination has asked for.
    fetched: PageSet,
    /// Pages that stayed here.
    missing: PageSet,
    stopped: Option<Instant>,
    downtime: Duration,
    slowed: u8,
    /// The guest ended at the destination.
    ended: bool,
}

impl<G: Departing> Leaving<'_, G> {
    fn leave(&mut self) -> Result<()> {
        let offer = self.guest.offer().map_err(Error::Machine)?;
        let mut control = self.open(Purpose::Migrate {
            pages: self.options.connections.get(),
            post_copy: self.options.post_copy != PostCopy::Never,
        })?;
        for state in &offer {
            control.state(state)?;
        }
        control.say(&Word::Offer)?;
        let requests = hear_acceptance(&mut control)?;
        let mut links = self.open_all(Purpose::Pages, self.options.connections.get())?;
        self.guest.watch().map_err(Error::Machine)?;
        let stays = self.converge(&mut control, &mut links)?;
        let outcome = self.hand_over(&mut control, links, requests, stays);
        // Before the commit, the destination is told so that it need not guess.
        if outcome.is_err() && matches!(self.state, Source::Stopped) {
            let _ = control.say(&Word::Abort);
        }
        // It knows then that this side knows.
        if outcome.is_ok() {
            let _ = control.finish();
        }
        self.sent.add((control.bytes(), control.tag_bytes()));
        outcome
    }

    fn open(&self, purpose: Purpose) -> Result<Link> {
        let hello = Hello {
            protocol: PROTOCOL,
            tagvisor: env!("CARGO_PKG_VERSION").into(),
            session: self.session,
            purpose,
        };
        Link::open(
            self.dial,
            &hello,
            self.guest.pages().metadata(),
            self.options.compression,
            self.options.patience,
        )
    }

    fn open_all(&self, purpose: Purpose, count: u8) -> Result<Vec<Link>> {
        (0..count).map(|_| self.open(purpose)).collect()
    }

    fn step(&mut self, event: SourceEvent) -> Result<()> {
        match self.state.on(event) {
            Some(next) => {
                tracing::debug!("migration: source: {:?}, {event:?}: {next:?}", self.state);
                self.state = next;
                Ok(())
            }
            None => Err(Error::State(format!(
                "the source is {:?} and hears {event:?}",
                self.state
            ))),
        }
    }

    fn check(&self, convergence: &Convergence) -> Result<()> {
        if self.progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        match self.options.timeout {
            Some(after) if self.begun.elapsed() > after => Err(Error::TimedOut {
                after,
                figures: convergence.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Sends memory, until the guest is to be stopped. Returns whether pages may stay behind then.
    fn converge(&mut self, control: &mut Link, links: &mut [Link]) -> Result<bool> {
        if self.options.post_copy == PostCopy::Now {
            return Ok(true);
        }
        let otherwise = match self.options.post_copy {
            PostCopy::Auto => Otherwise::PostCopy,
            _ if self.options.may_slow => Otherwise::Slow,
            _ => Otherwise::GiveUp,
        };
        let mut convergence = Convergence::new(self.options.max_downtime, otherwise);
        let nothing = self.guest.changes().map_err(Error::Machine)?;
        let mut changed = all_of(&*self.guest.pages(), nothing.range())?;
        loop {
            self.check(&convergence)?;
            let begun = Instant::now();
            let mut changes = Changes::since(&changed);
            let sent = self.send(control, links, changed, &mut changes)?;
            changes.look(self.guest, None)?;
            let round = Round {
                pages: sent,
                time: begun.elapsed(),
                changed: changes.pages.len(),
                written: changes.written,
            };
            changed = changes.pages;
            let decision = convergence.after(round);
            self.show(&convergence);
            self.check(&convergence)?;
            match decision {
                Next::Round => {}
                Next::Slow(percent) => {
                    self.slowed = percent;
                    self.progress.slowed.store(percent, Relaxed);
                    self.guest.slow(percent);
                }
                Next::GiveUp => return Err(Error::DoesNotConverge(convergence.to_string())),
                stop @ (Next::Stop | Next::PostCopy) => {
                    self.missing = changed;
                    return Ok(stop == Next::PostCopy);
                }
            }
        }
    }

    fn show(&self, convergence: &Convergence) {
        let progress = self.progress;
        let whole = |number: f64| number as u64;
        progress
            .pages_per_second
            .store(whole(convergence.pages_per_second()), Relaxed);
        progress
            .changes_per_second
            .store(whole(convergence.changes_per_second()), Relaxed);
        let downtime = convergence.downtime().as_micros();
        progress
            .expected_downtime_us
            .store(u64::try_from(downtime).unwrap_or(u64::MAX), Relaxed);
    }

    /// Sends pages of a guest that runs over all links, and waits until all are placed. `changes` notes what it does to them meanwhile.
    ///
    /// What the guest writes before it is sent need not be sent again: so every now and then it is looked what has changed, and what
    /// of that is still to be sent is left out. That is as fine as parts are short; and every look has the guest fault on its next
    /// write to a page.
    fn send(
        &mut self,
        control: &mut Link,
        links: &mut [Link],
        mut rest: PageSet,
        changes: &mut Changes,
    ) -> Result<u64> {
        self.begin_round(&rest);
        let (progress, patience) = (self.progress, self.options.patience);
        let failed = &AtomicBool::new(false);
        let source = self.guest.pages();
        let mut said = Instant::now();
        let mut sent = Ok(0);
        let mut part_len = CHUNK as u64;
        while !rest.is_empty()
            && let Ok(before) = sent
        {
            changes.look(self.guest, Some(&rest))?;
            let part = rest.split_first(part_len);
            let begun = Instant::now();
            let work = || spread(links, &Only::new(&*source, &part), failed, progress);
            (sent, ()) = in_touch(control, &mut said, patience, failed, work, || ());
            if let Ok(now) = &mut sent {
                part_len = pages_in(LOOK_EVERY, *now, begun.elapsed());
                *now += before;
            }
        }
        self.end_round(control, links, sent)
    }

    /// Sends the last pages of a guest that stands still over all links, finds out its state meanwhile, and waits until all pages are
    /// placed.
    fn send_last(
        &mut self,
        control: &mut Link,
        links: &mut [Link],
        rest: &PageSet,
    ) -> Result<Vec<SavedState>> {
        self.begin_round(rest);
        let (progress, patience) = (self.progress, self.options.patience);
        let failed = &AtomicBool::new(false);
        let source = self.guest.pages();
        let (sent, states) = in_touch(
            control,
            &mut Instant::now(),
            patience,
            failed,
            || spread(links, &Only::new(&*source, rest), failed, progress),
            || self.guest.state(),
        );
        self.end_round(control, links, sent)?;
        states.map_err(Error::Machine)
    }

    fn begin_round(&mut self, pages: &PageSet) {
        self.rounds += 1;
        self.progress.round.store(self.rounds, Relaxed);
        self.progress.pages_total.fetch_add(pages.len(), Relaxed);
    }

    /// Says that so many pages were sent, and waits until they are placed.
    fn end_round(
        &mut self,
        control: &mut Link,
        links: &mut [Link],
        sent: Result<u64>,
    ) -> Result<u64> {
        let round = self.rounds;
        let sent = sent.and_then(|sent| {
            for link in links {
                link.say(&Word::RoundEnd { round })?;
            }
            Ok(sent)
        });
        // Also if a link broke: the destination then says why it broke it.
        control.say(&Word::RoundEnd { round })?;
        let receipt = control.hear();
        let sent = match (sent, receipt) {
            (Ok(sent), Ok(Word::RoundDone { round: done, pages })) => {
                if done != round || pages != self.pages + sent {
                    return Err(Error::Protocol {
                        peer: control.peer().into(),
                        what: format!(
                            "it has placed {pages} pages after round {done}; {} were sent in {round}",
                            self.pages + sent
                        ),
                    });
                }
                sent
            }
            (Ok(_), Ok(other)) => return Err(control.unexpected(other.name(), "a receipt")),
            (_, Err(refused @ Error::Refused { .. })) | (Ok(_), Err(refused)) => {
                return Err(refused);
            }
            (Err(error), _) => return Err(error),
        };
        self.pages += sent;
        Ok(sent)
    }

    /// Stops the guest, sends the last of it, and gives it away. If pages may stay, it is made ready before that they can be asked for.
    fn hand_over(
        &mut self,
        control: &mut Link,
        mut links: Vec<Link>,
        requests: u8,
        pages_may_stay: bool,
    ) -> Result<()> {
        let asked = match pages_may_stay {
            // While the guest runs still: it takes as long as all else that it stands still for.
            true => {
                control.say(&Word::PostCopy)?;
                self.open_all(Purpose::Requests, requests)?
            }
            false => Vec::new(),
        };
        let stopped = Instant::now();
        self.stopped = Some(stopped);
        self.step(SourceEvent::Stop)?;
        self.guest.stop().map_err(Error::Machine)?;
        note(stopped, "its vCPUs and devices have stopped");
        let last = self.guest.changes().map_err(Error::Machine)?;
        for link in links.iter().chain([&*control]) {
            link.set_patience(self.options.handover_patience)?;
        }
        let pages = self.guest.pages();
        if self.options.post_copy == PostCopy::Now {
            self.missing = all_of(&*pages, last.range())?;
        }
        self.missing.add(&last);
        self.fetched = PageSet::none(last.range().clone());
        let pages_stay = pages_may_stay && !self.missing.is_empty();
        let states = if pages_stay {
            self.guest.state().map_err(Error::Machine)?
        } else {
            let missing = std::mem::replace(&mut self.missing, PageSet::none(last.range().clone()));
            self.send_last(control, &mut links, &missing)?
        };
        for link in &mut links {
            link.finish()?;
            self.sent.add((link.bytes(), link.tag_bytes()));
        }
        drop(links);
        note(stopped, "its last pages are sent and its state is saved");
        for state in &states {
            control.state(state)?;
        }
        let stay: Vec<_> = self.missing.runs().collect();
        control.holes(&stay)?;
        control.say(&Word::HandOver)?;
        match control.hear()? {
            Word::Ready => {}
            other => return Err(control.unexpected(other.name(), "readiness")),
        }
        note(stopped, "its state is loaded");
        if self.progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        // Also if the next word cannot be said: requests are counted from then on.
        self.fetched = PageSet::none(last.range().clone());
        // The commit: from here on the guest is not run here, whatever happens.
        self.step(SourceEvent::Ready { pages_stay })?;
        control.say(&Word::Run)?;
        self.hear_of_it(control)?;
        note(stopped, "it runs");
        self.serve(control, asked)
    }

    /// Hears where the destination is.
    fn hear_of_it(&mut self, control: &mut Link) -> Result<()> {
        let state = hear_state(control)?;
        if (state.may_run() || state == Destination::Ended) && self.downtime.is_zero() {
            self.downtime = self
                .stopped
                .map_or(Duration::ZERO, |stopped| stopped.elapsed());
        }
        self.find(control.peer(), state)
    }

    fn find(&mut self, peer: &str, state: Destination) -> Result<()> {
        self.believe(peer, state)?;
        self.step(SourceEvent::Found(state))?;
        self.ended = state == Destination::Ended;
        Ok(())
    }

    /// A destination that says it has everything must have asked for it.
    fn believe(&self, peer: &str, state: Destination) -> Result<()> {
        if state == Destination::Complete && self.fetched.len() < self.missing.len() {
            return Err(Error::Protocol {
                peer: peer.into(),
                what: format!(
                    "it says that it has all of the guest, and asked for {} of {} pages that stayed here",
                    self.fetched.len(),
                    self.missing.len()
                ),
            });
        }
        Ok(())
    }

    /// Answers requests until the destination has all pages, or needs no more.
    fn serve(&mut self, control: &mut Link, asked: Vec<Link>) -> Result<()> {
        if self.state == Source::Gone {
            return Ok(());
        }
        control.set_patience(self.options.patience)?;
        self.progress.post_copy.store(true, Relaxed);
        self.progress.pages_done.store(self.fetched.len(), Relaxed);
        self.progress.pages_total.store(self.missing.len(), Relaxed);
        let closers: Vec<Closer> = asked.iter().map(Link::closer).collect();
        let pages = self.guest.pages();
        let fetched = Mutex::new(std::mem::replace(&mut self.fetched, PageSet::none(0..0)));
        let sent = Mutex::new(Sent::default());
        let (missing, progress) = (&self.missing, self.progress);
        let mut state = Ok(Destination::Running);
        thread::scope(|scope| {
            for mut link in asked {
                let (pages, fetched, sent) = (&*pages, &fetched, &sent);
                let mut work = move || {
                    if let Err(error) = answer(&mut link, pages, missing, fetched, progress) {
                        tracing::debug!("a link for requests ended: {error}");
                    }
                    let mut sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
                    sent.add((link.bytes(), link.tag_bytes()));
                };
                // A fuzzer knows all that comes, and needs no thread.
                if cfg!(fuzzing) {
                    work();
                } else {
                    scope.spawn(work);
                }
            }
            while let Ok(Destination::Running | Destination::Separated) = state {
                state = hear_state(control);
            }
            for close in &closers {
                close();
            }
        });
        self.fetched = fetched.into_inner().unwrap_or_else(PoisonError::into_inner);
        let sent = sent.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.sent.add((sent.bytes, sent.tag_bytes));
        self.find(control.peer(), state?)
    }

    /// What became of it.
    fn end(mut self, left: Result<()>) -> Departure {
        let error = match left {
            Ok(()) => return Departure::Gone(self.report()),
            Err(error) => error,
        };
        let may_be_ready = self.state == Source::Stopped;
        if self.step(SourceEvent::Failed).is_err() {
            tracing::debug!("migration: it failed while it was {:?}", self.state);
        }
        if self.state == Source::Kept {
            let went_on = self.guest.go_on();
            if may_be_ready {
                self.tell_that_it_was_kept();
            }
            return Departure::Kept(match went_on {
                Ok(()) => error,
                Err(worse) => Error::Machine(
                    format!("{error}; and the guest cannot go on here: {worse}").into(),
                ),
            });
        }
        Departure::Away(
            Box::new(Away {
                session: self.session,
                state: self.state,
                rounds: self.rounds,
                pages: self.pages,
                sent: self.sent,
                fetched: self.fetched,
                missing: self.missing,
                stopped: self.stopped,
                downtime: self.downtime,
                begun: self.begun,
                slowed: self.slowed,
            }),
            error,
        )
    }

    /// A destination that was ready when its link broke waits to hear this. If it cannot be told, its operator is.
    fn tell_that_it_was_kept(&self) {
        let told = self
            .open(Purpose::Back { kept: true })
            .and_then(|mut control| control.say(&Word::Abort));
        if let Err(error) = told {
            tracing::debug!("the destination is not told that the guest stays: {error}");
        }
    }

    fn report(&self) -> Report {
        Report {
            rounds: self.rounds,
            pages: self.pages,
            fetched: self.fetched.len(),
            ended: self.ended,
            bytes: self.sent.bytes,
            tag_bytes: self.sent.tag_bytes,
            downtime: self.downtime,
            total: self.begun.elapsed(),
            slowed: self.slowed,
        }
    }
}

impl Away {
    /// Where the source is.
    #[must_use]
    pub const fn state(&self) -> Source {
        self.state
    }

    /// Which migration it is.
    #[must_use]
    pub const fn session(&self) -> Session {
        self.session
    }

    /// Pages that are still here and nowhere else, as far as is known.
    #[must_use]
    pub fn pages_left(&self) -> u64 {
        self.missing.len() - self.fetched.len()
    }

    /// Mends the link, over another one, and goes on from there.
    pub fn recover<G: Departing>(
        self,
        guest: &mut G,
        dial: &dyn Dial,
        options: &Options,
        progress: &Progress,
    ) -> Departure {
        let mut leaving = Leaving {
            guest,
            dial,
            options,
            progress,
            session: self.session,
            state: self.state,
            begun: self.begun,
            rounds: self.rounds,
            pages: self.pages,
            sent: self.sent,
            fetched: self.fetched,
            missing: self.missing,
            stopped: self.stopped,
            downtime: self.downtime,
            slowed: self.slowed,
            ended: false,
        };
        let left = leaving.come_back();
        leaving.end(left)
    }

    /// Decides that the guest runs here, by somebody who made sure that it does not run at the destination and never did.
    ///
    /// # Errors
    /// Pages of it were at the destination, where it has run: what is here is old. Or it cannot go on.
    pub fn take_back<G: Departing>(&mut self, guest: &mut G) -> Result<()> {
        let Some(kept) = self.state.on(SourceEvent::TakeBack) else {
            return Err(Error::State(
                "the guest has run at the destination: what is here is old".into(),
            ));
        };
        guest.go_on().map_err(Error::Machine)?;
        self.state = kept;
        Ok(())
    }

    /// Decides that what is here is not needed, by somebody who made sure that the destination has all of it.
    pub fn forget(mut self) {
        self.state = self.state.on(SourceEvent::Forget).unwrap_or(self.state);
    }
}

impl<G: Departing> Leaving<'_, G> {
    fn come_back(&mut self) -> Result<()> {
        let mut control = self.open(Purpose::Back { kept: false })?;
        let requests = hear_acceptance(&mut control)?;
        let asked = match self.missing.is_empty() {
            true => Vec::new(),
            false => self.open_all(Purpose::Requests, requests)?,
        };
        self.hear_of_it(&mut control)?;
        if matches!(self.state, Source::Committed { .. }) {
            control.say(&Word::Run)?;
            self.hear_of_it(&mut control)?;
        }
        self.serve(&mut control, asked)?;
        let _ = control.finish();
        self.sent.add((control.bytes(), control.tag_bytes()));
        Ok(())
    }
}

/// Does what may take longer than the destination has `patience`, and tells it meanwhile that this side is there; it was told so
/// last when it `said` so. If it cannot be told, `failed` is set. Does something else besides, on this thread, that takes no
/// longer than that.
fn in_touch<T: Send, U>(
    control: &mut Link,
    said: &mut Instant,
    patience: Duration,
    failed: &AtomicBool,
    work: impl FnOnce() -> T + Send,
    besides: impl FnOnce() -> U,
) -> (T, U) {
    thread::scope(|scope| {
        let (done, is_done) = mpsc::channel::<()>();
        let worker = scope.spawn(move || {
            let outcome = work();
            drop(done);
            outcome
        });
        let beside = besides();
        loop {
            let quiet = (patience / 3).saturating_sub(said.elapsed());
            if is_done.recv_timeout(quiet) != Err(RecvTimeoutError::Timeout) {
                break;
            }
            if control.say(&Word::Sending).is_err() {
                failed.store(true, Relaxed);
                break;
            }
            *said = Instant::now();
        }
        let outcome = worker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (outcome, beside)
    })
}

/// Where its downtime goes.
fn note(stopped: Instant, what: &str) {
    let ms = stopped.elapsed().as_secs_f64() * 1e3;
    tracing::debug!("the guest stands still for {ms:.1} ms, and {what}");
}

/// Hears how many links for requests the destination wants.
fn hear_acceptance(control: &mut Link) -> Result<u8> {
    match control.hear()? {
        Word::Accept { requests } if requests <= MAX_LINKS => Ok(requests),
        Word::Accept { .. } => Err(control.unexpected("too many links for requests", "fewer")),
        other => Err(control.unexpected(other.name(), "an acceptance")),
    }
}

fn hear_state(control: &mut Link) -> Result<Destination> {
    match control.hear()? {
        Word::State { state, .. } => Ok(state),
        other => Err(control.unexpected(other.name(), "its state")),
    }
}

/// All pages of a source.
fn all_of(source: &impl PageSource, range: &std::ops::Range<u64>) -> Result<PageSet> {
    let mut all = PageSet::none(range.clone());
    let mut from = 0;
    while let Some(run) = next_run(source, from)? {
        from = run.end;
        all.insert(run);
    }
    Ok(all)
}

fn next_run(source: &impl PageSource, from: u64) -> Result<Option<std::ops::Range<u64>>> {
    source.next_run(from).map_err(|source| {
        Error::Pages(stream::Error::Source {
            first: from,
            last: from,
            source,
        })
    })
}

/// Pages of a chunk.
const CHUNK: usize = 64;

/// How often it is looked what the guest has changed.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How many pages go in a time, in whole chunks and at least one, when so many took so long.
fn pages_in(time: Duration, pages: u64, took: Duration) -> u64 {
    let pages = pages as f64 * time.as_secs_f64() / took.as_secs_f64().max(1e-6);
    (pages as u64 / CHUNK as u64).max(1) * CHUNK as u64
}

/// What a guest changes while its memory is sent.
struct Changes {
    /// What is to be sent again.
    pages: PageSet,
    /// Pages that it wrote.
    written: u64,
}

impl Changes {
    /// None yet of a guest that has such pages.
    fn since(pages: &PageSet) -> Self {
        Self {
            pages: PageSet::none(pages.range().clone()),
            written: 0,
        }
    }

    /// Asks what has changed. Of the pages in `to_come` it does not matter: they are read after this.
    fn look(&mut self, guest: &mut impl Departing, to_come: Option<&PageSet>) -> Result<()> {
        let new = guest.changes().map_err(Error::Machine)?;
        self.written += new.len();
        self.pages.add(&new);
        if let Some(to_come) = to_come {
            self.pages.remove(to_come);
        }
        Ok(())
    }
}

/// Sends all pages of a source over all links at once, each page over one, unless something `failed`. Returns how many.
fn spread<S: PageSource + Sync>(
    links: &mut [Link],
    source: &S,
    failed: &AtomicBool,
    progress: &Progress,
) -> Result<u64> {
    let cursor = Mutex::new(Cursor::new(CHUNK).map_err(Error::Pages)?);
    let work = |link: &mut Link| {
        let sent = feed(link, source, &cursor, failed, progress);
        if sent.is_err() {
            failed.store(true, Relaxed);
        }
        sent
    };
    let Some((own, others)) = links.split_first_mut() else {
        return Ok(0);
    };
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = others
            .iter_mut()
            .map(|link| scope.spawn(move || work(link)))
            .collect();
        // One link needs no other thread: the last round is often short, and the guest waits for it.
        let mut sent = work(own);
        for thread in threads {
            let more = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            sent = sent.and_then(|sent| Ok(sent + more?));
        }
        sent
    })
}

/// Sends chunks over a link until there are no more.
fn feed(
    link: &mut Link,
    source: &impl PageSource,
    cursor: &Mutex<Cursor>,
    failed: &AtomicBool,
    progress: &Progress,
) -> Result<u64> {
    let mut batch = Batch::new(source.metadata());
    let mut runs = Vec::new();
    let mut sent = 0;
    loop {
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        // Another link broke: that is told, and this round is not finished.
        if failed.load(Relaxed) {
            return Ok(sent);
        }
        {
            let mut cursor = cursor.lock().unwrap_or_else(PoisonError::into_inner);
            cursor.next(source, &mut runs).map_err(Error::Pages)?;
        }
        if runs.is_empty() {
            return Ok(sent);
        }
        batch.read(source, &runs).map_err(Error::Pages)?;
        let before = (link.bytes(), link.tag_bytes());
        link.pages(&batch)?;
        sent += batch.len() as u64;
        count(progress, link, before, batch.len());
    }
}

fn count(progress: &Progress, link: &Link, before: (u64, u64), pages: usize) {
    progress.pages_done.fetch_add(pages as u64, Relaxed);
    progress.bytes.fetch_add(link.bytes() - before.0, Relaxed);
    progress
        .tag_bytes
        .fetch_add(link.tag_bytes() - before.1, Relaxed);
}

/// Answers the requests of a link until it ends.
fn answer(
    link: &mut Link,
    pages: &impl PageSource,
    missing: &PageSet,
    fetched: &Mutex<PageSet>,
    progress: &Progress,
) -> Result<()> {
    let mut batch = Batch::new(pages.metadata());
    let mut none = Batch::new(pages.metadata());
    // A destination asks when its guest needs something, and may be silent for as long as it does not.
    link.set_patience(Duration::from_secs(24 * 3600))?;
    loop {
        let wanted = match link.next(&mut none)? {
            Incoming::Wanted(wanted) => wanted,
            Incoming::End => return Ok(()),
            other => return Err(link.unexpected(other.name(), "a request for pages")),
        };
        let runs = wanted.runs();
        if !runs
            .iter()
            .cloned()
            .flatten()
            .all(|page| missing.contains(page))
        {
            return Err(link.unexpected(
                "a request for pages that are not here",
                "one for those that are",
            ));
        }
        batch.read(pages, &runs).map_err(Error::Pages)?;
        let before = (link.bytes(), link.tag_bytes());
        link.pages(&batch)?;
        link.flush()?;
        let mut fetched = fetched.lock().unwrap_or_else(PoisonError::into_inner);
        let new: u64 = runs.into_iter().map(|run| fetched.insert(run)).sum();
        drop(fetched);
        count(progress, link, before, new as usize);
    }
}
