//! A machine's memory by the addresses that a vCPU uses: through its stage-1 tables, or physical where its MMU is off.

use std::ops::Range;

use engine::{Vcpu, VcpuState};
use mte::TagPage;
use stream::Page;

use super::Debuggee;
use crate::error::{Error, Result};
use crate::memory::{TaggedMemory, Visitor};
use crate::registers::{SCTLR_EL1, TCR_EL1, TCR2_EL1, TTBR0_EL1, TTBR1_EL1};
use crate::view::PAGE;
use crate::walk::{Extent, Fault, Regime, Walker};

/// Walks of tables for one request: of no more than this many pages.
const MOST_WALKS: u64 = 1 << 16;

/// Addresses that are alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// The last of them is in it, but for the last of all.
    pub addresses: Range<u64>,
    /// Whether they are mapped to RAM.
    pub is_ram: bool,
}

/// The translation that a vCPU has now.
///
/// # Errors
/// The vCPU does not tell.
pub fn regime(vcpu: &impl Vcpu) -> engine::Result<Regime> {
    Ok(Regime {
        tcr: vcpu.register_u64(TCR_EL1)?,
        ttbr: [vcpu.register_u64(TTBR0_EL1)?, vcpu.register_u64(TTBR1_EL1)?],
        enabled: vcpu.register_u64(SCTLR_EL1)? & 1 != 0,
        // CPUs without the register have no wide descriptors.
        wide: vcpu.register_u64(TCR2_EL1).unwrap_or(0) >> 5 & 1 != 0,
    })
}

/// Where `length` bytes from `address` on are, piece by piece; fewer where the rest is not mapped to RAM.
///
/// # Errors
/// There are too many pieces.
pub fn locate(
    machine: &impl Debuggee,
    regime: Regime,
    address: u64,
    length: u64,
) -> Result<Vec<Range<u64>>> {
    let mut walker = Walker::new(regime).limited(MOST_WALKS);
    let mut pieces: Vec<Range<u64>> = Vec::new();
    let ram = machine.ram();
    let mut done = 0;
    while done < length {
        let Some(at) = address.checked_add(done) else {
            break;
        };
        let extent = match walker.extent(&mut Tables(machine), at) {
            Ok(extent) => extent,
            Err(Error::Translation { .. }) => break,
            Err(e) => return Err(e),
        };
        let Extent::Mapped { physical, size } = extent else {
            break;
        };
        if !ram.contains(&physical) {
            break;
        }
        let size = size.min(length - done).min(ram.end - physical);
        match pieces.last_mut() {
            Some(last) if last.end == physical => last.end += size,
            _ => pieces.push(physical..physical + size),
        }
        done += size;
    }
    Ok(pieces)
}

/// The addresses from the page of `address` on that are all mapped to RAM, or all not; as many of them as one request may find.
///
/// # Errors
/// A table cannot be read.
pub fn region(machine: &impl Debuggee, regime: Regime, address: u64) -> Result<Region> {
    let mut walker = Walker::new(regime).limited(MOST_WALKS);
    let start = address - address % PAGE;
    let (size, is_ram) = alike(machine, &mut walker, start)?;
    let mut end = start.checked_add(size);
    while let Some(at) = end {
        match alike(machine, &mut walker, at) {
            Ok((size, same)) if same == is_ram => end = at.checked_add(size),
            Ok(_) | Err(Error::TooManyMappings(_)) => break,
            Err(e) => return Err(e),
        }
    }
    let addresses = start..end.unwrap_or(u64::MAX);
    Ok(Region { addresses, is_ram })
}

/// How many bytes from an address on are surely like it, and whether that is mapped to RAM.
fn alike(machine: &impl Debuggee, walker: &mut Walker, address: u64) -> Result<(u64, bool)> {
    let ram = machine.ram();
    match walker.extent(&mut Tables(machine), address) {
        Ok(Extent::Unmapped { size }) => Ok((size, false)),
        Ok(Extent::Mapped { physical, size }) => Ok(match physical {
            below if below < ram.start => (size.min(ram.start - below), false),
            within if within < ram.end => (size.min(ram.end - within), true),
            _ => (size, false),
        }),
        Err(Error::Translation { fault, .. }) => Ok(match fault {
            Fault::NotCanonical { bits } => {
                let gap = (u64::MAX << bits).saturating_sub(address);
                (gap.max(PAGE), false)
            }
            _ => (PAGE, false),
        }),
        Err(e) => Err(e),
    }
}

/// Where one address is.
pub fn physical(machine: &impl Debuggee, regime: Regime, address: u64) -> Option<u64> {
    let pieces = locate(machine, regime, address, 1).ok()?;
    Some(pieces.first()?.start)
}

/// A machine's memory as what tables are read from.
struct Tables<'a, D>(&'a D);

impl<D: Debuggee> TaggedMemory for Tables<'_, D> {
    fn has_tags(&self) -> bool {
        false
    }

    fn ram(&self) -> Range<u64> {
        let ram = self.0.ram();
        ram.start / PAGE..ram.end / PAGE
    }

    fn vcpus(&self) -> &[VcpuState] {
        &[]
    }

    fn next_run(&mut self, from: u64) -> Result<Option<Range<u64>>> {
        let ram = self.ram();
        let rest = from.max(ram.start)..ram.end;
        Ok((!rest.is_empty()).then_some(rest))
    }

    fn read(&mut self, first: u64, data: &mut [Page], _: &mut [TagPage]) -> Result<()> {
        self.0
            .read(first * PAGE, data.as_flattened_mut())
            .map_err(crate::error::output("read the guest's translation tables"))
    }

    fn visit(&mut self, _: Range<u64>, _: Visitor<'_>) -> Result<()> {
        Ok(())
    }
}
