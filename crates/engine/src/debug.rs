//! A debugger's hold on a vCPU: what makes it stop, and what it says when it does.
//!
//! Set by [`Vcpu::set_debug`](crate::Vcpu::set_debug) while the vCPU does not run; from then on [`Exit::Debug`](crate::Exit::Debug)
//! is one of its exits. The guest's own use of the same things stands back meanwhile: its BRK instructions come out as exits, which
//! whoever debugs has to tell from his own ([`DebugExit::cause`]) and give back to the guest, and its breakpoint and
//! watchpoint registers do nothing while a debugger uses any (Linux `Documentation/virt/kvm/api.rst` 4.87; Arm ARM D2).

/// Exception classes in ESR_ELx (Arm ARM D24.2.40, "EC"), of debug exceptions from a lower level.
mod class {
    pub const BREAKPOINT: u32 = 0x30;
    pub const STEP: u32 = 0x32;
    pub const WATCHPOINT: u32 = 0x34;
    pub const BRK: u32 = 0x3c;
}

/// What is to stop a vCPU. The default is nothing: all is the guest's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// It stops after one instruction.
    pub single_step: bool,
    /// It stops at BRK instructions instead of taking their exceptions.
    pub software_breakpoints: bool,
    /// Breakpoint registers, no more than [`DebugRegisters::breakpoints`].
    pub breakpoints: Vec<DebugRegister>,
    /// Watchpoint registers, no more than [`DebugRegisters::watchpoints`].
    pub watchpoints: Vec<DebugRegister>,
}

impl GuestDebug {
    /// Whether anything is to stop the vCPU.
    pub fn is_on(&self) -> bool {
        *self != Self::default()
    }
}

/// A breakpoint or watchpoint register pair (Arm ARM D24.3: DBGBCR and DBGBVR, DBGWCR and DBGWVR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugRegister {
    /// `DBGBCRn_EL1` or `DBGWCRn_EL1`.
    pub control: u64,
    /// `DBGBVRn_EL1` or `DBGWVRn_EL1`.
    pub value: u64,
}

/// Which accesses a watchpoint stops: `DBGWCRn_EL1.LSC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Loads.
    Loads = 1,
    /// Stores.
    Stores = 2,
    /// Both.
    Both = 3,
}

const ENABLED: u64 = 1;
/// EL1 and EL0: `PMC` or `PAC` 0b11, with `HMC` and `SSC` 0.
const EL1_AND_EL0: u64 = 0b11 << 1;
const BAS_SHIFT: u32 = 5;

impl DebugRegister {
    /// Stops before the A64 instruction at `address`, in EL1 and EL0.
    pub const fn breakpoint(address: u64) -> Self {
        Self {
            control: ENABLED | EL1_AND_EL0 | 0xf << BAS_SHIFT,
            value: address & !3,
        }
    }

    /// Stops at accesses to `length` bytes from `address` on, in EL1 and EL0. One register watches bytes of one aligned
    /// doubleword, or an aligned power of two of up to 2 GiB; `None` for what needs more.
    pub const fn watchpoint(address: u64, length: u64, watch: Watch) -> Option<Self> {
        let control = ENABLED | EL1_AND_EL0 | (watch as u64) << 3;
        let within = address & 7;
        if length != 0 && length <= 8 && within + length <= 8 {
            let bytes = ((1 << length) - 1) << within;
            return Some(Self {
                control: control | bytes << BAS_SHIFT,
                value: address & !7,
            });
        }
        if length.is_power_of_two()
            && length > 8
            && length <= 1 << 31
            && address & (length - 1) == 0
        {
            let mask = length.trailing_zeros() as u64;
            return Some(Self {
                control: control | 0xff << BAS_SHIFT | mask << 24,
                value: address,
            });
        }
        None
    }
}

/// How many of each a vCPU has (`KVM_CAP_GUEST_DEBUG_HW_BPS` and `_WPS`, as `ID_AA64DFR0_EL1` says).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DebugRegisters {
    /// Breakpoint registers.
    pub breakpoints: usize,
    /// Watchpoint registers.
    pub watchpoints: usize,
}

