//! A debugger on a machine: gdb's remote protocol, with memory tags.
//!
//! [`serve`] speaks with one client until it detaches or is gone. What it debugs is a [`Debuggee`], whose vCPUs stand at the
//! beginning and at the end, without a trace of the client's breakpoints. The protocol is gdbstub's; packets that it does not
//! know are taken out of the stream before it (`wire.rs`): those of memory tags ([`memory_tags`]), and lldb's for the regions that
//! may have them.
//!
//! The guest's own BRK instructions stay the guest's: where a debugger has BRK instructions of its own in memory, the hypervisor
//! lets all of them out, and those that are not the debugger's are given back as the exceptions that they would have been.
//!
//! A client can do with the guest what it likes, and nothing else: what it sends is bounded before it is taken, and nonsense ends
//! the connection.

mod breakpoints;
mod exception;
pub mod memory_tags;
mod registers;
mod target;
#[cfg(test)]
mod tests;
mod translation;
mod wire;

use std::io::{self, Write};
use std::ops::Range;

use engine::{DebugExit, Vcpu};
use gdbstub::common::Signal;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub};
use mte::TagPage;

use memory_tags::{Errno, FEATURE, Packet, refuse};
use target::{Stop, Stub};
use wire::{Client, Frame, LONGEST, Reader};

pub use target::MOST_GRANULES;

/// What a debuggee hears of.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The client sent something.
    Input(Vec<u8>),
    /// The client is gone, or has to go.
    Gone,
    /// A vCPU came to what it was set to stop at ([`engine::Vcpu::set_debug`]). All vCPUs stand.
    Stopped {
        /// Its number.
        vcpu: usize,
        /// To what.
        exit: DebugExit,
    },
    /// The machine has ended. All vCPUs stand.
    Ended(Last),
}

/// The last that a client hears of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Last {
    /// Whether it is to be told of a program that was killed, or else of one that ended by itself.
    pub killed: bool,
    /// A sentence for whoever sits at it.
    pub words: String,
}

/// A machine in a debugger's hands.
///
/// Addresses are guest-physical. vCPUs are numbered from 0 on.
pub trait Debuggee {
    /// Its vCPUs.
    type Vcpu: Vcpu;

    /// How many vCPUs there are.
    fn vcpu_count(&self) -> usize;

    /// A vCPU that stands.
    fn vcpu(&self, number: usize) -> Option<&Self::Vcpu>;

    /// Where RAM is: whole pages.
    fn ram(&self) -> Range<u64>;

    /// Whether RAM has tags.
    fn has_tags(&self) -> bool;

