//! Granules and pages.
//!
//! A granule is the 16 naturally aligned bytes that share one allocation tag. Tags are moved by the
//! page, *packed*: two tags a byte, the tag of the lower address in the lower nibble, so that a
//! page's tags are 1/32 of its size. Every size that follows from this is here.

/// Bytes of memory with one allocation tag (Arm ARM D10.2, `TAG_GRANULE`).
pub const GRANULE_SIZE: usize = 16;

/// Granules whose tags are packed into one byte.
pub(crate) const TAGS_PER_BYTE: usize = 2;

/// The page sizes of the architecture (its *translation granules*).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB: 256 tags, 128 bytes packed.
    Kib4,
    /// 16 KiB: 1024 tags, 512 bytes packed.
    Kib16,
    /// 64 KiB: 4096 tags, 2 KiB packed.
    Kib64,
}

impl PageSize {
    /// The page size of this many bytes, if there is one.
    pub const fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            0x1000 => Some(Self::Kib4),
            0x4000 => Some(Self::Kib16),
            0x1_0000 => Some(Self::Kib64),
            _ => None,
        }
    }

    /// Bytes of a page.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Kib4 => 0x1000,
            Self::Kib16 => 0x4000,
            Self::Kib64 => 0x1_0000,
        }
    }

    /// Granules of a page, and so its tags.
    pub const fn granules(self) -> usize {
        self.bytes() / GRANULE_SIZE
    }

    /// Bytes of a page's packed tags.
    pub const fn packed_bytes(self) -> usize {
        self.granules() / TAGS_PER_BYTE
    }

    /// [`TagPage`](crate::TagPage)s of a page: 1, 4 or 16.
    pub const fn tag_pages(self) -> usize {
        self.bytes() / Self::Kib4.bytes()
    }

    /// Is `address` the first of a page?
    pub const fn is_aligned(self, address: u64) -> bool {
        address.is_multiple_of(self.bytes() as u64)
    }

    /// The first address of the page of `address`.
    pub const fn align_down(self, address: u64) -> u64 {
        address & !(self.bytes() as u64 - 1)
    }

    /// The first address at or after `address` that is the first of a page; `None` beyond the last
    /// page.
    pub const fn align_up(self, address: u64) -> Option<u64> {
        address.checked_next_multiple_of(self.bytes() as u64)
    }
}

/// The first addresses of the granules that `size` bytes from `address` touch, the lowest first. No
/// byte touches no granule.
///
/// Addresses wrap at the top of the address space.
pub fn granules(address: u64, size: u64) -> impl Iterator<Item = u64> {
    let granule = GRANULE_SIZE as u64;
    let first = address & !(granule - 1);
    let count = match size {
        0 => 0,
        _ => (address % granule + (size - 1) % granule) / granule + (size - 1) / granule + 1,
    };
    (0..count).map(move |index| first.wrapping_add(index * granule))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    const PAGE_SIZES: [PageSize; 3] = [PageSize::Kib4, PageSize::Kib16, PageSize::Kib64];

    #[test]
    fn packed_tags_are_one_thirtysecond_of_a_page() {
        for size in PAGE_SIZES {
            assert_eq!(size.packed_bytes() * 32, size.bytes());
            assert_eq!(
                size.tag_pages() * size_of::<crate::TagPage>(),
                size.packed_bytes()
            );
        }
    }

    #[test]
    fn a_page_size_is_known_by_its_bytes() {
        for size in PAGE_SIZES {
            assert_eq!(PageSize::from_bytes(size.bytes()), Some(size));
        }
        assert_eq!(PageSize::from_bytes(0x2000), None);
    }

    #[test]
    fn there_is_no_page_above_the_last() {
        assert_eq!(PageSize::Kib4.align_up(0xffff_ffff_ffff_f001), None);
        assert_eq!(
            PageSize::Kib4.align_up(0xffff_ffff_ffff_f000),
            Some(0xffff_ffff_ffff_f000)
        );
    }

    #[test]
    fn an_access_that_crosses_a_boundary_touches_both_granules() {
        assert_eq!(granules(0x100f, 2).collect::<Vec<_>>(), [0x1000, 0x1010]);
        assert_eq!(granules(0x1000, 16).collect::<Vec<_>>(), [0x1000]);
        assert_eq!(granules(0x1001, 16).collect::<Vec<_>>(), [0x1000, 0x1010]);
    }

    #[test]
    fn the_whole_address_space_has_a_count_of_granules_that_does_not_overflow() {
        assert_eq!(granules(0, u64::MAX).size_hint().0, 1 << 60);
        assert_eq!(granules(1, u64::MAX).size_hint().0, 1 << 60);
    }

    proptest! {
        #[test]
        fn granules_are_those_of_the_single_bytes(address: u64, size in 0u64..100) {
            let mut expected: Vec<u64> = (0..size).map(|offset| address.wrapping_add(offset) & !15).collect();
            expected.dedup();
            prop_assert_eq!(granules(address, size).collect::<Vec<_>>(), expected);
        }

        #[test]
        fn alignment_never_leaves_the_page(address in 0..u64::MAX - 0x1_0000) {
            for size in PAGE_SIZES {
                let down = size.align_down(address);
                let up = size.align_up(address).unwrap();
                prop_assert!(size.is_aligned(down) && size.is_aligned(up));
                prop_assert!(down <= address && address <= up && up - down <= size.bytes() as u64);
            }
        }
    }
}
