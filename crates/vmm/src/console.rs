//! The guest's console: the serial port on one side, a terminal or a file on the other.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::serial::{FirstState, Output, SerialPort};
use crate::terminal::{Command, Escape, HELP, RawMode};

/// How much of what a user types a guest that does not read may leave behind. The rest is dropped, so
/// that the keys for Tagvisor are always seen.
const TYPED_AHEAD: usize = 4096;

/// Where the guest's console is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ConsoleConfig {
    /// Standard input and output.
    #[default]
    Stdio,
    /// Output to a file, which is emptied when the machine has been built; no input.
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
    /// The file is a pipe without a reader.
    #[error("console file {0}: nobody reads this pipe; start its reader first")]
    NoReader(PathBuf),
    /// The terminal, a descriptor or a thread cannot be had.
    #[error("console: {step}: {source}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

fn host(step: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Host { step, source }
}

/// What serial ports are connected to, one after the other: it outlives the guest's resets.
/// Dropping it gives the terminal back.
pub struct Console {
    output: Output,
    keyboard: Option<Arc<Mutex<Keyboard>>>,
    /// The file to be emptied at the first port: a machine that cannot be built costs no old log.
    old_content: Option<File>,
    // Dropped after the output has ended, so that nothing is written to it any more.
    raw: Option<RawMode>,
}

/// A serial port's connection to the console. Dropping it ends the port's input.
pub struct Connection(Option<InputThread>);

struct InputThread {
    stop: EventFd,
    thread: JoinHandle<()>,
}

impl Console {
    /// Opens the console.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(config: &ConsoleConfig) -> Result<Self, Error> {
        Self::open_with(config, false)
    }

    /// Opens the console of a machine that goes on: a file keeps what it has, and more is written behind it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open_again(config: &ConsoleConfig) -> Result<Self, Error> {
        Self::open_with(config, true)
    }

    fn open_with(config: &ConsoleConfig, append: bool) -> Result<Self, Error> {
        let mut old_content = None;
        let output = match config {
            ConsoleConfig::Stdio => Output::to(io::stdout()),
            ConsoleConfig::Off => Output::to(io::sink()),
            ConsoleConfig::File(path) => {
                let file = create(path, append)?;
                old_content = file.try_clone().ok().filter(|_| !append);
                Output::to(file)
            }
        };
        let keyboard = match config {
            ConsoleConfig::Stdio => Some(Arc::new(Mutex::new(Keyboard::open()?))),
            ConsoleConfig::Off | ConsoleConfig::File(_) => None,
        };
        Ok(Self {
            output: output.map_err(host("starting its thread"))?,
            keyboard,
            old_content,
            raw: None,
        })
    }

    /// A serial port on this console, which interrupts by `interrupt`; the user's commands go to `command`.
    /// From the first port on, a terminal is in raw mode.
    ///
    /// # Errors
    /// The terminal, a thread or a descriptor cannot be had.
    pub fn connect<T: Trigger + Send + Sync + 'static>(
        &mut self,
        interrupt: T,
        command: impl Fn(Command) + Send + 'static,
        first: FirstState,
    ) -> Result<(Arc<SerialPort<T>>, Connection), Error> {
        if let Some(file) = self.old_content.take()
            && let Err(e) = file.set_len(0)
        {
            // A pipe or a device has nothing to empty.
            tracing::debug!("console file: {e}");
        }
        if self.raw.is_none() && self.keyboard.is_some() && io::stdin().is_terminal() {
            self.raw = Some(RawMode::enter().map_err(host("setting up the terminal"))?);
            print_help();
        }
        let room = event().map_err(host("creating an event"))?;
        let signal = room.try_clone().map_err(host("duplicating an event"))?;
        let port = Arc::new(SerialPort::new(interrupt, &self.output, signal, first));
        let input = self
            .keyboard
            .as_ref()
            .map(|keyboard| start_input(keyboard.clone(), port.clone(), room, command))
            .transpose()
            .map_err(host("starting the input thread"))?;
        Ok((port, Connection(input)))
    }
}

fn event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn print_help() {
    // Whoever closed standard error does not want to be told.
    let _ = writeln!(io::stderr(), "\n{HELP}");
}

fn start_input<T: Trigger + Send + Sync + 'static>(
    keyboard: Arc<Mutex<Keyboard>>,
    port: Arc<SerialPort<T>>,
    room: EventFd,
    command: impl Fn(Command) + Send + 'static,
) -> io::Result<InputThread> {
    let stop = event()?;
    let stopped = stop.try_clone()?;
    let thread = thread::Builder::new()
        .name("tv-input".into())
        .spawn(move || {
            // The connection before this one gave it back when it was dropped.
            let mut keyboard = keyboard.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(e) = keyboard.forward(&port, &room, &stopped, &command) {
                tracing::warn!("console input: {e}");
            }
        })?;
    Ok(InputThread { stop, thread })
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(input) = self.0.take() {
            let _ = input.stop.write(1);
            let _ = input.thread.join();
        }
    }
}

