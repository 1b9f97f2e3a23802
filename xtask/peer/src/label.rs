//! Output in lines that say which host they are of, where it goes to the lab's log or to a terminal; byte for byte where it goes
//! to a file or a pipe.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;

/// A writer that puts a label before each line, if it has one.
pub struct Labelled<W: Write> {
    writer: W,
    label: Option<Vec<u8>>,
    /// The start of a line whose end has not come.
    held: Vec<u8>,
}

impl<W: Write + AsFd> Labelled<W> {
    /// One with the label `host: ` if `writer` is the lab's log or a terminal, both of which are character devices.
    ///
    /// # Errors
    /// Those of asking what `writer` is.
    pub fn for_log(writer: W, host: &str) -> io::Result<Self> {
        let file = File::from(writer.as_fd().try_clone_to_owned()?);
        let is_log = file.metadata()?.file_type().is_char_device();
        Ok(Self::new(writer, is_log.then_some(host)))
    }
}

impl<W: Write> Labelled<W> {
    fn new(writer: W, host: Option<&str>) -> Self {
        Self {
            writer,
            label: host.map(|host| format!("{host}: ").into_bytes()),
            held: Vec::new(),
        }
    }

    /// Writes `bytes`, or of them the lines that are whole.
    ///
    /// # Errors
    /// The writer's.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(label) = &self.label else {
            self.writer.write_all(bytes)?;
            return self.writer.flush();
        };
        self.held.extend_from_slice(bytes);
        let Some(end) = self.held.iter().rposition(|byte| *byte == b'\n') else {
            return Ok(());
        };
        let rest = self.held.split_off(end + 1);
        let lines = std::mem::replace(&mut self.held, rest);
        let labelled: Vec<u8> = lines
            .split_inclusive(|byte| *byte == b'\n')
            .flat_map(|line| [label, line].concat())
            .collect();
        // At once, so that lines of several writers stay whole.
        self.writer.write_all(&labelled)?;
        self.writer.flush()
    }

    /// Writes the start of a line that has no end, and ends it.
    ///
    /// # Errors
    /// The writer's.
    pub fn finish(&mut self) -> io::Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        self.write(b"\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_come_in_pieces_have_one_label_each() {
        let mut log = Vec::new();
        let mut output = Labelled::new(&mut log, Some("host2"));

        for piece in ["on", "e\ntwo\nth", "ree"] {
            output.write(piece.as_bytes()).unwrap();
        }
        output.finish().unwrap();

        assert_eq!(log, b"host2: one\nhost2: two\nhost2: three\n");
    }

    #[test]
    fn without_a_label_bytes_pass_at_once_and_unchanged() {
        let mut file = Vec::new();
        let mut output = Labelled::new(&mut file, None);

        output.write(b"a\nb").unwrap();
        output.finish().unwrap();

        assert_eq!(file, b"a\nb");
    }
}
