//! A hostile source: what it says on all its links, from the greeting until the guest is complete or nobody comes any more.
//! Nothing panics; no page is placed and none is awaited that is no memory; and the guest runs only if the source said so. It may end
//! at once.

#![no_main]

mod peer;

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use migration::{
    Arriving, Fill, Filling, MachineError, Peer, Progress, Receiver, SavedState, Session, Verdict,
};
use peer::{RAM, Recorded, say};
use stream::{Batch, Metadata, PageSink};

/// Which migration it is.
const SESSION: &str = "1";

fuzz_target!(|input: &[u8]| {
    let Some(([settings, links], program)) = input.split_first_chunk() else {
        return;
    };
    let metadata = |bit: u8| match settings & bit {
        0 => Metadata::ArmMte,
        _ => Metadata::None,
    };
    let mut guest = Guest {
        sink: Arc::new(Sink {
            metadata: metadata(1),
            room: Mutex::new(u64::from(settings >> 4) * 16 + 1),
        }),
        loads: settings & 4 == 0,
        fetches: settings & 8 == 0,
        peer: None,
    };
    let said = say(metadata(2), program, |link, how, more| {
        greeting(link, *links, how, more)
    });
    let session = Session::try_from(SESSION.to_owned()).expect("it is a number");
    let wires = said.links.into_iter().map(Recorded::of).collect();
    let Ok(mut held) = Receiver::of(wires, session).receive(&mut guest, &Progress::default())
    else {
        return;
    };
    let verdict = match held.wait() {
        Verdict::Undecided(_) => held.hear_all_who_came_back(),
        verdict => Some(verdict),
    };
    let runs = matches!(verdict, Some(Verdict::Run));
    assert_eq!(held.state().may_run(), runs);
    assert!(said.run || !runs, "nobody told it to run");
    if runs {
        if links & 0x80 != 0 {
            // Refused if nothing of it is at the source.
            let _ = held.decider().end();
        }
        held.attend_all_who_came_back(&guest);
    }
});

/// The first word of a link.
fn greeting(link: usize, links: u8, how: u8, more: u8) -> String {
    let purpose = match (link, how % 8) {
        (0, _) | (_, 7) => format!(r#"{{"migrate":{{"pages":{}}}}}"#, links % 70),
        (_, 0..3) => r#""pages""#.into(),
        (_, 3..5) => r#""requests""#.into(),
        _ => format!(r#"{{"back":{{"kept":{}}}}}"#, more % 2 == 1),
    };
    let session = if more == 0xff { "2" } else { SESSION };
    let protocol = if more == 0xfe { 1 } else { 2 };
    format!(
        r#"{{"word":"hello","protocol":{protocol},"tagvisor":"1","session":"{session}","purpose":{purpose}}}"#
    )
}

/// A guest that is memory with little room.
struct Guest {
    sink: Arc<Sink>,
    loads: bool,
    fetches: bool,
    peer: Option<Arc<Peer>>,
}

impl Filling for Guest {
    /// Fetches all that is missing, until that fails.
    fn state(&self) -> Fill {
        let Some(peer) = &self.peer else {
            return Fill::Complete;
        };
        let mut fetcher = peer.fetcher();
        for (run, group) in peer.runs() {
            fetcher.expect(group..group.saturating_add(3));
            match fetcher.fetch(group) {
                Ok(batch) => assert!(run.into_iter().all(|page| batch.numbers().contains(&page))),
                Err(error) => return Fill::Failed(error.to_string()),
            }
        }
        Fill::Complete
    }

    fn retry(&self) {}
}

impl Arriving for Guest {
    type Sink = Sink;

    fn accept(&mut self, _: &[SavedState], metadata: Metadata) -> Result<(), MachineError> {
        match metadata == self.sink.metadata {
            true => Ok(()),
            false => Err("its tags cannot be had".into()),
        }
    }

    fn sink(&self) -> Arc<Sink> {
        self.sink.clone()
    }

    fn pages(&self) -> Range<u64> {
        RAM
    }

    fn fetches(&self) -> Result<u8, MachineError> {
        match self.fetches {
            true => Ok(2),
            false => Err("no".into()),
        }
    }

    fn load(
        &mut self,
        states: &[SavedState],
        missing: Option<Arc<Peer>>,
    ) -> Result<(), MachineError> {
        assert!(states.len() <= 16);
        let runs = missing.iter().flat_map(|peer| peer.runs());
        runs.for_each(|(run, _)| assert!(RAM.start <= run.start && run.end <= RAM.end));
        self.peer = missing;
        match self.loads {
            true => Ok(()),
            false => Err("no".into()),
        }
    }
}

struct Sink {
    metadata: Metadata,
    room: Mutex<u64>,
}

impl PageSink for Sink {
    fn metadata(&self) -> Metadata {
        self.metadata
    }

    fn place(&self, pages: &Batch) -> io::Result<()> {
        assert_eq!(pages.metadata(), self.metadata);
        let mut room = self.room.lock().expect("nothing panics with it");
        for (page, _, tags) in pages.iter() {
            assert_eq!(tags.is_some(), self.metadata.has_tags());
            *room = room
                .checked_sub(1)
                .filter(|_| RAM.contains(&page))
                .ok_or_else(|| io::Error::other("no memory"))?;
        }
        Ok(())
    }

    fn discard(&self, _: Range<u64>) -> io::Result<()> {
        panic!("migrations discard nothing")
    }
}
