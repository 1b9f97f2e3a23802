//! How fast connections may send: a [`Rate`] as a user writes it, and a [`RateLimit`], a token bucket that several connections
//! share. The bucket holds 20 ms of the rate and is empty at first; a sender takes what is in it once that is 5 ms' worth, so one
//! that wakes up to 15 ms late loses nothing.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Error;

/// Seconds of the rate that the bucket holds.
const BURST: f64 = 0.020;
/// Seconds of the rate that must be in it for somebody to take some.
const QUANTUM: f64 = 0.005;
/// Waits are cut into these, so that whoever waits sees in time that it need not any more.
const NAP: Duration = Duration::from_millis(20);

/// What a prefix multiplies by, the longer ones first.
const PREFIXES: [(&str, u64); 9] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("k", 1_000),
    ("K", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
];
/// Prefixes to write with, the largest first.
const WRITTEN: [(&str, u64); 5] = [
    ("T", 1_000_000_000_000),
    ("G", 1_000_000_000),
    ("M", 1_000_000),
    ("K", 1_000),
    ("", 1),
];

/// Bytes per second, at least one.
///
/// In text: a whole number, then `K`, `M`, `G`, `T` (thousands) or `Ki`, `Mi`, `Gi`, `Ti` (1024s) if wanted, then `B` for bytes (as
/// without it) or `bit` for bits, then `/s` if wanted: `100M`, `1GB/s`, `512Ki`, `800Mbit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(NonZeroU64);

impl Rate {
    /// So many bytes per second.
    #[must_use]
    pub fn new(bytes_per_second: NonZeroU64) -> Self {
        Self(bytes_per_second)
    }

    /// Bytes per second.
    #[must_use]
    pub fn bytes_per_second(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (prefix, unit) = WRITTEN
            .into_iter()
            .find(|(_, unit)| self.0.get().is_multiple_of(*unit))
            .unwrap_or(("", 1));
        write!(f, "{}{prefix}B/s", self.0.get() / unit)
    }
}

impl FromStr for Rate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map_err(|why| Error::Rate {
            text: text.into(),
            why,
        })
    }
}

fn parse(text: &str) -> Result<Rate, &'static str> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, rest) = text.split_at(digits);
    if number.is_empty() {
        return Err("it does not begin with a number");
    }
    if rest.starts_with('.') {
        return Err("the number is not whole (use a smaller unit)");
    }
    let (rest, scale) = PREFIXES
        .into_iter()
        .find_map(|(prefix, scale)| Some((rest.strip_prefix(prefix)?, scale)))
        .unwrap_or((rest, 1));
    let per_byte = match rest.strip_suffix("/s").unwrap_or(rest) {
        "" | "B" => 1,
        "bit" => 8,
        _ => return Err("the unit is not known"),
    };
    let number: u64 = number.parse().map_err(|_| "the number is too large")?;
    let scaled = number.checked_mul(scale).ok_or("it is too large")?;
    let rate = NonZeroU64::new(scaled / per_byte).ok_or("it is less than a byte per second")?;
    Ok(Rate(rate))
}

/// A bound on what all connections that share it send together, in bytes as they are on the wire.
#[derive(Debug)]
pub struct RateLimit {
    bucket: Mutex<Bucket>,
    changed: Condvar,
}

impl RateLimit {
    /// A bound, or none until [`RateLimit::set`].
    #[must_use]
    pub fn new(rate: Option<Rate>) -> Self {
        Self {
            bucket: Mutex::new(Bucket::new(rate, Instant::now())),
            changed: Condvar::new(),
        }
    }

    /// Another bound, or none, from now on: whoever waits is woken.
    pub fn set(&self, rate: Option<Rate>) {
        *self.lock() = Bucket::new(rate, Instant::now());
        self.changed.notify_all();
    }

    /// The bound there is.
    #[must_use]
    pub fn rate(&self) -> Option<Rate> {
        self.lock().rate
    }

    /// How many of `want` bytes may be sent now. With `None`, the caller has waited up to 20 ms, and asks again.
    pub(crate) fn take(&self, want: usize) -> Option<usize> {
        let mut bucket = self.lock();
        match bucket.take(want, Instant::now()) {
            Ok(granted) => Some(granted),
            Err(wait) => {
                // Whoever is woken asks again; how it was woken does not matter.
                drop(self.changed.wait_timeout(bucket, wait.min(NAP)));
                None
            }
        }
    }

