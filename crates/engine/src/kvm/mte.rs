//! MTE in KVM: the capability and the bulk copy of tags, which kvm-ioctls does not have.
//!
//! Stands on its own, in kvm-ioctls' style, so that it could be given upstream.

use std::io;

use kvm_bindings::{
    KVM_ARM_TAGS_FROM_GUEST, KVM_ARM_TAGS_TO_GUEST, KVM_CAP_ARM_MTE, KVMIO, kvm_arm_copy_mte_tags,
    kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_ior_nr;

mod number {
    use super::*;

    // Declared `_IOR` in <linux/kvm.h>, although the kernel reads the structure.
    ioctl_ior_nr!(KVM_ARM_MTE_COPY_TAGS, KVMIO, 0xb4, kvm_arm_copy_mte_tags);
}
use number::KVM_ARM_MTE_COPY_TAGS;

/// Whether KVM can give a guest MTE (`KVM_CAP_ARM_MTE`).
pub fn is_supported(kvm: &Kvm) -> bool {
    kvm.check_extension_raw(KVM_CAP_ARM_MTE.into()) > 0
}

/// Turns MTE on for a VM that has no vCPU yet.
pub fn enable(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_ARM_MTE,
        ..Default::default()
    })
}

/// Which way tags are copied, and the buffer: one byte a granule.
pub enum CopyTags<'a> {
    /// Out of the guest.
    FromGuest(&'a mut [u8]),
    /// Into the guest.
    ToGuest(&'a [u8]),
}

/// Copies the tags of guest memory from `ipa` on, and returns the bytes of guest memory covered.
pub fn copy_tags(vm: &VmFd, ipa: u64, tags: CopyTags<'_>) -> io::Result<u64> {
    let (flags, granules, address) = match tags {
        CopyTags::FromGuest(tags) => (KVM_ARM_TAGS_FROM_GUEST, tags.len(), tags.as_mut_ptr()),
        CopyTags::ToGuest(tags) => (KVM_ARM_TAGS_TO_GUEST, tags.len(), tags.as_ptr().cast_mut()),
    };
    let copy = kvm_arm_copy_mte_tags {
        guest_ipa: ipa,
        length: granules as u64 * mte::GRANULE_SIZE as u64,
        addr: address.cast(),
        flags: flags.into(),
        reserved: [0; 2],
    };
    // SAFETY: the file is a VM's, and the structure is what this ioctl reads. The kernel accesses
    // `length / 16` bytes at `addr`, which is the buffer that `tags` borrows, and writes it only
    // for `FromGuest`, whose borrow is exclusive.
    let covered = unsafe { ioctl_with_ref(vm, KVM_ARM_MTE_COPY_TAGS(), &copy) };
    u64::try_from(covered).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ioctl_has_the_number_of_the_kernel_header() {
        assert_eq!(KVM_ARM_MTE_COPY_TAGS(), 0x8030_aeb4);
    }
}
