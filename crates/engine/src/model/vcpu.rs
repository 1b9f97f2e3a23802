//! A vCPU of the model.
//!
//! It executes no code. Either a test drives it: each method ([`ModelVcpu::stg`] and so on) is an
//! instruction of the guest. Or the VM was given a [`Guest`], whose steps are the guest's program
//! when the VMM runs the vCPU. Such a program should keep what it has to remember in registers and
//! memory of the guest, as a real one must: then it survives snapshots and migration.

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use mte::{GRANULE_SIZE, SWITCHED_REGISTERS, SystemRegister, Tag};

use super::frame::PAGE_SIZE;
use super::host::{Found, Touch};
use super::registers::Registers;
use super::vm::{Miss, VmState};
use crate::{
    DebugExit, Error, Exit, GuestDebug, Interrupter, PendingSError, PowerState, Ppi, RegisterId,
    RegisterList, Result, SystemEvent, Vcpu, VcpuFeatures,
};

/// A guest's program.
pub trait Guest: Send + Sync + 'static {
    /// Does a little of the vCPU's work, and says what comes next.
    ///
    /// # Errors
    /// What [`Vcpu::run`] is to fail with.
    fn step(&self, vcpu: &mut ModelVcpu) -> Result<Step>;
}

/// What a vCPU does after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The next step.
    Continue,
    /// Nothing until it is interrupted, as after WFI; then the next step.
    Wait,
    /// It reads a device's register.
    MmioRead {
        /// Guest-physical address.
        ipa: u64,
        /// Bytes, 1 to 8.
        size: usize,
        /// Where the value goes.
        into: RegisterId,
    },
    /// It writes a device's register.
    MmioWrite {
        /// Guest-physical address.
        ipa: u64,
        /// Bytes, 1 to 8.
        size: usize,
        /// The value.
        value: u64,
    },
    /// It asks something of the machine.
    System(SystemEvent),
    /// It comes to what its debugger waits for. The model does not find out by itself: the program looks at
    /// [`ModelVcpu::debug`].
    Debug(DebugExit),
}

/// A guest that does nothing.
pub struct Idle;

impl Guest for Idle {
    fn step(&self, _: &mut ModelVcpu) -> Result<Step> {
        Ok(Step::Wait)
    }
}

/// Why an access of the guest did not reach memory.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Nothing is there, or nothing that may be written: on a real machine an MMIO exit.
    #[error(
        "vCPU {index} at pc {pc:#x}: no memory at guest address {ipa:#x} that this access can reach"
    )]
    Mmio {
        /// The vCPU.
        index: u32,
        /// Where it stands.
        pc: u64,
        /// Guest-physical address.
        ipa: u64,
    },
    /// [`Vcpu::run`] would have failed.
    #[error(transparent)]
    Run(#[from] Error),
}

/// For a guest's program that expects memory there: the vCPU cannot run on.
impl From<AccessError> for Error {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Mmio { index, pc, .. } => Self::Run {
                index,
                pc,
                reason: error.to_string(),
            },
            AccessError::Run(error) => error,
        }
    }
}

/// An instruction that the guest does not have: an exception to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("undefined instruction")]
pub struct Undefined;

/// A vCPU of the model.
pub struct ModelVcpu {
    vm: Arc<VmState>,
    index: u32,
    registers: RefCell<Registers>,
    interrupter: ModelInterrupter,
    power: Cell<PowerState>,
    serror: Cell<PendingSError>,
    debug: RefCell<GuestDebug>,
    /// Data of the device access that the VMM was asked for, and where they go if it was a read.
    mmio: [u8; 8],
    reading: Option<(RegisterId, usize)>,
}

impl ModelVcpu {
    pub(super) fn new(vm: Arc<VmState>, index: u32, features: VcpuFeatures) -> Self {
        let registers = RefCell::new(Registers::new(index, vm.mte()));
        Self {
            vm,
            index,
            registers,
            interrupter: ModelInterrupter::default(),
            power: Cell::new(match features.powered_off {
                true => PowerState::Off,
                false => PowerState::On,
            }),
            serror: Cell::default(),
            debug: RefCell::default(),
            mmio: [0; 8],
            reading: None,
        }
    }

