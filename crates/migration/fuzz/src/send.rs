//! A hostile destination: what it answers on all links, and what it asks for. Nothing panics; the guest runs here if and only if it was
//! kept; and it is not given away before the destination said that it is ready.

#![no_main]

mod peer;

use std::io;
use std::num::NonZeroU8;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use migration::{
    Departing, Departure, Dial, MachineError, Options, PostCopy, Progress, SavedState, Wire, depart,
};
use mte::TagPage;
use peer::{RAM, Recorded, say};
use stream::{Compression, Metadata, Page, PageSet, PageSource};

/// Pages that the source has at first.
const FILLED: u64 = 3;

fuzz_target!(|input: &[u8]| {
    let Some(([settings, changes], program)) = input.split_first_chunk() else {
        return;
    };
    let said = say(Metadata::ArmMte, program, |_, how, _| match how {
        0xff => r#"{"word":"refused","reason":"no"}"#.into(),
        _ => r#"{"word":"welcome"}"#.into(),
    });
    let line = Line(Mutex::new(said.links));
    let mut guest = Guest {
        runs: true,
        changes: *changes,
        stops: settings & 1 == 0,
    };
    let options = Options {
        connections: NonZeroU8::MIN,
        post_copy: match settings >> 1 & 3 {
            0 => PostCopy::Never,
            1 => PostCopy::Auto,
            _ => PostCopy::Now,
        },
        may_slow: settings & 8 == 0,
        max_downtime: match settings & 16 {
            0 => Duration::from_secs(1000),
            _ => Duration::ZERO,
        },
        compression: Compression::None,
        timeout: None,
        patience: Duration::ZERO,
        handover_patience: Duration::ZERO,
    };
    let progress = Progress::default();
    let mut departure = depart(&mut guest, &line, &options, &progress);
    while !line.0.lock().expect("nothing panics with it").is_empty() {
        let Departure::Away(away, _) = departure else {
            break;
        };
        assert!(!guest.runs);
        assert!(away.pages_left() <= RAM.end - RAM.start);
        departure = away.recover(&mut guest, &line, &options, &progress);
    }
    let kept = matches!(departure, Departure::Kept(_));
    assert_eq!(guest.runs, kept);
    assert!(said.ready || kept, "nobody was ready to run it");
});

/// A destination that says what it says, whatever it is told.
struct Line(Mutex<Vec<Vec<u8>>>);

impl Dial for Line {
    fn dial(&self) -> io::Result<Box<dyn Wire>> {
        let mut links = self.0.lock().expect("nothing panics with it");
        match links.is_empty() {
            true => Err(io::ErrorKind::ConnectionRefused.into()),
            false => Ok(Recorded::of(links.remove(0))),
        }
    }

    fn peer(&self) -> String {
        "peer".into()
    }
}

struct Guest {
    runs: bool,
    /// How often pages change, two bits a round.
    changes: u8,
    stops: bool,
}

impl Departing for Guest {
    type Pages = Pages;

    fn pages(&self) -> Arc<Pages> {
        Arc::new(Pages)
    }

    fn offer(&mut self) -> Result<Vec<SavedState>, MachineError> {
        Ok(Vec::new())
    }

    fn watch(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn changes(&mut self) -> Result<PageSet, MachineError> {
        let mut changed = PageSet::none(RAM);
        changed.insert(RAM.start..RAM.start + u64::from(self.changes & 3));
        self.changes >>= 2;
        Ok(changed)
    }

    fn slow(&mut self, _: u8) {}

    fn stop(&mut self) -> Result<(), MachineError> {
        self.runs = false;
        match self.stops {
            true => Ok(()),
            false => Err("no".into()),
        }
    }

    fn state(&mut self) -> Result<Vec<SavedState>, MachineError> {
        Ok(Vec::new())
    }

    fn go_on(&mut self) -> Result<(), MachineError> {
        self.runs = true;
        Ok(())
    }
}

/// The first pages of RAM.
struct Pages;

impl PageSource for Pages {
    fn metadata(&self) -> Metadata {
        Metadata::ArmMte
    }

    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let filled = from.max(RAM.start)..RAM.start + FILLED;
        Ok((!filled.is_empty()).then_some(filled))
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        assert!(RAM.start <= first && first + data.len() as u64 <= RAM.end);
        assert_eq!(data.len(), tags.len());
        Ok(())
    }
}
