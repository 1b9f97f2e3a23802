//! The hand-over, gone through in every order of messages, broken links, deaths and decisions.
//!
//! The model has both sides' state machines as they are in the crate, a link that loses what is on its way when it
//! breaks (or delivers some of it before it is noticed), processes that are killed, and an operator who does what the messages
//! allow: to decide for a side only after having made sure of the other.

use migration::handover::{Destination, DestinationEvent, Source, SourceEvent};
use stateright::{Checker, Model, Property};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Message {
    /// To the destination: state and last pages.
    Last,
    Run,
    Abort,
    /// The source is back on a new link.
    Back,
    /// To the source.
    Ready,
    State(Destination),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Hosts {
    source: Source,
    source_lives: bool,
    destination: Destination,
    destination_lives: bool,
    link: bool,
    /// A side finds out that its link broke when it reads or writes next.
    source_noticed: bool,
    destination_noticed: bool,
    to_source: Vec<Message>,
    to_destination: Vec<Message>,
    /// The guest has run at the destination: what the source has of it is old.
    moved: bool,
    /// A side died that had what no other had.
    lost_by_death: bool,
    cuts: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Stop,
    GiveUp,
    /// The next message arrives.
    ToSource,
    ToDestination,
    /// The last page comes.
    AllThere,
    /// The guest ends its machine at the destination.
    GuestEnds,
    Cut,
    LoseToSource,
    LoseToDestination,
    SourceNotices,
    DestinationNotices,
    Reconnect,
    KillSource,
    KillDestination,
    TakeBack,
    TakeOver,
    ForgetAtSource,
    ForgetAtDestination,
}

/// Pages stay at the source, or not.
struct HandOver {
    post_copy: bool,
}

impl HandOver {
    fn send(&self, hosts: &mut Hosts, message: Message) {
        if !hosts.link {
            return;
        }
        match message {
            Message::Ready | Message::State(_) => hosts.to_source.push(message),
            _ => hosts.to_destination.push(message),
        }
    }

    fn source(hosts: &mut Hosts, event: SourceEvent) -> bool {
        let next = hosts.source.on(event);
        hosts.source = next.unwrap_or(hosts.source);
        next.is_some()
    }

    fn destination(hosts: &mut Hosts, event: DestinationEvent) -> bool {
        let next = hosts.destination.on(event);
        hosts.destination = next.unwrap_or(hosts.destination);
        hosts.moved |= hosts.destination.may_run();
        next.is_some()
    }

    /// The source reads a message.
    fn at_source(&self, hosts: &mut Hosts, message: Message) {
        match message {
            Message::Ready => {
                let pages_stay = self.post_copy;
                if Self::source(hosts, SourceEvent::Ready { pages_stay }) {
                    self.send(hosts, Message::Run);
                }
            }
            // Only to say that it keeps the guest.
            Message::State(_) if hosts.source == Source::Kept => self.send(hosts, Message::Abort),
            Message::State(state) => {
                Self::source(hosts, SourceEvent::Found(state));
                if matches!(hosts.source, Source::Committed { .. }) {
                    self.send(hosts, Message::Run);
                }
            }
            other => panic!("{other:?} is not for the source"),
        }
    }

    /// The destination reads a message.
    fn at_destination(&self, hosts: &mut Hosts, message: Message) {
        match message {
            Message::Last => {
                let pages_missing = self.post_copy;
                if Self::destination(hosts, DestinationEvent::Loaded { pages_missing }) {
                    self.send(hosts, Message::Ready);
                }
            }
            Message::Run => {
                if Self::destination(hosts, DestinationEvent::Run) {
                    self.send(hosts, Message::State(hosts.destination));
                }
            }
            Message::Abort => {
                Self::destination(hosts, DestinationEvent::Abort);
            }
            Message::Back => {
                Self::destination(hosts, DestinationEvent::Found);
                self.send(hosts, Message::State(hosts.destination));
            }
            other => panic!("{other:?} is not for the destination"),
        }
    }

    fn has_whole_guest(destination: Destination) -> bool {
        matches!(
            destination,
            Destination::Complete
                | Destination::Ready {
                    pages_missing: false
                }
                | Destination::Undecided {
                    pages_missing: false
                }
        )
    }

    fn kill_source(hosts: &mut Hosts) {
        hosts.source_lives = false;
        hosts.lost_by_death |= hosts.source.may_run();
        hosts.lost_by_death |=
            !Self::has_whole_guest(hosts.destination) || !hosts.destination_lives;
    }

    fn kill_destination(hosts: &mut Hosts) {
        hosts.destination_lives = false;
        hosts.lost_by_death |= hosts.moved || !hosts.source_lives;
    }

    /// A living side, or both together, could still run the guest as it is.
    fn is_recoverable(hosts: &Hosts) -> bool {
        let at_source = hosts.source_lives && !hosts.moved && hosts.source != Source::Gone;
        let at_destination = hosts.destination_lives && Self::has_whole_guest(hosts.destination);
        let halves = hosts.source_lives
            && hosts.destination_lives
            && !matches!(hosts.source, Source::Gone | Source::Kept)
            && matches!(
                hosts.destination,
                Destination::Running | Destination::Separated
            );
        at_source || at_destination || halves
    }

    fn somebody_runs(hosts: &Hosts) -> bool {
        hosts.source_lives && hosts.source.may_run()
            || hosts.destination_lives && hosts.destination.may_run()
    }
}

impl Model for HandOver {
    type State = Hosts;
    type Action = Action;

    fn init_states(&self) -> Vec<Hosts> {
        vec![Hosts {
            source: Source::Sending,
            source_lives: true,
            destination: Destination::Receiving,
            destination_lives: true,
            link: true,
            source_noticed: false,
            destination_noticed: false,
            to_source: vec![],
            to_destination: vec![],
            moved: false,
            lost_by_death: false,
            cuts: 2,
        }]
    }

    fn actions(&self, hosts: &Hosts, actions: &mut Vec<Action>) {
        let mut may = |condition: bool, action| {
            if condition {
                actions.push(action);
            }
        };
        let (source, destination) = (hosts.source_lives, hosts.destination_lives);
        may(source && hosts.source == Source::Sending, Action::Stop);
        may(
            source && matches!(hosts.source, Source::Sending | Source::Stopped),
            Action::GiveUp,
        );
        may(
            source && !hosts.source_noticed && !hosts.to_source.is_empty(),
            Action::ToSource,
        );
        may(
            destination && !hosts.destination_noticed && !hosts.to_destination.is_empty(),
            Action::ToDestination,
        );
        may(
            destination && hosts.destination == Destination::Running && hosts.link && source,
            Action::AllThere,
        );
        may(
            destination
                && matches!(
                    hosts.destination,
                    Destination::Running | Destination::Separated
                ),
            Action::GuestEnds,
        );
        may(hosts.link && hosts.cuts > 0, Action::Cut);
        may(
            !hosts.link && !hosts.to_source.is_empty(),
            Action::LoseToSource,
        );
        may(
            !hosts.link && !hosts.to_destination.is_empty(),
            Action::LoseToDestination,
        );
        may(
            source && !hosts.link && !hosts.source_noticed,
            Action::SourceNotices,
        );
        may(
            destination
                && !hosts.link
                && !hosts.destination_noticed
                && hosts.to_destination.is_empty(),
            Action::DestinationNotices,
        );
        may(
            source
                && destination
                && hosts.source_noticed
                && matches!(
                    hosts.source,
                    Source::Undecided { .. } | Source::Separated | Source::Kept
                )
                && !matches!(hosts.destination, Destination::Discarded),
            Action::Reconnect,
        );
        may(source, Action::KillSource);
        may(destination, Action::KillDestination);
        let nothing_there =
            !destination && !hosts.moved || hosts.destination == Destination::Discarded;
        may(
            source && matches!(hosts.source, Source::Undecided { .. }) && nothing_there,
            Action::TakeBack,
        );
        may(
            destination
                && matches!(hosts.destination, Destination::Undecided { .. })
                && !source
                && hosts.source != Source::Kept,
            Action::TakeOver,
        );
        may(
            source
                && matches!(hosts.source, Source::Undecided { .. } | Source::Separated)
                && matches!(
                    hosts.destination,
                    Destination::Complete | Destination::Ended
                ),
            Action::ForgetAtSource,
        );
        may(
            destination
                && matches!(hosts.destination, Destination::Undecided { .. })
                && source
                && hosts.source == Source::Kept,
            Action::ForgetAtDestination,
        );
    }

    fn next_state(&self, last: &Hosts, action: Action) -> Option<Hosts> {
        let mut hosts = last.clone();
        match action {
            Action::Stop => {
                Self::source(&mut hosts, SourceEvent::Stop);
                self.send(&mut hosts, Message::Last);
            }
            Action::GiveUp => {
                Self::source(&mut hosts, SourceEvent::Failed);
                self.send(&mut hosts, Message::Abort);
            }
            Action::ToSource => {
                let message = hosts.to_source.remove(0);
                self.at_source(&mut hosts, message);
            }
            Action::ToDestination => {
                let message = hosts.to_destination.remove(0);
                self.at_destination(&mut hosts, message);
            }
            Action::AllThere => {
                Self::destination(&mut hosts, DestinationEvent::AllThere);
                self.send(&mut hosts, Message::State(Destination::Complete));
            }
            // One that is separated has no link to say it on; it does when the source is back.
            Action::GuestEnds => {
                let was = hosts.destination;
                Self::destination(&mut hosts, DestinationEvent::End);
                if was == Destination::Running {
                    self.send(&mut hosts, Message::State(Destination::Ended));
                }
            }
            Action::Cut => {
                hosts.link = false;
                hosts.cuts -= 1;
            }
            Action::LoseToSource => hosts.to_source.clear(),
            Action::LoseToDestination => hosts.to_destination.clear(),
            Action::SourceNotices => {
                hosts.source_noticed = true;
                hosts.to_source.clear();
                Self::source(&mut hosts, SourceEvent::Failed);
            }
            Action::DestinationNotices => {
                hosts.destination_noticed = true;
                Self::destination(&mut hosts, DestinationEvent::Failed);
            }
            Action::Reconnect => {
                // The new link ends the old one, also for a destination that has not noticed.
                if !hosts.destination_noticed {
                    Self::destination(&mut hosts, DestinationEvent::Failed);
                }
                hosts.link = true;
                hosts.source_noticed = false;
                hosts.destination_noticed = false;
                hosts.to_source.clear();
                hosts.to_destination = vec![Message::Back];
            }
            Action::KillSource => {
                Self::kill_source(&mut hosts);
                hosts.link = false;
            }
            Action::KillDestination => {
                Self::kill_destination(&mut hosts);
                hosts.link = false;
            }
            Action::TakeBack => _ = Self::source(&mut hosts, SourceEvent::TakeBack),
            Action::TakeOver => _ = Self::destination(&mut hosts, DestinationEvent::TakeOver),
            Action::ForgetAtSource => _ = Self::source(&mut hosts, SourceEvent::Forget),
            Action::ForgetAtDestination => {
                Self::destination(&mut hosts, DestinationEvent::Forget);
            }
        }
        (hosts != *last).then_some(hosts)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two sides run the guest", |_, hosts: &Hosts| {
                !(hosts.source_lives
                    && hosts.source.may_run()
                    && hosts.destination_lives
                    && hosts.destination.may_run())
            }),
            Property::always(
                "the source never runs what has moved on",
                |_, hosts: &Hosts| !(hosts.moved && hosts.source_lives && hosts.source.may_run()),
            ),
            Property::always(
                "the destination never runs what has gone on",
                |_, hosts: &Hosts| {
                    !(hosts.source == Source::Kept
                        && hosts.destination_lives
                        && hosts.destination.may_run())
                },
            ),
            Property::always("no guest is lost but by a death", |_, hosts: &Hosts| {
                hosts.lost_by_death
                    || hosts.destination == Destination::Ended
                    || Self::is_recoverable(hosts)
            }),
            Property::always(
                "a source that has heard all lets go of a guest that ended",
                |_, hosts: &Hosts| {
                    let has_heard_all = hosts.source_lives
                        && hosts.destination_lives
                        && hosts.link
                        && hosts.to_source.is_empty()
                        && hosts.to_destination.is_empty();
                    !(hosts.destination == Destination::Ended && has_heard_all)
                        || hosts.source == Source::Gone
                },
            ),
            Property::always("there is always a way to go on", |model, hosts: &Hosts| {
                let mut actions = Vec::new();
                model.actions(hosts, &mut actions);
                actions.retain(|action| {
                    !matches!(
                        action,
                        Action::Cut | Action::KillSource | Action::KillDestination
                    )
                });
                let has_ended =
                    hosts.destination == Destination::Ended && hosts.source == Source::Gone;
                hosts.lost_by_death
                    || has_ended
                    || Self::somebody_runs(hosts)
                    || !actions.is_empty()
            }),
            Property::sometimes("the guest arrives", |_, hosts: &Hosts| {
                hosts.source == Source::Gone && hosts.destination == Destination::Complete
            }),
            Property::sometimes("neither knows", |_, hosts: &Hosts| {
                matches!(hosts.source, Source::Undecided { .. })
                    && matches!(hosts.destination, Destination::Undecided { .. })
            }),
            Property::sometimes(
                "the source goes on after the guest was stopped",
                |_, hosts: &Hosts| {
                    hosts.source == Source::Kept
                        && matches!(hosts.destination, Destination::Undecided { .. })
                },
            ),
        ]
    }
}

fn check(post_copy: bool) {
    let checker = HandOver { post_copy }
        .checker()
        .threads(2)
        .spawn_bfs()
        .join();
    assert!(checker.is_done());
    checker.assert_properties();
}

#[test]
fn after_pre_copy_never_two_sides_run_and_no_guest_is_lost() {
    check(false);
}

#[test]
fn with_pages_still_at_the_source_never_two_sides_run_and_no_guest_is_lost() {
    check(true);
}
