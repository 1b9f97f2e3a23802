//! The registers that gdb sees, by number, and the description by which it learns of them.
//!
//! Numbers 0 to 67 are gdb's own of AArch64 (`gdb/features/aarch64-core.xml`, `aarch64-fpu.xml`), 68 is `tag_ctl`, by which gdb knows that
//! memory has tags (`aarch64-mte.xml`), and from 69 on there are the system registers of EL1 that one wants to see.

use std::fmt::Write;

use engine::{RegisterId, Vcpu};

use crate::registers::{
    ESR_EL1, FAR_EL1, FPCR, FPSR, SCTLR_EL1, TCR_EL1, TFSR_EL1, TFSRE0_EL1, TTBR0_EL1, TTBR1_EL1,
    v, z,
};

/// The stack pointer in use.
const SP: usize = 31;
/// The program counter.
pub const PC: usize = 32;
const CPSR: usize = 33;
const V0: usize = 34;
const FPSR_NUMBER: usize = 66;
const FPCR_NUMBER: usize = 67;
const TAG_CTL: usize = 68;
const FIRST_SYSTEM: usize = 69;

/// How many registers a `g` packet has: the general and the vector registers.
pub const GENERAL: usize = FPCR_NUMBER + 1;

const GCR_EL1: RegisterId = RegisterId::system(3, 0, 1, 0, 6);

/// A system register of EL1 or EL0.
struct System {
    name: &'static str,
    id: RegisterId,
    /// Only guests with MTE have it.
    mte: bool,
}

const fn system(name: &'static str, id: RegisterId) -> System {
    System {
        name,
        id,
        mte: false,
    }
}

const fn tags(name: &'static str, id: RegisterId) -> System {
    System {
        name,
        id,
        mte: true,
    }
}

const SYSTEM: &[System] = &[
    system("SCTLR_EL1", SCTLR_EL1),
    system("TCR_EL1", TCR_EL1),
    system("TTBR0_EL1", TTBR0_EL1),
    system("TTBR1_EL1", TTBR1_EL1),
    system("MAIR_EL1", RegisterId::system(3, 0, 10, 2, 0)),
    system("VBAR_EL1", super::exception::VBAR_EL1),
    system("ESR_EL1", ESR_EL1),
    system("FAR_EL1", FAR_EL1),
    system("ELR_EL1", RegisterId::ELR_EL1),
    system("SPSR_EL1", RegisterId::SPSR_EL1),
    system("SP_EL0", RegisterId::SP),
    system("SP_EL1", RegisterId::SP_EL1),
    system("TPIDR_EL0", RegisterId::system(3, 3, 13, 0, 2)),
    system("TPIDRRO_EL0", RegisterId::system(3, 3, 13, 0, 3)),
    system("TPIDR_EL1", RegisterId::system(3, 0, 13, 0, 4)),
    system("CONTEXTIDR_EL1", RegisterId::system(3, 0, 13, 0, 1)),
    system("CPACR_EL1", RegisterId::system(3, 0, 1, 0, 2)),
    system("MPIDR_EL1", RegisterId::MPIDR_EL1),
    tags("GCR_EL1", GCR_EL1),
    tags("RGSR_EL1", RegisterId::system(3, 0, 1, 0, 5)),
    tags("TFSR_EL1", TFSR_EL1),
    tags("TFSRE0_EL1", TFSRE0_EL1),
];

/// A register by its number. There is none of a number that is too high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number(usize);

impl Number {
    pub fn new(number: usize) -> Option<Self> {
        (number < FIRST_SYSTEM + SYSTEM.len()).then_some(Self(number))
    }

    /// Its bytes.
    pub const fn size(self) -> usize {
        match self.0 {
            CPSR | FPSR_NUMBER | FPCR_NUMBER => 4,
            V0..FPSR_NUMBER => 16,
            _ => 8,
        }
    }

