//! A VMM that does nothing, writes down what it is asked, and answers as it is told.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};

use mte::TagPage;
use stream::{Metadata, Page, PageSource};
use transport::Address;
use vmm::config::MachineConfig;

use crate::control::{
    DebugRequest, Decision, InspectRequest, MigrationReport, MigrationRequest, ReceptionRequest,
    Refusal, RestoreRequest, SnapshotReport, SnapshotRequest, VmInfo, VmState, Vmm,
};
use crate::inspection::Lease;

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Create(Box<MachineConfig>),
    Boot,
    Pause,
    Resume,
    Shutdown,
    Reboot,
    Delete,
    Snapshot(SnapshotRequest),
    Restore(RestoreRequest),
    Migrate(MigrationRequest),
    CancelMigration,
    DecideMigration(Decision),
    Receive(ReceptionRequest),
    Debug(DebugRequest),
    Inspect(InspectRequest),
    ShutDownVmm,
}

/// The VMM.
#[derive(Default)]
pub struct Double {
    calls: Mutex<Vec<Call>>,
    info: Mutex<Option<VmInfo>>,
    refusal: Mutex<Option<Refusal>>,
    held: Mutex<bool>,
    released: Condvar,
}

/// A machine that runs.
pub fn running() -> VmInfo {
    VmInfo {
        config: MachineConfig {
            name: Some("web".into()),
            kernel: Some("/boot/Image".into()),
            cpus: 2,
            ..MachineConfig::default()
        },
        state: VmState::Running,
        reason: None,
        mte: Some("MTE3".into()),
        work: None,
    }
}

impl Double {
    /// Has a machine that runs.
    pub fn running() -> Arc<Self> {
        let double = Arc::<Self>::default();
        double.set_info(Some(running()));
        double
    }

    /// Has this machine from now on.
    pub fn set_info(&self, info: Option<VmInfo>) {
        *self.info.lock().unwrap() = info;
    }

    /// Refuses everything from now on.
    pub fn refuse(&self, refusal: Refusal) {
        *self.refusal.lock().unwrap() = Some(refusal);
    }

    /// Makes snapshots and migrations take until they are released.
    pub fn hold(&self) {
        *self.held.lock().unwrap() = true;
    }

    /// Lets them go on.
    pub fn release(&self) {
        *self.held.lock().unwrap() = false;
        self.released.notify_all();
    }

    /// What it was asked.
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    fn wait(&self) {
        let held = self.held.lock().unwrap();
        drop(self.released.wait_while(held, |held| *held).unwrap());
    }

    fn asked(&self, call: Call) -> Result<(), Refusal> {
        self.calls.lock().unwrap().push(call);
        self.refusal.lock().unwrap().clone().map_or(Ok(()), Err)
    }
}

impl Vmm for Double {
    fn info(&self) -> Result<VmInfo, Refusal> {
        self.info.lock().unwrap().clone().ok_or(Refusal::NoVm)
    }

    fn create(&self, config: MachineConfig) -> Result<(), Refusal> {
        self.asked(Call::Create(Box::new(config)))
    }

    fn boot(&self) -> Result<(), Refusal> {
        self.asked(Call::Boot)
    }

    fn pause(&self) -> Result<(), Refusal> {
        self.asked(Call::Pause)
    }

    fn resume(&self) -> Result<(), Refusal> {
        self.asked(Call::Resume)
    }

    fn shutdown(&self) -> Result<(), Refusal> {
        self.asked(Call::Shutdown)
    }

    fn reboot(&self) -> Result<(), Refusal> {
        self.asked(Call::Reboot)
    }

    fn delete(&self) -> Result<(), Refusal> {
        self.asked(Call::Delete)
    }

    fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotReport, Refusal> {
        self.asked(Call::Snapshot(request))?;
        self.wait();
        Ok(report())
    }

    fn restore(&self, request: RestoreRequest) -> Result<(), Refusal> {
        self.asked(Call::Restore(request))
    }

    fn migrate(&self, request: MigrationRequest) -> Result<MigrationReport, Refusal> {
        self.asked(Call::Migrate(request))?;
        self.wait();
        Ok(migration_report())
    }

    fn cancel_migration(&self) -> Result<(), Refusal> {
        self.asked(Call::CancelMigration)
    }

    fn decide_migration(&self, decision: Decision) -> Result<(), Refusal> {
        self.asked(Call::DecideMigration(decision))
    }

    fn receive(&self, request: ReceptionRequest) -> Result<(), Refusal> {
        self.asked(Call::Receive(request))
    }

    fn debug(&self, request: DebugRequest) -> Result<Option<Address>, Refusal> {
        let listen = request.listen.clone();
        self.asked(Call::Debug(request))?;
        Ok(listen)
    }

    fn inspect(&self, request: InspectRequest) -> Result<Lease, Refusal> {
        self.asked(Call::Inspect(request))?;
        Ok(Lease {
            ram: 0x40000..0x40000 + 16,
            vcpus: Vec::new(),
            pages: Box::new(NoPages),
            file: None,
            hold: None,
        })
    }

    fn shut_down_vmm(&self) {
        let _ = self.asked(Call::ShutDownVmm);
    }
}

/// Memory that was never populated.
struct NoPages;

impl PageSource for NoPages {
    fn metadata(&self) -> Metadata {
        Metadata::ArmMte
    }

    fn next_run(&self, _: u64) -> io::Result<Option<Range<u64>>> {
        Ok(None)
    }

    fn read(&self, _: u64, _: &mut [Page], _: &mut [TagPage]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// What every snapshot becomes.
pub fn report() -> SnapshotReport {
    SnapshotReport {
        identity: "00ff-01".into(),
        bytes: 1 << 20,
        pages: 300,
        rounds: 3,
        total_us: 41_000,
        blackout_us: 900,
    }
}

/// What every migration comes to.
pub fn migration_report() -> MigrationReport {
    MigrationReport {
        rounds: 3,
        pages: 27_511,
        ended: false,
        fetched: 512,
        bytes: 46 << 20,
        tag_bytes: 1 << 20,
        downtime_us: 132_000,
        total_us: 12_420_000,
        slowed: 20,
    }
}
