//! What gdbstub asks of its target, answered by a machine whose vCPUs stand: thread N of the client is vCPU N - 1.

use std::num::NonZeroUsize;

use engine::{DebugCause, DebugExit, DebugRegisters, GuestDebug, RegisterId, Vcpu, Watch};
use gdbstub::arch::{Arch, RegId, Registers};
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{
    SingleRegisterAccess, SingleRegisterAccessOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints as BreakpointsExtension, BreakpointsOps, HwBreakpoint, HwBreakpointOps,
    HwWatchpoint, HwWatchpointOps, SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::target_description_xml_override::{
    TargetDescriptionXmlOverride, TargetDescriptionXmlOverrideOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use mte::{GRANULE_SIZE, Tag, TagPage, VaRange};

use super::breakpoints::{BRK, Breakpoints, Planted};
use super::exception::{self, Masked};
use super::memory_tags::{Errno, MemoryTags, aarch64};
use super::registers::{self, GENERAL, Number};
use super::{Debuggee, Error, translation};
use crate::view::PAGE;

/// Most granules whose tags one packet can read or set: those of 16 MiB.
pub const MOST_GRANULES: u64 = 1 << 20;

/// How the client stops.
pub type Stop = MultiThreadStopReason<u64>;

/// AArch64 as gdb knows it.
pub enum Aarch64 {}

impl Arch for Aarch64 {
    type Usize = u64;
    type Registers = General;
    type BreakpointKind = usize;
    type RegId = Number;
}

impl RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let number = Self::new(id)?;
        Some((number, NonZeroUsize::new(number.size())))
    }
}

/// The general and vector registers, one after the other; a byte that is not known is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct General(Vec<Option<u8>>);

fn general() -> impl Iterator<Item = Number> {
    (0..GENERAL).filter_map(Number::new)
}

impl Registers for General {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        let start = registers::PC * 8;
        let bytes = self.0.get(start..start + 8).unwrap_or_default();
        let bytes = bytes.iter().rev();
        bytes.fold(0, |pc, byte| pc << 8 | u64::from(byte.unwrap_or(0)))
    }

    fn gdb_serialize(&self, write: impl FnMut(Option<u8>)) {
        self.0.iter().copied().for_each(write);
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let whole: usize = general().map(Number::size).sum();
        if bytes.len() != whole {
            return Err(());
        }
        self.0 = bytes.iter().copied().map(Some).collect();
        Ok(())
    }
}

/// What a vCPU is to do when the machine goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Continue,
    Step,
    Stand,
}

/// A machine as gdbstub's target. Dropping it takes the client's breakpoints out of the guest, whose vCPUs stand then.
pub struct Stub<'d, D: Debuggee> {
    machine: &'d mut D,
    description: String,
    available: DebugRegisters,
    breakpoints: Breakpoints,
    /// For each vCPU, once it is said; and for those of which nothing is said.
    actions: Vec<Option<Action>>,
    default_action: Action,
    /// Interrupts that were masked for a step.
    masked: Vec<Option<Masked>>,
    /// The vCPU that stopped last: by its tables addresses are translated where the client does not say a vCPU.
    focus: usize,
}

fn number_of(tid: Tid) -> usize {
    tid.get() - 1
}

fn tid_of(number: usize) -> Tid {
    Tid::MIN.saturating_add(number)
}

const FAULT: TargetError<Error> = TargetError::Errno(Errno::FAULT.0);
const INVALID: TargetError<Error> = TargetError::Errno(Errno::INVALID.0);

impl<'d, D: Debuggee> Stub<'d, D> {
    /// The target that `machine` is, whose vCPUs stand.
    pub fn new(machine: &'d mut D) -> Self {
        let count = machine.vcpu_count();
        let available = machine
            .vcpu(0)
            .and_then(|vcpu| vcpu.debug_registers().ok())
            .unwrap_or_default();
        Self {
            description: registers::description(machine.has_tags()),
            machine,
            available,
            breakpoints: Breakpoints::default(),
            actions: vec![None; count],
            default_action: Action::Continue,
            masked: vec![None; count],
            focus: 0,
        }
    }

    pub fn machine(&mut self) -> &mut D {
        self.machine
    }

