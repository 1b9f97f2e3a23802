//! A machine's life on a hypervisor whose guests say one word and end.

mod debug;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use engine::{
    Capabilities, Exit, GicLayout, Interrupter, Memslot, Ppi, RegisterId, RegisterList, Spi,
    SystemEvent, TagCopyResult, Vcpu, VcpuFeatures,
};
use stream::{Chunk, Compression, Encoder, Header, State, StreamReader, StreamWriter};
use tempfile::TempDir;
use vmm::config::{MemorySize, MteConfig};
use vmm::console::ConsoleConfig;
use vmm::layout;

use super::*;

/// When in a machine's life the wish to end comes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    Never,
    Building,
    TakingDown,
}

/// A hypervisor that counts. Its first `resets` guests reset their machines, the next switches its off.
struct Scripted {
    capabilities: Capabilities,
    story: Arc<Story>,
}

struct Story {
    /// Its guests never end.
    endless: bool,
    resets: usize,
    asked_while: Moment,
    vmm: Life,
    vms: AtomicUsize,
    runs: AtomicUsize,
}

impl Story {
    fn reach(&self, moment: Moment) {
        if self.asked_while == moment {
            self.vmm.shut_down_vmm();
        }
    }
}

struct ScriptedVm(Arc<Story>);

struct ScriptedVcpu {
    story: Arc<Story>,
    has_spoken: bool,
}

#[derive(Clone)]
struct NoInterrupter;

impl Interrupter for NoInterrupter {
    fn interrupt(&self) {}
}

impl Hypervisor for Scripted {
    type VmBuilder = ScriptedVm;
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }
    fn new_vm(&self, _: u8) -> engine::Result<ScriptedVm> {
        self.story.vms.fetch_add(1, Ordering::SeqCst);
        Ok(ScriptedVm(self.story.clone()))
    }
}

impl VmBuilder for ScriptedVm {
    type Vm = Self;
    fn enable_mte(&mut self) -> engine::Result<()> {
        Ok(())
    }
    fn build(self) -> engine::Result<Self> {
        Ok(self)
    }
}

impl Vm for ScriptedVm {
    type Vcpu = ScriptedVcpu;
    fn has_mte(&self) -> bool {
        false
    }
    unsafe fn set_memslot(&self, _: &Memslot) -> engine::Result<()> {
        Ok(())
    }
    fn delete_memslot(&self, _: u32) -> engine::Result<()> {
        self.0.reach(Moment::TakingDown);
        Ok(())
    }
    fn create_vcpu(&self, _: u32, _: VcpuFeatures) -> engine::Result<ScriptedVcpu> {
        Ok(ScriptedVcpu {
            story: self.0.clone(),
            has_spoken: false,
        })
    }
    fn create_gic(&self, _: &GicLayout) -> engine::Result<()> {
        self.0.reach(Moment::Building);
        Ok(())
    }
    fn gic_state(&self) -> engine::Result<engine::GicState> {
        Ok(engine::GicState::default())
    }
    fn restore_gic(&self, _: &engine::GicState) -> engine::Result<()> {
        Ok(())
    }
    fn set_spi(&self, _: Spi, _: bool) -> engine::Result<()> {
        Ok(())
    }
    fn copy_tags_from_guest(&self, _: u64, _: &mut [u8]) -> TagCopyResult {
        Ok(0)
    }
    fn copy_tags_to_guest(&self, _: u64, _: &[u8]) -> TagCopyResult {
        Ok(0)
    }
    fn take_dirty_log(&self, _: u32) -> engine::Result<Vec<u64>> {
        Ok(Vec::new())
    }
}

