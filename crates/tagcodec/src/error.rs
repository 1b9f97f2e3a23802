//! What can be wrong with coded tags.

use core::fmt;

/// Why tags could not be coded or decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The output has less room than the input may need. Nothing was written.
    NoRoom {
        /// Bytes that there must be.
        needed: usize,
        /// Bytes that there are.
        given: usize,
    },
    /// The bytes end before the tags do.
    Truncated,
    /// A first byte that no form has. A later version of the format may have given it a meaning.
    Reserved(u8),
    /// The description of a prefix code is not one of a complete code with codes of at most 10 bits, or symbols of byte spans do not
    /// have 14 meanings.
    Code,
    /// The kinds of a group's pages contradict each other: the first is said to be like the one
    /// before, a page behind the last has a kind, or a stream has more pages than it may.
    Kinds,
    /// A span goes beyond the pages of its stream.
    Overrun,
    /// The first stream of a group ends before the length that is given for it, or byte spans before the pages they are for.
    Length,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRoom { needed, given } => write!(
                f,
                "coded tags may take {needed} bytes, but there is room for {given}"
            ),
            Self::Truncated => f.write_str("coded tags are cut off"),
            Self::Reserved(byte) => write!(
                f,
                "coded tags begin with {byte:#04x}, which this version of the format does not know"
            ),
            Self::Code => {
                f.write_str("coded tags are damaged: the code of their spans is not complete")
            }
            Self::Kinds => f.write_str(
                "coded tags are damaged: the kinds of their pages contradict each other",
            ),
            Self::Overrun => f.write_str("coded tags are damaged: a span goes beyond its pages"),
            Self::Length => f.write_str("coded tags are damaged: spans end too early"),
        }
    }
}

impl core::error::Error for Error {}
