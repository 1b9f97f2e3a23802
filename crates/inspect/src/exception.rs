//! The last exception that a vCPU took to EL1, in words: what a guest that died has died of, if it was that.
//!
//! `ESR_EL1` says what it was, `FAR_EL1` for which address and `ELR_EL1` where (Arm ARM D24.2.45, D24.2.47, D1.3). They
//! stay until the next exception; an interrupt changes the last alone. Of a tag check fault, memory says the rest: which tag is there, and
//! around it.

use std::fmt;

use engine::{RegisterId, VcpuState};
use mte::{TagCheckFaultSyndrome, Tfsr, VaRange};

use crate::error::{Error, Result};
use crate::memory::TaggedMemory;
use crate::place::Place;
use crate::registers::{self, ESR_EL1, FAR_EL1, TFSR_EL1, TFSRE0_EL1, must_have};
use crate::walk::{Regime, Walker};

/// What a vCPU's registers say of the last exception that it took to EL1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Where the vCPU stands.
    pub pc: u64,
    /// PSTATE.
    pub pstate: u64,
    /// `ESR_EL1`.
    pub syndrome: u64,
    /// `FAR_EL1`.
    pub address: u64,
    /// `ELR_EL1`.
    pub at: u64,
    /// `TFSR_EL1` and `TFSRE0_EL1`, of a vCPU with MTE.
    pub asynchronous: [Tfsr; 2],
}

/// What sort of exception a syndrome names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A synchronous tag check fault.
    TagCheck {
        /// The access was a write.
        write: bool,
    },
    /// Another abort of a load or store.
    Data {
        /// The access was a write.
        write: bool,
        /// The status code.
        status: u8,
    },
    /// An instruction could not be fetched.
    Fetch {
        /// The status code.
        status: u8,
    },
    /// A `BRK` with its number.
    Breakpoint(u16),
    /// A system call, which is no fault.
    Call,
    /// There was none: the register holds what no exception leaves in it.
    None,
    /// Anything else: its class.
    Other(u8),
}

impl Kind {
    /// What an `ESR_EL1` says.
    pub const fn of(syndrome: u64) -> Self {
        // These bits are 0 in all that a CPU writes. KVM begins a vCPU with others.
        if syndrome >> 56 != 0 {
            return Self::None;
        }
        if let Some(fault) = TagCheckFaultSyndrome::from_esr(syndrome) {
            return Self::TagCheck { write: fault.write };
        }
        let status = (syndrome & 0x3f) as u8;
        match class(syndrome) {
            0x24 | 0x25 => Self::Data {
                write: syndrome >> 6 & 1 != 0,
                status,
            },
            0x20 | 0x21 => Self::Fetch { status },
            0x3c => Self::Breakpoint(syndrome as u16),
            0x15 => Self::Call,
            other => Self::Other(other),
        }
    }

    /// Whether `FAR_EL1` means anything for it.
    const fn has_address(self) -> bool {
        matches!(
            self,
            Self::TagCheck { .. } | Self::Data { .. } | Self::Fetch { .. } | Self::Other(0x22)
        )
    }
}

const fn class(syndrome: u64) -> u8 {
    (syndrome >> 26 & 0x3f) as u8
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = |write: bool| if write { "a write" } else { "a read" };
        match self {
            Self::TagCheck { write } => write!(
                f,
                "a tag check fault: {} by a pointer whose tag is not that of the memory",
                access(*write)
            ),
            Self::Data { write, status } => {
                write!(f, "{} that was aborted: {}", access(*write), abort(*status))
            }
            Self::Fetch { status } => {
                write!(
                    f,
                    "an instruction that could not be fetched: {}",
                    abort(*status)
                )
            }
            Self::Breakpoint(0x800) => f.write_str("BRK 0x800, Linux's BUG or WARN"),
            Self::Breakpoint(number @ 0x900..=0x9ff) => write!(
                f,
                "BRK {number:#x}, a report of Linux's KASAN with tags that software checks; x0 has the address"
            ),
            Self::Breakpoint(number) => write!(f, "BRK {number:#x}"),
            Self::Call => f.write_str("a system call"),
            Self::None => f.write_str("none"),
            Self::Other(class) => match class_in_words(*class) {
                Some(words) => f.write_str(words),
                None => write!(f, "an exception of class {class:#x}"),
            },
        }
    }
}

