//! A destination that answers what it should not: bytes known beforehand, with right checks.

use std::io::{self, Cursor, Read, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[expect(dead_code, reason = "one side is enough here")]
mod double;

use double::Leaver;
use migration::{Closer, Departure, Dial, Options, Progress, Wire, depart};
use stream::{Chunk, Compression, Encoder, Header, Metadata, StreamWriter};

const WELCOME: &[u8] = br#"{"word":"welcome"}"#;

/// A stream of the chunks that `make` makes after a welcome.
fn answers(make: impl FnOnce(&mut Encoder, &mut Chunk)) -> Vec<u8> {
    let header = Header::of_connection(Metadata::ArmMte).unwrap();
    let mut encoder = Encoder::new(&header, Compression::None).unwrap();
    let mut bytes = Vec::new();
    let mut writer = StreamWriter::new(&mut bytes, header).unwrap();
    let mut chunk = Chunk::new();
    encoder.message(0, WELCOME, &mut chunk).unwrap();
    writer.write(&chunk).unwrap();
    make(&mut encoder, &mut chunk);
    writer.write(&chunk).unwrap();
    bytes
}

/// Why a guest was kept whose destination answers this.
fn reason_to_keep(answers: Vec<u8>) -> String {
    let mut guest = Leaver::new(0);
    let line = Line(Mutex::new(Some(answers)));
    match depart(&mut guest, &line, &Options::default(), &Progress::default()) {
        Departure::Kept(error) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_destination_that_wants_more_links_than_may_be_is_refused() {
    let accept = br#"{"word":"accept","requests":65}"#;

    let reason = reason_to_keep(answers(|encoder, chunk| {
        encoder.message(0, accept, chunk).unwrap();
    }));

    assert!(reason.contains("too many links"), "{reason}");
}

/// One link, over which all has come that will.
struct Line(Mutex<Option<Vec<u8>>>);

impl Dial for Line {
    fn dial(&self) -> io::Result<Box<dyn Wire>> {
        let answers = self.0.lock().unwrap().take();
        let answers = answers.ok_or(io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(Recorded(Cursor::new(answers))))
    }

    fn peer(&self) -> String {
        "the destination".into()
    }
}

struct Recorded(Cursor<Vec<u8>>);

impl Read for Recorded {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Recorded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Wire for Recorded {
    fn set_patience(&mut self, _: Duration) -> io::Result<()> {
        Ok(())
    }

    fn closer(&self) -> Closer {
        Arc::new(|| {})
    }

    fn peer(&self) -> String {
        "the destination".into()
    }
}
