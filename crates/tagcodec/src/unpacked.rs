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

/// Page `nth` of tags that were read.
pub(crate) fn pack(tags: &[u8], nth: usize, page: &mut TagPage) {
    let (pages, _) = tags.as_chunks::<GRANULES>();
    let packed = page.as_packed_mut();
    for (byte, pair) in packed.iter_mut().zip(pages[nth].as_chunks::<2>().0) {
        let pair = u16::from_le_bytes(*pair);
        *byte = (pair | pair >> 4) as u8;
    }
}

/// A stream of spans, and the tags that were read from it, one a byte.
pub(crate) struct SpanReader<'a, 'b, const ROOM: usize> {
    tags: &'a mut [u8; ROOM],
    bits: BitReader<'b>,
    at: usize,
    end: usize,
}

impl<'a, 'b, const ROOM: usize> SpanReader<'a, 'b, ROOM> {
    /// Will read the spans of `pages` pages, for which there is [`room`].
    pub(crate) fn new(tags: &'a mut [u8; ROOM], bytes: &'b [u8], pages: usize) -> Self {
        Self {
            tags,
            bits: BitReader::new(bytes),
            at: 0,
            end: pages * GRANULES,
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
        'refill: while a.has_room() && b.has_room() {
            a.bits.refill();
            b.bits.refill();
            for _ in 0..STEPS {
                if !a.short_span(reading) {
                    a.long_span(reading)?;
                    continue 'refill;
                }
                if !b.short_span(reading) {
                    b.long_span(reading)?;
                    continue 'refill;
                }
            }
        }
        Ok([a.read(reading)?, b.read(reading)?])
    }

    /// Reads a stream to its end. Returns how many bytes it took.
    #[inline(never)]
    pub(crate) fn read(mut self, reading: &Reading) -> Result<usize, Error> {
        'refill: while self.has_room() {
            self.bits.refill();
            for _ in 0..STEPS {
                if !self.short_span(reading) {
                    self.long_span(reading)?;
                    continue 'refill;
                }
            }
        }
        while self.at < self.end {
            self.bits.refill();
            if !self.short_span(reading) {
                self.long_span(reading)?;
            }
        }
        if self.at > self.end {
            return Err(self.overrun());
        }
        self.bits.bytes_used().ok_or(Error::Truncated)
    }

    /// What is wrong when a span goes beyond the pages: it may have been read from behind the bytes.
    #[cold]
    fn overrun(&self) -> Error {
        self.bits
            .bytes_used()
            .map_or(Error::Truncated, |_| Error::Overrun)
    }

    /// Is there room for as many short spans as are read at once?
    #[inline(always)]
    fn has_room(&self) -> bool {
        self.at + MARGIN <= self.end
    }

    /// Reads a span, if it is one without extra bits.
    #[inline(always)]
    fn short_span(&mut self, reading: &Reading) -> bool {
        let next = self.bits.peek();
        let read = reading.get(next);
        let length = read.length();
        if length == 0 {
            return false;
        }
        self.bits.skip(read.bits());
        let tag = next as u8 & 0xf;
        let to = &mut self.tags[self.at..self.at + AT_ONCE];
        to.fill(tag);
        to[(length - 1) % AT_ONCE] = tag & read.last_mask();
        self.at += length;
        true
    }

    /// Reads a span with extra bits.
    #[inline(always)]
    fn long_span(&mut self, reading: &Reading) -> Result<(), Error> {
        self.bits.refill();
        let next = self.bits.peek();
        let read = reading.get(next);
        let tag = next as u8 & 0xf;
        let (length, extra) = read.long(next >> read.bits());
        self.bits.skip(read.bits() + extra);
        if length > self.end - self.at {
            return Err(self.overrun());
        }
        let to = &mut self.tags[self.at..][..length];
        to.fill(tag);
        to[length - 1] = tag & read.last_mask();
        self.at += length;
        Ok(())
    }
}
