//! The serial port that the device tree names as standard output: an ns16550a or a PL011, polled, no interrupts.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use dtoolkit::fdt::Fdt;
use dtoolkit::standard::NodeStandard;
use dtoolkit::{Node, Property};

use crate::machine::{region, text};
use crate::registers::{read_device_u8, read_device_u32, write_device_u8};

/// Address of the port's first register, 0 while there is none.
static BASE: AtomicU64 = AtomicU64::new(0);
/// log2 of the distance between two of an ns16550a's registers, or [`PL011`].
static SHIFT: AtomicU32 = AtomicU32::new(0);
/// In [`SHIFT`]: the port is a PL011.
const PL011: u32 = u32::MAX;

/// Finds the port that `/chosen/stdout-path` names, directly or through `/aliases`, and uses it from now on. Without
/// one, output is dropped.
pub fn open(tree: Fdt<'static>) {
    let Some(chosen) = text(tree, "/chosen", "stdout-path") else {
        return;
    };
    // "serial0:115200n8": what follows the colon is the line's setting.
    let name = chosen.split(':').next().unwrap_or(chosen);
    let path = if name.starts_with('/') {
        Some(name)
    } else {
        text(tree, "/aliases", name)
    };
    let Some(node) = path.and_then(|path| tree.find_node(path)) else {
        return;
    };
    let Some(registers) = region(node, 0) else {
        return;
    };

    let reg_shift = node
        .property("reg-shift")
        .and_then(|property| property.value_as::<u32>().ok());
    let shift = if node.is_compatible("arm,pl011") {
        PL011
    } else {
        reg_shift.unwrap_or(0).min(4)
    };
    SHIFT.store(shift, Ordering::Relaxed);
    BASE.store(registers.start, Ordering::Release);
}

/// Reads a register of the port that has no side effect: an exit to the VMM, for those who want one.
pub fn touch() {
    let base = BASE.load(Ordering::Acquire);
    if base == 0 {
        return;
    }
    transmitter_is_ready(base);
}

fn transmitter_is_ready(base: u64) -> bool {
    match SHIFT.load(Ordering::Relaxed) {
        // FR.TXFF
        PL011 => read_device_u32(base + 0x18) & 1 << 5 == 0,
        // LSR.THRE
        shift => read_device_u8(base + (5 << shift)) & 1 << 5 != 0,
    }
}

fn put(byte: u8) {
    let base = BASE.load(Ordering::Acquire);
    if base == 0 {
        return;
    }
    while !transmitter_is_ready(base) {}
    write_device_u8(base, byte);
}

/// The serial port as a [`Write`]r.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

/// Writes a line to the serial port. One vCPU at a time should: the first one, or one that is about to end everything.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {{
        // Writing to the console cannot fail.
        let _ = core::fmt::Write::write_fmt(&mut $crate::console::Console, format_args!("{}\n", format_args!($($argument)*)));
    }};
}
