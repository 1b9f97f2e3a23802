//! What a guest died of, in words: the last words of its kernel, and the faults that its vCPUs took last.
//!
//! There is no device by which Debian's kernels would say that they panicked, and they end their machine after a panic as they do for a
//! reboot. So the kernel's log is read, as it is in memory ([`kernel_log`](crate::kernel_log())), and the registers that the last exception
//! left ([`Exception`]). A vCPU that went on to other exceptions keeps nothing of an earlier one.

use std::fmt;

use crate::error::Result;
use crate::exception::{Exception, Kind, Report};
use crate::kernel_log::kernel_log;
use crate::memory::TaggedMemory;

/// Records among which the panic's is: Linux writes the stack and the registers of each CPU behind it.
const LAST_RECORDS: usize = 200;
/// Populated pages of a guest that asked for its end, above which its kernel's log is not looked for: 8 GiB. All of them are read for
/// that, and a guest that only reboots waits for it.
const SEARCHED: u64 = 2 << 20;
const PANIC: &str = "Kernel panic - not syncing: ";

/// What ended a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest asked for it.
    Asked,
    /// A vCPU cannot go on.
    Stuck,
}

/// What a guest died of.
#[derive(Debug)]
pub struct Death {
    /// What the kernel said when it panicked.
    panic: Option<String>,
    /// The exceptions that can have to do with it.
    exceptions: Vec<Report>,
    /// vCPUs with no such exception, and what their registers say.
    others: Vec<(usize, Exception)>,
}

impl Death {
    /// What the guest with this memory died of; none if nothing says that it did.
    ///
    /// # Errors
    /// Whatever keeps the memory from being read.
    pub fn of(memory: &mut dyn TaggedMemory, end: End) -> Result<Option<Self>> {
        let log = match end == End::Stuck || populated(memory)? <= SEARCHED {
            true => kernel_log(memory, LAST_RECORDS)?.unwrap_or_default(),
            false => Vec::new(),
        };
        let said = log.iter().rev().find_map(|line| line.split_once(PANIC));
        let panic = said.map(|(_, words)| words.to_owned());
        let (mut exceptions, mut others) = (Vec::new(), Vec::new());
        for vcpu in 0..memory.vcpus().len() {
            let exception = Exception::of(&memory.vcpus()[vcpu])?;
            if has_to_do(&exception, end, panic.is_some()) {
                exceptions.push(Report::of(memory, vcpu)?);
            } else {
                others.push((vcpu, exception));
            }
        }
        let died = panic.is_some() || !exceptions.is_empty();
        Ok(died.then_some(Self {
            panic,
            exceptions,
            others,
        }))
    }
}

fn populated(memory: &mut dyn TaggedMemory) -> Result<u64> {
    let (mut pages, mut at) = (0, 0);
    while let Some(run) = memory.next_run(at)? {
        pages += run.end - run.start;
        at = run.end;
    }
    Ok(pages)
}

/// Whether an exception can have to do with a death. Programs fault all the time, and so do kernels that read their memory.
fn has_to_do(exception: &Exception, end: End, panicked: bool) -> bool {
    let is_of_kernel = !exception.is_from_below();
    match (end, exception.kind()) {
        (End::Stuck, _) => true,
        (End::Asked, Kind::TagCheck { .. }) => panicked || is_of_kernel,
        (End::Asked, Kind::Call | Kind::None) => false,
        (End::Asked, _) => panicked && is_of_kernel,
    }
}

/// Lines, the last without an end.
impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.panic {
            Some(words) => write!(f, "its kernel panicked: {words}")?,
            None => f.write_str("its kernel says nothing of a panic")?,
        }
        for report in &self.exceptions {
            write!(f, "\n{report}")?;
        }
        for (vcpu, exception) in &self.others {
            write!(f, "\nvCPU {vcpu} stands at {}", exception.stand())?;
        }
        Ok(())
    }
}
