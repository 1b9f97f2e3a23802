//! What bodies may ask for, and what not.

use proptest::prelude::*;
use serde_json::json;
use vmm::config::{MachineConfig, MemorySize};
use vmm::console::ConsoleConfig;

use super::super::body::{interpret, read};
use super::super::config::VmConfig;
use super::super::migration::{DecideMigrationConfig, ReceiveMigrationConfig, SendMigrationConfig};
use super::super::model::{RestoreConfig, SnapshotConfig, parse_compression};

fn machine(body: &serde_json::Value) -> Result<MachineConfig, String> {
    let config = interpret::<VmConfig>(body).and_then(VmConfig::machine);
    config.map_err(|e| e.to_string())
}

/// A configuration with this field at the top.
fn with(name: &str, value: serde_json::Value) -> Result<MachineConfig, String> {
    let mut body = json!({"payload": {"kernel": "/k"}});
    body[name] = value;
    machine(&body)
}

/// What `vm.info` of Cloud Hypervisor 49 says of a machine made with `--kernel k --disk path=d --net tap=tap0`.
fn with_every_default() -> serde_json::Value {
    json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "topology": null, "kvm_hyperv": false, "max_phys_bits": 46,
            "affinity": null, "features": {}, "nested": true, "core_scheduling": "Vm", "profile": "Host"},
        "memory": {"size": 536870912, "mergeable": false, "hotplug_method": "Acpi", "hotplug_size": null,
            "hotplugged_size": null, "shared": false, "hugepages": false, "hugepage_size": null,
            "prefault": false, "reserve": false, "zones": null, "thp": true},
        "payload": {"firmware": null, "kernel": "k", "cmdline": null, "initramfs": null},
        "rate_limit_groups": null,
        "disks": [{"path": "d", "readonly": false, "direct": false, "iommu": false, "num_queues": 1, "queue_size": 128,
            "vhost_user": false, "vhost_socket": null, "rate_limit_group": null, "rate_limiter_config": null,
            "id": "_disk0", "disable_io_uring": false, "disable_aio": false, "pci_segment": 0, "serial": null,
            "queue_affinity": null, "backing_files": false, "sparse": true, "image_type": "Raw"}],
        "net": [{"tap": "tap0", "mac": "02:00:00:00:00:01", "host_mac": null, "mtu": null, "iommu": false,
            "num_queues": 2, "queue_size": 256, "vhost_user": false, "vhost_socket": null, "vhost_mode": "Client",
            "id": "_net1", "fds": null, "rate_limiter_config": null, "pci_segment": 0, "offload_tso": true,
            "offload_ufo": true, "offload_csum": true, "ip": null, "mask": null}],
        "rng": {"src": "/dev/urandom", "iommu": false},
        "balloon": null, "fs": null, "pmem": null,
        "serial": {"file": null, "mode": "Null", "iommu": false, "socket": null},
        "console": {"file": null, "mode": "Off", "iommu": false, "socket": null},
        "devices": null, "user_devices": null, "vdpa": null, "vsock": null, "pvpanic": false, "iommu": false,
        "numa": null, "watchdog": false, "gdb": false, "pci_segments": null, "platform": null, "tpm": null,
        "landlock_enable": false, "landlock_rules": null
    })
}

#[test]
fn cloud_hypervisors_defaults_are_accepted() {
    let created = machine(&with_every_default()).unwrap();
    assert_eq!(created.kernel, Some("k".into()));
    assert_eq!(created.disk, ["d".parse().unwrap()]);
    assert_eq!(created.net, ["tap0,mac=02:00:00:00:00:01".parse().unwrap()]);
    assert_eq!(created.console, ConsoleConfig::Off);
}

#[test]
fn what_libvirt_sends_is_accepted() {
    let created = machine(&json!({
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": 1073741824},
        "payload": {"kernel": "/k", "cmdline": "root=/dev/vda", "initramfs": "/i"},
        "disks": [{"path": "/d", "readonly": true}]
    }));
    assert_eq!(created.unwrap().memory, MemorySize(1 << 30));
}

