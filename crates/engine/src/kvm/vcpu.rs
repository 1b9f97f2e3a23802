//! A vCPU on KVM.

use std::io;

use kvm_bindings::{
    KVM_ARM_VCPU_EL1_32BIT, KVM_ARM_VCPU_PMU_V3, KVM_ARM_VCPU_PMU_V3_CTRL,
    KVM_ARM_VCPU_PMU_V3_INIT, KVM_ARM_VCPU_PMU_V3_IRQ, KVM_ARM_VCPU_POWER_OFF,
    KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_PTRAUTH_ADDRESS, KVM_ARM_VCPU_PTRAUTH_GENERIC,
    KVM_ARM_VCPU_SVE, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW,
    KVM_GUESTDBG_USE_SW_BP, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED, KVM_MP_STATE_SUSPENDED,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, RegList, kvm_device_attr, kvm_guest_debug,
    kvm_guest_debug_arch, kvm_mp_state, kvm_vcpu_events, kvm_vcpu_init,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use super::KvmInterrupter;
use crate::{
    DebugExit, DebugRegister, Error, Exit, GuestDebug, PendingSError, PowerState, Ppi, RegisterId,
    RegisterList, Result, SystemEvent, Vcpu, VcpuFeatures,
};

/// More registers than any vCPU has; as many as the crate's list can hold.
const MAX_REGISTERS: usize = 500;

/// A vCPU on KVM.
pub struct KvmVcpu {
    fd: VcpuFd,
    index: u32,
    interrupter: KvmInterrupter,
}

/// What `KVM_RUN` came back with, holding no borrow of the vCPU.
enum Outcome {
    MmioRead { ipa: u64, length: usize },
    MmioWrite { ipa: u64, length: usize },
    System(SystemEvent),
    Debug(DebugExit),
    Interrupted,
    Failed(String),
    MemoryFault,
}

impl KvmVcpu {
    pub(super) fn new(vm: &VmFd, index: u32, features: VcpuFeatures) -> Result<Self> {
        let fd = vm
            .create_vcpu(index.into())
            .map_err(vcpu_error(index, "creating it"))?;
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init)
            .map_err(vcpu_error(index, "asking for the host's CPU type"))?;
        for feature in feature_bits(features) {
            init.features[0] |= 1 << feature;
        }
        fd.vcpu_init(&init)
            .map_err(vcpu_error(index, "initialising it"))?;
        if features.sve {
            fd.vcpu_finalize(&(KVM_ARM_VCPU_SVE as i32))
                .map_err(vcpu_error(index, "settling its SVE vector lengths"))?;
        }
        let interrupter = KvmInterrupter::new(&fd, index)?;
        Ok(Self {
            fd,
            index,
            interrupter,
        })
    }

    fn run_once(&mut self) -> Outcome {
        match self.fd.run() {
            Ok(VcpuExit::MmioRead(ipa, data)) => Outcome::MmioRead {
                ipa,
                length: data.len(),
            },
            Ok(VcpuExit::MmioWrite(ipa, data)) => Outcome::MmioWrite {
                ipa,
                length: data.len(),
            },
            Ok(VcpuExit::SystemEvent(event, _)) => system_event(event),
            Ok(VcpuExit::Debug(exit)) => Outcome::Debug(DebugExit {
                syndrome: exit.hsr,
                far: exit.far,
            }),
            Ok(VcpuExit::Intr) => Outcome::Interrupted,
            Ok(VcpuExit::MemoryFault { .. }) => Outcome::MemoryFault,
            Ok(VcpuExit::FailEntry(reason, cpu)) => Outcome::Failed(format!(
                "the CPU {cpu} refused to enter the guest, reason {reason:#x}"
            )),
            Ok(exit) => Outcome::Failed(format!("KVM stopped for a reason unknown here: {exit:?}")),
            Err(e) => failure(e),
        }
    }

    fn mmio_data(&mut self, length: usize) -> &mut [u8] {
        let run = self.fd.get_kvm_run();
        // SAFETY: called only after `KVM_EXIT_MMIO`, for which this is the union's live member; and
        // any bytes are valid for its integers.
        let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
        &mut mmio.data[..length]
    }

    fn pc(&self) -> u64 {
        self.register_u64(RegisterId::PC).unwrap_or(u64::MAX)
    }

    fn set_pmu_attribute(
        &self,
        attribute: u32,
        value: Option<&i32>,
    ) -> Result<(), kvm_ioctls::Error> {
        self.fd.set_device_attr(&kvm_device_attr {
            flags: 0,
            group: KVM_ARM_VCPU_PMU_V3_CTRL,
            attr: attribute.into(),
            addr: value.map_or(0, |value| std::ptr::from_ref(value) as u64),
        })
    }
}

