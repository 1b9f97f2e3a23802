//! What can be seen of memory, on snapshots and other memory made for it.

mod core;
mod deaths;
mod machine;
mod output;
mod real;
mod snapshots;
mod walk;
