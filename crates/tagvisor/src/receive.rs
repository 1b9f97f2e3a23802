//! `tagvisor receive`: waits for a guest that migrates here, and runs it to its end.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args as ClapArgs;
use transport::Address;
use vmm::console::ConsoleConfig;

use crate::control::{Changes, ReceptionRequest, TlsRequest};
use crate::life::{Beginning, Reception};
use crate::run::{EXIT_STATUS, parse_console, until_its_end};

/// Where to wait, and for what.
#[derive(ClapArgs)]
#[command(after_help = EXIT_STATUS)]
pub struct Args {
    /// The machine's name here, unique among those that run; the control socket is under this name while the guest is waited for
    #[arg(value_name = "NAME", required_unless_present = "named")]
    name: Option<String>,
    /// The same
    #[arg(
        long = "name",
        value_name = "NAME",
        conflicts_with = "name",
        id = "named"
    )]
    named: Option<String>,
    /// Where the guest is waited for: tcp://HOST:PORT (port 0 has one chosen, which is printed) or unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    listen: Address,
    /// The directory with certificates, keys and authorities by which both sides prove themselves (docs/tls.md)
    #[arg(long, value_name = "DIRECTORY")]
    tls: Option<PathBuf>,
    /// The name that the source's certificate must have
    #[arg(long, value_name = "NAME", requires = "tls")]
    tls_peer_name: Option<String>,
    /// Let other hosts come without TLS: whoever reaches the address can have a machine run here
    #[arg(long, conflicts_with = "tls")]
    unprotected: bool,
    /// The tap of the guest's first network interface here; each one given is that of one more [default: as at the source]
    #[arg(long = "tap", value_name = "TAP")]
    taps: Vec<String>,
    /// The image of the guest's first disk here; each one given is that of one more [default: as at the source]
    #[arg(long = "disk", value_name = "PATH")]
    disks: Vec<PathBuf>,
    /// The socket of the guest's first port here; each one given is that of one more [default: as at the source]
    #[arg(long = "port", value_name = "PATH")]
    ports: Vec<PathBuf>,
    /// The serial console: stdio, off, or file=PATH (output only, behind what is there) [default: as at the source]
    #[arg(long, value_name = "WHERE", value_parser = parse_console)]
    console: Option<ConsoleConfig>,
    /// The hypervisor's device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: PathBuf,
}

/// Waits for a guest, and runs it to its end.
///
/// # Errors
/// Nobody can come to the address; the migration failed when the machine was there; the guest cannot go on.
pub fn receive(args: Args) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let name = args.name.or(args.named);
    let reception = Reception::open(ReceptionRequest {
        listen: args.listen,
        tls: args.tls.map(|directory| TlsRequest {
            directory,
            peer_name: args.tls_peer_name,
        }),
        unprotected: args.unprotected,
        changes: Changes {
            name: name.clone(),
            console: args.console,
            taps: args.taps,
            disks: args.disks,
            ports: args.ports,
        },
    })?;
    until_its_end(
        &args.kvm,
        name.as_deref(),
        Beginning::Receive(Box::new(reception)),
    )
}
