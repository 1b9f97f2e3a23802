//! What is mapped where, as the guest's translation tables say: stage 1 of EL1 and EL0 (Arm ARM D8.2, D8.3).
//!
//! Pages of 4, 16 and 64 KiB, virtual and physical addresses of up to 52 bits (`FEAT_LPA`, `FEAT_LVA`, `FEAT_LPA2`), top
//! bytes that are ignored. The tables are the guest's and say what it likes: each step goes one level down, so that
//! tables which lead in circles end at the last level; a walker takes a bounded number of walks; and a table where no memory
//! is, is a [`Fault`].

use std::fmt;
use std::ops::Range;

use engine::VcpuState;
use mte::{PageSize, Tag, TcrEl1, VaRange};
use stream::{Page, ZERO_PAGE};

use crate::error::{Error, Result};
use crate::memory::TaggedMemory;
use crate::registers::{self, must_have};
use crate::view::PAGE;

/// The most walks that one [`Walker`] does: 64 GiB of 4 KiB pages.
pub const MAX_WALKS: u64 = 1 << 24;

/// Levels are -1 to 3.
const LAST_LEVEL: i8 = 3;
const LEVELS: usize = 5;

/// Why an address cannot be translated, whatever its tables say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is between the two ranges that TTBR0_EL1 and TTBR1_EL1 translate.
    NotCanonical {
        /// Bits of the range that it is next to.
        bits: u32,
    },
    /// `TCR_EL1.EPD0` or `EPD1`: walks of its range are turned off.
    Disabled,
    /// `TCR_EL1` has a value that no Arm CPU with its page size takes.
    Control {
        /// The register.
        tcr: u64,
    },
    /// The tables have descriptors of 128 bits.
    Wide,
    /// A table is where the guest has no memory.
    TableOutside {
        /// Of the level, -1 to 3.
        level: i8,
        /// Its guest-physical address.
        table: u64,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotCanonical { bits } => write!(
                f,
                "no table can map it: virtual addresses have {bits} bits here, and those above do not fit"
            ),
            Self::Disabled => f.write_str("TCR_EL1 turns walks of its range off"),
            Self::Control { tcr } => write!(
                f,
                "TCR_EL1 is {tcr:#x}, which lays out no tables for it: was the MMU ever set up?"
            ),
            Self::Wide => f.write_str(
                "the tables have descriptors of 128 bits, which are not understood here",
            ),
            Self::TableOutside { level, table } => write!(
                f,
                "its table of level {level} is at {table:#x}, where the guest has no memory"
            ),
        }
    }
}

/// What is known of an address and those behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// It is mapped, and so are the bytes behind it, one after the other.
    Mapped {
        /// Where it is.
        physical: u64,
        /// Bytes from it on.
        size: u64,
    },
    /// It is not mapped.
    Unmapped {
        /// Bytes from it on that are not either.
        size: u64,
    },
}

impl Extent {
    /// Bytes.
    pub const fn size(self) -> u64 {
        match self {
            Self::Mapped { size, .. } | Self::Unmapped { size } => size,
        }
    }
}

/// The registers that say where tables are and how they are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regime {
    /// `TCR_EL1`.
    pub tcr: u64,
    /// `TTBR0_EL1` and `TTBR1_EL1`.
    pub ttbr: [u64; 2],
    /// `SCTLR_EL1.M`. If clear, addresses are physical ones.
    pub enabled: bool,
    /// `TCR2_EL1.D128`.
    pub wide: bool,
}

impl Regime {
    /// That of a vCPU, as it was saved.
    ///
    /// # Errors
    /// [`Error::NoRegister`].
    pub fn of(vcpu: &VcpuState) -> Result<Self> {
        let tcr2 = registers::value(vcpu, registers::TCR2_EL1).unwrap_or(0);
        Ok(Self {
            tcr: must_have(vcpu, registers::TCR_EL1, "TCR_EL1")?,
            ttbr: [
                must_have(vcpu, registers::TTBR0_EL1, "TTBR0_EL1")?,
                must_have(vcpu, registers::TTBR1_EL1, "TTBR1_EL1")?,
            ],
            enabled: must_have(vcpu, registers::SCTLR_EL1, "SCTLR_EL1")? & 1 != 0,
            wide: tcr2 >> 5 & 1 != 0,
        })
    }

