//! What this host's KVM can do, asked once when it is opened.
//!
//! Most of it is a capability. What memory may stand behind a guest with MTE is not: the kernel
//! grew it over years (shared mappings in 6.2, huge pages in 6.13) without a capability for either,
//! so an empty VM is offered a page of each kind.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use ::mte::MteFeatures;
use kvm_ioctls::{Cap, Kvm};

use super::vm::KvmVmBuilder;
use super::{KvmVm, host_page_size, mte};
use crate::{
    Capabilities, Error, Memslot, MteSupport, RegisterId, Result, Vcpu, VcpuFeatures, Vm, VmBuilder,
};

/// Enough for one page of the scratch VM, and accepted by every host.
const SCRATCH_IPA_BITS: u8 = 32;
const HUGE_PAGE_SIZE: usize = 2 << 20;

pub fn capabilities(kvm: &Kvm) -> Result<Capabilities> {
    let mte = if mte::is_supported(kvm) {
        Some(mte_support(kvm)?)
    } else {
        None
    };
    Ok(Capabilities {
        // Hosts without the capability have the 40 bits that KVM began with.
        ipa_bits: u8::try_from(kvm.get_host_ipa_limit())
            .ok()
            .filter(|bits| *bits != 0)
            .unwrap_or(40),
        max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
        max_memslots: u32::try_from(kvm.get_nr_memslots()).unwrap_or(u32::MAX),
        mte,
        sve: kvm.check_extension(Cap::ArmSve),
        pointer_authentication: kvm.check_extension(Cap::ArmPtrAuthAddress)
            && kvm.check_extension(Cap::ArmPtrAuthGeneric),
        pmu: kvm.check_extension(Cap::ArmPmuV3),
        aarch32_el1: kvm.check_extension(Cap::ArmEl132bit),
        gic_v3: super::gic::has_gic_v3(kvm)?,
        counter_hz: counter_hz(),
    })
}

/// CNTFRQ_EL0, which KVM leaves to guests as it is.
fn counter_hz() -> u64 {
    let frequency;
    // SAFETY: Linux lets every program read it, and emulates that where the CPU has an erratum.
    unsafe {
        std::arch::asm!("mrs {}, cntfrq_el0", out(reg) frequency, options(nomem, nostack, preserves_flags));
    }
    frequency
}

fn mte_support(kvm: &Kvm) -> Result<MteSupport> {
    let mut builder = KvmVmBuilder::new(kvm, SCRATCH_IPA_BITS)?;
    builder.enable_mte()?;
    let vm = builder.build()?;
    let shared_memory = accepts_memory_file(&vm, 0, host_page_size() as usize)?;
    let huge_pages =
        accepts_memory_file(&vm, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, HUGE_PAGE_SIZE)?;
    let vcpu = vm.create_vcpu(0, VcpuFeatures::default())?;
    let pfr1 = vcpu.register_u64(RegisterId::ID_AA64PFR1_EL1)?;
    let pfr2 = vcpu.register_u64(RegisterId::ID_AA64PFR2_EL1)?;
    Ok(MteSupport {
        features: MteFeatures::from_id_registers(pfr1, pfr2),
        shared_memory,
        huge_pages,
    })
}

/// Whether a shared mapping of a memory file made with `flags` may be memory of `vm`. The kernel
/// looks at the mapping, not at pages, so none is touched and none has to be there.
fn accepts_memory_file(vm: &KvmVm, flags: libc::c_uint, size: usize) -> Result<bool> {
    let mapping = match Mapping::of_memory_file(flags, size) {
        Ok(mapping) => mapping,
        // A kernel without huge pages of this size.
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EINVAL | libc::ENOENT | libc::ENODEV)
            ) =>
        {
            return Ok(false);
        }
        Err(source) => {
            return Err(Error::Host {
                step: "making a memory file to offer a scratch VM",
                source,
            });
        }
    };
    let memslot = Memslot {
        slot: 0,
        ipa: 0,
        size: size as u64,
        host_address: mapping.address,
        log_dirty: false,
        read_only: false,
    };
    // SAFETY: the mapping is `size` bytes long, holds zeroes, and stays until the slot is deleted below.
    match unsafe { vm.set_memslot(&memslot) } {
        Ok(()) => vm.delete_memslot(memslot.slot).map(|()| true),
        Err(Error::MemoryWithoutTags { .. }) => Ok(false),
        Err(e) => Err(e),
    }
}

struct Mapping {
    address: NonNull<u8>,
    size: usize,
}

impl Mapping {
    fn of_memory_file(flags: libc::c_uint, size: usize) -> io::Result<Self> {
        // SAFETY: the name is a C string; the call has no other demands.
        let fd =
            unsafe { libc::memfd_create(c"tagvisor-probe".as_ptr(), flags | libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(size as u64)?;
        // SAFETY: a new mapping where the kernel likes replaces nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(address.cast()) {
            Some(mapped) if address != libc::MAP_FAILED => Ok(Self {
                address: mapped,
                size,
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `of_memory_file` with this size, and nothing refers to it any more.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.size) };
    }
}
