//! The serial port, a 16550A: the guest's console.
//!
//! Three parties meet here. A vCPU that writes a byte puts it into the [`Output`]'s buffer; a
//! thread of its own takes it from there to the terminal or file, so that a reader who is slow or
//! gone never holds a vCPU for long. Another thread takes input from the terminal to the port's
//! 64-byte FIFO, as fast as the guest empties it. The port itself is vm-superio's.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::MmioDevice;

/// Output waiting for its reader.
const OUTPUT_CAPACITY: usize = 1 << 20;
/// How long a vCPU waits for a reader that does not read before the byte is given up.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long the program's end waits for a reader: the last lines say why a guest died.
const LAST_PATIENCE: Duration = Duration::from_secs(5);

/// The registers of the port, and input that the guest has yet to read, in a snapshot. The default is a port after reset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialPortState(#[serde(with = "SerialStateFields")] SerialState);

#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct SerialStateFields {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// A saved port holds more input than a port can.
#[derive(Debug, thiserror::Error)]
#[error("the saved serial port holds more input than one has room for")]
pub struct TooMuchInput;

/// In what a port begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstState {
    /// As after a reset.
    Reset,
    /// In one that is still to come, by [`SerialPort::restore`]: until then it takes no input, which has to come behind
    /// what the guest was given before.
    Awaited,
}

/// The serial port.
pub struct SerialPort<T: Trigger> {
    port: Mutex<Port<T>>,
}

struct Port<T: Trigger> {
    serial: Serial<Line<T>, RoomForInput, OutputBuffer>,
    awaits_state: bool,
}

/// The port's interrupt, which outlasts a change of the port's state.
struct Line<T>(Arc<T>);

impl<T: Trigger> Trigger for Line<T> {
    type E = T::E;

    fn trigger(&self) -> Result<(), T::E> {
        self.0.trigger()
    }
}

impl<T: Trigger> SerialPort<T> {
    /// A port that interrupts by `interrupt`, writes to `output`, and signals `room` whenever
    /// there is room for more input.
    pub fn new(interrupt: T, output: &Output, room: EventFd, first: FirstState) -> Self {
        Self {
            port: Mutex::new(Port {
                serial: Serial::with_events(
                    Line(Arc::new(interrupt)),
                    RoomForInput(Arc::new(room)),
                    output.buffer.clone(),
                ),
                awaits_state: first == FirstState::Awaited,
            }),
        }
    }

    /// What a snapshot must hold of the port.
    pub fn state(&self) -> SerialPortState {
        SerialPortState(self.lock().serial.state())
    }

    /// Goes on from `state`.
    ///
    /// # Errors
    /// The state is none of such a port.
    pub fn restore(&self, state: &SerialPortState) -> Result<(), TooMuchInput> {
        let mut port = self.lock();
        let line = Line(port.serial.interrupt_evt().0.clone());
        let room = RoomForInput(port.serial.events().0.clone());
        let output = port.serial.writer().clone();
        port.serial = Serial::from_state(&state.0, line, room, output).map_err(|_| TooMuchInput)?;
        port.awaits_state = false;
        port.serial.events().in_buffer_empty();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Port<T>> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest as much of `input` as the FIFO holds, and returns how much that was.
    pub fn receive(&self, input: &[u8]) -> usize {
        let mut port = self.lock();
        if port.awaits_state || port.serial.fifo_capacity() == 0 {
            return 0;
        }
        port.serial.enqueue_raw_bytes(input).unwrap_or_else(|e| {
            tracing::warn!("serial port: {e:?}");
            0
        })
    }
}

impl<T: Trigger + Send + Sync> MmioDevice for SerialPort<T> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.lock().serial.read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data)
            && let Err(e) = self.lock().serial.write(offset, *byte)
        {
            tracing::debug!("serial port: {e:?}");
        }
    }
}

/// Tells the input thread that there is room for input: the guest has read what was there.
struct RoomForInput(Arc<EventFd>);

impl SerialEvents for RoomForInput {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // The counter cannot overflow before the input thread takes it, and what it wakes for is state, not a count.
        let _ = self.0.write(1);
    }
}

