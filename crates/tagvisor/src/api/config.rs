//! A machine's configuration in Cloud Hypervisor's words, its `VmConfig`, to Tagvisor's and back.
//!
//! Of its many fields those that Tagvisor knows have a place here, beside those that are Tagvisor's own; what becomes of the
//! others is said in [`super::body`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmm::config::{
    DiskConfig as Disk, MachineConfig, MemorySize, MteConfig, NetConfig as Net, OverlayConfig,
    PortConfig,
};
use vmm::console::ConsoleConfig as Console;
use vmm::memory::TagAccess;

use super::body::{Body, Granted, Invalid, invalid};

/// A machine's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmConfig {
    #[serde(default)]
    pub cpus: CpusConfig,
    #[serde(default)]
    pub memory: MemoryConfig,
    #[serde(default)]
    payload: Option<PayloadConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    disks: Option<Vec<DiskConfig>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    net: Option<Vec<NetConfig>>,
    #[serde(default)]
    rng: RngConfig,
    #[serde(default)]
    serial: ConsoleConfig,
    #[serde(default)]
    console: ConsoleConfig,
    /// Ours: the machine's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Ours: the memory tagging that the guest gets.
    #[serde(default = "mte_on")]
    mte: MteConfig,
    /// Ours: how its tags are reached.
    #[serde(default)]
    tag_access: TagAccess,
    /// Ours: ports for talk between host and guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ports: Option<Vec<Port>>,
    /// Ours: the machine ends when its guest resets it.
    #[serde(default)]
    no_reboot: bool,
}

const fn mte_on() -> MteConfig {
    MteConfig::On
}

/// vCPUs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpusConfig {
    pub boot_vcpus: u32,
    pub max_vcpus: u32,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self::of(1)
    }
}

impl CpusConfig {
    fn of(count: u32) -> Self {
        Self {
            boot_vcpus: count,
            max_vcpus: count,
        }
    }

    fn count(&self) -> Result<u32, Invalid> {
        if self.max_vcpus != self.boot_vcpus {
            return Err(invalid(
                "cpus.max_vcpus",
                "Tagvisor adds no vCPUs to a running machine: it has to be the number of `boot_vcpus`",
            ));
        }
        if self.boot_vcpus == 0 {
            return Err(invalid("cpus.boot_vcpus", "a machine has at least one"));
        }
        Ok(self.boot_vcpus)
    }
}

/// RAM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryConfig {
    /// In bytes.
    pub size: u64,
    /// Whatever is asked for: it is always mapped so that its pages could be shared.
    #[serde(default = "shared")]
    shared: bool,
    #[serde(default)]
    hugepages: bool,
    /// In bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hugepage_size: Option<u64>,
}

const fn shared() -> bool {
    true
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            shared: true,
            hugepages: false,
            hugepage_size: None,
        }
    }
}

impl MemoryConfig {
    fn check(&self) -> Result<(), Invalid> {
        match self.hugepage_size {
            None => Ok(()),
            Some(size) if self.hugepages && size == 2 << 20 => Ok(()),
            Some(_) => Err(invalid(
                "memory.hugepage_size",
                "with `hugepages` they have 2 MiB (2097152) here",
            )),
        }
    }
}

/// What is booted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct PayloadConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cmdline: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    initramfs: Option<PathBuf>,
    /// Ours: a bare-metal payload instead of a kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    flat: Option<PathBuf>,
}

