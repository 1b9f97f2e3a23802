//! What stands between the client and the stub that gdbstub is: packets are taken from the stream whole, so that those that
//! gdbstub does not know can be answered before it sees them, and its answer to `qSupported` can say more.
//!
//! A packet is `$BODY#CC`, with `CC` the sum of the body's bytes in hexadecimal. Until the client has asked for it to end, each side
//! acknowledges packets by `+` (gdb's manual, "Overview" of the remote protocol).

use std::io::{self, Write};

use gdbstub::conn::Connection;

/// Bytes of the longest packet that is taken, frame and all.
pub const LONGEST: usize = 4096;

/// What came from the client.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// A byte outside of packets: an acknowledgement, an interrupt, or nonsense.
    Byte(u8),
    /// A packet.
    Packet(Vec<u8>),
}

/// A packet that is longer than any may be.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLong;

/// Takes packets from a stream.
#[derive(Default)]
pub struct Reader {
    packet: Vec<u8>,
    /// Digits of the checksum that have come.
    digits: Option<u8>,
}

impl Reader {
    /// Takes the next byte, and returns what it completes.
    pub fn push(&mut self, byte: u8) -> Result<Option<Frame>, TooLong> {
        if self.packet.is_empty() && byte != b'$' {
            return Ok(Some(Frame::Byte(byte)));
        }
        if self.packet.len() == LONGEST {
            return Err(TooLong);
        }
        self.packet.push(byte);
        self.digits = match (self.digits, byte) {
            (None, b'#') => Some(0),
            (None, _) => None,
            (Some(0), _) => Some(1),
            (Some(_), _) => {
                self.digits = None;
                return Ok(Some(Frame::Packet(std::mem::take(&mut self.packet))));
            }
        };
        Ok(None)
    }
}

/// The body of a packet, if its checksum is right.
pub fn body(packet: &mut [u8]) -> Option<&mut [u8]> {
    let (rest, digits) = packet.split_last_chunk_mut::<2>()?;
    let (_, rest) = rest.split_first_mut()?;
    let (_, body) = rest.split_last_mut()?;
    let said = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    (said == checksum(body)).then_some(body)
}

