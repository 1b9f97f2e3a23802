//! The memory-tag packets of gdb's remote protocol: `qMemTags`, `QMemTags`, `qIsAddressTagged` (gdb's manual, "General Query
//! Packets"; the feature is called `memory-tagging` in `qSupported`).
//!
//! A packet's body is parsed in place ([`Packet::parse`]) and carried out on whatever implements [`MemoryTags`]
//! ([`Packet::answer`]), which gives the reply's body. Nothing is allocated, nothing is known of a transport, of a target or of an
//! architecture: types of tags are the numbers that the architecture gives them ([`aarch64`]). Clients send these packets only
//! to stubs that say `memory-tagging+` ([`FEATURE`]).
//!
//! ```
//! use inspect::gdb::memory_tags::{Errno, MemoryTags, Packet};
//!
//! /// Memory of which every granule has tag 5.
//! struct Fives;
//!
//! impl MemoryTags for Fives {
//!     fn is_address_tagged(&mut self, _: u64) -> Result<bool, Errno> {
//!         Ok(true)
//!     }
//!     fn read_tags(&mut self, _: u64, length: u64, _: u32, each: &mut dyn FnMut(u8)) -> Result<(), Errno> {
//!         (0..length.div_ceil(16)).for_each(|_| each(5));
//!         Ok(())
//!     }
//!     fn write_tags(&mut self, _: u64, _: u64, _: u32, _: &[u8]) -> Result<(), Errno> {
//!         Err(Errno::NOT_PERMITTED)
//!     }
//! }
//!
//! let mut body = *b"qMemTags:1000,20:1";
//! let mut reply = Vec::new();
//! let packet = Packet::parse(&mut body).unwrap().unwrap();
//! packet.answer(&mut Fives, &mut |bytes| reply.extend_from_slice(bytes));
//! assert_eq!(reply, b"m0505");
//! ```

/// What a stub that answers these packets adds to its answer to `qSupported`.
pub const FEATURE: &str = "memory-tagging+";

/// Types of tags of AArch64 (gdb's manual, "ARM Memory Tag Types").
pub mod aarch64 {
    /// The tag in a pointer.
    pub const LOGICAL: u32 = 0;
    /// The tag of a granule of memory.
    pub const ALLOCATION: u32 = 1;
}

/// What is told to the client of a failure: a number of the host's, which the protocol gives no meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u8);

impl Errno {
    /// `EPERM`.
    pub const NOT_PERMITTED: Self = Self(1);
    /// `E2BIG`.
    pub const TOO_MANY: Self = Self(7);
    /// `EFAULT`.
    pub const FAULT: Self = Self(14);
    /// `EINVAL`.
    pub const INVALID: Self = Self(22);
}

/// A target with tags.
pub trait MemoryTags {
    /// Whether what is at an address can have tags. The address may have a tag itself.
    ///
    /// # Errors
    /// What the client is to be told.
    fn is_address_tagged(&mut self, address: u64) -> Result<bool, Errno>;

    /// Gives the tags of type `kind` of all granules that `length` bytes from `start` on touch to `each`, one a byte.
    ///
    /// # Errors
    /// What the client is to be told; then `each` has been given none.
    fn read_tags(
        &mut self,
        start: u64,
        length: u64,
        kind: u32,
        each: &mut dyn FnMut(u8),
    ) -> Result<(), Errno>;

    /// Sets the tags of type `kind` of all granules that `length` bytes from `start` on touch: to `tags`, which are at least
    /// one, over and over again. Those that are too many are for nothing.
    ///
    /// # Errors
    /// What the client is to be told; then no tag has been set.
    fn write_tags(&mut self, start: u64, length: u64, kind: u32, tags: &[u8]) -> Result<(), Errno>;
}

/// A packet of this kind that says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// One of the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    /// `qIsAddressTagged:ADDRESS`.
    IsAddressTagged {
        /// Which.
        address: u64,
    },
    /// `qMemTags:START,LENGTH:TYPE`.
    Read {
        /// First address.
        start: u64,
        /// Bytes.
        length: u64,
        /// The type of tags.
        kind: u32,
    },
    /// `QMemTags:START,LENGTH:TYPE:TAGS`.
    Write {
        /// First address.
        start: u64,
        /// Bytes.
        length: u64,
        /// The type of tags.
        kind: u32,
        /// The tags, one a byte, at least one.
        tags: &'a [u8],
    },
}

