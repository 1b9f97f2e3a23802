//! A machine in a debugger's hands: its vCPUs stand outside of the guest, each to be looked into and changed, and run when
//! they are told to, all or some of them.
//!
//! [`Machine::debug`] stops the vCPUs and ends their threads, so that whoever debugs has the vCPUs themselves. To resume some of
//! them is to start threads for those ([`VcpuThreads::start_some`]); when one comes to what the debugger waits for, all are
//! stopped. Devices go on all the while: what the guest had asked them for arrives. Dropping [`Debugged`] takes every
//! breakpoint and watchpoint register from the vCPUs and gives the machine back as it was, running or not.
//!
//! Memory is reached by the data mapping, as devices reach it, and never tag-checked.

use std::ops::Range;

use engine::{DebugExit, GuestDebug, Hypervisor, Vcpu};
use mte::TagPage;
use vm_memory::{Bytes, GuestAddress};

use super::{Ending, Error, Event, Machine, Running, VcpuOf, start_threads};
use crate::layout::{PAGE_SIZE, RAM_START};
use crate::memory::tags::TagStore;
use crate::vcpu::{VcpuEvent, VcpuThreads};

/// Why memory could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It is not the guest's.
    #[error("{length} bytes at guest address {address:#x}: not RAM of the machine")]
    Range {
        /// First guest-physical address.
        address: u64,
        /// How many bytes.
        length: usize,
    },
    /// The guest runs without MTE.
    #[error("its memory has no tags: the guest runs without MTE")]
    NoTags,
    /// The host says no.
    #[error("guest address {address:#x}: {source}")]
    Host {
        /// First guest-physical address.
        address: u64,
        /// What it said.
        source: std::io::Error,
    },
    /// Tags.
    #[error(transparent)]
    Tags(#[from] crate::memory::tags::Error),
}

/// What a debugger hears of.
#[derive(Debug, PartialEq, Eq)]
pub enum Woken {
    /// Somebody wants its thread ([`super::MachineHandle::interrupt`]).
    Interrupted,
    /// A vCPU came to what the debugger waits for. All vCPUs stand.
    Stopped {
        /// Its number.
        vcpu: usize,
        /// To what.
        exit: DebugExit,
    },
    /// The guest ended its machine, or somebody did: [`Machine::run`] says so next. None if a vCPU cannot go on. All vCPUs stand.
    Ended(Option<Ending>),
}

/// vCPUs that run for a debugger, and their numbers.
type Resumed<V> = (VcpuThreads<V>, Vec<usize>);

/// A machine in a debugger's hands.
pub struct Debugged<'m, H: Hypervisor>
where
    VcpuOf<H>: Vcpu + 'static,
{
    machine: &'m mut Machine<H>,
    /// The vCPUs, but those that run.
    standing: Vec<Option<VcpuOf<H>>>,
    resumed: Option<Resumed<VcpuOf<H>>>,
    tags: Option<Box<dyn TagStore>>,
    /// The guest ran when the debugger came.
    ran: bool,
    /// Somebody wanted the thread when nobody listened.
    interrupted: bool,
}

impl<H: Hypervisor> Machine<H>
where
    VcpuOf<H>: Vcpu + 'static,
{
    /// Stops the vCPUs for a debugger.
    ///
    /// # Errors
    /// [`Error::Awaiting`]; a vCPU's thread is gone.
    pub fn debug(&mut self) -> Result<Debugged<'_, H>, Error> {
        if self.running == Running::Awaiting {
            return Err(Error::Awaiting);
        }
        let standing = self.stop_vcpus()?.into_iter().map(Some).collect();
        let mut debugged = Debugged {
            ran: self.is_running(),
            tags: self.tags(),
            machine: self,
            standing,
            resumed: None,
            interrupted: false,
        };
        debugged.drain();
        Ok(debugged)
    }
}

