//! The life of a machine, through its guest's resets to its end.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::{Hypervisor, Vm, VmBuilder};
use vmm::config::MachineConfig;
use vmm::console::Console;
use vmm::machine::{Ending, Error, Machine, StopHandle};
use vmm::virtio::net::MacAddr;

/// Runs a machine, and a new one whenever its guest resets it, until `shutdown` is asked for.
///
/// # Errors
/// It cannot be built, or cannot go on.
pub fn run<H: Hypervisor>(
    hypervisor: &H,
    config: &MachineConfig,
    shutdown: &ShutdownRequest,
) -> Result<Ending, Error>
where
    <<H::VmBuilder as VmBuilder>::Vm as Vm>::Vcpu: 'static,
{
    let config = with_addresses(config);
    let mut console = Console::open(&config.console)?;
    while !shutdown.is_asked() {
        let mut machine = Machine::new(hypervisor, &config, &mut console)?;
        shutdown.attach(machine.stop_handle());
        match machine.run()? {
            Ending::Reset if !config.no_reboot => tracing::info!("the guest reset the machine"),
            ending => return Ok(ending),
        }
    }
    Ok(Ending::Asked)
}

/// The configuration with an address for each network interface, so that a reset does not change it.
fn with_addresses(config: &MachineConfig) -> MachineConfig {
    let mut config = config.clone();
    for net in &mut config.net {
        net.mac.get_or_insert_with(MacAddr::random);
    }
    config
}

/// The wish that it all end, which a signal can bring while one machine is gone and the next not yet there.
#[derive(Clone, Default)]
pub struct ShutdownRequest(Arc<Mutex<ShutdownState>>);

#[derive(Default)]
struct ShutdownState {
    asked: bool,
    machine: Option<StopHandle>,
}

impl ShutdownRequest {
    fn lock(&self) -> MutexGuard<'_, ShutdownState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the machine that there is, and any that is still to come.
    pub fn ask(&self) {
        let mut state = self.lock();
        state.asked = true;
        if let Some(machine) = &state.machine {
            machine.stop();
        }
    }

    fn is_asked(&self) -> bool {
        self.lock().asked
    }

    /// Names the machine to stop, in the place of the one before.
    fn attach(&self, machine: StopHandle) {
        let mut state = self.lock();
        if state.asked {
            machine.stop();
        }
        state.machine = Some(machine);
    }
}
