//! Files of every version of the format, as they were written once: they are read, and are what
//! they were. `cargo test -p stream --test versions -- --ignored` writes those of this version.

mod memory;

use std::borrow::Cow;
use std::fs;
use std::path::PathBuf;
use std::slice;

use memory::{Memory, Pages, by_index, header, in_order, sample, sending, tags};
use mte::TagPage;
use stream::{
    Chunk, Compression, Encoder, Identity, Metadata, Snapshot, State, StreamWriter, inspect, send,
};

const STATE: State<'_> = State {
    name: "vcpu.0",
    version: 7,
    data: Cow::Borrowed(b"registers"),
};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/files")
        .join(name)
}

/// In the delta: page 1 with other tags and the same data, page 3 gone, page 50 new.
fn changed() -> Pages {
    let mut pages = Pages::from([(50, (Box::new([5; 4096]), TagPage::ZERO))]);
    pages.insert(1, (sample()[&1].0.clone(), tags(1)));
    pages
}

fn in_the_end() -> Pages {
    let mut pages = sample();
    pages.extend(changed());
    pages.remove(&3);
    pages
}

fn write(base: Option<Identity>, pages: Pages, compression: Compression) -> (Vec<u8>, Identity) {
    let header = header(1 + u8::from(base.is_some()), Metadata::ArmMte, base);
    let mut encoder = Encoder::new(&header, compression).unwrap();
    let mut writer = StreamWriter::new(Vec::new(), header).unwrap();
    let mut chunk = Chunk::new();
    encoder.holes(slice::from_ref(&(3..4)), &mut chunk).unwrap();
    writer.write(&chunk).unwrap();
    send(
        &Memory::tagged(pages),
        &mut writer,
        &sending(compression, 4),
    )
    .unwrap();
    encoder.state(&STATE, &mut chunk).unwrap();
    writer.write(&chunk).unwrap();
    writer.finish().unwrap()
}

#[test]
#[ignore = "writes the files that the other test reads"]
fn write_the_files_of_this_version() {
    let (base, identity) = write(None, sample(), Compression::Lz4);
    let (delta, _) = write(Some(identity), changed(), Compression::Zstd(1));
    fs::write(path("version-1.base"), base).unwrap();
    fs::write(path("version-1.delta"), delta).unwrap();
}

#[test]
fn version_1_is_read() {
    let base = fs::read(path("version-1.base")).unwrap();
    let delta = fs::read(path("version-1.delta")).unwrap();
    for bytes in [&base, &delta] {
        assert_eq!(inspect(&bytes[..]).unwrap().states[0].version, 7);
    }
    assert_eq!(in_order(&base, Pages::new()).unwrap(), sample());
    assert_eq!(in_order(&delta, sample()).unwrap(), in_the_end());
    let snapshot = Snapshot::open(delta, |_| Ok(Some(base.clone()))).unwrap();
    assert_eq!(by_index(&snapshot).unwrap(), in_the_end());
    let mut states = 0;
    snapshot
        .states(|state| {
            assert_eq!(state, STATE);
            states += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(states, 1);
}
