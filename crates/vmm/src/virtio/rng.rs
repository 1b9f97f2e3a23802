//! The entropy device (virtio 1.2, 5.4): fills the guest's buffers from the host's random number
//! generator, getrandom(2).

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::{DescriptorChain, Queue};

use super::chain::Chain;
use super::worker::{self, Handler, HandlerError, Outcome, Poll, Progress, Worker};
use super::{Activation, Interrupt, VirtioDevice};
use crate::memory::GuestRam;

/// Bytes given for one descriptor chain at most; a driver with more room asks again.
const REQUEST_LIMIT: usize = 64 << 10;
/// Bytes fetched from the kernel at once. A signal cannot cut a call for up to 256 short.
const PIECE: usize = 256;
const QUEUE_SIZE: u16 = 16;

/// An entropy device.
pub struct Rng {
    name: String,
    worker: Option<Worker<RngHandler>>,
}

impl Rng {
    /// An entropy device of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Rng {
            name: name.into(),
            worker: None,
        }
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let handler = RngHandler {
            memory: activation.memory,
            queues: activation.queues,
            interrupt: activation.interrupt.clone(),
        };
        let worker = Worker::start(&self.name, handler, activation.kicks, activation.interrupt)
            .map_err(|not_started| not_started.error)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn deactivate(&mut self) -> Option<Vec<Queue>> {
        self.worker.take().map(|worker| worker.stop().queues)
    }
}

struct RngHandler {
    memory: Arc<GuestRam>,
    queues: Vec<Queue>,
    interrupt: Arc<dyn Interrupt>,
}

impl Handler for RngHandler {
    fn queue_kicked(&mut self, index: usize, _poll: &Poll) -> Result<Progress, HandlerError> {
        let Some(queue) = self.queues.get_mut(index) else {
            return Ok(Progress::Done);
        };
        worker::serve(queue, &self.memory, &*self.interrupt, |chain| {
            fill(&self.memory, chain)
        })
    }
}

fn fill<'m>(
    memory: &'m GuestRam,
    chain: DescriptorChain<&'m GuestRam>,
) -> Result<Outcome, HandlerError> {
    let head = chain.head_index();
    let chain = Chain::parse(memory, chain).map_err(|why| HandlerError::chain(head, &why))?;
    let mut bytes = vec![0; chain.writable.len().min(REQUEST_LIMIT)];
    for piece in bytes.chunks_mut(PIECE) {
        fill_random(piece)?;
    }
    // At most REQUEST_LIMIT.
    Ok(Outcome::Used(chain.writable.copy_from(&bytes) as u32))
}

/// Fills up to 256 bytes with random ones, waiting for the kernel's generator if it is not ready yet.
fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    loop {
        // SAFETY: the kernel writes at most `bytes.len()` bytes to `bytes`, which is borrowed mutably.
        let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        if usize::try_from(count).is_ok_and(|count| count == bytes.len()) {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if count < 0 && error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::testing::{
        BUFFERS, CountedInterrupt, DriverQueue, WRITE, activation, ram, wait_until,
    };
    use super::*;

    /// Serves `buffers` as one chain and gives back the device's answer: the bytes written, or
    /// `None` if it asked for a reset, and the first 64 bytes of the buffers.
    fn request(buffers: &[(u64, u32, u16)]) -> (Option<u32>, [u8; 64]) {
        let memory = ram();
        let mut queue = [DriverQueue::new(&memory, 0, QUEUE_SIZE)];
        queue[0].add(buffers);
        let interrupt = Arc::new(CountedInterrupt::default());
        let (activation, _kicks) = activation(&memory, &queue, &interrupt, 0);
        let mut rng = Rng::new("rng0");
        rng.activate(activation).unwrap();
        let broken = || interrupt.needs_reset.load(Ordering::SeqCst);
        wait_until("the request ended", || {
            queue[0].used_index() == 1 || broken()
        });
        rng.deactivate().unwrap();
        let answer = (!broken()).then(|| queue[0].used(0).1);
        let mut bytes = [0; 64];
        memory
            .read_slice(&mut bytes, GuestAddress(BUFFERS))
            .unwrap();
        (answer, bytes)
    }

    #[test]
    fn buffers_are_filled_to_their_end_and_not_beyond() {
        let (written, bytes) = request(&[(BUFFERS, 20, WRITE), (BUFFERS + 20, 20, WRITE)]);

        assert_eq!(written, Some(40));
        assert_ne!(bytes[..20], [0; 20]);
        assert_ne!(bytes[20..40], [0; 20]);
        assert_eq!(bytes[40..], [0; 24]);
    }

    #[test]
    fn two_requests_get_different_bytes() {
        let [(_, first), (_, second)] = [(); 2].map(|()| request(&[(BUFFERS, 64, WRITE)]));

        assert_ne!(first, second);
    }

    #[test]
    fn a_huge_request_is_answered_in_part() {
        let (written, _) = request(&[(BUFFERS, 1 << 20, WRITE)]);

        assert_eq!(written, Some(64 << 10));
    }

    #[test]
    fn a_request_without_room_gets_nothing() {
        let (written, bytes) = request(&[(BUFFERS, 64, 0)]);

        assert_eq!((written, bytes), (Some(0), [0; 64]));
    }

    #[test]
    fn a_buffer_outside_memory_stops_the_device() {
        let (written, _) = request(&[(0, 64, WRITE)]);

        assert_eq!(written, None);
    }

    #[test]
    fn a_chain_without_end_stops_the_device() {
        let memory = ram();
        let mut queue = [DriverQueue::new(&memory, 0, QUEUE_SIZE)];
        let loops = (BUFFERS, 8, WRITE | super::super::testing::NEXT, 0);
        queue[0].write_descriptor(queue[0].descriptors(), 0, loops);
        queue[0].make_available(0);
        let interrupt = Arc::new(CountedInterrupt::default());
        let (activation, _kicks) = activation(&memory, &queue, &interrupt, 0);
        let mut rng = Rng::new("rng0");

        rng.activate(activation).unwrap();

        wait_until("it asks for a reset", || {
            interrupt.needs_reset.load(Ordering::SeqCst)
        });
        assert_eq!(queue[0].used_index(), 0);
    }

    #[test]
    fn an_indirect_table_that_is_larger_than_memory_stops_the_device() {
        let (written, _) = request(&[(BUFFERS, u32::MAX - 15, super::super::testing::INDIRECT)]);

        assert_eq!(written, None);
    }
}
