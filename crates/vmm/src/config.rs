//! What a machine is made of, as a user writes it: on the command line, or in a TOML or JSON file
//! with the same names.
//!
//! A disk, a network interface or a port is one string in both. Its parts are separated by commas,
//! so that a file may also have a table of them: `{ path = "a,b.img", readonly = true }`. A table is
//! also how they are written back.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use mte::MteLevel;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::console::ConsoleConfig;
use crate::memory::TagAccess;
use crate::virtio::net::MacAddr;

/// A machine's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct MachineConfig {
    /// The machine's name; unique among those that run.
    pub name: Option<String>,
    /// An arm64 Linux kernel: `Image`, plain or compressed.
    pub kernel: Option<PathBuf>,
    /// The initial RAM file system for the kernel.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// A bare-metal payload, instead of a kernel.
    pub flat: Option<PathBuf>,
    /// How many vCPUs.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: MemorySize,
    /// Back RAM with huge pages of 2 MiB.
    pub huge_pages: bool,
    /// The memory tagging that the guest gets.
    pub mte: MteConfig,
    /// How tags are reached from outside of the guest.
    pub tag_access: TagAccess,
    /// Where the console is.
    pub console: ConsoleConfig,
    /// Disks, in order: the first is the guest's `vda`.
    pub disk: Vec<DiskConfig>,
    /// Network interfaces, in order.
    pub net: Vec<NetConfig>,
    /// Ports for talk between host and guest.
    pub port: Vec<PortConfig>,
    /// End, instead of starting over, when the guest resets the machine.
    pub no_reboot: bool,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            name: None,
            kernel: None,
            initrd: None,
            cmdline: String::new(),
            flat: None,
            cpus: 1,
            memory: MemorySize(512 << 20),
            huge_pages: false,
            mte: MteConfig::On,
            tag_access: TagAccess::Auto,
            console: ConsoleConfig::Stdio,
            disk: Vec::new(),
            net: Vec::new(),
            port: Vec::new(),
            no_reboot: false,
        }
    }
}

impl MachineConfig {
    /// The same machine, wherever this program stands: with absolute paths.
    ///
    /// # Errors
    /// The working directory is not known.
    pub fn with_absolute_paths(mut self) -> io::Result<Self> {
        let console = match &mut self.console {
            ConsoleConfig::File(path) => Some(path),
            ConsoleConfig::Stdio | ConsoleConfig::Off => None,
        };
        let files = [&mut self.kernel, &mut self.initrd, &mut self.flat];
        let disks = self.disk.iter_mut().flat_map(|disk| {
            let overlay = match &mut disk.overlay {
                Some(OverlayConfig::File(path)) => Some(path),
                Some(OverlayConfig::Temporary) | None => None,
            };
            [&mut disk.path].into_iter().chain(overlay)
        });
        let sockets = self.port.iter_mut().map(|port| &mut port.socket);
        for path in files
            .into_iter()
            .flatten()
            .chain(console)
            .chain(disks)
            .chain(sockets)
        {
            *path = std::path::absolute(&path)?;
        }
        Ok(self)
    }
}

/// A value in a configuration that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} `{text}`: {why}")]
pub struct InvalidValue {
    what: &'static str,
    text: String,
    why: String,
}

impl InvalidValue {
    fn new(what: &'static str, text: &str, why: impl Into<String>) -> Self {
        Self {
            what,
            text: text.into(),
            why: why.into(),
        }
    }
}

/// Serde for a value that is read from one string, as on the command line, or from a table of its
/// fields, and is written as a table. The type derives it for the table with `serde(remote = "Self")`,
/// which makes functions of its own out of what would be implementations of the two traits.
macro_rules! read_from_text_or_table {
    ($type:ident, $expected:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct TextOrTable;

                impl<'de> Visitor<'de> for TextOrTable {
                    type Value = $type;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expected)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }

                    fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<$type, A::Error> {
                        $type::deserialize(MapAccessDeserializer::new(table))
                    }
                }

                deserializer.deserialize_any(TextOrTable)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                $type::serialize(self, serializer)
            }
        }
    };
}

/// Reads a field that has to say something.
fn not_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: From<String>,
{
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Err(de::Error::custom("an empty text means nothing here"));
    }
    Ok(text.into())
}

/// Bytes of memory, written with a unit: `512M`, `2G`, or `1048576K`; a bare number is MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "MemorySizeText", into = "String")]
pub struct MemorySize(pub u64);

/// A file may write a memory size as a number, too.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number of MiB, or a number and a unit in quotes, such as \"512M\""
)]
enum MemorySizeText {
    Text(String),
    Number(u64),
}

