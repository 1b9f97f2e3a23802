//! The codecs compared: tagcodec's two forms, general ones, and the 6-run form.

use mte::TagPage;
use tagcodec::{Decoder, Effort, Encoder, MAX_PAGE_LEN, decode_page, encode_page, max_batch_len};

/// A codec of pages, given as they are and as packed bytes in a row.
pub trait Codec {
    /// Its name in the table.
    fn name(&self) -> String;
    /// Codes pages to `out`, which has room for twice as much; returns the bytes.
    fn encode(&mut self, pages: &[TagPage], packed: &[u8], out: &mut [u8]) -> usize;
    /// Decodes what `encode` made. Fills either `pages` or `packed`; says whether it was `pages`.
    fn decode(&mut self, coded: &[u8], pages: &mut [TagPage], packed: &mut [u8]) -> bool;
}

/// tagcodec's batch form.
pub struct Batch {
    effort: Effort,
    codec: Box<(Encoder, Decoder)>,
}

impl Batch {
    /// With this effort.
    pub fn new(effort: Effort) -> Self {
        Self {
            effort,
            codec: Box::default(),
        }
    }
}

impl Codec for Batch {
    fn name(&self) -> String {
        format!("tagcodec, batch, {:?}", self.effort)
    }

    fn encode(&mut self, pages: &[TagPage], _: &[u8], out: &mut [u8]) -> usize {
        let out = &mut out[..max_batch_len(pages.len())];
        let (encoder, _) = &mut *self.codec;
        encoder
            .batch_with(self.effort, pages, out)
            .expect("there is room")
    }

    fn decode(&mut self, coded: &[u8], pages: &mut [TagPage], _: &mut [u8]) -> bool {
        let (_, decoder) = &mut *self.codec;
        decoder.batch(coded, pages).expect("it was encoded");
        true
    }
}

/// tagcodec's page form, page after page.
pub struct Alone;

impl Codec for Alone {
    fn name(&self) -> String {
        "tagcodec, page form".into()
    }

    fn encode(&mut self, pages: &[TagPage], _: &[u8], out: &mut [u8]) -> usize {
        let mut len = 0;
        for page in pages {
            let out: &mut [u8; MAX_PAGE_LEN] = out[len..].first_chunk_mut().expect("there is room");
            len += encode_page(page, out);
        }
        len
    }

    fn decode(&mut self, mut coded: &[u8], pages: &mut [TagPage], _: &mut [u8]) -> bool {
        for page in pages {
            let used = decode_page(coded, page).expect("it was encoded");
            coded = &coded[used..];
        }
        true
    }
}

/// zstd, with contexts that are kept.
pub struct Zstd {
    level: i32,
    compressor: zstd::bulk::Compressor<'static>,
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl Zstd {
    /// Of this level.
    pub fn new(level: i32) -> Self {
        Self {
            level,
            compressor: zstd::bulk::Compressor::new(level).expect("a level of zstd"),
            decompressor: zstd::bulk::Decompressor::new().expect("zstd has memory"),
        }
    }
}

impl Codec for Zstd {
    fn name(&self) -> String {
        format!("zstd -{}", self.level)
    }

    fn encode(&mut self, _: &[TagPage], packed: &[u8], out: &mut [u8]) -> usize {
        self.compressor
            .compress_to_buffer(packed, out)
            .expect("there is room")
    }

    fn decode(&mut self, coded: &[u8], _: &mut [TagPage], packed: &mut [u8]) -> bool {
        self.decompressor
            .decompress_to_buffer(coded, packed)
            .expect("it was encoded");
        false
    }
}

/// LZ4's block format.
pub struct Lz4;

impl Codec for Lz4 {
    fn name(&self) -> String {
        "lz4".into()
    }

    fn encode(&mut self, _: &[TagPage], packed: &[u8], out: &mut [u8]) -> usize {
        lz4_flex::block::compress_into(packed, out).expect("there is room")
    }

    fn decode(&mut self, coded: &[u8], _: &mut [TagPage], packed: &mut [u8]) -> bool {
        lz4_flex::block::decompress_into(coded, packed).expect("it was encoded");
        false
    }
}

/// What was proposed for Linux as `mtecomp`: a page of at most 6 runs in 8 bytes, another raw. As
/// there, something else tells the two apart; here it is a byte that is not counted.
pub struct SixRuns;

const MOST_RUNS: usize = 6;

impl Codec for SixRuns {
    fn name(&self) -> String {
        "6 runs or raw".into()
    }

    fn encode(&mut self, pages: &[TagPage], _: &[u8], out: &mut [u8]) -> usize {
        let mut len = 0;
        for page in pages {
            let coded = six_runs(page).map(u64::to_le_bytes);
            let bytes = coded
                .as_ref()
                .map_or(page.as_packed().as_slice(), |coded| coded);
            out[len] = u8::from(coded.is_some());
            out[len + 1..=len + bytes.len()].copy_from_slice(bytes);
            len += 1 + bytes.len();
        }
        len
    }

    fn decode(&mut self, mut coded: &[u8], pages: &mut [TagPage], _: &mut [u8]) -> bool {
        for page in pages {
            let (runs, rest) = (coded[0] == 1, &coded[1..]);
            coded = if runs {
                let (word, rest) = rest.split_first_chunk().expect("it was encoded");
                *page = from_six_runs(u64::from_le_bytes(*word));
                rest
            } else {
                let (packed, rest) = rest.split_first_chunk().expect("it was encoded");
                *page = TagPage::from_packed(*packed);
                rest
            };
        }
        true
    }
}

/// Six tags in bits 23:0, then the last granules of the first five runs, a byte each.
fn six_runs(page: &TagPage) -> Option<u64> {
    let tags = page.unpack();
    let mut word = u64::from(tags[0]);
    let mut run = 0;
    for (granule, pair) in tags.windows(2).enumerate() {
        if pair[0] != pair[1] {
            run += 1;
            if run == MOST_RUNS {
                return None;
            }
            word |= u64::from(pair[1]) << (4 * run) | (granule as u64) << (16 + 8 * run);
        }
    }
    for run in run + 1..MOST_RUNS {
        word |= 0xff << (16 + 8 * run);
    }
    Some(word)
}

fn from_six_runs(word: u64) -> TagPage {
    let mut tags = [0; 256];
    let mut start = 0;
    for run in 0..MOST_RUNS {
        let last = if run + 1 < MOST_RUNS {
            (word >> (24 + 8 * run) & 0xff) as usize
        } else {
            255
        };
        if start <= last {
            tags[start..=last].fill((word >> (4 * run) & 0xf) as u8);
        }
        start = last + 1;
    }
    TagPage::pack(&tags)
}
