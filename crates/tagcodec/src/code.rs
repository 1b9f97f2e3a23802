//! Prefix codes for the shapes of spans.
//!
//! A shape (length and end) is one of 60 symbols, some with extra bits. A [`Lengths`] says how many
//! bits each symbol's code has; from it follow the canonical code, the table that writes with it and
//! the table that reads it.

use crate::error::Error;
use crate::span::{ENDS, End, GRANULES, SHAPES, Span};

/// Symbols for the lengths of spans of one [`End`].
const LENGTHS: usize = EXACT + CLASSES;
/// How many symbols there are.
pub(crate) const SYMBOLS: usize = ENDS * LENGTHS;
/// Lengths up to this have a symbol of their own.
const EXACT: usize = 16;
/// Classes of longer ones: 17 to 32, 33 to 64, 65 to 128, 129 to 256.
const CLASSES: usize = 4;
/// The longest code.
pub(crate) const LONGEST: u32 = 10;
/// Bits of a tag.
const TAG_BITS: u32 = 4;
/// The most bits that a span without extra bits takes.
pub(crate) const SHORT_SPAN_BITS: u32 = TAG_BITS + LONGEST;
/// The most bits that a span takes.
pub(crate) const SPAN_BITS: u32 = SHORT_SPAN_BITS + extra_bits(CLASSES - 1);

/// Untagged spans do not say that their tag is 0.
const fn tag_bits(symbol: usize) -> u32 {
    if symbol / LENGTHS == End::Untagged as usize {
        0
    } else {
        TAG_BITS
    }
}

const fn extra_bits(class: usize) -> u32 {
    4 + class as u32
}

/// The shortest length of a class, less one.
const fn below(class: usize) -> usize {
    EXACT << class
}

/// The shortest length of a symbol, and its extra bits. Of which end the symbol is does not matter.
const fn lengths_of(symbol: usize) -> (usize, u32) {
    let kind = symbol % LENGTHS;
    if kind < EXACT {
        (kind + 1, 0)
    } else {
        (below(kind - EXACT) + 1, extra_bits(kind - EXACT))
    }
}

/// The shape of a span of 1 to 256 granules of this symbol's end.
const fn shape(symbol: usize, length: usize) -> usize {
    symbol / LENGTHS * GRANULES + length % GRANULES
}

/// The symbol of each shape.
const SYMBOL_OF: [u8; SHAPES] = {
    let mut table = [0; SHAPES];
    let mut symbol = 0;
    while symbol < SYMBOLS {
        let (shortest, extra_bits) = lengths_of(symbol);
        let mut extra = 0;
        while extra < 1 << extra_bits {
            table[shape(symbol, shortest + extra)] = symbol as u8;
            extra += 1;
        }
        symbol += 1;
    }
    table
};

/// How often each symbol occurs in up to [`PAGES_COUNTED`] pages. They and what follows from them fit
/// 16 bits, in which SSE2 and NEON multiply eight at once.
pub(crate) struct Counts([u16; SYMBOLS]);

/// The most pages whose spans are counted.
pub(crate) const PAGES_COUNTED: usize = 16;
const _: () = assert!(PAGES_COUNTED * GRANULES * (LONGEST as usize) < 1 << 16);

impl Counts {
    pub(crate) const fn new() -> Self {
        Self([0; SYMBOLS])
    }

    #[inline(always)]
    pub(crate) fn add(&mut self, span: Span) {
        self.0[usize::from(SYMBOL_OF[span.shape()])] += 1;
    }

    /// Bits that the spans counted take in a code. Tags and extra bits are the same in all codes and
    /// do not count.
    pub(crate) fn bits(&self, lengths: &Lengths) -> u16 {
        let each = self.0.iter().zip(&lengths.0);
        each.map(|(count, length)| count * u16::from(*length)).sum()
    }
}

/// The length of each symbol's code, 1 to [`LONGEST`].
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Lengths(pub(crate) [u8; SYMBOLS]);

impl Lengths {
    /// Bytes of a code's description.
    pub(crate) const BYTES: usize = SYMBOLS / 2;

