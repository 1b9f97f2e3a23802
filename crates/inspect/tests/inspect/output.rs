//! Figures, pictures, dumps, searches, differences.

use inspect::{
    Cell, Change, Colours, Difference, Error, Format, Gap, Grid, Space, Statistics, View, Wanted,
    differences, draw, dump, find, write_png,
};
use mte::TagPage;
use stream::Metadata;

use crate::machine::{RAM, TestPage, counting, memory, page, snapshot, tag, tagged};

const START: u64 = RAM << 12;

/// Three pages, a hole between the first two, and a hole behind them.
fn some_pages() -> [TestPage; 3] {
    [
        page(RAM, 1, TagPage::filled(tag(5))),
        page(RAM + 2, 0, counting()),
        page(RAM + 3, 3, TagPage::ZERO),
    ]
}

fn dumped(range: std::ops::Range<u64>, format: Format) -> Result<Vec<u8>, Error> {
    let snapshot = tagged(&[&some_pages()]);
    let mut memory = memory(&snapshot, 8);
    let mut view = View::new(&mut memory, Space::Physical, range)?;
    let mut out = Vec::new();
    dump(&mut view, format, &mut out)?;
    Ok(out)
}

fn text(range: std::ops::Range<u64>) -> String {
    String::from_utf8(dumped(range, Format::Text).unwrap()).unwrap()
}

#[test]
fn pages_are_counted_by_their_tags_and_holes_by_the_ram_around_them() {
    let snapshot = tagged(&[&some_pages()]);
    let mut memory = memory(&snapshot, 8);

    let statistics = Statistics::of(&mut View::whole(&mut memory).unwrap()).unwrap();

    let total = &statistics.total;
    assert_eq!(
        [total.untagged, total.uniform, total.mixed, total.holes],
        [1, 1, 1, 5]
    );
    assert_eq!(total.granules()[5], 256 + 16);
    assert_eq!(total.tagged_bytes(), 4096 + 15 * 16 * 16);
    assert_eq!(statistics.regions.len(), 8);
    assert_eq!(statistics.regions[2].counts.mixed, 1);
    assert_eq!(
        (statistics.start, statistics.end),
        (START, START + 8 * 4096)
    );
}

#[test]
fn entropy_is_0_of_one_tag_4_of_all_and_0_beside_a_neighbour_that_tells() {
    let entropies = |tags: TagPage| {
        let snapshot = tagged(&[&[page(RAM, 0, tags)]]);
        let mut memory = memory(&snapshot, 1);
        let total = Statistics::of(&mut View::whole(&mut memory).unwrap())
            .unwrap()
            .total;
        (total.entropy(), total.entropy_beside_neighbour())
    };

    assert_eq!(entropies(TagPage::filled(tag(9))), (0.0, 0.0));
    // In counting tags the second of two is always the first and one.
    assert_eq!(entropies(counting()), (4.0, 0.0));
}

#[test]
fn memory_without_tags_is_refused_and_not_shown_as_untagged() {
    let snapshot = snapshot(Metadata::None, &[&some_pages()]);
    let mut memory = memory(&snapshot, 8);
    let mut view = View::whole(&mut memory).unwrap();

    assert!(matches!(Statistics::of(&mut view), Err(Error::NoTags)));
    assert!(matches!(
        Grid::of(&mut view, 16, 16).map(|_| ()),
        Err(Error::NoTags)
    ));
    assert!(matches!(
        dump(&mut view, Format::Text, &mut Vec::new()),
        Err(Error::NoTags)
    ));
}

#[test]
fn a_dump_has_a_digit_a_granule_and_says_what_is_no_page() {
    let line = "5555555555555555 5555555555555555 5555555555555555 5555555555555555";
    let count = "0123456789abcdef 0123456789abcdef 0123456789abcdef 0123456789abcdef";
    let expected = [
        format!("0x0000000040000c00  {line}"),
        "0x0000000040001000  never populated up to 0x40002000".into(),
        format!("0x0000000040002000  {count}"),
        "*".into(),
        "0x0000000040003000  0000000000000000 0000000000000000 0000000000000000 0000000000000000"
            .into(),
        "*".into(),
        "0x0000000040004000  never populated up to 0x40008000".into(),
        "0x0000000040008000  no memory up to 0x40009000".into(),
    ];

    assert_eq!(
        text(START + 0xc00..START + 0x9000)
            .lines()
            .collect::<Vec<_>>(),
        expected
    );
}

#[test]
fn a_dump_begins_and_ends_at_any_granule() {
    assert_eq!(
        text(START + 0x2030..START + 0x2050),
        "0x0000000040002030  34\n"
    );
}

