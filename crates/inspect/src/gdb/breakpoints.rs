//! Where a debugger wants the guest to stop: BRK instructions that it puts into the guest's memory, and registers.

use std::ops::Range;

use engine::{DebugRegister, DebugRegisters, Watch};

/// `BRK #0`.
pub const BRK: [u8; 4] = 0xd420_0000_u32.to_le_bytes();

/// Most BRK instructions at once.
const MOST_PLANTED: usize = 4096;

/// A BRK instruction in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planted {
    /// As the client calls the place.
    pub address: u64,
    /// Where it is.
    pub physical: u64,
    /// What the guest has there.
    pub original: [u8; 4],
}

/// A watchpoint register and what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watched {
    pub address: u64,
    pub length: u64,
    pub watch: Watch,
    pub register: DebugRegister,
}

/// All of them.
#[derive(Default)]
pub struct Breakpoints {
    planted: Vec<Planted>,
    registers: Vec<DebugRegister>,
    watched: Vec<Watched>,
}

impl Breakpoints {
    /// Whether one more BRK instruction may be planted.
    pub fn has_room(&self) -> bool {
        self.planted.len() < MOST_PLANTED
    }

    pub fn planted(&self) -> &[Planted] {
        &self.planted
    }

    pub fn plant(&mut self, planted: Planted) {
        self.planted.push(planted);
    }

    /// Forgets the instruction that the client calls so.
    pub fn dig_up(&mut self, address: u64) -> Option<Planted> {
        let at = self
            .planted
            .iter()
            .position(|planted| planted.address == address)?;
        Some(self.planted.swap_remove(at))
    }

    /// Whether there is one at a physical address.
    pub fn is_planted_at(&self, physical: u64) -> bool {
        self.planted
            .iter()
            .any(|planted| planted.physical == physical)
    }

    /// Puts what the guest has in the place of the planted instructions in `data`, which was read from `physical` on.
    pub fn hide(&self, physical: u64, data: &mut [u8]) {
        for planted in &self.planted {
            let (theirs, here) = overlap(physical, data.len(), planted);
            data[here].copy_from_slice(&planted.original[theirs]);
        }
    }

    /// Takes note of what the guest is to have in the place of the planted instructions, and puts these into `data`, which is to be
    /// written from `physical` on.
    pub fn keep(&mut self, physical: u64, data: &mut [u8]) {
        for planted in &mut self.planted {
            let (theirs, here) = overlap(physical, data.len(), planted);
            planted.original[theirs.clone()].copy_from_slice(&data[here.clone()]);
            data[here].copy_from_slice(&BRK[theirs]);
        }
    }

    /// Whether there was room.
    pub fn add_register(&mut self, address: u64, available: DebugRegisters) -> bool {
        let has_room = self.registers.len() < available.breakpoints;
        if has_room {
            self.registers.push(DebugRegister::breakpoint(address));
        }
        has_room
    }

    /// Whether it was there.
    pub fn remove_register(&mut self, address: u64) -> bool {
        let wanted = DebugRegister::breakpoint(address);
        let at = self
            .registers
            .iter()
            .position(|register| *register == wanted);
        at.map(|at| self.registers.swap_remove(at)).is_some()
    }

    /// Whether there was room, and one register can watch that.
    pub fn watch(
        &mut self,
        address: u64,
        length: u64,
        watch: Watch,
        available: DebugRegisters,
    ) -> bool {
        if self.watched.len() >= available.watchpoints {
            return false;
        }
        let Some(register) = DebugRegister::watchpoint(address, length, watch) else {
            return false;
        };
        self.watched.push(Watched {
            address,
            length,
            watch,
            register,
        });
        true
    }

    /// Whether it was there.
    pub fn unwatch(&mut self, address: u64, length: u64, watch: Watch) -> bool {
        let at = self.watched.iter().position(|watched| {
            (watched.address, watched.length, watched.watch) == (address, length, watch)
        });
        at.map(|at| self.watched.swap_remove(at)).is_some()
    }

    pub fn registers(&self) -> Vec<DebugRegister> {
        self.registers.clone()
    }