    /// The best code for these counts. Symbols that were not counted have one too.
    pub(crate) fn of(counts: &Counts) -> Self {
        // A seen symbol weighs at least as much as all unseen ones.
        let mut order = [0u32; SYMBOLS];
        for (symbol, (entry, count)) in order.iter_mut().zip(&counts.0).enumerate() {
            *entry = (u32::from(*count) * SYMBOLS as u32 + 1) << 6 | symbol as u32;
        }
        order.sort_unstable();
        let mut weights = order.map(|entry| entry >> 6);
        minimum_redundancy(&mut weights);
        let mut of_length = [0u32; SYMBOLS];
        for length in weights {
            of_length[length.min(LONGEST) as usize] += 1;
        }
        shorten(&mut of_length);
        let mut lengths = [0; SYMBOLS];
        let mut rarest_first = order.iter();
        for length in (1..=LONGEST).rev() {
            for entry in rarest_first
                .by_ref()
                .take(of_length[length as usize] as usize)
            {
                lengths[(entry & 63) as usize] = length as u8;
            }
        }
        Self(lengths)
    }

    /// Writes it, four bits a symbol.
    pub(crate) fn to_bytes(&self) -> [u8; Self::BYTES] {
        core::array::from_fn(|i| self.0[2 * i] | self.0[2 * i + 1] << 4)
    }

    /// Reads it, and makes sure that every sequence of bits is a sequence of codes.
    pub(crate) fn from_bytes(bytes: &[u8; Self::BYTES]) -> Result<Self, Error> {
        let lengths: [u8; SYMBOLS] = core::array::from_fn(|i| bytes[i / 2] >> (i % 2 * 4) & 0xf);
        let valid = lengths.iter().all(|length| u32::from(*length) <= LONGEST);
        let space = |length: &u8| {
            if *length == 0 {
                0
            } else {
                1u32 << LONGEST >> (*length).min(LONGEST as u8)
            }
        };
        let complete = lengths.iter().map(space).sum::<u32>() == 1 << LONGEST;
        if valid && complete {
            Ok(Self(lengths))
        } else {
            Err(Error::Code)
        }
    }

    /// The canonical code of each symbol, its first bit lowest.
    const fn codes(&self) -> [u16; SYMBOLS] {
        let mut next = [0u16; LONGEST as usize + 2];
        let mut symbol = 0;
        while symbol < SYMBOLS {
            next[self.0[symbol] as usize + 1] += 1;
            symbol += 1;
        }
        next[1] = 0;
        let mut length = 1;
        while length <= LONGEST as usize {
            next[length + 1] = (next[length] + next[length + 1]) << 1;
            length += 1;
        }
        let mut codes = [0; SYMBOLS];
        symbol = 0;
        while symbol < SYMBOLS {
            let length = self.0[symbol] as usize;
            codes[symbol] = next[length].reverse_bits() >> ((16 - length) & 15);
            next[length] += 1;
            symbol += 1;
        }
        codes
    }
}

/// Turns weights, the smallest first, into the lengths of a Huffman code, the longest first
/// (Moffat and Katajainen, *In-place calculation of minimum-redundancy codes*, 1995).
fn minimum_redundancy(a: &mut [u32; SYMBOLS]) {
    let n = a.len();
    a[0] += a[1];
    let (mut root, mut leaf) = (0, 2);
    for next in 1..n - 1 {
        let mut weight = 0;
        for _ in 0..2 {
            if leaf >= n || root < next && a[root] < a[leaf] {
                weight += a[root];
                a[root] = next as u32;
                root += 1;
            } else {
                weight += a[leaf];
                leaf += 1;
            }
        }
        a[next] = weight;
    }
    a[n - 2] = 0;
    for next in (0..n - 2).rev() {
        a[next] = a[a[next] as usize] + 1;
    }
    let (mut available, mut used, mut depth) = (1usize, 0usize, 0);
    let mut next = n;
    let mut root = n as isize - 2;
    while available > 0 {
        while root >= 0 && a[root as usize] == depth {
            used += 1;
            root -= 1;
        }
        while available > used {
            next -= 1;
            a[next] = depth;
            available -= 1;
        }
        available = 2 * used;
        depth += 1;
        used = 0;
    }
}

