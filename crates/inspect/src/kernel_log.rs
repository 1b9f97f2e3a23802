//! The log of a Linux guest's kernel, as it is in its memory.
//!
//! Linux names its log's place and layout in VMCOREINFO, for whoever reads a dead kernel's memory (`kernel/printk/printk.c`,
//! `kernel/printk/printk_ringbuffer.h`): a ring of descriptors, each with the place of its text in a ring of bytes. All of it is the
//! guest's and says what it likes: rings have a size that is bounded, so many records are looked at and no more, and what does not fit is
//! no record.

use crate::core::vmcoreinfo_of;
use crate::error::Result;
use crate::memory::TaggedMemory;
use crate::view::PAGE;
use crate::walk::{Extent, Regime, Walker};
use stream::ZERO_PAGE;

/// The most records that are looked at.
const MAX_RECORDS: u64 = 4096;
/// The most descriptors and bytes of text of a ring, as powers of two: 2^22, and 2 GiB as Linux has it.
const MAX_DESCRIPTOR_BITS: u64 = 22;
const MAX_TEXT_BITS: u64 = 31;
/// The most bytes of a record's text that are shown.
const MAX_TEXT: usize = 1024;
/// What begins the text of a block: the number of its descriptor.
const BLOCK_HEADER: u64 = 8;
/// A descriptor's state is in the two highest bits of its number (`DESC_FLAGS_SHIFT`).
const NUMBER: u64 = (1 << 62) - 1;
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;

/// Reads VMCOREINFO's lines.
struct Names<'a>(&'a str);

impl Names<'_> {
    fn value(&self, key: &str) -> Option<&str> {
        let mut lines = self.0.lines();
        lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }

    fn symbol(&self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.value(&format!("SYMBOL({name})"))?, 16).ok()
    }

    fn offset(&self, field: &str) -> Option<u64> {
        let offset = self.value(&format!("OFFSET({field})"))?.parse().ok()?;
        (offset < PAGE).then_some(offset)
    }

    fn size(&self, name: &str) -> Option<u64> {
        let size = self.value(&format!("SIZE({name})"))?.parse().ok()?;
        (1..PAGE).contains(&size).then_some(size)
    }
}

/// Virtual memory, as a vCPU sees it.
struct Virtual<'a> {
    memory: &'a mut dyn TaggedMemory,
    walker: Walker,
}

impl Virtual<'_> {
    /// Reads bytes; `None` where nothing is mapped.
    fn read(&mut self, mut address: u64, mut to: &mut [u8]) -> Result<Option<()>> {
        while !to.is_empty() {
            let Ok(Extent::Mapped { physical, size }) = self.walker.extent(self.memory, address)
            else {
                return Ok(None);
            };
            let offset = physical % PAGE;
            let count = (to.len() as u64).min(PAGE - offset).min(size);
            let mut data = [ZERO_PAGE];
            let mut tags = [mte::TagPage::ZERO];
            let tags = &mut tags[..usize::from(self.memory.has_tags())];
            self.memory.read(physical / PAGE, &mut data, tags)?;
            let (now, later) = std::mem::take(&mut to).split_at_mut(count as usize);
            now.copy_from_slice(&data[0][offset as usize..][..count as usize]);
            to = later;
            address = address.wrapping_add(count);
        }
        Ok(Some(()))
    }

    fn number(&mut self, address: u64) -> Result<Option<u64>> {
        let mut bytes = [0; 8];
        let read = self.read(address, &mut bytes)?;
        Ok(read.map(|()| u64::from_le_bytes(bytes)))
    }
}

/// Where a log is, and how it is laid out.
struct Log<'a> {
    names: Names<'a>,
    descriptors: u64,
    infos: u64,
    count_bits: u64,
    text: u64,
    size_bits: u64,
    head: u64,
    tail: u64,
}

/// The last records of the kernel's log, the last of all last; at most `most`. None if the guest is no Linux, or does not say where its
/// log is.
///
/// # Errors
/// Whatever keeps the memory from being read.
pub fn kernel_log(memory: &mut dyn TaggedMemory, most: usize) -> Result<Option<Vec<String>>> {
    let Some(regime) = memory.vcpus().first().map(Regime::of).transpose()? else {
        return Ok(None);
    };
    let Some(text) = vmcoreinfo_of(memory)? else {
        return Ok(None);
    };
    let mut memory = Virtual {
        memory,
        walker: Walker::new(regime),
    };
    let text = String::from_utf8_lossy(&text);
    let Some(log) = Log::find(Names(&text), &mut memory)? else {
        return Ok(None);
    };
    let mut records = Vec::new();
    let mut id = log.head;
    for _ in 0..MAX_RECORDS.min(1 << log.count_bits) {
        if records.len() >= most {
            break;
        }
        if let Some(text) = log.record(id, &mut memory)? {
            records.push(text);
        }
        if id == log.tail {
            break;
        }
        id = id.wrapping_sub(1) & NUMBER;
    }
    records.reverse();
    Ok(Some(records))
}

