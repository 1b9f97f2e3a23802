//! Pages that are still at the source, as the destination fetches them while its guest runs.
//!
//! They are asked for in groups of neighbours. Who needs a group takes a link out of the pool and gives it back; a link that fails is
//! not given back. When the link to the source breaks, all fail, and
//! those who wait are told; new links in the pool serve the next tries.

use std::collections::VecDeque;
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
    /// Links that are taken, of those that are not ended.
    taken: usize,
    /// How often all links were ended. One that was taken before is not put back.
    ended: u32,
}

/// A link out of the pool.
struct Taken {
    link: Link,
    /// How often all were ended before.
    ended: u32,
}

/// Groups that a [`Fetcher`] may ask for before it needs them.
pub const MOST_AHEAD: usize = 8;

/// Fetches pages for one thread. It can ask for some before they are needed, so that the source has the next ones on the way while
/// those that came are placed. Answers come in the order of requests, over a link that it keeps as long as any are to come.
pub struct Fetcher<'a> {
    peer: &'a Peer,
    link: Option<Taken>,
    /// What was asked for, and has not come.
    asked: VecDeque<u32>,
    /// What came and was not needed yet.
    early: Vec<(u32, Batch)>,
    /// What came last.
    batch: Batch,
}

impl Fetcher<'_> {
    /// Asks for groups that are to be fetched next, as far as that has not been done. Others that came are forgotten. That it
    /// failed is told when they are fetched.
    pub fn expect(&mut self, groups: impl Iterator<Item = u32>) {
        let groups: Vec<u32> = groups.take(MOST_AHEAD).collect();
        self.early.retain(|(group, _)| groups.contains(group));
        let has = |group: &u32| {
            self.asked.contains(group) || self.early.iter().any(|(early, _)| early == group)
        };
        let room = MOST_AHEAD.saturating_sub(self.asked.len() + self.early.len());
        let new: Vec<u32> = groups
            .iter()
            .copied()
            .filter(|group| !has(group))
            .take(room)
            .collect();
        if !new.is_empty()
            && let Err(error) = self.ask(&new)
        {
            tracing::debug!("asking for pages ahead of their need: {error}");
            self.lose();
        }
    }

    /// Fetches the pages of a group.
    ///
    /// # Errors
    /// The link broke, or there is none; it can be tried again when there is another.
    pub fn fetch(&mut self, group: u32) -> Result<&Batch> {
        if let Some(place) = self.early.iter().position(|(early, _)| *early == group) {
            self.batch = self.early.swap_remove(place).1;
            return Ok(&self.batch);
        }
        loop {
            match self.hear_of(group) {
                Ok(()) => break,
                // It failed with its link, which is replaced already.
                Err(error) => match self.lose() {
                    true => {}
                    false => return Err(error),
                },
            }
        }
        if self.asked.is_empty()
            && let Some(link) = self.link.take()
        {
            self.peer.put_back(link);
        }
        Ok(&self.batch)
    }

    fn hear_of(&mut self, group: u32) -> Result<()> {
        if !self.asked.contains(&group) {
            self.ask(&[group])?;
        }
        while let (Some(next), Some(taken)) = (self.asked.pop_front(), &mut self.link) {
            if next == group {
                return hear(&mut taken.link, self.peer.wanted(next)?, &mut self.batch);
            }
            let mut batch = Batch::new(self.peer.metadata);
            hear(&mut taken.link, self.peer.wanted(next)?, &mut batch)?;
            self.early.push((next, batch));
        }
        Err(Error::State(format!("group {group} was not asked for")))
    }

    fn ask(&mut self, groups: &[u32]) -> Result<()> {
        if self.link.is_none() {
            self.link = Some(self.peer.take()?);
        }
        let Some(taken) = &mut self.link else {
            return Ok(());
        };
        for group in groups {
            taken.link.ask(self.peer.wanted(*group)?)?;
            self.asked.push_back(*group);
        }
        taken.link.flush()
    }

    /// Its link failed, if it has one. Returns whether there are others instead.
    fn lose(&mut self) -> bool {
        self.asked.clear();
        self.link
            .take()
            .is_some_and(|taken| self.peer.lose(taken.ended))
    }
}

impl Drop for Fetcher<'_> {
    fn drop(&mut self) {
        // Answers may be on their way, which nobody else can tell from theirs.
        if self.link.is_some() {
            self.lose();
        }
    }
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

    /// For a thread that fetches pages.
    #[must_use]
    pub fn fetcher(&self) -> Fetcher<'_> {
        Fetcher {
            peer: self,
            link: None,
            asked: VecDeque::new(),
            early: Vec::new(),
            batch: Batch::new(self.metadata),
        }
    }

    fn wanted(&self, group: u32) -> Result<Wanted> {
        let wanted = self.groups.get(group as usize).copied();
        wanted.ok_or_else(|| Error::State(format!("there is no group {group} of missing pages")))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A link that nobody uses. Waits for one if there are any.
    fn take(&self) -> Result<Taken> {
        let mut pool = self.lock();
        loop {
            if let Some(link) = pool.free.pop() {
                pool.taken += 1;
                let ended = pool.ended;
                return Ok(Taken { link, ended });
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

    /// Puts a link back, unless all were ended since.
    fn put_back(&self, taken: Taken) {
        let mut pool = self.lock();
        if pool.ended == taken.ended {
            pool.taken -= 1;
            pool.free.push(taken.link);
        }
        drop(pool);
        self.changed.notify_all();
    }

    /// A link failed that was taken when links had been ended so often. Returns whether there are others instead.
    fn lose(&self, ended: u32) -> bool {
        let mut pool = self.lock();
        let is_replaced = pool.ended != ended;
        if !is_replaced {
            pool.taken -= 1;
        }
        let has_others = !pool.free.is_empty() || pool.taken > 0;
        drop(pool);
        self.changed.notify_all();
        is_replaced && has_others
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
        pool.taken = 0;
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

/// Hears the answer to a request.
fn hear(link: &mut Link, wanted: Wanted, batch: &mut Batch) -> Result<()> {
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
