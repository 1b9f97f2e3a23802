//! What a page can hold: its tags in one of several patterns, and its data, all zero or made from a seed.

use fastrand::Rng;
use mte::{Tag, TagPage, TagSet};

/// Granules of a page.
pub const GRANULES: usize = 256;
/// Granules whose packed tags make up 64 bits.
pub const GRANULES_PER_WORD: usize = 16;
/// The most granules that an object of [`Pattern::Objects`] has.
const LARGEST_OBJECT: usize = 32;

/// How tags are laid out in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// All tags zero.
    Untagged,
    /// One tag for all.
    Uniform,
    /// Two tags that alternate every few granules.
    Stripes,
    /// Objects of random sizes, each with a tag that its neighbour does not have, as an allocator does it.
    Objects,
    /// A tag of its own for each granule.
    Random,
}

impl Pattern {
    const ALL: [Self; 5] = [
        Self::Untagged,
        Self::Uniform,
        Self::Stripes,
        Self::Objects,
        Self::Random,
    ];

    /// Any of them.
    pub fn any(rng: &mut Rng) -> Self {
        Self::ALL[rng.usize(..Self::ALL.len())]
    }

    /// Tags in this pattern. `random_tag` chooses a tag that is not in the set given.
    pub fn tags(self, rng: &mut Rng, mut random_tag: impl FnMut(TagSet) -> Tag) -> TagPage {
        match self {
            Self::Untagged => TagPage::ZERO,
            Self::Uniform => TagPage::filled(random_tag(TagSet::EMPTY)),
            Self::Stripes => {
                let width = rng.usize(1..=16);
                let one = random_tag(TagSet::EMPTY);
                let other = random_tag(TagSet::EMPTY.with(one));
                page_of(|granule| {
                    if (granule / width).is_multiple_of(2) {
                        one
                    } else {
                        other
                    }
                })
            }
            Self::Objects => {
                let mut tag = Tag::ZERO;
                let mut end = 0;
                page_of(|granule| {
                    if granule == end {
                        tag = random_tag(TagSet::EMPTY.with(tag));
                        end += rng.usize(1..=LARGEST_OBJECT);
                    }
                    tag
                })
            }
            Self::Random => page_of(|_| random_tag(TagSet::EMPTY)),
        }
    }
}

/// A page of these tags, put together sixteen at a time.
fn page_of(mut tag: impl FnMut(usize) -> Tag) -> TagPage {
    let mut packed = [0; GRANULES / 2];
    for (index, bytes) in packed.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let word = (0..GRANULES_PER_WORD).fold(0, |word, n| {
            word | u64::from(tag(index * GRANULES_PER_WORD + n).value()) << (4 * n)
        });
        *bytes = word.to_le_bytes();
    }
    TagPage::from_packed(packed)
}

/// The data of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// Nothing but zeros.
    Zero,
    /// Words made from this seed.
    Seeded(u64),
}

impl Data {
    /// Zeros for one page in four, else words from a new seed.
    pub fn any(rng: &mut Rng) -> Self {
        if rng.u8(..4) == 0 {
            Self::Zero
        } else {
            Self::Seeded(rng.u64(..))
        }
    }

    /// The words, from the first on.
    pub const fn words(self) -> Words {
        match self {
            Self::Zero => Words { state: 0, step: 0 },
            Self::Seeded(seed) => Words {
                state: seed,
                step: STEP,
            },
        }
    }

    /// The two words of each granule.
    pub fn granules(self) -> impl Iterator<Item = [u64; 2]> {
        let mut words = self.words();
        (0..GRANULES).map(move |_| words.next_granule())
    }
}

/// Odd, so that no two words of a page are the same.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The words of [`Data`], one after the other.
///
/// Word *n* is made from `seed + n * STEP`; zeros are what comes of a seed and a step of 0. That is cheap, since it is done
/// for each granule in each pass.
pub struct Words {
    state: u64,
    step: u64,
}

impl Words {
    /// The two words of the next granule.
    #[inline(always)]
    pub const fn next_granule(&mut self) -> [u64; 2] {
        [self.next_word(), self.next_word()]
    }

    #[inline(always)]
    const fn next_word(&mut self) -> u64 {
        let word = self.state ^ self.state >> 32;
        self.state = self.state.wrapping_add(self.step);
        word
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A generator that never gives an excluded tag.
    fn counting(excluded: TagSet, last: &mut u8) -> Tag {
        *last = (1..=16)
            .map(|step| (*last + step) % 16)
            .find(|&n| !excluded.contains(Tag::from_low_bits(n)))
            .unwrap();
        Tag::from_low_bits(*last)
    }

    fn tags(pattern: Pattern, seed: u64) -> TagPage {
        let mut last = 7;
        pattern.tags(&mut Rng::with_seed(seed), |excluded| {
            counting(excluded, &mut last)
        })
    }

    #[test]
    fn neighbouring_objects_have_different_tags_and_no_object_is_larger_than_allowed() {
        for seed in 0..50 {
            let mut last = 0;
            let page = Pattern::Objects.tags(&mut Rng::with_seed(seed), |excluded| {
                // A tag that is always the first of those allowed: neighbours differ only if the last one is excluded.
                last = 0;
                counting(excluded, &mut last)
            });
            let tags: Vec<Tag> = page.iter().collect();
            let largest = tags.chunk_by(|a, b| a == b).map(<[Tag]>::len).max();
            assert!(largest <= Some(LARGEST_OBJECT), "{page:?}");
        }
    }

    #[test]
    fn stripes_have_exactly_two_tags() {
        for seed in 0..50 {
            let page = tags(Pattern::Stripes, seed);
            assert_eq!(
                page.iter().collect::<TagSet>().bits().count_ones(),
                2,
                "{page:?}"
            );
        }
    }

    #[test]
    fn uniform_and_untagged_pages_are_uniform() {
        assert!(
            tags(Pattern::Uniform, 1)
                .uniform()
                .is_some_and(|tag| tag != Tag::ZERO)
        );
        assert_eq!(tags(Pattern::Untagged, 1), TagPage::ZERO);
    }

    #[test]
    fn no_two_words_made_from_seeds_are_the_same() {
        let words: std::collections::HashSet<u64> = [1, 2, u64::MAX]
            .into_iter()
            .flat_map(|seed| Data::Seeded(seed).granules().flatten())
            .collect();
        assert_eq!(words.len(), 3 * 2 * GRANULES);
    }

    #[test]
    fn zero_data_is_nothing_but_zeros() {
        assert!(Data::Zero.granules().eq([[0, 0]; GRANULES]));
    }

    #[test]
    fn a_page_has_the_tags_of_its_granules_in_their_order() {
        let page = page_of(|granule| Tag::from_low_bits((granule / 3) as u8));
        assert!(
            page.iter()
                .eq((0..GRANULES).map(|granule| Tag::from_low_bits((granule / 3) as u8)))
        );
    }
}
