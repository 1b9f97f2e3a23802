//! `tagvisor run`: starts a machine and runs it to its end.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args as ClapArgs;
use vmm::config::{DiskConfig, MachineConfig, MemorySize, MteConfig, NetConfig, PortConfig};
use vmm::console::ConsoleConfig;
use vmm::machine::Ending;
use vmm::memory::TagAccess;

use crate::api::serve;
use crate::configuration;
use crate::control::Vmm;
use crate::life::{Beginning, End, Life, Orders};
use crate::name::Name;
use crate::signals::EndingSignals;

/// The machine was ended from outside, before its guest ended it.
const ENDED_FROM_OUTSIDE: u8 = 3;

/// The guest is at another host.
const MOVED: u8 = 4;

/// What the program's exit statuses mean.
pub const EXIT_STATUS: &str = "\
Exit status:
  0  the guest switched the machine off (or reset it, with --no-reboot)
  1  the machine could not be started, or could not go on; standard error says why
  2  the command line is wrong
  3  the machine was ended from outside: Ctrl-] q, SIGTERM, SIGINT, SIGHUP or SIGQUIT
  4  the guest is at another host now: it was migrated
  128 and more: a second of these signals ended Tagvisor at once; its number is added to 128

On a terminal, Ctrl-] q ends the machine; every other key goes to the guest.";

/// What to run.
#[derive(ClapArgs)]
#[command(after_help = EXIT_STATUS)]
pub struct Args {
    /// Read the machine from a TOML or JSON (*.json) file; its keys are the long options' names.
    /// Options given beside it go before the file's; disks, nets and ports are added to the file's
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The machine's name, unique among those that run [default: tagvisor-PID]
    #[arg(long)]
    name: Option<String>,
    /// An arm64 Linux kernel: Image, plain or compressed with gzip or zstd
    #[arg(long, value_name = "FILE", conflicts_with = "flat")]
    kernel: Option<PathBuf>,
    /// The initial RAM file system for the kernel
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line; the serial console is ttyS0
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// A bare-metal payload instead of a kernel: loaded at the start of RAM (0x40000000) and entered
    /// at its first byte, at EL1 with the MMU off and the device tree's address in x0
    #[arg(long, value_name = "FILE")]
    flat: Option<PathBuf>,
    /// How many CPUs the guest has [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// The guest's memory, such as 512M or 2G [default: 512M]
    #[arg(long, value_name = "SIZE")]
    memory: Option<MemorySize>,
    /// Back the guest's memory with huge pages of 2 MiB
    #[arg(long)]
    huge_pages: bool,
    /// Memory tagging: off, on (what the host has), or 2 or 3 (exactly that level) [default: on]
    #[arg(long, value_name = "off|on|LEVEL")]
    mte: Option<MteConfig>,
    /// How tags are reached from outside of the guest: auto, alias (a second mapping), ioctl (the kernel copies) [default: auto]
    #[arg(long, value_name = "METHOD", value_parser = parse_tag_access)]
    tag_access: Option<TagAccess>,
    /// The serial console: stdio, off, or file=PATH (output only) [default: stdio]
    #[arg(long, value_name = "WHERE", value_parser = parse_console)]
    console: Option<ConsoleConfig>,
    /// A disk from a raw image or block device: PATH[,readonly][,overlay[=FILE]][,id=SERIAL]; each one given adds a disk.
    /// With an overlay, what the guest writes goes to FILE, or without it to a file that ends with the machine, and
    /// any number of machines can use the image
    #[arg(long, value_name = "DISK")]
    disk: Vec<DiskConfig>,
    /// A network interface on an existing tap: TAP[,mac=ADDRESS][,mtu=BYTES]; each one given adds an interface
    #[arg(long, value_name = "NET")]
    net: Vec<NetConfig>,
    /// A port for talk between host and guest: NAME,socket=PATH; the guest finds
    /// /dev/virtio-ports/NAME, the host a Unix socket; each one given adds a port
    #[arg(long, value_name = "PORT")]
    port: Vec<PortConfig>,
    /// End, instead of starting over, when the guest resets the machine
    #[arg(long)]
    no_reboot: bool,
    /// The hypervisor's device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: PathBuf,
}

