//! Tests that need KVM with MTE: `cargo xtask test` executes them in the lab's host.

#[cfg(target_arch = "aarch64")]
mod clones;
#[cfg(target_arch = "aarch64")]
mod lazy;
#[cfg(target_arch = "aarch64")]
mod life;
#[cfg(target_arch = "aarch64")]
mod tags;

#[cfg(target_arch = "aarch64")]
fn main() -> std::process::ExitCode {
    let arguments = libtest_mimic::Arguments::from_args();
    let tests = [tags::tests(), clones::tests(), life::tests(), lazy::tests()];
    let tests = tests.into_iter().flatten().collect();
    libtest_mimic::run(&arguments, tests).exit_code()
}

#[cfg(not(target_arch = "aarch64"))]
fn main() {}