impl PayloadConfig {
    fn check(&self) -> Result<(), Invalid> {
        match (&self.kernel, &self.flat) {
            (None, None) => Err(invalid(
                "payload",
                "it names neither a `kernel` nor a `flat` payload",
            )),
            (Some(_), Some(_)) => Err(invalid(
                "payload.flat",
                "there is a `kernel` as well: give one of them",
            )),
            _ => Ok(()),
        }
    }
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct DiskConfig {
    path: PathBuf,
    readonly: bool,
    /// By which the guest finds it.
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    /// Ours: where its writes go, if not to the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    overlay: Option<OverlayConfig>,
    /// Accepted and not kept: it names a disk for those who would remove it.
    #[serde(skip_serializing)]
    id: Option<String>,
}

impl DiskConfig {
    fn disk(self, path: &str) -> Result<Disk, Invalid> {
        if self.path.as_os_str().is_empty() {
            return Err(invalid(
                format!("{path}path"),
                "it has to name a raw image or a block device",
            ));
        }
        Ok(Disk {
            path: self.path,
            readonly: self.readonly,
            id: self.serial,
            overlay: self.overlay,
        })
    }
}

impl From<&Disk> for DiskConfig {
    fn from(disk: &Disk) -> Self {
        Self {
            path: disk.path.clone(),
            readonly: disk.readonly,
            serial: disk.id.clone(),
            overlay: disk.overlay.clone(),
            ..Self::default()
        }
    }
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct NetConfig {
    tap: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<vmm::virtio::net::MacAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u16>,
    /// Accepted and not kept, as a disk's.
    #[serde(skip_serializing)]
    id: Option<String>,
}

impl NetConfig {
    fn net(self, path: &str) -> Result<Net, Invalid> {
        if self.tap.is_empty() {
            return Err(invalid(
                format!("{path}tap"),
                "it has to name a tap interface of the host, which exists",
            ));
        }
        Ok(Net {
            tap: self.tap,
            mac: self.mac,
            mtu: self.mtu,
        })
    }
}

impl From<&Net> for NetConfig {
    fn from(net: &Net) -> Self {
        Self {
            tap: net.tap.clone(),
            mac: net.mac,
            mtu: net.mtu,
            ..Self::default()
        }
    }
}

/// A port for talk between host and guest. Ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Port {
    name: String,
    socket: PathBuf,
}

/// Random numbers, which every machine has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct RngConfig {
    src: PathBuf,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: "/dev/urandom".into(),
        }
    }
}

impl RngConfig {
    fn check(&self) -> Result<(), Invalid> {
        if self.src != Self::default().src {
            return Err(invalid(
                "rng.src",
                "random numbers come from the host's kernel, `/dev/urandom`",
            ));
        }
        Ok(())
    }
}

/// Where a console is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum ConsoleMode {
    Off,
    Pty,
    Tty,
    File,
    Socket,
    #[default]
    Null,
}

/// A console.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ConsoleConfig {
    mode: ConsoleMode,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
}

impl ConsoleConfig {
    /// Of the serial console.
    pub fn console(&self) -> Result<Console, Invalid> {
        match (self.mode, &self.file) {
            (ConsoleMode::Off | ConsoleMode::Null, _) => Ok(Console::Off),
            (ConsoleMode::Tty, _) => Ok(Console::Stdio),
            (ConsoleMode::File, Some(file)) => Ok(Console::File(file.clone())),
            (ConsoleMode::File, None) => Err(invalid(
                "serial.file",
                "`mode` is `File`, and it names none",
            )),
            (ConsoleMode::Pty | ConsoleMode::Socket, _) => Err(invalid(
                "serial.mode",
                "a console is `Off`, `Null`, `Tty` (standard input and output) or `File` here",
            )),
        }
    }

    /// Of the second console, which no machine has.
    fn refuse_second(&self) -> Result<(), Invalid> {
        match self.mode {
            ConsoleMode::Off | ConsoleMode::Null => Ok(()),
            _ => Err(invalid(
                "console.mode",
                "the machine's console is the serial one: describe it as `serial`, and let this be `Off`",
            )),
        }
    }
}

impl From<&Console> for ConsoleConfig {
    fn from(console: &Console) -> Self {
        let (mode, file) = match console {
            Console::Off => (ConsoleMode::Null, None),
            Console::Stdio => (ConsoleMode::Tty, None),
            Console::File(file) => (ConsoleMode::File, Some(file.clone())),
        };
        Self { mode, file }
    }
}

