//! `tagvisor check`: what this host can do, what that means, and how to get what is missing.
//!
//! Nothing is taken from version numbers. Each line was found by trying it: a scratch VM with
//! guest memory of its own, a tag written one way and read the other.

#[cfg(target_arch = "aarch64")]
mod host;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args as ClapArgs;
use serde::Serialize;

/// What to check, and how to say it.
#[derive(ClapArgs)]
#[command(after_help = "Exit status: 0 if machines with MTE can run here, 1 if not.")]
pub struct Args {
    /// Print JSON, for scripts
    #[arg(long)]
    json: bool,
    /// The hypervisor's device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: PathBuf,
}

/// All that was found.
#[derive(Serialize)]
struct Report {
    /// Machines with MTE can run here.
    mte_guests: bool,
    /// Each thing looked at.
    findings: Vec<Finding>,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// A name for scripts.
    id: &'static str,
    /// What was looked at, for people.
    title: &'static str,
    /// Whether it is there.
    available: bool,
    /// What was found.
    value: String,
    /// What that means, or how to get it.
    meaning: &'static str,
}

/// Looks at the host and says what it can do.
///
/// # Errors
/// Standard output cannot be written.
pub fn check(args: &Args) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let report = examine(args);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", in_words(&report));
    }
    Ok(if report.mte_guests {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(target_arch = "aarch64")]
fn examine(args: &Args) -> Report {
    host::examine(&args.kvm)
}

#[cfg(not(target_arch = "aarch64"))]
fn examine(_: &Args) -> Report {
    Report {
        mte_guests: false,
        findings: vec![Finding {
            id: "architecture",
            title: "Architecture",
            available: false,
            value: std::env::consts::ARCH.into(),
            meaning: crate::NOT_AN_ARM_HOST,
        }],
    }
}

fn in_words(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let mark = if finding.available { "yes" } else { "no " };
        text += &format!("{mark}  {:<22} {}\n", finding.title, finding.value);
        for line in wrapped(finding.meaning, 70) {
            text += &format!("     {line}\n");
        }
    }
    text += if report.mte_guests {
        "\nMachines with MTE can run here.\n"
    } else {
        "\nMachines with MTE cannot run here.\n"
    };
    text
}

fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + word.len() < width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.into()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_of_each_thing_whether_it_is_there_and_what_that_means() {
        let report = Report {
            mte_guests: false,
            findings: vec![Finding {
                id: "mte",
                title: "MTE for guests",
                available: false,
                value: "none".into(),
                meaning: "boot without arm64.nomte",
            }],
        };
        assert_eq!(
            in_words(&report),
            "no   MTE for guests         none\n     boot without arm64.nomte\n\nMachines with MTE cannot run here.\n"
        );
    }

    #[test]
    fn long_lines_are_broken_between_words() {
        assert_eq!(wrapped("one two three", 8), ["one two", "three"]);
    }
}
