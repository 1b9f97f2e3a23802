//! Whole migrations between two sides in one process, whole or broken at each message in turn.

mod double;

use std::io;
use std::num::NonZeroU8;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use double::{Comer, FIRST, Last, Leaver, Line, Memory, Network};
use migration::handover::{Destination, Source};
use migration::{
    Away, Decider, Departure, Dial, Error, Filling, Options, PostCopy, Progress, Receiver, Report,
    Verdict, Wire, depart,
};

const LONG: Duration = Duration::from_secs(20);

/// How long the other side may say nothing: longer than a busy machine keeps a thread waiting.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it may where a test waits for the end of that.
const SHORT: Duration = Duration::from_secs(1);

fn options(post_copy: PostCopy) -> Options {
    Options {
        post_copy,
        patience: PATIENCE,
        handover_patience: PATIENCE,
        ..Options::default()
    }
}

/// What a destination has come to.
struct There {
    memory: Arc<Memory>,
    runs: Arc<AtomicBool>,
    accepted: Arc<AtomicBool>,
    decider: Arc<Mutex<Option<Decider>>>,
    error: Arc<Mutex<Option<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl There {
    fn state(&self) -> Option<Destination> {
        self.decider.lock().unwrap().as_ref().map(Decider::state)
    }

    fn wait_for(&self, what: impl Fn(Option<Destination>) -> bool) {
        let begun = Instant::now();
        while !what(self.state()) {
            assert!(
                begun.elapsed() < LONG,
                "the destination is {:?}",
                self.state()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn runs(&self) -> bool {
        self.runs.load(SeqCst)
    }

    fn end_guest(&self) {
        let decider = self.decider.lock().unwrap();
        decider.as_ref().unwrap().end().unwrap();
    }

    fn join(&mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A destination as a program makes it: receives, waits, runs, attends.
fn destination(door: double::Door, comer: Comer) -> There {
    patient_destination(PATIENCE, door, comer)
}

fn patient_destination(patience: Duration, door: double::Door, mut comer: Comer) -> There {
    let memory = comer.memory();
    let accepted = comer.accepted.clone();
    let runs = Arc::new(AtomicBool::new(false));
    let decider = Arc::new(Mutex::new(None));
    let error = Arc::new(Mutex::new(None));
    let (running, deciding, failing) = (runs.clone(), decider.clone(), error.clone());
    let thread = thread::spawn(move || {
        let receiver = Receiver::new(door, patience).unwrap();
        let mut held = match receiver.receive(&mut comer, &Progress::default()) {
            Ok(held) => held,
            Err(why) => {
                *failing.lock().unwrap() = Some(why.to_string());
                return;
            }
        };
        *deciding.lock().unwrap() = Some(held.decider());
        let verdict = match held.wait() {
            Verdict::Undecided(_) => held.wait_again(),
            verdict => verdict,
        };
        if let Verdict::Run = verdict {
            running.store(true, SeqCst);
            let filling = comer.filling.clone();
            held.attend(
                filling.as_ref().map(|filling| filling as &dyn Filling),
                |_| {},
            );
        }
    });
    There {
        memory,
        runs,
        accepted,
        decider,
        error,
        thread: Some(thread),
    }
}

fn went(departure: Departure) -> Report {
    match departure {
        Departure::Gone(report) => report,
        Departure::Away(away, error) => {
            panic!("the guest has not gone, {:?}: {error}", away.state())
        }
        Departure::Kept(error) => panic!("the guest has not gone: {error}"),
    }
}

fn kept(departure: Departure) -> Error {
    match departure {
        Departure::Kept(error) => error,
        other => panic!("the guest was not kept: {other:?}"),
    }
}

fn same(one: &Memory, other: &Memory) -> bool {
    one.contents() == other.contents()
}

#[test]
fn a_guest_that_writes_arrives_with_every_page_and_tag() {
    for connections in [1, 3] {
        let (network, door) = Network::new();
        let mut guest = Leaver::new(3);
        let mut there = destination(door, Comer::new(u64::MAX));
        let options = Options {
            connections: NonZeroU8::new(connections).unwrap(),
            ..options(PostCopy::Never)
        };

        let progress = Progress::default();
        let report = went(depart(&mut guest, &Line(network), &options, &progress));
        there.join();

        assert!(there.runs());
        assert!(!guest.runs.load(SeqCst));
        assert!(same(&guest.memory, &there.memory));
        assert_eq!(there.state(), Some(Destination::Complete));
        assert!(report.pages >= 256 && report.fetched == 0, "{report:?}");
        assert!(
            report.tag_bytes > 0 && report.tag_bytes < report.bytes,
            "{report:?}"
        );
        assert_eq!(progress.figures().pages_done, report.pages);
    }
}

#[test]
fn a_round_may_take_longer_than_the_destination_is_patient() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(0);
    guest.memory.slowness.store(16, SeqCst);
    let patience = 3 * SHORT;
    let mut there = patient_destination(patience, door, Comer::new(u64::MAX));
    let options = Options {
        // It says that it is there after a third of that, which is longer than a part of the round takes.
        patience: 2 * patience,
        ..options(PostCopy::Never)
    };

    let progress = Progress::default();
    let report = went(depart(&mut guest, &Line(network), &options, &progress));
    there.join();

    assert!(report.total > patience, "{report:?}");
    assert!(same(&guest.memory, &there.memory));
}

#[test]
fn a_page_that_changes_before_it_is_sent_is_sent_once() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(0);
    // One that was sent, one that will be, and one that is new.
    *guest.memory.written_when_read.lock().unwrap() = vec![FIRST, FIRST + 500, FIRST + 501];
    let mut there = destination(door, Comer::new(u64::MAX));

    let options = options(PostCopy::Never);
    let progress = Progress::default();
    let report = went(depart(&mut guest, &Line(network), &options, &progress));
    there.join();

    assert_eq!(report.pages, 256 + 2);
    assert!(same(&guest.memory, &there.memory));
}

#[test]
fn what_was_never_populated_is_not_sent() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(0);
    let mut there = destination(door, Comer::new(u64::MAX));

    let report = went(depart(
        &mut guest,
        &Line(network),
        &options(PostCopy::Never),
        &Progress::default(),
    ));
    there.join();

    assert_eq!(report.pages, 256);
    assert!(same(&guest.memory, &there.memory));
}

#[test]
fn a_guest_goes_on_by_post_copy_and_fetches_what_stayed_behind() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(1);
    let mut there = destination(door, Comer::new(u64::MAX));

    let report = went(depart(
        &mut guest,
        &Line(network),
        &options(PostCopy::Now),
        &Progress::default(),
    ));
    there.join();

    assert!(report.fetched >= 256 && report.pages == 0, "{report:?}");
    assert_eq!(there.state(), Some(Destination::Complete));
    assert!(same(&guest.memory, &there.memory));
}

/// A line that is only dialled while the guest runs.
struct WhileItRuns(Line, Arc<AtomicBool>);

impl Dial for WhileItRuns {
    fn dial(&self) -> io::Result<Box<dyn Wire>> {
        match self.1.load(SeqCst) {
            true => self.0.dial(),
            false => Err(io::Error::other("the guest stands still")),
        }
    }

    fn peer(&self) -> String {
        self.0.peer()
    }
}

#[test]
fn a_guest_does_not_stand_still_for_connections_to_be_made() {
    for post_copy in [PostCopy::Never, PostCopy::Auto, PostCopy::Now] {
        let (network, door) = Network::new();
        let mut guest = Leaver::new(1);
        let mut there = destination(door, Comer::new(u64::MAX));
        let line = WhileItRuns(Line(network), guest.runs.clone());

        went(depart(
            &mut guest,
            &line,
            &options(post_copy),
            &Progress::default(),
        ));
        there.join();

        assert!(same(&guest.memory, &there.memory));
    }
}

#[test]
fn a_guest_that_ends_in_post_copy_leaves_nothing_at_the_source() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(1);
    guest.memory.slowness.store(20, SeqCst);
    let mut there = destination(door, Comer::new(u64::MAX));

    let report = thread::scope(|scope| {
        scope.spawn(|| {
            there.wait_for(|state| state == Some(Destination::Running));
            there.end_guest();
        });
        let line = Line(network);
        let options = options(PostCopy::Now);
        went(depart(&mut guest, &line, &options, &Progress::default()))
    });
    there.join();

    assert!(report.ended && report.fetched < 256, "{report:?}");
    assert_eq!(there.state(), Some(Destination::Ended));
    assert!(!guest.runs.load(SeqCst));
}

#[test]
fn a_guest_that_ends_while_the_link_is_broken_is_let_go_when_the_source_is_back() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(1);
    guest.memory.slowness.store(20, SeqCst);
    let mut there = destination(door, Comer::new(u64::MAX));
    let line = Line(network.clone());
    let departure = thread::scope(|scope| {
        scope.spawn(|| {
            there.wait_for(|state| state == Some(Destination::Running));
            network.cut();
        });
        let options = options(PostCopy::Now);
        depart(&mut guest, &line, &options, &Progress::default())
    });
    let Departure::Away(away, _) = departure else {
        panic!("its pages are still here: {departure:?}");
    };
    assert_eq!(settled(&there), Some(Destination::Separated));

