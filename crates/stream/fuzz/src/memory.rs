//! Pages by number: data and tags, or what stands for them.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;
use std::ops::Range;
use std::sync::Mutex;

use mte::TagPage;
use stream::{Batch, Metadata, Page, PageSink};

/// Keeps a hash of each page.
pub struct Hashes {
    metadata: Metadata,
    pages: Mutex<BTreeMap<u64, u64>>,
}

impl Hashes {
    pub fn new(metadata: Metadata) -> Self {
        Self {
            metadata,
            pages: Mutex::default(),
        }
    }

    pub fn into_pages(self) -> BTreeMap<u64, u64> {
        self.pages.into_inner().expect("nothing panics with it")
    }
}

/// What stands for a page.
pub fn hash(data: &Page, tags: Option<&TagPage>) -> u64 {
    let mut hasher = DefaultHasher::new();
    (data, tags).hash(&mut hasher);
    hasher.finish()
}

impl PageSink for Hashes {
    fn metadata(&self) -> Metadata {
        self.metadata
    }

    fn place(&self, batch: &Batch) -> io::Result<()> {
        let mut pages = self.pages.lock().expect("nothing panics with it");
        for (number, data, tags) in batch.iter() {
            pages.insert(number, hash(data, tags));
        }
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let mut pages = self.pages.lock().expect("nothing panics with it");
        let gone: Vec<u64> = pages.range(range).map(|(number, _)| *number).collect();
        for number in gone {
            pages.remove(&number);
        }
        Ok(())
    }
}
