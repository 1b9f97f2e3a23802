//! What a guest saw of its CPU, feature by feature, so that a host that lacks one is refused by the
//! feature's name before anything is restored.
//!
//! The ID registers of the guest's CPU are among its saved registers, and can be had without the others ([`identity`]) before
//! a guest runs. A field of theirs that is greater
//! than this host's is a feature that this host does not have (Arm ARM D24.1.3: fields grow with what
//! they describe). Lesser ones are written as they were saved; hosts that cannot hide a feature refuse that.

use std::fmt;

use engine::{PendingSError, PowerState, RegisterId, RegisterValue, Vcpu, VcpuState};
use mte::MteFeatures;

/// An ID register, by the last two parts of its encoding `S3_0_C0_<crm>_<op2>`, and its fields by their lowest bit.
struct IdRegister {
    crm: u8,
    op2: u8,
    fields: &'static [(u32, &'static str)],
}

/// Those that a guest's programs choose their instructions by. The two fields whose 15 means "none" are signed.
const ID_REGISTERS: [IdRegister; 9] = [
    IdRegister {
        crm: 4,
        op2: 0,
        fields: &[
            (16, FLOATING_POINT),
            (20, ADVANCED_SIMD),
            (28, "RAS"),
            (32, "SVE"),
            (48, "DIT"),
        ],
    },
    IdRegister {
        crm: 4,
        op2: 1,
        fields: &[(0, "BTI"), (4, "SSBS"), (8, "MTE")],
    },
    IdRegister {
        crm: 4,
        op2: 2,
        fields: &[(4, "MTE_STORE_ONLY"), (8, "MTE_TAGGED_FAR")],
    },
    IdRegister {
        crm: 4,
        op2: 4,
        fields: &[
            (0, "SVE2"),
            (4, "SVE_AES"),
            (16, "SVE_BitPerm"),
            (20, "SVE_BF16"),
            (32, "SVE_SHA3"),
            (40, "SVE_SM4"),
            (44, "SVE_I8MM"),
            (52, "SVE_F32MM"),
            (56, "SVE_F64MM"),
        ],
    },
    IdRegister {
        crm: 5,
        op2: 0,
        fields: &[(8, "PMUv3")],
    },
    IdRegister {
        crm: 6,
        op2: 0,
        fields: &[
            (4, "AES"),
            (8, "SHA1"),
            (12, "SHA2"),
            (16, "CRC32"),
            (20, "LSE"),
            (28, "RDM"),
            (32, "SHA3"),
            (36, "SM3"),
            (40, "SM4"),
            (44, "DotProd"),
            (48, "FHM"),
            (52, "FlagM"),
            (56, "TLBI"),
            (60, "RNG"),
        ],
    },
    IdRegister {
        crm: 6,
        op2: 1,
        fields: &[
            (0, "DPB"),
            (4, "PAuth (QARMA5)"),
            (8, "PAuth (other)"),
            (12, "JSCVT"),
            (16, "FCMA"),
            (20, "LRCPC"),
            (24, "PACGA (QARMA5)"),
            (28, "PACGA (other)"),
            (32, "FRINTTS"),
            (36, "SB"),
            (40, "SPECRES"),
            (44, "BF16"),
            (48, "DGH"),
            (52, "I8MM"),
            (60, "LS64"),
        ],
    },
    IdRegister {
        crm: 6,
        op2: 2,
        fields: &[
            (0, "WFxT"),
            (4, "RPRES"),
            (8, "PACGA (QARMA3)"),
            (12, "PAuth (QARMA3)"),
            (16, "MOPS"),
            (20, "HBC"),
            (52, "CSSC"),
        ],
    },
    IdRegister {
        crm: 7,
        op2: 0,
        fields: &[(0, "physical addresses"), (4, "ASIDs of 16 bits")],
    },
];

const FLOATING_POINT: &str = "floating point";
const ADVANCED_SIMD: &str = "Advanced SIMD";

/// A feature, and how much of it there is: 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name.
    pub name: &'static str,
    /// The field's value, counted from what means "none".
    pub level: u8,
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.level {
            0 | 1 => f.write_str(self.name),
            level => write!(f, "{} (level {level})", self.name),
        }
    }
}

/// The features that a register with this value tells of, those that are not there among them.
fn features(register: &IdRegister, value: u64) -> impl Iterator<Item = Feature> {
    register.fields.iter().map(move |(lowest, name)| {
        let field = (value >> lowest & 0xf) as u8;
        let level = match *name {
            FLOATING_POINT | ADVANCED_SIMD => (field + 1) & 0xf,
            _ => field,
        };
        Feature { name, level }
    })
}

fn id(register: &IdRegister) -> RegisterId {
    RegisterId::system(3, 0, 0, register.crm, register.op2)
}

fn saved_value(state: &VcpuState, id: RegisterId) -> Option<u64> {
    let register = state.registers.iter().find(|register| register.id == id)?;
    Some(u64::from_le_bytes(
        register.value.as_slice().try_into().ok()?,
    ))
}

/// What a saved CPU has.
pub fn features_of(state: &VcpuState) -> Vec<Feature> {
    let of_register = |register| Some(features(register, saved_value(state, id(register))?));
    let all = ID_REGISTERS.iter().filter_map(of_register).flatten();
    all.filter(|feature| feature.level != 0).collect()
}

/// The ID registers of a vCPU: what a guest sees of its CPU, and no more of its state.
///
/// # Errors
/// The host does not tell a register.
pub fn identity(vcpu: &impl Vcpu) -> engine::Result<VcpuState> {
    let known = vcpu.registers()?;
    let read = |id| {
        let value = vcpu.register_u64(id)?.to_le_bytes().into();
        Ok(RegisterValue { id, value })
    };
    let ids = ID_REGISTERS.iter().map(id).filter(|id| known.contains(id));
    Ok(VcpuState {
        registers: ids.map(read).collect::<engine::Result<_>>()?,
        power: PowerState::On,
        serror: PendingSError::default(),
    })
}

