//! The conformance checks against the reference model, as each kind of host that it can be.

use std::sync::Arc;

use conformance::model::ModelTestbed;
use conformance::{Stop, checks};
use engine::model::HostRules;
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let hosts = [
        ("linux_6_1", HostRules::linux_6_1()),
        ("linux_6_12", HostRules::linux_6_12()),
        ("linux_6_13", HostRules::linux_6_13()),
    ];
    let trials = hosts
        .into_iter()
        .flat_map(|(name, rules)| trials(name, rules))
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn trials(host: &'static str, rules: HostRules) -> impl Iterator<Item = Trial> {
    let testbed = Arc::new(ModelTestbed::new(rules));
    checks::<ModelTestbed>().into_iter().map(move |check| {
        let testbed = Arc::clone(&testbed);
        Trial::test(format!("{host}::{}", check.name), move || {
            match check.run(&testbed) {
                // What a host cannot do is for another one to show.
                Ok(()) | Err(Stop::Skip(_)) => Ok(()),
                Err(Stop::Fail(reason)) => Err(Failed::from(reason)),
            }
        })
    })
}