impl Vcpu for ScriptedVcpu {
    type Interrupter = NoInterrupter;
    fn run(&mut self) -> engine::Result<Exit<'_>> {
        self.story.runs.fetch_add(1, Ordering::SeqCst);
        if self.story.endless {
            thread::sleep(Duration::from_millis(1));
            return Ok(Exit::Interrupted);
        }
        if !std::mem::replace(&mut self.has_spoken, true) {
            return Ok(Exit::MmioWrite {
                ipa: layout::SERIAL,
                data: b"x",
            });
        }
        Ok(Exit::System(
            if self.story.vms.load(Ordering::SeqCst) <= self.story.resets {
                SystemEvent::Reset
            } else {
                SystemEvent::Off
            },
        ))
    }
    fn interrupter(&self) -> NoInterrupter {
        NoInterrupter
    }
    fn init_pmu(&self, _: Ppi) -> engine::Result<()> {
        Ok(())
    }
    fn power_state(&self) -> engine::Result<engine::PowerState> {
        Ok(engine::PowerState::On)
    }
    fn set_power_state(&self, _: engine::PowerState) -> engine::Result<()> {
        Ok(())
    }
    fn pending_serror(&self) -> engine::Result<engine::PendingSError> {
        Ok(engine::PendingSError::default())
    }
    fn set_pending_serror(&self, _: engine::PendingSError) -> engine::Result<()> {
        Ok(())
    }
    fn set_debug(&self, _: &engine::GuestDebug) -> engine::Result<()> {
        Ok(())
    }
    fn registers(&self) -> engine::Result<RegisterList> {
        Ok(Vec::new())
    }
    fn register(&self, _: RegisterId, value: &mut [u8]) -> engine::Result<()> {
        value.fill(0);
        Ok(())
    }
    fn set_register(&self, _: RegisterId, _: &[u8]) -> engine::Result<()> {
        Ok(())
    }
}

/// What a test looks at.
struct Trial {
    hypervisor: Scripted,
    orders: Mutex<Option<Orders>>,
    config: MachineConfig,
    console: PathBuf,
    folder: TempDir,
}

fn life(resets: usize, asked_while: Moment) -> Trial {
    trial(resets, asked_while, false)
}

fn trial(resets: usize, asked_while: Moment, endless: bool) -> Trial {
    let folder = tempfile::tempdir().unwrap();
    let payload = folder.path().join("payload");
    fs::write(&payload, [0; 4]).unwrap();
    let console = folder.path().join("console");
    let config = MachineConfig {
        flat: Some(payload),
        memory: MemorySize(16 << 20),
        mte: MteConfig::Off,
        console: ConsoleConfig::File(console.clone()),
        ..MachineConfig::default()
    };
    let (vmm, orders) = Life::new();
    let story = Story {
        endless,
        resets,
        asked_while,
        vmm,
        vms: AtomicUsize::new(0),
        runs: AtomicUsize::new(0),
    };
    let capabilities = Capabilities {
        ipa_bits: 40,
        max_vcpus: 1,
        max_memslots: 32,
        mte: None,
        sve: false,
        pointer_authentication: false,
        pmu: false,
        aarch32_el1: false,
        gic_v3: true,
        counter_hz: 62_500_000,
    };
    Trial {
        orders: Mutex::new(Some(orders)),
        hypervisor: Scripted {
            capabilities,
            story: Arc::new(story),
        },
        config,
        console,
        folder,
    }
}

/// Ends a VMM when it is dropped, so that a test that fails ends, too.
struct Ended<'a>(&'a Life);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.shut_down_vmm();
    }
}

impl Trial {
    fn run(&self) -> Ending {
        self.begin(Beginning::Boot(self.config.clone()))
    }

    fn begin(&self, beginning: Beginning) -> Ending {
        let orders = self.orders.lock().unwrap().take().unwrap();
        match orders.carry_out(&self.hypervisor, beginning).unwrap() {
            End::Machine(ending) => ending,
            End::Moved => panic!("the guest has moved"),
        }
    }

    /// Runs a VMM and does `what` with it meanwhile, then ends it.
    fn meanwhile<T>(&self, beginning: Beginning, what: impl FnOnce(&dyn Vmm) -> T) -> T {
        let vmm = &self.hypervisor.story.vmm;
        thread::scope(|scope| {
            let running = scope.spawn(|| self.begin(beginning));
            let end = Ended(vmm);
            let done = what(vmm);
            drop(end);
            assert_eq!(running.join().unwrap(), Ending::Asked);
            done
        })
    }

    fn boot(&self) -> Beginning {
        Beginning::Boot(self.config.clone())
    }

    fn snapshot_request(&self, name: &str) -> SnapshotRequest {
        SnapshotRequest {
            file: self.folder.path().join(name),
            base: None,
            compression: Compression::None,
        }
    }

