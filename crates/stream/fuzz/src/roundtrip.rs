//! Any pages, made by instructions, in a file and a delta on it: they come back in order, by the
//! index, and pass inspection.

#![no_main]

mod memory;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;

use libfuzzer_sys::fuzz_target;
use memory::{Hashes, hash};
use mte::{Tag, TagPage};
use stream::{
    Batch, Chunk, Compression, Encoder, Header, Identity, Metadata, PAGE_SIZE, Page, Snapshot,
    StreamId, StreamReader, StreamWriter, ZERO_PAGE,
};

const TWO: NonZeroUsize = NonZeroUsize::new(2).expect("two are more than none");

type Pages = BTreeMap<u64, u64>;

fuzz_target!(|input: &[u8]| {
    let Some(([settings, cut], input)) = input.split_first_chunk() else {
        return;
    };
    let compression = match settings % 3 {
        0 => Compression::None,
        1 => Compression::Lz4,
        _ => Compression::Zstd(1),
    };
    let chunk_pages = usize::from(settings / 3) + 1;
    let (first, second) = input.split_at(input.len().min((*cut).into()));
    let mut pages = Pages::new();
    let (base, base_identity) = write(first, None, compression, chunk_pages, &mut pages);
    let snapshot = Snapshot::open_whole(base.clone()).expect("it was written right");
    assert_eq!(restored(&snapshot), pages);
    let (delta, _) = write(
        second,
        Some(base_identity),
        compression,
        chunk_pages,
        &mut pages,
    );

    let in_order = Hashes::new(Metadata::ArmMte);
    for bytes in [&base, &delta] {
        stream::inspect(&bytes[..]).expect("it was written right");
        let mut reader = StreamReader::new(&bytes[..]).expect("it was written right");
        stream::receive(&mut reader, &in_order, |_| Ok(())).expect("it was written right");
    }
    assert_eq!(in_order.into_pages(), pages);
    let snapshot = Snapshot::open(delta, |_| Ok(Some(base.clone()))).expect("it was written right");
    assert_eq!(restored(&snapshot), pages);
});

fn restored(snapshot: &Snapshot<Vec<u8>>) -> Pages {
    let by_index = Hashes::new(Metadata::ArmMte);
    stream::restore(snapshot, &by_index, TWO).expect("it was written right");
    by_index.into_pages()
}

/// Three bytes are an instruction: what to do, and where or how.
fn write(
    input: &[u8],
    base: Option<Identity>,
    compression: Compression,
    chunk_pages: usize,
    pages: &mut Pages,
) -> (Vec<u8>, Identity) {
    let header = Header {
        id: StreamId([u8::from(base.is_some()); 16]),
        metadata: Metadata::ArmMte,
        base,
        indexed: true,
    };
    let mut encoder = Encoder::new(&header, compression).expect("there is room");
    let mut writer = StreamWriter::new(Vec::new(), header).expect("memory takes all");
    let mut chunk = Chunk::new();
    let mut batch = Batch::new(Metadata::ArmMte);
    let mut next = 0;
    for [what, how, more] in input.as_chunks::<3>().0 {
        match what % 8 {
            0 => next = u64::from(*how) << (more % 44),
            1 => next += u64::from(*how),
            2 => {
                let holes: Range<u64> = next..next + 1 + u64::from(*how);
                encoder
                    .holes(std::slice::from_ref(&holes), &mut chunk)
                    .expect("a run");
                flush(&mut batch, &mut encoder, &mut writer);
                writer.write(&chunk).expect("memory takes all");
                pages.retain(|number, _| !holes.contains(number));
            }
            _ => {
                let (data, tags) = (data(*what, *how), tags(*how, *more));
                let in_order = batch.numbers().last().is_none_or(|last| *last < next);
                if !in_order || batch.len() == chunk_pages {
                    flush(&mut batch, &mut encoder, &mut writer);
                }
                batch
                    .push(next, &data, Some(&tags))
                    .expect("it is in order");
                pages.insert(next, hash(&data, Some(&tags)));
                next += 1;
            }
        }
    }
    flush(&mut batch, &mut encoder, &mut writer);
    writer.finish().expect("memory takes all")
}

fn flush(batch: &mut Batch, encoder: &mut Encoder, writer: &mut StreamWriter<Vec<u8>>) {
    let mut chunk = Chunk::new();
    encoder.pages(batch, &mut chunk).expect("they have tags");
    writer.write(&chunk).expect("memory takes all");
    batch.clear();
}

fn data(what: u8, how: u8) -> Page {
    match what % 8 {
        3 => ZERO_PAGE,
        4 => [how; PAGE_SIZE],
        5 => std::array::from_fn(|i| (i as u8).wrapping_mul(how)),
        _ => std::array::from_fn(|i| {
            let mixed = (i as u32 ^ u32::from(how) << 16).wrapping_mul(0x9e37_79b9);
            (mixed ^ mixed >> 15)
                .wrapping_mul(0x85eb_ca6b)
                .to_le_bytes()[3]
        }),
    }
}

fn tags(how: u8, more: u8) -> TagPage {
    let mut page = TagPage::filled(Tag::from_low_bits(how));
    for granule in (0..more).step_by(1 + usize::from(how >> 4)) {
        page.set(granule, Tag::from_low_bits(granule ^ more));
    }
    page
}
