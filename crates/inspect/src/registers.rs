//! Registers of a saved vCPU, by KVM's names (`struct kvm_regs`, `arch/arm64/include/uapi/asm/kvm.h`).

use engine::{RegisterId, VcpuState};

use crate::error::{Error, Result};

pub(crate) const SCTLR_EL1: RegisterId = RegisterId::system(3, 0, 1, 0, 0);
pub(crate) const TTBR0_EL1: RegisterId = RegisterId::system(3, 0, 2, 0, 0);
pub(crate) const TTBR1_EL1: RegisterId = RegisterId::system(3, 0, 2, 0, 1);
pub(crate) const TCR_EL1: RegisterId = RegisterId::system(3, 0, 2, 0, 2);
pub(crate) const ESR_EL1: RegisterId = RegisterId::system(3, 0, 5, 2, 0);
pub(crate) const FAR_EL1: RegisterId = RegisterId::system(3, 0, 6, 0, 0);
pub(crate) const TCR2_EL1: RegisterId = RegisterId::system(3, 0, 2, 0, 3);
pub(crate) const TFSR_EL1: RegisterId = RegisterId::system(3, 0, 5, 6, 0);
pub(crate) const TFSRE0_EL1: RegisterId = RegisterId::system(3, 0, 5, 6, 1);
pub(crate) const FPSR: RegisterId = RegisterId::from_kvm(0x6020_0000_0010_00d4);
pub(crate) const FPCR: RegisterId = RegisterId::from_kvm(0x6020_0000_0010_00d5);

/// SIMD and floating-point register `number`, 0 to 31.
pub(crate) const fn v(number: usize) -> RegisterId {
    RegisterId::from_kvm(0x6040_0000_0010_0054 + number as u64 * 4)
}

/// A vector register of SVE, whose low end is V (`Documentation/virt/kvm/api.rst`, `KVM_REG_ARM64_SVE`).
pub(crate) const fn z(number: usize) -> RegisterId {
    RegisterId::from_kvm(0x6080_0000_0015_0000 + ((number as u64) << 5))
}

/// The value of a register, little-endian.
fn bytes(vcpu: &VcpuState, id: RegisterId) -> Option<&[u8]> {
    let register = vcpu.registers.iter().find(|register| register.id == id)?;
    Some(&register.value)
}

/// The value of a register of at most 64 bits.
pub(crate) fn value(vcpu: &VcpuState, id: RegisterId) -> Option<u64> {
    let bytes = bytes(vcpu, id)?;
    let mut value = [0; 8];
    value.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(u64::from_le_bytes(value))
}

/// The value of a register that every vCPU has.
pub(crate) fn must_have(vcpu: &VcpuState, id: RegisterId, name: &'static str) -> Result<u64> {
    value(vcpu, id).ok_or(Error::NoRegister(name))
}

/// SIMD and floating-point register `number`, 0 to 31. With SVE it is the low end of the vector register of that number.
pub(crate) fn vector(vcpu: &VcpuState, number: usize) -> Option<[u8; 16]> {
    bytes(vcpu, v(number))
        .or_else(|| bytes(vcpu, z(number)))?
        .first_chunk()
        .copied()
}

/// The stack pointer in use: `SP_EL1` if PSTATE says EL1h.
pub(crate) fn stack_pointer(vcpu: &VcpuState, pstate: u64) -> Result<u64> {
    if pstate & 0xf == 0b0101 {
        return must_have(vcpu, RegisterId::SP_EL1, "SP_EL1");
    }
    must_have(vcpu, RegisterId::SP, "SP_EL0")
}
