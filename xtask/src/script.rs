//! The scripts that run in the host: tests, benchmarks, the demo. Comment lines `# lab: …` at the
//! start of a script say what host it wants:
//!
//! ```text
//! # lab: cpus=4 memory=6G kernel=bookworm timeout=300
//! # lab: icount append=arm64.nomte own-host
//! # lab: hosts=2 memory=3G peer-memory=6G
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::lab::Choice;

const DEFAULT_LIMIT: Duration = Duration::from_secs(300);

/// A script and what it wants.
#[derive(Debug)]
pub struct Script {
    /// Its file name without `.sh`.
    pub name: String,
    pub wants: Wants,
}

/// What the header of a script says.
#[derive(Clone, Debug, PartialEq)]
pub struct Wants {
    pub host: Choice,
    pub limit: Duration,
    /// Whether it must be the only one in its host.
    pub own_host: bool,
}

impl Wants {
    /// Reads the header lines of a script's `text`.
    fn parse(text: &str) -> Result<Self> {
        let mut wants = Self {
            host: Choice::default(),
            limit: DEFAULT_LIMIT,
            own_host: false,
        };
        let header = text
            .lines()
            .take_while(|line| line.starts_with('#') || line.trim().is_empty());
        for word in header
            .filter_map(|line| line.strip_prefix("# lab:"))
            .flat_map(str::split_whitespace)
        {
            wants
                .set(word)
                .with_context(|| format!("cannot understand '{word}' in a line '# lab:'"))?;
        }
        Ok(wants)
    }

    fn set(&mut self, word: &str) -> Result<()> {
        match word.split_once('=') {
            Some(("hosts", number @ ("1" | "2"))) => self.host.hosts = number.parse()?,
            Some(("cpus", number)) => self.host.cpus = number.parse()?,
            Some(("memory", size)) => self.host.memory = size.to_owned(),
            Some(("peer-memory", size)) => self.host.peer_memory = Some(size.to_owned()),
            Some(("kernel", name)) => self.host.kernel = Some(name.to_owned()),
            Some(("append", word)) => self.host.kernel_args.push(word.to_owned()),
            Some(("timeout", seconds)) => self.limit = Duration::from_secs(seconds.parse()?),
            None if word == "icount" => self.host.icount = true,
            None if word == "own-host" => self.own_host = true,
            _ => bail!(
                "there are hosts=1|2, cpus=N, memory=SIZE, peer-memory=SIZE, kernel=NAME, append=WORD, timeout=SECONDS, icount and own-host"
            ),
        }
        Ok(())
    }

    /// Whether the script can share a host with others.
    pub fn can_share(&self) -> bool {
        !self.own_host && self.host == Choice::default()
    }
}

/// The scripts in `folder`, by name; none if there is no such folder.
pub fn in_folder(folder: &Path) -> Result<Vec<Script>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut paths = fs::read_dir(folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<PathBuf>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "sh"));
    paths.sort();
    paths.iter().map(|path| read(path)).collect()
}

/// The script at `path`.
pub fn read(path: &Path) -> Result<Script> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let name = path
        .file_stem()
        .ok_or_else(|| anyhow!("{} has no name", path.display()))?;
    let wants = Wants::parse(&text).with_context(|| format!("in {}", path.display()))?;
    Ok(Script {
        name: name.to_string_lossy().into_owned(),
        wants,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_without_a_header_can_share_a_host() {
        let wants = Wants::parse("#!/bin/bash\n# What it checks.\ntrue\n").unwrap();

        assert!(wants.can_share());
        assert_eq!(wants.limit, DEFAULT_LIMIT);
    }

    #[test]
    fn headers_choose_host_and_time() {
        let wants =
            Wants::parse("#!/bin/bash\n# lab: cpus=4 kernel=bookworm\n# lab: timeout=7\n").unwrap();

        assert_eq!(wants.host.cpus, 4);
        assert_eq!(wants.host.kernel.as_deref(), Some("bookworm"));
        assert_eq!(wants.limit, Duration::from_secs(7));
        assert!(!wants.can_share());
    }

    #[test]
    fn two_hosts_are_shared_with_no_other_script() {
        let wants = Wants::parse("# lab: hosts=2 memory=3G peer-memory=6G\n").unwrap();

        assert_eq!(wants.host.hosts, 2);
        assert_eq!(wants.host.peer_memory.as_deref(), Some("6G"));
        assert!(!wants.can_share());
    }

    #[test]
    fn more_hosts_than_two_are_refused() {
        assert!(Wants::parse("# lab: hosts=3\n").is_err());
    }

    #[test]
    fn words_for_the_kernel_are_added_up() {
        let wants = Wants::parse("# lab: append=arm64.nomte append=mitigations=off\n").unwrap();

        assert_eq!(wants.host.kernel_args, ["arm64.nomte", "mitigations=off"]);
        assert!(!wants.can_share());
    }

    #[test]
    fn a_time_limit_alone_does_not_ask_for_a_host() {
        assert!(Wants::parse("# lab: timeout=7\n").unwrap().can_share());
        assert!(!Wants::parse("# lab: own-host\n").unwrap().can_share());
    }

    #[test]
    fn headers_after_the_first_command_are_no_headers() {
        assert!(Wants::parse("true\n# lab: own-host\n").unwrap().can_share());
    }

    #[test]
    fn a_misspelt_word_is_refused() {
        let error = Wants::parse("# lab: cpu=4\n").unwrap_err();

        assert!(format!("{error:#}").contains("cpus=N"), "{error:#}");
    }
}
