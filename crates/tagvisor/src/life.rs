//! The life of a VMM and of its machine: built, run through its guest's resets, paused, saved, ended.
//!
//! One thread, the one that calls [`Orders::carry_out`], has the machine; its vCPUs run on threads of
//! their own. Whoever wants something of the machine has a [`Life`]: it puts an order into a queue,
//! interrupts the machine's wait, and waits for the answer. What is known of the machine stands beside
//! the queue, so that a question is answered at once, whatever the machine's thread does.

mod death;
mod debug;
mod inspection;
mod migration;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::mem;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use engine::{Hypervisor, Vm, VmBuilder};
use stream::Snapshot;
use transport::Address;
use vmm::config::{DiskConfig, MachineConfig};
use vmm::console::Console;
use vmm::layout::PAGE_SIZE;
use vmm::machine::snapshot::{self, Progress, SavedMachine};
use vmm::machine::{Ending, Error, Machine, MachineHandle};
use vmm::memory::base::Base;
use vmm::memory::lazy::{self, Before, LazyFill, SnapshotPages, Threads};
use vmm::memory::pages::GuestPages;
use vmm::virtio::block::hold_temporary;
use vmm::virtio::net::MacAddr;

use self::debug::{Door, Session};
use self::migration::{Attended, Between};
pub use self::migration::{ReceiveError, Reception};
use crate::control::{
    DebugRequest, Decision, InspectRequest, MigrationReport, MigrationRequest, ReceptionRequest,
    Refusal, RestoreRequest, SnapshotReport, SnapshotRequest, VmInfo, VmState, Vmm, Work,
};
use crate::inspection::Lease;

type Answer = Sender<Result<(), Refusal>>;

enum Order {
    Create(Box<MachineConfig>, Answer),
    Boot(Answer),
    Pause(Answer),
    Resume(Answer),
    Shutdown(Answer),
    Reboot(Answer),
    Delete(Answer),
    Snapshot(SnapshotRequest, Sender<Result<SnapshotReport, Refusal>>),
    Restore(RestoreRequest, Answer),
    Migrate(MigrationRequest, Sender<Result<MigrationReport, Refusal>>),
    Decide(Decision, Answer),
    Receive(ReceptionRequest, Answer),
    Inspect(InspectRequest, Sender<Result<Lease, Refusal>>),
    Attended(Attended),
    /// A debugger came.
    Debug(Box<Session>),
    /// A page of a machine that is restored lazily cannot be had, and why.
    MemoryMissing(String),
    /// Look whether it is all to end.
    Look,
}

/// A VMM, as all others but its machine's thread see it.
#[derive(Clone)]
pub struct Life {
    orders: Sender<Order>,
    shared: Arc<Shared>,
}

/// Orders to a VMM, for the thread that carries them out.
pub struct Orders {
    queue: Receiver<Order>,
    life: Life,
}

#[derive(Default)]
struct Shared {
    /// It is all to end.
    ended: AtomicBool,
    known: Mutex<Known>,
    /// Where debuggers can come.
    door: Mutex<Option<Door>>,
}

/// What is known of the machine.
#[derive(Default)]
struct Known {
    info: Option<VmInfo>,
    /// A snapshot that is being written.
    snapshot: Option<Arc<Progress>>,
    /// A guest that is on its way to another host, or from one.
    migration: Option<(&'static str, Arc<::migration::Progress>)>,
    /// Memory that comes as it is touched, and has not all come.
    fill: Option<Arc<LazyFill>>,
    /// Ends the wait for somebody who looks at the machine.
    lent: Option<Sender<()>>,
    machine: Option<MachineHandle>,
    /// Who debugs the machine, or is about to.
    debugger: Option<String>,
}

impl Known {
    /// What is being done with the machine.
    fn work(&self) -> Option<Work> {
        if let Some(progress) = &self.snapshot {
            return Some(Work {
                what: "snapshot".into(),
                pages_done: progress.pages_done.load(Ordering::Relaxed),
                pages_total: progress.pages_total.load(Ordering::Relaxed),
                bytes: progress.bytes.load(Ordering::Relaxed),
                migration: None,
            });
        }
        if let Some((what, progress)) = &self.migration {
            return Some(migration::work(what, progress));
        }
        let fill = self.fill.as_deref().filter(|fill| !fill.is_complete())?;
        let progress = fill.progress();
        Some(Work {
            what: "restore".into(),
            pages_done: progress.placed,
            pages_total: progress.pages,
            bytes: progress.placed * PAGE_SIZE,
            migration: None,
        })
    }
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}

impl Life {
    /// A VMM without a machine.
    pub fn new() -> (Self, Orders) {
        let (orders, queue) = mpsc::channel();
        let life = Self {
            orders,
            shared: Arc::new(Shared::default()),
        };
        (life.clone(), Orders { queue, life })
    }

