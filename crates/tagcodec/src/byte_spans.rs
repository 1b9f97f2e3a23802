//! Byte spans: spans of a byte each, for links that would have to wait for a prefix code.
//!
//! A byte is a tag and one of 16 symbols. What 14 of them mean is said for each group; the other two are spans whose lengths follow
//! behind the bytes of all spans. So all that a decoder has to wait for is where the span before ends.
//!
//! A [`Cutter`] takes some pages at a time through steps that are loops over arrays, with few branches: what is to be known of each
//! granule and whether a span begins there, then a list of these places, then the bytes of the spans between them. In all of them but
//! the list the compiler finds vectors.

use mte::TagPage;

use crate::batch::{indices, take};
use crate::error::Error;
use crate::span::{GRANULES, PACKED};
use crate::unpacked::unpacked_pages;

/// Pages of a group.
const GROUP: usize = 64;
/// Pages cut at a time. What is known of them stays in the first-level cache.
const RUN: usize = 8;
/// Pages with more spans hardly become smaller.
const MOST_SPANS: usize = 120;
/// Spans whose symbols are found at a time.
const AT_ONCE: usize = 32;
/// The most spans of a group: one that came from the page before is counted in each of two pages.
const GROUP_SPANS: usize = GROUP * (MOST_SPANS + 1);

/// How many pages at least are looked at to choose meanings, if there are so many.
const SAMPLED: usize = 8;
/// Other meanings are looked for if more than one span in so many is long, and taken if they help so many.
const WORTH: usize = 8;

/// Lengths that a symbol may stand for: 1 to 16 granules.
const LONGEST: usize = 16;
/// Symbols with a meaning of their own.
const MEANINGS: usize = 14;
/// The symbol of other spans without a gap; the next one is that of those with a gap.
const LONG: u8 = MEANINGS as u8;
/// In a byte of a long span's length: the next byte goes on with it.
const GOES_ON: u8 = u8::MAX;

/// A shape is a length, and in this bit whether there is a gap.
const GAP: u8 = 0x80;

/// What the symbols mean: bit *l* - 1 for spans of *l* granules without a gap, bit *l* + 15 for those with one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meanings(u32);

impl Meanings {
    /// For headers of one granule before chunks that are not large.
    pub(crate) const FIRST: Self = Self(0x03fe_008f);

    /// The commonest shapes.
    fn of(counts: &Counts) -> Self {
        let mut order: [u32; 2 * LONGEST] =
            core::array::from_fn(|shape| counts.shapes[shape] << 5 | shape as u32);
        order.sort_unstable();
        let commonest = order[2 * LONGEST - MEANINGS..].iter();
        Self(commonest.fold(0, |bits, entry| bits | 1 << (entry & 31)))
    }

    /// The shape that each symbol stands for.
    const fn shapes(self) -> [u8; MEANINGS] {
        let mut shapes = [0; _];
        let mut bits = self.0;
        let mut symbol = 0;
        while symbol < MEANINGS {
            let bit = bits.trailing_zeros() as u8;
            let gap = if bit < LONGEST as u8 { 0 } else { GAP };
            shapes[symbol] = (bit % LONGEST as u8 + 1) | gap;
            bits &= bits - 1;
            symbol += 1;
        }
        shapes
    }

    pub(crate) const fn to_bytes(self) -> [u8; 4] {
        self.0.to_le_bytes()
    }

    const fn from_bytes(bytes: [u8; 4]) -> Result<Self, Error> {
        let bits = u32::from_le_bytes(bytes);
        if bits.count_ones() as usize == MEANINGS {
            Ok(Self(bits))
        } else {
            Err(Error::Code)
        }
    }
}

/// How often spans of each shape occur that can have a symbol of their own.
struct Counts {
    /// By the bits of [`Meanings`].
    shapes: [u32; 2 * LONGEST],
    /// Of all spans.
    all: usize,
}

impl Counts {
    fn add(&mut self, length: u16, end_key: u8) {
        self.all += 1;
        let length = usize::from(length);
        if length <= LONGEST {
            self.shapes[length - 1 + usize::from(end_key & 1) * LONGEST] += 1;
        }
    }

    /// Spans that have a symbol of their own.
    fn meant(&self, meanings: Meanings) -> u32 {
        let counts = self.shapes.iter().enumerate();
        counts
            .filter(|(shape, _)| meanings.0 >> shape & 1 == 1)
            .map(|(_, count)| count)
            .sum()
    }
}

