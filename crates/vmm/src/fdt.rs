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
    generation(&mut fdt)?;
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
        fdt.property_string("compatible", "arm,armv8")?;
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

/// As `rng/microsoft,vmgenid.yaml` wants it.
fn generation(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("rng@{:x}", layout::GENERATION))?;
    fdt.property_string("compatible", "microsoft,vmgenid")?;
    fdt.property_array_u64("reg", &[layout::GENERATION, layout::DEVICE_SIZE])?;
    fdt.property_array_u32("interrupts", &[SPI, layout::GENERATION_SPI, EDGE_RISING])?;
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
    use dtoolkit::fdt::Fdt;
    use dtoolkit::{Node, Property};

    use super::*;

    fn machine(cmdline: &str) -> Description<'_> {
        let mut seed = [7; 72];
        seed[..8].fill(1);
        Description {
            ram_size: 512 << 20,
            cmdline,
            initrd: Some((0x4100_0000, 0x4200_0000)),
            affinities: &[0, 1, 0x100, 1 << 32],
            gic: GicLayout {
                distributor: layout::GIC_DISTRIBUTOR,
                redistributors: layout::GIC_REDISTRIBUTORS,
                vcpus: 4,
                spis: layout::SPIS,
            },
            pmu: true,
            virtio_devices: 2,
            seed,
        }
    }

    /// The value of a property, which has to be there.
    fn value(tree: &[u8], node: &str, property: &str) -> Vec<u8> {
        let fdt = Fdt::new(tree).unwrap();
        let node = fdt.find_node(node).unwrap_or_else(|| panic!("no {node}"));
        let property = node
            .property(property)
            .unwrap_or_else(|| panic!("no {property}"));
        property.value().to_vec()
    }

    fn cells(tree: &[u8], node: &str, property: &str) -> Vec<u32> {
        value(tree, node, property)
            .chunks(4)
            .map(|cell| u32::from_be_bytes(cell.try_into().unwrap()))
            .collect()
    }

    fn text(tree: &[u8], node: &str, property: &str) -> String {
        String::from_utf8(value(tree, node, property)).unwrap()
    }

    fn children(tree: &[u8], node: &str) -> Vec<String> {
        let node = Fdt::new(tree).unwrap().find_node(node).unwrap();
        node.children()
            .map(|child| child.name().to_owned())
            .collect()
    }

    #[test]
    fn the_tree_has_a_node_for_every_part_of_the_machine() {
        let tree = device_tree(&machine("")).unwrap();
        assert_eq!(
            children(&tree, "/"),
            [
                "chosen",
                "memory@40000000",
                "cpus",
                "psci",
                "timer",
                "interrupt-controller@8000000",
                "pmu",
                "apb-pclk",
                "serial@9000000",
                "rtc@9010000",
                "rng@9020000",
                "virtio_mmio@a000000",
                "virtio_mmio@a001000",
            ]
        );
    }

    #[test]
    fn addresses_and_sizes_have_two_cells_and_interrupts_go_to_the_gic() {
        let tree = device_tree(&machine("")).unwrap();
        assert_eq!(cells(&tree, "/", "#address-cells"), [2]);
        assert_eq!(cells(&tree, "/", "#size-cells"), [2]);
        assert_eq!(
            cells(&tree, "/", "interrupt-parent"),
            cells(&tree, "/interrupt-controller", "phandle")
        );
    }

    #[test]
    fn the_kernel_is_told_its_command_line_console_initrd_and_seeds() {
        let tree = device_tree(&machine("console=ttyS0 quiet")).unwrap();
        assert_eq!(text(&tree, "/chosen", "bootargs"), "console=ttyS0 quiet\0");
        assert_eq!(text(&tree, "/chosen", "stdout-path"), "/serial@9000000\0");
        assert_eq!(
            cells(&tree, "/chosen", "linux,initrd-start"),
            [0, 0x4100_0000]
        );
        assert_eq!(
            cells(&tree, "/chosen", "linux,initrd-end"),
            [0, 0x4200_0000]
        );
        assert_eq!(value(&tree, "/chosen", "kaslr-seed"), [1; 8]);
        assert_eq!(value(&tree, "/chosen", "rng-seed"), [7; 64]);
    }

    #[test]
    fn a_machine_without_pmu_initrd_and_virtio_devices_has_no_trace_of_them() {
        let bare = Description {
            initrd: None,
            pmu: false,
            virtio_devices: 0,
            ..machine("")
        };

        let tree = device_tree(&bare).unwrap();

        let fdt = Fdt::new(&tree).unwrap();
        let chosen = fdt.find_node("/chosen").unwrap();
        assert!(chosen.property("linux,initrd-start").is_none());
        assert!(chosen.property("linux,initrd-end").is_none());
        assert!(fdt.find_node("/pmu").is_none());
        assert!(fdt.find_node("/virtio_mmio").is_none());
    }

    #[test]
    fn memory_is_one_range_from_the_start_of_ram() {
        let large = Description {
            ram_size: 5 << 30,
            ..machine("")
        };

        let tree = device_tree(&large).unwrap();

        assert_eq!(text(&tree, "/memory", "device_type"), "memory\0");
        assert_eq!(
            cells(&tree, "/memory", "reg"),
            [0, 0x4000_0000, 1, 0x4000_0000]
        );
    }

    #[test]
    fn every_cpu_is_named_by_its_affinity_and_started_by_psci() {
        let tree = device_tree(&machine("")).unwrap();
        assert_eq!(cells(&tree, "/cpus", "#address-cells"), [2]);
        assert_eq!(cells(&tree, "/cpus", "#size-cells"), [0]);
        assert_eq!(
            children(&tree, "/cpus"),
            ["cpu@0", "cpu@1", "cpu@100", "cpu@100000000"]
        );
        assert_eq!(cells(&tree, "/cpus/cpu@100", "reg"), [0, 0x100]);
        assert_eq!(cells(&tree, "/cpus/cpu@100000000", "reg"), [1, 0]);
        assert_eq!(text(&tree, "/cpus/cpu@100", "device_type"), "cpu\0");
        assert_eq!(text(&tree, "/cpus/cpu@100", "compatible"), "arm,armv8\0");
        assert_eq!(text(&tree, "/cpus/cpu@100", "enable-method"), "psci\0");
        assert_eq!(
            text(&tree, "/psci", "compatible"),
            "arm,psci-1.0\0arm,psci-0.2\0"
        );
        assert_eq!(text(&tree, "/psci", "method"), "hvc\0");
    }

    #[test]
    fn the_gic_has_its_distributor_and_a_redistributor_for_every_vcpu() {
        let tree = device_tree(&machine("")).unwrap();
        let gic = "/interrupt-controller@8000000";
        assert_eq!(text(&tree, gic, "compatible"), "arm,gic-v3\0");
        assert_eq!(cells(&tree, gic, "#interrupt-cells"), [3]);
        assert!(value(&tree, gic, "interrupt-controller").is_empty());
        assert_eq!(
            cells(&tree, gic, "reg"),
            [0, 0x800_0000, 0, 0x1_0000, 0, 0x1000_0000, 0, 4 * 0x2_0000]
        );
    }

    #[test]
    fn timers_and_pmu_interrupt_each_cpu_by_its_own_level_triggered_line() {
        let tree = device_tree(&machine("")).unwrap();
        assert_eq!(text(&tree, "/timer", "compatible"), "arm,armv8-timer\0");
        assert!(value(&tree, "/timer", "always-on").is_empty());
        assert_eq!(
            cells(&tree, "/timer", "interrupts"),
            [1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4]
        );
        assert_eq!(text(&tree, "/pmu", "compatible"), "arm,armv8-pmuv3\0");
        assert_eq!(cells(&tree, "/pmu", "interrupts"), [1, 7, 4]);
    }

    #[test]
    fn the_serial_port_is_a_16550a_with_an_edge_for_an_interrupt() {
        let tree = device_tree(&machine("")).unwrap();
        let serial = "/serial@9000000";
        assert_eq!(text(&tree, serial, "compatible"), "ns16550a\0");
        assert_eq!(cells(&tree, serial, "reg"), [0, 0x900_0000, 0, 0x1000]);
        assert_eq!(cells(&tree, serial, "interrupts"), [0, 1, 1]);
        assert_eq!(cells(&tree, serial, "clock-frequency"), [1_843_200]);
        assert_eq!(cells(&tree, serial, "current-speed"), [115_200]);
    }

    #[test]
    fn the_rtc_is_a_pl031_on_the_fixed_clock() {
        let tree = device_tree(&machine("")).unwrap();
        let rtc = "/rtc@9010000";
        assert_eq!(text(&tree, rtc, "compatible"), "arm,pl031\0arm,primecell\0");
        assert_eq!(cells(&tree, rtc, "arm,primecell-periphid"), [0x0004_1031]);
        assert_eq!(cells(&tree, rtc, "reg"), [0, 0x901_0000, 0, 0x1000]);
        assert_eq!(text(&tree, rtc, "clock-names"), "apb_pclk\0");
        assert_eq!(
            cells(&tree, rtc, "clocks"),
            cells(&tree, "/apb-pclk", "phandle")
        );
        assert_eq!(text(&tree, "/apb-pclk", "compatible"), "fixed-clock\0");
        assert_eq!(cells(&tree, "/apb-pclk", "#clock-cells"), [0]);
        assert_eq!(cells(&tree, "/apb-pclk", "clock-frequency"), [24_000_000]);
    }

    #[test]
    fn the_generation_id_is_a_page_and_its_change_an_edge() {
        let tree = device_tree(&machine("")).unwrap();
        let rng = "/rng@9020000";
        assert_eq!(text(&tree, rng, "compatible"), "microsoft,vmgenid\0");
        assert_eq!(cells(&tree, rng, "reg"), [0, 0x902_0000, 0, 0x1000]);
        assert_eq!(cells(&tree, rng, "interrupts"), [0, 2, 1]);
    }

    #[test]
    fn every_virtio_device_has_its_page_and_a_level_triggered_interrupt() {
        let tree = device_tree(&machine("")).unwrap();
        let second = "/virtio_mmio@a001000";
        assert_eq!(
            cells(&tree, "/virtio_mmio@a000000", "interrupts"),
            [0, 16, 4]
        );
        assert_eq!(text(&tree, second, "compatible"), "virtio,mmio\0");
        assert_eq!(cells(&tree, second, "reg"), [0, 0xa00_1000, 0, 0x1000]);
        assert_eq!(cells(&tree, second, "interrupts"), [0, 17, 4]);
        assert!(value(&tree, second, "dma-coherent").is_empty());
    }

    #[test]
    fn a_command_line_with_a_zero_byte_is_refused() {
        assert!(device_tree(&machine("a\0b")).is_err());
    }
}