/// Lengths that were cut to [`LONGEST`] take more room than there is: makes others longer until
/// the code is complete.
fn shorten(of_length: &mut [u32; SYMBOLS]) {
    let longest = LONGEST as usize;
    let mut space: u32 = (1..=longest)
        .map(|length| of_length[length] << (longest - length))
        .sum();
    while space > 1 << LONGEST {
        of_length[longest] -= 1;
        let shorter = (1..longest)
            .rev()
            .find(|length| of_length[*length] > 0)
            .unwrap_or(1);
        of_length[shorter] -= 1;
        of_length[shorter + 1] += 2;
        space -= 1;
    }
}

/// What to write for each shape: code and extra bits in 31:0, how many bits with the tag's in
/// 39:32, and where among them the tag is put in 47:40.
pub(crate) struct Writing([u64; SHAPES]);

impl Writing {
    pub(crate) const fn of(lengths: &Lengths) -> Self {
        let codes = lengths.codes();
        let mut table = [0; SHAPES];
        let mut symbol = 0;
        while symbol < SYMBOLS {
            let (shortest, extra_bits) = lengths_of(symbol);
            let code_bits = lengths.0[symbol] as u32;
            let bits = code_bits + tag_bits(symbol);
            let code = codes[symbol] as u64
                | ((bits + extra_bits) as u64) << 32
                | (code_bits as u64) << 40;
            let mut extra = 0;
            while extra < 1 << extra_bits {
                table[shape(symbol, shortest + extra)] = code | (extra as u64) << bits;
                extra += 1;
            }
            symbol += 1;
        }
        Self(table)
    }

    /// What to write for a span, and how many bits these are.
    #[inline(always)]
    pub(crate) fn get(&self, span: Span) -> (u64, u32) {
        let entry = self.0[span.shape()];
        let tag = u64::from(span.tag) << (entry >> 40);
        (u64::from(entry as u32) | tag, (entry >> 32) as u32 & 0xff)
    }
}

/// What the next bits mean, whichever they are.
pub(crate) struct Reading([u32; 1 << LONGEST]);

/// A symbol that was read.
#[derive(Clone, Copy)]
pub(crate) struct Read(u32);

impl Reading {
    pub(crate) const fn new() -> Self {
        Self([0; 1 << LONGEST])
    }

    /// Makes the table for a complete code. It is doubled for each length of codes, and those of
    /// that length put in.
    pub(crate) const fn fill(&mut self, lengths: &Lengths) {
        let codes = lengths.codes();
        let mut filled = 1;
        let mut length = 1;
        while length <= LONGEST {
            let (done, rest) = self.0.split_at_mut(filled);
            rest.split_at_mut(filled).0.copy_from_slice(done);
            filled *= 2;
            let mut symbol = 0;
            while symbol < SYMBOLS {
                if lengths.0[symbol] as u32 == length {
                    self.0[codes[symbol] as usize] = Read::new(symbol, length).0;
                }
                symbol += 1;
            }
            length += 1;
        }
    }

    const fn of(lengths: &Lengths) -> Self {
        let mut table = Self::new();
        table.fill(lengths);
        table
    }

    /// The span that these bits begin with.
    #[inline(always)]
    pub(crate) fn get(&self, bits: u64) -> Read {
        Read(self.0[bits as usize & ((1 << LONGEST) - 1)])
    }
}

impl Read {
    const fn new(symbol: usize, code_bits: u32) -> Self {
        let bits = code_bits + tag_bits(symbol);
        let last_mask = if symbol / LENGTHS == End::Gap as usize {
            0
        } else {
            0xf
        };
        let tag_mask = (1 << tag_bits(symbol)) - 1;
        let (length, class) = match lengths_of(symbol) {
            (length, 0) => (length, 0),
            (_, extra_bits) => (0, extra_bits - self::extra_bits(0)),
        };
        Self(bits | (length as u32) << 8 | last_mask << 16 | tag_mask << 20 | class << 24)
    }

