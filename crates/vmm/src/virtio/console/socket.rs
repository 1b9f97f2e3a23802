//! The host's end of a console port: a listening Unix socket for its owner alone.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A non-blocking listener whose file is removed with it.
pub(super) struct PortSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, to remove no other one.
    identity: (u64, u64),
}

impl PortSocket {
    /// Listens at `path`, in the place of a socket that nobody listens on.
    pub fn listen(path: PathBuf) -> io::Result<Self> {
        remove_stale(&path)?;
        let listener = UnixListener::bind(&path)?;
        let metadata = fs::symlink_metadata(&path)?;
        // From here on the file goes with the socket.
        let socket = PortSocket {
            listener,
            path,
            identity: (metadata.dev(), metadata.ino()),
        };
        fs::set_permissions(&socket.path, Permissions::from_mode(0o600))?;
        socket.listener.set_nonblocking(true)?;
        // Whoever connected before the permissions were set may be anybody.
        while socket.accept()?.is_some() {}
        Ok(socket)
    }

    /// The next client, non-blocking, if one waits.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((client, _)) => {
                client.set_nonblocking(true)?;
                Ok(Some(client))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsRawFd for PortSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for PortSocket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours {
            // Nothing is lost if it stays: it is replaced by the next one.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes the socket at `path` if nobody listens on it. Anything else there is an error.
fn remove_stale(path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    if !metadata.file_type().is_socket() {
        let why = "there is a file of this name that is no socket; choose another path";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
    }
    // A listener refuses a socket of another type without noticing it; a stale file refuses all.
    match UnixDatagram::unbound()?.connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => {
            let why = "another program listens there; choose another path, or end that program";
            Err(io::Error::new(io::ErrorKind::AddrInUse, why))
        }
    }
}
