//! Translation tables, as a guest lays them out and as no guest should.

use engine::RegisterId;
use inspect::walk::{Extent, Fault, Regime, Walker};
use inspect::{Error, Format, Space, Statistics, View, dump};
use proptest::prelude::*;
use stream::ZERO_PAGE;

use crate::machine::{Scattered, vcpu};

/// How a range is laid out, with what follows from that, from the tables of Arm ARM D8.2.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// Bits of a page's offset.
    page: u32,
    /// Bits of a virtual address.
    bits: u32,
    first_level: i32,
    /// TCR_EL1: TG0 and TG1.
    tg: [u64; 2],
    /// TCR_EL1.DS.
    ds: bool,
    /// TCR_EL1.IPS.
    ips: u64,
    /// Levels that have blocks.
    blocks: &'static [i32],
}

const LAYOUTS: [Layout; 10] = [
    layout(12, 48, 0, false, 5, &[1, 2]),
    layout(12, 39, 1, false, 5, &[1, 2]),
    layout(12, 52, -1, true, 6, &[0, 1, 2]),
    layout(14, 48, 0, false, 5, &[2]),
    layout(14, 47, 1, false, 5, &[2]),
    layout(14, 36, 2, false, 5, &[2]),
    layout(14, 52, 0, true, 6, &[1, 2]),
    layout(16, 48, 1, false, 5, &[2]),
    layout(16, 42, 2, false, 5, &[2]),
    layout(16, 52, 1, false, 6, &[1, 2]),
];

const fn layout(
    page: u32,
    bits: u32,
    first_level: i32,
    ds: bool,
    ips: u64,
    blocks: &'static [i32],
) -> Layout {
    let tg = match page {
        12 => [0b00, 0b10],
        14 => [0b10, 0b01],
        _ => [0b01, 0b11],
    };
    Layout {
        page,
        bits,
        first_level,
        tg,
        ds,
        ips,
        blocks,
    }
}

impl Layout {
    fn is_wide(self) -> bool {
        self.ips == 6
    }

    fn tcr(self) -> u64 {
        let size_offset = u64::from(64 - self.bits);
        size_offset
            | size_offset << 16
            | self.tg[0] << 14
            | self.tg[1] << 30
            | self.ips << 32
            | u64::from(self.ds) << 59
    }

    fn shift(self, level: i32) -> u32 {
        self.page + (self.page - 3) * (3 - level) as u32
    }

    fn index(self, address: u64, level: i32) -> u64 {
        let top = self.bits.min(self.shift(level) + self.page - 3);
        (address & ((1 << top) - 1)) >> self.shift(level)
    }

    /// An address as descriptors have it.
    fn field(self, address: u64) -> u64 {
        match (self.is_wide(), self.page) {
            (false, _) => address,
            (true, 16) => address & 0xffff_ffff_0000 | (address >> 48) << 12,
            (true, _) => address & 0x3_ffff_ffff_ffff | (address >> 50) << 8,
        }
    }

    fn ttbr(self, table: u64) -> u64 {
        match self.is_wide() {
            true => table & 0xffff_ffff_ffff | (table >> 48) << 2,
            false => table,
        }
    }

    /// Where tables and what they map are: above 48 bits where that can be.
    fn place(self) -> u64 {
        match self.is_wide() {
            true => 0x000d_0000_4000_0000,
            false => 0x0000_0040_0000_0000,
        }
    }

    /// Upper addresses have ones above their bits.
    fn upper(self, address: u64) -> u64 {
        u64::MAX << self.bits | address
    }
}

/// Tables that are made as they are needed.
struct Tables {
    layout: Layout,
    memory: Scattered,
    root: u64,
    next: u64,
}

impl Tables {
    fn new(layout: Layout) -> Self {
        let root = layout.place();
        let mut memory = Scattered::default();
        memory.put(root, 0);
        Self {
            layout,
            memory,
            root,
            next: root + (1 << 16),
        }
    }

