//! Cuts a page into spans.
//!
//! A *span* is a run of granules of one tag, together with the granule behind it if that one alone
//! has tag 0. Allocators put a header of one untagged granule before each tagged chunk, so a chunk
//! and the next one's header are one span. Where there are no headers a span is just a run.

use mte::{Tag, TagPage};

/// Bytes of packed tags.
pub(crate) const PACKED: usize = 128;
/// Granules of a page.
pub(crate) const GRANULES: usize = 256;

/// The spans of a page.
pub(crate) struct Spans {
    /// The granule each begins at, and 0 behind the last one.
    starts: [u8; GRANULES + STARTS_AT_ONCE],
    count: usize,
    /// The tag of each granule.
    tags: [u8; GRANULES],
}

/// The tag of a page that has only one.
#[inline(always)]
pub(crate) fn uniform(page: &TagPage) -> Option<Tag> {
    let first = first_granules(page);
    let differ = (first ^ first.rotate_left(4)) | (first ^ last_granules(page));
    let words = page.as_packed().as_chunks().0.iter();
    let differs = |word: &[u8; 8]| u64::from_le_bytes(*word) ^ first;
    let uniform = differ == 0 && words.fold(0, |differ, word| differ | differs(word)) == 0;
    uniform.then(|| page.get(0))
}

/// Whether two pages have the same tags. That most have not is seen in their first granules or their last ones: a branch that can be
/// foretold.
#[inline(always)]
pub(crate) fn alike(a: &TagPage, b: &TagPage) -> bool {
    let differ = (first_granules(a) ^ first_granules(b)) | (last_granules(a) ^ last_granules(b));
    let bytes = a.as_packed().iter().zip(b.as_packed());
    differ == 0 && bytes.fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

/// Whether a page has more spans than so many, if that can be seen without cutting it. That it has not is mostly seen in its first
/// granules.
#[inline(always)]
pub(crate) fn has_more_spans_than(most: usize, page: &TagPage) -> bool {
    // So many granules may begin no span: those with the tag of the one before, and gaps, which have tag 0.
    let mut left = GRANULES - most;
    let mut before = first_granules(page) & 0xf;
    for word in page.as_packed().as_chunks().0 {
        let word = u64::from_le_bytes(*word);
        let differ = ones(nonzero(word ^ (word << 4 | before)));
        let untagged = ones(nonzero(word) ^ HIGHEST);
        before = word >> 60;
        match left.checked_sub(GRANULES_OF_WORD - differ + untagged) {
            Some(rest) => left = rest,
            None => return false,
        }
    }
    true
}

/// Granules of 64 bits.
const GRANULES_OF_WORD: usize = 16;

/// How many nibbles have their highest bit set; the other bits are not.
#[inline(always)]
const fn ones(highest: u64) -> usize {
    let pairs = (highest >> 3 & 0x0f0f_0f0f_0f0f_0f0f) + (highest >> 7 & 0x0f0f_0f0f_0f0f_0f0f);
    (pairs.wrapping_mul(EACH_BYTE) >> 56) as usize
}

/// The tags of the first 16 granules.
#[inline(always)]
fn first_granules(page: &TagPage) -> u64 {
    u64::from_le_bytes(page.as_packed().as_chunks().0[0])
}

/// The tags of the last 16 granules.
#[inline(always)]
fn last_granules(page: &TagPage) -> u64 {
    let words = page.as_packed().as_chunks().0;
    u64::from_le_bytes(words[words.len() - 1])
}

/// A span: 1 to 256 granules.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    /// The tag, in bits 3:0.
    pub(crate) tag: u8,
    /// How many granules, the closing one counted; 0 stands for 256.
    length: u8,
    end: End,
}

/// How a span ends, and whether it has a tag.
#[derive(Clone, Copy)]
pub(crate) enum End {
    /// With a granule of its tag.
    Tagged,
    /// With a granule of tag 0 that is alone.
    Gap,
    /// Its tag is 0.
    Untagged,
}

/// How many there are of these.
pub(crate) const ENDS: usize = 3;

impl Span {
    /// `end` and `length` as one index.
    #[inline(always)]
    pub(crate) fn shape(self) -> usize {
        usize::from(self.length) | (self.end as usize) << 8
    }
}

/// How many shapes there are.
pub(crate) const SHAPES: usize = ENDS * GRANULES;

const STARTS_AT_ONCE: usize = 8;

impl Spans {
    /// No spans; a place for them.
    pub(crate) const fn new() -> Self {
        Self {
            starts: [0; GRANULES + STARTS_AT_ONCE],
            count: 0,
            tags: [0; GRANULES],
        }
    }

