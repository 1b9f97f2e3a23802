//! Which vCPU runs a process, as far as the guest says so in a register.
//!
//! Linux built with `CONFIG_PID_IN_CONTEXTIDR`, as Debian's is, writes the number of each thread that it switches to, that of its
//! first PID namespace, into CONTEXTIDR_EL1 (`arch/arm64/include/asm/mmu_context.h`, `contextidr_thread_switch`), after the thread's
//! tables are in TTBR0_EL1. So the tables of threads that a vCPU runs are known, with nothing known of the kernel's own structures;
//! those of threads that sleep are not.

use engine::{RegisterId, VcpuState};

use crate::error::{Error, Result};
use crate::registers;

const CONTEXTIDR_EL1: RegisterId = RegisterId::system(3, 0, 13, 0, 1);

/// The vCPU that runs a thread of the guest's. A process' first thread has its number.
///
/// # Errors
/// [`Error::NoProcess`]: none runs it, or the guest does not say what its vCPUs run. Number 0 is no thread's.
pub fn vcpu_of_process(vcpus: &[VcpuState], wanted: u32) -> Result<usize> {
    let running: Vec<u32> = vcpus.iter().map(process_of).collect();
    let found = running.iter().position(|number| *number == wanted);
    found
        .filter(|_| wanted != 0)
        .ok_or(Error::NoProcess { wanted, running })
}

/// What a vCPU runs: 0 if it is idle, or if the guest does not say.
fn process_of(vcpu: &VcpuState) -> u32 {
    // The upper half is reserved (Arm ARM, CONTEXTIDR_EL1).
    registers::value(vcpu, CONTEXTIDR_EL1).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use engine::{PendingSError, PowerState, RegisterValue};

    use super::*;

    fn running(process: u64) -> VcpuState {
        VcpuState {
            registers: vec![RegisterValue {
                id: CONTEXTIDR_EL1,
                value: process.to_le_bytes().to_vec(),
            }],
            power: PowerState::On,
            serror: PendingSError::default(),
        }
    }

    fn refusal(vcpus: &[VcpuState], wanted: u32) -> String {
        vcpu_of_process(vcpus, wanted).unwrap_err().to_string()
    }

    #[test]
    fn the_vcpu_is_the_one_whose_register_has_the_number() {
        let vcpus = [running(0), running(77), running(158)];
        assert_eq!(vcpu_of_process(&vcpus, 158).unwrap(), 2);
        assert_eq!(vcpu_of_process(&vcpus, 77).unwrap(), 1);
    }

    #[test]
    fn whoever_asks_for_a_process_that_sleeps_is_told_which_run() {
        let said = refusal(&[running(77), running(0), running(158)], 5);
        assert!(
            said.starts_with("no vCPU runs process 5: they run 77 (vCPU 0) and 158 (vCPU 2)"),
            "{said}"
        );
        assert!(said.contains("--ttbr"), "{said}");
    }

    #[test]
    fn an_idle_vcpu_runs_no_process() {
        let said = refusal(&[running(0)], 0);
        assert!(said.contains("do not say"), "{said}");
    }

    #[test]
    fn vcpus_without_the_register_run_nothing_that_is_known() {
        let mut vcpu = running(3);
        vcpu.registers.clear();
        assert!(refusal(&[vcpu], 3).contains("do not say"));
        assert!(refusal(&[], 3).contains("do not say"));
    }
}
