//! Connections without TLS: who may listen where, bounded waiting, closing, the rate, and peers that mean ill.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};

use tempfile::TempDir;
use transport::{
    Address, Connection, Error, Listener, MAX_PENDING, RateLimit, Unprotected, connect,
};

const SECOND: Duration = Duration::from_secs(1);

fn soon() -> Instant {
    Instant::now() + 10 * SECOND
}

fn listen_at(address: &str) -> transport::Result<Listener> {
    Listener::bind(&address.parse().unwrap(), None, Unprotected::Refused)
}

fn listen() -> Listener {
    listen_at("tcp://127.0.0.1:0").unwrap()
}

/// A peer of `listener` that speaks no protocol.
fn stranger(listener: &Listener) -> TcpStream {
    let address = listener.local_address().to_string();
    TcpStream::connect(address.strip_prefix("tcp://").unwrap()).unwrap()
}

/// Receiver and sender.
fn pair_at(listener: &Listener) -> (Connection, Connection) {
    thread::scope(|scope| {
        let receiver = scope.spawn(|| listener.accept(Some(soon())).unwrap().establish(soon()));
        let sender = connect(listener.local_address(), None, soon()).unwrap();
        (receiver.join().unwrap().unwrap(), sender)
    })
}

fn pair() -> (Connection, Connection) {
    pair_at(&listen())
}

fn inner(error: &io::Error) -> &Error {
    error.get_ref().unwrap().downcast_ref().unwrap()
}

/// A name for a socket in a directory that ends with the test.
fn socket_path() -> (TempDir, Address) {
    let directory = TempDir::new().unwrap();
    let address = Address::Unix(directory.path().join("socket"));
    (directory, address)
}

#[test]
fn bytes_arrive_over_tcp_and_over_unix_sockets() {
    let (_directory, unix) = socket_path();
    let listeners = [
        listen(),
        listen_at("tcp://[::1]:0").unwrap(),
        Listener::bind(&unix, None, Unprotected::Refused).unwrap(),
    ];
    let sent: Vec<u8> = (0..5_000_000_u32)
        .map(|n| (n.wrapping_mul(n) >> 9) as u8)
        .collect();

    let received = listeners.map(|listener| {
        let (mut receiver, mut sender) = pair_at(&listener);
        let mut received = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                sender.write_all(&sent).unwrap();
                sender.finish().unwrap();
            });
            receiver.read_to_end(&mut received).unwrap();
        });
        received
    });

    assert!(received.iter().all(|received| *received == sent));
}

#[test]
fn what_others_could_reach_needs_tls_or_a_word_that_it_does_not() {
    let error = listen_at("tcp://0.0.0.0:0").unwrap_err();
    let allowed = Listener::bind(
        &"tcp://0.0.0.0:0".parse().unwrap(),
        None,
        Unprotected::Allowed,
    );

    assert!(matches!(error, Error::Unprotected { .. }), "{error}");
    assert!(error.to_string().contains("--tls"), "{error}");
    assert!(listen_at("tcp://[::]:0").is_err());
    allowed.unwrap();
    listen_at("tcp://localhost:0").unwrap();
}

#[test]
fn an_address_in_use_is_refused_by_name() {
    let listener = listen();
    let address = listener.local_address().to_string();

    let error = listen_at(&address).unwrap_err();

    assert!(
        error
            .to_string()
            .contains(&format!("cannot listen at {address}")),
        "{error}"
    );
}

#[test]
fn a_sockets_file_is_its_owners_and_goes_with_the_listener() {
    let (directory, address) = socket_path();
    let path = directory.path().join("socket");

    let listener = Listener::bind(&address, None, Unprotected::Refused).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    drop(listener);

    assert_eq!(mode & 0o777, 0o600);
    assert!(!path.exists());
}

