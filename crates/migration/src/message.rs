//! What the two sides say to each other, besides pages and saved states.
//!
//! A link is a stream (`stream`) in each direction. Pages, holes and saved states are its own chunks; everything else is a
//! message of one of two kinds: [`WORD`], JSON, and [`WANTED`], the pages that the destination asks for.

use serde::{Deserialize, Serialize};
use stream::{MAX_PAGE, StreamId};

use crate::handover::Destination;

/// The version of what follows. Both sides must have the same.
pub const PROTOCOL: u32 = 2;

/// The message number of a [`Word`].
pub const WORD: u8 = 0;
/// The message number of [`Wanted`].
pub const WANTED: u8 = 1;

/// The most connections for pages, and the most for requests.
pub const MAX_LINKS: u8 = 64;

/// Which migration it is: 128 random bits, which nobody can guess who has not seen them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Session(u128);

impl From<Session> for String {
    fn from(session: Session) -> Self {
        session.to_string()
    }
}

impl TryFrom<String> for Session {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        u128::from_str_radix(&text, 16).map(Self)
    }
}

impl Session {
    /// A new one.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn random() -> stream::Result<Self> {
        Ok(Self(u128::from_le_bytes(StreamId::random()?.0)))
    }
}

impl std::fmt::Display for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The first thing that the source says on every link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The version of the Tagvisor that speaks, for messages.
    pub tagvisor: String,
    /// Which migration.
    pub session: Session,
    /// What the link is for.
    pub purpose: Purpose,
}

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// The first link of a migration: control.
    Migrate {
        /// How many links for pages will follow.
        pages: u8,
        /// Whether pages may stay behind, and the guest is to be refused where they cannot be fetched.
        #[serde(default)]
        post_copy: bool,
    },
    /// Pages, from the source.
    Pages,
    /// Pages that the destination asks for.
    Requests,
    /// Control again, after the first one broke.
    Back {
        /// The source keeps the guest: nothing but that is to be said.
        kept: bool,
    },
}

/// What is said on a control link, and on each link first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "word", rename_all = "snake_case")]
pub enum Word {
    /// Source, first on each link.
    Hello(Hello),
    /// Destination, to each link: it is taken.
    Welcome,
    /// Destination: no, and that was all.
    Refused {
        /// Why.
        reason: String,
    },
    /// Source: the saved states before this say what the machine is.
    Offer,
    /// Destination: it has a machine like that.
    Accept {
        /// So many links for requests it wants, should pages stay behind.
        requests: u8,
    },
    /// Source, on control: a round takes long, and this side is at it.
    Sending,
    /// Source, at the end of a round, on each link for pages and then on control.
    RoundEnd {
        /// From 1 on.
        round: u32,
    },
    /// Destination: all pages of the round are placed.
    RoundDone {
        /// Which.
        round: u32,
        /// Pages placed since the beginning.
        pages: u64,
    },
    /// Source, while the guest runs still: pages may stay behind, and the links on which they can be asked for follow.
    PostCopy,
    /// Source: the saved states before this are the stopped guest's, and the holes before it are pages that stay
    /// behind.
    HandOver,
    /// Destination: the guest could run.
    Ready,
    /// Source: it is the destination's now.
    Run,
    /// Source: it stays the source's.
    Abort,
    /// Destination: where it is.
    State {
        /// Where.
        state: Destination,
        /// Pages that it fetched.
        fetched: u64,
    },
}

impl Word {
    /// Its name, for messages about what was expected.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "a greeting",
            Self::Welcome => "a welcome",
            Self::Refused { .. } => "a refusal",
            Self::Offer => "an offer",
            Self::Accept { .. } => "an acceptance",
            Self::Sending => "that it is sending",
            Self::RoundEnd { .. } => "the end of a round",
            Self::RoundDone { .. } => "the receipt of a round",
            Self::PostCopy => "that pages may stay behind",
            Self::HandOver => "the hand-over",
            Self::Ready => "readiness",
            Self::Run => "the word to run",
            Self::Abort => "the word to give up",
            Self::State { .. } => "its state",
        }
    }
}

/// Pages that the destination asks for: up to 64, in an aligned block of as many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The block's first page number, a multiple of 64.
    pub first: u64,
    /// Which of its pages.
    pub pages: u64,
}

impl Wanted {
    /// As a message.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.first.to_le_bytes());
        bytes[8..].copy_from_slice(&self.pages.to_le_bytes());
        bytes
    }

    /// From a message; none if it makes no sense.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (first, pages) = bytes.split_first_chunk::<8>()?;
        let wanted = Self {
            first: u64::from_le_bytes(*first),
            pages: u64::from_le_bytes(pages.try_into().ok()?),
        };
        let right = wanted.first.is_multiple_of(64) && wanted.first < MAX_PAGE && wanted.pages != 0;
        right.then_some(wanted)
    }

    /// The runs of pages.
    pub fn runs(self) -> Vec<std::ops::Range<u64>> {
        let mut runs = Vec::new();
        let mut rest = self.pages;
        while rest != 0 {
            let start = rest.trailing_zeros();
            let length = (rest >> start).trailing_ones();
            let end = start + length;
            runs.push(self.first + u64::from(start)..self.first + u64::from(end));
            rest &= u64::MAX.checked_shl(end).unwrap_or(0);
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn wanted_pages_come_back_from_a_message_as_they_were(block in 0u64..1 << 40, pages in 1u64..) {
            let wanted = Wanted { first: block * 64, pages };

            prop_assert_eq!(Wanted::from_bytes(&wanted.to_bytes()), Some(wanted));
            let listed: Vec<u64> = wanted.runs().into_iter().flatten().collect();
            let expected: Vec<u64> = (0..64)
                .filter(|bit| pages >> bit & 1 == 1)
                .map(|bit| wanted.first + bit)
                .collect();
            prop_assert_eq!(listed, expected);
        }

        #[test]
        fn no_bytes_make_the_reader_of_wanted_pages_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Some(wanted) = Wanted::from_bytes(&bytes) {
                prop_assert!(wanted.runs().iter().all(|run| run.end <= MAX_PAGE));
            }
        }
    }

    #[test]
    fn a_greeting_comes_back_from_json_as_it_was() {
        let hello = Word::Hello(Hello {
            protocol: PROTOCOL,
            tagvisor: "1".into(),
            session: Session(u128::MAX - 1),
            purpose: Purpose::Migrate {
                pages: 3,
                post_copy: false,
            },
        });
        let json = serde_json::to_string(&hello).unwrap();
        assert_eq!(
            serde_json::from_str::<Word>(&json).unwrap(),
            hello,
            "{json}"
        );
    }

    #[test]
    fn pages_that_cannot_be_are_not_wanted() {
        for (first, pages) in [(1, 1), (0, 0), (MAX_PAGE, 1)] {
            let bytes = Wanted { first, pages }.to_bytes();
            assert_eq!(Wanted::from_bytes(&bytes), None, "{first:#x} {pages:#x}");
        }
    }
}