    /// Asks for something, and waits for the answer.
    fn order<T>(
        &self,
        order: impl FnOnce(Sender<Result<T, Refusal>>) -> Order,
    ) -> Result<T, Refusal> {
        let (answer, answered) = mpsc::channel();
        let gone = |_| Refusal::Failed("the VMM is ending".into());
        {
            let known = self.shared.known();
            if let Some(peer) = &known.debugger {
                return Err(Refusal::Debugged(peer.clone()));
            }
            // Under the lock, so that no debugger comes between.
            self.orders.send(order(answer)).map_err(|_| gone(()))?;
        }
        self.call();
        answered.recv().map_err(|_| gone(()))?
    }

    /// Has the machine's thread look at its orders.
    fn call(&self) {
        if let Some(machine) = &self.shared.known().machine {
            machine.interrupt();
        }
    }
}

impl Vmm for Life {
    fn info(&self) -> Result<VmInfo, Refusal> {
        let known = self.shared.known();
        let mut info = known.info.clone().ok_or(Refusal::NoVm)?;
        info.work = known.work();
        Ok(info)
    }

    fn create(&self, config: MachineConfig) -> Result<(), Refusal> {
        self.order(|answer| Order::Create(Box::new(config), answer))
    }

    fn boot(&self) -> Result<(), Refusal> {
        self.order(Order::Boot)
    }

    fn pause(&self) -> Result<(), Refusal> {
        self.order(Order::Pause)
    }

    fn resume(&self) -> Result<(), Refusal> {
        self.order(Order::Resume)
    }

    fn shutdown(&self) -> Result<(), Refusal> {
        self.order(Order::Shutdown)
    }

    fn reboot(&self) -> Result<(), Refusal> {
        self.order(Order::Reboot)
    }

    fn delete(&self) -> Result<(), Refusal> {
        self.order(Order::Delete)
    }

    fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotReport, Refusal> {
        self.order(|answer| Order::Snapshot(request, answer))
    }

    fn restore(&self, request: RestoreRequest) -> Result<(), Refusal> {
        self.order(|answer| Order::Restore(request, answer))
    }

    fn migrate(&self, request: MigrationRequest) -> Result<MigrationReport, Refusal> {
        self.order(|answer| Order::Migrate(request, answer))
    }

    fn cancel_migration(&self) -> Result<(), Refusal> {
        match &self.shared.known().migration {
            Some((_, progress)) if progress.figures().post_copy => Err(Refusal::Failed(
                "the guest has been handed over: it runs at the destination".into(),
            )),
            Some((_, progress)) => {
                progress.cancel();
                Ok(())
            }
            None => Err(Refusal::Failed("there is no migration on its way".into())),
        }
    }

    fn decide_migration(&self, decision: Decision) -> Result<(), Refusal> {
        self.order(|answer| Order::Decide(decision, answer))
    }

    fn receive(&self, request: ReceptionRequest) -> Result<(), Refusal> {
        self.order(|answer| Order::Receive(request, answer))
    }

    fn debug(&self, request: DebugRequest) -> Result<Option<Address>, Refusal> {
        self.open_door(&request)
    }

    fn inspect(&self, request: InspectRequest) -> Result<Lease, Refusal> {
        self.order(|answer| Order::Inspect(request, answer))
    }

