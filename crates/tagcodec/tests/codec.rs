//! Any pages come back; any bytes are refused or decoded, with no panic.

use mte::{Tag, TagPage};
use proptest::collection::vec;
use proptest::prelude::*;
use tagcodec::{
    Effort, Encoder, Error, MAX_PAGE_LEN, decode_batch, decode_page, encode_batch, encode_page,
    max_batch_len,
};

/// A page of runs, some of them one granule of tag 0.
fn page_of_runs() -> impl Strategy<Value = TagPage> {
    let run = (
        0u8..16,
        prop_oneof![Just(1usize), 1usize..6, 1usize..300],
        any::<bool>(),
    );
    vec(run, 1..260).prop_map(|runs| {
        let tags = runs.into_iter().flat_map(|(tag, length, gap)| {
            std::iter::repeat_n(tag, length).chain(gap.then_some(0))
        });
        let mut page = TagPage::ZERO;
        for (granule, tag) in (0..=u8::MAX).zip(tags) {
            page.set(granule, Tag::from_low_bits(tag));
        }
        page
    })
}

fn any_page() -> impl Strategy<Value = TagPage> {
    prop_oneof![
        4 => page_of_runs(),
        1 => any::<[u8; 128]>().prop_map(TagPage::from_packed),
        1 => (0u8..16).prop_map(|tag| TagPage::filled(Tag::from_low_bits(tag))),
        1 => any::<[u8; 4]>().prop_map(|four| TagPage::from_packed(std::array::from_fn(|i| four[i % 4]))),
    ]
}

/// Pages, some of them repeated.
fn any_pages(most: usize) -> impl Strategy<Value = Vec<TagPage>> {
    vec(
        (any_page(), prop_oneof![4 => Just(1usize), 1 => 1usize..40]),
        0..most,
    )
    .prop_map(|pages| {
        pages
            .into_iter()
            .flat_map(|(page, times)| std::iter::repeat_n(page, times))
            .collect()
    })
}

fn coded(pages: &[TagPage]) -> Vec<u8> {
    coded_with(Effort::Full, pages)
}

fn coded_with(effort: Effort, pages: &[TagPage]) -> Vec<u8> {
    let mut out = vec![0; max_batch_len(pages.len())];
    let len = Encoder::new()
        .batch_with(effort, pages, &mut out)
        .expect("there is room");
    out.truncate(len);
    out
}

fn sample() -> Vec<TagPage> {
    (0..70u8)
        .map(|nth| {
            let mut page = TagPage::filled(Tag::from_low_bits(nth));
            for granule in (0..=u8::MAX).step_by(2 + usize::from(nth) % 9) {
                page.set(granule, Tag::from_low_bits(granule.wrapping_mul(nth)));
            }
            page
        })
        .collect()
}

#[test]
fn the_least_effort_still_makes_little_of_pages_with_one_tag() {
    let mut pages = vec![TagPage::ZERO; 64];
    pages[7] = sample()[3].clone();
    let mut out = vec![0; max_batch_len(pages.len())];
    let len = Encoder::new()
        .batch_with(Effort::Least, &pages, &mut out)
        .expect("there is room");
    assert!(len < 160, "{len}");
}

/// A page of spans of so many granules, the last of which is a gap.
fn chunks_with_headers(length: u8) -> TagPage {
    let mut page = TagPage::filled(Tag::from_low_bits(length | 1));
    for chunk in 0..=u8::MAX / length {
        (chunk * length..(chunk * length).saturating_add(length))
            .for_each(|granule| page.set(granule, Tag::from_low_bits(1 + chunk % 15)));
        page.set((chunk * length).saturating_add(length - 1), Tag::ZERO);
    }
    page
}

/// Effort::Quick for one batch after the other; returns the bytes of each.
fn quickly(batches: &[&[TagPage]]) -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new();
    let each = batches.iter().map(|pages| {
        let mut out = vec![0; max_batch_len(pages.len())];
        let len = encoder
            .batch_with(Effort::Quick, pages, &mut out)
            .expect("there is room");
        out.truncate(len);
        out
    });
    each.collect()
}