#[test]
fn each_field_that_asks_for_more_is_refused_by_its_name() {
    let changes = [
        ("/cpus/max_vcpus", json!(2)),
        ("/cpus/boot_vcpus", json!(0)),
        ("/cpus/topology", json!({"threads_per_core": 2})),
        ("/cpus/kvm_hyperv", json!(true)),
        ("/cpus/max_phys_bits", json!(40)),
        ("/cpus/affinity", json!([{"vcpu": 0, "host_cpus": [1]}])),
        ("/memory/mergeable", json!(true)),
        ("/memory/hotplug_size", json!(1)),
        ("/memory/hotplug_method", json!("VirtioMem")),
        ("/memory/hugepage_size", json!(1 << 30)),
        ("/memory/prefault", json!(true)),
        ("/memory/zones", json!([{"id": "a", "size": 1}])),
        ("/memory/thp", json!(false)),
        ("/payload/firmware", json!("/f")),
        ("/payload/flat", json!("/f")),
        ("/rate_limit_groups", json!([{"id": "a"}])),
        ("/disks/0/direct", json!(true)),
        ("/disks/0/num_queues", json!(4)),
        ("/disks/0/vhost_user", json!(true)),
        ("/disks/0/image_type", json!("Qcow2")),
        ("/disks/0/path", json!("")),
        ("/net/0/host_mac", json!("02:00:00:00:00:02")),
        ("/net/0/ip", json!("10.0.0.1")),
        ("/net/0/fds", json!([3])),
        ("/net/0/num_queues", json!(4)),
        ("/net/0/tap", json!("")),
        ("/rng/src", json!("/dev/hwrng")),
        ("/balloon", json!({"size": 1})),
        ("/fs", json!([{"tag": "a", "socket": "/s"}])),
        ("/serial/mode", json!("Pty")),
        ("/serial/mode", json!("Socket")),
        ("/console/mode", json!("Tty")),
        ("/devices", json!([{"path": "/sys/a"}])),
        ("/vsock", json!({"cid": 3, "socket": "/s"})),
        ("/iommu", json!(true)),
        ("/watchdog", json!(true)),
        ("/platform", json!({"num_pci_segments": 2})),
        ("/tpm", json!({"socket": "/s"})),
        ("/landlock_enable", json!(true)),
    ];
    let unnamed: Vec<_> = changes
        .into_iter()
        .filter(|(pointer, value)| {
            let mut body = with_every_default();
            let (parent, name) = pointer.rsplit_once('/').unwrap();
            body.pointer_mut(parent).unwrap()[name] = value.clone();
            let refused = machine(&body).err().unwrap_or_default();
            !refused.contains(name)
        })
        .collect();
    assert_eq!(unnamed, []);
}

#[test]
fn a_refused_field_is_named_with_its_place_and_its_value() {
    let mut body = with_every_default();
    body["disks"][0]["direct"] = json!(true);
    assert_eq!(
        machine(&body),
        Err("`disks[0].direct`: Tagvisor has no such thing, and true is asked for".into())
    );
}

#[test]
fn a_misspelt_field_that_asks_for_something_is_refused() {
    assert_eq!(
        with("memroy", json!({"size": 1})),
        Err("`memroy`: Tagvisor has no such thing, and {\"size\":1} is asked for".into())
    );
}

#[test]
fn values_of_another_kind_are_refused() {
    let refused = [
        with("cpus", json!(1)),
        with("cpus", json!({"boot_vcpus": -1, "max_vcpus": -1})),
        with("cpus", json!({"boot_vcpus": 1.5, "max_vcpus": 1})),
        with("cpus", json!({"boot_vcpus": 1})),
        with(
            "cpus",
            json!({"boot_vcpus": 4294967296_u64, "max_vcpus": 1}),
        ),
        with("memory", json!({"size": "1G"})),
        with("memory", json!({"size": -1})),
        with("payload", json!([])),
        with("payload", json!({})),
        with("payload", json!(null)),
        with("disks", json!({})),
        with("disks", json!([{}])),
        with("net", json!([{"tap": "tap0", "mac": "x"}])),
        with("net", json!([{"tap": "tap0", "mtu": 70000}])),
        with("serial", json!({"mode": "file"})),
        with("serial", json!({"mode": "File"})),
        with("mte", json!("4")),
        with("mte", json!(3)),
        with("tag_access", json!("magic")),
        with("ports", json!([{"name": "a"}])),
        with("ports", json!([{"name": "a", "socket": "/s", "more": 1}])),
        with("no_reboot", json!("no")),
    ];
    assert_eq!(refused.map(|result| result.is_err()), [true; 22]);
}