impl Body for VmConfig {
    const GRANTED: &'static [Granted] = &[
        ("cpus.core_scheduling", &[r#""Vm""#]),
        ("cpus.max_phys_bits", &["46"]),
        // No guest gets EL2, whatever is said.
        ("cpus.nested", &["true", "false"]),
        ("cpus.profile", &[r#""Host""#]),
        ("memory.hotplug_method", &[r#""Acpi""#]),
        ("memory.hotplug_size", &["0"]),
        ("memory.hotplugged_size", &["0"]),
        ("memory.thp", &["true"]),
        // They say how not to read the disk, and it is not read so.
        ("disks[].disable_aio", &["true", "false"]),
        ("disks[].disable_io_uring", &["true", "false"]),
        ("disks[].image_type", &[r#""Raw""#, r#""Unknown""#]),
        ("disks[].lock_granularity", &[r#""ByteRange""#]),
        ("disks[].num_queues", &["1"]),
        ("disks[].pci_segment", &["0"]),
        ("disks[].queue_size", &["128", "256"]),
        ("disks[].sparse", &["true"]),
        ("net[].num_queues", &["2"]),
        ("net[].offload_csum", &["true"]),
        ("net[].offload_tso", &["true"]),
        ("net[].offload_ufo", &["true"]),
        ("net[].pci_segment", &["0"]),
        ("net[].queue_size", &["256"]),
        ("net[].vhost_mode", &[r#""Client""#]),
        ("rng.pci_segment", &["0"]),
        ("console.pci_segment", &["0"]),
    ];
}

impl VmConfig {
    /// The machine that this describes.
    ///
    /// # Errors
    /// It asks for what Tagvisor cannot do.
    pub fn machine(self) -> Result<MachineConfig, Invalid> {
        self.memory.check()?;
        self.rng.check()?;
        self.console.refuse_second()?;
        let payload = self.payload.unwrap_or_default();
        payload.check()?;
        let mut disk = Vec::new();
        for (number, config) in self.disks.unwrap_or_default().into_iter().enumerate() {
            disk.push(config.disk(&format!("disks[{number}]."))?);
        }
        let mut net = Vec::new();
        for (number, config) in self.net.unwrap_or_default().into_iter().enumerate() {
            net.push(config.net(&format!("net[{number}]."))?);
        }
        let ports = self.ports.unwrap_or_default().into_iter();
        Ok(MachineConfig {
            name: self.name,
            kernel: payload.kernel,
            initrd: payload.initramfs,
            cmdline: payload.cmdline.unwrap_or_default(),
            flat: payload.flat,
            cpus: self.cpus.count()?,
            memory: MemorySize(self.memory.size),
            huge_pages: self.memory.hugepages,
            mte: self.mte,
            tag_access: self.tag_access,
            console: self.serial.console()?,
            disk,
            net,
            port: ports
                .map(|Port { name, socket }| PortConfig { name, socket })
                .collect(),
            no_reboot: self.no_reboot,
        })
    }
}

impl From<&MachineConfig> for VmConfig {
    fn from(machine: &MachineConfig) -> Self {
        let cmdline = Some(machine.cmdline.clone()).filter(|text| !text.is_empty());
        let ports = machine.port.iter().map(|port| Port {
            name: port.name.clone(),
            socket: port.socket.clone(),
        });
        Self {
            cpus: CpusConfig::of(machine.cpus),
            memory: MemoryConfig {
                size: machine.memory.0,
                hugepages: machine.huge_pages,
                ..MemoryConfig::default()
            },
            payload: Some(PayloadConfig {
                kernel: machine.kernel.clone(),
                cmdline,
                initramfs: machine.initrd.clone(),
                flat: machine.flat.clone(),
            }),
            disks: unless_empty(machine.disk.iter().map(DiskConfig::from)),
            net: unless_empty(machine.net.iter().map(NetConfig::from)),
            serial: ConsoleConfig::from(&machine.console),
            name: machine.name.clone(),
            mte: machine.mte,
            tag_access: machine.tag_access,
            ports: unless_empty(ports),
            no_reboot: machine.no_reboot,
            rng: RngConfig::default(),
            console: ConsoleConfig::default(),
        }
    }
}

fn unless_empty<T>(items: impl Iterator<Item = T>) -> Option<Vec<T>> {
    Some(items.collect::<Vec<_>>()).filter(|items| !items.is_empty())
}
