//! The payload `touch`: all vCPUs at once touch fresh memory, each its share, one word a page of 4 KiB, and say how long
//! that took. Every first touch is a fault that the hypervisor resolves. `size=BYTES` says how much memory.
#![cfg_attr(all(target_arch = "aarch64", panic = "abort"), no_std, no_main)]

#[cfg(all(target_arch = "aarch64", panic = "abort"))]
mod touch {
    use core::ops::Range;
    use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    use payloads::machine::Machine;
    use payloads::processors::run_on_all;
    use payloads::report::Report;
    use payloads::{println, read_register, start};

    const PAGE_SIZE: u64 = 4096;
    /// Memory from here on was touched by nobody: what is before it shares a huge page with the image.
    const FRESH: u64 = 2 << 20;

    static START: AtomicU64 = AtomicU64::new(0);
    static SHARE: AtomicU64 = AtomicU64::new(0);
    static VCPUS: AtomicUsize = AtomicUsize::new(0);
    static READY: AtomicUsize = AtomicUsize::new(0);
    /// When the first vCPU began and the last one ended, in ticks of the counter that all share.
    static BEGUN: AtomicU64 = AtomicU64::new(u64::MAX);
    static ENDED: AtomicU64 = AtomicU64::new(0);

    pub fn run(machine: &Machine, report: &mut Report) {
        let vcpus = machine.processors().len();
        let fresh = fresh_memory(machine);
        let size = machine
            .argument("size")
            .and_then(|size| size.parse().ok())
            .unwrap_or(fresh.end - fresh.start);
        report.check("memory-is-as-large-as-asked", |check| {
            check.that(
                size <= fresh.end - fresh.start,
                format_args!("{size} bytes asked for, {fresh:#x?} is there"),
            );
        });
        if !report.all_passed() {
            return;
        }
        START.store(fresh.start, Ordering::Relaxed);
        SHARE.store(
            size / vcpus as u64 / PAGE_SIZE * PAGE_SIZE,
            Ordering::Relaxed,
        );
        VCPUS.store(vcpus, Ordering::Relaxed);

        report.check("all-vcpus-touch-their-share", |check| {
            if let Err((vcpu, error)) = run_on_all(machine, touch_share) {
                check.that(
                    false,
                    format_args!("vCPU {vcpu} cannot be turned on: {error}"),
                );
            }
        });
        let ticks = ENDED.load(Ordering::Relaxed) - BEGUN.load(Ordering::Relaxed);
        let microseconds = ticks * 1_000_000 / read_register!("cntfrq_el0");
        println!(
            "touch: {vcpus} vCPUs, {} pages, {microseconds} us",
            size / PAGE_SIZE
        );
    }

    fn fresh_memory(machine: &Machine) -> Range<u64> {
        let start = start::image().end.next_multiple_of(FRESH);
        start..machine.device_tree / FRESH * FRESH
    }

    fn touch_share(vcpu: usize) {
        let share = SHARE.load(Ordering::Relaxed);
        let first = START.load(Ordering::Relaxed) + vcpu as u64 * share;
        READY.fetch_add(1, Ordering::AcqRel);
        while READY.load(Ordering::Acquire) < VCPUS.load(Ordering::Relaxed) {
            core::hint::spin_loop();
        }
        BEGUN.fetch_min(read_register!("cntvct_el0"), Ordering::Relaxed);
        for address in (first..first + share).step_by(PAGE_SIZE as usize) {
            // SAFETY: the address is in RAM that neither the image nor the device tree occupies, and no other vCPU's.
            unsafe { core::ptr::write_volatile(address as *mut u64, address) };
        }
        ENDED.fetch_max(read_register!("cntvct_el0"), Ordering::Relaxed);
    }
}

#[cfg(all(target_arch = "aarch64", panic = "abort"))]
payloads::payload!(touch::run);

#[cfg(not(all(target_arch = "aarch64", panic = "abort")))]
fn main() {}
