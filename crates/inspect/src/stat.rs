//! How much of a machine's memory is tagged, and how.

use std::ops::Range;

use mte::{GRANULE_SIZE, Tag, TagPage};
use serde::Serialize;

use crate::error::Result;
use crate::pairs::Pairs;
use crate::view::{Gap, PAGE, Part, View};

/// The most parts that a range is cut into.
const MAX_REGIONS: u64 = 16;

/// What was counted.
#[derive(Clone, Debug)]
pub struct Counts {
    /// Populated pages whose tags are all 0.
    pub untagged: u64,
    /// Populated pages with one tag other than 0.
    pub uniform: u64,
    /// Populated pages with several tags.
    pub mixed: u64,
    /// Pages of RAM that were never populated.
    pub holes: u64,
    /// Pages of virtual addresses that are not mapped.
    pub unmapped: u64,
    pairs: Pairs,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            untagged: 0,
            uniform: 0,
            mixed: 0,
            holes: 0,
            unmapped: 0,
            pairs: Pairs::NONE,
        }
    }
}

impl Counts {
    fn add_page(&mut self, tags: &TagPage) {
        let Some(tag) = tags.uniform() else {
            self.mixed += 1;
            self.pairs.add_page(tags);
            return;
        };
        match tag {
            Tag::ZERO => self.untagged += 1,
            _ => self.uniform += 1,
        }
        self.pairs.add_uniform_page(tag);
    }

    fn add(&mut self, other: &Self) {
        self.untagged += other.untagged;
        self.uniform += other.uniform;
        self.mixed += other.mixed;
        self.holes += other.holes;
        self.unmapped += other.unmapped;
        self.pairs.add(&other.pairs);
    }

    /// Populated pages.
    pub fn populated(&self) -> u64 {
        self.untagged + self.uniform + self.mixed
    }

    /// How many granules have each tag.
    pub fn granules(&self) -> [u64; Tag::COUNT] {
        self.pairs.granules()
    }

    /// Bytes of memory with a tag other than 0.
    pub fn tagged_bytes(&self) -> u64 {
        self.granules()[1..].iter().sum::<u64>() * GRANULE_SIZE as u64
    }

    /// Bits that the tag of a populated granule says on average: 0 if all are the same, 4 if all 16 are as frequent.
    pub fn entropy(&self) -> f64 {
        entropy(&self.granules())
    }

    /// The same for granules with a tag other than 0 alone.
    pub fn entropy_of_tagged(&self) -> f64 {
        entropy(&self.granules()[1..])
    }

    /// Bits that the tag of a granule says to whoever knows the one before. These two are those in a byte of packed tags.
    pub fn entropy_beside_neighbour(&self) -> f64 {
        (entropy(self.pairs.counts()) - entropy(&self.pairs.firsts())).max(0.0)
    }
}

/// Shannon's, in bits.
fn entropy(counts: &[u64]) -> f64 {
    let all: u64 = counts.iter().sum();
    let bits = counts.iter().filter(|count| **count > 0).map(|count| {
        let share = *count as f64 / all as f64;
        -share * share.log2()
    });
    // A sum of nothing is -0.
    bits.sum::<f64>() + 0.0
}

#[derive(Serialize)]
struct CountsOut {
    pages: u64,
    untagged: u64,
    uniform: u64,
    mixed: u64,
    holes: u64,
    unmapped: u64,
    tagged_bytes: u64,
    granules: [u64; Tag::COUNT],
    entropy: f64,
    entropy_of_tagged: f64,
    entropy_beside_neighbour: f64,
}

impl Serialize for Counts {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let out = CountsOut {
            pages: self.populated(),
            untagged: self.untagged,
            uniform: self.uniform,
            mixed: self.mixed,
            holes: self.holes,
            unmapped: self.unmapped,
            tagged_bytes: self.tagged_bytes(),
            granules: self.granules(),
            entropy: self.entropy(),
            entropy_of_tagged: self.entropy_of_tagged(),
            entropy_beside_neighbour: self.entropy_beside_neighbour(),
        };
        out.serialize(serializer)
    }
}

/// A part of the range.
#[derive(Clone, Debug, Serialize)]
pub struct Region {
    /// Its first byte.
    pub start: u64,
    /// The byte behind its last.
    pub end: u64,
    /// What is there.
    #[serde(flatten)]
    pub counts: Counts,
}

/// Figures of a range.
#[derive(Clone, Debug, Serialize)]
pub struct Statistics {
    /// Its first byte.
    pub start: u64,
    /// The byte behind its last.
    pub end: u64,
    /// All of it.
    #[serde(flatten)]
    pub total: Counts,
    /// Equal parts of it, whose size is a power of two and their alignment.
    pub regions: Vec<Region>,
}

impl Statistics {
    /// Counts. Pages that the range cuts count whole.
    ///
    /// # Errors
    /// [`crate::Error::NoTags`]; whatever keeps the memory from being read.
    pub fn of(view: &mut View<'_>) -> Result<Self> {
        view.must_have_tags()?;
        let range = view.range();
        let mut regions = Regions::of(&range);
        view.visit_tags(&mut |part| {
            regions.add(part);
            Ok(())
        })?;
        let mut total = Counts::default();
        for region in &regions.all {
            total.add(&region.counts);
        }
        Ok(Self {
            start: range.start,
            end: range.end,
            total,
            regions: regions.all,
        })
    }
}

struct Regions {
    /// Bytes of each.
    size: u64,
    all: Vec<Region>,
}

impl Regions {
    fn of(range: &Range<u64>) -> Self {
        let size = (range.end - range.start)
            .div_ceil(MAX_REGIONS)
            .next_power_of_two()
            .max(PAGE);
        let first = range.start / size;
        let last = (range.end - 1) / size;
        let region = |number: u64| Region {
            start: (number * size).max(range.start),
            end: (number * size).saturating_add(size).min(range.end),
            counts: Counts::default(),
        };
        Self {
            size,
            all: (first..=last).map(region).collect(),
        }
    }

    /// The region of an address; those that the first and the last page have outside of the range are counted with it.
    fn at(&mut self, address: u64) -> &mut Region {
        let first = self.all[0].start / self.size;
        let number = (address / self.size).saturating_sub(first) as usize;
        let last = self.all.len() - 1;
        &mut self.all[number.min(last)]
    }

    fn add(&mut self, part: Part<'_>) {
        match part {
            Part::Pages { address, tags, .. } => {
                for (tags, page) in tags.iter().zip(0..) {
                    self.at(address + page * PAGE).counts.add_page(tags);
                }
            }
            Part::Gap(range, gap) => self.add_gap(range, gap),
        }
    }

    fn add_gap(&mut self, range: Range<u64>, gap: Gap) {
        let mut at = range.start;
        while at < range.end {
            let end = (at / self.size * self.size)
                .saturating_add(self.size)
                .min(range.end);
            let counts = &mut self.at(at).counts;
            match gap {
                Gap::Hole => counts.holes += (end - at) / PAGE,
                Gap::Unmapped => counts.unmapped += (end - at) / PAGE,
                Gap::NoMemory => {}
            }
            at = end;
        }
    }
}
