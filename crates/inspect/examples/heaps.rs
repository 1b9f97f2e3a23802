//! Writes a snapshot with the tags of real programs' heaps (`crates/tagcodec/corpora`), to look at: what
//! docs/inspecting.md shows is of it.
//!
//! `cargo run -p inspect --example heaps -- FILE`

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use lzma_rust2::XzReader;
use mte::TagPage;
use stream::{Batch, Chunk, Compression, Encoder, Header, Metadata, StreamWriter, ZERO_PAGE};

/// Where the first heap is, and pages that are never populated between two.
const FIRST: u64 = 0x4_0400;
const BETWEEN: u64 = 0x1000;
/// Untagged pages before each heap, as of a program's other memory.
const UNTAGGED: usize = 0x800;
const CHUNK: usize = 64;

/// Tags of the pages of a heap, whose file tells its format (`crates/tagcodec/corpora/README.md`).
fn heap(name: &str) -> Result<Vec<TagPage>, Box<dyn Error>> {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tagcodec/corpora");
    let mut bytes = Vec::new();
    XzReader::new(File::open(corpora.join(name))?, false).read_to_end(&mut bytes)?;
    let mut pages = Vec::new();
    let mut rest = bytes.as_slice();
    while let Some((head, behind)) = rest.split_first_chunk::<16>() {
        let [_, size] = [0, 8].map(|at| head[at..].first_chunk().copied().map(u64::from_le_bytes));
        let (tags, behind) = behind
            .split_at_checked(size.unwrap_or(0) as usize / 32)
            .ok_or("the corpus is cut off")?;
        pages.extend(
            tags.as_chunks()
                .0
                .iter()
                .map(|packed| TagPage::from_packed(*packed)),
        );
        rest = behind;
    }
    Ok(pages)
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: heaps FILE")?;
    let header = Header::of_file(Metadata::ArmMte, None)?;
    let mut encoder = Encoder::new(&header, Compression::Lz4)?;
    let mut writer = StreamWriter::new(File::create(path)?, header)?;
    let mut chunk = Chunk::new();
    let mut number = FIRST;
    for name in ["perl.tags.xz", "python3.tags.xz"] {
        let mut pages = vec![TagPage::ZERO; UNTAGGED];
        pages.extend(heap(name)?);
        for tags in pages.chunks(CHUNK) {
            let mut batch = Batch::new(Metadata::ArmMte);
            for tags in tags {
                batch.push(number, &ZERO_PAGE, Some(tags))?;
                number += 1;
            }
            encoder.pages(&batch, &mut chunk)?;
            writer.write(&chunk)?;
        }
        number += BETWEEN;
    }
    writer.finish()?;
    Ok(())
}
