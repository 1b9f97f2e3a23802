//! What can be asked of a VMM from outside, whoever asks: the control socket, a signal, a test.
//!
//! A VMM has at most one machine. It is created from a configuration or restored from a snapshot, boots, pauses and
//! goes on, and is shut down; then it can boot again, or be deleted (the life of a VM in Cloud Hypervisor's API v1).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use stream::Compression;
use vmm::config::MachineConfig;

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
    /// Tagvisor cannot do this, or not to this machine.
    #[error("{0}")]
    Unsupported(String),
    /// It was tried, and failed.
    #[error("{0}")]
    Failed(String),
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

    /// Ends the machine, if there is one, and then the VMM.
    fn shut_down_vmm(&self);
}
