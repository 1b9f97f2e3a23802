//! The payload `fill`: fills memory with random words and, with `tags=random`, each granule with a random tag, and then prints a
//! line again and again. `size=BYTES` says how much memory; all that is free if it is not given.
#![cfg_attr(all(target_arch = "aarch64", panic = "abort"), no_std, no_main)]

#[cfg(all(target_arch = "aarch64", panic = "abort"))]
mod fill {
    use mte::{GRANULE_SIZE, Tag};
    use payloads::machine::Machine;
    use payloads::report::Report;
    use payloads::tagging::instructions;
    use payloads::{println, start};

    /// A page's worth: the size is rounded down to it.
    const PAGE_SIZE: u64 = 4096;

    pub fn run(machine: &Machine, _: &mut Report) {
        let first = start::image().end.next_multiple_of(PAGE_SIZE);
        let free = (machine.device_tree - first) / PAGE_SIZE * PAGE_SIZE;
        let size = machine
            .argument("size")
            .and_then(|size| size.parse().ok())
            .map_or(free, |size: u64| free.min(size));
        let tagged = machine.argument("tags") == Some("random");
        let mut words = Words(0x9e37_79b9_7f4a_7c15);
        for granule in (first..first + size).step_by(GRANULE_SIZE) {
            let granule = granule as *mut u64;
            // SAFETY: the addresses are in RAM that neither the image nor the device tree occupies.
            unsafe {
                granule.write_volatile(words.next());
                granule.add(1).write_volatile(words.next());
            }
            if tagged {
                let tag = Tag::from_low_bits((words.next() >> 32) as u8);
                // SAFETY: as above.
                unsafe { instructions().stg(granule.cast(), tag) };
            }
        }
        println!("fill: {} pages", size / PAGE_SIZE);
        loop {
            println!("fill: here");
        }
    }

    /// Numbers that no codec makes shorter (xorshift64, Marsaglia 2003).
    struct Words(u64);

    impl Words {
        const fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }
    }
}

#[cfg(all(target_arch = "aarch64", panic = "abort"))]
payloads::payload!(fill::run);

#[cfg(not(all(target_arch = "aarch64", panic = "abort")))]
fn main() {}