impl TryFrom<MemorySizeText> for MemorySize {
    type Error = InvalidValue;

    fn try_from(text: MemorySizeText) -> Result<Self, InvalidValue> {
        match text {
            MemorySizeText::Text(text) => text.parse(),
            MemorySizeText::Number(number) => number.to_string().parse(),
        }
    }
}

impl From<MemorySize> for String {
    fn from(size: MemorySize) -> String {
        size.to_string()
    }
}

impl FromStr for MemorySize {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let invalid = |why| InvalidValue::new("memory", text, why);
        let number_end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(number_end);
        let shift = match unit.trim().to_ascii_uppercase().as_str() {
            "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "" | "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => return Err(invalid("expected a number and a unit, such as 512M or 2G")),
        };
        let number: u64 = number
            .parse()
            .map_err(|_| invalid("expected a number and a unit, such as 512M or 2G"))?;
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| invalid("more than 16 EiB"))
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes.is_multiple_of(1 << 20) => write!(f, "{}M", bytes >> 20),
            bytes if bytes.is_multiple_of(1 << 10) => write!(f, "{}K", bytes >> 10),
            bytes => write!(f, "{bytes}B"),
        }
    }
}

/// The memory tagging that a guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MteConfig {
    /// None: the guest sees no MTE.
    Off,
    /// What the host has.
    On,
    /// Exactly this level, or an error: what a guest was started with it must find wherever it goes.
    Level(MteLevel),
}

impl FromStr for MteConfig {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        match text.to_ascii_lowercase().as_str() {
            "off" => Ok(Self::Off),
            "on" => Ok(Self::On),
            "2" | "mte2" => Ok(Self::Level(MteLevel::Mte2)),
            "3" | "mte3" => Ok(Self::Level(MteLevel::Mte3)),
            _ => Err(InvalidValue::new(
                "mte",
                text,
                "expected `off`, `on` (what the host has), `2` or `3` (exactly that level, or an error)",
            )),
        }
    }
}

impl fmt::Display for MteConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Level(MteLevel::None) => "0",
            Self::Level(MteLevel::Mte1) => "1",
            Self::Level(MteLevel::Mte2) => "2",
            Self::Level(MteLevel::Mte3) => "3",
        })
    }
}

impl TryFrom<String> for MteConfig {
    type Error = InvalidValue;

    fn try_from(text: String) -> Result<Self, InvalidValue> {
        text.parse()
    }
}

impl From<MteConfig> for String {
    fn from(mte: MteConfig) -> String {
        mte.to_string()
    }
}

/// `KEY=VALUE` and bare words after the first, separated by commas.
struct Options<'a> {
    what: &'static str,
    text: &'a str,
    rest: std::str::Split<'a, char>,
}

impl<'a> Options<'a> {
    /// Takes `text` apart and returns its first part, which must not be empty.
    fn after_first(what: &'static str, text: &'a str) -> Result<(&'a str, Self), InvalidValue> {
        let mut rest = text.split(',');
        match rest.next() {
            Some(first) if !first.is_empty() => Ok((first, Self { what, text, rest })),
            _ => Err(InvalidValue::new(what, text, "its first part is empty")),
        }
    }

    fn unknown(&self, option: &str, known: &str) -> InvalidValue {
        InvalidValue::new(
            self.what,
            self.text,
            format!("unknown option `{option}`; there are {known}"),
        )
    }
}

impl<'a> Iterator for Options<'a> {
    type Item = (&'a str, Option<&'a str>);

    fn next(&mut self) -> Option<Self::Item> {
        let option = self.rest.next()?;
        Some(
            option
                .split_once('=')
                .map_or((option, None), |(key, value)| (key, Some(value))),
        )
    }
}

/// A disk: `PATH[,readonly][,overlay[=FILE]][,id=SERIAL]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct DiskConfig {
    /// A raw image or a block device.
    #[serde(deserialize_with = "not_empty")]
    pub path: PathBuf,
    /// The guest may not write it.
    #[serde(default)]
    pub readonly: bool,
    /// Where the guest's writes go instead, so that others can use the image too.
    pub overlay: Option<OverlayConfig>,
    /// The serial by which the guest finds it; at most 20 characters.
    pub id: Option<String>,
}

