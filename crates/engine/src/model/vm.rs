//! A VM of the model, under construction and built.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use mte::{GRANULE_SIZE, Tag};

use super::frame::{Frame, GRANULES, PAGE_SIZE};
use super::host::{Found, HostFault, Touch};
use super::memslots::{Slot, Slots, pages_of};
use super::{Guest, ModelHost, ModelVcpu};
use crate::{
    Error, GicLayout, GicRegister, GicState, Memslot, Result, Spi, TagCopyError, TagCopyResult,
    VcpuFeatures, Vm, VmBuilder,
};

/// A VM of the model without vCPUs.
pub struct ModelVmBuilder(VmState);

impl ModelVmBuilder {
    pub(super) fn new(host: ModelHost, ipa_bits: u8, guest: Arc<dyn Guest>) -> Self {
        Self(VmState {
            host,
            ipa_bits,
            mte: false,
            guest,
            slots: RwLock::default(),
            vcpus: Mutex::default(),
            gic: Mutex::default(),
        })
    }
}

impl VmBuilder for ModelVmBuilder {
    type Vm = ModelVm;

    fn enable_mte(&mut self) -> Result<()> {
        if self.0.host.rules().mte.is_none() {
            return Err(Error::MteUnsupported);
        }
        self.0.mte = true;
        Ok(())
    }

    fn build(self) -> Result<ModelVm> {
        Ok(ModelVm(Arc::new(self.0)))
    }
}

/// A VM of the model.
pub struct ModelVm(Arc<VmState>);

/// What a VM and its vCPUs share.
pub(super) struct VmState {
    host: ModelHost,
    ipa_bits: u8,
    mte: bool,
    guest: Arc<dyn Guest>,
    slots: RwLock<Slots>,
    vcpus: Mutex<BTreeSet<u32>>,
    gic: Mutex<Option<Gic>>,
}

/// The interrupt controller: no more than its lines.
struct Gic {
    spis: u32,
    high: BTreeSet<Spi>,
}

impl Gic {
    /// Blocks of 32 shared interrupts.
    fn blocks(&self) -> std::ops::Range<u32> {
        0..self.spis.div_ceil(32)
    }

    fn register(block: u32) -> GicRegister {
        GicRegister::Lines(0, 32 * (block + 1))
    }
}

fn no_gic() -> Error {
    Error::Gic {
        step: "looking for it",
        source: io::ErrorKind::NotFound.into(),
    }
}

/// Why an access of a guest did not reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Miss {
    /// No memslot is there, or one that may not be written: the VMM's matter.
    Mmio,
    /// The host could not give the memory.
    Host,
}

impl From<HostFault> for Miss {
    fn from(_: HostFault) -> Self {
        Self::Host
    }
}

impl VmState {
    pub fn guest(&self) -> &Arc<dyn Guest> {
        &self.guest
    }

    pub fn mte(&self) -> Option<mte::MteFeatures> {
        self.host.rules().mte.filter(|_| self.mte)
    }

    /// Held by every access until it is over: a slot that is gone is not being accessed.
    fn slots(&self) -> RwLockReadGuard<'_, Slots> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_slots(&self) -> RwLockWriteGuard<'_, Slots> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest's access to the page at `ipa`. Its stage-2 fault, if you will: the model walks all
    /// tables at every access, and so has no stage 2 that could go stale.
    pub fn access<R>(
        &self,
        ipa: u64,
        touch: Touch,
        access: impl FnOnce(&Found) -> R,
    ) -> Result<R, Miss> {
        let slots = self.slots();
        let (slot, page) = slots.find(ipa).ok_or(Miss::Mmio)?;
        if touch == Touch::Write && slot.memslot.read_only {
            return Err(Miss::Mmio);
        }
        let result = self.host.with_slot_page(
            &slot.memory,
            slot.address(),
            page,
            touch,
            self.mte,
            |found| {
                if let (true, Found::Frame(frame)) = (self.mte, found) {
                    frame.validate_tags();
                }
                access(found)
            },
        )?;
        if touch == Touch::Write {
            slot.wrote(page);
        }
        Ok(result)
    }
}

