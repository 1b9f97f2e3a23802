//! Configuration files: TOML or JSON, with the names of the command line.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use vmm::config::MachineConfig;

/// Most bytes of a configuration file.
const MAX_SIZE: u64 = 1 << 20;

/// Why a configuration file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("configuration {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It is larger than a configuration can be.
    #[error("configuration {path}: it has more than 1 MiB; is it another file than you meant?")]
    TooLarge {
        /// Which file.
        path: PathBuf,
    },
    /// It does not say what it should.
    #[error("configuration {path}: {reason}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where, and what is wrong.
        reason: String,
    },
}

/// Reads a configuration file: JSON if its name ends so, TOML otherwise.
///
/// # Errors
/// See [`Error`]; an unknown key comes with the known one that it is most like.
pub fn read(path: &Path) -> Result<MachineConfig, Error> {
    let text = read_bounded(path)?;
    let parsed = if path
        .extension()
        .is_some_and(|extension| extension == "json")
    {
        serde_json::from_slice(&text).map_err(|e| e.to_string())
    } else {
        toml::from_slice(&text).map_err(|e| e.to_string())
    };
    parsed.map_err(|reason| Error::Parse {
        path: path.into(),
        reason: with_suggestion(reason.trim_end().to_owned()),
    })
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_SIZE + 1).read_to_end(&mut text))
        .map_err(|source| Error::Read {
            path: path.into(),
            source,
        })?;
    if text.len() as u64 > MAX_SIZE {
        return Err(Error::TooLarge { path: path.into() });
    }
    Ok(text)
}