#[test]
fn a_stale_socket_is_replaced_and_nothing_else() {
    let (directory, address) = socket_path();
    let path = directory.path().join("socket");
    drop(UnixListener::bind(&path).unwrap());

    let listener = Listener::bind(&address, None, Unprotected::Refused).unwrap();
    let busy = Listener::bind(&address, None, Unprotected::Refused).unwrap_err();
    drop(listener);
    fs::write(&path, "precious").unwrap();
    let file = Listener::bind(&address, None, Unprotected::Refused).unwrap_err();

    assert!(
        busy.to_string().contains("another process listens"),
        "{busy}"
    );
    assert!(file.to_string().contains("not replaced"), "{file}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn nobody_there_is_said_with_the_address() {
    let address = listen().local_address().clone();
    let (_directory, unix) = socket_path();

    let tcp = connect(&address, None, soon()).unwrap_err().to_string();
    let unix = connect(&unix, None, soon()).unwrap_err().to_string();
    let zero = connect(&"tcp://127.0.0.1:0".parse().unwrap(), None, soon()).unwrap_err();
    let name = connect(
        &"tcp://no-such-host.invalid:1".parse().unwrap(),
        None,
        soon(),
    );

    assert!(
        tcp.contains(&format!("cannot connect to {address}: Connection refused")),
        "{tcp}"
    );
    assert!(unix.contains("No such file"), "{unix}");
    assert!(zero.to_string().contains("port 0"), "{zero}");
    assert!(matches!(name.unwrap_err(), Error::Resolve { .. }));
}

#[test]
fn a_unix_listener_that_takes_nobody_up_holds_a_sender_no_longer_than_its_deadline() {
    let (directory, address) = socket_path();
    let path = directory.path().join("socket");
    let _listener = UnixListener::bind(&path).unwrap();
    let full: Vec<UnixStream> = fill(&path);
    let start = Instant::now();

    let error = connect(&address, None, start + SECOND / 2).unwrap_err();

    assert!(
        matches!(error, Error::TimedOut { .. }),
        "{error} after {}",
        full.len()
    );
    assert!(start.elapsed() < 10 * SECOND);
}

/// Connections until no more may wait.
fn fill(path: &std::path::Path) -> Vec<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
    let address = SocketAddrUnix::new(path).unwrap();
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let connect = || {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::net::connect(&socket, &address).map(|()| socket.into())
    };
    std::iter::from_fn(|| connect().ok()).collect()
}

#[test]
fn a_peer_that_is_something_else_is_refused_at_once_and_can_read_so() {
    let listener = listen();
    let mut peer = stranger(&listener);
    let reader = thread::spawn(move || {
        peer.write_all(b"GET / HTTP/1.1\r\n").unwrap();
        thread::sleep(SECOND / 5);
        peer.write_all(b"\r\n").unwrap();
        thread::sleep(SECOND / 20);
        peer.read_to_end(&mut Vec::new())
    });
    let start = Instant::now();

    let error = listener
        .accept(None)
        .unwrap()
        .establish(soon())
        .unwrap_err();

    assert!(matches!(error, Error::NotTagvisor { .. }), "{error}");
    assert!(start.elapsed() < 10 * SECOND);
    reader.join().unwrap().unwrap();
}

#[test]
fn a_peer_that_leaves_without_a_word_is_noticed() {
    let listener = listen();
    drop(stranger(&listener));

    let error = listener
        .accept(None)
        .unwrap()
        .establish(soon())
        .unwrap_err();

    assert!(error.to_string().contains("before it greeted"), "{error}");
}

#[test]
fn a_listener_that_says_nothing_holds_a_sender_no_longer_than_its_deadline() {
    let listener = listen();
    let start = Instant::now();

    let error = connect(listener.local_address(), None, start + SECOND / 2).unwrap_err();

    assert!(
        error.to_string().contains("to receive the greeting"),
        "{error}"
    );
    assert!(start.elapsed() < 10 * SECOND);
}