    fn shut_down_vmm(&self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        let known = self.shared.known();
        if let Some(lent) = &known.lent {
            let _ = lent.send(());
        }
        if let Some(snapshot) = &known.snapshot {
            snapshot.cancelled.store(true, Ordering::Relaxed);
        }
        if let Some((_, migration)) = &known.migration {
            migration.cancel();
        }
        drop(known);
        // Nobody carries orders out any more: then it has ended.
        let _ = self.orders.send(Order::Look);
        self.call();
    }
}

/// With what a VMM begins.
pub enum Beginning {
    /// With no machine; it stays when a machine has ended.
    Empty,
    /// With a machine that boots; it ends with its guest.
    Boot(MachineConfig),
    /// With a machine from a snapshot; it ends with its guest.
    Restore(Box<Restoration>),
    /// With a machine that shares its memory with others; it ends with its guest.
    Clone(Cloning),
    /// With a guest that comes from another host; it ends with its guest.
    Receive(Box<Reception>),
}

/// How a VMM ends that was not asked to, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As its machine did.
    Machine(Ending),
    /// Its guest is at another host.
    Moved,
}

/// A machine that goes on from a state and a base of memory.
pub struct Cloning {
    /// Its configuration and state.
    pub saved: Box<SavedMachine>,
    /// Its memory.
    pub base: Base,
    /// Let the guest stand still until it is resumed.
    pub paused: bool,
}

/// A machine to be restored.
pub struct Restoration {
    /// From what.
    request: RestoreRequest,
    snapshot: Snapshot<File>,
    /// What was saved. Its configuration may be changed before.
    pub saved: SavedMachine,
}

impl Restoration {
    /// Opens the snapshot.
    ///
    /// # Errors
    /// The file is none that a machine could be restored from.
    pub fn open(request: RestoreRequest) -> Result<Self, RestoreError> {
        let opened = snapshot::open(&request.file, &request.bases)
            .map_err(snapshot::ReadError::from)
            .and_then(|snapshot| Ok((SavedMachine::read(&snapshot)?, snapshot)));
        match opened {
            Ok((saved, snapshot)) => Ok(Self {
                request,
                snapshot,
                saved,
            }),
            Err(source) => Err(RestoreError::Snapshot {
                file: request.file,
                source,
            }),
        }
    }
}

/// The machine that a VMM has.
struct Tenant<H: Hypervisor> {
    /// As it was given, with addresses chosen: what a snapshot says.
    config: MachineConfig,
    /// The files of overlays without a name, which outlast resets.
    overlays: Overlays,
    // Dropped in this order: the machine writes to the console until it is gone.
    machine: Option<Machine<H>>,
    console: Option<Console>,
}

/// The disks of a configuration with the files of overlays without a name, once these were made.
#[derive(Default)]
struct Overlays(Option<(Vec<DiskConfig>, Vec<File>)>);

impl Overlays {
    /// The configuration with disks that name their overlays.
    fn named(&mut self, config: &MachineConfig) -> Result<MachineConfig, Error> {
        let (disks, _) = match &mut self.0 {
            Some(held) => held,
            none => {
                let mut disks = config.disk.clone();
                let files = hold_temporary(&mut disks)?;
                none.insert((disks, files))
            }
        };
        Ok(MachineConfig {
            disk: disks.clone(),
            ..config.clone()
        })
    }
}

/// The VMM, on the thread that has the machine.
struct Landlord<'h, H: Hypervisor> {
    hypervisor: &'h H,
    /// It goes on when its guest has ended the machine.
    stays: bool,
    /// How it gives itself orders.
    life: Life,
    shared: Arc<Shared>,
    tenant: Option<Tenant<H>>,
    /// A guest that is neither here nor elsewhere, as far as is known.
    between: Between,
    /// Whether a guest that came, and may not run yet, was paused at the source.
    paused_at_source: bool,
    /// The guest is at another host.
    moved: bool,
    /// The guest is held because a page of it cannot be had.
    waits_for_memory: bool,
}

