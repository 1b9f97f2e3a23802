//! What the bodies of requests and answers say, but for a machine's configuration: Cloud Hypervisor's names, and ours for
//! what it lacks.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use stream::Compression;

use super::body::{Body, Granted, Invalid, invalid};
use super::config::VmConfig;
use crate::control::{self, InspectRequest, RestoreRequest, SnapshotRequest, VmState, Work};

/// The file of a snapshot whose URL names a directory, as Cloud Hypervisor's URLs do.
const SNAPSHOT_FILE: &str = "tagvisor.snapshot";

/// The VMM, which answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingResponse {
    /// Program and version.
    pub build_version: String,
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// What it was built with.
    pub features: Vec<String>,
}

impl PingResponse {
    pub fn of_this_process() -> Self {
        let version = env!("CARGO_PKG_VERSION");
        Self {
            build_version: format!("tagvisor-{version}"),
            version: version.into(),
            pid: std::process::id(),
            features: vec!["kvm".into(), "mte".into()],
        }
    }
}

/// A machine as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its configuration.
    pub config: VmConfig,
    /// Where it is in its life.
    pub state: VmState,
    /// Bytes of RAM.
    pub memory_actual_size: u64,
    /// Why the VMM paused it, if nobody asked for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The MTE that the guest sees, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mte: Option<String>,
    /// What is done with it besides running it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<Work>,
}

impl From<control::VmInfo> for VmInfo {
    fn from(info: control::VmInfo) -> Self {
        Self {
            memory_actual_size: info.config.memory.0,
            config: VmConfig::from(&info.config),
            state: info.state,
            reason: info.reason,
            mte: info.mte,
            work: info.work,
        }
    }
}

/// What a snapshot is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotConfig {
    /// A file, or a directory that is there.
    pub destination_url: String,
    /// Ours: the snapshot on which this one is to be based.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Ours: `none`, `lz4`, `zstd` or `zstd:LEVEL`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<String>,
    /// Ours: answer with a report, where Cloud Hypervisor answers with nothing.
    #[serde(default)]
    pub report: bool,
}

impl Body for SnapshotConfig {
    const GRANTED: &'static [Granted] = &[];
}

impl SnapshotConfig {
    pub fn request(self) -> Result<SnapshotRequest, Invalid> {
        let compression = self
            .compression
            .as_deref()
            .map(parse_compression)
            .transpose();
        Ok(SnapshotRequest {
            file: snapshot_file("destination_url", &self.destination_url)?,
            base: self
                .base
                .map(|url| snapshot_file("base", &url))
                .transpose()?,
            compression: compression
                .map_err(|why| invalid("compression", why))?
                .unwrap_or_default(),
        })
    }
}

/// Reads `none`, `lz4`, `zstd` or `zstd:LEVEL`.
///
/// # Errors
/// It is none of them; what to write instead.
pub fn parse_compression(text: &str) -> Result<Compression, String> {
    match text.split_once(':').unwrap_or((text, "")) {
        ("none", "") => Ok(Compression::None),
        ("lz4", "") => Ok(Compression::Lz4),
        ("zstd", "") => Ok(Compression::ZSTD),
        ("zstd", level) => match level.parse() {
            Ok(level @ 1..=22) => Ok(Compression::Zstd(level)),
            _ => Err(format!("`{level}` is no level of zstd: they are 1 to 22")),
        },
        _ => Err("expected `none`, `lz4`, `zstd` or `zstd:LEVEL`".into()),
    }
}

/// How a machine is to be looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InspectConfig {
    /// Ours: the guest goes on meanwhile.
    #[serde(default)]
    pub live: bool,
    /// Ours: who looks, as `vm.info` is to say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reader: Option<String>,
}

impl Body for InspectConfig {
    const GRANTED: &'static [Granted] = &[];
}

impl InspectConfig {
    pub fn request(self) -> Result<InspectRequest, Invalid> {
        const MOST: usize = 100;
        if self
            .reader
            .as_ref()
            .is_some_and(|reader| reader.len() > MOST)
        {
            return Err(invalid("reader", "it has more than 100 bytes"));
        }
        Ok(InspectRequest {
            live: self.live,
            reader: self.reader,
        })
    }
}

/// From what a machine is to be restored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RestoreConfig {
    /// A file, or a directory with a snapshot in it.
    pub source_url: String,
    /// Cloud Hypervisor's word for `lazy`.
    #[serde(default)]
    memory_restore_mode: MemoryRestoreMode,
    /// Let the guest run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<bool>,
    /// Ours: bring each page when it is touched.
    #[serde(default)]
    pub lazy: bool,
    /// Ours: the opposite of `resume`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
    /// Ours: the snapshots that it is based on, where they are not where they were.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<String>,
}

/// When pages are brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum MemoryRestoreMode {
    #[default]
    Copy,
    OnDemand,
}

impl Body for RestoreConfig {
    const GRANTED: &'static [Granted] = &[];
}

impl RestoreConfig {
    pub fn request(self) -> Result<RestoreRequest, Invalid> {
        let paused = match (self.resume, self.paused) {
            (Some(resume), Some(paused)) if resume == paused => {
                return Err(invalid("paused", "`resume` says the opposite"));
            }
            (resume, paused) => paused.unwrap_or(!resume.unwrap_or(false)),
        };
        let bases = self.bases.iter().map(|url| snapshot_file("bases", url));
        Ok(RestoreRequest {
            file: snapshot_file("source_url", &self.source_url)?,
            bases: bases.collect::<Result<_, _>>()?,
            lazy: self.lazy || self.memory_restore_mode == MemoryRestoreMode::OnDemand,
            paused,
        })
    }
}

/// The file that a URL names. As in Cloud Hypervisor, what follows `file://` is a path as it stands.
fn snapshot_file(field: &str, url: &str) -> Result<PathBuf, Invalid> {
    let path = url.strip_prefix("file://").map(PathBuf::from);
    match path {
        Some(path) if url.contains('\0') || !path.is_absolute() => {
            Err(invalid(field, "expected an absolute path after `file://`"))
        }
        Some(path) if path.is_dir() => Ok(path.join(SNAPSHOT_FILE)),
        Some(path) => Ok(path),
        None => Err(invalid(
            field,
            "expected a URL such as `file:///path/to/file`",
        )),
    }
}
