//! Looking at a machine's memory and tags without changing either: figures, pictures, dumps, searches, differences, ELF
//! cores.
//!
//! [`TaggedMemory`] is what can be looked at: memory that is read at random, with the tags, and the vCPUs' states. A
//! snapshot is one ([`SnapshotMemory`]), and so is a running machine, or whatever else pages are read from
//! ([`SourceMemory`]). A [`View`] is a range of it, by guest-physical addresses or by the virtual ones
//! that a guest's translation tables give it ([`walk`]). Everything else goes through a view once, in pieces:
//! [`Statistics`], [`Grid`] (the picture), [`dump`], [`find`], [`differences`]. [`core`] writes the whole machine.
//!
//! [`gdb`] lets a debugger change what it looks at: a machine that runs.
//!
//! Memory in use does not grow with the guest's, but for what a snapshot's index takes.

#![forbid(unsafe_code)]

pub mod core;
mod death;
mod diff;
mod dump;
mod error;
mod exception;
mod find;
pub mod gdb;
mod kernel_log;
mod map;
mod memory;
mod pairs;
mod palette;
mod picture;
mod place;
mod process;
mod registers;
mod snapshot;
mod source;
mod stat;
mod terminal;
mod view;
pub mod walk;

pub use death::{Death, End};
pub use diff::{Change, Difference, Totals, differences};
pub use dump::{Format, dump};
pub use error::{Error, Result};
pub use exception::{Exception, Kind, Report};
pub use find::{Wanted, find};
pub use kernel_log::kernel_log;
pub use map::{Cell, Grid};
pub use memory::{TaggedMemory, Visitor};
pub use palette::{Colour, HOLE, NO_MEMORY, colour_of, tag_colour};
pub use picture::write_png;
pub use place::Place;
pub use process::vcpu_of_process;
pub use snapshot::SnapshotMemory;
pub use source::SourceMemory;
pub use stat::{Counts, Region, Statistics};
pub use terminal::{Colours, draw};
pub use view::{Gap, Part, Space, View};