    there.end_guest();
    network.mend();
    let options = options(PostCopy::Never);
    let report = went(away.recover(&mut guest, &line, &options, &Progress::default()));
    there.join();

    assert!(report.ended, "{report:?}");
    assert_eq!(there.state(), Some(Destination::Ended));
}

#[test]
fn a_machine_that_cannot_be_had_is_refused_by_name_and_the_next_one_is_taken() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(1);
    let mut comer = Comer::new(u64::MAX);
    comer.refusal = Some("this host has no feature X");
    let mut there = destination(door, comer);
    let line = Line(network);

    let error = kept(depart(
        &mut guest,
        &line,
        &options(PostCopy::Never),
        &Progress::default(),
    ));
    assert_eq!(
        error.to_string(),
        "the destination refused: this host has no feature X"
    );
    assert!(guest.runs.load(SeqCst));

    went(depart(
        &mut guest,
        &line,
        &options(PostCopy::Never),
        &Progress::default(),
    ));
    there.join();
    assert!(same(&guest.memory, &there.memory));
}

#[test]
fn a_guest_that_may_leave_pages_behind_is_refused_where_they_cannot_be_fetched() {
    for post_copy in [PostCopy::Auto, PostCopy::Now] {
        let (network, door) = Network::new();
        let mut guest = Leaver::new(1);
        let mut comer = Comer::new(u64::MAX);
        comer.fetch_refusal = Some("this host has no userfaultfd");
        let mut there = destination(door, comer);
        let line = Line(network);

        let progress = Progress::default();
        let error = kept(depart(&mut guest, &line, &options(post_copy), &progress));
        assert_eq!(
            error.to_string(),
            "the destination refused: this host has no userfaultfd"
        );
        assert_eq!(progress.figures().pages_done, 0);

        went(depart(
            &mut guest,
            &line,
            &options(PostCopy::Never),
            &progress,
        ));
        there.join();
        assert!(same(&guest.memory, &there.memory));
    }
}

