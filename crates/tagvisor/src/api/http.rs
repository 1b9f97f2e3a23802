//! HTTP/1.1 as far as the control socket needs it: bodies whose length is said beforehand, and connections that are
//! kept. Whoever sends anything else is told so, or left.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use httparse::Status as Parsed;

use super::wire::{Deadline, Wire};
use crate::inspection::PROTOCOL;

/// The most bytes before a body.
pub const MAX_HEAD: usize = 16 << 10;

/// The most bytes of a body.
pub const MAX_BODY: usize = 1 << 20;

/// The most headers.
const MAX_HEADERS: usize = 64;

/// For how long a client that was refused may go on writing before it reads that it was.
const LINGER: Duration = Duration::from_secs(1);

/// How a request went. The numbers are RFC 9110's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    SwitchingProtocols = 101,
    Ok = 200,
    NoContent = 204,
    BadRequest = 400,
    Forbidden = 403,
    NotFound = 404,
    MethodNotAllowed = 405,
    RequestTimeout = 408,
    Conflict = 409,
    LengthRequired = 411,
    ContentTooLarge = 413,
    UpgradeRequired = 426,
    HeadersTooLarge = 431,
    InternalServerError = 500,
    ServiceUnavailable = 503,
}

/// A request, read to its end.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// Without host and query.
    pub path: String,
    pub body: Vec<u8>,
    /// The client may send another one.
    pub keep_alive: bool,
    /// It is ready to go on in [`PROTOCOL`].
    pub upgrades: bool,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: Status,
    /// JSON, or nothing.
    pub body: Vec<u8>,
    /// With [`Status::MethodNotAllowed`]: the method that is.
    pub allow: Option<&'static str>,
}

impl Response {
    /// A request that was carried out and has nothing to say.
    pub const NO_CONTENT: Self = Self {
        status: Status::NoContent,
        body: Vec::new(),
        allow: None,
    };

    /// The connection is no longer HTTP's after this.
    pub const SWITCHING_PROTOCOLS: Self = Self {
        status: Status::SwitchingProtocols,
        body: Vec::new(),
        allow: None,
    };

    /// What was asked for.
    pub fn ok(body: &impl serde::Serialize) -> Self {
        Self {
            status: Status::Ok,
            body: json(body),
            allow: None,
        }
    }

    /// What went wrong, from what was wanted to why it was not done, as Cloud Hypervisor says it.
    pub fn error(status: Status, messages: &[&str]) -> Self {
        Self {
            status,
            body: json(&messages),
            allow: None,
        }
    }

    /// The bytes of the answer. A `closing` one says that no other follows.
    pub fn to_bytes(&self, closing: bool) -> Vec<u8> {
        let connection = match self.status {
            Status::SwitchingProtocols => "Upgrade",
            _ if closing => "close",
            _ => "keep-alive",
        };
        // Without a reason: Cloud Hypervisor's client takes all that follows the version for the number.
        let mut head = format!(
            "HTTP/1.1 {} \r\nServer: Tagvisor\r\nConnection: {connection}\r\n",
            self.status as u16,
        );
        if let Some(method) = self.allow {
            head += &format!("Allow: {method}\r\n");
        }
        if matches!(
            self.status,
            Status::SwitchingProtocols | Status::UpgradeRequired
        ) {
            head += &format!("Upgrade: {PROTOCOL}\r\n");
        }
        if !matches!(self.status, Status::NoContent | Status::SwitchingProtocols) {
            head += &format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                self.body.len()
            );
        }
        head += "\r\n";
        [head.as_bytes(), &self.body].concat()
    }
}

fn json(body: &impl serde::Serialize) -> Vec<u8> {
    // Fails only for maps whose keys are no text, which no answer has.
    serde_json::to_vec(body).unwrap_or_default()
}

/// Why there is no request.
#[derive(Debug)]
pub enum Unreadable {
    /// The client left, or said nothing for too long between two requests.
    Gone,
    /// It sent what cannot be answered otherwise.
    Refused(Status, &'static str),
}

use Unreadable::{Gone, Refused};

/// How long a client may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From the first byte of a request to its last, and the same again for the answer.
    pub request: Duration,
    /// Until the first byte.
    pub idle: Duration,
}

/// A client, served one request after the other.
pub struct Connection {
    wire: Wire,
    patience: Patience,
}

impl Connection {
    pub fn new(wire: Wire, patience: Patience) -> Self {
        Self { wire, patience }
    }

    /// Waits for a request and reads it to its end.
    ///
    /// # Errors
    /// There is none, and the connection is of no more use.
    pub fn read_request(&mut self) -> Result<Request, Unreadable> {
        if self.wire.received().is_empty() {
            let idle = Some(Instant::now() + self.patience.idle);
            if !matches!(self.wire.receive(idle), Ok(1..)) {
                return Err(Gone);
            }
        }
        let deadline = Some(Instant::now() + self.patience.request);
        let head = loop {
            if let Some(head) = Head::parse(self.wire.received())? {
                break head;
            }
            self.receive_more(deadline)?;
        };
        self.wire.take(head.len);
        self.read_body(head, deadline)
    }

    fn read_body(&mut self, head: Head, deadline: Deadline) -> Result<Request, Unreadable> {
        if head.expects_continue && self.wire.received().len() < head.body_len {
            self.wire
                .send(b"HTTP/1.1 100 Continue\r\n\r\n", deadline)
                .map_err(|_| Gone)?;
        }
        while self.wire.received().len() < head.body_len {
            self.receive_more(deadline)?;
        }
        Ok(Request {
            body: self.wire.take(head.body_len),
            method: head.method,
            path: head.path,
            keep_alive: head.keep_alive,
            upgrades: head.upgrades,
        })
    }