#[test]
fn a_value_of_another_kind_is_refused_with_its_place() {
    let mut body = with_every_default();
    body["disks"][0]["readonly"] = json!("yes");
    assert_eq!(
        machine(&body),
        Err("`disks[0].readonly`: invalid type: string \"yes\", expected a boolean".into())
    );
}

#[test]
fn what_would_have_to_be_switched_off_is_refused() {
    let mut body = with_every_default();
    body["net"][0]["offload_tso"] = json!(false);
    assert_eq!(
        machine(&body),
        Err("`net[0].offload_tso`: Tagvisor has no such thing, and false is asked for".into())
    );
}

#[test]
fn a_machine_that_is_told_and_created_again_is_the_same() {
    let machine = MachineConfig {
        name: Some("web".into()),
        flat: Some("/f".into()),
        cmdline: "a b".into(),
        cpus: 4,
        memory: MemorySize(513 << 20),
        huge_pages: true,
        mte: "3".parse().unwrap(),
        tag_access: vmm::memory::TagAccess::Ioctl,
        console: ConsoleConfig::File("/log".into()),
        disk: vec!["a,readonly,id=x".parse().unwrap(), "b".parse().unwrap()],
        net: vec!["tap0,mac=02:00:00:00:00:01,mtu=1400".parse().unwrap()],
        port: vec!["agent,socket=/run/a".parse().unwrap()],
        no_reboot: true,
        ..MachineConfig::default()
    };
    let told = serde_json::to_value(VmConfig::from(&machine)).unwrap();
    assert_eq!(super::bodies::machine(&told), Ok(machine));
}

fn restore(body: &serde_json::Value) -> Result<crate::control::RestoreRequest, String> {
    let config = interpret::<RestoreConfig>(body).and_then(RestoreConfig::request);
    config.map_err(|e| e.to_string())
}

#[test]
fn restores_that_contradict_themselves_or_ask_for_more_are_refused() {
    let url = "file:///a";
    let refused = [
        restore(&json!({})),
        restore(&json!({"source_url": url, "resume": true, "paused": true})),
        restore(&json!({"source_url": url, "prefault": true})),
        restore(&json!({"source_url": url, "net_fds": [{"id": "n", "num_fds": 1}]})),
        restore(&json!({"source_url": url, "memory_restore_mode": "Magic"})),
        restore(&json!({"source_url": url, "bases": ["relative"]})),
        restore(&json!({"source_url": "a"})),
        restore(&json!({"source_url": "file://a"})),
        restore(&json!({"source_url": "http:///a"})),
        restore(&json!({"source_url": "file:///a\u{0}b"})),
    ];
    assert_eq!(refused.map(|result| result.is_err()), [true; 10]);
}