    /// The same layout with another table at its root, in either range: the value that its TTBR would have.
    #[must_use]
    pub const fn rooted_at(self, ttbr: u64) -> Self {
        Self {
            ttbr: [ttbr; 2],
            enabled: true,
            ..self
        }
    }

    /// How the tables of a range are laid out.
    fn layout(&self, range: VaRange) -> Result<Layout, Fault> {
        let field = |shift: u32, mask: u64| self.tcr >> shift & mask;
        let (size_offset, walks_off, page, ttbr) = match range {
            VaRange::Lower => {
                let page = match field(14, 3) {
                    0b00 => Some(PageSize::Kib4),
                    0b01 => Some(PageSize::Kib64),
                    0b10 => Some(PageSize::Kib16),
                    _ => None,
                };
                (field(0, 0x3f), field(7, 1), page, self.ttbr[0])
            }
            VaRange::Upper => {
                let page = match field(30, 3) {
                    0b01 => Some(PageSize::Kib16),
                    0b10 => Some(PageSize::Kib4),
                    0b11 => Some(PageSize::Kib64),
                    _ => None,
                };
                (field(16, 0x3f), field(23, 1), page, self.ttbr[1])
            }
        };
        if self.wide {
            return Err(Fault::Wide);
        }
        if walks_off != 0 {
            return Err(Fault::Disabled);
        }
        let wrong = Fault::Control { tcr: self.tcr };
        let page = page.ok_or(wrong)?;
        // DS means nothing where pages have 64 KiB.
        let ds = field(59, 1) != 0 && page != PageSize::Kib64;
        let bits = 64 - size_offset as u32;
        let most = if ds || page == PageSize::Kib64 {
            52
        } else {
            48
        };
        let layout = Layout {
            offset_bits: page.bytes().ilog2(),
            bits,
            ds,
            wide_output: ds || page == PageSize::Kib64 && field(32, 7) == 0b110,
            ttbr,
        };
        if bits > most || bits <= layout.offset_bits {
            return Err(wrong);
        }
        Ok(layout)
    }

    /// The address without what translation ignores, its upper bits as its range has them, and the layout of its tables.
    fn of_address(&self, address: u64) -> Result<(u64, Layout), Fault> {
        let range = VaRange::of_address(address);
        let layout = self.layout(range)?;
        let tcr = TcrEl1::from_bits(self.tcr);
        let ignored = match (tcr.tbi(range), tcr.mtx(range)) {
            (true, _) => 0xff << 56,
            (false, true) => 0x0f << 56,
            (false, false) => 0,
        };
        let upper = u64::MAX << layout.bits;
        let expected = match range {
            VaRange::Lower => 0,
            VaRange::Upper => upper,
        };
        if (address ^ expected) & upper & !ignored != 0 {
            return Err(Fault::NotCanonical { bits: layout.bits });
        }
        Ok((address & !upper | expected, layout))
    }
}

/// How the tables of one range of addresses are laid out.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// Bits of an address within a page.
    offset_bits: u32,
    /// Bits of an address that are translated.
    bits: u32,
    /// `TCR_EL1.DS`: 52 bits with pages of 4 and 16 KiB.
    ds: bool,
    /// Physical addresses have 52 bits.
    wide_output: bool,
    ttbr: u64,
}

/// What a descriptor says.
enum Descriptor {
    Table(u64),
    /// A block or a page.
    Leaf(u64),
    Invalid,
}

impl Layout {
    /// Bits of an address that a whole table resolves.
    const fn stride(self) -> u32 {
        self.offset_bits - 3
    }

