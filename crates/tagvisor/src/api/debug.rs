//! What the bodies of requests about debuggers say. All of it is ours.

use serde::{Deserialize, Serialize};
use transport::Address;

use super::body::{Body, Granted, Invalid};
use super::migration::address;
use crate::control::DebugRequest;

/// Where debuggers can come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GdbConfig {
    /// `tcp://HOST:PORT` or `unix:PATH`; none to let nobody come any more.
    pub listen: Option<String>,
    /// Whether it may be where other hosts can come.
    #[serde(default)]
    pub unprotected: bool,
}

impl Body for GdbConfig {
    const GRANTED: &'static [Granted] = &[];
}

impl GdbConfig {
    pub fn request(self) -> Result<DebugRequest, Invalid> {
        let listen = self.listen.map(|url| address("listen", &url));
        Ok(DebugRequest {
            listen: listen.transpose()?,
            unprotected: self.unprotected,
        })
    }
}

/// Where debuggers can come, with the port that was chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GdbReport {
    /// `tcp://HOST:PORT` or `unix:PATH`; none if they cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
}

impl From<Option<Address>> for GdbReport {
    fn from(address: Option<Address>) -> Self {
        Self {
            listen: address.map(|address| address.to_string()),
        }
    }
}
