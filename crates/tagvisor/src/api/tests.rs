//! The control socket against a VMM that only writes down what it is asked.

mod bodies;
mod clients;
mod contract;
pub mod double;
mod hostile;
mod requests;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::http::Patience;
use super::server::{Limits, Server, serve_within};
use double::Double;

/// As long as a test waits for what has to happen.
const SOON: Duration = Duration::from_secs(20);

/// A server, and a directory for its socket.
struct Served {
    server: Option<Server>,
    vmm: Arc<Double>,
    directory: tempfile::TempDir,
}

/// Short enough that a test can wait for the end of it, long enough for a busy machine.
fn impatient() -> Limits {
    Limits {
        connections: 32,
        patience: Patience {
            request: Duration::from_millis(400),
            idle: Duration::from_millis(800),
        },
    }
}

/// Eight connections, and time for everything.
fn few() -> Limits {
    Limits {
        connections: 8,
        ..patient()
    }
}

fn patient() -> Limits {
    Limits {
        connections: 32,
        patience: Patience {
            request: SOON,
            idle: SOON,
        },
    }
}

impl Served {
    fn new(vmm: Arc<Double>, limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = serve_within(&directory.path().join("api.sock"), vmm.clone(), limits).unwrap();
        Self {
            server: Some(server),
            vmm,
            directory,
        }
    }

    /// With a machine that runs, and time for everything.
    fn running() -> Self {
        Self::new(Double::running(), patient())
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("api.sock")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        stream
    }

    /// Sends bytes, and reads all that comes until the server closes.
    fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // Who is refused early may not be read to the end.
        let _ = stream.write_all(bytes);
        everything(&mut stream)
    }

    /// Sends one request for a path, and returns status and body of the answer.
    fn ask(&self, method: &str, name: &str, body: &str) -> (u16, serde_json::Value) {
        let answer = self.exchange(&request(method, name, body));
        (status(&answer), body_of(&answer))
    }
}

fn request(method: &str, name: &str, body: &str) -> Vec<u8> {
    format!(
        "{method} /api/v1/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// All that comes until the server closes, or cuts the connection.
fn everything(stream: &mut UnixStream) -> String {
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

/// The status of the first answer; 0 if there is none.
fn status(answer: &str) -> u16 {
    let status = answer
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3));
    status.map_or(0, |status| status.parse().unwrap())
}

fn body_of(answer: &str) -> serde_json::Value {
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    serde_json::from_str(body).unwrap_or_default()
}

/// Waits for what other threads bring about.
fn wait_until(happened: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + SOON;
    while !happened() {
        assert!(std::time::Instant::now() < deadline, "it did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}
