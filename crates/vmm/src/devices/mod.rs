//! Devices that are not virtio: the serial port and the real-time clock.

pub mod rtc;
pub mod serial;
