//! The batch form: many pages, coded together in groups.

use mte::{Tag, TagPage};

use crate::bits::BitWriter;
use crate::byte_spans::{self, Cutter};
use crate::code::{Code, Counts, FIXED, FIXED_CODES, Lengths, PAGES_COUNTED, Reading, Writing};
use crate::error::Error;
use crate::page::{
    MAX_PAGE_LEN, RAW, SPANS_MARGIN, cut, decode_page, encode_page, put_raw, put_spans,
};
use crate::span::{PACKED, Spans, alike, uniform};
use crate::unpacked::{SpanReader, pack, room, unpacked_pages};

/// Pages of a group; the last one of a batch may have fewer.
const GROUP: usize = 64;
/// Pages of a stream.
const STREAM: usize = GROUP / 2;
/// Groups with fewer pages in spans have one stream.
const FEWEST_FOR_TWO_STREAMS: usize = 4;

/// Heads of groups in which pages differ: 0x20 to 0x3f.
const MIXED: u8 = 0x20;
const LAST_MIXED: u8 = 0x3f;
const SAME_PLANE: u8 = 0x08;
const OTHER_PLANE: u8 = 0x10;
/// Which code: 0 is one that is described, others are the fixed ones.
const CODE: u8 = 0x07;
const OWN_CODE: u8 = 0;
const FIRST_CODE: u8 = 1;
/// No prefix code: byte spans.
const BYTE_SPANS: u8 = FIRST_CODE + FIXED_CODES as u8;

/// How many pages at least are looked at to choose a code, if there are so many.
const SAMPLED: usize = 8;
const _: () = assert!(2 * SAMPLED <= PAGES_COUNTED);

/// The most bytes that [`encode_batch`] makes of this many pages: one a page above raw.
#[must_use]
pub const fn max_batch_len(pages: usize) -> usize {
    pages * (PACKED + 1)
}

/// How the pages of a group are held: bit *i* of a plane for page *i*.
///
/// | same | other | page *i* |
/// |---|---|---|
/// | 0 | 0 | in spans |
/// | 1 | 0 | has the tags of page *i* - 1 |
/// | 0 | 1 | has one tag |
/// | 1 | 1 | in the page form |
#[derive(Clone, Copy, Default)]
struct Kinds {
    same: u64,
    other: u64,
}

impl Kinds {
    fn of(pages: &[TagPage]) -> Self {
        let mut kinds = Self::default();
        let mut before = None;
        for (i, page) in pages.iter().enumerate() {
            if before.is_some_and(|before| alike(before, page)) {
                kinds.same |= 1 << i;
            } else if uniform(page).is_some() {
                kinds.other |= 1 << i;
            }
            before = Some(page);
        }
        kinds
    }

    fn in_spans(self, pages: usize) -> u64 {
        !(self.same | self.other) & first(pages)
    }

    fn copied(self) -> u64 {
        self.same & !self.other
    }

    fn uniform(self) -> u64 {
        self.other & !self.same
    }

    /// Pages that were to be in spans are in the page form.
    fn set_alone(&mut self, pages: u64) {
        self.same |= pages;
        self.other |= pages;
    }

    fn alone(self) -> u64 {
        self.same & self.other
    }
}

/// The lowest `count` of 64 bits.
const fn first(count: usize) -> u64 {
    if count == 0 {
        0
    } else {
        u64::MAX >> (64 - count)
    }
}

/// The indices of the bits set.
pub(crate) fn indices(mut bits: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let index = (bits != 0).then(|| bits.trailing_zeros() as usize);
        bits &= bits.wrapping_sub(1);
        index
    })
}

/// Codes pages together, as [`Encoder::batch`] does, with an encoder on the stack.
///
/// # Errors
/// [`Error::NoRoom`] if `out` is shorter than [`max_batch_len`].
pub fn encode_batch(pages: &[TagPage], out: &mut [u8]) -> Result<usize, Error> {
    Encoder::new().batch(pages, out)
}

/// What is to be had from coding a batch. One decoder reads all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Effort {
    /// The fewest bytes, spans in a prefix code. For files, and for links slow enough that every byte is waited for.
    #[default]
    Full,
    /// Few bytes in little time, spans of a byte each. For links on which coding with [`Effort::Full`] would be waited for, and for
    /// what is decoded soon and often. On the tags of real programs it takes about a quarter more bytes, in half the time or less.
    Quick,
    /// The least time: pages with more than one tag stay as they are. For links that take the bytes of a page in less time than its
    /// tags are coded.
    Least,
}

/// Codes batches, and has the room for it, 57 KiB, which need not be cleared for each. What [`Effort::Quick`] made of one batch
/// it tries first on the next.
pub struct Encoder {
    spans: Spans,
    streams: [u8; GROUP * PACKED + SPANS_MARGIN],
    cutter: Cutter,
}

