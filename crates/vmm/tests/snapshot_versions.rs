//! Snapshots that earlier versions wrote are read, or refused by their number.
//!
//! `data/machine-v1.snapshot` is of a guest with MTE3 and two CPUs, the second off, which jumps to itself
//! (`14000000`) at the start of 16 MiB of RAM.

use std::path::Path;

use engine::{PowerState, RegisterId};
use mte::MteLevel;
use vmm::layout::{PAGE_SIZE, RAM_START};
use vmm::machine::cpu;
use vmm::machine::snapshot::{self, SavedMachine};

fn kept(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

#[test]
fn a_machine_of_version_1_is_read() {
    let snapshot = snapshot::open(&kept("machine-v1.snapshot"), &[]).unwrap();
    let saved = SavedMachine::read(&snapshot).unwrap();

    let boot_cpu = &saved.state.vcpus[0];
    let pc = boot_cpu
        .registers
        .iter()
        .find(|register| register.id == RegisterId::PC);
    assert_eq!(pc.unwrap().value, RAM_START.to_le_bytes());
    assert_eq!(saved.state.vcpus[1].power, PowerState::Off);
    assert_eq!(cpu::mte_of(boot_cpu).level(), MteLevel::Mte3);
    assert_eq!(saved.platform.mte.as_deref(), Some("MTE3 (asymmetric)"));
    assert_eq!(saved.config.memory.0, 16 << 20);
    assert_eq!(saved.config.cpus, 2);
    let mut reader = snapshot.reader();
    let first = reader.read_with(RAM_START / PAGE_SIZE).unwrap().unwrap();
    assert_eq!(first.data()[0][..4], 0x1400_0000_u32.to_le_bytes());
}
