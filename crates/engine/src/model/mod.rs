//! A reference model of the hypervisor side, for tests that have to run anywhere.
//!
//! [`ModelHypervisor`] implements this crate's traits without a hypervisor, and executes no code: a
//! [`ModelVcpu`] is driven by a test, instruction by instruction, or by a [`Guest`] written in Rust.
//! What the model is exact in is what the seeds and KVM say of memory and its tags: which memory a
//! guest may have and when it is told (`memslots`, `host`), that stale tags are never seen and valid
//! ones never cleared ([`PageState`], `frame`), that tags go with their page through swap and
//! copy-on-write (`page`), what the bulk copy of tags returns (`vm`), what the dirty log shows, and
//! which registers a vCPU has (`registers`). What a guest's access does is its page's business alone:
//! no lock is held above a page but for reading. Where hosts differ, [`HostRules`] says which one
//! the model is.
//!
//! Memory behind a memslot is either the model's own ([`ModelHost`]), which tests can recycle,
//! remap, swap and share as a process does, or real memory of this process, given by its address.
//! So a whole machine of the `vmm` crate can run on the model: its devices and loaders work on
//! real memory, and the model has the tags.
//!
//! ```
//! use engine::model::{Backing, HostRules, ModelHypervisor, Protection};
//! use engine::{Hypervisor, Memslot, VcpuFeatures, Vm, VmBuilder};
//! use mte::Tag;
//!
//! let hypervisor = ModelHypervisor::new(HostRules::linux(6, 12));
//! let memory = hypervisor.host().map(Backing::Anonymous, 16, Protection::Plain)?;
//! let mut builder = hypervisor.new_vm(40)?;
//! builder.enable_mte()?;
//! let vm = builder.build()?;
//! let slot = Memslot {
//!     slot: 0,
//!     ipa: 0x8000_0000,
//!     size: 16 * 4096,
//!     host_address: memory,
//!     log_dirty: false,
//!     read_only: false,
//! };
//! // SAFETY: the memory is the model's, which checks every access.
//! unsafe { vm.set_memslot(&slot) }?;
//! let vcpu = vm.create_vcpu(0, VcpuFeatures::default())?;
//!
//! vcpu.stg(0x8000_1230, Tag::MAX)?;
//!
//! let mut tags = [0; 256];
//! assert_eq!(vm.copy_tags_from_guest(0x8000_1000, &mut tags)?, 4096);
//! assert_eq!(tags[0x23], 15);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod frame;
mod host;
mod memslots;
mod page;
mod page_state;
mod registers;
mod rules;
mod sync;
mod vcpu;
mod vm;

#[cfg(all(test, not(loom)))]
mod tests;

use std::sync::Arc;

pub use frame::PAGE_SIZE;
pub use host::{
    AdoptedMemory, Backing, FIRST_ADDRESS, FileKind, MemoryFile, ModelHost, Protection,
};
pub use page_state::{PageState, TagState};
pub use rules::HostRules;
pub use vcpu::{AccessError, Guest, Idle, ModelInterrupter, ModelVcpu, Step, Undefined};
pub use vm::{ModelVm, ModelVmBuilder};

use crate::{Capabilities, Error, Hypervisor, Result};

/// The model as a hypervisor.
pub struct ModelHypervisor {
    host: ModelHost,
    capabilities: Capabilities,
    guest: Arc<dyn Guest>,
}

impl ModelHypervisor {
    /// The hypervisor of a host of this kind. Its guests do nothing of themselves.
    pub fn new(rules: HostRules) -> Self {
        Self {
            host: ModelHost::new(rules),
            capabilities: rules.capabilities(),
            guest: Arc::new(Idle),
        }
    }

    /// The same with this program in all guests that are made from now on.
    #[must_use]
    pub fn with_guest(self, guest: impl Guest) -> Self {
        Self {
            guest: Arc::new(guest),
            ..self
        }
    }

    /// The host on which it runs.
    pub fn host(&self) -> &ModelHost {
        &self.host
    }
}

impl Hypervisor for ModelHypervisor {
    type VmBuilder = ModelVmBuilder;

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn new_vm(&self, ipa_bits: u8) -> Result<ModelVmBuilder> {
        if ipa_bits > self.capabilities.ipa_bits {
            return Err(Error::IpaBits {
                needed: ipa_bits,
                offered: self.capabilities.ipa_bits,
            });
        }
        let guest = Arc::clone(&self.guest);
        Ok(ModelVmBuilder::new(self.host.clone(), ipa_bits, guest))
    }
}
