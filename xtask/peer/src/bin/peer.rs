//! `peer COMMAND…`: runs COMMAND on the other host. `PEER_AGENT` says where the agent is, `PEER_NAME` what the host is called.

use std::ffi::OsString;
use std::process::ExitCode;

/// The other host failed, not the command.
const NO_OUTCOME: u8 = 125;

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    if words.is_empty() {
        eprintln!("usage: peer COMMAND [ARGUMENT]…: runs COMMAND on the other host");
        return ExitCode::from(2);
    }
    let agent = std::env::var("PEER_AGENT").ok();
    let Some(agent) = agent.and_then(|address| address.parse().ok()) else {
        eprintln!(
            "peer: there is no other host: a script asks for two by '# lab: hosts=2', 'cargo xtask host' by --hosts 2"
        );
        return ExitCode::from(NO_OUTCOME);
    };
    let host = std::env::var("PEER_NAME").unwrap_or_else(|_| "peer".to_owned());
    match peer::client::run(agent, &host, words) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("peer: {error}");
            ExitCode::from(NO_OUTCOME)
        }
    }
}