impl Orders {
    /// Runs a VMM to its end: until it is told to end, or its guest ends the machine that it began with.
    ///
    /// # Errors
    /// That machine cannot be built, or cannot go on.
    pub fn carry_out<H: Hypervisor>(
        self,
        hypervisor: &H,
        beginning: Beginning,
    ) -> Result<End, LifeError>
    where
        <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
    {
        let Self { queue, life } = self;
        let mut vmm = Landlord {
            hypervisor,
            stays: matches!(beginning, Beginning::Empty),
            shared: life.shared.clone(),
            life,
            tenant: None,
            between: Between::default(),
            paused_at_source: false,
            moved: false,
            waits_for_memory: false,
        };
        const ASKED: End = End::Machine(Ending::Asked);
        if vmm.shared.has_ended() {
            return Ok(ASKED);
        }
        match beginning {
            Beginning::Empty => {}
            Beginning::Boot(config) => {
                vmm.create(config);
                vmm.boot()?;
            }
            Beginning::Restore(restoration) => vmm.restore(*restoration)?,
            Beginning::Clone(cloning) => vmm.clone_machine(&cloning)?,
            Beginning::Receive(reception) => match vmm.receive(*reception) {
                Err(_) if vmm.shared.has_ended() => return Ok(ASKED),
                received => received?,
            },
        }
        loop {
            while let Ok(order) = queue.try_recv() {
                vmm.obey(order);
            }
            if vmm.shared.has_ended() {
                return Ok(ASKED);
            }
            if vmm.has_moved() {
                return Ok(End::Moved);
            }
            match vmm.running().map(Machine::run) {
                Some(outcome) => {
                    if let Some(ending) = vmm.act_on(outcome)? {
                        return Ok(End::Machine(ending));
                    }
                }
                None => match queue.recv() {
                    Ok(order) => vmm.obey(order),
                    // It cannot be closed: `life` keeps it open.
                    Err(_) => return Ok(ASKED),
                },
            }
        }
    }
}

