//! One address: where it is, what is there, what tags are around it, and whether a pointer's tag is that of memory.

use std::fmt;
use std::ops::Range;

use mte::{GRANULE_SIZE, Tag};
use serde::{Serialize, Serializer};

use crate::error::Result;
use crate::memory::TaggedMemory;
use crate::view::{PAGE, Part, Space, View};
use crate::walk::{Extent, Walker};

const GRANULE: u64 = GRANULE_SIZE as u64;
/// Granules that are shown before that of the address, and from it on.
const AROUND: u64 = 8;
/// Bytes that are shown from the granule's first on.
const SHOWN: u64 = 4 * GRANULE;

/// What is at an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The address as it was given, with its tag.
    #[serde(serialize_with = "hexadecimal")]
    pub pointer: u64,
    /// The address as translation takes it.
    #[serde(serialize_with = "hexadecimal")]
    pub address: u64,
    /// Where it is; none if it is not mapped.
    #[serde(serialize_with = "maybe_hexadecimal")]
    pub physical: Option<u64>,
    /// Bits 59 to 56 of the pointer; none if they are no tag.
    #[serde(serialize_with = "number")]
    pub pointer_tag: Option<Tag>,
    /// Those of the 16 granules around it, none where nothing is populated or no tags are.
    #[serde(serialize_with = "numbers")]
    pub tags: Vec<Option<Tag>>,
    /// The address of the first of them.
    #[serde(serialize_with = "hexadecimal")]
    pub first: u64,
    /// Bytes from its granule's first on, as many as are populated, at most 64.
    pub data: Vec<u8>,
}

fn hexadecimal<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{value:#x}"))
}

fn maybe_hexadecimal<S: Serializer>(value: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => hexadecimal(value, to),
        None => to.serialize_none(),
    }
}

fn number<S: Serializer>(tag: &Option<Tag>, to: S) -> Result<S::Ok, S::Error> {
    tag.map(Tag::value).serialize(to)
}

fn numbers<S: Serializer>(tags: &[Option<Tag>], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(tags.iter().map(|tag| tag.map(Tag::value)))
}

impl Place {
    /// What is where `pointer` points: to a virtual address of `walker`'s tables, or to a guest-physical one.
    ///
    /// # Errors
    /// What the tables say is not understood; whatever keeps the memory from being read.
    pub fn of(
        memory: &mut dyn TaggedMemory,
        mut walker: Option<Walker>,
        pointer: u64,
    ) -> Result<Self> {
        let (address, physical) = match &mut walker {
            None => {
                let address = pointer & ((PAGE << 40) - 1);
                (address, Some(address))
            }
            Some(walker) => {
                let address = walker.canonical(pointer)?;
                match walker.extent(memory, address)? {
                    Extent::Mapped { physical, .. } => (address, Some(physical)),
                    Extent::Unmapped { .. } => (address, None),
                }
            }
        };
        let pointer_tag = match &walker {
            Some(walker) => walker.pointer_tag(pointer),
            None => (pointer >> 56 != 0).then(|| Tag::of_address(pointer)),
        };
        let granule = address / GRANULE * GRANULE;
        let around =
            granule.saturating_sub(AROUND * GRANULE)..granule.saturating_add(AROUND * GRANULE);
        let translates = |address| match &walker {
            Some(walker) => walker.canonical(address).is_ok(),
            None => true,
        };
        // At the ends of what is translated, of its own page alone.
        let Range { start: first, end } = match translates(around.start) && translates(around.end) {
            true => around,
            false => {
                let page = address / PAGE * PAGE;
                around.start.max(page)..around.end.min(page.saturating_add(PAGE))
            }
        };
        let mut place = Self {
            pointer,
            address,
            physical,
            pointer_tag,
            tags: vec![None; ((end - first) / GRANULE) as usize],
            first,
            data: Vec::new(),
        };
        let space = match walker {
            Some(walker) => Space::Virtual(Box::new(walker)),
            None => Space::Physical,
        };
        View::new(memory, space, first..end)?.visit_in_order(&mut |part| {
            if let Part::Pages {
                address,
                data,
                tags,
            } = part
            {
                for (page, number) in data.iter().zip(0..) {
                    place.see(address + number as u64 * PAGE, page, tags.get(number));
                }
            }
            Ok(())
        })?;
        Ok(place)
    }

    /// Takes what it is to show of the page at `at`.
    fn see(&mut self, at: u64, page: &[u8], tags: Option<&mte::TagPage>) {
        for (tag, address) in self
            .tags
            .iter_mut()
            .zip((self.first..).step_by(GRANULE_SIZE))
        {
            if let Some(tags) = tags
                && address / PAGE == at / PAGE
            {
                *tag = Some(tags.get(mte::TagPage::index_of(address)));
            }
        }
        let start = self.address / GRANULE * GRANULE + self.data.len() as u64;
        let wanted = SHOWN - self.data.len() as u64;
        if start / PAGE == at / PAGE {
            let from = (start - at) as usize;
            let bytes = page[from..].iter().take(wanted as usize);
            self.data.extend(bytes);
        }
    }

    /// The tag of the memory there; none if nothing is populated or there are no tags.
    pub fn memory_tag(&self) -> Option<Tag> {
        let index = (self.address - self.first) / GRANULE;
        *self.tags.get(index as usize)?
    }

    /// The granules that are shown.
    fn granules(&self) -> Range<u64> {
        0..self.tags.len() as u64
    }
}

/// Lines, the last without an end.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pointer {:#018x}", self.pointer)?;
        if let Some(tag) = self.pointer_tag {
            write!(f, ", tag {tag},")?;
        }
        match self.physical {
            None => return f.write_str(" is mapped nowhere"),
            Some(physical) => write!(f, " is guest-physical {physical:#x}")?,
        }
        match (self.memory_tag(), self.pointer_tag) {
            (None, _) => f.write_str(
                ", where no tag is: nothing is populated there, or the guest has no tags",
            )?,
            (Some(tag), None) => write!(f, ", memory tag {tag}")?,
            (Some(tag), Some(pointer)) if tag == pointer => {
                write!(f, ", memory tag {tag}: they match")?;
            }
            (Some(tag), Some(_)) => write!(f, ", memory tag {tag}: they do not match")?,
        }
        let here = (self.address - self.first) / GRANULE;
        write!(
            f,
            "\ntags from {:#018x}, a granule of 16 bytes each:\n ",
            self.first
        )?;
        for index in self.granules() {
            let [before, behind] = match (index == here, index == here + 1) {
                (true, _) => ["[", "]"],
                (_, true) => ["", ""],
                _ => [" ", ""],
            };
            match self.tags[index as usize] {
                Some(tag) => write!(f, "{before}{tag}{behind}")?,
                None => write!(f, "{before}.{behind}")?,
            }
        }
        let start = self.address / GRANULE * GRANULE;
        for (bytes, number) in self.data.chunks(GRANULE_SIZE).zip(0..) {
            write!(f, "\n{:#018x} ", start + number * GRANULE)?;
            for byte in bytes {
                write!(f, " {byte:02x}")?;
            }
            let shown = |byte: &u8| match byte {
                0x20..=0x7e => char::from(*byte),
                _ => '.',
            };
            let text: String = bytes.iter().map(shown).collect();
            write!(f, "  {text}")?;
        }
        Ok(())
    }
}
