//! Every path, and what becomes of it.

use std::io::Write;

use serde_json::json;
use vmm::config::MachineConfig;

use super::double::{Call, Double, migration_report, report};
use super::*;
use crate::control::{
    Changes, Decision, MigrationRequest, ReceptionRequest, Refusal, SnapshotRequest, TlsRequest,
    VmState,
};

/// Asks for a path without a body; returns the status, and what the VMM was asked.
fn put(name: &str) -> (u16, Vec<Call>) {
    let served = Served::running();
    let (status, _) = served.ask("PUT", name, "");
    (status, served.vmm.calls())
}

#[test]
fn what_takes_no_body_is_done_and_answered_with_nothing() {
    assert_eq!(put("vm.boot"), (204, vec![Call::Boot]));
    assert_eq!(put("vm.pause"), (204, vec![Call::Pause]));
    assert_eq!(put("vm.resume"), (204, vec![Call::Resume]));
    assert_eq!(put("vm.shutdown"), (204, vec![Call::Shutdown]));
    assert_eq!(put("vm.reboot"), (204, vec![Call::Reboot]));
    assert_eq!(put("vm.delete"), (204, vec![Call::Delete]));
}

#[test]
fn the_answer_to_a_ping_has_version_and_process() {
    let (status, body) = Served::running().ask("GET", "vmm.ping", "");
    assert_eq!(status, 200);
    assert_eq!(body["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(body["pid"], std::process::id());
}

#[test]
fn a_vmm_is_shut_down_after_the_answer() {
    let served = Served::running();
    let answer = served.exchange(&request("PUT", "vmm.shutdown", ""));
    assert_eq!(status(&answer), 204);
    drop(served.server);
    assert_eq!(served.vmm.calls(), [Call::ShutDownVmm]);
}

#[test]
fn info_has_the_configuration_in_cloud_hypervisors_names() {
    let (status, body) = Served::running().ask("GET", "vm.info", "");
    assert_eq!(status, 200);
    assert_eq!(body["state"], "Running");
    assert_eq!(body["memory_actual_size"], 512 << 20);
    assert_eq!(
        body["config"]["cpus"],
        json!({"boot_vcpus": 2, "max_vcpus": 2})
    );
    assert_eq!(body["config"]["payload"], json!({"kernel": "/boot/Image"}));
    assert_eq!(body["config"]["name"], "web");
    assert_eq!(body["mte"], "MTE3");
}

#[test]
fn without_a_machine_there_is_nothing_to_tell_and_nothing_to_delete() {
    let served = Served::new(Arc::default(), patient());
    served.vmm.refuse(Refusal::NoVm);
    let ask = |method, name| served.ask(method, name, "");

    assert_eq!(
        ask("GET", "vm.info"),
        (
            404,
            json!([
                "The VM info is not available",
                "there is no VM: create or restore one first"
            ])
        )
    );
    assert_eq!(ask("GET", "vm.counters").0, 404);
    assert_eq!(ask("PUT", "vm.pause").0, 404);
    assert_eq!(ask("PUT", "vm.resize").0, 404);
    assert_eq!(ask("PUT", "vm.delete").0, 204);
}

#[test]
fn a_machine_without_counters_has_none() {
    assert_eq!(
        Served::running().ask("GET", "vm.counters", ""),
        (200, json!({}))
    );
}

#[test]
fn a_refusal_is_answered_with_what_was_wanted_and_why_it_was_not_done() {
    let served = Served::running();
    served.vmm.refuse(Refusal::State {
        wanted: "paused",
        state: VmState::Paused,
    });
    assert_eq!(
        served.ask("PUT", "vm.pause", ""),
        (
            405,
            json!([
                "The VM could not be paused",
                "the VM is paused: it cannot be paused now"
            ])
        )
    );
}

#[test]
fn each_kind_of_refusal_has_its_status() {
    let statuses = [
        Refusal::NoVm,
        Refusal::VmExists,
        Refusal::Unsupported("no".into()),
        Refusal::Failed("no".into()),
    ]
    .map(|refusal| {
        let served = Served::running();
        served.vmm.refuse(refusal);
        served.ask("PUT", "vm.boot", "").0
    });
    assert_eq!(statuses, [404, 500, 500, 500]);
}

#[test]
fn what_tagvisor_lacks_is_refused_with_the_reason() {
    let (status, body) = Served::running().ask("PUT", "vm.power-button", "");
    assert_eq!(status, 500);
    assert_eq!(body[0], "Error triggering power button");
    assert!(body[1].as_str().unwrap().contains("vm.shutdown"), "{body}");
}

#[test]
fn a_body_where_none_belongs_is_refused_before_anything_is_done() {
    let served = Served::running();
    assert_eq!(served.ask("PUT", "vm.pause", "{}").0, 400);
    assert_eq!(served.vmm.calls(), []);
}

#[test]
fn a_machine_is_created_from_cloud_hypervisors_configuration() {
    let served = Served::running();
    let body = r#"{"cpus": {"boot_vcpus": 4, "max_vcpus": 4}, "memory": {"size": 1073741824},
        "payload": {"kernel": "/k", "cmdline": "console=ttyS0", "initramfs": "/i"}}"#;

    let (status, _) = served.ask("PUT", "vm.create", body);

    let expected = MachineConfig {
        kernel: Some("/k".into()),
        initrd: Some("/i".into()),
        cmdline: "console=ttyS0".into(),
        cpus: 4,
        memory: vmm::config::MemorySize(1 << 30),
        console: vmm::console::ConsoleConfig::Off,
        ..MachineConfig::default()
    };
    assert_eq!(status, 204);
    assert_eq!(served.vmm.calls(), [Call::Create(Box::new(expected))]);
}

#[test]
fn a_snapshot_into_a_directory_goes_to_a_file_in_it() {
    let served = Served::running();
    let directory = served.directory.path();
    let body = json!({"destination_url": format!("file://{}", directory.display())});

    let (status, _) = served.ask("PUT", "vm.snapshot", &body.to_string());

    let expected = SnapshotRequest {
        file: directory.join("tagvisor.snapshot"),
        base: None,
        compression: stream::Compression::default(),
    };
    assert_eq!(status, 204);
    assert_eq!(served.vmm.calls(), [Call::Snapshot(expected)]);
}

#[test]
fn a_snapshot_with_fields_of_ours_is_made_so_and_reported() {
    let served = Served::running();
    let body = r#"{"destination_url": "file:///n/b", "base": "file:///n/a", "compression": "zstd:7", "report": true}"#;

    let answer = served.ask("PUT", "vm.snapshot", body);

    let expected = SnapshotRequest {
        file: "/n/b".into(),
        base: Some("/n/a".into()),
        compression: stream::Compression::Zstd(7),
    };
    assert_eq!(answer, (200, serde_json::to_value(report()).unwrap()));
    assert_eq!(served.vmm.calls(), [Call::Snapshot(expected)]);
}

#[test]
fn a_restored_machine_stands_still_unless_it_is_to_resume() {
    let restored = |fields: &str| {
        let served = Served::running();
        let body = format!(r#"{{"source_url": "file:///n/a"{fields}}}"#);
        let (status, _) = served.ask("PUT", "vm.restore", &body);
        assert_eq!(status, 204);
        match &served.vmm.calls()[..] {
            [Call::Restore(request)] => (request.paused, request.lazy),
            calls => panic!("{calls:?}"),
        }
    };
    assert_eq!(restored(""), (true, false));
    assert_eq!(restored(r#", "resume": true"#), (false, false));
    assert_eq!(restored(r#", "paused": false"#), (false, false));
    assert_eq!(restored(r#", "lazy": true"#), (true, true));
    assert_eq!(
        restored(r#", "memory_restore_mode": "OnDemand""#),
        (true, true)
    );
    assert_eq!(
        restored(r#", "prefault": false, "net_fds": null"#),
        (true, false)
    );
}

/// What becomes of a guest that is sent away as Cloud Hypervisor's clients ask for it.
fn sent_to(destination: &str) -> MigrationRequest {
    MigrationRequest {
        destination: destination.parse().unwrap(),
        tls: None,
        connections: std::num::NonZeroU8::MIN,
        post_copy: migration::PostCopy::Never,
        may_slow: true,
        max_downtime: Duration::from_millis(300),
        bandwidth: None,
        compression: stream::Compression::None,
        timeout: None,
        recover: false,
    }
}

#[test]
fn a_guest_is_sent_away_as_cloud_hypervisors_clients_ask_for_it() {
    let served = Served::running();
    let bodies = [
        r#"{"destination_url": "tcp:192.0.2.7:6000", "local": false}"#,
        r#"{"destination_url": "unix:/run/b.sock", "timeout_strategy": "Cancel", "memory_mode": "Precopy"}"#,
    ];

    let answers = bodies.map(|body| served.ask("PUT", "vm.send-migration", body));

    assert_eq!(answers, [(204, json!(null)), (204, json!(null))]);
    assert_eq!(
        served.vmm.calls(),
        [
            Call::Migrate(sent_to("tcp://192.0.2.7:6000")),
            Call::Migrate(sent_to("unix:/run/b.sock"))
        ]
    );
}

#[test]
fn a_guest_is_sent_away_with_fields_of_ours_and_reported() {
    let served = Served::running();
    let body = json!({"destination_url": "tcp://b.example:6000", "connections": 4, "postcopy": "auto",
        "may_slow": false, "downtime_ms": 50, "bandwidth": "800Mbit", "compression": "lz4", "tls_dir": "/etc/tls",
        "tls_peer_name": "b", "timeout_s": 60, "recover": true, "report": true});

    let answer = served.ask("PUT", "vm.send-migration", &body.to_string());

    let expected = MigrationRequest {
        tls: Some(TlsRequest {
            directory: "/etc/tls".into(),
            peer_name: Some("b".into()),
        }),
        connections: 4.try_into().unwrap(),
        post_copy: migration::PostCopy::Auto,
        may_slow: false,
        max_downtime: Duration::from_millis(50),
        bandwidth: Some("100MB/s".parse().unwrap()),
        compression: stream::Compression::Lz4,
        timeout: Some(Duration::from_secs(60)),
        recover: true,
        ..sent_to("tcp://b.example:6000")
    };
    assert_eq!(
        answer,
        (200, serde_json::to_value(migration_report()).unwrap())
    );
    assert_eq!(served.vmm.calls(), [Call::Migrate(expected)]);
}

#[test]
fn a_guest_is_received_as_it_was_or_with_changes() {
    let served = Served::running();
    let plain = r#"{"receiver_url": "tcp:0.0.0.0:6000", "zone_updates": []}"#;
    let ours = json!({"receiver_url": "unix:/run/a", "unprotected": true, "name": "web", "taps": ["tap1"],
        "disks": ["/d"], "ports": ["/p"], "serial": {"mode": "File", "file": "/log"}});

    let statuses =
        [plain, &ours.to_string()].map(|body| served.ask("PUT", "vm.receive-migration", body).0);

    let as_it_was = ReceptionRequest {
        listen: "tcp://0.0.0.0:6000".parse().unwrap(),
        tls: None,
        unprotected: false,
        changes: Changes::default(),
    };
    let with_changes = ReceptionRequest {
        listen: "unix:/run/a".parse().unwrap(),
        tls: None,
        unprotected: true,
        changes: Changes {
            name: Some("web".into()),
            console: Some(vmm::console::ConsoleConfig::File("/log".into())),
            taps: vec!["tap1".into()],
            disks: vec!["/d".into()],
            ports: vec!["/p".into()],
        },
    };
    assert_eq!(statuses, [204, 204]);
    assert_eq!(
        served.vmm.calls(),
        [Call::Receive(as_it_was), Call::Receive(with_changes)]
    );
}

#[test]
fn a_migration_is_cancelled_and_decided() {
    let served = Served::running();
    let decide = |body| served.ask("PUT", "vm.decide-migration", body).0;

    let statuses = [
        served.ask("PUT", "vm.cancel-migration", "").0,
        decide(r#"{"run": "here"}"#),
        decide(r#"{"run": "elsewhere"}"#),
        decide(r#"{"run": "both"}"#),
        decide(""),
    ];

    assert_eq!(statuses, [204, 204, 204, 400, 400]);
    assert_eq!(
        served.vmm.calls(),
        [
            Call::CancelMigration,
            Call::DecideMigration(Decision::Here),
            Call::DecideMigration(Decision::Elsewhere)
        ]
    );
}

#[test]
fn a_migration_whose_client_left_goes_on_and_is_told_of() {
    let served = Served::running();
    served.vmm.hold();
    let mut leaving = served.connect();
    leaving
        .write_all(&request(
            "PUT",
            "vm.send-migration",
            r#"{"destination_url": "unix:/run/b"}"#,
        ))
        .unwrap();
    wait_until(|| !served.vmm.calls().is_empty());

    drop(leaving);
    let (told, _) = served.ask("GET", "vm.info", "");
    let (cancelled, _) = served.ask("PUT", "vm.cancel-migration", "");
    served.vmm.release();

    assert_eq!((told, cancelled), (200, 204));
    assert_eq!(
        served.vmm.calls(),
        [Call::Migrate(sent_to("unix:/run/b")), Call::CancelMigration]
    );
}

#[test]
fn paths_that_are_not_there_are_not_found() {
    let served = Served::running();
    let statuses = ["vm.nothing", "", "vm.info/", "../v1/vm.info", "vm.info%00"]
        .map(|name| served.ask("GET", name, "").0);
    assert_eq!(statuses, [404; 5]);
}

#[test]
fn a_target_may_be_a_whole_url_and_have_a_query() {
    let served = Served::running();
    let answer = served.exchange(
        b"GET http://localhost/api/v1/vm.info?x=y HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    );
    assert_eq!(status(&answer), 200);
}

#[test]
fn a_connection_is_kept_for_request_after_request() {
    let served = Served::running();
    let mut stream = served.connect();
    for _ in 0..100 {
        stream
            .write_all(b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n")
            .unwrap();
        let mut answer = [0; 15];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 \r\n");
        read_to_blank_line_and_body(&mut stream);
    }
}

/// Reads the rest of an answer's head, and its body.
fn read_to_blank_line_and_body(stream: &mut UnixStream) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let (_, length) = head.split_once("Content-Length: ").unwrap();
    let length = length.split("\r\n").next().unwrap().parse().unwrap();
    stream.read_exact(&mut vec![0; length]).unwrap();
}

#[test]
fn requests_sent_at_once_are_answered_in_order() {
    let served = Served::running();
    let pause = b"PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: 0\r\n\r\n";
    let resume = b"PUT /api/v1/vm.resume HTTP/1.1\r\nConnection: close\r\n\r\n";

    let answer = served.exchange(&[&pause[..], resume].concat());

    assert_eq!(answer.matches("HTTP/1.1 204 ").count(), 2);
    assert_eq!(served.vmm.calls(), [Call::Pause, Call::Resume]);
}

/// It looks for `HTTP/1.1`, takes what follows in that line for a number, and looks for `Content-Length: ` as it stands.
#[test]
fn an_answer_is_what_cloud_hypervisors_client_can_read() {
    let served = Served::running();
    let ping = served.exchange(&request("GET", "vmm.ping", ""));
    let pause = served.exchange(&request("PUT", "vm.pause", ""));

    let (status_line, headers) = ping.split_once("\r\n").unwrap();
    assert_eq!(status_line, "HTTP/1.1 200 ");
    assert!(headers.contains("\r\nContent-Length: "), "{headers}");
    assert!(pause.starts_with("HTTP/1.1 204 \r\n"), "{pause}");
    assert!(!pause.contains("Content-Length"), "{pause}");
}

#[test]
fn http_1_0_is_answered_and_the_connection_closed() {
    let answer = Served::running().exchange(b"GET /api/v1/vmm.ping HTTP/1.0\r\n\r\n");
    assert_eq!(status(&answer), 200);
    assert!(answer.contains("Connection: close"), "{answer}");
}

#[test]
fn a_client_that_asks_before_it_sends_a_body_is_told_to_go_on() {
    let served = Served::running();
    let body = r#"{"destination_url": "file:///n/a"}"#;
    let mut stream = served.connect();
    let head = format!(
        "PUT /api/v1/vm.snapshot HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();

    let mut go_on = [0; 25];
    stream.read_exact(&mut go_on).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let answer = everything(&mut stream);

    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(status(&answer), 204);
}

#[test]
fn info_is_answered_while_a_snapshot_is_written() {
    let served = Served::running();
    served.vmm.hold();
    let mut writing = served.connect();
    writing
        .write_all(&request(
            "PUT",
            "vm.snapshot",
            r#"{"destination_url": "file:///n/a"}"#,
        ))
        .unwrap();

    let (info, _) = served.ask("GET", "vm.info", "");
    served.vmm.release();
    let written = everything(&mut writing);

    assert_eq!((info, status(&written)), (200, 204));
}

#[test]
fn a_snapshot_whose_client_left_is_written_to_its_end() {
    let served = Served::running();
    served.vmm.hold();
    let mut leaving = served.connect();
    leaving
        .write_all(&request(
            "PUT",
            "vm.snapshot",
            r#"{"destination_url": "file:///n/a"}"#,
        ))
        .unwrap();
    wait_until(|| !served.vmm.calls().is_empty());

    drop(leaving);
    served.vmm.release();

    assert_eq!(served.ask("PUT", "vm.pause", "").0, 204);
    assert_eq!(served.vmm.calls().len(), 2);
}

#[test]
fn a_server_that_ends_sends_away_who_waits_and_removes_its_socket() {
    let mut served = Served::running();
    let mut waiting = served.connect();
    served.ask("GET", "vmm.ping", "");

    let server = served.server.take();
    let started = std::time::Instant::now();
    drop(server);

    assert!(started.elapsed() < std::time::Duration::from_secs(1));
    assert_eq!(everything(&mut waiting), "");
    assert!(!served.socket().exists());
}

#[test]
fn a_server_that_ends_still_answers_what_was_asked() {
    let mut served = Served::running();
    served.vmm.hold();
    let mut asking = served.connect();
    asking
        .write_all(&request(
            "PUT",
            "vm.snapshot",
            r#"{"destination_url": "file:///n/a"}"#,
        ))
        .unwrap();
    wait_until(|| !served.vmm.calls().is_empty());

    let server = served.server.take();
    let ending = std::thread::spawn(move || drop(server));
    served.vmm.release();
    let answer = everything(&mut asking);
    ending.join().unwrap();

    assert_eq!(status(&answer), 204);
}

#[test]
fn the_socket_of_another_server_is_not_taken_and_a_dead_one_is() {
    let served = Served::running();
    let second = super::serve_within(&served.socket(), Arc::<Double>::default(), patient());
    let dead = served.directory.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let file = served.directory.path().join("file");
    std::fs::write(&file, "data").unwrap();

    let in_use = second.err().unwrap().to_string();
    let taken = super::serve_within(&dead, Arc::<Double>::default(), patient());
    let kept = super::serve_within(&file, Arc::<Double>::default(), patient());

    assert!(in_use.contains("another VMM listens there"), "{in_use}");
    assert!(taken.is_ok());
    assert!(kept.is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"data");
}