impl<'a> Log<'a> {
    fn find(names: Names<'a>, memory: &mut Virtual<'_>) -> Result<Option<Self>> {
        let places = || {
            let field = |name: &str| names.offset(name);
            let ring = field("printk_ringbuffer.desc_ring")?;
            let text = field("printk_ringbuffer.text_data_ring")?;
            Some((
                names.symbol("prb")?,
                [
                    ring + field("prb_desc_ring.descs")?,
                    ring + field("prb_desc_ring.infos")?,
                    ring + field("prb_desc_ring.count_bits")?,
                    text + field("prb_data_ring.data")?,
                    text + field("prb_data_ring.size_bits")?,
                    ring + field("prb_desc_ring.head_id")?,
                    ring + field("prb_desc_ring.tail_id")?,
                ],
            ))
        };
        let Some((symbol, places)) = places() else {
            return Ok(None);
        };
        let Some(prb) = memory.number(symbol)? else {
            return Ok(None);
        };
        let mut values = [0; 7];
        for (value, place) in values.iter_mut().zip(places) {
            let Some(found) = memory.number(prb.wrapping_add(place))? else {
                return Ok(None);
            };
            *value = found;
        }
        let [descriptors, infos, count_bits, text, size_bits, head, tail] = values;
        // Of 32 bits each.
        let [count_bits, size_bits] = [count_bits, size_bits].map(|bits| bits & 0xffff_ffff);
        let fits = count_bits <= MAX_DESCRIPTOR_BITS && size_bits <= MAX_TEXT_BITS;
        Ok(fits.then_some(Self {
            names,
            descriptors,
            infos,
            count_bits,
            text,
            size_bits,
            head: head & NUMBER,
            tail: tail & NUMBER,
        }))
    }

    /// The text of a record; none if there is none.
    fn record(&self, id: u64, memory: &mut Virtual<'_>) -> Result<Option<String>> {
        let places = || {
            let index = id & ((1 << self.count_bits) - 1);
            let descriptor = index * self.names.size("prb_desc")?;
            let info = index * self.names.size("printk_info")?;
            let position = self.names.offset("prb_desc.text_blk_lpos")?;
            Some([
                self.descriptors
                    .wrapping_add(descriptor + self.names.offset("prb_desc.state_var")?),
                self.descriptors.wrapping_add(
                    descriptor + position + self.names.offset("prb_data_blk_lpos.begin")?,
                ),
                self.descriptors.wrapping_add(
                    descriptor + position + self.names.offset("prb_data_blk_lpos.next")?,
                ),
                self.infos
                    .wrapping_add(info + self.names.offset("printk_info.text_len")?),
            ])
        };
        let Some(places) = places() else {
            return Ok(None);
        };
        let mut values = [0; 4];
        for (value, place) in values.iter_mut().zip(places) {
            let Some(found) = memory.number(place)? else {
                return Ok(None);
            };
            *value = found;
        }
        let [state, begin, next, length] = values;
        // Of 16 bits.
        let length = (length & 0xffff) as usize;
        let is_there = state & NUMBER == id && matches!(state >> 62, COMMITTED | FINALIZED);
        // An odd position is that of a record without text.
        if !is_there || begin & 1 != 0 || length == 0 {
            return Ok(None);
        }
        // A block that would go across the end begins anew at the start.
        let begin = match begin >> self.size_bits == next.wrapping_sub(1) >> self.size_bits {
            true => begin & ((1 << self.size_bits) - 1),
            false => 0,
        };
        let mut text = vec![0; length.min(MAX_TEXT)];
        let place = self.text.wrapping_add(begin + BLOCK_HEADER);
        let read = memory.read(place, &mut text)?;
        Ok(read.map(|()| {
            String::from_utf8_lossy(&text)
                .chars()
                .map(|letter| if letter.is_control() { ' ' } else { letter })
                .collect()
        }))
    }
}
