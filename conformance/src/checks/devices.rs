//! Devices neither check tags nor carry any (seed 000): they use a mapping that is not tagged, even
//! in a process that has its own accesses checked.

use super::{Guest, IPA, pattern};
use crate::{GuestCpu, Testbed, Verdict};

pub fn a_device_writes_tagged_memory_unchecked_and_leaves_the_tags<T: Testbed>(
    testbed: &T,
) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 1)?;
    guest.cpu.set_page_tags(IPA, &pattern(1))?;

    testbed.device_writes(&guest.memory, 0x18, 0x1234)?;

    assert_eq!(guest.cpu.load(IPA + 0x18)?, 0x1234);
    assert_eq!(guest.cpu.page_tags(IPA)?, pattern(1));
    Ok(())
}

pub fn a_device_reads_tagged_memory_unchecked<T: Testbed>(testbed: &T) -> Verdict {
    let mut guest = Guest::with_private_memory(testbed, 1)?;
    guest.cpu.set_page_tags(IPA, &pattern(2))?;
    guest.cpu.store(IPA + 0x28, 0x5678)?;

    let read = testbed.device_reads(&guest.memory, 0x28)?;

    assert_eq!(read, 0x5678);
    Ok(())
}
