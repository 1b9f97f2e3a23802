//! `peer-agent ADDRESS:PORT`: runs the commands that `peer` sends there.

use std::net::TcpListener;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(address) = std::env::args().nth(1) else {
        eprintln!("usage: peer-agent ADDRESS:PORT");
        return ExitCode::from(2);
    };
    match TcpListener::bind(&address) {
        Ok(listener) => {
            peer::agent::serve(&listener);
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("peer-agent: cannot listen at {address}: {error}");
            ExitCode::FAILURE
        }
    }
}
