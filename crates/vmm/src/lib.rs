//! The machine: guest memory, boot, devices, vCPU threads and their life cycle.

pub mod memory;
pub mod virtio;