    /// Gives back what was not sent.
    pub(crate) fn give_back(&self, bytes: usize) {
        self.lock().give_back(bytes);
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Bucket {
    rate: Option<Rate>,
    /// Bytes that may be sent as of `filled`.
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn new(rate: Option<Rate>, now: Instant) -> Self {
        Self {
            rate,
            tokens: 0.0,
            filled: now,
        }
    }

    /// How many of `want` bytes may be sent, or how long it is until some may.
    fn take(&mut self, want: usize, now: Instant) -> Result<usize, Duration> {
        let Some(rate) = self.rate else {
            return Ok(want);
        };
        let rate = rate.bytes_per_second() as f64;
        let new = now.saturating_duration_since(self.filled).as_secs_f64() * rate;
        self.tokens = (self.tokens + new).min(burst(rate));
        self.filled = now;
        let enough = (rate * QUANTUM).max(1.0).min(want as f64);
        if self.tokens < enough {
            return Err(Duration::from_secs_f64((enough - self.tokens) / rate));
        }
        let granted = want.min(self.tokens as usize);
        self.tokens -= granted as f64;
        Ok(granted)
    }

    fn give_back(&mut self, bytes: usize) {
        if let Some(rate) = self.rate {
            self.tokens = (self.tokens + bytes as f64).min(burst(rate.bytes_per_second() as f64));
        }
    }
}

/// At least a byte, as otherwise a slow enough limit would let nothing through.
fn burst(rate: f64) -> f64 {
    (rate * BURST).max(1.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate(text: &str) -> u64 {
        text.parse::<Rate>().unwrap().bytes_per_second()
    }

    fn why(text: &str) -> String {
        text.parse::<Rate>().unwrap_err().to_string()
    }

    #[test]
    fn rates_are_bytes_or_bits_per_second() {
        assert_eq!(rate("1"), 1);
        assert_eq!(rate("100M"), 100_000_000);
        assert_eq!(rate("1G"), 1_000_000_000);
        assert_eq!(rate("512Ki"), 512 << 10);
        assert_eq!(rate("2GiB/s"), 2 << 30);
        assert_eq!(rate("5kB"), 5_000);
        assert_eq!(rate("800Mbit"), 100_000_000);
        assert_eq!(rate("10Gbit/s"), 1_250_000_000);
        assert_eq!(rate("1Mibit"), 1 << 17);
    }

    #[test]
    fn what_is_wrong_with_a_rate_is_said() {
        assert!(why("").contains("begin with a number"));
        assert!(why("-1").contains("begin with a number"));
        assert!(why("M").contains("begin with a number"));
        assert!(why("1.5G").contains("not whole"));
        assert!(why("1m").contains("unit"));
        assert!(why("1 M").contains("unit"));
        assert!(why("1Mbits").contains("unit"));
        assert!(why("0").contains("less than a byte"));
        assert!(why("7bit").contains("less than a byte"));
        assert!(why("99999999999999999999").contains("too large"));
        assert!(why("18446744073709551615K").contains("too large"));
    }

    #[test]
    fn an_idle_bucket_holds_no_more_than_its_burst() {
        let start = Instant::now();
        let mut bucket = Bucket::new("1M".parse().ok(), start);

        let granted = bucket.take(usize::MAX, start + Duration::from_secs(100));

        assert_eq!(granted, Ok(20_000));
    }

    #[test]
    fn what_was_not_sent_can_be_sent_at_once() {
        let start = Instant::now();
        let mut bucket = Bucket::new("1M".parse().ok(), start);
        let now = start + Duration::from_millis(10);
        let granted = bucket.take(10_000, now);

        bucket.give_back(6_000);

        assert_eq!(granted, Ok(10_000));
        assert_eq!(bucket.take(10_000, now), Ok(6_000));
    }

    #[test]
    fn without_a_rate_everything_may_be_sent() {
        assert_eq!(RateLimit::new(None).take(usize::MAX), Some(usize::MAX));
    }

    proptest! {
        #[test]
        fn a_rate_is_read_as_it_was_written(bytes in 1..=u64::MAX, shift in 0_u32..60) {
            let rate = Rate(NonZeroU64::new((bytes >> shift).max(1)).unwrap());

            prop_assert_eq!(rate.to_string().parse::<Rate>().unwrap(), rate);
        }

        #[test]
        fn any_text_is_a_rate_or_refused(text in "[0-9]{0,20}\\PC{0,8}") {
            let read = text.parse::<Rate>();

            prop_assert!(read.is_err() || read.unwrap().bytes_per_second() > 0);
        }

        #[test]
        fn senders_of_any_size_get_the_rate_to_a_percent(
            rate in 10_000_u64..100_000_000_000,
            writes in prop::collection::vec(1_usize..4_000_000, 1..20),
        ) {
            let start = Instant::now();
            let mut bucket = Bucket::new(NonZeroU64::new(rate).map(Rate::new), start);
            let mut now = start;
            let mut sent = 0_u64;
            for want in writes.into_iter().cycle().take(20_000) {
                match bucket.take(want, now) {
                    Ok(granted) => sent += granted as u64,
                    Err(wait) => now += wait.max(Duration::from_nanos(1)),
                }
            }

            let allowed = now.duration_since(start).as_secs_f64() * rate as f64;
            prop_assert!(sent as f64 <= allowed * 1.000_001 + 1.0, "{sent} of {allowed}");
            prop_assert!(sent as f64 >= allowed * 0.99 - rate as f64 * QUANTUM - 1.0, "{sent} of {allowed}");
        }
    }
}
