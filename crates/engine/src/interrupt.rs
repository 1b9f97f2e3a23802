//! Interrupt numbers and the interrupt controller's place in the guest.

use std::fmt;

/// A shared peripheral interrupt, counted from 0 as in a device tree. The GIC's own number is 32 more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Spi(u32);

impl Spi {
    /// How many a GICv3 has.
    pub const COUNT: u32 = 988;

    /// The interrupt numbered `number`, below [`Spi::COUNT`].
    pub const fn new(number: u32) -> Option<Self> {
        if number < Self::COUNT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// Its number, from 0.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// Its interrupt ID in the GIC.
    pub const fn intid(self) -> u32 {
        self.0 + 32
    }
}

impl fmt::Display for Spi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SPI {}", self.0)
    }
}

/// A private peripheral interrupt of each vCPU, counted from 0 as in a device tree. The GIC's own number is 16 more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ppi(u32);

impl Ppi {
    /// How many each vCPU has.
    pub const COUNT: u32 = 16;

    /// The interrupt numbered `number`, below [`Ppi::COUNT`].
    pub const fn new(number: u32) -> Option<Self> {
        if number < Self::COUNT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// Its number, from 0.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// Its interrupt ID in the GIC.
    pub const fn intid(self) -> u32 {
        self.0 + 16
    }
}

/// Where the GICv3 stands in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GicLayout {
    /// Guest-physical address of the distributor, 64 KiB.
    pub distributor: u64,
    /// Guest-physical address of the redistributors, 128 KiB a vCPU, one behind the other.
    pub redistributors: u64,
    /// How many vCPUs it serves.
    pub vcpus: u32,
    /// How many shared peripheral interrupts the machine uses.
    pub spis: u32,
}

impl GicLayout {
    /// Bytes of the distributor's frame.
    pub const DISTRIBUTOR_SIZE: u64 = 0x1_0000;
    /// Bytes of one redistributor's two frames.
    pub const REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
}
