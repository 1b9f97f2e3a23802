//! Any pages come back: in order, by the index, from many threads, through deltas.

mod memory;

use std::borrow::Cow;
use std::io::Seek;
use std::num::NonZeroUsize;

use memory::{
    COMPRESSIONS, Memory, Pages, any_pages, by_index, data, file, header, in_order, sample,
    sending, tags,
};
use mte::TagPage;
use proptest::prelude::*;
use stream::{
    Batch, Chunk, Compression, Encoder, Error, Metadata, Sending, Snapshot, State, StreamReader,
    StreamWriter, ZERO_PAGE, inspect, receive, restore, send, send_changes,
};

fn any_compression() -> impl Strategy<Value = Compression> {
    prop::sample::select(COMPRESSIONS.to_vec())
}

fn any_chunk_pages() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1usize), 1usize..20, Just(64), Just(512)]
}

/// The delta of two memories: what is new or changed, and the holes.
fn delta(base: &Pages, now: &Pages) -> (Pages, Vec<std::ops::Range<u64>>) {
    let changed = now
        .iter()
        .filter(|(number, page)| base.get(number) != Some(page))
        .map(|(number, page)| (*number, page.clone()))
        .collect();
    let gone = base.keys().filter(|number| !now.contains_key(number));
    (changed, gone.map(|number| *number..number + 1).collect())
}

