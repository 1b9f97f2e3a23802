//! Devices that are not virtio: the serial port, the real-time clock, the generation ID.

pub mod generation;
pub mod rtc;
pub mod serial;
