//! What can be asked of a VMM from outside, whoever asks: the control socket, a signal, a test.
//!
//! A VMM has at most one machine. It is created from a configuration or restored from a snapshot, boots, pauses and
//! goes on, and is shut down; then it can boot again, or be deleted (the life of a VM in Cloud Hypervisor's API v1).

use std::num::NonZeroU8;
use std::path::PathBuf;
use std::time::Duration;

use migration::PostCopy;
use serde::{Deserialize, Serialize};
use stream::Compression;
use transport::{Address, Rate};
use vmm::config::MachineConfig;
use vmm::console::ConsoleConfig;

use crate::inspection::Lease;

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// It has a configuration and does not exist yet.
    Created,
    /// Its guest runs.
    Running,
    /// It ended; its configuration is there.
    Shutdown,
    /// Its guest stands still.
    Paused,
}

/// A machine as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmInfo {
    /// Its configuration, with addresses and the like as they were chosen.
    pub config: MachineConfig,
    /// Where it is in its life.
    pub state: VmState,
    /// Why the VMM paused it, if nobody asked for that.
    pub reason: Option<String>,
    /// The MTE that the guest sees, in words.
    pub mte: Option<String>,
    /// What the VMM is doing with the machine besides running it.
    pub work: Option<Work>,
}

/// Long work on a machine, on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Such as `snapshot`.
    pub what: String,
    /// Pages done.
    pub pages_done: u64,
    /// Pages to do, as far as is known by now.
    pub pages_total: u64,
    /// Bytes written or read.
    pub bytes: u64,
    /// What only a migration has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationWork>,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationWork {
    /// Which time memory is gone through, from 1 on.
    pub round: u32,
    /// Bytes of tags among those sent.
    pub tag_bytes: u64,
    /// Pages that can be sent in a second.
    pub pages_per_second: u64,
    /// Pages that the guest changes in a second.
    pub changes_per_second: u64,
    /// Microseconds for which the guest would stand still if it were stopped now.
    pub expected_downtime_us: u64,
    /// For how much of the time the guest is kept from running, in percent.
    pub slowed: u8,
    /// The guest runs at the destination and fetches pages from here.
    pub post_copy: bool,
}

/// What a snapshot is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// The file; an absolute path.
    pub file: PathBuf,
    /// Write what changed since this snapshot, and no more.
    pub base: Option<PathBuf>,
    /// What is made of data.
    pub compression: Compression,
}

/// What a snapshot became.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// The snapshot's identity: what a delta on it names as its base.
    pub identity: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Pages written, each as often as it was.
    pub pages: u64,
    /// How often memory was gone through, the last time while the guest stood still.
    pub rounds: u32,
    /// Microseconds from the first page to the synced file.
    pub total_us: u64,
    /// Microseconds for which the guest stood still, 0 if it was paused before.
    pub blackout_us: u64,
}

/// From what a machine is to be restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreRequest {
    /// The file; an absolute path.
    pub file: PathBuf,
    /// The snapshots that it is based on, where they are not where they were.
    pub bases: Vec<PathBuf>,
    /// Let the guest run at once, and bring each page when it is touched.
    pub lazy: bool,
    /// Let the guest stand still until it is resumed.
    pub paused: bool,
}

/// Where a guest is to go, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationRequest {
    /// Where it is received.
    pub destination: Address,
    /// The files of TLS, if there is to be any.
    pub tls: Option<TlsRequest>,
    /// Connections for pages, 1 to 64.
    pub connections: NonZeroU8,
    /// Whether the guest goes on before all its pages are there.
    pub post_copy: PostCopy,
    /// Whether it may be slowed down if it changes pages faster than they can be sent.
    pub may_slow: bool,
    /// How long it may stand still.
    pub max_downtime: Duration,
    /// How much may be sent in a second.
    pub bandwidth: Option<Rate>,
    /// What is made of data.
    pub compression: Compression,
    /// After how long it is given up, unless the guest has been handed over.
    pub timeout: Option<Duration>,
    /// Mend the link of a migration that was broken off after the hand-over, rather than beginning one.
    pub recover: bool,
}

