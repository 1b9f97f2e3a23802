//! Two machines on the reference model hand a guest over, as the two ends of a migration do.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use engine::model::{Guest, HostRules, ModelHypervisor, ModelVcpu, Step};
use engine::{RegisterId, Result, SystemEvent, Vcpu};
use mte::{MteFeatures, Tag};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{MachineConfig, MemorySize, OverlayConfig};
use vmm::console::{Console, ConsoleConfig};
use vmm::layout::RAM_START;
use vmm::machine::{Ending, Error, Machine, MachineState, cpu};
use vmm::memory::TagAccess;

const COUNTER: u64 = RAM_START + (16 << 20);
/// Tells the guest that it may go on from five.
const GO: u64 = COUNTER + 4096;
const TAG: Tag = Tag::from_low_bits(6);
const COUNT: RegisterId = RegisterId::x(1);

/// Counts to ten in tagged memory and in a register, waits at five for leave to go on, and switches itself off.
struct Counting;

impl Guest for Counting {
    fn step(&self, vcpu: &mut ModelVcpu) -> Result<Step> {
        let count = load(vcpu, COUNTER)?;
        let tag = vcpu.ldg(COUNTER)?;
        assert!(count == 0 || tag == TAG, "the counter has tag {tag}");
        assert_eq!(vcpu.register_u64(COUNT)?, count);
        match count {
            5 if load(vcpu, GO)? == 0 => return Ok(Step::Wait),
            10 => return Ok(Step::System(SystemEvent::Off)),
            _ => (),
        }
        vcpu.store(COUNTER, &(count + 1).to_le_bytes())?;
        vcpu.stg(COUNTER, TAG)?;
        vcpu.set_register_u64(COUNT, count + 1)?;
        Ok(Step::Continue)
    }
}

fn load(vcpu: &ModelVcpu, address: u64) -> Result<u64> {
    let mut value = [0; 8];
    vcpu.load(address, &mut value)?;
    Ok(u64::from_le_bytes(value))
}

/// A host, and what its machines need.
struct Host {
    folder: TempDir,
    hypervisor: ModelHypervisor,
    console: Console,
}

impl Host {
    fn new() -> Self {
        Self::with(HostRules::linux(6, 12))
    }

    fn with(rules: HostRules) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("payload"), [0; 8]).unwrap();
        Self {
            folder,
            hypervisor: ModelHypervisor::new(rules).with_guest(Counting),
            console: Console::open(&ConsoleConfig::Off).unwrap(),
        }
    }

    fn config(&self) -> MachineConfig {
        MachineConfig {
            flat: Some(self.path("payload")),
            memory: MemorySize(32 << 20),
            tag_access: TagAccess::Ioctl,
            console: ConsoleConfig::Off,
            cpus: 1,
            ..MachineConfig::default()
        }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        Path::new(self.folder.path()).join(name)
    }

    fn boot(&mut self, config: &MachineConfig) -> Machine<ModelHypervisor> {
        Machine::new(&self.hypervisor, config, &mut self.console).unwrap()
    }

    fn await_guest(&mut self, config: &MachineConfig) -> Machine<ModelHypervisor> {
        Machine::awaiting(&self.hypervisor, config, &mut self.console).unwrap()
    }
}

fn word(machine: &Machine<ModelHypervisor>, address: u64) -> u64 {
    let ram = machine.memory().ram();
    ram.read_obj(GuestAddress(address)).unwrap()
}

/// Runs the guest until it waits at five.
fn run_to_five(machine: &mut Machine<ModelHypervisor>) {
    machine.resume().unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while word(machine, COUNTER) != 5 {
        assert!(Instant::now() < end, "the guest does not count");
        thread::sleep(Duration::from_millis(1));
    }
}

/// All pages that there are, data and tags.
fn move_memory(from: &Machine<ModelHypervisor>, to: &Machine<ModelHypervisor>) {
    use stream::{Batch, PageSink, PageSource};
    let source = from.pages();
    let sink = to.pages();
    let mut at = 0;
    while let Some(run) = source.next_run(at).unwrap() {
        at = run.end;
        let mut batch = Batch::new(PageSource::metadata(&source));
        batch.read(&source, &[run]).unwrap();
        sink.place(&batch).unwrap();
    }
}

/// A guest that waits at five, its machine, and its state.
fn source(host: &mut Host) -> (Machine<ModelHypervisor>, MachineState) {
    let config = host.config();
    let mut machine = host.boot(&config);
    run_to_five(&mut machine);
    let state = machine.save().unwrap();
    (machine, state)
}

#[test]
fn a_guest_goes_on_in_a_machine_that_awaited_it() {
    let mut host = Host::new();
    let config = host.config();
    let mut destination = host.await_guest(&config);
    let (source, state) = source(&mut host);
    move_memory(&source, &destination);

    destination.load(&state).unwrap();
    let ram = destination.memory().ram();
    ram.write_obj(1u64, GuestAddress(GO)).unwrap();
    let ending = destination.run().unwrap();

    assert_eq!(ending, Ending::Off);
    assert_eq!(word(&destination, COUNTER), 10);
    assert_eq!(word(&source, COUNTER), 5);
}

#[test]
fn a_machine_has_the_whole_state_that_it_was_given() {
    let mut host = Host::new();
    let config = host.config();
    let mut destination = host.await_guest(&config);
    let (_source, state) = source(&mut host);

    destination.load(&state).unwrap();

    assert_eq!(destination.save().unwrap(), state);
}

