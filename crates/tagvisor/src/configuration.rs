//! Configuration files: TOML or JSON, with the names of the command line.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use vmm::config::MachineConfig;

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
    let text = fs::read_to_string(path).map_err(|source| Error::Read {
        path: path.into(),
        source,
    })?;
    let parsed = if path
        .extension()
        .is_some_and(|extension| extension == "json")
    {
        serde_json::from_str(&text).map_err(|e| e.to_string())
    } else {
        toml::from_str(&text).map_err(|e| e.to_string())
    };
    parsed.map_err(|reason| Error::Parse {
        path: path.into(),
        reason: with_suggestion(reason.trim_end().to_owned()),
    })
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

    use vmm::config::{MemorySize, MteConfig};

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
