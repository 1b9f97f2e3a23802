//! The other end of the control socket: one connection a question, each answered in its time or not at all.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::debug::{GdbConfig, GdbReport};
use super::http::{Answer, Status, read_answer};
use super::migration::{DecideMigrationConfig, ReceiveMigrationConfig, SendMigrationConfig};
use super::model::{InspectConfig, SnapshotConfig, VmInfo};
use super::wire::Wire;
use crate::control::{Decision, MigrationReport, SnapshotReport};
use crate::inspection::{PROTOCOL, Reader};

/// Why a VMM did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens at the socket.
    #[error("no VMM listens at {0}")]
    Nobody(PathBuf),
    /// It listens and does not answer.
    #[error("the VMM at {socket} did not answer within {} s: it is stuck, or its host is overloaded", .patience.as_secs_f32())]
    Silent {
        /// Where.
        socket: PathBuf,
        /// For how long it was waited for.
        patience: Duration,
    },
    /// The socket cannot be used.
    #[error("socket {socket}: {source}")]
    Io {
        /// Where.
        socket: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It refused.
    #[error("{}", .messages.join(": "))]
    Refused {
        /// The status of its answer.
        status: u16,
        /// What was not done, and why.
        messages: Vec<String>,
    },
    /// It answers, but not as Tagvisor would.
    #[error("the VMM at {socket} answers what is not understood: {why}")]
    Strange {
        /// Where.
        socket: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl Error {
    /// Whether what was asked for may have been done, or a part of it: the VMM says so, or said nothing more.
    pub const fn leaves_open(&self) -> bool {
        match self {
            Self::Refused { status, .. } => *status == Status::Conflict as u16,
            Self::Silent { .. } | Self::Io { .. } | Self::Strange { .. } => true,
            Self::Nobody(_) => false,
        }
    }
}

/// A VMM that can be asked through its socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    patience: Duration,
}

impl Client {
    /// For how long an answer is waited for, unless what was asked for takes as long as it takes.
    pub const PATIENCE: Duration = Duration::from_secs(30);

    /// The VMM whose socket is `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            patience: Self::PATIENCE,
        }
    }

    /// Waits for answers no longer than `patience`.
    pub fn patient(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// The machine as it is.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn info(&self) -> Result<VmInfo, Error> {
        self.read(&self.ask("GET", "vm.info", None, Some(self.patience))?)
    }

    /// Stops the guest where it is.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn pause(&self) -> Result<(), Error> {
        self.put("vm.pause")
    }

    /// Lets a paused guest go on.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn resume(&self) -> Result<(), Error> {
        self.put("vm.resume")
    }

    /// Ends the machine and its VMM. The answer comes before the end.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn shut_down_vmm(&self) -> Result<(), Error> {
        self.put("vmm.shutdown")
    }

    /// Writes a snapshot, and waits for it as long as it takes.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn snapshot(&self, config: &SnapshotConfig) -> Result<SnapshotReport, Error> {
        let body = self.write(config)?;
        self.read(&self.ask("PUT", "vm.snapshot", Some(&body), None)?)
    }

    /// Sends the guest to another host, and waits for it as long as it takes.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn send_migration(&self, config: &SendMigrationConfig) -> Result<MigrationReport, Error> {
        let mut config = config.clone();
        config.report = true;
        let body = self.write(&config)?;
        self.read(&self.ask("PUT", "vm.send-migration", Some(&body), None)?)
    }

    /// Waits for a guest of another host, as long as it takes.
    ///
    /// # Errors
    /// See [`Error`].
    #[allow(
        dead_code,
        reason = "`tagvisor receive` is a VMM itself; tests ask one"
    )]
    pub fn receive_migration(&self, config: &ReceiveMigrationConfig) -> Result<(), Error> {
        let body = self.write(config)?;
        self.ask("PUT", "vm.receive-migration", Some(&body), None)
            .map(drop)
    }

    /// Gives up the migration that is on its way.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn cancel_migration(&self) -> Result<(), Error> {
        self.put("vm.cancel-migration")
    }

    /// Decides where a guest runs of which that is not known.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn decide_migration(&self, run: Decision) -> Result<(), Error> {
        let body = self.write(&DecideMigrationConfig { run })?;
        self.ask(
            "PUT",
            "vm.decide-migration",
            Some(&body),
            Some(self.patience),
        )
        .map(drop)
    }

    /// Lets debuggers come, or none.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn debug(&self, config: &GdbConfig) -> Result<GdbReport, Error> {
        let body = self.write(config)?;
        self.read(&self.ask("PUT", "vm.gdb", Some(&body), Some(self.patience))?)
    }

    /// What is the same for two clients of the same VMM.
    pub fn identity(&self) -> PathBuf {
        std::fs::canonicalize(&self.socket).unwrap_or_else(|_| self.socket.clone())
    }

    /// Looks at the machine's memory, once it is its turn, as long as that takes. The guest stands still until what is returned
    /// is gone, unless `config` says otherwise.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn inspect(&self, config: &InspectConfig) -> Result<Reader, Error> {
        let body = self.write(config)?;
        let request = upgrade("vm.inspect", &body);
        let stream = self.connect().map_err(|e| self.failed(e))?;
        let mut wire = Wire::new(stream);
        let sent = wire.send(&request, Some(Instant::now() + self.patience));
        let answer =
            read_answer(&mut wire, None).map_err(|e| self.failed(sent.err().unwrap_or(e)))?;
        if answer.status != Status::SwitchingProtocols as u16 {
            return Err(refused(answer));
        }
        Reader::new(wire.into_stream()).map_err(|e| self.failed(e))
    }

    /// The process that listens.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn process(&self) -> Result<rustix::process::Pid, Error> {
        let stream = self.connect().map_err(|e| self.failed(e))?;
        rustix::net::sockopt::socket_peercred(&stream)
            .map(|peer| peer.pid)
            .map_err(|e| self.failed(e.into()))
    }

    fn put(&self, name: &str) -> Result<(), Error> {
        self.ask("PUT", name, None, Some(self.patience)).map(drop)
    }

    /// `patience` is for the answer.
    fn ask(
        &self,
        method: &str,
        name: &str,
        body: Option<&[u8]>,
        patience: Option<Duration>,
    ) -> Result<Vec<u8>, Error> {
        let answer = self
            .exchange(&request(method, name, body), patience)
            .map_err(|e| self.failed(e))?;
        match answer.status {
            200..300 => Ok(answer.body),
            _ => Err(refused(answer)),
        }
    }

    fn exchange(&self, request: &[u8], patience: Option<Duration>) -> io::Result<Answer> {
        let mut wire = Wire::new(self.connect()?);
        let sent = wire.send(request, Some(Instant::now() + self.patience));
        let answer = read_answer(
            &mut wire,
            patience.map(|patience| Instant::now() + patience),
        );
        // One who is turned away unheard cannot send, but can read why.
        match (sent, answer) {
            (Err(e), Err(_)) => Err(e),
            (_, answer) => answer,
        }
    }

    /// Connects; unlike the standard library's, not for ever where the VMM takes up no connections.
    fn connect(&self) -> io::Result<UnixStream> {
        let address = SocketAddrUnix::new(&*self.socket)?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        set_socket_timeout(&socket, Timeout::Send, Some(self.patience))?;
        rustix::net::connect(&socket, &address)?;
        Ok(socket.into())
    }

    fn failed(&self, source: io::Error) -> Error {
        let socket = self.socket.clone();
        match source.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => Error::Nobody(socket),
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Error::Silent {
                socket,
                patience: self.patience,
            },
            ErrorKind::InvalidData => Error::Strange {
                socket,
                why: source.to_string(),
            },
            _ => Error::Io { socket, source },
        }
    }

    fn read<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, Error> {
        serde_json::from_slice(body).map_err(|e| self.strange(&e))
    }

    fn write(&self, body: &impl Serialize) -> Result<Vec<u8>, Error> {
        serde_json::to_vec(body).map_err(|e| self.strange(&e))
    }

    fn strange(&self, error: &serde_json::Error) -> Error {
        Error::Strange {
            socket: self.socket.clone(),
            why: error.to_string(),
        }
    }
}

fn refused(Answer { status, body }: Answer) -> Error {
    Error::Refused {
        status,
        messages: serde_json::from_slice(&body)
            .unwrap_or_else(|_| vec![format!("the VMM answered with status {status}")]),
    }
}

fn upgrade(name: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "PUT /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: {PROTOCOL}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn request(method: &str, name: &str, body: Option<&[u8]>) -> Vec<u8> {
    let mut head =
        format!("{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    if let Some(body) = body {
        head += &format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        );
    }
    head += "\r\n";
    [head.as_bytes(), body.unwrap_or_default()].concat()
}
