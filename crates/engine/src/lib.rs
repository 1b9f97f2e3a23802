//! What a hypervisor offers a virtual machine monitor.
//!
//! A [`Hypervisor`] says what it can do ([`Capabilities`]) and makes a [`VmBuilder`]. Whatever has
//! to be decided before the first vCPU exists is decided on the builder, MTE among it
//! (`KVM_CAP_ARM_MTE` is refused once a vCPU was created; Linux `Documentation/virt/kvm/api.rst`
//! 7.28), and [`VmBuilder::build`] ends that phase: a [`Vm`] has no way to turn MTE on, so the
//! wrong order does not compile. The VM then takes memory as [`Memslot`]s, makes [`Vcpu`]s, an
//! interrupt controller, and copies tags in bulk. A vCPU runs on the thread that calls
//! [`Vcpu::run`] until it needs the VMM's help: an [`Exit`].
//!
//! ```compile_fail
//! # fn f(hypervisor: &impl engine::Hypervisor) -> engine::Result<()> {
//! use engine::{Vm, VmBuilder};
//! let vm = hypervisor.new_vm(40)?.build()?;
//! let vcpu = vm.create_vcpu(0, engine::VcpuFeatures::default())?;
//! vm.enable_mte()?; // too late: no such method
//! # Ok(())
//! # }
//! ```
//!
//! ```
//! # fn f(hypervisor: &impl engine::Hypervisor) -> engine::Result<()> {
//! use engine::{Vm, VmBuilder};
//! let mut builder = hypervisor.new_vm(40)?;
//! builder.enable_mte()?;
//! let vm = builder.build()?;
//! let vcpu = vm.create_vcpu(0, engine::VcpuFeatures::default())?;
//! # Ok(())
//! # }
//! ```
//!
//! The traits speak of guest memory, registers and interrupts, never of file descriptors or
//! ioctls, so that a hypervisor other than Linux KVM can stand behind them. `kvm` is KVM on arm64,
//! [`model`] a reference model of the hypervisor side for tests that have to run anywhere.

mod capabilities;
mod debug;
mod error;
mod exit;
mod interrupt;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
pub mod kvm;
mod memslot;
pub mod model;
mod register;
mod state;
mod tags;

pub use capabilities::{Capabilities, MteSupport};
pub use debug::{DebugCause, DebugExit, DebugRegister, DebugRegisters, GuestDebug, Watch};
pub use error::{Error, Result};
pub use exit::{Exit, SystemEvent};
pub use interrupt::{GicLayout, Ppi, Spi};
pub use memslot::Memslot;
pub use register::{RegisterId, RegisterList};
pub use state::{GicRegister, GicState, PendingSError, PowerState, RegisterValue, VcpuState};
pub use tags::{TagCopyError, TagCopyResult};

/// A hypervisor on this machine.
pub trait Hypervisor {
    /// A VM under construction.
    type VmBuilder: VmBuilder;

    /// What the hypervisor can do here. Asked once, when it was opened.
    fn capabilities(&self) -> &Capabilities;

    /// Begins a VM whose guest-physical addresses have `ipa_bits` bits.
    ///
    /// # Errors
    /// [`Error::IpaBits`] if the host has fewer; [`Error::Host`] if it refuses the VM.
    fn new_vm(&self, ipa_bits: u8) -> Result<Self::VmBuilder>;
}

/// A VM under construction: no vCPU exists yet.
pub trait VmBuilder: Sized {
    /// The VM that is built.
    type Vm: Vm;

    /// Gives the VM memory tagging: tag storage for all of its memory, the tag registers in every
    /// vCPU, and the MTE fields of the ID registers (seed 000). It cannot be taken back.
    ///
    /// # Errors
    /// [`Error::MteUnsupported`] if the host cannot.
    fn enable_mte(&mut self) -> Result<()>;

    /// Ends construction.
    ///
    /// # Errors
    /// [`Error::Host`] if the host refuses.
    fn build(self) -> Result<Self::Vm>;
}

