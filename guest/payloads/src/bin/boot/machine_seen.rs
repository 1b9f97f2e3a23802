//! What a guest can tell of its machine right after it was started, and whether that is as it should be.

use core::arch::asm;

use payloads::machine::Machine;
use payloads::report::Report;
use payloads::{power, println, read_register, start};

pub fn run(machine: &Machine, report: &mut Report) {
    println!("boot: device tree at {:#x}", machine.device_tree);
    println!("boot: image at {:#x?}", start::image());
    println!("boot: EL{}", read_register!("CurrentEL") >> 2 & 0b11);
    println!(
        "boot: RAM {:#x} to {:#x}",
        machine.memory.start, machine.memory.end
    );
    println!(
        "boot: {} vCPUs, affinities {:x?}",
        machine.processors().len(),
        machine.processors()
    );
    println!(
        "boot: ID_AA64PFR1_EL1 {:#x}",
        read_register!("S3_0_C0_C4_1")
    );
    println!("boot: bootargs '{}'", machine.bootargs());

    report.check("entered-at-el1", |check| {
        check.equal(
            "the exception level",
            read_register!("CurrentEL") >> 2 & 0b11,
            1,
        );
    });
    report.check("image-in-ram", |check| {
        let (image, ram) = (start::image(), &machine.memory);
        check.that(
            ram.start <= image.start && image.end <= ram.end,
            format_args!("the image is at {image:#x?}, RAM at {ram:#x?}"),
        );
    });
    report.check("device-tree-in-ram-beside-the-image", |check| {
        let (tree, image) = (machine.device_tree, start::image());
        check.that(
            machine.memory.contains(&tree) && !image.contains(&tree),
            format_args!("it is at {tree:#x}, the image at {image:#x?}"),
        );
    });
    report.check("first-vcpu-is-the-first-in-the-device-tree", |check| {
        check.equal(
            "MPIDR_EL1's affinity",
            read_register!("mpidr_el1") & 0xff_00ff_ffff,
            machine.processors()[0],
        );
    });
    waits_with_a_time_limit_end(report);
    match machine.argument("end") {
        Some("reset") => {
            println!("boot: restarts");
            power::reset()
        }
        Some("wait") => {
            println!("boot: waits");
            power::wait_for_ever()
        }
        _ => {}
    }
}

/// FEAT_WFxT: a hypervisor may run others while a guest delays, but must come back by itself.
fn waits_with_a_time_limit_end(report: &mut Report) {
    const NAME: &str = "waits-with-a-time-limit-end";
    let emulated = read_register!("midr_el1") >> 24 & 0xff == 0;
    let offered = read_register!("S3_0_C0_C6_2") & 0xf != 0;
    if !offered {
        return report.skip(NAME, "the CPU has none");
    }
    report.check(NAME, |check| {
        check.that(
            !emulated,
            format_args!("an emulated CPU has them, which may never end"),
        );
        if emulated {
            return;
        }
        let end = read_register!("cntvct_el0") + read_register!("cntfrq_el0") / 100;
        while read_register!("cntvct_el0") < end {
            // SAFETY: WFIT X0 changes nothing; it may end early.
            unsafe { asm!(".inst 0xd5031020", in("x0") end, options(nomem, nostack)) };
        }
    });
}
