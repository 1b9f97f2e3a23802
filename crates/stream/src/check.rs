//! Checks: XXH3-64 of what must not change unnoticed.
//!
//! XXH3 because it keeps up with memory, 64 bits because what it guards against is damage: nobody
//! needs an accident to get past one chunk in 2^64. It proves nothing about who wrote a stream;
//! that is for the connection (TLS) or for who may write the file.

use mte::TagPage;
use twox_hash::XxHash3_64;

use crate::wire::PAGE_SIZE;

/// Whether a check is right. A fuzzer, which would not get past it, finds all of them right.
pub(crate) const fn matches(found: u64, expected: u64) -> bool {
    found == expected || cfg!(fuzzing)
}

/// Of bytes, for one stream: the same bytes have another check in another stream.
pub(crate) fn seeded(seed: u64, bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(seed, bytes)
}

/// Of a chunk without pages.
pub(crate) fn of_content(seed: u64, meta: &[u8], data: &[u8]) -> u64 {
    let parts = [meta, data].map(|part| XxHash3_64::oneshot(part).to_le_bytes());
    seeded(seed, parts.as_flattened())
}

/// Goes on with a check over checks.
pub(crate) fn chained(before: u64, next: u64) -> u64 {
    seeded(before, &next.to_le_bytes())
}

/// The check of a chunk's pages, as they will be in the guest.
pub(crate) struct PagesCheck {
    seed: u64,
    of_zero_page: u64,
    /// Of the tags of an untagged page: most pages are.
    of_untagged: u64,
    /// Of the tags of a page of a stream without tags.
    of_no_tags: u64,
    /// Number, check of the data, check of the tags, for each page.
    records: Vec<u8>,
}

impl PagesCheck {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            of_zero_page: XxHash3_64::oneshot(&[0; PAGE_SIZE]),
            of_untagged: XxHash3_64::oneshot(TagPage::ZERO.as_packed()),
            of_no_tags: XxHash3_64::oneshot(&[]),
            records: Vec::new(),
        }
    }

    pub(crate) fn begin(&mut self) {
        self.records.clear();
    }

    /// Adds a page. Data of `None` are zeros; tags of `None` are those of a stream without.
    pub(crate) fn add(
        &mut self,
        number: u64,
        data: Option<&[u8; PAGE_SIZE]>,
        tags: Option<&TagPage>,
    ) {
        let data = data.map_or(self.of_zero_page, |data| XxHash3_64::oneshot(data));
        let tags = match tags {
            None => self.of_no_tags,
            Some(tags) if tags.is_untagged() => self.of_untagged,
            Some(tags) => XxHash3_64::oneshot(tags.as_packed()),
        };
        for field in [number, data, tags] {
            self.records.extend_from_slice(&field.to_le_bytes());
        }
    }

    pub(crate) fn end(&self) -> u64 {
        seeded(self.seed, &self.records)
    }
}