fn feature_bits(features: VcpuFeatures) -> impl Iterator<Item = u32> {
    [
        (true, KVM_ARM_VCPU_PSCI_0_2),
        (features.powered_off, KVM_ARM_VCPU_POWER_OFF),
        (features.aarch32_el1, KVM_ARM_VCPU_EL1_32BIT),
        (features.sve, KVM_ARM_VCPU_SVE),
        (
            features.pointer_authentication,
            KVM_ARM_VCPU_PTRAUTH_ADDRESS,
        ),
        (
            features.pointer_authentication,
            KVM_ARM_VCPU_PTRAUTH_GENERIC,
        ),
        (features.pmu, KVM_ARM_VCPU_PMU_V3),
    ]
    .into_iter()
    .filter_map(|(wanted, bit)| wanted.then_some(bit))
}

fn system_event(event: u32) -> Outcome {
    match event {
        KVM_SYSTEM_EVENT_SHUTDOWN => Outcome::System(SystemEvent::Off),
        KVM_SYSTEM_EVENT_RESET => Outcome::System(SystemEvent::Reset),
        _ => Outcome::Failed(format!("KVM reports system event {event}, unknown here")),
    }
}

fn failure(error: kvm_ioctls::Error) -> Outcome {
    match error.errno() {
        libc::EINTR | libc::EAGAIN => Outcome::Interrupted,
        libc::EFAULT => Outcome::MemoryFault,
        libc::ENOSYS => Outcome::Failed(
            "the guest accessed a device with an instruction that tells the hypervisor neither \
             address nor register (a pair, a vector or an atomic)"
                .into(),
        ),
        _ => Outcome::Failed(error.to_string()),
    }
}

impl Vcpu for KvmVcpu {
    type Interrupter = KvmInterrupter;

