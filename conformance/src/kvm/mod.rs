//! The testbed of KVM: this host's kernel, with memory of this process.
//!
//! [`memory`] makes and mistreats host memory, [`agent`] is the program that a vCPU runs to do as it
//! is told. The whole process has its accesses tag-checked synchronously, as a VMM would that tags
//! its own heap: so an access of a device that met a guest's tags would end the program.

mod agent;
mod memory;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use engine::kvm::{KvmHypervisor, KvmVm};
use engine::model::HostRules;
use engine::{TagCopyError, TagCopyResult};
use kvm_bindings::{
    KVM_ARM_TAGS_TO_GUEST, KVM_ARM_VCPU_EL1_32BIT, kvm_arm_copy_mte_tags, kvm_vcpu_init,
};
use mte::aarch64::Instructions;
use mte::{Tag, TagPage};

pub use agent::AgentCpu;
pub use memory::{File, HostMapping};

use crate::{Backing, Mapping, Stop, Testbed};

// Numbers of ioctls (<linux/kvm.h>).
/// `KVM_ARM_MTE_COPY_TAGS`.
const COPY_TAGS: libc::c_ulong = 0x8030_aeb4;
/// `KVM_CREATE_VCPU`.
const CREATE_VCPU: libc::c_ulong = 0xae41;
/// `KVM_ARM_VCPU_INIT`.
const VCPU_INIT: libc::c_ulong = 0x4020_aeae;
/// `KVM_ARM_PREFERRED_TARGET`.
const PREFERRED_TARGET: libc::c_ulong = 0x8020_aeaf;

/// KVM on this host.
pub struct KvmTestbed {
    hypervisor: KvmHypervisor,
    instructions: Instructions,
    rules: HostRules,
}

impl KvmTestbed {
    /// Opens KVM and has this process's accesses tag-checked.
    ///
    /// # Errors
    /// There is no KVM, or processes have no MTE here.
    pub fn open() -> Result<Self, Stop> {
        let hypervisor = KvmHypervisor::open(Path::new(KvmHypervisor::DEFAULT_PATH))?;
        // SAFETY: a query without demands.
        let hwcap2 = unsafe { libc::getauxval(libc::AT_HWCAP2) };
        // SAFETY: the value is what the kernel gave this process.
        let instructions = unsafe { Instructions::from_hwcap2(hwcap2) }
            .ok_or_else(|| Stop::Fail("processes have no MTE on this host".to_owned()))?;
        check_own_accesses()?;
        let (major, minor) = release()?;
        Ok(Self {
            hypervisor,
            instructions,
            rules: HostRules::linux(major, minor),
        })
    }
}

/// The kernel's version.
fn release() -> Result<(u32, u32), Stop> {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => Err(Stop::Fail(format!(
            "the kernel's version is not understood: {text}"
        ))),
    }
}

