//! Putting a machine together: from the configuration to vCPUs that stand at their first instruction.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use engine::{
    Capabilities, GicLayout, Hypervisor, Ppi, RegisterId, Spi, Vcpu, VcpuFeatures, VcpuState, Vm,
};
use mte::MteFeatures;
use vm_memory::{Bytes, GuestAddress};
use vm_superio::Trigger;

use super::{Error, VcpuOf, VmOf, cpu};
use crate::boot::{self, Loaded};
use crate::bus::{Bus, MmioDevice};
use crate::config::{DiskConfig, MachineConfig, MemorySize, MteConfig, NetConfig, OverlayConfig};
use crate::console::{Connection, Console};
use crate::devices::generation::{Generation, GenerationId};
use crate::devices::rtc::RealTimeClock;
use crate::devices::serial::{FirstState, SerialPort};
use crate::fdt;
use crate::layout::{self, DEVICE_SIZE};
use crate::memory::base::Base;
use crate::memory::{GuestMemory, MemoryPlan};
use crate::terminal::Command;
use crate::virtio::block::{Access, Block, DiskError, Image, OverlayPlace, Serial};
use crate::virtio::console::{Console as VirtioConsole, Port};
use crate::virtio::mmio::MmioTransport;
use crate::virtio::net::{Announcer, MacAddr, Net, Tap, TapSource};
use crate::virtio::rng::Rng;
use crate::virtio::{IrqLine, VirtioDevice};

/// The parts of a machine.
pub(super) struct Parts<H: Hypervisor> {
    pub vcpus: Vec<VcpuOf<H>>,
    pub cpu: VcpuState,
    pub bus: Arc<Bus>,
    pub serial: Arc<MachinePort<VmOf<H>>>,
    pub clock: Arc<RealTimeClock>,
    pub generation: Generation<SpiLine<VmOf<H>>>,
    pub virtio: Vec<Arc<MmioTransport>>,
    pub disks: Vec<Arc<Image>>,
    pub announcers: Arc<[Announcer]>,
    pub mte: Option<MteFeatures>,
    pub vm: Arc<VmOf<H>>,
    pub memory: GuestMemory,
    pub console: Connection,
}

/// Where a machine begins.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    /// At the first instruction of what the configuration names.
    Boot,
    /// Where another machine will stand, whose memory and state are still to come.
    Awaiting,
    /// Where another machine stood, whose state and memory come at once.
    Restored,
    /// The same, with the memory of this base.
    Cloned(&'a Base),
}

/// Builds all parts of a machine, its serial port on `console`; the user's commands there go to `on_command`.
pub(super) fn assemble<H: Hypervisor>(
    hypervisor: &H,
    config: &MachineConfig,
    start: Start<'_>,
    console: &mut Console,
    on_command: impl Fn(Command) + Send + 'static,
) -> Result<Parts<H>, Error> {
    let host = hypervisor.capabilities();
    let mte = guest_mte(host, config.mte)?;
    check_cpus(host, config.cpus)?;
    check_memory(host, config.memory)?;
    let memory = guest_memory(host, config, mte.is_some(), start)?;
    let loaded = match start {
        Start::Boot => Some(load(&memory, config)?),
        Start::Awaiting | Start::Restored | Start::Cloned(_) => None,
    };

    // SAFETY: the memory is in `Parts` and then in `Machine`, which deletes the slot before it drops
    // the memory; if this function fails, no vCPU ever runs.
    let vm = Arc::new(unsafe { memory.new_vm(hypervisor, mte.is_some()) }?);

    let features = vcpu_features(host);
    let vcpus = create_vcpus(&*vm, config.cpus, features)?;
    let gic = GicLayout {
        distributor: layout::GIC_DISTRIBUTOR,
        redistributors: layout::GIC_REDISTRIBUTORS,
        vcpus: config.cpus,
        spis: layout::SPIS,
    };
    vm.create_gic(&gic)?;
    if features.pmu {
        init_pmus(&vcpus)?;
    }

    let mut bus = Bus::default();
    let disks = open_disks(config, start)?;
    let nets = net_devices(config)?;
    let announcers = nets.iter().map(Net::announcer).collect();
    let virtio = add_virtio(
        &mut bus,
        virtio_devices(config, &disks, nets)?,
        &vm,
        &memory,
    )?;
    let first = match start {
        Start::Boot => FirstState::Reset,
        Start::Awaiting | Start::Restored | Start::Cloned(_) => FirstState::Awaited,
    };
    let (serial, console) = add_serial_port(&mut bus, &vm, console, on_command, first)?;
    let clock = Arc::new(RealTimeClock::new());
    bus.add(layout::RTC, DEVICE_SIZE, clock.clone());
    let generation = add_generation(&vm)?;

    if let Some(loaded) = &loaded {
        let description = fdt::Description {
            ram_size: memory.size(),
            cmdline: &config.cmdline,
            initrd: loaded.initrd,
            affinities: &affinities(&vcpus)?,
            gic,
            pmu: features.pmu,
            virtio_devices: virtio.len() as u32,
            seed: random_seed().map_err(|source| Error::Host {
                step: "reading /dev/urandom",
                source,
            })?,
        };
        write_device_tree(&memory, loaded, &description)?;
        check_page_size(&vcpus, loaded)?;
        cpu::hide_timed_waits(&vcpus)?;
        enter(&vcpus, loaded)?;
    }
    Ok(Parts {
        cpu: cpu::identity(boot_cpu(&vcpus)?)?,
        vcpus,
        bus: Arc::new(bus),
        serial,
        clock,
        generation,
        virtio,
        disks,
        announcers,
        mte,
        vm,
        memory,
        console,
    })
}

