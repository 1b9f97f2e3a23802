//! What the conformance suite does not reach: real memory, guests' programs, the limits of the host.

use std::ptr::NonNull;

use super::*;
use crate::{
    Error, Exit, GicLayout, Interrupter, Memslot, PowerState, RegisterId, Spi, TagCopyError, Vcpu,
    VcpuFeatures, VcpuState, Vm, VmBuilder,
};
use mte::Tag;

const IPA: u64 = 0x8000_0000;
const PAGE: usize = PAGE_SIZE as usize;
const GCR_EL1: RegisterId = RegisterId::system(3, 0, 1, 0, 6);
const TAG: Tag = Tag::from_low_bits(7);

fn slot(host_address: NonNull<u8>, pages: usize) -> Memslot {
    Memslot {
        slot: 0,
        ipa: IPA,
        size: (pages * PAGE) as u64,
        host_address,
        log_dirty: false,
        read_only: false,
    }
}

fn vm_with_mte(hypervisor: &ModelHypervisor) -> ModelVm {
    let mut builder = hypervisor.new_vm(40).unwrap();
    builder.enable_mte().unwrap();
    builder.build().unwrap()
}

/// A page-aligned piece of this process's memory.
#[repr(C, align(4096))]
struct RealMemory([u8; 2 * PAGE]);

impl RealMemory {
    fn leak() -> NonNull<u8> {
        NonNull::from(Box::leak(Box::new(Self([0; 2 * PAGE])))).cast()
    }
}

#[test]
fn real_memory_is_accessed_in_place_and_has_tags() {
    let hypervisor = ModelHypervisor::new(HostRules::linux(6, 12));
    let vm = vm_with_mte(&hypervisor);
    let memory = RealMemory::leak();
    // SAFETY: the memory is never freed, and accessed by address alone.
    unsafe { vm.set_memslot(&slot(memory, 2)) }.unwrap();
    let vcpu = vm.create_vcpu(0, VcpuFeatures::default()).unwrap();

    vcpu.store(IPA + PAGE_SIZE - 2, b"real").unwrap();
    vcpu.stg(IPA + PAGE_SIZE, TAG).unwrap();

    // SAFETY: four bytes across the middle of the memory, which no one else accesses now.
    let bytes: [u8; 4] = unsafe { memory.add(PAGE - 2).cast().read() };
    assert_eq!(&bytes, b"real");
    assert_eq!(vcpu.ldg(IPA + PAGE_SIZE).unwrap(), TAG);
    assert_eq!(vcpu.ldg(IPA).unwrap(), Tag::ZERO);
}

#[test]
fn adopted_memory_keeps_its_tags_from_one_vm_to_the_next() {
    let hypervisor = ModelHypervisor::new(HostRules::linux(6, 12));
    let memory = RealMemory::leak();
    // SAFETY: the memory is never freed, and accessed by address alone.
    let adopted = unsafe { hypervisor.host().adopt(memory, 2) }.unwrap();
    let first = vm_with_mte(&hypervisor);
    // SAFETY: as above.
    unsafe { first.set_memslot(&slot(memory, 2)) }.unwrap();
    first.copy_tags_to_guest(IPA, &[7; 256]).unwrap();
    drop(first);

    let second = vm_with_mte(&hypervisor);
    // SAFETY: as above.
    unsafe { second.set_memslot(&slot(memory, 2)) }.unwrap();

    let vcpu = second.create_vcpu(0, VcpuFeatures::default()).unwrap();
    assert_eq!(vcpu.ldg(IPA).unwrap(), TAG);
    drop(adopted);
}

#[test]
fn memory_adopted_in_part_is_refused() {
    let hypervisor = ModelHypervisor::new(HostRules::linux(6, 12));
    let memory = RealMemory::leak();
    // SAFETY: the memory is never freed, and accessed by address alone.
    let _adopted = unsafe { hypervisor.host().adopt(memory, 1) }.unwrap();
    let vm = vm_with_mte(&hypervisor);

    // SAFETY: as above.
    let refused = unsafe { vm.set_memslot(&slot(memory, 2)) };

    assert!(matches!(refused, Err(Error::Memslot { .. })));
}

/// A program that asks a device for the address of its counter and counts there, with its tag.
struct Counter;

