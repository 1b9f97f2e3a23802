//! Looking at a machine that runs, from another process.
//!
//! Who looks has a *lease*: a connection to the control socket that was upgraded from HTTP (`vm.inspect`). It says what the
//! machine has, and gives its memory; the guest stands still for as long as the connection is open, unless it was to be looked
//! at live. So however whoever looks ends, the guest goes on.
//!
//! ```text
//! reader                                            VMM
//!   PUT /api/v1/vm.inspect, Upgrade: tagvisor-inspect ─►   the guest stands still
//!   ◄───────────────────────── 101 Switching Protocols
//!   describe ─────────────────────────────────────────►
//!   ◄─────────────── what there is, and the memory file, if others may read it
//!   vCPU, run, pages … ───────────────────────────────►
//!   ◄───────────────────────────────────────────────── …
//!   end of the connection ────────────────────────────►   the guest goes on
//! ```
//!
//! A request has 16 bytes: what is wanted (32 bits), how many pages (32 bits), a vCPU or the first page (64 bits). An
//! answer has a status (32 bits), the length of what follows (32 bits), and that. All numbers are little-endian. Reader and VMM
//! are the same Tagvisor: there is no version.

mod reader;
mod server;

use std::fs::File;
use std::ops::Range;

use engine::VcpuState;
use serde::{Deserialize, Serialize};
use std::sync::mpsc::Sender;
use stream::PageSource;

pub use reader::{Memory, Reader};
pub use server::serve;

/// The protocol, as HTTP names it.
pub const PROTOCOL: &str = "tagvisor-inspect";

/// The most pages of one answer: 1 MiB of data.
const MAX_PAGES: usize = 256;

/// The most bytes of an answer.
const MAX_ANSWER: usize = MAX_PAGES * (stream::PAGE_SIZE + stream::PAGE_SIZE / 32);

/// What a request wants.
mod wanted {
    /// A [`super::Description`], in JSON, and with it the memory file, if there is one to be had.
    pub const DESCRIPTION: u32 = 1;
    /// An `engine::VcpuState`, in JSON.
    pub const VCPU: u32 = 2;
    /// The first run of populated pages at or after a page: its first page, and the one behind its last; nothing if there is
    /// none.
    pub const RUN: u32 = 3;
    /// Pages: data of all, then tags of all, if there are tags.
    pub const PAGES: u32 = 4;
    /// Tags of pages, without their data.
    pub const TAGS: u32 = 5;
}

/// How a request went.
mod status {
    pub const DONE: u32 = 0;
    /// Why not, in words, is what follows.
    pub const FAILED: u32 = 1;
}

/// What a machine has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    /// RAM: its first page, and the one behind its last.
    ram: Range<u64>,
    /// Whether its pages have tags.
    tags: bool,
    /// How many there are.
    vcpus: u32,
    /// The memory file comes with this.
    memory_file: bool,
}

/// What is lent to a reader.
pub struct Lease {
    /// Pages.
    pub ram: Range<u64>,
    /// Of all vCPUs, as they stand, or stood when it was lent.
    pub vcpus: Vec<VcpuState>,
    /// The memory.
    pub pages: Box<dyn PageSource + Send>,
    /// The same for another process, where it can be had.
    pub file: Option<File>,
    /// The guest stands still until this is dropped; none if it does not.
    pub hold: Option<Hold>,
}

/// Keeps a guest where it is until it is dropped.
pub struct Hold(Sender<()>);

impl Hold {
    /// Says to `released` when it is dropped.
    pub const fn new(released: Sender<()>) -> Self {
        Self(released)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Nobody waits any more if the VMM is ending.
        let _ = self.0.send(());
    }
}

#[cfg(test)]
mod tests;
