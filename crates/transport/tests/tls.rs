//! TLS between two sides: who is let in, who is not, and that both learn why, in bounded time.

mod authority;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use authority::{Authority, Wish, client, server};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tempfile::TempDir;
use transport::{
    Address, ClientIdentity, Connection, Error, Listener, ServerIdentity, Side, Unprotected,
    connect,
};

const DEADLINE: Duration = Duration::from_secs(10);

fn soon() -> Instant {
    Instant::now() + DEADLINE
}

fn directory() -> (TempDir, Authority) {
    let (directory, authority) = (TempDir::new().unwrap(), Authority::new());
    authority.fill(directory.path());
    (directory, authority)
}

fn listen(identity: Option<&ServerIdentity>) -> Listener {
    let address = "tcp://127.0.0.1:0".parse().unwrap();
    Listener::bind(&address, identity, Unprotected::Refused).unwrap()
}

type Established = transport::Result<Connection>;

/// What comes of a connection at either side.
fn meet_at(
    listener: &Listener,
    address: &Address,
    sender: Option<&ClientIdentity>,
) -> (Established, Established) {
    thread::scope(|scope| {
        let receiver = scope.spawn(|| listener.accept(Some(soon())).unwrap().establish(soon()));
        let sender = connect(address, sender, soon());
        (receiver.join().unwrap(), sender)
    })
}

fn meet(
    receiver: Option<&ServerIdentity>,
    sender: Option<&ClientIdentity>,
) -> (Established, Established) {
    let listener = listen(receiver);
    meet_at(&listener, listener.local_address(), sender)
}

/// The same, where each should refuse the other; their words, and that it did not take all the time there was.
fn part(receiver: Option<&ServerIdentity>, sender: Option<&ClientIdentity>) -> (String, String) {
    let start = Instant::now();
    let (receiver, sender) = meet(receiver, sender);
    assert!(start.elapsed() < DEADLINE / 2, "{:?}", start.elapsed());
    (words(receiver), words(sender))
}

fn words(established: Established) -> String {
    established.unwrap_err().to_string()
}

#[track_caller]
fn says(text: &str, words: &str) {
    assert!(text.contains(words), "{text}");
}

#[test]
fn both_sides_prove_themselves_and_bytes_arrive() {
    let (directory, _authority) = directory();
    let sent: Vec<u8> = (0..3_000_000_u32)
        .map(|n| (n.wrapping_mul(n) >> 7) as u8)
        .collect();
    let (receiver, sender) = meet(
        Some(&server(directory.path())),
        Some(&client(directory.path())),
    );
    let (mut receiver, mut sender) = (receiver.unwrap(), sender.unwrap());

    let received = thread::scope(|scope| {
        scope.spawn(|| {
            sender.write_all(&sent).unwrap();
            sender.finish().unwrap();
        });
        let mut received = Vec::new();
        receiver.read_to_end(&mut received).unwrap();
        received
    });

    assert!(received == sent);
    assert!(receiver.is_protected() && sender.is_protected());
    says(receiver.peer(), "(sender.test)");
    says(sender.peer(), "(receiver.test)");
}

#[test]
fn the_other_direction_still_works_after_one_is_finished() {
    let (directory, _authority) = directory();
    let (receiver, sender) = meet(
        Some(&server(directory.path())),
        Some(&client(directory.path())),
    );
    let (mut receiver, mut sender) = (receiver.unwrap(), sender.unwrap());
    let mut request = Vec::new();
    let mut answer = Vec::new();

    sender.write_all(b"request").unwrap();
    sender.finish().unwrap();
    receiver.read_to_end(&mut request).unwrap();
    receiver.write_all(b"answer").unwrap();
    receiver.finish().unwrap();
    sender.read_to_end(&mut answer).unwrap();

    assert_eq!(
        (&request[..], &answer[..]),
        (&b"request"[..], &b"answer"[..])
    );
}

#[test]
fn a_cut_is_no_end() {
    let (directory, _authority) = directory();
    let (receiver, sender) = meet(
        Some(&server(directory.path())),
        Some(&client(directory.path())),
    );
    let (mut receiver, mut sender) = (receiver.unwrap(), sender.unwrap());

    sender.write_all(b"half").unwrap();
    drop(sender);
    let error = receiver.read_to_end(&mut Vec::new()).unwrap_err();

    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    says(
        &error.to_string(),
        "(sender.test) ended the connection before",
    );
}

#[test]
fn names_and_addresses_in_the_certificate_are_those_connected_to() {
    let (directory, _authority) = directory();
    let listener = listen(Some(&server(directory.path())));
    let by_name = listener
        .local_address()
        .to_string()
        .replace("127.0.0.1", "localhost");

    let (receiver, sender) = meet_at(
        &listener,
        &by_name.parse().unwrap(),
        Some(&client(directory.path())),
    );

    receiver.unwrap();
    sender.unwrap();
}

