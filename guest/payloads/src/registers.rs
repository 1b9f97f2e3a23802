//! System registers by name, and device registers by address.

use core::arch::asm;
use core::fmt;

/// Reads a system register: `read_register!("mpidr_el1")`. One that the vCPU does not have raises an exception, which is
/// reported and ends the payload, or is expected by [`exceptions::attempt`](crate::exceptions::attempt).
#[macro_export]
macro_rules! read_register {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: reading a register changes neither memory nor the flow of control.
        unsafe { core::arch::asm!(concat!("mrs {value}, ", $name), value = out(reg) value, options(nostack)) };
        value
    }};
}

/// Writes a system register and waits until that has taken effect.
#[macro_export]
macro_rules! write_register {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: payloads write the registers of tag checks, tag generation, timer and interrupts alone; none of them
        // changes what the addresses that Rust code uses mean.
        unsafe { core::arch::asm!(concat!("msr ", $name, ", {value}\nisb"), value = in(reg) value, options(nostack)) };
    }};
}

/// The four registers that MTE gives a vCPU ([`mte::SWITCHED_REGISTERS`]), named by their encodings, which every
/// assembler takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagRegister {
    /// RGSR_EL1.
    Seed,
    /// GCR_EL1.
    Control,
    /// TFSR_EL1.
    FaultStatus,
    /// TFSRE0_EL1.
    FaultStatusEl0,
}

impl TagRegister {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Seed,
        Self::Control,
        Self::FaultStatus,
        Self::FaultStatusEl0,
    ];

    /// The bits that software can set and that read back as written, whatever GCR_EL1.RRND is.
    pub const fn writable(self) -> u64 {
        match self {
            Self::Seed => 0x00ff_ff0f,
            Self::Control => 0x1_ffff,
            Self::FaultStatus | Self::FaultStatusEl0 => 0b11,
        }
    }

    /// Reads it.
    pub fn read(self) -> u64 {
        match self {
            Self::Seed => read_register!("S3_0_C1_C0_5"),
            Self::Control => read_register!("S3_0_C1_C0_6"),
            Self::FaultStatus => read_register!("S3_0_C5_C6_0"),
            Self::FaultStatusEl0 => read_register!("S3_0_C5_C6_1"),
        }
    }

    /// Writes it.
    pub fn write(self, value: u64) {
        match self {
            Self::Seed => write_register!("S3_0_C1_C0_5", value),
            Self::Control => write_register!("S3_0_C1_C0_6", value),
            Self::FaultStatus => write_register!("S3_0_C5_C6_0", value),
            Self::FaultStatusEl0 => write_register!("S3_0_C5_C6_1", value),
        }
    }
}

/// Its architectural name.
impl fmt::Display for TagRegister {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Seed => "RGSR_EL1",
            Self::Control => "GCR_EL1",
            Self::FaultStatus => "TFSR_EL1",
            Self::FaultStatusEl0 => "TFSRE0_EL1",
        })
    }
}

/// Defines a read and a write of a device register of one width, each with a single plain load or store: the only forms
/// for which the hardware tells a hypervisor what was accessed.
macro_rules! device_access {
    ($read:ident, $write:ident, $type:ty, $load:literal, $store:literal) => {
        /// Reads a device's register.
        pub fn $read(address: u64) -> $type {
            let value: u64;
            // SAFETY: the address is one of a device's registers, by the device tree; it is mapped as Device memory,
            // where no Rust object lies.
            unsafe { asm!($load, value = out(reg) value, address = in(reg) address, options(nostack)) };
            value as $type
        }

        /// Writes a device's register.
        pub fn $write(address: u64, value: $type) {
            // SAFETY: as for the read; what the device does on a write is what the caller wants of it.
            unsafe { asm!($store, value = in(reg) u64::from(value), address = in(reg) address, options(nostack)) };
        }
    };
}

device_access!(
    read_device_u8,
    write_device_u8,
    u8,
    "ldrb {value:w}, [{address}]",
    "strb {value:w}, [{address}]"
);
device_access!(
    read_device_u32,
    write_device_u32,
    u32,
    "ldr {value:w}, [{address}]",
    "str {value:w}, [{address}]"
);
device_access!(
    read_device_u64,
    write_device_u64,
    u64,
    "ldr {value}, [{address}]",
    "str {value}, [{address}]"
);