#[test]
fn a_destination_that_is_full_says_so_and_the_guest_stays() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(1);
    let mut there = destination(door, Comer::new(100));

    let error = kept(depart(
        &mut guest,
        &Line(network),
        &options(PostCopy::Never),
        &Progress::default(),
    ));
    there.join();

    assert!(
        error.to_string().contains("there is no memory left"),
        "{error}"
    );
    assert!(guest.runs.load(SeqCst) && !there.runs());
    assert!(there.error.lock().unwrap().is_some());
}

#[test]
fn a_state_that_does_not_fit_is_told_and_the_guest_goes_on() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(1);
    let mut comer = Comer::new(u64::MAX);
    comer.load_refusal = Some("disk X is held by another");
    let mut there = destination(door, comer);

    let error = kept(depart(
        &mut guest,
        &Line(network),
        &options(PostCopy::Never),
        &Progress::default(),
    ));
    there.join();

    assert_eq!(
        error.to_string(),
        "the destination refused: disk X is held by another"
    );
    assert!(guest.runs.load(SeqCst) && !there.runs());
}

#[test]
fn a_guest_whose_state_cannot_be_had_goes_on_where_it_is() {
    for post_copy in [PostCopy::Never, PostCopy::Now] {
        let (network, door) = Network::new();
        let mut guest = Leaver::new(1);
        guest.secret = Some("KVM does not tell register X");
        let mut there = destination(door, Comer::new(u64::MAX));

        let error = kept(depart(
            &mut guest,
            &Line(network),
            &options(post_copy),
            &Progress::default(),
        ));
        there.join();

        assert_eq!(error.to_string(), "KVM does not tell register X");
        assert!(guest.runs.load(SeqCst) && !there.runs());
    }
}

