//! The feature is found by asking (seed 000).

use super::mte_support;
use crate::{Testbed, Verdict};

pub fn a_host_with_mte_says_so<T: Testbed>(testbed: &T) -> Verdict {
    let support = mte_support(testbed)?;

    assert!(support.features.level().has_tagged_memory());
    Ok(())
}
