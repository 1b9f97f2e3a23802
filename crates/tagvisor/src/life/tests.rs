//! A machine's life on a hypervisor whose guests say one word and end.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use engine::{
    Capabilities, Exit, GicLayout, Interrupter, Memslot, Ppi, RegisterId, RegisterList, Spi,
    SystemEvent, TagCopyResult, Vcpu, VcpuFeatures,
};
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
    _folder: TempDir,
}

fn life(resets: usize, asked_while: Moment) -> Trial {
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
    };
    Trial {
        orders: Mutex::new(Some(orders)),
        hypervisor: Scripted {
            capabilities,
            story: Arc::new(story),
        },
        config,
        console,
        _folder: folder,
    }
}

impl Trial {
    fn run(&self) -> Ending {
        let orders = self.orders.lock().unwrap().take().unwrap();
        let beginning = Beginning::Boot(self.config.clone());
        orders.carry_out(&self.hypervisor, beginning).unwrap()
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
