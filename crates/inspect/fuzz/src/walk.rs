//! Hostile guests: translation tables, a kernel's log and registers that say whatever they like. A vCPU's registers come from the
//! first bytes, and so does how memory is made of the others, which lie in it at every page with different beginnings, so that
//! addresses, descriptors and texts meet. Whatever goes through it ends, and what is mapped is where the walk says that it is.

#![no_main]

use std::ops::Range;

use engine::{PendingSError, PowerState, RegisterId, RegisterValue, VcpuState};
use inspect::walk::{Extent, Regime, Walker};
use inspect::{
    Death, End, Format, Place, Report, Result, Space, TaggedMemory, View, Visitor, Wanted, dump,
    find, kernel_log,
};
use libfuzzer_sys::fuzz_target;
use mte::{Tag, TagPage};
use stream::{Page, Run, ZERO_PAGE};

const RAM: Range<u64> = 0x40000..0x40000 + 32;

struct Memory<'a> {
    bytes: &'a [u8],
    vcpus: Vec<VcpuState>,
    reads: u64,
}

impl Memory<'_> {
    fn page(&self, number: u64) -> (Page, TagPage) {
        let mut page = ZERO_PAGE;
        let mut tags = TagPage::ZERO;
        if !RAM.contains(&number) || self.bytes.is_empty() {
            return (page, tags);
        }
        let from = (number - RAM.start) as usize * 64 % self.bytes.len();
        let bytes = &self.bytes[from..];
        let count = bytes.len().min(page.len());
        page[..count].copy_from_slice(&bytes[..count]);
        for (packed, byte) in tags.as_packed_mut().iter_mut().zip(bytes) {
            *packed = *byte;
        }
        (page, tags)
    }
}

impl TaggedMemory for Memory<'_> {
    fn has_tags(&self) -> bool {
        true
    }

    fn ram(&self) -> Range<u64> {
        RAM
    }

    fn vcpus(&self) -> &[VcpuState] {
        &self.vcpus
    }

    fn next_run(&mut self, from: u64) -> Result<Option<Range<u64>>> {
        // The last page but one is a hole.
        let runs = [RAM.start..RAM.end - 2, RAM.end - 1..RAM.end];
        let run = runs.into_iter().find(|run| run.end > from);
        Ok(run.map(|run| run.start.max(from)..run.end))
    }

    fn read(&mut self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> Result<()> {
        self.reads += data.len() as u64;
        assert_eq!(data.len(), tags.len());
        for ((data, tags), number) in data.iter_mut().zip(tags).zip(first..) {
            (*data, *tags) = self.page(number);
        }
        Ok(())
    }

    fn visit(&mut self, pages: Range<u64>, each: Visitor<'_>) -> Result<()> {
        for number in RAM.filter(|number| pages.contains(number) && *number != RAM.end - 2) {
            let (data, tags) = self.page(number);
            each(Run {
                first: number,
                data: &[data],
                tags: &[tags],
            })?;
        }
        Ok(())
    }
}

/// Those that translation and exceptions ask for, of which `words` are the values.
fn vcpu(words: &[u64; 12]) -> VcpuState {
    let names = [
        RegisterId::system(3, 0, 1, 0, 0),
        RegisterId::system(3, 0, 2, 0, 0),
        RegisterId::system(3, 0, 2, 0, 1),
        RegisterId::system(3, 0, 2, 0, 2),
        RegisterId::system(3, 0, 2, 0, 3),
        RegisterId::system(3, 0, 5, 2, 0),
        RegisterId::system(3, 0, 6, 0, 0),
        RegisterId::system(3, 0, 5, 6, 0),
        RegisterId::from_kvm(0x6030_0000_0010_0046),
        RegisterId::PC,
        RegisterId::PSTATE,
    ];
    let registers = names.into_iter().zip(words).map(|(id, value)| RegisterValue {
        id,
        value: value.to_le_bytes().to_vec(),
    });
    VcpuState {
        registers: registers.collect(),
        power: PowerState::On,
        serror: PendingSError::default(),
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((head, bytes)) = input.split_first_chunk::<96>() else {
        return;
    };
    let (words, _) = head.as_chunks::<8>();
    let words: [u64; 12] = std::array::from_fn(|index| u64::from_le_bytes(words[index]));
    let mut memory = Memory {
        bytes,
        vcpus: vec![vcpu(&words)],
        reads: 0,
    };
    let address = words[11];
    let Ok(regime) = Regime::of(&memory.vcpus[0]) else {
        panic!("the vCPU has all registers");
    };

    let mut walker = Walker::new(regime).limited(64);
    let extent = walker.extent(&mut memory, address);
    assert!(memory.reads <= 5, "a walk reads a page a level");
    if let Ok(extent) = extent {
        assert!(extent.size() > 0);
        if let Extent::Mapped { physical, size } = extent {
            let last = address.wrapping_add(size - 1);
            if let Ok(Extent::Mapped { physical: of_last, .. }) = walker.extent(&mut memory, last) {
                assert_eq!(of_last, physical.wrapping_add(size - 1));
            }
        }
    }

    if let Ok(place) = Place::of(&mut memory, Some(Walker::new(regime).limited(64)), address) {
        assert!(place.tags.len() <= 16 && place.data.len() <= 64);
        assert!(!place.to_string().is_empty());
    }
    let _ = Report::of(&mut memory, 0).map(|report| report.to_string());
    let _ = kernel_log(&mut memory, 16);
    let _ = Death::of(&mut memory, End::Stuck).map(|death| death.map(|it| it.to_string()));

    let walker = Walker::new(regime).limited(64);
    let Ok(range) = walker.canonical_range(address..address.saturating_add(0x8000)) else {
        return;
    };
    let space = || Space::Virtual(Box::new(Walker::new(regime).limited(64)));
    if let Ok(mut view) = View::new(&mut memory, space(), range.clone()) {
        let wanted = Wanted::Mismatch(Tag::of_address(address));
        let mut behind = view.range().start;
        let _ = find(&mut view, wanted, &mut |found, _| {
            assert!(found.start >= behind && found.end > found.start);
            behind = found.end;
            Ok(())
        });
    }
    if let Ok(mut view) = View::new(&mut memory, space(), range) {
        let mut text = Vec::new();
        let _ = dump(&mut view, Format::Text, &mut text);
        assert!(text.len() < 1 << 20);
    }
});
