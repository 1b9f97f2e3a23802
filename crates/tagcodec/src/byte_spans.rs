//! Byte spans: spans of a byte each, for links that would have to wait for a prefix code.
//!
//! A byte is a tag and one of 16 symbols. What 14 of them mean is said for each group; the other two are spans whose lengths follow
//! behind the bytes of all spans. So all that a decoder has to wait for is where the span before ends.
//!
//! A [`Cutter`] takes some pages at a time through steps that are loops over arrays: which 64 granules have more than one tag, where
//! spans begin in these and what there is to know of their granules, a list of these places, the bytes of the spans between them, the
//! lengths of long ones. None has a branch that depends on tags: programs mix large chunks with small ones, so that it would be taken
//! for no reason that a CPU could foretell.

use mte::TagPage;

use crate::batch::{indices, take};
use crate::error::Error;
use crate::look::{WORD, WORD_GRANULES, Window};
use crate::span::{GRANULES, PACKED};
use crate::unpacked::unpacked_pages;

/// Pages of a group.
const GROUP: usize = 64;
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
            self.shapes[length - 1 + usize::from(end_key & 0xf == 0) * LONGEST] += 1;
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

/// Pages cut at a time. What is known of them stays in the first-level cache.
const RUN: usize = 16;
/// Behind which byte of [`Cutter::packed`] pages begin: there is one granule to see before them.
const BEFORE: usize = 16;
/// Places for keys: a power of two, so that an index needs no check.
const KEYS: usize = 2 * RUN * GRANULES;
/// Places for cuts: those of pages that have too many are listed before it is known.
const CUTS: usize = RUN * GRANULES + 2 * AT_ONCE;
/// Of a page, as many as are looked at at a time.
const WORDS: usize = PACKED / WORD;

/// Cuts pages into spans and has the bytes of a group's.
pub(crate) struct Cutter {
    meanings: Meanings,
    symbols: Symbols,
    /// Pages, and a granule before and behind them.
    packed: [u8; BEFORE + RUN * PACKED + 1],
    /// Which 64 granules of these have more than one tag.
    differing: [u8; RUN * WORDS],
    /// Of each of those, bit *i* of byte *n*: a span begins at granule 8 *n* + *i*.
    begins: [[u8; 8]; RUN * WORDS],
    /// The keys of their granules, and of the one behind all pages.
    keys: [u8; KEYS],
    /// Where spans begin, and behind them where the last one ends.
    cuts: [u16; CUTS],
    /// How many spans that are.
    cut_spans: usize,
    /// The keys of these granules.
    cut_keys: [u8; CUTS],
    /// Which of these spans are long.
    cut_long: [u16; CUTS],
    bytes: [u8; GROUP_SPANS + AT_ONCE],
    spans: usize,
    /// Of long spans, in the order of these.
    long_lengths: [u8; GROUP_SPANS + GROUP * GRANULES / GOES_ON as usize + USUAL_BYTES],
    long_bytes: usize,
}