    /// The level of the first table.
    const fn first_level(self) -> i8 {
        LAST_LEVEL + 1 - (self.bits - self.offset_bits).div_ceil(self.stride()) as i8
    }

    /// Bits of an address below those that a level resolves.
    const fn shift(self, level: i8) -> u32 {
        self.offset_bits + self.stride() * (LAST_LEVEL - level) as u32
    }

    /// The first table: as large as it must be, and aligned to that (Arm ARM D8.2.5).
    fn root(self) -> u64 {
        let entries_bits = self.bits - self.shift(self.first_level());
        let low = match self.wide_output {
            true => (entries_bits + 3).max(6),
            false => entries_bits + 3,
        };
        let base = self.ttbr & bits(low, 48);
        match self.wide_output {
            true => base | (self.ttbr >> 2 & 0xf) << 48,
            false => base,
        }
    }

    /// The address in a descriptor whose lowest `low` bits are no address (Arm ARM D8.3.1).
    fn output(self, descriptor: u64, low: u32) -> u64 {
        match (self.wide_output, self.ds) {
            (true, true) => descriptor & bits(low, 50) | (descriptor >> 8 & 3) << 50,
            (true, false) => descriptor & bits(low, 48) | (descriptor >> 12 & 0xf) << 48,
            (false, _) => descriptor & bits(low, 48),
        }
    }

    /// Whether a level can have blocks (Arm ARM table D8-14).
    fn has_blocks(self, level: i8) -> bool {
        let first = match self.offset_bits {
            12 if self.ds => 0,
            12 => 1,
            14 if self.ds => 1,
            14 => 2,
            _ if self.wide_output => 1,
            _ => 2,
        };
        (first..LAST_LEVEL).contains(&level)
    }

    fn read(self, descriptor: u64, level: i8) -> Descriptor {
        match (descriptor & 3, level) {
            (0b11, LAST_LEVEL) => Descriptor::Leaf(self.output(descriptor, self.offset_bits)),
            (0b11, _) => Descriptor::Table(self.output(descriptor, self.offset_bits)),
            (0b01, _) if self.has_blocks(level) => {
                Descriptor::Leaf(self.output(descriptor, self.shift(level)))
            }
            _ => Descriptor::Invalid,
        }
    }
}

/// Bits `low` to `end` - 1.
const fn bits(low: u32, end: u32) -> u64 {
    ((1 << end) - 1) & (u64::MAX << low)
}

/// Walks tables, and remembers those that it read last.
pub struct Walker {
    regime: Regime,
    walks: u64,
    limit: u64,
    /// For each level the page of tables read last, and what is in it.
    read: [(Option<u64>, Box<Page>); LEVELS],
}

impl Walker {
    /// A walker of these tables.
    pub fn new(regime: Regime) -> Self {
        Self {
            regime,
            walks: 0,
            limit: MAX_WALKS,
            read: std::array::from_fn(|_| (None, Box::new(ZERO_PAGE))),
        }
    }

    /// Gives up after so many walks, instead of [`MAX_WALKS`].
    #[must_use]
    pub fn limited(self, limit: u64) -> Self {
        Self { limit, ..self }
    }

    /// The address that translation takes this one for.
    ///
    /// # Errors
    /// [`Error::Translation`].
    pub fn canonical(&self, address: u64) -> Result<u64> {
        if !self.regime.enabled {
            return Ok(address & bits(0, 56));
        }
        let canonical = self.regime.of_address(address);
        let (address, _) = canonical.map_err(|fault| Error::Translation { address, fault })?;
        Ok(address)
    }

