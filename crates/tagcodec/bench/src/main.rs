//! Ratio and speed of tagcodec beside other codecs, on the corpora and on made-up pages: 64 pages at
//! a time, all in one run on one core, the best of some rounds in which the codecs take turns: what
//! else runs on the machine only adds. Speeds are of packed tags.

mod codecs;
#[path = "../../tests/pages/mod.rs"]
mod pages;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use codecs::{Alone, Batch, Codec, Lz4, SixRuns, Zstd};
use mte::{Tag, TagPage};
use pages::{Kind, corpus, made_up};
use tagcodec::Effort;

/// Pages coded at a time.
const AT_ONCE: usize = 64;
const PACKED: usize = 128;
/// zstd -19 is measured once: its speed has no part in any goal.
const SLOW: &str = "zstd -19";

/// What a codec did on pages.
struct Result {
    name: String,
    ratio: f64,
    /// Bytes a second.
    encode: f64,
    decode: f64,
}

/// Goals not reached are counted.
struct Goals {
    missed: usize,
}

impl Goals {
    fn at_least(&mut self, what: &str, value: f64, goal: f64) {
        let verdict = if value >= goal { "reached" } else { "MISSED" };
        println!("  {what:<58} {value:8.2}   goal: at least {goal:.2}   {verdict}");
        self.missed += usize::from(value < goal);
    }
}

