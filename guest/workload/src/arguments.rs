//! The command line.

use std::ffi::OsString;
use std::time::Duration;

use lexopt::prelude::*;

/// What `--help` prints.
pub const USAGE: &str = "\
tag-workload: keeps rewriting tagged memory and notices whatever is not as it wrote it

Usage: tag-workload [OPTION]…

  --memory SIZE      how much memory to use, with K, M or G after the number (16M)
  --threads N        how many threads share it (one for each CPU)
  --rewrite PERCENT  how many pages of 100 a pass rewrites (25)
  --pause MS         how long a thread rests after a pass, in milliseconds (0)
  --passes N         end when every thread has made so many passes
  --seconds N        end after so many seconds
  --seed N           where random choices start from (a new one each time; it is printed)
  --json             print JSON, an object a line

It prints a line each second. Without --passes and --seconds it goes on until SIGTERM or SIGINT.

Exit status: 0 all was as written; 1 a difference, which is printed; 2 it could not work.";

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// Pages of 4 KiB.
    pub pages: usize,
    /// Threads; as many as CPUs if not given.
    pub threads: Option<usize>,
    /// Pages of 100 that are rewritten in a pass.
    pub rewritten_percent: u8,
    /// Rest after a pass.
    pub pause: Duration,
    /// Passes after which to end.
    pub passes: Option<u64>,
    /// Time after which to end.
    pub duration: Option<Duration>,
    /// Start of random choices.
    pub seed: Option<u64>,
    /// JSON instead of text.
    pub json: bool,
}

/// What is wrong with a command line.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentError {
    /// Not understood.
    #[error("{0}; see --help")]
    Syntax(#[from] lexopt::Error),
    /// Not usable.
    #[error("{option} {value}: {why}")]
    Value {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// Why it cannot be used.
        why: &'static str,
    },
}

impl Arguments {
    /// Reads a command line, without the program's name. `None` if it asks for help.
    ///
    /// # Errors
    /// What cannot be understood or used.
    pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Option<Self>, ArgumentError> {
        let mut arguments = Self {
            pages: (16 << 20) / 4096,
            threads: None,
            rewritten_percent: 25,
            pause: Duration::ZERO,
            passes: None,
            duration: None,
            seed: None,
            json: false,
        };
        let mut parser = lexopt::Parser::from_args(words);
        while let Some(argument) = parser.next()? {
            match argument {
                Long("memory") => arguments.pages = pages(&parser.value()?.string()?)?,
                Long("threads") => {
                    arguments.threads = Some(positive("--threads", parser.value()?.parse()?)?)
                }
                Long("rewrite") => arguments.rewritten_percent = percent(parser.value()?.parse()?)?,
                Long("pause") => arguments.pause = Duration::from_millis(parser.value()?.parse()?),
                Long("passes") => arguments.passes = Some(parser.value()?.parse()?),
                Long("seconds") => {
                    arguments.duration = Some(Duration::from_secs(parser.value()?.parse()?))
                }
                Long("seed") => arguments.seed = Some(parser.value()?.parse()?),
                Long("json") => arguments.json = true,
                Short('h') | Long("help") => return Ok(None),
                _ => return Err(argument.unexpected().into()),
            }
        }
        Ok(Some(arguments))
    }
}

fn pages(size: &str) -> Result<usize, ArgumentError> {
    let wrong = |why| ArgumentError::Value {
        option: "--memory",
        value: size.into(),
        why,
    };
    let shift = match size.bytes().last() {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        _ => 0,
    };
    let digits = if shift == 0 {
        size
    } else {
        &size[..size.len() - 1]
    };
    let number: usize = digits
        .parse()
        .map_err(|_| wrong("give a number, and K, M or G if you like"))?;
    let bytes = number
        .checked_mul(1 << shift)
        .ok_or_else(|| wrong("that is more than there can be"))?;
    if bytes == 0 || !bytes.is_multiple_of(4096) {
        return Err(wrong("give a multiple of a page, 4096 bytes"));
    }
    Ok(bytes / 4096)
}

fn positive(option: &'static str, value: usize) -> Result<usize, ArgumentError> {
    let wrong = ArgumentError::Value {
        option,
        value: value.to_string(),
        why: "give at least 1",
    };
    if value == 0 { Err(wrong) } else { Ok(value) }
}

fn percent(value: u8) -> Result<u8, ArgumentError> {
    let wrong = ArgumentError::Value {
        option: "--rewrite",
        value: value.to_string(),
        why: "give 0 to 100",
    };
    if value > 100 { Err(wrong) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Arguments>, String> {
        Arguments::parse(line.split_whitespace().map(OsString::from))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn without_options_it_works_on_16_mib_without_end() {
        let arguments = parse("").unwrap().unwrap();
        assert_eq!(
            (arguments.pages, arguments.passes, arguments.duration),
            (4096, None, None)
        );
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse("--memory 1G").unwrap().unwrap().pages, 262_144);
        assert_eq!(parse("--memory=64K").unwrap().unwrap().pages, 16);
        assert_eq!(parse("--memory 8192").unwrap().unwrap().pages, 2);
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_the_reason() {
        assert_eq!(
            parse("--memory 5000").unwrap_err(),
            "--memory 5000: give a multiple of a page, 4096 bytes"
        );
        assert_eq!(
            parse("--memory 99999999999G").unwrap_err(),
            "--memory 99999999999G: that is more than there can be"
        );
        assert_eq!(
            parse("--threads 0").unwrap_err(),
            "--threads 0: give at least 1"
        );
        assert_eq!(
            parse("--rewrite 101").unwrap_err(),
            "--rewrite 101: give 0 to 100"
        );
        assert!(parse("--memroy 1M").unwrap_err().contains("memroy"));
    }

    #[test]
    fn help_is_no_work() {
        assert_eq!(parse("--json --help"), Ok(None));
    }
}
