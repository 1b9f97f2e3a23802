//! Tags counted by packed bytes, each of which has two: half the work of counting them one by one.

use mte::{PageSize, Tag, TagPage};

/// How often each pair of neighbouring tags is in a byte of packed tags; the first granule's in the low half.
#[derive(Clone, Debug)]
pub(crate) struct Pairs([u64; Pairs::COUNT]);

impl Pairs {
    const COUNT: usize = Tag::COUNT * Tag::COUNT;

    /// Nothing counted yet.
    pub(crate) const NONE: Self = Self([0; Self::COUNT]);

    pub(crate) fn add_page(&mut self, tags: &TagPage) {
        for pair in tags.as_packed() {
            self.0[usize::from(*pair)] += 1;
        }
    }

    /// A page all of whose granules have this tag.
    pub(crate) fn add_uniform_page(&mut self, tag: Tag) {
        self.0[usize::from(tag.value() * 0x11)] += PageSize::Kib4.packed_bytes() as u64;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (sum, count) in self.0.iter_mut().zip(other.0) {
            *sum += count;
        }
    }

    /// How often each pair was seen.
    pub(crate) fn counts(&self) -> &[u64] {
        &self.0
    }

    /// How many granules have each tag.
    pub(crate) fn granules(&self) -> [u64; Tag::COUNT] {
        let mut granules = self.firsts();
        for (sum, row) in granules.iter_mut().zip(self.rows()) {
            *sum += row.iter().sum::<u64>();
        }
        granules
    }

    /// How many of the first granules of pairs have each tag.
    pub(crate) fn firsts(&self) -> [u64; Tag::COUNT] {
        let mut firsts = [0; Tag::COUNT];
        for row in self.rows() {
            for (sum, count) in firsts.iter_mut().zip(row) {
                *sum += count;
            }
        }
        firsts
    }

    /// The pairs with the same second tag, by that.
    fn rows(&self) -> &[[u64; Tag::COUNT]] {
        self.0.as_chunks().0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_granule_of_a_page_counts_once() {
        let mut of_granules = [3; 256];
        of_granules[7] = 9;
        of_granules[8] = 9;
        of_granules[255] = 15;
        let mut pairs = Pairs::NONE;
        let mut expected = [0; Tag::COUNT];
        (expected[3], expected[9], expected[15]) = (253, 2, 1);

        pairs.add_page(&TagPage::pack(&of_granules));

        assert_eq!(pairs.granules(), expected);
    }

    #[test]
    fn a_page_of_one_tag_counts_as_its_granules() {
        let tag = Tag::from_low_bits(0xb);
        let (mut whole, mut one_by_one) = (Pairs::NONE, Pairs::NONE);

        whole.add_uniform_page(tag);
        one_by_one.add_page(&TagPage::filled(tag));

        assert_eq!(whole.counts(), one_by_one.counts());
        assert_eq!(whole.granules()[0xb], 256);
    }
}