impl<H: Hypervisor> Debugged<'_, H>
where
    VcpuOf<H>: Vcpu + 'static,
{
    /// How many vCPUs there are, numbered from 0 on.
    pub fn vcpu_count(&self) -> usize {
        self.standing.len()
    }

    /// A vCPU that stands.
    pub fn vcpu(&self, number: usize) -> Option<&VcpuOf<H>> {
        self.standing.get(number)?.as_ref()
    }

    /// Lets some vCPUs run while the others stand. Nothing happens if any run, or the guest has ended its machine.
    ///
    /// # Errors
    /// A device or a thread cannot be started.
    pub fn resume(&mut self, numbers: &[usize]) -> Result<(), Error> {
        if self.resumed.is_some() || self.machine.seen.is_some() {
            return Ok(());
        }
        if !self.machine.is_running() {
            self.machine.open()?;
        }
        let taken: Vec<_> = numbers
            .iter()
            .filter_map(|number| Some((*number, self.standing.get_mut(*number)?.take()?)))
            .collect();
        let numbers = taken.iter().map(|(number, _)| *number).collect();
        let report = self.machine.sender.clone();
        let report = move |event| {
            // The machine has the other end, and outlives its vCPUs.
            let _ = report.send(Event::Vcpu(event));
        };
        let threads =
            VcpuThreads::start_some(taken, &self.machine.bus, report).map_err(|source| {
                Error::Host {
                    step: "starting the vCPU threads",
                    source,
                }
            })?;
        threads.resume();
        self.resumed = Some((threads, numbers));
        Ok(())
    }

    /// Stops the vCPUs that run. What they came to meanwhile they come to again.
    pub fn stop(&mut self) {
        let Some((threads, numbers)) = self.resumed.take() else {
            return;
        };
        let vcpus = threads.stop();
        if vcpus.len() == numbers.len() {
            for (number, vcpu) in numbers.into_iter().zip(vcpus) {
                self.standing[number] = Some(vcpu);
            }
        }
        self.drain();
    }

    /// Waits for something to do.
    pub fn wait(&mut self) -> Woken {
        if let Some(event) = &self.machine.seen {
            let ending = event.known_ending();
            self.stop();
            return Woken::Ended(ending);
        }
        if std::mem::take(&mut self.interrupted) {
            return Woken::Interrupted;
        }
        // The channel cannot close: the machine keeps it open.
        match self.machine.events.recv() {
            Ok(Event::Interrupt) | Err(_) => Woken::Interrupted,
            Ok(Event::Vcpu(VcpuEvent::Debug { vcpu, exit })) => {
                self.stop();
                Woken::Stopped { vcpu, exit }
            }
            Ok(event) => {
                let ending = self.machine.seen.get_or_insert(event).known_ending();
                self.stop();
                Woken::Ended(ending)
            }
        }
    }

    /// Takes what has been said by now: of debug exits nothing is kept.
    fn drain(&mut self) {
        while let Ok(event) = self.machine.events.try_recv() {
            match event {
                Event::Interrupt => self.interrupted = true,
                Event::Vcpu(VcpuEvent::Debug { .. }) => {}
                event => {
                    self.machine.seen.get_or_insert(event);
                }
            }
        }
    }

    /// Whether memory has tags.
    pub fn has_tags(&self) -> bool {
        self.tags.is_some()
    }

    /// Guest-physical addresses of RAM.
    pub fn ram(&self) -> Range<u64> {
        RAM_START..RAM_START + self.machine.memory.size()
    }

    fn check(&self, address: u64, length: usize) -> Result<(), MemoryError> {
        let ram = self.ram();
        let end = address.checked_add(length as u64);
        match end {
            Some(end) if ram.contains(&address) && end <= ram.end => Ok(()),
            _ => Err(MemoryError::Range { address, length }),
        }
    }

    /// Reads guest-physical memory. Holes are zero and stay holes.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.check(address, data.len())?;
        data.fill(0);
        let end = address + data.len() as u64;
        let pages = address / PAGE_SIZE * PAGE_SIZE..end.next_multiple_of(PAGE_SIZE);
        for populated in self.machine.memory.populated(pages) {
            let populated = populated.map_err(|source| MemoryError::Host { address, source })?;
            let (from, to) = (populated.start.max(address), populated.end.min(end));
            let part = &mut data[(from - address) as usize..(to - address) as usize];
            self.machine
                .memory
                .ram()
                .read_slice(part, GuestAddress(from))
                .map_err(host_error(from))?;
        }
        Ok(())
    }

    /// Writes guest-physical memory, instructions among it: they are what is executed there from then on. Tags stay.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn write(&mut self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.check(address, data.len())?;
        let memory = &self.machine.memory;
        memory
            .ram()
            .write_slice(data, GuestAddress(address))
            .map_err(host_error(address))?;
        #[cfg(target_arch = "aarch64")]
        {
            let offset = (address - RAM_START) as usize;
            let start = memory.memslot().host_address.as_ptr().wrapping_add(offset);
            synchronise_instructions(start, data.len());
        }
        Ok(())
    }

    /// Reads the tags of a page, whose number is its guest-physical address divided by 4096.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn read_tags(&self, page: u64, tags: &mut TagPage) -> Result<(), MemoryError> {
        let store = self.tags.as_ref().ok_or(MemoryError::NoTags)?;
        store.read(page.saturating_mul(PAGE_SIZE), std::slice::from_mut(tags))?;
        Ok(())
    }

    /// Writes the tags of a page. Data stay, and the page counts as written.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn write_tags(&mut self, page: u64, tags: &TagPage) -> Result<(), MemoryError> {
        let store = self.tags.as_ref().ok_or(MemoryError::NoTags)?;
        let address = page.saturating_mul(PAGE_SIZE);
        store.write(address, std::slice::from_ref(tags))?;
        // Tags that are written by their own mapping are in no log of writes, and a page's data and tags have one dirty bit.
        let mut byte = [0];
        let ram = self.machine.memory.ram();
        ram.read_slice(&mut byte, GuestAddress(address))
            .and_then(|()| ram.write_slice(&byte, GuestAddress(address)))
            .map_err(host_error(address))
    }
}