#[test]
fn a_migration_that_is_cancelled_leaves_the_guest_where_it_is() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(1);
    let mut there = destination(door, Comer::new(u64::MAX));
    let progress = Progress::default();
    progress.cancel();

    let error = kept(depart(
        &mut guest,
        &Line(network),
        &options(PostCopy::Never),
        &progress,
    ));
    there.join();

    assert!(matches!(error, Error::Cancelled), "{error}");
    assert!(guest.runs.load(SeqCst) && !there.runs());
}

#[test]
fn a_guest_that_writes_too_fast_is_kept_with_the_figures_if_it_may_not_be_slowed_down() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(400);
    let _there = destination(door, Comer::new(u64::MAX));
    let options = Options {
        may_slow: false,
        max_downtime: Duration::ZERO,
        ..options(PostCopy::Never)
    };

    let error = kept(depart(
        &mut guest,
        &Line(network),
        &options,
        &Progress::default(),
    ));

    assert!(matches!(error, Error::DoesNotConverge(_)), "{error}");
    assert!(guest.runs.load(SeqCst));
}

#[test]
fn a_guest_that_writes_too_fast_goes_on_by_post_copy_if_that_was_asked_for() {
    let (network, door) = Network::new();
    let mut guest = Leaver::new(400);
    let mut there = destination(door, Comer::new(u64::MAX));
    let options = Options {
        max_downtime: Duration::ZERO,
        ..options(PostCopy::Auto)
    };

    let report = went(depart(
        &mut guest,
        &Line(network),
        &options,
        &Progress::default(),
    ));
    there.join();

    assert!(report.fetched > 0 && report.pages > 256, "{report:?}");
    assert!(same(&guest.memory, &there.memory));
}

/// A migration that breaks at a message, and what has become of it when both sides have noticed.
struct Broken {
    network: Arc<Network>,
    guest: Leaver,
    there: There,
    departure: Departure,
}

/// `patience` is that of the source.
fn broken(post_copy: PostCopy, message: usize, last: Last, patience: Duration) -> Broken {
    let (network, door) = Network::new();
    network.break_at(message, last);
    let mut guest = Leaver::new(1);
    let there = patient_destination(patience.min(PATIENCE), door, Comer::new(u64::MAX));
    let options = Options {
        patience,
        handover_patience: patience,
        ..options(post_copy)
    };
    let line = Line(network.clone());
    let departure = depart(&mut guest, &line, &options, &Progress::default());
    Broken {
        network,
        guest,
        there,
        departure,
    }
}