/// Behind which byte of [`Cutter::packed`] pages begin: there is one granule to see before them.
const BEFORE: usize = 16;

/// Places for keys: a power of two, so that an index needs no check.
const KEYS: usize = 2 * RUN * GRANULES;
/// Places for cuts: those of a page that has too many are listed before it is known.
const CUTS: usize = RUN * MOST_SPANS + GRANULES + 2 * AT_ONCE;

/// Cuts pages into spans and has the bytes of a group's.
pub(crate) struct Cutter {
    meanings: Meanings,
    symbols: Symbols,
    /// Pages, and a granule before and behind them.
    packed: [u8; BEFORE + RUN * PACKED + 1],
    /// Bit *i* of byte *n*: a span begins at granule 8 *n* + *i*.
    begins: [u8; RUN * GRANULES / 8],
    /// Of each granule the tag in bits 7:4, and whether the one before has tag 0 in bit 0.
    keys: [u8; KEYS],
    /// Where spans begin, and behind them where the last one ends.
    cuts: [u16; CUTS],
    /// How many spans that are.
    cut_spans: usize,
    /// The keys of these granules.
    cut_keys: [u8; CUTS],
    bytes: [u8; GROUP_SPANS + AT_ONCE],
    spans: usize,
    /// Of long spans, in the order of these.
    long_lengths: [u8; GROUP_SPANS + GROUP * GRANULES / GOES_ON as usize],
    long_bytes: usize,
}

impl Cutter {
    pub(crate) const fn new() -> Self {
        Self {
            meanings: Meanings::FIRST,
            symbols: Symbols::of(Meanings::FIRST),
            packed: [0; _],
            begins: [0; _],
            keys: [0; _],
            cuts: [0; _],
            cut_spans: 0,
            cut_keys: [0; _],
            bytes: [0; _],
            spans: 0,
            long_lengths: [0; _],
            long_bytes: 0,
        }
    }

    /// How many bytes [`Cutter::parts`] are.
    pub(crate) const fn bytes(&self) -> usize {
        size_of::<Meanings>() + 2 + self.spans + self.long_bytes
    }

    /// What the symbols mean, a byte a span, and long lengths.
    pub(crate) fn parts(&self) -> (Meanings, &[u8], &[u8]) {
        (
            self.meanings,
            &self.bytes[..self.spans],
            &self.long_lengths[..self.long_bytes],
        )
    }

    /// Makes the bytes of these pages of a group, at most 64 of them. Returns those that have too many spans and were left out.
    pub(crate) fn group(&mut self, pages: &[TagPage], which: u64) -> u64 {
        let left_out = self.spans_of(pages, which);
        let few_long = self.long_bytes * WORTH <= self.spans;
        if few_long || !self.find_better_meanings(pages, which & !left_out) {
            return left_out;
        }
        self.spans_of(pages, which)
    }

    fn spans_of(&mut self, pages: &[TagPage], mut which: u64) -> u64 {
        (self.spans, self.long_bytes) = (0, 0);
        let mut left_out = 0;
        let mut at_once = RUN;
        while which != 0 {
            let mut rest = which;
            let count = self.load(pages, &mut rest, at_once);
            self.look(count);
            let listed = self.list(count);
            (0..listed).for_each(|_| which &= which - 1);
            self.put();
            at_once = (2 * at_once).min(RUN);
            if listed < count {
                left_out |= which & which.wrapping_neg();
                which &= which - 1;
                at_once = 1;
            }
        }
        left_out
    }

    /// Takes up to `most` of the pages. Returns how many.
    fn load(&mut self, pages: &[TagPage], which: &mut u64, most: usize) -> usize {
        let (slots, _) = self.packed[BEFORE..].as_chunks_mut::<PACKED>();
        let mut count = 0;
        for slot in &mut slots[..most] {
            if *which == 0 {
                break;
            }
            *slot = *pages[which.trailing_zeros() as usize].as_packed();
            *which &= *which - 1;
            count += 1;
        }
        // Before the first granule is one like it, behind the last one is one of another tag.
        let end = BEFORE + count * PACKED;
        self.packed[BEFORE - 1] = self.packed[BEFORE] << 4;
        self.packed[end] = !self.packed[end - 1] >> 4;
        self.keys[count * GRANULES] = u8::from(self.packed[end - 1] >> 4 == 0);
        count
    }

