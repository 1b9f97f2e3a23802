//! What of MTE is visible with it and without (seed 000).

use engine::{RegisterId, TagCopyError, Vcpu, Vm};
use mte::{MteFeatures, MteLevel, SWITCHED_REGISTERS, SystemRegister, Tag};

use super::{Guest, IPA, TAG, give, mte_support, slot_of, vm_without_mte};
use crate::{Backing, GRANULES, GuestCpu, GuestFault, Stop, Testbed, Verdict};

pub fn with_mte_the_guest_sees_the_level_that_the_host_announced<T: Testbed>(
    testbed: &T,
) -> Verdict {
    let announced = mte_support(testbed)?.features;
    let mut guest = Guest::with_private_memory(testbed, 1)?;

    let pfr1 = guest.cpu.mrs(SystemRegister::ID_AA64PFR1_EL1)?;
    let vcpu = guest.cpu.vcpu()?;

    let saved = vcpu.register_u64(RegisterId::ID_AA64PFR1_EL1)?;
    let pfr2 = vcpu.register_u64(RegisterId::ID_AA64PFR2_EL1)?;
    assert_eq!(pfr1, saved);
    assert_eq!(MteFeatures::from_id_registers(pfr1, pfr2), announced);
    Ok(())
}

pub fn without_mte_the_guest_sees_none<T: Testbed>(testbed: &T) -> Verdict {
    let vm = vm_without_mte(testbed)?;
    let mut cpu = testbed.cpu(&vm, 0)?;

    let pfr1 = cpu.mrs(SystemRegister::ID_AA64PFR1_EL1)?;

    assert_eq!(MteLevel::from_id_aa64pfr1(pfr1), MteLevel::None);
    Ok(())
}

pub fn with_mte_the_four_registers_are_listed_and_the_guest_has_them<T: Testbed>(
    testbed: &T,
) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 1)?;

    let listed = guest.cpu.vcpu()?.registers()?;

    for register in SWITCHED_REGISTERS {
        assert!(listed.contains(&register.into()), "{register:?}");
        guest.cpu.mrs(register)?;
    }
    Ok(())
}

pub fn without_mte_the_four_registers_do_not_exist<T: Testbed>(testbed: &T) -> Verdict {
    let vm = vm_without_mte(testbed)?;
    let mut cpu = testbed.cpu(&vm, 0)?;
    let vcpu = cpu.vcpu()?;

    let listed = vcpu.registers()?;

    for register in SWITCHED_REGISTERS {
        assert!(!listed.contains(&register.into()), "{register:?}");
        assert_not_found(vcpu.register_u64(register.into()).map(drop));
        assert_not_found(vcpu.set_register_u64(register.into(), 0));
    }
    Ok(())
}

fn assert_not_found(result: engine::Result<()>) {
    let Err(engine::Error::Register { source, .. }) = result else {
        panic!("{result:?} instead of an error of the register");
    };
    assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
}

pub fn without_mte_the_four_registers_are_undefined_to_the_guest<T: Testbed>(
    testbed: &T,
) -> Verdict {
    let vm = vm_without_mte(testbed)?;
    let mut cpu = testbed.cpu(&vm, 0)?;

    for register in SWITCHED_REGISTERS {
        let (read, written) = (cpu.mrs(register), cpu.msr(register, 0));
        assert!(matches!(read, Err(GuestFault::Undefined)), "{register:?}");
        assert!(
            matches!(written, Err(GuestFault::Undefined)),
            "{register:?}"
        );
    }
    Ok(())
}

pub fn without_mte_tags_are_neither_stored_nor_copied<T: Testbed>(testbed: &T) -> Verdict {
    let memory = testbed.map(Backing::Anonymous, 1)?;
    let vm = vm_without_mte(testbed)?;
    give(&*vm, &slot_of(&memory))?;
    let mut cpu = testbed.cpu(&vm, 0)?;

    cpu.stg(IPA, TAG)?;

    assert_eq!(cpu.ldg(IPA)?, Tag::ZERO);
    let mut tags = [0; GRANULES];
    let copies = [
        vm.copy_tags_from_guest(IPA, &mut tags),
        vm.copy_tags_to_guest(IPA, &tags),
    ];
    for copy in copies {
        assert!(matches!(copy, Err(TagCopyError::NoMte)), "{copy:?}");
    }
    drop(cpu);
    drop(vm);
    Ok(())
}

pub fn the_level_cannot_be_changed<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 1)?;
    let vcpu = guest.cpu.vcpu()?;
    let pfr1 = vcpu.register_u64(RegisterId::ID_AA64PFR1_EL1)?;

    let lowered = vcpu.set_register_u64(RegisterId::ID_AA64PFR1_EL1, pfr1 & !0xf00 | 0x100);
    let kept = vcpu.set_register_u64(RegisterId::ID_AA64PFR1_EL1, pfr1);

    assert!(matches!(lowered, Err(engine::Error::Register { .. })));
    kept.map_err(Stop::from)
}
