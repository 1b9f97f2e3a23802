//! Clients that mean harm, or do not know better: each is refused or left, and hurts nobody else.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use proptest::prelude::*;
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;

use super::*;

/// The status of the answer to these bytes.
fn answered(bytes: &[u8]) -> u16 {
    status(&Served::running().exchange(bytes))
}

/// The status of the answer to a request with these headers.
fn with_headers(headers: &str) -> u16 {
    answered(format!("PUT /api/v1/vm.pause HTTP/1.1\r\n{headers}\r\n").as_bytes())
}

fn still_serves(served: &Served) {
    assert_eq!(served.ask("GET", "vmm.ping", "").0, 200);
}

#[test]
fn what_is_not_http_is_refused() {
    assert_eq!(answered(b"hello\r\n\r\n"), 400);
    assert_eq!(answered(b"GET /api/v1/vmm.ping HTTP/2.0\r\n\r\n"), 400);
    assert_eq!(answered(b"GET /api/v1/vmm.ping\r\n\r\n"), 400);
    assert_eq!(
        answered(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        400
    );
    assert_eq!(answered(b"GET / HTTP/1.1\r\nno colon\r\n\r\n"), 400);
    assert_eq!(answered(b"GET / HTTP/1.1\r\n: x\r\n\r\n"), 400);
    assert_eq!(answered(b"GET / HTTP/1.1\r\nx: \0\r\n\r\n"), 400);
    assert_eq!(answered(&[0; 100]), 400);
    assert_eq!(answered(&[0xff; 100]), 400);
}

#[test]
fn a_path_that_is_not_utf_8_is_refused() {
    assert_eq!(
        answered(b"GET /api/v1/\xff\xfe HTTP/1.1\r\nConnection: close\r\n\r\n"),
        400
    );
}

#[test]
fn a_body_that_is_not_utf_8_is_refused() {
    assert_eq!(
        answered(b"PUT /api/v1/vm.create HTTP/1.1\r\nConnection: close\r\nContent-Length: 4\r\n\r\n\"\xff\xfe\""),
        400
    );
}

#[test]
fn lengths_that_are_no_lengths_are_refused() {
    let of = |length: &str| with_headers(&format!("Content-Length: {length}\r\n"));
    assert_eq!(
        ["-1", "+1", "1.0", "0x1", "", "1 1", "1,1", "\u{661}"].map(of),
        [400; 8]
    );
    assert_eq!(["1048577", "99999999999999999999999"].map(of), [413; 2]);
}

#[test]
fn two_lengths_are_refused_and_the_same_twice_is_not() {
    let close = "Connection: close\r\n";
    assert_eq!(
        with_headers("Content-Length: 0\r\nContent-Length: 1\r\n"),
        400
    );
    assert_eq!(
        with_headers(&format!(
            "{close}Content-Length: 0\r\nContent-Length: 0\r\n"
        )),
        204
    );
}

#[test]
fn a_body_in_chunks_is_refused() {
    assert_eq!(with_headers("Transfer-Encoding: chunked\r\n"), 411);
    assert_eq!(
        with_headers("Transfer-Encoding: gzip\r\nContent-Length: 1\r\n"),
        411
    );
}

#[test]
fn headers_without_end_are_refused() {
    let huge = format!("GET / HTTP/1.1\r\nx: {}", "y".repeat(1 << 20));
    let long_path = format!("GET /{}", "y".repeat(1 << 20));
    assert_eq!(answered(huge.as_bytes()), 431);
    assert_eq!(answered(long_path.as_bytes()), 431);
    assert_eq!(with_headers(&"x: y\r\n".repeat(65)), 431);
}

#[test]
fn a_client_that_writes_a_huge_body_before_it_reads_learns_that_it_is_refused() {
    let served = Served::running();
    let mut stream = served.connect();
    let mut bytes = b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4194304\r\n\r\n".to_vec();
    bytes.resize(4 << 20, b'x');

    stream.write_all(&bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();

    assert_eq!(status(&everything(&mut stream)), 413);
    still_serves(&served);
}

#[test]
fn a_body_of_a_mebibyte_is_read() {
    let body = format!(
        r#"{{"payload": {{"kernel": "/k", "cmdline": "{}"}}}}"#,
        "x".repeat((1 << 20) - 50)
    );
    assert_eq!(Served::running().ask("PUT", "vm.create", &body).0, 204);
}

#[test]
fn json_that_is_none_or_says_something_else_is_refused() {
    let served = Served::running();
    let deep = "[".repeat(100_000);
    let statuses = [
        "",
        "{",
        "null",
        "[]",
        "1",
        "\"\"",
        "{}",
        "{\"payload\": 1}",
        "{}{}",
        &deep,
    ]
    .map(|body| served.ask("PUT", "vm.create", body).0);
    assert_eq!(statuses, [400; 10]);
    assert_eq!(served.vmm.calls(), []);
}

#[test]
fn a_client_that_dribbles_is_refused_when_its_time_is_over() {
    let served = Served::new(Double::running(), impatient());
    let mut stream = served.connect();
    let started = Instant::now();
    let mut writer = stream.try_clone().unwrap();
    let dribbling = std::thread::spawn(move || {
        while writer.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
    });

    let answer = everything(&mut stream);
    dribbling.join().unwrap();

    assert_eq!(status(&answer), 408);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_client_that_stalls_in_its_body_is_refused() {
    let served = Served::new(Double::running(), impatient());
    let answer = served.exchange(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 10\r\n\r\n{");
    assert_eq!(status(&answer), 408);
}

#[test]
fn a_client_that_says_nothing_is_sent_away() {
    let served = Served::new(Double::running(), impatient());
    assert_eq!(served.exchange(b""), "");
}

#[test]
fn a_client_that_leaves_in_the_middle_asked_for_nothing() {
    let served = Served::new(Double::running(), impatient());
    for half in [
        "PUT /api/v1/vm.pa",
        "PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: 2\r\n\r\n{",
    ] {
        let mut stream = served.connect();
        stream.write_all(half.as_bytes()).unwrap();
    }
    still_serves(&served);
    assert_eq!(served.vmm.calls(), []);
}

#[test]
fn a_client_that_never_reads_is_left() {
    let served = Served::new(Double::running(), impatient());
    let mut deaf = served.connect();
    deaf.set_write_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    let asked = std::iter::repeat_with(|| deaf.write_all(b"GET /api/v1/vm.info HTTP/1.1\r\n\r\n"))
        .take(1_000_000)
        .position(|written| written.is_err());

    assert!(asked.is_some(), "the server read on and on");
    still_serves(&served);
}

#[test]
fn connections_beyond_the_bound_are_told_so_and_closed() {
    let served = Served::new(Double::running(), few());
    let kept: Vec<_> = (0..8).map(|_| served.connect()).collect();

    let refused = served.exchange(b"");
    drop(kept);
    wait_until(|| served.ask("GET", "vmm.ping", "").0 == 200);

    assert_eq!(status(&refused), 503);
}

#[test]
fn a_thousand_connections_are_served_or_told_so() {
    let served = Served::new(Double::running(), few());
    let statuses: Vec<_> = (0..1000)
        .map(|_| served.connect())
        .collect::<Vec<_>>()
        .into_iter()
        .map(|mut stream| {
            let _ = stream.write_all(b"GET /api/v1/vmm.ping HTTP/1.1\r\nConnection: close\r\n\r\n");
            status(&everything(&mut stream))
        })
        .collect();

    let unexpected: Vec<_> = statuses
        .iter()
        .filter(|status| ![200, 503].contains(status))
        .collect();
    assert_eq!(unexpected, [&0; 0], "{} connections", statuses.len());
    assert!(statuses.contains(&503));
    wait_until(|| served.ask("GET", "vmm.ping", "").0 == 200);
}

#[test]
fn the_socket_is_for_its_owner_alone() {
    let served = Served::running();
    let mode = std::fs::metadata(served.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_directory_that_is_made_for_the_socket_is_for_its_owner_alone() {
    let directory = tempfile::tempdir().unwrap();
    let made = directory.path().join("made");
    let _server = serve_within(&made.join("api.sock"), Double::running(), patient()).unwrap();
    let mode = std::fs::metadata(&made).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

/// What another user is answered; `None` where this one may not become another. Identities belong to threads in Linux.
fn answer_to_another_user(served: &Served) -> Option<String> {
    let nobody = Uid::from_raw(65534);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            set_thread_res_uid(nobody, nobody, nobody).ok()?;
            Some(served.exchange(b""))
        });
        asking.join().unwrap()
    })
}

#[test]
fn another_user_is_refused_even_where_the_file_lets_him_in() {
    let served = Served::running();
    for (path, mode) in [(served.directory.path(), 0o755), (&served.socket(), 0o666)] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }

    let Some(answer) = answer_to_another_user(&served) else {
        println!("skipped: only root can become another user");
        return;
    };

    assert_eq!(status(&answer), 403, "{answer}");
    assert_eq!(served.vmm.calls(), []);
}

/// Pieces that requests are made of, and others.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..20),
        Just(b"GET /api/v1/vm.info HTTP/1.1\r\n".to_vec()),
        Just(b"PUT /api/v1/vm.create HTTP/1.0\r\n".to_vec()),
        Just(b"Content-Length: 3\r\n".to_vec()),
        Just(b"Content-Length: 99999999999999999999\r\n".to_vec()),
        Just(b"Transfer-Encoding: chunked\r\n".to_vec()),
        Just(b"Expect: 100-continue\r\n".to_vec()),
        Just(b"Connection: close, keep-alive\r\n".to_vec()),
        Just(b"\r\n".to_vec()),
        Just(b"{}\n".to_vec()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn no_bytes_make_the_server_panic_or_hang(pieces in prop::collection::vec(piece(), 0..12)) {
        let served = Served::new(Double::running(), patient());
        let mut stream = served.connect();
        let _ = stream.write_all(&pieces.concat());
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let answer = everything(&mut stream);
        prop_assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 "));
        prop_assert_eq!(served.ask("GET", "vmm.ping", "").0, 200);
    }
}
