//! `cargo xtask`: the lab, the demo, the tests, the benchmarks and the fuzz targets.
//!
//! The lab is an emulated Arm machine with MTE that boots Debian as a KVM host, on any x86-64 or
//! arm64 Linux machine; `docs/lab.md` tells how it works. [`lab`] puts it together from the
//! [`cache`]: [`debian`] trees of [`tools`] and of the host, [`kernel`]s with their [`modules`],
//! and the programs that [`compile`] builds with a [`toolchain`]. [`machine`] runs QEMU.

mod bench;
mod cache;
mod command;
mod compile;
mod cpio;
mod debian;
mod demo;
mod flat;
mod folder;
mod fuzz;
mod host;
mod interrupt;
mod kernel;
mod lab;
mod machine;
mod modules;
mod ports;
mod progress;
mod script;
mod terminal;
mod test;
mod toolchain;
mod tools;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The lab, the demo, the tests, the benchmarks and the fuzz targets of Tagvisor
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Boot the lab's host and run COMMAND there, or a shell without one
    Host(host::Arguments),
    /// Run the demo: a Linux guest with MTE under Tagvisor
    Demo,
    /// Run all tests: native ones, those of aarch64 programs, those in the lab's host
    Test(test::Arguments),
    /// Run the benchmarks
    Bench(bench::Arguments),
    /// Fuzz a parser: a target of a crate's `fuzz` folder
    Fuzz(fuzz::Arguments),
    /// Build the programs that run in the lab and set up what is missing, without booting
    Build,
    /// Remove all that the lab has downloaded
    Clean,
}

/// The exit status of a lab that failed, as against a command that did.
const LAB_FAILED: u8 = 125;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match interrupt::listen().and_then(|()| run(&arguments)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("lab: error: {error:#}");
            // As shells say it: 128 and the signal's number.
            ExitCode::from(interrupt::signal().map_or(LAB_FAILED, |signal| 128 | signal))
        }
    }
}

fn run(arguments: &Arguments) -> Result<u8> {
    match &arguments.action {
        Action::Host(arguments) => host::run(arguments),
        Action::Demo => demo::run(),
        Action::Test(arguments) => test::run(arguments),
        Action::Bench(arguments) => bench::run(arguments),
        Action::Fuzz(arguments) => fuzz::run(arguments),
        Action::Clean => {
            let cache = cache::Cache::open()?;
            cache.clear()?;
            progress::say(&format!("{} is empty", cache.folder().display()));
            Ok(0)
        }
        Action::Build => lab::Lab::open(compile::Profile::Lab, true).map(|_| 0),
    }
}