    /// What is to stop it for a debugger.
    pub fn debug(&self) -> GuestDebug {
        self.debug.borrow().clone()
    }

    /// Its number.
    pub fn index(&self) -> u32 {
        self.index
    }

    fn access<R>(
        &self,
        ipa: u64,
        touch: Touch,
        access: impl FnOnce(&Found) -> R,
    ) -> Result<R, AccessError> {
        let index = self.index;
        let registers = self.registers.borrow();
        let pc = registers.get(RegisterId::PC).unwrap_or(u64::MAX);
        self.vm
            .access(ipa, touch, access)
            .map_err(|miss| match miss {
                Miss::Mmio => AccessError::Mmio { index, pc, ipa },
                Miss::Host => AccessError::Run(Error::GuestMemoryFault { index, pc }),
            })
    }

    /// Loads memory. An aligned 8-byte word is loaded at once.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn load(&self, ipa: u64, bytes: &mut [u8]) -> Result<(), AccessError> {
        let mut rest = bytes;
        let mut at = ipa;
        while !rest.is_empty() {
            let (part, others) = rest.split_at_mut(up_to_page_end(at, rest.len()));
            self.access(at, Touch::Read, |found| match found {
                Found::Frame(frame) => frame.load(offset_of(at), part),
                Found::Zeros => part.fill(0),
            })?;
            at += part.len() as u64;
            rest = others;
        }
        Ok(())
    }

    /// Stores memory. An aligned 8-byte word is stored at once.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn store(&self, ipa: u64, bytes: &[u8]) -> Result<(), AccessError> {
        let mut rest = bytes;
        let mut at = ipa;
        while !rest.is_empty() {
            let (part, others) = rest.split_at(up_to_page_end(at, rest.len()));
            self.access(at, Touch::Write, |found| {
                if let Found::Frame(frame) = found {
                    frame.store(offset_of(at), part);
                }
            })?;
            at += part.len() as u64;
            rest = others;
        }
        Ok(())
    }

    /// Loads the tag of the granule at `ipa`: 0 without MTE.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn ldg(&self, ipa: u64) -> Result<Tag, AccessError> {
        let has_mte = self.vm.mte().is_some();
        self.access(ipa, Touch::Read, |found| match found {
            Found::Frame(frame) if has_mte => frame.tag(offset_of(ipa) / GRANULE_SIZE),
            _ => Tag::ZERO,
        })
    }

    /// Stores the tag of the granule at `ipa`. Without MTE it is not stored.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn stg(&self, ipa: u64, tag: Tag) -> Result<(), AccessError> {
        let has_mte = self.vm.mte().is_some();
        self.access(ipa, Touch::Write, |found| match found {
            Found::Frame(frame) if has_mte => frame.set_tag(offset_of(ipa) / GRANULE_SIZE, tag),
            _ => (),
        })
    }

    /// Reads a register of MTE as the guest does.
    ///
    /// # Errors
    /// The guest has no such register.
    pub fn mrs(&self, register: SystemRegister) -> Result<u64, Undefined> {
        self.registers
            .borrow()
            .get(register.into())
            .map_err(|_| Undefined)
    }

    /// Writes one of the four registers of MTE that belong to a vCPU, as the guest does.
    ///
    /// # Errors
    /// The guest has no such register, or cannot write it.
    pub fn msr(&mut self, register: SystemRegister, value: u64) -> Result<(), Undefined> {
        if !SWITCHED_REGISTERS.contains(&register) {
            return Err(Undefined);
        }
        self.registers
            .get_mut()
            .set(register.into(), value)
            .map_err(|_| Undefined)
    }

    /// Finishes what the last exit asked for.
    fn complete(&mut self) -> Result<()> {
        let Some((id, size)) = self.reading.take() else {
            return Ok(());
        };
        let mut value = [0; 8];
        value[..size].copy_from_slice(&self.mmio[..size]);
        self.set_register(id, &value)
    }

    fn register_error(
        &self,
        action: &'static str,
        id: RegisterId,
    ) -> impl FnOnce(io::Error) -> Error {
        let index = self.index;
        move |source| Error::Register {
            index,
            action,
            id,
            source,
        }
    }
}