#[test]
fn a_peer_that_says_nothing_holds_a_receiver_no_longer_than_its_deadline() {
    let listener = listen();
    let _peer = stranger(&listener);
    let start = Instant::now();

    let pending = listener.accept(None).unwrap();
    let error = pending.establish(start + SECOND / 2).unwrap_err();

    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    assert!(start.elapsed() < 10 * SECOND);
}

#[test]
fn a_thousand_silent_peers_keep_nobody_out_and_take_no_more_than_their_places() {
    let listener = listen();
    let address = listener.local_address().clone();
    let closer = listener.closer();
    let server = thread::spawn(move || accept_all(&listener));

    let silent: Vec<TcpStream> = (0..1000)
        .map(|_| TcpStream::connect(address.to_string().trim_start_matches("tcp://")).unwrap())
        .collect();
    let start = Instant::now();
    let sender = connect(&address, None, soon());
    let took = start.elapsed();
    closer.close();
    drop(silent);
    let most = server.join().unwrap();

    assert!(sender.is_ok(), "{sender:?}");
    assert!(took < 5 * SECOND, "{took:?}");
    // Some have left their place and not yet ended their thread.
    assert!(most < 2 * MAX_PENDING, "{most} at once");
}

/// A thread for each that comes, as a receiver does it; how many there were at most.
fn accept_all(listener: &Listener) -> usize {
    let mut most = 0;
    thread::scope(|scope| {
        let mut pending: Vec<thread::ScopedJoinHandle<'_, bool>> = Vec::new();
        while let Ok(one) = listener.accept(None) {
            pending.push(scope.spawn(move || one.establish(Instant::now() + 60 * SECOND).is_ok()));
            pending.retain(|thread| !thread.is_finished());
            most = most.max(pending.len());
        }
    });
    most
}

#[test]
fn accepting_ends_at_its_deadline_and_when_it_is_closed() {
    let (_directory, unix) = socket_path();
    for listener in [
        listen(),
        Listener::bind(&unix, None, Unprotected::Refused).unwrap(),
    ] {
        let closer = listener.closer();

        let late = listener
            .accept(Some(Instant::now() + SECOND / 10))
            .unwrap_err();
        let waiting = thread::spawn(move || listener.accept(None).unwrap_err());
        thread::sleep(SECOND / 10);
        closer.close();

        assert!(matches!(late, Error::TimedOut { .. }), "{late}");
        assert!(matches!(waiting.join().unwrap(), Error::Closed { .. }));
    }
}

#[test]
fn a_peer_that_stands_still_is_an_error_that_says_who_how_long_and_for_what() {
    let (mut receiver, sender) = pair();
    receiver.set_patience(Some(SECOND / 5));
    receiver.set_waiting_for("the next page");
    let start = Instant::now();

    let error = receiver.read(&mut [0; 16]).unwrap_err();

    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(start.elapsed() >= SECOND / 5 && start.elapsed() < 10 * SECOND);
    let text = error.to_string();
    assert!(text.starts_with(receiver.peer()), "{text}");
    assert!(
        text.contains("waited 2") && text.ends_with("to receive the next page"),
        "{text}"
    );
    drop(sender);
}

#[test]
fn a_peer_that_takes_nothing_is_an_error_too() {
    let (_receiver, mut sender) = pair();
    sender.set_patience(Some(SECOND / 5));

    let error = sender.write_all(&vec![0; 64 << 20]).unwrap_err();

    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("to send data"), "{error}");
}

#[test]
fn a_byte_now_and_then_satisfies_patience_but_no_deadline() {
    let (mut receiver, mut sender) = pair();
    let dribble = thread::spawn(move || {
        while sender.write_all(&[1]).is_ok() {
            thread::sleep(SECOND / 20);
        }
    });
    let start = Instant::now();
    receiver.set_patience(Some(SECOND));
    receiver.set_deadline(Some(start + SECOND / 2));

    let error = receiver.read_exact(&mut [0; 1000]).unwrap_err();

    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(start.elapsed() >= SECOND / 2 && start.elapsed() < 10 * SECOND);
    drop(receiver);
    dribble.join().unwrap();
}

