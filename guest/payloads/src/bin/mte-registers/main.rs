//! The payload `mte-registers`: MTE as a guest's EL1 sees it.
//!
//! With `mte=on` in the command line: RAM has no tags at first and then those given to it, the four registers of MTE hold
//! what is written and do what they say, tag check faults do what SCTLR_EL1.TCF says, and each vCPU's registers are its
//! own through exits of every kind (`rounds=N` says how many). With `mte=off`: the ID register says that there is no MTE,
//! and the four registers are undefined.
#![cfg_attr(all(target_arch = "aarch64", panic = "abort"), no_std, no_main)]

#[cfg(all(target_arch = "aarch64", panic = "abort"))]
mod checks;

#[cfg(all(target_arch = "aarch64", panic = "abort"))]
payloads::payload!(checks::run);

#[cfg(not(all(target_arch = "aarch64", panic = "abort")))]
fn main() {}