/// Arm ARM, ESR_EL1.EC.
const fn class_in_words(class: u8) -> Option<&'static str> {
    Some(match class {
        0x00 => "an undefined instruction, or one whose cause is not known",
        0x07 => "an access to registers of SIMD, SVE or floating point that is off",
        0x0d => "a branch to where none may go (BTI)",
        0x0e => "an illegal execution state",
        0x18 => "a system register or instruction that was trapped",
        0x19 => "an access to SVE that is off",
        0x1c => "a pointer whose authentication failed",
        0x22 => "a PC that is not aligned",
        0x26 => "an SP that is not aligned",
        0x27 => "a memory copy or set instruction that was begun on another CPU",
        0x2f => "an SError",
        0x30 | 0x31 => "a hardware breakpoint",
        0x32 | 0x33 => "a single step",
        0x34 | 0x35 => "a watchpoint",
        _ => return None,
    })
}

/// Arm ARM, ESR_EL1.ISS, DFSC and IFSC.
const fn abort(status: u8) -> &'static str {
    match status {
        0x00..=0x03 => "its address does not fit (address size fault)",
        0x04..=0x07 => "nothing is mapped there (translation fault)",
        0x08..=0x0b => "its page was not yet accessed (access flag fault)",
        0x0c..=0x0f => "its page does not allow it (permission fault)",
        0x10 => "there is no memory and no device (external abort)",
        0x13..=0x17 => "there is no memory for its translation table (external abort)",
        0x21 => "it is not aligned",
        0x30 => "two translations at once (TLB conflict)",
        0x35 => "an exclusive or atomic access where there can be none",
        _ => "an abort that is not known here",
    }
}

/// The faults that a `TFSR` has: none if it was never written, and so has what KVM begins it with.
fn tag_faults(vcpu: &VcpuState, id: RegisterId) -> Tfsr {
    let bits = registers::value(vcpu, id).unwrap_or(0);
    Tfsr::from_bits(if bits <= 0b11 { bits } else { 0 })
}

impl Exception {
    /// What the registers of a vCPU say.
    ///
    /// # Errors
    /// [`Error::NoRegister`].
    pub fn of(vcpu: &VcpuState) -> Result<Self> {
        let asynchronous = [TFSR_EL1, TFSRE0_EL1];
        Ok(Self {
            pc: must_have(vcpu, RegisterId::PC, "PC")?,
            pstate: must_have(vcpu, RegisterId::PSTATE, "PSTATE")?,
            syndrome: must_have(vcpu, ESR_EL1, "ESR_EL1")?,
            address: must_have(vcpu, FAR_EL1, "FAR_EL1")?,
            at: must_have(vcpu, RegisterId::ELR_EL1, "ELR_EL1")?,
            asynchronous: asynchronous.map(|id| tag_faults(vcpu, id)),
        })
    }

    /// Where the vCPU stands, in words.
    pub(crate) fn stand(&self) -> String {
        format!("{:#x} in EL{}", self.pc, self.pstate >> 2 & 3)
    }

    /// What it was.
    pub const fn kind(&self) -> Kind {
        Kind::of(self.syndrome)
    }

    /// Whether it was taken from EL0.
    pub(crate) const fn is_from_below(&self) -> bool {
        matches!(
            class(self.syndrome),
            0x24 | 0x20 | 0x15 | 0x30 | 0x32 | 0x34
        )
    }

    /// Whether a tag did not match: synchronously, or at some time before.
    pub const fn is_tag_check(&self) -> bool {
        matches!(self.kind(), Kind::TagCheck { .. })
            || (self.asynchronous[0].bits() | self.asynchronous[1].bits()) & 0b11 != 0
    }
}

