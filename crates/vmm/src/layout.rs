//! Where things stand in the guest's physical memory.
//!
//! | from | what |
//! |---|---|
//! | 0x0800_0000 | GIC distributor |
//! | 0x0900_0000 | serial port |
//! | 0x0901_0000 | real-time clock |
//! | 0x0902_0000 | generation ID, memory that the guest cannot write |
//! | 0x0a00_0000 | virtio-mmio devices, one page each |
//! | 0x1000_0000 | GIC redistributors, 128 KiB a vCPU |
//! | 0x4000_0000 | RAM, in one piece |
//!
//! The map is what a guest sees and therefore part of saved state: changing it is a change of format.

/// The page that this program reasons in. Hosts with larger pages need memory in their own multiples besides.
pub const PAGE_SIZE: u64 = 4096;

/// First byte of RAM.
pub const RAM_START: u64 = 0x4000_0000;
/// The GIC's distributor.
pub const GIC_DISTRIBUTOR: u64 = 0x0800_0000;
/// The GIC's redistributors.
pub const GIC_REDISTRIBUTORS: u64 = 0x1000_0000;
/// Most vCPUs whose redistributors fit below 0x2000_0000.
pub const MAX_VCPUS: u32 = 512;

/// The serial port, 16550A.
pub const SERIAL: u64 = 0x0900_0000;
/// The serial port's interrupt.
pub const SERIAL_SPI: u32 = 1;
/// The real-time clock, PL031.
pub const RTC: u64 = 0x0901_0000;
/// The generation ID. A page of the host's is there, and those have up to 64 KiB.
pub const GENERATION: u64 = 0x0902_0000;
/// The generation ID's interrupt.
pub const GENERATION_SPI: u32 = 2;
/// Bytes of a device's range.
pub const DEVICE_SIZE: u64 = 0x1000;

/// Most virtio devices.
pub const MAX_VIRTIO_DEVICES: u32 = 64;
/// The interrupt of the first virtio device; the others follow.
const FIRST_VIRTIO_SPI: u32 = 16;
/// Shared peripheral interrupts in use.
pub const SPIS: u32 = FIRST_VIRTIO_SPI + MAX_VIRTIO_DEVICES;

/// Interrupt of the secure EL1 physical timer. Named in the device tree, not used by a guest.
pub const SECURE_TIMER_PPI: u32 = 13;
/// Interrupt of the EL1 physical timer.
pub const PHYSICAL_TIMER_PPI: u32 = 14;
/// Interrupt of the virtual timer.
pub const VIRTUAL_TIMER_PPI: u32 = 11;
/// Interrupt of the EL2 physical timer.
pub const HYPERVISOR_TIMER_PPI: u32 = 10;
/// Interrupt of the PMU.
pub const PMU_PPI: u32 = 7;

/// Address of virtio device `index`, below [`MAX_VIRTIO_DEVICES`].
pub const fn virtio_device(index: u32) -> u64 {
    0x0a00_0000 + index as u64 * DEVICE_SIZE
}

/// Interrupt of virtio device `index`.
pub const fn virtio_spi(index: u32) -> u32 {
    FIRST_VIRTIO_SPI + index
}

/// Bits of guest-physical address for `ram_size` bytes of RAM: at least 32, which every host has.
pub fn ipa_bits(ram_size: u64) -> u8 {
    let last = RAM_START.saturating_add(ram_size).saturating_sub(1);
    (64 - last.leading_zeros() as u8).max(32)
}

/// The most RAM that fits guest-physical addresses of `ipa_bits` bits and one memslot
/// (2³¹ − 1 pages: `KVM_MEM_MAX_NR_PAGES` of the kernel).
pub fn max_ram(ipa_bits: u8) -> u64 {
    const MEMSLOT: u64 = ((1 << 31) - 1) * PAGE_SIZE;
    let addresses = 1u64.checked_shl(ipa_bits.into()).unwrap_or(u64::MAX);
    addresses.saturating_sub(RAM_START).min(MEMSLOT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_ram_ends_where_addresses_end_or_is_what_a_memslot_holds() {
        assert_eq!(max_ram(32), 3 << 30);
        assert_eq!(ipa_bits(max_ram(36)), 36);
        assert_eq!(max_ram(52), (8 << 40) - PAGE_SIZE);
    }

    #[test]
    fn ram_that_ends_at_four_gibibytes_needs_32_bits_and_one_page_more_needs_33() {
        let up_to_4_gib = (4 << 30) - RAM_START;
        assert_eq!(ipa_bits(up_to_4_gib), 32);
        assert_eq!(ipa_bits(up_to_4_gib + PAGE_SIZE), 33);
    }

    #[test]
    fn devices_and_redistributors_of_the_largest_machine_do_not_meet() {
        let virtio_end = virtio_device(MAX_VIRTIO_DEVICES);
        let redistributors_end =
            GIC_REDISTRIBUTORS + u64::from(MAX_VCPUS) * engine::GicLayout::REDISTRIBUTOR_SIZE;
        assert!(virtio_end <= GIC_REDISTRIBUTORS);
        assert!(redistributors_end <= RAM_START);
    }
}