    /// The spans of `page`.
    pub(crate) fn cut(&mut self, page: &TagPage) {
        for (pair, byte) in self.tags.as_chunks_mut().0.iter_mut().zip(page.as_packed()) {
            *pair = [byte & 0xf, byte >> 4];
        }
        // Before the first granule is one like it, behind the last one is one of another tag.
        let words = page
            .as_packed()
            .as_chunks()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word));
        let mut after = words.clone().skip(1);
        let mut before = u64::from(self.tags[0]);
        let mut count = 1;
        for (nth, word) in words.enumerate() {
            let after = after.next().unwrap_or(!word >> 60);
            let differs = word ^ (word << 4 | before);
            before = word >> 60;
            if differs != 0 {
                let lone =
                    nonzero(differs) & nonzero(word ^ (word >> 4 | after << 60)) & !nonzero(word);
                let begins = gather(nonzero(differs) & !lone);
                count = self.list(count, 16 * nth, begins);
            }
        }
        self.starts[count] = 0;
        self.count = count;
    }

    /// Lists spans that begin among the 16 granules from `first` on, behind the `count` that are
    /// listed. Returns how many there are then.
    #[inline(always)]
    fn list(&mut self, mut count: usize, first: usize, begins: u16) -> usize {
        for (half, begins) in begins.to_le_bytes().into_iter().enumerate() {
            let entry = POSITIONS[usize::from(begins)];
            let starts = (entry & POSITION_BITS) + (first + 8 * half) as u64 * EACH_BYTE;
            self.starts[count..count + STARTS_AT_ONCE].copy_from_slice(&starts.to_le_bytes());
            count += (entry >> 60) as usize;
        }
        count
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The spans, from the lowest address.
    #[inline(always)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = Span> {
        let mut start = 0;
        self.starts[1..=self.count].iter().map(move |&end| {
            let tag = self.tags[usize::from(start)];
            let last = self.tags[usize::from(end.wrapping_sub(1))];
            let length = end.wrapping_sub(start);
            start = end;
            let end = match tag {
                0 => End::Untagged,
                _ if last == tag => End::Tagged,
                _ => End::Gap,
            };
            Span { tag, length, end }
        })
    }
}

/// The highest bit of each nibble that is not zero.
#[inline(always)]
fn nonzero(nibbles: u64) -> u64 {
    (((nibbles & !HIGHEST) + !HIGHEST) | nibbles) & HIGHEST
}

/// The highest bit of each nibble, side by side.
#[inline(always)]
fn gather(nibbles: u64) -> u16 {
    let bits = nibbles >> 3;
    let pairs = bits | bits >> 3;
    let fours = (pairs | pairs >> 6) & 0x000f_000f_000f_000f;
    (fours.wrapping_mul(0x0001_0010_0100_1000) >> 48) as u16
}

/// The highest bit of each nibble.
const HIGHEST: u64 = 0x8888_8888_8888_8888;
const EACH_BYTE: u64 = 0x0101_0101_0101_0101;
const POSITION_BITS: u64 = 0x0707_0707_0707_0707;

/// The positions of the bits set in a byte, one a byte, the lowest first, and their count in 63:60.
const POSITIONS: [u64; 256] = {
    let mut table = [0; 256];
    let mut bits = 0;
    while bits < 256 {
        let (mut position, mut count) = (0, 0u64);
        while position < 8 {
            if bits >> position & 1 == 1 {
                table[bits] |= (position as u64) << (8 * count);
                count += 1;
            }
            position += 1;
        }
        table[bits] |= count << 60;
        bits += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A page of random tags, of which one in so many is that of the granule before.
    fn page(tags: &[u8], repeated: usize) -> TagPage {
        let mut page = TagPage::ZERO;
        let mut before = 0;
        for (granule, tag) in (0..=u8::MAX).zip(tags) {
            if granule == 0 || usize::from(granule) % repeated != 0 {
                before = *tag;
            }
            page.set(granule, Tag::from_low_bits(before));
        }
        page
    }

    proptest! {
        #[test]
        fn what_is_seen_to_have_more_spans_has_them(
            tags in prop::collection::vec(0u8..16, GRANULES),
            repeated in 2..40usize,
            most in 100..GRANULES,
        ) {
            let page = page(&tags, repeated);
            let mut spans = Spans::new();
            spans.cut(&page);
            prop_assert!(!has_more_spans_than(most, &page) || spans.count() > most);
        }

        #[test]
        fn a_page_without_untagged_granules_is_seen_to_have_more_spans_if_it_has(
            tags in prop::collection::vec(1u8..16, GRANULES),
            repeated in 2..40usize,
            most in 100..GRANULES,
        ) {
            let page = page(&tags, repeated);
            let mut spans = Spans::new();
            spans.cut(&page);
            prop_assert_eq!(has_more_spans_than(most, &page), spans.count() > most);
        }
    }
}
