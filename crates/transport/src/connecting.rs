//! The sender's way to a connection: resolve, connect, TLS, greet; all of it by one deadline.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{SocketAddrUnix, SocketFlags};
use rustls::ClientConnection;
use rustls::pki_types::ServerName;

use crate::connection::Connection;
use crate::greeting::{self, verdict};
use crate::link::{Shared, tune};
use crate::{Address, ClientIdentity, Error, Host, Result, identity, unix};

/// Connects to who listens at `address`, with TLS if there is an `identity`. By `deadline`, there is a connection or an error.
/// The connection then has neither deadline nor patience.
///
/// # Errors
/// [`Error`] says who is at the other end, what it did or did not do, and what to do.
pub fn connect(
    address: &Address,
    identity: Option<&ClientIdentity>,
    deadline: Instant,
) -> Result<Connection> {
    let expected = identity
        .map(|identity| expected_name(address, identity))
        .transpose()?;
    let socket = match address {
        Address::Tcp { host, port } => connect_tcp(address, host, *port, deadline)?,
        Address::Unix(path) => connect_unix(address, path, deadline)?,
    };
    let mut connection = Connection::new(Shared::new(socket), address.to_string(), deadline);
    let established = establish(&mut connection, identity, expected);
    if established.is_err() {
        connection.part();
    }
    established.map(|()| connection)
}

fn establish(
    connection: &mut Connection,
    identity: Option<&ClientIdentity>,
    expected: Option<ServerName<'static>>,
) -> Result<()> {
    if let (Some(identity), Some(expected)) = (identity, expected) {
        let session = ClientConnection::new(identity.config().clone(), expected)
            .map_err(|e| verdict(connection.peer(), e))?;
        connection.protect(session.into())?;
    }
    connection.greet(greeting::greet)
}

fn expected_name(address: &Address, identity: &ClientIdentity) -> Result<ServerName<'static>> {
    if let Some(name) = identity.expected() {
        return Ok(name.clone());
    }
    match address {
        Address::Tcp {
            host: Host::Ip(ip), ..
        } => Ok((*ip).into()),
        Address::Tcp {
            host: Host::Name(name),
            ..
        } => identity::peer_name(name),
        Address::Unix(_) => Err(Error::NoPeerName {
            address: address.clone(),
        }),
    }
}

fn connect_tcp(address: &Address, host: &Host, port: u16, deadline: Instant) -> Result<OwnedFd> {
    let failed = |source| Error::Connect {
        address: address.clone(),
        source,
    };
    if port == 0 {
        let why = "port 0 is for listeners alone";
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, why)));
    }
    let addresses = match host {
        Host::Ip(ip) => vec![SocketAddr::new(*ip, port)],
        Host::Name(name) => resolve(address, name, port, deadline)?,
    };
    let socket = connect_first(address, &addresses, deadline)?;
    tune(&socket).map_err(|e| failed(e.into()))?;
    Ok(socket.into())
}

/// Connects to the first of `addresses` that answers; each has its share of the time.
fn connect_first(
    address: &Address,
    addresses: &[SocketAddr],
    deadline: Instant,
) -> Result<TcpStream> {
    let start = Instant::now();
    let mut last = timed_out(address, start);
    for (tried, socket_address) in addresses.iter().enumerate() {
        let share =
            time_left(deadline) / u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
        if share.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(socket_address, share) {
            Ok(socket) => return Ok(socket),
            Err(e) if e.kind() == io::ErrorKind::TimedOut => last = timed_out(address, start),
            Err(source) => {
                last = Error::Connect {
                    address: address.clone(),
                    source,
                };
            }
        }
    }
    Err(last)
}

/// Asks the resolver, which takes as long as it likes, on a thread of its own.
pub(crate) fn resolve(
    address: &Address,
    name: &str,
    port: u16,
    deadline: Instant,
) -> Result<Vec<SocketAddr>> {
    let failed = |source| Error::Resolve {
        address: address.clone(),
        source,
    };
    let (answer, answers) = mpsc::channel();
    let name = name.to_owned();
    std::thread::Builder::new()
        .name("resolve".into())
        .spawn(move || {
            let resolved = (name.as_str(), port).to_socket_addrs();
            // Nobody waits for it any more, if it cannot be sent.
            let _ = answer.send(resolved.map(Vec::from_iter));
        })
        .map_err(failed)?;
    answers
        .recv_timeout(time_left(deadline))
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .and_then(|addresses| match addresses.is_empty() {
            true => Err(io::ErrorKind::NotFound.into()),
            false => Ok(addresses),
        })
        .map_err(failed)
}

fn connect_unix(address: &Address, path: &Path, deadline: Instant) -> Result<OwnedFd> {
    let start = Instant::now();
    let failed = |source: io::Error| Error::Connect {
        address: address.clone(),
        source,
    };
    let left = time_left(deadline);
    if left.is_zero() {
        return Err(timed_out(address, start));
    }
    let socket = unix::new_socket(SocketFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    // It bounds the wait of a connect to a listener with too many others waiting, too; all else is done without blocking.
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(left))
        .and_then(|()| SocketAddrUnix::new(path))
        .and_then(|unix| rustix::net::connect(&socket, &unix))
        .map_err(|e| match e {
            Errno::AGAIN => timed_out(address, start),
            e => failed(e.into()),
        })?;
    match unix::foreign_user(&socket).map_err(failed)? {
        None => Ok(socket),
        Some(uid) => Err(Error::ForeignUser {
            peer: address.to_string(),
            uid,
        }),
    }
}

fn timed_out(address: &Address, since: Instant) -> Error {
    Error::TimedOut {
        peer: address.to_string(),
        waited: since.elapsed(),
        doing: "connect",
        what: "to it",
    }
}

fn time_left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}