    fn run(&mut self) -> Result<Exit<'_>> {
        self.interrupter.runs_here();
        match self.run_once() {
            Outcome::MmioRead { ipa, length } => Ok(Exit::MmioRead {
                ipa,
                data: self.mmio_data(length),
            }),
            Outcome::MmioWrite { ipa, length } => Ok(Exit::MmioWrite {
                ipa,
                data: self.mmio_data(length),
            }),
            Outcome::System(event) => Ok(Exit::System(event)),
            Outcome::Debug(exit) => Ok(Exit::Debug(exit)),
            Outcome::Interrupted => {
                self.interrupter.acknowledge();
                Ok(Exit::Interrupted)
            }
            Outcome::MemoryFault => Err(Error::GuestMemoryFault {
                index: self.index,
                pc: self.pc(),
            }),
            Outcome::Failed(reason) => Err(Error::Run {
                index: self.index,
                pc: self.pc(),
                reason,
            }),
        }
    }

    fn interrupter(&self) -> KvmInterrupter {
        self.interrupter.clone()
    }

    fn init_pmu(&self, interrupt: Ppi) -> Result<()> {
        let intid = interrupt.intid() as i32;
        self.set_pmu_attribute(KVM_ARM_VCPU_PMU_V3_IRQ, Some(&intid))
            .map_err(vcpu_error(self.index, "connecting the PMU's interrupt"))?;
        self.set_pmu_attribute(KVM_ARM_VCPU_PMU_V3_INIT, None)
            .map_err(vcpu_error(self.index, "starting the PMU"))
    }

    fn power_state(&self) -> Result<PowerState> {
        let state = self
            .fd
            .get_mp_state()
            .map_err(vcpu_error(self.index, "asking whether it runs"))?;
        Ok(match state.mp_state {
            KVM_MP_STATE_STOPPED => PowerState::Off,
            KVM_MP_STATE_SUSPENDED => PowerState::Suspended,
            _ => PowerState::On,
        })
    }

    fn set_power_state(&self, state: PowerState) -> Result<()> {
        let mp_state = match state {
            PowerState::On => KVM_MP_STATE_RUNNABLE,
            PowerState::Off => KVM_MP_STATE_STOPPED,
            PowerState::Suspended => KVM_MP_STATE_SUSPENDED,
        };
        self.fd
            .set_mp_state(kvm_mp_state { mp_state })
            .map_err(vcpu_error(self.index, "saying whether it runs"))
    }

    fn pending_serror(&self) -> Result<PendingSError> {
        let exception = self
            .fd
            .get_vcpu_events()
            .map_err(vcpu_error(self.index, "asking for its pending SError"))?
            .exception;
        Ok(PendingSError {
            pending: exception.serror_pending != 0,
            syndrome: (exception.serror_has_esr != 0).then_some(exception.serror_esr),
        })
    }

    fn set_pending_serror(&self, serror: PendingSError) -> Result<()> {
        let mut events = kvm_vcpu_events::default();
        events.exception.serror_pending = serror.pending.into();
        // The syndrome is one of the SError that is pending: without one it is refused.
        if let Some(syndrome) = serror.syndrome.filter(|_| serror.pending) {
            events.exception.serror_has_esr = 1;
            events.exception.serror_esr = syndrome;
        }
        self.fd
            .set_vcpu_events(&events)
            .map_err(vcpu_error(self.index, "giving it a pending SError"))
    }

    fn set_debug(&self, debug: &GuestDebug) -> Result<()> {
        const STEP: &str = "giving it a debugger's breakpoints and watchpoints";
        let mut arch = kvm_guest_debug_arch::default();
        let fits = place(&debug.breakpoints, &mut arch.dbg_bcr, &mut arch.dbg_bvr)
            && place(&debug.watchpoints, &mut arch.dbg_wcr, &mut arch.dbg_wvr);
        if !fits {
            return Err(Error::Vcpu {
                index: self.index,
                step: STEP,
                source: io::ErrorKind::InvalidInput.into(),
            });
        }
        let uses_registers = !debug.breakpoints.is_empty() || !debug.watchpoints.is_empty();
        let control = [
            (debug.is_on(), KVM_GUESTDBG_ENABLE),
            (debug.single_step, KVM_GUESTDBG_SINGLESTEP),
            (debug.software_breakpoints, KVM_GUESTDBG_USE_SW_BP),
            (uses_registers, KVM_GUESTDBG_USE_HW),
        ];
        let control = control.into_iter().filter(|(wanted, _)| *wanted);
        self.fd
            .set_guest_debug(&kvm_guest_debug {
                control: control.fold(0, |bits, (_, bit)| bits | bit),
                pad: 0,
                arch,
            })
            .map_err(vcpu_error(self.index, STEP))
    }

    fn registers(&self) -> Result<RegisterList> {
        let error = |source| Error::RegisterList {
            index: self.index,
            source,
        };
        let mut list =
            RegList::new(MAX_REGISTERS).map_err(|_| error(io::ErrorKind::OutOfMemory.into()))?;
        self.fd
            .get_reg_list(&mut list)
            .map_err(|e| error(e.into()))?;
        Ok(list
            .as_slice()
            .iter()
            .map(|id| RegisterId::from_kvm(*id))
            .collect())
    }

    fn register(&self, id: RegisterId, value: &mut [u8]) -> Result<()> {
        self.fd
            .get_one_reg(id.to_kvm(), value)
            .map(drop)
            .map_err(|e| self.register_error("read", id, e))
    }

    fn set_register(&self, id: RegisterId, value: &[u8]) -> Result<()> {
        self.fd
            .set_one_reg(id.to_kvm(), value)
            .map(drop)
            .map_err(|e| self.register_error("write", id, e))
    }
}

/// Fills register pairs from the first on. `false` if there are too few.
fn place(registers: &[DebugRegister], controls: &mut [u64], values: &mut [u64]) -> bool {
    let pairs = controls.iter_mut().zip(values);
    for (register, (control, value)) in registers.iter().zip(pairs) {
        (*control, *value) = (register.control, register.value);
    }
    registers.len() <= controls.len()
}

impl KvmVcpu {
    fn register_error(
        &self,
        action: &'static str,
        id: RegisterId,
        error: kvm_ioctls::Error,
    ) -> Error {
        Error::Register {
            index: self.index,
            action,
            id,
            source: error.into(),
        }
    }
}

fn vcpu_error(index: u32, step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |e| Error::Vcpu {
        index,
        step,
        source: e.into(),
    }
}
