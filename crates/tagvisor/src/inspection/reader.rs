//! The reader's side: a machine's vCPUs and memory, for as long as its lease.

use std::fs::File;
use std::io::{self, ErrorKind, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use engine::VcpuState;
use inspect::SourceMemory;
use mte::TagPage;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg};
use serde::de::DeserializeOwned;
use stream::{Metadata, Page, PageSource};
use vmm::layout::{PAGE_SIZE, max_ram};
use vmm::memory::outside::MemoryFile;

use super::{Description, MAX_ANSWER, MAX_PAGES, status, wanted};

/// The most vCPUs of a machine.
const MAX_VCPUS: u32 = 512;
/// Bytes of packed tags a page.
const TAG_BYTES: usize = stream::PAGE_SIZE / 32;

/// A machine's memory, as its VMM lends it.
pub type Memory = SourceMemory<Pages>;

/// A machine that is being looked at. Dropping what [`Reader::memory`] gives lets the guest go on.
pub struct Reader {
    lease: Connection,
    description: Description,
    file: Option<File>,
}

impl Reader {
    /// Takes over a connection whose other end is ready to [`serve`](super::serve).
    ///
    /// # Errors
    /// The other end is gone, or says what is not understood.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        let lease = Connection(Mutex::new(stream));
        let (answer, file) = lease.ask(wanted::DESCRIPTION, 0, 0)?;
        let description: Description = parse(&answer)?;
        let ram = &description.ram;
        let most = max_ram(52) / PAGE_SIZE;
        let is_sound = ram.start <= ram.end
            && ram.end - ram.start <= most
            && ram.end <= 1 << 40
            && description.vcpus <= MAX_VCPUS
            && description.memory_file == file.is_some();
        if !is_sound {
            return Err(strange("it describes a machine that cannot be"));
        }
        Ok(Self {
            lease,
            description,
            file,
        })
    }

    /// The machine's memory and vCPUs.
    ///
    /// # Errors
    /// The VMM is gone; its memory file cannot be read here.
    pub fn memory(self) -> inspect::Result<Memory> {
        let lost = |source| inspect::Error::Source { page: 0, source };
        let ram = self.description.ram.clone();
        let vcpu = |number| {
            let (answer, _) = self.lease.ask(wanted::VCPU, 0, number)?;
            parse(&answer)
        };
        let vcpus: Vec<VcpuState> = (0..self.description.vcpus.into())
            .map(vcpu)
            .collect::<io::Result<_>>()
            .map_err(lost)?;
        let tags = self.description.tags;
        let file = self.file.map(|file| {
            let size = (ram.end - ram.start) * PAGE_SIZE;
            MemoryFile::new(file, size, tags)
        });
        let pages = Pages {
            lease: self.lease,
            tags,
            file: file.transpose().map_err(lost)?,
        };
        SourceMemory::new(pages, ram, vcpus)
    }
}

/// The pages of a machine: from its memory file, or else from its VMM.
pub struct Pages {
    // Held to the end, whether it is asked or not.
    lease: Connection,
    tags: bool,
    file: Option<MemoryFile>,
}

impl PageSource for Pages {
    fn metadata(&self) -> Metadata {
        if self.tags {
            Metadata::ArmMte
        } else {
            Metadata::None
        }
    }

    fn next_run(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        if let Some(file) = &self.file {
            return file.next_run(from);
        }
        let (answer, _) = self.lease.ask(wanted::RUN, 0, from)?;
        match answer.as_chunks::<8>() {
            ([], []) => Ok(None),
            ([start, end], []) => Ok(Some(u64::from_le_bytes(*start)..u64::from_le_bytes(*end))),
            _ => Err(strange("it names a run of pages that is none")),
        }
    }