impl<'a> Packet<'a> {
    /// The packet whose body, between `$` and `#`, this is; none if it is another kind's.
    pub fn parse(body: &'a mut [u8]) -> Option<Result<Self, Malformed>> {
        let (name, arguments) = split_at(body, b':')?;
        let parsed = match &*name {
            b"qIsAddressTagged" => {
                number(arguments).map(|address| Self::IsAddressTagged { address })
            }
            b"qMemTags" => Self::read(arguments),
            b"QMemTags" => Self::write(arguments),
            _ => return None,
        };
        Some(parsed.ok_or(Malformed))
    }

    fn read(arguments: &mut [u8]) -> Option<Self> {
        let (range, kind) = split_at(arguments, b':')?;
        let (start, length) = self::range(range)?;
        let kind = self::kind(kind)?;
        Some(Self::Read {
            start,
            length,
            kind,
        })
    }

    fn write(arguments: &'a mut [u8]) -> Option<Self> {
        let (range, rest) = split_at(arguments, b':')?;
        let (start, length) = self::range(range)?;
        let (kind, tags) = split_at(rest, b':')?;
        let kind = self::kind(kind)?;
        let tags = decode(tags)?;
        Some(Self::Write {
            start,
            length,
            kind,
            tags,
        })
    }

    /// Does what the packet asks for, and gives the reply's body to `reply` in pieces, one after the other.
    pub fn answer(self, target: &mut impl MemoryTags, reply: &mut dyn FnMut(&[u8])) {
        let done = match self {
            Self::IsAddressTagged { address } => target
                .is_address_tagged(address)
                .map(|is| reply(if is { b"01" } else { b"00" })),
            Self::Read {
                start,
                length,
                kind,
            } => read(target, start, length, kind, reply),
            Self::Write {
                start,
                length,
                kind,
                tags,
            } => target
                .write_tags(start, length, kind, tags)
                .map(|()| reply(b"OK")),
        };
        if let Err(errno) = done {
            refuse(errno, reply);
        }
    }
}

/// The reply to a packet that is not carried out.
pub fn refuse(errno: Errno, reply: &mut dyn FnMut(&[u8])) {
    reply(b"E");
    reply(&hex(errno.0));
}

fn read(
    target: &mut impl MemoryTags,
    start: u64,
    length: u64,
    kind: u32,
    reply: &mut dyn FnMut(&[u8]),
) -> Result<(), Errno> {
    let mut begun = false;
    target.read_tags(start, length, kind, &mut |tag| {
        if !begun {
            reply(b"m");
            begun = true;
        }
        reply(&hex(tag));
    })?;
    if !begun {
        reply(b"m");
    }
    Ok(())
}

fn hex(byte: u8) -> [u8; 2] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    [
        DIGITS[usize::from(byte >> 4)],
        DIGITS[usize::from(byte & 0xf)],
    ]
}

/// What is before and behind the first `separator`.
fn split_at(text: &mut [u8], separator: u8) -> Option<(&mut [u8], &mut [u8])> {
    let at = text.iter().position(|byte| *byte == separator)?;
    let (before, rest) = text.split_at_mut(at);
    Some((before, &mut rest[1..]))
}

fn range(text: &mut [u8]) -> Option<(u64, u64)> {
    let (start, length) = split_at(text, b',')?;
    Some((number(start)?, number(length)?))
}

/// Up to 16 hexadecimal digits.
fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 16 {
        return None;
    }
    text.iter().try_fold(0, |number, digit| {
        Some(number << 4 | u64::from(value(*digit)?))
    })
}

fn kind(text: &[u8]) -> Option<u32> {
    number(text)?.try_into().ok()
}

