//! The page form: one page, decodable alone.

use mte::{Tag, TagPage};

use crate::batch::take;
use crate::bits::{BITS_AT_ONCE, BitWriter, WRITE_MARGIN};
use crate::code::{Code, Counts, FIXED, FIXED_CODES, SPAN_BITS, Writing};
use crate::error::Error;
use crate::span::{PACKED, Spans, has_more_spans_than, uniform};
use crate::unpacked::{SpanReader, pack, room, unpacked_pages};

/// The head of packed tags as they are.
pub(crate) const RAW: u8 = 0x10;
/// The head of spans in the first of the fixed codes.
const SPANS: u8 = 0x11;
const LAST_SPANS: u8 = SPANS + FIXED_CODES as u8 - 1;
/// The head of one byte of packed tags that repeats; those of 2, 4, 8, … bytes follow.
const PERIODIC: u8 = 0x18;
const LAST_PERIODIC: u8 = PERIODIC + PACKED.ilog2() as u8 - 1;

/// Pages with more spans hardly become smaller.
const MOST_SPANS: usize = 8 * PACKED / 5;

/// The most bytes that [`encode_page`] makes of a page: one above raw.
pub const MAX_PAGE_LEN: usize = PACKED + 1;

/// Codes a page. Returns how many bytes of `out` it wrote: 1 for a page of one tag, at most
/// [`MAX_PAGE_LEN`].
pub fn encode_page(page: &TagPage, out: &mut [u8; MAX_PAGE_LEN]) -> usize {
    if let Some(tag) = uniform(page) {
        out[0] = tag.value();
        return 1;
    }
    let mut spans = Spans::new();
    cut(page, &mut spans)
        .then(|| in_spans(&spans, out))
        .flatten()
        .or_else(|| periodic(page, out))
        .unwrap_or_else(|| put_raw(page, out))
}

/// Cuts a page into spans. Answers no if it has too many, and these are then of no meaning.
#[inline(always)]
pub(crate) fn cut(page: &TagPage, spans: &mut Spans) -> bool {
    if has_more_spans_than(MOST_SPANS, page) {
        return false;
    }
    spans.cut(page);
    spans.count() <= MOST_SPANS
}

/// Writes the packed tags as they are.
pub(crate) fn put_raw(page: &TagPage, out: &mut [u8; MAX_PAGE_LEN]) -> usize {
    out[0] = RAW;
    out[1..].copy_from_slice(page.as_packed());
    MAX_PAGE_LEN
}

fn in_spans(spans: &Spans, out: &mut [u8; MAX_PAGE_LEN]) -> Option<usize> {
    let mut counts = Counts::new();
    spans.iter().for_each(|span| counts.add(span));
    let (code, _) = Code::best_fixed(&counts);
    let mut stream = [0; PACKED + SPANS_MARGIN];
    let mut writer = BitWriter::new(&mut stream);
    if !put_spans(spans, &FIXED[code].writing, &mut writer) {
        return None;
    }
    let bytes = writer.align();
    out[0] = SPANS + code as u8;
    out[1..=bytes].copy_from_slice(&stream[..bytes]);
    Some(1 + bytes)
}

/// Pages whose spans are many but return again and again.
fn periodic(page: &TagPage, out: &mut [u8; MAX_PAGE_LEN]) -> Option<usize> {
    let packed = page.as_packed();
    let repeats = |log: &u8| packed[1 << log..] == packed[..PACKED - (1 << log)];
    let log = (0..PACKED.ilog2() as u8).find(repeats)?;
    out[0] = PERIODIC + log;
    out[1..=1 << log].copy_from_slice(&packed[..1 << log]);
    Some(1 + (1 << log))
}

/// Bytes behind those of a page's tags that [`put_spans`] may touch before it gives up.
pub(crate) const SPANS_MARGIN: usize = MOST_SPANS * SPAN_BITS as usize / 8 - PACKED + WRITE_MARGIN;

const _: () = assert!(2 * SPAN_BITS <= BITS_AT_ONCE);

/// Writes the spans of a page. If they take more bits than the packed tags, nothing is written and
/// the answer is no.
#[inline(always)]
pub(crate) fn put_spans(spans: &Spans, writing: &Writing, writer: &mut BitWriter<'_>) -> bool {
    let before = writer.position();
    let mut spans = spans.iter();
    while let Some(span) = spans.next() {
        writer.put(writing.get(span));
        if let Some(span) = spans.next() {
            writer.put(writing.get(span));
        }
        writer.flush();
    }
    let fits = writer.position().bits() - before.bits() <= 8 * PACKED;
    if !fits {
        writer.go_back_to(before);
    }
    fits
}

/// Decodes a page. Returns how many of the bytes it took; the others are not looked at.
///
/// # Errors
/// Any but [`Error::NoRoom`], [`Error::Code`], [`Error::Kinds`] and [`Error::Length`]; what `page`
/// then holds is not specified.
pub fn decode_page(bytes: &[u8], page: &mut TagPage) -> Result<usize, Error> {
    let mut rest = bytes;
    let [head] = *take(&mut rest)?;
    match head {
        0..=0xf => page.fill(Tag::from_low_bits(head)),
        RAW => *page = TagPage::from_packed(*take(&mut rest)?),
        SPANS..=LAST_SPANS => {
            let mut tags = [0; room(1)];
            let reading = &FIXED[usize::from(head - SPANS)].reading;
            let used = SpanReader::new(&mut tags, rest, 1).read(reading)?;
            rest = &rest[used..];
            pack(&unpacked_pages(&tags, 1)[0], page);
        }
        PERIODIC..=LAST_PERIODIC => {
            let period = 1 << (head - PERIODIC);
            let (pattern, behind) = rest.split_at_checked(period).ok_or(Error::Truncated)?;
            for repeat in page.as_packed_mut().chunks_exact_mut(period) {
                repeat.copy_from_slice(pattern);
            }
            rest = behind;
        }
        _ => return Err(Error::Reserved(head)),
    }
    Ok(bytes.len() - rest.len())
}