    fn restore_request(&self, name: &str) -> RestoreRequest {
        RestoreRequest {
            file: self.folder.path().join(name),
            bases: Vec::new(),
            lazy: false,
            paused: false,
        }
    }

    fn vms(&self) -> usize {
        self.hypervisor.story.vms.load(Ordering::SeqCst)
    }

    fn runs(&self) -> usize {
        self.hypervisor.story.runs.load(Ordering::SeqCst)
    }
}

#[test]
fn a_guest_that_resets_its_machine_starts_over_on_the_same_console() {
    let life = life(2, Moment::Never);

    assert_eq!(life.run(), Ending::Off);
    assert_eq!(life.vms(), 3);
    assert_eq!(fs::read(&life.console).unwrap(), b"xxx");
}

#[test]
fn without_reboot_a_reset_is_the_end() {
    let mut life = life(2, Moment::Never);
    life.config.no_reboot = true;

    assert_eq!(life.run(), Ending::Reset);
    assert_eq!(life.vms(), 1);
}

#[test]
fn a_wish_to_end_that_comes_first_builds_no_machine() {
    let life = life(0, Moment::Never);
    life.hypervisor.story.vmm.shut_down_vmm();

    assert_eq!(life.run(), Ending::Asked);
    assert_eq!(life.vms(), 0);
}

#[test]
fn a_wish_to_end_that_comes_while_a_machine_is_built_ends_it() {
    let life = life(0, Moment::Building);

    assert_eq!(life.run(), Ending::Asked);
    assert_eq!(life.vms(), 1);
}

#[test]
fn a_machine_that_was_stopped_before_it_runs_executes_nothing() {
    let life = life(0, Moment::Never);
    let mut console = Console::open(&life.config.console).unwrap();
    let mut machine = Machine::new(&life.hypervisor, &life.config, &mut console).unwrap();

    machine.handle().quit();
    let ending = machine.run().unwrap();
    thread::sleep(Duration::from_millis(50));

    assert_eq!((ending, life.runs()), (Ending::Asked, 0));
}

#[test]
fn a_wish_to_end_that_comes_during_a_reset_builds_no_further_machine() {
    let life = life(1, Moment::TakingDown);

    assert_eq!(life.run(), Ending::Asked);
    assert_eq!(life.vms(), 1);
}

/// A guest that never ends.
fn endless() -> Trial {
    trial(0, Moment::Never, true)
}

#[test]
fn a_paused_guest_stands_still_until_it_is_resumed() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        vmm.pause().unwrap();
        let before = life.runs();
        thread::sleep(Duration::from_millis(20));
        assert_eq!(life.runs(), before);
        assert_eq!(vmm.info().unwrap().state, VmState::Paused);

        vmm.resume().unwrap();
        while life.runs() == before {
            thread::yield_now();
        }
        assert_eq!(vmm.info().unwrap().state, VmState::Running);
    });
}

#[test]
fn an_order_that_comes_at_the_wrong_time_is_refused_with_what_the_machine_is() {
    let life = endless();
    life.meanwhile(Beginning::Empty, |vmm| {
        assert_eq!(vmm.info(), Err(Refusal::NoVm));
        assert_eq!(vmm.boot(), Err(Refusal::NoVm));
        assert_eq!(vmm.delete(), Err(Refusal::NoVm));
        vmm.create(life.config.clone()).unwrap();
        assert_eq!(vmm.create(life.config.clone()), Err(Refusal::VmExists));
        let refusal = vmm.pause().unwrap_err().to_string();
        assert_eq!(refusal, "the VM is not booted: it cannot be paused now");
        vmm.boot().unwrap();
        let refusal = vmm.resume().unwrap_err().to_string();
        assert_eq!(refusal, "the VM is running: it cannot be resumed now");
        vmm.shutdown().unwrap();
        let refusal = vmm.snapshot(life.snapshot_request("file")).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "the VM is shut down: it cannot be saved now"
        );
    });
}

