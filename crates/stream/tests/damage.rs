//! Damaged and hostile streams: an error or the right pages, never others. Forged chunks are made
//! here by the README alone, with right checks, so that what lies behind the checks is reached.

mod memory;

use std::borrow::Cow;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memory::{COMPRESSIONS, Memory, Pages, by_index, data, file, header, sample, sending, tags};
use mte::{Tag, TagPage};
use stream::{
    Batch, Chunk, ChunkError, Compression, Encoder, Error, Identity, Kind, Metadata, ReadAt,
    Snapshot, State, StreamReader, StreamWriter, ZERO_PAGE, inspect, receive, send,
};
use twox_hash::XxHash3_64;

const HEADER: usize = 64;
const HEAD: usize = 32;

/// Pages and states.
type Content = (Pages, Vec<(String, u32, Vec<u8>)>);

fn write(pages: Pages, compression: Compression) -> Vec<u8> {
    let header = header(1, Metadata::ArmMte, None);
    let mut writer = StreamWriter::new(Vec::new(), header.clone()).unwrap();
    let mut chunk = Chunk::new();
    let state = State {
        name: "vcpu",
        version: 1,
        data: Cow::Borrowed(&[5; 60]),
    };
    let mut encoder = Encoder::new(&header, compression).unwrap();
    encoder.state(&state, &mut chunk).unwrap();
    writer.write(&chunk).unwrap();
    send(
        &Memory::tagged(pages),
        &mut writer,
        &sending(compression, 3),
    )
    .unwrap();
    encoder.holes(&[200..300, 400..401], &mut chunk).unwrap();
    writer.write(&chunk).unwrap();
    writer.finish().unwrap().0
}

fn read_in_order(bytes: &[u8]) -> stream::Result<Content> {
    let mut reader = StreamReader::new(bytes)?;
    let memory = Memory::new(reader.header().metadata);
    let mut states = Vec::new();
    receive(&mut reader, &memory, |state| {
        states.push((
            state.name.to_owned(),
            state.version,
            state.data.into_owned(),
        ));
        Ok(())
    })?;
    Ok((memory.into_pages(), states))
}

fn read_by_index(bytes: &[u8]) -> stream::Result<Content> {
    let snapshot = Snapshot::open_whole(bytes.to_vec())?;
    let pages = by_index(&snapshot)?;
    let mut states = Vec::new();
    snapshot.states(|state| {
        states.push((
            state.name.to_owned(),
            state.version,
            state.data.into_owned(),
        ));
        Ok(())
    })?;
    Ok((pages, states))
}

fn assert_error_or_same(changed: &[u8], right: &Content, what: &str) {
    let same = |read: &Content| read == right;
    assert!(
        read_in_order(changed).as_ref().map_or(true, same),
        "{what}, in order"
    );
    assert!(
        read_by_index(changed).as_ref().map_or(true, same),
        "{what}, by index"
    );
}

fn without_random_data() -> Pages {
    let mut pages = sample();
    pages.values_mut().for_each(|(data, _)| {
        let first = data[0];
        data.fill(first);
    });
    pages
}

#[test]
fn every_flipped_bit_is_an_error_or_changes_nothing() {
    for compression in [Compression::Lz4, Compression::Zstd(1)] {
        let bytes = write(without_random_data(), compression);
        let right = read_in_order(&bytes).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_error_or_same(&changed, &right, &format!("{compression:?}, bit {bit}"));
        }
    }
}

#[test]
fn every_changed_byte_of_uncompressed_pages_is_an_error_or_changes_nothing() {
    let bytes = write(sample(), Compression::None);
    let right = read_in_order(&bytes).unwrap();
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] = changed[at].wrapping_add(1 + (at % 255) as u8);
        assert_error_or_same(&changed, &right, &format!("byte {at}"));
    }
}

