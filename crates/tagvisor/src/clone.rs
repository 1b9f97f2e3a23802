//! `tagvisor clone`: many machines from one snapshot, which share its memory until they write.
//!
//! The program that is called makes the memory once, and starts a process for each clone, which inherits the memory
//! file and, in another, the machine's state. What a clone must not share with the others it is given: its name, and
//! with it its socket, MAC addresses, a new generation ID, and an overlay for each disk that it may write.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use clap::Args as ClapArgs;
use rustix::fs::MemfdFlags;
use rustix::io::FdFlags;
use vmm::config::{DiskConfig, MachineConfig, OverlayConfig};
use vmm::console::ConsoleConfig;
use vmm::machine::snapshot::{self, ReadError, SavedMachine};
use vmm::memory::base::Base;

use crate::api::model::SnapshotConfig;
use crate::commands::Machine;
use crate::control::VmState;
use crate::life::{Beginning, Cloning};
use crate::name::{self, Running};
use crate::run::until_its_end;

/// Most clones that one call starts.
const MAX_COUNT: u32 = 1024;

/// What to clone, and how often.
#[derive(ClapArgs)]
pub struct Args {
    /// A snapshot, or the name of a machine that runs or is paused; that one goes on as it was
    #[arg(value_name = "FILE|NAME")]
    source: PathBuf,
    /// How many machines to start
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_COUNT)))]
    count: u32,
    /// A snapshot that FILE, or one that FILE is based on, is based on; each one given is one more
    #[arg(long = "base", value_name = "FILE")]
    bases: Vec<PathBuf>,
    /// The clones' names, %i being the clone's number [default: the name that the machine had, and -%i]
    #[arg(long, value_name = "PATTERN")]
    name: Option<String>,
    /// Their serial consoles: off, or file=PATH, in which %i is the clone's number
    #[arg(long, value_name = "WHERE", default_value = "off")]
    console: String,
    /// The tap interface of their first network interface, %i being the clone's number; each one given is that of one more
    #[arg(long = "tap", value_name = "PATTERN")]
    taps: Vec<String>,
    /// Let the guests stand still until `tagvisor resume`
    #[arg(long)]
    paused: bool,
    /// Return when all clones run, rather than when all have ended
    #[arg(long)]
    detach: bool,
    /// The hypervisor's device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: PathBuf,
}

/// One clone, as the process that starts it says.
#[derive(ClapArgs)]
pub struct OneArgs {
    /// The descriptor of the memory file
    #[arg(long)]
    base: RawFd,
    /// The descriptor of the machine's state
    #[arg(long)]
    machine: RawFd,
    /// Let the guest stand still
    #[arg(long)]
    paused: bool,
    /// The hypervisor's device
    #[arg(long)]
    kvm: PathBuf,
}

/// Why there are no clones.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The source is none.
    #[error("snapshot {file}: {source}")]
    Snapshot {
        /// Which.
        file: PathBuf,
        /// What is wrong.
        source: ReadError,
    },
    /// All would be called the same.
    #[error("--{option} {pattern}: it has no %i, so all clones would have the same")]
    NoNumber {
        /// Which option.
        option: &'static str,
        /// What was given.
        pattern: String,
    },
    /// The console of a clone.
    #[error(
        "--console {0}: expected `off` or `file=PATH`, with %i in PATH: clones have no terminal"
    )]
    Console(String),
    /// Interfaces that clones would share.
    #[error(
        "the machine has {wanted} network interfaces: give each clone taps of its own, with --tap PATTERN for each, such as --tap tap%i"
    )]
    Taps {
        /// How many there are.
        wanted: usize,
    },
    /// Ports that clones would share.
    #[error(
        "port {0}: its socket has no %i, so clones would share it; clones of machines with ports need sockets named so"
    )]
    Port(String),
    /// A disk that clones would share.
    #[error(
        "disk {0} has an overlay, and a clone would need one on top of that, which Tagvisor has not"
    )]
    Overlay(PathBuf),
    /// A clone did not come up.
    #[error("clone {name} ended before it ran ({status}); what it said is above")]
    Ended {
        /// Which.
        name: String,
        /// How.
        status: std::process::ExitStatus,
    },
}

