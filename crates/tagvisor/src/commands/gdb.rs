//! `tagvisor gdb`: lets a debugger come to a machine.

use std::process::ExitCode;

use clap::Args as ClapArgs;
use transport::Address;

use super::absolute;
use super::machine::Machine;
use crate::api::debug::GdbConfig;

const HOW: &str = "\
The machine goes on until a debugger comes: it stands then, and goes on when the debugger detaches or is gone, without a trace of
its breakpoints. Meanwhile the machine cannot be saved, migrated, paused, resumed or shut down; `tagvisor stop` ends it as always.
There is one debugger at a time. Whoever reaches the address can read and change all of the guest.";

/// Which machine, and where.
#[derive(ClapArgs)]
#[command(after_help = HOW)]
pub struct Args {
    /// The machine's name, or the path of a control socket: whatever contains a `/`
    name: String,
    /// Where the debugger comes: tcp://HOST:PORT (port 0 has one chosen, which is printed) or unix:PATH
    #[arg(long, value_name = "ADDRESS", required_unless_present = "off")]
    listen: Option<Address>,
    /// Let other hosts come: there is neither TLS nor a password
    #[arg(long, requires = "listen")]
    unprotected: bool,
    /// Let no debugger come any more, and send away the one that is there
    #[arg(long, conflicts_with = "listen")]
    off: bool,
    /// Print JSON, for scripts
    #[arg(long)]
    json: bool,
}

/// Opens a machine to debuggers, or closes it to them.
///
/// # Errors
/// It was not done.
pub fn gdb(args: &Args) -> super::Result {
    let machine = Machine::find(&args.name)?;
    let listen = match &args.listen {
        Some(Address::Unix(path)) => Some(format!("unix:{}", absolute(path)?)),
        Some(address) => Some(address.to_string()),
        None => None,
    };
    let config = GdbConfig {
        listen,
        unprotected: args.unprotected,
    };
    let report = machine.ask(|client| client.debug(&config))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{}", in_words(report.listen.as_deref()));
    }
    Ok(ExitCode::SUCCESS)
}

/// What to type in gdb.
fn in_words(listen: Option<&str>) -> String {
    let Some(listen) = listen else {
        return "no debugger can come".into();
    };
    let target = listen
        .strip_prefix("tcp://")
        .or_else(|| listen.strip_prefix("unix:"))
        .unwrap_or(listen);
    format!("{listen}: in gdb, `target remote {target}`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::serve;
    use crate::api::tests::double::{Call, Double};
    use crate::control::DebugRequest;

    #[test]
    fn a_machine_is_opened_where_the_user_says() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        let vmm = Double::running();
        let _server = serve(&socket, vmm.clone()).unwrap();

        gdb(&Args {
            name: socket.to_str().unwrap().into(),
            listen: Some("tcp://127.0.0.1:0".parse().unwrap()),
            unprotected: false,
            off: false,
            json: false,
        })
        .unwrap();

        let listen = Some("tcp://127.0.0.1:0".parse().unwrap());
        let wanted = DebugRequest {
            listen,
            unprotected: false,
        };
        assert_eq!(vmm.calls(), [Call::Debug(wanted)]);
    }

    #[test]
    fn the_user_is_told_what_to_type() {
        assert_eq!(
            in_words(Some("tcp://127.0.0.1:1234")),
            "tcp://127.0.0.1:1234: in gdb, `target remote 127.0.0.1:1234`"
        );
        assert_eq!(
            in_words(Some("unix:/run/web.gdb")),
            "unix:/run/web.gdb: in gdb, `target remote /run/web.gdb`"
        );
        assert_eq!(in_words(None), "no debugger can come");
    }
}