/// A code chosen for a group.
enum Choice {
    /// One of those that need no description.
    Fixed(usize),
    /// One that has to be described.
    Own(Lengths),
}

/// Where the two streams lie in [`Encoder::streams`].
struct Streams {
    /// Pages and bytes of the first.
    first: (usize, usize),
    /// Bytes of both.
    bytes: usize,
}

/// The spans of a group.
enum Coded<'a> {
    /// In a prefix code, in [`Encoder::streams`].
    Streams(&'a Choice, Streams),
    /// A byte each, in [`Encoder::cutter`].
    Bytes,
}

impl Encoder {
    /// Room for any batch.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            spans: Spans::new(),
            streams: [0; _],
            cutter: Cutter::new(),
        }
    }

    /// Codes pages together. Returns how many bytes it wrote to `out`; the count of pages is not
    /// among what they say.
    ///
    /// # Errors
    /// [`Error::NoRoom`] if `out` is shorter than [`max_batch_len`].
    pub fn batch(&mut self, pages: &[TagPage], out: &mut [u8]) -> Result<usize, Error> {
        self.batch_with(Effort::Full, pages, out)
    }

    /// Codes pages together, as [`Encoder::batch`] does, with this effort.
    ///
    /// # Errors
    /// [`Error::NoRoom`] if `out` is shorter than [`max_batch_len`].
    pub fn batch_with(
        &mut self,
        effort: Effort,
        pages: &[TagPage],
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let needed = max_batch_len(pages.len());
        if out.len() < needed {
            return Err(Error::NoRoom {
                needed,
                given: out.len(),
            });
        }
        let mut written = 0;
        for group in pages.chunks(GROUP) {
            written += self.group(effort, group, &mut out[written..]);
        }
        Ok(written)
    }

    fn group(&mut self, effort: Effort, pages: &[TagPage], out: &mut [u8]) -> usize {
        let mut kinds = Kinds::of(pages);
        if kinds.other == 1 && kinds.same == first(pages.len()) & !1 {
            out[0] = pages[0].get(0).value();
            return 1;
        }
        let in_spans = kinds.in_spans(pages.len());
        let len = match effort {
            Effort::Full => {
                let choice = self.choose(pages, kinds);
                let streams = match &choice {
                    Choice::Own(lengths) => self.streams(pages, &mut kinds, &Writing::of(lengths)),
                    Choice::Fixed(code) => self.streams(pages, &mut kinds, &FIXED[*code].writing),
                };
                let coded = Coded::Streams(&choice, streams);
                self.assemble(pages, kinds, &coded, encode_page, out)
            }
            Effort::Quick => {
                kinds.set_alone(self.cutter.group(pages, in_spans));
                self.assemble(pages, kinds, &Coded::Bytes, put_raw, out)
            }
            Effort::Least => {
                kinds.set_alone(in_spans);
                self.assemble(pages, kinds, &Coded::Bytes, put_raw, out)
            }
        };
        len.unwrap_or_else(|| raw(pages, out))
    }

    /// Chooses a code from a sample of the pages.
    fn choose(&mut self, pages: &[TagPage], kinds: Kinds) -> Choice {
        let in_spans = kinds.in_spans(pages.len());
        if in_spans == 0 {
            return Choice::Fixed(0);
        }
        let step = (in_spans.count_ones() as usize / SAMPLED).max(1);
        let mut counts = Counts::new();
        for i in indices(in_spans).step_by(step) {
            if cut(&pages[i], &mut self.spans) {
                self.spans.iter().for_each(|span| counts.add(span));
            }
        }
        let own = Lengths::of(&counts);
        let description = 8 * Lengths::BYTES as u16 / step as u16;
        let (fixed, bits) = Code::best_fixed(&counts);
        if bits <= counts.bits(&own) + description {
            Choice::Fixed(fixed)
        } else {
            Choice::Own(own)
        }
    }

    /// Writes the spans of all pages that have few enough; the others become pages in page form.
    fn streams(&mut self, pages: &[TagPage], kinds: &mut Kinds, writing: &Writing) -> Streams {
        let in_spans = kinds.in_spans(pages.len());
        let count = in_spans.count_ones() as usize;
        let half = if count < FEWEST_FOR_TWO_STREAMS {
            usize::MAX
        } else {
            count.div_ceil(2)
        };
        let mut writer = BitWriter::new(&mut self.streams);
        let mut first = (0, 0);
        let mut done = 0;
        for (nth, i) in indices(in_spans).enumerate() {
            if nth == half {
                first = (done, writer.align());
            }
            if cut(&pages[i], &mut self.spans) && put_spans(&self.spans, writing, &mut writer) {
                done += 1;
            } else {
                kinds.set_alone(1 << i);
            }
        }
        Streams {
            first,
            bytes: writer.align(),
        }
    }

    /// Puts the parts of a group together, unless they are longer than raw.
    fn assemble(
        &self,
        pages: &[TagPage],
        kinds: Kinds,
        coded: &Coded<'_>,
        put_page: impl Fn(&TagPage, &mut [u8; MAX_PAGE_LEN]) -> usize,
        out: &mut [u8],
    ) -> Option<usize> {
        let limit = 1 + pages.len() * PACKED;
        let plane = pages.len().div_ceil(8);
        let most_heads = 1 + 2 * plane + pages.len().div_ceil(2) + Lengths::BYTES + 3;
        let any_in_spans = kinds.in_spans(pages.len()) != 0;
        let (code, bytes) = match coded {
            _ if !any_in_spans => (FIRST_CODE, 0),
            Coded::Streams(Choice::Own(_), streams) => (OWN_CODE, streams.bytes),
            Coded::Streams(Choice::Fixed(code), streams) => {
                (FIRST_CODE + *code as u8, streams.bytes)
            }
            Coded::Bytes => (BYTE_SPANS, self.cutter.bytes()),
        };
        if bytes > limit.saturating_sub(most_heads) {
            return None;
        }
        let mut to = Appender { out, len: 0 };
        let same = if kinds.same != 0 { SAME_PLANE } else { 0 };
        let other = if kinds.other != 0 { OTHER_PLANE } else { 0 };
        to.append(&[MIXED | same | other | code]);
        for bits in [kinds.same, kinds.other]
            .into_iter()
            .filter(|bits| *bits != 0)
        {
            to.append(&bits.to_le_bytes()[..plane]);
        }
        let mut tags = indices(kinds.uniform()).map(|i| pages[i].get(0).value());
        while let Some(low) = tags.next() {
            to.append(&[low | tags.next().unwrap_or(0) << 4]);
        }
        if any_in_spans {
            match coded {
                Coded::Streams(choice, streams) => self.append_streams(choice, streams, &mut to),
                Coded::Bytes => {
                    let (meanings, spans, long_lengths) = self.cutter.parts();
                    to.append(&meanings.to_bytes());
                    to.append(&(spans.len() as u16).to_le_bytes());
                    to.append(spans);
                    to.append(long_lengths);
                }
            }
        }
        for i in indices(kinds.alone()) {
            let mut coded = [0; MAX_PAGE_LEN];
            let len = put_page(&pages[i], &mut coded);
            if to.len + len > limit {
                return None;
            }
            to.append(&coded[..len]);
        }
        Some(to.len)
    }

    fn append_streams(&self, choice: &Choice, streams: &Streams, to: &mut Appender<'_>) {
        if let Choice::Own(lengths) = choice {
            to.append(&lengths.to_bytes());
        }
        to.append(&[streams.first.0 as u8]);
        if streams.first.0 > 0 {
            to.append(&(streams.first.1 as u16).to_le_bytes());
        }
        to.append(&self.streams[..streams.bytes]);
    }
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}

