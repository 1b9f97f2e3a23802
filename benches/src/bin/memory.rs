//! What it costs to reach a guest's memory and tags from another process, with nothing done to them: what looking at a machine
//! that runs is compared with.
//!
//! `bench-memory tags PID` reads the tags of all populated pages of the guest whose VMM is that process; `bench-memory copy PID
//! FILE` copies data and tags to a new file, each page to its place, the tags behind all data; `bench-memory data PID FILE` the
//! data alone.

#[cfg(target_arch = "aarch64")]
mod bench {
    use std::error::Error;
    use std::fs::{self, File};
    use std::io;
    use std::ops::Range;
    use std::os::unix::fs::FileExt;

    use mte::TagPage;
    use stream::{PageSource, ZERO_PAGE};
    use vmm::layout::{PAGE_SIZE, RAM_START};
    use vmm::memory::outside::MemoryFile;

    type Result<T> = std::result::Result<T, Box<dyn Error>>;

    /// Pages reached by one call: 1 MiB.
    const BATCH: usize = 256;

    /// The largest file that a process has open: its guest's memory.
    fn memory_file(pid: &str) -> Result<(File, u64)> {
        let mut largest = None;
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            // Others may be closed meanwhile.
            let size = fs::metadata(&path).map_or(0, |about| about.len());
            largest = largest.max(Some((size, path)));
        }
        let (size, path) = largest.ok_or("it has no files")?;
        Ok((File::open(path)?, size))
    }

    /// Gives `each` all populated pages, some at a time.
    fn all(memory: &MemoryFile, mut each: impl FnMut(u64, usize) -> io::Result<()>) -> Result<()> {
        let mut at = 0;
        while let Some(Range { start, end }) = memory.next_run(at)? {
            for first in (start..end).step_by(BATCH) {
                each(first, BATCH.min((end - first) as usize))?;
            }
            at = end;
        }
        Ok(())
    }

    fn read_tags(memory: &MemoryFile) -> Result<()> {
        let mut tags = vec![TagPage::ZERO; BATCH];
        let mut mixed = 0;
        all(memory, |first, count| {
            memory.read_tags(first, &mut tags[..count])?;
            mixed += u64::from(tags[0].uniform().is_none());
            Ok(())
        })?;
        if mixed == 0 {
            return Err("no tags were read".into());
        }
        Ok(())
    }

    fn copy(memory: &MemoryFile, size: u64, with_tags: bool, to: &File) -> Result<()> {
        let mut data = vec![ZERO_PAGE; BATCH];
        let mut tags = vec![TagPage::ZERO; if with_tags { BATCH } else { 0 }];
        let mut packed = Vec::new();
        all(memory, |first, count| {
            let (data, tags) = (
                &mut data[..count],
                tags.get_mut(..count).unwrap_or_default(),
            );
            memory.read(first, data, tags)?;
            let place = first * PAGE_SIZE - RAM_START;
            to.write_all_at(data.as_flattened(), place)?;
            packed.clear();
            for tags in &*tags {
                packed.extend_from_slice(tags.as_packed());
            }
            to.write_all_at(&packed, size + place / 32)
        })
    }

    pub fn main() -> Result<()> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (what, pid) = match arguments[..] {
            [what @ "tags", pid] | [what @ ("copy" | "data"), pid, _] => (what, pid),
            _ => return Err("usage: bench-memory tags PID | copy PID FILE | data PID FILE".into()),
        };
        let (file, size) = memory_file(pid)?;
        let memory = MemoryFile::new(file, size, what != "data")?;
        match arguments.get(2) {
            None => read_tags(&memory),
            Some(path) => copy(&memory, size, what == "copy", &File::create_new(path)?),
        }
    }
}

#[cfg(target_arch = "aarch64")]
fn main() -> std::process::ExitCode {
    match bench::main() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench-memory: {e}");
            std::process::ExitCode::FAILURE
        }
    }
}

#[cfg(not(target_arch = "aarch64"))]
fn main() {}
