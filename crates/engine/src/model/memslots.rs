//! The memslots of a VM, and the pages that the guest wrote in each.

use std::collections::BTreeMap;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::frame::PAGE_SIZE;
use super::host::SlotMemory;
use crate::Memslot;

/// A memslot in use.
pub struct Slot {
    pub memslot: Memslot,
    pub memory: SlotMemory,
    /// One bit a page, if the slot logs.
    dirty: Option<Box<[AtomicU64]>>,
}

impl Slot {
    pub fn new(memslot: Memslot, memory: SlotMemory) -> Self {
        let words = pages_of(memslot.size).div_ceil(64);
        let dirty = memslot
            .log_dirty
            .then(|| (0..words).map(|_| AtomicU64::new(0)).collect());
        Self {
            memslot,
            memory,
            dirty,
        }
    }

    /// Where its memory begins in the host.
    pub fn address(&self) -> NonNull<u8> {
        self.memslot.host_address
    }

    /// Logs that the guest wrote a page. Called after the write: a log taken in between lacks the
    /// page, and the next one has it.
    pub fn wrote(&self, page: usize) {
        if let Some(words) = &self.dirty {
            words[page / 64].fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    /// Takes the log.
    pub fn take_dirty(&self) -> Option<Vec<u64>> {
        let take = |word: &AtomicU64| word.swap(0, Ordering::Acquire);
        Some(self.dirty.as_ref()?.iter().map(take).collect())
    }

    fn covers(&self, ipa: u64) -> bool {
        (self.memslot.ipa..self.memslot.ipa + self.memslot.size).contains(&ipa)
    }
}

/// How many pages so many bytes are.
pub fn pages_of(bytes: u64) -> usize {
    (bytes / PAGE_SIZE) as usize
}

/// The memslots of a VM, by number.
#[derive(Default)]
pub struct Slots(BTreeMap<u32, Slot>);

impl Slots {
    /// The slot at a guest-physical address, and the page in it.
    pub fn find(&self, ipa: u64) -> Option<(&Slot, usize)> {
        let slot = self.0.values().find(|slot| slot.covers(ipa))?;
        Some((slot, pages_of(ipa - slot.memslot.ipa)))
    }

    pub fn get(&self, number: u32) -> Option<&Slot> {
        self.0.get(&number)
    }

    pub fn any_logs_dirty(&self) -> bool {
        self.0.values().any(|slot| slot.memslot.log_dirty)
    }

    pub fn insert(&mut self, slot: Slot) {
        self.0.insert(slot.memslot.slot, slot);
    }

    pub fn remove(&mut self, number: u32) -> Option<Slot> {
        self.0.remove(&number)
    }

    /// Whether the slot is well made and has room, by the rules of `KVM_SET_USER_MEMORY_REGION`
    /// (api.rst 4.35).
    pub fn check(&self, new: &Memslot, ipa_bits: u8, most: u32) -> io::Result<()> {
        let address = new.host_address.addr().get() as u64;
        let whole_pages = (new.ipa | new.size | address).is_multiple_of(PAGE_SIZE) && new.size > 0;
        if !whole_pages || new.slot >= most {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let end = new.ipa.checked_add(new.size);
        if end.is_none_or(|end| end > 1 << ipa_bits) {
            return Err(io::Error::other(
                "it reaches beyond the VM's guest-physical addresses",
            ));
        }
        if let Some(old) = self.get(new.slot) {
            let same = |a: &Memslot| (a.size, a.host_address, a.read_only);
            if same(&old.memslot) != same(new) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
        }
        let overlaps = |old: &Memslot| {
            old.slot != new.slot && old.ipa < new.ipa + new.size && new.ipa < old.ipa + old.size
        };
        if self.0.values().any(|slot| overlaps(&slot.memslot)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        Ok(())
    }
}
