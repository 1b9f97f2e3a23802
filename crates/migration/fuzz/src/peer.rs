//! The other side, as hostile as it may be: a program of three-byte instructions that says any words, states, pages and holes in
//! any order on as many links as it likes, and bytes that are none of these. Its checks are right, or are passed over.

use std::io::{self, Cursor, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use migration::{Closer, Wire};
use mte::{Tag, TagPage};
use stream::{Batch, Chunk, Compression, Encoder, Header, Metadata, State, StreamId, StreamWriter};

/// The guest's memory.
pub const RAM: Range<u64> = 0x40000..0x40060;

const MOST_INSTRUCTIONS: usize = 64;
const MOST_LINKS: usize = 8;

/// All that the other side says.
pub struct Said {
    /// Bytes, for each link.
    pub links: Vec<Vec<u8>>,
    /// It may have told the guest to run.
    pub run: bool,
    /// It may have said that it is ready to run the guest.
    pub ready: bool,
}

/// What a program says. `first` makes the first word of a link from two bytes.
pub fn say(metadata: Metadata, program: &[u8], first: impl Fn(usize, u8, u8) -> String) -> Said {
    let mut said = Said {
        links: Vec::new(),
        run: false,
        ready: false,
    };
    let mut speaker = Speaker::new(metadata, &first(0, 0, 1));
    let mut rest = program;
    for _ in 0..MOST_INSTRUCTIONS {
        let Some(([what, how, more], after)) = rest.split_first_chunk() else {
            break;
        };
        rest = after;
        match what % 16 {
            0 if said.links.len() + 1 < MOST_LINKS => {
                let next = Speaker::new(metadata, &first(said.links.len() + 1, *how, *more));
                said.links.push(std::mem::replace(&mut speaker, next).bytes);
            }
            0 | 1 => speaker.state(*how, *more),
            2 => speaker.holes(u64::from(*how), u64::from(*more)),
            3 | 4 => speaker.pages(what / 16, *how, *more),
            5 => {
                let first = RAM.start + u64::from(*how >> 6) * 64;
                let pages = u64::from(*more) << (how & 0x3f);
                speaker.message(1, [first, pages].map(u64::to_le_bytes).as_flattened());
            }
            6 => speaker.end(),
            7 => {
                let bytes = take(&mut rest, *more);
                speaker.message(how % 4, bytes);
                (said.run, said.ready) = (true, true);
            }
            8 => {
                let bytes = take(&mut rest, *more);
                speaker.chunk([*how, what / 16], bytes);
                (said.run, said.ready) = (true, true);
            }
            9 => {
                let left = speaker.bytes.len().saturating_sub(usize::from(how % 64));
                speaker.bytes.truncate(left);
            }
            10 => {
                let (round, pages) = (how % 8, u64::from(*more));
                speaker.word(&format!(
                    r#"{{"word":"round_done","round":{round},"pages":{pages}}}"#
                ));
            }
            11 => speaker.word(&format!(r#"{{"word":"round_end","round":{}}}"#, how % 8)),
            12 => {
                let state = STATES[usize::from(*how) % STATES.len()];
                speaker.word(&format!(
                    r#"{{"word":"state","state":{state},"fetched":{more}}}"#
                ));
            }
            13 => speaker.word(&format!(r#"{{"word":"accept","requests":{}}}"#, how % 80)),
            _ => {
                let word = WORDS[usize::from(*how) % WORDS.len()];
                said.run |= word == "run";
                said.ready |= word == "ready";
                speaker.word(&format!(r#"{{"word":"{word}","reason":"{more}"}}"#));
            }
        }
    }
    said.links.push(speaker.bytes);
    said
}

const WORDS: [&str; 9] = [
    "offer",
    "post_copy",
    "hand_over",
    "run",
    "abort",
    "welcome",
    "ready",
    "refused",
    "hello",
];

const STATES: [&str; 10] = [
    r#""receiving""#,
    r#"{"ready":{"pages_missing":true}}"#,
    r#"{"ready":{"pages_missing":false}}"#,
    r#"{"undecided":{"pages_missing":true}}"#,
    r#"{"undecided":{"pages_missing":false}}"#,
    r#""running""#,
    r#""separated""#,
    r#""complete""#,
    r#""discarded""#,
    r#""ended""#,
];

fn take<'a>(rest: &mut &'a [u8], most: u8) -> &'a [u8] {
    let (taken, after) = rest.split_at(rest.len().min(most.into()));
    *rest = after;
    taken
}

/// One link, from the other side.
struct Speaker {
    encoder: Encoder,
    metadata: Metadata,
    bytes: Vec<u8>,
    chunk: Chunk,
    chunks: u64,
    pages: u64,
}

impl Speaker {
    fn new(metadata: Metadata, first: &str) -> Self {
        let header = Header {
            id: StreamId([7; 16]),
            metadata,
            base: None,
            indexed: false,
        };
        let mut bytes = Vec::new();
        StreamWriter::new(&mut bytes, header.clone()).expect("memory takes all");
        let mut this = Self {
            encoder: Encoder::new(&header, Compression::None).expect("nothing is compressed"),
            metadata,
            bytes,
            chunk: Chunk::new(),
            chunks: 0,
            pages: 0,
        };
        this.word(first);
        this
    }

    fn add(&mut self) {
        self.chunks += 1;
        self.pages += self.chunk.pages() as u64;
        self.bytes.extend_from_slice(self.chunk.bytes());
    }

    fn message(&mut self, number: u8, bytes: &[u8]) {
        let made = self.encoder.message(number, bytes, &mut self.chunk);
        made.expect("messages are short");
        self.add();
    }

    fn word(&mut self, json: &str) {
        self.message(0, json.as_bytes());
    }

    fn state(&mut self, how: u8, more: u8) {
        let state = State {
            name: ["config", "machine", "a"][usize::from(how % 3)],
            version: more.into(),
            data: vec![how; more.into()].into(),
        };
        self.encoder
            .state(&state, &mut self.chunk)
            .expect("names are right");
        self.add();
    }

    fn holes(&mut self, start: u64, length: u64) {
        let start = RAM.start - 8 + start;
        let runs = [
            start..start + length % 16 + 1,
            start + 32..start + 33 + length / 16,
        ];
        self.encoder
            .holes(&runs, &mut self.chunk)
            .expect("they are in order");
        self.add();
    }

    fn pages(&mut self, how: u8, start: u8, more: u8) {
        let mut batch = Batch::new(self.metadata);
        for i in 0..u64::from(more % 3) {
            let page = RAM.start + u64::from(start) + i * u64::from(more / 3 + 1);
            let tags = TagPage::filled(Tag::from_low_bits(how));
            let tags = self.metadata.has_tags().then_some(&tags);
            let data = [how & 3; stream::PAGE_SIZE];
            batch.push(page, &data, tags).expect("they are in order");
        }
        self.encoder
            .pages(&batch, &mut self.chunk)
            .expect("their metadata are the stream's");
        self.add();
    }

    /// A chunk of a kind and codec of which nothing need be right.
    fn chunk(&mut self, [kind, codec]: [u8; 2], bytes: &[u8]) {
        let (head, body) = bytes.split_at(bytes.len().min(4));
        let field = |i: usize| head.get(i).copied().unwrap_or(0);
        let meta_len = usize::from(field(0)).min(body.len());
        let data_len = body.len() - meta_len + usize::from(field(1) == 0xff);
        let decoded_len = match codec {
            0..=1 => data_len,
            _ => usize::from(field(1)) << (field(2) & 31),
        };
        self.bytes.extend_from_slice(&[kind, codec, field(3), 0]);
        for len in [meta_len, data_len, decoded_len] {
            self.bytes.extend_from_slice(&(len as u32).to_le_bytes());
        }
        self.bytes.extend_from_slice(&[0; 16]);
        self.bytes.extend_from_slice(body);
        self.chunks += 1;
        self.pages += if kind == 1 { field(3).into() } else { 0 };
    }

    fn end(&mut self) {
        let end = [self.chunks, self.pages, 0, 0, 0].map(u64::to_le_bytes);
        let bytes = end.as_flattened();
        let len = (bytes.len() as u32).to_le_bytes();
        self.bytes.extend_from_slice(&[6, 1, 0, 0, 0, 0, 0, 0]);
        self.bytes.extend_from_slice(&len);
        self.bytes.extend_from_slice(&len);
        self.bytes.extend_from_slice(&[0; 16]);
        self.bytes.extend_from_slice(bytes);
    }
}

/// A wire over which all has come that will, and that takes anything.
pub struct Recorded(pub Cursor<Vec<u8>>);

impl Recorded {
    pub fn of(bytes: Vec<u8>) -> Box<dyn Wire> {
        Box::new(Self(Cursor::new(bytes)))
    }
}

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
        "peer".into()
    }
}
