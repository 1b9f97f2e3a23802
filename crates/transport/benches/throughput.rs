//! How fast bytes go from one thread to another by a connection, plain and with TLS, beside a bare socket. `cargo bench -p transport`.
//! As a test it sends little, and measures nothing.

#[path = "../tests/authority/mod.rs"]
mod authority;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use authority::Authority;
use transport::{Address, ClientIdentity, Listener, ServerIdentity, Unprotected, connect};

/// Chunks a run sends: 2 GiB.
const CHUNKS: usize = 8192;
/// Bytes a call writes or reads: a chunk of 64 pages.
const CHUNK: usize = 256 << 10;
const RUNS: usize = 5;

fn main() {
    let is_test = !std::env::args().any(|arg| arg == "--bench");
    let chunks = if is_test { 8 } else { CHUNKS };
    let directory = tempfile::tempdir().unwrap();
    Authority::new().fill(directory.path());
    let receiver = authority::server(directory.path());
    let sender = authority::client(directory.path());
    let tcp: Address = "tcp://127.0.0.1:0".parse().unwrap();
    let unix = Address::Unix(directory.path().join("socket"));

    report("bare TCP socket", chunks, || bare(chunks));
    report("plain, TCP", chunks, || run(&tcp, chunks, None));
    report("plain, Unix socket", chunks, || run(&unix, chunks, None));
    let identities = Some((&receiver, &sender));
    report("TLS, TCP", chunks, || run(&tcp, chunks, identities));
}

fn report(name: &str, chunks: usize, run: impl Fn() -> Duration) {
    let mut rates: Vec<f64> = (0..RUNS)
        .map(|_| (chunks * CHUNK) as f64 / 1e9 / run().as_secs_f64())
        .collect();
    rates.sort_by(f64::total_cmp);
    let (least, median, most) = (rates[0], rates[RUNS / 2], rates[RUNS - 1]);
    println!("{name:20} {median:5.2} GB/s ({least:.2} to {most:.2} in {RUNS} runs)");
}

fn run(
    address: &Address,
    chunks: usize,
    identities: Option<(&ServerIdentity, &ClientIdentity)>,
) -> Duration {
    let listener = Listener::bind(
        address,
        identities.map(|(own, _)| own),
        Unprotected::Refused,
    )
    .unwrap();
    let soon = Instant::now() + Duration::from_secs(10);
    thread::scope(|scope| {
        scope.spawn(|| {
            let identity = identities.map(|(_, own)| own);
            let mut connection = connect(listener.local_address(), identity, soon).unwrap();
            write(&mut connection, chunks);
            connection.finish().unwrap();
        });
        read(
            listener.accept(None).unwrap().establish(soon).unwrap(),
            chunks,
        )
    })
}

fn bare(chunks: usize) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || write(&mut TcpStream::connect(address).unwrap(), chunks));
        read(listener.accept().unwrap().0, chunks)
    })
}

fn write(connection: &mut impl Write, chunks: usize) {
    let chunk = vec![0xa5; CHUNK];
    for _ in 0..chunks {
        connection.write_all(&chunk).unwrap();
    }
}

fn read(mut connection: impl Read, chunks: usize) -> Duration {
    let mut chunk = vec![0; CHUNK];
    let start = Instant::now();
    for _ in 0..chunks {
        connection.read_exact(&mut chunk).unwrap();
    }
    start.elapsed()
}