fn value(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

/// The bytes that the text's digits say, two each, in the place of the text. At least one.
fn decode(text: &mut [u8]) -> Option<&[u8]> {
    if text.is_empty() || !text.len().is_multiple_of(2) {
        return None;
    }
    for at in 0..text.len() / 2 {
        text[at] = value(text[at * 2])? << 4 | value(text[at * 2 + 1])?;
    }
    Some(&text[..text.len() / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hundred granules from address 0 on.
    struct Memory([u8; 100]);

    impl Memory {
        fn granules(&self, start: u64, length: u64) -> Result<std::ops::Range<usize>, Errno> {
            let end = start.checked_add(length).ok_or(Errno::FAULT)?;
            if end > 1600 {
                return Err(Errno::FAULT);
            }
            Ok(start as usize / 16..end.div_ceil(16) as usize)
        }
    }

    impl MemoryTags for Memory {
        fn is_address_tagged(&mut self, address: u64) -> Result<bool, Errno> {
            Ok(address < 1600)
        }

        fn read_tags(
            &mut self,
            start: u64,
            length: u64,
            _: u32,
            each: &mut dyn FnMut(u8),
        ) -> Result<(), Errno> {
            let granules = self.granules(start, length)?;
            self.0[granules].iter().copied().for_each(each);
            Ok(())
        }

        fn write_tags(
            &mut self,
            start: u64,
            length: u64,
            kind: u32,
            tags: &[u8],
        ) -> Result<(), Errno> {
            if kind != aarch64::ALLOCATION {
                return Err(Errno::INVALID);
            }
            let granules = self.granules(start, length)?;
            for (granule, tag) in self.0[granules].iter_mut().zip(tags.iter().cycle()) {
                *granule = *tag;
            }
            Ok(())
        }
    }

    fn ask(memory: &mut Memory, body: &str) -> String {
        let mut body = body.as_bytes().to_vec();
        let mut reply = Vec::new();
        let packet = Packet::parse(&mut body).unwrap().unwrap();
        packet.answer(memory, &mut |bytes| reply.extend_from_slice(bytes));
        String::from_utf8(reply).unwrap()
    }

    fn is_malformed(body: &str) -> bool {
        let mut body = body.as_bytes().to_vec();
        matches!(Packet::parse(&mut body), Some(Err(Malformed)))
    }

    #[test]
    fn a_packet_of_another_kind_is_none() {
        assert_eq!(Packet::parse(&mut b"qSupported:x".to_vec()), None);
        assert_eq!(Packet::parse(&mut b"qMemTags".to_vec()), None);
        assert_eq!(Packet::parse(&mut b"".to_vec()), None);
    }

    #[test]
    fn tags_that_were_set_are_read_back() {
        let mut memory = Memory([0; 100]);

        assert_eq!(ask(&mut memory, "QMemTags:20,30:1:0a0b0c"), "OK");

        assert_eq!(ask(&mut memory, "qMemTags:10,50:1"), "m000a0b0c00");
    }

    #[test]
    fn a_pattern_that_is_too_short_repeats() {
        let mut memory = Memory([0; 100]);

        ask(&mut memory, "QMemTags:0,50:1:0102");

        assert_eq!(ask(&mut memory, "qMemTags:0,60:1"), "m010201020100");
    }

    #[test]
    fn a_pattern_that_is_too_long_ends_with_the_range() {
        let mut memory = Memory([0; 100]);

        ask(&mut memory, "QMemTags:0,10:1:0102");

        assert_eq!(ask(&mut memory, "qMemTags:0,20:1"), "m0100");
    }

    #[test]
    fn an_empty_range_has_no_tags() {
        assert_eq!(ask(&mut Memory([1; 100]), "qMemTags:10,0:1"), "m");
    }

    #[test]
    fn a_failure_is_told_by_its_number() {
        let mut memory = Memory([0; 100]);

        assert_eq!(ask(&mut memory, "qMemTags:fffffffffffffff0,20:1"), "E0e");
        assert_eq!(ask(&mut memory, "QMemTags:0,10:0:01"), "E16");
    }

    #[test]
    fn whether_an_address_is_tagged_is_told() {
        let mut memory = Memory([0; 100]);

        assert_eq!(ask(&mut memory, "qIsAddressTagged:63f"), "01");
        assert_eq!(ask(&mut memory, "qIsAddressTagged:0a00000000000640"), "00");
    }

    #[test]
    fn packets_that_say_nothing_are_malformed() {
        assert!(is_malformed("qIsAddressTagged:"));
        assert!(is_malformed("qIsAddressTagged:+1"));
        assert!(is_malformed("qIsAddressTagged:11112222333344445"));
        assert!(is_malformed("qMemTags:1,2"));
        assert!(is_malformed("qMemTags:1:2"));
        assert!(is_malformed("qMemTags:1,2:100000000"));
        assert!(is_malformed("QMemTags:1,2:1"));
        assert!(is_malformed("QMemTags:1,2:1:"));
        assert!(is_malformed("QMemTags:1,2:1:5"));
        assert!(is_malformed("QMemTags:1,2:1:0g"));
    }
}
