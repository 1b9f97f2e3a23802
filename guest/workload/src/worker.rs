//! What a thread does with its pages: it writes them once, and then in each pass verifies all and rewrites some.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fastrand::Rng;
use mte::{Tag, TagPage, TagSet};

use crate::clock::Clocks;
use crate::difference::Difference;
use crate::ledger::{Entry, Written};
use crate::memory::Memory;
use crate::page::{Data, GRANULES, Pattern};

/// So many tags drawn, and each one that may come has come: one in 16 fails to with a probability below 10⁻¹¹⁰.
const DRAWS_THAT_SHOW_ALL: u64 = 4096;

/// How a page is rewritten.
#[derive(Clone, Copy)]
enum Change {
    /// New tags, new data.
    TagsAndData,
    /// New tags, the same data.
    Tags,
    /// New data, the same tags.
    Data,
    /// One tag, nothing else.
    OneTag,
    /// New tags and zeros, by the instructions that do both.
    TagsAndZeros,
}

impl Change {
    const ALL: [Self; 5] = [
        Self::TagsAndData,
        Self::Tags,
        Self::Data,
        Self::OneTag,
        Self::TagsAndZeros,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::TagsAndData => "tags and data written",
            Self::Tags => "tags written",
            Self::Data => "data written",
            Self::OneTag => "one tag written",
            Self::TagsAndZeros => "zeroed with tags",
        }
    }
}

/// What a thread has done so far, for others to read.
#[derive(Default)]
pub struct Counters {
    /// Passes over all its pages.
    pub passes: AtomicU64,
    /// Tags compared.
    pub tags_checked: AtomicU64,
    /// Pages rewritten.
    pub pages_rewritten: AtomicU64,
}

/// A thread's part of the work.
pub struct Worker<'a, M> {
    thread: usize,
    memory: M,
    pages: Vec<Entry>,
    include: TagSet,
    drawn: TagSet,
    draws: u64,
    rewritten_percent: u8,
    rng: Rng,
    clocks: &'a Clocks,
    counters: &'a Counters,
}

/// How a worker is set up.
pub struct Setting {
    /// Its number.
    pub thread: usize,
    /// The tags that its thread lets IRG choose.
    pub include: TagSet,
    /// How many pages of 100 it rewrites in a pass.
    pub rewritten_percent: u8,
    /// What its random choices follow from.
    pub seed: u64,
}

impl<'a, M: Memory> Worker<'a, M> {
    /// A worker on pages that nobody has touched.
    pub fn new(
        setting: &Setting,
        memory: M,
        pages: Vec<usize>,
        clocks: &'a Clocks,
        counters: &'a Counters,
    ) -> Self {
        Self {
            thread: setting.thread,
            memory,
            pages: pages.into_iter().map(Entry::untouched).collect(),
            include: setting.include,
            drawn: TagSet::EMPTY,
            draws: 0,
            rewritten_percent: setting.rewritten_percent,
            rng: Rng::with_seed(setting.seed),
            clocks,
            counters,
        }
    }

    /// Writes all its pages for the first time, but those that are `never_touched`.
    ///
    /// # Errors
    /// What went wrong.
    pub fn populate(&mut self, never_touched: impl Fn(usize) -> bool) -> Result<(), Difference> {
        for index in 0..self.pages.len() {
            if !never_touched(self.pages[index].page) {
                self.rewrite(index, Change::TagsAndData)?;
            }
        }
        Ok(())
    }