#[test]
fn a_machine_that_was_shut_down_boots_again_and_one_that_was_deleted_makes_room() {
    let life = endless();
    life.meanwhile(Beginning::Empty, |vmm| {
        vmm.create(life.config.clone()).unwrap();
        vmm.boot().unwrap();
        vmm.shutdown().unwrap();
        vmm.boot().unwrap();
        vmm.reboot().unwrap();
        vmm.delete().unwrap();
        vmm.create(life.config.clone()).unwrap();
        vmm.boot().unwrap();
    });
    assert_eq!(life.vms(), 4);
}

#[test]
fn a_vmm_that_stays_outlives_its_guest() {
    let life = life(0, Moment::Never);
    life.meanwhile(Beginning::Empty, |vmm| {
        vmm.create(life.config.clone()).unwrap();
        vmm.boot().unwrap();
        while vmm.info().unwrap().state != VmState::Shutdown {
            thread::yield_now();
        }
    });
}

#[test]
fn a_machine_is_saved_while_it_runs_and_taken_up_by_another() {
    let life = endless();
    let report = life.meanwhile(life.boot(), |vmm| {
        let report = vmm.snapshot(life.snapshot_request("file")).unwrap();
        assert_eq!(vmm.info().unwrap().state, VmState::Running);
        report
    });
    assert!(report.pages > 0);
    assert!(report.blackout_us > 0);

    let other = endless();
    let request = RestoreRequest {
        paused: true,
        ..life.restore_request("file")
    };
    other.meanwhile(Beginning::Empty, |vmm| {
        vmm.restore(request).unwrap();
        assert_eq!(
            (vmm.info().unwrap().state, other.runs()),
            (VmState::Paused, 0)
        );
        vmm.resume().unwrap();
        let again = vmm.snapshot(life.snapshot_request("again")).unwrap();
        assert_eq!(again.pages, report.pages);
    });
}

#[test]
fn a_snapshot_on_a_base_has_what_changed_and_is_restored_with_it() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        vmm.snapshot(life.snapshot_request("whole")).unwrap();
        let delta = SnapshotRequest {
            base: Some(life.folder.path().join("whole")),
            ..life.snapshot_request("delta")
        };
        assert_eq!(vmm.snapshot(delta).unwrap().pages, 0);
    });

    endless().meanwhile(Beginning::Empty, |vmm| {
        vmm.restore(life.restore_request("delta")).unwrap();
    });
    fs::remove_file(life.folder.path().join("whole")).unwrap();
    endless().meanwhile(Beginning::Empty, |vmm| {
        let refusal = vmm.restore(life.restore_request("delta")).unwrap_err();
        assert!(
            refusal.to_string().contains("give that one as its base"),
            "{refusal}"
        );
        assert_eq!(vmm.info(), Err(Refusal::NoVm));
    });
}

#[test]
fn a_snapshot_takes_the_place_of_an_older_one_and_of_nothing_else() {
    let life = endless();
    fs::write(life.folder.path().join("file"), "old").unwrap();
    fs::create_dir(life.folder.path().join("folder")).unwrap();
    life.meanwhile(life.boot(), |vmm| {
        vmm.snapshot(life.snapshot_request("file")).unwrap();
        let refusal = vmm.snapshot(life.snapshot_request("folder")).unwrap_err();
        assert!(refusal.to_string().contains("no regular file"), "{refusal}");
        let refusal = vmm
            .snapshot(life.snapshot_request("nowhere/file"))
            .unwrap_err();
        assert!(
            refusal
                .to_string()
                .contains("cannot create a file beside it"),
            "{refusal}"
        );
        assert_eq!(vmm.info().unwrap().state, VmState::Running);
    });
    let mut left: Vec<_> = fs::read_dir(life.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["console", "file", "folder", "payload"]);
}

/// Writes the states of the snapshot `file`, each as `change` makes it or not at all, to the file `changed`, with right checks.
fn rewrite(life: &Trial, change: impl Fn(&str, u32, &str) -> Option<(u32, String)>) {
    let whole = snapshot::open(&life.folder.path().join("file"), &[]).unwrap();
    let header = Header::of_file(whole.metadata(), None).unwrap();
    let mut encoder = Encoder::new(&header, Compression::None).unwrap();
    let file = fs::File::create(life.folder.path().join("changed")).unwrap();
    let mut writer = StreamWriter::new(file, header).unwrap();
    let mut chunk = Chunk::new();
    whole
        .states(|state| {
            let text = std::str::from_utf8(&state.data).unwrap();
            if let Some((version, data)) = change(state.name, state.version, text) {
                let state = State {
                    name: state.name,
                    version,
                    data: data.into_bytes().into(),
                };
                encoder.state(&state, &mut chunk)?;
                writer.write(&chunk)?;
            }
            Ok(())
        })
        .unwrap();
    writer.finish().unwrap();
}

