//! `mte-checks`: whether MTE does in this guest what the architecture and Linux say.
//!
//! Each check prints a line, `ok NAME`, `skip NAME: why` or `FAIL NAME: why`. Beside the checks, two commands help others
//! to test: `poke-tag` changes a tag of another program's memory, `tag-fault` runs a program that has to die of a tag
//! check fault.

#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
mod checks;
#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
mod command;
#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
mod trace;

#[cfg(all(target_arch = "aarch64", target_os = "linux"))]
fn main() -> std::process::ExitCode {
    command::main()
}

#[cfg(not(all(target_arch = "aarch64", target_os = "linux")))]
fn main() -> std::process::ExitCode {
    eprintln!("mte-checks: this program is for aarch64 Linux");
    std::process::ExitCode::from(2)
}