fn checksum(body: &[u8]) -> u8 {
    body.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The way to the client. What is written goes out when it is flushed.
pub struct Client<W> {
    stream: W,
    waiting: Vec<u8>,
    /// To be added to the next answer.
    addition: Option<&'static str>,
    /// The client wants packets acknowledged.
    acknowledges: bool,
    /// Acknowledgements that will come for packets that gdbstub did not send.
    expected: u32,
}

impl<W: Write> Client<W> {
    pub fn new(stream: W) -> Self {
        Self {
            stream,
            waiting: Vec::new(),
            addition: None,
            acknowledges: true,
            expected: 0,
        }
    }

    /// Adds a feature to the answer that gdbstub gives next.
    pub fn add_to_next_answer(&mut self, feature: &'static str) {
        self.addition = Some(feature);
    }

    /// The client is about to be told that there are no acknowledgements any more.
    pub fn end_acknowledgements(&mut self) {
        self.acknowledges = false;
    }

    /// Answers a packet that gdbstub is not to see.
    pub fn answer(&mut self, body: &[u8]) -> io::Result<()> {
        if self.acknowledges {
            self.waiting.push(b'+');
            self.expected += 1;
        }
        self.put(body)?;
        self.send()
    }

    /// Shows text to whoever sits at the client, which waits for the machine to stop (gdb's manual, "Stop Reply Packets": `O`).
    pub fn say(&mut self, text: &str) -> io::Result<()> {
        self.expected += u32::from(self.acknowledges);
        let mut body = vec![b'O'];
        for byte in text.bytes() {
            write!(body, "{byte:02x}")?;
        }
        self.put(&body)?;
        self.send()
    }

    fn put(&mut self, body: &[u8]) -> io::Result<()> {
        self.waiting.push(b'$');
        self.waiting.extend_from_slice(body);
        write!(self.waiting, "#{:02x}", checksum(body))
    }

    /// Whether an acknowledgement is for one of our own answers.
    pub fn takes_acknowledgement(&mut self) -> bool {
        let is_ours = self.expected > 0;
        self.expected -= u32::from(is_ours);
        is_ours
    }

    /// Puts the addition where the answer ends.
    fn add(&mut self) {
        let Some(feature) = self.addition.take() else {
            return;
        };
        let start = self.waiting.iter().position(|byte| *byte == b'$');
        let end = self.waiting.iter().rposition(|byte| *byte == b'#');
        let (Some(start), Some(end)) = (start, end) else {
            return;
        };
        self.waiting.truncate(end);
        self.waiting.push(b';');
        self.waiting.extend_from_slice(feature.as_bytes());
        let sum = checksum(&self.waiting[start + 1..]);
        self.waiting
            .extend_from_slice(format!("#{sum:02x}").as_bytes());
    }

    fn send(&mut self) -> io::Result<()> {
        let sent = self.stream.write_all(&self.waiting);
        self.waiting.clear();
        sent?;
        self.stream.flush()
    }
}

impl<W: Write> Connection for Client<W> {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.waiting.push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.waiting.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.add();
        self.send()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(bytes: &[u8]) -> Vec<Frame> {
        let mut reader = Reader::default();
        bytes
            .iter()
            .filter_map(|byte| reader.push(*byte).unwrap())
            .collect()
    }

    #[test]
    fn packets_are_told_from_what_is_between_them() {
        let frames = frames(b"+$g#67\x03$#00-");

        let packet = |text: &[u8]| Frame::Packet(text.to_vec());
        assert_eq!(
            frames,
            [
                Frame::Byte(b'+'),
                packet(b"$g#67"),
                Frame::Byte(3),
                packet(b"$#00"),
                Frame::Byte(b'-')
            ]
        );
    }

    #[test]
    fn a_body_is_what_its_checksum_says() {
        assert_eq!(body(&mut b"$g#67".to_vec()), Some(&mut b"g".to_vec()[..]));
        assert_eq!(body(&mut b"$#00".to_vec()), Some(&mut [][..]));
        assert_eq!(body(&mut b"$g#68".to_vec()), None);
        assert_eq!(body(&mut b"$g#\xff\xff".to_vec()), None);
    }

    #[test]
    fn a_packet_without_end_is_refused() {
        let mut reader = Reader::default();
        reader.push(b'$').unwrap();

        let refused = (0..LONGEST).find_map(|_| reader.push(b'x').err());

        assert_eq!(refused, Some(TooLong));
    }

    #[test]
    fn an_answer_of_ours_is_acknowledged_to_us() {
        let mut sent = Vec::new();
        let mut client = Client::new(&mut sent);

        client.answer(b"OK").unwrap();

        assert!(client.takes_acknowledgement());
        assert!(!client.takes_acknowledgement());
        assert_eq!(sent, b"+$OK#9a");
    }

    #[test]
    fn without_acknowledgements_there_are_none() {
        let mut sent = Vec::new();
        let mut client = Client::new(&mut sent);
        client.end_acknowledgements();

        client.answer(b"OK").unwrap();

        assert!(!client.takes_acknowledgement());
        assert_eq!(sent, b"$OK#9a");
    }

    #[test]
    fn a_feature_is_added_to_one_answer() {
        let mut sent = Vec::new();
        let mut client = Client::new(&mut sent);
        client.add_to_next_answer("b+");

        client.write_all(b"+$a#61").unwrap();
        client.flush().unwrap();
        client.write_all(b"$a#61").unwrap();
        client.flush().unwrap();

        // 'a' ';' 'b' '+': 0x61 + 0x3b + 0x62 + 0x2b.
        assert_eq!(sent, b"+$a;b+#29$a#61");
    }
}
