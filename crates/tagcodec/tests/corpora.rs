//! What the codec promises of real programs' tags and of made-up ones: they come back, and in how
//! many bytes.

mod pages;

use mte::TagPage;
use pages::{Kind, corpus, made_up};
use tagcodec::{Decoder, Effort, Encoder, MAX_PAGE_LEN, decode_page, encode_page, max_batch_len};

/// Pages of a batch.
const BATCH: usize = 64;
const EFFORTS: [Effort; 3] = [Effort::Full, Effort::Quick, Effort::Least];

/// Bytes in the page form, after decoding them again.
fn page_form(kind: &Kind) -> usize {
    let mut coded = [0; MAX_PAGE_LEN];
    let mut back = TagPage::ZERO;
    let mut bytes = 0;
    for page in &kind.pages {
        let len = encode_page(page, &mut coded);
        assert_eq!(decode_page(&coded[..len], &mut back), Ok(len));
        assert_eq!(&back, page, "{}", kind.name);
        bytes += len;
    }
    bytes
}

/// Bytes in batches of `pages` pages, after decoding them again.
fn batch_form(effort: Effort, kind: &Kind, pages: usize) -> usize {
    let mut coded = vec![0; max_batch_len(pages)];
    let mut back = vec![TagPage::ZERO; pages];
    let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
    let mut bytes = 0;
    for batch in kind.pages.chunks(pages) {
        let len = encoder
            .batch_with(effort, batch, &mut coded)
            .expect("there is room");
        let back = &mut back[..batch.len()];
        assert_eq!(decoder.batch(&coded[..len], back), Ok(len));
        assert_eq!(back, batch, "{}", kind.name);
        bytes += len;
    }
    bytes
}

fn ratio(kind: &Kind, bytes: usize) -> f64 {
    (kind.pages.len() * 128) as f64 / bytes as f64
}

#[test]
fn perls_heap_shrinks_as_promised() {
    let perl = corpus("perl");

    assert!(ratio(&perl, page_form(&perl)) >= 2.6);
    for effort in [Effort::Full, Effort::Quick] {
        assert!(ratio(&perl, batch_form(effort, &perl, BATCH)) >= 4.19);
    }
}

#[test]
fn pythons_heap_shrinks_as_promised() {
    let python = corpus("python3");

    assert!(ratio(&python, page_form(&python)) >= 1.6);
    for effort in [Effort::Full, Effort::Quick] {
        assert!(ratio(&python, batch_form(effort, &python, BATCH)) >= 2.63);
    }
}

#[test]
fn made_up_pages_come_back_and_take_at_most_a_byte_more() {
    for kind in made_up() {
        let most = kind.pages.len() * MAX_PAGE_LEN;
        assert!(page_form(&kind) <= most, "{}", kind.name);
        for effort in EFFORTS {
            assert!(batch_form(effort, &kind, BATCH) <= most, "{}", kind.name);
        }
    }
}

#[test]
fn batches_of_any_size_come_back() {
    for kind in made_up() {
        let most = kind.pages.len() * MAX_PAGE_LEN;
        for pages in [1, 2, 3, 7, 63, 65, 300] {
            for effort in EFFORTS {
                assert!(batch_form(effort, &kind, pages) <= most, "{}", kind.name);
            }
        }
    }
}

#[test]
fn untagged_and_uniform_pages_take_one_byte_alone() {
    for kind in made_up().iter().take(2) {
        assert_eq!(page_form(kind), kind.pages.len(), "{}", kind.name);
    }
}

#[test]
fn untagged_pages_take_a_byte_in_64_together() {
    let untagged = &made_up()[0];

    for effort in EFFORTS {
        let bytes = batch_form(effort, untagged, BATCH);
        assert_eq!(bytes, untagged.pages.len() / BATCH);
    }
}

#[test]
fn uniform_pages_of_different_tags_take_less_than_a_byte_together() {
    let uniform = &made_up()[1];

    for effort in EFFORTS {
        assert!(batch_form(effort, uniform, BATCH) < uniform.pages.len());
    }
}
