//! `peer` and its agent over loopback.

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

fn agent() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || peer::agent::serve(&listener));
    address
}

fn peer(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_peer"));
    command
        .args(words)
        .env("PEER_AGENT", agent().to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn output(words: &[&str]) -> Output {
    peer(words).output().unwrap()
}

/// Starts a command whose first line is awaited and returned.
fn started(words: &[&str]) -> (Child, String) {
    let mut child = peer(words).spawn().unwrap();
    let mut line = String::new();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    reader.read_line(&mut line).unwrap();
    std::thread::spawn(move || reader.read_to_end(&mut Vec::new()));
    (child, line.trim().to_owned())
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn both_outputs_and_the_status_come_back() {
    let output = output(&["sh", "-c", "echo out; echo err >&2; exit 42"]);

    assert_eq!(output.stdout, b"out\n");
    assert_eq!(output.stderr, b"err\n");
    assert_eq!(output.status.code(), Some(42));
}

#[test]
fn much_output_arrives_whole() {
    let output = output(&["head", "-c", "5000000", "/dev/zero"]);

    assert_eq!(output.stdout.len(), 5_000_000);
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_command_that_a_signal_ends_has_the_status_a_shell_says() {
    assert_eq!(output(&["sh", "-c", "kill -9 $$"]).status.code(), Some(137));
}

#[test]
fn a_command_that_is_not_there_is_named() {
    let output = output(&["no-such-command"]);

    assert!(String::from_utf8_lossy(&output.stderr).contains("no-such-command"));
    assert_eq!(output.status.code(), Some(127));
}

#[test]
fn signals_are_passed_on() {
    let script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.02; done";
    let (mut child, _) = started(&["sh", "-c", script]);

    send(&child, Signal::TERM);

    assert_eq!(child.wait().unwrap().code(), Some(9));
}

#[test]
fn who_kills_the_stand_in_kills_the_command_and_all_it_has_started() {
    let (mut child, pid) = started(&["sh", "-c", "sleep 1000 & echo $!; wait"]);
    let process = format!("/proc/{pid}/exe");
    assert!(Path::new(&process).exists());

    send(&child, Signal::KILL);

    child.wait().unwrap();
    wait_until("it still runs", || std::fs::read_link(&process).is_err());
}

#[test]
fn a_program_left_in_the_background_does_not_hold_up_the_end_and_goes_on() {
    let output = output(&["sh", "-c", "sleep 1000 & echo $!; exit 3"]);

    assert_eq!(output.status.code(), Some(3));
    let pid = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

#[test]
fn variables_are_passed_on_but_those_that_tell_the_hosts_apart() {
    let mut command = peer(&["sh", "-c", "echo $COLOUR $PEER_NAME"]);

    let output = command
        .env("COLOUR", "blue")
        .env("PEER_NAME", "host2")
        .output()
        .unwrap();

    assert_eq!(output.stdout, b"blue\n");
}

#[test]
fn many_commands_at_once_do_not_wait_for_each_other() {
    let address = agent().to_string();
    let run = |_| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peer"));
        command.args(["sleep", "0.5"]).env("PEER_AGENT", &address);
        command.spawn().unwrap()
    };
    let begun = Instant::now();

    let children: Vec<Child> = (0..20).map(run).collect();

    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert!(begun.elapsed() < Duration::from_secs(8));
}
