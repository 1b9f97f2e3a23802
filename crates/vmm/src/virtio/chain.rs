//! The guest's buffers behind one descriptor chain.
//!
//! A chain is hostile until [`Chain::parse`] has walked it to its end: it may be cut, loop, run out
//! of memory, or mix the directions. What comes out are two scatter lists of guest memory,
//! [`Buffers`], one for each direction, that the kernel reads and writes in place (`preadv`,
//! `pwritev`, `writev`). Every byte that is written marks its page in the bitmap of guest memory,
//! after the write, so that a migration that clears the bitmap meanwhile sees the page again.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{Bitmap, MS};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use crate::memory::GuestRam;

/// The most descriptors a chain may have: as many as one `preadv` takes. A driver may not exceed
/// its queue's size (virtio 1.2, 2.7.5.3.1), but Linux does with indirect tables and a small queue.
const MAX_DESCRIPTORS: usize = 1024;

/// The most buffers one `preadv` or `pwritev` takes (`UIO_MAXIOV`).
const MAX_IOVECS: usize = libc::UIO_MAXIOV as usize;

/// What a driver did wrong with a chain. The device cannot go on: where the chain
/// is broken, the ring can be too.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum ChainError {
    /// The chain has no descriptor, or points to one that cannot be read.
    #[error("the chain is cut: a descriptor is missing or cannot be read")]
    Cut,
    /// More descriptors than any driver needs.
    #[error("the chain has more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// A device-readable descriptor follows a device-writable one (virtio 1.2, 2.7.4.2).
    #[error("a device-readable descriptor follows a device-writable one")]
    Order,
    /// A buffer is not guest memory.
    #[error("the buffer at {address:#x}, {len} bytes, is outside guest memory")]
    Outside {
        /// Guest physical address of the buffer.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
}

/// Guest memory in pieces, in the order of the chain.
#[derive(Default)]
pub(crate) struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m, MS<'m, GuestRam>>>,
    len: usize,
}

/// One descriptor chain, checked.
pub(crate) struct Chain<'m> {
    /// What the device reads.
    pub readable: Buffers<'m>,
    /// What the device writes.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Walks `descriptors` to their end and finds their buffers in `memory`.
    ///
    /// # Errors
    /// The driver's mistakes, each as its own [`ChainError`].
    pub fn parse(
        memory: &'m GuestRam,
        descriptors: DescriptorChain<&'m GuestRam>,
    ) -> Result<Self, ChainError> {
        let mut chain = Chain {
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        // The iterator ends without a word where it cannot go on; only the last descriptor tells.
        let mut expects_more = true;
        for (index, descriptor) in descriptors.enumerate() {
            if index == MAX_DESCRIPTORS {
                return Err(ChainError::TooLong);
            }
            expects_more = descriptor.has_next();
            let buffers = if descriptor.is_write_only() {
                &mut chain.writable
            } else if chain.writable.slices.is_empty() {
                &mut chain.readable
            } else {
                return Err(ChainError::Order);
            };
            buffers.append(memory, descriptor.addr(), descriptor.len())?;
        }
        if expects_more {
            return Err(ChainError::Cut);
        }
        Ok(chain)
    }
}

impl<'m> Buffers<'m> {
    fn append(
        &mut self,
        memory: &'m GuestRam,
        address: GuestAddress,
        len: u32,
    ) -> Result<(), ChainError> {
        let outside = || ChainError::Outside {
            address: address.0,
            len,
        };
        let slices = memory
            .get_slices(address, len as usize, Permissions::ReadWrite)
            .map_err(|_| outside())?;
        for slice in slices {
            let slice = slice.map_err(|_| outside())?;
            self.len += slice.len();
            self.slices.push(slice);
        }
        Ok(())
    }

    /// One piece of guest memory, as a chain of one descriptor gives it.
    #[cfg(test)]
    pub fn of(memory: &'m GuestRam, address: u64, len: usize) -> Self {
        let mut buffers = Buffers::default();
        buffers
            .append(memory, GuestAddress(address), len as u32)
            .expect("guest memory");
        buffers
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Takes the first `count` bytes off, or nothing when there are fewer.
    pub fn take_front(&mut self, count: usize) -> Option<Buffers<'m>> {
        if count > self.len {
            return None;
        }
        let mut front = Buffers::default();
        let mut rest = Buffers::default();
        for slice in self.slices.drain(..) {
            let (before, after) = slice.split_at(slice.len().min(count - front.len)).ok()?;
            front.push(before);
            rest.push(after);
        }
        *self = rest;
        Some(front)
    }

