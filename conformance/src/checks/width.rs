//! AArch32, which has no tags (seed 003).

use engine::{Error, Hypervisor, VcpuFeatures, Vm};

use mte::SystemRegister;

use super::{Guest, IPA, page, pattern, vm_with_mte, vm_without_mte};
use crate::{GuestCpu, Testbed, Verdict, require};

const AARCH32: VcpuFeatures = VcpuFeatures {
    aarch32_el1: true,
    powered_off: false,
    sve: false,
    pointer_authentication: false,
    pmu: false,
};

pub fn a_32_bit_el1_is_refused_with_mte<T: Testbed>(testbed: &T) -> Verdict {
    let vm = vm_with_mte(testbed)?;

    let refused = vm.create_vcpu(0, AARCH32);

    assert!(matches!(
        refused.err(),
        Some(Error::Aarch32WithMte { index: 0 })
    ));
    Ok(())
}

pub fn the_host_itself_refuses_a_32_bit_el1_with_mte<T: Testbed>(testbed: &T) -> Verdict {
    let vm = vm_with_mte(testbed)?;

    let made = testbed.host_makes_aarch32_vcpu(&vm)?;

    assert!(!made);
    Ok(())
}

pub fn a_32_bit_program_stores_data_and_leaves_tags_and_registers<T: Testbed>(
    testbed: &T,
) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 2)?;
    guest.cpu.set_page_tags(IPA, &pattern(1))?;
    guest.cpu.msr(SystemRegister::GCR_EL1, 0x1_1234)?;
    guest.cpu.msr(SystemRegister::TFSRE0_EL1, 1)?;

    let stored = guest.cpu.store_in_aarch32(IPA + 0x10, 0x5678, page(1))?;

    require(stored.is_some(), "this host's vCPUs have no AArch32 at EL0")?;
    assert_eq!(guest.cpu.load(IPA + 0x10)?, 0x5678);
    assert_eq!(guest.cpu.page_tags(IPA)?, pattern(1));
    assert_eq!(guest.cpu.mrs(SystemRegister::GCR_EL1)?, 0x1_1234);
    assert_eq!(guest.cpu.mrs(SystemRegister::TFSRE0_EL1)?, 1);
    Ok(())
}

pub fn a_32_bit_el1_is_welcome_without_mte<T: Testbed>(testbed: &T) -> Verdict {
    require(
        testbed.hypervisor().capabilities().aarch32_el1,
        "this host has no EL1 in AArch32",
    )?;
    let vm = vm_without_mte(testbed)?;

    vm.create_vcpu(0, AARCH32)?;

    Ok(())
}
