//! What a vCPU and the interrupt controller are between two instructions: for a snapshot, or the other end of a migration.
//!
//! Registers go by KVM's stable names ([`RegisterId`]); the four of MTE are among them. A vCPU that takes up a state must
//! be made like the one that gave it. Each register that differs is written, and one that the host does not take is an
//! error that names it: so a guest never goes on with a CPU other than its own.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{Error, RegisterId, Result, Vcpu};

/// Longer than any register: an SVE vector of 2048 bits.
const MAX_REGISTER_SIZE: usize = 256;

/// Whether a vCPU runs at all (PSCI).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerState {
    /// It runs its guest when it is let.
    On,
    /// It waits for `CPU_ON`.
    Off,
    /// It waits for `SYSTEM_RESUME`.
    Suspended,
}

/// An SError that waits to be taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingSError {
    /// There is one.
    pub pending: bool,
    /// Its syndrome, on CPUs that let one be given (FEAT_RAS).
    pub syndrome: Option<u64>,
}

/// A register and its value, little-endian, as long as its name says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterValue {
    /// Which.
    pub id: RegisterId,
    /// What it holds.
    #[serde(with = "hexadecimal")]
    pub value: Vec<u8>,
}

/// A vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// All registers that the host names as state, in its order.
    pub registers: Vec<RegisterValue>,
    /// Whether it runs at all.
    pub power: PowerState,
    /// What it has yet to take.
    pub serror: PendingSError,
}

impl VcpuState {
    /// The state of a vCPU, which is whole: its last exit was [`crate::Exit::Interrupted`], or it never ran.
    ///
    /// # Errors
    /// The host does not tell a register.
    pub fn of(vcpu: &impl Vcpu) -> Result<Self> {
        let read = |id: RegisterId| {
            let mut value = vec![0; id.size()];
            vcpu.register(id, &mut value)?;
            Ok(RegisterValue { id, value })
        };
        Ok(Self {
            registers: vcpu
                .registers()?
                .into_iter()
                .map(read)
                .collect::<Result<_>>()?,
            power: vcpu.power_state()?,
            serror: vcpu.pending_serror()?,
        })
    }

    /// Gives a vCPU this state.
    ///
    /// # Errors
    /// [`Error::ForeignRegister`] if it lacks a register of the state, has one more, or does not take a value.
    pub fn apply(&self, vcpu: &impl Vcpu) -> Result<()> {
        // A guest stands still meanwhile, and there are hundreds of each.
        let own: BTreeSet<_> = vcpu.registers()?.into_iter().collect();
        let saved: BTreeSet<_> = self.registers.iter().map(|register| register.id).collect();
        if let Some(missing) = own.difference(&saved).next() {
            return Err(Error::ForeignRegister {
                id: *missing,
                why: "the saved CPU did not have it, this host's has".into(),
            });
        }
        for register in &self.registers {
            if !own.contains(&register.id) {
                return Err(Error::ForeignRegister {
                    id: register.id,
                    why: "this host's CPU does not have it".into(),
                });
            }
            register.apply(vcpu)?;
        }
        vcpu.set_pending_serror(self.serror)?;
        vcpu.set_power_state(self.power)
    }
}

impl RegisterValue {
    /// Writes it unless it is there: hosts refuse to write what cannot change.
    fn apply(&self, vcpu: &impl Vcpu) -> Result<()> {
        let (id, size) = (self.id, self.id.size());
        if size > MAX_REGISTER_SIZE || self.value.len() != size {
            return Err(Error::ForeignRegister {
                id,
                why: format!("its saved value has {} bytes", self.value.len()),
            });
        }
        let mut here = [0; MAX_REGISTER_SIZE];
        let here = &mut here[..size];
        vcpu.register(id, here)?;
        if *here == *self.value {
            return Ok(());
        }
        vcpu.set_register(id, &self.value)
            .map_err(|e| Error::ForeignRegister {
                id,
                why: format!(
                    "the guest's has {:x?}, this host's {here:x?}, and cannot be changed: {e}",
                    self.value
                ),
            })
    }
}

/// The interrupt controller: its registers, by parts, in an order in which they can be written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GicState {
    /// Registers with their values.
    pub registers: Vec<(GicRegister, u64)>,
}

/// A register of the interrupt controller (Arm IHI 0069, chapter 12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GicRegister {
    /// Of the distributor, by its offset.
    Distributor(u32),
    /// Of a vCPU's redistributor, by the vCPU's affinity (`Aff3.Aff2.Aff1.Aff0`, a byte each) and the register's offset.
    Redistributor(u32, u32),
    /// A system register of a vCPU's interface, by affinity and encoding.
    CpuInterface(u32, u32),
    /// The input lines of 32 interrupts from this number on; those below 32 are a vCPU's own, by its affinity.
    Lines(u32, u32),
}

/// Bytes as two digits each: there are hundreds of registers, a guest stands still while they are read, and a list of numbers takes
/// three times as long. Such lists, which were written before, are read too.
mod hexadecimal {
    use std::fmt;

    use data_encoding::HEXLOWER;
    use serde::de::{Error, SeqAccess, Visitor};
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&HEXLOWER.encode_display(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        deserializer.deserialize_any(Bytes)
    }

    struct Bytes;

    impl<'de> Visitor<'de> for Bytes {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a register's bytes, in lower-case hexadecimal")
        }

        fn visit_str<E: Error>(self, digits: &str) -> Result<Vec<u8>, E> {
            HEXLOWER.decode(digits.as_bytes()).map_err(E::custom)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut numbers: A) -> Result<Vec<u8>, A::Error> {
            let mut bytes = Vec::new();
            while let Some(byte) = numbers.next_element()? {
                bytes.push(byte);
            }
            Ok(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: &str) -> serde_json::Result<Vec<u8>> {
        let id = RegisterId::PC.to_kvm();
        let json = format!(r#"{{"id":{id},"value":{value}}}"#);
        serde_json::from_str::<RegisterValue>(&json).map(|register| register.value)
    }

    #[test]
    fn a_register_is_written_in_hexadecimal_and_read_again() {
        let register = RegisterValue {
            id: RegisterId::PC,
            value: vec![0, 0, 0xe0, 0x40, 0xff, 0, 0, 0],
        };

        let json = serde_json::to_string(&register).unwrap();

        assert!(json.contains(r#""0000e040ff000000""#), "{json}");
        let read: RegisterValue = serde_json::from_str(&json).unwrap();
        assert_eq!(read, register);
    }

    #[test]
    fn a_register_that_was_written_as_numbers_is_read() {
        assert_eq!(parse("[0,0,224,64]").unwrap(), [0, 0, 0xe0, 0x40]);
    }

    #[test]
    fn what_is_no_bytes_is_refused() {
        for value in [r#""0""#, r#""0g""#, r#""E0""#, "[256]", "[-1]", "7", "null"] {
            assert!(parse(value).is_err(), "{value}");
        }
    }
}
