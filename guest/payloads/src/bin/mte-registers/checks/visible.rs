//! With MTE, the ID register says so, the registers hold what is written and do what they say, and RAM has every tag that
//! is given to it, and none before.

use mte::{GcrEl1, PageSize, RgsrEl1, Tag, TagGenerator, TagPage, TagSet};
use payloads::machine::Machine;
use payloads::registers::TagRegister;
use payloads::report::{Check, Report};
use payloads::tagging::{Page, features, instructions, random_tag};
use payloads::{println, read_register, start};

/// How much RAM is searched for tags that somebody left there.
const SEARCHED: u64 = 16 << 20;

static PAGE: Page = Page::new();

pub fn check(machine: &Machine, report: &mut Report) {
    println!(
        "mte-registers: {:?}, GMID_EL1 {:#x}",
        features(),
        read_register!("S3_1_C0_C0_4")
    );

    report.check("mte-visible-in-id-register", |check| {
        check.that(
            features().level().has_tagged_memory(),
            format_args!("it says: {}", features().level()),
        );
    });
    report.check("ram-arrives-without-tags", |check| {
        ram_arrives_without_tags(machine, check)
    });
    report.check("memory-holds-every-tag", memory_holds_every_tag);
    report.check(
        "registers-hold-what-is-written",
        registers_hold_what_is_written,
    );
    report.check("irg-follows-rgsr-and-gcr", irg_follows_rgsr_and_gcr);
}

fn ram_arrives_without_tags(machine: &Machine, check: &mut Check) {
    let first = start::image().end;
    let end = machine.memory.end.min(first + SEARCHED);
    for page in (first..end).step_by(PageSize::Kib4.bytes()) {
        let mut tags = [TagPage::ZERO];
        // SAFETY: the image ends on a page's boundary, and from there to the end all is RAM, and mapped.
        unsafe { instructions().read_tag_pages(page as *const u8, &mut tags) };
        check.that(
            tags == [TagPage::ZERO],
            format_args!("the page at {page:#x} has tags: {tags:?}"),
        );
    }
}

fn memory_holds_every_tag(check: &mut Check) {
    for granule in 0..=u8::MAX {
        PAGE.set_tag(granule, Tag::from_low_bits(granule));
    }
    for granule in 0..=u8::MAX {
        let (given, found) = (Tag::from_low_bits(granule), PAGE.tag(granule));
        check.that(
            found == given,
            format_args!("granule {granule} was given tag {given} and has {found}"),
        );
    }
}

fn registers_hold_what_is_written(check: &mut Check) {
    for register in TagRegister::ALL {
        for pattern in [0, u64::MAX, 0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa] {
            let written = pattern & register.writable();
            register.write(written);
            let read = register.read() & register.writable();
            check.that(
                read == written,
                format_args!("{register} was given {written:#x} and holds {read:#x}"),
            );
        }
        register.write(0);
    }
}

fn irg_follows_rgsr_and_gcr(check: &mut Check) {
    for exclude in [0x0000, 0x0001, 0x8001, 0x5555, 0xfffe, 0xffff] {
        let gcr = GcrEl1::default().with_exclude(TagSet::from_bits(exclude));
        let mut model = TagGenerator {
            tag_access: true,
            gcr,
            rgsr: RgsrEl1::default().with_seed(0xace1),
        };
        TagRegister::Control.write(model.gcr.bits());
        TagRegister::Seed.write(model.rgsr.bits());
        for draw in 0..100 {
            let (actual, expected) = (random_tag(), Tag::of_address(model.irg(0, 0)));
            check.that(
                actual == expected,
                format_args!(
                    "draw {draw} with {exclude:#06x} excluded is {actual} and should be {expected}"
                ),
            );
        }
    }
}
