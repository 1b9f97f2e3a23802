//! Lazy filling: the guest runs while its memory is still elsewhere, in a snapshot or with a peer, and each page comes with its
//! tags when it is first touched, by a vCPU, a device or a system call on a guest's buffer. What nobody
//! touches comes in the background.
//!
//! A userfaultfd watches the data mapping, wherever there are pages to come. Who touches a page that is not mapped there
//! waits in the kernel. A thread reads who waits for what; others bring whole chunks from a [`PageProvider`]: they write the
//! data to the memory file, where nobody sees them, then the tags by the tag mapping, and then make the
//! chunk's pages visible by `UFFDIO_CONTINUE`, data and tags of each as one.
//!
//! What the kernel has of a page says nothing: where the file is made of huge pages, writing one small page puts 511
//! neighbours into the page cache, as zeros. Faults of both kinds, *missing* and *minor*, are therefore treated
//! alike, and what was placed is decided by one table alone (`queue.rs`). Pages that the source does not have are shown
//! as the file has them as soon as they are touched: holes, zeros with tag 0, or what pre-copy brought before.
//!
//! When all is placed, the memory becomes ordinary memory and the threads end. If the source fails, nothing wrong is
//! placed: who waits goes on waiting, the event is told, and another try can be asked for.
//!
//! | part | what |
//! |---|---|
//! | `provider` | where pages come from |
//! | `queue` | which chunks are there, who waits, what is next |
//! | `filling` | what the threads do |
//! | `userfault` | the kernel's interface |
//! | `latency` | how long faults took |

mod filling;
mod latency;
mod provider;
mod queue;
#[cfg(test)]
mod tests;
mod userfault;

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use rustix::event::EventfdFlags;
use rustix::io::Errno;
use stream::Metadata;

use super::populated::Populated;
use super::tags::{self, TagStore};
use super::untagged::Untagged;
use super::{GuestMemory, HUGE_PAGE_SIZE, MemoryPlan, TagMethod, host_page_size};
use crate::layout::{PAGE_SIZE, RAM_START};
use filling::{Filling, Plan};
pub use latency::FaultTimes;
use latency::Latencies;
pub use provider::{ChunkReader, PageProvider, SnapshotChunks, SnapshotPages};
use queue::{Phase, Queue};
use userfault::Userfault;

/// Most blocks that are watched or not: where one differs from the next the mapping is split, and a process can have
/// 65,530 mappings.
const MAX_BLOCKS: u64 = 8192;
/// The file system of reserved huge pages (Linux `include/uapi/linux/magic.h`).
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;

/// Why memory cannot be filled lazily here.
#[derive(Debug, thiserror::Error)]
pub enum Unsupported {
    /// Memory without a file.
    #[error(
        "the guest's memory is private, as this host's kernel refuses shared memory to a guest with MTE (it is older than \
         Linux 6.2)"
    )]
    PrivateMemory,
    /// Tags reached by the bulk copy.
    #[error(
        "the guest's tags are not reached by a tag mapping, and the bulk copy (--tag-access ioctl) would wait for the very page that it \
         is to complete; use --tag-access alias or auto"
    )]
    TagCopy,
    /// Reserved huge pages.
    #[error(
        "the guest's memory is of reserved huge pages, which come 2 MiB at once; run without --huge-pages"
    )]
    HugePages,
    /// Pages of 16 or 64 KiB.
    #[error("this host's kernel has pages of {0} bytes, pages of {PAGE_SIZE} are needed")]
    HostPages(u64),
    /// No userfaultfd at all.
    #[error("this host's kernel has no userfaultfd (CONFIG_USERFAULTFD)")]
    NoUserfaultfd,
    /// No faults of the kernel.
    #[error(
        "this user may not handle page faults of the kernel: /dev/userfaultfd: {device}, and vm.unprivileged_userfaultfd is 0; \
         allow the user to open /dev/userfaultfd, or run with CAP_SYS_PTRACE"
    )]
    NotPermitted {
        /// Why the device could not be opened.
        device: io::Error,
    },
    /// A kernel that is too old.
    #[error(
        "this host's kernel reports no minor faults on shared memory (it is older than Linux 5.14)"
    )]
    NoMinorFaults,
    /// The host refused.
    #[error("this host gives no userfaultfd: {0}")]
    Host(io::Error),
}

/// Whether memory as planned can be filled lazily on this host.
///
/// # Errors
/// Why not, and what to do.
pub fn support(plan: MemoryPlan) -> Result<(), Unsupported> {
    if !plan.memory_file {
        return Err(Unsupported::PrivateMemory);
    }
    if plan.tags == Some(TagMethod::Ioctl) {
        return Err(Unsupported::TagCopy);
    }
    if plan.huge_pages {
        return Err(Unsupported::HugePages);
    }
    if host_page_size() != PAGE_SIZE {
        return Err(Unsupported::HostPages(host_page_size()));
    }
    Userfault::new().map(drop)
}