#[test]
fn a_binary_dump_is_packed_tags_with_holes_as_tag_0() {
    let bytes = dumped(START + 0x1000..START + 0x2040, Format::Binary).unwrap();

    assert_eq!(bytes.len(), 128 + 2);
    assert_eq!(bytes[..128], [0; 128]);
    assert_eq!(bytes[128..], [0x10, 0x32]);
}

#[test]
fn what_a_binary_dump_cannot_say_is_refused() {
    let no_memory = dumped(START + 0x7000..START + 0x9000, Format::Binary);
    let half_byte = dumped(START + 0x10..START + 0x40, Format::Binary);

    assert!(matches!(no_memory, Err(Error::NotInBinary(0x4000_8000))));
    assert!(matches!(half_byte, Err(Error::HalfByte)));
}

#[test]
fn a_json_dump_is_spans_that_cover_the_range() {
    let json = dumped(START..START + 0x2030, Format::Json).unwrap();

    let spans: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let expected = serde_json::json!([
        {"address": "0x40000000", "bytes": 4096, "tag": 5},
        {"address": "0x40001000", "bytes": 4096, "gap": "hole"},
        {"address": "0x40002000", "bytes": 16, "tag": 0},
        {"address": "0x40002010", "bytes": 16, "tag": 1},
        {"address": "0x40002020", "bytes": 16, "tag": 2},
    ]);
    assert_eq!(spans, expected);
}

fn found(range: std::ops::Range<u64>, wanted: Wanted) -> Vec<(u64, u64, Result<u8, Gap>)> {
    let snapshot = tagged(&[&some_pages()]);
    let mut memory = memory(&snapshot, 8);
    let mut view = View::new(&mut memory, Space::Physical, range).unwrap();
    let mut all = Vec::new();
    find(&mut view, wanted, &mut |range, what| {
        all.push((
            range.start - START,
            range.end - START,
            what.map(|tag| tag.value()),
        ));
        Ok(())
    })
    .unwrap();
    all
}

#[test]
fn granules_with_a_tag_are_found_those_that_follow_each_other_as_one() {
    let all = found(START..START + 0x2100, Wanted::Tag(tag(5)));
    assert_eq!(all, [(0, 0x1000, Ok(5)), (0x2050, 0x2060, Ok(5))]);
}

#[test]
fn what_a_pointers_tag_does_not_match_is_found_holes_too() {
    let all = found(START + 0xff0..START + 0x2020, Wanted::Mismatch(tag(5)));
    assert_eq!(
        all,
        [
            (0x1000, 0x2000, Err(Gap::Hole)),
            (0x2000, 0x2010, Ok(0)),
            (0x2010, 0x2020, Ok(1))
        ]
    );
    assert_eq!(
        found(START + 0x10..START + 0x80, Wanted::Mismatch(tag(5))),
        []
    );
}

#[test]
fn a_cell_shows_its_most_frequent_tag_but_0() {
    let mut mostly_untagged = TagPage::ZERO;
    mostly_untagged.set(3, tag(7));
    mostly_untagged.set(4, tag(7));
    mostly_untagged.set(9, tag(2));
    let snapshot = tagged(&[&[
        page(RAM, 0, mostly_untagged),
        page(RAM + 1, 0, TagPage::ZERO),
    ]]);
    let mut memory = memory(&snapshot, 3);
    let mut view = View::new(&mut memory, Space::Physical, START..START + 0x4000).unwrap();

    let grid = Grid::of(&mut view, 4, 2).unwrap();

    assert_eq!(
        (grid.cell_bytes(), grid.width(), grid.height()),
        (4096, 4, 1)
    );
    let cells: Vec<_> = (0..4).map(|column| grid.cell(column, 0)).collect();
    assert_eq!(
        cells,
        [
            Cell::Tag(tag(7)),
            Cell::Tag(tag(0)),
            Cell::Hole,
            Cell::NoMemory
        ]
    );
}

#[test]
fn a_picture_of_one_page_has_a_cell_a_granule() {
    let snapshot = tagged(&[&some_pages()]);
    let mut memory = memory(&snapshot, 8);
    let range = START + 0x2000..START + 0x3000;
    let mut view = View::new(&mut memory, Space::Physical, range).unwrap();

    let grid = Grid::of(&mut view, 64, 32).unwrap();
    let mut drawn = Vec::new();
    draw(&grid, Colours::None, &mut drawn).unwrap();

    assert_eq!(grid.cell_bytes(), 16);
    let first = format!("    0x40002000  {}\n", "0123456789abcdef".repeat(4));
    assert!(String::from_utf8(drawn).unwrap().starts_with(&first));
}

