//! Pages to try the codec on: the corpora, and pages made up after other users of tags.

use std::io::Read;

use mte::{Tag, TagPage};

/// A name for pages, and the pages.
pub struct Kind {
    /// What they are.
    pub name: &'static str,
    /// The pages, in the order of their addresses.
    pub pages: Vec<TagPage>,
}

/// The pages of a corpus, `corpora/<name>.tags.xz`.
///
/// # Panics
/// If it is not there, or not what `corpora/README.md` says.
pub fn corpus(name: &'static str) -> Kind {
    let path = format!("{}/corpora/{name}.tags.xz", codec_folder());
    let file = std::fs::File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut bytes = Vec::new();
    lzma_rust2::XzReader::new(file, false)
        .read_to_end(&mut bytes)
        .unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut rest = bytes.as_slice();
    let mut pages = Vec::new();
    while let Some((header, behind)) = rest.split_first_chunk::<16>() {
        let size = u64::from_le_bytes(*header.last_chunk().expect("8 of 16 bytes")) as usize / 32;
        let (tags, behind) = behind.split_at(size);
        pages.extend(
            tags.as_chunks()
                .0
                .iter()
                .map(|packed| TagPage::from_packed(*packed)),
        );
        rest = behind;
    }
    Kind { name, pages }
}

fn codec_folder() -> String {
    let here = env!("CARGO_MANIFEST_DIR");
    here.strip_suffix("/bench").unwrap_or(here).to_owned()
}

/// Pages that no corpus has, some thousands of each kind, the same at each call.
pub fn made_up() -> Vec<Kind> {
    const PAGES: usize = 4096;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let untagged = vec![TagPage::ZERO; PAGES];
    let uniform = each(PAGES, |_| TagPage::filled(random.tag()));
    let stripes = |random: &mut Random, length: usize| from_runs(PAGES, |_| (random.tag(), length));
    let small_stripes = stripes(&mut random, 2);
    let large_stripes = stripes(&mut random, 24);
    let alternating = from_runs(PAGES, |run| {
        (Tag::from_low_bits(3 + 6 * (run as u8 & 1)), 1)
    });
    let slab = slab(PAGES, &mut random);
    let scudo = scudo(PAGES, &mut random);
    let noise = from_runs(PAGES, |_| (random.tag(), 1));
    let mut mixture = Vec::new();
    for start in (0..PAGES).step_by(8) {
        let from: [&[TagPage]; 8] = [
            &untagged,
            &untagged,
            &untagged,
            &uniform,
            &slab,
            &scudo,
            &small_stripes,
            &large_stripes,
        ];
        let from = from[random.below(8)];
        mixture.extend_from_slice(&from[start..start + 8]);
    }
    [
        ("untagged", untagged),
        ("uniform", uniform),
        ("stripes of 2", small_stripes),
        ("stripes of 24", large_stripes),
        ("two tags in turn", alternating),
        ("kernel slabs", slab),
        ("size classes, odd and even tags", scudo),
        ("random", noise),
        ("mixture", mixture),
    ]
    .map(|(name, pages)| Kind { name, pages })
    .into()
}

fn each(count: usize, page: impl FnMut(usize) -> TagPage) -> Vec<TagPage> {
    (0..count).map(page).collect()
}

/// Pages of runs, each a tag and a length in granules.
fn from_runs(count: usize, mut run: impl FnMut(usize) -> (Tag, usize)) -> Vec<TagPage> {
    let tags = (0..).flat_map(|nth| {
        let (tag, length) = run(nth);
        std::iter::repeat_n(tag, length)
    });
    let tags: Vec<u8> = tags.take(count * 256).map(Tag::value).collect();
    tags.as_chunks().0.iter().map(TagPage::pack).collect()
}

/// As the kernel's hardware tag-based KASAN has slabs: objects of one size side by side, a random
/// tag each, 14 where free.
fn slab(count: usize, random: &mut Random) -> Vec<TagPage> {
    const FREE: Tag = Tag::from_low_bits(14);
    let mut left = 0;
    let mut size = 1;
    from_runs(count, |_| {
        if left == 0 {
            size = [2, 4, 6, 8, 12, 16, 32, 64][random.below(8)];
            left = 1024 / size;
        }
        left -= 1;
        let tag = if random.below(4) == 0 {
            FREE
        } else {
            random.tag()
        };
        (tag, size)
    })
}

/// As Scudo has blocks: of one size in a region, a header of one untagged granule, a tag that is odd
/// or even in turn, and no tag behind what was asked for.
fn scudo(count: usize, random: &mut Random) -> Vec<TagPage> {
    let mut runs = Vec::new();
    let mut length = 0;
    while length < count * 256 {
        let size = [2, 3, 4, 5, 7, 9, 13, 17, 33][random.below(9)];
        for block in 0..2048 / size {
            let used = 1 + random.below(size - 1);
            let parity = block as u8 & 1;
            let tag = Tag::from_low_bits(random.tag().value() & !1 | parity);
            runs.extend([(Tag::ZERO, 1), (tag, used), (Tag::ZERO, size - 1 - used)]);
            length += size;
        }
    }
    from_runs(count, |nth| runs[nth])
}

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 33) as usize % limit
    }

    fn tag(&mut self) -> Tag {
        Tag::from_low_bits(self.below(15) as u8 + 1)
    }
}
