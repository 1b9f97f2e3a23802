//! The testbed of the reference model.

use std::num::NonZero;
use std::ptr::NonNull;
use std::sync::Arc;

use engine::model::{
    self, AccessError, FileKind, HostRules, MemoryFile, ModelHost, ModelHypervisor, ModelVcpu,
    ModelVm, PAGE_SIZE, Protection, Undefined,
};
use engine::{TagCopyResult, VcpuFeatures, Vm};
use mte::{SystemRegister, Tag, TagPage};

use crate::{Backing, GRANULES, GuestCpu, GuestFault, Mapping, PAGE, Stop, Testbed};

const _: () = assert!(PAGE == PAGE_SIZE);

/// Pages of a huge page.
const HUGE: usize = 512;

/// The model, as a host of some kind.
pub struct ModelTestbed(ModelHypervisor);

impl ModelTestbed {
    /// A host of this kind.
    pub fn new(rules: HostRules) -> Self {
        Self(ModelHypervisor::new(rules))
    }

    fn host(&self) -> &ModelHost {
        self.0.host()
    }
}

/// Memory of the model's host.
pub struct ModelMapping {
    host: ModelHost,
    /// Of the model's own addresses, behind which this process has nothing.
    address: NonZero<usize>,
    pages: usize,
}

impl ModelMapping {
    fn new(
        host: &ModelHost,
        backing: model::Backing,
        pages: usize,
        protection: Protection,
    ) -> Result<Self, Stop> {
        Ok(Self {
            host: host.clone(),
            address: host.map(backing, pages, protection)?.addr(),
            pages,
        })
    }

    fn at(&self, offset: u64) -> NonNull<u8> {
        NonNull::without_provenance(self.address.saturating_add(offset as usize))
    }

    fn page(&self, index: usize) -> NonNull<u8> {
        self.at(index as u64 * PAGE)
    }
}

impl Mapping for ModelMapping {
    fn address(&self) -> NonNull<u8> {
        self.at(0)
    }

    fn size(&self) -> u64 {
        self.pages as u64 * PAGE
    }
}

impl Drop for ModelMapping {
    fn drop(&mut self) {
        self.host
            .unmap(self.at(0), self.pages)
            .expect("what was mapped can be unmapped");
    }
}

/// What the model is to map, if it is to map anything.
fn backing_of(backing: &Backing<'_, MemoryFile>, pages: usize) -> Option<model::Backing> {
    let file = |kind, pages| MemoryFile::new(kind, pages);
    match backing {
        Backing::Anonymous => Some(model::Backing::Anonymous),
        Backing::Shared(file) => Some(model::Backing::Shared((*file).clone(), 0)),
        Backing::Private(file) => Some(model::Backing::Private((*file).clone(), 0)),
        Backing::Disk => Some(model::Backing::Private(file(FileKind::Disk, pages), 0)),
        Backing::HugePages => Some(model::Backing::Shared(file(FileKind::HugePages, pages), 0)),
        Backing::Nothing => None,
    }
}

impl Testbed for ModelTestbed {
    type Hypervisor = ModelHypervisor;
    type Mapping = ModelMapping;
    type File = MemoryFile;
    type Cpu = ModelCpu;

    fn hypervisor(&self) -> &ModelHypervisor {
        &self.0
    }

    fn rules(&self) -> HostRules {
        *self.host().rules()
    }

    fn memory_file(&self, pages: usize) -> Result<MemoryFile, Stop> {
        Ok(MemoryFile::new(FileKind::Memory, pages))
    }

    fn map(&self, backing: Backing<'_, MemoryFile>, pages: usize) -> Result<ModelMapping, Stop> {
        let pages = match backing {
            Backing::HugePages => HUGE,
            _ => pages,
        };
        let shown = backing_of(&backing, pages).unwrap_or(model::Backing::Anonymous);
        let mapping = ModelMapping::new(self.host(), shown, pages, Protection::Plain)?;
        if let Backing::Nothing = backing {
            self.host().unmap(mapping.at(0), pages)?;
        }
        Ok(mapping)
    }

    fn remap(
        &self,
        mapping: &ModelMapping,
        first: usize,
        backing: Backing<'_, MemoryFile>,
    ) -> Result<(), Stop> {
        let (address, pages) = (mapping.page(first), mapping.pages - first);
        match backing_of(&backing, pages) {
            Some(shown) => self
                .host()
                .map_at(address, shown, pages, Protection::Plain)?,
            None => self.host().unmap(address, pages)?,
        }
        Ok(())
    }

    fn device_writes(&self, mapping: &ModelMapping, offset: u64, value: u64) -> Result<(), Stop> {
        Ok(self
            .host()
            .store(mapping.at(offset), &value.to_le_bytes())?)
    }

    fn device_reads(&self, mapping: &ModelMapping, offset: u64) -> Result<u64, Stop> {
        let mut value = [0; 8];
        self.host().load(mapping.at(offset), &mut value)?;
        Ok(u64::from_le_bytes(value))
    }

    fn file_tags(&self, file: &MemoryFile, page: usize) -> Result<TagPage, Stop> {
        let mapping = self.map_tagged(file, page)?;
        let mut tags = TagPage::ZERO;
        for granule in 0..=u8::MAX {
            let tag = self.host().ldg(mapping.at(u64::from(granule) * 16))?;
            tags.set(granule, tag);
        }
        Ok(tags)
    }

