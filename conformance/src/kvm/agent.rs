//! What a vCPU of KVM runs to do as it is told.
//!
//! The agent is a page of code beside a page of translation table, in a memslot of its own. After
//! each command it writes the result to a device's address, which ends `KVM_RUN`; the next command
//! is put into its registers, and it goes on. An exception is reported in the same way at the
//! device's next word. So nothing that the guest does can hang: every instruction ends in an exit.
//!
//! The MMU is on from the first instruction, for with it off all memory is Device memory and has no
//! tags: addresses up to 512 GiB are mapped to themselves, the first GiB as Device memory, the rest as
//! Normal memory, Tagged if the VM has MTE.

use std::arch::global_asm;
use std::sync::Arc;

use engine::kvm::{KvmVcpu, KvmVm};
use engine::{Exit, Interrupter, Memslot, RegisterId, Vcpu, VcpuFeatures, Vm};
use mte::{SystemRegister, Tag, TagPage};

use super::HostMapping;
use crate::{Backing, GuestCpu, GuestFault, Mapping, PAGE, Stop};

/// Where the agents of a VM's vCPUs are, a stride apart. No check has memory there.
const AGENTS: u64 = 0x4000_0000;
const STRIDE: u64 = 0x1_0000;
/// Their memslots are numbered from here on.
const FIRST_SLOT: u32 = 16;

/// The device: a word for results, one for exceptions.
const RESULT: u64 = 0x1000_0000;
const EXCEPTION: u64 = RESULT + 8;