    /// Finds keys and where spans begin.
    fn look(&mut self, count: usize) {
        let before = self.packed[BEFORE - 1..].as_chunks::<PACKED>().0;
        let these = self.packed[BEFORE..].as_chunks::<PACKED>().0;
        let after = self.packed[BEFORE + 1..].as_chunks::<PACKED>().0;
        let keys = self.keys.as_chunks_mut::<GRANULES>().0;
        let begins = self.begins.as_chunks_mut().0;
        for page in 0..count {
            let (before, these, after) = (&before[page], &these[page], &after[page]);
            for (i, pair) in keys[page].as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *pair = [
                    these[i] << 4 | u8::from(before[i] & 0xf0 == 0),
                    these[i] & 0xf0 | u8::from(these[i] & 0xf == 0),
                ];
            }
            let pairs = core::array::from_fn(|i| begins_of_pair(before[i], these[i], after[i]));
            begins[page] = gather(&pairs);
        }
    }

    /// Lists where spans begin. Returns the number of pages before the first one that has too many.
    fn list(&mut self, pages: usize) -> usize {
        let mut count = 1;
        let mut listed = 0;
        for begins in &self.begins.as_chunks::<{ GRANULES / 8 }>().0[..pages] {
            let count_before = count;
            for (nth, begins) in begins.as_chunks().0.iter().enumerate() {
                if u64::from_le_bytes(*begins) != 0 {
                    let first = listed * GRANULES + 64 * nth;
                    count = list_64(&mut self.cuts, count, first as u16, *begins);
                }
            }
            if count - count_before > MOST_SPANS {
                count = count_before;
                break;
            }
            listed += 1;
        }
        self.cuts[count] = (listed * GRANULES) as u16;
        self.cut_spans = if listed == 0 { 0 } else { count };
        listed
    }

    /// Adds the bytes of the spans listed.
    fn put(&mut self) {
        let count = self.cut_spans;
        let cuts = self.cuts.as_chunks::<8>().0;
        let cut_keys = self.cut_keys.as_chunks_mut::<8>().0;
        for (keys, cuts) in cut_keys.iter_mut().zip(&cuts[..count / 8 + 1]) {
            for (key, cut) in keys.iter_mut().zip(cuts) {
                *key = self.keys[usize::from(*cut) % KEYS];
            }
        }
        let begin_keys = self.cut_keys.as_chunks::<AT_ONCE>().0;
        let end_keys = self.cut_keys[1..].as_chunks().0;
        let begins = self.cuts.as_chunks().0;
        let ends = self.cuts[1..].as_chunks().0;
        let bytes = self.bytes[self.spans..].as_chunks_mut::<AT_ONCE>().0;
        for (nth, bytes) in bytes[..count.div_ceil(AT_ONCE)].iter_mut().enumerate() {
            let lengths = lengths(&begins[nth], &ends[nth]);
            let symbols = self.symbols.get(&lengths, &end_keys[nth]);
            *bytes = core::array::from_fn(|i| begin_keys[nth][i] & 0xf0 | symbols[i]);
        }
        let words = self.bytes[self.spans..].as_chunks().0;
        for (nth, word) in words[..count.div_ceil(8)].iter().enumerate() {
            for span in long_spans(u64::from_le_bytes(*word)).map(|i| 8 * nth + i) {
                // Behind the last span are bytes of no meaning.
                if span < count {
                    self.long_bytes += put_long_length(
                        self.cuts[span + 1] - self.cuts[span],
                        &mut self.long_lengths[self.long_bytes..],
                    );
                }
            }
        }
        self.spans += count;
    }

    /// Looks at a sample of the pages. Answers whether other meanings would save much, and has these then.
    #[cold]
    fn find_better_meanings(&mut self, pages: &[TagPage], which: u64) -> bool {
        let step = (which.count_ones() as usize / SAMPLED).max(1);
        let mut counts = Counts {
            shapes: [0; _],
            all: 0,
        };
        for i in indices(which).step_by(step) {
            self.load(pages, &mut (1 << i), 1);
            self.look(1);
            self.list(1);
            for cuts in self.cuts[..=self.cut_spans].windows(2) {
                counts.add(cuts[1] - cuts[0], self.keys[usize::from(cuts[1])]);
            }
        }
        let better = Meanings::of(&counts);
        let saved = counts.meant(better) - counts.meant(self.meanings);
        let worth_it = saved as usize * WORTH > counts.all;
        if worth_it {
            self.meanings = better;
            self.symbols = Symbols::of(better);
        }
        worth_it
    }
}

