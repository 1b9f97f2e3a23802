//! The stand-in of a command that runs on the other host.

use std::ffi::OsString;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use crate::label::Labelled;
use crate::wire::{Command, Message};

/// The signals that are passed on. When SIGKILL ends the stand-in, the connection closes, which kills the command.
const SIGNALS: &[i32] = &[SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];

/// How long the other host may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why a command's outcome is not known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no agent.
    #[error("cannot reach the other host's agent at {address}: {error}")]
    Unreachable {
        /// Where it should be.
        address: SocketAddr,
        /// Why not.
        error: io::Error,
    },
    /// The connection broke.
    #[error("lost the other host before the command ended: {0}")]
    Lost(io::Error),
    /// Whoever read the output has gone.
    #[error("cannot write the command's output: {0}")]
    Output(io::Error),
    /// Something on this host.
    #[error("cannot {what}: {error}")]
    Here {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        error: io::Error,
    },
}

fn here(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |error| Error::Here { what, error }
}

/// Runs `words` by the agent at `address`, in a folder of this one's name and with this environment. Output goes to the standard
/// streams, labelled with `host`. Returns the status.
///
/// # Errors
/// An outcome that is not known.
pub fn run(address: SocketAddr, host: &str, words: Vec<OsString>) -> Result<u8, Error> {
    // From here on signals are the command's.
    let mut signals = Signals::new(SIGNALS).map_err(here("listen for signals"))?;
    let mut connection = connect(address)?;
    let mut orders = connection
        .try_clone()
        .map_err(here("use the connection twice"))?;
    command(words)?
        .write(&mut connection)
        .map_err(Error::Lost)?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            let number = u8::try_from(signal).unwrap_or_default();
            if Message::Signal(number).write(&mut orders).is_err() {
                return;
            }
        }
    });
    follow(&mut connection, host)
}

fn command(words: Vec<OsString>) -> Result<Message, Error> {
    let folder = std::env::current_dir().map_err(here("tell the current folder"))?;
    let pair = |(name, value): (OsString, OsString)| {
        OsString::from_vec([name.as_bytes(), b"=", value.as_bytes()].concat())
    };
    Ok(Message::Run(Command {
        folder: folder.into(),
        words,
        environment: std::env::vars_os().map(pair).collect(),
    }))
}

/// Connects; the agent may be about to start.
fn connect(address: SocketAddr) -> Result<TcpStream, Error> {
    let started = Instant::now();
    loop {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(connection) => {
                // It only makes answers faster.
                let _ = connection.set_nodelay(true);
                return Ok(connection);
            }
            Err(error) if started.elapsed() > PATIENCE => {
                return Err(Error::Unreachable { address, error });
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Prints what the command prints, to its end.
fn follow(connection: &mut TcpStream, host: &str) -> Result<u8, Error> {
    let mut out = Labelled::for_log(io::stdout(), host).map_err(Error::Output)?;
    let mut err = Labelled::for_log(io::stderr(), host).map_err(Error::Output)?;
    loop {
        match Message::read(connection).map_err(Error::Lost)? {
            Some(Message::Out(bytes)) => out.write(&bytes).map_err(Error::Output)?,
            Some(Message::Err(bytes)) => err.write(&bytes).map_err(Error::Output)?,
            Some(Message::Exit(status)) => {
                out.finish().and(err.finish()).map_err(Error::Output)?;
                return Ok(status);
            }
            _ => return Err(Error::Lost(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}
