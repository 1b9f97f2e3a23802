//! The four registers that belong to a vCPU: saved, restored, private (seeds 000 and 004).

use std::sync::Barrier;
use std::thread;

use engine::Vcpu;
use mte::{SWITCHED_REGISTERS, SystemRegister};

use super::{Guest, vm_with_mte};
use crate::{GuestCpu, GuestFault, Testbed, Verdict};

/// A value for each of the four. Every field of every register differs from that in [`OTHERS`].
const VALUES: [(SystemRegister, u64); 4] = [
    (SystemRegister::RGSR_EL1, 0x0012_3405),
    (SystemRegister::GCR_EL1, 0x1_5555),
    (SystemRegister::TFSR_EL1, 0b01),
    (SystemRegister::TFSRE0_EL1, 0b10),
];

const OTHERS: [(SystemRegister, u64); 4] = [
    (SystemRegister::RGSR_EL1, 0x00ab_cd0a),
    (SystemRegister::GCR_EL1, 0x0_aaaa),
    (SystemRegister::TFSR_EL1, 0b10),
    (SystemRegister::TFSRE0_EL1, 0b01),
];

/// How often two vCPUs at once write their registers and read them.
const ROUNDS: usize = 40;

fn write(cpu: &mut impl GuestCpu, values: &[(SystemRegister, u64)]) -> Result<(), GuestFault> {
    values
        .iter()
        .try_for_each(|(register, value)| cpu.msr(*register, *value))
}

fn assert_holds(cpu: &mut impl GuestCpu, values: &[(SystemRegister, u64)]) -> Verdict {
    for (register, value) in values {
        assert_eq!(cpu.mrs(*register)?, *value, "{register:?}");
    }
    Ok(())
}

pub fn each_register_is_saved_and_restored<T: Testbed>(testbed: &T) -> Verdict {
    let mut source = Guest::with_private_memory(testbed, 1)?;
    let mut destination = Guest::with_private_memory(testbed, 1)?;
    write(&mut source.cpu, &VALUES)?;
    write(&mut destination.cpu, &OTHERS)?;

    for register in SWITCHED_REGISTERS {
        let saved = source.cpu.vcpu()?.register_u64(register.into())?;
        let vcpu = destination.cpu.vcpu()?;
        vcpu.set_register_u64(register.into(), saved)?;
    }

    assert_holds(&mut destination.cpu, &VALUES)?;
    assert_holds(&mut source.cpu, &VALUES)
}

pub fn two_vcpus_on_one_thread_keep_their_registers_apart<T: Testbed>(testbed: &T) -> Verdict {
    let vm = vm_with_mte(testbed)?;
    let (mut first, mut second) = (testbed.cpu(&vm, 0)?, testbed.cpu(&vm, 1)?);

    write(&mut first, &VALUES)?;
    write(&mut second, &OTHERS)?;

    assert_holds(&mut first, &VALUES)?;
    assert_holds(&mut second, &OTHERS)?;
    assert_holds(&mut first, &VALUES)
}

pub fn two_vcpus_at_once_keep_their_registers_apart<T: Testbed>(testbed: &T) -> Verdict {
    let vm = vm_with_mte(testbed)?;
    let (first, second) = (testbed.cpu(&vm, 0)?, testbed.cpu(&vm, 1)?);
    let start = Barrier::new(2);
    let exercise = |mut cpu: T::Cpu, values: &[(SystemRegister, u64)]| {
        start.wait();
        for _ in 0..ROUNDS {
            write(&mut cpu, values)?;
            assert_holds(&mut cpu, values)?;
        }
        Verdict::Ok(())
    };

    thread::scope(|scope| {
        let first = scope.spawn(|| exercise(first, &VALUES));
        let second = scope.spawn(|| exercise(second, &OTHERS));
        first.join().expect("the first vCPU's thread")?;
        second.join().expect("the second vCPU's thread")
    })
}
