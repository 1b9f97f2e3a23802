//! What a machine is made of, as a user writes it: on the command line, or in a TOML or JSON file
//! with the same names.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use mte::MteLevel;
use serde::{Deserialize, Serialize};

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

/// Serde for a value that is written as one string, on the command line as in a file.
macro_rules! written_as_string {
    ($type:ty) => {
        impl TryFrom<String> for $type {
            type Error = InvalidValue;
            fn try_from(text: String) -> Result<Self, InvalidValue> {
                text.parse()
            }
        }
        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    };
}

/// Bytes of memory, written with a unit: `512M`, `2G`, or `1048576K`; a bare number is MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "MemorySizeText", into = "String")]
pub struct MemorySize(pub u64);

/// A file may write a memory size as a number, too.
#[derive(Deserialize)]
#[serde(untagged)]
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
        let shift = match unit
            .trim()
            .to_ascii_uppercase()
            .trim_end_matches("IB")
            .trim_end_matches('B')
        {
            "" if unit.trim().eq_ignore_ascii_case("b") => 0,
            "K" => 10,
            "" | "M" => 20,
            "G" => 30,
            "T" => 40,
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
        match text.to_ascii_lowercase().trim_start_matches("mte") {
            "off" => Ok(Self::Off),
            "on" => Ok(Self::On),
            "2" => Ok(Self::Level(MteLevel::Mte2)),
            "3" => Ok(Self::Level(MteLevel::Mte3)),
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
            Self::Level(MteLevel::Mte2) => "2",
            Self::Level(_) => "3",
        })
    }
}

written_as_string!(MteConfig);

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

/// A disk: `PATH[,readonly][,id=SERIAL]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskConfig {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// The guest may not write it.
    pub readonly: bool,
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
            id: None,
        };
        while let Some(option) = options.next() {
            match option {
                ("readonly" | "ro", None) => disk.readonly = true,
                ("id", Some(id)) => disk.id = Some(id.into()),
                (other, _) => return Err(options.unknown(other, "`readonly` and `id=SERIAL`")),
            }
        }
        Ok(disk)
    }
}

impl fmt::Display for DiskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if self.readonly {
            f.write_str(",readonly")?;
        }
        self.id.iter().try_for_each(|id| write!(f, ",id={id}"))
    }
}

written_as_string!(DiskConfig);

/// A network interface: `TAP[,mac=ADDRESS][,mtu=BYTES]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NetConfig {
    /// An existing tap interface of the host.
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

impl fmt::Display for NetConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.tap)?;
        self.mac
            .iter()
            .try_for_each(|mac| write!(f, ",mac={mac}"))?;
        self.mtu.iter().try_for_each(|mtu| write!(f, ",mtu={mtu}"))
    }
}

written_as_string!(NetConfig);

/// A port for talk between host and guest: `NAME,socket=PATH`. The guest finds it as
/// `/dev/virtio-ports/NAME`, the host as a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortConfig {
    /// The port's name in the guest.
    pub name: String,
    /// The socket on the host.
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

impl fmt::Display for PortConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},socket={}", self.name, self.socket.display())
    }
}

written_as_string!(PortConfig);

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
            ["", "M", "12X", "-1M", "1.5G", "99999999999T"].map(size),
            [None; 6]
        );
    }

    #[test]
    fn levels_of_mte_are_read_with_and_without_the_word() {
        assert_eq!("mte3".parse(), Ok(MteConfig::Level(MteLevel::Mte3)));
        assert_eq!("2".parse(), Ok(MteConfig::Level(MteLevel::Mte2)));
        assert_eq!("off".parse(), Ok(MteConfig::Off));
        assert!("1".parse::<MteConfig>().is_err());
    }

    #[test]
    fn a_disk_is_read_with_its_options() {
        let disk: DiskConfig = "a.img,readonly,id=root".parse().unwrap();
        assert_eq!(
            disk,
            DiskConfig {
                path: "a.img".into(),
                readonly: true,
                id: Some("root".into())
            }
        );
    }

    #[test]
    fn an_unknown_option_is_named_beside_the_known_ones() {
        let error = "a.img,read-only".parse::<DiskConfig>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "disk `a.img,read-only`: unknown option `read-only`; there are `readonly` and `id=SERIAL`"
        );
    }

    #[test]
    fn a_network_interface_is_read_with_and_without_the_key() {
        let net: NetConfig = "tap=tap0,mac=02:00:00:00:00:01,mtu=1400".parse().unwrap();
        assert_eq!(net.to_string(), "tap0,mac=02:00:00:00:00:01,mtu=1400");
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