#[test]
fn a_machine_that_awaits_its_guest_runs_nothing_and_has_no_state() {
    let mut host = Host::new();
    let config = host.config();
    let mut destination = host.await_guest(&config);

    destination.pause();

    assert!(matches!(destination.resume(), Err(Error::Awaiting)));
    assert!(matches!(destination.run(), Err(Error::Awaiting)));
    assert!(matches!(destination.save(), Err(Error::Awaiting)));
    assert!(!destination.is_running());
}

#[test]
fn a_machine_takes_one_guest() {
    let mut host = Host::new();
    let config = host.config();
    let mut destination = host.await_guest(&config);
    let (mut source, state) = source(&mut host);
    destination.load(&state).unwrap();

    assert!(matches!(destination.load(&state), Err(Error::NotAwaiting)));
    assert!(matches!(source.load(&state), Err(Error::NotAwaiting)));
}

#[test]
fn a_guest_with_other_parts_is_refused_with_both_counts() {
    let mut host = Host::new();
    let config = MachineConfig {
        cpus: 2,
        ..host.config()
    };
    let mut destination = host.await_guest(&config);
    let (_source, state) = source(&mut host);

    let refusal = destination.load(&state).unwrap_err().to_string();

    assert!(
        refusal.contains("has 1 CPUs and 1 virtio devices, this one 2 and 1"),
        "{refusal}"
    );
}

#[test]
fn what_a_guest_sees_of_its_cpu_is_known_while_it_runs_and_goes_with_it() {
    let mut host = Host::new();
    let config = host.config();
    let mut destination = host.await_guest(&config);
    let mut source = host.boot(&config);
    run_to_five(&mut source);

    let seen = source.cpu().clone();
    destination.check_cpu(&seen).unwrap();
    let state = source.save().unwrap();
    destination.load(&state).unwrap();

    assert_eq!(cpu::mte_of(&seen), cpu::mte_of(&state.vcpus[0]));
    assert_eq!(cpu::features_of(&seen), cpu::features_of(&state.vcpus[0]));
    assert_eq!(destination.cpu(), &seen);
}

#[test]
fn a_guest_with_another_mte_is_refused_by_its_level_before_anything_is_sent() {
    let mut host = Host::new();
    let config = host.config();
    let source = host.boot(&config);
    let mut other = Host::with(HostRules {
        mte: Some(MteFeatures::from_id_registers(2 << 8, 0)),
        ..HostRules::linux(6, 12)
    });
    let config = other.config();
    let destination = other.await_guest(&config);

    let less = destination.check_cpu(source.cpu()).unwrap_err();
    let more = source.check_cpu(destination.cpu()).unwrap_err();

    assert!(less.to_string().contains("MTE (level 3)"), "{less}");
    assert!(matches!(more, Error::OtherMte { .. }), "{more}");
}

/// The configuration with a disk of 1 MiB, and what its machines have it as.
fn with_disk(host: &Host) -> MachineConfig {
    fs::write(host.path("disk"), vec![0; 1 << 20]).unwrap();
    MachineConfig {
        disk: vec![host.path("disk").display().to_string().parse().unwrap()],
        ..host.config()
    }
}

#[test]
fn disks_go_with_the_guest_and_neither_machine_runs_without_them() {
    let mut host = Host::new();
    let config = with_disk(&host);
    let mut source = host.boot(&config);
    let mut destination = host.await_guest(&config);
    run_to_five(&mut source);
    let while_it_runs = source.release_disks();
    let state = source.save().unwrap();
    move_memory(&source, &destination);
    destination.load(&state).unwrap();

    let too_early = destination.claim_disks().unwrap_err().to_string();
    let without = destination.resume().unwrap_err().to_string();
    source.release_disks().unwrap();
    destination.claim_disks().unwrap();
    let after = source.resume().unwrap_err().to_string();
    destination.resume().unwrap();

    assert!(matches!(while_it_runs, Err(Error::DisksInUse)));
    assert!(too_early.contains("disk") && too_early.contains("holds a lock"));
    assert!(without.contains("was not claimed for it"), "{without}");
    assert!(after.contains("was let go"), "{after}");
}

#[test]
fn a_source_takes_its_disks_back_and_goes_on() {
    let mut host = Host::new();
    let config = with_disk(&host);
    let mut source = host.boot(&config);
    let destination = host.await_guest(&config);
    run_to_five(&mut source);
    source.pause();
    source.release_disks().unwrap();
    destination.claim_disks().unwrap();
    drop(destination);

    source.claim_disks().unwrap();
    let ram = source.memory().ram();
    ram.write_obj(1u64, GuestAddress(GO)).unwrap();
    let ending = source.run().unwrap();

    assert_eq!(ending, Ending::Off);
    assert_eq!(word(&source, COUNTER), 10);
}

#[test]
fn all_disks_are_claimed_or_none() {
    let mut host = Host::new();
    let first = with_disk(&host);
    fs::write(host.path("other"), vec![0; 1 << 20]).unwrap();
    let other = host.path("other").display().to_string().parse().unwrap();
    let both = MachineConfig {
        disk: vec![first.disk[0].clone(), other],
        ..first.clone()
    };
    let user = MachineConfig {
        disk: vec![both.disk[1].clone()],
        ..first.clone()
    };
    let _user = host.boot(&user);
    let destination = host.await_guest(&both);

    let refusal = destination.claim_disks().unwrap_err().to_string();

    assert!(refusal.contains("/other"), "{refusal}");
    host.boot(&first);
}

#[test]
fn a_guest_with_an_overlay_without_a_name_is_not_awaited() {
    let mut host = Host::new();
    let mut config = with_disk(&host);
    config.disk[0].overlay = Some(OverlayConfig::Temporary);

    let refusal = Machine::awaiting(&host.hypervisor, &config, &mut host.console).err();

    let refusal = refusal.unwrap().to_string();
    assert!(refusal.contains("overlay without a name"), "{refusal}");
}
