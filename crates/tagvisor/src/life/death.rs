//! What a guest died of, told when its machine ends.

use engine::{Hypervisor, Vm, VmBuilder};
use inspect::{Death, End, SourceMemory};
use vmm::machine::{Ending, Error, Machine};

use super::Landlord;

impl<H: Hypervisor> Landlord<'_, H>
where
    <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
{
    /// Says what the guest died of whose run came back like this, if it did: Linux resets its machine when it has panicked.
    pub(super) fn tell_death(&mut self, outcome: &Result<Ending, Error>) {
        let end = match outcome {
            Ok(Ending::Reset) => End::Asked,
            Err(Error::Engine(_)) => End::Stuck,
            _ => return,
        };
        if self.fill().is_some() {
            // Memory that has not come would be waited for.
            return;
        }
        let machine = self.tenant.as_mut();
        let Some(machine) = machine.and_then(|tenant| tenant.machine.as_mut()) else {
            return;
        };
        match death_of(machine, end) {
            Ok(Some(death)) if end == End::Stuck => tracing::error!("a vCPU cannot go on; {death}"),
            Ok(Some(death)) => tracing::error!("the guest died: {death}"),
            Ok(None) => {}
            Err(why) => tracing::debug!("what the guest died of is not known: {why}"),
        }
    }
}

fn death_of<H: Hypervisor>(
    machine: &mut Machine<H>,
    end: End,
) -> Result<Option<Death>, Box<dyn std::error::Error>>
where
    <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
{
    let vcpus = machine.save()?.vcpus;
    let pages = machine.pages();
    let ram = pages.ram();
    let mut memory = SourceMemory::new(pages, ram, vcpus)?;
    Ok(Death::of(&mut memory, end)?)
}
