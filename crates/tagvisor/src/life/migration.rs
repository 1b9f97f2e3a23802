//! Guests that go to another host, and guests that come from one.
//!
//! The thread that has the machine sends and receives. When a guest has come and pages of it, or the word that it may run, are
//! still at the source, another thread attends to that, and has orders for the one with the machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use engine::{Hypervisor, Vm, VmBuilder};
use migration::handover::Destination;
use migration::{
    Away, Decider, Departure, Fill, Filling, Happening, Held, Options, Report, Verdict, depart,
    handover,
};
use vmm::config::MachineConfig;
use vmm::console::Console;
use vmm::layout::PAGE_SIZE;
use vmm::machine::migration::{Arrived, Coming, Leaving};
use vmm::machine::{Error, Machine};
use vmm::memory::lazy::{self, LazyFill};

use super::{Landlord, Life, Order, Overlays, Tenant, failed, state_of, with_addresses};
use crate::control::{
    Changes, Decision, MigrationReport, MigrationRequest, MigrationWork, ReceptionRequest, Refusal,
    VmInfo, VmState, Work,
};
use crate::wire::{Door, Line};

/// How long a source may say nothing.
const PATIENCE: Duration = Duration::from_secs(30);

/// Orders of the thread that attends to a guest that has come.
pub(super) enum Attended {
    /// It is known now whether the guest runs here.
    Decided {
        runs: bool,
        done: Sender<Result<(), Refusal>>,
    },
    /// Pages that could not be had are being tried again.
    Found,
    /// The link is broken: pages are still at the source.
    Separated(String),
}

/// A guest that is waited for.
pub struct Reception {
    door: Door,
    changes: Changes,
}

impl Reception {
    /// Lets guests come.
    ///
    /// # Errors
    /// The address cannot be had.
    pub fn open(request: ReceptionRequest) -> transport::Result<Self> {
        Ok(Self {
            door: Door::open(&request)?,
            changes: request.changes,
        })
    }
}

/// Why a guest did not come.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// Nobody can come there.
    #[error(transparent)]
    Listen(#[from] transport::Error),
    /// It failed.
    #[error("receiving a guest: {0}")]
    Migration(#[from] migration::Error),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] Error),
    /// The source has it.
    #[error("the source keeps the guest")]
    Kept,
}

/// What is left here of a guest that went, or has come and may not run yet.
#[derive(Default)]
pub(super) struct Between {
    /// It went, and it is not known whether it arrived; or half of it is here.
    away: Option<Box<Away>>,
    /// It came, and it is not known whether it may run.
    undecided: Option<Decider>,
    /// It came, and another thread attends to it.
    attendance: Option<Attendance>,
}

/// A guest that has come, and is attended to.
struct Attendance {
    decider: Decider,
    /// Closed when the source knows all that it is to know.
    done: Receiver<()>,
}

/// For how long the end of a guest is held up by telling its source.
const TELLING: Duration = Duration::from_secs(5);

impl Attendance {
    /// The guest has ended here: its source lets go of what it has. Returns whether the source knows where the guest went.
    fn end(self) -> bool {
        let before = self.decider.state();
        let _ = self.decider.end();
        match before {
            Destination::Running | Destination::Complete => {
                self.done.recv_timeout(TELLING) == Err(RecvTimeoutError::Disconnected)
            }
            // There is no link to tell it on.
            Destination::Separated => false,
            _ => true,
        }
    }
}

impl Between {
    /// Refuses what is not to be done with such a guest.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        if let Some(away) = &self.away {
            return Err(Refusal::Failed(what_to_do_here(away)));
        }
        match &self.undecided {
            Some(decider) if !decider.state().may_run() => {
                Err(Refusal::Failed(WHAT_TO_DO_THERE.into()))
            }
            _ => Ok(()),
        }
    }
}

const WHAT_TO_DO_THERE: &str = "the guest has come, and the source has not said whether it may run here. If the source can be \
    reached again: `tagvisor migrate NAME --recover ADDRESS` there. If it keeps the guest (`tagvisor info NAME` there says that it \
    runs): `tagvisor migrate NAME --decide elsewhere` here. If it is gone, and had not gone on with the guest: \
    `tagvisor migrate NAME --decide here` here";

