//! `tagvisor tags` and `tagvisor core`, on files that were written once: a machine with two vCPUs and no tags
//! (`machine-v1.snapshot`), and memory with tags and no machine (`version-1.base`, and `version-1.delta` on it).

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn machine() -> PathBuf {
    crates().join("vmm/tests/data/machine-v1.snapshot")
}

fn base() -> PathBuf {
    crates().join("stream/tests/files/version-1.base")
}

fn delta() -> PathBuf {
    crates().join("stream/tests/files/version-1.delta")
}

fn tagvisor(command: &[&str], paths: &[&Path], options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tagvisor"))
        .args(command)
        .args(paths)
        .args(options)
        .output()
        .unwrap()
}

fn printed(command: &[&str], paths: &[&Path], options: &[&str]) -> String {
    let output = tagvisor(command, paths, options);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

fn refused(command: &[&str], paths: &[&Path], options: &[&str]) -> String {
    let output = tagvisor(command, paths, options);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn figures_count_populated_memory_and_holes() {
    let text = printed(&["tags", "stat"], &[&machine()], &["--json"]);
    let figures: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(figures["pages"], 1024);
    assert_eq!(figures["untagged"], 1024);
    assert_eq!(figures["holes"], 3072);
    assert_eq!(figures["granules"][0], 1024 * 256);
    assert_eq!(figures["start"], 0x4000_0000);
}

#[test]
fn figures_in_words_have_a_line_a_tag_and_a_region() {
    let text = printed(&["tags", "stat"], &[&base()], &[]);
    assert!(text.contains("TAG  GRANULES  SHARE"), "{text}");
    assert!(text.contains("tagged: "), "{text}");
    assert!(!text.contains("NaN") && !text.contains("-0"), "{text}");
}

#[test]
fn a_picture_is_digits_where_there_is_no_terminal_and_colours_when_asked_for() {
    let digits = printed(&["tags", "map"], &[&delta()], &["--range", "0x1000+4K"]);
    let coloured = printed(
        &["tags", "map"],
        &[&delta()],
        &["--range", "0x1000+4K", "--colour", "256"],
    );
    assert!(
        digits.lines().next().unwrap().ends_with("51119111d111"),
        "{digits}"
    );
    assert!(
        coloured.contains("▀") && coloured.contains("38;5;"),
        "{coloured}"
    );
}

#[test]
fn a_picture_is_written_as_png() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("map.png");
    printed(
        &["tags", "map"],
        &[&machine()],
        &["--png", file.to_str().unwrap()],
    );
    assert!(fs::read(file).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn a_dump_is_of_the_range_in_the_form_asked_for() {
    let text = printed(&["tags", "dump"], &[&delta()], &["--range", "0x1030+0x20"]);
    let spans = printed(
        &["tags", "dump"],
        &[&delta()],
        &["--range", "0x1030+0x20", "--format", "json"],
    );
    let spans: Value = serde_json::from_str(&spans).unwrap();
    assert_eq!(text, "0x0000000000001030  15\n");
    let expected = json!([{"address": "0x1030", "bytes": 16, "tag": 1}, {"address": "0x1040", "bytes": 16, "tag": 5}]);
    assert_eq!(spans, expected);
}

#[test]
fn a_pointer_is_compared_with_what_its_vcpu_sees() {
    // The vCPU has its MMU off.
    let options = [
        "--pointer",
        "0x0b00000040000000",
        "--length",
        "64",
        "--vcpu",
        "0",
    ];
    let mismatch = printed(&["tags", "find"], &[&machine()], &options);
    let fits = printed(
        &["tags", "find"],
        &[&machine()],
        &["--pointer", "0x40000000", "--vcpu", "0"],
    );
    assert_eq!(mismatch, "0x0000000040000000        0x40 bytes  tag 0\n");
    assert_eq!(fits, "all of it has tag 0, as the pointer\n");
}

#[test]
fn what_differs_is_data_tags_or_both() {
    let text = printed(&["tags", "diff"], &[&base(), &delta()], &[]);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].contains("0x1000 bytes  tags  "), "{text}");
    assert!(lines[1].contains("data and tags  "), "{text}");
    assert!(lines[2].contains("data    "), "{text}");
    let same = printed(&["tags", "diff"], &[&base(), &base()], &["--json"]);
    let sums: Value = serde_json::from_str(&same).unwrap();
    assert_eq!([&sums["data"], &sums["tags"], &sums["both"]], [0, 0, 0]);
}

#[test]
fn a_core_has_memory_tags_and_vcpus() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("core");
    let report = printed(&["core"], &[&machine(), &file], &["--json"]);
    let report: Value = serde_json::from_str(&report).unwrap();
    assert!(fs::read(&file).unwrap().starts_with(b"\x7fELF"));
    assert_eq!(report["vcpus"], 2);
    assert_eq!(report["pages"], 1024);
    assert_eq!(report["tags"], true);
    assert_eq!(report["vmcoreinfo"], "missing");
}

#[test]
fn a_damaged_snapshot_becomes_no_core() {
    let directory = tempfile::tempdir().unwrap();
    let damaged = directory.path().join("damaged");
    let mut bytes = fs::read(base()).unwrap();
    bytes[100] ^= 0x10;
    fs::write(&damaged, bytes).unwrap();

    let error = refused(&["core"], &[&damaged, &directory.path().join("core")], &[]);

    assert!(error.starts_with("tagvisor: "), "{error}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_control_socket_is_a_machine_and_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    drop(UnixListener::bind(&socket).unwrap());
    let error = refused(&["tags", "stat"], &[&socket], &[]);
    assert!(error.contains("no VMM listens at"), "{error}");
}

#[test]
fn addresses_that_cannot_be_are_refused_with_what_there_is() {
    let stat = |options: &[&str]| refused(&["tags", "stat"], &[&machine()], options);
    let range = ["--range", "0x1000+4K"];
    let third = stat(&[&range[..], &["--vcpu", "2"]].concat());
    let no_range = stat(&["--vcpu", "0"]);
    let memory_alone = refused(
        &["tags", "stat"],
        &[&base()],
        &[&range[..], &["--vcpu", "0"]].concat(),
    );
    let table = stat(&[&range[..], &["--ttbr", "0x7f0000000"]].concat());
    let process = stat(&[&range[..], &["--pid", "7"]].concat());
    assert!(
        third.contains("there is no vCPU 2: the machine has 0 to 1"),
        "{third}"
    );
    assert!(no_range.contains("need a range"), "{no_range}");
    assert!(
        memory_alone.contains("no vCPU's state is saved"),
        "{memory_alone}"
    );
    assert!(table.contains("TCR_EL1"), "{table}");
    assert!(process.contains("no vCPU runs process 7"), "{process}");
}

#[test]
fn what_is_no_snapshot_is_refused_with_its_name() {
    let directory = tempfile::tempdir().unwrap();
    for path in [directory.path(), Path::new("/nonexistent")] {
        let error = refused(&["tags", "stat"], &[path], &[]);
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
}
