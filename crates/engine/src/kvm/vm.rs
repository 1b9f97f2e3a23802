//! A VM on KVM, under construction and built.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_userspace_memory_region,
};
use kvm_ioctls::{DeviceFd, Kvm, VmFd};

use super::mte::{self, CopyTags};
use super::{KvmVcpu, host_error, host_page_size};
use crate::{
    Error, GicLayout, Memslot, Result, Spi, TagCopyError, TagCopyResult, VcpuFeatures, Vm,
    VmBuilder,
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
    gic: OnceLock<DeviceFd>,
}

impl KvmVm {
    fn slot_sizes(&self) -> MutexGuard<'_, BTreeMap<u32, u64>> {
        self.slot_sizes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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
        let gic = create_gic(&self.vm, layout)?;
        self.gic.set(gic).map_err(|_| Error::Gic {
            step: "creating a second one",
            source: io::ErrorKind::AlreadyExists.into(),
        })
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

/// Whether KVM has a GICv3 for guests here: it has not where the host's own is a GICv2.
///
/// One is made in a scratch VM. Asking with `KVM_CREATE_DEVICE_TEST` would do, but kvm-ioctls takes
/// the descriptor that this flag does not return for an open file.
pub fn has_gic_v3(kvm: &Kvm) -> Result<bool> {
    let vm = kvm.create_vm().map_err(host_error("creating a VM"))?;
    Ok(create_gic_device(&vm).is_ok())
}

fn create_gic_device(vm: &VmFd) -> Result<DeviceFd, kvm_ioctls::Error> {
    vm.create_device(&mut kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
        fd: 0,
        flags: 0,
    })
}

fn create_gic(vm: &VmFd, layout: &GicLayout) -> Result<DeviceFd> {
    let gic = create_gic_device(vm).map_err(gic_error("creating a GICv3"))?;
    // Interrupts come in blocks of 32, the first of which is the vCPUs' own.
    let interrupts: u32 = (32 + layout.spis).next_multiple_of(32);
    set_attribute(&gic, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &interrupts)
        .map_err(gic_error("setting the number of interrupts"))?;
    set_attribute(
        &gic,
        KVM_DEV_ARM_VGIC_GRP_ADDR,
        KVM_VGIC_V3_ADDR_TYPE_DIST,
        &layout.distributor,
    )
    .map_err(gic_error("placing the distributor"))?;
    // One region for all vCPUs: count in bits 63:52, address in 51:16, flags and index zero
    // (Documentation/virt/kvm/devices/arm-vgic-v3.rst).
    let redistributors = u64::from(layout.vcpus) << 52 | layout.redistributors;
    set_attribute(
        &gic,
        KVM_DEV_ARM_VGIC_GRP_ADDR,
        KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
        &redistributors,
    )
    .map_err(gic_error("placing the redistributors"))?;
    set_attribute(
        &gic,
        KVM_DEV_ARM_VGIC_GRP_CTRL,
        KVM_DEV_ARM_VGIC_CTRL_INIT,
        &0u64,
    )
    .map_err(gic_error("initialising it"))?;
    Ok(gic)
}

fn set_attribute<T>(
    device: &DeviceFd,
    group: u32,
    attribute: u32,
    value: &T,
) -> Result<(), kvm_ioctls::Error> {
    device.set_device_attr(&kvm_device_attr {
        flags: 0,
        group,
        attr: attribute.into(),
        addr: std::ptr::from_ref(value) as u64,
    })
}

fn gic_error(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |e| Error::Gic {
        step,
        source: e.into(),
    }
}
