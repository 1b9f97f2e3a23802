//! Pages that changed: what the guest wrote, by the engine's dirty log, and what the VMM wrote, by the
//! bitmap of the data mapping. Neither knows the other's writes. A store of a tag alone is a write.

use stream::PageSet;

use super::host_page_size;
use crate::layout::{PAGE_SIZE, RAM_START};

const FIRST: u64 = RAM_START / PAGE_SIZE;

/// The pages of `size` bytes of RAM that these bitmaps have: `log`, a bit for each page of the host's size, and `writes`,
/// a bit for each page of 4 KiB. What else is in the host's pages that those are in is added: tags are reached by whole
/// pages of the host.
pub fn dirty_pages(size: u64, log: &[u64], writes: &[u64]) -> PageSet {
    blocks(size, log, writes, host_page_size() / PAGE_SIZE)
}

fn blocks(size: u64, log: &[u64], writes: &[u64], block: u64) -> PageSet {
    let mut dirty = PageSet::none(FIRST..FIRST + size / PAGE_SIZE);
    for first in bits(log).map(|number| number * block) {
        dirty.insert(FIRST + first..FIRST + first + block);
    }
    for page in bits(writes) {
        let first = page - page % block;
        dirty.insert(FIRST + first..FIRST + first + block);
    }
    dirty
}

/// The numbers of the bits that are set, the lowest first.
fn bits(words: &[u64]) -> impl Iterator<Item = u64> {
    (0..).zip(words).flat_map(|(index, word)| {
        let mut rest = *word;
        std::iter::from_fn(move || {
            let bit = (rest != 0).then(|| rest.trailing_zeros())?;
            rest &= rest - 1;
            Some(index * 64 + u64::from(bit))
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pages counted from the start of RAM.
    fn listed(pages: &PageSet) -> Vec<u64> {
        pages.runs().flatten().map(|page| page - FIRST).collect()
    }

    proptest! {
        #[test]
        fn what_is_dirty_is_what_the_bitmaps_have_of_ram(
            size in 1u64..400,
            pages in prop::collection::btree_set(0u64..400, 0..80),
        ) {
            let mut bitmap = vec![0u64; 7];
            for page in &pages {
                bitmap[(page / 64) as usize] |= 1 << (page % 64);
            }

            let expected: Vec<u64> = pages.into_iter().filter(|page| *page < size).collect();
            prop_assert_eq!(listed(&blocks(size * PAGE_SIZE, &bitmap, &[], 1)), expected.clone());
            prop_assert_eq!(listed(&blocks(size * PAGE_SIZE, &[], &bitmap, 1)), expected);
        }
    }

    #[test]
    fn what_guest_and_vmm_wrote_is_put_together() {
        let dirty = blocks(128 * PAGE_SIZE, &[1 << 63, 0], &[1 << 3, 1], 1);
        assert_eq!(listed(&dirty), [3, 63, 64]);
    }

    #[test]
    fn a_dirty_page_of_a_larger_host_page_makes_all_of_it_dirty() {
        let expected: Vec<u64> = (0..16).chain(32..40).collect();
        assert_eq!(listed(&blocks(40 * PAGE_SIZE, &[0b101], &[], 16)), expected);
        let expected: Vec<u64> = (16..32).collect();
        assert_eq!(
            listed(&blocks(40 * PAGE_SIZE, &[], &[1 << 20], 16)),
            expected
        );
    }
}