impl DebugRegisters {
    /// Those that `ID_AA64DFR0_EL1` names: its fields BRPs and WRPs, each one less than there are.
    pub const fn from_id_aa64dfr0(value: u64) -> Self {
        Self {
            breakpoints: (value >> 12 & 0xf) as usize + 1,
            watchpoints: (value >> 20 & 0xf) as usize + 1,
        }
    }
}

/// Why a vCPU stopped for its debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugExit {
    /// The syndrome, as `ESR_EL2` had it.
    pub syndrome: u32,
    /// The address of a watched access, as `FAR_EL2` had it; means nothing otherwise.
    pub far: u64,
}

/// What a debug exception was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugCause {
    /// A breakpoint register. PC is that of the instruction, which was not executed.
    Breakpoint,
    /// A watchpoint register. PC is that of the instruction, which was not executed.
    Watchpoint,
    /// One instruction was executed.
    Step,
    /// A BRK instruction, whoever put it there. PC is its own.
    Brk,
    /// Nothing that is asked for here.
    Other,
}

impl DebugExit {
    /// What it was.
    pub const fn cause(self) -> DebugCause {
        match self.syndrome >> 26 {
            class::BREAKPOINT => DebugCause::Breakpoint,
            class::WATCHPOINT => DebugCause::Watchpoint,
            class::STEP => DebugCause::Step,
            class::BRK => DebugCause::Brk,
            _ => DebugCause::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_breakpoint_is_one_instruction_of_both_levels() {
        let register = DebugRegister::breakpoint(0x4008_0004);

        // E, PMC 0b11, BAS 0b1111.
        assert_eq!(register.control, 0x1e7);
        assert_eq!(register.value, 0x4008_0004);
    }

    #[test]
    fn a_small_watchpoint_selects_bytes_of_a_doubleword() {
        let register = DebugRegister::watchpoint(0x1004, 4, Watch::Stores).unwrap();

        assert_eq!(register.value, 0x1000);
        // E, PAC 0b11, LSC 0b10, BAS 0b11110000.
        assert_eq!(register.control, 1 | 3 << 1 | 2 << 3 | 0xf0 << 5);
    }

    #[test]
    fn a_large_watchpoint_masks_address_bits() {
        let register = DebugRegister::watchpoint(0x1000, 64, Watch::Both).unwrap();

        assert_eq!(register.value, 0x1000);
        assert_eq!(register.control >> 24, 6);
        assert_eq!(register.control >> 5 & 0xff, 0xff);
    }

    #[test]
    fn what_one_register_cannot_watch_is_refused() {
        assert_eq!(DebugRegister::watchpoint(0x1006, 4, Watch::Both), None);
        assert_eq!(DebugRegister::watchpoint(0x1000, 12, Watch::Both), None);
        assert_eq!(DebugRegister::watchpoint(0x1010, 64, Watch::Both), None);
        assert_eq!(DebugRegister::watchpoint(0x1000, 0, Watch::Both), None);
        assert_eq!(DebugRegister::watchpoint(0, 1 << 32, Watch::Both), None);
    }

    #[test]
    fn the_number_of_registers_is_one_more_than_the_fields_say() {
        let registers = DebugRegisters::from_id_aa64dfr0(0x3 << 20 | 0x5 << 12);

        assert_eq!((registers.breakpoints, registers.watchpoints), (6, 4));
    }

    #[test]
    fn the_cause_is_read_from_the_exception_class() {
        let cause = |class: u32| {
            let exit = DebugExit {
                syndrome: class << 26 | 0x1f0,
                far: 0,
            };
            exit.cause()
        };
        assert_eq!(cause(0x30), DebugCause::Breakpoint);
        assert_eq!(cause(0x32), DebugCause::Step);
        assert_eq!(cause(0x34), DebugCause::Watchpoint);
        assert_eq!(cause(0x3c), DebugCause::Brk);
        assert_eq!(cause(0x24), DebugCause::Other);
    }
}