    /// Reads RAM.
    ///
    /// # Errors
    /// It is no RAM, or the host says no.
    fn read(&self, address: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes RAM. What is written can be executed at once.
    ///
    /// # Errors
    /// It is no RAM, or the host says no.
    fn write(&mut self, address: u64, data: &[u8]) -> io::Result<()>;

    /// Reads the tags of a page of 4 KiB, by its number.
    ///
    /// # Errors
    /// It has none, or the host says no.
    fn read_tags(&self, page: u64, tags: &mut TagPage) -> io::Result<()>;

    /// Writes the tags of a page of 4 KiB, by its number.
    ///
    /// # Errors
    /// It has none, or the host says no.
    fn write_tags(&mut self, page: u64, tags: &TagPage) -> io::Result<()>;

    /// Lets some vCPUs run. Nothing happens if any do.
    ///
    /// # Errors
    /// The host says no.
    fn resume(&mut self, vcpus: &[usize]) -> io::Result<()>;

    /// Stops the vCPUs that run.
    fn stop(&mut self);

    /// Waits for what comes next.
    fn wait(&mut self) -> Event;
}

/// Why a debugger had to go.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be told anything any more.
    #[error("the debugger's connection: {0}")]
    Client(#[source] io::Error),
    /// What it sent makes no sense.
    #[error("the debugger sends what is not gdb's remote protocol: {0}")]
    Protocol(String),
    /// The machine did not do as it was told.
    #[error("the machine does not go on: {0}")]
    Machine(#[source] io::Error),
    /// A vCPU did not do as it was told.
    #[error(transparent)]
    Vcpu(#[from] engine::Error),
    /// A vCPU is not there any more.
    #[error("a vCPU is gone")]
    Gone,
}

/// How it ended with a debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It detached, or wanted the machine killed, which a debugger cannot.
    Detached,
    /// It was gone.
    Gone,
    /// The machine ended.
    Ended,
}

type Machine<'s, 'd, D, W> = GdbStubStateMachine<'s, Stub<'d, D>, Client<W>>;

/// Debugs `machine`, whose vCPUs stand, for a client that is written to by `client` and read from by [`Debuggee::wait`]. At the
/// end the vCPUs stand, and none of the client's breakpoints is left.
///
/// # Errors
/// See [`Error`].
pub fn serve<D: Debuggee>(machine: &mut D, client: impl Write) -> Result<End, Error> {
    let mut target = Stub::new(machine);
    let mut reader = Reader::default();
    let mut stub = GdbStub::builder(Client::new(client))
        .packet_buffer_size(LONGEST)
        .build()
        .map_err(|e| Error::Protocol(e.to_string()))?
        .run_state_machine(&mut target)
        .map_err(failure)?;
    loop {
        match target.machine().wait() {
            Event::Input(bytes) => {
                for byte in bytes {
                    let frame = reader.push(byte).map_err(|_| {
                        Error::Protocol(format!("a packet of more than {LONGEST} bytes"))
                    })?;
                    if let Some(frame) = frame {
                        stub = hear(stub, &mut target, frame)?;
                    }
                    if let GdbStubStateMachine::Disconnected(stub) = &stub {
                        return Ok(match stub.get_reason() {
                            DisconnectReason::TargetExited(_)
                            | DisconnectReason::TargetTerminated(_) => End::Ended,
                            DisconnectReason::Disconnect | DisconnectReason::Kill => End::Detached,
                        });
                    }
                }
            }
            Event::Stopped { vcpu, exit } => {
                if let Some(reason) = target.stopped(vcpu, exit)? {
                    stub = report(stub, &mut target, reason)?;
                }
            }
            Event::Gone => return Ok(End::Gone),
            Event::Ended(last) => {
                tell_end(stub, &mut target, &last)?;
                return Ok(End::Ended);
            }
        }
    }
}

/// Tells the client of a stop, if it waits for one.
fn report<'s, 'd, D: Debuggee, W: Write>(
    stub: Machine<'s, 'd, D, W>,
    target: &mut Stub<'d, D>,
    reason: Stop,
) -> Result<Machine<'s, 'd, D, W>, Error> {
    match stub {
        GdbStubStateMachine::Running(stub) => stub.report_stop(target, reason).map_err(failure),
        stub => Ok(stub),
    }
}

/// Tells the client that the machine is no more, if it waits for it: nothing may be said to one that does not.
fn tell_end<'s, 'd, D: Debuggee, W: Write>(
    mut stub: Machine<'s, 'd, D, W>,
    target: &mut Stub<'d, D>,
    last: &Last,
) -> Result<(), Error> {
    if let GdbStubStateMachine::Running(running) = &mut stub {
        let line = format!("{}\n", last.words);
        running.borrow_conn().say(&line).map_err(Error::Client)?;
    }
    let reason = match last.killed {
        true => Stop::Terminated(Signal::SIGKILL),
        false => Stop::Exited(0),
    };
    report(stub, target, reason).map(drop)
}

/// Takes what the client said.
fn hear<'s, 'd, D: Debuggee, W: Write>(
    mut stub: Machine<'s, 'd, D, W>,
    target: &mut Stub<'d, D>,
    frame: Frame,
) -> Result<Machine<'s, 'd, D, W>, Error> {
    match frame {
        Frame::Byte(b'+') if client(&mut stub).is_some_and(Client::takes_acknowledgement) => {
            Ok(stub)
        }
        // Anything else between packets means nothing.
        Frame::Byte(byte @ (b'+' | b'-' | INTERRUPT)) => pass(stub, target, &[byte]),
        Frame::Byte(_) => Ok(stub),
        Frame::Packet(mut packet) => {
            let is_idle = matches!(stub, GdbStubStateMachine::Idle(_));
            let whole = packet.clone();
            if let Some(body) = wire::body(&mut packet)
                && let Some(client) = client(&mut stub)
            {
                if is_idle && let Some(answer) = answer(target, body) {
                    client.answer(&answer).map_err(Error::Client)?;
                    return Ok(stub);
                }
                if body.starts_with(b"qSupported") && target.machine().has_tags() {
                    client.add_to_next_answer(FEATURE);
                }
                let ends_acknowledgements = body == b"QStartNoAckMode";
                stub = pass(stub, target, &whole)?;
                if let Some(client) = self::client(&mut stub).filter(|_| ends_acknowledgements) {
                    client.end_acknowledgements();
                }
                return Ok(stub);
            }
            Err(Error::Protocol("a packet whose checksum is wrong".into()))
        }
    }
}

/// Ctrl-C.
const INTERRUPT: u8 = 3;

/// The answer to a packet that gdbstub does not know, or would take at its word.
fn answer<D: Debuggee>(target: &mut Stub<'_, D>, body: &mut [u8]) -> Option<Vec<u8>> {
    let mut answer = Vec::new();
    let mut reply = |bytes: &[u8]| answer.extend_from_slice(bytes);
    if let Some(range) = body.strip_prefix(b"m".as_slice())
        && !is_sound(range)
    {
        refuse(Errno::INVALID, &mut reply);
        return Some(answer);
    }
    if let Some(address) = body.strip_prefix(b"qMemoryRegionInfo:".as_slice()) {
        match region(target, address) {
            Ok(region) => reply(region.as_bytes()),
            Err(errno) => refuse(errno, &mut reply),
        }
        return Some(answer);
    }
    match Packet::parse(body)? {
        Ok(packet) => packet.answer(target, &mut reply),
        Err(_) => refuse(Errno::INVALID, &mut reply),
    }
    Some(answer)
}

/// The answer to `qMemoryRegionInfo:ADDRESS` (lldb's "GDB Remote Protocol Extensions"). A guest's permissions are of its levels;
/// the debugger has all.
fn region<D: Debuggee>(target: &mut Stub<'_, D>, address: &[u8]) -> Result<String, Errno> {
    let region = target.region(number(address).ok_or(Errno::INVALID)?)?;
    let Range { start, end } = region.addresses;
    let what = match (region.is_ram, target.machine().has_tags()) {
        (true, true) => "permissions:rwx;flags:mt;",
        (true, false) => "permissions:rwx;",
        (false, _) => "",
    };
    Ok(format!("start:{start:x};size:{:x};{what}", end - start))
}

/// Whether a read of memory is one that fits a packet and the address space: gdbstub reads and sends whatever it is asked
/// for, and adds without looking.
fn is_sound(range: &[u8]) -> bool {
    let mut numbers = range.splitn(2, |byte| *byte == b',').map(number);
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(address), Some(length)) => {
            length <= LONGEST as u64 && address.checked_add(length).is_some()
        }
        _ => false,
    }
}

