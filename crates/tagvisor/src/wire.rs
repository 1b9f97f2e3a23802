//! What carries a migration: connections of `transport`.

use std::io::{self};
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::{Closer, Dial, Listen, Pending, Wire};
use transport::{
    Address, ClientIdentity, Connection, Listener, RateLimit, ServerIdentity, Side, TlsFiles,
    Unprotected, connect,
};

use crate::control::{MigrationRequest, ReceptionRequest, TlsRequest};

/// How long a connection may take to be there, its handshake among that.
const ESTABLISH: Duration = Duration::from_secs(10);

struct Carried(Connection);

impl io::Read for Carried {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl io::Write for Carried {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Wire for Carried {
    fn set_patience(&mut self, patience: Duration) -> io::Result<()> {
        self.0.set_patience(Some(patience));
        Ok(())
    }

    fn closer(&self) -> Closer {
        let closer = self.0.closer();
        Arc::new(move || closer.close())
    }

    fn peer(&self) -> String {
        self.0.peer().to_owned()
    }
}

/// How a source reaches its destination.
pub struct Line {
    address: Address,
    identity: Option<ClientIdentity>,
    limit: Arc<RateLimit>,
}

impl Line {
    /// To the destination of `request`.
    ///
    /// # Errors
    /// The files of TLS are no good.
    pub fn new(request: &MigrationRequest) -> transport::Result<Self> {
        let load = |tls: &TlsRequest| {
            let identity =
                ClientIdentity::load(&TlsFiles::in_directory(&tls.directory, Side::Client))?;
            match &tls.peer_name {
                Some(name) => identity.expecting(name),
                None => Ok(identity),
            }
        };
        let identity = request.tls.as_ref().map(load).transpose()?;
        if identity.is_none() && !request.destination.is_local() {
            tracing::warn!(
                "the guest's memory goes to {} without TLS: whoever is on the way can read and change it; use --tls",
                request.destination
            );
        }
        Ok(Self {
            address: request.destination.clone(),
            identity,
            limit: Arc::new(RateLimit::new(request.bandwidth)),
        })
    }
}

impl Dial for Line {
    fn dial(&self) -> io::Result<Box<dyn Wire>> {
        let deadline = Instant::now() + ESTABLISH;
        let connection = connect(&self.address, self.identity.as_ref(), deadline)?;
        Ok(Box::new(Carried(connection.limited(self.limit.clone()))))
    }

    fn peer(&self) -> String {
        self.address.to_string()
    }
}

/// Where a destination takes connections.
pub struct Door(Listener);

impl Door {
    /// Listens as `request` says.
    ///
    /// # Errors
    /// The address cannot be had, others could reach it without TLS, or the files of TLS are no good.
    pub fn open(request: &ReceptionRequest) -> transport::Result<Self> {
        let load = |tls: &TlsRequest| {
            let identity =
                ServerIdentity::load(&TlsFiles::in_directory(&tls.directory, Side::Server))?;
            match &tls.peer_name {
                Some(name) => identity.expecting(name),
                None => Ok(identity),
            }
        };
        let identity = request.tls.as_ref().map(load).transpose()?;
        let unprotected = match request.unprotected {
            true => Unprotected::Allowed,
            false => Unprotected::Refused,
        };
        let listener = Listener::bind(&request.listen, identity.as_ref(), unprotected)?;
        tracing::info!("a guest is waited for at {}", listener.local_address());
        Ok(Self(listener))
    }

    /// Where it listens, with the port that was chosen.
    pub fn address(&self) -> &Address {
        self.0.local_address()
    }
}

impl Listen for Door {
    fn accept(&self) -> io::Result<Pending> {
        let pending = self.0.accept(None)?;
        Ok(Box::new(move || {
            let connection = pending.establish(Instant::now() + ESTABLISH)?;
            Ok(Box::new(Carried(connection)) as Box<dyn Wire>)
        }))
    }

    fn closer(&self) -> Closer {
        let closer = self.0.closer();
        Arc::new(move || closer.close())
    }
}
