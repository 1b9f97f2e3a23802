//! Turns spans back into tags, one a byte, and these into pages.

use mte::TagPage;

use crate::bits::{BITS_AT_ONCE, BitReader};
use crate::code::{Reading, SHORT_SPAN_BITS};
use crate::error::Error;
use crate::span::GRANULES;

/// Bytes written for a span whatever its length.
const AT_ONCE: usize = 16;
/// Spans between two refills.
const STEPS: usize = 4;
const _: () = assert!(STEPS as u32 * SHORT_SPAN_BITS <= BITS_AT_ONCE);
const MARGIN: usize = STEPS * AT_ONCE;

/// Bytes for the tags of so many pages, and what may be written behind them.
pub(crate) const fn room(pages: usize) -> usize {
    pages * GRANULES + MARGIN
}

/// The tags of the first pages of those that were read.
pub(crate) fn unpacked_pages(tags: &[u8], pages: usize) -> &[[u8; GRANULES]] {
    &tags.as_chunks().0[..pages]
}

/// Packs the tags of a page that were read.
pub(crate) fn pack(tags: &[u8; GRANULES], page: &mut TagPage) {
    let packed = page.as_packed_mut();
    for (byte, pair) in packed.iter_mut().zip(tags.as_chunks::<2>().0) {
        let pair = u16::from_le_bytes(*pair);
        *byte = (pair | pair >> 4) as u8;
    }
}

/// A stream of spans, and room for the tags that are read from it, one a byte.
pub(crate) struct SpanReader<'a, 'b, const ROOM: usize> {
    tags: &'a mut [u8; ROOM],
    end: usize,
    bytes: &'b [u8],
}

/// How far a stream was read. Apart from the reader, so that it is held in registers.
#[derive(Clone, Copy, Default)]
struct Progress {
    bits: BitReader,
    /// The granule that comes next.
    at: usize,
}

impl<'a, 'b, const ROOM: usize> SpanReader<'a, 'b, ROOM> {
    /// Will read the spans of `pages` pages, for which there is [`room`].
    pub(crate) fn new(tags: &'a mut [u8; ROOM], bytes: &'b [u8], pages: usize) -> Self {
        Self {
            tags,
            end: pages * GRANULES,
            bytes,
        }
    }

    /// Reads two streams in turn: in one alone, each span has to wait for the one before to be known.
    /// Returns what [`SpanReader::read`] does, for both.
    #[inline(never)]
    pub(crate) fn read_both(
        mut a: Self,
        mut b: Self,
        reading: &Reading,
    ) -> Result<[usize; 2], Error> {
        let (mut at_a, mut at_b) = (Progress::default(), Progress::default());
        'refill: while a.has_room(at_a) && b.has_room(at_b) {
            at_a.bits.refill(a.bytes);
            at_b.bits.refill(b.bytes);
            for _ in 0..STEPS {
                if !a.short_span(&mut at_a, reading) {
                    at_a = a.long_span(at_a, reading)?;
                    continue 'refill;
                }
                if !b.short_span(&mut at_b, reading) {
                    at_b = b.long_span(at_b, reading)?;
                    continue 'refill;
                }
            }
        }
        Ok([a.read_on(at_a, reading)?, b.read_on(at_b, reading)?])
    }

    /// Reads a stream to its end. Returns how many bytes it took.
    pub(crate) fn read(mut self, reading: &Reading) -> Result<usize, Error> {
        self.read_on(Progress::default(), reading)
    }

    #[inline(never)]
    fn read_on(&mut self, mut at: Progress, reading: &Reading) -> Result<usize, Error> {
        'refill: while self.has_room(at) {
            at.bits.refill(self.bytes);
            for _ in 0..STEPS {
                if !self.short_span(&mut at, reading) {
                    at = self.long_span(at, reading)?;
                    continue 'refill;
                }
            }
        }
        while at.at < self.end {
            at.bits.refill(self.bytes);
            if !self.short_span(&mut at, reading) {
                at = self.long_span(at, reading)?;
            }
        }
        if at.at > self.end {
            return Err(self.overrun(at));
        }
        at.bits.bytes_used(self.bytes).ok_or(Error::Truncated)
    }

    /// What is wrong when a span goes beyond the pages: it may have been read from behind the bytes.
    #[cold]
    fn overrun(&self, at: Progress) -> Error {
        at.bits
            .bytes_used(self.bytes)
            .map_or(Error::Truncated, |_| Error::Overrun)
    }

    /// Is there room for as many short spans as are read at once?
    #[inline(always)]
    fn has_room(&self, at: Progress) -> bool {
        at.at + MARGIN <= self.end
    }

    /// Reads a span, if it is one without extra bits.
    #[inline(always)]
    fn short_span(&mut self, at: &mut Progress, reading: &Reading) -> bool {
        let next = at.bits.peek();
        let read = reading.get(next);
        let length = read.length();
        if length == 0 {
            return false;
        }
        at.bits.skip(read.bits());
        let tag = read.tag(next);
        let to = &mut self.tags[at.at..at.at + AT_ONCE];
        to.fill(tag);
        to[(length - 1) % AT_ONCE] = tag & read.last_mask();
        at.at += length;
        true
    }

    /// Reads a span with extra bits.
    #[inline(always)]
    fn long_span(&mut self, mut at: Progress, reading: &Reading) -> Result<Progress, Error> {
        at.bits.refill(self.bytes);
        let next = at.bits.peek();
        let read = reading.get(next);
        let tag = read.tag(next);
        let (length, extra) = read.long(next >> read.bits());
        at.bits.skip(read.bits() + extra);
        if length > self.end - at.at {
            return Err(self.overrun(at));
        }
        let to = &mut self.tags[at.at..][..length];
        to.fill(tag);
        to[length - 1] = tag & read.last_mask();
        at.at += length;
        Ok(at)
    }
}