fn what_to_do_here(away: &Away) -> String {
    match away.state() {
        handover::Source::Separated => format!(
            "the guest went to the destination, and {} pages of it are still here: `tagvisor migrate NAME --recover ADDRESS` mends the \
             link. Without the destination, the guest is lost: `tagvisor migrate NAME --decide elsewhere` gives up what is here",
            away.pages_left()
        ),
        _ => "the guest was handed over, and the destination did not answer: it may run there. If it can be reached: \
              `tagvisor migrate NAME --recover ADDRESS` here. If it runs the guest: `tagvisor migrate NAME --decide elsewhere` here. If \
              it is gone, and never ran the guest: `tagvisor migrate NAME --decide here` here"
            .into(),
    }
}

/// The work of a migration, for who asks.
pub(super) fn work(what: &str, progress: &migration::Progress) -> Work {
    let figures = progress.figures();
    Work {
        what: what.into(),
        pages_done: figures.pages_done,
        pages_total: figures.pages_total.max(figures.pages_done),
        bytes: figures.bytes.max(match what {
            "receive" => figures.pages_done * PAGE_SIZE,
            _ => 0,
        }),
        migration: Some(MigrationWork {
            round: figures.round,
            tag_bytes: figures.tag_bytes,
            pages_per_second: figures.pages_per_second,
            changes_per_second: figures.changes_per_second,
            expected_downtime_us: figures.expected_downtime.as_micros() as u64,
            slowed: figures.slowed,
            post_copy: figures.post_copy,
        }),
    }
}

fn options_of(request: &MigrationRequest) -> Options {
    Options {
        connections: request.connections,
        post_copy: request.post_copy,
        may_slow: request.may_slow,
        max_downtime: request.max_downtime,
        compression: request.compression,
        timeout: request.timeout,
        ..Options::default()
    }
}

fn report_of(report: &Report) -> MigrationReport {
    MigrationReport {
        rounds: report.rounds,
        pages: report.pages,
        fetched: report.fetched,
        ended: report.ended,
        bytes: report.bytes,
        tag_bytes: report.tag_bytes,
        downtime_us: report.downtime.as_micros() as u64,
        total_us: report.total.as_micros() as u64,
        slowed: report.slowed,
    }
}

