//! The device tree: how a guest learns what machine it runs on.

use engine::GicLayout;
use vm_fdt::{Error, FdtWriter};

use crate::layout;

/// What the machine has, as far as its device tree says so.
#[derive(Clone, Debug)]
pub struct Description<'a> {
    /// Bytes of RAM.
    pub ram_size: u64,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Guest-physical start and end of the initrd.
    pub initrd: Option<(u64, u64)>,
    /// The affinity fields of each vCPU's MPIDR_EL1, in order.
    pub affinities: &'a [u64],
    /// Where the interrupt controller is.
    pub gic: GicLayout,
    /// Each vCPU has a PMU.
    pub pmu: bool,
    /// How many virtio devices there are.
    pub virtio_devices: u32,
    /// Fresh randomness for the kernel's own generator and its address randomisation.
    pub seed: [u8; 72],
}

const GIC_PHANDLE: u32 = 1;
const CLOCK_PHANDLE: u32 = 2;

const SPI: u32 = 0;
const PPI: u32 = 1;
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// Writes the device tree of a machine.
///
/// # Errors
/// The command line or a count cannot be expressed (a zero byte, for one).
pub fn device_tree(machine: &Description<'_>) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_string("model", "tagvisor")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC_PHANDLE)?;
    chosen(&mut fdt, machine)?;
    memory(&mut fdt, machine)?;
    cpus(&mut fdt, machine)?;
    psci(&mut fdt)?;
    timer(&mut fdt)?;
    gic(&mut fdt, machine)?;
    if machine.pmu {
        pmu(&mut fdt)?;
    }
    clock(&mut fdt)?;
    serial(&mut fdt)?;
    rtc(&mut fdt)?;
    for index in 0..machine.virtio_devices {
        virtio(&mut fdt, index)?;
    }
    fdt.end_node(root)?;
    fdt.finish()
}

fn chosen(fdt: &mut FdtWriter, machine: &Description<'_>) -> Result<(), Error> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", machine.cmdline)?;
    fdt.property_string("stdout-path", &format!("/serial@{:x}", layout::SERIAL))?;
    if let Some((start, end)) = machine.initrd {
        fdt.property_u64("linux,initrd-start", start)?;
        fdt.property_u64("linux,initrd-end", end)?;
    }
    let (kaslr, rng) = machine.seed.split_at(8);
    fdt.property("kaslr-seed", kaslr)?;
    fdt.property("rng-seed", rng)?;
    fdt.end_node(node)
}

fn memory(fdt: &mut FdtWriter, machine: &Description<'_>) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("memory@{:x}", layout::RAM_START))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[layout::RAM_START, machine.ram_size])?;
    fdt.end_node(node)
}