/// How the two sides of a migration prove themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsRequest {
    /// A directory with certificates, keys and authorities (docs/tls.md).
    pub directory: PathBuf,
    /// The name that the other side's certificate must have.
    pub peer_name: Option<String>,
}

/// From where a guest is to come, and what is different here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceptionRequest {
    /// Where it is waited for.
    pub listen: Address,
    /// The files of TLS, if there is to be any.
    pub tls: Option<TlsRequest>,
    /// Whether other hosts may come without TLS.
    pub unprotected: bool,
    /// What is different from the machine that is offered.
    pub changes: Changes,
}

/// What of a machine is another at the host that it comes to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Its name.
    pub name: Option<String>,
    /// Its console.
    pub console: Option<ConsoleConfig>,
    /// The tap of each network interface, in order; none if they are called the same.
    pub taps: Vec<String>,
    /// The path of each disk's image, in order; none if they are called the same.
    pub disks: Vec<PathBuf>,
    /// The socket of each port, in order; none if they are called the same.
    pub ports: Vec<PathBuf>,
}

/// Where a debugger can come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DebugRequest {
    /// Where; nowhere if there is none, and whoever is there has to go.
    pub listen: Option<Address>,
    /// Whether it may be where other hosts can come.
    pub unprotected: bool,
}

/// What a migration came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationReport {
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
    /// Microseconds from the guest's last instruction here until the destination said that it runs.
    pub downtime_us: u64,
    /// Microseconds from the beginning until nothing was left here.
    pub total_us: u64,
    /// How much the guest was slowed down at last, in percent.
    pub slowed: u8,
}

/// How a machine is to be looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InspectRequest {
    /// Its guest goes on meanwhile.
    pub live: bool,
    /// Who looks, for others to read.
    pub reader: Option<String>,
}

/// Where a guest is to run of which it is not known where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// Here: it does not run at the other side, and never will.
    Here,
    /// At the other side, or nowhere: it is not needed here.
    Elsewhere,
}

/// Why something that was asked for was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no machine.
    #[error("there is no VM: create or restore one first")]
    NoVm,
    /// There is one.
    #[error("there is a VM already: delete it first")]
    VmExists,
    /// The machine is not in a state for it.
    #[error("the VM is {}: it cannot be {wanted} now", state_in_words(*.state))]
    State {
        /// What was asked for, as a participle.
        wanted: &'static str,
        /// Where the machine is.
        state: VmState,
    },
    /// A debugger has the machine.
    #[error(
        "a debugger has the VM ({0}): let it detach, or send it away with `tagvisor gdb NAME --off`"
    )]
    Debugged(String),
    /// Tagvisor cannot do this, or not to this machine.
    #[error("{0}")]
    Unsupported(String),
    /// It was tried, and failed.
    #[error("{0}")]
    Failed(String),
    /// The guest was handed over: it is not known where it runs, or pages of it are at both sides.
    #[error("{0}")]
    Unsettled(String),
}

const fn state_in_words(state: VmState) -> &'static str {
    match state {
        VmState::Created => "not booted",
        VmState::Running => "running",
        VmState::Shutdown => "shut down",
        VmState::Paused => "paused",
    }
}

