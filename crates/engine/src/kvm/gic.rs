//! The GICv3 of a KVM VM: made, saved and restored (Linux `Documentation/virt/kvm/devices/arm-vgic-v3.rst`).

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, Kvm, VmFd};

use super::host_error;
use crate::{Error, GicLayout, GicRegister, GicState, Result};

/// A GICv3 in a VM.
pub struct KvmGic {
    device: DeviceFd,
    layout: GicLayout,
}

impl KvmGic {
    /// Makes the GIC of a VM all of whose vCPUs exist.
    pub fn new(vm: &VmFd, layout: &GicLayout) -> Result<Self> {
        let device = create_device(vm).map_err(gic_error("creating a GICv3"))?;
        let gic = Self {
            device,
            layout: *layout,
        };
        gic.set(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &interrupts(layout))
            .map_err(gic_error("setting the number of interrupts"))?;
        gic.set(
            KVM_DEV_ARM_VGIC_GRP_ADDR,
            KVM_VGIC_V3_ADDR_TYPE_DIST.into(),
            &layout.distributor,
        )
        .map_err(gic_error("placing the distributor"))?;
        // One region for all vCPUs: count in bits 63:52, address in 51:16, flags and index zero.
        let redistributors = u64::from(layout.vcpus) << 52 | layout.redistributors;
        gic.set(
            KVM_DEV_ARM_VGIC_GRP_ADDR,
            KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION.into(),
            &redistributors,
        )
        .map_err(gic_error("placing the redistributors"))?;
        gic.set(
            KVM_DEV_ARM_VGIC_GRP_CTRL,
            KVM_DEV_ARM_VGIC_CTRL_INIT.into(),
            &0u64,
        )
        .map_err(gic_error("initialising it"))?;
        Ok(gic)
    }

    /// Its state, while no vCPU runs.
    pub fn state(&self) -> Result<GicState> {
        let read = |register| match is_absent(register) {
            true => Ok((register, 0)),
            false => Ok((register, self.read(register)?)),
        };
        Ok(GicState {
            registers: self
                .registers()?
                .into_iter()
                .map(read)
                .collect::<Result<_>>()?,
        })
    }

    /// Gives a GIC that was just made this state.
    pub fn restore(&self, state: &GicState) -> Result<()> {
        let names = state.registers.iter().map(|(register, _)| *register);
        if !names.eq(self.registers()?) {
            return Err(Error::ForeignGic);
        }
        for (register, value) in &state.registers {
            match is_absent(*register) {
                true if *value != 0 => return Err(Error::ForeignGic),
                true => {}
                false => self.write(*register, *value)?,
            }
        }
        Ok(())
    }

    /// The affinities of its vCPUs: KVM counts 16 of them by Aff0, then 256 times that by Aff1, and so on.
    fn affinities(&self) -> impl Iterator<Item = u32> + use<> {
        (0..self.layout.vcpus)
            .map(|index| index & 0xf | (index >> 4 & 0xff) << 8 | (index >> 12 & 0xff) << 16)
    }

    /// All its registers, in an order in which they can be written.
    fn registers(&self) -> Result<Vec<GicRegister>> {
        let mut registers: Vec<_> = self.shared_registers().collect();
        for affinity in self.affinities() {
            let control = self.read(GicRegister::CpuInterface(affinity, ICC_CTLR_EL1))?;
            registers.extend(interface_registers(affinity, priority_bits(control)));
        }
        Ok(registers)
    }

    /// All registers but those of the vCPUs' interfaces. What an interrupt is goes
    /// before whether it is pending, and the distributor's being on goes before everything: a line that goes high while it is
    /// off is remembered as high, but never delivered, for it does not go high again.
    fn shared_registers(&self) -> impl Iterator<Item = GicRegister> {
        const CONTROL: u32 = 0x0;
        const STATUS: u32 = 0x10;
        const GROUP: u32 = 0x80;
        const ENABLED: u32 = 0x100;
        const PENDING: u32 = 0x200;
        const ACTIVE: u32 = 0x300;
        const PRIORITY: u32 = 0x400;
        const CONFIGURATION: u32 = 0xc00;
        // Of a redistributor: the frame of its vCPU's own interrupts, laid out as the distributor's.
        const OWN: u32 = 0x1_0000;
        let private = self.affinities().flat_map(|affinity| {
            REDISTRIBUTOR
                .iter()
                .map(move |offset| GicRegister::Redistributor(affinity, *offset))
                .chain([GicRegister::Lines(affinity, 0)])
                .chain(
                    [OWN + PENDING, OWN + ACTIVE]
                        .map(|offset| GicRegister::Redistributor(affinity, offset)),
                )
        });
        let interrupts = interrupts(&self.layout);
        // Bits an interrupt, and where they begin. Interrupts below 32 are the redistributors'.
        let block = move |base: u32, bits: u32| {
            (base + 4 * bits..base + interrupts * bits / 8)
                .step_by(4)
                .map(GicRegister::Distributor)
        };
        [CONTROL, STATUS]
            .map(GicRegister::Distributor)
            .into_iter()
            .chain(private)
            .chain(block(GROUP, 1))
            .chain(block(CONFIGURATION, 2))
            .chain(block(PRIORITY, 8))
            .chain(block(ROUTE, 64))
            .chain(block(ENABLED, 1))
            .chain(
                (32..interrupts)
                    .step_by(32)
                    .map(|first| GicRegister::Lines(0, first)),
            )
            .chain(block(PENDING, 1))
            .chain(block(ACTIVE, 1))
    }