    /// Stops the guest because the client says so.
    pub fn interrupt(&mut self) -> Stop {
        self.stop();
        Stop::SignalWithThread {
            tid: tid_of(self.focus),
            signal: Signal::SIGINT,
        }
    }

    fn stop(&mut self) {
        self.machine.stop();
        self.unmask();
    }

    fn unmask(&mut self) {
        for (number, masked) in self.masked.iter_mut().enumerate() {
            if let Some(vcpu) = self.machine.vcpu(number)
                && let Some(masked) = masked.take()
                && let Err(e) = masked.unmask(vcpu)
            {
                tracing::warn!("interrupts of a vCPU stay masked after a step: {e}");
            }
        }
    }

    /// What the client is to be told of a stop. Nothing if it is none of its business: then the guest goes on.
    ///
    /// # Errors
    /// The machine does not do as it is told.
    pub fn stopped(&mut self, number: usize, exit: DebugExit) -> Result<Option<Stop>, Error> {
        self.unmask();
        let tid = tid_of(number);
        let stepped = self.action(number) == Action::Step;
        let done_step = Stop::SignalWithThread {
            tid,
            signal: Signal::SIGTRAP,
        };
        self.focus = number;
        match exit.cause() {
            DebugCause::Brk if self.is_ours(number) => Ok(Some(Stop::SwBreak(tid))),
            DebugCause::Brk => {
                let vcpu = self.machine.vcpu(number).ok_or(Error::Gone)?;
                exception::take(vcpu, exit.syndrome)?;
                if stepped {
                    return Ok(Some(done_step));
                }
                self.go()?;
                Ok(None)
            }
            DebugCause::Breakpoint => Ok(Some(Stop::HwBreak(tid))),
            DebugCause::Watchpoint => Ok(Some(self.watched(tid, exit.far))),
            DebugCause::Step | DebugCause::Other => Ok(Some(done_step)),
        }
    }

    fn watched(&self, tid: Tid, far: u64) -> Stop {
        let address = without_tag(far);
        let Some((watched, addr)) = self.breakpoints.watched_at(address) else {
            return Stop::HwBreak(tid);
        };
        let kind = match watched.watch {
            Watch::Loads => WatchKind::Read,
            Watch::Stores => WatchKind::Write,
            Watch::Both => WatchKind::ReadWrite,
        };
        Stop::Watch { tid, kind, addr }
    }

    /// Whether a vCPU stands at an instruction that we planted.
    fn is_ours(&self, number: usize) -> bool {
        let Some(vcpu) = self.machine.vcpu(number) else {
            return false;
        };
        let at = vcpu
            .register_u64(RegisterId::PC)
            .and_then(|pc| Ok((pc, translation::regime(vcpu)?)));
        let Ok((pc, regime)) = at else {
            return false;
        };
        translation::physical(self.machine, regime, pc)
            .is_some_and(|physical| self.breakpoints.is_planted_at(physical))
    }

    fn action(&self, number: usize) -> Action {
        let said = self.actions.get(number).copied().flatten();
        said.unwrap_or(self.default_action)
    }

    /// Lets the guest go on as the client said last.
    fn go(&mut self) -> Result<(), Error> {
        let going: Vec<_> = (0..self.actions.len())
            .filter(|number| self.action(*number) != Action::Stand)
            .collect();
        for number in &going {
            self.prepare(*number)?;
        }
        self.machine.resume(&going).map_err(Error::Machine)
    }

    fn prepare(&mut self, number: usize) -> Result<(), Error> {
        let single_step = self.action(number) == Action::Step;
        // vCPUs that run already are not told anything.
        let Some(vcpu) = self.machine.vcpu(number) else {
            return Ok(());
        };
        vcpu.set_debug(&GuestDebug {
            single_step,
            software_breakpoints: !self.breakpoints.planted().is_empty(),
            breakpoints: self.breakpoints.registers(),
            watchpoints: self.breakpoints.watchpoint_registers(),
        })?;
        if single_step {
            let pc = vcpu.register_u64(RegisterId::PC)?;
            let mut instruction = [0; 4];
            // One that cannot be read is not executed either.
            if self
                .read(number, pc, &mut instruction)
                .is_ok_and(|read| read == 4)
            {
                let instruction = u32::from_le_bytes(instruction);
                let vcpu = self.machine.vcpu(number).ok_or(Error::Gone)?;
                self.masked[number] = Masked::mask(vcpu, instruction)?;
            }
        }
        Ok(())
    }