    pub fn watchpoint_registers(&self) -> Vec<DebugRegister> {
        self.watched
            .iter()
            .map(|watched| watched.register)
            .collect()
    }

    /// The watchpoint that an access at `address` hit: what it covers, or, as an access can begin before it, the nearest one.
    pub fn watched_at(&self, address: u64) -> Option<(Watched, u64)> {
        let distance = |watched: &Watched| {
            let last = watched.address + (watched.length - 1);
            match address {
                before if before < watched.address => watched.address - before,
                behind if behind > last => behind - last,
                _ => 0,
            }
        };
        let watched = *self
            .watched
            .iter()
            .min_by_key(|watched| distance(watched))?;
        let last = watched.address + (watched.length - 1);
        Some((watched, address.clamp(watched.address, last)))
    }
}

/// Which bytes of a planted instruction are among `length` bytes from `physical` on, and which bytes of those they are.
fn overlap(physical: u64, length: usize, planted: &Planted) -> (Range<usize>, Range<usize>) {
    let from = planted.physical.max(physical);
    let to = (planted.physical + BRK.len() as u64).min(physical + length as u64);
    if from >= to {
        return (0..0, 0..0);
    }
    (
        (from - planted.physical) as usize..(to - planted.physical) as usize,
        (from - physical) as usize..(to - physical) as usize,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_one_at(physical: u64) -> Breakpoints {
        let mut breakpoints = Breakpoints::default();
        breakpoints.plant(Planted {
            address: physical | 0xffff << 48,
            physical,
            original: [1, 2, 3, 4],
        });
        breakpoints
    }

    #[test]
    fn what_is_read_shows_what_the_guest_has() {
        let breakpoints = with_one_at(0x1004);
        let mut whole = [0xff; 12];
        let mut begin = [0xff; 6];
        let mut end = [0xff; 4];
        let mut beside = [0xff; 4];

        breakpoints.hide(0x1000, &mut whole);
        breakpoints.hide(0x1000, &mut begin);
        breakpoints.hide(0x1006, &mut end);
        breakpoints.hide(0x1008, &mut beside);

        assert_eq!(whole, [255, 255, 255, 255, 1, 2, 3, 4, 255, 255, 255, 255]);
        assert_eq!(begin, [255, 255, 255, 255, 1, 2]);
        assert_eq!(end, [3, 4, 255, 255]);
        assert_eq!(beside, [255; 4]);
    }

    #[test]
    fn what_is_written_is_kept_for_the_guest_and_the_instruction_stays() {
        let mut breakpoints = with_one_at(0x1004);
        let mut data = [9, 8, 7, 6];

        breakpoints.keep(0x1002, &mut data);

        assert_eq!(data, [9, 8, BRK[0], BRK[1]]);
        assert_eq!(breakpoints.planted()[0].original, [7, 6, 3, 4]);
    }

    #[test]
    fn there_are_no_more_breakpoints_than_registers() {
        let mut breakpoints = Breakpoints::default();
        let available = DebugRegisters {
            breakpoints: 1,
            watchpoints: 1,
        };

        assert!(breakpoints.add_register(0x1000, available));
        assert!(!breakpoints.add_register(0x1004, available));
        assert!(breakpoints.watch(0x1000, 8, Watch::Stores, available));
        assert!(!breakpoints.watch(0x2000, 8, Watch::Stores, available));

        assert!(breakpoints.remove_register(0x1000));
        assert!(!breakpoints.remove_register(0x1000));
        assert!(!breakpoints.unwatch(0x1000, 8, Watch::Loads));
        assert!(breakpoints.unwatch(0x1000, 8, Watch::Stores));
    }

    #[test]
    fn an_access_that_begins_before_a_watchpoint_hit_it() {
        let mut breakpoints = Breakpoints::default();
        let available = DebugRegisters {
            breakpoints: 0,
            watchpoints: 2,
        };
        breakpoints.watch(0x1008, 4, Watch::Stores, available);
        breakpoints.watch(0x2000, 8, Watch::Loads, available);

        let (watched, address) = breakpoints.watched_at(0x1000).unwrap();

        assert_eq!((watched.watch, address), (Watch::Stores, 0x1008));
    }
}