/// Adds the known key that an unknown one is most like. Serde names both in its message:
/// ``unknown field `memroy`, expected one of `name`, `memory` ``.
fn with_suggestion(message: String) -> String {
    let Some((_, fields)) = message.split_once("unknown field `") else {
        return message;
    };
    let mut names = fields.split('`').step_by(2);
    let Some(unknown) = names.next() else {
        return message;
    };
    let closest = names
        .map(|known| (strsim::damerau_levenshtein(unknown, known), known))
        .min()
        .filter(|(distance, _)| *distance <= 3);
    match closest {
        Some((_, known)) => format!("{message}\ndid you mean `{known}`?"),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vmm::config::{DiskConfig, MemorySize, MteConfig, NetConfig, OverlayConfig, PortConfig};

    use super::*;

    fn read_text(suffix: &str, text: &str) -> Result<MachineConfig, Error> {
        let mut file = tempfile::Builder::new().suffix(suffix).tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        read(file.path())
    }

    #[test]
    fn toml_and_json_say_the_same_with_the_names_of_the_command_line() {
        let toml = read_text(
            ".toml",
            "name = 'web'\nkernel = 'Image'\ncpus = 2\nmemory = '1G'\nmte = 'off'\ntag-access = 'ioctl'\n\
             disk = ['a.img,readonly']\nnet = ['tap0']\nno-reboot = true\n",
        )
        .unwrap();
        let json = read_text(
            ".json",
            r#"{"name": "web", "kernel": "Image", "cpus": 2, "memory": 1024, "mte": "off", "tag-access": "ioctl",
                "disk": ["a.img,readonly"], "net": ["tap0"], "no-reboot": true}"#,
        )
        .unwrap();

        assert_eq!(toml, json);
        assert_eq!(toml.memory, MemorySize(1 << 30));
        assert_eq!(toml.mte, MteConfig::Off);
    }

    #[test]
    fn disks_interfaces_and_ports_may_be_tables_whose_paths_have_commas() {
        let toml = read_text(
            ".toml",
            "disk = ['a.img', { path = 'b,c.img', overlay = 'd,e', id = 'data' }, { path = 'f', overlay = true }]\n\
             net = [{ tap = 'tap0', mac = '02:00:00:00:00:01', mtu = 1400 }]\n\
             [[port]]\nname = 'agent'\nsocket = '/run/a,b'\n",
        )
        .unwrap();
        let json = read_text(
            ".json",
            r#"{"disk": ["a.img", {"path": "b,c.img", "overlay": "d,e", "id": "data"}, {"path": "f", "overlay": true}],
                "net": [{"tap": "tap0", "mac": "02:00:00:00:00:01", "mtu": 1400}],
                "port": [{"name": "agent", "socket": "/run/a,b"}]}"#,
        )
        .unwrap();

        assert_eq!(toml, json);
        assert_eq!(
            toml.disk,
            [
                "a.img".parse().unwrap(),
                DiskConfig {
                    path: "b,c.img".into(),
                    readonly: false,
                    overlay: Some(OverlayConfig::File("d,e".into())),
                    id: Some("data".into())
                },
                "f,overlay".parse().unwrap(),
            ]
        );
        assert_eq!(
            toml.net,
            ["tap0,mac=02:00:00:00:00:01,mtu=1400"
                .parse::<NetConfig>()
                .unwrap()]
        );
        assert_eq!(
            toml.port,
            [PortConfig {
                name: "agent".into(),
                socket: "/run/a,b".into()
            }]
        );
    }

    #[test]
    fn what_a_configuration_is_written_as_is_read_as_the_same() {
        let machine = MachineConfig {
            memory: MemorySize(513 << 10),
            mte: "3".parse().unwrap(),
            disk: vec![
                DiskConfig {
                    path: "a,readonly".into(),
                    readonly: false,
                    overlay: Some(OverlayConfig::File("b,overlay".into())),
                    id: None,
                },
                "c,overlay".parse().unwrap(),
            ],
            net: vec!["tap0,mtu=1400".parse().unwrap()],
            port: vec!["agent,socket=/run/a".parse().unwrap()],
            ..MachineConfig::default()
        };

        let toml = read_text(".toml", &toml::to_string(&machine).unwrap()).unwrap();
        let json = read_text(".json", &serde_json::to_string(&machine).unwrap()).unwrap();

        assert_eq!([&toml, &json], [&machine, &machine]);
    }

    #[test]
    fn a_misspelt_key_in_a_table_is_refused_with_the_one_that_was_meant() {
        let error = read_text(".toml", "disk = [{ path = 'a.img', read-only = true }]\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("unknown field `read-only`"), "{error}");
        assert!(error.ends_with("did you mean `readonly`?"), "{error}");
    }

    #[test]
    fn an_overlay_that_is_none_is_refused() {
        let off = read_text(".toml", "disk = [{ path = 'a', overlay = false }]\n").unwrap_err();
        let number = read_text(".toml", "disk = [{ path = 'a', overlay = 1 }]\n").unwrap_err();
        assert!(off.to_string().contains("leave it out"), "{off}");
        assert!(
            number
                .to_string()
                .contains("expected `true` or the path of a file"),
            "{number}"
        );
    }

    #[test]
    fn a_table_without_its_path_and_one_with_an_empty_path_are_refused() {
        let without = read_text(".toml", "disk = [{ readonly = true }]\n").unwrap_err();
        let empty = read_text(".toml", "disk = [{ path = '' }]\n").unwrap_err();
        assert!(
            without.to_string().contains("missing field `path`"),
            "{without}"
        );
        assert!(
            empty
                .to_string()
                .contains("an empty text means nothing here"),
            "{empty}"
        );
    }

    #[test]
    fn what_is_neither_text_nor_table_is_refused_with_what_is_expected() {
        let disk = read_text(".json", r#"{"disk": [1]}"#).unwrap_err();
        let memory = read_text(".json", r#"{"memory": -1}"#).unwrap_err();
        assert!(
            disk.to_string().contains(
                "expected a disk: `PATH[,readonly][,overlay[=FILE]][,id=SERIAL]`, or a table"
            ),
            "{disk}"
        );
        assert!(
            memory.to_string().contains("expected a number of MiB"),
            "{memory}"
        );
    }

    #[test]
    fn a_file_of_one_mebibyte_is_read_and_a_larger_one_refused() {
        let comment = |length| read_text(".toml", &"#".repeat(length));
        let error = comment((1 << 20) + 1).unwrap_err();
        assert!(comment(1 << 20).is_ok());
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    }

    #[test]
    fn a_misspelt_key_is_refused_with_the_one_that_was_meant() {
        let error = read_text(".toml", "memroy = '1G'\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("unknown field `memroy`"), "{error}");
        assert!(error.ends_with("did you mean `memory`?"), "{error}");
    }

    #[test]
    fn a_key_like_no_other_is_refused_without_a_guess() {
        let error = read_text(".json", r#"{"colour": 1}"#)
            .unwrap_err()
            .to_string();
        assert!(error.contains("unknown field `colour`"), "{error}");
        assert!(!error.contains("did you mean"), "{error}");
    }

    #[test]
    fn a_value_that_means_nothing_is_refused_with_what_is_expected() {
        let error = read_text(".toml", "mte = 'maybe'\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("mte `maybe`: expected `off`, `on`"),
            "{error}"
        );
    }
}
