//! Which part of a machine's memory a command is about, as a user says it.

use std::ops::Range;
use std::str::FromStr;

use clap::Args as ClapArgs;
use inspect::walk::{Regime, Walker};
use inspect::{Space, TaggedMemory, View, vcpu_of_process};

/// A range, and whose addresses it has.
#[derive(ClapArgs)]
pub struct Addresses {
    /// These addresses alone, as START..END or START+SIZE: 0x40000000..0x40100000, 0x40000000+64K
    #[arg(long, value_name = "RANGE")]
    range: Option<AddressRange>,
    #[command(flatten)]
    space: SpaceArgs,
}

/// Whose addresses.
#[derive(ClapArgs)]
pub struct SpaceArgs {
    /// Addresses are virtual, as this vCPU's tables (EL1, EL0) have them; the first vCPU is 0
    #[arg(long, value_name = "N")]
    vcpu: Option<usize>,
    /// Addresses are virtual, with the first table at this guest-physical address, laid out as the vCPU's
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    ttbr: Option<u64>,
    /// Addresses are virtual, as this process of a Linux guest has them: one that a vCPU runs at the moment
    #[arg(long, value_name = "N", conflicts_with_all = ["vcpu", "ttbr"])]
    pid: Option<u32>,
}

/// A range of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressRange(pub Range<u64>);

impl FromStr for AddressRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let range = if let Some((start, end)) = text.split_once("..") {
            parse_address(start)?..parse_address(end)?
        } else if let Some((start, size)) = text.split_once('+') {
            let start = parse_address(start)?;
            let end = start.checked_add(parse_size(size)?);
            start..end.ok_or("it ends above all addresses")?
        } else {
            return Err("expected START..END or START+SIZE".into());
        };
        if range.is_empty() {
            return Err("it is empty".into());
        }
        Ok(Self(range))
    }
}

/// An address: hexadecimal behind `0x`, decimal otherwise.
pub fn parse_address(text: &str) -> Result<u64, String> {
    let digits = text.trim().replace('_', "");
    let parsed = match digits.strip_prefix("0x") {
        Some(hexadecimal) => u64::from_str_radix(hexadecimal, 16),
        None => digits.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is no address, such as 0x40000000"))
}

/// A number of bytes: an address's digits, or with a unit, K, M, G or T.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let upper = text.trim().to_ascii_uppercase();
    let units = [("K", 10), ("M", 20), ("G", 30), ("T", 40)];
    // Hexadecimal digits are none of them.
    let unit = units.iter().find(|(unit, _)| upper.ends_with(unit));
    let Some((unit, shift)) = unit else {
        return parse_address(text)
            .map_err(|_| format!("`{text}` is no size, such as 0x1000 or 64K"));
    };
    let number: Option<u64> = upper.trim_end_matches(unit).trim().parse().ok();
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("`{text}` is no size, such as 0x1000 or 64K"))
}

impl Addresses {
    /// What is meant of `memory`: all of it unless a range was given.
    pub fn view<'a>(&self, memory: &'a mut dyn TaggedMemory) -> Result<View<'a>, String> {
        let range = self.range.as_ref().map(|range| range.0.clone());
        self.space.view(memory, range)
    }
}

impl SpaceArgs {
    /// A range of `memory`, or all of it.
    pub fn view<'a>(
        &self,
        memory: &'a mut dyn TaggedMemory,
        range: Option<Range<u64>>,
    ) -> Result<View<'a>, String> {
        let walker = self.walker(memory)?;
        let view = match (walker, range) {
            (None, None) => View::whole(memory),
            (None, Some(range)) => View::new(memory, Space::Physical, range),
            (Some(_), None) => {
                return Err("virtual addresses need a range: give --range START..END".into());
            }
            (Some(walker), Some(range)) => walker
                .canonical_range(range)
                .and_then(|range| View::new(memory, Space::Virtual(Box::new(walker)), range)),
        };
        view.map_err(|e| e.to_string())
    }

    /// Walks the tables that are meant; none if addresses are guest-physical.
    pub fn walker(&self, memory: &dyn TaggedMemory) -> Result<Option<Walker>, String> {
        if self.vcpu.is_none() && self.ttbr.is_none() && self.pid.is_none() {
            return Ok(None);
        }
        let vcpus = memory.vcpus();
        let wanted = match self.pid {
            Some(pid) => vcpu_of_process(vcpus, pid).map_err(|e| e.to_string())?,
            None => self.vcpu.unwrap_or(0),
        };
        let missing = inspect::Error::NoVcpu {
            wanted,
            known: vcpus.len(),
        };
        let vcpu = vcpus.get(wanted).ok_or_else(|| missing.to_string())?;
        let mut regime = Regime::of(vcpu).map_err(|e| e.to_string())?;
        if let Some(ttbr) = self.ttbr {
            regime = regime.rooted_at(ttbr);
        }
        Ok(Some(Walker::new(regime)))
    }

    /// The address that a pointer means: without the tag, and whatever else translation ignores.
    pub fn address_of(&self, memory: &dyn TaggedMemory, pointer: u64) -> Result<u64, String> {
        match self.walker(memory)? {
            Some(walker) => walker.canonical(pointer).map_err(|e| e.to_string()),
            // A physical address has at most 52 bits.
            None => Ok(pointer & ((1 << 56) - 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_an_end_or_a_size() {
        let range = |text: &str| text.parse::<AddressRange>().map(|range| range.0);
        assert_eq!(range("0x4000..0x5000"), Ok(0x4000..0x5000));
        assert_eq!(range("0x4000+4K"), Ok(0x4000..0x5000));
        assert_eq!(
            range("0xffff_8000_0000_0000+0x10").map(|it| it.end),
            Ok(0xffff_8000_0000_0010)
        );
        assert_eq!(range("16+2M"), Ok(16..16 + (2 << 20)));
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for text in [
            "",
            "0x4000",
            "0x5000..0x4000",
            "0x4000+0",
            "..",
            "x+1",
            "0x4000+4Q",
            "0xffffffffffffffff+2",
            "0x4000+99999999999T",
        ] {
            assert!(text.parse::<AddressRange>().is_err(), "{text}");
        }
    }
}