/// What the last exception of a vCPU was, with what memory says of it.
#[derive(Debug)]
pub struct Report {
    vcpu: usize,
    exception: Exception,
    /// Where its address is, if it has one; or why that is not known.
    place: Option<Result<Place>>,
}

impl Report {
    /// Of vCPU `number`.
    ///
    /// # Errors
    /// [`Error::NoVcpu`]; [`Error::NoRegister`].
    pub fn of(memory: &mut dyn TaggedMemory, number: usize) -> Result<Self> {
        let known = memory.vcpus().len();
        let vcpu = memory.vcpus().get(number).ok_or(Error::NoVcpu {
            wanted: number,
            known,
        })?;
        let exception = Exception::of(vcpu)?;
        let walker = Regime::of(vcpu).map(Walker::new);
        let has_address = exception.kind().has_address();
        let place = has_address.then(|| Place::of(memory, Some(walker?), exception.address));
        Ok(Self {
            vcpu: number,
            exception,
            place,
        })
    }

    /// What the registers say.
    pub const fn exception(&self) -> &Exception {
        &self.exception
    }
}

/// Lines, the last without an end.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exception = &self.exception;
        let below = if exception.is_from_below() {
            "EL0"
        } else {
            "EL1"
        };
        write!(
            f,
            "vCPU {} stands at {}; its last exception was {}\nESR_EL1 {:#x}",
            self.vcpu,
            exception.stand(),
            exception.kind(),
            exception.syndrome,
        )?;
        match exception.kind() {
            Kind::Call | Kind::None => {}
            // Programs have the lower half of addresses.
            _ if exception.is_from_below()
                && VaRange::of_address(exception.at) == VaRange::Upper =>
            {
                f.write_str(", from EL0; ELR_EL1 is of an interrupt that came since")?;
            }
            _ => write!(
                f,
                ", from {below} at {:#x} unless an interrupt came since (ELR_EL1)",
                exception.at
            )?,
        }
        match &self.place {
            None => {}
            Some(Ok(place)) => write!(f, "\n{place}")?,
            Some(Err(error)) => write!(f, "\nFAR_EL1 {:#018x}: {error}", exception.address)?,
        }
        for (register, value) in ["TFSR_EL1", "TFSRE0_EL1"]
            .iter()
            .zip(exception.asynchronous)
        {
            for range in [VaRange::Lower, VaRange::Upper] {
                let half = match range {
                    VaRange::Lower => "lower",
                    VaRange::Upper => "upper",
                };
                if value.faulted(range) {
                    write!(
                        f,
                        "\n{register}: an access to the {half} half of addresses did not match its tag, which is told later"
                    )?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_check_fault_is_told_from_other_aborts() {
        assert_eq!(Kind::of(0x9200_0051), Kind::TagCheck { write: true });
        assert_eq!(Kind::of(0x9600_0011), Kind::TagCheck { write: false });
        let translation = Kind::of(0x9600_0006);
        assert_eq!(
            translation.to_string(),
            "a read that was aborted: nothing is mapped there (translation fault)"
        );
        assert_eq!(Kind::of(0x8600_0010), Kind::Fetch { status: 0x10 });
    }

    #[test]
    fn breakpoints_of_linux_are_named() {
        assert_eq!(
            Kind::of(0xf200_0800).to_string(),
            "BRK 0x800, Linux's BUG or WARN"
        );
        assert!(Kind::of(0xf200_0932).to_string().contains("KASAN"));
        assert_eq!(Kind::of(0xf200_0001).to_string(), "BRK 0x1");
    }

    #[test]
    fn what_kvm_begins_a_vcpu_with_is_no_exception() {
        assert_eq!(Kind::of(0x1de7_ec7e_dbad_c0de), Kind::None);
    }

    #[test]
    fn every_syndrome_has_words() {
        for class in 0..64_u64 {
            for status in 0..64 {
                assert!(!Kind::of(class << 26 | status).to_string().is_empty());
            }
        }
    }
}