impl Guest for Counter {
    fn step(&self, vcpu: &mut ModelVcpu) -> Result<Step> {
        let counter = vcpu.register_u64(RegisterId::x(0))?;
        if counter == 0 {
            return Ok(Step::MmioRead {
                ipa: 0x1000,
                size: 8,
                into: RegisterId::x(0),
            });
        }
        let mut value = [0; 8];
        vcpu.load(counter, &mut value)?;
        let value = u64::from_le_bytes(value) + 1;
        vcpu.store(counter, &value.to_le_bytes())?;
        vcpu.stg(counter, TAG)?;
        Ok(match value {
            3 => Step::Wait,
            _ => Step::Continue,
        })
    }
}

#[test]
fn a_guests_program_runs_between_exits_and_stops_when_interrupted() {
    let hypervisor = ModelHypervisor::new(HostRules::linux(6, 12)).with_guest(Counter);
    let memory = hypervisor
        .host()
        .map(Backing::Anonymous, 2, Protection::Plain)
        .unwrap();
    let vm = vm_with_mte(&hypervisor);
    // SAFETY: the memory is the model's, which checks every access.
    unsafe { vm.set_memslot(&slot(memory, 2)) }.unwrap();
    let mut vcpu = vm.create_vcpu(0, VcpuFeatures::default()).unwrap();
    let interrupter = vcpu.interrupter();

    let Exit::MmioRead { ipa: 0x1000, data } = vcpu.run().unwrap() else {
        panic!("the program asks for its address")
    };
    data.copy_from_slice(&IPA.to_le_bytes());
    let waker = std::thread::spawn(move || interrupter.interrupt());
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    waker.join().unwrap();

    assert_eq!(vcpu.register_u64(RegisterId::x(0)).unwrap(), IPA);
}

#[test]
fn a_page_whose_tags_the_host_cannot_keep_is_not_swapped_out() {
    let rules = HostRules {
        swapped_tag_pages: 1,
        ..HostRules::linux(6, 12)
    };
    let hypervisor = ModelHypervisor::new(rules);
    let host = hypervisor.host();
    let memory = host.map(Backing::Anonymous, 2, Protection::Plain).unwrap();
    let second = memory.map_addr(|address| address.saturating_add(PAGE));
    let vm = vm_with_mte(&hypervisor);
    // SAFETY: the memory is the model's, which checks every access.
    unsafe { vm.set_memslot(&slot(memory, 2)) }.unwrap();
    let vcpu = vm.create_vcpu(0, VcpuFeatures::default()).unwrap();
    vcpu.stg(IPA, TAG).unwrap();
    vcpu.stg(IPA + PAGE_SIZE, TAG).unwrap();
    host.swap_out(memory).unwrap();

    let without_room = host.swap_out(second);
    let first_tag = vcpu.ldg(IPA).unwrap();
    let with_room = host.swap_out(second);

    assert_eq!(
        without_room.unwrap_err().kind(),
        std::io::ErrorKind::OutOfMemory
    );
    assert!(with_room.unwrap());
    assert_eq!(first_tag, TAG);
    assert_eq!(vcpu.ldg(IPA + PAGE_SIZE).unwrap(), TAG);
}

#[test]
fn a_host_without_memory_fails_the_guests_access_and_the_tag_copy() {
    let rules = HostRules {
        memory_pages: 1,
        ..HostRules::linux(6, 12)
    };
    let hypervisor = ModelHypervisor::new(rules);
    let memory = hypervisor
        .host()
        .map(Backing::Anonymous, 2, Protection::Plain)
        .unwrap();
    let vm = vm_with_mte(&hypervisor);
    // SAFETY: the memory is the model's, which checks every access.
    unsafe { vm.set_memslot(&slot(memory, 2)) }.unwrap();
    let vcpu = vm.create_vcpu(0, VcpuFeatures::default()).unwrap();
    vcpu.store(IPA, &[1]).unwrap();

    let access = vcpu.store(IPA + PAGE_SIZE, &[1]);
    let copy = vm.copy_tags_to_guest(IPA + PAGE_SIZE, &[1; 256]);

    assert!(matches!(
        access,
        Err(AccessError::Run(Error::GuestMemoryFault { index: 0, .. }))
    ));
    assert!(matches!(copy, Err(TagCopyError::NoMemory { .. })));
}

