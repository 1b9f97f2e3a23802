//! Any pages, made by instructions: raw bytes alone would hardly ever have runs. They come back from
//! both forms, in the bytes promised; a batch that is cut off is refused.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mte::{Tag, TagPage};
use tagcodec::{
    Effort, Encoder, MAX_PAGE_LEN, decode_batch, decode_page, encode_page, max_batch_len,
};

/// More than two groups.
const MOST_PAGES: usize = 140;

fuzz_target!(|input: &[u8]| {
    let pages = pages(input);
    pages.iter().for_each(alone);
    let mut encoder = Encoder::new();
    for effort in [Effort::Full, Effort::Quick, Effort::Least] {
        together(&mut encoder, effort, &pages);
    }
    // What an encoder learned of other pages does no harm.
    let half = pages.len() / 2;
    together(&mut encoder, Effort::Quick, &pages[half..]);
    together(&mut encoder, Effort::Quick, &pages[..half]);
});

/// Two bytes are an instruction: a tag, what to do with it, and how often.
fn pages(input: &[u8]) -> Vec<TagPage> {
    let mut pages: Vec<TagPage> = Vec::new();
    let mut tags = Vec::new();
    for [what, times] in input.as_chunks::<2>().0 {
        let (tag, times) = (what & 0xf, usize::from(*times));
        match what >> 4 {
            0..6 => tags.extend(std::iter::repeat_n(tag, times + 1).chain([0])),
            6..12 => tags.extend(std::iter::repeat_n(tag, times + 1)),
            12 => tags.extend([tag, times as u8 & 0xf, times as u8 >> 4]),
            13 => (0..times).for_each(|n| tags.push(tag.wrapping_mul(n as u8) & 0xf)),
            14 => pages.extend(pages.last().cloned().into_iter().cycle().take(times % 70)),
            _ => pages.extend((0..times % 70).map(|_| TagPage::filled(Tag::from_low_bits(tag)))),
        }
        let whole = tags.len() / 256;
        pages.extend(tags.as_chunks().0.iter().map(TagPage::pack));
        tags.drain(..whole * 256);
        if pages.len() >= MOST_PAGES {
            break;
        }
    }
    tags.resize(256, 0);
    pages.extend(tags.as_chunks().0.iter().map(TagPage::pack));
    pages.truncate(MOST_PAGES);
    pages
}

fn alone(page: &TagPage) {
    let mut coded = [0; MAX_PAGE_LEN];
    let len = encode_page(page, &mut coded);
    let mut back = TagPage::filled(Tag::MAX);
    assert_eq!(decode_page(&coded[..len], &mut back), Ok(len));
    assert_eq!(&back, page);
    assert!(page.uniform().is_none() || len == 1);
}

fn together(encoder: &mut Encoder, effort: Effort, pages: &[TagPage]) {
    let mut coded = vec![0; max_batch_len(pages.len())];
    let len = encoder
        .batch_with(effort, pages, &mut coded)
        .expect("there is room");
    let mut back = vec![TagPage::filled(Tag::MAX); pages.len()];
    assert_eq!(decode_batch(&coded[..len], &mut back), Ok(len));
    assert_eq!(back, pages);
    for cut in [0, 1, len / 2, len.saturating_sub(1)] {
        assert!(cut >= len || decode_batch(&coded[..cut], &mut back).is_err());
    }
}
