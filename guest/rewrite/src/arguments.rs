//! The command line.

use std::ffi::OsString;

use lexopt::prelude::*;

/// What `--help` prints.
pub const USAGE: &str = "\
rewrite: rewrites memory at a set rate and tells how long stores had to wait

Usage: rewrite [OPTION]…

  --memory MIB   how much memory to fill and then rewrite (64)
  --rate MIB     how much of it a second (16)
  --tags         map it with PROT_MTE, and give each granule a new random tag each time

It prints a line each second and goes on until it is ended.";

/// Pages of 4 KiB in a MiB.
const PAGES_PER_MIB: usize = 256;
/// More than any guest has, so that sums cannot overflow: 1 TiB.
const MOST_MIB: usize = 1 << 20;

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// Pages of 4 KiB.
    pub pages: usize,
    /// How many of them are rewritten a second.
    pub pages_per_second: u64,
    /// Whether they are tagged.
    pub tags: bool,
}

/// What is wrong with a command line.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentError {
    /// Not understood.
    #[error("{0}; see --help")]
    Syntax(#[from] lexopt::Error),
    /// Not usable.
    #[error("{option} {value}: give 1 to {MOST_MIB} MiB")]
    Size {
        /// The option.
        option: &'static str,
        /// Its value.
        value: usize,
    },
}

impl Arguments {
    /// Reads a command line, without the program's name. `None` if it asks for help.
    ///
    /// # Errors
    /// What cannot be understood or used.
    pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Option<Self>, ArgumentError> {
        let (mut memory, mut rate, mut tags) = (64, 16, false);
        let mut parser = lexopt::Parser::from_args(words);
        while let Some(argument) = parser.next()? {
            match argument {
                Long("memory") => memory = parser.value()?.parse()?,
                Long("rate") => rate = parser.value()?.parse()?,
                Long("tags") => tags = true,
                Short('h') | Long("help") => return Ok(None),
                _ => return Err(argument.unexpected().into()),
            }
        }
        Ok(Some(Self {
            pages: pages("--memory", memory)?,
            pages_per_second: pages("--rate", rate)? as u64,
            tags,
        }))
    }
}

fn pages(option: &'static str, mib: usize) -> Result<usize, ArgumentError> {
    if (1..=MOST_MIB).contains(&mib) {
        Ok(mib * PAGES_PER_MIB)
    } else {
        Err(ArgumentError::Size { option, value: mib })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Arguments>, String> {
        Arguments::parse(line.split_whitespace().map(OsString::from))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_are_in_mib() {
        let arguments = parse("--memory 2 --rate 1 --tags").unwrap().unwrap();

        assert_eq!(
            arguments,
            Arguments {
                pages: 512,
                pages_per_second: 256,
                tags: true
            }
        );
    }

    #[test]
    fn no_memory_at_all_is_refused() {
        assert!(parse("--memory 0").unwrap_err().contains("--memory 0"));
    }

    #[test]
    fn help_is_no_work() {
        assert_eq!(parse("--help"), Ok(None));
    }
}
