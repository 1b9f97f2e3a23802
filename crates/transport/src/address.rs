//! Where the other side is: `tcp://HOST:PORT` or `unix:PATH`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use crate::Error;

/// Bytes of a socket's path that fit the kernel's `sockaddr_un`, with the zero at its end.
const MAX_UNIX_PATH: usize = 107;
/// Characters of a host's name (RFC 1035, 2.3.4).
const MAX_NAME: usize = 253;

/// Where to listen, or to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `tcp://HOST:PORT`. Port 0 is for listeners alone: the kernel chooses one.
    Tcp {
        /// Which host.
        host: Host,
        /// Which port.
        port: u16,
    },
    /// `unix:PATH`, at most 107 bytes of it.
    Unix(PathBuf),
}

/// A host, by address or by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// By address. In text an IPv6 address is in brackets.
    Ip(IpAddr),
    /// By name: letters, digits, `-`, `_` and `.`.
    Name(String),
}

impl Address {
    /// Whether only this host can be at the other end: a Unix socket, a loopback address, or the name `localhost`.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp { host, .. } => host.is_local(),
            Self::Unix(_) => true,
        }
    }
}

impl Host {
    fn is_local(&self) -> bool {
        match self {
            Self::Ip(ip) => ip.to_canonical().is_loopback(),
            Self::Name(name) => name.trim_end_matches('.').eq_ignore_ascii_case("localhost"),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp {
            host: Host::Ip(address.ip()),
            port: address.port(),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(IpAddr::V4(ip)) => write!(f, "{ip}"),
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map_err(|why| Error::Address {
            text: text.into(),
            why,
        })
    }
}

fn parse(text: &str) -> Result<Address, &'static str> {
    match (text.strip_prefix("tcp://"), text.strip_prefix("unix:")) {
        (Some(rest), _) => parse_tcp(rest),
        (_, Some(path)) => parse_unix(path),
        _ => Err("it begins with neither tcp:// nor unix:"),
    }
}

fn parse_unix(path: &str) -> Result<Address, &'static str> {
    match path.len() {
        0 => Err("there is no path"),
        1..=MAX_UNIX_PATH if path.contains('\0') => Err("there is a zero byte in the path"),
        1..=MAX_UNIX_PATH => Ok(Address::Unix(path.into())),
        _ => Err("the path is longer than 107 bytes, which is all that a socket's may have"),
    }
}

fn parse_tcp(rest: &str) -> Result<Address, &'static str> {
    let (host, port) = match rest.strip_prefix('[') {
        Some(rest) => {
            let (ip, port) = rest.split_once("]:").ok_or("no ]:PORT follows the [")?;
            (Host::Ip(parse_ipv6(ip)?.into()), port)
        }
        None => {
            let (host, port) = rest.rsplit_once(':').ok_or("there is no port")?;
            (parse_host(host)?, port)
        }
    };
    Ok(Address::Tcp {
        host,
        port: parse_port(port)?,
    })
}

fn parse_ipv6(text: &str) -> Result<Ipv6Addr, &'static str> {
    if text.contains('%') {
        return Err("an address with a zone (%) is not supported");
    }
    text.parse()
        .map_err(|_| "what is in the brackets is not an IPv6 address")
}

fn parse_host(text: &str) -> Result<Host, &'static str> {
    if text.contains(':') {
        return Err("an IPv6 address needs brackets around it");
    }
    if let Ok(ip) = text.parse() {
        return Ok(Host::Ip(ip));
    }
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    match text.len() {
        0 => Err("there is no host"),
        1..=MAX_NAME if text.chars().all(is_name) => Ok(Host::Name(text.into())),
        1..=MAX_NAME => Err("the host has characters that no name has"),
        _ => Err("the host's name is longer than 253 characters"),
    }
}

fn parse_port(text: &str) -> Result<u16, &'static str> {
    const WHY: &str = "the port is not a number from 0 to 65535";
    if text.starts_with('+') {
        return Err(WHY);
    }
    text.parse().map_err(|_| WHY)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn why(text: &str) -> String {
        text.parse::<Address>().unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_with_an_address_is_said() {
        assert!(why("host:1").contains("neither tcp:// nor unix:"));
        assert!(why("tcp://host").contains("no port"));
        assert!(why("tcp://:1").contains("no host"));
        assert!(why("tcp://::1:1").contains("needs brackets"));
        assert!(why("tcp://[::1]").contains("no ]:PORT"));
        assert!(why("tcp://[127.0.0.1]:1").contains("not an IPv6 address"));
        assert!(why("tcp://[fe80::1%eth0]:1").contains("zone"));
        assert!(why("tcp://a b:1").contains("characters"));
        assert!(why("tcp://host:65536").contains("0 to 65535"));
        assert!(why("tcp://host:+1").contains("0 to 65535"));
        assert!(why("tcp://host:").contains("0 to 65535"));
        assert!(why("unix:").contains("no path"));
        assert!(why("unix:a\0b").contains("zero byte"));
        assert!(why(&format!("unix:{}", "x".repeat(108))).contains("107 bytes"));
        assert!(why(&format!("tcp://{}:1", "x".repeat(254))).contains("253"));
    }

    #[test]
    fn loopback_addresses_and_unix_sockets_are_local() {
        let is_local = |text: &str| text.parse::<Address>().unwrap().is_local();
        assert!(is_local("tcp://127.0.0.1:1"));
        assert!(is_local("tcp://127.8.9.1:1"));
        assert!(is_local("tcp://[::1]:1"));
        assert!(is_local("tcp://[::ffff:127.0.0.1]:1"));
        assert!(is_local("tcp://LocalHost.:1"));
        assert!(is_local("unix:/run/x"));
        assert!(!is_local("tcp://0.0.0.0:1"));
        assert!(!is_local("tcp://[::]:1"));
        assert!(!is_local("tcp://192.0.2.1:1"));
        assert!(!is_local("tcp://localhost.example.org:1"));
    }

    fn host() -> impl Strategy<Value = Host> {
        prop_oneof![
            any::<IpAddr>().prop_map(Host::Ip),
            "[a-z][a-z0-9-]{0,20}(\\.[a-z][a-z0-9-]{0,8})?".prop_map(Host::Name),
        ]
    }

    fn address() -> impl Strategy<Value = Address> {
        prop_oneof![
            (host(), any::<u16>()).prop_map(|(host, port)| Address::Tcp { host, port }),
            "[ -~]{1,107}".prop_map(|path| Address::Unix(path.into())),
        ]
    }

    proptest! {
        #[test]
        fn an_address_is_read_as_it_was_written(address in address()) {
            let text = address.to_string();

            prop_assert_eq!(text.parse::<Address>().unwrap(), address);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "(tcp://|unix:)?\\PC{0,120}") {
            let read = text.parse::<Address>();

            prop_assert!(read.is_err() || read.unwrap().to_string().parse::<Address>().is_ok());
        }
    }
}