fn guest_memory(
    host: &Capabilities,
    config: &MachineConfig,
    mte: bool,
    start: Start<'_>,
) -> Result<GuestMemory, Error> {
    let (access, huge_pages) = (config.tag_access, config.huge_pages);
    if let Start::Cloned(base) = start {
        MemoryPlan::choose_for_clone(mte, access, huge_pages)?;
        if base.size() != config.memory.0 {
            return Err(Error::OtherBase {
                base: MemorySize(base.size()),
                wanted: config.memory,
            });
        }
        return Ok(GuestMemory::clone_of(base)?);
    }
    let plan = MemoryPlan::choose(host, mte, access, huge_pages)?;
    Ok(GuestMemory::new(config.memory.0, plan)?)
}

fn guest_mte(host: &Capabilities, wanted: MteConfig) -> Result<Option<MteFeatures>, Error> {
    let offered = host.mte.map(|support| support.features);
    match (wanted, offered) {
        (MteConfig::Off, _) => Ok(None),
        (_, None) => Err(engine::Error::MteUnsupported.into()),
        (MteConfig::Level(wanted), Some(offered)) if offered.level() != wanted => {
            Err(Error::MteLevel { wanted, offered })
        }
        (_, Some(offered)) => Ok(Some(offered)),
    }
}

fn check_cpus(host: &Capabilities, wanted: u32) -> Result<(), Error> {
    if !host.gic_v3 {
        return Err(Error::NoGicV3);
    }
    let offered = host.max_vcpus.min(layout::MAX_VCPUS);
    match wanted {
        0 => Err(Error::Cpus { wanted, offered }),
        _ if wanted > offered => Err(Error::Cpus { wanted, offered }),
        _ => Ok(()),
    }
}

/// Before any is had: even the bookkeeping of absurd sizes is large.
fn check_memory(host: &Capabilities, wanted: MemorySize) -> Result<(), Error> {
    let offered = layout::max_ram(host.ipa_bits);
    if wanted.0 > offered {
        return Err(Error::MemoryTooLarge {
            wanted,
            offered: MemorySize(offered),
        });
    }
    Ok(())
}

fn load(memory: &GuestMemory, config: &MachineConfig) -> Result<Loaded, Error> {
    let (ram, size) = (memory.ram(), memory.size());
    match (&config.kernel, &config.flat) {
        (Some(kernel), None) => {
            boot::check_command_line(&config.cmdline)?;
            Ok(boot::load_kernel(
                ram,
                size,
                kernel,
                config.initrd.as_deref(),
            )?)
        }
        (None, Some(_)) if config.initrd.is_some() => Err(Error::Boot(
            "--initrd goes with --kernel, not with --flat: a payload has no boot protocol that would name it",
        )),
        (None, Some(flat)) => Ok(boot::load_flat(ram, size, flat)?),
        (None, None) => Err(Error::Boot(
            "nothing to start: give a kernel with --kernel, or a bare-metal payload with --flat",
        )),
        (Some(_), Some(_)) => Err(Error::Boot(
            "--kernel and --flat exclude each other: a machine starts one thing",
        )),
    }
}

