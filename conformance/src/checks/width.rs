//! AArch32, which has no tags (seed 003).

use engine::{Error, Hypervisor, VcpuFeatures, Vm};

use super::{vm_with_mte, vm_without_mte};
use crate::{Testbed, Verdict, require};

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

pub fn a_32_bit_el1_is_welcome_without_mte<T: Testbed>(testbed: &T) -> Verdict {
    require(
        testbed.hypervisor().capabilities().aarch32_el1,
        "this host has no EL1 in AArch32",
    )?;
    let vm = vm_without_mte(testbed)?;

    vm.create_vcpu(0, AARCH32)?;

    Ok(())
}