/// One buffer of the tag copy, byte by byte: `false` or `None` where it faults.
enum Buffer<'a> {
    FromGuest(&'a mut [u8]),
    ToGuest(&'a dyn Fn(usize) -> Option<u8>),
}

impl ModelVm {
    /// The host on which it runs.
    pub fn host(&self) -> &ModelHost {
        &self.0.host
    }

    /// The level of an interrupt line, as last driven by [`Vm::set_spi`].
    pub fn spi(&self, spi: Spi) -> bool {
        let gic = self.0.gic.lock().unwrap_or_else(PoisonError::into_inner);
        gic.as_ref().is_some_and(|gic| gic.high.contains(&spi))
    }

    /// [`Vm::copy_tags_to_guest`] of `length` bytes of guest memory from a buffer of which any byte
    /// may fault: `read` gives the byte with this index, or nothing.
    ///
    /// The page in which the buffer faults does not count as copied. What becomes of its tags, see
    /// [`clears_half_written_pages`](super::HostRules::clears_half_written_pages).
    ///
    /// # Errors
    /// As for that call; [`TagCopyError::NoMemory`] too if the buffer faults in the first page.
    pub fn copy_tags_to_guest_from(
        &self,
        ipa: u64,
        length: u64,
        read: &dyn Fn(usize) -> Option<u8>,
    ) -> TagCopyResult {
        self.copy_tags(ipa, length, Buffer::ToGuest(read))
    }

    fn copy_tags(&self, ipa: u64, length: u64, mut buffer: Buffer<'_>) -> TagCopyResult {
        if !self.0.mte {
            return Err(TagCopyError::NoMte);
        }
        let whole_pages = (ipa | length).is_multiple_of(PAGE_SIZE);
        if !whole_pages
            || length > self.0.host.rules().longest_copy
            || ipa.checked_add(length).is_none()
        {
            return Err(TagCopyError::Range { ipa, length });
        }
        let slots = self.0.slots();
        let writes = matches!(buffer, Buffer::ToGuest(_));
        if writes && self.0.host.rules().guards_dirty_log && slots.any_logs_dirty() {
            return Err(TagCopyError::DirtyLogging { ipa });
        }
        for page in 0..pages_of(length) {
            let done = page as u64 * PAGE_SIZE;
            if self
                .copy_page(&slots, ipa + done, page * GRANULES, &mut buffer)
                .is_err()
            {
                return match done {
                    0 => Err(TagCopyError::NoMemory { ipa }),
                    _ => Ok(done),
                };
            }
        }
        Ok(length)
    }

    /// Copies the tags of one page from or to where they are in the buffer.
    fn copy_page(
        &self,
        slots: &Slots,
        ipa: u64,
        first: usize,
        buffer: &mut Buffer<'_>,
    ) -> Result<(), HostFault> {
        let (slot, page) = slots.find(ipa).ok_or(HostFault)?;
        let on_page = |touch, copy: &mut dyn FnMut(&Found) -> Result<(), HostFault>| {
            let host = &self.0.host;
            host.with_slot_page(&slot.memory, slot.address(), page, touch, false, copy)?
        };
        match buffer {
            Buffer::FromGuest(tags) => on_page(Touch::Read, &mut |found| {
                copy_out(found, &mut tags[first..first + GRANULES]);
                Ok(())
            }),
            Buffer::ToGuest(_) if slot.memslot.read_only => Err(HostFault),
            Buffer::ToGuest(read) => on_page(Touch::Write, &mut |found| match found {
                Found::Frame(frame) => self.copy_in(frame, |granule| read(first + granule)),
                Found::Zeros => Err(HostFault),
            }),
        }
    }

    fn copy_in(&self, frame: &Frame, read: impl Fn(usize) -> Option<u8>) -> Result<(), HostFault> {
        let rules = self.0.host.rules();
        // Before Linux 6.2 a page that was untagged stays so, and is cleared when it is first used.
        if !rules.clears_half_written_pages && !frame.state().is_tagged() {
            let tags: Option<Vec<u8>> = (0..GRANULES).map(read).collect();
            let tags = tags.ok_or(HostFault)?;
            frame.overwrite_tags(|| write_tags(frame, |granule| Some(tags[granule])).unwrap_or(()));
            return Ok(());
        }
        let mut outcome = Ok(());
        frame.overwrite_tags(|| {
            outcome = write_tags(frame, read);
            if outcome.is_err() && rules.clears_half_written_pages {
                frame.fill_tags(Tag::ZERO);
            }
        });
        outcome
    }
}

fn write_tags(frame: &Frame, read: impl Fn(usize) -> Option<u8>) -> Result<(), HostFault> {
    for granule in 0..GRANULES {
        frame.set_tag(granule, Tag::from_low_bits(read(granule).ok_or(HostFault)?));
    }
    Ok(())
}

/// The tags of a page, one byte each; of a page without valid ones, 0.
fn copy_out(found: &Found, tags: &mut [u8]) {
    let valid = match found {
        Found::Frame(frame) => frame.valid_tags(),
        Found::Zeros => None,
    };
    match valid {
        Some(page) => {
            for (byte, tag) in tags.iter_mut().zip(page.iter()) {
                *byte = tag.value();
            }
        }
        None => tags.fill(0),
    }
}

impl Vm for ModelVm {
    type Vcpu = ModelVcpu;

    fn has_mte(&self) -> bool {
        self.0.mte
    }

    unsafe fn set_memslot(&self, memslot: &Memslot) -> Result<()> {
        let refused = |source| Error::Memslot {
            slot: *memslot,
            source,
        };
        let host = &self.0.host;
        let mut slots = self.0.change_slots();
        let most = host.rules().capabilities().max_memslots;
        slots
            .check(memslot, self.0.ipa_bits, most)
            .map_err(refused)?;
        let pages = pages_of(memslot.size);
        if self.0.mte && !host.may_hold_tags(memslot.host_address, pages) {
            return Err(Error::MemoryWithoutTags { slot: *memslot });
        }
        // SAFETY: real memory is vouched for by the caller, until the slot is deleted or the VM gone;
        // the guest's accesses and the VMM's are volatile or atomic.
        let memory =
            unsafe { host.memory_of_slot(memslot.host_address, pages) }.map_err(refused)?;
        slots.insert(Slot::new(*memslot, memory));
        Ok(())
    }

    fn delete_memslot(&self, slot: u32) -> Result<()> {
        let removed = self.0.change_slots().remove(slot);
        removed.map(drop).ok_or_else(|| Error::DeleteMemslot {
            slot,
            source: io::ErrorKind::NotFound.into(),
        })
    }

    fn create_vcpu(&self, index: u32, features: VcpuFeatures) -> Result<ModelVcpu> {
        let rules = self.0.host.rules();
        let refused = |step, kind: io::ErrorKind| Error::Vcpu {
            index,
            step,
            source: kind.into(),
        };
        if self.0.mte && features.aarch32_el1 {
            return Err(Error::Aarch32WithMte { index });
        }
        let lacks = features.sve
            || features.pmu
            || features.pointer_authentication
            || features.aarch32_el1 && !rules.aarch32_el1;
        if lacks || index >= rules.max_vcpus {
            return Err(refused("initialising it", io::ErrorKind::InvalidInput));
        }
        let mut vcpus = self.0.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        if !vcpus.insert(index) {
            return Err(refused("creating it", io::ErrorKind::AlreadyExists));
        }
        Ok(ModelVcpu::new(Arc::clone(&self.0), index, features))
    }

    fn create_gic(&self, layout: &GicLayout) -> Result<()> {
        let mut gic = self.0.gic.lock().unwrap_or_else(PoisonError::into_inner);
        if gic.is_some() {
            return Err(Error::Gic {
                step: "creating a second one",
                source: io::ErrorKind::AlreadyExists.into(),
            });
        }
        *gic = Some(Gic {
            spis: layout.spis,
            high: BTreeSet::new(),
        });
        Ok(())
    }

    fn gic_state(&self) -> Result<GicState> {
        let gic = self.0.gic.lock().unwrap_or_else(PoisonError::into_inner);
        let gic = gic.as_ref().ok_or_else(no_gic)?;
        let lines = |block: u32| {
            let number = |bit| Spi::new(32 * block + bit);
            let bits =
                (0..32).filter(|bit| number(*bit).is_some_and(|spi| gic.high.contains(&spi)));
            bits.fold(0, |lines, bit| lines | 1 << bit)
        };
        let registers = gic
            .blocks()
            .map(|block| (Gic::register(block), lines(block)));
        Ok(GicState {
            registers: registers.collect(),
        })
    }

    fn restore_gic(&self, state: &GicState) -> Result<()> {
        let mut gic = self.0.gic.lock().unwrap_or_else(PoisonError::into_inner);
        let gic = gic.as_mut().ok_or_else(no_gic)?;
        let names = state.registers.iter().map(|(register, _)| *register);
        if !names.eq(gic.blocks().map(Gic::register)) {
            return Err(Error::ForeignGic);
        }
        gic.high = (0..gic.spis)
            .filter(|number| {
                let (_, lines) = state.registers[(number / 32) as usize];
                lines >> (number % 32) & 1 != 0
            })
            .filter_map(Spi::new)
            .collect();
        Ok(())
    }

    fn set_spi(&self, spi: Spi, high: bool) -> Result<()> {
        let mut gic = self.0.gic.lock().unwrap_or_else(PoisonError::into_inner);
        let gic = gic
            .as_mut()
            .filter(|gic| spi.number() < gic.spis)
            .ok_or_else(|| Error::Host {
                step: "driving an interrupt line",
                source: io::ErrorKind::NotFound.into(),
            })?;
        match high {
            true => gic.high.insert(spi),
            false => gic.high.remove(&spi),
        };
        Ok(())
    }

    fn copy_tags_from_guest(&self, ipa: u64, tags: &mut [u8]) -> TagCopyResult {
        let length = tags.len() as u64 * GRANULE_SIZE as u64;
        self.copy_tags(ipa, length, Buffer::FromGuest(tags))
    }

    fn copy_tags_to_guest(&self, ipa: u64, tags: &[u8]) -> TagCopyResult {
        let length = tags.len() as u64 * GRANULE_SIZE as u64;
        let read = |index: usize| tags.get(index).copied();
        self.copy_tags(ipa, length, Buffer::ToGuest(&read))
    }

    fn take_dirty_log(&self, slot: u32) -> Result<Vec<u64>> {
        let log = self.0.slots().get(slot).and_then(Slot::take_dirty);
        log.ok_or_else(|| Error::DirtyLog {
            slot,
            source: io::ErrorKind::NotFound.into(),
        })
    }
}
