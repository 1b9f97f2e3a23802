//! Bits in bytes: the first bit written is the lowest of the first byte.
//!
//! Writer and reader hold some bits in a register and touch memory eight bytes at a time, so both
//! want a little room behind what they write or read.

/// How many bits may be written between two flushes, or read after one refill.
pub(crate) const BITS_AT_ONCE: u32 = 56;

/// Bytes behind the last one that a flush may touch.
pub(crate) const WRITE_MARGIN: usize = 8;

/// Writes bits into a buffer.
pub(crate) struct BitWriter<'a> {
    out: &'a mut [u8],
    position: Position,
}

/// Where a writer stands; it can be put back there.
#[derive(Clone, Copy)]
pub(crate) struct Position {
    bytes: usize,
    held: u64,
    held_bits: u32,
}

impl<'a> BitWriter<'a> {
    /// A writer at the beginning of `out`, which has `WRITE_MARGIN` more bytes than will be written.
    pub(crate) fn new(out: &'a mut [u8]) -> Self {
        let position = Position {
            bytes: 0,
            held: 0,
            held_bits: 0,
        };
        Self { out, position }
    }

    /// Adds the low `count` bits of `bits`; the others are 0.
    #[inline(always)]
    pub(crate) fn put(&mut self, (bits, count): (u64, u32)) {
        self.position.held |= bits << self.position.held_bits;
        self.position.held_bits += count;
    }

    /// Moves whole bytes out of the register, so that `BITS_AT_ONCE` more fit.
    #[inline(always)]
    pub(crate) fn flush(&mut self) {
        let at = &mut self.position;
        self.out[at.bytes..at.bytes + WRITE_MARGIN].copy_from_slice(&at.held.to_le_bytes());
        at.bytes += (at.held_bits / 8) as usize;
        at.held >>= at.held_bits & !7;
        at.held_bits %= 8;
    }

    pub(crate) fn position(&self) -> Position {
        self.position
    }

    pub(crate) fn go_back_to(&mut self, position: Position) {
        self.position = position;
    }

    /// Fills the last byte with zeros; the next bit begins a byte. Returns the bytes written so far.
    pub(crate) fn align(&mut self) -> usize {
        self.flush();
        self.position.bytes += usize::from(self.position.held_bits > 0);
        self.position.held = 0;
        self.position.held_bits = 0;
        self.position.bytes
    }
}

impl Position {
    /// Bits from the beginning.
    pub(crate) fn bits(self) -> usize {
        self.bytes * 8 + self.held_bits as usize
    }
}

/// A place in bytes from which bits are read. Behind the bytes are zeros; [`BitReader::bytes_used`]
/// tells whether they were used.
#[derive(Clone, Copy, Default)]
pub(crate) struct BitReader {
    /// Bits that were read.
    position: usize,
    /// The bits that come next.
    held: u64,
}

impl BitReader {
    /// Makes at least `BITS_AT_ONCE` bits ready.
    #[inline(always)]
    pub(crate) fn refill(&mut self, bytes: &[u8]) {
        let next = self.position / 8;
        let word = match bytes.get(next..).and_then(<[u8]>::first_chunk) {
            Some(chunk) => u64::from_le_bytes(*chunk),
            None => last_word(bytes, next),
        };
        self.held = word >> (self.position % 8);
    }

    /// The bits that come next, the first one lowest.
    #[inline(always)]
    pub(crate) fn peek(self) -> u64 {
        self.held
    }

    /// Goes on by `count` bits, which are at most as many as are ready.
    #[inline(always)]
    pub(crate) fn skip(&mut self, count: u32) {
        self.held >>= count;
        self.position += count as usize;
    }

    /// How many of `bytes` were begun, if there were so many.
    pub(crate) fn bytes_used(self, bytes: &[u8]) -> Option<usize> {
        let used = self.position.div_ceil(8);
        (used <= bytes.len()).then_some(used)
    }
}

#[cold]
fn last_word(bytes: &[u8], next: usize) -> u64 {
    let rest = bytes.get(next..).unwrap_or_default();
    let mut word = [0; 8];
    word[..rest.len()].copy_from_slice(rest);
    u64::from_le_bytes(word)
}