/// Where the destination is when it has noticed that its link is broken; nowhere, if it waits for another guest or has
/// discarded this one.
fn settled(there: &There) -> Option<Destination> {
    let begun = Instant::now();
    loop {
        let state = there.state();
        let waits = matches!(
            state,
            Some(
                Destination::Undecided { .. }
                    | Destination::Separated
                    | Destination::Complete
                    | Destination::Discarded
            )
        );
        if waits || !there.accepted.load(SeqCst) || there.error.lock().unwrap().is_some() {
            return state;
        }
        assert!(begun.elapsed() < LONG, "the destination is {state:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Breaks a migration at each message, until one is not broken any more. They wait much of the time, and can do that side by side.
fn break_each(post_copy: PostCopy, last: Last, check: impl Fn(Broken) + Sync) -> usize {
    let next = AtomicUsize::new(0);
    let break_some = || {
        loop {
            let message = next.fetch_add(1, SeqCst);
            let broken = broken(post_copy, message, last, LONG);
            if !broken.network.is_broken() {
                return message;
            }
            eprintln!("message {message} {last:?}");
            check(broken);
        }
    };
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..4).map(|_| scope.spawn(break_some)).collect();
        let unbroken = lanes.into_iter().map(|lane| lane.join().unwrap());
        unbroken.min().unwrap()
    })
}

fn goes_on_after_mending(mut broken: Broken) {
    let line = Line(broken.network.clone());
    match broken.departure {
        Departure::Kept(_) => {
            assert!(
                broken.guest.runs.load(SeqCst),
                "the source keeps a guest that stands still"
            );
            let there = settled(&broken.there);
            assert!(
                !broken.there.runs(),
                "it runs twice; the destination is {there:?}"
            );
            assert!(
                matches!(
                    there,
                    None | Some(Destination::Undecided { .. } | Destination::Discarded)
                ),
                "{there:?}"
            );
        }
        Departure::Away(away, _) => {
            assert!(!broken.guest.runs.load(SeqCst));
            settled(&broken.there);
            broken.network.mend();
            let departure = away.recover(
                &mut broken.guest,
                &line,
                &options(PostCopy::Never),
                &Progress::default(),
            );
            let report = went(departure);
            assert!(report.pages + report.fetched >= 256, "{report:?}");
            assert!(
                report.tag_bytes > 0 && report.bytes > report.tag_bytes,
                "{report:?}"
            );
            assert!(!report.downtime.is_zero(), "{report:?}");
            broken.there.join();
            assert!(broken.there.runs());
            assert_eq!(broken.there.state(), Some(Destination::Complete));
            assert!(same(&broken.guest.memory, &broken.there.memory));
        }
        Departure::Gone(_) => {
            // The last words were lost, and both sides knew.
            assert!(!broken.guest.runs.load(SeqCst));
            broken
                .there
                .wait_for(|state| state == Some(Destination::Complete));
            assert!(same(&broken.guest.memory, &broken.there.memory));
        }
    }
}

#[test]
fn a_link_that_breaks_at_any_message_of_pre_copy_costs_nothing_and_can_be_mended() {
    for last in [Last::Arrives, Last::IsLost] {
        let messages = break_each(PostCopy::Never, last, goes_on_after_mending);
        assert!(messages > 20, "only {messages} messages were tried");
    }
}

#[test]
fn a_link_that_breaks_at_any_message_of_post_copy_costs_nothing_and_can_be_mended() {
    for last in [Last::Arrives, Last::IsLost] {
        let messages = break_each(PostCopy::Now, last, goes_on_after_mending);
        assert!(messages > 100, "only {messages} messages were tried");
    }
}

