//! The socket's file: made for its owner alone, in nobody's way when its maker was killed, removed with its maker.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that wait to be taken up.
const BACKLOG: i32 = 128;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another VMM listens there.
    #[error("socket {0}: another VMM listens there; choose another path, or end that one")]
    InUse(PathBuf),
    /// What is there is not a socket.
    #[error("socket {0}: there is a file of another kind; it is not replaced")]
    NotASocket(PathBuf),
    /// The host refuses.
    #[error("socket {path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// A socket's file, removed when this is dropped if it is still the same.
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

/// Listens at `path`, in the place of a socket that nobody listens at. Its directory is made if need be.
///
/// # Errors
/// See [`Error`].
pub fn listen(path: &Path) -> Result<(UnixListener, SocketFile), Error> {
    let error = |source| Error::Io {
        path: path.into(),
        source,
    };
    if let Some(directory) = path.parent().filter(|parent| *parent != Path::new("")) {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(error)?;
    }
    remove_stale(path)?;
    let listener = bind(path).map_err(|e| error(e.into()))?;
    let identity = identity(path).map_err(error)?;
    let file = SocketFile {
        path: path.into(),
        identity,
    };
    Ok((listener, file))
}

fn remove_stale(path: &Path) -> Result<(), Error> {
    let error = |source| Error::Io {
        path: path.into(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(error(e)),
        Ok(there) if !there.file_type().is_socket() => {
            return Err(Error::NotASocket(path.into()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(error),
        Err(e) => Err(error(e)),
        Ok(_) => Err(Error::InUse(path.into())),
    }
}

fn bind(path: &Path) -> rustix::io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // The file gets the mode of the socket: there is no moment at which others could open it.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).ok() == Some(self.identity)
            && let Err(e) = fs::remove_file(&self.path)
        {
            tracing::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}