#[test]
fn a_receiver_with_another_name_is_refused() {
    let (directory, authority) = directory();
    let other = Wish::of(Side::Server).named("other.test");
    authority.put(directory.path(), Side::Server, &other);

    let (receiver, sender) = part(
        Some(&server(directory.path())),
        Some(&client(directory.path())),
    );

    says(&sender, "is refused: it is for");
    says(&sender, "other.test");
    says(&sender, "must be for \"127.0.0.1\"");
    says(
        &receiver,
        "refuses this side's certificate: it has another name",
    );
}

#[test]
fn a_receiver_may_have_the_name_that_is_expected_in_place_of_its_address() {
    let (directory, authority) = directory();
    let other = Wish::of(Side::Server).named("other.test");
    authority.put(directory.path(), Side::Server, &other);
    let expecting = client(directory.path()).expecting("other.test").unwrap();

    let (receiver, sender) = meet(Some(&server(directory.path())), Some(&expecting));

    receiver.unwrap();
    sender.unwrap();
}

#[test]
fn a_receiver_without_the_expected_name_is_refused() {
    let (directory, _authority) = directory();
    let expecting = client(directory.path()).expecting("other.test").unwrap();

    let (_, sender) = part(Some(&server(directory.path())), Some(&expecting));

    says(&sender, "must be for \"other.test\"");
}

#[test]
fn a_sender_with_the_expected_name_is_let_in_and_another_is_not() {
    let (directory, _authority) = directory();
    let right = server(directory.path()).expecting("sender.test").unwrap();
    let wrong = server(directory.path()).expecting("other.test").unwrap();

    let (receiver, sender) = meet(Some(&right), Some(&client(directory.path())));
    receiver.unwrap();
    sender.unwrap();
    let (receiver, sender) = part(Some(&wrong), Some(&client(directory.path())));

    says(&receiver, "must be for \"other.test\"");
    says(
        &sender,
        "refuses this side's certificate: it has another name",
    );
}

#[test]
fn over_a_unix_socket_a_name_must_be_given() {
    let (directory, _authority) = directory();
    let address = Address::Unix(directory.path().join("socket"));
    let identity = server(directory.path());
    let listener = Listener::bind(&address, Some(&identity), Unprotected::Refused).unwrap();
    let nameless = client(directory.path());
    let expecting = nameless.clone().expecting("receiver.test").unwrap();

    let without = connect(&address, Some(&nameless), soon());
    let (receiver, sender) = meet_at(&listener, &address, Some(&expecting));

    says(&words(without), "--tls-peer-name");
    receiver.unwrap();
    sender.unwrap();
}

#[test]
fn a_sender_of_another_authority_is_refused() {
    let (ours, _) = directory();
    let (theirs, _) = directory();
    // It believes the receiver, so that the receiver is the one to refuse.
    let believed = fs::read_to_string(ours.path().join("ca-cert.pem")).unwrap();
    let own = fs::read_to_string(theirs.path().join("ca-cert.pem")).unwrap();
    fs::write(theirs.path().join("ca-cert.pem"), believed + &own).unwrap();

    let (receiver, sender) = part(Some(&server(ours.path())), Some(&client(theirs.path())));

    says(&receiver, "is refused: none of the authorities issued it");
    says(
        &sender,
        "refuses this side's certificate: it does not know the authority",
    );
}

#[test]
fn a_receiver_of_another_authority_is_refused() {
    let (ours, _) = directory();
    let (theirs, _) = directory();

    let (receiver, sender) = part(Some(&server(theirs.path())), Some(&client(ours.path())));

    says(&sender, "is refused: none of the authorities issued it");
    says(
        &receiver,
        "refuses this side's certificate: it does not know the authority",
    );
}

#[test]
fn a_revoked_certificate_is_refused_by_either_side() {
    let (directory, authority) = directory();
    let (good_server, good_client) = (server(directory.path()), client(directory.path()));
    fs::write(directory.path().join("ca-crl.pem"), authority.revoke_all()).unwrap();
    let strict_server = server(directory.path());

    let (receiver, sender) = part(Some(&strict_server), Some(&good_client));

    says(&receiver, "is refused: it was revoked");
    says(&sender, "refuses this side's certificate: it was revoked");

    let (clean, other) = self::directory();
    let both = authority.pem() + &other.pem();
    fs::write(clean.path().join("ca-cert.pem"), both).unwrap();
    fs::write(clean.path().join("ca-crl.pem"), authority.revoke_all()).unwrap();
    let (_, sender) = part(Some(&good_server), Some(&client(clean.path())));
    says(&sender, "is refused: it was revoked");
}

/// A sender that does not look whether its own certificate would do, or that has none.
fn careless(directory: &Path, own: Option<(String, String)>) -> rustls::ClientConfig {
    let authority = CertificateDer::from_pem_file(directory.join("ca-cert.pem")).unwrap();
    let mut authorities = rustls::RootCertStore::empty();
    authorities.add(authority).unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(authorities);
    match own {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => config
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                rustls::pki_types::PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap(),
    }
}