impl<H: Hypervisor> Landlord<'_, H>
where
    <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
{
    fn obey(&mut self, order: Order) {
        // Whoever asked may be gone.
        match order {
            Order::Create(config, answer) => {
                let _ = answer.send(self.may_create().map(|()| self.create(*config)));
            }
            Order::Boot(answer) => {
                let _ = answer.send(self.try_boot());
            }
            Order::Pause(answer) => {
                let _ = answer.send(self.pause());
            }
            Order::Resume(answer) => {
                let _ = answer.send(self.resume());
            }
            Order::Shutdown(answer) => {
                let _ = answer.send(self.shutdown());
            }
            Order::Reboot(answer) => {
                let _ = answer.send(self.shutdown().and_then(|()| self.try_boot()));
            }
            Order::Delete(answer) => {
                let _ = answer.send(self.delete());
            }
            Order::Snapshot(request, answer) => {
                let _ = answer.send(self.snapshot(&request));
            }
            Order::Restore(request, answer) => {
                let restored = self
                    .may_create()
                    .and_then(|()| failed(Restoration::open(request)))
                    .and_then(|restoration| failed(self.restore(restoration)));
                let _ = answer.send(restored);
            }
            Order::Migrate(request, answer) => migration::tell(&answer, self.migrate(&request)),
            Order::Decide(decision, answer) => migration::tell(&answer, self.decide(decision)),
            Order::Receive(request, answer) => {
                let received = self
                    .may_create()
                    .and_then(|()| failed(Reception::open(request)))
                    .and_then(|reception| failed(self.receive(reception)));
                migration::tell(&answer, received);
            }
            Order::Inspect(request, answer) => self.inspect(&request, &answer),
            Order::Attended(order) => self.attended(order),
            Order::Debug(session) => self.debug(&session),
            Order::MemoryMissing(reason) => self.miss_memory(reason),
            Order::Look => {}
        }
    }

    /// Whether the VMM is to end because its guest is at another host.
    fn has_moved(&mut self) -> bool {
        let moved = std::mem::take(&mut self.moved);
        moved && !self.stays
    }

    /// The guest cannot go on where it wants to: it is held, in all of its vCPUs, until there is another try.
    fn miss_memory(&mut self, reason: String) {
        let fill = self.fill();
        if !fill.is_some_and(|fill| matches!(fill.state(), lazy::State::Failed(_))) {
            // There was another try before this was heard of.
            return;
        }
        if let Some(machine) = self.running() {
            machine.hold();
        }
        tracing::error!("the guest is paused, and `tagvisor resume` tries again: {reason}");
        self.waits_for_memory |= self.state() == Some(VmState::Running);
        if let Some(info) = &mut self.shared.known().info {
            info.state = VmState::Paused;
            info.reason = Some(reason);
        }
    }

    /// The memory that has not all come, if so.
    fn fill(&self) -> Option<Arc<LazyFill>> {
        let fill = self.shared.known().fill.clone();
        fill.filter(|fill| !fill.is_complete())
    }

    /// Waits until all of a lazily restored machine's memory is there: before that it can be neither saved nor stopped.
    fn settle(&self) -> Result<(), Refusal> {
        const LOOK_EVERY: Duration = Duration::from_millis(10);
        let Some(fill) = self.fill() else {
            return Ok(());
        };
        loop {
            match fill.state() {
                lazy::State::Complete => return Ok(()),
                lazy::State::Failed(why) => {
                    return Err(Refusal::Failed(format!(
                        "{why}; resume the machine to try again, or end it"
                    )));
                }
                lazy::State::Filling if self.shared.has_ended() => {
                    return Err(Refusal::Failed("the VMM is ending".into()));
                }
                lazy::State::Filling => thread::sleep(LOOK_EVERY),
            }
        }
    }

    /// The machine's run came back. Returns how the VMM ends, if it does.
    fn act_on(&mut self, outcome: Result<Ending, Error>) -> Result<Option<Ending>, Error> {
        self.tell_death(&outcome);
        match outcome {
            Ok(Ending::Interrupted) => Ok(None),
            Ok(Ending::Asked) => Ok(Some(Ending::Asked)),
            Ok(Ending::Reset) if self.starts_over() => {
                tracing::info!("the guest reset the machine");
                self.end_machine();
                if self.shared.has_ended() {
                    return Ok(Some(Ending::Asked));
                }
                let booted = self.boot();
                self.survive(booted)
            }
            Ok(ending) => {
                self.end_machine();
                Ok((!self.stays).then_some(ending))
            }
            Err(e) => {
                self.end_machine();
                self.survive(Err(e))
            }
        }
    }

    /// What ends the machine ends the VMM, unless that stays.
    fn survive(&self, result: Result<(), Error>) -> Result<Option<Ending>, Error> {
        match result {
            Err(e) if self.stays => {
                tracing::error!("the machine cannot go on: {e}");
                Ok(None)
            }
            result => result.map(|()| None),
        }
    }

    fn state(&self) -> Option<VmState> {
        self.shared.known().info.as_ref().map(|info| info.state)
    }

    fn set_state(&self, state: VmState) {
        if let Some(info) = &mut self.shared.known().info {
            info.state = state;
        }
    }

    /// The machine, if its guest is to run.
    fn running(&mut self) -> Option<&mut Machine<H>> {
        if self.state() != Some(VmState::Running) {
            return None;
        }
        self.tenant.as_mut()?.machine.as_mut()
    }

    fn starts_over(&self) -> bool {
        self.tenant
            .as_ref()
            .is_some_and(|tenant| !tenant.config.no_reboot)
    }

    fn may_create(&self) -> Result<(), Refusal> {
        match self.tenant {
            Some(_) => Err(Refusal::VmExists),
            None => Ok(()),
        }
    }

    fn create(&mut self, config: MachineConfig) {
        let config = with_addresses(config);
        self.shared.known().info = Some(VmInfo {
            config: config.clone(),
            state: VmState::Created,
            reason: None,
            mte: None,
            work: None,
        });
        self.tenant = Some(Tenant {
            config,
            overlays: Overlays::default(),
            machine: None,
            console: None,
        });
    }

    fn try_boot(&mut self) -> Result<(), Refusal> {
        match self.state().ok_or(Refusal::NoVm)? {
            VmState::Created | VmState::Shutdown => failed(self.boot()),
            state => Err(Refusal::State {
                wanted: "booted",
                state,
            }),
        }
    }

    /// Builds the machine of the configuration.
    fn boot(&mut self) -> Result<(), Error> {
        let hypervisor = self.hypervisor;
        let Some(tenant) = &mut self.tenant else {
            return Ok(());
        };
        let console = match &mut tenant.console {
            Some(console) => console,
            none => none.insert(Console::open(&tenant.config.console)?),
        };
        let config = tenant.overlays.named(&tenant.config)?;
        let machine = Machine::new(hypervisor, &config, console)?;
        self.move_in(machine, VmState::Running)
    }

    /// The machine is built: its guest runs from here on, if it is to.
    fn move_in(&mut self, mut machine: Machine<H>, state: VmState) -> Result<(), Error> {
        if state == VmState::Running && !self.shared.has_ended() {
            machine.resume()?;
        }
        let mut known = self.shared.known();
        known.machine = Some(machine.handle());
        if let Some(info) = &mut known.info {
            info.state = state;
            info.mte = machine.mte().map(|mte| mte.to_string());
        }
        drop(known);
        if let Some(tenant) = &mut self.tenant {
            tenant.machine = Some(machine);
        }
        Ok(())
    }

    /// Ends the machine, its disks flushed.
    fn end_machine(&mut self) {
        let fill = {
            let mut known = self.shared.known();
            known.machine = None;
            known.fill.take()
        };
        let machine = self
            .tenant
            .as_mut()
            .and_then(|tenant| tenant.machine.take());
        // Its vCPUs may wait in the kernel for what cannot be had, and its end would wait for them; the process' does not.
        if fill.is_some_and(|fill| matches!(fill.state(), lazy::State::Failed(_))) {
            mem::forget(machine);
        } else {
            drop(machine);
        }
        self.end_attendance();
        self.set_state(VmState::Shutdown);
    }

    fn pause(&mut self) -> Result<(), Refusal> {
        self.between.check()?;
        self.settle()?;
        let machine = self.machine_in(VmState::Running, "paused")?;
        machine.pause();
        self.set_state(VmState::Paused);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        self.between.check()?;
        let fill = self.fill();
        let machine = self.machine_in(VmState::Paused, "resumed")?;
        failed(machine.resume())?;
        if let Some(fill) = fill {
            fill.retry();
            machine.release();
        }
        self.waits_for_memory = false;
        if let Some(info) = &mut self.shared.known().info {
            info.state = VmState::Running;
            info.reason = None;
        }
        Ok(())
    }

    /// The machine, if it is in this state.
    fn machine_in(
        &mut self,
        needed: VmState,
        wanted: &'static str,
    ) -> Result<&mut Machine<H>, Refusal> {
        let state = self.state().ok_or(Refusal::NoVm)?;
        let machine = self
            .tenant
            .as_mut()
            .and_then(|tenant| tenant.machine.as_mut());
        match machine {
            Some(machine) if state == needed => Ok(machine),
            _ => Err(Refusal::State { wanted, state }),
        }
    }

    fn shutdown(&mut self) -> Result<(), Refusal> {
        match self.state().ok_or(Refusal::NoVm)? {
            VmState::Running | VmState::Paused => {
                self.settle()?;
                self.end_machine();
                Ok(())
            }
            state => Err(Refusal::State {
                wanted: "shut down",
                state,
            }),
        }
    }

    fn delete(&mut self) -> Result<(), Refusal> {
        self.state().ok_or(Refusal::NoVm)?;
        self.settle()?;
        self.end_machine();
        self.tenant = None;
        self.shared.known().info = None;
        Ok(())
    }

    fn snapshot(&mut self, request: &SnapshotRequest) -> Result<SnapshotReport, Refusal> {
        let shared = self.shared.clone();
        let state = self.state().ok_or(Refusal::NoVm)?;
        if !matches!(state, VmState::Running | VmState::Paused) {
            return Err(Refusal::State {
                wanted: "saved",
                state,
            });
        }
        self.between.check()?;
        self.settle()?;
        let config = match &self.tenant {
            // Whoever restores it may stand elsewhere.
            Some(tenant) => failed(tenant.config.clone().with_absolute_paths())?,
            None => return Err(Refusal::NoVm),
        };
        let machine = self.machine_in(state, "saved")?;
        let base = request.base.as_deref().map(open_base).transpose()?;
        let progress = Arc::new(Progress::default());
        let options = snapshot::Options {
            config: &config,
            base: base.as_ref(),
            compression: request.compression,
            progress: &progress,
        };
        shared.known().snapshot = Some(progress.clone());
        // Whoever ended the VMM just before did not see it.
        progress
            .cancelled
            .store(shared.has_ended(), Ordering::Relaxed);
        let written = machine.snapshot(&request.file, &options);
        shared.known().snapshot = None;
        let report = failed(written)?;
        Ok(SnapshotReport {
            identity: report.identity.to_string(),
            bytes: report.bytes,
            pages: report.pages,
            rounds: report.rounds,
            total_us: report.total.as_micros() as u64,
            blackout_us: report
                .blackout
                .map_or(0, |blackout| blackout.as_micros() as u64),
        })
    }

    /// Takes up a machine from a snapshot. If it cannot, there is no machine.
    fn restore(&mut self, restoration: Restoration) -> Result<(), RestoreError> {
        let Restoration {
            request,
            snapshot,
            saved,
        } = restoration;
        saved
            .check_host(self.hypervisor.capabilities())
            .and_then(|()| saved.check_disks())
            .map_err(|source| RestoreError::Snapshot {
                file: request.file.clone(),
                source,
            })?;
        self.create(saved.config.clone());
        let restored = self.move_in_restored(snapshot, &saved, &request);
        if restored.is_err() {
            self.tenant = None;
            self.shared.known().info = None;
        }
        restored.map_err(|source| RestoreError::Machine {
            file: request.file.clone(),
            source: Box::new(source),
        })
    }

    fn move_in_restored(
        &mut self,
        snapshot: Snapshot<File>,
        saved: &SavedMachine,
        request: &RestoreRequest,
    ) -> Result<(), Error> {
        let hypervisor = self.hypervisor;
        let life = self.life.clone();
        let Some(tenant) = &mut self.tenant else {
            return Ok(());
        };
        let console = tenant
            .console
            .insert(Console::open_again(&tenant.config.console)?);
        let mut fill = None;
        let fill_memory = |pages: &GuestPages| {
            if request.lazy {
                fill = Some(start_fill(pages, snapshot, life)?);
            } else {
                let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
                stream::restore(&snapshot, pages, threads)?;
            }
            Ok(())
        };
        let config = tenant.overlays.named(&tenant.config)?;
        let machine = Machine::restored(hypervisor, &config, &saved.state, console, fill_memory)?;
        machine.renew_generation()?;
        self.shared.known().fill = fill;
        self.move_in(machine, state_of(request.paused))
    }
}