/// Starts clones, and waits until they have ended, or run.
///
/// # Errors
/// A clone cannot be started. Those that were are ended.
pub fn clone(args: &Args) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let (saved, base) = source(args)?;
    let configs: Vec<MachineConfig> = (1..=args.count)
        .map(|number| config_of(&saved.config, number, args))
        .collect::<Result<_, _>>()?;
    let base = inheritable(base.file().try_clone()?.into())?;
    let mut clones = Clones(Vec::with_capacity(configs.len()));
    for config in configs {
        let name = config.name.clone().unwrap_or_default();
        let machine = SavedMachine {
            config,
            ..saved.clone()
        };
        clones.0.push((name, start(&base, &machine, args)?));
    }
    clones.wait_until_they_run()?;
    for (name, child) in &clones.0 {
        println!("{name}  {}", child.id());
    }
    let children = std::mem::take(&mut clones.0);
    if args.detach {
        return Ok(ExitCode::SUCCESS);
    }
    let mut result = ExitCode::SUCCESS;
    for (name, mut child) in children {
        let status = child.wait()?;
        if !status.success() {
            tracing::warn!("clone {name} ended with {status}");
            result = ExitCode::FAILURE;
        }
    }
    Ok(result)
}

/// The machine to be cloned, and its memory.
fn source(args: &Args) -> Result<(SavedMachine, Base), Box<dyn std::error::Error>> {
    if !args.source.exists()
        && let Some(name) = args.source.to_str()
        && !name.contains('/')
    {
        let machine = Machine::find(name)?;
        // On the file system of the runtime directory, which is memory, beside the machine's own files.
        let directory = tempfile::tempdir_in(name::runtime_directory())?;
        let file = directory.path().join("snapshot");
        machine.ask(|client| {
            client.snapshot(&SnapshotConfig {
                destination_url: format!("file://{}", file.display()),
                base: None,
                compression: Some("none".into()),
                report: true,
            })
        })?;
        return Ok(open(&file, &[])?);
    }
    Ok(open(&args.source, &args.bases)?)
}

fn open(file: &Path, bases: &[PathBuf]) -> Result<(SavedMachine, Base), Error> {
    let error = |source| Error::Snapshot {
        file: file.into(),
        source,
    };
    let snapshot = snapshot::open(file, bases).map_err(|e| error(e.into()))?;
    let saved = SavedMachine::read(&snapshot).map_err(error)?;
    saved.check_disks().map_err(error)?;
    let base =
        snapshot::base_of(&snapshot, &saved).map_err(|e| error(ReadError::Memory(e.into())))?;
    Ok((saved, base))
}

/// The configuration of clone `number`.
fn config_of(saved: &MachineConfig, number: u32, args: &Args) -> Result<MachineConfig, Error> {
    let with_number = |option, pattern: &str| match pattern.contains("%i") || args.count == 1 {
        true => Ok(pattern.replace("%i", &number.to_string())),
        false => Err(Error::NoNumber {
            option,
            pattern: pattern.into(),
        }),
    };
    let mut config = saved.clone();
    let default_name = format!("{}-%i", saved.name.as_deref().unwrap_or("clone"));
    let name = args.name.as_deref().unwrap_or(&default_name);
    config.name = Some(with_number("name", name)?);
    config.console = match args.console.as_str() {
        "off" => ConsoleConfig::Off,
        file if file.starts_with("file=") => {
            let path = with_number("console", &file["file=".len()..])?;
            ConsoleConfig::File(std::path::absolute(&path).unwrap_or_else(|_| path.into()))
        }
        other => return Err(Error::Console(other.into())),
    };
    if config.net.len() != args.taps.len() {
        return Err(Error::Taps {
            wanted: config.net.len(),
        });
    }
    for (net, tap) in config.net.iter_mut().zip(&args.taps) {
        net.tap = with_number("tap", tap)?;
        net.mac = None;
    }
    for port in &mut config.port {
        let socket = port.socket.to_string_lossy().into_owned();
        port.socket = with_number("port", &socket)
            .map_err(|_| Error::Port(port.name.clone()))?
            .into();
    }
    for disk in &mut config.disk {
        disk.overlay = overlay_of(disk)?;
    }
    Ok(config)
}