#[test]
fn a_quick_encoder_learns_which_spans_are_common() {
    let unusual: Vec<_> = (0..64).map(|_| chunks_with_headers(14)).collect();
    let unusual: Vec<_> = unusual
        .iter()
        .zip(0..)
        .map(|(page, nth)| {
            let mut page = page.clone();
            page.set(0, Tag::from_low_bits(nth & 7));
            page
        })
        .collect();

    let coded = quickly(&[&unusual]);

    // 19 spans a page, of a byte each.
    assert!(coded[0].len() < 64 * 22, "{}", coded[0].len());
}

#[test]
fn what_a_quick_encoder_has_learned_is_in_its_bytes() {
    let unusual = sample();
    let usual: Vec<_> = (3..9).map(chunks_with_headers).collect();

    let coded = quickly(&[&usual, &unusual, &usual]);

    let mut back = vec![TagPage::ZERO; usual.len()];
    for bytes in [&coded[0], &coded[2]] {
        assert_eq!(decode_batch(bytes, &mut back), Ok(bytes.len()));
        assert_eq!(back, usual);
    }
}

#[test]
fn a_quick_encoder_leaves_pages_with_many_spans_as_they_are() {
    let mut pages: Vec<_> = (0..64).map(|_| chunks_with_headers(4)).collect();
    let noise = TagPage::from_packed(std::array::from_fn(|i| (i * i * 37 / 11) as u8));
    let places = [0, 1, 7, 8, 30, 63];
    places
        .into_iter()
        .for_each(|place| pages[place] = noise.clone());
    pages[1].set(0, Tag::MAX);

    let bytes = coded_with(Effort::Quick, &pages);

    let mut back = vec![TagPage::ZERO; 64];
    assert_eq!(decode_batch(&bytes, &mut back), Ok(bytes.len()));
    assert_eq!(back, pages);
    assert!(bytes.len() < 6 * MAX_PAGE_LEN + 58 * 70, "{}", bytes.len());
}

proptest! {
    #[test]
    fn any_pages_that_were_coded_with_less_effort_come_back(
        pages in any_pages(40), effort in prop_oneof![3 => Just(Effort::Quick), 1 => Just(Effort::Least)],
    ) {
        let bytes = coded_with(effort, &pages);
        let mut back = vec![TagPage::filled(Tag::MAX); pages.len()];
        prop_assert_eq!(decode_batch(&bytes, &mut back), Ok(bytes.len()));
        prop_assert_eq!(back, pages);
    }

    #[test]
    fn batches_that_a_quick_encoder_coded_in_a_row_come_back(batches in vec(any_pages(6), 1..5)) {
        let given: Vec<_> = batches.iter().map(Vec::as_slice).collect();
        for (bytes, pages) in quickly(&given).iter().zip(&batches) {
            let mut back = vec![TagPage::ZERO; pages.len()];
            prop_assert_eq!(decode_batch(bytes, &mut back), Ok(bytes.len()));
            prop_assert_eq!(&back, pages);
        }
    }

    #[test]
    fn any_bytes_are_byte_spans_or_an_error(bytes in vec(any::<u8>(), 0..300), spans in 0u16..200, pages in 1usize..5) {
        let head = [[0x26].as_slice(), &FIRST_MEANINGS, &spans.to_le_bytes()].concat();
        let bytes = [head, bytes].concat();
        let mut back = vec![TagPage::ZERO; pages];
        if let Ok(used) = decode_batch(&bytes, &mut back) {
            prop_assert!(used <= bytes.len());
        }
    }

    #[test]
    fn any_page_comes_back_alone(page in any_page()) {
        let mut out = [0; MAX_PAGE_LEN];
        let len = encode_page(&page, &mut out);
        let mut back = TagPage::ZERO;
        prop_assert_eq!(decode_page(&out[..len], &mut back), Ok(len));
        prop_assert_eq!(back, page);
    }

    #[test]
    fn any_pages_come_back_together(pages in any_pages(30)) {
        let coded = coded(&pages);
        let mut back = vec![TagPage::filled(Tag::MAX); pages.len()];
        prop_assert_eq!(decode_batch(&coded, &mut back), Ok(coded.len()));
        prop_assert_eq!(back, pages);
    }

    #[test]
    fn what_follows_a_batch_is_not_looked_at(pages in any_pages(20), behind in vec(any::<u8>(), 0..40)) {
        let mut bytes = coded(&pages);
        let len = bytes.len();
        bytes.extend(behind);
        let mut back = vec![TagPage::ZERO; pages.len()];
        prop_assert_eq!(decode_batch(&bytes, &mut back), Ok(len));
        prop_assert_eq!(back, pages);
    }

    #[test]
    fn any_bytes_are_a_page_or_an_error(bytes in vec(any::<u8>(), 0..200), head in 0u8..0x20) {
        let bytes = [vec![head], bytes].concat();
        let mut page = TagPage::ZERO;
        if let Ok(used) = decode_page(&bytes, &mut page) {
            prop_assert!(used <= bytes.len());
        }
    }

    #[test]
    fn damaged_bytes_are_pages_or_an_error(
        pages in any_pages(40), quick: bool, at: prop::sample::Index, flip: u8,
    ) {
        let effort = if quick { Effort::Quick } else { Effort::Full };
        let mut bytes = coded_with(effort, &pages);
        bytes.push(0);
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let mut back = vec![TagPage::ZERO; pages.len()];
        if let Ok(used) = decode_batch(&bytes, &mut back) {
            prop_assert!(used <= bytes.len());
        }
    }
}