fn vcpu_features(host: &Capabilities) -> VcpuFeatures {
    VcpuFeatures {
        aarch32_el1: false,
        powered_off: false,
        sve: host.sve,
        pointer_authentication: host.pointer_authentication,
        pmu: host.pmu,
    }
}

fn create_vcpus<V: Vm>(vm: &V, count: u32, features: VcpuFeatures) -> Result<Vec<V::Vcpu>, Error> {
    (0..count)
        .map(|index| {
            let features = VcpuFeatures {
                powered_off: index != 0,
                ..features
            };
            Ok(vm.create_vcpu(index, features)?)
        })
        .collect()
}

fn init_pmus(vcpus: &[impl Vcpu]) -> Result<(), Error> {
    const INTERRUPT: Ppi = Ppi::new(layout::PMU_PPI).unwrap();
    for vcpu in vcpus {
        vcpu.init_pmu(INTERRUPT)?;
    }
    Ok(())
}

/// The affinity fields of each vCPU's MPIDR_EL1, by which device tree and PSCI name it.
fn affinities(vcpus: &[impl Vcpu]) -> Result<Vec<u64>, Error> {
    const AFFINITY: u64 = 0xff_00ff_ffff;
    vcpus
        .iter()
        .map(|vcpu| Ok(vcpu.register_u64(RegisterId::MPIDR_EL1)? & AFFINITY))
        .collect()
}

/// Devices of the configuration's kinds, in the order in which the guest finds them.
fn virtio_devices(
    config: &MachineConfig,
    disks: &[Arc<Image>],
    nets: Vec<Net<Tap>>,
) -> Result<Vec<Box<dyn VirtioDevice>>, Error> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for (index, (disk, image)) in config.disk.iter().zip(disks).enumerate() {
        devices.push(Box::new(block_device(index, disk, image.clone())?));
    }
    for net in nets {
        devices.push(Box::new(net));
    }
    if !config.port.is_empty() {
        let ports = config
            .port
            .iter()
            .map(|port| Port::listen(&port.name, &port.socket))
            .collect::<Result<Vec<_>, _>>()?;
        devices.push(Box::new(VirtioConsole::new("ports", ports)?));
    }
    devices.push(Box::new(Rng::new("rng")));
    if devices.len() > layout::MAX_VIRTIO_DEVICES as usize {
        return Err(Error::TooManyDevices {
            wanted: devices.len(),
            offered: layout::MAX_VIRTIO_DEVICES,
        });
    }
    Ok(devices)
}

/// Opens the disks, which another machine has while this one awaits its guest.
fn open_disks(config: &MachineConfig, start: Start<'_>) -> Result<Vec<Arc<Image>>, Error> {
    let open = match start {
        Start::Awaiting => open_unclaimed,
        Start::Boot | Start::Restored | Start::Cloned(_) => open_claimed,
    };
    let images = config.disk.iter().map(|disk| Ok(Arc::new(open(disk)?)));
    images.collect()
}

fn open_claimed(disk: &DiskConfig) -> Result<Image, DiskError> {
    let path = &disk.path;
    match overlay_of(disk)? {
        None => Image::open(path, access_to(disk)),
        Some(OverlayConfig::Temporary) => Image::open_below(path, &OverlayPlace::Temporary),
        Some(OverlayConfig::File(file)) => {
            Image::open_below(path, &OverlayPlace::File(file.clone()))
        }
    }
}

fn open_unclaimed(disk: &DiskConfig) -> Result<Image, DiskError> {
    let path = &disk.path;
    match overlay_of(disk)? {
        None => Image::unclaimed(path, access_to(disk)),
        Some(OverlayConfig::Temporary) => Err(DiskError::NamelessOverlay { path: path.clone() }),
        Some(OverlayConfig::File(file)) => Image::unclaimed_below(path, file),
    }
}

fn overlay_of(disk: &DiskConfig) -> Result<Option<&OverlayConfig>, DiskError> {
    match (&disk.overlay, disk.readonly) {
        (Some(_), true) => Err(DiskError::ReadOnlyOverlay {
            path: disk.path.clone(),
        }),
        (overlay, _) => Ok(overlay.as_ref()),
    }
}

fn access_to(disk: &DiskConfig) -> Access {
    if disk.readonly {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    }
}

fn block_device(index: usize, disk: &DiskConfig, image: Arc<Image>) -> Result<Block, Error> {
    let serial = disk
        .id
        .as_deref()
        .map(Serial::new)
        .transpose()?
        .unwrap_or_default();
    Ok(Block::new(format!("disk{index}"), image, serial))
}

