//! A tap interface of the host: what a guest sends appears on it, what the host sends there the
//! guest receives (Documentation/networking/tuntap.rst).
//!
//! Each read and write is one frame behind a 12-byte virtio-net header, in which the kernel and the
//! guest tell each other about checksums left open and segments left joined. A tap that does not
//! exist is refused: the kernel would create a fresh one, connected to nothing.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use bitflags::bitflags;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::{HEADER_LEN, Link, NetError};

bitflags! {
    /// What the kernel may leave to the guest when it passes it frames (`TUN_F_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// Checksums need not be filled in.
        const CSUM = libc::TUN_F_CSUM;
        /// TCP over IPv4 may come in joined segments.
        const TSO4 = libc::TUN_F_TSO4;
        /// TCP over IPv6 may come in joined segments.
        const TSO6 = libc::TUN_F_TSO6;
        /// Joined TCP segments may carry congestion marks.
        const ECN = libc::TUN_F_TSO_ECN;
        /// UDP may come in joined segments. The kernel knows IPv4 and IPv6 only together.
        const USO = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
}

impl Offloads {
    /// What a driver that agreed to `features` takes.
    pub fn from_features(features: u64) -> Self {
        let agreed = |bit: u32| features & (1 << bit) != 0;
        let mut offloads = Offloads::empty();
        // Nothing can stay joined where checksums must be complete, and congestion marks are those
        // of joined segments: the kernel refuses other sets.
        if agreed(VIRTIO_NET_F_GUEST_CSUM) {
            offloads |= Offloads::CSUM;
            offloads.set(Offloads::TSO4, agreed(VIRTIO_NET_F_GUEST_TSO4));
            offloads.set(Offloads::TSO6, agreed(VIRTIO_NET_F_GUEST_TSO6));
            offloads.set(
                Offloads::USO,
                agreed(VIRTIO_NET_F_GUEST_USO4) && agreed(VIRTIO_NET_F_GUEST_USO6),
            );
        }
        if offloads.intersects(Offloads::TSO4 | Offloads::TSO6) {
            offloads.set(Offloads::ECN, agreed(VIRTIO_NET_F_GUEST_ECN));
        }
        offloads
    }
}

/// Where a tap comes from.
#[derive(Debug)]
pub enum TapSource {
    /// An existing tap interface of this network namespace.
    Name(String),
    /// A tap that another program opened, with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`.
    Fd(OwnedFd),
}

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    has_uso: bool,
}

impl Tap {
    /// Opens the tap and sets its header length to that of virtio-net.
    ///
    /// # Errors
    /// There is no such tap, it is in use, there is no right to it, or the descriptor is no tap.
    pub fn open(source: TapSource) -> Result<Self, NetError> {
        let (file, name) = match source {
            TapSource::Name(name) => (attach(&name)?, name),
            TapSource::Fd(fd) => adopt(fd)?,
        };
        set_header_length(&file).map_err(|source| NetError::SetUp {
            name: name.clone(),
            what: "TUNSETVNETHDRSZ",
            source,
        })?;
        let has_uso = set_offloads(&file, Offloads::CSUM | Offloads::USO).is_ok();
        set_offloads(&file, Offloads::empty()).map_err(|source| NetError::SetUp {
            name: name.clone(),
            what: "TUNSETOFFLOAD",
            source,
        })?;
        Ok(Tap {
            file,
            name,
            has_uso,
        })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Link for Tap {
    fn frames(&self) -> &File {
        &self.file
    }

    fn has_uso(&self) -> bool {
        self.has_uso
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        set_offloads(&self.file, offloads)
    }
}

/// `struct ifreq` of the kernel, as far as `TUNSETIFF` and `TUNGETIFF` use it.
#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

// The kernel copies this much in and out.
const _: () = assert!(size_of::<IfReq>() == 40);

const TAP_FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Opens the existing tap called `name`.
fn attach(name: &str) -> Result<File, NetError> {
    let mut request = IfReq {
        name: interface_name(name)?,
        flags: TAP_FLAGS as libc::c_short,
        rest: [0; 22],
    };
    if !interface_exists(name) {
        return Err(NetError::Missing {
            name: name.to_owned(),
        });
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(|source| NetError::Tun { source })?;
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one ifreq.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result == 0 {
        return Ok(file);
    }
    let source = io::Error::last_os_error();
    let name = name.to_owned();
    Err(match source.raw_os_error() {
        Some(libc::EBUSY) => NetError::Busy { name },
        Some(libc::EPERM | libc::EACCES) => NetError::Permission { name },
        Some(libc::EINVAL) => NetError::Kind { name },
        _ => NetError::SetUp {
            name,
            what: "TUNSETIFF",
            source,
        },
    })
}

/// Takes over a descriptor that another program opened, and learns its interface's name.
fn adopt(fd: OwnedFd) -> Result<(File, String), NetError> {
    let file = File::from(fd);
    let refuse = |why: String| NetError::Descriptor {
        fd: file.as_raw_fd(),
        why,
    };
    let mut request = IfReq {
        name: [0; libc::IFNAMSIZ],
        flags: 0,
        rest: [0; 22],
    };
    // SAFETY: the descriptor is open, and TUNGETIFF writes one ifreq.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    if result != 0 {
        let source = io::Error::last_os_error();
        return Err(refuse(format!("it is no attached tap ({source})")));
    }
    let missing = TAP_FLAGS & !i32::from(request.flags);
    if missing != 0 {
        return Err(refuse(format!("it lacks the flags {missing:#x}")));
    }
    set_nonblocking(&file).map_err(|source| refuse(source.to_string()))?;
    let name = request
        .name
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    let name = String::from_utf8_lossy(name).into_owned();
    Ok((file, name))
}

fn interface_name(name: &str) -> Result<[u8; libc::IFNAMSIZ], NetError> {
    let mut bytes = [0; libc::IFNAMSIZ];
    let allowed = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b'%';
    // The kernel wants a zero at the end; it expands a percent sign.
    let fits = !name.is_empty() && name.len() < bytes.len();
    if !fits || !name.bytes().all(allowed) {
        return Err(NetError::Name {
            name: name.to_owned(),
        });
    }
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    Ok(bytes)
}

fn interface_exists(name: &str) -> bool {
    let Ok(name) = CString::new(name) else {
        return false;
    };
    // SAFETY: the name is a C string that lives through the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

fn set_header_length(file: &File) -> io::Result<()> {
    let length = HEADER_LEN as libc::c_int;
    // SAFETY: the descriptor is open, and TUNSETVNETHDRSZ reads one int.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn set_offloads(file: &File, offloads: Offloads) -> io::Result<()> {
    let flags = libc::c_ulong::from(offloads.bits());
    // SAFETY: the descriptor is open, and TUNSETOFFLOAD takes a number.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, flags) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open; no memory is passed.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
