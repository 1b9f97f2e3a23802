//! A page of a mapping or of a file: not there yet, in a frame, or swapped out.
//!
//! The page's lock guards only where its contents are. Whoever accesses them takes a reference to
//! the frame and lets the lock go, so that accesses to one page meet in nothing but its tag state.
//! Swap-out wants the frame for itself alone and otherwise has to come back, as in Linux a page with
//! extra references is not reclaimed.

use std::sync::atomic::{AtomicU64, Ordering};

use mte::TagPage;

use super::frame::Frame;
use super::sync::{Arc, Mutex, MutexGuard};

/// The host has no memory left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

/// How an attempt to swap a page out ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwapOut {
    /// The page is swapped out now.
    Done,
    /// There is nothing to swap out: it has no contents, or they are swapped out already.
    NothingThere,
    /// Somebody is accessing it.
    Busy,
    /// The host would not keep its tags.
    NoRoomForTags,
}

/// A page of a mapping or of a file.
#[derive(Default)]
pub struct HostPage(Mutex<Contents>);

#[derive(Default)]
enum Contents {
    #[default]
    Absent,
    Present(Arc<Frame>),
    Swapped(Swapped),
}

/// What a swap device keeps of a page, and the tags that the kernel keeps beside it (Linux's
/// `arch/arm64/mm/mteswap.c`).
struct Swapped {
    data: Vec<u64>,
    tags: Option<(TagPage, TagRoom)>,
}

/// Room for the tags of swapped pages.
pub struct TagStorage {
    pages: u64,
    in_use: AtomicU64,
}

/// Room for those of one page, given back when dropped.
pub struct TagRoom(std::sync::Arc<TagStorage>);

impl TagStorage {
    /// Room for the tags of so many pages.
    pub fn new(pages: u64) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self {
            pages,
            in_use: AtomicU64::new(0),
        })
    }

    /// Room for one page's, if there is any.
    fn take(self: &std::sync::Arc<Self>) -> Option<TagRoom> {
        let one_more = |in_use| (in_use < self.pages).then(|| in_use + 1);
        self.in_use
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .ok()?;
        Some(TagRoom(std::sync::Arc::clone(self)))
    }
}

impl Drop for TagRoom {
    fn drop(&mut self) {
        self.0.in_use.fetch_sub(1, Ordering::Relaxed);
    }
}

impl HostPage {
    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// The frame that holds the page, swapped in if need be; `None` if there are no contents.
    ///
    /// # Errors
    /// No memory to swap it in.
    pub fn find(
        &self,
        allocate: impl FnOnce() -> Option<Frame>,
    ) -> Result<Option<Arc<Frame>>, OutOfMemory> {
        find(&mut self.contents(), allocate)
    }

    /// The frame that holds the page. If there are no contents, a new frame gets them from `fill`.
    ///
    /// # Errors
    /// No memory for it.
    pub fn find_or_fill(
        &self,
        mut allocate: impl FnMut() -> Option<Frame>,
        fill: impl FnOnce(&Frame),
    ) -> Result<Arc<Frame>, OutOfMemory> {
        let mut contents = self.contents();
        if let Some(frame) = find(&mut contents, &mut allocate)? {
            return Ok(frame);
        }
        let frame = Arc::new(allocate().ok_or(OutOfMemory)?);
        fill(&frame);
        *contents = Contents::Present(Arc::clone(&frame));
        Ok(frame)
    }

    /// The number of the frame that holds the page now.
    pub fn frame_number(&self) -> Option<u64> {
        match &*self.contents() {
            Contents::Present(frame) => Some(frame.number()),
            _ => None,
        }
    }

    /// Whether there are no contents, in a frame or swapped out.
    pub fn is_absent(&self) -> bool {
        matches!(*self.contents(), Contents::Absent)
    }

    /// Throws the contents away.
    pub fn discard(&self) {
        *self.contents() = Contents::Absent;
    }

    /// Moves the contents out of their frame, tags with them if those are valid and there is room.
    pub fn swap_out(&self, storage: &std::sync::Arc<TagStorage>) -> SwapOut {
        let mut contents = self.contents();
        let Contents::Present(frame) = &mut *contents else {
            return SwapOut::NothingThere;
        };
        // Nobody can get a reference while the lock is held, so being alone now is being alone.
        let Some(frame) = Arc::get_mut(frame) else {
            return SwapOut::Busy;
        };
        let tags = match frame.valid_tags() {
            None => None,
            Some(tags) => match storage.take() {
                Some(room) => Some((tags, room)),
                None => return SwapOut::NoRoomForTags,
            },
        };
        let data = frame.data();
        *contents = Contents::Swapped(Swapped { data, tags });
        SwapOut::Done
    }
}

fn find(
    contents: &mut Contents,
    allocate: impl FnOnce() -> Option<Frame>,
) -> Result<Option<Arc<Frame>>, OutOfMemory> {
    let swapped = match contents {
        Contents::Absent => return Ok(None),
        Contents::Present(frame) => return Ok(Some(Arc::clone(frame))),
        Contents::Swapped(swapped) => swapped,
    };
    let frame = allocate().ok_or(OutOfMemory)?;
    frame.set_data(&swapped.data);
    if let Some((tags, _)) = &swapped.tags {
        frame.set_tags(tags);
    }
    let frame = Arc::new(frame);
    *contents = Contents::Present(Arc::clone(&frame));
    Ok(Some(frame))
}

#[cfg(all(test, loom))]
mod interleavings;
