//! `cargo xtask`: the lab, the demo, the tests and the benchmarks.

fn main() {}