    fn read(&self, first: u64, data: &mut [Page], tags: &mut [TagPage]) -> io::Result<()> {
        if let Some(file) = &self.file {
            return file.read(first, data, tags);
        }
        let mut at = first;
        let mut tags = tags.chunks_mut(MAX_PAGES);
        for data in data.chunks_mut(MAX_PAGES) {
            let count = data.len();
            let (answer, _) = self.lease.ask(wanted::PAGES, count as u32, at)?;
            let of_tags = if self.tags { count * TAG_BYTES } else { 0 };
            if answer.len() != size_of_val(data) + of_tags {
                return Err(strange("it gives other pages than were asked for"));
            }
            let (bytes, packed) = answer.split_at(size_of_val(data));
            data.as_flattened_mut().copy_from_slice(bytes);
            unpack(packed, tags.next().unwrap_or_default());
            at += count as u64;
        }
        Ok(())
    }

    fn read_tags(&self, first: u64, tags: &mut [TagPage]) -> io::Result<()> {
        if let Some(file) = &self.file {
            return file.read_tags(first, tags);
        }
        let mut at = first;
        for tags in tags.chunks_mut(MAX_PAGES) {
            let (answer, _) = self.lease.ask(wanted::TAGS, tags.len() as u32, at)?;
            if answer.len() != tags.len() * TAG_BYTES {
                return Err(strange("it gives other tags than were asked for"));
            }
            unpack(&answer, tags);
            at += tags.len() as u64;
        }
        Ok(())
    }
}

fn unpack(packed: &[u8], tags: &mut [TagPage]) {
    for (tags, packed) in tags.iter_mut().zip(packed.as_chunks::<TAG_BYTES>().0) {
        *tags = TagPage::from_packed(*packed);
    }
}

/// The connection, one question after the other.
struct Connection(Mutex<UnixStream>);

impl Connection {
    fn lock(&self) -> MutexGuard<'_, UnixStream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer to a request, and a file if one came with it.
    fn ask(&self, what: u32, count: u32, place: u64) -> io::Result<(Vec<u8>, Option<File>)> {
        let mut stream = self.lock();
        let mut request = Vec::with_capacity(16);
        request.extend_from_slice(&what.to_le_bytes());
        request.extend_from_slice(&count.to_le_bytes());
        request.extend_from_slice(&place.to_le_bytes());
        let sent = rustix::net::send(&*stream, &request, SendFlags::NOSIGNAL);
        if sent.map_err(|e| ended(e.into()))? != request.len() {
            return Err(ErrorKind::WriteZero.into());
        }
        let (head, file) = receive_head(&mut stream).map_err(ended)?;
        let [state, length] = head;
        let length = length as usize;
        if length > MAX_ANSWER {
            return Err(strange("its answer is too long"));
        }
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer).map_err(ended)?;
        match state {
            status::DONE => Ok((answer, file)),
            _ => Err(io::Error::other(
                String::from_utf8_lossy(&answer).into_owned(),
            )),
        }
    }
}

/// Status and length of an answer, and the file that comes with them, if one does.
fn receive_head(stream: &mut UnixStream) -> io::Result<([u32; 2], Option<File>)> {
    let mut head = [0; 8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut head)];
        match recvmsg(&*stream, &mut parts, &mut with, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received.bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    };
    if received == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let mut file = None;
    for message in with.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            file = files.into_iter().next().map(File::from);
        }
    }
    stream.read_exact(&mut head[received..])?;
    let (numbers, _) = head.as_chunks::<4>();
    Ok(([0, 1].map(|at| u32::from_le_bytes(numbers[at])), file))
}

fn parse<T: DeserializeOwned>(answer: &[u8]) -> io::Result<T> {
    serde_json::from_slice(answer).map_err(|e| strange(&e.to_string()))
}

fn strange(why: &str) -> io::Error {
    let why = format!("the VMM answers what is not understood: {why}");
    io::Error::new(ErrorKind::InvalidData, why)
}

/// What a connection that is cut means.
fn ended(error: io::Error) -> io::Error {
    use ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error.kind() {
        BrokenPipe | ConnectionReset | UnexpectedEof => {
            io::Error::new(error.kind(), "the machine ended while it was looked at")
        }
        _ => error,
    }
}