impl<H: Hypervisor> Landlord<'_, H>
where
    <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
{
    /// Sends the guest to another host.
    pub(super) fn migrate(
        &mut self,
        request: &MigrationRequest,
    ) -> Result<MigrationReport, Refusal> {
        let state = self.state().ok_or(Refusal::NoVm)?;
        if !matches!(state, VmState::Running | VmState::Paused) {
            return Err(Refusal::State {
                wanted: "migrated",
                state,
            });
        }
        let is_away = self.between.away.is_some();
        // Whatever is refused, a guest between two hosts stays there.
        let refusal = |reason| match is_away {
            true => Refusal::Unsettled(reason),
            false => Refusal::Failed(reason),
        };
        if !is_away {
            let unsettled = |refusal: Refusal| Refusal::Unsettled(refusal.to_string());
            self.between.check().map_err(unsettled)?;
            self.settle()?;
        }
        match &self.between.away {
            Some(away) if !request.recover => return Err(refusal(what_to_do_here(away))),
            None if request.recover => {
                let reason = "there is no migration whose link could be mended";
                return Err(refusal(reason.into()));
            }
            _ => {}
        }
        let line = Line::new(request).map_err(|e| refusal(e.to_string()))?;
        let tenant = self.tenant.as_mut().ok_or(Refusal::NoVm)?;
        // The destination may stand elsewhere.
        let config = tenant.config.clone().with_absolute_paths();
        let config = config.map_err(|e| refusal(e.to_string()))?;
        let machine = tenant.machine.as_mut().ok_or(Refusal::State {
            wanted: "migrated",
            state,
        })?;
        let shared = self.shared.clone();
        let progress = Arc::new(migration::Progress::default());
        shared.known().migration = Some(("migrate", progress.clone()));
        if shared.has_ended() {
            progress.cancel();
        }
        let mut guest = Leaving::new(machine, &config);
        let options = options_of(request);
        // What is taken out here is kept by `after`: between, nothing is refused.
        let departure = match self.between.away.take() {
            Some(away) => away.recover(&mut guest, &line, &options, &progress),
            None => depart(&mut guest, &line, &options, &progress),
        };
        drop(guest);
        shared.known().migration = None;
        self.after(departure, state)
    }

    /// The guest is gone, or stays; it was in the state `before`.
    fn after(&mut self, departure: Departure, before: VmState) -> Result<MigrationReport, Refusal> {
        match departure {
            Departure::Gone(report) => {
                self.leave();
                Ok(report_of(&report))
            }
            Departure::Kept(error) => {
                let machine = self
                    .tenant
                    .as_mut()
                    .and_then(|tenant| tenant.machine.as_mut());
                // What it ended with is told by its run.
                let goes_on =
                    machine.is_some_and(|machine| machine.is_running() || machine.has_ended());
                if before == VmState::Paused || goes_on {
                    self.set_state(before);
                    return Err(Refusal::Failed(format!(
                        "{error}. The guest is here, as before"
                    )));
                }
                let reason = error.to_string();
                if let Some(info) = &mut self.shared.known().info {
                    info.state = VmState::Paused;
                    info.reason = Some(reason.clone());
                }
                Err(Refusal::Failed(reason))
            }
            Departure::Away(away, error) => {
                let what = what_to_do_here(&away);
                self.between.away = Some(away);
                if let Some(info) = &mut self.shared.known().info {
                    info.state = VmState::Paused;
                    info.reason = Some(what.clone());
                }
                tracing::error!("{error}; {what}");
                Err(Refusal::Unsettled(format!("{error}; {what}")))
            }
        }
    }

    /// The guest is at another host, or given up.
    fn leave(&mut self) {
        self.end_machine();
        self.moved = true;
    }

    pub(super) fn decide(&mut self, decision: Decision) -> Result<(), Refusal> {
        if let Some(away) = self.between.away.take() {
            return self.decide_here(away, decision);
        }
        let decider = self
            .between
            .undecided
            .as_ref()
            .ok_or_else(|| Refusal::Failed(self.why_nothing_is_to_decide()))?;
        // The thread that waits for the source sees it, and has the guest run or discarded.
        match decision {
            Decision::Here => decider.take_over().map_err(|_| {
                Refusal::Failed(
                    "pages of the guest are still at the source: it cannot run without that one, `--decide elsewhere` gives it up".into(),
                )
            }),
            Decision::Elsewhere => failed(decider.forget()),
        }
    }

    /// What a guest is about which nobody can decide.
    fn why_nothing_is_to_decide(&self) -> String {
        let pages = self.fill().map_or(0, |fill| {
            let progress = fill.progress();
            progress.pages.saturating_sub(progress.placed)
        });
        let state = self.between.attendance.as_ref();
        match state.map(|attendance| attendance.decider.state()) {
            Some(Destination::Running) => format!(
                "there is nothing to decide: the guest runs here, and {pages} pages of it, which are still at the source, are on their way"
            ),
            Some(Destination::Separated) => format!(
                "the guest is here, but for {pages} pages that are at the source and nowhere else: without them it cannot go on, whatever is \
                 decided. `tagvisor migrate NAME --recover ADDRESS` there mends the link. If the source's process is gone, the guest is lost: \
                 `tagvisor kill NAME` here gives up what is left of it"
            ),
            _ => "there is nothing to decide: the guest is here, all of it".into(),
        }
    }

    /// The machine has ended: a source that still has pages of its guest is told that they are needed no more.
    pub(super) fn end_attendance(&mut self) {
        if let Some(attendance) = self.between.attendance.take()
            && !attendance.end()
        {
            tracing::error!(
                "the guest's machine has ended, and the source of its migration could not be told: \
                 `tagvisor migrate NAME --decide elsewhere` there gives up what is left there"
            );
        }
    }

    fn decide_here(&mut self, mut away: Box<Away>, decision: Decision) -> Result<(), Refusal> {
        if decision == Decision::Elsewhere {
            away.forget();
            self.leave();
            return Ok(());
        }
        let tenant = self.tenant.as_mut().ok_or(Refusal::NoVm)?;
        let machine = tenant.machine.as_mut().ok_or(Refusal::NoVm)?;
        let mut guest = Leaving::new(machine, &tenant.config);
        let taken = away.take_back(&mut guest);
        drop(guest);
        if let Err(error) = taken {
            let what = what_to_do_here(&away);
            self.between.away = Some(away);
            return Err(Refusal::Failed(format!("{error}; {what}")));
        }
        // Whether it ran before is forgotten: whoever takes it back wants it to.
        if let Some(machine) = self
            .tenant
            .as_mut()
            .and_then(|tenant| tenant.machine.as_mut())
        {
            failed(machine.resume())?;
        }
        if let Some(info) = &mut self.shared.known().info {
            info.state = VmState::Running;
            info.reason = None;
        }
        Ok(())
    }

    /// Waits for a guest, and lets it run.
    pub(super) fn receive(&mut self, reception: Reception) -> Result<(), ReceiveError> {
        let progress = Arc::new(migration::Progress::default());
        self.shared.known().migration = Some(("receive", progress.clone()));
        if self.shared.has_ended() {
            progress.cancel();
        }
        // Whoever starts the source waits for this line.
        eprintln!(
            "tagvisor: waiting for a guest at {}",
            reception.door.address()
        );
        let received = self.receive_guest(reception, &progress);
        let mut known = self.shared.known();
        known.migration = None;
        known.info = None;
        drop(known);
        let (tenant, arrived, mut held) = received?;
        let paused = arrived.paused;
        let fill = arrived.fill.clone();
        self.take_in(tenant, arrived);
        match held.wait() {
            Verdict::Run => {
                self.run_arrived(paused)?;
                self.attend(held, fill)
            }
            Verdict::Discard => {
                self.give_up_arrived();
                Err(ReceiveError::Kept)
            }
            Verdict::Undecided(error) => {
                tracing::error!("{error}; {WHAT_TO_DO_THERE}");
                if let Some(info) = &mut self.shared.known().info {
                    info.reason = Some(WHAT_TO_DO_THERE.into());
                }
                self.between.undecided = Some(held.decider());
                self.paused_at_source = paused;
                self.wait_for_decision(held, fill)
            }
        }
    }

    fn receive_guest(
        &mut self,
        Reception { door, changes }: Reception,
        progress: &migration::Progress,
    ) -> Result<(Tenant<H>, Arrived<H>, Held), ReceiveError> {
        let hypervisor = self.hypervisor;
        let shared = self.shared.clone();
        let mut made: Option<(MachineConfig, Overlays, Console)> = None;
        let mut build = |offered: &MachineConfig| {
            made = None;
            let config = with_addresses(changed(offered.clone(), &changes));
            let mut overlays = Overlays::default();
            let mut console = Console::open_again(&config.console)?;
            let named = overlays.named(&config)?;
            let machine = Machine::awaiting(hypervisor, &named, &mut console)?;
            shared.known().info = Some(VmInfo {
                config: config.clone(),
                state: VmState::Created,
                reason: None,
                mte: machine.mte().map(|mte| mte.to_string()),
                work: None,
            });
            made = Some((config, overlays, console));
            Ok(machine)
        };
        let mut coming = Coming::new(
            hypervisor.capabilities(),
            &mut build,
            on_event(self.life.clone()),
        );
        let receiver = migration::Receiver::new(door, PATIENCE)?;
        let held = receiver.receive(&mut coming, progress)?;
        let arrived = coming.arrived();
        match (arrived, made) {
            (Some(arrived), Some((config, overlays, console))) => Ok((
                Tenant {
                    config,
                    overlays,
                    machine: None,
                    console: Some(console),
                },
                arrived,
                held,
            )),
            _ => Err(ReceiveError::Kept),
        }
    }

    /// The guest is here, and stands still.
    fn take_in(&mut self, mut tenant: Tenant<H>, arrived: Arrived<H>) {
        let machine = arrived.machine;
        let mut known = self.shared.known();
        known.info = Some(VmInfo {
            config: tenant.config.clone(),
            state: VmState::Paused,
            reason: None,
            mte: machine.mte().map(|mte| mte.to_string()),
            work: None,
        });
        known.machine = Some(machine.handle());
        known.fill = arrived.fill;
        drop(known);
        tenant.machine = Some(machine);
        self.tenant = Some(tenant);
    }

    /// It is known that the guest is this host's.
    fn run_arrived(&mut self, paused: bool) -> Result<(), Error> {
        self.between.undecided = None;
        let Some(machine) = self
            .tenant
            .as_mut()
            .and_then(|tenant| tenant.machine.as_mut())
        else {
            return Ok(());
        };
        if !paused {
            machine.resume()?;
        }
        if let Err(e) = machine.announce() {
            tracing::warn!("the network is not told that the guest is here: {e}");
        }
        if let Some(info) = &mut self.shared.known().info {
            info.state = state_of(paused);
            info.reason = None;
        }
        Ok(())
    }

    fn give_up_arrived(&mut self) {
        self.between.undecided = None;
        self.end_machine();
        self.tenant = None;
        self.shared.known().info = None;
    }

    fn wait_for_decision(
        &mut self,
        mut held: Held,
        fill: Option<Arc<LazyFill>>,
    ) -> Result<(), ReceiveError> {
        let life = self.life.clone();
        self.attended_by(held.decider(), move || {
            let runs = matches!(held.wait_again(), Verdict::Run);
            let (done, answered) = mpsc::channel();
            life.attended(Attended::Decided { runs, done });
            if runs && matches!(answered.recv(), Ok(Ok(()))) {
                attend_to(held, fill.as_deref(), &life);
            }
        })
    }

    fn attend(&mut self, held: Held, fill: Option<Arc<LazyFill>>) -> Result<(), ReceiveError> {
        let life = self.life.clone();
        self.attended_by(held.decider(), move || {
            attend_to(held, fill.as_deref(), &life)
        })
    }

    /// Has a thread attend to a guest that has come.
    fn attended_by(
        &mut self,
        decider: Decider,
        attend: impl FnOnce() + Send + 'static,
    ) -> Result<(), ReceiveError> {
        let (doing, done) = mpsc::channel();
        self.between.attendance = Some(Attendance { decider, done });
        spawn(move || {
            let _doing: Sender<()> = doing;
            attend();
        })
    }

    /// An order of the thread that attends to a guest that has come.
    pub(super) fn attended(&mut self, order: Attended) {
        match order {
            Attended::Decided { runs: true, done } => {
                let _ = done.send(failed(self.run_arrived(self.paused_at_source)));
            }
            Attended::Decided { runs: false, done } => {
                self.give_up_arrived();
                self.moved = true;
                let _ = done.send(Ok(()));
            }
            Attended::Separated(reason) => {
                tracing::error!("pages of the guest are still at the source: {reason}");
                if let Some(info) = &mut self.shared.known().info {
                    info.reason = Some(format!(
                        "pages of the guest are still at the source, and the link is broken: {reason}; \
                         `tagvisor migrate NAME --recover ADDRESS` there mends it"
                    ));
                }
            }
            Attended::Found => {
                if std::mem::take(&mut self.waits_for_memory)
                    && let Err(refusal) = self.resume()
                {
                    tracing::error!("the guest cannot go on: {refusal}");
                }
                if let Some(info) = &mut self.shared.known().info {
                    info.reason = None;
                }
            }
        }
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<(), ReceiveError> {
    thread::Builder::new()
        .name("migration-attend".into())
        .spawn(work)
        .map(drop)
        .map_err(|error| migration::Error::Thread(error).into())
}

fn attend_to(held: Held, fill: Option<&LazyFill>, life: &Life) {
    let memory = fill.map(Memory);
    let filling = memory.as_ref().map(|memory| memory as &dyn Filling);
    held.attend(filling, |happening| match happening {
        Happening::Separated(reason) => life.attended(Attended::Separated(reason)),
        Happening::Found => life.attended(Attended::Found),
        Happening::Complete => {
            if let Some(fill) = fill {
                tracing::info!("all of the guest is here: {}", fill.progress().faults);
            }
        }
    });
}

/// The guest's memory, as whoever attends to it sees it.
struct Memory<'a>(&'a LazyFill);

impl Filling for Memory<'_> {
    fn state(&self) -> Fill {
        match self.0.state() {
            lazy::State::Filling => Fill::Filling(self.0.progress().placed),
            lazy::State::Failed(why) => Fill::Failed(why.to_string()),
            lazy::State::Complete => Fill::Complete,
        }
    }

    fn retry(&self) {
        self.0.retry();
    }
}