impl<H: Hypervisor> Landlord<'_, H>
where
    <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
{
    fn clone_machine(&mut self, cloning: &Cloning) -> Result<(), Error> {
        let hypervisor = self.hypervisor;
        let saved = &cloning.saved;
        self.create(saved.config.clone());
        let Some(tenant) = &mut self.tenant else {
            return Ok(());
        };
        let console = Console::open_again(&tenant.config.console)?;
        let console = tenant.console.insert(console);
        let config = tenant.overlays.named(&tenant.config)?;
        let machine = Machine::cloned(hypervisor, &config, &saved.state, console, &cloning.base)?;
        machine.renew_generation()?;
        self.move_in(machine, state_of(cloning.paused))
    }
}

/// What a machine is in that goes on, or is to wait.
const fn state_of(paused: bool) -> VmState {
    if paused {
        VmState::Paused
    } else {
        VmState::Running
    }
}

impl<H: Hypervisor> Drop for Landlord<'_, H> {
    fn drop(&mut self) {
        self.life.close_door();
        self.end_machine();
    }
}

/// Begins to fill memory as it is touched.
fn start_fill(
    pages: &GuestPages,
    snapshot: Snapshot<File>,
    life: Life,
) -> Result<Arc<LazyFill>, Error> {
    let source = SnapshotPages::new(snapshot);
    let fill = LazyFill::start(
        pages.memory().clone(),
        source,
        Before::Untouched,
        Threads::DEFAULT,
        migration::on_event(life),
    )?;
    Ok(Arc::new(fill))
}

