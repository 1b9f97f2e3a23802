//! Whatever a debugger sends and a guest does, the stub answers or ends, and leaves no BRK in the guest.
//!
//! A case is a list of pieces, each led by a byte that says its length and whether it is sent as it is, framed as a packet, or
//! something that the guest does. The MMU is on or off, with what is in memory as tables.

#![no_main]

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use engine::model::{HostRules, ModelHypervisor, ModelVcpu};
use engine::{DebugExit, Hypervisor, RegisterId, Vcpu, VcpuFeatures, Vm, VmBuilder};
use inspect::gdb::{Debuggee, Event, serve};
use libfuzzer_sys::fuzz_target;
use mte::TagPage;

const RAM: u64 = 0x4000_0000;
const PAGE: usize = 4096;
const PAGES: usize = 2;
const BRK: u32 = 0xd420_0000;

struct Machine {
    vcpus: Vec<ModelVcpu>,
    memory: Vec<u8>,
    tags: Vec<TagPage>,
    script: VecDeque<Event>,
    runs: bool,
}

impl Machine {
    fn place(&self, address: u64, length: usize) -> io::Result<Range<usize>> {
        let start = address.checked_sub(RAM).ok_or(io::ErrorKind::NotFound)?;
        let end = start.checked_add(length as u64);
        end.filter(|end| *end <= self.memory.len() as u64)
            .map(|end| start as usize..end as usize)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn page(&self, page: u64) -> io::Result<usize> {
        let address = page.checked_mul(PAGE as u64).ok_or(io::ErrorKind::NotFound)?;
        Ok(self.place(address, PAGE)?.start / PAGE)
    }

    fn brks(&self) -> usize {
        let words = self.memory.chunks_exact(4);
        words.filter(|word| **word == BRK.to_le_bytes()).count()
    }
}

impl Debuggee for Machine {
    type Vcpu = ModelVcpu;

    fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }
    fn vcpu(&self, number: usize) -> Option<&ModelVcpu> {
        self.vcpus.get(number).filter(|_| !self.runs)
    }
    fn ram(&self) -> Range<u64> {
        RAM..RAM + self.memory.len() as u64
    }
    fn has_tags(&self) -> bool {
        true
    }
    fn read(&self, address: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(&self.memory[self.place(address, data.len())?]);
        Ok(())
    }
    fn write(&mut self, address: u64, data: &[u8]) -> io::Result<()> {
        let place = self.place(address, data.len())?;
        self.memory[place].copy_from_slice(data);
        Ok(())
    }
    fn read_tags(&self, page: u64, tags: &mut TagPage) -> io::Result<()> {
        tags.clone_from(&self.tags[self.page(page)?]);
        Ok(())
    }
    fn write_tags(&mut self, page: u64, tags: &TagPage) -> io::Result<()> {
        let page = self.page(page)?;
        self.tags[page].clone_from(tags);
        Ok(())
    }
    fn resume(&mut self, _: &[usize]) -> io::Result<()> {
        self.runs = true;
        Ok(())
    }
    fn stop(&mut self) {
        self.runs = false;
    }
    fn wait(&mut self) -> Event {
        let event = self.script.pop_front().unwrap_or(Event::Gone);
        if matches!(event, Event::Stopped { .. }) {
            self.runs = false;
        }
        event
    }
}

fn framed(body: &[u8]) -> Vec<u8> {
    let sum = body.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    [b"$", body, format!("#{sum:02x}").as_bytes()].concat()
}

fn script(mut bytes: &[u8]) -> VecDeque<Event> {
    let mut script = VecDeque::new();
    while let Some((kind, rest)) = bytes.split_first() {
        let (piece, rest) = rest.split_at(rest.len().min(usize::from(kind & 0x3f)));
        bytes = rest;
        script.push_back(match kind >> 6 {
            0 => Event::Input(piece.to_vec()),
            1 | 2 => Event::Input(framed(piece)),
            _ => Event::Stopped {
                vcpu: usize::from(kind & 1),
                exit: DebugExit {
                    syndrome: [0x30, 0x32, 0x34, 0x3c][usize::from(kind >> 1 & 3)] << 26,
                    far: RAM,
                },
            },
        });
    }
    script
}

fuzz_target!(|bytes: &[u8]| {
    let Some((setting, bytes)) = bytes.split_first() else {
        return;
    };
    let mut builder = ModelHypervisor::new(HostRules::linux(6, 12)).new_vm(40).unwrap();
    builder.enable_mte().unwrap();
    let vm = builder.build().unwrap();
    let vcpus: Vec<_> = (0..2)
        .map(|number| vm.create_vcpu(number, VcpuFeatures::default()).unwrap())
        .collect();
    for vcpu in &vcpus {
        let set = |id, value| vcpu.set_register_u64(id, value).unwrap();
        set(RegisterId::PC, RAM);
        set(RegisterId::system(3, 0, 1, 0, 0), u64::from(setting & 1));
        // 4 KiB pages and 39 bits, for both ranges; the tables are the memory itself.
        set(RegisterId::system(3, 0, 2, 0, 2), 2 << 30 | 25 << 16 | 25);
        set(RegisterId::system(3, 0, 2, 0, 0), RAM);
        set(RegisterId::system(3, 0, 2, 0, 1), RAM + PAGE as u64);
    }
    let mut memory = vec![0; PAGES * PAGE];
    if setting & 2 != 0 {
        // A table that leads to itself, so that the page is everywhere, and writable.
        for entry in memory.chunks_exact_mut(8) {
            entry.copy_from_slice(&(RAM | 3).to_le_bytes());
        }
    }
    let mut machine = Machine {
        vcpus,
        memory,
        tags: vec![TagPage::ZERO; PAGES],
        script: script(bytes),
        runs: false,
    };
    let writes = machine.script.iter().any(|event| {
        matches!(event, Event::Input(bytes) if bytes.iter().any(|byte| matches!(byte, b'M' | b'X')))
    });

    let _ = serve(&mut machine, io::sink());

    assert!(!machine.runs);
    // The client may write BRK instructions as data.
    assert!(writes || machine.brks() == 0);
});