fn cpus(fdt: &mut FdtWriter, machine: &Description<'_>) -> Result<(), Error> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 0)?;
    for affinity in machine.affinities {
        let cpu = fdt.begin_node(&format!("cpu@{affinity:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,arm-v8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u64("reg", *affinity)?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(cpus)
}

fn psci(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node("psci")?;
    fdt.property_string_list(
        "compatible",
        vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()],
    )?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(node)
}

fn timer(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_null("always-on")?;
    let interrupts: Vec<u32> = [
        layout::SECURE_TIMER_PPI,
        layout::PHYSICAL_TIMER_PPI,
        layout::VIRTUAL_TIMER_PPI,
        layout::HYPERVISOR_TIMER_PPI,
    ]
    .into_iter()
    .flat_map(|ppi| [PPI, ppi, LEVEL_HIGH])
    .collect();
    fdt.property_array_u32("interrupts", &interrupts)?;
    fdt.end_node(node)
}

fn gic(fdt: &mut FdtWriter, machine: &Description<'_>) -> Result<(), Error> {
    let gic = &machine.gic;
    let node = fdt.begin_node(&format!("interrupt-controller@{:x}", gic.distributor))?;
    fdt.property_string("compatible", "arm,gic-v3")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_array_u64(
        "reg",
        &[
            gic.distributor,
            GicLayout::DISTRIBUTOR_SIZE,
            gic.redistributors,
            GicLayout::REDISTRIBUTOR_SIZE * u64::from(gic.vcpus),
        ],
    )?;
    fdt.property_phandle(GIC_PHANDLE)?;
    fdt.end_node(node)
}

fn pmu(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node("pmu")?;
    fdt.property_string("compatible", "arm,armv8-pmuv3")?;
    fdt.property_array_u32("interrupts", &[PPI, layout::PMU_PPI, LEVEL_HIGH])?;
    fdt.end_node(node)
}

/// The clock that the serial port and the RTC claim to run on.
fn clock(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", 24_000_000)?;
    fdt.property_string("clock-output-names", "clk24mhz")?;
    fdt.property_phandle(CLOCK_PHANDLE)?;
    fdt.end_node(node)
}

fn serial(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("serial@{:x}", layout::SERIAL))?;
    fdt.property_string("compatible", "ns16550a")?;
    fdt.property_array_u64("reg", &[layout::SERIAL, layout::DEVICE_SIZE])?;
    fdt.property_u32("clock-frequency", 1_843_200)?;
    fdt.property_u32("current-speed", 115_200)?;
    fdt.property_array_u32("interrupts", &[SPI, layout::SERIAL_SPI, EDGE_RISING])?;
    fdt.end_node(node)
}

fn rtc(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("rtc@{:x}", layout::RTC))?;
    fdt.property_string_list(
        "compatible",
        vec!["arm,pl031".into(), "arm,primecell".into()],
    )?;
    fdt.property_u32("arm,primecell-periphid", 0x0004_1031)?;
    fdt.property_array_u64("reg", &[layout::RTC, layout::DEVICE_SIZE])?;
    fdt.property_u32("clocks", CLOCK_PHANDLE)?;
    fdt.property_string("clock-names", "apb_pclk")?;
    fdt.end_node(node)
}

fn virtio(fdt: &mut FdtWriter, index: u32) -> Result<(), Error> {
    let address = layout::virtio_device(index);
    let node = fdt.begin_node(&format!("virtio_mmio@{address:x}"))?;
    fdt.property_string("compatible", "virtio,mmio")?;
    fdt.property_array_u64("reg", &[address, layout::DEVICE_SIZE])?;
    fdt.property_array_u32("interrupts", &[SPI, layout::virtio_spi(index), LEVEL_HIGH])?;
    fdt.property_null("dma-coherent")?;
    fdt.end_node(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(cmdline: &str) -> Description<'_> {
        Description {
            ram_size: 512 << 20,
            cmdline,
            initrd: Some((0x4100_0000, 0x4200_0000)),
            affinities: &[0, 1, 0x100],
            gic: GicLayout {
                distributor: layout::GIC_DISTRIBUTOR,
                redistributors: layout::GIC_REDISTRIBUTORS,
                vcpus: 3,
                spis: layout::SPIS,
            },
            pmu: true,
            virtio_devices: 2,
            seed: [7; 72],
        }
    }

    fn contains(tree: &[u8], text: &str) -> bool {
        tree.windows(text.len())
            .any(|window| window == text.as_bytes())
    }

    #[test]
    fn the_tree_names_every_cpu_device_and_argument() {
        let tree = device_tree(&machine("console=ttyS0 quiet")).unwrap();

        let names = [
            "console=ttyS0 quiet",
            "cpu@0",
            "cpu@1",
            "cpu@100",
            "serial@9000000",
            "rtc@9010000",
            "virtio_mmio@a000000",
            "virtio_mmio@a001000",
            "arm,armv8-pmuv3",
        ];
        assert_eq!(names.map(|name| contains(&tree, name)), [true; 9]);
    }

    #[test]
    fn a_command_line_with_a_zero_byte_is_refused() {
        assert!(device_tree(&machine("a\0b")).is_err());
    }
}
