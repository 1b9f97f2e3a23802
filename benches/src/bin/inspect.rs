//! What it costs to look at a snapshot of 2 GiB, each figure beside its goal: figures and picture of its tags against reading
//! them, a core against copying the memory. All is in memory (`/dev/shm`), so that no disk is measured.
//!
//! Each measurement is a process of its own, on one thread, whose peak memory is its own as well; times are those that it was on a
//! CPU, the kernel's work for it with them, so that what else the machine does counts little. The data are random, so that
//! they are not compressed: what is decoded faster makes what is done with it weigh more. Ends with status 1 if a goal is missed.

use std::error::Error;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use inspect::{Grid, SnapshotMemory, Statistics, View, core, write_png};
use mte::TagPage;
use rustix::time::{ClockId, clock_gettime};
use stream::{
    Header, Metadata, PAGE_SIZE, Page, PageSource, Sending, Snapshot, StreamWriter, send,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const RAM: Range<u64> = 0x40000..0x40000 + PAGES;
const PAGES: u64 = (2 << 30) / PAGE_SIZE as u64;
const ROUNDS: usize = 7;
/// The most memory that looking may take.
const PEAK_KIB: u64 = 64 << 10;

/// Random data, and tags in spans of random lengths, as a heap has them.
struct Heap;

impl PageSource for Heap {
    fn metadata(&self) -> Metadata {
        Metadata::ArmMte
    }

    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let from = from.max(RAM.start);
        Ok((from < RAM.end).then_some(from..RAM.end))
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        for ((number, data), tags) in (first..).zip(data).zip(tags) {
            let mut random = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            for word in data.as_chunks_mut().0 {
                *word = next(&mut random).to_le_bytes();
            }
            let mut of_granules = [0; 256];
            let mut rest = &mut of_granules[..];
            while !rest.is_empty() {
                let drawn = next(&mut random);
                let length = (1 + drawn as usize % 8).min(rest.len());
                let (span, behind) = rest.split_at_mut(length);
                span.fill((drawn >> 32) as u8 & 0xf);
                rest = behind;
            }
            *tags = TagPage::pack(&of_granules);
        }
        Ok(())
    }
}

/// Xorshift (George Marsaglia, 2003).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn make(path: &Path) -> Result<()> {
    let header = Header::of_file(Metadata::ArmMte, None)?;
    let mut writer = StreamWriter::new(File::create(path)?, header)?;
    send(&Heap, &mut writer, &Sending::default())?;
    writer.finish()?;
    Ok(())
}

/// Reads all chunks, and so all tags, with the checks that belong to that.
fn read(snapshot: &Snapshot<File>) -> Result<()> {
    let mut reader = snapshot.reader();
    let mut mixed = 0;
    for chunk in snapshot.chunks() {
        let tags = reader.read(chunk)?.tags();
        mixed += tags.iter().filter(|tags| tags.uniform().is_none()).count();
    }
    if mixed == 0 {
        return Err("no tags were read".into());
    }
    Ok(())
}

/// Copies all pages to a file, each to its place.
fn copy(snapshot: &Snapshot<File>, to: &File) -> Result<()> {
    let mut reader = snapshot.reader();
    for chunk in snapshot.chunks() {
        for run in reader.read(chunk)?.runs() {
            let place = (run.first - RAM.start) * PAGE_SIZE as u64;
            to.write_all_at(run.data.as_flattened(), place)?;
        }
    }
    Ok(())
}

/// How long this process has been on a CPU.
fn on_cpu() -> Result<Duration> {
    Ok(clock_gettime(ClockId::ProcessCPUTime).try_into()?)
}

/// One measurement: prints microseconds, and the KiB of memory that the process had at most.
fn measure(what: &str, path: &Path) -> Result<()> {
    let out = tempfile::tempfile_in(path.parent().ok_or("the snapshot is in no directory")?)?;
    let begun = on_cpu()?;
    let snapshot = Snapshot::open_whole(File::open(path)?)?;
    let mut memory = SnapshotMemory::new(&snapshot, Some(RAM), Vec::new());
    match what {
        "read" => read(&snapshot)?,
        "copy" => copy(&snapshot, &out)?,
        "stat" => {
            Statistics::of(&mut View::whole(&mut memory)?)?;
        }
        "map" => {
            let grid = Grid::of(&mut View::whole(&mut memory)?, 512, 512)?;
            write_png(&grid, "a machine", io::sink())?;
        }
        "core" => {
            core::write(&mut memory, &out)?;
        }
        _ => return Err(format!("there is no measurement {what}").into()),
    }
    let microseconds = (on_cpu()? - begun).as_micros();
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|peak| peak.split_whitespace().next());
    println!("{microseconds} {}", peak.ok_or("the kernel tells no peak")?);
    Ok(())
}

/// A measurement by a process of its own.
fn measured(what: &str, path: &Path) -> Result<(u64, u64)> {
    let output = Command::new(std::env::current_exe()?)
        .arg(what)
        .arg(path)
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(microseconds)), Some(Ok(peak))) => Ok((microseconds, peak)),
        _ => Err(String::from_utf8_lossy(&output.stderr).into()),
    }
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

fn compare() -> Result<bool> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let path = directory.path().join("snapshot");
    make(&path)?;
    println!(
        "A snapshot of 2 GiB of random data with random tags; medians of {ROUNDS} rounds in turn, CPU time of one thread"
    );
    let names = ["read", "stat", "map", "copy", "core"];
    let mut times = names.map(|_| Vec::new());
    let mut peaks = [0; 5];
    for _ in 0..ROUNDS {
        for (number, name) in names.iter().enumerate() {
            let (time, peak) = measured(name, &path)?;
            times[number].push(time);
            peaks[number] = peaks[number].max(peak);
        }
    }
    let [read, stat, map, copy, core] = times.map(median);
    let lines = [
        ("reading its tags", read, peaks[0], None),
        ("tags stat", stat, peaks[1], Some((read, 2.0))),
        ("tags map", map, peaks[2], Some((read, 2.0))),
        ("copying its memory", copy, peaks[3], None),
        ("core", core, peaks[4], Some((copy, 1.1))),
    ];
    let mut met = true;
    for (name, time, peak, goal) in lines {
        print!(
            "  {name:20} {:8.1} ms   peak {:5.1} MiB",
            time as f64 / 1e3,
            peak as f64 / 1024.0
        );
        if let Some((base, limit)) = goal {
            let ratio = time as f64 / base as f64;
            let right = ratio <= limit && peak <= PEAK_KIB;
            met &= right;
            let verdict = if right { "" } else { "   MISSED" };
            print!("   ratio {ratio:.3}   goals: at most {limit}, 64 MiB{verdict}");
        }
        println!();
    }
    Ok(met)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.as_slice() {
        [] => compare(),
        [what, path] => measure(what, path.as_ref()).map(|()| true),
        _ => Err("usage: bench-inspect".into()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench-inspect: {error}");
            ExitCode::from(2)
        }
    }
}
