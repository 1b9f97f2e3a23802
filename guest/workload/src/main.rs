//! `tag-workload`: memory with tags, always changing, always checked.
//!
//! The program maps memory with `PROT_MTE` and divides its pages among threads. A thread gives its pages tags (by IRG,
//! STG, ST2G, STZG) and data, knows what it wrote ([`ledger`]), and pass after pass finds everything as it left it, by LDG
//! and by loads that the hardware checks, before it rewrites some of it ([`worker`]). Some pages have zero data and tags,
//! some data and tags that are zero, some are never touched and must still be so at the end. Between passes each thread
//! sees that IRG keeps to the tags that it included and that a mismatching access faults; one more thread sees that
//! asynchronous faults arrive ([`asynchronous`]); and all see that no clock goes back ([`clock`]).
//!
//! So whoever stops the guest, copies it, moves it and lets it go on has to bring every tag, every byte, every vCPU's
//! registers and the time, or the program says which one is wrong and exits with 1.
//!
//! What is known of a page ([`page`], [`ledger`]) and how passes go ([`worker`]) know the memory by a trait ([`memory`]),
//! which is tagged memory on aarch64 ([`hardware`]) and a pretended one in tests.

#![cfg_attr(
    not(all(target_arch = "aarch64", target_os = "linux")),
    allow(dead_code, reason = "only tests run it")
)]

mod arguments;
#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
mod asynchronous;
mod clock;
mod difference;
#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
mod hardware;
mod ledger;
mod memory;
mod page;
mod progress;
#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
mod run;
mod worker;

#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
fn main() -> std::process::ExitCode {
    run::main()
}

#[cfg(not(all(target_arch = "aarch64", target_os = "linux")))]
fn main() -> std::process::ExitCode {
    eprintln!("tag-workload: this program is for aarch64 Linux");
    std::process::ExitCode::from(2)
}
