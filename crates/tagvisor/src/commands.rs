//! The commands that ask a running machine, over its control socket, or look at a saved one.

mod addresses;
pub mod api;
pub mod core;
pub mod gdb;
pub mod info;
pub mod inspect;
pub mod kill;
pub mod ls;
mod machine;
pub mod migrate;
mod progress;
pub mod snapshot;
pub mod stop;
pub mod tags;
mod target;
mod text;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args as ClapArgs;

pub use machine::Machine;

/// How a command ends.
pub type Result = std::result::Result<ExitCode, Box<dyn Error>>;

/// Which machine.
#[derive(ClapArgs)]
pub struct Named {
    /// The machine's name, or the path of a control socket: whatever contains a `/`
    name: String,
}

impl Named {
    fn machine(&self) -> std::result::Result<Machine, machine::Error> {
        Machine::find(&self.name)
    }
}

/// A path that cannot be told to the VMM.
#[derive(Debug, thiserror::Error)]
#[error("{}: a path that is not UTF-8 cannot be sent to the VMM", .0.display())]
struct NotText(PathBuf);

/// A path as the VMM can be told it, which may stand elsewhere.
fn absolute(path: &Path) -> std::result::Result<String, Box<dyn Error>> {
    let path = std::path::absolute(path)?;
    match path.to_str() {
        Some(text) => Ok(text.into()),
        None => Err(NotText(path).into()),
    }
}

/// `tagvisor pause`: stops a guest where it is.
///
/// # Errors
/// It was not done.
pub fn pause(named: &Named) -> Result {
    let machine = named.machine()?;
    machine.ask(|client| client.pause())?;
    Ok(ExitCode::SUCCESS)
}

/// `tagvisor resume`: lets a paused guest go on.
///
/// # Errors
/// It was not done.
pub fn resume(named: &Named) -> Result {
    let machine = named.machine()?;
    machine.ask(|client| client.resume())?;
    Ok(ExitCode::SUCCESS)
}