/// Why lazy filling could not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is impossible with this memory or on this host.
    #[error("guest memory cannot be filled lazily: {0}; restore eagerly, without --lazy")]
    Unsupported(#[from] Unsupported),
    /// The source has tags and the guest has none, or the other way round.
    #[error(transparent)]
    Metadata(stream::Error),
    /// The source has pages that the guest does not.
    #[error("pages {first:#x} to {last:#x} are not all in the guest's {size} MiB of memory")]
    OutOfRange {
        /// The first page number.
        first: u64,
        /// The last one.
        last: u64,
        /// MiB of RAM.
        size: u64,
    },
    /// The source has a page twice.
    #[error("pages {first:#x} to {last:#x} would come from more than one place")]
    Twice {
        /// The first page number.
        first: u64,
        /// The last one.
        last: u64,
    },
    /// Somebody was here before.
    #[error(
        "guest memory is in use at {ipa:#x} already: it can be filled lazily only if nobody touched it"
    )]
    InUse {
        /// The first guest-physical address in use.
        ipa: u64,
    },
    /// The host refused.
    #[error("filling guest memory lazily: {step}: {source}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

fn host(step: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { step, source }
}

/// Why pages could not be placed. The guest has seen nothing wrong: who touches one of them waits.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The source failed.
    #[error("the guest's memory cannot be read: {0}")]
    Source(stream::Error),
    /// The source is not what it said.
    #[error(
        "the guest's memory cannot be read: chunk {chunk} has other pages than it was said to have"
    )]
    OtherPages {
        /// Its number.
        chunk: u32,
    },
    /// The host has no memory, most likely.
    #[error("{step} pages {:#x} to {:#x} of guest memory: {source}", .pages.start, .pages.end - 1)]
    Memory {
        /// What was tried.
        step: &'static str,
        /// The page numbers.
        pages: Range<u64>,
        /// What the host said.
        source: io::Error,
    },
    /// The tags could not be written.
    #[error("writing tags of guest memory: {0}")]
    Tags(#[from] tags::Error),
    /// Faults could not be read.
    #[error("reading page faults on guest memory: {0}")]
    Faults(io::Error),
}

impl Failure {
    fn show(pages: Range<u64>, error: Errno) -> Self {
        Self::Memory {
            step: "mapping",
            pages,
            source: error.into(),
        }
    }
}

/// What is told as it happens.
#[derive(Clone, Debug)]
pub enum Event {
    /// All is placed.
    Complete,
    /// Pages could not be placed. It is told once, and again only if [`LazyFill::retry`] fails too.
    Failed(Arc<Failure>),
}

/// How far the filling is.
#[derive(Clone, Debug)]
pub enum State {
    /// Pages come.
    Filling,
    /// The background stands still, and who touches a page that could not be had waits. Others are served.
    Failed(Arc<Failure>),
    /// All is placed.
    Complete,
}

/// Counts, as they are now.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Pages that the source has.
    pub pages: u64,
    /// Those that are placed.
    pub placed: u64,
    /// Faults that were answered, and how long each waited.
    pub faults: FaultTimes,
}

/// Who brings pages.
#[derive(Clone, Copy, Debug)]
pub struct Threads {
    /// Threads that bring only what somebody waits for. With one for each vCPU and device, nobody waits for a chunk
    /// that another one needs.
    pub faults: NonZeroUsize,
    /// Threads that bring all the rest, if nobody waits.
    pub background: NonZeroUsize,
}

impl Threads {
    /// Four for faults, one for the rest.
    pub const DEFAULT: Self = Self {
        faults: NonZeroUsize::MIN.saturating_add(3),
        background: NonZeroUsize::MIN,
    };

    /// How many these are.
    pub const fn all(self) -> usize {
        self.faults.get() + self.background.get()
    }
}

/// What a memory has before it is filled.
pub enum Before {
    /// Nothing: nobody has touched it.
    Untouched,
    /// Older contents, and these tags: what the source has replaces them, and all others stay. So post-copy goes on where pre-copy
    /// ended.
    Placed(Arc<Untagged>),
}

/// A memory that is being filled.
///
/// Dropping it changes nothing: its threads hold the memory and the userfaultfd, and fill on, or wait for ever if the source
/// failed. Only [`Self::abandon`] gives up pages that are missing, since closing the userfaultfd lets those who wait find
/// zeros. A process that ends is no danger: its threads end before its files are closed.
///
/// Until [`Self::is_complete`], the memory must not be saved ([`GuestMemory::populated`] tells of what the kernel has, not of
/// what was placed), and a vCPU that waits cannot be stopped: it waits in the kernel, where only the end of the
/// process reaches it.
pub struct LazyFill {
    filling: Arc<Filling>,
}