#[test]
fn a_truncated_batch_is_refused_wherever_it_is_cut() {
    let pages = sample();
    let mut back = pages.clone();

    for effort in [Effort::Full, Effort::Quick, Effort::Least] {
        let bytes = coded_with(effort, &pages);
        for len in 0..bytes.len() {
            assert!(
                decode_batch(&bytes[..len], &mut back).is_err(),
                "{len} of {}, {effort:?}",
                bytes.len()
            );
        }
    }
}

#[test]
fn a_truncated_page_is_refused_wherever_it_is_cut() {
    for page in sample() {
        let mut out = [0; MAX_PAGE_LEN];
        let len = encode_page(&page, &mut out);
        for cut in 0..len {
            assert_eq!(
                decode_page(&out[..cut], &mut TagPage::default()),
                Err(Error::Truncated)
            );
        }
    }
}

#[test]
fn no_pages_are_no_bytes() {
    assert_eq!(encode_batch(&[], &mut []), Ok(0));
    assert_eq!(decode_batch(&[], &mut []), Ok(0));
}

#[test]
fn output_with_too_little_room_is_refused() {
    let pages = sample();
    let needed = max_batch_len(pages.len());

    let result = encode_batch(&pages, &mut vec![0; needed - 1]);

    assert_eq!(
        result,
        Err(Error::NoRoom {
            needed,
            given: needed - 1
        })
    );
}

#[test]
fn reserved_heads_are_refused() {
    let mut pages = [TagPage::ZERO];
    for head in (0x16..0x18).chain([0x1f]).chain(0x20..=0xff) {
        let bytes = [[head].as_slice(), &[0; 300]].concat();
        assert_eq!(
            decode_page(&bytes, &mut pages[0]),
            Err(Error::Reserved(head))
        );
    }
    for head in (0x11..0x20)
        .chain([0x27, 0x2f, 0x37, 0x3f])
        .chain(0x40..=0xff)
    {
        let bytes = [[head].as_slice(), &[0; 300]].concat();
        assert_eq!(decode_batch(&bytes, &mut pages), Err(Error::Reserved(head)));
    }
}

#[test]
fn a_first_page_like_the_one_before_is_refused() {
    assert_eq!(
        decode_batch(&[0x28, 0x01], &mut [TagPage::ZERO]),
        Err(Error::Kinds)
    );
}

#[test]
fn a_kind_for_a_page_behind_the_last_is_refused() {
    assert_eq!(
        decode_batch(&[0x30, 0x03, 0x55], &mut [TagPage::ZERO]),
        Err(Error::Kinds)
    );
}

#[test]
fn a_stream_of_more_than_32_pages_is_refused() {
    let mut pages = vec![TagPage::ZERO; 33];
    let one_stream = [[0x21, 0].as_slice(), &[0; 400]].concat();
    let first_too_long = [[0x21, 33, 0, 1].as_slice(), &[0; 400]].concat();

    assert_eq!(decode_batch(&one_stream, &mut pages), Err(Error::Kinds));
    assert_eq!(decode_batch(&first_too_long, &mut pages), Err(Error::Kinds));
}

#[test]
fn an_incomplete_code_is_refused() {
    let bytes = [[0x20].as_slice(), &[0x99; 30], &[0; 100]].concat();

    assert_eq!(decode_batch(&bytes, &mut [TagPage::ZERO]), Err(Error::Code));
}