impl FromStr for DiskConfig {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let (path, mut options) = Options::after_first("disk", text)?;
        let mut disk = Self {
            path: path.into(),
            readonly: false,
            overlay: None,
            id: None,
        };
        while let Some(option) = options.next() {
            match option {
                ("readonly" | "ro", None) => disk.readonly = true,
                ("overlay", None) => disk.overlay = Some(OverlayConfig::Temporary),
                ("overlay", Some(file)) if !file.is_empty() => {
                    disk.overlay = Some(OverlayConfig::File(file.into()));
                }
                ("id", Some(id)) => disk.id = Some(id.into()),
                (other, _) => {
                    let known = "`readonly`, `overlay`, `overlay=FILE` and `id=SERIAL`";
                    return Err(options.unknown(other, known));
                }
            }
        }
        Ok(disk)
    }
}

read_from_text_or_table!(
    DiskConfig,
    "a disk: `PATH[,readonly][,overlay[=FILE]][,id=SERIAL]`, or a table with `path`, `readonly`, `overlay` and `id`"
);

/// Where a disk's writes go: `true` or a file's path in a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "OverlayValue", into = "OverlayValue")]
pub enum OverlayConfig {
    /// To a file that is made if it does not exist, and kept.
    File(PathBuf),
    /// To a file without a name, which ends with the machine.
    Temporary,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected `true` or the path of a file")]
enum OverlayValue {
    Temporary(bool),
    File(PathBuf),
}

impl TryFrom<OverlayValue> for OverlayConfig {
    type Error = InvalidValue;

    fn try_from(value: OverlayValue) -> Result<Self, InvalidValue> {
        let invalid = |text, why| Err(InvalidValue::new("overlay", text, why));
        match value {
            OverlayValue::Temporary(true) => Ok(Self::Temporary),
            OverlayValue::Temporary(false) => {
                invalid("false", "leave it out for a disk without an overlay")
            }
            OverlayValue::File(path) if path.as_os_str().is_empty() => {
                invalid("", "an empty text means nothing here")
            }
            OverlayValue::File(path) => Ok(Self::File(path)),
        }
    }
}

impl From<OverlayConfig> for OverlayValue {
    fn from(overlay: OverlayConfig) -> Self {
        match overlay {
            OverlayConfig::File(path) => Self::File(path),
            OverlayConfig::Temporary => Self::Temporary(true),
        }
    }
}

/// A network interface: `TAP[,mac=ADDRESS][,mtu=BYTES]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct NetConfig {
    /// An existing tap interface of the host.
    #[serde(deserialize_with = "not_empty")]
    pub tap: String,
    /// The guest's address on it; a random one if not given.
    pub mac: Option<MacAddr>,
    /// The MTU that the guest is told, in bytes.
    pub mtu: Option<u16>,
}

impl FromStr for NetConfig {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let (tap, mut options) = Options::after_first("net", text)?;
        let tap = tap.strip_prefix("tap=").unwrap_or(tap);
        let mut net = Self {
            tap: tap.into(),
            mac: None,
            mtu: None,
        };
        let invalid = |why: String| InvalidValue::new("net", text, why);
        while let Some(option) = options.next() {
            match option {
                ("mac", Some(mac)) => {
                    net.mac = Some(mac.parse().map_err(|e| invalid(format!("{e}")))?)
                }
                ("mtu", Some(mtu)) => {
                    let mtu = mtu
                        .parse()
                        .map_err(|_| invalid(format!("`{mtu}` is no MTU")))?;
                    net.mtu = Some(mtu);
                }
                (other, _) => return Err(options.unknown(other, "`mac=ADDRESS` and `mtu=BYTES`")),
            }
        }
        Ok(net)
    }
}

read_from_text_or_table!(
    NetConfig,
    "a network interface: `TAP[,mac=ADDRESS][,mtu=BYTES]`, or a table with `tap`, `mac` and `mtu`"
);

/// A port for talk between host and guest: `NAME,socket=PATH`. The guest finds it as
/// `/dev/virtio-ports/NAME`, the host as a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct PortConfig {
    /// The port's name in the guest.
    #[serde(deserialize_with = "not_empty")]
    pub name: String,
    /// The socket on the host.
    #[serde(deserialize_with = "not_empty")]
    pub socket: PathBuf,
}

impl FromStr for PortConfig {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let (name, mut options) = Options::after_first("port", text)?;
        let mut socket = None;
        while let Some(option) = options.next() {
            match option {
                ("socket", Some(path)) if !path.is_empty() => socket = Some(path.into()),
                (other, _) => return Err(options.unknown(other, "`socket=PATH`")),
            }
        }
        let socket =
            socket.ok_or_else(|| InvalidValue::new("port", text, "it has no `socket=PATH`"))?;
        Ok(Self {
            name: name.into(),
            socket,
        })
    }
}