impl Cutter {
    pub(crate) const fn new() -> Self {
        Self {
            meanings: Meanings::FIRST,
            symbols: Symbols::of(Meanings::FIRST),
            packed: [0; _],
            differing: [0; _],
            begins: [[0; _]; _],
            keys: [0; _],
            cuts: [0; _],
            cut_spans: 0,
            cut_keys: [0; _],
            cut_long: [0; _],
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
            if self.cut(count) {
                self.put();
                which = rest;
                at_once = (2 * at_once).min(RUN);
            } else {
                if count == 1 {
                    left_out |= which & !rest;
                    which = rest;
                }
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
        let (first, last) = (self.packed[BEFORE] & 0xf, self.packed[end - 1] >> 4);
        self.packed[BEFORE - 1] = first << 4 | first;
        self.packed[end] = !last;
        self.keys[0] = first << 4;
        self.keys[count * GRANULES] = last;
        count
    }

    /// Lists where spans begin. Answers whether no page has too many of them. Of more than one page that is no already if many begin
    /// in 64 granules.
    fn cut(&mut self, pages: usize) -> bool {
        let mut differing = 0;
        for word in 0..pages * WORDS {
            self.differing[differing % (RUN * WORDS)] = word as u8;
            differing += usize::from(window(&self.packed, word).differs());
        }
        let differing = &self.differing[..differing];
        let keys = self.keys.as_chunks_mut::<WORD_GRANULES>().0;
        for (word, begins) in differing.iter().zip(&mut self.begins) {
            let word = usize::from(*word) % (RUN * WORDS);
            *begins = window(&self.packed, word)
                .look(&mut keys[word])
                .to_le_bytes();
        }
        let mut count = 1;
        let mut most = 0;
        for (word, begins) in differing.iter().zip(&self.begins) {
            let eight = WORD_GRANULES / 8 * usize::from(*word);
            let behind = list(&mut self.cuts, count, eight, begins);
            most = most.max(behind - count);
            count = behind;
        }
        self.cuts[count] = (pages * GRANULES) as u16;
        self.cut_spans = count;
        match pages {
            1 => count <= MOST_SPANS,
            _ => most <= MOST_SPANS / WORDS,
        }
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
        let mut with_long = [0; CUTS / AT_ONCE];
        let mut blocks = 0;
        for (nth, bytes) in bytes[..count.div_ceil(AT_ONCE)].iter_mut().enumerate() {
            let lengths = lengths(&begins[nth], &ends[nth]);
            let symbols = self.symbols.get(&lengths, &end_keys[nth]);
            *bytes = core::array::from_fn(|i| begin_keys[nth][i] & 0xf0 | symbols[i]);
            with_long[blocks % (CUTS / AT_ONCE)] = nth as u8;
            let any_long = symbols.map(|symbol| mask(symbol >= LONG)) != [0; _];
            blocks += usize::from(any_long);
        }
        self.put_long_lengths(&with_long[..blocks]);
        self.spans += count;
    }

    /// Adds the lengths of long spans. They are among these, [`AT_ONCE`] at a time.
    fn put_long_lengths(&mut self, blocks: &[u8]) {
        let bytes = self.bytes[self.spans..].as_chunks::<AT_ONCE>().0;
        let mut count = 0;
        for block in blocks {
            let block = usize::from(*block);
            let long = long_spans(&bytes[block]);
            count = list(&mut self.cut_long, count, AT_ONCE / 8 * block, &long);
        }
        for span in self.cut_long[..count].iter().map(|span| usize::from(*span)) {
            // Behind the last span are bytes of no meaning.
            if span < self.cut_spans {
                let length = self.cuts[span + 1] - self.cuts[span];
                let to = &mut self.long_lengths[self.long_bytes..];
                self.long_bytes += put_long_length(length, to);
            }
        }
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
            self.cut(1);
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

#[inline(always)]
fn window(packed: &[u8; BEFORE + RUN * PACKED + 1], word: usize) -> Window<'_> {
    let window = packed[BEFORE - 1 + WORD * word..].first_chunk();
    Window(window.expect("there is a byte behind the last page"))
}

/// Lists the positions of bits, the first one's being 8 `eight`, behind the `count` that are listed. Returns how many there are then.
#[inline(always)]
fn list<const PLACES: usize, const BYTES: usize>(
    listed: &mut [u16; PLACES],
    mut count: usize,
    eight: usize,
    bits: &[u8; BYTES],
) -> usize {
    let mut first = EIGHTS[eight % EIGHTS.len()];
    for bits in bits {
        let positions = &POSITIONS.0[usize::from(*bits)];
        let positions: [u16; 8] = core::array::from_fn(|i| positions[i] + first[i]);
        listed[count..count + 8].copy_from_slice(&positions);
        count += usize::from(ONES[usize::from(*bits)]);
        first = first.map(|first| first + 8);
    }
    count
}

/// Bytes written for a long length whatever it is.
const USUAL_BYTES: usize = 4;

/// Writes a length less one. Returns how many bytes that were.
#[inline(always)]
fn put_long_length(length: u16, out: &mut [u8]) -> usize {
    let rest = length - 1;
    let last = usize::from(rest / u16::from(GOES_ON));
    out[..USUAL_BYTES].fill(GOES_ON);
    if last > USUAL_BYTES {
        out[USUAL_BYTES..last].fill(GOES_ON);
    }
    out[last] = (rest % u16::from(GOES_ON)) as u8;
    last + 1
}

#[inline(always)]
const fn mask(condition: bool) -> u8 {
    if condition { 0xff } else { 0 }
}

/// Lengths; those above 127 are all the same.
#[inline(always)]
fn lengths(begins: &[u16; AT_ONCE], ends: &[u16; AT_ONCE]) -> [u8; AT_ONCE] {
    core::array::from_fn(|i| ends[i].wrapping_sub(begins[i]).min(127) as u8)
}

/// Symbols in a row whose shapes are in a row too, each number as many times as shapes are compared at once.
#[repr(align(16))]
struct Row {
    /// Makes the first shape 0.
    less_first: [u8; AT_ONCE],
    /// The last one is then this.
    last: [u8; AT_ONCE],
    /// The symbol of the first one.
    symbol: [u8; AT_ONCE],
    /// The symbol of long spans that are like these.
    long: [u8; AT_ONCE],
}

/// The symbols of shapes.
struct Symbols {
    rows: [Row; MEANINGS],
    count: usize,
}

impl Symbols {
    const fn of(meanings: Meanings) -> Self {
        const NONE: Row = Row {
            less_first: [0; _],
            last: [0; _],
            symbol: [0; _],
            long: [0; _],
        };
        let shapes = meanings.shapes();
        let mut symbols = Self {
            rows: [NONE; _],
            count: 0,
        };
        let mut symbol = 0;
        while symbol < MEANINGS {
            let first = symbol;
            while symbol + 1 < MEANINGS && shapes[symbol + 1] == shapes[symbol] + 1 {
                symbol += 1;
            }
            symbols.rows[symbols.count] = Row {
                less_first: [shapes[first].wrapping_neg(); _],
                last: [(symbol - first) as u8; _],
                symbol: [first as u8; _],
                long: [LONG | shapes[first] >> 7; _],
            };
            symbols.count += 1;
            symbol += 1;
        }
        symbols
    }

    #[inline(always)]
    fn get(&self, lengths: &[u8; AT_ONCE], end_keys: &[u8; AT_ONCE]) -> [u8; AT_ONCE] {
        let gaps = end_keys.map(|key| mask(key & 0xf == 0));
        let shapes: [u8; AT_ONCE] = core::array::from_fn(|i| lengths[i] | gaps[i] & GAP);
        let mut symbols = gaps.map(|gap| LONG | gap & 1);
        for row in &self.rows[..self.count] {
            let nth: [u8; AT_ONCE] =
                core::array::from_fn(|i| shapes[i].wrapping_add(row.less_first[i]));
            let these: [u8; AT_ONCE] = core::array::from_fn(|i| {
                mask(nth[i] <= row.last[i]) & (nth[i].wrapping_add(row.symbol[i]) ^ row.long[i])
            });
            symbols = core::array::from_fn(|i| symbols[i] ^ these[i]);
        }
        symbols
    }
}

/// Which spans are long.
#[inline(always)]
fn long_spans(bytes: &[u8; AT_ONCE]) -> [u8; AT_ONCE / 8] {
    const EACH: u64 = 0x0101_0101_0101_0101;
    const LONGS: u64 = LONG as u64 * EACH;
    /// Brings bits 0 of the bytes to the highest one.
    const SIDE_BY_SIDE: u64 = 0x0102_0408_1020_4080;
    let words = bytes.as_chunks().0;
    core::array::from_fn(|nth| {
        // Bits 3:1 of a long one are all set.
        let carries = (u64::from_le_bytes(words[nth]) & LONGS) + 2 * EACH;
        ((carries >> 4 & EACH).wrapping_mul(SIDE_BY_SIDE) >> 56) as u8
    })
}

/// The numbers divisible by eight, eight times each. If they were made of one, that would be done anew for each byte.
static EIGHTS: [[u16; 8]; RUN * GRANULES / 8] = {
    let mut table = [[0; 8]; _];
    let mut eight = 0;
    while eight < RUN * GRANULES / 8 {
        table[eight] = [8 * eight as u16; 8];
        eight += 1;
    }
    table
};

#[repr(align(16))]
struct Positions([[u16; 8]; 256]);

/// The positions of the bits set in a byte, the lowest first.
static POSITIONS: Positions = {
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
    Positions(table)
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
