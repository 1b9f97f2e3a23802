//! The memory that is rewritten: ordinary, or with tags.

use std::time::{Duration, Instant};

const WORDS: usize = 512;

/// Why there is no memory to rewrite.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Tags were asked for.
    #[error("this machine offers programs no MTE: start the guest with MTE, or leave out --tags")]
    NoMte,
    /// The kernel's answer.
    #[cfg(all(target_arch = "aarch64", target_os = "linux"))]
    #[error("cannot map memory with PROT_MTE: {0}")]
    Map(#[from] std::io::Error),
}

/// It begins where a page of the machine does: to rewrite one touches no other.
#[repr(align(4096))]
#[derive(Clone)]
struct Page([u64; WORDS]);

/// Pages of 4 KiB.
pub struct Pages {
    plain: Vec<Page>,
    #[cfg(all(target_arch = "aarch64", target_os = "linux"))]
    tagged: Option<tagged::Tagged>,
}

impl Pages {
    /// This many pages, with tags or without.
    ///
    /// # Errors
    /// There is no such memory.
    #[cfg(all(target_arch = "aarch64", target_os = "linux"))]
    pub fn new(pages: usize, tags: bool) -> Result<Self, MemoryError> {
        let tagged = tags.then(|| tagged::Tagged::new(pages)).transpose()?;
        let plain = if tags { 0 } else { pages };
        Ok(Self {
            plain: vec![Page([0; WORDS]); plain],
            tagged,
        })
    }

    /// This many pages, without tags.
    ///
    /// # Errors
    /// Tags are asked for.
    #[cfg(not(all(target_arch = "aarch64", target_os = "linux")))]
    pub fn new(pages: usize, tags: bool) -> Result<Self, MemoryError> {
        if tags {
            return Err(MemoryError::NoMte);
        }
        Ok(Self {
            plain: vec![Page([0; WORDS]); pages],
        })
    }

    /// Gives a page new data, and new tags if it has some. Returns how long the first store took.
    pub fn rewrite(&mut self, index: usize, words: &mut Words) -> Duration {
        #[cfg(all(target_arch = "aarch64", target_os = "linux"))]
        if let Some(tagged) = &mut self.tagged {
            let took = fill(tagged.page(index), words);
            tagged.colour(index, words);
            return took;
        }
        fill(&mut self.plain[index].0, words)
    }
}

fn fill(page: &mut [u64; WORDS], words: &mut Words) -> Duration {
    let begun = Instant::now();
    // SAFETY: a reference can be written. Volatile, so that the store happens between the two looks at the clock.
    unsafe { (&raw mut page[0]).write_volatile(words.next()) };
    let took = begun.elapsed();
    for word in &mut page[1..] {
        *word = words.next();
    }
    took
}

/// Numbers that no codec makes shorter (xorshift64, Marsaglia 2003).
pub struct Words(u64);

impl Words {
    /// They are the same in each run.
    pub const fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
mod tagged {
    use mte::aarch64::Instructions;
    use mte::{GRANULE_SIZE, Tag};
    use mte_linux::TaggedMemory;

    use super::{MemoryError, WORDS, Words};

    /// Pages mapped with `PROT_MTE`.
    pub struct Tagged {
        memory: TaggedMemory,
        instructions: Instructions,
    }

    impl Tagged {
        pub fn new(pages: usize) -> Result<Self, MemoryError> {
            let instructions = mte_linux::instructions().ok_or(MemoryError::NoMte)?;
            Ok(Self {
                memory: TaggedMemory::new(pages)?,
                instructions,
            })
        }

        pub fn page(&mut self, index: usize) -> &mut [u64; WORDS] {
            // SAFETY: the page is mapped, readable and writable for as long as the mapping is borrowed, zeros are words,
            // and tag checks are off, so that an address with tag 0 reaches it whatever its tags are.
            unsafe { &mut *self.memory.page(index).cast() }
        }

        /// Gives each granule a random tag.
        pub fn colour(&mut self, index: usize, words: &mut Words) {
            let page = self.memory.page(index);
            for granule in 0..size_of::<[u64; WORDS]>() / GRANULE_SIZE {
                let tag = Tag::from_low_bits((words.next() >> 32) as u8);
                // SAFETY: the granule is in the page, which is mapped with `PROT_MTE`.
                unsafe { self.instructions.stg(page.add(granule * GRANULE_SIZE), tag) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rewritten_page_has_new_data_in_every_word() {
        let mut pages = Pages::new(2, false).unwrap();
        let mut words = Words::new();
        pages.rewrite(1, &mut words);
        let before = pages.plain[1].clone();

        pages.rewrite(1, &mut words);

        assert!(before.0.iter().zip(&pages.plain[1].0).all(|(a, b)| a != b));
        assert_eq!(pages.plain[0].0, [0; WORDS]);
    }

    #[test]
    fn pages_begin_where_those_of_the_machine_do() {
        let pages = Pages::new(3, false).unwrap();

        let misaligned = |page: &Page| (&raw const *page).addr() % 4096;
        assert!(pages.plain.iter().map(misaligned).all(|rest| rest == 0));
    }
}
