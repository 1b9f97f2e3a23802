//! What clones share: the memory of one guest, data and tags, that nobody writes any more.
//!
//! A base is filled as guest memory is, by data mapping and tag mapping and with no VM about, and then closed
//! ([`GuestMemory::into_base`]): both mappings go, and what is left is a descriptor of the memory file that
//! cannot write. Any process that has it makes guest memory of it, [`GuestMemory::clone_of`]: a private
//! mapping, whose pages are the base's until they are written.
//!
//! The file stays one of transparent huge pages where the host has them. A clone that reads then maps 2 MiB by
//! one fault, in its own page tables and in stage 2. A first write splits that mapping and copies 4 KiB; the rest of the
//! 2 MiB comes back by pages, and the huge page itself stays whole for the others.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::populated::{Populated, first_data};
use super::{Error, GuestMemory, HUGE_PAGE_SIZE, MemoryPlan, TagMethod};

/// Most holes that are mapped apart: the host bounds how many mappings a process has
/// (`/proc/sys/vm/max_map_count`, 65530).
const MAX_HOLES: u64 = 4096;

impl MemoryPlan {
    /// What stands behind memory that becomes a [`Base`]: no VM has it, so its tags are reached by the tag
    /// mapping on every host with MTE.
    pub fn of_base(mte: bool) -> Self {
        Self {
            memory_file: true,
            huge_pages: false,
            tags: mte.then_some(TagMethod::Alias),
        }
    }
}

/// A memory file, filled, that cannot be written by this descriptor.
#[derive(Debug)]
pub struct Base {
    file: File,
    size: u64,
}

impl Base {
    /// The base that `file` is, which another process made. That process must be trusted with the guest: whoever can still write
    /// the file writes the clone's memory, and whoever makes it shorter ends the clone.
    ///
    /// # Errors
    /// It is no memory file, or the host does not let it be opened for reading.
    pub fn from_file(file: &File) -> io::Result<Self> {
        let status = rustix::fs::fstatfs(file)?;
        // Linux takes no other files' pages for tags (`shmem_mmap` alone sets `VM_MTE_ALLOWED`).
        if status.f_type != libc::TMPFS_MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is no memory file: only pages of a tmpfs have tags",
            ));
        }
        let size = file.metadata()?.len();
        let can_write = rustix::fs::fcntl_getfl(file)?.intersects(OFlags::WRONLY | OFlags::RDWR);
        let file = if can_write {
            File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?
        } else {
            file.try_clone()?
        };
        Ok(Self { file, size })
    }

    /// The memory file, which cannot be written by this descriptor.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The holes that are worth a mapping of their own, in bytes from the start of RAM.
    ///
    /// In a hole that is mapped from the file, a first read gives a page to the file, and a first write one to the file
    /// and one to the clone.
    pub(super) fn large_holes(&self) -> io::Result<Vec<Range<u64>>> {
        let least = (self.size / MAX_HOLES).max(HUGE_PAGE_SIZE);
        let mut holes = Vec::new();
        let mut at = 0;
        while at < self.size {
            let data = first_data(&self.file, at..self.size)?.unwrap_or(self.size..self.size);
            if data.start - at >= least {
                holes.push(at..data.start);
            }
            at = data.end;
        }
        Ok(holes)
    }
}