    fn receive_more(&mut self, deadline: Deadline) -> Result<(), Unreadable> {
        match self.wire.receive(deadline) {
            Ok(1..) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                Err(Refused(Status::RequestTimeout, "the request took too long"))
            }
            _ => Err(Gone),
        }
    }

    /// Answers, and says whether the client got it.
    pub fn answer(&mut self, response: &Response, closing: bool) -> bool {
        let deadline = Some(Instant::now() + self.patience.request);
        let answered = self.wire.send(&response.to_bytes(closing), deadline);
        answered.is_ok()
    }

    /// The connection, which is no longer HTTP's.
    pub fn into_stream(self) -> UnixStream {
        self.wire.into_stream()
    }

    /// Lets a client that was refused read why.
    pub fn linger(&mut self) {
        let longest = LINGER.min(self.patience.request);
        self.wire.linger(Some(Instant::now() + longest));
    }
}

/// What comes before a body.
struct Head {
    len: usize,
    method: String,
    path: String,
    body_len: usize,
    keep_alive: bool,
    expects_continue: bool,
    upgrades: bool,
}

impl Head {
    /// `None` if there is more to come.
    fn parse(bytes: &[u8]) -> Result<Option<Self>, Unreadable> {
        let bounded = &bytes[..bytes.len().min(MAX_HEAD)];
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let len = match request.parse(bounded) {
            Ok(Parsed::Complete(len)) => len,
            Ok(Parsed::Partial) if bytes.len() >= MAX_HEAD => {
                return Err(Refused(
                    Status::HeadersTooLarge,
                    "more than 16 KiB of headers",
                ));
            }
            Ok(Parsed::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => {
                return Err(Refused(Status::HeadersTooLarge, "more than 64 headers"));
            }
            Err(_) => return Err(Refused(Status::BadRequest, "this is not HTTP/1.1")),
        };
        let current = request.version == Some(1);
        let body_len = body_len(request.headers)?;
        Ok(Some(Self {
            len,
            method: request.method.unwrap_or_default().into(),
            path: path_of(request.path.unwrap_or_default()).into(),
            body_len,
            keep_alive: current && !has_token(request.headers, "connection", "close"),
            expects_continue: current && has_token(request.headers, "expect", "100-continue"),
            upgrades: current && has_token(request.headers, "upgrade", PROTOCOL),
        }))
    }
}

/// The path of a request's target, which may be a whole URL and have a query.
fn path_of(target: &str) -> &str {
    let path = match target.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |start| &rest[start..]),
        None => target,
    };
    path.split('?').next().unwrap_or_default()
}

fn has_token(headers: &[httparse::Header], name: &str, token: &str) -> bool {
    headers
        .iter()
        .filter(|header| header.name.eq_ignore_ascii_case(name))
        .flat_map(|header| header.value.split(|byte| *byte == b','))
        .any(|value| value.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

fn body_len(headers: &[httparse::Header]) -> Result<usize, Unreadable> {
    let has = |name| move |header: &&httparse::Header| header.name.eq_ignore_ascii_case(name);
    if headers
        .iter()
        .any(|header| has("transfer-encoding")(&header))
    {
        return Err(Refused(
            Status::LengthRequired,
            "a body needs a Content-Length here, and no Transfer-Encoding",
        ));
    }
    let mut lengths = headers.iter().filter(has("content-length"));
    let Some(first) = lengths.next() else {
        return Ok(0);
    };
    if lengths.any(|other| other.value != first.value) {
        return Err(Refused(
            Status::BadRequest,
            "it has more than one Content-Length",
        ));
    }
    match decimal(first.value) {
        Some(length) if length <= MAX_BODY => Ok(length),
        Some(_) => Err(Refused(
            Status::ContentTooLarge,
            "a body of more than 1 MiB",
        )),
        None => Err(Refused(
            Status::BadRequest,
            "its Content-Length is no number",
        )),
    }
}

/// A number of digits alone; one beyond all bounds is the largest there is.
fn decimal(text: &[u8]) -> Option<usize> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let text = std::str::from_utf8(text).ok()?;
    Some(text.parse().unwrap_or(usize::MAX))
}

/// The answer to a request, as a client reads it.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

/// Reads the answer to a request.
///
/// # Errors
/// It does not come in time, or is none; `InvalidData` then.
pub fn read_answer(wire: &mut Wire, deadline: Deadline) -> io::Result<Answer> {
    loop {
        let (status, head_len, body_len) = loop {
            if let Some(found) = parse_answer(wire.received())? {
                break found;
            }
            receive_more(wire, deadline)?;
        };
        wire.take(head_len);
        while wire.received().len() < body_len {
            receive_more(wire, deadline)?;
        }
        let body = wire.take(body_len);
        if status >= 200 || status == Status::SwitchingProtocols as u16 {
            return Ok(Answer { status, body });
        }
    }
}

fn receive_more(wire: &mut Wire, deadline: Deadline) -> io::Result<()> {
    match wire.receive(deadline)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// Status, bytes of the head, bytes of the body; `None` if there is more to come.
fn parse_answer(bytes: &[u8]) -> io::Result<Option<(u16, usize, usize)>> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP/1.1");
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let bounded = &bytes[..bytes.len().min(MAX_HEAD)];
    match response.parse(bounded).map_err(|_| invalid())? {
        Parsed::Complete(len) => {
            let body_len = body_len(response.headers).map_err(|_| invalid())?;
            Ok(Some((response.code.unwrap_or_default(), len, body_len)))
        }
        Parsed::Partial if bytes.len() >= MAX_HEAD => Err(invalid()),
        Parsed::Partial => Ok(None),
    }
}