fn main() -> ExitCode {
    let rounds = std::env::var("ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(11);
    let mut goals = Goals { missed: 0 };
    println!(
        "{rounds} rounds; ratio = packed bytes / coded bytes; MB/s of packed tags on one core\n"
    );
    for (name, entropy_bound, page_goal) in [("perl", 4.59, 2.6), ("python3", 3.09, 1.6)] {
        let results = measure(&corpus(name), rounds);
        let [full, quick, page, zstd_1, _, zstd_19, ..] = &results[..] else {
            unreachable!("eight codecs")
        };
        for (name, batch) in [("Full", full), ("Quick", quick)] {
            goals.at_least(
                &format!("batch form, {name}: ratio, against zstd -19 here"),
                batch.ratio,
                zstd_19.ratio,
            );
            goals.at_least(
                &format!("batch form, {name}: ratio, 85 % of the order-2 bound"),
                batch.ratio,
                0.85 * entropy_bound,
            );
            goals.at_least(
                &format!("batch form, {name}: times zstd -1's encoding speed"),
                batch.encode / zstd_1.encode,
                5.0,
            );
            goals.at_least(
                &format!("batch form, {name}: times zstd -1's decoding speed"),
                batch.decode / zstd_1.decode,
                2.0,
            );
        }
        goals.at_least("page form: ratio", page.ratio, page_goal);
        goals.at_least("page form: encoding, MB/s", page.encode / 1e6, 250.0);
        goals.at_least("page form: decoding, MB/s", page.decode / 1e6, 250.0);
        println!();
    }
    for kind in made_up() {
        let results = measure(&kind, rounds);
        let [full, quick, page, ..] = &results[..] else {
            unreachable!("eight codecs")
        };
        let one_tag = ["untagged", "uniform"].contains(&kind.name);
        let raw = PACKED as f64 / (PACKED + 1) as f64;
        for (name, batch) in [("Full", full), ("Quick", quick)] {
            goals.at_least(
                &format!("batch form, {name}: ratio, a byte a page above raw"),
                batch.ratio,
                raw,
            );
            if one_tag {
                goals.at_least(
                    &format!("batch form, {name}: ratio, less than a byte a page"),
                    batch.ratio,
                    PACKED as f64,
                );
            }
        }
        goals.at_least("page form: ratio, a byte a page above raw", page.ratio, raw);
        if one_tag {
            goals.at_least(
                "page form: ratio, one byte a page",
                page.ratio,
                PACKED as f64,
            );
            goals.at_least("page form: encoding, MB/s", page.encode / 1e6, 1000.0);
            goals.at_least("page form: decoding, MB/s", page.decode / 1e6, 1000.0);
        }
        println!();
    }
    println!("{} goals missed", goals.missed);
    ExitCode::from(u8::from(goals.missed > 0))
}

/// Measures all codecs on `kind` and prints what they did.
fn measure(kind: &Kind, rounds: usize) -> Vec<Result> {
    let mut codecs: [Box<dyn Codec>; 8] = [
        Box::new(Batch::new(Effort::Full)),
        Box::new(Batch::new(Effort::Quick)),
        Box::new(Alone),
        Box::new(Zstd::new(1)),
        Box::new(Zstd::new(3)),
        Box::new(Zstd::new(19)),
        Box::new(Lz4),
        Box::new(SixRuns),
    ];
    let packed: Vec<u8> = kind
        .pages
        .iter()
        .flat_map(|page| *page.as_packed())
        .collect();
    let mut times = vec![Vec::new(); codecs.len()];
    let mut lengths = vec![0; codecs.len()];
    for round in 0..rounds {
        for (nth, codec) in codecs.iter_mut().enumerate() {
            if round == 0 || codec.name() != SLOW {
                let (length, time) = run(codec.as_mut(), kind, &packed);
                lengths[nth] = length;
                times[nth].push(time);
            }
        }
    }
    println!(
        "{} ({} pages){:>24} {:>12} {:>12}",
        kind.name,
        kind.pages.len(),
        "ratio",
        "encode MB/s",
        "decode MB/s"
    );
    let mut results = Vec::new();
    for (nth, codec) in codecs.iter().enumerate() {
        let speed = |side: fn(&(Duration, Duration)) -> Duration| {
            let best = times[nth].iter().map(side).min();
            packed.len() as f64 / best.expect("a round").as_secs_f64()
        };
        let result = Result {
            name: codec.name(),
            ratio: packed.len() as f64 / lengths[nth] as f64,
            encode: speed(|times| times.0),
            decode: speed(|times| times.1),
        };
        println!(
            "  {:<28} {:10.2} {:12.0} {:12.0}",
            result.name,
            result.ratio,
            result.encode / 1e6,
            result.decode / 1e6
        );
        results.push(result);
    }
    results
}

/// Codes all pages, decodes them, compares; returns the bytes and the times of the first two.
fn run(codec: &mut dyn Codec, kind: &Kind, packed: &[u8]) -> (usize, (Duration, Duration)) {
    // Not zeros: these would be memory that the kernel gives at the first touch, in the time measured.
    let mut out = vec![1; 2 * packed.len() + 4096];
    let mut ends = vec![0];
    let started = Instant::now();
    for (pages, packed) in kind
        .pages
        .chunks(AT_ONCE)
        .zip(packed.chunks(AT_ONCE * PACKED))
    {
        let start = ends[ends.len() - 1];
        ends.push(start + codec.encode(pages, packed, &mut out[start..]));
    }
    let encode = started.elapsed();
    let mut pages = vec![TagPage::filled(Tag::MAX); kind.pages.len()];
    let mut bytes = vec![1; packed.len()];
    let mut in_pages = true;
    let started = Instant::now();
    let to = pages
        .chunks_mut(AT_ONCE)
        .zip(bytes.chunks_mut(AT_ONCE * PACKED));
    for (range, (pages, bytes)) in ends.windows(2).zip(to) {
        in_pages = codec.decode(&out[range[0]..range[1]], pages, bytes);
    }
    let decode = started.elapsed();
    assert!(
        if in_pages {
            pages == kind.pages
        } else {
            bytes == packed
        },
        "{}",
        codec.name()
    );
    let uncounted = if codec.name() == SixRuns.name() {
        kind.pages.len()
    } else {
        0
    };
    (ends[ends.len() - 1] - uncounted, (encode, decode))
}
