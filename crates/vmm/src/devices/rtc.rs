//! The real-time clock, a PL031: the wall-clock time a guest starts from.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Rtc;
use vm_superio::rtc_pl031::{NoEvents, RtcState};

use crate::bus::MmioDevice;

/// The clock in a snapshot: how far the guest set it from the host's time, and its registers. So it has gone on when the
/// guest does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState(#[serde(with = "RtcStateFields")] RtcState);

#[derive(Serialize, Deserialize)]
#[serde(remote = "RtcState")]
struct RtcStateFields {
    lr: u32,
    offset: i64,
    mr: u32,
    imsc: u32,
    ris: u32,
}

/// A PL031 that tells the host's time.
pub struct RealTimeClock(Mutex<Rtc<NoEvents>>);

impl RealTimeClock {
    /// A clock that tells the host's time until the guest sets it.
    pub fn new() -> Self {
        Self(Mutex::new(Rtc::new()))
    }

    /// What a snapshot must hold of the clock.
    pub fn state(&self) -> ClockState {
        ClockState(self.lock().state())
    }

    /// Goes on from a snapshot.
    pub fn restore(&self, state: &ClockState) {
        *self.lock() = Rtc::from_state(&state.0, NoEvents);
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