/// Hides from a new guest that its CPU can wait with a time limit (FEAT_WFxT), where the CPU is an emulator's.
///
/// QEMU 10 does not tell the hypervisor which register holds the limit of a WFIT that it traps, and KVM then takes it for a WFI
/// (`kvm_handle_wfx` in Linux' `arch/arm64/kvm/handle_exit.c`). Linux delays by WFIT where it can, also in a timer's interrupt: then
/// nothing wakes that vCPU any more.
///
/// # Errors
/// A register cannot be read. A host that cannot hide it (Linux before 6.7) is warned of.
pub fn hide_timed_waits(vcpus: &[impl Vcpu]) -> engine::Result<()> {
    let Some(boot_cpu) = vcpus.first() else {
        return Ok(());
    };
    let known = boot_cpu.registers()?;
    let ids = [RegisterId::MIDR_EL1, RegisterId::ID_AA64ISAR2_EL1];
    if !ids.iter().all(|id| known.contains(id)) {
        return Ok(());
    }
    let [midr, isar2] = ids.map(|id| boot_cpu.register_u64(id));
    if let Some(hidden) = without_timed_waits(midr?, isar2?) {
        let hide = |vcpu: &_| Vcpu::set_register_u64(vcpu, RegisterId::ID_AA64ISAR2_EL1, hidden);
        if let Err(e) = vcpus.iter().try_for_each(hide) {
            tracing::warn!(
                "the CPU is emulated, and KVM here cannot hide WFIT from the guest, which may stand still in one: {e}"
            );
        }
    }
    Ok(())
}

/// What ID_AA64ISAR2_EL1 is to be instead, if anything.
fn without_timed_waits(midr: u64, isar2: u64) -> Option<u64> {
    // MIDR_EL1.Implementer, bits 31:24: 0 is for software (Arm ARM D24.2.122).
    const IMPLEMENTER: u64 = 0xff << 24;
    const WFXT: u64 = 0xf;
    (midr & IMPLEMENTER == 0 && isar2 & WFXT != 0).then_some(isar2 & !WFXT)
}

/// What a saved CPU has and this one has not, or has less of.
pub fn missing(state: &VcpuState, here: &VcpuState) -> Vec<Feature> {
    let missing_of = |register| {
        let saved = saved_value(state, id(register))?;
        let own = saved_value(here, id(register)).unwrap_or(0);
        let both = features(register, saved).zip(features(register, own));
        Some(both.filter(|(saved, own)| saved.level > own.level))
    };
    let missing = ID_REGISTERS.iter().filter_map(missing_of).flatten();
    missing.map(|(saved, _)| saved).collect()
}

/// The MTE that a saved CPU has.
pub fn mte_of(state: &VcpuState) -> MteFeatures {
    let value = |id| saved_value(state, id).unwrap_or(0);
    MteFeatures::from_id_registers(
        value(RegisterId::ID_AA64PFR1_EL1),
        value(RegisterId::ID_AA64PFR2_EL1),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(registers: &[(u8, u8, u64)]) -> VcpuState {
        let registers = registers.iter().map(|(crm, op2, value)| RegisterValue {
            id: RegisterId::system(3, 0, 0, *crm, *op2),
            value: value.to_le_bytes().into(),
        });
        VcpuState {
            registers: registers.collect(),
            power: PowerState::On,
            serror: PendingSError::default(),
        }
    }

    #[test]
    fn features_are_told_by_name_and_those_that_are_not_there_are_not() {
        // PFR0: no floating point (15), Advanced SIMD with half precision (1), SVE; PFR1: MTE3.
        let state = state(&[(4, 0, 1 << 32 | 1 << 20 | 0xf << 16), (4, 1, 3 << 8)]);
        let names: Vec<String> = features_of(&state)
            .iter()
            .map(ToString::to_string)
            .collect();

        assert_eq!(names, ["Advanced SIMD (level 2)", "SVE", "MTE (level 3)"]);
    }

    #[test]
    fn what_is_missing_is_told_with_the_level_that_the_guest_has() {
        let saved = state(&[(4, 0, 1 << 32 | 0xf << 16), (4, 1, 3 << 8), (6, 0, 2 << 4)]);
        // PFR0: floating point, which the guest did without, and no SVE; PFR1: less MTE; no ISAR0 at all.
        let here = state(&[(4, 0, 0), (4, 1, 2 << 8)]);

        let missing = missing(&saved, &here);

        let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["SVE", "MTE (level 3)", "AES (level 2)"]);
    }

    #[test]
    fn waits_with_a_time_limit_are_hidden_on_emulated_cpus_alone() {
        // QEMU's `max`, and a Neoverse V2.
        let (emulated, neoverse) = (0x000f_0510, 0x410f_d4f0);
        let (wfxt, others) = (2, 0x1_2300);

        assert_eq!(without_timed_waits(emulated, wfxt | others), Some(others));
        assert_eq!(without_timed_waits(emulated, others), None);
        assert_eq!(without_timed_waits(neoverse, wfxt | others), None);
    }

    #[test]
    fn a_register_of_another_size_than_a_register_has_is_not_looked_at() {
        let mut state = state(&[(4, 1, 3 << 8)]);
        state.registers[0].value.truncate(3);

        assert_eq!(features_of(&state), []);
        assert_eq!(mte_of(&state), MteFeatures::NONE);
    }
}
