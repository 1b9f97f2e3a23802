//! The life of a machine, through its guest's resets to its end.

use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::kvm::KvmHypervisor;
use vmm::config::MachineConfig;
use vmm::machine::{Ending, Machine, Quitter};

use crate::run::{CRASHED, ENDED_FROM_OUTSIDE};
use crate::signals::EndingSignals;

/// Runs a machine, and a new one whenever its guest resets it.
///
/// # Errors
/// It cannot be built, or cannot go on.
pub fn run(
    hypervisor: &KvmHypervisor,
    config: &MachineConfig,
    signals: EndingSignals,
) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let end = End::default();
    let on_signal = end.clone();
    signals.on_each(move || on_signal.ask())?;
    loop {
        let mut machine = Machine::new(hypervisor, config)?;
        end.is_for(machine.quitter());
        match machine.run()? {
            Ending::Reset if !config.no_reboot => tracing::info!("the guest reset the machine"),
            Ending::Off | Ending::Reset => return Ok(ExitCode::SUCCESS),
            Ending::Crash => return Ok(CRASHED.into()),
            Ending::Asked => return Ok(ENDED_FROM_OUTSIDE.into()),
        }
    }
}

/// The wish that it all end, which a signal can bring while one machine is gone and the next not yet there.
#[derive(Clone, Default)]
struct End(Arc<Mutex<EndState>>);

#[derive(Default)]
struct EndState {
    asked: bool,
    machine: Option<Quitter>,
}

impl End {
    fn lock(&self) -> MutexGuard<'_, EndState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self) {
        let mut state = self.lock();
        state.asked = true;
        if let Some(machine) = &state.machine {
            machine.quit();
        }
    }

    fn is_for(&self, machine: Quitter) {
        let mut state = self.lock();
        if state.asked {
            machine.quit();
        }
        state.machine = Some(machine);
    }
}
