//! What the bodies of requests about migrations say: Cloud Hypervisor's names, and ours for what it lacks.

use std::num::{NonZeroU8, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use migration::{MAX_LINKS, PostCopy};
use serde::{Deserialize, Serialize};
use transport::Address;

use super::body::{Body, Granted, Invalid, invalid};
use super::config::ConsoleConfig;
use super::model::parse_compression;
use crate::control::{Changes, Decision, MigrationRequest, ReceptionRequest, TlsRequest};

/// Milliseconds for which a guest may stand still, if nobody says otherwise: as long as with Cloud Hypervisor.
pub const DOWNTIME_MS: NonZeroU64 = NonZeroU64::new(300).unwrap();

/// When a guest goes on before all its pages are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PostCopyMode {
    /// Never
    Never,
    /// If it changes pages faster than they can be sent
    Auto,
    /// At once; no pages are sent before
    Now,
}

impl From<PostCopyMode> for PostCopy {
    fn from(mode: PostCopyMode) -> Self {
        match mode {
            PostCopyMode::Never => Self::Never,
            PostCopyMode::Auto => Self::Auto,
            PostCopyMode::Now => Self::Now,
        }
    }
}

/// Cloud Hypervisor's word for the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum MemoryMode {
    Precopy,
    Postcopy,
}

/// Where a guest is to go, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendMigrationConfig {
    /// `tcp:HOST:PORT`, `tcp://HOST:PORT` or `unix:PATH`.
    pub destination_url: String,
    /// For how long it may stand still.
    #[serde(default = "default_downtime")]
    pub downtime_ms: NonZeroU64,
    /// After how long it is given up; never, if it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<NonZeroU64>,
    /// Connections for pages.
    #[serde(default = "one")]
    pub connections: NonZeroU8,
    /// The directory of TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// `Postcopy` is what `postcopy: now` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory_mode: Option<MemoryMode>,
    /// Ours: when it goes on before all its pages are there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<PostCopyMode>,
    /// Ours: whether it may be slowed down.
    #[serde(default = "yes")]
    pub may_slow: bool,
    /// Ours: how much may be sent in a second, such as `100M` or `800Mbit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<String>,
    /// Ours: `none`, `lz4`, `zstd` or `zstd:LEVEL`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<String>,
    /// Ours: the name that the destination's certificate must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_peer_name: Option<String>,
    /// Ours: mend the link of a migration that was broken off.
    #[serde(default)]
    pub recover: bool,
    /// Ours: answer with a report.
    #[serde(default)]
    pub report: bool,
}

const fn default_downtime() -> NonZeroU64 {
    DOWNTIME_MS
}

const fn one() -> NonZeroU8 {
    NonZeroU8::MIN
}

const fn yes() -> bool {
    true
}

impl SendMigrationConfig {
    /// To `destination_url`, with all else as it is unless it is said.
    pub fn to(destination_url: impl Into<String>) -> Self {
        Self {
            destination_url: destination_url.into(),
            downtime_ms: DOWNTIME_MS,
            timeout_s: None,
            connections: one(),
            tls_dir: None,
            memory_mode: None,
            postcopy: None,
            may_slow: true,
            bandwidth: None,
            compression: None,
            tls_peer_name: None,
            recover: false,
            report: false,
        }
    }

    pub fn request(self) -> Result<MigrationRequest, Invalid> {
        if self.connections.get() > MAX_LINKS {
            return Err(invalid(
                "connections",
                format!("there can be 1 to {MAX_LINKS}"),
            ));
        }
        let compression = self.compression.as_deref().unwrap_or("none");
        let bandwidth = self.bandwidth.as_deref().map(str::parse).transpose();
        Ok(MigrationRequest {
            destination: address("destination_url", &self.destination_url)?,
            tls: tls(self.tls_dir, self.tls_peer_name)?,
            connections: self.connections,
            post_copy: post_copy(self.memory_mode, self.postcopy)?,
            may_slow: self.may_slow,
            max_downtime: Duration::from_millis(self.downtime_ms.get()),
            bandwidth: bandwidth
                .map_err(|e: transport::Error| invalid("bandwidth", e.to_string()))?,
            compression: parse_compression(compression)
                .map_err(|why| invalid("compression", why))?,
            timeout: self
                .timeout_s
                .map(|seconds| Duration::from_secs(seconds.get())),
            recover: self.recover,
        })
    }
}