global_asm!(
    r#"
    .arch_extension memtag
    .pushsection .rodata.conformance_agent, "a"
    .balign 4
    .global conformance_agent
    conformance_agent:
    0:  str x0, [x20]               // x20: the device. Here the command arrives.
    .global conformance_agent_next
    conformance_agent_next:
        adr x9, 1f
        add x9, x9, x1, lsl #3      // x1: what to do; x2 to x5: with what
        br x9
        // Two instructions for each command.
    1:  ldr x0, [x2]
        b 0b
        str x3, [x2]
        b 0b
        b 2f
        nop
        b 3f
        nop
        b 4f
        nop
        b 7f
        nop
        b 8f
        nop
        mrs x0, id_aa64pfr0_el1
        b 0b
        mrs x0, S3_0_C0_C4_1        // ID_AA64PFR1_EL1
        b 0b
        mrs x0, S3_0_C1_C0_5        // RGSR_EL1
        b 0b
        msr S3_0_C1_C0_5, x3
        b 0b
        mrs x0, S3_0_C1_C0_6        // GCR_EL1
        b 0b
        msr S3_0_C1_C0_6, x3
        b 0b
        mrs x0, S3_0_C5_C6_0        // TFSR_EL1
        b 0b
        msr S3_0_C5_C6_0, x3
        b 0b
        mrs x0, S3_0_C5_C6_1        // TFSRE0_EL1
        b 0b
        msr S3_0_C5_C6_1, x3
        b 0b

    2:  cbz x5, 0b                  // x5 tags x3, the first at x2, x4 bytes apart
        stg x3, [x2]
        add x2, x2, x4
        sub x5, x5, #1
        b 2b

    3:  mov x0, #0                  // the sixteen tags from x2 on, packed
        add x9, x2, #256
    5:  sub x9, x9, #16
        mov x10, #0
        ldg x10, [x9]
        ubfx x10, x10, #56, #4
        orr x0, x10, x0, lsl #4
        cmp x9, x2
        b.ne 5b
        b 0b

    4:  mov x5, #16                 // sixteen tags from x2 on, packed in x3
    6:  lsl x9, x3, #56
        stg x9, [x2]
        add x2, x2, #16
        lsr x3, x3, #4
        subs x5, x5, #1
        b.ne 6b
        b 0b

    7:  mov x0, #0                  // the tag at x2
        ldg x0, [x2]
        ubfx x0, x0, #56, #4
        b 0b

    8:  dc cvau, x2                 // the code at x2, which EL0 has at x4, in AArch32 with r0 = x5 and r1 = x3
        dsb ish
        ic ivau, x2
        dsb ish
        isb
        msr elr_el1, x4
        mov x9, #0x1d0              // User mode, A32, all interrupts masked
        msr spsr_el1, x9
        mov x0, x5
        mov x1, x3
        eret

        .org conformance_agent + 0x800
        .rept 16
        mrs x0, esr_el1
        str x0, [x20, #8]
        b conformance_agent_next
        .org . + 0x74
        .endr
    .global conformance_agent_end
    conformance_agent_end:
    .popsection
    "#
);

unsafe extern "C" {
    static conformance_agent: u8;
    static conformance_agent_next: u8;
    static conformance_agent_end: u8;
}

/// The exception vectors' place in the code.
const VECTORS: u64 = 0x800;

/// The commands, in the order of the agent's table.
#[derive(Clone, Copy)]
enum Command {
    Load,
    Store,
    StgEach,
    Ldg16,
    Stg16,
    Ldg,
    Aarch32,
    ReadPfr0,
    ReadPfr1,
    ReadRgsr,
    WriteRgsr,
    ReadGcr,
    WriteGcr,
    ReadTfsr,
    WriteTfsr,
    ReadTfsre0,
    WriteTfsre0,
}

// Stage-1 descriptors of a 1 GiB block (Arm ARM D8.3).
const BLOCK: u64 = 0b01 | 1 << 10; // valid, access flag
const NORMAL: u64 = 0b11 << 8; // inner shareable, index 0 of MAIR_EL1
const EL0: u64 = 1 << 6; // readable and writable at EL0 too
const DEVICE: u64 = 1 << 2 | 0b11 << 53; // index 1 of MAIR_EL1, execute never

const SCTLR_EL1: RegisterId = RegisterId::system(3, 0, 1, 0, 0);
const TTBR0_EL1: RegisterId = RegisterId::system(3, 0, 2, 0, 0);
const TCR_EL1: RegisterId = RegisterId::system(3, 0, 2, 0, 2);
const MAIR_EL1: RegisterId = RegisterId::system(3, 0, 10, 2, 0);
const VBAR_EL1: RegisterId = RegisterId::system(3, 0, 12, 0, 0);

/// 39 bits of address by TTBR0 alone, pages of 4 KiB, write-back inner-shareable table walks, 40 bits
/// of physical address, top byte ignored.
const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 0b11 << 12 | 1 << 23 | 2 << 32 | 1 << 37;
/// Memory attributes: index 0 Normal write-back, Tagged or not; index 1 Device-nGnRE.
const MAIR_TAGGED: u64 = 0x04f0;
const MAIR_UNTAGGED: u64 = 0x04ff;
/// The bits that are one in any Armv8.0 setting, and M, C, I.
const SCTLR: u64 = 0x30d0_1805 | 1 << 12 | 1 << 2 | 1;
/// SCTLR_EL1.ATA.
const SCTLR_TAG_ACCESS: u64 = 1 << 43;
/// EL1h, all exceptions masked.
const PSTATE: u64 = 0x3c5;

/// A vCPU with an agent.
pub struct AgentCpu {
    vcpu: KvmVcpu,
    vm: Arc<KvmVm>,
    slot: Memslot,
    _memory: HostMapping,
    /// It did not end its last command, and must not go on with it.
    astray: bool,
}

impl AgentCpu {
    /// Makes vCPU number `index` of `vm`, and brings it to where it waits for commands.
    ///
    /// # Errors
    /// The engine refuses.
    pub fn new(vm: &Arc<KvmVm>, index: u32) -> Result<Self, Stop> {
        let memory = HostMapping::new(&Backing::Anonymous, 2)?;
        let slot = Memslot {
            slot: FIRST_SLOT + index,
            ipa: AGENTS + u64::from(index) * STRIDE,
            size: memory.size(),
            host_address: memory.address(),
            log_dirty: false,
            read_only: false,
        };
        write_agent(&memory);
        // SAFETY: the memory is the agent's alone, and goes after the slot, in `drop`.
        unsafe { vm.set_memslot(&slot) }?;
        let vcpu = vm.create_vcpu(index, VcpuFeatures::default())?;
        set_up(&vcpu, slot.ipa, vm.has_mte())?;
        let mut cpu = Self {
            vcpu,
            vm: Arc::clone(vm),
            slot,
            _memory: memory,
            astray: false,
        };
        cpu.run()?;
        Ok(cpu)
    }

    fn command(&mut self, command: Command, operands: [u64; 4]) -> Result<u64, GuestFault> {
        self.give(command, operands).map_err(GuestFault::Run)?;
        self.run()
    }

    fn give(&mut self, command: Command, operands: [u64; 4]) -> engine::Result<()> {
        if self.astray {
            let next = self.slot.ipa + offset_of_next();
            self.vcpu.set_register_u64(RegisterId::PC, next)?;
            self.astray = false;
        }
        self.vcpu
            .set_register_u64(RegisterId::x(1), command as u64)?;
        for (number, operand) in (2..).zip(operands) {
            self.vcpu.set_register_u64(RegisterId::x(number), operand)?;
        }
        Ok(())
    }

    /// Runs until the command is done.
    fn run(&mut self) -> Result<u64, GuestFault> {
        loop {
            match self.vcpu.run() {
                Ok(Exit::Interrupted) => (),
                Ok(Exit::MmioWrite { ipa: RESULT, data }) => return Ok(word(data)),
                Ok(Exit::MmioWrite {
                    ipa: EXCEPTION,
                    data,
                }) => return Err(fault_of(word(data))),
                Ok(Exit::MmioRead { .. } | Exit::MmioWrite { .. }) => {
                    self.finish_access().map_err(GuestFault::Run)?;
                    self.astray = true;
                    return Err(GuestFault::Mmio);
                }
                Ok(Exit::System(event)) => panic!("the agent asked for {event:?}"),
                Ok(Exit::Debug(exit)) => panic!("{exit:?}, and nobody debugs"),
                Err(error) => {
                    self.astray = true;
                    return Err(GuestFault::Run(error));
                }
            }
        }
    }

    /// Has the instruction finished for which the last exit was.
    fn finish_access(&mut self) -> engine::Result<()> {
        self.vcpu.interrupter().interrupt();
        match self.vcpu.run()? {
            Exit::Interrupted => Ok(()),
            exit => panic!("{exit:?} instead of an interruption"),
        }
    }
}

impl Drop for AgentCpu {
    fn drop(&mut self) {
        self.vm
            .delete_memslot(self.slot.slot)
            .expect("the agent's memslot can be deleted");
    }
}

/// An exception that the agent met.
fn fault_of(syndrome: u64) -> GuestFault {
    match syndrome >> 26 {
        // An undefined instruction, or a system register that is not there.
        0 => GuestFault::Undefined,
        _ => GuestFault::Exception(syndrome),
    }
}

fn word(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..data.len()].copy_from_slice(data);
    u64::from_le_bytes(bytes)
}

