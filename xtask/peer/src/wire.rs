//! The messages between `peer` and `peer-agent`: a byte for the kind, the length as four bytes, big-endian, and the content.
//!
//! ```text
//! peer        Run (once), then Signal …
//! peer-agent  Out and Err …, then Exit (once)
//! ```

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// The content of a message is no longer than this.
const LONGEST: usize = 1 << 20;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Run a command.
    Run(Command),
    /// Send the command a signal, which has this number.
    Signal(u8),
    /// What the command has written to its standard output.
    Out(Vec<u8>),
    /// What the command has written to its standard error.
    Err(Vec<u8>),
    /// The command has ended with this status: 128 and the signal's number if a signal ended it.
    Exit(u8),
}

/// A command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// Where it runs. The folder is made if there is none.
    pub folder: OsString,
    /// The program and its arguments.
    pub words: Vec<OsString>,
    /// Each a name, `=` and a value.
    pub environment: Vec<OsString>,
}

impl Message {
    /// Writes the message.
    ///
    /// # Errors
    /// Those of `writer`, and a command that is too long.
    pub fn write(&self, writer: &mut impl Write) -> io::Result<()> {
        let (kind, content) = match self {
            Self::Run(command) => (b'r', command.encode()),
            Self::Signal(number) => (b's', vec![*number]),
            Self::Out(bytes) => (b'o', bytes.clone()),
            Self::Err(bytes) => (b'e', bytes.clone()),
            Self::Exit(status) => (b'x', vec![*status]),
        };
        let length = u32::try_from(content.len()).ok();
        let Some(length) = length.filter(|_| content.len() <= LONGEST) else {
            return Err(invalid("the command and its environment are too long"));
        };
        let mut bytes = vec![kind];
        bytes.extend(length.to_be_bytes());
        bytes.extend(content);
        // In one piece, since several threads may write.
        writer.write_all(&bytes)
    }

    /// Reads the next message; `None` at the end of the stream.
    ///
    /// # Errors
    /// Those of `reader`, and what is no message.
    pub fn read(reader: &mut impl Read) -> io::Result<Option<Self>> {
        let mut head = [0; 5];
        if reader.read(&mut head[..1])? == 0 {
            return Ok(None);
        }
        reader.read_exact(&mut head[1..])?;
        let [kind, length @ ..] = head;
        let length = u32::from_be_bytes(length) as usize;
        if length > LONGEST {
            return Err(invalid("a message is too long"));
        }
        let mut content = vec![0; length];
        reader.read_exact(&mut content)?;
        match (kind, content.as_slice()) {
            (b'r', _) => Ok(Some(Self::Run(Command::decode(&content)?))),
            (b's', [number]) => Ok(Some(Self::Signal(*number))),
            (b'o', _) => Ok(Some(Self::Out(content))),
            (b'e', _) => Ok(Some(Self::Err(content))),
            (b'x', [status]) => Ok(Some(Self::Exit(*status))),
            _ => Err(invalid("a message is of no known kind")),
        }
    }
}

impl Command {
    /// How many words there are, the folder, the words, the environment: all with a NUL behind.
    fn encode(&self) -> Vec<u8> {
        let count = OsString::from(self.words.len().to_string());
        let parts = [&count, &self.folder].into_iter();
        let parts = parts.chain(&self.words).chain(&self.environment);
        parts
            .flat_map(|part| [part.as_bytes(), b"\0"].concat())
            .collect()
    }

    fn decode(content: &[u8]) -> io::Result<Self> {
        let Some(content) = content.strip_suffix(b"\0") else {
            return Err(invalid("a command is cut short"));
        };
        let mut parts = content.split(|byte| *byte == 0).map(OsStr::from_bytes);
        let count = parts.next().and_then(OsStr::to_str);
        let count: usize = count
            .and_then(|count| count.parse().ok())
            .ok_or_else(|| invalid("a command says not how many words it has"))?;
        let folder = parts.next().unwrap_or_default().to_owned();
        let mut words: Vec<OsString> = parts
            .map(|part| OsString::from_vec(part.as_bytes().to_vec()))
            .collect();
        if count == 0 || words.len() < count {
            return Err(invalid("a command lacks words"));
        }
        let environment = words.split_off(count);
        Ok(Self {
            folder,
            words,
            environment,
        })
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(message: &Message) -> io::Result<Option<Message>> {
        let mut bytes = Vec::new();
        message.write(&mut bytes)?;
        Message::read(&mut bytes.as_slice())
    }

    #[test]
    fn a_command_arrives_word_for_word() {
        let message = Message::Run(Command {
            folder: "/tmp/a b".into(),
            words: vec!["echo".into(), String::new().into(), "two\nlines".into()],
            environment: vec!["A=1".into(), "B=".into()],
        });

        assert_eq!(there_and_back(&message).unwrap(), Some(message));
    }

    #[test]
    fn output_arrives_byte_for_byte() {
        let message = Message::Out(vec![0, 255, b'\n']);

        assert_eq!(there_and_back(&message).unwrap(), Some(message));
    }

    #[test]
    fn a_stream_that_ends_between_two_messages_has_ended() {
        assert_eq!(Message::read(&mut [].as_slice()).unwrap(), None);
    }

    #[test]
    fn a_message_cut_short_is_refused() {
        assert!(Message::read(&mut b"o\0\0\0\x05abc".as_slice()).is_err());
    }

    #[test]
    fn a_length_beyond_the_bound_is_refused_before_anything_is_allocated() {
        let error = Message::read(&mut b"o\xff\xff\xff\xff".as_slice()).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_command_without_words_is_refused() {
        assert!(there_and_back(&Message::Run(Command::default())).is_err());
    }
}