fn host_error(address: u64) -> impl FnOnce(vm_memory::GuestMemoryError) -> MemoryError {
    move |e| MemoryError::Host {
        address,
        source: std::io::Error::other(e),
    }
}

/// Makes what was stored in a range the instructions that are fetched from it, on every CPU (Arm ARM B2.7.4). KVM does this
/// for pages that a guest begins to execute, not for those that it has executed.
#[cfg(target_arch = "aarch64")]
fn synchronise_instructions(start: *const u8, length: usize) {
    use std::arch::asm;

    let start = start as usize;
    let control: usize;
    // SAFETY: reads CTR_EL0, which Linux lets every program read.
    unsafe {
        asm!("mrs {}, ctr_el0", out(reg) control, options(nomem, nostack, preserves_flags));
    }
    let lines = |log_words: usize| {
        let line = 4 << (log_words & 0xf);
        (start & !(line - 1)..start + length).step_by(line)
    };
    for line in lines(control >> 16) {
        // SAFETY: cleaning a line changes no memory, and its address is in the mapping that was just written through.
        unsafe { asm!("dc cvau, {}", in(reg) line, options(nostack, preserves_flags)) };
    }
    // SAFETY: barriers.
    unsafe { asm!("dsb ish", options(nostack, preserves_flags)) };
    for line in lines(control) {
        // SAFETY: as for cleaning.
        unsafe { asm!("ic ivau, {}", in(reg) line, options(nostack, preserves_flags)) };
    }
    // SAFETY: barriers.
    unsafe { asm!("dsb ish", "isb", options(nostack, preserves_flags)) };
}

impl<H: Hypervisor> Drop for Debugged<'_, H>
where
    VcpuOf<H>: Vcpu + 'static,
{
    fn drop(&mut self) {
        self.stop();
        let count = self.standing.len();
        let vcpus: Vec<_> = self.standing.drain(..).flatten().collect();
        for vcpu in &vcpus {
            if let Err(e) = vcpu.set_debug(&GuestDebug::default()) {
                tracing::warn!("a debugger's breakpoints stay in a vCPU: {e}");
            }
        }
        let machine = &mut *self.machine;
        // Without one of them the machine cannot go on, as its next event says.
        if vcpus.len() == count {
            match start_threads(vcpus, &machine.bus, &machine.sender) {
                Ok(threads) => machine.vcpus = Some(threads),
                Err(e) => {
                    tracing::error!("the debugger is gone and the guest cannot go on: {e}");
                    machine.seen.get_or_insert(Event::Quit);
                }
            }
        }
        match (self.ran, machine.is_running()) {
            (true, true) if machine.seen.is_none() => {
                if let Some(threads) = &machine.vcpus {
                    threads.resume();
                }
            }
            (false, true) => machine.pause_devices(),
            _ => {}
        }
        if self.interrupted {
            machine.handle().interrupt();
        }
    }
}
