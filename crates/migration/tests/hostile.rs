//! Peers that lie, with right checks: a destination that answers what it should not, and sources that say what they should not,
//! dribble, say nothing, or do not come to an end.

use std::io::{self, Cursor, Read, Write};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

#[expect(dead_code, reason = "one side is enough here")]
mod double;

use double::{Comer, Leaver, Network};
use migration::{Closer, Departure, Dial, Options, Progress, Receiver, Verdict, Wire, depart};
use stream::{Chunk, Compression, Encoder, Header, Metadata, State, StreamWriter};

const LONG: Duration = Duration::from_secs(20);
const WELCOME: &[u8] = br#"{"word":"welcome"}"#;
const MIGRATE: &str = r#"{"migrate":{"pages":1,"post_copy":true}}"#;

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

/// A link of a source: a stream of chunks, made one after the other.
struct Spoken<W: Write> {
    encoder: Encoder,
    writer: StreamWriter<W>,
    chunk: Chunk,
}

impl<W: Write> Spoken<W> {
    /// It begins with the greeting of a link for this purpose.
    fn to(wire: W, purpose: &str) -> Self {
        let header = Header::of_connection(Metadata::ArmMte).unwrap();
        let encoder = Encoder::new(&header, Compression::None).unwrap();
        let spoken = Self {
            encoder,
            writer: StreamWriter::new(wire, header).unwrap(),
            chunk: Chunk::new(),
        };
        let session = "00000000000000000000000000000001";
        let protocol = migration::PROTOCOL;
        spoken.word(&format!(
            r#"{{"word":"hello","protocol":{protocol},"tagvisor":"1","session":"{session}","purpose":{purpose}}}"#
        ))
    }

    fn word(mut self, word: &str) -> Self {
        let chunk = &mut self.chunk;
        self.encoder.message(0, word.as_bytes(), chunk).unwrap();
        self.written()
    }

    fn state(mut self, name: &str, data: &[u8]) -> Self {
        let state = State {
            name,
            version: 1,
            data: data.into(),
        };
        self.encoder.state(&state, &mut self.chunk).unwrap();
        self.written()
    }

    fn holes(mut self, pages: std::ops::Range<u64>) -> Self {
        self.encoder.holes(&[pages], &mut self.chunk).unwrap();
        self.written()
    }

    fn end(self) -> W {
        self.writer.finish().unwrap().0
    }

    fn written(mut self) -> Self {
        self.writer.write(&self.chunk).unwrap();
        self
    }
}

/// The links of a source that begins an offer, and never ends it.
fn beginning_of_an_offer() -> Vec<u8> {
    let mut bytes = Vec::new();
    Spoken::to(&mut bytes, MIGRATE).state("machine", &vec![7; 1 << 16]);
    bytes
}

type Wired = Spoken<Box<dyn Wire>>;

/// Why a destination ends a migration in which this is said on the control link after the offer, and on the one for pages.
fn reason_to_end<K>(
    control: impl FnOnce(Wired) -> Wired,
    pages: impl FnOnce(Wired) -> K,
) -> String {
    let (network, door) = Network::new();
    let line = double::Line(network);
    let offer = Spoken::to(line.dial().unwrap(), MIGRATE)
        .state("config", b"one cpu")
        .word(r#"{"word":"offer"}"#);
    let mut comer = Comer::new(u64::MAX);
    let accepted = comer.accepted.clone();
    let arriving = thread::spawn(move || {
        let receiver = Receiver::new(door, Duration::from_secs(1)).unwrap();
        match receiver.receive(&mut comer, &Progress::default()) {
            Ok(_) => panic!("it was believed"),
            Err(error) => error.to_string(),
        }
    });
    let begun = Instant::now();
    while !accepted.load(SeqCst) {
        assert!(begun.elapsed() < LONG);
        thread::sleep(Duration::from_millis(1));
    }
    let _pages = pages(Spoken::to(line.dial().unwrap(), r#""pages""#));
    let _control = control(offer);
    arriving.join().unwrap()
}

fn hands_over(spoken: Wired) -> Wired {
    spoken
        .state("machine", b"registers")
        .holes(double::FIRST..double::FIRST + 1)
        .word(r#"{"word":"hand_over"}"#)
}

#[test]
fn pages_that_stay_behind_without_links_to_ask_for_them_are_refused() {
    let reason = reason_to_end(hands_over, Spoken::end);

    assert!(reason.contains("links to ask for them"), "{reason}");
}

#[test]
fn a_source_that_hands_over_and_does_not_end_its_links_for_pages_is_given_up() {
    let reason = reason_to_end(hands_over, |pages| pages);

    assert!(reason.contains("did not come to its end"), "{reason}");
}

#[test]
fn a_source_that_dribbles_its_offer_is_given_up_and_the_next_one_is_taken() {
    let patience = Duration::from_millis(500);
    let (network, door) = Network::new();
    let line = double::Line(network);
    let arriving = thread::spawn(move || receive(door, patience));

    let mut wire = line.dial().unwrap();
    let bytes = beginning_of_an_offer();
    let (most, rest) = bytes.split_at(bytes.len() - 60_000);
    wire.write_all(most).unwrap();
    let begun = Instant::now();
    let dribbled = rest
        .iter()
        .take_while(|byte| {
            thread::sleep(Duration::from_millis(10));
            wire.write_all(&[**byte]).is_ok()
        })
        .count();
    let held = begun.elapsed();
    assert!(
        held > patience / 2 && held < 20 * patience,
        "{dribbled} bytes were taken in {held:?}"
    );

    let mut guest = Leaver::new(0);
    let departure = depart(&mut guest, &line, &Options::default(), &Progress::default());
    assert!(matches!(departure, Departure::Gone(_)), "{departure:?}");
    arriving.join().unwrap();
}

#[test]
fn a_thousand_who_say_nothing_are_sent_away_but_for_a_few_and_a_guest_can_come() {
    let (network, door) = Network::new();
    let line = double::Line(network);
    let arriving = thread::spawn(move || receive(door, Duration::from_secs(5)));

    let mut silent: Vec<_> = (0..1000).map(|_| line.dial().unwrap()).collect();
    let begun = Instant::now();
    let is_open = |wire: &mut Box<dyn Wire>| {
        wire.set_patience(Duration::ZERO).unwrap();
        wire.read(&mut [0]).is_err()
    };
    while silent.len() > 32 {
        assert!(begun.elapsed() < LONG, "{} are held", silent.len());
        silent.retain_mut(is_open);
    }
    drop(silent);

    let mut guest = Leaver::new(0);
    let departed = (0..100).any(|_| {
        thread::sleep(Duration::from_millis(10));
        let departure = depart(&mut guest, &line, &Options::default(), &Progress::default());
        matches!(departure, Departure::Gone(_))
    });
    assert!(departed);
    arriving.join().unwrap();
}

/// Receives a guest.
fn receive(door: double::Door, patience: Duration) {
    let receiver = Receiver::new(door, patience).unwrap();
    let mut comer = Comer::new(u64::MAX);
    let mut held = receiver.receive(&mut comer, &Progress::default()).unwrap();
    assert!(matches!(held.wait(), Verdict::Run));
    held.attend(None, |_| {});
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