impl LazyFill {
    /// Begins to fill `memory` from `source`. vCPUs may run and devices go on when this returns, and not before.
    /// `on_event` is called by threads of the filling; it may call
    /// this value's functions, but must touch no guest memory.
    ///
    /// # Errors
    /// See [`Error`]. The memory is as before then.
    pub fn start<S: PageProvider>(
        memory: Arc<GuestMemory>,
        source: S,
        before: Before,
        threads: Threads,
        on_event: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let tags = match source.metadata().has_tags() {
            true => Some(tags_by_alias(&memory)?),
            false => None,
        };
        Self::start_with(memory, tags, source, before, threads, Box::new(on_event))
    }

    fn start_with<S: PageProvider>(
        memory: Arc<GuestMemory>,
        tags: Option<Box<dyn TagStore>>,
        source: S,
        before: Before,
        threads: Threads,
        on_event: Box<dyn Fn(Event) + Send + Sync>,
    ) -> Result<Self, Error> {
        check_metadata(&memory, &source)?;
        let file = file_of(&memory)?;
        let untagged = match before {
            Before::Untouched => {
                check_untouched(&memory)?;
                Arc::new(Untagged::new(memory.size()))
            }
            Before::Placed(untagged) => untagged,
        };
        let plan = plan(&source, memory.size())?;
        let userfault = Userfault::new()?;
        for range in &plan.ranges {
            watch(&memory, range, &userfault)
                .map_err(host("registering memory with userfaultfd"))?;
        }
        let end = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|error| host("making an eventfd")(error.into()))?;
        let filling = Arc::new(Filling {
            queue: Mutex::new(Queue::new(plan.sizes.len())),
            memory,
            file,
            tags,
            untagged,
            userfault,
            plan,
            on_event,
            more: Condvar::new(),
            changed: Condvar::new(),
            end,
            placed: AtomicU64::new(0),
            fault_times: Latencies::new(),
        });
        let this = Self { filling };
        match this.start_threads(source, threads) {
            Ok(()) => Ok(this),
            Err(error) => {
                this.abandon();
                Err(error)
            }
        }
    }

    fn start_threads<S: PageProvider>(&self, source: S, threads: Threads) -> Result<(), Error> {
        self.filling.end_if_complete();
        if self.is_complete() {
            return Ok(());
        }
        let filling = self.filling.clone();
        spawn("lazy-faults", move || filling.answer_faults())?;
        let source = Arc::new(source);
        let fault = [false].repeat(threads.faults.get());
        let background = [true].repeat(threads.background.get());
        for background in [fault, background].concat() {
            let (filling, source) = (self.filling.clone(), source.clone());
            spawn("lazy-fill", move || filling.fill(&*source, background))?;
        }
        Ok(())
    }

    /// How far it is.
    pub fn state(&self) -> State {
        match &self.filling.lock().phase {
            Phase::Filling => State::Filling,
            Phase::Failed(failure) => State::Failed(failure.clone()),
            Phase::Complete | Phase::Abandoned => State::Complete,
        }
    }

    /// Whether all is placed: the memory is ordinary memory now.
    pub fn is_complete(&self) -> bool {
        matches!(self.filling.lock().phase, Phase::Complete)
    }

    /// Counts, as they are now.
    pub fn progress(&self) -> Progress {
        Progress {
            pages: self.filling.plan.sizes.iter().sum(),
            placed: self.filling.placed.load(Ordering::Relaxed),
            faults: self.filling.fault_times.get(),
        }
    }

    /// Waits until all is placed.
    ///
    /// # Errors
    /// Pages could not be placed; it can be called again after [`Self::retry`].
    pub fn wait(&self) -> Result<(), Arc<Failure>> {
        let mut queue = self.filling.lock();
        loop {
            match &queue.phase {
                Phase::Complete | Phase::Abandoned => return Ok(()),
                Phase::Failed(failure) => return Err(failure.clone()),
                Phase::Filling => {}
            }
            queue = self
                .filling
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// After a failure, tries again what failed, that first for which somebody waits.
    pub fn retry(&self) {
        let mut queue = self.filling.lock();
        let Phase::Failed(_) = queue.phase else {
            return;
        };
        let stuck = queue.retry();
        drop(queue);
        self.filling.more.notify_all();
        self.filling.let_go(&stuck);
        self.filling.end_if_complete();
    }

    /// Gives up what is not placed: a page that is missing reads as zeros from now on. For when nobody can touch the memory any more,
    /// neither a vCPU nor a device, nor is waiting for a page of it. Chunks on their way may still be placed until
    /// their reader returns.
    pub fn abandon(self) {
        let mut queue = self.filling.lock();
        if !queue.is_over() {
            queue.phase = Phase::Abandoned;
        }
        drop(queue);
        self.filling.wake_all();
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    thread::Builder::new()
        .name(name.into())
        .spawn(work)
        .map(drop)
        .map_err(host("starting a thread"))
}

/// The one way to tags that needs no page of the data mapping.
fn tags_by_alias(memory: &Arc<GuestMemory>) -> Result<Box<dyn TagStore>, Unsupported> {
    #[cfg(target_arch = "aarch64")]
    if let Some(alias) = tags::AliasTags::new(memory.clone()) {
        return Ok(Box::new(alias));
    }
    let _ = memory;
    Err(Unsupported::TagCopy)
}

/// Rule: no tag is lost or made up silently.
fn check_metadata(memory: &GuestMemory, source: &impl PageProvider) -> Result<(), Error> {
    if memory.tag_mapping().is_none() || source.metadata().has_tags() {
        return Ok(());
    }
    Err(Error::Metadata(stream::Error::Metadata {
        from: "the source",
        given: source.metadata(),
        to: "the guest",
        taken: Metadata::ArmMte,
    }))
}

/// The file behind a memory, which pages can be written to.
fn file_of(memory: &GuestMemory) -> Result<File, Error> {
    let Populated::File(file) = &memory.populated else {
        return Err(Unsupported::PrivateMemory.into());
    };
    let system = rustix::fs::fstatfs(file)
        .map_err(|error| host("looking at the memory file")(error.into()))?;
    if system.f_type as u32 == HUGETLBFS_MAGIC {
        return Err(Unsupported::HugePages.into());
    }
    file.try_clone()
        .map_err(host("duplicating the memory file"))
}

/// From now on, who touches a page of this range of RAM waits for it, whether the file has it or not.
fn watch(memory: &GuestMemory, range: &Range<u64>, userfault: &Userfault) -> io::Result<()> {
    let start = memory.host_address.addr().get() as u64;
    userfault.register(start + range.start..start + range.end)?;
    let length = (range.end - range.start) as usize;
    // SAFETY: the range is the data mapping's, a shared one: this takes pages from the page tables, and from
    // nothing else.
    let result = unsafe {
        let first = memory.host_address.as_ptr().add(range.start as usize);
        libc::madvise(first.cast(), length, libc::MADV_DONTNEED)
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn check_untouched(memory: &GuestMemory) -> Result<(), Error> {
    let all = RAM_START..RAM_START + memory.size();
    match memory.populated(all).next().transpose() {
        Ok(None) => Ok(()),
        Ok(Some(used)) => Err(Error::InUse { ipa: used.start }),
        Err(error) => Err(host("finding out which pages exist")(error)),
    }
}

/// What comes from where, checked: the source may be hostile.
fn plan(source: &impl PageProvider, size: u64) -> Result<Plan, Error> {
    let ram = RAM_START / PAGE_SIZE..(RAM_START + size) / PAGE_SIZE;
    let block = block_size(size);
    let runs = source.runs().filter(|(run, _)| !run.is_empty());
    let mut plan = Plan {
        runs: runs.collect(),
        sizes: Vec::new(),
        ranges: Vec::new(),
    };
    // The guest waits for this. They mostly come in order, which then costs next to nothing, other than maps of ranges do.
    plan.runs.sort_by_key(|(run, _)| run.start);
    let mut next = 0;
    for (run, chunk) in &plan.runs {
        let (first, last) = (run.start, run.end - 1);
        if first < ram.start || ram.end <= last {
            let size = size >> 20;
            return Err(Error::OutOfRange { first, last, size });
        }
        if first < next {
            return Err(Error::Twice { first, last });
        }
        next = run.end;
        let bytes = (first - ram.start) * PAGE_SIZE..(run.end - ram.start) * PAGE_SIZE;
        let start = bytes.start - bytes.start % block;
        let end = bytes.end.next_multiple_of(block).min(size);
        match plan.ranges.last_mut() {
            Some(last) if start <= last.end => last.end = end,
            _ => plan.ranges.push(start..end),
        }
        let chunk = *chunk as usize;
        if plan.sizes.len() <= chunk {
            plan.sizes.resize(chunk + 1, 0);
        }
        plan.sizes[chunk] += run.end - run.start;
    }
    Ok(plan)
}

/// The unit in which memory is watched: a huge page, or more where there would be too many.
fn block_size(size: u64) -> u64 {
    (size / MAX_BLOCKS).next_power_of_two().max(HUGE_PAGE_SIZE)
}
