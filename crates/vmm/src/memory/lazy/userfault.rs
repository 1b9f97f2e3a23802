//! userfaultfd (Linux `Documentation/admin-guide/mm/userfaultfd.rst`), as far as lazy filling needs it: faults
//! on shared memory, of programs and of the kernel on their behalf, resolved by `UFFDIO_CONTINUE`.
//!
//! The crate `userfaultfd` is not used: it cannot ask for minor faults on shared memory, and its build
//! needs libclang and the target's kernel headers.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_SHMEM,
    UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING, uffd_msg,
    uffd_msg__bindgen_ty_1__bindgen_ty_1 as Pagefault, uffdio_api, uffdio_continue, uffdio_range,
    uffdio_register,
};
use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_CONTINUE, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE,
};
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl};
use rustix::mm::UserfaultfdFlags;

use super::Unsupported;
use crate::layout::PAGE_SIZE;

/// Hands out userfaultfds to all who may open it (Linux ≥ 6.1).
const DEVICE: &str = "/dev/userfaultfd";
/// `USERFAULTFD_IOC_NEW` of [`DEVICE`], whose argument are flags.
const NEW: libc::Ioctl = 0xaa00;
/// Messages read at once.
const MESSAGES: usize = 64;

/// A userfaultfd. Addresses are the process' own, in whole pages.
///
/// As it is closed, all who wait for a page go on, and find zeros where nothing was placed.
pub(super) struct Userfault(OwnedFd);

impl Userfault {
    /// A new one, which sees faults of the kernel too.
    ///
    /// # Errors
    /// This host, or what this process may do, has none that serves.
    pub(super) fn new() -> Result<Self, Unsupported> {
        let fd = open()?;
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM).into(),
            ioctls: 0,
        };
        // SAFETY: this request updates this structure.
        unsafe { update::<UFFDIO_API, _>(&fd, &mut api) }.map_err(|error| match error {
            Errno::INVAL => Unsupported::NoMinorFaults,
            error => Unsupported::Host(error.into()),
        })?;
        Ok(Self(fd))
    }

    /// From now on, who touches a page of a range that is not mapped waits until it is shown.
    ///
    /// # Errors
    /// What the host said.
    pub(super) fn register(&self, range: Range<u64>) -> io::Result<()> {
        let mut register = uffdio_register {
            range: raw(range),
            mode: (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR).into(),
            ioctls: 0,
        };
        // SAFETY: this request updates this structure.
        unsafe { update::<UFFDIO_REGISTER, _>(&self.0, &mut register) }?;
        Ok(())
    }

    /// The range is ordinary memory again. Who waits for a page of it goes on.
    ///
    /// # Errors
    /// What the host said.
    pub(super) fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        // SAFETY: this request reads this structure.
        unsafe { update::<UFFDIO_UNREGISTER, _>(&self.0, &mut raw(range.clone())) }?;
        // The kernel wakes first and unregisters then. Who faults in between, which newer kernels let happen as they
        // hold the lock of one mapping only, would wait for ever.
        Ok(self.wake(range)?)
    }

    /// Maps the pages of a range, which are in the file behind it, and lets go on who waits for them. Those
    /// that are mapped already stay as they are.
    ///
    /// # Errors
    /// `EFAULT`: a page is not in the file; `ENOENT`: the range is not registered; others the host may have.
    /// Pages before the one that failed were shown.
    pub(super) fn show(&self, range: Range<u64>) -> Result<(), Errno> {
        let mut rest = range;
        while !rest.is_empty() {
            match self.show_some(rest.clone()) {
                Ok(bytes) => rest.start += bytes,
                // Others may have mapped it without a wake.
                Err(Errno::EXIST) => {
                    self.wake(rest.start..rest.start + PAGE_SIZE)?;
                    rest.start += PAGE_SIZE;
                }
                // The address space is being changed.
                Err(Errno::AGAIN) => std::thread::yield_now(),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Maps pages from the first one on, and says how many bytes: the host may stop short.
    fn show_some(&self, range: Range<u64>) -> Result<u64, Errno> {
        let mut request = uffdio_continue {
            range: raw(range),
            mode: 0,
            mapped: 0,
        };
        // SAFETY: this request updates this structure.
        let shown = unsafe { update::<UFFDIO_CONTINUE, _>(&self.0, &mut request) };
        match (shown, u64::try_from(request.mapped)) {
            (_, Ok(mapped @ 1..)) => Ok(mapped),
            (Err(error), _) => Err(error),
            (Ok(()), _) => Err(Errno::AGAIN),
        }
    }

    fn wake(&self, range: Range<u64>) -> Result<(), Errno> {
        // SAFETY: this request reads this structure.
        unsafe { update::<UFFDIO_WAKE, _>(&self.0, &mut raw(range)) }
    }

    /// Gives the address of each fault that was not read yet to `fault`; there may be none.
    ///
    /// # Errors
    /// What the host said.
    pub(super) fn read(&self, mut fault: impl FnMut(u64)) -> io::Result<()> {
        const SIZE: usize = size_of::<uffd_msg>();
        const ADDRESS: usize = offset_of!(uffd_msg, arg) + offset_of!(Pagefault, address);
        let mut messages = [0; MESSAGES * SIZE];
        let length = match rustix::io::read(&self.0, &mut messages) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        for message in messages[..length].as_chunks::<SIZE>().0 {
            let address = message[ADDRESS..]
                .first_chunk()
                .expect("it is in a message");
            if u32::from(message[offset_of!(uffd_msg, event)]) == UFFD_EVENT_PAGEFAULT {
                fault(u64::from_ne_bytes(*address));
            }
        }
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// From the device, or by the system call, which needs `CAP_SYS_PTRACE` or the administrator's leave for all.
fn open() -> Result<OwnedFd, Unsupported> {
    let device = match File::options().read(true).write(true).open(DEVICE) {
        Ok(device) => return open_by(&device).map_err(Unsupported::Host),
        Err(error) => error,
    };
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: it has no effect on memory until a range is registered.
    unsafe { rustix::mm::userfaultfd(flags) }.map_err(|error| match error {
        Errno::NOSYS => Unsupported::NoUserfaultfd,
        Errno::PERM => Unsupported::NotPermitted { device },
        error => Unsupported::Host(error.into()),
    })
}

fn open_by(device: &File) -> io::Result<OwnedFd> {
    // SAFETY: this request takes flags and returns a new file descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// `REQUEST` reads and writes a `T`, and nothing else of the process' memory that the compiler knows of.
unsafe fn update<const REQUEST: u32, T>(fd: &OwnedFd, value: &mut T) -> Result<(), Errno> {
    // SAFETY: the caller vouches for request and type.
    unsafe { ioctl(fd, Updater::<REQUEST, T>::new(value)) }
}

const fn raw(range: Range<u64>) -> uffdio_range {
    uffdio_range {
        start: range.start,
        len: range.end - range.start,
    }
}