#[test]
fn a_blocked_read_ends_when_the_connection_is_closed() {
    let (mut receiver, _sender) = pair();
    let closer = receiver.closer();
    let reading = thread::spawn(move || receiver.read(&mut [0; 16]).unwrap_err());
    thread::sleep(SECOND / 10);

    closer.close();

    let error = reading.join().unwrap();
    assert!(matches!(inner(&error), Error::Closed { .. }), "{error}");
}

#[test]
fn a_blocked_write_ends_when_the_connection_is_closed() {
    let (_receiver, mut sender) = pair();
    let closer = sender.closer();
    let writing = thread::spawn(move || sender.write_all(&vec![0; 64 << 20]).unwrap_err());
    thread::sleep(SECOND / 5);

    closer.clone().close();

    let error = writing.join().unwrap();
    assert!(matches!(inner(&error), Error::Closed { .. }), "{error}");
}

#[test]
fn a_write_that_waits_for_the_rate_ends_when_the_connection_is_closed() {
    let (_receiver, sender) = pair();
    let closer = sender.closer();
    let mut sender = sender.limited(Arc::new(RateLimit::new("1".parse().ok())));
    let writing = thread::spawn(move || sender.write_all(&[0; 1000]).unwrap_err());
    thread::sleep(SECOND / 10);
    let start = Instant::now();

    closer.close();

    let error = writing.join().unwrap();
    assert!(start.elapsed() < 10 * SECOND, "{:?}", start.elapsed());
    assert!(matches!(inner(&error), Error::Closed { .. }), "{error}");
}

#[test]
fn a_closer_does_not_keep_a_connection_open() {
    let (mut receiver, sender) = pair();
    let closer = sender.closer();

    drop(sender);

    assert_eq!(receiver.read(&mut [0; 16]).unwrap(), 0);
    closer.close();
}

/// Bytes per second that two connections of one limit send in a second, in writes of `len` bytes.
fn measure(limit: &Arc<RateLimit>, len: usize) -> f64 {
    let pairs = [pair(), pair()];
    let start = Instant::now();
    let end = start + SECOND;
    let received: u64 = thread::scope(|scope| {
        let readers = pairs.map(|(mut receiver, sender)| {
            let mut sender = sender.limited(limit.clone());
            scope.spawn(move || {
                let buffer = vec![0; len];
                while Instant::now() < end && sender.write_all(&buffer).is_ok() {}
            });
            scope.spawn(move || io::copy(&mut receiver, &mut io::sink()).unwrap())
        });
        readers.map(|reader| reader.join().unwrap()).iter().sum()
    });
    received as f64 / start.elapsed().as_secs_f64()
}

#[test]
fn connections_keep_the_rate_together_whatever_the_sizes_of_their_writes() {
    let limit = Arc::new(RateLimit::new("40M".parse().ok()));

    let measured =
        [1000, 64 << 10, 3 << 20].map(|len| [(); 4].map(|()| measure(&limit, len) / 40e6));

    // A busy host may wake a sender too late, but never too early.
    assert!(measured.iter().flatten().all(|m| *m < 1.03), "{measured:?}");
    let is_reached = |runs: &[f64; 4]| runs.iter().any(|m| *m > 0.8);
    assert!(measured.iter().all(is_reached), "{measured:?}");
}

#[test]
fn a_new_rate_holds_at_once() {
    let (mut receiver, sender) = pair();
    let limit = Arc::new(RateLimit::new("1".parse().ok()));
    let mut sender = sender.limited(limit.clone());
    let writing = thread::spawn(move || sender.write_all(&vec![0; 1 << 20]).unwrap());
    thread::sleep(SECOND / 10);
    let start = Instant::now();

    limit.set(None);
    receiver.read_exact(&mut vec![0; 1 << 20]).unwrap();

    assert!(start.elapsed() < 10 * SECOND, "{:?}", start.elapsed());
    assert_eq!(limit.rate(), None);
    writing.join().unwrap();
}