/// The last of some files, on those before.
fn opened(files: &[Vec<u8>]) -> stream::Result<Snapshot<Vec<u8>>> {
    let (top, bases) = files.split_last().expect("there is a file");
    let mut bases = bases.to_vec();
    Snapshot::open(top.clone(), |_| Ok(bases.pop()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_pages_come_back_from_a_file(
        pages in any_pages(),
        compression in any_compression(),
        chunk_pages in any_chunk_pages(),
    ) {
        let memory = Memory::tagged(pages.clone());
        let header = header(1, Metadata::ArmMte, None);
        let (bytes, identity) = file(&header, &memory, &sending(compression, chunk_pages));

        prop_assert_eq!(&in_order(&bytes, Pages::new()).unwrap(), &pages);
        let summary = inspect(&bytes[..]).unwrap();
        prop_assert_eq!(summary.identity, identity);
        prop_assert_eq!(summary.pages, pages.len() as u64);
        let snapshot = Snapshot::open_whole(bytes).unwrap();
        prop_assert_eq!(snapshot.identity(), identity);
        prop_assert_eq!(snapshot.pages(), pages.len() as u64);
        prop_assert_eq!(&by_index(&snapshot).unwrap(), &pages);
    }

    #[test]
    fn a_base_and_its_deltas_are_the_last_memory(
        versions in prop::collection::vec(any_pages(), 2..4),
        compression in any_compression(),
    ) {
        let sending = sending(compression, 16);
        let mut files: Vec<(Vec<u8>, stream::Identity)> = Vec::new();
        let mut before = Pages::new();
        for (id, now) in (0..).zip(&versions) {
            let base = files.last().map(|(_, identity)| *identity);
            let header = header(id, Metadata::ArmMte, base);
            let (changed, holes) = delta(&before, now);
            let mut writer = StreamWriter::new(Vec::new(), header.clone()).unwrap();
            let mut chunk = Chunk::new();
            let taken = Encoder::new(&header, compression).unwrap().holes(&holes, &mut chunk);
            prop_assert_eq!(taken.unwrap(), holes.len());
            writer.write(&chunk).unwrap();
            send(&Memory::tagged(changed), &mut writer, &sending).unwrap();
            files.push(writer.finish().unwrap());
            before.clone_from(now);
        }

        let mut pages = Pages::new();
        for (bytes, _) in &files {
            prop_assert!(inspect(&bytes[..]).is_ok());
            pages = in_order(bytes, pages).unwrap();
        }
        prop_assert_eq!(&pages, &versions[versions.len() - 1]);
        let (top, _) = files.pop().unwrap();
        let snapshot = Snapshot::open(top, |_| Ok(files.pop().map(|(bytes, _)| bytes))).unwrap();
        prop_assert_eq!(&by_index(&snapshot).unwrap(), &pages);
    }

    #[test]
    fn what_changed_since_a_base_is_written_and_nothing_else(
        versions in prop::collection::vec(any_pages(), 2..4),
        compression in any_compression(),
        chunk_pages in any_chunk_pages(),
    ) {
        let first = Memory::tagged(versions[0].clone());
        let whole = file(&header(0, Metadata::ArmMte, None), &first, &sending(compression, 16));
        let mut files = vec![whole.0];
        for (id, steps) in (1..).zip(versions.windows(2)) {
            let base = opened(&files).unwrap();
            let mut writer = StreamWriter::new(
                Vec::new(),
                header(id, Metadata::ArmMte, Some(base.identity())),
            ).unwrap();
            let now = Memory::tagged(steps[1].clone());
            send_changes(&now, &base, &mut writer, &sending(compression, chunk_pages)).unwrap();
            let (bytes, _) = writer.finish().unwrap();

            let (changed, _) = delta(&steps[0], &steps[1]);
            prop_assert_eq!(inspect(&bytes[..]).unwrap().pages, changed.len() as u64);
            files.push(bytes);
            prop_assert_eq!(&by_index(&opened(&files).unwrap()).unwrap(), &steps[1]);
        }
    }

    #[test]
    fn of_a_page_written_twice_the_last_counts(
        first in any_pages(),
        second in any_pages(),
        compression in any_compression(),
    ) {
        let header = header(1, Metadata::ArmMte, None);
        let mut writer = StreamWriter::new(Vec::new(), header).unwrap();
        send(&Memory::tagged(first.clone()), &mut writer, &sending(compression, 16)).unwrap();
        send(&Memory::tagged(second.clone()), &mut writer, &sending(compression, 7)).unwrap();
        let (bytes, _) = writer.finish().unwrap();

        let replaced = first.keys().filter(|page| second.contains_key(page)).count();
        let mut expected = first;
        expected.extend(second);
        prop_assert_eq!(inspect(&bytes[..]).unwrap().replaced, replaced as u64);
        prop_assert_eq!(&in_order(&bytes, Pages::new()).unwrap(), &expected);
        let snapshot = Snapshot::open_whole(bytes).unwrap();
        prop_assert_eq!(&by_index(&snapshot).unwrap(), &expected);
    }
}

#[test]
fn a_file_on_disk_is_read_in_and_out_of_order() {
    let memory = Memory::tagged(sample());
    let header = stream::Header::of_file(Metadata::ArmMte, None).unwrap();
    let mut writer = StreamWriter::new(tempfile::tempfile().unwrap(), header).unwrap();
    send(&memory, &mut writer, &sending(Compression::Lz4, 2)).unwrap();
    let (mut file, identity) = writer.finish().unwrap();
    file.rewind().unwrap();
    assert_eq!(inspect(&file).unwrap().identity, identity);
    let snapshot = Snapshot::open_whole(file).unwrap();
    let restored = Memory::new(Metadata::ArmMte);
    restore(&snapshot, &restored, NonZeroUsize::MIN).unwrap();
    assert!(restored.into_pages() == sample());
}

#[test]
fn pages_without_tags_come_back() {
    let mut pages = sample();
    pages.values_mut().for_each(|page| page.1 = TagPage::ZERO);
    let memory = Memory::with(Metadata::None, pages.clone());
    let header = header(1, Metadata::None, None);
    let (bytes, _) = file(&header, &memory, &sending(Compression::Lz4, 4));
    assert_eq!(in_order(&bytes, Pages::new()).unwrap(), pages);
    assert_eq!(inspect(&bytes[..]).unwrap().untagged_pages, 0);
}

#[test]
fn many_threads_write_the_same_file_as_one() {
    let pages: Pages = (0..600)
        .map(|number| (number * 3 / 2, (data(number), tags(number as u8))))
        .collect();
    let memory = Memory::tagged(pages.clone());
    let header = header(1, Metadata::ArmMte, None);
    let one = sending(Compression::Lz4, 8);
    let many = Sending {
        threads: NonZeroUsize::new(7).unwrap(),
        ..one
    };
    let (by_one, _) = file(&header, &memory, &one);
    let (by_many, _) = file(&header, &memory, &many);
    assert!(by_one == by_many);
    let restored = Memory::new(Metadata::ArmMte);
    let snapshot = Snapshot::open_whole(by_many).unwrap();
    restore(&snapshot, &restored, NonZeroUsize::new(7).unwrap()).unwrap();
    assert!(restored.into_pages() == pages);
}

#[test]
fn a_page_is_found_by_its_number_and_a_hole_is_not() {
    let memory = Memory::tagged(sample());
    let header = header(1, Metadata::ArmMte, None);
    let (bytes, _) = file(&header, &memory, &sending(Compression::Zstd(1), 2));
    let snapshot = Snapshot::open_whole(bytes).unwrap();
    let mut reader = snapshot.reader();

    let batch = reader.read_with(100).unwrap().expect("page 100 is there");
    let (_, data, tags) = batch.iter().find(|page| page.0 == 100).unwrap();
    assert_eq!((data, tags), (&*sample()[&100].0, Some(&sample()[&100].1)));
    assert!(reader.read_with(5).unwrap().is_none());
    assert!(reader.read_with(u64::MAX).unwrap().is_none());
    assert_eq!(
        snapshot
            .populated()
            .map(|run| run.end - run.start)
            .sum::<u64>(),
        6
    );
}

#[test]
fn a_summary_counts_what_is_there() {
    let memory = Memory::tagged(sample());
    let header = header(1, Metadata::ArmMte, None);
    let (bytes, _) = file(&header, &memory, &sending(Compression::None, 64));
    let summary = inspect(&bytes[..]).unwrap();
    assert_eq!((summary.pages, summary.zero_pages), (6, 2));
    assert_eq!(
        (
            summary.untagged_pages,
            summary.uniform_pages,
            summary.mixed_pages
        ),
        (2, 1, 3)
    );
    assert_eq!(summary.data_bytes, 4 * 4096);
    assert_eq!(summary.bytes, bytes.len() as u64);
}

fn keep(kept: &mut Vec<(String, u32, Vec<u8>)>, state: State<'_>) -> stream::Result<()> {
    kept.push((
        state.name.to_owned(),
        state.version,
        state.data.into_owned(),
    ));
    Ok(())
}

#[test]
fn saved_states_come_back_by_name_with_their_version() {
    let header = header(1, Metadata::ArmMte, None);
    let mut writer = StreamWriter::new(Vec::new(), header.clone()).unwrap();
    let mut encoder = Encoder::new(&header, Compression::Lz4).unwrap();
    let mut chunk = Chunk::new();
    let states = [
        ("vcpu.0", 3, vec![1; 5000]),
        ("machine", u32::MAX, Vec::new()),
    ];
    for (name, version, data) in &states {
        let state = State {
            name,
            version: *version,
            data: Cow::Borrowed(data),
        };
        encoder.state(&state, &mut chunk).unwrap();
        writer.write(&chunk).unwrap();
    }
    assert!(matches!(writer.write(&chunk), Err(Error::StateName { .. })));
    let (bytes, _) = writer.finish().unwrap();

    let mut in_order = Vec::new();
    let mut reader = StreamReader::new(&bytes[..]).unwrap();
    let sink = Memory::new(Metadata::ArmMte);
    receive(&mut reader, &sink, |state| keep(&mut in_order, state)).unwrap();
    let mut by_index = Vec::new();
    let snapshot = Snapshot::open_whole(bytes).unwrap();
    snapshot.states(|state| keep(&mut by_index, state)).unwrap();
    assert_eq!(in_order, by_index);
    assert_eq!(
        in_order,
        states.map(|(name, version, data)| (name.to_owned(), version, data))
    );
}

#[test]
fn messages_ride_on_connections_and_not_in_files() {
    let header = stream::Header::of_connection(Metadata::ArmMte).unwrap();
    let mut chunk = Chunk::new();
    let mut encoder = Encoder::new(&header, Compression::Lz4).unwrap();
    let mut writer = StreamWriter::new(Vec::new(), header).unwrap();
    encoder.message(9, b"hand over", &mut chunk).unwrap();
    writer.write(&chunk).unwrap();
    let (bytes, _) = writer.finish().unwrap();

    let mut reader = StreamReader::new(&bytes[..]).unwrap();
    assert!(reader.read(&mut chunk).unwrap());
    assert_eq!(chunk.kind(), stream::Kind::Message(9));
    assert_eq!(&*reader.decoder().message(&chunk).unwrap(), b"hand over");
    assert!(!reader.read(&mut chunk).unwrap());
    assert!(!reader.read(&mut chunk).unwrap());
    assert!(matches!(
        Snapshot::open_whole(bytes),
        Err(Error::NotIndexed)
    ));

    let header = memory::header(1, Metadata::ArmMte, None);
    let mut encoder = Encoder::new(&header, Compression::Lz4).unwrap();
    let mut writer = StreamWriter::new(Vec::new(), header).unwrap();
    encoder.message(9, b"hand over", &mut chunk).unwrap();
    assert!(matches!(writer.write(&chunk), Err(Error::Unexpected(_))));
    assert!(matches!(
        encoder.message(128, b"", &mut chunk),
        Err(Error::Unexpected(_))
    ));
}

#[test]
fn metadata_are_neither_lost_nor_made_up() {
    let tagged = Memory::tagged(sample());
    let untagged = Memory::new(Metadata::None);
    let with_tags = header(1, Metadata::ArmMte, None);
    let without = header(2, Metadata::None, None);
    let sending = sending(Compression::None, 64);
    let mut writer = StreamWriter::new(Vec::new(), without.clone()).unwrap();
    assert!(matches!(
        send(&tagged, &mut writer, &sending),
        Err(Error::Metadata { .. })
    ));
    let (bytes, base) = file(&with_tags, &tagged, &sending);
    let mut reader = StreamReader::new(&bytes[..]).unwrap();
    assert!(matches!(
        receive(&mut reader, &untagged, |_| Ok(())),
        Err(Error::Metadata { .. })
    ));
    let snapshot = Snapshot::open_whole(bytes.clone()).unwrap();
    assert!(matches!(
        restore(&snapshot, &untagged, NonZeroUsize::MIN),
        Err(Error::Metadata { .. })
    ));
    let mut batch = Batch::new(Metadata::ArmMte);
    assert!(matches!(
        batch.push(0, &ZERO_PAGE, None),
        Err(Error::Metadata { .. })
    ));
    assert!(matches!(
        Encoder::new(&without, Compression::None)
            .unwrap()
            .pages(&batch, &mut Chunk::new()),
        Err(Error::Metadata { .. })
    ));
    let (delta, _) = file(&header(3, Metadata::None, Some(base)), &untagged, &sending);
    assert!(matches!(
        Snapshot::open(delta, |_| Ok(Some(bytes.clone()))),
        Err(Error::Metadata { .. })
    ));
}

#[test]
fn tags_that_changed_alone_are_a_change() {
    let base = file(
        &header(0, Metadata::ArmMte, None),
        &Memory::tagged(sample()),
        &sending(Compression::Lz4, 4),
    );
    let base = opened(&[base.0]).unwrap();
    let mut now = sample();
    now.get_mut(&3).unwrap().1 = tags(3);
    let header = header(1, Metadata::ArmMte, Some(base.identity()));
    let mut writer = StreamWriter::new(Vec::new(), header).unwrap();
    send_changes(
        &Memory::tagged(now.clone()),
        &base,
        &mut writer,
        &sending(Compression::Lz4, 4),
    )
    .unwrap();
    let (bytes, _) = writer.finish().unwrap();

    let changed = in_order(&bytes, Pages::new()).unwrap();
    assert_eq!(changed, Pages::from([(3, now[&3].clone())]));
}

#[test]
fn changes_since_another_base_than_the_headers_are_refused() {
    let memory = Memory::tagged(sample());
    let sending = sending(Compression::None, 4);
    let (base, _) = file(&header(0, Metadata::ArmMte, None), &memory, &sending);
    let base = opened(&[base]).unwrap();
    let (_, other) = file(&header(9, Metadata::ArmMte, None), &memory, &sending);
    let refusal = |wanted| {
        let header = header(1, Metadata::ArmMte, wanted);
        let mut writer = StreamWriter::new(Vec::new(), header).unwrap();
        send_changes(&memory, &base, &mut writer, &sending).unwrap_err()
    };

    assert!(matches!(refusal(Some(other)), Error::WrongBase { .. }));
    assert!(matches!(refusal(None), Error::NoBase(_)));
}

#[test]
fn a_delta_on_another_base_is_refused() {
    let memory = Memory::tagged(sample());
    let sending = sending(Compression::Lz4, 4);
    let (base, identity) = file(&header(1, Metadata::ArmMte, None), &memory, &sending);
    memory.pages().remove(&100);
    let (changed, _) = file(&header(1, Metadata::ArmMte, None), &memory, &sending);
    let (other, _) = file(&header(2, Metadata::ArmMte, None), &memory, &sending);
    let (delta, _) = file(
        &header(3, Metadata::ArmMte, Some(identity)),
        &memory,
        &sending,
    );
    let on = |base: Option<&Vec<u8>>| Snapshot::open(delta.clone(), |_| Ok(base.cloned())).err();

    assert!(on(Some(&base)).is_none());
    assert!(matches!(on(None), Some(Error::BaseMissing(wanted)) if wanted == identity));
    assert!(matches!(on(Some(&other)), Some(Error::WrongBase { .. })));
    let refused = on(Some(&changed)).expect("the base was changed");
    assert!(refused.to_string().contains("not as it was"), "{refused}");
}

#[test]
fn a_chunk_of_another_stream_is_refused() {
    let mut batch = Batch::new(Metadata::ArmMte);
    batch.push(1, &ZERO_PAGE, Some(&tags(1))).unwrap();
    let one = header(1, Metadata::ArmMte, None);
    let mut chunk = Chunk::new();
    let mut encoder = Encoder::new(&one, Compression::None).unwrap();
    encoder.pages(&batch, &mut chunk).unwrap();
    let other = header(2, Metadata::ArmMte, None);
    let mut writer = StreamWriter::new(Vec::new(), other).unwrap();
    assert!(matches!(writer.write(&chunk), Err(Error::ForeignChunk)));
    assert!(matches!(
        writer.write(&Chunk::new()),
        Err(Error::ForeignChunk)
    ));
}

#[test]
fn pages_of_a_batch_ascend_and_are_no_more_than_a_chunk_may_have() {
    let mut batch = Batch::new(Metadata::None);
    batch.push(7, &ZERO_PAGE, None).unwrap();
    for page in [7, 6, 0, 1 << 52, u64::MAX] {
        let refused = batch.push(page, &ZERO_PAGE, None);
        assert!(matches!(refused, Err(Error::Order { .. })), "{page}");
    }
    let full = (8..7 + 512).try_for_each(|page| batch.push(page, &ZERO_PAGE, None));
    assert!(full.is_ok());
    let refused = batch.push(1000, &ZERO_PAGE, None);
    assert!(matches!(refused, Err(Error::TooManyPages(513))));
    assert_eq!(batch.len(), 512);
}

#[test]
fn a_batch_has_no_page_that_was_not_put_there_however_much_room_it_has() {
    for pages in [0, 1, 2, 3, 512] {
        let mut batch = Batch::with_room(Metadata::ArmMte, pages);
        assert!(batch.is_empty() && batch.data().is_empty() && batch.tags().is_empty());

        batch.push(3, &data(3), Some(&tags(3))).unwrap();
        batch.push(4, &data(4), Some(&tags(4))).unwrap();

        assert_eq!(batch.data(), [*data(3), *data(4)]);
        assert_eq!(batch.tags(), [tags(3), tags(4)]);
        assert_eq!(batch.runs().count(), 1);
    }
}

#[test]
fn a_full_disk_is_an_error_and_the_stream_cannot_be_finished() {
    let mut room = [0; 9000];
    let header = header(1, Metadata::ArmMte, None);
    let mut writer = StreamWriter::new(&mut room[..], header).unwrap();
    let memory = Memory::tagged(sample());
    let refused = send(&memory, &mut writer, &sending(Compression::None, 1));
    assert!(matches!(refused, Err(Error::Io { .. })));
    assert!(matches!(writer.finish(), Err(Error::Abandoned)));
}

#[test]
fn a_source_that_fails_fails_the_whole_with_many_threads() {
    struct Failing;
    impl stream::PageSource for Failing {
        fn metadata(&self) -> Metadata {
            Metadata::None
        }
        fn next_run(&self, from: u64) -> std::io::Result<Option<std::ops::Range<u64>>> {
            Ok(Some(from..from + 1000))
        }
        fn read(
            &self,
            first: u64,
            _: &mut [stream::Page],
            _: &mut [TagPage],
        ) -> std::io::Result<()> {
            (first < 200)
                .then_some(())
                .ok_or(std::io::ErrorKind::Unsupported.into())
        }
    }
    let mut writer = StreamWriter::new(Vec::new(), header(1, Metadata::None, None)).unwrap();
    let sending = Sending {
        threads: NonZeroUsize::new(5).unwrap(),
        ..sending(Compression::None, 10)
    };
    let refused = send(&Failing, &mut writer, &sending);
    assert!(matches!(refused, Err(Error::Source { first: 200.., .. })));
}
