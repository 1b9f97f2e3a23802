//! Unix sockets for this host's processes: the file is made for its owner alone, in nobody's way when its maker was
//! killed, and removed with its maker; who is at the other end is asked of the kernel.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that wait to be taken up.
const BACKLOG: i32 = 128;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process listens there.
    #[error("socket {0}: another process listens there; choose another path, or end that one")]
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
#[derive(Debug)]
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

/// The user at the other end, if it is neither ours nor root. The file's mode keeps others out as well; but a directory may
/// be changed, and a descriptor passed on.
///
/// # Errors
/// What the kernel reports.
pub fn foreign_user(socket: impl AsFd) -> io::Result<Option<u32>> {
    let uid = rustix::net::sockopt::socket_peercred(socket)?.uid;
    let is_trusted = uid.is_root() || uid == rustix::process::geteuid();
    Ok((!is_trusted).then_some(uid.as_raw()))
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
    match try_connecting(path) {
        Err(rustix::io::Errno::CONNREFUSED) => fs::remove_file(path).map_err(error),
        // Somebody listens, and has more connections waiting than may wait.
        Ok(()) | Err(rustix::io::Errno::AGAIN) => Err(Error::InUse(path.into())),
        Err(e) => Err(error(e.into())),
    }
}

fn try_connecting(path: &Path) -> rustix::io::Result<()> {
    let socket = new_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

pub(crate) fn new_socket(flags: SocketFlags) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn bind(path: &Path) -> rustix::io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = new_socket(SocketFlags::CLOEXEC)?;
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