read_from_text_or_table!(
    PortConfig,
    "a port: `NAME,socket=PATH`, or a table with `name` and `socket`"
);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn size(text: &str) -> Option<u64> {
        text.parse::<MemorySize>().ok().map(|size| size.0)
    }

    #[test]
    fn memory_sizes_are_read_with_their_units() {
        assert_eq!(size("512M"), Some(512 << 20));
        assert_eq!(size("2GiB"), Some(2 << 30));
        assert_eq!(size("64"), Some(64 << 20));
        assert_eq!(size("1048577K"), Some(1_048_577 << 10));
        assert_eq!(size("4097B"), Some(4097));
    }

    #[test]
    fn memory_sizes_that_mean_nothing_are_refused() {
        assert_eq!(
            [
                "",
                "M",
                "12X",
                "-1M",
                "1.5G",
                "99999999999T",
                "1BBB",
                "64iB",
                "1MM"
            ]
            .map(size),
            [None; 9]
        );
    }

    #[test]
    fn levels_of_mte_are_read_with_and_without_the_word() {
        assert_eq!("mte3".parse(), Ok(MteConfig::Level(MteLevel::Mte3)));
        assert_eq!("2".parse(), Ok(MteConfig::Level(MteLevel::Mte2)));
        assert_eq!("off".parse(), Ok(MteConfig::Off));
    }

    #[test]
    fn levels_of_mte_that_mean_nothing_are_refused() {
        let parsed = ["1", "4", "mteon", "mtemte3", ""].map(|text| text.parse::<MteConfig>().ok());
        assert_eq!(parsed, [None; 5]);
    }

    #[test]
    fn what_a_level_of_mte_displays_is_read_as_the_same_level() {
        let levels = [
            MteConfig::Off,
            MteConfig::On,
            MteConfig::Level(MteLevel::Mte2),
            MteConfig::Level(MteLevel::Mte3),
        ];
        let parsed = levels.map(|level| level.to_string().parse());
        assert_eq!(parsed, levels.map(Ok));
    }

    #[test]
    fn a_disk_is_read_with_its_options() {
        let disk: DiskConfig = "a.img,readonly,id=root".parse().unwrap();
        assert_eq!(
            disk,
            DiskConfig {
                path: "a.img".into(),
                readonly: true,
                overlay: None,
                id: Some("root".into())
            }
        );
    }

    #[test]
    fn a_disk_has_an_overlay_in_a_file_or_without_a_name() {
        let overlay = |text: &str| text.parse::<DiskConfig>().map(|disk| disk.overlay);
        assert_eq!(overlay("a.img"), Ok(None));
        assert_eq!(overlay("a.img,overlay"), Ok(Some(OverlayConfig::Temporary)));
        assert_eq!(
            overlay("a.img,overlay=b,id=root"),
            Ok(Some(OverlayConfig::File("b".into())))
        );
        assert!(overlay("a.img,overlay=").is_err());
    }

    #[test]
    fn an_unknown_option_is_named_beside_the_known_ones() {
        let error = "a.img,read-only".parse::<DiskConfig>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "disk `a.img,read-only`: unknown option `read-only`; there are `readonly`, `overlay`, `overlay=FILE` \
             and `id=SERIAL`"
        );
    }

    #[test]
    fn a_network_interface_is_read_with_and_without_the_key() {
        let net: NetConfig = "tap=tap0,mac=02:00:00:00:00:01,mtu=1400".parse().unwrap();
        assert_eq!(
            net,
            NetConfig {
                tap: "tap0".into(),
                mac: Some("02:00:00:00:00:01".parse().unwrap()),
                mtu: Some(1400)
            }
        );
        assert_eq!("tap0".parse::<NetConfig>().unwrap().tap, "tap0");
    }

    #[test]
    fn a_port_needs_a_socket() {
        assert!("agent".parse::<PortConfig>().is_err());
        assert_eq!(
            "agent,socket=/run/a".parse::<PortConfig>().unwrap().socket,
            PathBuf::from("/run/a")
        );
    }

    proptest! {
        #[test]
        fn what_a_memory_size_displays_is_read_as_the_same_size(bytes: u64) {
            let text = MemorySize(bytes).to_string();
            prop_assert_eq!(size(&text), Some(bytes));
        }

        #[test]
        fn no_text_makes_the_parsers_panic(text in ".{0,40}") {
            let _ = text.parse::<MemorySize>();
            let _ = text.parse::<DiskConfig>();
            let _ = text.parse::<NetConfig>();
            let _ = text.parse::<PortConfig>();
            let _ = text.parse::<MteConfig>();
        }
    }
}