/// A virtual machine.
pub trait Vm: Send + Sync + 'static {
    /// A virtual CPU of this VM.
    type Vcpu: Vcpu;

    /// Whether the VM was built with MTE.
    fn has_mte(&self) -> bool;

    /// Maps host memory into the guest, or moves the memslot of the same number or changes its flags.
    ///
    /// # Safety
    /// `memslot.host_address` must be the start of at least `memslot.size` bytes of mapped memory
    /// that stays mapped until the slot is deleted or the VM is gone, and that holds nothing a
    /// guest may not read and write.
    ///
    /// # Errors
    /// [`Error::MemoryWithoutTags`] if the VM has MTE and the memory cannot hold tags;
    /// [`Error::Memslot`] for any other refusal.
    unsafe fn set_memslot(&self, memslot: &Memslot) -> Result<()>;

    /// Takes a memslot's memory away from the guest.
    ///
    /// # Errors
    /// [`Error::DeleteMemslot`] if there is no such slot.
    fn delete_memslot(&self, slot: u32) -> Result<()>;

    /// Makes vCPU number `index`, reset and ready to be given registers.
    ///
    /// # Errors
    /// [`Error::Aarch32WithMte`] for a 32-bit EL1 in a VM with MTE; [`Error::Vcpu`] if the host refuses.
    fn create_vcpu(&self, index: u32, features: VcpuFeatures) -> Result<Self::Vcpu>;

    /// Makes the interrupt controller. All vCPUs exist by now and none has run.
    ///
    /// # Errors
    /// [`Error::Gic`] if the host has no GICv3 to give or refuses the layout.
    fn create_gic(&self, layout: &GicLayout) -> Result<()>;

    /// The interrupt controller's state, while no vCPU runs.
    ///
    /// # Errors
    /// [`Error::Gic`] if there is none, or the host does not tell.
    fn gic_state(&self) -> Result<GicState>;

    /// Gives an interrupt controller that was just made, with the same layout, this state. No vCPU has run.
    ///
    /// # Errors
    /// [`Error::ForeignGic`] if it is another kind's; [`Error::Gic`] if the host refuses.
    fn restore_gic(&self, state: &GicState) -> Result<()>;

    /// Drives the line of a shared peripheral interrupt. The guest decides whether its level or its rising edge counts.
    ///
    /// # Errors
    /// [`Error::Host`] if the interrupt controller does not exist.
    fn set_spi(&self, spi: Spi, high: bool) -> Result<()>;

    /// Reads the tags of whole pages of guest memory from `ipa` on: one byte a granule, so
    /// `tags.len() * 16` bytes of memory (`KVM_ARM_MTE_COPY_TAGS`, api.rst 4.130, seed 003).
    ///
    /// Returns how many bytes of *guest memory* were covered, which can be fewer than asked if
    /// a later page could not be reached. Not synchronised with vCPUs that run.
    ///
    /// # Errors
    /// See [`TagCopyError`].
    fn copy_tags_from_guest(&self, ipa: u64, tags: &mut [u8]) -> TagCopyResult;

    /// Writes the tags of whole pages of guest memory from `ipa` on; only bits 3:0 of each byte
    /// count. Otherwise like [`Vm::copy_tags_from_guest`].
    ///
    /// # Errors
    /// See [`TagCopyError`]; among them [`TagCopyError::DirtyLogging`] while any memslot logs writes.
    fn copy_tags_to_guest(&self, ipa: u64, tags: &[u8]) -> TagCopyResult;

    /// Takes the pages of a memslot that the guest wrote, data or tags, since the last call: one
    /// bit a host page, lowest address in bit 0 of the first word. The log is cleared.
    ///
    /// # Errors
    /// [`Error::DirtyLog`] if there is no such slot, or it does not log writes.
    fn take_dirty_log(&self, slot: u32) -> Result<Vec<u64>>;
}

/// What a vCPU is made with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuFeatures {
    /// EL1 runs in AArch32. Refused in a VM with MTE, which AArch32 does not have (seed 003).
    pub aarch32_el1: bool,
    /// The vCPU waits for PSCI `CPU_ON`; the boot CPU does not.
    pub powered_off: bool,
    /// Scalable Vector Extension.
    pub sve: bool,
    /// Pointer authentication, address and generic.
    pub pointer_authentication: bool,
    /// A PMUv3, whose interrupt is then set by [`Vcpu::init_pmu`].
    pub pmu: bool,
}

/// A virtual CPU. It can move between threads while it does not run.
pub trait Vcpu: Send {
    /// Makes a running vCPU return.
    type Interrupter: Interrupter;