    /// Where memory is to a vCPU.
    fn locate(
        &self,
        number: usize,
        address: u64,
        length: u64,
    ) -> Result<Vec<std::ops::Range<u64>>, TargetError<Error>> {
        let vcpu = self.machine.vcpu(number).ok_or(INVALID)?;
        let regime = translation::regime(vcpu).map_err(|_| INVALID)?;
        translation::locate(self.machine, regime, address, length).map_err(|_| FAULT)
    }

    /// What is like an address, for lldb, which wants to know that before it reads tags.
    pub(super) fn region(&self, address: u64) -> Result<translation::Region, Errno> {
        let regime = self.machine.vcpu(self.focus).map(translation::regime);
        let regime = regime.and_then(Result::ok).ok_or(Errno::INVALID)?;
        translation::region(self.machine, regime, without_tag(address)).map_err(|_| Errno::FAULT)
    }

    /// Reads as much as is mapped.
    fn read(
        &self,
        number: usize,
        address: u64,
        data: &mut [u8],
    ) -> Result<usize, TargetError<Error>> {
        let pieces = self.locate(number, address, data.len() as u64)?;
        let mut done = 0;
        for piece in pieces {
            let size = (piece.end - piece.start) as usize;
            let part = &mut data[done..done + size];
            self.machine.read(piece.start, part).map_err(|_| FAULT)?;
            self.breakpoints.hide(piece.start, part);
            done += size;
        }
        match done {
            0 if !data.is_empty() => Err(FAULT),
            done => Ok(done),
        }
    }

    /// Writes all or nothing.
    fn write(
        &mut self,
        number: usize,
        address: u64,
        data: &[u8],
    ) -> Result<(), TargetError<Error>> {
        let pieces = self.locate(number, address, data.len() as u64)?;
        let mapped: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
        if mapped != data.len() as u64 {
            return Err(FAULT);
        }
        let mut rest = data;
        for piece in pieces {
            let (part, others) = rest.split_at((piece.end - piece.start) as usize);
            let mut part = part.to_vec();
            self.breakpoints.keep(piece.start, &mut part);
            self.machine.write(piece.start, &part).map_err(|_| FAULT)?;
            rest = others;
        }
        Ok(())
    }

    /// Puts what the guest had in the place of a planted instruction, if that is still there.
    fn restore(&mut self, planted: Planted) {
        let mut there = BRK;
        let read = self.machine.read(planted.physical, &mut there);
        if read.is_ok()
            && there == BRK
            && !self.breakpoints.is_planted_at(planted.physical)
            && let Err(e) = self.machine.write(planted.physical, &planted.original)
        {
            tracing::error!(
                "a debugger's BRK stays in the guest at {:#x}: {e}",
                planted.physical
            );
        }
    }

    /// The pages of the granules that a range touches, as guest-physical addresses of granules.
    fn granules(&self, start: u64, length: u64) -> Result<Vec<u64>, Errno> {
        const SIZE: u64 = GRANULE_SIZE as u64;
        if length == 0 {
            return Ok(Vec::new());
        }
        let start = without_tag(start);
        let last = start.checked_add(length - 1).ok_or(Errno::FAULT)?;
        let (first, last) = (start & !(SIZE - 1), last & !(SIZE - 1));
        let count = (last - first) / SIZE + 1;
        if count > MOST_GRANULES {
            return Err(Errno::TOO_MANY);
        }
        let pieces = self
            .locate(self.focus, first, count * SIZE)
            .map_err(|_| Errno::FAULT)?;
        let granules: Vec<_> = pieces
            .into_iter()
            .flat_map(|piece| piece.step_by(GRANULE_SIZE))
            .collect();
        match granules.len() as u64 {
            found if found == count => Ok(granules),
            _ => Err(Errno::FAULT),
        }
    }
}

/// An address as it is without a tag: the bits that tags and their kin are in, as bit 55 is.
fn without_tag(address: u64) -> u64 {
    match VaRange::of_address(address) {
        VaRange::Lower => address & (u64::MAX >> 8),
        VaRange::Upper => address | !(u64::MAX >> 8),
    }
}