fn net_devices(config: &MachineConfig) -> Result<Vec<Net<Tap>>, Error> {
    let nets = config.net.iter().enumerate();
    nets.map(|(index, net)| net_device(index, net)).collect()
}

fn net_device(index: usize, net: &NetConfig) -> Result<Net<Tap>, Error> {
    let tap = Tap::open(TapSource::Name(net.tap.clone()))?;
    let mac = net.mac.unwrap_or_else(MacAddr::random);
    Ok(Net::new(format!("net{index}"), tap, mac, net.mtu)?)
}

fn add_virtio<V: Vm>(
    bus: &mut Bus,
    devices: Vec<Box<dyn VirtioDevice>>,
    vm: &Arc<V>,
    memory: &GuestMemory,
) -> Result<Vec<Arc<MmioTransport>>, Error> {
    let mut transports = Vec::with_capacity(devices.len());
    for (device, index) in devices.into_iter().zip(0..) {
        let line = Arc::new(SpiLine {
            vm: vm.clone(),
            spi: spi(layout::virtio_spi(index)),
        });
        let transport = Arc::new(MmioTransport::new(device, memory.ram().clone(), line)?);
        bus.add(layout::virtio_device(index), DEVICE_SIZE, transport.clone());
        transports.push(transport);
    }
    Ok(transports)
}

fn add_serial_port<V: Vm>(
    bus: &mut Bus,
    vm: &Arc<V>,
    console: &mut Console,
    on_command: impl Fn(Command) + Send + 'static,
    first: FirstState,
) -> Result<(Arc<MachinePort<V>>, Connection), Error> {
    let line = SpiLine {
        vm: vm.clone(),
        spi: spi(layout::SERIAL_SPI),
    };
    let (port, connection) = console.connect(line, on_command, first)?;
    bus.add(layout::SERIAL, DEVICE_SIZE, port.clone());
    Ok((port, connection))
}

/// An ID of its own. A guest that comes from elsewhere brings the one that it has seen.
fn add_generation<V: Vm>(vm: &Arc<V>) -> Result<Generation<SpiLine<V>>, Error> {
    let host = |source| Error::Host {
        step: "making the guest's generation ID",
        source,
    };
    let id = GenerationId::random().map_err(host)?;
    let line = SpiLine {
        vm: vm.clone(),
        spi: spi(layout::GENERATION_SPI),
    };
    let generation = Generation::new(id, line).map_err(host)?;
    // SAFETY: the page holds the ID alone. It is in `Parts` and then in `Machine`, which deletes the slot
    // before it drops the page; if assembling fails, no vCPU ever runs.
    unsafe { vm.set_memslot(&generation.memslot()) }?;
    Ok(generation)
}

fn spi(number: u32) -> Spi {
    Spi::new(number).expect("the layout's interrupts are below the GIC's limit")
}

/// The serial port of a machine in a VM.
pub(super) type MachinePort<V> = SerialPort<SpiLine<V>>;

/// An interrupt line into the VM.
pub(super) struct SpiLine<V> {
    vm: Arc<V>,
    spi: Spi,
}

impl<V: Vm> SpiLine<V> {
    fn drive(&self, high: bool) {
        if let Err(e) = self.vm.set_spi(self.spi, high) {
            tracing::error!("{}: {e}", self.spi);
        }
    }
}

impl<V: Vm> IrqLine for SpiLine<V> {
    fn set_level(&self, high: bool) {
        self.drive(high);
    }
}

/// For the serial port, whose interrupt is an edge.
impl<V: Vm> Trigger for SpiLine<V> {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.drive(true);
        self.drive(false);
        Ok(())
    }
}

impl MmioDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.write(offset, data);
    }
}

fn random_seed() -> io::Result<[u8; 72]> {
    let mut seed = [0; 72];
    File::open("/dev/urandom")?.read_exact(&mut seed)?;
    Ok(seed)
}

fn write_device_tree(
    memory: &GuestMemory,
    loaded: &Loaded,
    description: &fdt::Description<'_>,
) -> Result<(), Error> {
    let tree = fdt::device_tree(description).map_err(Error::DeviceTree)?;
    if tree.len() as u64 > boot::DEVICE_TREE_SIZE {
        return Err(Error::DeviceTreeTooLarge { size: tree.len() });
    }
    memory
        .ram()
        .write_slice(&tree, GuestAddress(loaded.device_tree))
        .map_err(|e| Error::Host {
            step: "writing the device tree",
            source: io::Error::other(e),
        })
}

