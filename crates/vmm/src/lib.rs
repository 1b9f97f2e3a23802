//! The machine: guest memory, boot, devices, vCPU threads and their life cycle.
//!
//! A [`config::MachineConfig`] says what a machine is made of; [`machine::Machine`] builds it on
//! any [`engine::Hypervisor`] and runs it. Underneath: [`memory`] is the guest's RAM and its tags,
//! [`boot`] and [`fdt`] fill it, [`bus`] finds the device behind an exit, [`devices`] and
//! [`virtio`] are the devices, [`vcpu`] the threads that run the guest.

pub mod boot;
pub mod bus;
pub mod config;
pub mod console;
pub mod devices;
pub mod fdt;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod terminal;
pub mod vcpu;
pub mod virtio;