/// Tells the machine's thread of pages that cannot be had.
pub(super) fn on_event(life: Life) -> impl Fn(lazy::Event) + Clone + Send + Sync + 'static {
    move |event| {
        if let lazy::Event::Failed(why) = event {
            // Nobody carries orders out any more: then it has ended.
            let _ = life.orders.send(Order::MemoryMissing(why.to_string()));
            life.call();
        }
    }
}

impl Life {
    fn attended(&self, order: Attended) {
        let _ = self.orders.send(Order::Attended(order));
        self.call();
    }
}

/// The machine that was offered, as it is to be here.
fn changed(mut config: MachineConfig, changes: &Changes) -> MachineConfig {
    if changes.name.is_some() {
        config.name.clone_from(&changes.name);
    }
    if let Some(console) = &changes.console {
        config.console = console.clone();
    }
    for (net, tap) in config.net.iter_mut().zip(&changes.taps) {
        net.tap.clone_from(tap);
    }
    for (disk, path) in config.disk.iter_mut().zip(&changes.disks) {
        disk.path.clone_from(path);
    }
    for (port, socket) in config.port.iter_mut().zip(&changes.ports) {
        port.socket = PathBuf::from(socket);
    }
    config
}

/// What whoever asked is told.
pub(super) fn tell<T>(answer: &Sender<Result<T, Refusal>>, result: Result<T, Refusal>) {
    // They may be gone.
    let _ = answer.send(result);
}