    /// Reads it into `value`, which has its size. `None` if the vCPU has none of it, or does not tell.
    pub fn read(self, vcpu: &impl Vcpu, value: &mut [u8]) -> Option<()> {
        match self.0 {
            V0..FPSR_NUMBER => {
                value.copy_from_slice(&vector(vcpu, self.0 - V0)?);
            }
            TAG_CTL => value.copy_from_slice(&tag_control(vcpu)?.to_le_bytes()),
            _ => {
                let mut whole = [0; 8];
                vcpu.register(self.id(vcpu)?, &mut whole).ok()?;
                value.copy_from_slice(&whole[..self.size()]);
            }
        }
        Some(())
    }

    /// Writes it from `value`, which has its size. `None` if the vCPU has none of it, or does not take that.
    pub fn write(self, vcpu: &impl Vcpu, value: &[u8]) -> Option<()> {
        if value.len() != self.size() {
            return None;
        }
        match self.0 {
            V0..FPSR_NUMBER => set_vector(vcpu, self.0 - V0, value.try_into().ok()?),
            TAG_CTL => None,
            _ => {
                let id = self.id(vcpu)?;
                let mut whole = [0; 8];
                whole[..value.len()].copy_from_slice(value);
                vcpu.set_register(id, &whole[..id.size()]).ok()
            }
        }
    }

    /// Its name with KVM.
    fn id(self, vcpu: &impl Vcpu) -> Option<RegisterId> {
        Some(match self.0 {
            number @ 0..SP => RegisterId::x(number as u8),
            SP if vcpu.register_u64(RegisterId::PSTATE).ok()? & 0xf == 0b0101 => RegisterId::SP_EL1,
            SP => RegisterId::SP,
            PC => RegisterId::PC,
            CPSR => RegisterId::PSTATE,
            FPSR_NUMBER => FPSR,
            FPCR_NUMBER => FPCR,
            number => SYSTEM.get(number.checked_sub(FIRST_SYSTEM)?)?.id,
        })
    }
}

const Z_SIZE: usize = 256;

fn vector(vcpu: &impl Vcpu, number: usize) -> Option<[u8; 16]> {
    let mut value = [0; 16];
    if vcpu.register(v(number), &mut value).is_ok() {
        return Some(value);
    }
    let mut whole = [0; Z_SIZE];
    vcpu.register(z(number), &mut whole).ok()?;
    whole.first_chunk().copied()
}

fn set_vector(vcpu: &impl Vcpu, number: usize, value: [u8; 16]) -> Option<()> {
    if vcpu.set_register(v(number), &value).is_ok() {
        return Some(());
    }
    let mut whole = [0; Z_SIZE];
    vcpu.register(z(number), &mut whole).ok()?;
    whole[..value.len()].copy_from_slice(&value);
    vcpu.set_register(z(number), &whole).ok()
}

/// What Linux would tell a program at EL0 of its tag checks (`PR_GET_TAGGED_ADDR_CTRL`), from `SCTLR_EL1.TCF0` and
/// `GCR_EL1.Exclude`. gdb shows it and wants it for nothing else.
fn tag_control(vcpu: &impl Vcpu) -> Option<u64> {
    let checks = vcpu.register_u64(SCTLR_EL1).ok()? >> 38 & 3;
    let excluded = vcpu.register_u64(GCR_EL1).ok()? & 0xffff;
    Some(1 | checks << 1 | (excluded ^ 0xffff) << 3)
}