/// Where the guest's output goes, and the thread that takes it there.
pub struct Output {
    buffer: OutputBuffer,
}

impl Output {
    /// Output to `writer`.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn to(writer: impl Write + Send + 'static) -> io::Result<Self> {
        let buffer = OutputBuffer(Arc::default());
        let taken = buffer.clone();
        thread::Builder::new()
            .name("tv-console".into())
            .spawn(move || taken.write_out(writer))?;
        Ok(Self { buffer })
    }
}

impl Drop for Output {
    /// Waits until everything was written, but not for ever for a reader that does not read.
    fn drop(&mut self) {
        let lost = self.buffer.close(LAST_PATIENCE);
        if lost != 0 {
            tracing::warn!("the last {lost} bytes of console output are lost: nobody read them");
        }
    }
}

#[derive(Clone)]
struct OutputBuffer(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<OutputState>,
    /// Something was added, or the port was closed.
    added: Condvar,
    /// Everything there was is written.
    written: Condvar,
}

#[derive(Default)]
struct OutputState {
    waiting: VecDeque<u8>,
    /// How many bytes the writer has taken and not yet written.
    writing: usize,
    closed: bool,
    /// How many bytes were given up, because `waiting` was full, since the writer last took any.
    lost: usize,
}

impl OutputBuffer {
    fn state(&self) -> MutexGuard<'_, OutputState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let (mut state, _) = self
            .0
            .written
            .wait_timeout_while(self.state(), PATIENCE, |state| {
                state.waiting.len() + bytes.len() > OUTPUT_CAPACITY && state.lost == 0
            })
            .unwrap_or_else(PoisonError::into_inner);
        if state.waiting.len() + bytes.len() > OUTPUT_CAPACITY {
            state.lost += bytes.len();
        } else {
            state.waiting.extend(bytes);
            self.0.added.notify_one();
        }
    }

    fn write_out(&self, mut writer: impl Write) {
        let mut has_failed = false;
        while let Some((bytes, lost)) = self.take() {
            if let Err(e) = write_batch(&mut writer, &bytes, lost)
                && !std::mem::replace(&mut has_failed, true)
            {
                tracing::warn!("console output is lost: {e}; this is said once");
            }
            self.state().writing = 0;
            self.0.written.notify_all();
        }
    }

    /// Waits for output. `None` when the port is closed and all was taken.
    fn take(&self) -> Option<(Vec<u8>, usize)> {
        let mut state = self
            .0
            .added
            .wait_while(self.state(), |state| {
                state.waiting.is_empty() && !state.closed
            })
            .unwrap_or_else(PoisonError::into_inner);
        if state.waiting.is_empty() {
            return None;
        }
        state.writing = state.waiting.len();
        let lost = std::mem::take(&mut state.lost);
        Some((state.waiting.drain(..).collect(), lost))
    }

    /// Waits for the writer, `patience` at most, and returns how many bytes were not written by then.
    fn close(&self, patience: Duration) -> usize {
        let mut state = self.state();
        state.closed = true;
        self.0.added.notify_one();
        let (state, _) = self
            .0
            .written
            .wait_timeout_while(state, patience, |state| state.unwritten() != 0)
            .unwrap_or_else(PoisonError::into_inner);
        state.unwritten()
    }
}

impl OutputState {
    fn unwritten(&self) -> usize {
        self.writing + self.waiting.len() + self.lost
    }
}

fn write_batch(writer: &mut impl Write, bytes: &[u8], lost: usize) -> io::Result<()> {
    writer.write_all(bytes)?;
    if lost != 0 {
        write!(
            writer,
            "\r\n[tagvisor: {lost} bytes of console output lost: nobody read them]\r\n"
        )?;
    }
    writer.flush()
}

