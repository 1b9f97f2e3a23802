//! `tagvisor migrate`: sends a guest to another host while it runs, gives that up, or decides what became of it.
//!
//! The VMM does the work, and goes on with it if this command ends; the command asks, watches, and reports.

mod watch;

use std::io::Write;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;

use clap::Args as ClapArgs;
use transport::{Address, Rate};

use super::machine::{Error, Machine};
use super::text::{bytes, count, microseconds, printable};
use super::{absolute, snapshot};
use crate::api::migration::{DOWNTIME_MS, PostCopyMode, SendMigrationConfig, parse_address};
use crate::control::{Decision, MigrationReport};
use crate::signals::EndingSignals;

/// The status when it is not known where the guest is, or it is at both sides.
const UNSETTLED: u8 = 3;

const AFTER_HELP: &str = "\
The destination waits with `tagvisor receive`. Progress goes to standard error: a bar on a terminal,
otherwise one line of JSON a second. Ctrl-C ends the watching, not the migration: that goes on in
the VMM.

Exit status:
  0  the guest moved: all of it is at the destination, or it has ended there; with --cancel or --decide:
     it was done
  1  the guest stays here; with --cancel or --decide: it was not done
  2  the command line is wrong
  3  the guest was handed over, and it is not known where it runs, or pages of it are at both sides, or
     the VMM does not answer any more; standard error says what to do
  128 and more: a signal ended the watching; its number is added to 128

docs/migration.md says what each failure leaves, and what --recover and --decide do.";

/// Which guest, and where it is to go.
#[derive(ClapArgs)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The machine's name, or the path of a control socket: whatever contains a `/`
    name: String,
    /// Where it is received: tcp://HOST:PORT or unix:PATH
    #[arg(
        value_name = "ADDRESS",
        value_parser = parse_address,
        required_unless_present_any = ["cancel", "decide"],
        conflicts_with_all = ["cancel", "decide"]
    )]
    destination: Option<Address>,
    #[command(flatten)]
    how: How,
    /// Give up the migration that is on its way; the guest stays
    #[arg(long, conflicts_with = "decide")]
    cancel: bool,
    /// Decide where the guest runs, after having made sure of the other side: here, or elsewhere
    #[arg(long, value_name = "WHERE", value_parser = parse_decision)]
    decide: Option<Decision>,
}

/// How it is to go there.
#[derive(ClapArgs)]
struct How {
    /// Connections for pages, with a thread each
    #[arg(long, value_name = "1..64", default_value_t = 1, conflicts_with_all = ["cancel", "decide"],
        value_parser = clap::value_parser!(u8).range(1..=i64::from(migration::MAX_LINKS)))]
    connections: u8,
    /// Whether the guest goes on there before all its pages are
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "never",
        conflicts_with_all = ["cancel", "decide"]
    )]
    postcopy: PostCopyMode,
    /// Give up, rather than slow the guest down, if it changes pages faster than they can be sent
    #[arg(long, conflicts_with_all = ["cancel", "decide"])]
    no_slowing: bool,
    /// For how many milliseconds the guest may stand still, as far as that can be predicted
    #[arg(long, value_name = "MS", default_value_t = DOWNTIME_MS, conflicts_with_all = ["cancel", "decide"])]
    max_downtime: NonZeroU64,
    /// How much may be sent in a second: 100M (bytes), 800Mbit
    #[arg(long, value_name = "RATE", conflicts_with_all = ["cancel", "decide"])]
    bandwidth: Option<Rate>,
    /// How to make data smaller: none, lz4, zstd or zstd:LEVEL (1 to 22)
    #[arg(long, value_name = "METHOD", default_value = "none", conflicts_with_all = ["cancel", "decide"],
        value_parser = snapshot::check_compression)]
    compress: String,
    /// The directory with certificates, keys and authorities by which both sides prove themselves (docs/tls.md)
    #[arg(long, value_name = "DIRECTORY", conflicts_with_all = ["cancel", "decide"])]
    tls: Option<PathBuf>,
    /// The name that the destination's certificate must have [default: the host of ADDRESS]
    #[arg(long, value_name = "NAME", requires = "tls")]
    tls_peer_name: Option<String>,
    /// Give up after so many seconds, unless the guest has been handed over
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["cancel", "decide"])]
    timeout: Option<NonZeroU64>,
    /// Mend the link of a migration that was broken off after the hand-over, and go on from there
    #[arg(long, conflicts_with_all = ["cancel", "decide"])]
    recover: bool,
    /// Print the report as JSON
    #[arg(long, conflicts_with_all = ["cancel", "decide"])]
    json: bool,
}