/// The target's description in gdb's format (gdb's manual, "Target Descriptions").
pub fn description(has_tags: bool) -> String {
    let mut xml = String::from(BEGINNING);
    let mut number = 0;
    let mut add = |xml: &mut String, name: &str, bits: usize, kind: &str| {
        // A string takes all that is written to it.
        let _ = writeln!(
            xml,
            r#"<reg name="{name}" bitsize="{bits}" type="{kind}" regnum="{number}"/>"#
        );
        number += 1;
    };
    xml.push_str(r#"<feature name="org.gnu.gdb.aarch64.core">"#);
    for x in 0..SP {
        add(&mut xml, &format!("x{x}"), 64, "int");
    }
    add(&mut xml, "sp", 64, "data_ptr");
    add(&mut xml, "pc", 64, "code_ptr");
    add(&mut xml, "cpsr", 32, "int");
    xml.push_str("</feature>\n");
    xml.push_str(VECTORS);
    for v in 0..32 {
        add(&mut xml, &format!("v{v}"), 128, "aarch64v");
    }
    add(&mut xml, "fpsr", 32, "int");
    add(&mut xml, "fpcr", 32, "int");
    xml.push_str("</feature>\n");
    if has_tags {
        xml.push_str(r#"<feature name="org.gnu.gdb.aarch64.mte">"#);
        xml.push_str(r#"<reg name="tag_ctl" bitsize="64" type="uint64" group="system" regnum="68" save-restore="no"/>"#);
        xml.push_str("</feature>\n");
    }
    xml.push_str(r#"<feature name="org.tagvisor.aarch64.system">"#);
    for (place, register) in SYSTEM.iter().enumerate() {
        if !register.mte || has_tags {
            let _ = writeln!(
                xml,
                r#"<reg name="{}" bitsize="64" type="uint64" group="system" regnum="{}" save-restore="no"/>"#,
                register.name,
                FIRST_SYSTEM + place
            );
        }
    }
    xml.push_str("</feature></target>\n");
    xml
}

const BEGINNING: &str = r#"<?xml version="1.0"?>
<!DOCTYPE target SYSTEM "gdb-target.dtd">
<target version="1.0"><architecture>aarch64</architecture>
"#;

/// A vector register's views: of doubles, of singles, of integers of each size.
const VECTORS: &str = r#"<feature name="org.gnu.gdb.aarch64.fpu">
<vector id="v2d" type="ieee_double" count="2"/>
<vector id="v2u" type="uint64" count="2"/>
<vector id="v2i" type="int64" count="2"/>
<vector id="v4f" type="ieee_single" count="4"/>
<vector id="v4u" type="uint32" count="4"/>
<vector id="v4i" type="int32" count="4"/>
<vector id="v8f" type="ieee_half" count="8"/>
<vector id="v8u" type="uint16" count="8"/>
<vector id="v8i" type="int16" count="8"/>
<vector id="v16u" type="uint8" count="16"/>
<vector id="v16i" type="int8" count="16"/>
<vector id="v1u" type="uint128" count="1"/>
<vector id="v1i" type="int128" count="1"/>
<union id="vnd"><field name="f" type="v2d"/><field name="u" type="v2u"/><field name="s" type="v2i"/></union>
<union id="vns"><field name="f" type="v4f"/><field name="u" type="v4u"/><field name="s" type="v4i"/></union>
<union id="vnh"><field name="f" type="v8f"/><field name="u" type="v8u"/><field name="s" type="v8i"/></union>
<union id="vnb"><field name="u" type="v16u"/><field name="s" type="v16i"/></union>
<union id="vnq"><field name="u" type="v1u"/><field name="s" type="v1i"/></union>
<union id="aarch64v"><field name="d" type="vnd"/><field name="s" type="vns"/><field name="h" type="vnh"/><field name="b" type="vnb"/><field name="q" type="vnq"/></union>
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_without_mte_has_no_registers_of_it() {
        let (with, without) = (description(true), description(false));

        assert!(with.contains("org.gnu.gdb.aarch64.mte") && with.contains("\"GCR_EL1\""));
        assert!(!without.contains("aarch64.mte") && !without.contains("GCR_EL1"));
    }

    #[test]
    fn numbers_in_the_description_are_those_of_the_protocol() {
        let xml = description(true);

        for wanted in [
            r#"name="x30" bitsize="64" type="int" regnum="30""#,
            r#"name="pc" bitsize="64" type="code_ptr" regnum="32""#,
            r#"name="v31" bitsize="128" type="aarch64v" regnum="65""#,
            r#"name="fpcr" bitsize="32" type="int" regnum="67""#,
            r#"name="SCTLR_EL1" bitsize="64" type="uint64" group="system" regnum="69""#,
        ] {
            assert!(xml.contains(wanted), "{wanted}");
        }
    }

    #[test]
    fn there_are_as_many_registers_as_there_are_names() {
        let last = FIRST_SYSTEM + SYSTEM.len() - 1;

        assert!(Number::new(last).is_some());
        assert!(Number::new(last + 1).is_none());
    }
}
