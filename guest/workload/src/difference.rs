//! What can be wrong.

use std::fmt;
use std::time::Duration;

use mte::{Tag, TagSet};

/// The first thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// A granule is not as it was written.
    #[error("{0}")]
    Granule(Box<GranuleDifference>),
    /// IRG chose a tag that the thread excluded: its GCR_EL1 is not its own.
    #[error("thread {thread}: IRG chose tag {tag}, and the thread includes {include:?}")]
    Irg {
        /// The thread that asked for a tag.
        thread: usize,
        /// The tag chosen.
        tag: Tag,
        /// The tags to choose from.
        include: TagSet,
    },
    /// IRG never chose some tag that it should have: its RGSR_EL1 or GCR_EL1 is not the thread's own.
    #[error(
        "thread {thread}: IRG never chose any of {missing:?} in {draws} draws, though the thread includes them"
    )]
    IrgMissing {
        /// The thread that asked for tags.
        thread: usize,
        /// The tags that never came.
        missing: TagSet,
        /// How often it asked.
        draws: u64,
    },
    /// An access with a mismatching tag had no consequence, or a matching one had.
    #[error("thread {thread}: {what}")]
    Fault {
        /// The thread that made the access.
        thread: usize,
        /// What happened.
        what: String,
    },
    /// A clock went back.
    #[error("{clock} went back by {by:?}: it was {before:?} and then {after:?}")]
    Clock {
        /// Its name.
        clock: &'static str,
        /// What it showed.
        before: Duration,
        /// What it showed later.
        after: Duration,
        /// The difference.
        by: Duration,
    },
}

/// A granule that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GranuleDifference {
    /// Its address.
    pub address: u64,
    /// The page and the granule in it.
    pub page: usize,
    /// The granule in the page.
    pub granule: u8,
    /// The thread whose page it is.
    pub thread: usize,
    /// The tag and the data that it was given.
    pub expected: (Tag, [u64; 2]),
    /// Those that it has.
    pub actual: (Tag, [u64; 2]),
    /// How the page was written last, and how long ago. `None` for one that never was.
    pub written: Option<(&'static str, Duration)>,
    /// How many granules of the page differ.
    pub differing: usize,
}

impl fmt::Display for GranuleDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            page,
            granule,
            thread,
            expected,
            actual,
            written,
            differing,
        } = self;
        let ([e0, e1], [a0, a1]) = (expected.1, actual.1);
        write!(
            f,
            "granule {granule} of page {page} at {address:#x}: expected tag {}, data {e0:016x} {e1:016x}; ",
            expected.0
        )?;
        write!(
            f,
            "actual tag {}, data {a0:016x} {a1:016x}; thread {thread}, ",
            actual.0
        )?;
        match written {
            Some((how, age)) => write!(f, "{how} {:.6} s ago; ", age.as_secs_f64())?,
            None => f.write_str("never touched; ")?,
        }
        write!(f, "{differing} of 256 granules of the page differ")
    }
}

impl Difference {
    /// As one line of JSON.
    pub fn to_json(&self) -> String {
        let message = self.to_string();
        let Self::Granule(granule) = self else {
            return format!(r#"{{"event":"difference","message":"{message}"}}"#);
        };
        let GranuleDifference {
            address,
            page,
            granule,
            thread,
            expected,
            actual,
            written,
            differing,
        } = &**granule;
        let ([e0, e1], [a0, a1]) = (expected.1, actual.1);
        let age = written.map_or_else(
            || "null".into(),
            |(_, age)| format!("{:.6}", age.as_secs_f64()),
        );
        format!(
            r#"{{"event":"difference","message":"{message}","address":"{address:#x}","page":{page},"granule":{granule},"thread":{thread},"expected_tag":{},"actual_tag":{},"expected_data":["{e0:016x}","{e1:016x}"],"actual_data":["{a0:016x}","{a1:016x}"],"age_seconds":{age},"differing_granules":{differing}}}"#,
            expected.0.value(),
            actual.0.value(),
        )
    }
}
