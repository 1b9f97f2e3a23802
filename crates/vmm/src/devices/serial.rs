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

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::MmioDevice;

/// Output waiting for its reader.
const OUTPUT_CAPACITY: usize = 1 << 20;
/// How long a vCPU waits for a reader that does not read before the byte is given up.
const PATIENCE: Duration = Duration::from_millis(500);

/// The serial port.
pub struct SerialPort<T: Trigger> {
    serial: Mutex<Serial<T, RoomForInput, OutputBuffer>>,
}

impl<T: Trigger> SerialPort<T> {
    /// A port that interrupts by `interrupt`, writes to `output`, and signals `room` whenever
    /// the guest has read all of its input.
    pub fn new(interrupt: T, output: &Output, room: EventFd) -> Self {
        Self {
            serial: Mutex::new(Serial::with_events(
                interrupt,
                RoomForInput(room),
                output.buffer.clone(),
            )),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Serial<T, RoomForInput, OutputBuffer>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest as much of `input` as the FIFO holds, and returns how much that was.
    pub fn receive(&self, input: &[u8]) -> usize {
        let mut serial = self.lock();
        if serial.fifo_capacity() == 0 {
            return 0;
        }
        serial.enqueue_raw_bytes(input).unwrap_or_else(|e| {
            tracing::warn!("serial port: {e:?}");
            0
        })
    }
}

impl<T: Trigger + Send> MmioDevice for SerialPort<T> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.lock().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data)
            && let Err(e) = self.lock().write(offset, *byte)
        {
            tracing::debug!("serial port: {e:?}");
        }
    }
}

/// Tells the input thread that the guest has read what was there.
struct RoomForInput(EventFd);

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
    /// Waits until everything was written, but not for a reader that does not read.
    fn drop(&mut self) {
        self.buffer.close();
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
    writing: bool,
    closed: bool,
    lost: u64,
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
            state.lost += bytes.len() as u64;
        } else {
            state.waiting.extend(bytes);
            self.0.added.notify_one();
        }
    }

    fn write_out(&self, mut writer: impl Write) {
        while let Some((bytes, lost)) = self.take() {
            let mut result = writer.write_all(&bytes);
            if lost != 0 {
                result = result.and_then(|()| {
                    write!(
                        writer,
                        "\r\n[tagvisor: {lost} bytes of console output lost: nobody read them]\r\n"
                    )
                });
            }
            if let Err(e) = result.and_then(|()| writer.flush()) {
                tracing::debug!("console: {e}");
            }
            self.state().writing = false;
            self.0.written.notify_all();
        }
    }

    /// Waits for output. `None` when the port is closed and all was taken.
    fn take(&self) -> Option<(Vec<u8>, u64)> {
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
        state.writing = true;
        let lost = std::mem::take(&mut state.lost);
        Some((state.waiting.drain(..).collect(), lost))
    }

    fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        self.0.added.notify_one();
        let _drained = self.0.written.wait_timeout_while(state, PATIENCE, |state| {
            state.writing || !state.waiting.is_empty()
        });
    }
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

    fn port(output: &Output) -> (SerialPort<Pulse>, mpsc::Receiver<()>, EventFd) {
        let (pulse, pulses) = mpsc::channel();
        let room = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let port = SerialPort::new(Pulse(pulse), output, room.try_clone().unwrap());
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
        let (_hold, held) = mpsc::channel();
        let output = Output::to(Stalled(held)).unwrap();
        let begun = std::time::Instant::now();

        output.buffer.push(&vec![b'a'; OUTPUT_CAPACITY]);
        output.buffer.push(&vec![b'b'; OUTPUT_CAPACITY]);
        for _ in 0..1000 {
            output.buffer.push(b"c");
        }

        assert!(begun.elapsed() < 3 * PATIENCE);
    }

    #[test]
    fn accesses_wider_than_a_byte_do_nothing() {
        let output = Output::to(io::sink()).unwrap();
        let (port, _pulses, _room) = port(&output);
        let mut data = [0; 4];

        port.write(DATA, &[1; 8]);
        port.read(LINE_STATUS, &mut data);

        assert_eq!(data, [0; 4]);
    }
}
