//! The control socket: HTTP/1.1 over a Unix socket, in the convention of Cloud Hypervisor's REST API v1.
//!
//! [`server`] takes up connections at a [`socket`], [`http`] reads requests from their [`wire`] and writes answers,
//! [`routes`] knows every path and asks the [`Vmm`](crate::control::Vmm). [`body`] reads what is sent, as one of the types
//! of [`model`], [`migration`] and [`config`]. [`client`] is the other end, which the command line uses. `docs/openapi.yaml` describes it
//! all, and a test holds the server against that file.

mod body;
pub mod client;
mod config;
pub mod debug;
mod http;
pub mod migration;
pub mod model;
mod routes;
pub mod server;
mod socket;
mod wire;

#[cfg(test)]
pub mod tests;

pub use client::Client;
pub use server::serve;