#[test]
fn a_code_longer_than_ten_bits_is_refused() {
    // Of 1, 2, 3, … 10 bits, and of 11.
    let lengths = [0x21, 0x43, 0x65, 0x87, 0xa9, 0x0b];
    let bytes = [[0x20].as_slice(), &lengths, &[0; 124]].concat();

    assert_eq!(decode_batch(&bytes, &mut [TagPage::ZERO]), Err(Error::Code));
}

#[test]
fn a_span_beyond_its_page_is_refused() {
    // 86 spans of three granules each: the code of that length is 1, 0, 0 in the third fixed code.
    let mut spans = [0; 80];
    for bit in (0..86).map(|span| 7 * span) {
        spans[bit / 8] |= 1 << (bit % 8);
    }
    let bytes = [[0x13].as_slice(), &spans].concat();

    assert_eq!(
        decode_page(&bytes, &mut TagPage::default()),
        Err(Error::Overrun)
    );
}

#[test]
fn a_first_stream_that_ends_before_its_length_is_refused() {
    const STREAM: [u8; 5] = [0xa9, 0xb2, 0xad, 0xda, 0x01];
    let mut pages = [TagPage::ZERO, TagPage::ZERO];
    let right = [[0x21, 1, 5, 0].as_slice(), &STREAM, &STREAM].concat();
    let wrong = [[0x21, 1, 6, 0].as_slice(), &STREAM, &[0], &STREAM].concat();

    assert_eq!(decode_batch(&right, &mut pages), Ok(right.len()));
    assert_eq!(pages[0], pages[1]);
    assert_eq!(decode_batch(&wrong, &mut pages), Err(Error::Length));
}

/// Symbols 0 to 4 are spans of 1, 2, 3, 4 and 8 granules, 5 to 13 those of 2 to 10 with a gap.
const FIRST_MEANINGS: [u8; 4] = [0x8f, 0x00, 0xfe, 0x03];

/// A page in byte spans, with these bytes for spans and for long lengths.
fn byte_spans(spans: &[u8], long_lengths: &[u8]) -> Result<usize, Error> {
    let count = (spans.len() as u16).to_le_bytes();
    let bytes = [
        [0x26].as_slice(),
        &FIRST_MEANINGS,
        &count,
        spans,
        long_lengths,
    ]
    .concat();
    decode_batch(&bytes, &mut [TagPage::ZERO])
}

#[test]
fn byte_spans_cover_their_pages_exactly() {
    // 32 spans of 8 granules; one fewer; one more; one of 2 more.
    assert_eq!(byte_spans(&[0x54; 32], &[]), Ok(39));
    assert_eq!(byte_spans(&[0x54; 31], &[]), Err(Error::Length));
    assert_eq!(byte_spans(&[0x54; 33], &[]), Err(Error::Overrun));
    assert_eq!(
        byte_spans(&[[0x54; 32].as_slice(), &[0x51]].concat(), &[]),
        Err(Error::Overrun)
    );
}

#[test]
fn a_long_byte_span_covers_its_page_exactly() {
    assert_eq!(byte_spans(&[0x5e], &[255, 0]), Ok(10));
    assert_eq!(byte_spans(&[0x5f], &[255, 0]), Ok(10));
    assert_eq!(byte_spans(&[0x5e], &[254]), Err(Error::Length));
    assert_eq!(byte_spans(&[0x5e], &[255, 1]), Err(Error::Overrun));
    assert_eq!(byte_spans(&[0x5e], &[255]), Err(Error::Truncated));
    assert_eq!(byte_spans(&[0x5e], &[]), Err(Error::Truncated));
    assert_eq!(
        byte_spans(&[0x5e], &[[255; 70].as_slice(), &[0]].concat()),
        Err(Error::Overrun)
    );
}

#[test]
fn more_or_fewer_than_14_meanings_are_refused() {
    for meanings in [0x03fe_009fu32, 0x03fe_000f, 0, u32::MAX] {
        let bytes = [[0x26].as_slice(), &meanings.to_le_bytes(), &[0; 100]].concat();
        assert_eq!(
            decode_batch(&bytes, &mut [TagPage::ZERO]),
            Err(Error::Code),
            "{meanings:#x}"
        );
    }
}