#[test]
fn unmapping_the_middle_leaves_both_ends() {
    let host = ModelHost::new(HostRules::linux(6, 12));
    let memory = host.map(Backing::Anonymous, 3, Protection::Tagged).unwrap();
    let page = |index: usize| memory.map_addr(|address| address.saturating_add(index * PAGE));
    host.stg(page(0), TAG).unwrap();
    host.stg(page(2), TAG).unwrap();

    host.unmap(page(1), 1).unwrap();

    assert_eq!(host.ldg(page(0)).unwrap(), TAG);
    assert!(host.ldg(page(1)).is_err());
    assert_eq!(host.ldg(page(2)).unwrap(), TAG);
}

#[test]
fn mappings_beyond_a_file_or_outside_of_the_models_addresses_are_refused() {
    let host = ModelHost::new(HostRules::linux(6, 12));
    let file = MemoryFile::new(FileKind::Memory, 2);

    let beyond = host.map(Backing::Shared(file, 1), 2, Protection::Plain);
    let outside = host.map_at(
        NonNull::dangling(),
        Backing::Anonymous,
        1,
        Protection::Plain,
    );

    assert!(beyond.is_err());
    assert!(outside.is_err());
}

#[test]
fn a_vcpu_goes_on_with_the_state_of_another() {
    let hypervisor = ModelHypervisor::new(HostRules::linux(6, 12));
    let (saved, taken) = (vm_with_mte(&hypervisor), vm_with_mte(&hypervisor));
    let off = VcpuFeatures {
        powered_off: true,
        ..VcpuFeatures::default()
    };
    let first = saved.create_vcpu(0, off).unwrap();
    let second = taken.create_vcpu(0, VcpuFeatures::default()).unwrap();
    first.set_register_u64(GCR_EL1, 0x1_fffe).unwrap();
    first.set_register_u64(RegisterId::PC, IPA).unwrap();

    let state = VcpuState::of(&first).unwrap();
    state.apply(&second).unwrap();

    assert_eq!(VcpuState::of(&second).unwrap(), state);
    assert_eq!(second.register_u64(GCR_EL1).unwrap(), 0x1_fffe);
    assert_eq!(second.power_state().unwrap(), PowerState::Off);
}

#[test]
fn a_vcpu_without_mte_does_not_take_the_state_of_one_with_it_nor_the_other_way_round() {
    let hypervisor = ModelHypervisor::new(HostRules::linux(6, 12));
    let with = vm_with_mte(&hypervisor);
    let without = hypervisor.new_vm(40).unwrap().build().unwrap();
    let with = with.create_vcpu(0, VcpuFeatures::default()).unwrap();
    let without = without.create_vcpu(0, VcpuFeatures::default()).unwrap();

    for (from, to) in [(&with, &without), (&without, &with)] {
        let error = VcpuState::of(from).unwrap().apply(to).unwrap_err();
        assert!(matches!(error, Error::ForeignRegister { .. }), "{error}");
    }
}

#[test]
fn a_value_of_another_length_than_its_register_is_refused() {
    let hypervisor = ModelHypervisor::new(HostRules::linux(6, 12));
    let vm = vm_with_mte(&hypervisor);
    let vcpu = vm.create_vcpu(0, VcpuFeatures::default()).unwrap();
    let mut state = VcpuState::of(&vcpu).unwrap();
    state.registers[0].value.push(0);

    let error = state.apply(&vcpu).unwrap_err();

    assert!(matches!(error, Error::ForeignRegister { .. }), "{error}");
}

#[test]
fn interrupt_lines_are_restored_and_those_of_another_machine_are_refused() {
    let hypervisor = ModelHypervisor::new(HostRules::linux(6, 12));
    let [saved, taken, smaller] = [64, 64, 32].map(|spis| {
        let vm = vm_with_mte(&hypervisor);
        let layout = GicLayout {
            distributor: 0,
            redistributors: 0x1_0000,
            vcpus: 1,
            spis,
        };
        vm.create_gic(&layout).unwrap();
        vm
    });
    saved.set_spi(Spi::new(40).unwrap(), true).unwrap();

    let state = saved.gic_state().unwrap();
    taken.restore_gic(&state).unwrap();

    assert_eq!(taken.gic_state().unwrap(), state);
    assert!(matches!(
        smaller.restore_gic(&state),
        Err(Error::ForeignGic)
    ));
}
