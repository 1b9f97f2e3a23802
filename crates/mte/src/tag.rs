//! The 4-bit tag, and sets of tags.
//!
//! A *logical* tag travels in bits 59:56 of an address; an *allocation* tag belongs to a granule of
//! memory. Both are a [`Tag`]. A [`TagSet`] is what `GCR_EL1.Exclude`, the second operand of IRG
//! and the result of GMI hold: one bit a tag.

use core::fmt;

/// The lowest bit of the logical tag in a 64-bit address (Arm ARM D10.4.2).
const LOGICAL_TAG_SHIFT: u32 = 56;
const LOGICAL_TAG_MASK: u64 = 0xf << LOGICAL_TAG_SHIFT;

/// A tag: 0 to 15, and nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(u8);

impl Tag {
    /// Tag 0, the tag of memory that was never tagged and of pointers that never were.
    pub const ZERO: Self = Self(0);
    /// Tag 15, which an address of the upper range has if nothing was put into it.
    pub const MAX: Self = Self(15);
    /// How many tags there are.
    pub const COUNT: usize = 16;

    /// The tag of this value, if there is one.
    pub const fn new(value: u8) -> Option<Self> {
        if value <= Self::MAX.0 {
            Some(Self(value))
        } else {
            None
        }
    }

    /// The tag in bits 3:0. The others do not count, as in a byte given to `KVM_ARM_MTE_COPY_TAGS`
    /// or `PTRACE_POKEMTETAGS`.
    pub const fn from_low_bits(byte: u8) -> Self {
        Self(byte & 0xf)
    }

    /// Its value, 0 to 15.
    pub const fn value(self) -> u8 {
        self.0
    }

    /// The logical tag of an address, whether or not the address is in use as a tagged one.
    pub const fn of_address(address: u64) -> Self {
        Self::from_low_bits((address >> LOGICAL_TAG_SHIFT) as u8)
    }

    /// `address` with this logical tag in place of its own (Arm ARM,
    /// `AArch64.AddressWithAllocationTag`).
    ///
    /// Bits 63:60 stay as they are, as they do in every instruction that inserts a tag.
    pub const fn insert_into(self, address: u64) -> u64 {
        address & !LOGICAL_TAG_MASK | (self.0 as u64) << LOGICAL_TAG_SHIFT
    }

    /// The logical tag of a pointer.
    #[cfg(target_pointer_width = "64")]
    pub fn of_pointer<T: ?Sized>(pointer: *const T) -> Self {
        Self::of_address(pointer.addr() as u64)
    }

    /// `pointer` with this logical tag in place of its own, and the provenance that it had.
    #[cfg(target_pointer_width = "64")]
    #[must_use]
    pub fn insert_into_pointer<T>(self, pointer: *mut T) -> *mut T {
        pointer.map_addr(|address| self.insert_into(address as u64) as usize)
    }

    /// All tags, 0 first.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> + ExactSizeIterator {
        (0..Self::COUNT as u8).map(Self)
    }

    /// The next tag, with 0 after 15.
    pub(crate) const fn successor(self) -> Self {
        Self::from_low_bits(self.0 + 1)
    }
}

impl From<Tag> for u8 {
    fn from(tag: Tag) -> Self {
        tag.0
    }
}

/// One hexadecimal digit.
impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// A set of tags, bit *n* for tag *n*.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct TagSet(u16);

impl TagSet {
    /// No tag.
    pub const EMPTY: Self = Self(0);
    /// Every tag.
    pub const ALL: Self = Self(u16::MAX);

    /// The set with these bits.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The set in bits 15:0 of a general-purpose register, as IRG reads it.
    pub const fn from_register(register: u64) -> Self {
        Self(register as u16)
    }

    /// Its bits.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Is `tag` in it?
    pub const fn contains(self, tag: Tag) -> bool {
        self.0 >> tag.0 & 1 == 1
    }

    /// The set with `tag` added.
    #[must_use]
    pub const fn with(self, tag: Tag) -> Self {
        Self(self.0 | 1 << tag.0)
    }

    /// The tags that are in either.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The tags that are not in it. Linux asks a thread for the tags to include, the hardware for
    /// those to exclude.
    #[must_use]
    pub const fn complement(self) -> Self {
        Self(!self.0)
    }

    /// Its tags, the lowest first.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = Tag> {
        Tag::all().filter(move |tag| self.contains(*tag))
    }
}

impl FromIterator<Tag> for TagSet {
    fn from_iter<I: IntoIterator<Item = Tag>>(tags: I) -> Self {
        tags.into_iter().fold(Self::EMPTY, Self::with)
    }
}

impl fmt::Debug for TagSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TagSet({:#06x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sixteen_is_no_tag() {
        assert_eq!(Tag::new(15), Some(Tag::MAX));
        assert_eq!(Tag::new(16), None);
    }

    #[test]
    fn only_the_low_four_bits_of_a_byte_count() {
        assert_eq!(Tag::from_low_bits(0xf3).value(), 3);
    }

    #[test]
    fn a_tag_is_put_into_bits_59_to_56_and_nowhere_else() {
        let tag = Tag::from_low_bits(0xa);
        assert_eq!(tag.insert_into(0), 0x0a00_0000_0000_0000);
        assert_eq!(tag.insert_into(u64::MAX), 0xfaff_ffff_ffff_ffff);
    }

    #[test]
    fn a_set_holds_exactly_the_tags_put_into_it() {
        let odd: TagSet = Tag::all().filter(|tag| tag.value() % 2 == 1).collect();
        assert_eq!(odd.bits(), 0xaaaa);
        assert_eq!(odd.complement().bits(), 0x5555);
        assert!(odd.iter().eq(Tag::all().skip(1).step_by(2)));
    }

    proptest! {
        #[test]
        fn a_tag_put_into_an_address_is_read_back_from_it(address: u64, value in 0u8..16) {
            let tag = Tag::from_low_bits(value);
            let tagged = tag.insert_into(address);
            prop_assert_eq!(Tag::of_address(tagged), tag);
            prop_assert_eq!(Tag::of_address(address).insert_into(tagged), address);
        }
    }
}
