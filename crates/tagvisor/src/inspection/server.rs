//! The VMM's side: answers a reader until it is gone.

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use mte::TagPage;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use stream::{Page, ZERO_PAGE};

use super::{Description, Lease, MAX_PAGES, status, wanted};

/// How long a reader may leave an answer lying: the guest may be standing still for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers the reader at `stream` until it has gone, or does not read what it asked for.
pub fn serve(lease: &Lease, stream: &UnixStream) {
    let mut server = Server {
        lease,
        data: Vec::new(),
        tags: Vec::new(),
        answer: Vec::new(),
    };
    if let Err(e) = server.serve(stream) {
        tracing::debug!("a reader of the machine's memory was given up: {e}");
    }
}

struct Server<'a> {
    lease: &'a Lease,
    // Room that is used again.
    data: Vec<Page>,
    tags: Vec<TagPage>,
    answer: Vec<u8>,
}

impl Server<'_> {
    fn serve(&mut self, mut stream: &UnixStream) -> io::Result<()> {
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        loop {
            let mut request = [0; 16];
            match stream.read_exact(&mut request) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                read => read?,
            }
            let field = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| request[at + byte]));
            let (what, count) = (field(0), field(4));
            let place = u64::from(field(8)) | u64::from(field(12)) << 32;
            self.answer.clear();
            let status = match self.perform(what, count, place) {
                Ok(()) => status::DONE,
                Err(e) => {
                    self.answer = e.to_string().into_bytes();
                    status::FAILED
                }
            };
            let file = self.lease.file.as_ref();
            self.send(stream, status, file.filter(|_| what == wanted::DESCRIPTION))?;
        }
    }

    /// Puts what is wanted into `answer`.
    fn perform(&mut self, what: u32, count: u32, place: u64) -> io::Result<()> {
        let lease = self.lease;
        match what {
            wanted::DESCRIPTION => {
                let description = Description {
                    ram: lease.ram.clone(),
                    tags: lease.pages.metadata().has_tags(),
                    vcpus: lease.vcpus.len() as u32,
                    memory_file: lease.file.is_some(),
                };
                Ok(serde_json::to_writer(&mut self.answer, &description)?)
            }
            wanted::VCPU => {
                let vcpu = usize::try_from(place).ok();
                let vcpu = vcpu.and_then(|vcpu| lease.vcpus.get(vcpu));
                let vcpu = vcpu.ok_or_else(|| invalid("there is no such vCPU"))?;
                Ok(serde_json::to_writer(&mut self.answer, vcpu)?)
            }
            wanted::RUN => {
                if let Some(run) = lease.pages.next_run(place)? {
                    self.answer.extend_from_slice(&run.start.to_le_bytes());
                    self.answer.extend_from_slice(&run.end.to_le_bytes());
                }
                Ok(())
            }
            wanted::PAGES => self.read(place, count as usize, true),
            wanted::TAGS => self.read(place, count as usize, false),
            _ => Err(invalid("this is not understood")),
        }
    }

    /// Pages with their tags, if they have any; or tags alone.
    fn read(&mut self, first: u64, count: usize, with_data: bool) -> io::Result<()> {
        if count > MAX_PAGES {
            return Err(invalid("these are too many pages at once"));
        }
        let pages = &self.lease.pages;
        let with_tags = if pages.metadata().has_tags() {
            count
        } else {
            0
        };
        self.tags.resize(with_tags, TagPage::ZERO);
        if with_data {
            self.data.resize(count, ZERO_PAGE);
            pages.read(first, &mut self.data, &mut self.tags)?;
            self.answer.extend_from_slice(self.data.as_flattened());
        } else {
            pages.read_tags(first, &mut self.tags)?;
        }
        for tags in &self.tags {
            self.answer.extend_from_slice(tags.as_packed());
        }
        Ok(())
    }

    /// Sends the answer, and a file with its first byte.
    fn send(
        &self,
        stream: &UnixStream,
        status: u32,
        file: Option<&std::fs::File>,
    ) -> io::Result<()> {
        let length = self.answer.len() as u32;
        let head = [status.to_le_bytes(), length.to_le_bytes()].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let files = file.map(AsFd::as_fd);
        let mut with = SendAncillaryBuffer::new(&mut space);
        if !files.as_slice().is_empty() {
            with.push(SendAncillaryMessage::ScmRights(files.as_slice()));
        }
        let mut parts = &mut [IoSlice::new(&head), IoSlice::new(&self.answer)][..];
        let mut none = SendAncillaryBuffer::default();
        let mut first = true;
        while parts.iter().any(|part| !part.is_empty()) {
            let with = if std::mem::take(&mut first) {
                &mut with
            } else {
                &mut none
            };
            match sendmsg(stream, parts, with, SendFlags::NOSIGNAL) {
                Ok(sent) => IoSlice::advance_slices(&mut parts, sent),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}