    /// The tag of a pointer; none if bits 59 to 56 are part of its address, or are the tag with which nothing is checked (`TCR_EL1.TCMA0`,
    /// `TCMA1`), as pointers of a Linux with KASAN have it. With the MMU off, a top byte that is 0 has no tag.
    pub const fn pointer_tag(&self, pointer: u64) -> Option<Tag> {
        let range = VaRange::of_address(pointer);
        let tcr = TcrEl1::from_bits(self.regime.tcr);
        let tag = Tag::of_address(pointer);
        let of_all = match range {
            VaRange::Lower => 0,
            VaRange::Upper => 0xf,
        };
        let has_tag = match self.regime.enabled {
            true if tcr.tcma(range) && tag.value() == of_all => false,
            true => tcr.tbi(range) || tcr.mtx(range),
            false => pointer >> 56 != 0,
        };
        if has_tag { Some(tag) } else { None }
    }

    /// The range of addresses that translation takes these for: both ends are in the same range of addresses.
    ///
    /// # Errors
    /// [`Error::Translation`]; [`Error::EmptyRange`].
    pub fn canonical_range(&self, range: Range<u64>) -> Result<Range<u64>> {
        let empty = Error::EmptyRange {
            start: range.start,
            end: range.end,
        };
        let last = range.end.checked_sub(1);
        let Some(last) = last.filter(|last| *last >= range.start) else {
            return Err(empty);
        };
        let [start, last] = [self.canonical(range.start)?, self.canonical(last)?];
        let same_half = VaRange::of_address(start) == VaRange::of_address(last);
        match last.checked_add(1) {
            Some(end) if start <= last && (same_half || !self.regime.enabled) => Ok(start..end),
            _ => Err(empty),
        }
    }

    /// What is known of an address and those behind it.
    ///
    /// # Errors
    /// [`Error::Translation`]; [`Error::TooManyMappings`]; what keeps the memory from being read.
    pub fn extent(&mut self, memory: &mut dyn TaggedMemory, address: u64) -> Result<Extent> {
        self.walks += 1;
        if self.walks > self.limit {
            return Err(Error::TooManyMappings(self.limit));
        }
        if !self.regime.enabled {
            return Ok(Extent::Mapped {
                physical: address,
                // All bytes to the last, that among them.
                size: (u64::MAX - address).saturating_add(1),
            });
        }
        let failed = |fault| Error::Translation { address, fault };
        let (canonical, layout) = self.regime.of_address(address).map_err(failed)?;
        let mut table = layout.root();
        let mut level = layout.first_level();
        loop {
            let shift = layout.shift(level);
            let top = layout.bits.min(shift + layout.stride());
            let index = (canonical & bits(shift, top)) >> shift;
            let place = table.wrapping_add(index * 8);
            let descriptor = self.descriptor(memory, level, place)?;
            let descriptor =
                descriptor.ok_or_else(|| failed(Fault::TableOutside { level, table }))?;
            let within = canonical & bits(0, shift);
            let size = (1 << shift) - within;
            match layout.read(descriptor, level) {
                Descriptor::Table(next) => (table, level) = (next, level + 1),
                Descriptor::Leaf(physical) => {
                    return Ok(Extent::Mapped {
                        physical: physical | within,
                        size,
                    });
                }
                Descriptor::Invalid => return Ok(Extent::Unmapped { size }),
            }
        }
    }

    /// The descriptor at a guest-physical address; none if there is no memory.
    fn descriptor(
        &mut self,
        memory: &mut dyn TaggedMemory,
        level: i8,
        place: u64,
    ) -> Result<Option<u64>> {
        let page = place / PAGE;
        let (known, data) = &mut self.read[(level + 1) as usize];
        if *known != Some(page) {
            let populated = memory
                .next_run(page)?
                .is_some_and(|run| run.contains(&page));
            if !populated && !memory.ram().contains(&page) {
                return Ok(None);
            }
            *known = None;
            let mut tags = [mte::TagPage::ZERO];
            let tags = &mut tags[..usize::from(memory.has_tags())];
            memory.read(page, std::slice::from_mut(&mut **data), tags)?;
            *known = Some(page);
        }
        let offset = (place % PAGE) as usize / 8 * 8;
        let bytes = data[offset..]
            .first_chunk()
            .expect("a page has whole descriptors");
        Ok(Some(u64::from_le_bytes(*bytes)))
    }
}
