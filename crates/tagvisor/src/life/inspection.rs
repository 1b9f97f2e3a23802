//! Machines that are looked at while they live.
//!
//! The guest stands still from when its memory is lent until the reader has gone. Meanwhile the machine's thread waits, so that
//! what else is wanted of the machine waits its turn, as behind a snapshot; only its end does not. Live, the guest stands still
//! for no longer than it takes to read its vCPUs' registers, and the machine's thread goes on.

use std::sync::mpsc::{self, Receiver, Sender};

use engine::{Hypervisor, Vm, VmBuilder};

use super::{Landlord, failed};
use crate::control::{InspectRequest, Refusal, VmState};
use crate::inspection::{Hold, Lease};

impl<H: Hypervisor> Landlord<'_, H>
where
    <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
{
    /// Lends the machine's memory, and waits for its return if the guest is to stand still.
    pub(super) fn inspect(
        &mut self,
        request: &InspectRequest,
        answer: &Sender<Result<Lease, Refusal>>,
    ) {
        let before = self.shared.known().info.clone();
        match self.lend(request) {
            Err(refusal) => {
                let _ = answer.send(Err(refusal));
            }
            Ok((lease, released)) => {
                // Whoever asked may be gone: then it is returned by this.
                let _ = answer.send(Ok(lease));
                if let Some(released) = released {
                    self.await_return(&released);
                }
            }
        }
        // Also after a look at the vCPUs' registers alone, or one that failed.
        let was_running = before.as_ref().map(|info| info.state) == Some(VmState::Running);
        if was_running && let Err(why) = self.go_on() {
            tracing::error!("the guest cannot go on: {why}");
            self.set_state(VmState::Paused);
            return;
        }
        self.shared.known().info = before;
    }

    fn lend(&mut self, request: &InspectRequest) -> Result<(Lease, Option<Receiver<()>>), Refusal> {
        let wanted = "looked at";
        let state = self.state().ok_or(Refusal::NoVm)?;
        if !matches!(state, VmState::Running | VmState::Paused) {
            return Err(Refusal::State { wanted, state });
        }
        self.between.check()?;
        self.settle()?;
        let shared = self.shared.clone();
        let machine = self.machine_in(state, wanted)?;
        let vcpus = failed(machine.save())?.vcpus;
        let pages = machine.pages();
        let file = pages.memory().readable_file().unwrap_or_else(|why| {
            tracing::debug!("the memory file cannot be lent, so that pages are: {why}");
            None
        });
        let mut lease = Lease {
            ram: pages.ram(),
            vcpus,
            pages: Box::new(pages),
            file,
            hold: None,
        };
        if request.live {
            return Ok((lease, None));
        }
        let (done, released) = mpsc::channel();
        lease.hold = Some(Hold::new(done.clone()));
        let mut known = shared.known();
        known.lent = Some(done);
        if let Some(info) = &mut known.info {
            info.state = VmState::Paused;
            info.reason = Some(match &request.reader {
                Some(reader) => format!("{reader} looks at its memory"),
                None => "its memory is looked at (vm.inspect)".into(),
            });
        }
        drop(known);
        Ok((lease, Some(released)))
    }

    /// Waits until nobody looks any more, or the VMM is to end.
    fn await_return(&self, released: &Receiver<()>) {
        // Whoever ended the VMM before could not say so here.
        if !self.shared.has_ended() {
            let _ = released.recv();
        }
        self.shared.known().lent = None;
    }

    /// The guest runs again, unless it ended its machine, which its run then tells.
    fn go_on(&mut self) -> Result<(), vmm::machine::Error> {
        let machine = self.tenant.as_mut();
        let machine = machine.and_then(|tenant| tenant.machine.as_mut());
        machine.map_or(Ok(()), vmm::machine::Machine::resume)
    }
}
