//! `tagvisor snapshot inspect`, on files that were written once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn stored(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../stream/tests/files")
        .join(name)
}

fn inspect(file: &Path, options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tagvisor"))
        .args(["snapshot", "inspect"])
        .arg(file)
        .args(options)
        .output()
        .unwrap()
}

fn json(file: &Path) -> serde_json::Value {
    serde_json::from_slice(&inspect(file, &["--json"]).stdout).unwrap()
}

#[test]
fn a_snapshot_names_the_base_that_it_needs() {
    let base = json(&stored("version-1.base"));
    let delta = json(&stored("version-1.delta"));
    assert_eq!(base["base"], serde_json::Value::Null);
    assert_eq!(delta["base"], base["identity"]);
    assert_eq!(delta["tags"], true);
    assert_eq!(delta["states"][0]["name"], "vcpu.0");
}

#[test]
fn it_is_said_in_words_as_well() {
    let output = inspect(&stored("version-1.base"), &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(text.contains("none: it is complete"), "{text}");
    assert!(text.ends_with("every checksum is right\n"), "{text}");
}

#[test]
fn any_byte_that_is_not_what_it_was_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("damaged");
    let sound = fs::read(stored("version-1.delta")).unwrap();
    let found = |position: usize| {
        let mut bytes = sound.clone();
        bytes[position] ^= 0x10;
        fs::write(&file, bytes).unwrap();
        let output = inspect(&file, &[]);
        output.status.code() == Some(1) && output.stdout.is_empty() && !output.stderr.is_empty()
    };
    let missed: Vec<_> = (0..sound.len())
        .step_by(sound.len() / 40)
        .filter(|position| !found(*position))
        .collect();
    assert_eq!(missed, [0; 0]);
}

#[test]
fn what_is_no_snapshot_is_refused_with_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("text");
    fs::write(&file, "text").unwrap();
    for path in [file.as_path(), directory.path(), Path::new("/nonexistent")] {
        let output = inspect(path, &[]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
}