impl<D: Debuggee> Drop for Stub<'_, D> {
    fn drop(&mut self) {
        self.stop();
        while let Some(planted) = self.breakpoints.planted().first().copied() {
            self.breakpoints.dig_up(planted.address);
            self.restore(planted);
        }
    }
}

impl<D: Debuggee> Target for Stub<'_, D> {
    type Arch = Aarch64;
    type Error = Error;

    fn base_ops(&mut self) -> BaseOps<'_, Aarch64, Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_target_description_xml_override(
        &mut self,
    ) -> Option<TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> TargetDescriptionXmlOverride for Stub<'_, D> {
    fn target_description_xml(
        &self,
        annex: &[u8],
        offset: u64,
        length: usize,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        if annex != b"target.xml" {
            return Err(INVALID);
        }
        let whole = self.description.as_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = whole.get(from..).unwrap_or_default();
        let count = rest.len().min(length).min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}

impl<D: Debuggee> MultiThreadBase for Stub<'_, D> {
    fn read_registers(&mut self, registers: &mut General, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.machine.vcpu(number_of(tid)).ok_or(INVALID)?;
        for number in general() {
            let mut value = [0; 16];
            let value = &mut value[..number.size()];
            let known = number.read(vcpu, value).is_some();
            registers
                .0
                .extend(value.iter().map(|byte| known.then_some(*byte)));
        }
        Ok(())
    }

    fn write_registers(&mut self, registers: &General, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.machine.vcpu(number_of(tid)).ok_or(INVALID)?;
        let bytes: Vec<_> = registers.0.iter().map(|byte| byte.unwrap_or(0)).collect();
        let mut rest = &bytes[..];
        for number in general() {
            let Some((value, others)) = rest.split_at_checked(number.size()) else {
                return Err(INVALID);
            };
            number.write(vcpu, value).ok_or(INVALID)?;
            rest = others;
        }
        Ok(())
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        self.read(number_of(tid), start, data)
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        self.write(number_of(tid), start, data)
    }

    fn list_active_threads(&mut self, each: &mut dyn FnMut(Tid)) -> Result<(), Error> {
        (0..self.machine.vcpu_count()).map(tid_of).for_each(each);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> SingleRegisterAccess<Tid> for Stub<'_, D> {
    fn read_register(
        &mut self,
        tid: Tid,
        number: Number,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let vcpu = self.machine.vcpu(number_of(tid)).ok_or(INVALID)?;
        let value = buffer.get_mut(..number.size()).ok_or(INVALID)?;
        // None of its bytes is how gdbstub is told that a register is not known.
        Ok(number.read(vcpu, value).map_or(0, |()| number.size()))
    }

    fn write_register(&mut self, tid: Tid, number: Number, value: &[u8]) -> TargetResult<(), Self> {
        let vcpu = self.machine.vcpu(number_of(tid)).ok_or(INVALID)?;
        number.write(vcpu, value).ok_or(INVALID)
    }
}

impl<D: Debuggee> ThreadExtraInfo for Stub<'_, D> {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Error> {
        let number = number_of(tid);
        let is_off = self.machine.vcpu(number).is_some_and(|vcpu| {
            vcpu.power_state()
                .is_ok_and(|state| state == engine::PowerState::Off)
        });
        let text = format!("vCPU {number}{}", if is_off { ", off" } else { "" });
        let count = text.len().min(buffer.len());
        buffer[..count].copy_from_slice(&text.as_bytes()[..count]);
        Ok(count)
    }
}

impl<D: Debuggee> MultiThreadResume for Stub<'_, D> {
    fn resume(&mut self) -> Result<(), Error> {
        self.go()
    }

    fn clear_resume_actions(&mut self) -> Result<(), Error> {
        self.actions.fill(None);
        self.default_action = Action::Continue;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.set_action(tid, Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> Stub<'_, D> {
    fn set_action(&mut self, tid: Tid, action: Action) {
        if let Some(place) = self.actions.get_mut(number_of(tid)) {
            *place = Some(action);
        }
    }
}

impl<D: Debuggee> MultiThreadSingleStep for Stub<'_, D> {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.set_action(tid, Action::Step);
        Ok(())
    }
}

impl<D: Debuggee> MultiThreadSchedulerLocking for Stub<'_, D> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Error> {
        self.default_action = Action::Stand;
        Ok(())
    }
}

