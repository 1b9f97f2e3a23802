#![doc = include_str!("../README.md")]
#![no_std]
#![deny(unsafe_code)]

mod batch;
mod bits;
mod byte_spans;
mod code;
mod error;
mod look;
mod page;
mod span;
mod unpacked;

pub use batch::{Decoder, Effort, Encoder, decode_batch, encode_batch, max_batch_len};
pub use error::Error;
pub use page::{MAX_PAGE_LEN, decode_page, encode_page};
