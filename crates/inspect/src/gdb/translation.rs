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
use crate::walk::{Extent, Regime, Walker};

/// Walks of tables for one request: of no more than this many pages.
const MOST_WALKS: u64 = 1 << 16;

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