/// What the receiver says of it, and what it hears.
fn intrude(receiver: &ServerIdentity, config: rustls::ClientConfig) -> (String, String) {
    let listener = listen(Some(receiver));
    let address = listener.local_address().to_string();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| listener.accept(Some(soon())).unwrap().establish(soon()));
        let name = "localhost".try_into().unwrap();
        let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let socket = TcpStream::connect(address.strip_prefix("tcp://").unwrap()).unwrap();
        let mut stream = rustls::StreamOwned::new(session, socket);
        let _ = stream.write_all(b"tagvisor");
        let heard = stream.read_exact(&mut [0; 8]).unwrap_err().to_string();
        (words(receiver.join().unwrap()), heard)
    })
}

#[test]
fn a_sender_without_a_certificate_is_refused() {
    let (directory, _authority) = directory();

    let (receiver, heard) = intrude(&server(directory.path()), careless(directory.path(), None));

    says(&receiver, "is refused: there is none");
    says(&heard, "CertificateRequired");
}

#[test]
fn a_sender_whose_certificate_has_expired_is_refused() {
    let (directory, authority) = directory();
    let expired = authority.issue(&Wish::of(Side::Client).expired());

    let (receiver, heard) = intrude(
        &server(directory.path()),
        careless(directory.path(), Some(expired)),
    );

    says(&receiver, "is refused: it expired 5 days ago");
    says(&heard, "CertificateExpired");
}

#[test]
fn a_receivers_certificate_does_not_make_a_sender() {
    let (directory, authority) = directory();
    let receivers = authority.issue(&Wish::of(Side::Server));

    let (receiver, heard) = intrude(
        &server(directory.path()),
        careless(directory.path(), Some(receivers)),
    );

    says(&receiver, "extendedKeyUsage");
    says(&heard, "UnsupportedCertificate");
}

#[test]
fn a_receiver_whose_certificate_has_expired_is_refused() {
    let (directory, authority) = directory();
    let wish = Wish {
        valid_until: time::OffsetDateTime::now_utc() + time::Duration::seconds(2),
        ..Wish::of(Side::Server)
    };
    authority.put(directory.path(), Side::Server, &wish);
    let identity = server(directory.path());
    thread::sleep(Duration::from_secs(4));

    let (receiver, sender) = part(Some(&identity), Some(&client(directory.path())));

    says(&sender, "is refused: it expired");
    says(&receiver, "refuses this side's certificate: it has expired");
}

#[test]
fn a_sender_without_tls_is_refused_by_a_receiver_with_it() {
    let (directory, _authority) = directory();

    let (receiver, sender) = part(Some(&server(directory.path())), None);

    says(&receiver, "does not speak TLS");
    says(&sender, "speaks TLS and this side does not");
}

#[test]
fn a_sender_with_tls_is_refused_by_a_receiver_without_it() {
    let (directory, _authority) = directory();

    let (receiver, sender) = part(None, Some(&client(directory.path())));

    says(&receiver, "speaks TLS and this side does not");
    says(&sender, "does not speak TLS");
}

#[test]
fn an_endless_handshake_ends_at_the_deadline() {
    let (directory, _authority) = directory();
    let listener = listen(Some(&server(directory.path())));
    let address = listener.local_address().to_string();
    let start = Instant::now();
    let mut peer = TcpStream::connect(address.strip_prefix("tcp://").unwrap()).unwrap();
    // A record that promises 16 KiB of a ClientHello, and then a byte now and then.
    let dribble = thread::spawn(move || {
        let mut sent = peer.write_all(&[0x16, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc]);
        while sent.is_ok() {
            thread::sleep(Duration::from_millis(50));
            sent = peer.write_all(&[0]);
        }
    });

    let pending = listener.accept(Some(soon())).unwrap();
    let error = pending
        .establish(start + Duration::from_millis(700))
        .unwrap_err();

    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    says(&error.to_string(), "to receive TLS's handshake");
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    dribble.join().unwrap();
}

#[test]
fn a_hello_longer_than_any_should_be_is_refused_before_it_is_held() {
    let (directory, _authority) = directory();
    let listener = listen(Some(&server(directory.path())));
    let address = listener.local_address().to_string();
    let mut peer = TcpStream::connect(address.strip_prefix("tcp://").unwrap()).unwrap();
    // A handshake message of 16 MiB - 1, in full records.
    let flood = thread::spawn(move || {
        let mut record = vec![0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff];
        record.resize(5 + (16 << 10), 0);
        while peer.write_all(&record).is_ok() {}
    });

    let error = listener
        .accept(Some(soon()))
        .unwrap()
        .establish(soon())
        .unwrap_err();

    assert!(matches!(error, Error::Tls { .. }), "{error}");
    flood.join().unwrap();
}