/// Why a VMM ended that was not asked to.
#[derive(Debug, thiserror::Error)]
pub enum LifeError {
    /// Its machine cannot be built, or cannot go on.
    #[error(transparent)]
    Machine(#[from] Error),
    /// Its machine could not be restored.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// Its guest did not come.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
}

/// Why a machine could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The file is none that a machine could be restored from.
    #[error("snapshot {file}: {source}")]
    Snapshot {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        source: snapshot::ReadError,
    },
    /// The machine cannot be here.
    #[error("restoring {file}: {source}")]
    Machine {
        /// From which file.
        file: PathBuf,
        /// What is wrong.
        source: Box<Error>,
    },
}

fn open_base(path: &Path) -> Result<Snapshot<File>, Refusal> {
    snapshot::open(path, &[]).map_err(|e| Refusal::Failed(format!("base {}: {e}", path.display())))
}

fn failed<T>(result: Result<T, impl ToString>) -> Result<T, Refusal> {
    result.map_err(|e| Refusal::Failed(e.to_string()))
}

/// The configuration with an address for each network interface, so that a reset does not change it.
fn with_addresses(mut config: MachineConfig) -> MachineConfig {
    for net in &mut config.net {
        net.mac.get_or_insert_with(MacAddr::random);
    }
    config
}
