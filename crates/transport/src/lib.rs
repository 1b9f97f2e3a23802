//! What carries the page stream between two hosts.
//!
//! A receiver binds a [`Listener`] to an [`Address`]; a sender calls [`connect`]. Both end up with a [`Connection`], which reads and
//! writes, knows who is at the other end ([`Connection::peer`]), does not wait for ever ([`Connection::set_patience`],
//! [`Connection::set_deadline`]), can be cut from another thread ([`Closer`]) and can be slowed down together with others
//! ([`RateLimit`]). With TLS both sides prove themselves: [`ServerIdentity`] and [`ClientIdentity`] are what they do it with.
//!
//! All of it blocks, and needs a thread for each connection. Nobody trusts the peer before [`Pending::establish`] or [`connect`]
//! returned: until then it can take no more than the time of the deadline and a place among [`MAX_PENDING`].
//!
//! # Establishing
//! After the socket's connection, and after TLS if there is TLS, each side sends the eight bytes `tagvisor`, the connecting
//! one first. So each side can say in words that the other speaks TLS, or does not, or is something else; and in TLS 1.3, where a client
//! is done before the server has seen its certificate, it learns here whether it was accepted.
//!
//! ```
//! use std::io::{Read, Write};
//! use std::time::{Duration, Instant};
//! use transport::{Address, Listener, Unprotected, connect};
//!
//! let soon = Instant::now() + Duration::from_secs(5);
//! let address: Address = "tcp://127.0.0.1:0".parse()?;
//! let listener = Listener::bind(&address, None, Unprotected::Refused)?;
//! let there = listener.local_address().clone();
//! let sender = std::thread::spawn(move || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//!     let mut connection = connect(&there, None, soon)?;
//!     connection.write_all(b"pages")?;
//!     connection.finish()?;
//!     Ok(())
//! });
//! let mut connection = listener.accept(Some(soon))?.establish(soon)?;
//! let mut pages = Vec::new();
//! connection.read_to_end(&mut pages)?;
//! assert_eq!(pages, b"pages");
//! sender.join().unwrap().unwrap();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod address;
mod connecting;
mod connection;
mod error;
mod greeting;
mod identity;
mod link;
mod listener;
mod rate;
pub mod unix;

pub use address::{Address, Host};
pub use connecting::connect;
pub use connection::Connection;
pub use error::{Error, Result};
pub use identity::{ClientIdentity, ServerIdentity, Side, TlsFiles};
pub use link::Closer;
pub use listener::{Listener, MAX_PENDING, Pending, Unprotected};
pub use rate::{Rate, RateLimit};