#[test]
fn a_link_that_stalls_at_any_message_costs_nothing_and_can_be_mended() {
    let stall = |post_copy, message| {
        let broken = broken(post_copy, message, Last::Stalls, SHORT);
        let stalled = broken.network.is_broken();
        if stalled {
            goes_on_after_mending(broken);
        }
        stalled
    };
    // They wait most of the time, and can do that side by side.
    let stalled = thread::scope(|scope| {
        let ways = [PostCopy::Never, PostCopy::Now];
        let all: Vec<_> = ways
            .into_iter()
            .flat_map(|way| (0..120).step_by(4).map(move |message| (way, message)))
            .map(|(way, message)| scope.spawn(move || stall(way, message)))
            .collect();
        all.into_iter()
            .map(|each| each.join().unwrap())
            .filter(|stalled| *stalled)
            .count()
    });
    assert!(stalled > 30, "only {stalled} migrations stalled");
}

#[test]
fn a_guest_arrives_over_links_that_are_slow_and_overtake_each_other() {
    for post_copy in [PostCopy::Never, PostCopy::Now] {
        let (network, door) = Network::new();
        network.crumbles.store(true, SeqCst);
        let mut guest = Leaver::new(3);
        let mut there = destination(door, Comer::new(u64::MAX));
        let options = Options {
            connections: NonZeroU8::new(4).unwrap(),
            max_downtime: Duration::from_secs(5),
            ..options(post_copy)
        };

        went(depart(
            &mut guest,
            &Line(network),
            &options,
            &Progress::default(),
        ));
        there.join();

        assert!(same(&guest.memory, &there.memory));
    }
}

/// The destination dies with the link. Its memory is gone.
fn source_alone(broken: Broken) {
    let Broken {
        mut guest,
        departure,
        network,
        ..
    } = broken;
    match departure {
        Departure::Kept(_) => assert!(guest.runs.load(SeqCst)),
        Departure::Away(mut away, _) => {
            assert!(!guest.runs.load(SeqCst));
            network.cut();
            let again = away_recover_fails(&mut guest, *away, &network);
            *away = again;
            let taken_back = away.take_back(&mut guest);
            match away.state() {
                Source::Kept => assert!(guest.runs.load(SeqCst) && taken_back.is_ok()),
                Source::Separated => assert!(!guest.runs.load(SeqCst) && taken_back.is_err()),
                state => panic!("the source is {state:?}"),
            }
        }
        Departure::Gone(_) => assert!(!guest.runs.load(SeqCst)),
    }
}

fn away_recover_fails(guest: &mut Leaver, away: Away, network: &Arc<Network>) -> Away {
    let departure = away.recover(
        guest,
        &Line(network.clone()),
        &options(PostCopy::Never),
        &Progress::default(),
    );
    match departure {
        Departure::Away(away, Error::Connect { .. }) => *away,
        other => panic!("there is nobody to be reached: {other:?}"),
    }
}

#[test]
fn a_destination_that_dies_at_any_message_leaves_a_source_that_runs_or_asks() {
    for post_copy in [PostCopy::Never, PostCopy::Now] {
        break_each(post_copy, Last::IsLost, source_alone);
    }
}

/// The source dies with the link.
fn destination_alone(broken: Broken) {
    let Broken {
        mut guest,
        mut there,
        ..
    } = broken;
    guest.halt();
    match settled(&there) {
        None | Some(Destination::Discarded) => assert!(!there.runs()),
        Some(Destination::Undecided { pages_missing }) => {
            assert!(!there.runs());
            let decided = there.decider.lock().unwrap().as_ref().unwrap().take_over();
            assert_eq!(decided.is_ok(), !pages_missing);
            if decided.is_ok() {
                there.join();
                assert!(there.runs());
                assert!(same(&guest.memory, &there.memory));
            }
        }
        Some(Destination::Separated) => assert!(there.runs()),
        Some(Destination::Complete) => assert!(same(&guest.memory, &there.memory)),
        other => panic!("the destination is {other:?}"),
    }
}

#[test]
fn a_source_that_dies_at_any_message_leaves_a_destination_that_has_all_or_asks() {
    for post_copy in [PostCopy::Never, PostCopy::Now] {
        break_each(post_copy, Last::Arrives, destination_alone);
    }
}
