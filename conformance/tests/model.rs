//! The conformance checks against the reference model, as each kind of host that it can be.

use std::sync::Arc;

use conformance::model::ModelTestbed;
use conformance::{Stop, checks};
use engine::model::HostRules;
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let trials = [(6, 1), (6, 12), (6, 13)]
        .into_iter()
        .flat_map(|(major, minor)| trials(major, minor))
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn trials(major: u32, minor: u32) -> impl Iterator<Item = Trial> {
    let testbed = Arc::new(ModelTestbed::new(HostRules::linux(major, minor)));
    checks::<ModelTestbed>().into_iter().map(move |check| {
        let testbed = Arc::clone(&testbed);
        Trial::test(
            format!("linux_{major}_{minor}::{}", check.name),
            move || {
                match check.run(&testbed) {
                    // What a host cannot do is for another one to show.
                    Ok(()) | Err(Stop::Skip(_)) => Ok(()),
                    Err(Stop::Fail(reason)) => Err(Failed::from(reason)),
                }
            },
        )
    })
}