/// Opens the file without waiting for the reader that a pipe may lack.
fn create(path: &Path, append: bool) -> Result<File, Error> {
    let open = || {
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .append(append)
            .truncate(false)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)?;
        make_blocking(&file)?;
        Ok(file)
    };
    open().map_err(|source: io::Error| match source.raw_os_error() {
        Some(libc::ENXIO) => Error::NoReader(path.into()),
        _ => Error::File {
            path: path.into(),
            source,
        },
    })
}

fn make_blocking(file: &File) -> io::Result<()> {
    // SAFETY: reads the flags of an open descriptor.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: sets flags of an open descriptor.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Standard input, and what of it no guest has taken yet.
struct Keyboard {
    source: File,
    /// A user types: some keys are commands, and what a guest does not take may be dropped.
    is_terminal: bool,
    escape: Escape,
    pending: Vec<u8>,
}

impl Keyboard {
    fn open() -> Result<Self, Error> {
        // Not `io::stdin()`, whose buffer would hold input back that poll no longer tells of.
        let source = io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .map_err(host("duplicating standard input"))?;
        Ok(Self {
            is_terminal: source.is_terminal(),
            source: source.into(),
            escape: Escape::default(),
            pending: Vec::new(),
        })
    }

    /// Gives the guest its input, as it reads, until the input ends or `stop` is signalled.
    fn forward<T: Trigger>(
        &mut self,
        port: &SerialPort<T>,
        room: &EventFd,
        stop: &EventFd,
        command: &impl Fn(Command),
    ) -> io::Result<()> {
        loop {
            let taken = port.receive(&self.pending);
            self.pending.drain(..taken);
            let is_waiting = !self.pending.is_empty();
            let [stopped, has_room, readable] = wait([
                Some(stop.as_raw_fd()),
                is_waiting.then_some(room.as_raw_fd()),
                // A user is always heard. What a file or a pipe holds is safe there until it is wanted.
                (self.is_terminal || !is_waiting).then_some(self.source.as_raw_fd()),
            ])?;
            if stopped {
                return Ok(());
            }
            if has_room {
                let _ = room.read();
            }
            if readable && !self.read(command)? {
                return Ok(());
            }
        }
    }

    /// Reads once; false is the end of the input.
    fn read(&mut self, command: &impl Fn(Command)) -> io::Result<bool> {
        let mut input = [0; 512];
        let length = match self.source.read(&mut input) {
            Ok(0) => return Ok(false),
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(e) => return Err(e),
        };
        if !self.is_terminal {
            self.pending.extend(&input[..length]);
            return Ok(true);
        }
        match self.escape.filter(&input[..length], &mut self.pending) {
            Some(Command::Help) => print_help(),
            Some(given) => command(given),
            None => {}
        }
        self.pending.truncate(TYPED_AHEAD);
        Ok(true)
    }
}

/// Waits until one of the descriptors can be read or has ended, and says which.
fn wait(descriptors: [Option<RawFd>; 3]) -> io::Result<[bool; 3]> {
    // Of these three, poll alone takes plain files. It passes over negative descriptors.
    let mut polled = descriptors.map(|fd| libc::pollfd {
        fd: fd.unwrap_or(-1),
        events: libc::POLLIN,
        revents: 0,
    });
    loop {
        // SAFETY: the array is `polled.len()` structures, which the call may write.
        if unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) } >= 0 {
            return Ok(polled.map(|polled| polled.revents != 0));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;
    use std::os::fd::OwnedFd;
    use std::os::unix::ffi::OsStrExt;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::bus::MmioDevice;

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

    struct NoInterrupt;

    impl Trigger for NoInterrupt {
        type E = io::Error;
        fn trigger(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A serial port whose guest reads only when the test does, and what feeds it.
    struct Guest {
        port: Arc<SerialPort<NoInterrupt>>,
        commands: mpsc::Receiver<Command>,
        _output: Output,
        input: Connection,
    }

    fn guest_with(keyboard: &Arc<Mutex<Keyboard>>) -> Guest {
        let output = Output::to(io::sink()).unwrap();
        let room = event().unwrap();
        let signal = room.try_clone().unwrap();
        let port = SerialPort::new(NoInterrupt, &output, signal, FirstState::Reset);
        let port = Arc::new(port);
        let (sender, commands) = mpsc::channel();
        let input = start_input(keyboard.clone(), port.clone(), room, move |command| {
            let _ = sender.send(command);
        });
        Guest {
            port,
            commands,
            _output: output,
            input: Connection(Some(input.unwrap())),
        }
    }

    impl Guest {
        fn read(&self, count: usize) -> Vec<u8> {
            (0..count).map(|_| self.read_byte()).collect()
        }

        fn read_byte(&self) -> u8 {
            const LINE_STATUS: u64 = 5;
            let mut byte = [0];
            while byte[0] & 1 == 0 {
                thread::yield_now();
                self.port.read(LINE_STATUS, &mut byte);
            }
            self.port.read(0, &mut byte);
            byte[0]
        }
    }

    fn keyboard(source: impl Into<OwnedFd>, is_terminal: bool) -> Arc<Mutex<Keyboard>> {
        Arc::new(Mutex::new(Keyboard {
            source: File::from(source.into()),
            is_terminal,
            escape: Escape::default(),
            pending: Vec::new(),
        }))
    }

    fn some_text(length: u32) -> Vec<u8> {
        (0..length).map(|i| b'a' + (i % 26) as u8).collect()
    }

    #[test]
    fn an_old_log_is_there_until_there_is_a_machine_to_write_a_new_one() {
        let log = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(log.path(), "old").unwrap();

        let mut console = Console::open(&ConsoleConfig::File(log.path().into())).unwrap();
        let opened = std::fs::read_to_string(log.path()).unwrap();
        let _port = console
            .connect(NoInterrupt, |_| {}, FirstState::Reset)
            .unwrap();
        let connected = std::fs::read_to_string(log.path()).unwrap();

        assert_eq!((opened.as_str(), connected.as_str()), ("old", ""));
    }

    #[test]
    fn the_user_ends_a_machine_whose_guest_reads_nothing() {
        let (source, mut user) = io::pipe().unwrap();
        let guest = guest_with(&keyboard(source, true));

        user.write_all(&some_text(20_000)).unwrap();
        user.write_all(b"\x1dq").unwrap();

        let command = guest.commands.recv_timeout(Duration::from_secs(10));
        assert_eq!(command, Ok(Command::Quit));
    }

    #[test]
    fn what_a_user_types_ahead_is_kept_up_to_a_bound() {
        let (source, mut user) = io::pipe().unwrap();
        let keyboard = keyboard(source, true);
        let guest = guest_with(&keyboard);
        let typed = some_text(20_000);

        user.write_all(&typed).unwrap();
        user.write_all(b"\x1dq").unwrap();
        let command = guest.commands.recv_timeout(Duration::from_secs(10));
        drop(guest.input);

        assert_eq!(command, Ok(Command::Quit));
        assert_eq!(keyboard.lock().unwrap().pending.len(), TYPED_AHEAD);
    }

    #[test]
    fn a_slow_guest_gets_all_that_a_pipe_holds() {
        let (source, mut script) = io::pipe().unwrap();
        let guest = guest_with(&keyboard(source, false));
        let text = some_text(20_000);

        script.write_all(&text).unwrap();
        drop(script);

        assert!(guest.read(text.len()) == text);
    }

    #[test]
    fn a_guest_gets_all_that_a_file_holds() {
        let text = some_text(20_000);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&text).unwrap();
        file.rewind().unwrap();

        let guest = guest_with(&keyboard(file, false));

        assert!(guest.read(text.len()) == text);
    }

    #[test]
    fn after_a_reset_input_goes_on_behind_what_the_first_guest_was_given() {
        const FIFO: usize = 64;
        let (source, mut script) = io::pipe().unwrap();
        let keyboard = keyboard(source, false);
        let text = some_text(100);
        let first = guest_with(&keyboard);

        script.write_all(&text).unwrap();
        first.read(1);
        drop(first);
        let second = guest_with(&keyboard);

        assert_eq!(second.read(text.len() - FIFO), text[FIFO..]);
    }

    #[test]
    fn a_console_file_keeps_what_the_guest_wrote_before_its_reset() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut console = Console::open(&ConsoleConfig::File(path.clone())).unwrap();

        for text in [b"first", b"again"] {
            let (port, _input) = console
                .connect(NoInterrupt, |_| {}, FirstState::Reset)
                .unwrap();
            text.iter().for_each(|byte| port.write(0, &[*byte]));
        }
        drop(console);

        assert_eq!(std::fs::read(path).unwrap(), b"firstagain");
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the name is a string with a zero at its end.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);

        let console = Console::open(&ConsoleConfig::File(path));

        assert!(matches!(console, Err(Error::NoReader(_))));
    }

    #[test]
    fn a_console_file_waits_for_its_reader_once_it_is_open() {
        let folder = tempfile::tempdir().unwrap();
        let file = create(&folder.path().join("log"), false).unwrap();

        // SAFETY: reads the flags of an open descriptor.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };

        assert_eq!(flags & libc::O_NONBLOCK, 0);
    }
}
