//! The guest's console: the serial port on one side, a terminal or a file on the other.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::serial::{Output, SerialPort};
use crate::terminal::{Command, Escape, HELP, RawMode};

/// Where the guest's console is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ConsoleConfig {
    /// Standard input and output.
    #[default]
    Stdio,
    /// Output to a file, which is emptied first; no input.
    File(PathBuf),
    /// Nowhere.
    Off,
}

impl TryFrom<String> for ConsoleConfig {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match (text.as_str(), text.strip_prefix("file=")) {
            ("stdio", _) => Ok(Self::Stdio),
            ("off", _) => Ok(Self::Off),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(format!(
                "console `{text}`: expected `stdio`, `off` or `file=PATH`"
            )),
        }
    }
}

impl From<ConsoleConfig> for String {
    fn from(config: ConsoleConfig) -> Self {
        match config {
            ConsoleConfig::Stdio => "stdio".into(),
            ConsoleConfig::Off => "off".into(),
            ConsoleConfig::File(path) => format!("file={}", path.display()),
        }
    }
}

/// The console cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be written.
    #[error("console file {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The terminal or a thread cannot be had.
    #[error("console: {0}")]
    Host(#[from] io::Error),
}

/// What the serial port is connected to. Dropping it gives the terminal back.
pub struct Console {
    output: Output,
    room: EventFd,
    input: Option<Input>,
    // Dropped after the threads that use the terminal have ended.
    _raw: Option<RawMode>,
    reads_stdin: bool,
}

struct Input {
    stop: EventFd,
    thread: JoinHandle<()>,
}

impl Console {
    /// Opens the console.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(config: &ConsoleConfig) -> Result<Self, Error> {
        let (output, raw) = match config {
            ConsoleConfig::Stdio => (Output::to(io::stdout())?, RawMode::enter()?),
            ConsoleConfig::Off => (Output::to(io::sink())?, None),
            ConsoleConfig::File(path) => (Output::to(create(path)?)?, None),
        };
        if raw.is_some() {
            eprintln!("{HELP}");
        }
        Ok(Self {
            output,
            room: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            input: None,
            reads_stdin: *config == ConsoleConfig::Stdio,
            _raw: raw,
        })
    }

    /// A serial port on this console, which interrupts by `interrupt`; the user's commands go to `command`.
    ///
    /// # Errors
    /// A thread or descriptor cannot be had.
    pub fn connect<T: Trigger + Send + 'static>(
        &mut self,
        interrupt: T,
        command: impl Fn(Command) + Send + 'static,
    ) -> Result<Arc<SerialPort<T>>, Error> {
        let port = SerialPort::new(interrupt, &self.output, self.room.try_clone()?);
        let port = Arc::new(port);
        if self.reads_stdin {
            self.input = Some(self.start_input(port.clone(), command)?);
        }
        Ok(port)
    }

    fn start_input<T: Trigger + Send + 'static>(
        &self,
        port: Arc<SerialPort<T>>,
        command: impl Fn(Command) + Send + 'static,
    ) -> io::Result<Input> {
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let waits = Waits::new(&stop, &self.room)?;
        let keys_are_commands = self._raw.is_some();
        let thread = thread::Builder::new()
            .name("tv-input".into())
            .spawn(move || {
                if let Err(e) = forward_input(&waits, &port, keys_are_commands, &command) {
                    tracing::warn!("console input: {e}");
                }
            })?;
        Ok(Input { stop, thread })
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(input) = self.input.take() {
            let _ = input.stop.write(1);
            let _ = input.thread.join();
        }
    }
}

fn create(path: &Path) -> Result<std::fs::File, Error> {
    OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .open(path)
        .map_err(|source| Error::File {
            path: path.into(),
            source,
        })
}

/// What the input thread waits for.
struct Waits {
    /// `None` if standard input is a plain file, which is always ready and not for epoll.
    for_input: Option<Epoll>,
    for_room: Epoll,
    room: EventFd,
}

const STOP: u64 = 0;
const READY: u64 = 1;

impl Waits {
    fn new(stop: &EventFd, room: &EventFd) -> io::Result<Self> {
        let room = room.try_clone()?;
        let for_room = waiting_for(room.as_raw_fd(), stop)?;
        let for_input = match waiting_for(io::stdin().as_raw_fd(), stop) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => None,
            epoll => Some(epoll?),
        };
        Ok(Self {
            for_input,
            for_room,
            room,
        })
    }

    fn for_input(&self) -> io::Result<bool> {
        self.for_input.as_ref().map_or(Ok(true), Self::wait)
    }

    /// Waits; false means stop.
    fn wait(epoll: &Epoll) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 2];
        loop {
            match epoll.wait(-1, &mut events) {
                Ok(count) => return Ok(events[..count].iter().all(|event| event.data() != STOP)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// An epoll that waits until `fd` can be read, or for `stop`.
fn waiting_for(fd: std::os::fd::RawFd, stop: &EventFd) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let add = |fd, token| {
        epoll.ctl(
            ControlOperation::Add,
            fd,
            EpollEvent::new(EventSet::IN, token),
        )
    };
    add(stop.as_raw_fd(), STOP)?;
    add(fd, READY)?;
    Ok(epoll)
}

fn forward_input<T: Trigger>(
    waits: &Waits,
    port: &SerialPort<T>,
    keys_are_commands: bool,
    command: &impl Fn(Command),
) -> io::Result<()> {
    let mut escape = Escape::default();
    // Not `io::stdin()`, whose buffer would hold input back that epoll no longer tells of.
    let mut stdin = std::fs::File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut input = [0; 64];
    while waits.for_input()? {
        let length = match stdin.read(&mut input) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        let mut guest = Vec::new();
        if keys_are_commands {
            match escape.filter(&input[..length], &mut guest) {
                Some(Command::Help) => eprintln!("\n{HELP}"),
                Some(given) => command(given),
                None => {}
            }
        } else {
            guest.extend(&input[..length]);
        }
        if !give(waits, port, &guest)? {
            return Ok(());
        }
    }
    Ok(())
}

/// Gives the guest all of `input`, as it reads; false means stop.
fn give<T: Trigger>(waits: &Waits, port: &SerialPort<T>, mut input: &[u8]) -> io::Result<bool> {
    while !input.is_empty() {
        let taken = port.receive(input);
        input = &input[taken..];
        if !input.is_empty() && !Waits::wait(&waits.for_room)? {
            return Ok(false);
        }
        let _ = waits.room.read();
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles_are_named_as_in_the_help() {
        let named = |text: &str| ConsoleConfig::try_from(text.to_owned());
        assert_eq!(named("stdio"), Ok(ConsoleConfig::Stdio));
        assert_eq!(named("off"), Ok(ConsoleConfig::Off));
        assert_eq!(
            named("file=/tmp/log"),
            Ok(ConsoleConfig::File("/tmp/log".into()))
        );
        assert_eq!(
            named("tty").unwrap_err(),
            "console `tty`: expected `stdio`, `off` or `file=PATH`"
        );
    }
}