fn offset_of_next() -> u64 {
    (&raw const conformance_agent_next).addr() as u64 - (&raw const conformance_agent).addr() as u64
}

/// `ESR_EL1.EC` of an SVC in AArch32.
const EC_SVC32: u64 = 0x11;

/// `str r1, [r0]`, `svc #0`, in A32.
const STORE_IN_AARCH32: u64 = 0xef00_0000_e580_1000;

/// What EL0 calls the guest's memory: the fourth GiB is the third one, open to EL0.
const EL0_GIB: u64 = 3;
const EL0_ALIAS: u64 = 1 << 30;

/// The agent's code.
fn code() -> &'static [u8] {
    let (start, end) = (
        &raw const conformance_agent,
        &raw const conformance_agent_end,
    );
    // SAFETY: the code above lies between the two, and nothing writes to it.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Writes code and translation table.
fn write_agent(memory: &HostMapping) {
    let (words, _) = code().as_chunks();
    for (offset, word) in (0..).step_by(8).zip(words) {
        memory.write(offset, u64::from_le_bytes(*word));
    }
    memory.write(PAGE, BLOCK | DEVICE);
    for gib in 1..512 {
        memory.write(PAGE + gib * 8, gib << 30 | BLOCK | NORMAL);
    }
    let aliased = (EL0_GIB << 30) - EL0_ALIAS;
    memory.write(PAGE + EL0_GIB * 8, aliased | BLOCK | NORMAL | EL0);
}

fn set_up(vcpu: &KvmVcpu, agent: u64, has_mte: bool) -> engine::Result<()> {
    let (mair, access) = match has_mte {
        true => (MAIR_TAGGED, SCTLR_TAG_ACCESS),
        false => (MAIR_UNTAGGED, 0),
    };
    let registers = [
        (MAIR_EL1, mair),
        (TCR_EL1, TCR),
        (TTBR0_EL1, agent + PAGE),
        (VBAR_EL1, agent + VECTORS),
        (SCTLR_EL1, SCTLR | access),
        (RegisterId::PSTATE, PSTATE),
        (RegisterId::PC, agent),
        (RegisterId::x(20), RESULT),
    ];
    registers
        .into_iter()
        .try_for_each(|(id, value)| vcpu.set_register_u64(id, value))
}

