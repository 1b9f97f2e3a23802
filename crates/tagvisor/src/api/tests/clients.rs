//! The client, against the server and against others that answer what they should not.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Instant;

use inspect::TaggedMemory;

use super::super::client::{Client, Error};
use super::super::migration::{ReceiveMigrationConfig, SendMigrationConfig};
use super::super::model::{InspectConfig, SnapshotConfig};
use super::double::{Call, migration_report, report};
use super::*;
use crate::control::{Decision, InspectRequest, Refusal, VmState};

/// What a client makes of one who answers `answer`, whatever is asked.
fn told(answer: &'static [u8]) -> Error {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let answering = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1000]).unwrap();
        let _ = stream.write_all(answer);
    });
    let error = Client::new(&socket)
        .patient(Duration::from_secs(5))
        .info()
        .unwrap_err();
    answering.join().unwrap();
    error
}

#[test]
fn what_a_client_asks_is_done() {
    let served = Served::running();
    let client = Client::new(served.socket());

    client.pause().unwrap();
    client.resume().unwrap();
    let info = client.info().unwrap();
    let written = client.snapshot(&SnapshotConfig {
        destination_url: "file:///n/a".into(),
        base: None,
        compression: None,
        report: true,
    });

    assert_eq!(served.vmm.calls()[..2], [Call::Pause, Call::Resume]);
    assert_eq!(
        (info.state, info.config.cpus.boot_vcpus),
        (VmState::Running, 2)
    );
    assert_eq!(written.unwrap(), report());
}

#[test]
fn a_client_looks_at_memory_over_a_connection_that_is_upgraded() {
    let served = Served::running();
    let client = Client::new(served.socket());
    let config = InspectConfig {
        live: true,
        reader: Some("process 7".into()),
    };

    let memory = client.inspect(&config).unwrap().memory().unwrap();

    assert_eq!(memory.ram(), 0x40000..0x40010);
    let asked = InspectRequest {
        live: true,
        reader: Some("process 7".into()),
    };
    assert_eq!(served.vmm.calls(), [Call::Inspect(asked)]);
}

#[test]
fn a_client_that_may_not_look_at_memory_is_told_why() {
    let served = Served::running();
    served.vmm.refuse(Refusal::Failed("no".into()));
    let refused = Client::new(served.socket()).inspect(&InspectConfig::default());
    assert_eq!(
        refused.map(drop).unwrap_err().to_string(),
        "The VM could not be inspected: no"
    );
}

#[test]
fn a_client_that_does_not_know_the_protocol_is_not_lent_memory() {
    let served = Served::running();
    let (status, body) = served.ask("PUT", "vm.inspect", "{}");
    assert_eq!(status, 426);
    assert_eq!(
        body[1],
        "it needs a connection that is upgraded to tagvisor-inspect"
    );
    assert_eq!(served.vmm.calls(), []);
}

#[test]
fn what_a_client_asks_of_migrations_is_done() {
    let served = Served::running();
    let client = Client::new(served.socket());
    let arriving: ReceiveMigrationConfig =
        serde_json::from_str(r#"{"receiver_url": "unix:/run/b"}"#).unwrap();

    let sent = client.send_migration(&SendMigrationConfig::to("unix:/run/b"));
    client.receive_migration(&arriving).unwrap();
    client.cancel_migration().unwrap();
    client.decide_migration(Decision::Here).unwrap();

    assert_eq!(sent.unwrap(), migration_report());
    assert!(matches!(
        served.vmm.calls()[..],
        [
            Call::Migrate(_),
            Call::Receive(_),
            Call::CancelMigration,
            Call::DecideMigration(Decision::Here)
        ]
    ));
}

#[test]
fn a_migration_is_waited_for_longer_than_other_answers() {
    let served = Served::running();
    served.vmm.hold();
    let client = Client::new(served.socket()).patient(Duration::from_millis(50));
    let sending = thread::spawn(move || client.send_migration(&SendMigrationConfig::to("unix:/b")));

    wait_until(|| !served.vmm.calls().is_empty());
    thread::sleep(Duration::from_millis(200));
    served.vmm.release();

    assert_eq!(sending.join().unwrap().unwrap(), migration_report());
}

#[test]
fn a_refusal_comes_with_its_reasons() {
    let served = Served::running();
    served.vmm.refuse(Refusal::NoVm);
    let error = Client::new(served.socket()).pause().unwrap_err();
    assert_eq!(
        error.to_string(),
        "The VM could not be paused: there is no VM: create or restore one first"
    );
}

#[test]
fn one_who_is_turned_away_learns_why() {
    let served = Served::new(Double::running(), few());
    let _kept: Vec<_> = (0..8).map(|_| served.connect()).collect();
    let error = Client::new(served.socket()).info().unwrap_err();
    assert!(
        matches!(error, Error::Refused { status: 503, .. }),
        "{error}"
    );
}

#[test]
fn a_socket_that_nobody_listens_at_is_told_from_one_that_is_silent() {
    let directory = tempfile::tempdir().unwrap();
    let silent = directory.path().join("silent.sock");
    let dead = directory.path().join("dead.sock");
    let _listener = UnixListener::bind(&silent).unwrap();
    drop(UnixListener::bind(&dead).unwrap());
    let asked = |path: &std::path::Path| {
        let patience = Duration::from_millis(100);
        Client::new(path).patient(patience).info().unwrap_err()
    };

    assert!(matches!(asked(&silent), Error::Silent { .. }));
    assert!(matches!(asked(&dead), Error::Nobody(_)));
    assert!(matches!(
        asked(&directory.path().join("none")),
        Error::Nobody(_)
    ));
}

#[test]
fn one_who_takes_up_no_connections_is_not_waited_for_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _waiting = UnixStream::connect(&socket).unwrap();

    let started = Instant::now();
    let error = Client::new(&socket)
        .patient(Duration::from_millis(100))
        .info()
        .unwrap_err();

    assert!(matches!(error, Error::Silent { .. }), "{error}");
    assert!(started.elapsed() < SOON);
}

#[test]
fn answers_that_are_none_are_refused() {
    let strange = |answer| matches!(told(answer), Error::Strange { .. });
    assert!(strange(b"hello\r\n\r\n"));
    assert!(strange(
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"
    ));
    assert!(strange(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"));
    assert!(strange(&[b'x'; 20_000]));
}

#[test]
fn answers_that_end_too_early_are_refused() {
    let cut = |answer| matches!(told(answer), Error::Io { .. });
    assert!(cut(b""));
    assert!(cut(b"HTTP/1.1 200 OK\r\n"));
    assert!(cut(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{"));
}

#[test]
fn an_error_without_reasons_is_told_by_its_status() {
    let error = told(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 3\r\n\r\nwhy");
    assert_eq!(error.to_string(), "the VMM answered with status 502");
}

#[test]
fn the_process_at_the_other_end_is_known() {
    let served = Served::running();
    let process = Client::new(served.socket()).process().unwrap();
    assert_eq!(process, rustix::process::getpid());
}
