//! A whole machine of the `vmm` crate on the reference model: its RAM is real memory of this process,
//! and the model has the tags.

use std::fs;

use engine::model::{Guest, HostRules, ModelHypervisor, ModelVcpu, Step};
use engine::{RegisterId, Result, SystemEvent, Vcpu};
use mte::Tag;
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{MachineConfig, MemorySize};
use vmm::console::{Console, ConsoleConfig};
use vmm::layout::RAM_START;
use vmm::machine::{Ending, Machine};
use vmm::memory::TagAccess;

const COUNTER: u64 = RAM_START + (16 << 20);
const TAG: Tag = Tag::from_low_bits(6);

/// Counts to ten in tagged memory, from where the payload's first word says, and switches itself off.
struct Counting;

impl Guest for Counting {
    fn step(&self, vcpu: &mut ModelVcpu) -> Result<Step> {
        let entry = vcpu.register_u64(RegisterId::PC)?;
        let tag = vcpu.ldg(COUNTER)?;
        let from = match (load(vcpu, COUNTER)?, tag) {
            (0, Tag::ZERO) => load(vcpu, entry)?,
            (count, TAG) => count,
            (_, tag) => panic!("the counter has tag {tag}"),
        };
        vcpu.store(COUNTER, &(from + 1).to_le_bytes())?;
        vcpu.stg(COUNTER, TAG)?;
        Ok(match from + 1 {
            10 => Step::System(SystemEvent::Off),
            _ => Step::Continue,
        })
    }
}

fn load(vcpu: &ModelVcpu, address: u64) -> Result<u64> {
    let mut value = [0; 8];
    vcpu.load(address, &mut value)?;
    Ok(u64::from_le_bytes(value))
}

#[test]
fn a_machine_runs_on_the_model_with_its_ram_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let payload = folder.path().join("payload.bin");
    fs::write(&payload, 7u64.to_le_bytes()).unwrap();
    let config = MachineConfig {
        flat: Some(payload),
        memory: MemorySize(32 << 20),
        tag_access: TagAccess::Ioctl,
        console: ConsoleConfig::Off,
        cpus: 2,
        ..MachineConfig::default()
    };
    let hypervisor = ModelHypervisor::new(HostRules::linux(6, 12)).with_guest(Counting);
    let mut console = Console::open(&config.console).unwrap();
    let mut machine = Machine::new(&hypervisor, &config, &mut console).unwrap();

    let ending = machine.run().unwrap();

    let ram = machine.memory().ram();
    let count: u64 = ram.read_obj(GuestAddress(COUNTER)).unwrap();
    assert_eq!(ending, Ending::Off);
    assert_eq!(count, 10);
}
