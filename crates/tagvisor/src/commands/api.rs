//! `tagvisor api`: an empty VMM, driven over its control socket from the first to the last.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use crate::run;

/// Where to listen.
#[derive(ClapArgs)]
pub struct Args {
    /// The control socket, made for you alone
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The hypervisor's device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: PathBuf,
}

/// Serves an empty VMM until it is shut down.
///
/// # Errors
/// It cannot be started.
pub fn api(args: &Args) -> super::Result {
    run::empty(&args.kvm, &args.socket)
}