    fn set_file_tags(&self, file: &MemoryFile, page: usize, tags: &TagPage) -> Result<(), Stop> {
        let mapping = self.map_tagged(file, page)?;
        for (granule, tag) in (0..).zip(tags.iter()) {
            self.host().stg(mapping.at(granule * 16), tag)?;
        }
        Ok(())
    }

    fn frames(&self, mapping: &ModelMapping) -> Result<Vec<Option<u64>>, Stop> {
        (0..mapping.pages)
            .map(|page| Ok(self.host().frame_number(mapping.page(page))?))
            .collect()
    }

    fn free_tagged_pages(&self, pages: usize, tag: Tag) -> Result<Vec<u64>, Stop> {
        let backing = model::Backing::Anonymous;
        let mapping = ModelMapping::new(self.host(), backing, pages, Protection::Tagged)?;
        for granule in 0..pages * GRANULES {
            self.host().stg(mapping.at(granule as u64 * 16), tag)?;
        }
        Ok(self.frames(&mapping)?.into_iter().flatten().collect())
    }

    fn swap_out(&self, mapping: &ModelMapping) -> Result<(), Stop> {
        for page in 0..mapping.pages {
            self.host().swap_out(mapping.page(page))?;
        }
        Ok(())
    }

    fn swap_some(&self, mapping: &ModelMapping) -> Result<(), Stop> {
        self.swap_out(mapping)
    }

    fn copy_tags_from_short_buffer(
        &self,
        vm: &ModelVm,
        ipa: u64,
        length: u64,
        tags: &[u8],
    ) -> Result<TagCopyResult, Stop> {
        Ok(vm.copy_tags_to_guest_from(ipa, length, &|index| tags.get(index).copied()))
    }

    fn host_makes_aarch32_vcpu(&self, vm: &ModelVm) -> Result<bool, Stop> {
        let features = VcpuFeatures {
            aarch32_el1: true,
            ..VcpuFeatures::default()
        };
        Ok(vm.create_vcpu(0, features).is_ok())
    }

    fn cpu(&self, vm: &Arc<ModelVm>, index: u32) -> Result<ModelCpu, Stop> {
        Ok(ModelCpu(vm.create_vcpu(index, VcpuFeatures::default())?))
    }
}

impl ModelTestbed {
    fn map_tagged(&self, file: &MemoryFile, page: usize) -> Result<ModelMapping, Stop> {
        let backing = model::Backing::Shared(file.clone(), page);
        ModelMapping::new(self.host(), backing, 1, Protection::Tagged)
    }
}

impl From<AccessError> for GuestFault {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Mmio { .. } => Self::Mmio,
            AccessError::Run(error) => Self::Run(error),
        }
    }
}

impl From<Undefined> for GuestFault {
    fn from(Undefined: Undefined) -> Self {
        Self::Undefined
    }
}

/// A vCPU of the model.
pub struct ModelCpu(ModelVcpu);

impl GuestCpu for ModelCpu {
    type Vcpu = ModelVcpu;

    fn vcpu(&mut self) -> Result<&mut ModelVcpu, Stop> {
        Ok(&mut self.0)
    }

    fn load(&mut self, ipa: u64) -> Result<u64, GuestFault> {
        let mut value = [0; 8];
        self.0.load(ipa, &mut value)?;
        Ok(u64::from_le_bytes(value))
    }

    fn store(&mut self, ipa: u64, value: u64) -> Result<(), GuestFault> {
        Ok(self.0.store(ipa, &value.to_le_bytes())?)
    }

    fn store_in_aarch32(&mut self, ipa: u64, value: u32, _: u64) -> Result<Option<()>, GuestFault> {
        // The model has no instructions, so it has none that are another width's.
        self.0.store(ipa, &value.to_le_bytes())?;
        Ok(Some(()))
    }

    fn ldg(&mut self, ipa: u64) -> Result<Tag, GuestFault> {
        Ok(self.0.ldg(ipa)?)
    }

    fn stg_each(&mut self, ipa: u64, stride: u64, count: u64, tag: Tag) -> Result<(), GuestFault> {
        for index in 0..count {
            self.0.stg(ipa + index * stride, tag)?;
        }
        Ok(())
    }

    fn page_tags(&mut self, ipa: u64) -> Result<TagPage, GuestFault> {
        let mut tags = TagPage::ZERO;
        for granule in 0..=u8::MAX {
            tags.set(granule, self.0.ldg(ipa + u64::from(granule) * 16)?);
        }
        Ok(tags)
    }

    fn set_page_tags(&mut self, ipa: u64, tags: &TagPage) -> Result<(), GuestFault> {
        for (granule, tag) in (0..).zip(tags.iter()) {
            self.0.stg(ipa + granule * 16, tag)?;
        }
        Ok(())
    }

    fn mrs(&mut self, register: SystemRegister) -> Result<u64, GuestFault> {
        Ok(self.0.mrs(register)?)
    }

    fn msr(&mut self, register: SystemRegister, value: u64) -> Result<(), GuestFault> {
        Ok(self.0.msr(register, value)?)
    }
}
