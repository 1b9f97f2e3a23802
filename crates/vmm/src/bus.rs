//! The devices' addresses: finds the device behind an MMIO exit.
//!
//! The map is fixed when the machine starts, so vCPUs look it up without a lock; each device locks
//! what it must.

use std::collections::BTreeMap;
use std::sync::Arc;

/// A device that answers at a range of guest-physical addresses.
///
/// Several vCPUs call it at once, and the guest chooses every offset, width and value. A device
/// answers nonsense with zeroes and ignores it otherwise.
pub trait MmioDevice: Send + Sync {
    /// Reads `data.len()` bytes, 1 to 8, at `offset`. `data` comes zeroed.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes 1 to 8 bytes at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

struct Range {
    size: u64,
    device: Arc<dyn MmioDevice>,
}

/// All devices by address.
#[derive(Default)]
pub struct Bus {
    ranges: BTreeMap<u64, Range>,
}

impl Bus {
    /// Puts a device at `address`. Ranges are the machine's own constants and never overlap.
    pub fn add(&mut self, address: u64, size: u64, device: Arc<dyn MmioDevice>) {
        let end = address + size;
        let overlaps = self
            .ranges
            .range(..end)
            .next_back()
            .is_some_and(|(start, range)| start + range.size > address);
        assert!(!overlaps, "two devices at {address:#x}");
        self.ranges.insert(address, Range { size, device });
    }

    /// Reads from the device at `address`. Where there is none, and across a device's end, zeroes are read.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => tracing::debug!(
                "guest read {} bytes at {address:#x}, where no device is",
                data.len()
            ),
        }
    }

    /// Writes to the device at `address`. Where there is none, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => tracing::debug!(
                "guest wrote {} bytes at {address:#x}, where no device is",
                data.len()
            ),
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(&dyn MmioDevice, u64)> {
        let (start, range) = self.ranges.range(..=address).next_back()?;
        let offset = address - start;
        let end = offset.checked_add(length as u64)?;
        (end <= range.size).then_some((&*range.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Remembers the last access.
    #[derive(Default)]
    struct Witness {
        written: Mutex<Option<(u64, Vec<u8>)>>,
    }

    impl Witness {
        fn written(&self) -> Option<(u64, Vec<u8>)> {
            self.written.lock().unwrap().clone()
        }
    }

    impl MmioDevice for Witness {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            *self.written.lock().unwrap() = Some((offset, data.to_vec()));
        }
    }

    fn bus_with_witness() -> (Bus, Arc<Witness>) {
        let witness = Arc::new(Witness::default());
        let mut bus = Bus::default();
        bus.add(0x1000, 0x100, witness.clone());
        (bus, witness)
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let (bus, witness) = bus_with_witness();
        let mut data = [0; 4];

        bus.read(0x1008, &mut data);
        bus.write(0x1010, &[1, 2]);

        assert_eq!(data, [8; 4]);
        assert_eq!(witness.written(), Some((0x10, vec![1, 2])));
    }

    #[test]
    fn an_access_where_no_device_is_reads_zeroes_and_writes_nothing() {
        let (bus, witness) = bus_with_witness();
        let mut data = [0xff; 8];

        bus.read(0x2000, &mut data);
        bus.write(u64::MAX - 3, &[1; 8]);
        bus.write(0xfff, &[1]);

        assert_eq!(data, [0; 8]);
        assert_eq!(witness.written(), None);
    }

    #[test]
    fn an_access_across_the_end_of_a_device_does_not_reach_it() {
        let (bus, witness) = bus_with_witness();

        bus.write(0x10fc, &[1; 8]);

        assert_eq!(witness.written(), None);
    }

    #[test]
    #[should_panic(expected = "two devices at 0x10ff")]
    fn two_devices_cannot_stand_at_one_address() {
        let (mut bus, witness) = bus_with_witness();
        bus.add(0x10ff, 0x100, witness);
    }
}
