//! Which pages of a machine change, from one look to the next.

use std::sync::Arc;

use engine::{Hypervisor, Memslot, Vcpu, Vm};
use stream::PageSet;

use super::{Machine, VcpuOf, VmOf};
use crate::memory::GuestMemory;
use crate::memory::dirty::dirty_pages;

/// The dirty log, on as long as this lives.
pub(super) struct DirtyLog<V: Vm> {
    vm: Arc<V>,
    memory: Arc<GuestMemory>,
}

impl<V: Vm> DirtyLog<V> {
    /// Turns the log on, with nothing in it.
    pub(super) fn start(vm: Arc<V>, memory: Arc<GuestMemory>) -> engine::Result<Self> {
        let log = Self { vm, memory };
        log.set(true)?;
        log.memory.take_vmm_writes();
        Ok(log)
    }

    fn set(&self, on: bool) -> engine::Result<()> {
        let slot = Memslot {
            log_dirty: on,
            ..self.memory.memslot()
        };
        // SAFETY: the same memory as before, which the machine keeps for as long as the slot exists.
        unsafe { self.vm.set_memslot(&slot) }
    }

    /// What changed since the last call.
    pub(super) fn take(&self) -> engine::Result<PageSet> {
        let log = self.vm.take_dirty_log(self.memory.memslot().slot)?;
        let writes = self.memory.take_vmm_writes();
        Ok(dirty_pages(self.memory.size(), &log, &writes))
    }
}

impl<V: Vm> Drop for DirtyLog<V> {
    fn drop(&mut self) {
        if let Err(e) = self.set(false) {
            tracing::warn!("the log of the guest's writes stays on, which slows it down: {e}");
        }
    }
}

impl<H: Hypervisor> Machine<H>
where
    VcpuOf<H>: Vcpu + 'static,
{
    /// Begins to log writes.
    pub(super) fn log_dirty_pages(&self) -> engine::Result<DirtyLog<VmOf<H>>> {
        DirtyLog::start(self.vm.clone(), self.memory.clone())
    }
}