/// Lists the granules of 64, from `first` on, at which spans begin, behind the `count` that are listed. Returns how many there are then.
#[inline(always)]
fn list_64(cuts: &mut [u16; CUTS], mut count: usize, first: u16, begins: [u8; 8]) -> usize {
    for (eight, begins) in (0..).zip(begins) {
        let positions = &POSITIONS[usize::from(begins)];
        let positions: [u16; 8] = core::array::from_fn(|i| positions[i] + first + 8 * eight);
        cuts[count..count + 8].copy_from_slice(&positions);
        count += usize::from(ONES[usize::from(begins)]);
    }
    count
}

/// Writes a length less one. Returns how many bytes that were.
fn put_long_length(length: u16, out: &mut [u8]) -> usize {
    let mut rest = length - 1;
    let mut bytes = 0;
    while rest >= u16::from(GOES_ON) {
        out[bytes] = GOES_ON;
        bytes += 1;
        rest -= u16::from(GOES_ON);
    }
    out[bytes] = rest as u8;
    bytes + 1
}

/// Whether spans begin at the two granules of a byte, in bits 0 and 1. Bytes that overlap it tell of the granules beside it.
#[inline(always)]
fn begins_of_pair(before: u8, byte: u8, after: u8) -> u8 {
    let low_as_before = mask((byte ^ before >> 4) & 0xf == 0);
    let high_as_low = mask((byte ^ byte << 4) & 0xf0 == 0);
    let after_as_high = mask((byte ^ after << 4) & 0xf0 == 0);
    let low_is_gap = mask(byte & 0xf == 0) & !high_as_low;
    let high_is_gap = mask(byte & 0xf0 == 0) & !after_as_high;
    (!(low_as_before | low_is_gap) & 1) | (!(high_as_low | high_is_gap) & 2)
}

#[inline(always)]
const fn mask(condition: bool) -> u8 {
    if condition { 0xff } else { 0 }
}

/// Two bits a byte, to eight.
#[inline(always)]
fn gather(pairs: &[u8; GRANULES / 2]) -> [u8; GRANULES / 8] {
    let mut fours = [0; GRANULES / 4];
    for (four, pairs) in fours.iter_mut().zip(pairs.as_chunks().0) {
        let pairs = u16::from_le_bytes(*pairs);
        *four = (pairs | pairs >> 6) as u8 & 0xf;
    }
    let mut eights = [0; GRANULES / 8];
    for (eight, fours) in eights.iter_mut().zip(fours.as_chunks().0) {
        let fours = u16::from_le_bytes(*fours);
        *eight = (fours | fours >> 4) as u8;
    }
    eights
}

/// Lengths; those above 127 are all the same.
#[inline(always)]
fn lengths(begins: &[u16; AT_ONCE], ends: &[u16; AT_ONCE]) -> [u8; AT_ONCE] {
    core::array::from_fn(|i| ends[i].wrapping_sub(begins[i]).min(127) as u8)
}

/// The symbols of shapes, as many times as they are compared at once.
struct Symbols {
    shapes: [[u8; AT_ONCE]; MEANINGS],
    /// What makes them of the symbol of a long span.
    changes: [[u8; AT_ONCE]; MEANINGS],
}

impl Symbols {
    const fn of(meanings: Meanings) -> Self {
        let shapes = meanings.shapes();
        let mut symbols = Self {
            shapes: [[0; _]; _],
            changes: [[0; _]; _],
        };
        let mut symbol = 0;
        while symbol < MEANINGS {
            let long = LONG | shapes[symbol] >> 7;
            symbols.shapes[symbol] = [shapes[symbol]; _];
            symbols.changes[symbol] = [symbol as u8 ^ long; _];
            symbol += 1;
        }
        symbols
    }