    /// Bits of code and tag.
    #[inline(always)]
    pub(crate) fn bits(self) -> u32 {
        self.0 & 0xff
    }

    /// The tag, given the bits that begin with the code.
    #[inline(always)]
    pub(crate) fn tag(self, bits: u64) -> u8 {
        // Where there is no tag, the mask is 0 whatever the shift is.
        let behind_code = bits.wrapping_shr(self.bits().wrapping_sub(TAG_BITS));
        (behind_code as u32 & (self.0 >> 20 & 0xf)) as u8
    }

    /// How many granules, or 0 if extra bits say it.
    #[inline(always)]
    pub(crate) fn length(self) -> usize {
        (self.0 >> 8 & 0xff) as usize
    }

    /// How many granules, given the bits behind the code, and how many of these say it.
    pub(crate) fn long(self, behind: u64) -> (usize, u32) {
        let class = (self.0 >> 24) as usize;
        let extra = behind as usize & (below(class) - 1);
        (below(class) + 1 + extra, extra_bits(class))
    }

    /// The last granule's tag is the span's tag and this.
    #[inline(always)]
    pub(crate) fn last_mask(self) -> u8 {
        (self.0 >> 16) as u8 & 0xf
    }
}

/// A code with its tables.
pub(crate) struct Code {
    pub(crate) lengths: Lengths,
    pub(crate) writing: Writing,
    pub(crate) reading: Reading,
}

/// The codes that need no description.
pub(crate) static FIXED: [Code; FIXED_CODES] = {
    let [a, b, c, d, e] = FIXED_LENGTHS;
    [
        Code::of(a),
        Code::of(b),
        Code::of(c),
        Code::of(d),
        Code::of(e),
    ]
};

/// How many of these there are.
pub(crate) const FIXED_CODES: usize = 5;

/// The lengths of their codes, a line for each [`End`].
#[rustfmt::skip]
const FIXED_LENGTHS: [Lengths; FIXED_CODES] = [
    // small chunks with headers
    Lengths([
        7, 7, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 7, 7, 7, 7,
        9, 2, 2, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9, 9, 9, 9, 7, 7, 7, 7,
        6, 7, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 7, 7, 6, 6,
    ]),
    // larger chunks with headers
    Lengths([
        9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9,
        9, 4, 3, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 8, 8, 8, 8,
        7, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9,
    ]),
    // short runs
    Lengths([
        2, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 9, 9, 9, 9, 9, 8, 8, 8, 8,
        9, 7, 8, 8, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9,
        5, 6, 6, 7, 8, 8, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 8, 7, 7, 7,
    ]),
    // long runs
    Lengths([
        8, 7, 7, 5, 7, 7, 7, 4, 7, 7, 7, 7, 7, 7, 7, 4, 4, 4, 3, 3,
        9, 9, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 5, 5, 5, 5,
        8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 5, 5, 5, 5,
    ]),
    // blocks with untagged rests
    Lengths([
        4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 7, 8, 9, 9,
        9, 5, 5, 6, 6, 6, 6, 7, 7, 7, 8, 8, 8, 8, 9, 9, 8, 9, 9, 9,
        4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 7, 8, 9, 9,
    ]),
];

impl Code {
    const fn of(lengths: Lengths) -> Self {
        let (writing, reading) = (Writing::of(&lengths), Reading::of(&lengths));
        Self {
            lengths,
            writing,
            reading,
        }
    }

    /// Which of the fixed codes takes the fewest bits, and how many.
    pub(crate) fn best_fixed(counts: &Counts) -> (usize, u16) {
        let bits = FIXED.each_ref().map(|code| counts.bits(&code.lengths));
        let mut best = (0, bits[0]);
        for (i, bits) in bits.into_iter().enumerate() {
            if bits < best.1 {
                best = (i, bits);
            }
        }
        best
    }
}