    /// Maps `address` by a descriptor of `level`.
    fn map(&mut self, address: u64, physical: u64, level: i32) {
        let mut table = self.root;
        for step in self.layout.first_level..level {
            let place = table + self.layout.index(address, step) * 8;
            if self.memory.get(place) == 0 {
                self.memory.put(place, self.layout.field(self.next) | 3);
                self.memory.put(self.next, 0);
                self.next += 1 << 16;
            }
            let descriptor = self.memory.get(place) & !3;
            table = (self.root..self.next)
                .step_by(1 << 16)
                .find(|table| self.layout.field(*table) == descriptor)
                .unwrap();
        }
        let kind = if level == 3 { 3 } else { 1 };
        let place = table + self.layout.index(address, level) * 8;
        // Attributes on both sides of the address, as a kernel's have them.
        let attributes = 0x0060_0000_0000_0000 | 1 << 10 | 4 << 2;
        self.memory
            .put(place, self.layout.field(physical) | attributes | kind);
        // All of a table is memory.
        for page in 0..16 {
            self.memory
                .pages
                .entry(table / 4096 + page)
                .or_insert(ZERO_PAGE);
        }
    }

    fn walker(&self) -> Walker {
        Walker::new(Regime {
            tcr: self.layout.tcr(),
            ttbr: [self.layout.ttbr(self.root) | 0x1234 << 48; 2],
            enabled: true,
            wide: false,
        })
    }

    fn extent(&mut self, address: u64) -> Result<Extent, Error> {
        self.walker().extent(&mut self.memory, address)
    }
}

#[test]
fn a_page_is_found_where_it_was_mapped_in_every_layout() {
    for layout in LAYOUTS {
        let mut tables = Tables::new(layout);
        let address = 0x9_8765_4000_u64 & ((1 << layout.bits) - 1) & !((1 << layout.page) - 1);
        let physical = layout.place() + 0x1234_0000;
        tables.map(address, physical, 3);
        let size = 1 << layout.page;

        let found = tables.extent(address + 0x120).unwrap();
        let behind = tables.extent(address + size).unwrap();

        let expected = Extent::Mapped {
            physical: physical + 0x120,
            size: size - 0x120,
        };
        assert_eq!(found, expected, "{layout:?}");
        assert_eq!(behind, Extent::Unmapped { size }, "{layout:?}");
    }
}

#[test]
fn an_upper_address_is_translated_by_the_other_base() {
    for layout in LAYOUTS {
        let mut tables = Tables::new(layout);
        let address = 0x8_0001_0000_u64 & ((1 << layout.bits) - 1);
        tables.map(address, layout.place() + 0x20_0000, 3);
        let regime = Regime {
            ttbr: [0, layout.ttbr(tables.root)],
            tcr: layout.tcr(),
            enabled: true,
            wide: false,
        };

        let upper = Walker::new(regime).extent(&mut tables.memory, layout.upper(address));
        let lower = Walker::new(regime).extent(&mut tables.memory, address);

        assert!(
            matches!(upper.unwrap(), Extent::Mapped { .. }),
            "{layout:?}"
        );
        let outside = Fault::TableOutside {
            level: layout.first_level as i8,
            table: 0,
        };
        assert!(
            matches!(lower, Err(Error::Translation { fault, .. }) if fault == outside),
            "{layout:?}"
        );
    }
}

#[test]
fn levels_have_blocks_or_have_not_as_the_architecture_says() {
    for layout in LAYOUTS {
        for level in layout.first_level..3 {
            let mut tables = Tables::new(layout);
            let size = 1_u64 << layout.shift(level);
            // The second block of its level: the first one's tables must not be taken for it.
            let address = size & ((1 << layout.bits) - 1);
            let physical = size.max(layout.place() & !(size - 1));
            tables.map(address, physical, level);

            let found = tables.extent(address + 0x30).unwrap();

            let expected = if layout.blocks.contains(&level) {
                Extent::Mapped {
                    physical: physical + 0x30,
                    size: size - 0x30,
                }
            } else {
                Extent::Unmapped { size: size - 0x30 }
            };
            assert_eq!(found, expected, "{layout:?} level {level}");
        }
    }
}

