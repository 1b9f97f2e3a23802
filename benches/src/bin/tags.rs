//! What it costs to reach the tags of a guest from outside, by LDG and STG on the tag mapping and by KVM's bulk copy.
//!
//! `bench-tags paths` prints nanoseconds a page on one CPU; where time counts instructions, these are instructions.
//! `bench-tags scaling` prints how much faster two threads are than one. Both end with status 1 if a goal is missed.

#[cfg(target_arch = "aarch64")]
mod bench {
    use std::error::Error;
    use std::ops::Range;
    use std::process::ExitCode;
    use std::sync::Arc;
    use std::time::Instant;

    use benches::scaling::{self, Medians, Plan, Rounds, TWO_CPUS, median};
    use engine::Hypervisor;
    use engine::kvm::KvmHypervisor;
    use mte::{Tag, TagPage};
    use vmm::layout::{PAGE_SIZE, RAM_START};
    use vmm::memory::tags::{AliasTags, CopiedTags, TagStore};
    use vmm::memory::{GuestMemory, MemoryPlan, TagAccess};

    type Result<T> = std::result::Result<T, Box<dyn Error>>;

    /// Pages reached by one call, as a stream of pages would.
    const BATCH: usize = 64;
    const ROUNDS: usize = 5;

    /// A guest's memory with tags, and both ways to them. No vCPU runs.
    struct Guest {
        alias: AliasTags,
        ioctl: Box<dyn TagStore>,
        pages: usize,
    }

    impl Guest {
        fn new(pages: usize) -> Result<Self> {
            let hypervisor = KvmHypervisor::open("/dev/kvm".as_ref())?;
            let plan =
                MemoryPlan::choose(hypervisor.capabilities(), true, TagAccess::Alias, false)?;
            let size = pages as u64 * PAGE_SIZE;
            let memory = Arc::new(GuestMemory::new(size, plan)?);
            // SAFETY: the VM never has a vCPU.
            let vm = Arc::new(unsafe { memory.new_vm(&hypervisor, true) }?);
            let alias =
                AliasTags::new(memory.clone()).ok_or("this host's programs have no tags")?;
            Ok(Self {
                alias,
                ioctl: Box::new(CopiedTags::new(memory, vm)),
                pages,
            })
        }

        /// Gives every page other tags, and finds them by both ways.
        fn fill(&self) -> Result<()> {
            let mut written = TagPage::ZERO;
            for page in 0..self.pages {
                for granule in 0..=u8::MAX {
                    let tag = usize::from(granule / 4) * 5 + page;
                    written.set(granule, Tag::from_low_bits(tag as u8));
                }
                let ipa = RAM_START + page as u64 * PAGE_SIZE;
                self.alias.write(ipa, std::slice::from_ref(&written))?;
                let mut read = [TagPage::ZERO, TagPage::ZERO];
                self.alias.read(ipa, &mut read[..1])?;
                self.ioctl.read(ipa, &mut read[1..])?;
                if read[0] != written || read[1] != written {
                    return Err(format!("page {page}: tags read are not those written").into());
                }
            }
            Ok(())
        }

        fn read(&self, store: &dyn TagStore, pages: Range<usize>) {
            let mut tags = vec![TagPage::ZERO; BATCH];
            for page in pages.step_by(BATCH) {
                store
                    .read(RAM_START + page as u64 * PAGE_SIZE, &mut tags)
                    .expect("the pages are guest memory");
            }
        }

        fn write(&self, store: &dyn TagStore, pages: Range<usize>) {
            let tags = vec![TagPage::filled(Tag::from_low_bits(5)); BATCH];
            for page in pages.step_by(BATCH) {
                store
                    .write(RAM_START + page as u64 * PAGE_SIZE, &tags)
                    .expect("the pages are guest memory");
            }
        }
    }

    type Work = fn(&Guest, &dyn TagStore, Range<usize>);

