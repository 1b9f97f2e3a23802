//! Tests that need KVM with MTE and no guest that runs: `cargo xtask test` executes them in the lab's host.

#[cfg(target_arch = "aarch64")]
mod tags;

#[cfg(target_arch = "aarch64")]
fn main() -> std::process::ExitCode {
    let arguments = libtest_mimic::Arguments::from_args();
    libtest_mimic::run(&arguments, tags::tests()).exit_code()
}

#[cfg(not(target_arch = "aarch64"))]
fn main() {}