#[test]
fn inspection_finds_what_a_flipped_bit_breaks() {
    let bytes = write(without_random_data(), Compression::Lz4);
    let right = read_in_order(&bytes).unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let passed = inspect(&changed[..]).is_ok();
        assert!(
            !passed || read_by_index(&changed).unwrap() == right,
            "bit {bit}"
        );
    }
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    for compression in COMPRESSIONS {
        let bytes = write(sample(), compression);
        for len in 0..bytes.len() {
            let cut = &bytes[..len];
            assert!(read_in_order(cut).is_err(), "in order, {len} bytes");
            assert!(read_by_index(cut).is_err(), "by index, {len} bytes");
            assert!(inspect(cut).is_err(), "inspected, {len} bytes");
        }
    }
}

#[test]
fn a_file_with_something_behind_its_end_is_refused() {
    let mut bytes = write(sample(), Compression::Lz4);
    bytes.push(0);
    assert!(matches!(read_by_index(&bytes), Err(Error::EndMissing)));
    assert!(matches!(inspect(&bytes[..]), Err(Error::EndMissing)));
}

/// Where chunks are.
fn chunks(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut found = Vec::new();
    let mut at = HEADER;
    while at < bytes.len() {
        let len = |field: usize| {
            u32::from_le_bytes(bytes[at + field..at + field + 4].try_into().unwrap()) as usize
        };
        let end = at + HEAD + len(4) + len(8);
        found.push(at..end);
        at = end;
    }
    found
}

/// Where the data of a chunk are, behind its head and its metadata.
fn data_of(bytes: &[u8], chunk: &std::ops::Range<usize>) -> std::ops::Range<usize> {
    let field = chunk.start + 4;
    let metadata = u32::from_le_bytes(bytes[field..field + 4].try_into().unwrap());
    chunk.start + HEAD + metadata as usize..chunk.end
}

/// The file with these of its chunks.
fn arranged(bytes: &[u8], order: &[usize]) -> Vec<u8> {
    let chunks = chunks(bytes);
    let mut arranged = bytes[..HEADER].to_vec();
    for number in order {
        arranged.extend_from_slice(&bytes[chunks[*number].clone()]);
    }
    arranged
}