    fn read(&self, register: GicRegister) -> Result<u64> {
        let (group, attribute) = name(register);
        let mut value = 0u64;
        let mut request = kvm_device_attr {
            flags: 0,
            group,
            attr: attribute,
            addr: &raw mut value as u64,
        };
        // SAFETY: the kernel writes four or eight bytes, by the group, into `value`, which has eight.
        unsafe { self.device.get_device_attr(&mut request) }
            .map_err(gic_error("reading a register"))?;
        Ok(value)
    }

    fn write(&self, register: GicRegister, value: u64) -> Result<()> {
        let (group, attribute) = name(register);
        self.set(group, attribute, &value)
            .map_err(gic_error("writing a register"))
    }

    fn set<T>(&self, group: u32, attribute: u64, value: &T) -> Result<(), kvm_ioctls::Error> {
        self.device.set_device_attr(&kvm_device_attr {
            flags: 0,
            group,
            attr: attribute,
            addr: std::ptr::from_ref(value) as u64,
        })
    }
}

/// `GICD_IROUTER`, 64 bits an interrupt.
const ROUTE: u32 = 0x6000;

/// Whether it is the upper half of a route, which is as good as none: a GIC of KVM knows no Aff3 (`GICD_TYPER.A3V` is 0), reads it
/// as zero and ignores what is written to it. It is a third of all registers.
fn is_absent(register: GicRegister) -> bool {
    matches!(register, GicRegister::Distributor(offset) if offset >= ROUTE && offset % 8 == 4)
}

/// GICR_CTLR, STATUSR, WAKER, PROPBASER, PENDBASER (each half); of the frame of SGIs and PPIs IGROUPR0, ICFGR0 and 1,
/// IPRIORITYR0 to 7, ISENABLER0. What is pending and active comes later.
const REDISTRIBUTOR: [u32; 19] = [
    0x0, 0x10, 0x14, 0x70, 0x74, 0x78, 0x7c, 0x1_0080, 0x1_0c00, 0x1_0c04, 0x1_0400, 0x1_0404,
    0x1_0408, 0x1_040c, 0x1_0410, 0x1_0414, 0x1_0418, 0x1_041c, 0x1_0100,
];

const ICC_CTLR_EL1: u32 = encoding(12, 4);

/// ICC registers are `S3_0_C<crn>…` with CRn 12 here, by CRm and Op2.
const fn encoding(crm: u32, op2: u32) -> u32 {
    3 << 14 | 12 << 7 | crm << 3 | op2
}

/// The system registers of a vCPU's interface, which has 1, 2 or 4 registers of active priorities of
/// each group for 5, 6 or 7 bits of priority.
fn interface_registers(affinity: u32, priority_bits: u32) -> impl Iterator<Item = GicRegister> {
    const ICC_SRE_EL1: u32 = encoding(12, 5);
    const ICC_PMR_EL1: u32 = 3 << 14 | 4 << 7 | 6 << 3;
    const ICC_BPR0_EL1: u32 = encoding(8, 3);
    const ICC_BPR1_EL1: u32 = encoding(12, 3);
    const ICC_IGRPEN0_EL1: u32 = encoding(12, 6);
    const ICC_IGRPEN1_EL1: u32 = encoding(12, 7);
    let active: u32 = match priority_bits {
        7.. => 4,
        6 => 2,
        _ => 1,
    };
    [
        ICC_SRE_EL1,
        ICC_CTLR_EL1,
        ICC_IGRPEN0_EL1,
        ICC_IGRPEN1_EL1,
        ICC_PMR_EL1,
        ICC_BPR0_EL1,
        ICC_BPR1_EL1,
    ]
    .into_iter()
    .chain((0..active).map(|n| encoding(8, 4 + n)))
    .chain((0..active).map(|n| encoding(9, n)))
    .map(move |encoding| GicRegister::CpuInterface(affinity, encoding))
}

/// ICC_CTLR_EL1.PRIbits.
fn priority_bits(interface_control: u64) -> u32 {
    (interface_control >> 8 & 7) as u32 + 1
}

/// A register's group and attribute.
fn name(register: GicRegister) -> (u32, u64) {
    let of = |affinity: u32, low: u64| u64::from(affinity) << 32 | low;
    match register {
        GicRegister::Distributor(offset) => (KVM_DEV_ARM_VGIC_GRP_DIST_REGS, offset.into()),
        GicRegister::Redistributor(affinity, offset) => (
            KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
            of(affinity, offset.into()),
        ),
        GicRegister::CpuInterface(affinity, encoding) => (
            KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
            of(affinity, encoding.into()),
        ),
        // The information asked for, in bits 31:10, is 0: the lines.
        GicRegister::Lines(affinity, first) => {
            (KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, of(affinity, first.into()))
        }
    }
}

/// Interrupts come in blocks of 32, the first of which is the vCPUs' own.
fn interrupts(layout: &GicLayout) -> u32 {
    (32 + layout.spis).next_multiple_of(32)
}

/// Whether KVM has a GICv3 for guests here: it has not where the host's own is a GICv2.
///
/// One is made in a scratch VM. Asking with `KVM_CREATE_DEVICE_TEST` would do, but kvm-ioctls takes
/// the descriptor that this flag does not return for an open file.
pub fn has_gic_v3(kvm: &Kvm) -> Result<bool> {
    let vm = kvm.create_vm().map_err(host_error("creating a VM"))?;
    Ok(create_device(&vm).is_ok())
}

fn create_device(vm: &VmFd) -> Result<DeviceFd, kvm_ioctls::Error> {
    vm.create_device(&mut kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
        fd: 0,
        flags: 0,
    })
}

fn gic_error(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |e| Error::Gic {
        step,
        source: e.into(),
    }
}