/// A VMM that can be asked. Any thread may; calls are carried out one after the other, but `info`, which answers at once.
pub trait Vmm: Send + Sync + 'static {
    /// The machine as it is.
    ///
    /// # Errors
    /// [`Refusal::NoVm`].
    fn info(&self) -> Result<VmInfo, Refusal>;

    /// Gives the VMM a machine, which does not exist before it is booted.
    ///
    /// # Errors
    /// [`Refusal::VmExists`].
    fn create(&self, config: MachineConfig) -> Result<(), Refusal>;

    /// Builds the machine and lets its guest run.
    ///
    /// # Errors
    /// [`Refusal::State`] if it runs; [`Refusal::Failed`] if it cannot be built.
    fn boot(&self) -> Result<(), Refusal>;

    /// Stops the guest where it is.
    ///
    /// # Errors
    /// [`Refusal::State`] if it does not run.
    fn pause(&self) -> Result<(), Refusal>;

    /// Lets a paused guest go on.
    ///
    /// # Errors
    /// [`Refusal::State`] if it is not paused.
    fn resume(&self) -> Result<(), Refusal>;

    /// Ends the machine, as pulling its plug does, with its disks flushed. The configuration stays.
    ///
    /// # Errors
    /// [`Refusal::State`] if there is none to end.
    fn shutdown(&self) -> Result<(), Refusal>;

    /// Ends the machine and boots it again.
    ///
    /// # Errors
    /// Those of [`Self::shutdown`] and [`Self::boot`].
    fn reboot(&self) -> Result<(), Refusal>;

    /// Forgets the machine, which is ended before.
    ///
    /// # Errors
    /// [`Refusal::NoVm`].
    fn delete(&self) -> Result<(), Refusal>;

    /// Writes a snapshot.
    ///
    /// # Errors
    /// [`Refusal::State`] if it neither runs nor is paused; [`Refusal::Failed`]. The guest goes on then as before.
    fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotReport, Refusal>;

    /// Takes up a machine from a snapshot.
    ///
    /// # Errors
    /// [`Refusal::VmExists`]; [`Refusal::Failed`]. There is no machine then.
    fn restore(&self, request: RestoreRequest) -> Result<(), Refusal>;

    /// Sends the guest to another host. Comes back when it is there, all of it, or stays.
    ///
    /// # Errors
    /// [`Refusal::State`] if it neither runs nor is paused; [`Refusal::Failed`] if the guest stays; [`Refusal::Unsettled`] says where it
    /// may be, and what to do.
    fn migrate(&self, request: MigrationRequest) -> Result<MigrationReport, Refusal>;

    /// Gives up the migration that is on its way. What became of it tells whoever asked for it.
    ///
    /// # Errors
    /// [`Refusal::Failed`] if there is none, or the guest has been handed over.
    fn cancel_migration(&self) -> Result<(), Refusal>;

    /// Decides where a guest runs whose migration was broken off when that was not known.
    ///
    /// # Errors
    /// [`Refusal::Failed`] if there is nothing to decide, or it cannot be decided so.
    fn decide_migration(&self, decision: Decision) -> Result<(), Refusal>;

    /// Waits for a guest of another host. Comes back when it is here.
    ///
    /// # Errors
    /// [`Refusal::VmExists`]; [`Refusal::Failed`]. There is no machine then.
    fn receive(&self, request: ReceptionRequest) -> Result<(), Refusal>;

    /// Lets debuggers come at an address, in place of the one before, and returns it as it is; or lets none come any more.
    /// While one is there it has the machine: it stands when the debugger comes, and goes on when it is gone.
    ///
    /// # Errors
    /// [`Refusal::NoVm`]; [`Refusal::Failed`] if nobody can come there.
    fn debug(&self, request: DebugRequest) -> Result<Option<Address>, Refusal>;

    /// Lends the machine's memory, with its vCPUs' registers, to somebody who looks at it. Unless it is to be looked at live,
    /// the guest stands still until the lease is dropped, and whatever else is asked waits for that, but for the VMM's end.
    ///
    /// # Errors
    /// [`Refusal::State`] if it neither runs nor is paused; [`Refusal::Failed`]. The guest goes on then as before.
    fn inspect(&self, request: InspectRequest) -> Result<Lease, Refusal>;

    /// Ends the machine, if there is one, and then the VMM.
    fn shut_down_vmm(&self);
}