    pub fn main() -> Result<ExitCode> {
        let met = match std::env::args().nth(1).as_deref() {
            Some("paths") => paths()?,
            Some("scaling") => scaling()?,
            _ => return Err("usage: bench-tags paths|scaling".into()),
        };
        Ok(if met {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    fn paths() -> Result<bool> {
        const GOAL: u128 = 1100;
        const GOAL_RATIO: f64 = 0.2;
        let guest = Guest::new(16384)?;
        guest.fill()?;
        println!(
            "Instructions a 4 KiB page, of tags packed two a byte, {} pages, {BATCH} a call",
            guest.pages
        );
        println!("                 alias      ioctl   alias/ioctl");
        let mut met = true;
        for (name, work) in [("read", Guest::read as Work), ("write", Guest::write)] {
            let cost = |store: &dyn TagStore| {
                let durations = (0..ROUNDS).map(|_| {
                    let begun = Instant::now();
                    work(&guest, store, 0..guest.pages);
                    begun.elapsed()
                });
                median(durations.collect()).as_nanos() / guest.pages as u128
            };
            let (alias, ioctl) = (cost(&guest.alias), cost(&*guest.ioctl));
            let ratio = alias as f64 / ioctl as f64;
            println!(
                "  {name:8} {alias:11} {ioctl:10} {ratio:13.3}   goals: at most {GOAL}, at most {GOAL_RATIO}"
            );
            met &= alias <= GOAL && ratio <= GOAL_RATIO;
        }
        Ok(met)
    }

    /// Pages that a thread reaches in each half of the guest's memory that is its own.
    const SHARE: usize = 4096;

    /// Pages at the beginning of each half of the guest's memory: the emulator notes which tags were written, in a bit for those of
    /// 32 pages, and two CPUs that set bits of one word wait for each other.
    struct FarApart<'a> {
        guest: &'a Guest,
        store: &'a dyn TagStore,
        reach: Work,
    }

    impl scaling::Work for FarApart<'_> {
        type Share = Vec<Range<usize>>;

        fn prepare(&self, thread: usize, threads: usize) -> Self::Share {
            let first = |half| half * self.guest.pages / 2;
            let halves = (thread..2).step_by(threads);
            halves
                .map(|half| first(half)..first(half) + SHARE)
                .collect()
        }

        fn run(&self, ranges: &mut Self::Share) {
            for range in ranges {
                (self.reach)(self.guest, self.store, range.clone());
            }
        }
    }

    fn scaling() -> Result<bool> {
        const GOAL: f64 = 1.8;
        let guest = Guest::new(65536)?;
        guest.fill()?;
        let pages = 2 * SHARE;
        let counted = Plan::FULL.counted;
        println!("Two threads against one, {pages} pages, medians of {counted} rounds in which");
        println!("arithmetic before and after was faster by {TWO_CPUS} or more");
        println!("             one thread  two threads   faster by   (arithmetic)   of rounds");
        let mut met = true;
        let ways: [(&str, &dyn TagStore, bool); 2] = [
            ("alias", &guest.alias, true),
            ("ioctl", &*guest.ioctl, false),
        ];
        for (name, store, has_goal) in ways {
            for (what, work) in [("read", Guest::read as Work), ("write", Guest::write)] {
                let far_apart = FarApart {
                    guest: &guest,
                    store,
                    reach: work,
                };
                let rounds = Rounds::measure(Plan::FULL, &far_apart);
                let (counted, made) = (rounds.counted(), rounds.made);
                print!("  {name} {what:6}");
                let Some(medians) = rounds.medians() else {
                    println!("not measured: two CPUs were there in {counted} of {made} rounds");
                    met &= !has_goal;
                    continue;
                };
                let Medians { faster, cpus, .. } = medians;
                let [one, two] = [medians.one, medians.two].map(|seconds| 1e3 * seconds);
                let goal = if has_goal {
                    "   goal: at least 1.8"
                } else {
                    ""
                };
                println!(" {one:7.1} ms {two:9.1} ms {faster:11.2} {cpus:14.2} {made:11}{goal}");
                met &= !has_goal || faster >= GOAL;
            }
        }
        Ok(met)
    }
}

#[cfg(target_arch = "aarch64")]
fn main() -> std::process::ExitCode {
    bench::main().unwrap_or_else(|e| {
        eprintln!("bench-tags: {e}");
        std::process::ExitCode::from(2)
    })
}

#[cfg(not(target_arch = "aarch64"))]
fn main() {}