    fn push(&mut self, slice: VolatileSlice<'m, MS<'m, GuestRam>>) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push(slice);
        }
    }

    /// Copies the first bytes out of guest memory; returns how many there were, at most `bytes.len()`.
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            done += slice.copy_to(&mut bytes[done..]);
        }
        done
    }

    /// Copies `bytes` into guest memory, from the first byte on; returns how many found room.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let Ok(count) = slice.write(&bytes[done..], 0) else {
                break;
            };
            done += count;
        }
        done
    }

    /// Fills all of it from `file` at byte `offset`, with no copy in between.
    ///
    /// # Errors
    /// The file's own, and `UnexpectedEof` where it is shorter. Part of the memory may be written then.
    pub fn fill_from_file(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        let result = self.transfer(offset, |iovecs, at| {
            // SAFETY: every iovec covers mapped guest memory (see `iovecs`), their number is at
            // most UIO_MAXIOV, and the kernel writes nowhere else.
            unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, at) }
        });
        // Also after an error: what was read before it is in guest memory.
        self.mark_dirty();
        result
    }

    /// Writes all of it to `file` at byte `offset`, with no copy in between.
    ///
    /// # Errors
    /// The file's own. Part of it may be written then.
    pub fn write_to_file(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.transfer(offset, |iovecs, at| {
            // SAFETY: every iovec covers mapped guest memory (see `iovecs`), their number is at
            // most UIO_MAXIOV, and the kernel only reads it.
            unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32, at) }
        })
    }

    /// Sends all of it as one packet.
    ///
    /// # Errors
    /// The receiver's own; `InvalidInput` when the packet is in more than 1024 pieces.
    pub fn send(&self, receiver: BorrowedFd<'_>) -> io::Result<usize> {
        let iovecs = self.iovecs(0);
        if self.slices.len() > MAX_IOVECS {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // SAFETY: every iovec covers mapped guest memory (see `iovecs`), their number is at most
        // UIO_MAXIOV, and the kernel only reads it.
        let sent =
            unsafe { libc::writev(receiver.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    fn mark_dirty(&self) {
        for slice in &self.slices {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }

    /// The memory from byte `skip` on, as the kernel takes it, at most [`MAX_IOVECS`] pieces.
    ///
    /// Each lies within one slice, which `get_slices` took from a mapped region of `GuestRam`; the
    /// slice's lifetime keeps the mapping. No reference to this memory exists in the program: the
    /// guest changes it at any time, and all access is volatile or by the kernel.
    fn iovecs(&self, mut skip: usize) -> Vec<libc::iovec> {
        let mut iovecs = Vec::with_capacity(self.slices.len().min(MAX_IOVECS));
        for slice in &self.slices {
            if iovecs.len() == MAX_IOVECS {
                break;
            }
            if let Ok(rest) = slice.offset(skip.min(slice.len()))
                && !rest.is_empty()
            {
                iovecs.push(libc::iovec {
                    iov_base: rest.ptr_guard_mut().as_ptr().cast(),
                    iov_len: rest.len(),
                });
            }
            skip = skip.saturating_sub(slice.len());
        }
        iovecs
    }

    /// Repeats `call` (a positioned read or write) until every byte is done.
    fn transfer(
        &self,
        offset: u64,
        mut call: impl FnMut(&[libc::iovec], libc::off_t) -> isize,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < self.len {
            let at = offset
                .checked_add(done as u64)
                .and_then(|at| libc::off_t::try_from(at).ok())
                .ok_or(io::ErrorKind::InvalidInput)?;
            match call(&self.iovecs(done), at) {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count if count > 0 => done += count.unsigned_abs(),
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::QueueOwnedT;

    use super::*;
    use crate::virtio::testing::{
        BUFFERS, DriverQueue, INDIRECT, NEXT, RAM_SIZE, RAM_START, WRITE, ram,
    };

    /// Parses the first chain of a queue that `fill` has filled; tells its readable and writable length.
    fn parse(fill: impl FnOnce(&mut DriverQueue)) -> Result<(usize, usize), ChainError> {
        let memory = ram();
        let mut driver = DriverQueue::new(&memory, 0, 256);
        fill(&mut driver);
        let mut queue = driver.device_queue();
        let descriptors = queue.iter(&*memory).unwrap().next().unwrap();
        let chain = Chain::parse(&memory, descriptors)?;
        Ok((chain.readable.len(), chain.writable.len()))
    }

    #[test]
    fn a_chain_is_sorted_by_direction() {
        let buffers = [
            (BUFFERS, 16, 0),
            (BUFFERS + 64, 5, 0),
            (BUFFERS + 128, 7, WRITE),
        ];

        let lens = parse(|queue| {
            queue.add(&buffers);
        });

        assert_eq!(lens, Ok((21, 7)));
    }

    #[test]
    fn a_chain_that_loops_is_refused() {
        let lens = parse(|queue| {
            queue.write_descriptor(queue.descriptors(), 0, (BUFFERS, 1, NEXT, 0));
            queue.make_available(0);
        });

        assert_eq!(lens, Err(ChainError::Cut));
    }

    #[test]
    fn a_chain_that_leaves_its_table_is_refused() {
        let lens = parse(|queue| {
            queue.write_descriptor(queue.descriptors(), 0, (BUFFERS, 1, NEXT, 256));
            queue.make_available(0);
        });

        assert_eq!(lens, Err(ChainError::Cut));
    }

    #[test]
    fn a_head_outside_the_table_is_refused() {
        let lens = parse(|queue| queue.make_available(256));

        assert_eq!(lens, Err(ChainError::Cut));
    }

    #[test]
    fn an_indirect_table_within_an_indirect_table_is_refused() {
        let lens = parse(|queue| {
            queue.write_descriptor(BUFFERS, 0, (BUFFERS, 16, INDIRECT, 0));
            queue.add(&[(BUFFERS, 16, INDIRECT)]);
        });

        assert_eq!(lens, Err(ChainError::Cut));
    }

    #[test]
    fn a_table_of_too_many_descriptors_is_refused() {
        let count = MAX_DESCRIPTORS as u16 + 1;

        let lens = parse(|queue| {
            for index in 0..count {
                let flags = if index + 1 < count { NEXT } else { 0 };
                queue.write_descriptor(BUFFERS, index, (BUFFERS, 1, flags, index + 1));
            }
            queue.add(&[(BUFFERS, 16 * u32::from(count), INDIRECT)]);
        });

        assert_eq!(lens, Err(ChainError::TooLong));
    }

    #[test]
    fn a_readable_buffer_behind_a_writable_one_is_refused() {
        let lens = parse(|queue| {
            queue.add(&[(BUFFERS, 1, WRITE), (BUFFERS, 1, 0)]);
        });

        assert_eq!(lens, Err(ChainError::Order));
    }

    #[test]
    fn buffers_that_are_not_all_in_guest_memory_are_refused() {
        let end = RAM_START + RAM_SIZE as u64;
        let buffers = [
            (0, 1),
            (RAM_START - 1, 2),
            (end - 1, 2),
            (end, 1),
            (u64::MAX, u32::MAX),
        ];

        let lens = buffers.map(|(address, len)| {
            parse(|queue| {
                queue.add(&[(address, len, WRITE)]);
            })
        });

        let expected = buffers.map(|(address, len)| Err(ChainError::Outside { address, len }));
        assert_eq!(lens, expected);
    }

    #[test]
    fn the_front_is_taken_off_across_buffers_and_the_rest_stays() {
        let buffers = [(BUFFERS, 3, 0), (BUFFERS + 8, 3, 0), (BUFFERS + 16, 3, 0)];
        let memory = ram();
        memory
            .write_slice(b"abc.....def.....ghi", GuestAddress(BUFFERS))
            .unwrap();
        let mut driver = DriverQueue::new(&memory, 0, 256);
        driver.add(&buffers);
        let mut queue = driver.device_queue();
        let descriptors = queue.iter(&*memory).unwrap().next().unwrap();
        let mut readable = Chain::parse(&memory, descriptors).unwrap().readable;

        let front = readable.take_front(5).unwrap();

        let mut bytes = [0; 9];
        assert_eq!((front.copy_to(&mut bytes), &bytes[..5]), (5, &b"abcde"[..]));
        assert_eq!(
            (readable.copy_to(&mut bytes), &bytes[..4]),
            (4, &b"fghi"[..])
        );
        assert!(readable.take_front(5).is_none());
    }
}