/// Why a machine is not restored whose saved states were changed.
fn refused_after(change: impl Fn(&str, u32, &str) -> Option<(u32, String)>) -> String {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        vmm.snapshot(life.snapshot_request("file")).unwrap();
    });
    rewrite(&life, change);
    let other = endless();
    let refusal = other.meanwhile(Beginning::Empty, |vmm| {
        let refusal = vmm.restore(life.restore_request("changed")).unwrap_err();
        assert_eq!(vmm.info(), Err(Refusal::NoVm));
        refusal
    });
    assert_eq!((other.vms(), other.runs()), (0, 0));
    refusal.to_string()
}

/// What changes the data of the state `wanted` and leaves the others as they are.
fn changing(
    wanted: &str,
    change: impl Fn(&str) -> String,
) -> impl Fn(&str, u32, &str) -> Option<(u32, String)> {
    move |name, version, data| {
        let data = if name == wanted {
            change(data)
        } else {
            data.into()
        };
        Some((version, data))
    }
}

#[test]
fn a_machine_of_another_architecture_is_refused_by_its_name() {
    let refusal = refused_after(changing("platform", |data| {
        data.replace("aarch64", "riscv64")
    }));
    assert!(
        refusal
            .ends_with("it is of a machine with architecture riscv64, this Tagvisor has aarch64"),
        "{refusal}"
    );
}

#[test]
fn a_saved_state_of_another_version_is_refused_by_its_number() {
    let refusal = refused_after(|name, version, data| {
        Some((version + u32::from(name == "machine"), data.into()))
    });
    assert!(
        refusal.ends_with("`machine` has version 3, this Tagvisor reads versions 1 to 2"),
        "{refusal}"
    );
}

#[test]
fn a_saved_state_that_is_missing_is_named() {
    let refusal =
        refused_after(|name, version, data| (name != "disks").then(|| (version, data.into())));
    assert!(
        refusal.ends_with("it has no saved state `disks`: it is no snapshot of a machine"),
        "{refusal}"
    );
}

#[test]
fn a_saved_state_that_says_nothing_is_refused() {
    let refusal = refused_after(changing("machine", |data| data[..data.len() / 2].into()));
    assert!(
        refusal.contains("its saved state `machine` is wrong: EOF while parsing"),
        "{refusal}"
    );
}

#[test]
fn a_saved_machine_with_other_parts_than_its_configuration_names_is_refused() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        vmm.snapshot(life.snapshot_request("file")).unwrap();
    });
    rewrite(&life, changing("machine", without_vcpus));
    endless().meanwhile(Beginning::Empty, |vmm| {
        let refusal = vmm.restore(life.restore_request("changed")).unwrap_err();
        assert!(
            refusal.to_string().contains("the saved machine has 0 CPUs"),
            "{refusal}"
        );
        assert_eq!(vmm.info(), Err(Refusal::NoVm));
    });
}

fn without_vcpus(machine: &str) -> String {
    let mut machine: serde_json::Value = serde_json::from_str(machine).unwrap();
    machine["vcpus"] = serde_json::json!([]);
    machine.to_string()
}

#[test]
fn a_base_that_changed_is_not_taken_for_the_one() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        vmm.snapshot(life.snapshot_request("whole")).unwrap();
        let delta = SnapshotRequest {
            base: Some(life.folder.path().join("whole")),
            ..life.snapshot_request("delta")
        };
        vmm.snapshot(delta).unwrap();
    });
    // Sound, with the same identifier, and other contents.
    let path = life.folder.path().join("whole");
    let header = StreamReader::new(fs::File::open(&path).unwrap())
        .unwrap()
        .header()
        .clone();
    let writer = StreamWriter::new(fs::File::create(&path).unwrap(), header).unwrap();
    writer.finish().unwrap();

    endless().meanwhile(Beginning::Empty, |vmm| {
        let refusal = vmm.restore(life.restore_request("delta")).unwrap_err();
        assert!(
            refusal.to_string().contains("the snapshot's base is"),
            "{refusal}"
        );
        assert_eq!(vmm.info(), Err(Refusal::NoVm));
    });
}

