//! A snapshot is the memory that was written, in whatever order it is read.

use inspect::TaggedMemory;
use mte::TagPage;
use proptest::prelude::*;
use stream::ZERO_PAGE;

use crate::machine::{RAM, TestPage, counting, memory, page, tag, tagged};

#[test]
fn holes_between_pages_read_as_zeros_with_tag_0() {
    let snapshot = tagged(&[&[page(RAM, 1, counting()), page(RAM + 2, 3, counting())]]);
    let mut memory = memory(&snapshot, 4);
    let mut data = [[9; 4096]; 4];
    let mut tags = [const { TagPage::filled(mte::Tag::MAX) }; 4];

    memory.read(RAM, &mut data, &mut tags).unwrap();

    assert_eq!(data.map(|page| page[0]), [1, 0, 3, 0]);
    assert_eq!(tags, [counting(), TagPage::ZERO, counting(), TagPage::ZERO]);
}

#[test]
fn runs_that_chunks_cut_are_one() {
    let chunk = |numbers: std::ops::Range<u64>| -> Vec<TestPage> {
        numbers.map(|number| page(number, 1, counting())).collect()
    };
    let snapshot = tagged(&[
        &chunk(RAM..RAM + 5),
        &chunk(RAM + 5..RAM + 9),
        &chunk(RAM + 12..RAM + 13),
    ]);
    let mut memory = memory(&snapshot, 16);

    assert_eq!(memory.next_run(0).unwrap(), Some(RAM..RAM + 9));
    assert_eq!(memory.next_run(RAM + 3).unwrap(), Some(RAM + 3..RAM + 9));
    assert_eq!(memory.next_run(RAM + 9).unwrap(), Some(RAM + 12..RAM + 13));
    assert_eq!(memory.next_run(RAM + 13).unwrap(), None);
}

#[test]
fn of_a_page_that_was_written_twice_the_last_is_seen_once() {
    let old = page(RAM + 1, 1, TagPage::filled(tag(1)));
    let new = page(RAM + 1, 2, TagPage::filled(tag(2)));
    let other = page(RAM, 7, TagPage::ZERO);
    let snapshot = tagged(&[&[other, old], &[new]]);
    let mut seen = Vec::new();

    memory(&snapshot, 2)
        .visit(0..u64::MAX, &mut |run| {
            let bytes = run.data.iter().map(|data| data[0]);
            seen.extend(run.pages().zip(bytes));
            Ok(())
        })
        .unwrap();

    assert_eq!(seen, [(RAM, 7), (RAM + 1, 2)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// More chunks than stay decoded, pages of several in turn.
    #[test]
    fn whatever_is_read_is_what_was_written_last(
        writes in proptest::collection::vec((0u64..48, 1u8..), 1..80),
        reads in proptest::collection::vec((0u64..48, 1usize..20), 1..30),
    ) {
        let chunks: Vec<[TestPage; 1]> = writes
            .iter()
            .map(|(number, byte)| [page(RAM + number, *byte, TagPage::filled(tag(byte & 15)))])
            .collect();
        let chunks: Vec<&[TestPage]> = chunks.iter().map(|chunk| &chunk[..]).collect();
        let snapshot = tagged(&chunks);
        let mut memory = memory(&snapshot, 48);

        for (first, count) in reads {
            let mut data = vec![ZERO_PAGE; count];
            let mut tags = vec![TagPage::ZERO; count];
            memory.read(RAM + first, &mut data, &mut tags).unwrap();
            for (place, number) in (first..first + count as u64).enumerate() {
                let last = writes.iter().rev().find(|(written, _)| *written == number);
                let byte = last.map_or(0, |(_, byte)| *byte);
                prop_assert_eq!(data[place], [byte; 4096]);
                prop_assert_eq!(&tags[place], &TagPage::filled(tag(byte & 15)));
            }
        }
    }
}

#[test]
fn a_chunk_whose_pages_are_apart_is_visited_once() {
    let snapshot = tagged(&[&[page(RAM, 1, counting()), page(RAM + 5, 2, counting())]]);
    let mut seen = Vec::new();

    memory(&snapshot, 8)
        .visit(0..u64::MAX, &mut |run| {
            seen.extend(run.pages());
            Ok(())
        })
        .unwrap();

    assert_eq!(seen, [RAM, RAM + 5]);
}
