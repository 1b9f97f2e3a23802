#![doc = include_str!("../README.md")]
#![no_std]
#![deny(unsafe_code)]

mod arithmetic;
mod check;
mod control;
mod granule;
mod level;
mod page;
mod random;
mod register;
mod tag;

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
#[allow(
    unsafe_code,
    reason = "the instructions act on memory behind the compiler's back"
)]
pub mod aarch64;

pub use arithmetic::{GranuleOffset, TagOffset, address_difference, insert_into_mask};
pub use check::{
    Access, AccessKind, CheckContext, ExceptionLevel, FaultEffect, Mismatch, TagCheck, Tagging,
    Unchecked,
};
pub use control::{
    HcrEl2, MAIR_NORMAL_TAGGED, PSTATE_TCO, SctlrEl1, TagCheckFaultMode, TagCheckFaultSyndrome,
    TcrEl1, VaRange,
};
pub use granule::{GRANULE_SIZE, PageSize, granules};
pub use level::{MteDifference, MteFeatures, MteLevel};
pub use page::TagPage;
pub use random::{TagGenerator, choose_non_excluded};
pub use register::{GcrEl1, GmidEl1, RgsrEl1, SWITCHED_REGISTERS, SystemRegister, Tfsr};
pub use tag::{Tag, TagSet};