#[test]
fn what_is_no_snapshot_of_a_machine_is_refused() {
    let life = endless();
    fs::write(
        life.folder.path().join("text"),
        "not a snapshot, whatever its name is. It is long enough for a header.",
    )
    .unwrap();
    life.meanwhile(Beginning::Empty, |vmm| {
        let refusal = vmm.restore(life.restore_request("text")).unwrap_err();
        assert!(
            refusal
                .to_string()
                .contains("no Tagvisor page stream or snapshot"),
            "{refusal}"
        );
        let refusal = vmm.restore(life.restore_request("missing")).unwrap_err();
        assert!(refusal.to_string().contains("No such file"), "{refusal}");
        assert_eq!(vmm.info(), Err(Refusal::NoVm));
    });
}

fn inspect(live: bool) -> InspectRequest {
    InspectRequest {
        live,
        reader: Some("a test".into()),
    }
}

/// Waits until a guest runs on.
fn await_runs(life: &Trial) {
    let before = life.runs();
    while life.runs() == before {
        thread::yield_now();
    }
}

/// Whether a guest runs on within a time in which it would.
fn runs_on(life: &Trial) -> bool {
    let before = life.runs();
    thread::sleep(Duration::from_millis(50));
    life.runs() > before
}

#[test]
fn a_guest_that_is_looked_at_stands_still_until_the_lease_is_gone() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        let lease = vmm.inspect(inspect(false)).unwrap();
        let meanwhile = vmm.info().unwrap();
        let ran = runs_on(&life);
        drop(lease);
        // Answered when the guest runs again.
        vmm.pause().unwrap();
        vmm.resume().unwrap();

        assert!(!ran);
        assert_eq!(meanwhile.state, VmState::Paused);
        assert_eq!(meanwhile.reason.unwrap(), "a test looks at its memory");
        let after = vmm.info().unwrap();
        assert_eq!((after.state, after.reason), (VmState::Running, None));
        await_runs(&life);
    });
}

#[test]
fn a_guest_that_is_looked_at_live_goes_on() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        let lease = vmm.inspect(inspect(true)).unwrap();
        await_runs(&life);
        assert_eq!(vmm.info().unwrap().state, VmState::Running);
        assert_eq!(lease.vcpus.len(), 1);
    });
}

#[test]
fn a_guest_that_was_paused_is_paused_after_it_was_looked_at() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        vmm.pause().unwrap();
        for live in [false, true] {
            drop(vmm.inspect(inspect(live)).unwrap());
        }
        assert!(!runs_on(&life));
        vmm.resume().unwrap();
    });
}

#[test]
fn the_memory_of_a_guest_that_is_looked_at_is_what_it_was_booted_with() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        let lease = vmm.inspect(inspect(false)).unwrap();
        let first = layout::RAM_START / layout::PAGE_SIZE;
        assert_eq!(lease.ram, first..first + 4096);
        // The payload, or the device tree.
        assert!(lease.pages.next_run(0).unwrap().is_some());
        assert!(lease.file.is_some());
    });
}

#[test]
fn a_vmm_ends_while_its_machine_is_looked_at() {
    let life = endless();
    let lease = life.meanwhile(life.boot(), |vmm| vmm.inspect(inspect(false)).unwrap());
    assert!(lease.hold.is_some());
}

#[test]
fn a_machine_that_is_not_there_is_not_looked_at() {
    let life = endless();
    life.meanwhile(Beginning::Empty, |vmm| {
        let refusal = vmm.inspect(inspect(false)).map(drop).unwrap_err();
        assert_eq!(refusal, Refusal::NoVm);
        vmm.create(life.config.clone()).unwrap();
        let refusal = vmm.inspect(inspect(true)).map(drop).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "the VM is not booted: it cannot be looked at now"
        );
    });
}
