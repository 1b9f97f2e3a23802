//! Why a network device cannot be attached, in words for the one who asked for it.

use std::io;

use thiserror::Error;

/// Why a network device cannot be attached.
#[derive(Debug, Error)]
pub enum NetError {
    /// Not an address, or not one for a single interface.
    #[error("{text:?} is no MAC address for a guest: {why}; write it as 02:00:00:12:34:56")]
    Mac {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An MTU that virtio does not allow.
    #[error("an MTU of {0} bytes cannot be offered to a guest; choose one from 68 to 65535")]
    Mtu(u16),
    /// Not the name of any interface.
    #[error(
        "{name:?} cannot be the name of a tap interface: a name has 1 to 15 bytes, \
         with no space and no slash; correct it"
    )]
    Name {
        /// What was given.
        name: String,
    },
    /// There is no such interface.
    #[error(
        "cannot open tap interface \"{name}\": there is none in this network namespace; \
         create it with `ip tuntap add dev {name} mode tap user USER` and `ip link set {name} up`"
    )]
    Missing {
        /// The interface.
        name: String,
    },
    /// Somebody else uses it.
    #[error(
        "cannot open tap interface \"{name}\": another process has it open; \
         stop that one, or give each guest a tap of its own"
    )]
    Busy {
        /// The interface.
        name: String,
    },
    /// It belongs to another user.
    #[error(
        "cannot open tap interface \"{name}\": no right to it; \
         give it to the user that runs this with `ip tuntap add dev {name} mode tap user USER`, \
         or run with CAP_NET_ADMIN"
    )]
    Permission {
        /// The interface.
        name: String,
    },
    /// An interface, but no tap with one queue.
    #[error(
        "cannot use interface \"{name}\" as a tap: it is of another kind (not a tap, or one with \
         many queues); create one with `ip tuntap add dev NAME mode tap`"
    )]
    Kind {
        /// The interface.
        name: String,
    },
    /// No taps here.
    #[error(
        "cannot open /dev/net/tun: {source}; the `tun` kernel module must be loaded (`modprobe tun`), \
         and the device readable and writable for the user that runs this"
    )]
    Tun {
        /// What the kernel said.
        source: io::Error,
    },
    /// A descriptor that was passed is no tap, or not set up as one.
    #[error(
        "cannot use file descriptor {fd} as a tap: {why}; \
         pass a tap opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    Descriptor {
        /// The descriptor.
        fd: i32,
        /// What is wrong with it.
        why: String,
    },
    /// The kernel's other reasons.
    #[error(
        "cannot set up tap interface \"{name}\": {what}: {source}; \
         give a tap made with `ip tuntap add dev NAME mode tap`"
    )]
    SetUp {
        /// The interface.
        name: String,
        /// The call that failed.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}
