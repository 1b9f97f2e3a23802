//! The generation ID: tells a guest that it is no longer the only one with its state.
//!
//! Guests that go on from one snapshot have one random-number generator among them. The ID, 16 random bytes in memory of
//! their own, is another after each restore or clone; an interrupt says so, and the guest's kernel mixes the ID into
//! its generator at once (device-tree binding `rng/microsoft,vmgenid.yaml`; Linux `drivers/virt/vmgenid.c`, from 6.10
//! on without ACPI). A migrated guest keeps its ID: it is still the only one.
//!
//! A kernel without that driver, Debian 12's 6.1 among them, learns nothing. The virtio entropy device still gives
//! each clone other randomness, but Linux takes it to its generator when it reseeds, up to a minute later, and until
//! then clones of such a guest can draw the same numbers.
//!
//! The memory is a memslot, and not a register: the driver reads it by `memcpy`, whose load of two registers no exit
//! to the VMM describes. It is read-only to the guest, so that it never has tags other than zero, and no RAM, so that
//! it is in no snapshot's pages.

use std::io;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use engine::Memslot;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use vm_superio::Trigger;

use crate::layout;
use crate::memory::host_page_size;

/// RAM is memslot 0.
const SLOT: u32 = 1;
/// The largest page that an arm64 host can have.
const MAX_HOST_PAGE: u64 = 64 << 10;
const _: () = assert!(layout::GENERATION.is_multiple_of(MAX_HOST_PAGE));

/// 16 random bytes, different for each machine that ever goes on from a saved state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationId([u8; 16]);

impl GenerationId {
    /// One that no machine had.
    ///
    /// # Errors
    /// The host has no randomness to give.
    pub fn random() -> io::Result<Self> {
        let mut id = [0; 16];
        getrandom::fill(&mut id)?;
        Ok(Self(id))
    }
}

/// The page with the ID, and the line that says that it is new.
pub struct Generation<L> {
    page: MmapRegion,
    address: NonNull<u8>,
    id: Mutex<GenerationId>,
    line: L,
}

// SAFETY: the address is of the page, which lives as long as this value and is written under a lock.
unsafe impl<L: Send> Send for Generation<L> {}
// SAFETY: as above; guests may read while it is written.
unsafe impl<L: Sync> Sync for Generation<L> {}

impl<L: Trigger> Generation<L> {
    /// A page that holds `id`, whose change `line`, an edge, will tell.
    ///
    /// # Errors
    /// The host has no memory.
    pub fn new(id: GenerationId, line: L) -> io::Result<Self> {
        let size = host_page_size() as usize;
        let page = MmapRegion::new(size).map_err(io::Error::other)?;
        let address = NonNull::new(page.as_ptr()).ok_or(io::ErrorKind::OutOfMemory)?;
        let generation = Self {
            page,
            address,
            id: Mutex::new(id),
            line,
        };
        generation.publish(id)?;
        Ok(generation)
    }

    /// The memslot that shows the page to the guest. It is to be deleted before this value is dropped.
    pub fn memslot(&self) -> Memslot {
        Memslot {
            slot: SLOT,
            ipa: layout::GENERATION,
            size: self.page.size() as u64,
            host_address: self.address,
            log_dirty: false,
            read_only: true,
        }
    }

    /// The ID, for a saved state.
    pub fn id(&self) -> GenerationId {
        *self.lock()
    }

    /// Takes up the ID that a guest has seen elsewhere, which is not told: to the guest nothing has changed.
    ///
    /// # Errors
    /// The page cannot be written.
    pub fn restore(&self, id: GenerationId) -> io::Result<()> {
        let mut own = self.lock();
        *own = id;
        self.publish(id)
    }

    /// Makes a new ID and tells the guest. Before a restored guest runs, the interrupt controller has its state by then.
    ///
    /// # Errors
    /// The host has no randomness to give.
    pub fn renew(&self) -> io::Result<()> {
        let mut id = self.lock();
        *id = GenerationId::random()?;
        self.publish(*id)?;
        // Unlike others' lines, a guest's cannot fail.
        let _ = self.line.trigger();
        Ok(())
    }

    fn publish(&self, id: GenerationId) -> io::Result<()> {
        let page = self.page.as_volatile_slice();
        page.write_slice(&id.0, 0).map_err(io::Error::other)?;
        clean_cache_line(self.address);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, GenerationId> {
        self.id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings a line of the data cache to memory: the driver maps the page as device memory, whose loads need not see
/// what is in a cache.
fn clean_cache_line(address: NonNull<u8>) {
    // SAFETY: Linux lets programs clean the cache (SCTLR_EL1.UCI), which changes no contents.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!("dc cvac, {address}", "dsb sy", address = in(reg) address.as_ptr());
    }
    // Elsewhere there is no guest.
    #[cfg(not(target_arch = "aarch64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Line(AtomicU32);

    impl Trigger for &Line {
        type E = Infallible;

        fn trigger(&self) -> Result<(), Infallible> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    fn seen_by_the_guest(generation: &Generation<&Line>) -> GenerationId {
        let mut id = [0; 16];
        let page = generation.page.as_volatile_slice();
        page.read_slice(&mut id, 0).unwrap();
        GenerationId(id)
    }

    #[test]
    fn a_guest_finds_the_id_that_its_machine_was_made_with_and_no_interrupt() {
        let line = Line::default();
        let id = GenerationId([7; 16]);

        let generation = Generation::new(id, &line).unwrap();

        assert_eq!(seen_by_the_guest(&generation), id);
        assert_eq!(generation.id(), id);
        assert_eq!(line.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_renewed_id_is_another_and_told_by_one_edge() {
        let line = Line::default();
        let first = GenerationId::random().unwrap();
        let generation = Generation::new(first, &line).unwrap();

        generation.renew().unwrap();

        assert_ne!(generation.id(), first);
        assert_eq!(seen_by_the_guest(&generation), generation.id());
        assert_eq!(line.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_guest_that_moves_finds_the_id_that_it_had_and_no_interrupt() {
        let line = Line::default();
        let generation = Generation::new(GenerationId([7; 16]), &line).unwrap();
        let id = GenerationId([9; 16]);

        generation.restore(id).unwrap();

        assert_eq!(seen_by_the_guest(&generation), id);
        assert_eq!(generation.id(), id);
        assert_eq!(line.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_guest_cannot_write_its_id() {
        let line = Line::default();
        let generation = Generation::new(GenerationId([7; 16]), &line).unwrap();
        assert!(generation.memslot().read_only);
        assert_eq!(generation.memslot().ipa, layout::GENERATION);
    }
}