/// Why a guest is not sent away: to `/run/b`, with this field.
fn not_sent(name: &str, value: serde_json::Value) -> String {
    let mut body = json!({"destination_url": "unix:/run/b"});
    body[name] = value;
    let config = interpret::<SendMigrationConfig>(&body).and_then(SendMigrationConfig::request);
    config.err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn migrations_that_contradict_themselves_or_ask_for_more_are_refused_by_the_fields_name() {
    let fields = [
        ("destination_url", json!("/run/b")),
        ("destination_url", json!("unix:b")),
        ("destination_url", json!("unix:")),
        ("destination_url", json!("tcp:6000")),
        ("destination_url", json!("tcp:///6000")),
        ("local", json!(true)),
        ("preserve_source", json!(true)),
        ("timeout_strategy", json!("Ignore")),
        ("memory_mode", json!("MemFDs")),
        ("connections", json!(0)),
        ("connections", json!(65)),
        ("connections", json!(-1)),
        ("downtime_ms", json!(0)),
        ("timeout_s", json!(0)),
        ("postcopy", json!("later")),
        ("bandwidth", json!("fast")),
        ("bandwidth", json!(1000)),
        ("compression", json!("gzip")),
        ("tls_dir", json!("certificates")),
        ("tls_peer_name", json!("b")),
        ("max_downtime_ms", json!(1)),
    ];
    let unnamed: Vec<_> = fields
        .into_iter()
        .filter(|(name, value)| !not_sent(name, value.clone()).contains(&format!("`{name}`")))
        .collect();
    assert_eq!(unnamed, []);
}

#[test]
fn both_words_for_post_copy_mean_the_same_and_may_not_differ() {
    let post_copy = |ours: serde_json::Value| {
        let body =
            json!({"destination_url": "unix:/b", "memory_mode": "Postcopy", "postcopy": ours});
        let config = interpret::<SendMigrationConfig>(&body).and_then(SendMigrationConfig::request);
        config.map(|request| request.post_copy).ok()
    };
    let now = Some(::migration::PostCopy::Now);
    assert_eq!(
        [json!(null), json!("now"), json!("auto"), json!("never")].map(post_copy),
        [now, now, None, None]
    );
}

#[test]
fn receptions_that_contradict_themselves_or_ask_for_more_are_refused() {
    let url = "unix:/run/b";
    let refused = [
        json!({}),
        json!({"receiver_url": "/run/b"}),
        json!({"receiver_url": url, "unprotected": true, "tls_dir": "/t"}),
        json!({"receiver_url": url, "tls_peer_name": "a"}),
        json!({"receiver_url": url, "tls_dir": "t"}),
        json!({"receiver_url": url, "taps": "tap0"}),
        json!({"receiver_url": url, "serial": {"mode": "Pty"}}),
        json!({"receiver_url": url, "zone_updates": [{"id": "a", "host_numa_node": 0}]}),
    ]
    .map(|body| {
        interpret::<ReceiveMigrationConfig>(&body)
            .and_then(ReceiveMigrationConfig::request)
            .is_err()
    });
    assert_eq!(refused, [true; 8]);
}

#[test]
fn a_url_is_a_path_as_it_stands() {
    let request = restore(&json!({"source_url": "file:///a%20b c?d#e"})).unwrap();
    assert_eq!(request.file.to_str(), Some("/a%20b c?d#e"));
}

#[test]
fn compressions_that_mean_nothing_are_refused() {
    let texts = [
        "", "gzip", "lz4:1", "none:1", "zstd:0", "zstd:23", "zstd:-1", "zstd:x", "ZSTD",
    ];
    assert_eq!(
        texts.map(|text| parse_compression(text).is_err()),
        [true; 9]
    );
}

#[test]
fn a_snapshot_with_an_unknown_field_is_refused() {
    let body = json!({"destination_url": "file:///a", "compress": "none"});
    assert_eq!(
        interpret::<SnapshotConfig>(&body).unwrap_err().to_string(),
        "`compress`: Tagvisor has no such thing, and \"none\" is asked for"
    );
}

proptest! {
    #[test]
    fn no_url_makes_the_reader_of_addresses_panic(url in "(tcp:|tcp://|unix:)?.{0,120}") {
        let _ = SendMigrationConfig::to(url).request();
    }

    #[test]
    fn no_text_makes_the_bodies_panic(text in "[\\[\\]{}\":,a-z0-9._-]{0,60}") {
        let _ = read::<VmConfig>(text.as_bytes()).and_then(VmConfig::machine);
        let _ = read::<SnapshotConfig>(text.as_bytes()).and_then(SnapshotConfig::request);
        let _ = read::<RestoreConfig>(text.as_bytes()).and_then(RestoreConfig::request);
        let _ = read::<SendMigrationConfig>(text.as_bytes()).and_then(SendMigrationConfig::request);
        let _ = read::<ReceiveMigrationConfig>(text.as_bytes()).and_then(ReceiveMigrationConfig::request);
        let _ = read::<DecideMigrationConfig>(text.as_bytes());
    }
}
