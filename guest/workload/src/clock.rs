//! Clocks that must not go back, not even between threads.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::difference::Difference;

/// The latest time that any thread has seen on CLOCK_MONOTONIC and CLOCK_REALTIME.
///
/// CLOCK_REALTIME does go back if somebody sets it: nothing in the guest should.
#[derive(Default)]
pub struct Clocks {
    monotonic: Latest,
    realtime: Latest,
}

/// The latest time seen on a clock, in nanoseconds.
#[derive(Default)]
struct Latest(AtomicU64);

impl Clocks {
    /// The time on CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// A clock is behind what it was.
    pub fn now(&self) -> Result<Duration, Difference> {
        self.realtime
            .advance("CLOCK_REALTIME", || read(libc::CLOCK_REALTIME))?;
        self.monotonic
            .advance("CLOCK_MONOTONIC", || read(libc::CLOCK_MONOTONIC))
    }
}

impl Latest {
    fn advance(
        &self,
        clock: &'static str,
        read: impl FnOnce() -> Duration,
    ) -> Result<Duration, Difference> {
        // What others have seen is looked up before the clock is read: it cannot be later than that.
        let before = Duration::from_nanos(self.0.load(Ordering::Acquire));
        let after = read();
        if after < before {
            return Err(Difference::Clock {
                clock,
                before,
                after,
                by: before - after,
            });
        }
        self.0.fetch_max(after.as_nanos() as u64, Ordering::AcqRel);
        Ok(after)
    }
}

fn read(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec.
    let result = unsafe { libc::clock_gettime(clock, &mut time) };
    assert_eq!(
        result,
        0,
        "clock_gettime({clock}): {}",
        io::Error::last_os_error()
    );
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_goes_back_is_a_difference() {
        let latest = Latest::default();
        latest.advance("CLOCK", || Duration::from_secs(7)).unwrap();
        let difference = latest
            .advance("CLOCK", || Duration::from_secs(5))
            .unwrap_err();
        assert_eq!(
            difference.to_string(),
            "CLOCK went back by 2s: it was 7s and then 5s"
        );
    }

    #[test]
    fn a_clock_that_stands_or_goes_on_is_none() {
        let latest = Latest::default();
        let times =
            [3, 3, 4].map(|seconds| latest.advance("CLOCK", || Duration::from_secs(seconds)));
        assert_eq!(
            times,
            [3, 3, 4].map(|seconds| Ok(Duration::from_secs(seconds)))
        );
    }

    #[test]
    fn the_clocks_of_this_machine_can_be_read() {
        let clocks = Clocks::default();
        let earlier = clocks.now().unwrap();
        assert!(clocks.now().unwrap() >= earlier);
    }
}
