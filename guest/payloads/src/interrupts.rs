//! Sleeping until the virtual timer fires, which makes the hypervisor take the vCPU off its CPU.
//!
//! WFI ends when an interrupt is pending at the vCPU, even a masked one. So the timer's interrupt is enabled in the GIC
//! and never taken.

use core::arch::asm;

use crate::machine::Gic;
use crate::registers::{read_device_u32, read_device_u64, write_device_u32};
use crate::{read_register, write_register};

/// The virtual timer's PPI.
const VIRTUAL_TIMER: u32 = 27;

/// Lets this vCPU see the timer's interrupt. Arm GIC specification (IHI 0069), 12.9 and 12.11.
pub fn enable_timer(gic: Gic) {
    const GICD_CTLR: u64 = 0;
    const ENABLE_GROUP_1: u32 = 1 << 1;
    const AFFINITY_ROUTING: u32 = 1 << 4;
    const GICR_WAKER: u64 = 0x14;
    const PROCESSOR_SLEEP: u32 = 1 << 1;
    const CHILDREN_ASLEEP: u32 = 1 << 2;
    const GICR_IGROUPR0: u64 = 0x1_0080;
    const GICR_ISENABLER0: u64 = 0x1_0100;
    const LOWEST_PRIORITY: u64 = 0xff;

    write_device_u32(
        gic.distributor + GICD_CTLR,
        AFFINITY_ROUTING | ENABLE_GROUP_1,
    );

    let Some(redistributor) = redistributor(gic) else {
        return;
    };
    let waker = read_device_u32(redistributor + GICR_WAKER);
    write_device_u32(redistributor + GICR_WAKER, waker & !PROCESSOR_SLEEP);
    while read_device_u32(redistributor + GICR_WAKER) & CHILDREN_ASLEEP != 0 {}
    write_device_u32(redistributor + GICR_IGROUPR0, 1 << VIRTUAL_TIMER);
    write_device_u32(redistributor + GICR_ISENABLER0, 1 << VIRTUAL_TIMER);

    write_register!("S3_0_C12_C12_5", read_register!("S3_0_C12_C12_5") | 1); // ICC_SRE_EL1.SRE
    write_register!("S3_0_C4_C6_0", LOWEST_PRIORITY); // ICC_PMR_EL1
    write_register!("S3_0_C12_C12_7", 1); // ICC_IGRPEN1_EL1
}

/// The registers of this vCPU's redistributor.
fn redistributor(gic: Gic) -> Option<u64> {
    const GICR_TYPER: u64 = 8;
    const VIRTUAL_LPIS: u64 = 1 << 1;
    const LAST: u64 = 1 << 4;

    let mpidr = read_register!("mpidr_el1");
    let affinity = mpidr & 0xff_ffff | (mpidr >> 32 & 0xff) << 24;
    let (mut frame, end) = gic.redistributors;
    while frame < end {
        let typer = read_device_u64(frame + GICR_TYPER);
        if typer >> 32 == affinity {
            return Some(frame);
        }
        if typer & LAST != 0 {
            return None;
        }
        frame += if typer & VIRTUAL_LPIS == 0 {
            0x2_0000
        } else {
            0x4_0000
        };
    }
    None
}

/// Sleeps for this many microseconds. Needs [`enable_timer`] on this vCPU.
pub fn sleep(microseconds: u64) {
    const ENABLE: u64 = 1;
    const MASKED: u64 = 1 << 1;
    const FIRED: u64 = 1 << 2;

    write_register!(
        "cntv_tval_el0",
        read_register!("cntfrq_el0") * microseconds / 1_000_000
    );
    write_register!("cntv_ctl_el0", ENABLE);
    while read_register!("cntv_ctl_el0") & FIRED == 0 {
        // SAFETY: waiting for an interrupt changes nothing; interrupts are masked.
        unsafe { asm!("wfi", options(nomem, nostack)) };
    }
    write_register!("cntv_ctl_el0", MASKED);
}
