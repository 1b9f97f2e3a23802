//! The real-time clock, a PL031: the wall-clock time a guest starts from.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::Rtc;
use vm_superio::rtc_pl031::NoEvents;

use crate::bus::MmioDevice;

/// A PL031 that tells the host's time.
pub struct RealTimeClock(Mutex<Rtc<NoEvents>>);

impl RealTimeClock {
    /// A clock that tells the host's time until the guest sets it.
    pub fn new() -> Self {
        Self(Mutex::new(Rtc::new()))
    }

    fn lock(&self) -> MutexGuard<'_, Rtc<NoEvents>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for RealTimeClock {
    fn default() -> Self {
        Self::new()
    }
}

impl MmioDevice for RealTimeClock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), Ok(word)) = (u16::try_from(offset), data.try_into()) {
            self.lock().read(offset, word);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), Ok(word)) = (u16::try_from(offset), data.try_into()) {
            self.lock().write(offset, word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u64 = 0;
    const LOAD: u64 = 8;

    /// The seconds that the guest reads.
    fn time(clock: &RealTimeClock) -> u64 {
        let mut time = [0; 4];
        clock.read(DATA, &mut time);
        u32::from_le_bytes(time).into()
    }

    fn hosts_time() -> u64 {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs()
    }

    #[test]
    fn the_clock_tells_the_time_of_the_host() {
        let clock = RealTimeClock::new();

        assert!(time(&clock).abs_diff(hosts_time()) <= 1);
    }

    #[test]
    fn the_guest_sets_the_clock() {
        let clock = RealTimeClock::new();

        clock.write(LOAD, &[0; 4]);

        assert!(time(&clock) <= 1);
    }

    #[test]
    fn an_access_of_another_width_than_a_word_does_nothing() {
        let clock = RealTimeClock::new();
        let mut byte = [0];

        clock.read(DATA, &mut byte);
        clock.write(LOAD, &[0; 8]);
        clock.write(LOAD, &[0]);

        assert_eq!(byte, [0]);
        assert!(time(&clock).abs_diff(hosts_time()) <= 1);
    }
}
