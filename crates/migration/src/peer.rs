//! Pages that are still at the source, as the destination fetches them while its guest runs.
//!
//! They are asked for in groups of neighbours, one request at a time on each link. Who needs a group takes a link out of
//! the pool and gives it back; a link that fails is not given back. When the link to the source breaks, all fail, and
//! those who wait are told; new links in the pool serve the next tries.

use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use stream::{Batch, Metadata, PageSet};

use crate::error::{Error, Result};
use crate::link::{Closer, Incoming, Link};
use crate::message::Wanted;

/// Pages of a request's block.
const BLOCK: u64 = 64;
/// The fewest pages that are fetched together: a fault brings its neighbours.
const FEWEST: u64 = 8;
/// The most groups, if a group has no more pages than a request can name.
const MOST_GROUPS: u64 = 1 << 18;

/// The source's pages.
pub struct Peer {
    metadata: Metadata,
    /// In order of their pages.
    groups: Vec<Wanted>,
    /// How many links it began with.
    links: u8,
    pool: Mutex<Pool>,
    changed: Condvar,
}

#[derive(Default)]
struct Pool {
    free: Vec<Link>,
    /// Of all links, those taken among them.
    closers: Vec<Closer>,
    /// Links that are taken.
    taken: usize,
    /// How often all links were ended. One that was taken before is not put back.
    ended: u32,
}

impl Peer {
    /// The pages of `missing`, by these links.
    pub(crate) fn new(metadata: Metadata, missing: &PageSet, links: Vec<Link>) -> Self {
        let peer = Self {
            metadata,
            groups: groups(missing),
            links: links.len() as u8,
            pool: Mutex::new(Pool::default()),
            changed: Condvar::new(),
        };
        peer.add(links);
        peer
    }

    /// How many links it is to have.
    pub(crate) const fn links(&self) -> u8 {
        self.links
    }

    /// What its pages have besides data.
    #[must_use]
    pub const fn metadata(&self) -> Metadata {
        self.metadata
    }

    /// The runs of pages, each with the number of its group.
    pub fn runs(&self) -> impl Iterator<Item = (Range<u64>, u32)> {
        let groups = (0..).zip(&self.groups);
        groups.flat_map(|(number, wanted)| wanted.runs().into_iter().map(move |run| (run, number)))
    }

    /// Fetches the pages of a group.
    ///
    /// # Errors
    /// The link broke, or there is none; it can be tried again when there is another.
    pub fn fetch(&self, group: u32, batch: &mut Batch) -> Result<()> {
        let wanted = *self
            .groups
            .get(group as usize)
            .ok_or_else(|| Error::State(format!("there is no group {group} of missing pages")))?;
        loop {
            let (mut link, ended) = self.take()?;
            let fetched = ask(&mut link, wanted, batch);
            let mut pool = self.lock();
            pool.taken -= 1;
            let was_ended = pool.ended != ended;
            if fetched.is_ok() && !was_ended {
                pool.free.push(link);
            }
            let has_others = !pool.free.is_empty() || pool.taken > 0;
            drop(pool);
            self.changed.notify_all();
            if fetched.is_ok() || !was_ended || !has_others {
                return fetched;
            }
            // It failed with its link, which is replaced already.
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A link that nobody uses. Waits for one if there are any.
    fn take(&self) -> Result<(Link, u32)> {
        let mut pool = self.lock();
        loop {
            if let Some(link) = pool.free.pop() {
                pool.taken += 1;
                return Ok((link, pool.ended));
            }
            if pool.taken == 0 {
                return Err(Error::Ended {
                    peer: "the source".into(),
                });
            }
            pool = self
                .changed
                .wait(pool)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// More links.
    pub(crate) fn add(&self, links: Vec<Link>) {
        let mut pool = self.lock();
        pool.closers = links.iter().map(Link::closer).collect();
        pool.free.extend(links);
        drop(pool);
        self.changed.notify_all();
    }

    /// Ends all links: who fetches fails.
    pub(crate) fn close(&self) {
        let mut pool = self.lock();
        pool.ended = pool.ended.wrapping_add(1);
        pool.free.clear();
        let closers = std::mem::take(&mut pool.closers);
        drop(pool);
        closers.iter().for_each(|close| close());
        self.changed.notify_all();
    }

    /// How long a page may take.
    pub(crate) fn set_patience(links: &[Link], patience: Duration) -> Result<()> {
        links
            .iter()
            .try_for_each(|link| link.set_patience(patience))
    }
}

fn ask(link: &mut Link, wanted: Wanted, batch: &mut Batch) -> Result<()> {
    link.ask(wanted)?;
    match link.next(batch)? {
        Incoming::Pages => {}
        other => return Err(link.unexpected(other.name(), "pages")),
    }
    let right = batch
        .numbers()
        .iter()
        .copied()
        .eq(wanted.runs().into_iter().flatten());
    if !right {
        batch.clear();
        return Err(link.unexpected("other pages", "those that were asked for"));
    }
    Ok(())
}

/// Neighbours together, as many as is right for so many pages.
fn groups(missing: &PageSet) -> Vec<Wanted> {
    let size = (missing.len() / MOST_GROUPS)
        .next_power_of_two()
        .clamp(FEWEST, BLOCK);
    let mut groups: Vec<Wanted> = Vec::new();
    let mut last = None;
    for page in missing.runs().flatten() {
        let (first, bit) = (page - page % BLOCK, 1 << (page % BLOCK));
        let group = page / size;
        match groups.last_mut() {
            Some(wanted) if last == Some(group) => wanted.pages |= bit,
            _ => groups.push(Wanted { first, pages: bit }),
        }
        last = Some(group);
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_pages_are_grouped_with_their_neighbours() {
        let mut missing = PageSet::none(0x40000..0x50000);
        missing.insert(0x40006..0x40009);
        missing.insert(0x4000c..0x4000d);
        missing.insert(0x40100..0x40101);

        let runs: Vec<_> = groups(&missing).into_iter().map(Wanted::runs).collect();

        let two_of_the_first_eight = 0x40006..0x40008;
        assert_eq!(runs[0], [two_of_the_first_eight]);
        assert_eq!(runs[1], [0x40008..0x40009, 0x4000c..0x4000d]);
        assert_eq!(runs.len(), 3);
    }
}