fn boot_cpu<V>(vcpus: &[V]) -> Result<&V, Error> {
    vcpus.first().ok_or(Error::Cpus {
        wanted: 0,
        offered: layout::MAX_VCPUS,
    })
}

/// A kernel built for pages that the CPU does not have stops before it can say a word.
fn check_page_size(vcpus: &[impl Vcpu], loaded: &Loaded) -> Result<(), Error> {
    let (Some(boot_cpu), Some(page_size)) = (vcpus.first(), loaded.page_size) else {
        return Ok(());
    };
    let offered = boot_cpu.register_u64(RegisterId::ID_AA64MMFR0_EL1)?;
    if page_size.is_offered(offered) {
        Ok(())
    } else {
        Err(Error::KernelPageSize(page_size))
    }
}

/// Puts the boot CPU at its first instruction, as Linux' boot protocol asks: EL1 with its own
/// stack pointer, interrupts masked, MMU off, the device tree's address in x0, zero in x1 to x3
/// (`Documentation/arch/arm64/booting.rst`). The others wait for PSCI `CPU_ON`.
fn enter(vcpus: &[impl Vcpu], loaded: &Loaded) -> Result<(), Error> {
    const EL1H_INTERRUPTS_MASKED: u64 = 0x3c5;
    let Some(boot_cpu) = vcpus.first() else {
        return Ok(());
    };
    boot_cpu.set_register_u64(RegisterId::PSTATE, EL1H_INTERRUPTS_MASKED)?;
    boot_cpu.set_register_u64(RegisterId::PC, loaded.entry)?;
    boot_cpu.set_register_u64(RegisterId::x(0), loaded.device_tree)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use engine::MteSupport;
    use mte::MteLevel;

    use super::*;

    fn host(id_aa64pfr1: Option<u64>) -> Capabilities {
        Capabilities {
            ipa_bits: 40,
            max_vcpus: 4,
            max_memslots: 32,
            mte: id_aa64pfr1.map(|register| MteSupport {
                features: MteFeatures::from_id_registers(register, 0),
                shared_memory: true,
                huge_pages: false,
            }),
            sve: false,
            pointer_authentication: false,
            pmu: false,
            aarch32_el1: false,
            gic_v3: true,
            counter_hz: 62_500_000,
        }
    }

    const MTE3: Option<u64> = Some(0x300);
    const MTE2: Option<u64> = Some(0x200);

    #[test]
    fn a_guest_with_mte_is_refused_where_the_host_has_none() {
        let error = guest_mte(&host(None), MteConfig::On).unwrap_err();
        assert!(matches!(
            error,
            Error::Engine(engine::Error::MteUnsupported)
        ));
    }

    #[test]
    fn a_guest_without_mte_gets_none_where_the_host_has_it() {
        assert_eq!(guest_mte(&host(MTE3), MteConfig::Off).unwrap(), None);
    }

    #[test]
    fn an_exact_level_is_given_where_the_host_has_it() {
        let mte = guest_mte(&host(MTE2), MteConfig::Level(MteLevel::Mte2)).unwrap();
        assert_eq!(mte.unwrap().level(), MteLevel::Mte2);
    }

    #[test]
    fn another_level_than_the_hosts_is_refused_by_name() {
        let error = guest_mte(&host(MTE2), MteConfig::Level(MteLevel::Mte3)).unwrap_err();
        assert!(error.to_string().starts_with("--mte 3: "), "{error}");
        assert!(
            error.to_string().contains("this host offers MTE2"),
            "{error}"
        );
    }

    #[test]
    fn more_memory_than_the_host_has_addresses_for_is_refused() {
        let error = check_memory(&host(MTE3), MemorySize(2 << 40)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--memory 2097152M: this host gives a guest at most 1047552M"
        );
    }

    #[test]
    fn no_cpus_and_more_than_the_host_offers_are_refused() {
        assert!(matches!(
            check_cpus(&host(MTE3), 0),
            Err(Error::Cpus { .. })
        ));
        assert!(matches!(
            check_cpus(&host(MTE3), 5),
            Err(Error::Cpus {
                wanted: 5,
                offered: 4
            })
        ));
        assert!(check_cpus(&host(MTE3), 4).is_ok());
    }
}