impl<D: Debuggee> BreakpointsExtension for Stub<'_, D> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> SwBreakpoint for Stub<'_, D> {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let known = self.breakpoints.planted().iter();
        if known.clone().any(|planted| planted.address == address) {
            return Ok(true);
        }
        if !address.is_multiple_of(BRK.len() as u64) || !self.breakpoints.has_room() {
            return Ok(false);
        }
        let mut original = [0; BRK.len()];
        if self.read(self.focus, address, &mut original)? != original.len() {
            return Err(FAULT);
        }
        let pieces = self.locate(self.focus, address, BRK.len() as u64)?;
        let physical = pieces.first().ok_or(FAULT)?.start;
        self.machine.write(physical, &BRK).map_err(|_| FAULT)?;
        self.breakpoints.plant(Planted {
            address,
            physical,
            original,
        });
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let planted = self.breakpoints.dig_up(address);
        if let Some(planted) = planted {
            self.restore(planted);
        }
        Ok(planted.is_some())
    }
}

impl<D: Debuggee> HwBreakpoint for Stub<'_, D> {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.add_register(address, self.available))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove_register(address))
    }
}

const fn watch_of(kind: WatchKind) -> Watch {
    match kind {
        WatchKind::Read => Watch::Loads,
        WatchKind::Write => Watch::Stores,
        WatchKind::ReadWrite => Watch::Both,
    }
}

impl<D: Debuggee> HwWatchpoint for Stub<'_, D> {
    fn add_hw_watchpoint(
        &mut self,
        address: u64,
        length: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let address = without_tag(address);
        let available = self.available;
        Ok(self
            .breakpoints
            .watch(address, length, watch_of(kind), available))
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        length: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let address = without_tag(address);
        Ok(self.breakpoints.unwatch(address, length, watch_of(kind)))
    }
}

/// Types of tags are AArch64's: the logical tag is that of the address itself, the allocation tags are those of the granules, by
/// the translation of the vCPU that stopped last.
impl<D: Debuggee> MemoryTags for Stub<'_, D> {
    fn is_address_tagged(&mut self, address: u64) -> Result<bool, Errno> {
        Ok(self.machine.has_tags() && self.granules(address, 1).is_ok())
    }

    fn read_tags(
        &mut self,
        start: u64,
        length: u64,
        kind: u32,
        each: &mut dyn FnMut(u8),
    ) -> Result<(), Errno> {
        let granules = self.granules(start, length)?;
        match kind {
            aarch64::LOGICAL => {
                let tag = Tag::of_address(start).value();
                granules.iter().for_each(|_| each(tag));
                Ok(())
            }
            aarch64::ALLOCATION => {
                let mut tags = Vec::with_capacity(granules.len());
                let mut page = TagPage::ZERO;
                for run in granules.chunk_by(|a, b| a / PAGE == b / PAGE) {
                    self.machine
                        .read_tags(run[0] / PAGE, &mut page)
                        .map_err(|_| Errno::FAULT)?;
                    tags.extend(
                        run.iter()
                            .map(|at| page.get(TagPage::index_of(*at)).value()),
                    );
                }
                tags.into_iter().for_each(each);
                Ok(())
            }
            _ => Err(Errno::INVALID),
        }
    }

    fn write_tags(&mut self, start: u64, length: u64, kind: u32, tags: &[u8]) -> Result<(), Errno> {
        if kind != aarch64::ALLOCATION || tags.iter().any(|tag| *tag > 0xf) {
            return Err(Errno::INVALID);
        }
        if !self.machine.has_tags() {
            return Err(Errno::NOT_PERMITTED);
        }
        let granules = self.granules(start, length)?;
        let mut pattern = tags.iter().copied().cycle();
        let mut page = TagPage::ZERO;
        for run in granules.chunk_by(|a, b| a / PAGE == b / PAGE) {
            let number = run[0] / PAGE;
            let written = self.machine.read_tags(number, &mut page).and_then(|()| {
                for (at, tag) in run.iter().zip(&mut pattern) {
                    page.set(TagPage::index_of(*at), Tag::from_low_bits(tag));
                }
                self.machine.write_tags(number, &page)
            });
            written.map_err(|_| Errno::FAULT)?;
        }
        Ok(())
    }
}
