//! Frames into the guest: where a frame finds room in the receive queue, and how its buffers are
//! handed back (virtio 1.2, 5.1.6.4).
//!
//! With `VIRTIO_NET_F_MRG_RXBUF` a frame may fill several buffers, and the header in the first tells
//! how many. The driver takes them all at once, so all must be in the used ring before its index
//! moves: one step of the index for one frame. A frame that finds no room stays with its caller.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::memory::GuestRam;
use crate::virtio::chain::Chain;
use crate::virtio::worker::HandlerError;

/// Where the header tells the number of buffers (`struct virtio_net_hdr_v1`).
const NUM_BUFFERS: usize = 10;

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    /// The guest has it.
    Whole,
    /// There is too little room now. The driver kicks when it adds buffers.
    NoRoom,
    /// It fits into no buffer that this driver offers, ever.
    TooLong,
}

/// Puts `frame`, a header and what follows it, into the queue's buffers.
///
/// # Errors
/// The ring or a chain is broken.
pub(super) fn place(
    queue: &mut Queue,
    memory: &GuestRam,
    merge: bool,
    frame: &mut [u8],
) -> Result<Placed, HandlerError> {
    loop {
        let start = queue.next_avail();
        match gather(queue, memory, merge, frame.len())? {
            Gathered::Enough(buffers) => {
                fill(queue, memory, &buffers, frame)?;
                return Ok(Placed::Whole);
            }
            Gathered::TooLong { head } => {
                // The buffer goes back empty: the driver may give a longer one.
                publish(queue, memory, &[(head, 0)])?;
                return Ok(Placed::TooLong);
            }
            Gathered::TooFew if queue.next_avail().wrapping_sub(start) == queue.size() => {
                queue.set_next_avail(start);
                return Ok(Placed::TooLong);
            }
            Gathered::TooFew => {
                // A driver with event indexes kicks when it passes the index that notifications
                // are enabled at: that must be the end of what it has offered.
                let more = queue.enable_notification(memory)?;
                queue.set_next_avail(start);
                if !more {
                    return Ok(Placed::NoRoom);
                }
            }
        }
    }
}

enum Gathered<'m> {
    /// Heads and chains, together long enough.
    Enough(Vec<(u16, Chain<'m>)>),
    /// The ring is used up. Its position is where it ended.
    TooFew,
    /// A single buffer must do, and the next one is too short.
    TooLong { head: u16 },
}

/// Takes chains off the available ring until they have room for `len` bytes.
fn gather<'m>(
    queue: &mut Queue,
    memory: &'m GuestRam,
    merge: bool,
    len: usize,
) -> Result<Gathered<'m>, HandlerError> {
    let mut chains = Vec::with_capacity(1);
    let mut room = 0;
    while room < len {
        // No driver has more buffers than its ring has entries, however often it moves the index.
        if chains.len() == usize::from(queue.size()) {
            return Ok(Gathered::TooFew);
        }
        let Some(descriptors) = queue.iter(memory)?.next() else {
            return Ok(Gathered::TooFew);
        };
        let head = descriptors.head_index();
        let chain =
            Chain::parse(memory, descriptors).map_err(|why| HandlerError::chain(head, &why))?;
        room += chain.writable.len();
        if !merge && room < len {
            return Ok(Gathered::TooLong { head });
        }
        chains.push((head, chain));
    }
    Ok(Gathered::Enough(chains))
}

fn fill(
    queue: &mut Queue,
    memory: &GuestRam,
    chains: &[(u16, Chain<'_>)],
    frame: &mut [u8],
) -> Result<(), Error> {
    // At most as many as the queue is long.
    let count = chains.len() as u16;
    frame[NUM_BUFFERS..NUM_BUFFERS + 2].copy_from_slice(&count.to_le_bytes());
    let mut rest = &*frame;
    let mut used = Vec::with_capacity(chains.len());
    for (head, chain) in chains {
        let copied = chain.writable.copy_from(rest);
        rest = &rest[copied..];
        used.push((*head, copied as u32));
    }
    publish(queue, memory, &used)
}

/// Puts heads with their lengths into the used ring and moves its index over all of them at once.
fn publish(queue: &mut Queue, memory: &GuestRam, used: &[(u16, u32)]) -> Result<(), Error> {
    let mut next = Wrapping(queue.next_used());
    for &(head, len) in used {
        let slot = u64::from(next.0 % queue.size());
        let address = ring_address(queue.used_ring(), 4 + 8 * slot)?;
        memory
            .write_obj([u32::from(head).to_le(), len.to_le()], address)
            .map_err(Error::GuestMemory)?;
        next += 1;
    }
    queue.set_next_used(next.0);
    let index = ring_address(queue.used_ring(), 2)?;
    memory
        .store(next.0.to_le(), index, Ordering::Release)
        .map_err(Error::GuestMemory)
}

/// Whether the driver wants an interrupt for the buffers used since the used index was `before`
/// (virtio 1.2, 2.7.7.2 and 2.7.10).
pub(super) fn wants_interrupt(
    queue: &Queue,
    memory: &GuestRam,
    before: u16,
) -> Result<bool, Error> {
    let (before, after) = (Wrapping(before), Wrapping(queue.next_used()));
    if before == after {
        return Ok(false);
    }
    // The driver looks for used buffers after it set what is read here.
    fence(Ordering::SeqCst);
    if queue.event_idx_enabled() {
        let event = Wrapping(load(
            memory,
            queue.avail_ring(),
            4 + 2 * u64::from(queue.size()),
        )?);
        Ok(after - event - Wrapping(1) < after - before)
    } else {
        let flags = load(memory, queue.avail_ring(), 0)?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

fn load(memory: &GuestRam, ring: u64, offset: u64) -> Result<u16, Error> {
    memory
        .load(ring_address(ring, offset)?, Ordering::Relaxed)
        .map(u16::from_le)
        .map_err(Error::GuestMemory)
}

fn ring_address(ring: u64, offset: u64) -> Result<GuestAddress, Error> {
    GuestAddress(ring)
        .checked_add(offset)
        .ok_or(Error::AddressOverflow)
}