    /// Runs the guest until it needs the VMM.
    ///
    /// What an [`Exit`] asks for is finished by the next call: the value of an MMIO read reaches
    /// the guest's register then. A vCPU is therefore only whole, fit to be saved, after
    /// [`Exit::Interrupted`] or [`Exit::Debug`].
    ///
    /// # Errors
    /// [`Error::GuestMemoryFault`] if the host cannot give the guest the memory it touched;
    /// [`Error::Run`] for whatever else stops it.
    fn run(&mut self) -> Result<Exit<'_>>;

    /// A handle by which other threads end [`Vcpu::run`].
    fn interrupter(&self) -> Self::Interrupter;

    /// Connects the PMU's overflow interrupt and starts the PMU. The interrupt controller exists by now.
    ///
    /// # Errors
    /// [`Error::Vcpu`] if the vCPU was made without a PMU.
    fn init_pmu(&self, interrupt: Ppi) -> Result<()>;

    /// Every register that the host names as state of this vCPU. [`VcpuState`] has what is state besides.
    ///
    /// # Errors
    /// [`Error::Register`] if the host refuses.
    fn registers(&self) -> Result<RegisterList>;

    /// Reads a register into `value`, [`RegisterId::size`] bytes, little-endian.
    ///
    /// # Errors
    /// [`Error::Register`] if the vCPU has no such register or `value` is too small.
    fn register(&self, id: RegisterId, value: &mut [u8]) -> Result<()>;

    /// Writes a register from `value`, [`RegisterId::size`] bytes, little-endian.
    ///
    /// # Errors
    /// [`Error::Register`] if the vCPU has no such register, or refuses the value.
    fn set_register(&self, id: RegisterId, value: &[u8]) -> Result<()>;

    /// Whether the vCPU runs at all (PSCI).
    ///
    /// # Errors
    /// [`Error::Vcpu`] if the host refuses.
    fn power_state(&self) -> Result<PowerState>;

    /// Lets the vCPU run, or wait for another to turn it on.
    ///
    /// # Errors
    /// [`Error::Vcpu`] if the host refuses.
    fn set_power_state(&self, state: PowerState) -> Result<()>;

    /// The SError that waits to be taken.
    ///
    /// # Errors
    /// [`Error::Vcpu`] if the host refuses.
    fn pending_serror(&self) -> Result<PendingSError>;

    /// Makes an SError wait to be taken, or none.
    ///
    /// # Errors
    /// [`Error::Vcpu`] if the host refuses.
    fn set_pending_serror(&self, serror: PendingSError) -> Result<()>;

    /// Says what is to stop the vCPU for a debugger, in place of what was said before, while it does not run
    /// (`KVM_SET_GUEST_DEBUG`, api.rst 4.87).
    ///
    /// # Errors
    /// [`Error::Vcpu`] if the host refuses, or the vCPU has fewer registers ([`Vcpu::debug_registers`]).
    fn set_debug(&self, debug: &GuestDebug) -> Result<()>;

    /// How many breakpoint and watchpoint registers it has for a debugger.
    ///
    /// # Errors
    /// [`Error::Register`] if the host does not tell.
    fn debug_registers(&self) -> Result<DebugRegisters> {
        self.register_u64(RegisterId::ID_AA64DFR0_EL1)
            .map(DebugRegisters::from_id_aa64dfr0)
    }

    /// Reads a 64-bit register.
    ///
    /// # Errors
    /// As [`Vcpu::register`].
    fn register_u64(&self, id: RegisterId) -> Result<u64> {
        let mut value = [0; 8];
        self.register(id, &mut value)?;
        Ok(u64::from_le_bytes(value))
    }

    /// Writes a 64-bit register.
    ///
    /// # Errors
    /// As [`Vcpu::set_register`].
    fn set_register_u64(&self, id: RegisterId, value: u64) -> Result<()> {
        self.set_register(id, &value.to_le_bytes())
    }
}

/// Ends a vCPU's [`Vcpu::run`] from another thread.
pub trait Interrupter: Clone + Send + Sync + 'static {
    /// Makes the current or else the next call of [`Vcpu::run`] return [`Exit::Interrupted`].
    ///
    /// It says nothing of the reason: the caller leaves that where the vCPU's thread looks for it,
    /// before it interrupts.
    fn interrupt(&self);
}
