//! The memory that the workload works on, as pages with tags and data.

use mte::{Tag, TagPage, TagSet};

use crate::page::Data;

/// Pages of memory with tags, of which each is used by one thread.
///
/// Accesses to data are made through pointers with the tags that the caller believes the page to have. On hardware they
/// are checked, and a tag that is not as believed ends the program with a diagnosis.
pub trait Memory {
    /// The address of a granule, for a message.
    fn address(&self, page: usize, granule: u8) -> u64;

    /// A tag that the thread may use and that is not in `excluded`; tag 0 if there is none.
    fn random_tag(&mut self, excluded: TagSet) -> Tag;

    /// The tags of a page.
    fn tags(&self, page: usize) -> TagPage;

    /// Gives a page tags.
    fn set_tags(&mut self, page: usize, tags: &TagPage);

    /// Gives one granule a tag.
    fn set_tag(&mut self, page: usize, granule: u8, tag: Tag);

    /// Gives a page tags and zeroes its data in the same instructions.
    fn set_tags_and_zero(&mut self, page: usize, tags: &TagPage);

    /// Writes the data of a page that has these tags.
    fn write(&mut self, page: usize, tags: &TagPage, data: Data);

    /// Does a page that has these tags hold this data?
    fn holds(&self, page: usize, tags: &TagPage, data: Data) -> bool;

    /// The data of a granule, whatever its tag.
    fn granule(&self, page: usize, granule: u8) -> [u64; 2];

    /// Reads a word of a page by a pointer whose tag is not that of the memory, and says what then did not happen that
    /// should have.
    fn mismatch(&self, page: usize, memory: Tag) -> Result<(), &'static str>;
}
