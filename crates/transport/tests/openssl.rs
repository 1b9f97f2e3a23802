//! The commands of docs/tls.md make what the two sides take.

mod authority;

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use transport::{ClientIdentity, Listener, Side, TlsFiles, Unprotected, connect};

const DOCUMENT: &str = include_str!("../../../docs/tls.md");

/// The shell commands of the document, in their order.
fn commands() -> Vec<&'static str> {
    let blocks = DOCUMENT.split("```sh\n").skip(1);
    blocks
        .filter_map(|rest| Some(rest.split_once("```")?.0))
        .collect()
}

fn run(commands: &str, directory: &Path) {
    let output = Command::new("sh")
        .args(["-e", "-c", commands])
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "needs openssl"]
fn certificates_made_as_documented_work_and_can_be_taken_back() {
    let directory = tempfile::tempdir().unwrap();
    let [authority, host, list] = commands()[..] else {
        panic!("the document has other commands");
    };
    run(authority, directory.path());
    run(host, directory.path());
    let receiver = authority::server(directory.path());
    let sender = authority::client(directory.path())
        .expecting("host-b.example.org")
        .unwrap();
    let address = "tcp://127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(&address, Some(&receiver), Unprotected::Refused).unwrap();
    let soon = Instant::now() + Duration::from_secs(10);

    let (received, sent) = thread::scope(|scope| {
        let received = scope.spawn(|| listener.accept(Some(soon)).unwrap().establish(soon));
        let sent = connect(listener.local_address(), Some(&sender), soon);
        (received.join().unwrap(), sent)
    });
    run(list, directory.path());
    let files = TlsFiles::in_directory(directory.path(), Side::Client);
    let revoked = ClientIdentity::load(&files).unwrap_err().to_string();

    assert!(received.unwrap().peer().ends_with("(host-b.example.org)"));
    sent.unwrap();
    assert!(revoked.contains("it was revoked"), "{revoked}");
}