fn offset_of(ipa: u64) -> usize {
    (ipa % PAGE_SIZE) as usize
}

fn up_to_page_end(ipa: u64, length: usize) -> usize {
    length.min(PAGE_SIZE as usize - offset_of(ipa))
}

impl Vcpu for ModelVcpu {
    type Interrupter = ModelInterrupter;

    fn run(&mut self) -> Result<Exit<'_>> {
        self.complete()?;
        let guest = Arc::clone(self.vm.guest());
        loop {
            if self.interrupter.take() {
                return Ok(Exit::Interrupted);
            }
            let step = match self.power.get() {
                PowerState::On => guest.step(self)?,
                PowerState::Off | PowerState::Suspended => Step::Wait,
            };
            match step {
                Step::Continue => (),
                Step::Wait => self.interrupter.wait(),
                Step::System(event) => return Ok(Exit::System(event)),
                Step::Debug(exit) => return Ok(Exit::Debug(exit)),
                Step::MmioRead { ipa, size, into } => {
                    self.reading = Some((into, size));
                    self.mmio = [0; 8];
                    let data = &mut self.mmio[..size];
                    return Ok(Exit::MmioRead { ipa, data });
                }
                Step::MmioWrite { ipa, size, value } => {
                    self.mmio = value.to_le_bytes();
                    let data = &self.mmio[..size];
                    return Ok(Exit::MmioWrite { ipa, data });
                }
            }
        }
    }

    fn interrupter(&self) -> ModelInterrupter {
        self.interrupter.clone()
    }

    fn init_pmu(&self, _: Ppi) -> Result<()> {
        Err(Error::Vcpu {
            index: self.index,
            step: "starting the PMU",
            source: io::ErrorKind::Unsupported.into(),
        })
    }

    fn power_state(&self) -> Result<PowerState> {
        Ok(self.power.get())
    }

    fn set_power_state(&self, state: PowerState) -> Result<()> {
        self.power.set(state);
        Ok(())
    }

    fn pending_serror(&self) -> Result<PendingSError> {
        Ok(self.serror.get())
    }

    fn set_pending_serror(&self, serror: PendingSError) -> Result<()> {
        self.serror.set(serror);
        Ok(())
    }

    fn set_debug(&self, debug: &GuestDebug) -> Result<()> {
        *self.debug.borrow_mut() = debug.clone();
        Ok(())
    }

    fn registers(&self) -> Result<RegisterList> {
        Ok(self.registers.borrow().ids().collect())
    }

    fn register(&self, id: RegisterId, value: &mut [u8]) -> Result<()> {
        let error = self.register_error("read", id);
        let mut read = || {
            let held = self.registers.borrow().get(id)?;
            let size = id.size();
            let value = value.get_mut(..size).ok_or(io::ErrorKind::InvalidInput)?;
            value.copy_from_slice(&held.to_le_bytes()[..size]);
            Ok(())
        };
        read().map_err(error)
    }

    fn set_register(&self, id: RegisterId, value: &[u8]) -> Result<()> {
        let error = self.register_error("write", id);
        let write = || {
            let mut bytes = [0; 8];
            let size = id.size().min(bytes.len());
            let value = value.get(..size).ok_or(io::ErrorKind::InvalidInput)?;
            bytes[..size].copy_from_slice(value);
            let mut registers = self.registers.borrow_mut();
            registers.set(id, u64::from_le_bytes(bytes))
        };
        write().map_err(error)
    }
}

/// Ends [`Vcpu::run`] of a model vCPU.
#[derive(Clone, Default)]
pub struct ModelInterrupter(Arc<(Mutex<bool>, Condvar)>);

impl ModelInterrupter {
    fn wait(&self) {
        let (wanted, changed) = &*self.0;
        let guard = wanted.lock().unwrap_or_else(PoisonError::into_inner);
        drop(
            changed
                .wait_while(guard, |wanted| !*wanted)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    fn take(&self) -> bool {
        let mut wanted = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut wanted)
    }
}

impl Interrupter for ModelInterrupter {
    fn interrupt(&self) {
        let (wanted, changed) = &*self.0;
        *wanted.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
    }
}