impl Write for OutputBuffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;
    const SCRATCH: u64 = 7;
    const DATA_READY: u8 = 1;

    struct Pulse(mpsc::Sender<()>);

    impl Trigger for Pulse {
        type E = mpsc::SendError<()>;
        fn trigger(&self) -> Result<(), Self::E> {
            self.0.send(())
        }
    }

    /// Hands everything that is written to a channel.
    struct Reader(mpsc::Sender<Vec<u8>>);

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Never takes anything until it is let go.
    struct Stalled(mpsc::Receiver<()>);

    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Takes nothing until the other side is gone, and then everything.
    struct HeldReader(mpsc::Receiver<()>, Reader);

    impl Write for HeldReader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            self.1.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A disk that is full.
    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn wait_until_written(buffer: &OutputBuffer) {
        let state = buffer
            .0
            .written
            .wait_while(buffer.state(), |state| state.unwritten() != 0);
        drop(state);
    }

    fn port(output: &Output) -> (SerialPort<Pulse>, mpsc::Receiver<()>, EventFd) {
        port_in(output, FirstState::Reset)
    }

    fn port_in(
        output: &Output,
        first: FirstState,
    ) -> (SerialPort<Pulse>, mpsc::Receiver<()>, EventFd) {
        let (pulse, pulses) = mpsc::channel();
        let room = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let signal = room.try_clone().unwrap();
        let port = SerialPort::new(Pulse(pulse), output, signal, first);
        (port, pulses, room)
    }

    #[test]
    fn what_the_guest_writes_reaches_the_reader_in_order() {
        let (sender, received) = mpsc::channel();
        let output = Output::to(Reader(sender)).unwrap();
        let (port, _pulses, _room) = port(&output);

        for byte in b"tags" {
            port.write(DATA, &[*byte]);
        }
        drop(output);

        let text: Vec<u8> = received.try_iter().flatten().collect();
        assert_eq!(text, b"tags");
    }

    #[test]
    fn input_interrupts_the_guest_and_room_is_signalled_when_it_was_read() {
        let output = Output::to(io::sink()).unwrap();
        let (port, pulses, room) = port(&output);
        port.write(INTERRUPT_ENABLE, &[1]);

        let taken = port.receive(b"x");
        let mut status = [0];
        port.read(LINE_STATUS, &mut status);
        let mut byte = [0];
        port.read(DATA, &mut byte);

        assert_eq!(taken, 1);
        assert_eq!(status[0] & DATA_READY, DATA_READY);
        assert_eq!(byte, *b"x");
        assert!(pulses.try_recv().is_ok());
        assert!(room.read().is_ok());
    }

    #[test]
    fn input_beyond_the_fifo_is_left_with_the_sender() {
        let output = Output::to(io::sink()).unwrap();
        let (port, _pulses, _room) = port(&output);

        let taken = port.receive(&[b'a'; 100]);
        let more = port.receive(b"b");

        assert_eq!(taken, 64);
        assert_eq!(more, 0);
    }

    #[test]
    fn a_reader_that_does_not_read_costs_output_and_holds_nobody() {
        let (hold, held) = mpsc::channel();
        let output = Output::to(Stalled(held)).unwrap();
        let begun = std::time::Instant::now();

        output.buffer.push(&vec![b'a'; OUTPUT_CAPACITY]);
        output.buffer.push(&vec![b'b'; OUTPUT_CAPACITY]);
        for _ in 0..1000 {
            output.buffer.push(b"c");
        }

        assert!(begun.elapsed() < 3 * PATIENCE);
        drop(hold);
    }

    #[test]
    fn what_a_reader_missed_is_said_when_it_reads_again() {
        let (hold, held) = mpsc::channel();
        let (sender, received) = mpsc::channel();
        let buffer = OutputBuffer(Arc::default());

        buffer.push(&vec![b'a'; OUTPUT_CAPACITY]);
        buffer.push(b"bc");
        let writer = buffer.clone();
        let thread = thread::spawn(move || writer.write_out(HeldReader(held, Reader(sender))));
        drop(hold);
        let unwritten = buffer.close(Duration::from_secs(10));
        thread.join().unwrap();

        let text: Vec<u8> = received
            .try_iter()
            .flatten()
            .skip(OUTPUT_CAPACITY)
            .collect();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "\r\n[tagvisor: 2 bytes of console output lost: nobody read them]\r\n"
        );
        assert_eq!(unwritten, 0);
    }

    #[test]
    fn the_end_waits_for_a_slow_reader() {
        let (hold, held) = mpsc::channel();
        let (sender, received) = mpsc::channel();
        let output = Output::to(HeldReader(held, Reader(sender))).unwrap();
        output.buffer.push(b"Kernel panic");

        let slow = thread::spawn(move || {
            thread::sleep(2 * PATIENCE);
            drop(hold);
        });
        drop(output);

        let text: Vec<u8> = received.try_iter().flatten().collect();
        assert_eq!(text, b"Kernel panic");
        slow.join().unwrap();
    }

    #[test]
    fn what_nobody_read_at_the_end_is_counted() {
        let (_hold, held) = mpsc::channel();
        let buffer = OutputBuffer(Arc::default());
        buffer.push(b"abc");
        let writer = buffer.clone();
        thread::spawn(move || writer.write_out(Stalled(held)));

        assert_eq!(buffer.close(Duration::from_millis(50)), 3);
    }

    #[test]
    fn a_full_disk_is_told_of_once() {
        let (sender, logged) = mpsc::channel();
        let log = tracing_subscriber::fmt()
            .with_writer(move || Reader(sender.clone()))
            .finish();
        let buffer = OutputBuffer(Arc::default());
        let guest = buffer.clone();
        let writer = thread::spawn(move || {
            tracing::subscriber::with_default(log, || buffer.write_out(Full));
        });

        guest.push(b"a");
        wait_until_written(&guest);
        guest.push(b"b");
        guest.close(Duration::from_secs(10));
        writer.join().unwrap();

        let lines: Vec<_> = logged.try_iter().collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(
            String::from_utf8_lossy(&lines[0]).contains("console output is lost: no storage space")
        );
    }

    #[test]
    fn a_port_goes_on_from_anothers_state_with_its_own_interrupt_and_output() {
        let (sender, received) = mpsc::channel();
        let output = Output::to(Reader(sender)).unwrap();
        let (other, ..) = port(&output);
        other.write(SCRATCH, &[0x5a]);
        other.write(INTERRUPT_ENABLE, &[1]);
        other.receive(b"x");
        let (port, pulses, _room) = port(&output);

        port.restore(&other.state()).unwrap();

        assert_eq!(port.state(), other.state());
        assert!(pulses.try_recv().is_ok());
        port.write(DATA, b"y");
        drop(output);
        assert_eq!(received.try_iter().flatten().collect::<Vec<_>>(), b"y");
    }

    #[test]
    fn input_waits_for_the_state_that_it_comes_behind() {
        let output = Output::to(io::sink()).unwrap();
        let (other, ..) = port(&output);
        other.receive(b"first");
        let (port, _pulses, room) = port_in(&output, FirstState::Awaited);

        let before = port.receive(b"second");
        port.restore(&other.state()).unwrap();
        let has_room = room.read().is_ok();
        let after = port.receive(b"second");

        assert_eq!((before, has_room, after), (0, true, 6));
        let mut read = [0; 11];
        for byte in read.chunks_mut(1) {
            port.read(DATA, byte);
        }
        assert_eq!(&read, b"firstsecond");
    }

    #[test]
    fn a_state_with_more_input_than_the_fifo_holds_is_refused() {
        let output = Output::to(io::sink()).unwrap();
        let (port, ..) = port(&output);
        let mut state = port.state();
        state.0.in_buffer = vec![0; 65];

        assert!(port.restore(&state).is_err());
    }

    #[test]
    fn accesses_wider_than_a_byte_do_nothing() {
        let output = Output::to(io::sink()).unwrap();
        let (port, _pulses, _room) = port(&output);
        let mut data = [0; 4];
        let mut scratch = [0];
        port.write(SCRATCH, &[0x5a]);

        port.write(SCRATCH, &[1; 8]);
        port.read(LINE_STATUS, &mut data);
        port.read(SCRATCH, &mut scratch);

        assert_eq!((data, scratch), ([0; 4], [0x5a]));
    }
}
