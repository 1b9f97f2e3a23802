//! Whether tags are worth coding on a link.
//!
//! Coded tags are fewer bytes and take time. On a slow link the bytes matter, on a fast one the time: there, tags of pages with more
//! than one are sent as they are. Coding is worth it as long as it takes a smaller share of the time than it saves of the bytes,
//! which each link finds out for itself, and tries again now and then.

use std::time::Duration;

use stream::TagEffort;

/// Chunks with little made of their tags, before it is tried again.
const TRY_EVERY: u32 = 32;
/// Bytes of a page's tags, if nothing is made of them.
const PLAIN: usize = size_of::<mte::TagPage>();

/// What a chunk of pages took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sent {
    /// Pages with tags.
    pub(crate) pages: usize,
    /// All bytes.
    pub(crate) bytes: usize,
    /// Those of tags.
    pub(crate) tag_bytes: usize,
    /// Since the chunk before was sent.
    pub(crate) time: Duration,
    /// Of it, for coding tags.
    pub(crate) tag_time: Duration,
}

/// What a link knows.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Chunks before coding is tried again; 0 as long as it is worth it.
    untried: u32,
}

impl Pace {
    /// What is to be made of the next chunk's tags.
    pub(crate) const fn effort(&self) -> TagEffort {
        match self.untried {
            0 => TagEffort::Full,
            _ => TagEffort::Least,
        }
    }

    /// What came of it.
    pub(crate) fn learn(&mut self, sent: Sent) {
        if self.untried > 0 {
            self.untried -= 1;
            return;
        }
        let saved = (sent.pages * PLAIN).saturating_sub(sent.tag_bytes) as f64;
        let of_bytes = saved / (sent.bytes as f64 + saved).max(1.0);
        let of_time = sent.tag_time.as_secs_f64() / sent.time.as_secs_f64().max(1e-9);
        if of_time > of_bytes {
            self.untried = TRY_EVERY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 pages whose tags were coded to a third, in 20 us.
    fn sent(time: Duration) -> Sent {
        Sent {
            pages: 64,
            bytes: 64 * (4096 + 43),
            tag_bytes: 64 * 43,
            time,
            tag_time: Duration::from_micros(20),
        }
    }

    #[test]
    fn tags_are_coded_on_a_slow_link() {
        let mut pace = Pace::default();
        pace.learn(sent(Duration::from_millis(2)));
        assert_eq!(pace.effort(), TagEffort::Full);
    }

    #[test]
    fn on_a_fast_link_they_are_left_as_they_are_and_coding_is_tried_again() {
        let mut pace = Pace::default();
        pace.learn(sent(Duration::from_micros(130)));
        for _ in 0..TRY_EVERY {
            assert_eq!(pace.effort(), TagEffort::Least);
            pace.learn(sent(Duration::from_micros(130)));
        }
        assert_eq!(pace.effort(), TagEffort::Full);
    }

    #[test]
    fn pages_with_one_tag_cost_nothing_and_are_coded_on_any_link() {
        let mut pace = Pace::default();
        pace.learn(Sent {
            tag_bytes: 1,
            tag_time: Duration::from_micros(1),
            ..sent(Duration::from_micros(130))
        });
        assert_eq!(pace.effort(), TagEffort::Full);
    }
}