/// A hexadecimal number.
fn number(text: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok()
}

/// The way to the client, in whatever state the stub is.
fn client<'a, D: Debuggee, W: Write>(
    stub: &'a mut Machine<'_, '_, D, W>,
) -> Option<&'a mut Client<W>> {
    match stub {
        GdbStubStateMachine::Idle(stub) => Some(stub.borrow_conn()),
        GdbStubStateMachine::Running(stub) => Some(stub.borrow_conn()),
        GdbStubStateMachine::CtrlCInterrupt(stub) => Some(stub.borrow_conn()),
        GdbStubStateMachine::Disconnected(_) => None,
    }
}

/// Gives bytes to gdbstub.
fn pass<'s, 'd, D: Debuggee, W: Write>(
    mut stub: Machine<'s, 'd, D, W>,
    target: &mut Stub<'d, D>,
    bytes: &[u8],
) -> Result<Machine<'s, 'd, D, W>, Error> {
    for byte in bytes {
        let runs = matches!(stub, GdbStubStateMachine::Running(_));
        stub = match stub {
            GdbStubStateMachine::Idle(stub) => stub.incoming_data(target, *byte),
            GdbStubStateMachine::Running(stub) => stub.incoming_data(target, *byte),
            stub => Ok(stub),
        }
        .map_err(failure)?;
        if let GdbStubStateMachine::CtrlCInterrupt(interrupted) = stub {
            // A guest that stands already is not stopped once more when it goes on.
            let reason = runs.then(|| target.interrupt());
            stub = interrupted
                .interrupt_handled(target, reason)
                .map_err(failure)?;
        }
    }
    Ok(stub)
}

fn failure(error: gdbstub::stub::GdbStubError<Error, io::Error>) -> Error {
    let text = error.to_string();
    if error.is_connection_error() {
        return match error.into_connection_error() {
            Some((error, _)) => Error::Client(error),
            None => Error::Protocol(text),
        };
    }
    match error.into_target_error() {
        Some(error) => error,
        None => Error::Protocol(text),
    }
}
