//! What a hypervisor owes a guest with MTE and its VMM, as tests that run against every engine.
//!
//! [`checks()`] has one check for each thing that the seeds demand of the hypervisor, ordered by the
//! rows of «The seeds, point by point». They speak to the traits of `engine` and to a [`Testbed`],
//! which has what those lack: host memory of all kinds, and vCPUs that do as they are told.
//! [`model`] is the testbed of the reference model and runs anywhere (`cargo test`); `kvm` is that
//! of a real kernel, whose guests run a small agent. The program `conformance` runs all of them on
//! one engine and prints a line for each; `docs/hypervisors.md` says what came out.

mod checks;
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
pub mod kvm;
pub mod model;
mod suite;
mod testbed;

pub use suite::{Check, Row, Stop, Verdict, checks, require};
pub use testbed::{Backing, GRANULES, GuestCpu, GuestFault, Mapping, PAGE, Testbed, VcpuOf, VmOf};
