//! What the checks need of an engine beside its traits.
//!
//! A [`Testbed`] is a hypervisor and the host around it: it makes and mistreats host memory, and
//! knows how a vCPU is brought to do a load here and an STG there ([`GuestCpu`]). The checks know
//! nothing else of whether they run against a model or against a kernel.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use engine::model::HostRules;
use engine::{Hypervisor, TagCopyResult, Vm, VmBuilder};
use mte::{GRANULE_SIZE, SystemRegister, Tag, TagPage};

use crate::Stop;

/// Bytes of a page, of every host on which the checks run.
pub const PAGE: u64 = 4096;

/// Granules of a page.
pub const GRANULES: usize = PAGE as usize / GRANULE_SIZE;

/// The VM of a testbed.
pub type VmOf<T> = <<<T as Testbed>::Hypervisor as Hypervisor>::VmBuilder as VmBuilder>::Vm;

/// The vCPU of a testbed.
pub type VcpuOf<T> = <VmOf<T> as Vm>::Vcpu;

/// What a mapping shows.
pub enum Backing<'a, F> {
    /// Memory of the process alone.
    Anonymous,
    /// A memory file, shared with all who map it.
    Shared(&'a F),
    /// A memory file until it is written, then a copy.
    Private(&'a F),
    /// A file on a disk.
    Disk,
    /// Reserved huge pages. The mapping is of one, whatever its size was to be; it may not be touched.
    HugePages,
    /// Nothing: accesses fault.
    Nothing,
}

/// A piece of host memory. It is unmapped when dropped, so a memslot that has it must be gone by then.
pub trait Mapping: Send + Sync {
    /// Its first byte.
    fn address(&self) -> NonNull<u8>;

    /// Bytes.
    fn size(&self) -> u64;
}

/// A hypervisor with a host around it.
pub trait Testbed: Sync + Sized {
    /// The hypervisor.
    type Hypervisor: Hypervisor;
    /// A piece of host memory.
    type Mapping: Mapping;
    /// A memory file.
    type File;
    /// A vCPU that does as it is told.
    type Cpu: GuestCpu<Vcpu = VcpuOf<Self>>;

    /// The hypervisor.
    fn hypervisor(&self) -> &Self::Hypervisor;

    /// What this host is expected to do where hosts differ: the rules of the model that is like it.
    fn rules(&self) -> HostRules;

    /// A memory file of so many pages, all of them holes.
    ///
    /// # Errors
    /// The host refuses.
    fn memory_file(&self, pages: usize) -> Result<Self::File, Stop>;

    /// Maps so many pages. The process cannot reach tags through the mapping.
    ///
    /// # Errors
    /// The host refuses, or has no such memory.
    fn map(&self, backing: Backing<'_, Self::File>, pages: usize) -> Result<Self::Mapping, Stop>;

    /// Maps something else in place of the pages of `mapping` from `first` on.
    ///
    /// # Errors
    /// The host refuses, or has no such memory.
    fn remap(
        &self,
        mapping: &Self::Mapping,
        first: usize,
        backing: Backing<'_, Self::File>,
    ) -> Result<(), Stop>;

    /// Writes memory as a device does: through the mapping, by a thread whose accesses are
    /// tag-checked where memory asks for it.
    ///
    /// # Errors
    /// The write faulted.
    fn device_writes(&self, mapping: &Self::Mapping, offset: u64, value: u64) -> Result<(), Stop>;

    /// Reads memory likewise.
    ///
    /// # Errors
    /// The read faulted.
    fn device_reads(&self, mapping: &Self::Mapping, offset: u64) -> Result<u64, Stop>;

    /// The tags of a page of a memory file, as a process sees them that maps it for that purpose.
    ///
    /// # Errors
    /// The host refuses.
    fn file_tags(&self, file: &Self::File, page: usize) -> Result<TagPage, Stop>;

    /// Writes these tags likewise.
    ///
    /// # Errors
    /// The host refuses.
    fn set_file_tags(&self, file: &Self::File, page: usize, tags: &TagPage) -> Result<(), Stop>;

    /// The numbers of the host's physical pages behind a mapping, where there are any.
    ///
    /// # Errors
    /// The host does not tell.
    fn frames(&self, mapping: &Self::Mapping) -> Result<Vec<Option<u64>>, Stop>;

    /// Fills so many pages of host memory with this tag and frees them. Their numbers.
    ///
    /// # Errors
    /// The host refuses, or does not tell.
    fn free_tagged_pages(&self, pages: usize, tag: Tag) -> Result<Vec<u64>, Stop>;

    /// Swaps out all of a mapping that is in memory.
    ///
    /// # Errors
    /// The host has nowhere to swap to, or will not.
    fn swap_out(&self, mapping: &Self::Mapping) -> Result<(), Stop>;

    /// Swaps out what can be swapped out of a mapping at this moment, while others use it.
    ///
    /// # Errors
    /// The host has nowhere to swap to.
    fn swap_some(&self, mapping: &Self::Mapping) -> Result<(), Stop>;

    /// [`Vm::copy_tags_to_guest`] of `length` bytes of guest memory, from a buffer that has `tags`
    /// and faults behind them. `tags` has the tags of whole pages, or half of a page's more.
    ///
    /// # Errors
    /// The host refuses to make such a buffer.
    fn copy_tags_from_short_buffer(
        &self,
        vm: &VmOf<Self>,
        ipa: u64,
        length: u64,
        tags: &[u8],
    ) -> Result<TagCopyResult, Stop>;

    /// Whether the host itself, which the engine does not ask, makes a vCPU of `vm` whose EL1 is in AArch32.
    ///
    /// # Errors
    /// The host refuses for another reason.
    fn host_makes_aarch32_vcpu(&self, vm: &VmOf<Self>) -> Result<bool, Stop>;

    /// A vCPU of `vm` that does as it is told.
    ///
    /// # Errors
    /// The engine refuses.
    fn cpu(&self, vm: &Arc<VmOf<Self>>, index: u32) -> Result<Self::Cpu, Stop>;
}

/// Why an instruction of the guest did not do its work.
#[derive(Debug)]
pub enum GuestFault {
    /// The guest has no such instruction or register.
    Undefined,
    /// Another exception, with this `ESR_EL1`.
    Exception(u64),
    /// Nothing is there, or nothing that may be written: the VMM was asked.
    Mmio,
    /// The vCPU could not go on.
    Run(engine::Error),
}

impl fmt::Display for GuestFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undefined => f.write_str("undefined instruction"),
            Self::Exception(syndrome) => write!(f, "exception, ESR_EL1 {syndrome:#x}"),
            Self::Mmio => f.write_str("no memory there"),
            Self::Run(error) => error.fmt(f),
        }
    }
}

