//! Debuggers that come to a machine.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use super::*;

const SOON: Duration = Duration::from_secs(20);

const SUPPORTED: &str = "qSupported:swbreak+";

/// Once there is a machine.
fn open(vmm: &dyn Vmm, listen: &str) -> Result<Option<Address>, Refusal> {
    while vmm.info().is_err() {
        thread::yield_now();
    }
    vmm.debug(DebugRequest {
        listen: Some(listen.parse().unwrap()),
        unprotected: false,
    })
}

fn close(vmm: &dyn Vmm) {
    vmm.debug(DebugRequest {
        listen: None,
        unprotected: false,
    })
    .unwrap();
}

/// A debugger at the other end.
struct Client(TcpStream);

impl Client {
    fn come(vmm: &dyn Vmm) -> Self {
        Self::at(&open(vmm, "tcp://127.0.0.1:0").unwrap().unwrap())
    }

    fn at(address: &Address) -> Self {
        let address = address.to_string();
        let stream = TcpStream::connect(address.strip_prefix("tcp://").unwrap()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self(stream)
    }

    fn say(&mut self, body: &str) {
        let sum = body.bytes().fold(0_u8, u8::wrapping_add);
        write!(self.0, "${body}#{sum:02x}").unwrap();
    }

    /// What comes until a packet ends, or the connection does.
    fn hear(&mut self) -> String {
        let mut heard = String::new();
        let mut byte = [0];
        let is_whole = |heard: &str| heard.find('#').is_some_and(|at| heard.len() == at + 3);
        while !is_whole(&heard) && self.0.read(&mut byte).is_ok_and(|length| length == 1) {
            heard.push(byte[0].into());
        }
        heard
    }

    fn ask(&mut self, body: &str) -> String {
        self.say(body);
        self.hear()
    }
}

fn wait_for_more_runs(life: &Trial) {
    let before = life.runs();
    while life.runs() == before {
        thread::yield_now();
    }
}

fn wait_for(vmm: &dyn Vmm, state: VmState) {
    while vmm.info().unwrap().state != state {
        thread::yield_now();
    }
}

#[test]
fn a_guest_stands_while_a_debugger_has_it_and_goes_on_when_that_detaches() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        let mut client = Client::come(vmm);
        assert!(client.ask(SUPPORTED).contains("PacketSize"));
        let standing = vmm.info().unwrap();
        let before = life.runs();
        thread::sleep(Duration::from_millis(20));
        let after = life.runs();
        assert!(client.ask("D").contains("OK"));
        wait_for_more_runs(&life);

        assert_eq!(standing.state, VmState::Paused);
        assert!(
            standing
                .reason
                .unwrap()
                .starts_with("a debugger has it (127.0.0.1:")
        );
        assert_eq!(before, after);
        wait_for(vmm, VmState::Running);
        assert_eq!(vmm.info().unwrap().reason, None);
    });
}

#[test]
fn while_a_debugger_has_the_machine_orders_are_refused() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        let mut client = Client::come(vmm);
        client.ask(SUPPORTED);

        let refusals = [
            vmm.pause().unwrap_err(),
            vmm.resume().unwrap_err(),
            vmm.shutdown().unwrap_err(),
            vmm.snapshot(life.snapshot_request("file")).unwrap_err(),
        ];

        for refusal in refusals {
            let refusal = refusal.to_string();
            assert!(
                refusal.starts_with("a debugger has the VM (127.0.0.1:"),
                "{refusal}"
            );
        }
    });
}

#[test]
fn a_guest_runs_for_a_debugger_until_that_interrupts_it() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        let mut client = Client::come(vmm);
        client.ask(SUPPORTED);

        client.say("vCont;c");
        wait_for_more_runs(&life);
        client.0.write_all(&[3]).unwrap();
        let stop = client.hear();
        let before = life.runs();
        thread::sleep(Duration::from_millis(20));

        assert!(stop.contains("$T02thread:01;"), "{stop}");
        assert_eq!(life.runs(), before);
    });
}

#[test]
fn a_debugger_that_vanishes_lets_the_guest_go_on() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        let mut client = Client::come(vmm);
        client.ask(SUPPORTED);

        drop(client);

        wait_for(vmm, VmState::Running);
        wait_for_more_runs(&life);
        vmm.pause().unwrap();
    });
}

#[test]
fn a_guest_that_was_paused_is_so_after_a_debugger_let_it_run() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        vmm.pause().unwrap();
        let mut client = Client::come(vmm);
        client.ask(SUPPORTED);
        client.say("vCont;c");
        wait_for_more_runs(&life);
        client.0.write_all(&[3]).unwrap();
        client.hear();
        client.ask("D");
        assert_eq!(client.hear(), "");

        let before = life.runs();
        thread::sleep(Duration::from_millis(20));

        assert_eq!(life.runs(), before);
        vmm.resume().unwrap();
        wait_for_more_runs(&life);
    });
}

#[test]
fn there_is_one_debugger_at_a_time() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        let address = open(vmm, "tcp://127.0.0.1:0").unwrap().unwrap();
        let mut first = Client::at(&address);
        first.ask(SUPPORTED);

        let mut second = Client::at(&address);

        assert_eq!(second.hear(), "");
        assert!(first.ask("?").contains("T05"));
    });
}

#[test]
fn a_debugger_is_sent_away_when_none_may_come_any_more() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        let mut client = Client::come(vmm);
        client.ask(SUPPORTED);

        close(vmm);

        assert_eq!(client.hear(), "");
        wait_for_more_runs(&life);
    });
}

#[test]
fn a_debugger_that_sends_garbage_is_sent_away_and_another_can_come() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        let address = open(vmm, "tcp://127.0.0.1:0").unwrap().unwrap();
        let mut client = Client::at(&address);

        client.0.write_all(&[b'$'; 5000]).unwrap();

        assert_eq!(client.hear(), "");
        // The machine is let go a moment after the connection.
        wait_for(vmm, VmState::Running);
        let answers = || Client::at(&address).ask(SUPPORTED).contains("PacketSize");
        while !answers() {
            thread::yield_now();
        }
    });
}

#[test]
fn a_socket_for_debuggers_is_gone_with_the_machine() {
    let life = endless();
    let path = life.folder.path().join("gdb.sock");
    life.meanwhile(life.boot(), |vmm| {
        open(vmm, &format!("unix:{}", path.display())).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"$?#3f").unwrap();
        let mut answer = [0; 5];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+$T05");
    });

    assert!(!path.exists());
}

#[test]
fn other_hosts_cannot_come_unless_that_is_allowed() {
    let life = endless();
    life.meanwhile(life.boot(), |vmm| {
        let refusal = open(vmm, "tcp://0.0.0.0:0").unwrap_err().to_string();

        assert!(
            refusal.contains("could read and change all of the guest"),
            "{refusal}"
        );
        assert!(refusal.contains("--unprotected"), "{refusal}");
    });
}
