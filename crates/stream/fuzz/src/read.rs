//! Hostile streams. Checks are passed over when fuzzing, so that what lies behind them is reached.
//! The bytes are read as they are, and once more with an index and an end that fit them. What passes
//! inspection must be the same in order and by its index.

#![no_main]

mod memory;

use std::num::NonZeroUsize;

use libfuzzer_sys::fuzz_target;
use memory::Hashes;
use stream::{Header, Identity, Metadata, Snapshot, StreamId, StreamReader, StreamWriter};

const HEAD: usize = 32;

fuzz_target!(|input: &[u8]| {
    let Some(([flags, runs], input)) = input.split_first_chunk() else {
        return;
    };
    let header = Header {
        id: StreamId([0; 16]),
        metadata: match flags & 1 {
            0 => Metadata::None,
            _ => Metadata::ArmMte,
        },
        base: (flags & 2 != 0).then_some(Identity {
            id: StreamId([1; 16]),
            check: 1,
        }),
        indexed: flags & 4 != 0,
    };
    let (runs, chunks) = input.split_at(input.len().min((*runs).into()));
    let mut stream = Vec::new();
    StreamWriter::new(&mut stream, header.clone()).expect("memory takes all");
    stream.extend_from_slice(chunks);
    read(&stream, &header);
    complete(&mut stream, runs, header.indexed);
    read(&stream, &header);
});

/// Reads in every way.
fn read(stream: &[u8], header: &Header) {
    let in_order = Hashes::new(header.metadata);
    let mut reader = StreamReader::new(stream).expect("the header is right");
    let received = stream::receive(&mut reader, &in_order, |_| Ok(())).is_ok();
    let inspected = stream::inspect(stream).is_ok();
    let Ok(snapshot) = Snapshot::open_whole(stream.to_vec()) else {
        assert!(!inspected || !header.indexed || header.base.is_some());
        return;
    };
    let by_index = Hashes::new(header.metadata);
    let restored = stream::restore(&snapshot, &by_index, NonZeroUsize::MIN).is_ok();
    let states = snapshot.states(|_| Ok(())).is_ok();
    if inspected {
        assert!(received && restored && states);
        assert_eq!(in_order.into_pages(), by_index.into_pages());
    }
}

/// Cuts off what is no chunk, and adds the index and the end.
fn complete(stream: &mut Vec<u8>, runs: &[u8], indexed: bool) {
    let (mut at, mut chunks, mut pages) = (64, 0, 0);
    let mut table = Vec::new();
    while let Some(head) = stream[at..].first_chunk::<HEAD>() {
        let field = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        let len = HEAD as u64 + u64::from(field(4)) + u64::from(field(8));
        if len > (stream.len() - at) as u64 {
            break;
        }
        at += len as usize;
        chunks += 1;
        if head[0] == 1 {
            pages += u64::from(u16::from_le_bytes([head[2], head[3]]));
        }
        table.extend_from_slice(&[head[0], 0, 0, 0]);
        table.extend_from_slice(&(len as u32).to_le_bytes());
        table.extend_from_slice(&[0; 8]);
    }
    stream.truncate(at);
    let mut index_offset = 0;
    if indexed {
        index_offset = at as u64;
        chunks += 2;
        add(stream, 4, &table);
        add(stream, 5, runs);
    }
    let end = [chunks, pages, index_offset, 0, 0].map(u64::to_le_bytes);
    add(stream, 6, end.as_flattened());
}

fn add(stream: &mut Vec<u8>, kind: u8, data: &[u8]) {
    let len = (data.len() as u32).to_le_bytes();
    stream.extend_from_slice(&[kind, 1, 0, 0, 0, 0, 0, 0]);
    stream.extend_from_slice(&len);
    stream.extend_from_slice(&len);
    stream.extend_from_slice(&[0; 16]);
    stream.extend_from_slice(data);
}
