//! A VM on KVM, under construction and built.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};

use super::gic::KvmGic;
use super::mte::{self, CopyTags};
use super::{KvmVcpu, host_error, host_page_size};
use crate::{
    Error, GicLayout, GicState, Memslot, Result, Spi, TagCopyError, TagCopyResult, VcpuFeatures,
    Vm, VmBuilder,
};

/// A KVM VM without vCPUs.
pub struct KvmVmBuilder {
    vm: VmFd,
    mte: bool,
}

impl KvmVmBuilder {
    pub(super) fn new(kvm: &Kvm, ipa_bits: u8) -> Result<Self> {
        let vm = kvm
            .create_vm_with_ipa_size(ipa_bits.into())
            .map_err(host_error("creating a VM"))?;
        Ok(Self { vm, mte: false })
    }
}

impl VmBuilder for KvmVmBuilder {
    type Vm = KvmVm;

    fn enable_mte(&mut self) -> Result<()> {
        // No vCPU can exist yet, so EINVAL has one meaning left: the host has no MTE to give.
        mte::enable(&self.vm).map_err(|e| match e.errno() {
            libc::EINVAL => Error::MteUnsupported,
            _ => host_error("turning MTE on")(e),
        })?;
        self.mte = true;
        Ok(())
    }

    fn build(self) -> Result<KvmVm> {
        Ok(KvmVm {
            vm: self.vm,
            mte: self.mte,
            slot_sizes: Mutex::default(),
            gic: OnceLock::new(),
        })
    }
}

/// A VM on KVM.
pub struct KvmVm {
    vm: VmFd,
    mte: bool,
    /// Bytes of each memslot: KVM writes a dirty log as long as the slot, whatever buffer it is given.
    slot_sizes: Mutex<BTreeMap<u32, u64>>,
    gic: OnceLock<KvmGic>,
}

impl KvmVm {
    fn slot_sizes(&self) -> MutexGuard<'_, BTreeMap<u32, u64>> {
        self.slot_sizes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn gic(&self) -> Result<&KvmGic> {
        self.gic.get().ok_or_else(|| Error::Gic {
            step: "looking for it",
            source: io::ErrorKind::NotFound.into(),
        })
    }

    fn copy_tags(&self, ipa: u64, length: u64, tags: CopyTags<'_>) -> TagCopyResult {
        if !self.mte {
            return Err(TagCopyError::NoMte);
        }
        mte::copy_tags(&self.vm, ipa, tags).map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) => TagCopyError::Range { ipa, length },
            Some(libc::EFAULT) => TagCopyError::NoMemory { ipa },
            Some(libc::EBUSY) => TagCopyError::DirtyLogging { ipa },
            _ => TagCopyError::Host { ipa, source },
        })
    }
}

/// For calls of KVM that this crate does not make.
impl AsRawFd for KvmVm {
    fn as_raw_fd(&self) -> RawFd {
        self.vm.as_raw_fd()
    }
}

/// The slot as KVM takes it.
fn region(memslot: &Memslot) -> kvm_userspace_memory_region {
    let flag = |wanted, flag| if wanted { flag } else { 0 };
    kvm_userspace_memory_region {
        slot: memslot.slot,
        flags: flag(memslot.log_dirty, KVM_MEM_LOG_DIRTY_PAGES)
            | flag(memslot.read_only, KVM_MEM_READONLY),
        guest_phys_addr: memslot.ipa,
        memory_size: memslot.size,
        userspace_addr: memslot.host_address.as_ptr() as u64,
    }
}

fn bytes_covered_by(granules: usize) -> u64 {
    granules as u64 * ::mte::GRANULE_SIZE as u64
}

impl Vm for KvmVm {
    type Vcpu = KvmVcpu;

    fn has_mte(&self) -> bool {
        self.mte
    }

    unsafe fn set_memslot(&self, memslot: &Memslot) -> Result<()> {
        // Held over the call, so that the sizes are those of the slots.
        let mut sizes = self.slot_sizes();
        let is_new = !sizes.contains_key(&memslot.slot);
        // SAFETY: the caller vouches for the memory.
        unsafe { self.vm.set_user_memory_region(region(memslot)) }.map_err(|e| {
            let source = io::Error::from(e);
            let without_tags = self.mte && is_new && is_whole_pages(memslot);
            if without_tags && source.raw_os_error() == Some(libc::EINVAL) {
                Error::MemoryWithoutTags { slot: *memslot }
            } else {
                Error::Memslot {
                    slot: *memslot,
                    source,
                }
            }
        })?;
        sizes.insert(memslot.slot, memslot.size);
        Ok(())
    }

    fn delete_memslot(&self, slot: u32) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            ..Default::default()
        };
        let mut sizes = self.slot_sizes();
        // SAFETY: a slot of no bytes has no memory.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|e| Error::DeleteMemslot {
            slot,
            source: e.into(),
        })?;
        sizes.remove(&slot);
        Ok(())
    }

    fn create_vcpu(&self, index: u32, features: VcpuFeatures) -> Result<KvmVcpu> {
        if self.mte && features.aarch32_el1 {
            return Err(Error::Aarch32WithMte { index });
        }
        KvmVcpu::new(&self.vm, index, features)
    }

    fn create_gic(&self, layout: &GicLayout) -> Result<()> {
        let gic = KvmGic::new(&self.vm, layout)?;
        self.gic.set(gic).map_err(|_| Error::Gic {
            step: "creating a second one",
            source: io::ErrorKind::AlreadyExists.into(),
        })
    }

    fn gic_state(&self) -> Result<GicState> {
        self.gic()?.state()
    }

    fn restore_gic(&self, state: &GicState) -> Result<()> {
        self.gic()?.restore(state)
    }

    fn set_spi(&self, spi: Spi, high: bool) -> Result<()> {
        let line = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | spi.intid();
        self.vm
            .set_irq_line(line, high)
            .map_err(host_error("driving an interrupt line"))
    }

    fn copy_tags_from_guest(&self, ipa: u64, tags: &mut [u8]) -> TagCopyResult {
        let length = bytes_covered_by(tags.len());
        self.copy_tags(ipa, length, CopyTags::FromGuest(tags))
    }

    fn copy_tags_to_guest(&self, ipa: u64, tags: &[u8]) -> TagCopyResult {
        let length = bytes_covered_by(tags.len());
        self.copy_tags(ipa, length, CopyTags::ToGuest(tags))
    }

    fn take_dirty_log(&self, slot: u32) -> Result<Vec<u64>> {
        let error = |source| Error::DirtyLog { slot, source };
        // Held over the call, so that the slot does not change its size meanwhile.
        let sizes = self.slot_sizes();
        let size = sizes
            .get(&slot)
            .and_then(|size| usize::try_from(*size).ok())
            .ok_or_else(|| error(io::ErrorKind::NotFound.into()))?;
        self.vm
            .get_dirty_log(slot, size)
            .map_err(|e| error(e.into()))
    }
}

/// Whether nothing but the mapping behind a new memslot can be what the kernel complains of: slots
/// that are not made of whole pages, or of too many, are refused with the same error.
fn is_whole_pages(memslot: &Memslot) -> bool {
    /// `KVM_MEM_MAX_NR_PAGES` of the kernel.
    const MAX_PAGES: u64 = (1 << 31) - 1;
    let page = host_page_size();
    memslot.size / page <= MAX_PAGES
        && memslot.size != 0
        && memslot.size.is_multiple_of(page)
        && memslot.ipa.is_multiple_of(page)
        && (memslot.host_address.as_ptr() as u64).is_multiple_of(page)
}
