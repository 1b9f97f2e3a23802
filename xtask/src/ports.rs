//! The bytes between xtask and the host: one Unix socket for each port of QEMU's virtio-serial
//! device, so that output, errors and orders stay apart and every byte arrives as it is.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What the threads that read ports report.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// A line on the control port.
    Control(String),
    /// The end marker has come on an output port.
    Ended,
    /// Whoever reads our output has gone.
    ReaderGone,
    /// The socket of a port was closed.
    Closed,
}

/// Where the output of a port goes; can be changed between two jobs.
pub type Sink = Arc<Mutex<Box<dyn Write + Send>>>;

/// A sink that writes to `writer`.
pub fn sink(writer: impl Write + Send + 'static) -> Sink {
    Arc::new(Mutex::new(Box::new(writer)))
}

/// Waits until QEMU has connected to `listener`; `alive` says why it never will.
pub fn accept(
    listener: &UnixListener,
    mut alive: impl FnMut() -> Result<()>,
) -> Result<UnixStream> {
    const PATIENCE: Duration = Duration::from_secs(60);
    listener
        .set_nonblocking(true)
        .context("cannot use a socket")?;
    let started = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream
                    .set_nonblocking(false)
                    .context("cannot use a socket")?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => alive()?,
            Err(error) => return Err(error).context("cannot accept QEMU's connection"),
        }
        if started.elapsed() > PATIENCE {
            bail!(
                "QEMU did not connect to its ports in {} s",
                PATIENCE.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Listens at `folder/name`.
pub fn listen(folder: &Path, name: &str) -> Result<UnixListener> {
    let path = folder.join(name);
    UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))
}

/// Reports the lines that come on `stream`.
pub fn read_control(stream: UnixStream, events: &Sender<Event>) {
    let events = events.clone();
    std::thread::spawn(move || {
        use std::io::BufRead;
        for line in io::BufReader::new(stream).lines().map_while(io::Result::ok) {
            if events.send(Event::Control(line)).is_err() {
                return;
            }
        }
        // Nobody listens any more when this fails.
        let _ = events.send(Event::Closed);
    });
}

/// Writes what comes on `stream` to `sink` without the end markers, which are reported.
pub fn read_output(mut stream: UnixStream, marker: &str, sink: &Sink, events: &Sender<Event>) {
    let (sink, events) = (Arc::clone(sink), events.clone());
    let mut filter = MarkerFilter::new(marker);
    std::thread::spawn(move || {
        let mut chunk = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = stream.read(&mut chunk) {
            let (output, ended) = filter.feed(&chunk[..length]);
            if write(&sink, &output).is_err() {
                let _ = events.send(Event::ReaderGone);
                return;
            }
            for _ in 0..ended {
                let _ = events.send(Event::Ended);
            }
        }
        // The host died: what was held back is output after all.
        let _ = write(&sink, &filter.rest());
        let _ = events.send(Event::Closed);
    });
}

fn write(sink: &Sink, bytes: &[u8]) -> io::Result<()> {
    let mut writer = sink
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    writer.write_all(bytes)?;
    writer.flush()
}

/// Passes `input` on to `stream`, then ends that direction.
pub fn write_input(mut input: impl Read + Send + 'static, mut stream: UnixStream) {
    std::thread::spawn(move || {
        // When the host goes first, its end is reported by others.
        let _ = io::copy(&mut input, &mut stream);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        // The socket stays open: a full close could overtake bytes that QEMU has not read.
        std::mem::forget(stream);
    });
}

/// Finds and removes a marker in a stream that comes in pieces.
struct MarkerFilter {
    marker: Vec<u8>,
    held: Vec<u8>,
}

impl MarkerFilter {
    fn new(marker: &str) -> Self {
        Self {
            marker: marker.as_bytes().to_vec(),
            held: Vec::new(),
        }
    }

    /// Takes the next piece; returns what is surely output, and how many markers were complete.
    fn feed(&mut self, piece: &[u8]) -> (Vec<u8>, usize) {
        self.held.extend_from_slice(piece);
        let mut output = Vec::new();
        let mut ended = 0;
        while let Some(position) = find(&self.held, &self.marker) {
            output.extend(self.held.drain(..position));
            self.held.drain(..self.marker.len());
            ended += 1;
        }
        let keep = self.possible_start();
        output.extend(self.held.drain(..self.held.len() - keep));
        (output, ended)
    }

    fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }

    /// How many of the last bytes held may be the start of a marker.
    fn possible_start(&self) -> usize {
        let longest = self.held.len().min(self.marker.len() - 1);
        (0..=longest)
            .rev()
            .find(|length| self.held.ends_with(&self.marker[..*length]))
            .unwrap_or(0)
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let first = wanted.first()?;
    let mut from = 0;
    while let Some(offset) = bytes[from..].iter().position(|byte| byte == first) {
        let position = from + offset;
        if bytes[position..].starts_with(wanted) {
            return Some(position);
        }
        from = position + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_in_one_piece_is_removed_and_counted() {
        let mut filter = MarkerFilter::new("=END=");

        assert_eq!(filter.feed(b"output=END="), (b"output".to_vec(), 1));
        assert_eq!(filter.rest(), b"");
    }

    #[test]
    fn a_marker_in_many_pieces_is_removed() {
        let mut filter = MarkerFilter::new("=END=");

        let pieces: Vec<_> = b"a=E=END=b"
            .iter()
            .map(|byte| filter.feed(&[*byte]))
            .collect();

        let output: Vec<u8> = pieces
            .iter()
            .flat_map(|(output, _)| output.clone())
            .collect();
        assert_eq!(output, b"a=Eb");
        assert_eq!(pieces.iter().map(|(_, ended)| ended).sum::<usize>(), 1);
    }

    #[test]
    fn what_only_looks_like_a_marker_passes() {
        let mut filter = MarkerFilter::new("=END=");

        let (output, ended) = filter.feed(b"=EN");
        assert_eq!((output.as_slice(), ended), (b"".as_slice(), 0));
        assert_eq!(filter.feed(b"x"), (b"=ENx".to_vec(), 0));
    }

    #[test]
    fn what_is_held_back_is_not_lost_when_the_stream_ends() {
        let mut filter = MarkerFilter::new("=END=");

        filter.feed(b"=EN");

        assert_eq!(filter.rest(), b"=EN");
    }
}