#[test]
fn a_top_byte_is_ignored_only_if_the_guest_says_so() {
    let layout = LAYOUTS[0];
    let mut tables = Tables::new(layout);
    tables.map(0x5000, layout.place(), 3);
    let mut regime = Regime {
        tcr: layout.tcr(),
        ttbr: [tables.root; 2],
        enabled: true,
        wide: false,
    };
    let tagged = 0x0b00_0000_0000_5000;

    let strict = Walker::new(regime).extent(&mut tables.memory, tagged);
    regime.tcr |= 1 << 37;
    let ignoring = Walker::new(regime);

    assert!(matches!(
        strict,
        Err(Error::Translation {
            fault: Fault::NotCanonical { bits: 48 },
            ..
        })
    ));
    assert_eq!(ignoring.canonical(tagged).unwrap(), 0x5000);
    let upper = ignoring.canonical(0x0f80_0000_0000_5000);
    assert!(upper.is_err(), "TBI1 is not set");
}

#[test]
fn with_the_mmu_off_addresses_are_physical() {
    let regime = Regime {
        tcr: 0,
        ttbr: [0; 2],
        enabled: false,
        wide: false,
    };
    let found = Walker::new(regime).extent(&mut Scattered::default(), 0x4000_0000);
    assert!(matches!(
        found,
        Ok(Extent::Mapped {
            physical: 0x4000_0000,
            ..
        })
    ));
}

#[test]
fn a_range_that_is_turned_off_or_laid_out_wrong_is_named() {
    let fault = |tcr: u64, wide: bool| {
        let regime = Regime {
            tcr,
            ttbr: [0; 2],
            enabled: true,
            wide,
        };
        Walker::new(regime)
            .canonical(0x1000)
            .unwrap_err()
            .to_string()
    };
    let tcr = LAYOUTS[0].tcr();

    assert!(fault(tcr | 1 << 7, false).contains("turns walks"));
    assert!(fault(tcr | 3 << 14, false).contains("TCR_EL1 is"));
    // 64 bits of address, and none.
    assert!(fault(0, false).contains("TCR_EL1 is"));
    assert!(fault(tcr | 0x3f, false).contains("TCR_EL1 is"));
    assert!(fault(tcr, true).contains("128 bits"));
}

#[test]
fn a_table_where_no_memory_is_is_named_with_its_level() {
    let layout = LAYOUTS[0];
    let mut tables = Tables::new(layout);
    tables.memory.put(tables.root, 0x0000_7000_0000_0003);

    let error = tables.extent(0x1000).unwrap_err().to_string();

    assert_eq!(
        error,
        "virtual address 0x1000: its table of level 1 is at 0x700000000000, where the guest has no memory"
    );
}

#[test]
fn tables_that_lead_in_circles_end_at_the_last_level() {
    let layout = LAYOUTS[0];
    let mut tables = Tables::new(layout);
    // The first and only table is the next one of each level.
    tables.memory.put(tables.root, tables.root | 3);

    let found = tables.extent(0x40).unwrap();

    let expected = Extent::Mapped {
        physical: tables.root + 0x40,
        size: 4096 - 0x40,
    };
    assert_eq!(found, expected);
}

#[test]
fn a_range_that_circles_map_again_and_again_is_given_up() {
    let layout = LAYOUTS[0];
    let mut tables = Tables::new(layout);
    for entry in 0..512 {
        tables.memory.put(tables.root + entry * 8, tables.root | 3);
    }
    let walker = tables.walker().limited(5000);
    let space = Space::Virtual(Box::new(walker));
    let mut view = View::new(&mut tables.memory, space, 0..1 << 47).unwrap();

    let given_up = Statistics::of(&mut view);

    assert!(matches!(given_up, Err(Error::TooManyMappings(5000))));
}