    #[inline(always)]
    fn get(&self, lengths: &[u8; AT_ONCE], end_keys: &[u8; AT_ONCE]) -> [u8; AT_ONCE] {
        let of_spans: [u8; AT_ONCE] = core::array::from_fn(|i| lengths[i] | end_keys[i] << 7);
        let mut symbols = end_keys.map(|key| LONG | key & 1);
        for (shape, change) in self.shapes.iter().zip(&self.changes) {
            for (i, symbol) in symbols.iter_mut().enumerate() {
                *symbol ^= mask(of_spans[i] == shape[i]) & change[i];
            }
        }
        symbols
    }
}

/// Which of eight spans are long.
#[inline(always)]
fn long_spans(bytes: u64) -> impl Iterator<Item = usize> {
    const EACH: u64 = 0x0101_0101_0101_0101;
    const LONGS: u64 = LONG as u64 * EACH;
    // Bits 3:1 of a long one are all set.
    let carries = ((bytes & LONGS) + 2 * EACH) & (16 * EACH);
    indices(carries).map(|bit| bit / 8)
}

/// The positions of the bits set in a byte, the lowest first.
static POSITIONS: [[u16; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut bits = 0;
    while bits < 256 {
        let (mut position, mut count) = (0, 0);
        while position < 8 {
            if bits >> position & 1 == 1 {
                table[bits][count] = position;
                count += 1;
            }
            position += 1;
        }
        bits += 1;
    }
    table
};

/// How many these are.
static ONES: [u8; 256] = {
    let mut table = [0; 256];
    let mut bits = 0;
    while bits < 256 {
        table[bits] = (bits as u8).count_ones() as u8;
        bits += 1;
    }
    table
};

/// Room for the tags of a group, one a byte, and what may be written behind them.
pub(crate) const ROOM: usize = GROUP * GRANULES + LONGEST;

/// What each byte means.
pub(crate) struct Reading {
    /// The tags of its granules; those behind its length have no meaning.
    tags: [[u8; LONGEST]; 256],
    /// 0 for long spans.
    lengths: [u8; 256],
}

impl Reading {
    pub(crate) const fn new() -> Self {
        Self {
            tags: [[0; LONGEST]; 256],
            lengths: [0; 256],
        }
    }

    fn fill(&mut self, meanings: Meanings) {
        let mut lengths = [0; 16];
        for (symbol, shape) in meanings.shapes().into_iter().enumerate() {
            let length = shape & !GAP;
            lengths[symbol] = length;
            let mut tagged = [0xf; LONGEST];
            if shape & GAP != 0 {
                tagged[usize::from(length) - 1] = 0;
            }
            for tag in 0..16 {
                self.tags[usize::from(tag) << 4 | symbol] = tagged.map(|tagged| tagged & tag);
            }
        }
        self.lengths.as_chunks_mut().0.fill(lengths);
    }

    /// Reads the spans of some pages. Returns their tags.
    // Inlined, the loop is slower by half: its registers run out.
    #[inline(never)]
    pub(crate) fn read<'a>(
        &mut self,
        rest: &mut &[u8],
        pages: usize,
        tags: &'a mut [u8],
    ) -> Result<&'a [[u8; GRANULES]], Error> {
        self.fill(Meanings::from_bytes(*take(rest)?)?);
        let spans = usize::from(u16::from_le_bytes(*take(rest)?));
        let (bytes, mut long_lengths) = rest.split_at_checked(spans).ok_or(Error::Truncated)?;
        let end = pages * GRANULES;
        let mut at = 0;
        for byte in bytes {
            let length = usize::from(self.lengths[usize::from(*byte)]);
            if length > 0 {
                let to = tags.get_mut(at..).and_then(<[u8]>::first_chunk_mut);
                *to.ok_or(Error::Overrun)? = self.tags[usize::from(*byte)];
                at += length;
            } else {
                let length = long_length(&mut long_lengths)?;
                if at + length > end {
                    return Err(Error::Overrun);
                }
                let to = &mut tags[at..at + length];
                to.fill(byte >> 4);
                to[length - 1] &= if byte & 1 == 1 { 0 } else { 0xf };
                at += length;
            }
        }
        if at > end {
            return Err(Error::Overrun);
        }
        if at < end {
            return Err(Error::Length);
        }
        *rest = long_lengths;
        Ok(unpacked_pages(tags, pages))
    }
}

fn long_length(bytes: &mut &[u8]) -> Result<usize, Error> {
    let mut length = 1;
    loop {
        let [byte] = *take(bytes)?;
        length += usize::from(byte);
        if byte < GOES_ON {
            return Ok(length);
        }
    }
}
