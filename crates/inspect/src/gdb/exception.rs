//! What a debugger does to a vCPU's state besides what its user asks for: it gives the guest the BRK exceptions that are the
//! guest's, and keeps interrupts from coming in the way of a single step.

use engine::{RegisterId, Result, Vcpu};

use crate::registers::{ESR_EL1, SCTLR_EL1};

pub const VBAR_EL1: RegisterId = RegisterId::system(3, 0, 12, 0, 0);

/// Fields of PSTATE as SPSR_EL1 has them (Arm ARM C5.2.18), of SCTLR_EL1 and of ID_AA64PFR1_EL1.
const MODE: u64 = 0x1f;
const EL1H: u64 = 0b0101;
const EL1T: u64 = 0b0100;
const EL0T: u64 = 0b0000;
const AARCH32: u64 = 1 << 4;
const DAIF: u64 = 0xf << 6;
const IRQ_AND_FIQ: u64 = 0b11 << 6;
const SSBS: u64 = 1 << 12;
const PAN: u64 = 1 << 22;
const DIT: u64 = 1 << 24;
const TCO: u64 = 1 << 25;
const FLAGS: u64 = 0xf << 28;
const SCTLR_SPAN: u64 = 1 << 23;
const SCTLR_DSSBS: u64 = 1 << 44;
const PFR1_MTE_SHIFT: u32 = 8;

/// Offsets of the vectors of synchronous exceptions from VBAR_EL1 (Arm ARM D1.3.1.5).
const FROM_EL1T: u64 = 0;
const FROM_EL1H: u64 = 0x200;
const FROM_EL0: u64 = 0x400;
const FROM_AARCH32: u64 = 0x600;

/// Has the guest take a synchronous exception of this syndrome to EL1, as the CPU would have if nobody debugged it (Arm ARM
/// D1.3.1; the same as KVM does, `enter_exception64` in `arch/arm64/kvm/hyp/exception.c`).
///
/// # Errors
/// The vCPU does not tell or take a register.
pub fn take(vcpu: &impl Vcpu, syndrome: u32) -> Result<()> {
    let old = vcpu.register_u64(RegisterId::PSTATE)?;
    let control = vcpu.register_u64(SCTLR_EL1)?;
    let has_mte = vcpu.register_u64(RegisterId::ID_AA64PFR1_EL1)? >> PFR1_MTE_SHIFT & 0xf >= 2;
    let vectors = vcpu.register_u64(VBAR_EL1)?;
    vcpu.set_register_u64(RegisterId::ELR_EL1, vcpu.register_u64(RegisterId::PC)?)?;
    vcpu.set_register_u64(RegisterId::SPSR_EL1, old)?;
    vcpu.set_register_u64(ESR_EL1, syndrome.into())?;
    vcpu.set_register_u64(
        RegisterId::PSTATE,
        state_in_exception(old, control, has_mte),
    )?;
    vcpu.set_register_u64(RegisterId::PC, vectors.wrapping_add(vector(old)))
}

const fn state_in_exception(old: u64, control: u64, has_mte: bool) -> u64 {
    let mut new = EL1H | DAIF | old & (FLAGS | DIT | PAN);
    if control & SCTLR_SPAN == 0 {
        new |= PAN;
    }
    if control & SCTLR_DSSBS != 0 {
        new |= SSBS;
    }
    if has_mte {
        new |= TCO;
    }
    new
}

const fn vector(state: u64) -> u64 {
    match state & MODE {
        EL1T => FROM_EL1T,
        EL1H => FROM_EL1H,
        EL0T => FROM_EL0,
        mode if mode & AARCH32 != 0 => FROM_AARCH32,
        _ => FROM_EL0,
    }
}

/// Interrupts that were masked for a step.
///
/// A guest that was stopped for a while has interrupts pending, so a step would end in a handler of them rather than behind
/// the instruction. EL1 can mask them; at EL0 they come all the same, as the mask does not hold there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masked {
    /// PSTATE before, of which I and F count.
    state: u64,
    /// Where the step began.
    pc: u64,
}