#[test]
fn a_dump_by_virtual_addresses_says_what_is_not_mapped() {
    let mut tables = Tables::new(LAYOUTS[0]);
    tables.map(0x5000, tables.root, 3);
    let space = Space::Virtual(Box::new(tables.walker()));
    let mut view = View::new(&mut tables.memory, space, 0x4000..0x7000).unwrap();
    let mut text = Vec::new();

    dump(&mut view, Format::Text, &mut text).unwrap();

    let zeros = "0000000000000000 0000000000000000 0000000000000000 0000000000000000";
    let expected = format!(
        "0x0000000000004000  not mapped up to 0x5000\n0x0000000000005000  {zeros}\n*\n0x0000000000006000  not mapped up to 0x7000\n"
    );
    assert_eq!(String::from_utf8(text).unwrap(), expected);
}

#[test]
fn a_range_has_both_ends_in_the_same_half() {
    let tables = Tables::new(LAYOUTS[0]);
    let walker = tables.walker();
    assert!(
        walker
            .canonical_range(0x1000..0xffff_8000_0000_0000)
            .is_err()
    );
    assert!(
        walker
            .canonical_range(0xffff_8000_0000_0000..0xffff_8000_0000_1000)
            .is_ok()
    );
}

#[test]
fn the_registers_of_a_saved_vcpu_say_where_its_tables_are() {
    let system = |crn, crm, op2| RegisterId::system(3, 0, crn, crm, op2);
    let saved = vcpu(&[
        (system(1, 0, 0), 0x1005),
        (system(2, 0, 0), 0x4_0000),
        (system(2, 0, 1), 0x5_0000),
        (system(2, 0, 2), 0x10),
    ]);

    let regime = Regime::of(&saved).unwrap();

    assert_eq!((regime.ttbr, regime.tcr), ([0x4_0000, 0x5_0000], 0x10));
    assert!(regime.enabled && !regime.wide);
    assert_eq!(regime.rooted_at(0x9000).ttbr, [0x9000; 2]);
    let without = Regime::of(&vcpu(&[(system(1, 0, 0), 1)]));
    assert!(matches!(without, Err(Error::NoRegister("TCR_EL1"))));
}

/// A descriptor: of a table or page among a few, or nonsense.
fn any_descriptor() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0u64..8, 0u64..4).prop_map(|(page, kind)| page << 12 | kind),
        any::<u64>(),
    ]
}

proptest! {
    #[test]
    fn no_tables_registers_or_addresses_are_too_hostile(
        tables in proptest::collection::vec(any_descriptor(), 8 * 512),
        fields in (any::<u64>(), 12u64..49, 12u64..49, any::<bool>()),
        ttbr in prop_oneof![(0u64..8).prop_map(|page| page << 12), any::<u64>()],
        addresses in proptest::collection::vec(prop_oneof![any::<u64>(), 0u64..1 << 48, (u64::MAX << 48)..], 16),
    ) {
        let (noise, lower, upper, is_noise) = fields;
        let tcr = if is_noise { noise } else { noise & 0xfc30_003f_c000_c000 & !(1 << 63) | lower | upper << 16 };
        let regime = Regime { tcr, ttbr: [ttbr; 2], enabled: true, wide: false };
        let mut memory = Scattered::default();
        for (place, descriptor) in (0u64..).zip(&tables) {
            memory.put(place * 8, *descriptor);
        }
        let mut walker = Walker::new(regime);
        for address in addresses {
            if let Ok(extent) = walker.extent(&mut memory, address) {
                prop_assert!(extent.size() >= 1);
                prop_assert!(address.checked_add(extent.size() - 1).is_some());
                prop_assert!(extent.size() <= 1 << 52);
            }
        }
    }
}
