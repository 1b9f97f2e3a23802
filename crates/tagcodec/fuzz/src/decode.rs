//! Hostile bytes: the page form, and batches of as many pages as the first byte says, also with the
//! beginning of byte spans put before. What is decoded must come back after coding it again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mte::{Tag, TagPage};
use tagcodec::{
    Effort, Encoder, MAX_PAGE_LEN, decode_batch, decode_page, encode_page, max_batch_len,
};

/// More than two groups.
const MOST_PAGES: usize = 140;

/// How a group in byte spans begins: not every four bytes are meanings.
const BYTE_SPANS: [u8; 5] = [0x26, 0x8f, 0x00, 0xfe, 0x03];

fuzz_target!(|input: &[u8]| {
    let Some((count, bytes)) = input.split_first() else {
        return;
    };
    page(bytes);
    let count = usize::from(*count) % (MOST_PAGES + 1);
    batch(bytes, count);
    batch(&[&BYTE_SPANS, bytes].concat(), count);
});

fn page(bytes: &[u8]) {
    let mut page = TagPage::ZERO;
    let Ok(used) = decode_page(bytes, &mut page) else {
        return;
    };
    assert!(used <= bytes.len());
    let mut again = [0; MAX_PAGE_LEN];
    let len = encode_page(&page, &mut again);
    let mut back = TagPage::filled(Tag::MAX);
    assert_eq!(decode_page(&again[..len], &mut back), Ok(len));
    assert_eq!(back, page);
}

fn batch(bytes: &[u8], count: usize) {
    let mut pages = vec![TagPage::ZERO; count];
    let Ok(used) = decode_batch(bytes, &mut pages) else {
        return;
    };
    assert!(used <= bytes.len());
    let mut again = vec![0; max_batch_len(count)];
    let mut encoder = Encoder::new();
    for effort in [Effort::Full, Effort::Quick] {
        let len = encoder
            .batch_with(effort, &pages, &mut again)
            .expect("there is room");
        let mut back = vec![TagPage::filled(Tag::MAX); count];
        assert_eq!(decode_batch(&again[..len], &mut back), Ok(len));
        assert_eq!(back, pages);
    }
}