#[test]
fn a_png_file_has_the_colours_of_the_cells() {
    let snapshot = tagged(&[&[page(RAM, 0, TagPage::filled(tag(3)))]]);
    let mut memory = memory(&snapshot, 1);
    let grid = Grid::of(&mut View::whole(&mut memory).unwrap(), 16, 32).unwrap();
    let mut file = Vec::new();

    write_png(&grid, "one page", &mut file).unwrap();

    let mut reader = png::Decoder::new(std::io::Cursor::new(file))
        .read_info()
        .unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    let (seen, _) = pixels.as_chunks::<3>();
    let of_tag = seen
        .iter()
        .filter(|pixel| **pixel == inspect::tag_colour(tag(3)))
        .count();
    // 16 by 16 cells of 32 by 32 pixels, and its place in the legend.
    assert_eq!(of_tag, 512 * 512 + 10 * 10);
}

#[test]
fn an_extent_of_all_addresses_is_shown_in_no_more_cells_than_asked_for() {
    let snapshot = tagged(&[&[page(0, 0, counting()), page((1 << 52) - 1, 0, counting())]]);
    let mut memory = memory(&snapshot, 1);
    let mut view = View::whole(&mut memory).unwrap();

    let grid = Grid::of(&mut view, 64, 32).unwrap();
    let statistics = Statistics::of(&mut view).unwrap();

    assert!(grid.height() <= 32);
    assert_eq!(statistics.total.mixed, 2);
}

fn compared(first: &[TestPage], second: &[TestPage]) -> Vec<(u64, Change, u64, u64)> {
    let [one, other] = [tagged(&[first]), tagged(&[second])];
    let mut all = Vec::new();
    let [mut one, mut other] = [memory(&one, 8), memory(&other, 8)];
    differences(
        &mut one,
        &mut other,
        0..u64::MAX,
        &mut |found: Difference| {
            let pages = (found.range.end - found.range.start) / 4096;
            all.push((pages, found.change, found.data_granules, found.tag_granules));
            Ok(())
        },
    )
    .unwrap();
    all
}

#[test]
fn data_tags_and_both_are_told_apart() {
    let same = page(RAM + 1, 9, counting());
    let first = [
        page(RAM, 1, TagPage::ZERO),
        same.clone(),
        page(RAM + 2, 1, TagPage::ZERO),
        page(RAM + 3, 1, TagPage::ZERO),
    ];
    let mut one_granule = TagPage::ZERO;
    one_granule.set(77, tag(1));
    let second = [
        page(RAM, 2, TagPage::ZERO),
        same,
        page(RAM + 2, 1, one_granule),
        page(RAM + 3, 2, counting()),
    ];

    assert_eq!(
        compared(&first, &second),
        [
            (1, Change::Data, 256, 0),
            (1, Change::Tags, 0, 1),
            (1, Change::Both, 256, 240)
        ]
    );
}

#[test]
fn a_hole_is_compared_as_what_the_guest_reads_there() {
    let zeros = page(RAM + 1, 0, TagPage::ZERO);
    let tags = page(RAM + 3, 0, TagPage::filled(tag(1)));
    let shared = page(RAM, 1, counting());

    assert_eq!(
        compared(&[shared.clone(), zeros], &[shared, tags]),
        [(1, Change::Tags, 0, 256)]
    );
}

#[test]
fn a_memory_with_tags_and_one_without_cannot_be_compared() {
    let [one, other] = [
        tagged(&[&some_pages()]),
        snapshot(Metadata::None, &[&some_pages()]),
    ];
    let [mut one, mut other] = [memory(&one, 8), memory(&other, 8)];

    let refused = differences(&mut one, &mut other, 0..u64::MAX, &mut |_| Ok(()));

    assert!(matches!(refused, Err(Error::Incomparable)));
}

#[test]
fn the_end_of_all_addresses_is_reached_and_not_passed() {
    let snapshot = tagged(&[&[page((1 << 52) - 1, 0, counting())]]);
    let mut memory = memory(&snapshot, u64::MAX >> 12);
    let mut view = View::new(&mut memory, Space::Physical, u64::MAX - 0x40..u64::MAX).unwrap();
    let mut text = Vec::new();

    dump(&mut view, Format::Text, &mut text).unwrap();
    let grid = Grid::of(&mut view, 1, 2).unwrap();

    assert_eq!(text, b"0xffffffffffffffb0  bcde\n");
    assert!(grid.height() <= 2);
}

#[test]
fn a_grid_of_one_column_holds_all_addresses() {
    let snapshot = tagged(&[&[page(RAM, 0, counting())]]);
    let mut memory = memory(&snapshot, 1);
    let mut view = View::new(&mut memory, Space::Physical, 0..u64::MAX).unwrap();
    let grid = Grid::of(&mut view, 1, 2).unwrap();
    assert_eq!(grid.height(), 2);
}