fn parse_decision(text: &str) -> Result<Decision, String> {
    match text {
        "here" => Ok(Decision::Here),
        "elsewhere" => Ok(Decision::Elsewhere),
        _ => Err("expected `here` or `elsewhere`".into()),
    }
}

/// Sends a guest away, or does what is to be done with one that was sent.
///
/// # Errors
/// It was not done; where the guest is.
pub fn migrate(args: Args) -> super::Result {
    let machine = Machine::find(&args.name)?;
    match (args.destination, args.decide) {
        (Some(destination), _) => send(&machine, &destination, &args.how),
        (None, Some(decision)) => {
            machine.ask(|client| client.decide_migration(decision))?;
            Ok(ExitCode::SUCCESS)
        }
        (None, None) => {
            machine.ask(|client| client.cancel_migration())?;
            println!(
                "{name}: the migration is being given up; `tagvisor info {name}` says where the guest is",
                name = printable(&machine.name)
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn send(machine: &Machine, destination: &Address, how: &How) -> super::Result {
    if let Some(warning) = warning(destination, how) {
        // `eprintln!` panics where nobody reads standard error.
        let _ = writeln!(std::io::stderr(), "tagvisor: {warning}");
    }
    let config = config(destination, how)?;
    let signals = EndingSignals::block()?;
    let watch = watch::Watch::new(&machine.client);
    let (name, closing) = (printable(&machine.name), watch.clone());
    signals.end_on_first(move || {
        closing.close();
        let _ = writeln!(std::io::stderr(), "{}", farewell(&name));
    })?;
    let report = match sent(machine, &config, &watch) {
        Ok(report) => report,
        Err(error) if is_unsettled(&error) => {
            let _ = writeln!(std::io::stderr(), "tagvisor: {error}");
            return Ok(UNSETTLED.into());
        }
        Err(error) => return Err(error.into()),
    };
    if how.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!(
            "{}: moved to {destination}: {}",
            printable(&machine.name),
            in_words(&report)
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether the guest may be elsewhere, or in two halves, after a migration was asked for and this came of it.
const fn is_unsettled(error: &Error) -> bool {
    match error {
        Error::Asked { source, .. } => source.leaves_open(),
        Error::NoSuch { .. } | Error::Name(_) => false,
    }
}

/// What a user should know before a guest's memory is sent to where others can read it.
fn warning(destination: &Address, how: &How) -> Option<String> {
    (how.tls.is_none() && !destination.is_local()).then(|| {
        format!(
            "warning: without --tls, whoever is on the way to {destination} can read and change the guest's memory, and whoever \
             answers there gets it"
        )
    })
}

fn farewell(name: &str) -> String {
    format!(
        "tagvisor: the migration of `{name}` goes on; `tagvisor info {name}` shows it, `tagvisor migrate {name} --cancel` gives it up"
    )
}

fn config(
    destination: &Address,
    how: &How,
) -> Result<SendMigrationConfig, Box<dyn std::error::Error>> {
    let url = match destination {
        Address::Unix(path) => format!("unix:{}", absolute(path)?),
        tcp @ Address::Tcp { .. } => tcp.to_string(),
    };
    let tls_dir = how.tls.as_deref().map(absolute).transpose()?;
    let mut config = SendMigrationConfig::to(url);
    config.downtime_ms = how.max_downtime;
    config.timeout_s = how.timeout;
    config.connections = how.connections.try_into()?;
    config.tls_dir = tls_dir.map(PathBuf::from);
    config.tls_peer_name.clone_from(&how.tls_peer_name);
    config.postcopy = Some(how.postcopy);
    config.may_slow = !how.no_slowing;
    config.bandwidth = how.bandwidth.map(|rate| rate.to_string());
    config.compression = Some(how.compress.clone());
    config.recover = how.recover;
    Ok(config)
}

fn sent(
    machine: &Machine,
    config: &SendMigrationConfig,
    watch: &watch::Watch,
) -> Result<MigrationReport, Error> {
    let (send, done) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            // Nobody else sends, and the receiver waits for this.
            let _ = send.send(machine.ask(|client| client.send_migration(config)));
        });
        watch
            .until(&done)
            .expect("the thread above sends before it ends")
    })
}

fn in_words(report: &MigrationReport) -> String {
    let fetched = match report.fetched {
        0 => String::new(),
        pages => format!(", {} fetched after it went on there", count(pages)),
    };
    let ended = match report.ended {
        true => ", of which it needed no more when it ended there",
        false => "",
    };
    let slowed = match report.slowed {
        0 => String::new(),
        percent => format!(", slowed down by {percent} % at last"),
    };
    format!(
        "{} ({} of tags) in {}, {} pages in {} rounds{fetched}{ended}, the guest stood still for {}{slowed}",
        bytes(report.bytes),
        bytes(report.tag_bytes),
        microseconds(report.total_us),
        count(report.pages),
        report.rounds,
        microseconds(report.downtime_us),
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::api::serve;
    use crate::api::tests::double::{Call, Double, migration_report};
    use crate::control::Refusal;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(arguments: &str) -> Result<Args, clap::Error> {
        let words = ["migrate"].into_iter().chain(arguments.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.args)
    }

    /// What the VMM is asked for, or what is wrong.
    fn asked(arguments: &str) -> Result<crate::control::MigrationRequest, String> {
        let args = parse(arguments).map_err(|e| e.to_string())?;
        let config = config(&args.destination.unwrap(), &args.how).map_err(|e| e.to_string())?;
        config.request().map_err(|e| e.to_string())
    }

    /// A machine called by its socket, which a double serves.
    fn machine(vmm: std::sync::Arc<Double>) -> (impl Drop, tempfile::TempDir, Machine) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        let server = serve(&socket, vmm).unwrap();
        let machine = Machine::find(socket.to_str().unwrap()).unwrap();
        (server, directory, machine)
    }

    #[test]
    fn without_options_the_vmm_is_asked_for_what_the_help_says() {
        let request = asked("web tcp://192.0.2.7:6000").unwrap();
        let plain = SendMigrationConfig::to("tcp:192.0.2.7:6000");
        assert_eq!(request, plain.request().unwrap());
    }

    #[test]
    fn each_option_reaches_the_vmm() {
        let request = asked(
            "web tcp://b:6000 --connections 64 --postcopy auto --no-slowing --max-downtime 50 --bandwidth 800Mbit \
             --compress zstd:3 --tls /etc/tls --tls-peer-name b.example --timeout 60 --recover",
        );
        let expected = crate::control::MigrationRequest {
            destination: "tcp://b:6000".parse().unwrap(),
            tls: Some(crate::control::TlsRequest {
                directory: "/etc/tls".into(),
                peer_name: Some("b.example".into()),
            }),
            connections: 64.try_into().unwrap(),
            post_copy: migration::PostCopy::Auto,
            may_slow: false,
            max_downtime: std::time::Duration::from_millis(50),
            bandwidth: Some("100M".parse().unwrap()),
            compression: stream::Compression::Zstd(3),
            timeout: Some(std::time::Duration::from_secs(60)),
            recover: true,
        };
        assert_eq!(request, Ok(expected));
    }

    #[test]
    fn paths_are_those_of_the_command_and_not_of_the_vmm() {
        let request = asked("web unix:b.sock --tls certificates --tls-peer-name b").unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(request.destination, Address::Unix(here.join("b.sock")));
        assert_eq!(request.tls.unwrap().directory, here.join("certificates"));
    }

    #[test]
    fn command_lines_that_contradict_themselves_are_refused() {
        let refused = [
            "web",
            "web /run/b.sock",
            "web tcp://b",
            "web tcp://b:1 --cancel",
            "web tcp://b:1 --decide here",
            "web --cancel --decide here",
            "web --decide nowhere",
            "web --cancel --connections 2",
            "web --cancel --json",
            "web --decide here --recover",
            "web tcp://b:1 --connections 0",
            "web tcp://b:1 --connections 65",
            "web tcp://b:1 --postcopy later",
            "web tcp://b:1 --max-downtime 0",
            "web tcp://b:1 --bandwidth fast",
            "web tcp://b:1 --compress gzip",
            "web tcp://b:1 --tls-peer-name b",
            "web tcp://b:1 --timeout 0",
        ];
        let accepted: Vec<_> = refused
            .into_iter()
            .filter(|arguments| parse(arguments).is_ok())
            .collect();
        assert_eq!(accepted, [""; 0]);
        assert!(parse("web --cancel").is_ok());
        assert!(parse("web --decide elsewhere").is_ok());
    }

    #[test]
    fn who_sends_memory_to_another_host_without_tls_is_warned() {
        let warned = |arguments| {
            let args = parse(arguments).unwrap();
            warning(&args.destination.unwrap(), &args.how).is_some()
        };
        assert!(warned("web tcp://192.0.2.7:6000"));
        assert!(!warned("web tcp://192.0.2.7:6000 --tls /t"));
        assert!(!warned("web tcp://127.0.0.1:6000"));
        assert!(!warned("web unix:/run/b"));
    }

    #[test]
    fn a_migration_is_asked_for_and_reported() {
        let (_server, _directory, machine) = machine(Double::running());
        let watch = watch::Watch::new(&machine.client);

        let report = sent(&machine, &SendMigrationConfig::to("unix:/run/b"), &watch).unwrap();

        assert_eq!(report, migration_report());
        assert_eq!(
            in_words(&report),
            "46.00 MiB (1.00 MiB of tags) in 12.42 s, 27,511 pages in 3 rounds, 512 fetched after it went on there, the guest stood \
             still for 132.0 ms, slowed down by 20 % at last"
        );
    }

    #[test]
    fn a_migration_that_fails_says_where_the_guest_is() {
        let vmm = Double::running();
        vmm.refuse(Refusal::Failed(
            "the disk is locked. The guest is here, as before".into(),
        ));
        let (_server, _directory, machine) = machine(vmm);
        let watch = watch::Watch::new(&machine.client);

        let error = sent(&machine, &SendMigrationConfig::to("unix:/run/b"), &watch).unwrap_err();

        assert!(
            error.to_string().ends_with(
                "Error sending migration: the disk is locked. The guest is here, as before"
            ),
            "{error}"
        );
        assert!(!is_unsettled(&error));
    }

    #[test]
    fn a_guest_that_is_at_both_sides_or_of_which_nothing_is_known_has_a_status_of_its_own() {
        let vmm = Double::running();
        vmm.refuse(Refusal::Unsettled("3 pages of it are still here".into()));
        let (_server, _directory, machine) = machine(vmm);
        let watch = watch::Watch::new(&machine.client);

        let halves = sent(&machine, &SendMigrationConfig::to("unix:/run/b"), &watch).unwrap_err();
        let killed = Error::Asked {
            name: "web".into(),
            source: crate::api::client::Error::Io {
                socket: "/run/a".into(),
                source: std::io::ErrorKind::UnexpectedEof.into(),
            },
        };

        assert!(is_unsettled(&halves) && is_unsettled(&killed));
    }

    #[test]
    fn a_guest_that_ended_there_is_said_to_have() {
        let report = MigrationReport {
            ended: true,
            ..migration_report()
        };
        let words = in_words(&report);
        assert!(words.contains("when it ended there"), "{words}");
    }

    #[test]
    fn a_migration_is_cancelled_and_decided_by_the_command() {
        let vmm = Double::running();
        let (_server, directory, _machine) = machine(vmm.clone());
        let socket = directory.path().join("api.sock");
        let run = |rest: &str| migrate(parse(&format!("{} {rest}", socket.display())).unwrap());

        run("--cancel").unwrap();
        run("--decide elsewhere").unwrap();

        assert_eq!(
            vmm.calls(),
            [
                Call::CancelMigration,
                Call::DecideMigration(Decision::Elsewhere)
            ]
        );
    }

    #[test]
    fn who_stops_watching_learns_how_to_go_on() {
        let words = farewell("web");
        assert!(words.contains("`tagvisor info web`"), "{words}");
        assert!(words.contains("`tagvisor migrate web --cancel`"), "{words}");
    }
}
