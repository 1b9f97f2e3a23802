//! Commands on the other of the lab's two hosts.
//!
//! `peer COMMAND…` is COMMAND's stand-in on this host: it prints what COMMAND prints, ends with its status, passes on
//! the signals it gets, and when it is killed, so is COMMAND. So a script deals with what runs on the other host as with
//! what runs on its own: `&`, `$!`, `kill` and `wait`. The other host's `peer-agent` runs COMMAND.
//!
//! [`client`] and [`agent`] exchange the messages of [`wire`] over one TCP connection a command. Output that goes to the
//! lab's log says by [`label`]s which host it is of.

pub mod agent;
pub mod client;
pub mod label;
pub mod wire;