impl Body for SendMigrationConfig {
    const GRANTED: &'static [Granted] = &[("timeout_strategy", &[r#""Cancel""#])];
}

fn post_copy(mode: Option<MemoryMode>, ours: Option<PostCopyMode>) -> Result<PostCopy, Invalid> {
    match (mode, ours) {
        (Some(MemoryMode::Postcopy), Some(PostCopyMode::Never | PostCopyMode::Auto)) => {
            Err(invalid("postcopy", "`memory_mode` says `Postcopy`"))
        }
        (Some(MemoryMode::Postcopy), _) => Ok(PostCopy::Now),
        (_, ours) => Ok(ours.map_or(PostCopy::Never, PostCopy::from)),
    }
}

/// From where a guest is to come, and what is different here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReceiveMigrationConfig {
    /// `tcp:HOST:PORT`, `tcp://HOST:PORT` or `unix:PATH`.
    pub receiver_url: String,
    /// The directory of TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// Ours: the name that the source's certificate must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_peer_name: Option<String>,
    /// Ours: let other hosts come without TLS.
    #[serde(default)]
    pub unprotected: bool,
    /// Ours: the machine's name here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Ours: the tap of each network interface here, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taps: Vec<String>,
    /// Ours: the image of each disk here, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<PathBuf>,
    /// Ours: the socket of each port here, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PathBuf>,
    /// Ours: the machine's console here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    serial: Option<ConsoleConfig>,
}

impl Body for ReceiveMigrationConfig {
    const GRANTED: &'static [Granted] = &[];
}

impl ReceiveMigrationConfig {
    pub fn request(self) -> Result<ReceptionRequest, Invalid> {
        if self.unprotected && self.tls_dir.is_some() {
            return Err(invalid("unprotected", "`tls_dir` says the opposite"));
        }
        let console = self.serial.as_ref().map(ConsoleConfig::console);
        Ok(ReceptionRequest {
            listen: address("receiver_url", &self.receiver_url)?,
            tls: tls(self.tls_dir, self.tls_peer_name)?,
            unprotected: self.unprotected,
            changes: Changes {
                name: self.name,
                console: console.transpose()?,
                taps: self.taps,
                disks: self.disks,
                ports: self.ports,
            },
        })
    }
}

/// Where a guest is to run of which it is not known where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecideMigrationConfig {
    /// Where.
    pub run: Decision,
}

impl Body for DecideMigrationConfig {
    const GRANTED: &'static [Granted] = &[];
}

pub(super) fn address(field: &str, url: &str) -> Result<Address, Invalid> {
    match parse_address(url).map_err(|why| invalid(field, why))? {
        Address::Unix(path) if !path.is_absolute() => {
            Err(invalid(field, "expected an absolute path after `unix:`"))
        }
        address => Ok(address),
    }
}

/// Reads `tcp://HOST:PORT`, `unix:PATH`, or `tcp:HOST:PORT`, as Cloud Hypervisor has it.
///
/// # Errors
/// It is none of them; what is wrong with it.
pub fn parse_address(text: &str) -> Result<Address, String> {
    let parsed = match text.strip_prefix("tcp:") {
        Some(rest) if !rest.starts_with("//") => format!("tcp://{rest}").parse(),
        _ => text.parse(),
    };
    parsed.map_err(|e: transport::Error| e.to_string())
}

fn tls(
    directory: Option<PathBuf>,
    peer_name: Option<String>,
) -> Result<Option<TlsRequest>, Invalid> {
    match (directory, peer_name) {
        (Some(directory), _) if !directory.is_absolute() => {
            Err(invalid("tls_dir", "expected an absolute path"))
        }
        (Some(directory), peer_name) => Ok(Some(TlsRequest {
            directory,
            peer_name,
        })),
        (None, Some(_)) => Err(invalid(
            "tls_peer_name",
            "there are no certificates without TLS: give `tls_dir`",
        )),
        (None, None) => Ok(None),
    }
}
