//! Ethernet addresses of guests.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::NetError;

/// The unicast Ethernet address of a guest's interface.
///
/// In text and in serialised form it is six pairs of hexadecimal digits with colons between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// The address with these bytes, in the order of the wire.
    ///
    /// # Errors
    /// [`NetError::Mac`] for a group address and for zero, which no interface can have.
    pub fn new(bytes: [u8; 6]) -> Result<Self, NetError> {
        let refuse = |why| {
            Err(NetError::Mac {
                text: MacAddr(bytes).to_string(),
                why,
            })
        };
        if bytes[0] & 1 != 0 {
            refuse("it is a group address (the lowest bit of its first byte is set)")
        } else if bytes == [0; 6] {
            refuse("it is zero")
        } else {
            Ok(MacAddr(bytes))
        }
    }

    /// A random, locally administered address.
    pub fn random() -> Self {
        // The standard library seeds each hasher from the system's randomness: enough for an
        // address that must differ from others and keeps no secret.
        let [a, b, c, d, e, f, ..] = RandomState::new().build_hasher().finish().to_ne_bytes();
        MacAddr([a & 0xfc | 0x02, b, c, d, e, f])
    }

    /// Its bytes, in the order of the wire.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        let parsed: Option<Vec<u8>> = text.split(':').map(parse_pair).collect();
        let bytes = parsed.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
        let bytes = bytes.ok_or_else(|| NetError::Mac {
            text: text.to_owned(),
            why: "it is not six pairs of hexadecimal digits with colons between them",
        })?;
        MacAddr::new(bytes)
    }
}

fn parse_pair(pair: &str) -> Option<u8> {
    let is_pair = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_pair.then(|| u8::from_str_radix(pair, 16).ok())?
}

impl TryFrom<String> for MacAddr {
    type Error = NetError;

    fn try_from(text: String) -> Result<Self, NetError> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}
