//! What it costs to reach the tags of a guest from outside, by LDG and STG on the tag mapping and by KVM's bulk copy.
//!
//! `bench-tags paths` prints nanoseconds a page on one CPU; where time counts instructions, these are instructions.
//! `bench-tags scaling` prints how much faster two threads are than one. Both end with status 1 if a goal is missed.

#[cfg(target_arch = "aarch64")]
mod bench {
    use std::error::Error;
    use std::process::ExitCode;
    use std::sync::{Arc, Barrier};
    use std::time::{Duration, Instant};

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

        fn read(&self, store: &dyn TagStore, pages: std::ops::Range<usize>) {
            let mut tags = vec![TagPage::ZERO; BATCH];
            for page in pages.step_by(BATCH) {
                store
                    .read(RAM_START + page as u64 * PAGE_SIZE, &mut tags)
                    .expect("the pages are guest memory");
            }
        }

        fn write(&self, store: &dyn TagStore, pages: std::ops::Range<usize>) {
            let tags = vec![TagPage::filled(Tag::from_low_bits(5)); BATCH];
            for page in pages.step_by(BATCH) {
                store
                    .write(RAM_START + page as u64 * PAGE_SIZE, &tags)
                    .expect("the pages are guest memory");
            }
        }
    }

    type Work = fn(&Guest, &dyn TagStore, std::ops::Range<usize>);

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

    fn scaling() -> Result<bool> {
        const GOAL: f64 = 1.8;
        let guest = Guest::new(65536)?;
        guest.fill()?;
        println!(
            "Two threads against one, {} pages, medians of {ROUNDS} rounds in turn",
            guest.pages
        );
        println!("             one thread  two threads   faster by");
        let mut met = true;
        let ways: [(&str, &dyn TagStore, bool); 2] = [
            ("alias", &guest.alias, true),
            ("ioctl", &*guest.ioctl, false),
        ];
        for (name, store, has_goal) in ways {
            for (what, work) in [("read", Guest::read as Work), ("write", Guest::write)] {
                let mut times: [Vec<Duration>; 2] = Default::default();
                for _ in 0..ROUNDS {
                    for threads in [1, 2] {
                        times[threads - 1].push(with_threads(&guest, store, work, threads));
                    }
                }
                let [one, two] = times.map(median);
                let faster = one.as_secs_f64() / two.as_secs_f64();
                let goal = if has_goal {
                    "   goal: at least 1.8"
                } else {
                    ""
                };
                println!(
                    "  {name} {what:6} {:7} ms {:9} ms {faster:11.2}{goal}",
                    one.as_millis(),
                    two.as_millis()
                );
                met &= !has_goal || faster >= GOAL;
            }
        }
        Ok(met)
    }

    /// The time until all threads have done their share.
    fn with_threads(guest: &Guest, store: &dyn TagStore, work: Work, threads: usize) -> Duration {
        let start = Barrier::new(threads + 1);
        let share = guest.pages / threads;
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    work(guest, store, thread * share..(thread + 1) * share);
                });
            }
            start.wait();
            let begun = Instant::now();
            // The scope ends when its threads have.
            begun
        })
        .elapsed()
    }

    fn median(mut durations: Vec<Duration>) -> Duration {
        durations.sort();
        durations[durations.len() / 2]
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