#[test]
fn whatever_a_changed_byte_does_to_the_data_of_a_chunk_the_error_says_damaged() {
    for compression in COMPRESSIONS {
        let bytes = write(without_random_data(), compression);
        let right = read_in_order(&bytes).unwrap();
        for chunk in chunks(&bytes) {
            let pages = bytes[chunk.start] == 1;
            for at in data_of(&bytes, &chunk) {
                let mut changed = bytes.clone();
                changed[at] ^= 0x40;
                match read_in_order(&changed) {
                    Ok(read) => assert_eq!(read, right, "{compression:?}, byte {at}"),
                    Err(error) => {
                        let error = error.to_string();
                        assert!(
                            error.contains("damaged") && (!pages || error.contains("of pages 0x")),
                            "{compression:?}, byte {at}: {error}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn chunks_swapped_left_out_or_doubled_are_noticed() {
    let bytes = write(sample(), Compression::None);
    assert_eq!(chunks(&bytes).len(), 7);
    assert!(read_in_order(&arranged(&bytes, &[0, 1, 2, 3, 4, 5, 6])).is_ok());
    for order in [
        &[0, 2, 1, 3, 4, 5, 6][..],
        &[0, 1, 3, 4, 5, 6],
        &[0, 1, 1, 2, 3, 4, 5, 6],
        &[0, 1, 2, 3, 6],
        &[0, 1, 2, 3, 4, 6],
        &[0, 1, 2, 3, 5, 4, 6],
        &[6],
    ] {
        let arranged = arranged(&bytes, order);
        assert!(
            matches!(read_in_order(&arranged), Err(Error::EndMismatch(_))),
            "in order, {order:?}"
        );
        assert!(read_by_index(&arranged).is_err(), "by index, {order:?}");
    }
}

#[test]
fn a_chunk_behind_the_index_is_refused() {
    let bytes = write(sample(), Compression::None);
    let arranged = arranged(&bytes, &[0, 1, 2, 4, 5, 3, 6]);
    assert_eq!(
        problem(read_in_order(&arranged)),
        ChunkError::Unexpected(Kind::Holes)
    );
}

#[test]
fn a_chunk_of_another_file_is_refused() {
    let bytes = write(sample(), Compression::None);
    let memory = Memory::tagged(sample());
    let sending = sending(Compression::None, 3);
    let (other, _) = file(&header(2, Metadata::ArmMte, None), &memory, &sending);
    let first = &chunks(&other)[0];
    let mut mixed = bytes[..HEADER].to_vec();
    mixed.extend_from_slice(&other[first.clone()]);
    assert_eq!(problem(read_in_order(&mixed)), ChunkError::HeadDamaged);
}

fn check(seed: u64, bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(seed, bytes)
}

fn problem<T>(result: stream::Result<T>) -> ChunkError {
    match result {
        Err(Error::Chunk { problem, .. }) => problem,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("no error"),
    }
}

/// A stream forged with right checks.
struct Forger {
    bytes: Vec<u8>,
    seed: u64,
    chunks: u64,
    pages: u64,
    index: Option<(u64, u64)>,
    chain: u64,
}

/// A chunk that fits itself, until a test changes it.
#[derive(Clone)]
struct Forged {
    kind: u8,
    codec: u8,
    count: u16,
    meta: Vec<u8>,
    data: Vec<u8>,
    decoded_len: u32,
    content: u64,
}

impl Forger {
    fn new() -> Self {
        Self::with_flags(2)
    }

    fn with_flags(flags: u32) -> Self {
        Self::with(flags, None)
    }

    fn with(flags: u32, base: Option<Identity>) -> Self {
        let mut bytes = b"\x89TVS\r\n\x1a\n\x01\x00\x02\x0c".to_vec();
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&[9; 16]);
        let base = base.map_or([0; 24].to_vec(), |base| {
            [&base.id.0[..], &base.check.to_le_bytes()].concat()
        });
        bytes.extend_from_slice(&base);
        Self::sealed(bytes)
    }

    fn sealed(mut bytes: Vec<u8>) -> Self {
        let seed = check(0, &bytes);
        bytes.extend_from_slice(&seed.to_le_bytes());
        Self {
            bytes,
            seed,
            chunks: 0,
            pages: 0,
            index: None,
            chain: seed,
        }
    }

    fn plain(&self, kind: u8, meta: &[u8], data: &[u8]) -> Forged {
        let parts = [check(0, meta), check(0, data)].map(u64::to_le_bytes);
        Forged {
            kind,
            codec: 1,
            count: 0,
            meta: meta.to_vec(),
            data: data.to_vec(),
            decoded_len: data.len() as u32,
            content: check(self.seed, parts.as_flattened()),
        }
    }

    /// Page 5 of data, page 6 of zeros, both with tags.
    fn two_pages(&self) -> Forged {
        let tags = [TagPage::filled(Tag::MAX), TagPage::ZERO];
        let mut coded = [0; tagcodec::max_batch_len(2)];
        let len = tagcodec::encode_batch(&tags, &mut coded).unwrap();
        let data = data(1);
        let pages = [(5, &*data, &tags[0]), (6, &ZERO_PAGE, &tags[1])];
        let records: Vec<u8> = pages
            .into_iter()
            .flat_map(|(number, data, tags)| [number, check(0, data), check(0, tags.as_packed())])
            .flat_map(u64::to_le_bytes)
            .collect();
        Forged {
            kind: 1,
            codec: 1,
            count: 2,
            meta: [&[5, 1, 0b01], &coded[..len]].concat(),
            data: data.to_vec(),
            decoded_len: 4096,
            content: check(self.seed, &records),
        }
    }

    fn holes(&self, count: u16, runs: &[u8]) -> Forged {
        Forged {
            count,
            ..self.plain(2, runs, &[])
        }
    }

    /// Adds a chunk, and returns its bytes in the index and the check of its head.
    fn add(&mut self, forged: &Forged) -> (u32, u64) {
        let mut head = vec![forged.kind, forged.codec];
        head.extend_from_slice(&forged.count.to_le_bytes());
        head.extend_from_slice(&(forged.meta.len() as u32).to_le_bytes());
        head.extend_from_slice(&(forged.data.len() as u32).to_le_bytes());
        head.extend_from_slice(&forged.decoded_len.to_le_bytes());
        head.extend_from_slice(&forged.content.to_le_bytes());
        let head_check = check(self.seed, &head);
        head.extend_from_slice(&head_check.to_le_bytes());
        if matches!(forged.kind, 4 | 5) {
            let (offset, chain) = self.index.unwrap_or((self.bytes.len() as u64, self.seed));
            self.index = Some((offset, check(chain, &head_check.to_le_bytes())));
        }
        self.bytes.extend_from_slice(&head);
        self.bytes.extend_from_slice(&forged.meta);
        self.bytes.extend_from_slice(&forged.data);
        self.chain = check(self.chain, &head_check.to_le_bytes());
        self.chunks += 1;
        self.pages += if forged.kind == 1 {
            u64::from(forged.count)
        } else {
            0
        };
        (
            (HEAD + forged.meta.len() + forged.data.len()) as u32,
            head_check,
        )
    }

    /// Adds two pages and an index of these chunks and runs, and ends.
    fn indexed(mut self, table: impl FnOnce(u32, u64) -> Vec<u8>, runs: &[u8]) -> Vec<u8> {
        let (len, head_check) = self.add(&self.two_pages());
        let table = table(len, head_check);
        self.add(&self.plain(4, &[], &table));
        self.add(&self.plain(5, &[], runs));
        self.end()
    }

    fn end(mut self) -> Vec<u8> {
        let (index_offset, index_chain) = self.index.unwrap_or((0, self.seed));
        let fields = [
            self.chunks,
            self.pages,
            index_offset,
            index_chain,
            self.chain,
        ];
        let data = fields.map(u64::to_le_bytes);
        self.add(&self.plain(6, &[], data.as_flattened()));
        self.bytes
    }
}

/// A row of the index.
fn row(kind: u8, len: u32, head_check: u64) -> Vec<u8> {
    let mut row = vec![kind, 0, 0, 0];
    row.extend_from_slice(&len.to_le_bytes());
    row.extend_from_slice(&head_check.to_le_bytes());
    row
}

#[test]
fn a_stream_written_by_the_readme_is_read() {
    let bytes = Forger::new().indexed(|len, check| row(1, len, check), &[5, 1, 0]);
    let (pages, _) = read_in_order(&bytes).unwrap();
    assert_eq!(pages[&5], (data(1), TagPage::filled(Tag::MAX)));
    assert_eq!(pages[&6], (Box::new(ZERO_PAGE), TagPage::ZERO));
    assert_eq!(read_by_index(&bytes).unwrap().0, pages);
    assert_eq!(inspect(&bytes[..]).unwrap().pages, 2);
}

#[test]
fn optional_flags_are_passed_over() {
    let bytes =
        Forger::with_flags(0x8001_0002).indexed(|len, check| row(1, len, check), &[5, 1, 0]);
    assert!(inspect(&bytes[..]).is_ok());
    assert_eq!(read_by_index(&bytes).unwrap().0.len(), 2);
}

fn refused_header(change: impl FnOnce(&mut Vec<u8>)) -> Error {
    let mut bytes = Forger::new().bytes[..HEADER - 8].to_vec();
    change(&mut bytes);
    let bytes = Forger::sealed(bytes).bytes;
    let by_index = Snapshot::open_whole(bytes.clone()).err().expect("refused");
    let in_order = StreamReader::new(&bytes[..]).err().expect("refused");
    assert_eq!(by_index.to_string(), in_order.to_string());
    in_order
}

#[test]
fn headers_of_other_formats_are_refused_by_name() {
    assert!(matches!(
        refused_header(|bytes| bytes[0] = 0),
        Error::NotAStream
    ));
    assert!(matches!(
        refused_header(|bytes| bytes[8] = 2),
        Error::Version(2)
    ));
    assert!(matches!(
        refused_header(|bytes| bytes[8] = 0),
        Error::Version(0)
    ));
    assert!(matches!(
        refused_header(|bytes| bytes[10] = 0),
        Error::UnknownMetadata(0)
    ));
    assert!(matches!(
        refused_header(|bytes| bytes[10] = 3),
        Error::UnknownMetadata(3)
    ));
    assert!(matches!(
        refused_header(|bytes| bytes[11] = 14),
        Error::PageSize(14)
    ));
    assert!(matches!(
        refused_header(|bytes| bytes[13] = 0x81),
        Error::Flags(0x8100)
    ));
    assert!(matches!(
        refused_header(|bytes| bytes[32] = 1),
        Error::HeaderDamaged
    ));
}

#[test]
fn a_header_of_zeros_or_less_is_no_stream() {
    for len in [0, 1, HEADER - 1, HEADER, 500] {
        let bytes = vec![0; len];
        assert!(matches!(
            StreamReader::new(&bytes[..]).err(),
            Some(Error::NotAStream)
        ));
        assert!(matches!(
            Snapshot::open_whole(bytes).err(),
            Some(Error::NotAStream)
        ));
    }
}

/// What is wrong with a chunk, which need not be followed by anything.
fn refused(forge: impl FnOnce(&Forger) -> Forged) -> ChunkError {
    let mut forger = Forger::new();
    let forged = forge(&forger);
    forger.add(&forged);
    problem(read_in_order(&forger.bytes))
}

/// What is wrong with a head of which no body follows.
fn refused_head(change: impl FnOnce(&mut Vec<u8>)) -> ChunkError {
    let mut forger = Forger::new();
    let mut head = vec![0; HEAD - 8];
    change(&mut head);
    let head_check = check(forger.seed, &head);
    forger.bytes.extend_from_slice(&head);
    forger.bytes.extend_from_slice(&head_check.to_le_bytes());
    problem(read_in_order(&forger.bytes))
}

fn lengths(kind: u8, meta: u32, data: u32, decoded: u32) -> impl FnOnce(&mut Vec<u8>) {
    move |head| {
        head[0] = kind;
        head[1] = 2;
        head[4..8].copy_from_slice(&meta.to_le_bytes());
        head[8..12].copy_from_slice(&data.to_le_bytes());
        head[12..16].copy_from_slice(&decoded.to_le_bytes());
    }
}

#[test]
fn a_head_of_zeros_and_unknown_kinds_and_codecs_are_refused() {
    assert_eq!(refused_head(|_| ()), ChunkError::Kind(0));
    assert_eq!(refused_head(|head| head[0] = 7), ChunkError::Kind(7));
    assert_eq!(refused_head(|head| head[0] = 127), ChunkError::Kind(127));
    assert_eq!(refused_head(|head| head[0] = 1), ChunkError::Codec(0));
    let codec = refused_head(|head| head[..2].copy_from_slice(&[1, 4]));
    assert_eq!(codec, ChunkError::Codec(4));
}

#[test]
fn hostile_lengths_are_refused_before_the_body_is_read() {
    for kind in [1, 2, 3, 4, 5, 6, 128] {
        for (meta, data, decoded) in [
            (u32::MAX, 0, 0),
            (0, u32::MAX, u32::MAX),
            (0, 0, u32::MAX),
            (0, 1, 0),
            (0, 17 << 20, 17 << 20),
        ] {
            let refused = refused_head(lengths(kind, meta, data, decoded));
            assert!(
                matches!(refused, ChunkError::TooLarge { .. }),
                "{kind}: {refused}"
            );
        }
    }
    let count = |head: &mut Vec<u8>| head[..4].copy_from_slice(&[1, 1, 1, 2]);
    assert!(matches!(
        refused_head(count),
        ChunkError::TooLarge {
            what: "count",
            given: 513,
            limit: 512
        }
    ));
}

#[test]
fn a_body_that_is_announced_and_does_not_come_is_truncation() {
    let mut forger = Forger::new();
    let state = forger.plain(3, b"\x01\0\0\0\x04vcpu", &[0; 4000]);
    forger.add(&state);
    let cut = &forger.bytes[..HEADER + HEAD + 10];
    assert!(matches!(
        read_in_order(cut),
        Err(Error::Truncated { offset: 106 })
    ));
}

#[test]
fn pages_that_contradict_themselves_are_refused() {
    type Change = fn(&mut Forged);
    let changes: [(Change, ChunkError); 12] = [
        (|pages| pages.meta[1] = 2, ChunkError::Runs),
        (|pages| pages.meta[1] = 0, ChunkError::Runs),
        (|pages| pages.meta.truncate(1), ChunkError::Runs),
        (
            |pages| drop(pages.meta.splice(..1, [0xff; 7].into_iter().chain([0x7f]))),
            ChunkError::Runs,
        ),
        (
            |pages| drop(pages.meta.splice(..1, [0x80; 8])),
            ChunkError::Runs,
        ),
        (|pages| pages.meta.truncate(2), ChunkError::Length),
        (|pages| pages.meta[2] = 0b11, ChunkError::Length),
        (|pages| pages.meta[2] = 0b00, ChunkError::Length),
        (|pages| pages.meta.push(0), ChunkError::Length),
        (
            |pages| pages.meta[2] = 0b10,
            ChunkError::PagesDamaged { first: 5, last: 6 },
        ),
        (
            |pages| pages.meta[0] = 4,
            ChunkError::PagesDamaged { first: 4, last: 5 },
        ),
        (
            |pages| pages.meta.truncate(3),
            ChunkError::Tags(tagcodec::Error::Truncated),
        ),
    ];
    for (number, (change, expected)) in changes.into_iter().enumerate() {
        let found = refused(|forger| {
            let mut pages = forger.two_pages();
            change(&mut pages);
            pages
        });
        assert_eq!(found, expected, "change {number}");
    }
}

#[test]
fn data_that_become_more_or_less_than_announced_are_refused() {
    let two_pages = vec![7; 8192];
    let none = Vec::new();
    for data in [&two_pages, &none] {
        for (codec, coded) in [
            (2, lz4_flex::block::compress(data)),
            (3, zstd::bulk::compress(data, 1).unwrap()),
            (2, vec![0xff; 100]),
            (3, vec![0x28; 100]),
        ] {
            let found = refused(|forger| Forged {
                codec,
                data: coded,
                ..forger.two_pages()
            });
            let expected = ChunkError::PagesData { first: 5, last: 6 };
            assert_eq!(found, expected, "codec {codec}");
        }
    }
    let raw = refused(|forger| Forged {
        data: vec![0; 4095],
        ..forger.two_pages()
    });
    assert_eq!(raw, ChunkError::Length);
}

#[test]
fn holes_and_states_that_contradict_themselves_are_refused() {
    assert_eq!(refused(|forger| forger.holes(1, &[5])), ChunkError::Runs);
    assert_eq!(refused(|forger| forger.holes(2, &[5, 1])), ChunkError::Runs);
    assert_eq!(
        refused(|forger| forger.holes(1, &[5, 1, 0])),
        ChunkError::Length
    );
    for name in [
        &b""[..],
        b"\x01\0\0\0",
        b"\x01\0\0\0\x00",
        b"\x01\0\0\0\x05vcpu",
        b"\x01\0\0\0\x03vcpu",
        b"\x01\0\0\0\x02\xff\xfe",
        b"\x01\0\0\0\x02AB",
    ] {
        assert_eq!(
            refused(|forger| forger.plain(3, name, b"")),
            ChunkError::Name
        );
    }
}

#[test]
fn an_index_that_lies_is_refused() {
    let right = |len, check| row(1, len, check);
    let lies: [(&str, Vec<u8>); 13] = [
        (
            "a chunk of another kind",
            Forger::new().indexed(|len, check| row(2, len, check), &[5, 1, 0]),
        ),
        (
            "a chunk of a kind that files do not have",
            Forger::new().indexed(|len, check| row(6, len, check), &[5, 1, 0]),
        ),
        (
            "a head with another check",
            Forger::new().indexed(|len, check| row(1, len, !check), &[5, 1, 0]),
        ),
        (
            "a longer chunk",
            Forger::new().indexed(|len, check| row(1, len + 1, check), &[5, 1, 0]),
        ),
        (
            "a huge chunk",
            Forger::new().indexed(|_, check| row(1, u32::MAX, check), &[5, 1, 0]),
        ),
        (
            "a chunk without a head",
            Forger::new().indexed(|_, check| row(1, 31, check), &[5, 1, 0]),
        ),
        ("no chunk", Forger::new().indexed(|_, _| Vec::new(), &[])),
        (
            "half a chunk",
            Forger::new().indexed(|len, check| row(1, len, check)[..8].to_vec(), &[5, 1, 0]),
        ),
        (
            "more pages than there are",
            Forger::new().indexed(right, &[5, 2, 0]),
        ),
        (
            "other pages than there are",
            Forger::new().indexed(right, &[6, 1, 0]),
        ),
        (
            "a chunk that is not there",
            Forger::new().indexed(right, &[5, 1, 1]),
        ),
        (
            "a number beyond all",
            Forger::new().indexed(right, &[5, 1, 0xff, 0xff, 0xff, 0xff, 0x7f]),
        ),
        ("half a run", Forger::new().indexed(right, &[5, 1])),
    ];
    for (lie, bytes) in lies {
        assert!(read_by_index(&bytes).is_err(), "{lie}");
        assert!(inspect(&bytes[..]).is_err(), "inspected, {lie}");
    }
    let fewer = Forger::new().indexed(right, &[5, 0, 0]);
    assert!(inspect(&fewer[..]).is_err());
}

/// A file with one chunk, of holes, and the index with these runs of it.
fn file_of_holes(mut forger: Forger, runs: &[u8]) -> Vec<u8> {
    let holes = forger.holes(1, &[10, 4]);
    let (len, head_check) = forger.add(&holes);
    forger.add(&forger.plain(4, &[], &row(2, len, head_check)));
    forger.add(&forger.plain(5, &[], runs));
    forger.end()
}

#[test]
fn holes_are_in_the_index_of_a_delta_alone_and_are_those_of_their_chunk() {
    let base = Forger::new().indexed(|len, check| row(1, len, check), &[5, 1, 0]);
    let identity = Snapshot::open_whole(base.clone()).unwrap().identity();
    let on_base = |runs: &[u8]| {
        let delta = file_of_holes(Forger::with(3, Some(identity)), runs);
        Snapshot::open(delta, |_| Ok(Some(base.clone()))).err()
    };
    assert!(on_base(&[10, 4, 0]).is_none());
    assert!(on_base(&[11, 2, 0]).is_none());
    assert!(matches!(on_base(&[9, 4, 0]), Some(Error::Index(_))));
    assert!(matches!(on_base(&[10, 5, 0]), Some(Error::Index(_))));

    let whole = |runs| Snapshot::open_whole(file_of_holes(Forger::new(), runs)).err();
    assert!(whole(&[]).is_none());
    assert!(matches!(whole(&[10, 4, 0]), Some(Error::Index(_))));
}

#[test]
fn an_index_that_the_end_does_not_name_is_refused() {
    let right = Forger::new().indexed(|len, check| row(1, len, check), &[5, 1, 0]);
    let other = Forger::new().indexed(|len, check| row(1, len, check), &[5, 0, 0]);
    let end = right.len() - 72;
    let mixed = [&other[..end], &right[end..]].concat();
    assert!(matches!(read_by_index(&mixed), Err(Error::Index(_))));
    assert!(matches!(read_in_order(&mixed), Err(Error::EndMismatch(_))));
}

#[test]
fn an_end_that_lies_is_refused() {
    type Change = fn(&mut Forger);
    let changes: [Change; 4] = [
        |forger| forger.chunks += 1,
        |forger| forger.pages += 1,
        |forger| forger.chain ^= 1,
        |forger| forger.index = Some((64, 7)),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut forger = Forger::with_flags(0);
        let pages = forger.two_pages();
        forger.add(&pages);
        change(&mut forger);
        let refused = read_in_order(&forger.end());
        assert!(
            matches!(refused, Err(Error::EndMismatch(_))),
            "change {number}"
        );
    }
    let without_index = Forger::new().end();
    assert!(matches!(
        read_in_order(&without_index),
        Err(Error::EndMismatch(_))
    ));
    assert!(read_by_index(&without_index).is_err());
}

#[test]
fn two_states_of_a_name_are_refused() {
    let mut forger = Forger::new();
    let mut table = Vec::new();
    for version in [1, 2] {
        let state = forger.plain(3, &[version, 0, 0, 0, 1, b'a'], b"");
        let (len, head_check) = forger.add(&state);
        table.extend(row(3, len, head_check));
    }
    forger.add(&forger.plain(4, &[], &table));
    forger.add(&forger.plain(5, &[], &[]));
    let bytes = forger.end();
    assert!(matches!(
        read_by_index(&bytes),
        Err(Error::StateName { .. })
    ));
    assert!(matches!(inspect(&bytes[..]), Err(Error::StateName { .. })));
}

#[test]
fn a_damaged_chunk_leaves_no_page_in_the_batch() {
    let header = header(1, Metadata::ArmMte, None);
    let mut batch = Batch::new(Metadata::ArmMte);
    batch.push(3, &data(3), Some(&tags(3))).unwrap();
    batch.push(4, &data(4), Some(&tags(4))).unwrap();
    let mut chunk = Chunk::new();
    let mut encoder = Encoder::new(&header, Compression::None).unwrap();
    encoder.pages(&batch, &mut chunk).unwrap();
    let mut writer = StreamWriter::new(Vec::new(), header).unwrap();
    writer.write(&chunk).unwrap();
    let (mut bytes, _) = writer.finish().unwrap();
    let last = HEADER + chunk.bytes().len() - 1;
    bytes[last] ^= 1;

    let mut reader = StreamReader::new(&bytes[..]).unwrap();
    assert!(reader.read(&mut chunk).unwrap());
    let damaged = reader.decoder().pages(&chunk, &mut batch);
    let expected = ChunkError::PagesDamaged { first: 3, last: 4 };
    assert_eq!(problem(damaged), expected);
    assert!(batch.is_empty());
    assert_eq!(batch.runs().count() + batch.iter().count(), 0);
}

#[test]
fn a_chunk_that_was_not_read_or_not_made_is_empty() {
    let bytes = write(sample(), Compression::None);
    let first = chunks(&bytes)[0].end;
    let mut reader = StreamReader::new(&bytes[..first + HEAD + 1]).unwrap();
    let mut decoder = reader.decoder();
    let mut batch = Batch::new(Metadata::ArmMte);
    let mut chunk = Chunk::new();
    assert!(reader.read(&mut chunk).unwrap());
    assert!(reader.read(&mut chunk).is_err());
    assert!(decoder.pages(&chunk, &mut batch).is_err());
    assert!(chunk.page_runs().is_err());

    let header = header(1, Metadata::ArmMte, None);
    let mut encoder = Encoder::new(&header, Compression::None).unwrap();
    batch.push(3, &data(3), Some(&tags(3))).unwrap();
    encoder.pages(&batch, &mut chunk).unwrap();
    assert!(encoder.holes(&[5..6, 4..5], &mut chunk).is_err());
    assert!(decoder.pages(&chunk, &mut batch).is_err());
    assert!(chunk.page_runs().is_err());
    let mut writer = StreamWriter::new(Vec::new(), header).unwrap();
    assert!(matches!(writer.write(&chunk), Err(Error::ForeignChunk)));
}

/// A disk that can be taken away.
struct Disk {
    bytes: Vec<u8>,
    gone: AtomicBool,
}

impl ReadAt for Disk {
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        if self.gone.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.bytes.read_exact_at(bytes, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.bytes.size()
    }
}

#[test]
fn a_file_that_vanishes_gives_errors_and_no_pages() {
    let disk = Arc::new(Disk {
        bytes: write(sample(), Compression::Lz4),
        gone: AtomicBool::new(false),
    });
    let snapshot = Snapshot::open_whole(Arc::clone(&disk)).unwrap();
    let mut reader = snapshot.reader();
    assert!(reader.read_with(1).unwrap().is_some());
    disk.gone.store(true, Ordering::Relaxed);
    assert!(matches!(reader.read_with(2), Err(Error::Io { .. })));
    disk.gone.store(false, Ordering::Relaxed);
    assert!(reader.read_with(2).unwrap().is_some());
}

/// Gives one byte at a time, and is interrupted before each.
struct Slow<'a>(&'a [u8], bool);

impl Read for Slow<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let len = bytes.len().min(1);
        self.0.read(&mut bytes[..len])
    }
}

#[test]
fn a_connection_that_gives_a_byte_at_a_time_is_read() {
    let bytes = write(sample(), Compression::Lz4);
    assert_eq!(
        inspect(Slow(&bytes, false)).unwrap(),
        inspect(&bytes[..]).unwrap()
    );
}
