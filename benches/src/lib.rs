//! What the benchmarks' programs share.

pub mod scaling;