impl Masked {
    /// Masks interrupts for a step of `instruction`, if they are not and that can be taken back.
    ///
    /// # Errors
    /// The vCPU does not tell or take a register.
    pub fn mask(vcpu: &impl Vcpu, instruction: u32) -> Result<Option<Self>> {
        let state = vcpu.register_u64(RegisterId::PSTATE)?;
        let is_el1 = matches!(state & MODE, EL1H | EL1T);
        if !is_el1 || state & IRQ_AND_FIQ == IRQ_AND_FIQ || concerns_masks(instruction) {
            return Ok(None);
        }
        let pc = vcpu.register_u64(RegisterId::PC)?;
        vcpu.set_register_u64(RegisterId::PSTATE, state | IRQ_AND_FIQ)?;
        Ok(Some(Self { state, pc }))
    }

    /// Takes the masks back: from where they were saved, if the step took an exception.
    ///
    /// # Errors
    /// The vCPU does not tell or take a register.
    pub fn unmask(self, vcpu: &impl Vcpu) -> Result<()> {
        let pc = vcpu.register_u64(RegisterId::PC)?;
        let entry = pc.wrapping_sub(vcpu.register_u64(VBAR_EL1)?);
        let took_exception = pc != self.pc && matches!(entry, FROM_EL1T | FROM_EL1H);
        let id = match took_exception {
            true => RegisterId::SPSR_EL1,
            false => RegisterId::PSTATE,
        };
        let now = vcpu.register_u64(id)?;
        vcpu.set_register_u64(id, now & !IRQ_AND_FIQ | self.state & IRQ_AND_FIQ)
    }
}

/// Whether an instruction reads or writes the masks: `MSR DAIFSet`, `MSR DAIFClr`, `MSR DAIF`, `MRS DAIF`, `ERET` and its
/// kin (Arm ARM C6.2).
const fn concerns_masks(instruction: u32) -> bool {
    const IMMEDIATE: u32 = 0xd503_40df;
    const REGISTER: u32 = 0xd51b_4220;
    const ERET: u32 = 0xd69f_03e0;
    instruction & 0xffff_f0df == IMMEDIATE
        || instruction & 0xffdf_ffe0 == REGISTER
        || instruction & 0xffff_f3e0 == ERET & 0xffff_f3e0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_masks_everything_and_keeps_flags() {
        let old = 0x6000_0000 | EL0T;

        let new = state_in_exception(old, SCTLR_SPAN, false);

        assert_eq!(new, 0x6000_03c5);
    }

    #[test]
    fn an_exception_sets_what_the_control_register_and_mte_ask_for() {
        let new = state_in_exception(EL1H, SCTLR_DSSBS, true);

        assert_eq!(new, EL1H | DAIF | PAN | SSBS | TCO);
    }

    #[test]
    fn each_level_has_its_vector() {
        assert_eq!(vector(EL1T), 0);
        assert_eq!(vector(EL1H | 0x3c0), 0x200);
        assert_eq!(vector(EL0T), 0x400);
        assert_eq!(vector(0x10), 0x600);
    }

    #[test]
    fn instructions_that_concern_masks_are_known() {
        // msr daifset, #2; msr daifclr, #15; msr daif, x1; mrs x0, daif; eret; eretaa; eretab.
        let known = [
            0xd503_42df_u32,
            0xd503_4fff,
            0xd51b_4221,
            0xd53b_4220,
            0xd69f_03e0,
            0xd69f_0bff,
            0xd69f_0fff,
        ];
        // nop; ret; stg x0, [x0]; br x0; msr spsel, #1.
        let others = [
            0xd503_201f_u32,
            0xd65f_03c0,
            0xd920_0800,
            0xd61f_0000,
            0xd500_41bf,
        ];

        assert!(known.into_iter().all(concerns_masks));
        assert!(!others.into_iter().any(concerns_masks));
    }
}
