//! Runs the commands that come over a socket, each in a process group of its own, in a thread of its own.
//!
//! A command's end is that of its first process: what that has left behind, such as a machine that runs on in the
//! background, goes on, and its output is nobody's any more. A command whose connection closes is killed with its group.

use std::ffi::OsString;
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::wire::{Command, Message};

/// As shells say it of a program that is not there, and of one that cannot be run.
const NOT_FOUND: u8 = 127;
const CANNOT_RUN: u8 = 126;

/// Variables that each host has of its own begin so.
const OWN_VARIABLES: &[u8] = b"PEER";

/// Runs the commands that come on `listener`, for ever.
pub fn serve(listener: &TcpListener) {
    for connection in listener.incoming() {
        std::thread::spawn(move || {
            if let Err(error) = connection.and_then(run) {
                eprintln!("peer-agent: {error}");
            }
        });
    }
}

/// Runs the one command that comes over `connection`.
fn run(mut connection: TcpStream) -> io::Result<()> {
    let Some(Message::Run(command)) = Message::read(&mut connection)? else {
        return Ok(());
    };
    connection.set_nodelay(true)?;
    let mut child = match start(&command) {
        Ok(child) => child,
        Err(error) => return refuse(&command, &error, &mut connection),
    };
    let group = Arc::new(Group::of(&child));
    let orders = connection.try_clone()?;
    let obeying = std::thread::spawn({
        let group = Arc::clone(&group);
        move || obey(orders, &group)
    });
    let relayed = relay(&mut child, &mut connection);
    if relayed.is_err() {
        group.signal(Signal::KILL);
    }
    group.forget();
    let status = status(child.wait()?);
    let told = relayed.and_then(|()| Message::Exit(status).write(&mut connection));
    // The other side may have closed it first.
    let _ = connection.shutdown(std::net::Shutdown::Both);
    let _ = obeying.join();
    told
}

fn start(command: &Command) -> io::Result<Child> {
    let Some((program, arguments)) = command.words.split_first() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    std::fs::create_dir_all(&command.folder)?;
    let own = std::env::vars_os().filter(|(name, _)| is_own(name.as_bytes()));
    std::process::Command::new(program)
        .args(arguments)
        .current_dir(&command.folder)
        .env_clear()
        .envs(command.environment.iter().filter_map(variable))
        .envs(own)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

/// Name and value of a variable that is the same on both hosts.
fn variable(pair: &OsString) -> Option<(OsString, OsString)> {
    let pair = pair.as_bytes();
    let at = pair.iter().position(|byte| *byte == b'=')?;
    let (name, value) = (&pair[..at], &pair[at + 1..]);
    let owned = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    (!is_own(name)).then(|| (owned(name), owned(value)))
}

fn is_own(name: &[u8]) -> bool {
    name.starts_with(OWN_VARIABLES)
}

fn refuse(command: &Command, error: &io::Error, connection: &mut TcpStream) -> io::Result<()> {
    let program = command.words[0].to_string_lossy();
    let text = format!("peer: cannot run {program}: {error}\n");
    Message::Err(text.into_bytes()).write(connection)?;
    let status = match error.kind() {
        io::ErrorKind::NotFound => NOT_FOUND,
        _ => CANNOT_RUN,
    };
    Message::Exit(status).write(connection)
}

/// A command's process group, until its first process is waited for: after that, the number may be another's.
struct Group(Mutex<Option<Pid>>);

impl Group {
    fn of(child: &Child) -> Self {
        Self(Mutex::new(Some(Pid::from_child(child))))
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // All in it may have ended.
            let _ = kill_process_group(group, signal);
        }
    }

    fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Passes on the signals that come over `connection`, and kills the group when it closes.
fn obey(mut connection: TcpStream, group: &Group) {
    while let Ok(Some(Message::Signal(number))) = Message::read(&mut connection) {
        if let Some(signal) = Signal::from_named_raw(number.into()) {
            group.signal(signal);
        }
    }
    group.signal(Signal::KILL);
}

/// Sends what `child` writes until it has ended and nothing that it wrote is left. Its end is not told by its pipes: others
/// may have them too.
fn relay(child: &mut Child, connection: &mut TcpStream) -> io::Result<()> {
    let ended = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let mut out = child.stdout.take();
    let mut err = child.stderr.take();
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let ready = readable(&[
            Some(ended.as_fd()),
            out.as_ref().map(AsFd::as_fd),
            err.as_ref().map(AsFd::as_fd),
        ])?;
        if ready[1] {
            relay_once(&mut out, Message::Out, &mut bytes, connection)?;
        }
        if ready[2] {
            relay_once(&mut err, Message::Err, &mut bytes, connection)?;
        }
        if ready == [true, false, false] {
            return Ok(());
        }
    }
}

/// Waits until one of `sources` can be read or has ended, and says of each whether it is so.
fn readable(sources: &[Option<BorrowedFd>; 3]) -> io::Result<[bool; 3]> {
    let mut wanted: Vec<PollFd> = sources
        .iter()
        .flatten()
        .map(|source| PollFd::from_borrowed_fd(*source, PollFlags::IN))
        .collect();
    rustix::io::retry_on_intr(|| poll(&mut wanted, None))?;
    let mut answers = wanted.iter().map(|source| !source.revents().is_empty());
    Ok(sources.map(|source| source.is_some() && answers.next() == Some(true)))
}

/// Passes on what `source` has; closes it if that is its end.
fn relay_once(
    source: &mut Option<impl Read>,
    message: impl FnOnce(Vec<u8>) -> Message,
    bytes: &mut [u8],
    connection: &mut TcpStream,
) -> io::Result<()> {
    let Some(pipe) = source else { return Ok(()) };
    match pipe.read(bytes)? {
        0 => *source = None,
        length => message(bytes[..length].to_vec()).write(connection)?,
    }
    Ok(())
}

/// As a shell's `$?`.
fn status(status: ExitStatus) -> u8 {
    let number = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    u8::try_from(number).unwrap_or(u8::MAX)
}
