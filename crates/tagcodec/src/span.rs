//! Cuts a page into spans.
//!
//! A *span* is a run of granules of one tag, together with the granule behind it if that one alone
//! has tag 0. Allocators put a header of one untagged granule before each tagged chunk, so a chunk
//! and the next one's header are one span. Where there are no headers a span is just a run.

use mte::TagPage;

/// Bytes of packed tags.
pub(crate) const PACKED: usize = 128;
/// Granules of a page.
pub(crate) const GRANULES: usize = 256;

/// In [`Spans::tags`]: the granule before this one ends a span that is closed by a lone tag 0.
pub(crate) const AFTER_GAP: u8 = 0x10;

/// The spans of a page.
pub(crate) struct Spans {
    /// The granule each begins at, and 0 behind the last one.
    starts: [u8; GRANULES + STARTS_AT_ONCE],
    count: usize,
    /// The tag of each granule, [`AFTER_GAP`] added where that holds. The last granule's successor
    /// is granule 0.
    tags: [u8; GRANULES],
}

/// A span: 1 to 256 granules.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    /// The tag, in bits 3:0.
    pub(crate) tag: u8,
    /// How many granules, the closing one counted; 0 stands for 256.
    pub(crate) length: u8,
    /// [`AFTER_GAP`] if the last granule has tag 0, else 0.
    pub(crate) gap: u8,
}

impl Span {
    /// `gap` and `length` as one index.
    #[inline(always)]
    pub(crate) fn shape(self) -> usize {
        usize::from(self.length) | usize::from(self.gap) << 4
    }
}

/// How many shapes there are.
pub(crate) const SHAPES: usize = 512;

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
        // Before the first granule is one like it, behind the last one is one of another tag.
        let mut padded = [0xff; GRANULES + 2];
        for (i, byte) in page.as_packed().iter().enumerate() {
            padded[2 * i + 1] = byte & 0xf;
            padded[2 * i + 2] = byte >> 4;
        }
        padded[0] = padded[1];
        let mut lone = [0u8; GRANULES + 1];
        for i in 0..GRANULES {
            let [before, own, after] = [padded[i], padded[i + 1], padded[i + 2]];
            lone[i + 1] = u8::from((own == 0) & (before != 0) & (after != 0));
        }
        let mut begins = [0u8; GRANULES];
        for i in 0..GRANULES {
            let [before, own] = [padded[i], padded[i + 1]];
            begins[i] = u8::from(own != before) & !lone[i + 1];
            self.tags[i] = own | lone[i] << 4;
        }
        begins[0] = 1;
        self.tags[0] |= lone[GRANULES] << 4;
        self.list(&begins);
    }

    /// Lists the granules whose byte is 1.
    fn list(&mut self, begins: &[u8; GRANULES]) {
        let mut count = 0;
        for (i, flags) in begins.as_chunks::<8>().0.iter().enumerate() {
            let bits = u64::from_le_bytes(*flags).wrapping_mul(GATHER) >> 56;
            let entry = POSITIONS[bits as usize];
            let starts = (entry & POSITION_BITS) + 8 * i as u64 * EACH_BYTE;
            self.starts[count..count + STARTS_AT_ONCE].copy_from_slice(&starts.to_le_bytes());
            count += (entry >> 60) as usize;
        }
        self.starts[count] = 0;
        self.count = count;
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The spans, from the lowest address.
    #[inline(always)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = Span> {
        let mut start = 0;
        let mut tag = self.tags[0];
        self.starts[1..=self.count].iter().map(move |&end| {
            let after = self.tags[usize::from(end)];
            let span = Span {
                tag: tag & 0xf,
                length: end.wrapping_sub(start),
                gap: after & AFTER_GAP,
            };
            (start, tag) = (end, after);
            span
        })
    }
}

const EACH_BYTE: u64 = 0x0101_0101_0101_0101;
/// Times this, a word of bytes that are 0 or 1 has them in its bits 63:56.
const GATHER: u64 = 0x0102_0408_1020_4080;
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