/// Bytes that are filled from the first on.
struct Appender<'a> {
    out: &'a mut [u8],
    len: usize,
}

impl Appender<'_> {
    fn append(&mut self, bytes: &[u8]) {
        self.out[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

fn raw(pages: &[TagPage], out: &mut [u8]) -> usize {
    out[0] = RAW;
    for (to, page) in out[1..].chunks_exact_mut(PACKED).zip(pages) {
        to.copy_from_slice(page.as_packed());
    }
    1 + pages.len() * PACKED
}

/// Decodes pages, as [`Decoder::batch`] does, with a decoder on the stack.
///
/// # Errors
/// Any but [`Error::NoRoom`]; what `pages` then holds is not specified.
pub fn decode_batch(bytes: &[u8], pages: &mut [TagPage]) -> Result<usize, Error> {
    Decoder::new().batch(bytes, pages)
}

/// Decodes batches, and has the room for it, 24 KiB, which need not be cleared for each.
pub struct Decoder {
    own: Reading,
    bytes: byte_spans::Reading,
    /// Of the pages of two streams, or of all in spans, one a byte.
    tags: [[u8; room(STREAM)]; 2],
}

const _: () = assert!(2 * room(STREAM) >= byte_spans::ROOM);

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// Room for any batch.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            own: Reading::new(),
            bytes: byte_spans::Reading::new(),
            tags: [[0; _]; 2],
        }
    }

    /// Decodes as many pages as `pages` has room for. Returns how many of the bytes they took; the
    /// others are not looked at.
    ///
    /// # Errors
    /// Any but [`Error::NoRoom`]; what `pages` then holds is not specified.
    pub fn batch(&mut self, bytes: &[u8], pages: &mut [TagPage]) -> Result<usize, Error> {
        let mut rest = bytes;
        for group in pages.chunks_mut(GROUP) {
            self.group(&mut rest, group)?;
        }
        Ok(bytes.len() - rest.len())
    }

    fn group(&mut self, rest: &mut &[u8], pages: &mut [TagPage]) -> Result<(), Error> {
        let [head] = *take(rest)?;
        match head {
            0..=0xf => pages.fill(TagPage::filled(Tag::from_low_bits(head))),
            RAW => {
                for page in pages {
                    *page = TagPage::from_packed(*take(rest)?);
                }
            }
            MIXED..=LAST_MIXED if head & CODE <= BYTE_SPANS => {
                return self.mixed(head, rest, pages);
            }
            _ => return Err(Error::Reserved(head)),
        }
        Ok(())
    }

    fn mixed(&mut self, head: u8, rest: &mut &[u8], pages: &mut [TagPage]) -> Result<(), Error> {
        let count = pages.len();
        let mut plane = |present: bool| {
            if present {
                read_plane(rest, count)
            } else {
                Ok(0)
            }
        };
        let kinds = Kinds {
            same: plane(head & SAME_PLANE != 0)?,
            other: plane(head & OTHER_PLANE != 0)?,
        };
        if (kinds.same | kinds.other) & !first(count) != 0 || kinds.copied() & 1 != 0 {
            return Err(Error::Kinds);
        }
        self.uniform(kinds.uniform(), rest, pages)?;
        self.spans(head & CODE, kinds.in_spans(count), rest, pages)?;
        for i in indices(kinds.alone()) {
            let used = decode_page(rest, &mut pages[i])?;
            *rest = &rest[used..];
        }
        for i in indices(kinds.copied()) {
            let (before, page) = pages.split_at_mut(i);
            page[0].clone_from(&before[i - 1]);
        }
        Ok(())
    }

    fn uniform(&self, which: u64, rest: &mut &[u8], pages: &mut [TagPage]) -> Result<(), Error> {
        let mut which = indices(which);
        while let Some(i) = which.next() {
            let [tags] = *take(rest)?;
            pages[i].fill(Tag::from_low_bits(tags));
            if let Some(i) = which.next() {
                pages[i].fill(Tag::from_low_bits(tags >> 4));
            }
        }
        Ok(())
    }

    fn spans(
        &mut self,
        code: u8,
        which: u64,
        rest: &mut &[u8],
        pages: &mut [TagPage],
    ) -> Result<(), Error> {
        let count = which.count_ones() as usize;
        if count == 0 {
            return Ok(());
        }
        let reading = match code {
            BYTE_SPANS => {
                let tags = self.bytes.read(rest, count, self.tags.as_flattened_mut())?;
                for (i, tags) in indices(which).zip(tags) {
                    pack(tags, &mut pages[i]);
                }
                return Ok(());
            }
            OWN_CODE => {
                self.own.fill(&Lengths::from_bytes(take(rest)?)?);
                &self.own
            }
            fixed => &FIXED[usize::from(fixed - FIRST_CODE)].reading,
        };
        let [split] = *take(rest)?;
        let split = usize::from(split);
        let first_bytes = match split {
            0 => 0,
            _ => usize::from(u16::from_le_bytes(*take(rest)?)),
        };
        if split > STREAM
            || count
                .checked_sub(split)
                .is_none_or(|second| second > STREAM)
        {
            return Err(Error::Kinds);
        }
        let (first, second) = rest.split_at_checked(first_bytes).ok_or(Error::Truncated)?;
        let [first_tags, second_tags] = &mut self.tags;
        let a = SpanReader::new(first_tags, first, split);
        let b = SpanReader::new(second_tags, second, count - split);
        let [a, b] = SpanReader::read_both(a, b, reading)?;
        if a != first_bytes {
            return Err(Error::Length);
        }
        *rest = &second[b..];
        let tags = unpacked_pages(first_tags, split)
            .iter()
            .chain(unpacked_pages(second_tags, count - split));
        for (i, tags) in indices(which).zip(tags) {
            pack(tags, &mut pages[i]);
        }
        Ok(())
    }
}

fn read_plane(rest: &mut &[u8], pages: usize) -> Result<u64, Error> {
    let mut bits = [0; 8];
    let bytes = pages.div_ceil(8);
    let (plane, behind) = rest.split_at_checked(bytes).ok_or(Error::Truncated)?;
    bits[..bytes].copy_from_slice(plane);
    *rest = behind;
    Ok(u64::from_le_bytes(bits))
}

/// The next `N` bytes.
pub(crate) fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Result<&'a [u8; N], Error> {
    let (bytes, behind) = rest.split_first_chunk().ok_or(Error::Truncated)?;
    *rest = behind;
    Ok(bytes)
}