fn parse_tag_access(text: &str) -> Result<TagAccess, String> {
    match text {
        "auto" => Ok(TagAccess::Auto),
        "alias" => Ok(TagAccess::Alias),
        "ioctl" => Ok(TagAccess::Ioctl),
        _ => Err("expected `auto`, `alias` or `ioctl`".into()),
    }
}

/// Reads `--console`.
pub fn parse_console(text: &str) -> Result<ConsoleConfig, String> {
    text.to_owned().try_into()
}

impl Args {
    /// The configuration file's machine, changed by the command line.
    fn machine(self) -> Result<MachineConfig, configuration::Error> {
        let mut machine = match &self.config {
            Some(path) => configuration::read(path)?,
            None => MachineConfig::default(),
        };
        // What to start is one choice: a payload given here replaces a kernel in the file, and the other way round.
        if self.flat.is_some() {
            (machine.kernel, machine.initrd) = (None, None);
        } else if self.kernel.is_some() {
            machine.flat = None;
        }
        replace(&mut machine.name, self.name.map(Some));
        replace(&mut machine.kernel, self.kernel.map(Some));
        replace(&mut machine.initrd, self.initrd.map(Some));
        replace(&mut machine.cmdline, self.cmdline);
        replace(&mut machine.flat, self.flat.map(Some));
        replace(&mut machine.cpus, self.cpus);
        replace(&mut machine.memory, self.memory);
        replace(&mut machine.mte, self.mte);
        replace(&mut machine.tag_access, self.tag_access);
        replace(&mut machine.console, self.console);
        machine.disk.extend(self.disk);
        machine.net.extend(self.net);
        machine.port.extend(self.port);
        machine.huge_pages |= self.huge_pages;
        machine.no_reboot |= self.no_reboot;
        Ok(machine)
    }
}

fn replace<T>(value: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *value = given;
    }
}

/// Runs a machine to its end.
///
/// # Errors
/// It cannot be started, or cannot go on.
pub fn run(args: Args) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let kvm = args.kvm.clone();
    let config = args.machine()?;
    let name = config.name.clone();
    until_its_end(&kvm, name.as_deref(), Beginning::Boot(config))
}

/// Runs a VMM that has a name, and under it a control socket, until it is told to end or its guest ends.
///
/// # Errors
/// The name cannot be had; its machine cannot be started, or cannot go on.
pub fn until_its_end(
    kvm: &Path,
    name: Option<&str>,
    beginning: Beginning,
) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let default_name = format!("tagvisor-{}", std::process::id());
    // Before any thread is started: they inherit what is blocked.
    let signals = EndingSignals::block()?;
    let name = Name::take(name.unwrap_or(&default_name))?;
    Ok(match serving(&name.socket(), signals, kvm, beginning)? {
        End::Machine(Ending::Off | Ending::Reset) => ExitCode::SUCCESS,
        End::Machine(Ending::Asked | Ending::Interrupted) => ENDED_FROM_OUTSIDE.into(),
        End::Moved => MOVED.into(),
    })
}

/// Runs a VMM without a machine, driven over `socket`, until it is told to end.
///
/// # Errors
/// The socket cannot be had, or the host runs no machines.
pub fn empty(kvm: &Path, socket: &Path) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let signals = EndingSignals::block()?;
    serving(socket, signals, kvm, Beginning::Empty)?;
    Ok(ExitCode::SUCCESS)
}

fn serving(
    socket: &Path,
    signals: EndingSignals,
    kvm: &Path,
    beginning: Beginning,
) -> Result<End, Box<dyn std::error::Error>> {
    let (life, orders) = Life::new();
    let on_signal = life.clone();
    signals.on_first(move || on_signal.shut_down_vmm())?;
    let _server = serve(socket, Arc::new(life))?;
    carry_out(kvm, orders, beginning)
}

#[cfg(target_arch = "aarch64")]
fn carry_out(
    kvm: &Path,
    orders: Orders,
    beginning: Beginning,
) -> Result<End, Box<dyn std::error::Error>> {
    let hypervisor = engine::kvm::KvmHypervisor::open(kvm)?;
    Ok(orders.carry_out(&hypervisor, beginning)?)
}

#[cfg(not(target_arch = "aarch64"))]
fn carry_out(_: &Path, _: Orders, _: Beginning) -> Result<End, Box<dyn std::error::Error>> {
    Err(crate::NOT_AN_ARM_HOST.into())
}