/// A vCPU that does as it is told. Addresses are guest-physical.
pub trait GuestCpu: Send {
    /// The vCPU behind it.
    type Vcpu: engine::Vcpu;

    /// The vCPU, stopped and whole.
    ///
    /// # Errors
    /// It cannot be brought to stop.
    fn vcpu(&mut self) -> Result<&mut Self::Vcpu, Stop>;

    /// Loads an aligned word.
    ///
    /// # Errors
    /// See [`GuestFault`].
    fn load(&mut self, ipa: u64) -> Result<u64, GuestFault>;

    /// Stores an aligned word.
    ///
    /// # Errors
    /// See [`GuestFault`].
    fn store(&mut self, ipa: u64, value: u64) -> Result<(), GuestFault>;

    /// Stores an aligned 32-bit word by a program in AArch32 at EL0, whose code may go to the page
    /// at `code`. `None` if the vCPU has no AArch32 there.
    ///
    /// # Errors
    /// See [`GuestFault`].
    fn store_in_aarch32(
        &mut self,
        ipa: u64,
        value: u32,
        code: u64,
    ) -> Result<Option<()>, GuestFault>;

    /// Loads a granule's tag.
    ///
    /// # Errors
    /// See [`GuestFault`].
    fn ldg(&mut self, ipa: u64) -> Result<Tag, GuestFault>;

    /// Stores the tag of `count` granules, the first at `ipa` and each `stride` bytes behind the last.
    ///
    /// # Errors
    /// See [`GuestFault`].
    fn stg_each(&mut self, ipa: u64, stride: u64, count: u64, tag: Tag) -> Result<(), GuestFault>;

    /// Stores a granule's tag.
    ///
    /// # Errors
    /// See [`GuestFault`].
    fn stg(&mut self, ipa: u64, tag: Tag) -> Result<(), GuestFault> {
        self.stg_each(ipa, 0, 1, tag)
    }

    /// Loads the tags of a page.
    ///
    /// # Errors
    /// See [`GuestFault`].
    fn page_tags(&mut self, ipa: u64) -> Result<TagPage, GuestFault>;

    /// Stores the tags of a page, one by one.
    ///
    /// # Errors
    /// See [`GuestFault`].
    fn set_page_tags(&mut self, ipa: u64, tags: &TagPage) -> Result<(), GuestFault>;

    /// Reads `ID_AA64PFR1_EL1` or one of the four registers of MTE.
    ///
    /// # Errors
    /// See [`GuestFault`].
    fn mrs(&mut self, register: SystemRegister) -> Result<u64, GuestFault>;

    /// Writes one of the four registers of MTE.
    ///
    /// # Errors
    /// See [`GuestFault`].
    fn msr(&mut self, register: SystemRegister, value: u64) -> Result<(), GuestFault>;
}