/// Has the accesses of this thread, and of all that it will start, tag-checked synchronously.
fn check_own_accesses() -> io::Result<()> {
    /// `PR_MTE_TCF_SYNC` of <linux/prctl.h>.
    const SYNCHRONOUS: libc::c_ulong = 1 << 1;
    let mode = libc::PR_TAGGED_ADDR_ENABLE as libc::c_ulong | SYNCHRONOUS;
    // SAFETY: all memory of this process has tag 0 where it has any, and so have its pointers.
    match unsafe { libc::prctl(libc::PR_SET_TAGGED_ADDR_CTRL, mode, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Testbed for KvmTestbed {
    type Hypervisor = KvmHypervisor;
    type Mapping = HostMapping;
    type File = File;
    type Cpu = AgentCpu;

    fn hypervisor(&self) -> &KvmHypervisor {
        &self.hypervisor
    }

    fn rules(&self) -> HostRules {
        self.rules
    }

    fn memory_file(&self, pages: usize) -> Result<File, Stop> {
        Ok(File::in_memory(pages)?)
    }

    fn map(&self, backing: Backing<'_, File>, pages: usize) -> Result<HostMapping, Stop> {
        HostMapping::new(&backing, pages)
    }

    fn remap(
        &self,
        mapping: &HostMapping,
        first: usize,
        backing: Backing<'_, File>,
    ) -> Result<(), Stop> {
        mapping.replace(first, &backing)
    }

    fn device_writes(&self, mapping: &HostMapping, offset: u64, value: u64) -> Result<(), Stop> {
        mapping.write(offset, value);
        Ok(())
    }

    fn device_reads(&self, mapping: &HostMapping, offset: u64) -> Result<u64, Stop> {
        Ok(mapping.read(offset))
    }

    fn file_tags(&self, file: &File, page: usize) -> Result<TagPage, Stop> {
        let mapping = HostMapping::of_tags(file, page)?;
        let mut tags = [TagPage::ZERO];
        // SAFETY: the mapping is a page.
        unsafe { self.instructions.read_tag_pages(mapping.start(), &mut tags) };
        let [tags] = tags;
        Ok(tags)
    }

    fn set_file_tags(&self, file: &File, page: usize, tags: &TagPage) -> Result<(), Stop> {
        let mapping = HostMapping::of_tags(file, page)?;
        let tags = std::slice::from_ref(tags);
        // SAFETY: the mapping is a page, and writable.
        unsafe { self.instructions.write_tag_pages(mapping.start(), tags) };
        Ok(())
    }

    fn frames(&self, mapping: &HostMapping) -> Result<Vec<Option<u64>>, Stop> {
        mapping.frames()
    }

    fn free_tagged_pages(&self, pages: usize, tag: Tag) -> Result<Vec<u64>, Stop> {
        let mapping = HostMapping::tagged(pages)?;
        // SAFETY: the mapping has so many pages, and is writable.
        unsafe {
            self.instructions
                .fill_tag_pages(mapping.start(), pages, tag);
        }
        Ok(mapping.frames()?.into_iter().flatten().collect())
    }

    fn swap_out(&self, mapping: &HostMapping) -> Result<(), Stop> {
        mapping.swap_out()
    }

    fn swap_some(&self, mapping: &HostMapping) -> Result<(), Stop> {
        memory::require_swap()?;
        Ok(mapping.page_out()?)
    }

    fn copy_tags_from_short_buffer(
        &self,
        vm: &KvmVm,
        ipa: u64,
        length: u64,
        tags: &[u8],
    ) -> Result<TagCopyResult, Stop> {
        let buffer = HostMapping::ending_in(tags)?;
        let end = buffer.address().as_ptr() as u64 + crate::PAGE;
        let copy = kvm_arm_copy_mte_tags {
            guest_ipa: ipa,
            length,
            addr: (end - tags.len() as u64) as *mut _,
            flags: KVM_ARM_TAGS_TO_GUEST.into(),
            reserved: [0; 2],
        };
        // SAFETY: the file is a VM's and the structure what this ioctl reads. From the buffer the
        // kernel only reads, and finds out for itself where it ends.
        let covered = unsafe { libc::ioctl(vm.as_raw_fd(), COPY_TAGS as _, &copy) };
        Ok(u64::try_from(covered).map_err(|_| {
            let source = io::Error::last_os_error();
            match source.raw_os_error() {
                Some(libc::EFAULT) => TagCopyError::NoMemory { ipa },
                _ => TagCopyError::Host { ipa, source },
            }
        }))
    }

    fn host_makes_aarch32_vcpu(&self, vm: &KvmVm) -> Result<bool, Stop> {
        let mut init = kvm_vcpu_init::default();
        // SAFETY: the file is a VM's, and the structure what this ioctl writes.
        let asked = unsafe { libc::ioctl(vm.as_raw_fd(), PREFERRED_TARGET as _, &mut init) };
        // SAFETY: the file is a VM's; the number is no address.
        let vcpu = unsafe { libc::ioctl(vm.as_raw_fd(), CREATE_VCPU as _, 0) };
        if asked < 0 || vcpu < 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        let vcpu = unsafe { OwnedFd::from_raw_fd(vcpu) };
        init.features[0] |= 1 << KVM_ARM_VCPU_EL1_32BIT;
        // SAFETY: the file is a vCPU's, and the structure what this ioctl reads.
        let made = unsafe { libc::ioctl(vcpu.as_raw_fd(), VCPU_INIT as _, &init) };
        Ok(made == 0)
    }

    fn cpu(&self, vm: &Arc<KvmVm>, index: u32) -> Result<AgentCpu, Stop> {
        AgentCpu::new(vm, index)
    }
}
