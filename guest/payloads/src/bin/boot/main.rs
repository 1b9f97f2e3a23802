//! The payload `boot`: says what the machine looks like from inside, and ends.
//!
//! `end=off` (the default) turns the machine off, `end=reset` restarts it, `end=wait` waits to be stopped from outside.
#![cfg_attr(all(target_arch = "aarch64", panic = "abort"), no_std, no_main)]

#[cfg(all(target_arch = "aarch64", panic = "abort"))]
mod machine_seen;

#[cfg(all(target_arch = "aarch64", panic = "abort"))]
payloads::payload!(machine_seen::run);

#[cfg(not(all(target_arch = "aarch64", panic = "abort")))]
fn main() {}