impl GuestMemory {
    /// Ends the filling of a base: this memory, data and tags as they are, is written no more.
    ///
    /// # Errors
    /// It is not of a memory file ([`MemoryPlan::of_base`]), or others hold its data mapping.
    pub fn into_base(self) -> Result<Base, Error> {
        let Populated::File(file) = &self.populated else {
            return Err(Error::NoBase("it is of no memory file"));
        };
        if Arc::strong_count(&self.ram) > 1 {
            return Err(Error::NoBase("it is in use and could still be written"));
        }
        Base::from_file(file).map_err(|source| Error::Host {
            size: self.size >> 20,
            step: "making a base for clones of it",
            source,
            hint: "",
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::layout::{PAGE_SIZE, RAM_START};
    use crate::memory::tests::{populated_pages, with_small_pages};

    const SIZE: u64 = 16 << 20;

    fn address(page: u64) -> GuestAddress {
        GuestAddress(RAM_START + page * PAGE_SIZE)
    }

    fn write(memory: &GuestMemory, page: u64, value: u64) {
        memory.ram().write_obj(value, address(page)).unwrap();
    }

    fn read(memory: &GuestMemory, page: u64) -> u64 {
        memory.ram().read_obj(address(page)).unwrap()
    }

    /// A base of small pages, where each of these holds its number plus 1000.
    fn base_with(pages: &[u64]) -> Base {
        let memory = with_small_pages(GuestMemory::new(SIZE, MemoryPlan::of_base(false)).unwrap());
        for page in pages {
            write(&memory, *page, page + 1000);
        }
        memory.into_base().unwrap()
    }

    fn clone_of(base: &Base) -> GuestMemory {
        with_small_pages(GuestMemory::clone_of(base).unwrap())
    }

    #[test]
    fn a_clone_has_the_data_of_its_base() {
        let base = base_with(&[0, 7, 4095]);
        let clone = clone_of(&base);
        assert_eq!(read(&clone, 0), 1000);
        assert_eq!(read(&clone, 7), 1007);
        assert_eq!(read(&clone, 4095), 5095);
        assert_eq!(read(&clone, 3000), 0);
    }

    #[test]
    fn what_a_clone_writes_neither_its_base_nor_another_clone_sees() {
        let base = base_with(&[3]);
        let (first, second) = (clone_of(&base), clone_of(&base));

        write(&first, 3, 1);
        write(&first, 4000, 2);

        let later = clone_of(&base);
        assert_eq!((read(&first, 3), read(&first, 4000)), (1, 2));
        assert_eq!((read(&second, 3), read(&second, 4000)), (1003, 0));
        assert_eq!((read(&later, 3), read(&later, 4000)), (1003, 0));
    }

    #[test]
    fn a_clone_has_the_pages_of_its_base_and_those_it_wrote() {
        let base = base_with(&[10, 11, 600, 4095]);
        let clone = clone_of(&base);

        for page in [9, 11, 12, 14, 601, 2000, 2001, 4094] {
            write(&clone, page, 1);
        }

        assert_eq!(
            populated_pages(&clone),
            [9..13, 14..15, 600..602, 2000..2002, 4094..4096]
        );
    }

    #[test]
    fn reading_a_page_of_the_base_changes_nothing_of_what_is_populated() {
        let base = base_with(&[10, 600]);
        let clone = clone_of(&base);

        read(&clone, 10);

        assert_eq!(populated_pages(&clone), [10..11, 600..601]);
    }

    #[test]
    fn a_large_hole_of_the_base_stays_one_whatever_clones_do_there() {
        let base = base_with(&[0, 4095]);
        let clone = clone_of(&base);

        read(&clone, 1000);
        write(&clone, 2000, 1);

        let hole = PAGE_SIZE..SIZE - PAGE_SIZE;
        assert_eq!(base.large_holes().unwrap(), [hole]);
        assert_eq!(populated_pages(&clone_of(&base)), [0..1, 4095..4096]);
    }

    #[test]
    fn a_base_without_a_page_is_one_hole() {
        let base = base_with(&[]);
        let clone = clone_of(&base);
        let all = 0..SIZE;
        assert_eq!(base.large_holes().unwrap(), [all]);
        assert_eq!(populated_pages(&clone), []);
    }

    #[test]
    fn only_what_was_asked_about_a_clone_is_said_to_be_populated() {
        let base = base_with(&[10, 11, 12]);
        let clone = clone_of(&base);
        write(&clone, 13, 1);

        let asked = RAM_START + 11 * PAGE_SIZE..RAM_START + 14 * PAGE_SIZE;

        let found: Vec<_> = clone.populated(asked.clone()).map(Result::unwrap).collect();
        assert_eq!(found, [asked]);
    }

    #[test]
    fn a_base_cannot_be_written_by_its_descriptor() {
        use std::os::unix::fs::FileExt;
        let base = base_with(&[0]);
        assert!(base.file().write_at(&[1], 0).is_err());
    }

    #[test]
    fn another_process_makes_the_same_base_of_its_descriptor() {
        let base = base_with(&[5]);
        let received = Base::from_file(&base.file().try_clone().unwrap()).unwrap();
        assert_eq!(received.size(), SIZE);
        assert_eq!(read(&clone_of(&received), 5), 1005);
    }

    #[test]
    fn a_file_on_a_disk_is_no_base() {
        let file = File::open("/proc/self/exe").unwrap();
        let error = Base::from_file(&file).unwrap_err();
        assert!(error.to_string().contains("no memory file"), "{error}");
    }

    #[test]
    fn private_memory_and_memory_in_use_are_no_bases() {
        let private = MemoryPlan {
            memory_file: false,
            huge_pages: false,
            tags: None,
        };
        let private = GuestMemory::new(SIZE, private).unwrap();
        let in_use = GuestMemory::new(SIZE, MemoryPlan::of_base(false)).unwrap();
        let _device = in_use.ram().clone();

        assert!(matches!(private.into_base(), Err(Error::NoBase(_))));
        assert!(matches!(in_use.into_base(), Err(Error::NoBase(_))));
    }
}
