//! Tags of real programs' heaps: what is shown of them is what is in them.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use inspect::core::{PT_AARCH64_MEMTAG_MTE, write};
use inspect::{Format, Statistics, View, dump};
use lzma_rust2::XzReader;
use mte::TagPage;
use object::LittleEndian;
use object::elf::FileHeader64;
use object::read::elf::{FileHeader, ProgramHeader};
use stream::Snapshot;

use crate::machine::{RAM, TestPage, memory, page, tagged};

/// Pages of `crates/tagcodec/corpora`, whose file tells its format.
fn corpus(name: &str) -> Vec<TagPage> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tagcodec/corpora")
        .join(name);
    let mut bytes = Vec::new();
    XzReader::new(File::open(path).unwrap(), false)
        .read_to_end(&mut bytes)
        .unwrap();
    let mut pages = Vec::new();
    let mut rest = bytes.as_slice();
    while let Some((head, behind)) = rest.split_first_chunk::<16>() {
        let size = u64::from_le_bytes(head[8..].try_into().unwrap());
        let (tags, behind) = behind.split_at(size as usize / 32);
        pages.extend(
            tags.as_chunks()
                .0
                .iter()
                .map(|packed| TagPage::from_packed(*packed)),
        );
        rest = behind;
    }
    pages
}

fn in_a_snapshot(pages: &[TagPage]) -> Snapshot<Vec<u8>> {
    let pages: Vec<TestPage> = (RAM..)
        .zip(pages)
        .map(|(n, tags)| page(n, 1, tags.clone()))
        .collect();
    tagged(&pages.chunks(64).collect::<Vec<_>>())
}

#[test]
fn the_tags_of_perls_heap_come_back_from_a_dump_and_from_a_core() {
    let pages: Vec<TagPage> = corpus("perl.tags.xz").into_iter().take(2000).collect();
    let packed: Vec<u8> = pages.iter().flat_map(|tags| *tags.as_packed()).collect();
    let snapshot = in_a_snapshot(&pages);
    let mut memory = memory(&snapshot, 2000);
    let mut dumped = Vec::new();
    let mut stored = tempfile::NamedTempFile::new().unwrap();

    dump(
        &mut View::whole(&mut memory).unwrap(),
        Format::Binary,
        &mut dumped,
    )
    .unwrap();
    write(&mut memory, stored.as_file_mut()).unwrap();

    let file = std::fs::read(stored.path()).unwrap();
    let header = FileHeader64::<LittleEndian>::parse(file.as_slice()).unwrap();
    let segments = header
        .program_headers(LittleEndian, file.as_slice())
        .unwrap();
    let tags = segments
        .iter()
        .find(|it| it.p_type(LittleEndian).0 == PT_AARCH64_MEMTAG_MTE);
    let in_core = tags.unwrap().data(LittleEndian, file.as_slice()).unwrap();
    assert!(dumped == packed && in_core == packed);
}

#[test]
fn pythons_heap_is_counted_granule_by_granule() {
    let pages: Vec<TagPage> = corpus("python3.tags.xz").into_iter().take(3000).collect();
    let snapshot = in_a_snapshot(&pages);
    let mut memory = memory(&snapshot, 3000);

    let total = Statistics::of(&mut View::whole(&mut memory).unwrap())
        .unwrap()
        .total;

    let of_tag = |value: u8| {
        let tags = pages.iter().flat_map(TagPage::iter);
        tags.filter(|tag| tag.value() == value).count() as u64
    };
    assert_eq!(
        total.granules(),
        std::array::from_fn(|value| of_tag(value as u8))
    );
    assert_eq!(total.populated(), 3000);
}