/// The overlay that a clone's disk gets.
fn overlay_of(disk: &DiskConfig) -> Result<Option<OverlayConfig>, Error> {
    match &disk.overlay {
        Some(_) => Err(Error::Overlay(disk.path.clone())),
        None if disk.readonly => Ok(None),
        None => Ok(Some(OverlayConfig::Temporary)),
    }
}

/// A descriptor that programs which are started have, too.
fn inheritable(file: OwnedFd) -> rustix::io::Result<OwnedFd> {
    rustix::io::fcntl_setfd(&file, FdFlags::empty())?;
    Ok(file)
}

/// Starts the process of a clone.
fn start(
    base: &OwnedFd,
    machine: &SavedMachine,
    args: &Args,
) -> Result<Child, Box<dyn std::error::Error>> {
    let mut state: File = rustix::fs::memfd_create("machine", MemfdFlags::CLOEXEC)?.into();
    state.write_all(&serde_json::to_vec(machine)?)?;
    state.rewind()?;
    let state = inheritable(state.into())?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("clone-machine")
        .args(["--base", &base.as_raw_fd().to_string()])
        .args(["--machine", &state.as_raw_fd().to_string()])
        .arg("--kvm")
        .arg(&args.kvm);
    if args.paused {
        command.arg("--paused");
    }
    if args.detach {
        // Whoever reads what this program says does not wait for the end of its clones.
        command.stdin(Stdio::null()).stdout(Stdio::null());
    }
    Ok(command.spawn()?)
}

/// Clones that are not known to run. Dropping this ends them.
struct Clones(Vec<(String, Child)>);

impl Clones {
    /// Waits until each answers on its socket.
    fn wait_until_they_run(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        const LOOK_EVERY: Duration = Duration::from_millis(5);
        let runtime = name::runtime_directory();
        for (name, child) in &mut self.0 {
            while !runs(&runtime, name, child) {
                if let Some(status) = child.try_wait()? {
                    let name = name.clone();
                    return Err(Error::Ended { name, status }.into());
                }
                thread::sleep(LOOK_EVERY);
            }
        }
        Ok(())
    }
}

/// Whether the machine of this name is that of this process, and exists.
fn runs(runtime: &Path, name: &str, child: &Child) -> bool {
    let Ok(Some(running)) = Running::find(runtime, name) else {
        return false;
    };
    let info = Machine::from(running).ask(|client| {
        let process = client.process()?;
        Ok((process, client.info()?))
    });
    info.is_ok_and(|(process, info)| {
        process.as_raw_nonzero().get() as u32 == child.id() && info.state != VmState::Created
    })
}

impl Drop for Clones {
    fn drop(&mut self) {
        for (_, child) in &mut self.0 {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs one clone to its end: what [`clone`] starts a process for.
///
/// # Errors
/// It cannot be started, or cannot go on.
pub fn run_one(args: &OneArgs) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let base = Base::from_file(&inherited(args.base)?)?;
    let mut state = Vec::new();
    inherited(args.machine)?.read_to_end(&mut state)?;
    let saved: SavedMachine = serde_json::from_slice(&state)?;
    let name = saved.config.name.clone();
    let cloning = Cloning {
        saved: Box::new(saved),
        base,
        paused: args.paused,
    };
    until_its_end(&args.kvm, name.as_deref(), Beginning::Clone(cloning))
}

/// A descriptor that the process was started with.
fn inherited(descriptor: RawFd) -> Result<File, Box<dyn std::error::Error>> {
    // SAFETY: a query; it fails if there is no such descriptor.
    if descriptor <= libc::STDERR_FILENO || unsafe { libc::fcntl(descriptor, libc::F_GETFD) } < 0 {
        return Err(format!(
            "{descriptor} is no descriptor of a clone's; start clones with `tagvisor clone`"
        )
        .into());
    }
    // SAFETY: it is open, and nothing in this process has used it: it came with the process.
    let file = unsafe { OwnedFd::from_raw_fd(descriptor) };
    rustix::io::fcntl_setfd(&file, FdFlags::CLOEXEC)?;
    Ok(file.into())
}