    /// One pass: verifies all pages but those never touched, rewrites some, and looks at the thread's registers. Ends early
    /// when `stopped` says so.
    ///
    /// # Errors
    /// The first thing that is not as it should be.
    pub fn pass(&mut self, stopped: impl Fn() -> bool) -> Result<(), Difference> {
        for index in 0..self.pages.len() {
            if stopped() {
                return Ok(());
            }
            if self.pages[index].written.is_none() {
                continue;
            }
            self.verify(index)?;
            if self.rng.u8(..100) < self.rewritten_percent {
                let change = Change::ALL[self.rng.usize(..Change::ALL.len())];
                self.rewrite(index, change)?;
            }
        }
        self.verify_that_checks_are_made()?;
        self.clocks.now()?;
        self.counters.passes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Verifies every page, also those never touched, and that IRG has chosen every tag it could.
    ///
    /// # Errors
    /// The first thing that is not as it should be.
    pub fn finish(&mut self) -> Result<(), Difference> {
        for index in 0..self.pages.len() {
            self.verify(index)?;
        }
        let missing: TagSet = self
            .include
            .iter()
            .filter(|&tag| !self.drawn.contains(tag))
            .collect();
        if self.draws >= DRAWS_THAT_SHOW_ALL && missing != TagSet::EMPTY {
            return Err(Difference::IrgMissing {
                thread: self.thread,
                missing,
                draws: self.draws,
            });
        }
        Ok(())
    }

    fn verify(&mut self, index: usize) -> Result<(), Difference> {
        let clocks = self.clocks;
        self.pages[index].verify(&self.memory, self.thread, || {
            clocks.now().unwrap_or(Duration::MAX)
        })?;
        self.counters
            .tags_checked
            .fetch_add(GRANULES as u64, Ordering::Relaxed);
        Ok(())
    }

    fn verify_that_checks_are_made(&mut self) -> Result<(), Difference> {
        let index = self.rng.usize(..self.pages.len().max(1));
        let Some(Entry {
            page,
            written: Some(written),
        }) = self.pages.get(index)
        else {
            return Ok(());
        };
        self.memory
            .mismatch(*page, written.tags.get(0))
            .map_err(|what| Difference::Fault {
                thread: self.thread,
                what: what.into(),
            })
    }

    fn rewrite(&mut self, index: usize, change: Change) -> Result<(), Difference> {
        let page = self.pages[index].page;
        let written = self.pages[index].written.as_ref();
        let (mut tags, mut data) = written.map_or((TagPage::ZERO, Data::Zero), |written| {
            (written.tags.clone(), written.data)
        });
        match change {
            Change::TagsAndData => {
                tags = self.new_tags()?;
                data = Data::any(&mut self.rng);
                self.memory.set_tags(page, &tags);
                self.memory.write(page, &tags, data);
            }
            Change::Tags => {
                tags = self.new_tags()?;
                self.memory.set_tags(page, &tags);
            }
            Change::Data => {
                data = Data::any(&mut self.rng);
                self.memory.write(page, &tags, data);
            }
            Change::OneTag => {
                let granule = self.rng.u8(..);
                let tag = self.draw(TagSet::EMPTY.with(tags.get(granule)))?;
                tags.set(granule, tag);
                self.memory.set_tag(page, granule, tag);
            }
            Change::TagsAndZeros => {
                tags = self.new_tags()?;
                data = Data::Zero;
                self.memory.set_tags_and_zero(page, &tags);
            }
        }
        self.pages[index].written = Some(Written {
            tags,
            data,
            how: change.name(),
            when: self.clocks.now()?,
        });
        self.counters
            .pages_rewritten
            .fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn new_tags(&mut self) -> Result<TagPage, Difference> {
        let pattern = Pattern::any(&mut self.rng);
        let mut rng = self.rng.fork();
        let mut wrong = Ok(());
        let tags = pattern.tags(&mut rng, |excluded| {
            self.draw(excluded).unwrap_or_else(|difference| {
                wrong = Err(difference);
                Tag::ZERO
            })
        });
        wrong.map(|()| tags)
    }

    /// A tag by IRG, which may be any that the thread includes and `excluded` does not have, or 0 if there is none.
    fn draw(&mut self, excluded: TagSet) -> Result<Tag, Difference> {
        let tag = self.memory.random_tag(excluded);
        let allowed = self.include.complement().union(excluded).complement();
        let right = if allowed == TagSet::EMPTY {
            tag == Tag::ZERO
        } else {
            allowed.contains(tag)
        };
        if !right {
            return Err(Difference::Irg {
                thread: self.thread,
                tag,
                include: allowed,
            });
        }
        self.drawn = self.drawn.with(tag);
        self.draws += 1;
        Ok(tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::difference::GranuleDifference;
    use mte::{GcrEl1, RgsrEl1, TagGenerator};

    const PAGES: usize = 40;
    const NEVER_TOUCHED: usize = 13;

    /// Memory of tags and data that software keeps, with a processor's IRG.
    struct Pretended {
        tags: Vec<TagPage>,
        data: Vec<[[u64; 2]; GRANULES]>,
        generator: TagGenerator,
    }

    impl Pretended {
        fn new(include: TagSet) -> Self {
            let gcr = GcrEl1::default().with_exclude(include.complement());
            let generator = TagGenerator {
                tag_access: true,
                gcr,
                rgsr: RgsrEl1::default().with_seed(0xace1),
            };
            Self {
                tags: vec![TagPage::ZERO; PAGES],
                data: vec![[[0; 2]; GRANULES]; PAGES],
                generator,
            }
        }
    }

    impl Memory for Pretended {
        fn address(&self, page: usize, granule: u8) -> u64 {
            (page as u64) << 12 | u64::from(granule) << 4
        }

        fn random_tag(&mut self, excluded: TagSet) -> Tag {
            Tag::of_address(self.generator.irg(0, excluded.bits().into()))
        }

        fn tags(&self, page: usize) -> TagPage {
            self.tags[page].clone()
        }

        fn set_tags(&mut self, page: usize, tags: &TagPage) {
            self.tags[page] = tags.clone();
        }

        fn set_tag(&mut self, page: usize, granule: u8, tag: Tag) {
            self.tags[page].set(granule, tag);
        }

        fn set_tags_and_zero(&mut self, page: usize, tags: &TagPage) {
            self.tags[page] = tags.clone();
            self.data[page] = [[0; 2]; GRANULES];
        }

        fn write(&mut self, page: usize, tags: &TagPage, data: Data) {
            assert_eq!(self.tags[page], *tags);
            self.data[page] = granules(data);
        }

        fn holds(&self, page: usize, tags: &TagPage, data: Data) -> bool {
            assert_eq!(self.tags[page], *tags);
            self.data[page] == granules(data)
        }

        fn granule(&self, page: usize, granule: u8) -> [u64; 2] {
            self.data[page][usize::from(granule)]
        }

        fn mismatch(&self, _page: usize, _memory: Tag) -> Result<(), &'static str> {
            Ok(())
        }
    }

    fn granules(data: Data) -> [[u64; 2]; GRANULES] {
        let mut granules = data.granules();
        std::array::from_fn(|_| granules.next().unwrap())
    }

    /// A worker that has populated its pages and made some passes.
    fn at_work<'a>(
        clocks: &'a Clocks,
        counters: &'a Counters,
        include: TagSet,
    ) -> Worker<'a, Pretended> {
        let setting = Setting {
            thread: 5,
            include,
            rewritten_percent: 30,
            seed: 42,
        };
        let mut worker = Worker::new(
            &setting,
            Pretended::new(include),
            (0..PAGES).collect(),
            clocks,
            counters,
        );
        worker.populate(|page| page == NEVER_TOUCHED).unwrap();
        for _ in 0..20 {
            worker.pass(|| false).unwrap();
        }
        worker
    }

    /// The difference that a worker with all tags finds in the next pass after `change`.
    fn found_after(change: impl FnOnce(&mut Worker<'_, Pretended>)) -> GranuleDifference {
        let (clocks, counters) = (Clocks::default(), Counters::default());
        let mut worker = at_work(&clocks, &counters, TagSet::ALL);
        change(&mut worker);
        let Err(Difference::Granule(difference)) =
            worker.pass(|| false).and_then(|()| worker.finish())
        else {
            panic!("nothing was found")
        };
        *difference
    }

    fn page_with(worker: &Worker<'_, Pretended>, wanted: impl Fn(&Written) -> bool) -> usize {
        worker
            .pages
            .iter()
            .position(|entry| entry.written.as_ref().is_some_and(&wanted))
            .unwrap()
    }

    #[test]
    fn memory_that_nobody_disturbs_shows_no_difference() {
        let (clocks, counters) = (Clocks::default(), Counters::default());
        let mut worker = at_work(&clocks, &counters, TagSet::ALL);
        assert_eq!(worker.finish(), Ok(()));
        assert_eq!(counters.passes.load(Ordering::Relaxed), 20);
        assert_eq!(
            counters.tags_checked.load(Ordering::Relaxed),
            (20 * (PAGES - 1) + PAGES) as u64 * 256
        );
    }

    #[test]
    fn one_changed_tag_is_found_with_its_place_and_history() {
        let difference = found_after(|worker| {
            let tag = worker.memory.tags[3].get(200).value();
            worker.memory.tags[3].set(200, Tag::from_low_bits(tag + 1));
        });
        assert_eq!(
            (difference.page, difference.granule, difference.address),
            (3, 200, 0x3c80)
        );
        assert_eq!(
            difference.actual.0.value(),
            (difference.expected.0.value() + 1) % 16
        );
        assert_eq!(difference.actual.1, difference.expected.1);
        assert_eq!((difference.thread, difference.differing), (5, 1));
        assert!(difference.written.is_some());
    }

    #[test]
    fn one_changed_bit_of_data_is_found() {
        let difference = found_after(|worker| worker.memory.data[7][255][1] ^= 1 << 63);
        assert_eq!(
            (difference.page, difference.granule, difference.differing),
            (7, 255, 1)
        );
        assert_eq!(difference.actual.1[1], difference.expected.1[1] ^ 1 << 63);
        assert_eq!(difference.actual.0, difference.expected.0);
    }

    #[test]
    fn tags_lost_from_a_page_of_zeros_are_found() {
        let difference = found_after(|worker| {
            let page = page_with(worker, |written| {
                written.data == Data::Zero && written.tags != TagPage::ZERO
            });
            worker.memory.tags[page] = TagPage::ZERO;
        });
        assert_eq!(difference.actual, (Tag::ZERO, [0, 0]));
        assert_ne!(difference.expected.0, Tag::ZERO);
    }

    #[test]
    fn data_lost_from_a_page_without_tags_is_found() {
        let difference = found_after(|worker| {
            let page = page_with(worker, |written| {
                written.data != Data::Zero && written.tags == TagPage::ZERO
            });
            worker.memory.data[page] = [[0; 2]; GRANULES];
        });
        assert_eq!(difference.differing, 256);
        assert_eq!(difference.actual, (Tag::ZERO, [0, 0]));
    }

    #[test]
    fn a_page_as_it_was_before_the_last_change_of_its_tags_is_found() {
        let difference = found_after(|worker| {
            let stale = worker.memory.tags[4].clone();
            while worker.memory.tags[4] == stale {
                worker.rewrite(4, Change::Tags).unwrap();
            }
            worker.memory.tags[4] = stale;
        });
        assert_eq!(difference.page, 4);
        assert_eq!(difference.written.unwrap().0, "tags written");
    }

    #[test]
    fn two_pages_exchanged_are_found() {
        let difference = found_after(|worker| {
            worker.rewrite(0, Change::TagsAndData).unwrap();
            worker.memory.data.swap(0, 1);
            worker.memory.tags.swap(0, 1);
        });
        assert!(difference.page < 2);
    }

    #[test]
    fn a_page_that_was_never_touched_and_has_a_tag_is_found_at_the_end() {
        let difference = found_after(|worker| worker.memory.tags[NEVER_TOUCHED].set(0, Tag::MAX));
        assert_eq!((difference.page, difference.written), (NEVER_TOUCHED, None));
    }

    #[test]
    fn a_tag_that_the_thread_does_not_include_is_found() {
        let (clocks, counters) = (Clocks::default(), Counters::default());
        let mut worker = at_work(&clocks, &counters, TagSet::from_bits(0xfff0));
        worker.memory.generator.gcr = GcrEl1::default();
        let difference = (0..100).find_map(|_| worker.pass(|| false).err()).unwrap();
        assert!(
            matches!(difference, Difference::Irg { thread: 5, .. }),
            "{difference}"
        );
    }

    #[test]
    fn a_tag_that_never_comes_is_found_at_the_end() {
        let (clocks, counters) = (Clocks::default(), Counters::default());
        let mut worker = at_work(&clocks, &counters, TagSet::from_bits(0xfff0));
        worker.drawn = TagSet::from_bits(0xffe0);
        let difference = worker.finish().unwrap_err();
        assert!(
            matches!(difference, Difference::IrgMissing { missing, .. } if missing == TagSet::from_bits(0x0010)),
            "{difference}"
        );
    }
}