impl GuestCpu for AgentCpu {
    type Vcpu = KvmVcpu;

    fn vcpu(&mut self) -> Result<&mut KvmVcpu, Stop> {
        self.finish_access()?;
        Ok(&mut self.vcpu)
    }

    fn load(&mut self, ipa: u64) -> Result<u64, GuestFault> {
        self.command(Command::Load, [ipa, 0, 0, 0])
    }

    fn store(&mut self, ipa: u64, value: u64) -> Result<(), GuestFault> {
        self.command(Command::Store, [ipa, value, 0, 0]).map(drop)
    }

    fn store_in_aarch32(
        &mut self,
        ipa: u64,
        value: u32,
        code: u64,
    ) -> Result<Option<()>, GuestFault> {
        /// `ID_AA64PFR0_EL1.EL0`: both widths.
        const BOTH: u64 = 2;
        if self.command(Command::ReadPfr0, [0; 4])? & 0xf != BOTH {
            return Ok(None);
        }
        self.store(code, STORE_IN_AARCH32)?;
        let operands = [code, value.into(), code + EL0_ALIAS, ipa + EL0_ALIAS];
        match self.command(Command::Aarch32, operands) {
            Err(GuestFault::Exception(syndrome)) if syndrome >> 26 == EC_SVC32 => Ok(Some(())),
            Err(fault) => Err(fault),
            Ok(result) => panic!("the agent returned {result:#x} from AArch32"),
        }
    }

    fn ldg(&mut self, ipa: u64) -> Result<Tag, GuestFault> {
        let tag = self.command(Command::Ldg, [ipa, 0, 0, 0])?;
        Ok(Tag::from_low_bits(tag as u8))
    }

    fn stg_each(&mut self, ipa: u64, stride: u64, count: u64, tag: Tag) -> Result<(), GuestFault> {
        let operands = [ipa, tag.insert_into(0), stride, count];
        self.command(Command::StgEach, operands).map(drop)
    }

    fn page_tags(&mut self, ipa: u64) -> Result<TagPage, GuestFault> {
        let mut packed = [0; 128];
        let (words, _) = packed.as_chunks_mut();
        for (block, word) in (0..).zip(words) {
            let tags = self.command(Command::Ldg16, [ipa + block * 256, 0, 0, 0])?;
            *word = tags.to_le_bytes();
        }
        Ok(TagPage::from_packed(packed))
    }

    fn set_page_tags(&mut self, ipa: u64, tags: &TagPage) -> Result<(), GuestFault> {
        let (words, _) = tags.as_packed().as_chunks();
        for (block, word) in (0..).zip(words) {
            let operands = [ipa + block * 256, u64::from_le_bytes(*word), 0, 0];
            self.command(Command::Stg16, operands)?;
        }
        Ok(())
    }

    fn mrs(&mut self, register: SystemRegister) -> Result<u64, GuestFault> {
        let (read, _) = commands_of(register);
        self.command(read, [0; 4])
    }

    fn msr(&mut self, register: SystemRegister, value: u64) -> Result<(), GuestFault> {
        let (_, write) = commands_of(register);
        let write = write.ok_or(GuestFault::Undefined)?;
        self.command(write, [0, value, 0, 0]).map(drop)
    }
}

/// How a register is read, and written if it can be.
fn commands_of(register: SystemRegister) -> (Command, Option<Command>) {
    match register {
        SystemRegister::ID_AA64PFR1_EL1 => (Command::ReadPfr1, None),
        SystemRegister::RGSR_EL1 => (Command::ReadRgsr, Some(Command::WriteRgsr)),
        SystemRegister::GCR_EL1 => (Command::ReadGcr, Some(Command::WriteGcr)),
        SystemRegister::TFSR_EL1 => (Command::ReadTfsr, Some(Command::WriteTfsr)),
        SystemRegister::TFSRE0_EL1 => (Command::ReadTfsre0, Some(Command::WriteTfsre0)),
        other => panic!("the agent cannot access {other:?}"),
    }
}
