//! A machine as an ELF core: physical memory, its tags, the vCPUs' registers.
//!
//! | segments | what |
//! |---|---|
//! | `PT_NOTE` | for each vCPU `NT_PRSTATUS` and, if they were saved, `NT_PRFPREG`; `VMCOREINFO` if the guest has one |
//! | `PT_LOAD` | populated memory by guest-physical address, which stands as virtual address as well |
//! | `PT_AARCH64_MEMTAG_MTE` | the packed tags of each `PT_LOAD`, as Linux writes them for its own cores (`Documentation/arch/arm64/memory-tagging-extension.rst`): `p_vaddr` and `p_memsz` are those of the memory, `p_filesz` is 1/32 of that |
//!
//! Holes are in no segment. Only where memory has more of them than a core should have segments, the smallest are in one;
//! these, pages of zeros and tags 0 are holes of the file, so that a core takes no more room than what is in it.
//!
//! A snapshot's pages are written in the order in which they are in the snapshot, each to its place.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine::{RegisterId, VcpuState};
use mte::TagPage;
use object::elf;
use object::endian::{LittleEndian, U16, U32, U64};
use object::pod::bytes_of;
use serde::Serialize;
use stream::{Run, ZERO_PAGE};

use crate::error::{self, output};
use crate::memory::TaggedMemory;
use crate::registers::{self, must_have};
use crate::view::PAGE;

/// The type of segments of tags (`include/uapi/linux/elf.h`): `PT_LOPROC` + 2.
pub const PT_AARCH64_MEMTAG_MTE: u32 = 0x7000_0002;

/// The most pieces of memory: debuggers look through them one after the other.
const MAX_PIECES: usize = 4096;
/// Bytes of memory for a byte of packed tags.
const TAGGED_BY_BYTE: u64 = 32;
/// The most bytes of a VMCOREINFO: the guest has one page for it, of at most 64 KiB.
const MAX_VMCOREINFO: usize = 64 << 10;
/// The most places that are looked at for it.
const MAX_CANDIDATES: usize = 16;
const VMCOREINFO: &[u8] = b"VMCOREINFO\0";
const NOTE_HEADER: usize = 12;
/// `struct elf_prstatus` of arm64, and where in it `pr_pid` and `pr_reg` are (`include/linux/elfcore.h`).
const PRSTATUS_LEN: usize = 392;
const PRSTATUS_PID: usize = 32;
const PRSTATUS_REGISTERS: usize = 112;
/// `struct user_fpsimd_state` (`arch/arm64/include/uapi/asm/ptrace.h`).
const FPSIMD_LEN: usize = 528;

/// Why there is no core.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The memory.
    #[error(transparent)]
    Memory(#[from] error::Error),
    /// The file.
    #[error("core {path}: cannot {action}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// There is something there that is no file.
    #[error("core {0}: it is there, and no regular file; choose another name")]
    NoFile(PathBuf),
}

/// What a core has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Bytes of the file, its holes among them.
    pub bytes: u64,
    /// Populated pages.
    pub pages: u64,
    /// `PT_LOAD` segments.
    pub segments: usize,
    /// Whether tags are beside them.
    pub tags: bool,
    /// vCPUs.
    pub vcpus: usize,
    /// Whether there is a VMCOREINFO.
    pub vmcoreinfo: Vmcoreinfo,
}

/// What was found of the guest kernel's description of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vmcoreinfo {
    /// It is in the core.
    Found,
    /// The guest has none.
    Missing,
    /// The guest's memory has several that differ, and none is in the core.
    Ambiguous,
}

/// Writes a core. It has its name when it is whole and on the disk; an older file of that name is there until then.
///
/// # Errors
/// See [`Error`].
pub fn save(memory: &mut dyn TaggedMemory, path: &Path) -> Result<Summary, Error> {
    match fs::symlink_metadata(path) {
        Ok(there) if !there.is_file() => return Err(Error::NoFile(path.into())),
        _ => {}
    }
    let name = path.file_name().ok_or_else(|| Error::NoFile(path.into()))?;
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let failed = |action| {
        move |source| Error::File {
            path: path.into(),
            action,
            source,
        }
    };
    let file = tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(".part")
        .tempfile_in(directory)
        .map_err(failed("create a file beside it"))?;
    let summary = write(memory, file.as_file())?;
    file.as_file().sync_all().map_err(failed("sync it"))?;
    file.persist(path)
        .map_err(|e| failed("give it its name")(e.error))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("sync its directory"))?;
    Ok(summary)
}

/// Writes a core into an empty file.
///
/// # Errors
/// The memory cannot be read, or the file not be written.
pub fn write(memory: &mut dyn TaggedMemory, file: &File) -> error::Result<Summary> {
    let mut notes = Vec::new();
    for (number, vcpu) in (1..).zip(memory.vcpus()) {
        put_vcpu(number, vcpu, &mut notes)?;
    }
    let layout = Layout::new(memory, notes.len())?;
    let mut candidates = Vec::new();
    let mut pages = 0;
    let mut packed = Vec::new();
    memory.visit(0..u64::MAX, &mut |run| {
        pages += run.data.len() as u64;
        add_candidates(&run, &mut candidates);
        layout
            .write(&run, &mut packed, file)
            .map_err(output("write the core"))
    })?;
    let vmcoreinfo = match vmcoreinfo(memory, &candidates)?.as_slice() {
        [] => Vmcoreinfo::Missing,
        [only] => {
            put_note(VMCOREINFO, 0, only, &mut notes);
            Vmcoreinfo::Found
        }
        _ => Vmcoreinfo::Ambiguous,
    };
    let head = layout.head(notes.len() as u64);
    file.write_all_at(&head, 0)
        .and_then(|()| file.write_all_at(&notes, layout.notes_offset))
        .and_then(|()| file.set_len(layout.end))
        .map_err(output("write the core"))?;
    Ok(Summary {
        bytes: layout.end,
        pages,
        segments: layout.pieces.len(),
        tags: layout.tags,
        vcpus: memory.vcpus().len(),
        vmcoreinfo,
    })
}

/// A piece of memory, and where its data and tags are in the file.
struct Piece {
    pages: Range<u64>,
    data: u64,
    tags: u64,
}

struct Layout {
    pieces: Vec<Piece>,
    tags: bool,
    notes_offset: u64,
    end: u64,
}

impl Layout {
    fn new(memory: &mut dyn TaggedMemory, notes_len: usize) -> error::Result<Self> {
        let tags = memory.has_tags();
        let runs = pieces(memory)?;
        let headers = 1 + runs.len() * if tags { 2 } else { 1 };
        let notes_offset = size_of::<FileHeader>() + headers * size_of::<ProgramHeader>();
        // Readers take what is before the first piece for headers and notes.
        let reserved = notes_len + NOTE_HEADER + VMCOREINFO.len() + 1 + MAX_VMCOREINFO;
        let mut at = ((notes_offset + reserved) as u64).next_multiple_of(PAGE);
        let mut pieces: Vec<Piece> = Vec::new();
        for pages in runs {
            let data = at;
            at = at.saturating_add((pages.end - pages.start).saturating_mul(PAGE));
            pieces.push(Piece {
                pages,
                data,
                tags: 0,
            });
        }
        for piece in &mut pieces {
            piece.tags = at;
            if tags {
                at = at.saturating_add(piece.bytes() / TAGGED_BY_BYTE);
            }
        }
        Ok(Self {
            pieces,
            tags,
            notes_offset: notes_offset as u64,
            end: at,
        })
    }

    /// Puts pages and tags where they belong. `packed` is room that is used again.
    fn write(&self, run: &Run<'_>, packed: &mut Vec<u8>, file: &File) -> io::Result<()> {
        let number = self
            .pieces
            .partition_point(|piece| piece.pages.end <= run.first);
        // A run is in one piece: pieces are runs joined.
        let Some(piece) = self.pieces.get(number) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let place = run.first - piece.pages.start;
        let mut at = piece.data + place * PAGE;
        // What is not written reads as zeros: data and tags are both there, whichever of them are 0.
        for same in run
            .data
            .chunk_by(|one, next| (*one == ZERO_PAGE) == (*next == ZERO_PAGE))
        {
            if same[0] != ZERO_PAGE {
                file.write_all_at(same.as_flattened(), at)?;
            }
            at += same.len() as u64 * PAGE;
        }
        if !run.tags.iter().all(TagPage::is_untagged) {
            packed.clear();
            for tags in run.tags {
                packed.extend_from_slice(tags.as_packed());
            }
            file.write_all_at(packed, piece.tags + place * PAGE / TAGGED_BY_BYTE)?;
        }
        Ok(())
    }

    fn head(&self, notes_len: u64) -> Vec<u8> {
        let of_data = self.pieces.iter().map(Piece::load);
        let of_tags = self.pieces.iter().filter(|_| self.tags).map(Piece::memtag);
        let note = program_header(elf::PT_NOTE.0, 0, self.notes_offset, 0, 0, notes_len, 0, 4);
        let headers: Vec<_> = [note].into_iter().chain(of_data).chain(of_tags).collect();
        let mut bytes = bytes_of(&file_header(headers.len())).to_vec();
        for header in &headers {
            bytes.extend_from_slice(bytes_of(header));
        }
        bytes
    }
}

impl Piece {
    fn bytes(&self) -> u64 {
        (self.pages.end - self.pages.start).saturating_mul(PAGE)
    }

    fn load(&self) -> ProgramHeader {
        let (address, bytes) = (self.pages.start * PAGE, self.bytes());
        let flags = (elf::PF_R | elf::PF_W | elf::PF_X).0;
        program_header(
            elf::PT_LOAD.0,
            flags,
            self.data,
            address,
            address,
            bytes,
            bytes,
            PAGE,
        )
    }

    fn memtag(&self) -> ProgramHeader {
        let (address, bytes) = (self.pages.start * PAGE, self.bytes());
        let packed = bytes / TAGGED_BY_BYTE;
        program_header(
            PT_AARCH64_MEMTAG_MTE,
            0,
            self.tags,
            address,
            0,
            packed,
            bytes,
            0,
        )
    }
}

/// Populated pages, the smallest gaps among them if there are too many pieces.
fn pieces(memory: &mut dyn TaggedMemory) -> error::Result<Vec<Range<u64>>> {
    let mut largest_joined = 0;
    loop {
        let mut pieces: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while let Some(run) = memory.next_run(at)? {
            at = run.end;
            match pieces.last_mut() {
                Some(last) if run.start - last.end <= largest_joined => last.end = run.end,
                _ => pieces.push(run),
            }
            if pieces.len() > MAX_PIECES {
                break;
            }
        }
        if pieces.len() <= MAX_PIECES {
            return Ok(pieces);
        }
        largest_joined = (largest_joined * 2).max(1);
    }
}

type FileHeader = elf::FileHeader64<LittleEndian>;
type ProgramHeader = elf::ProgramHeader64<LittleEndian>;

fn file_header(program_headers: usize) -> FileHeader {
    let le = LittleEndian;
    FileHeader {
        e_ident: elf::Ident {
            magic: elf::ELFMAG,
            class: elf::ELFCLASS64,
            data: elf::ELFDATA2LSB,
            version: elf::EV_CURRENT,
            os_abi: elf::ELFOSABI_NONE,
            abi_version: 0,
            padding: [0; 7],
        },
        e_type: U16::new(le, elf::ET_CORE),
        e_machine: U16::new(le, elf::EM_AARCH64),
        e_version: U32::new(le, elf::EV_CURRENT.0.into()),
        e_entry: U64::new(le, 0),
        e_phoff: U64::new(le, size_of::<FileHeader>() as u64),
        e_shoff: U64::new(le, 0),
        e_flags: U32::new(le, elf::FileFlags(0)),
        e_ehsize: U16::new(le, size_of::<FileHeader>() as u16),
        e_phentsize: U16::new(le, size_of::<ProgramHeader>() as u16),
        e_phnum: U16::new(le, program_headers as u16),
        e_shentsize: U16::new(le, 0),
        e_shnum: U16::new(le, 0),
        e_shstrndx: U16::new(le, elf::SHN_UNDEF),
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "they are the fields of the format, in its order"
)]
fn program_header(
    kind: u32,
    flags: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
    align: u64,
) -> ProgramHeader {
    let le = LittleEndian;
    ProgramHeader {
        p_type: U32::new(le, elf::ProgramType(kind)),
        p_flags: U32::new(le, elf::ProgramFlags(flags)),
        p_offset: U64::new(le, offset),
        p_vaddr: U64::new(le, vaddr),
        p_paddr: U64::new(le, paddr),
        p_filesz: U64::new(le, filesz),
        p_memsz: U64::new(le, memsz),
        p_align: U64::new(le, align),
    }
}

/// Adds a note: header, name, contents, each to a multiple of 4 bytes.
fn put_note(name: &[u8], kind: u32, contents: &[u8], notes: &mut Vec<u8>) {
    for field in [name.len() as u32, contents.len() as u32, kind] {
        notes.extend_from_slice(&field.to_le_bytes());
    }
    for part in [name, contents] {
        notes.extend_from_slice(part);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
}

/// Adds the notes of a vCPU, which debuggers show as thread `number`.
fn put_vcpu(number: u32, vcpu: &VcpuState, notes: &mut Vec<u8>) -> error::Result<()> {
    let mut status = [0; PRSTATUS_LEN];
    status[PRSTATUS_PID..PRSTATUS_PID + 4].copy_from_slice(&number.to_le_bytes());
    let pstate = must_have(vcpu, RegisterId::PSTATE, "PSTATE")?;
    let mut values = Vec::new();
    for x in 0..=30 {
        values.push(must_have(
            vcpu,
            RegisterId::x(x),
            "general-purpose registers",
        )?);
    }
    values.push(registers::stack_pointer(vcpu, pstate)?);
    values.push(must_have(vcpu, RegisterId::PC, "PC")?);
    values.push(pstate);
    for (value, place) in values.iter().zip((PRSTATUS_REGISTERS..).step_by(8)) {
        status[place..place + 8].copy_from_slice(&value.to_le_bytes());
    }
    let floating = floating_point(vcpu);
    status[PRSTATUS_LEN - 8] = u8::from(floating.is_some());
    put_note(b"CORE\0", elf::NT_PRSTATUS.0, &status, notes);
    if let Some(floating) = floating {
        put_note(b"CORE\0", elf::NT_PRFPREG.0, &floating, notes);
    }
    Ok(())
}

/// `struct user_fpsimd_state`, if all of it was saved.
fn floating_point(vcpu: &VcpuState) -> Option<[u8; FPSIMD_LEN]> {
    let mut state = [0; FPSIMD_LEN];
    let (vectors, rest) = state.split_at_mut(512);
    for (to, number) in vectors.chunks_mut(16).zip(0..) {
        to.copy_from_slice(&registers::vector(vcpu, number)?);
    }
    for (to, id) in rest.chunks_mut(4).zip([registers::FPSR, registers::FPCR]) {
        to.copy_from_slice(&(registers::value(vcpu, id)? as u32).to_le_bytes());
    }
    Some(state)
}

/// The guest's VMCOREINFO, if its memory has exactly one.
///
/// # Errors
/// Whatever keeps the memory from being read.
pub(crate) fn vmcoreinfo_of(memory: &mut dyn TaggedMemory) -> error::Result<Option<Vec<u8>>> {
    let mut candidates = Vec::new();
    memory.visit(0..u64::MAX, &mut |run| {
        add_candidates(&run, &mut candidates);
        Ok(())
    })?;
    let mut found = vmcoreinfo(memory, &candidates)?;
    let only = found.pop();
    Ok(only.filter(|_| found.is_empty()))
}

/// Adds the pages of a run that begin as a VMCOREINFO does.
fn add_candidates(run: &Run<'_>, candidates: &mut Vec<u64>) {
    for (data, page) in run.data.iter().zip(run.first..) {
        if candidates.len() < MAX_CANDIDATES && vmcoreinfo_len(data).is_some() {
            candidates.push(page);
        }
    }
}

/// The length of the VMCOREINFO that the note at the beginning of this page says it has, if it is such a note. Linux keeps
/// the note at the beginning of pages of its own (`kernel/vmcore_info.c`).
fn vmcoreinfo_len(page: &[u8]) -> Option<usize> {
    let field = |at: usize| Some(u32::from_le_bytes(*page.get(at..)?.first_chunk()?));
    let is_note = field(0)? as usize == VMCOREINFO.len()
        && field(8)? == 0
        && page.get(NOTE_HEADER..)?.starts_with(VMCOREINFO);
    let len = field(4)? as usize;
    (is_note && (1..=MAX_VMCOREINFO).contains(&len)).then_some(len)
}

/// The different texts that are at the pages which look like notes: lines of `KEY=VALUE`, those among them that no Linux
/// leaves out.
fn vmcoreinfo(memory: &mut dyn TaggedMemory, pages: &[u64]) -> error::Result<Vec<Vec<u8>>> {
    const TEXT: usize = NOTE_HEADER + VMCOREINFO.len() + 1;
    let mut found = Vec::new();
    for page in pages {
        let count = (TEXT + MAX_VMCOREINFO).div_ceil(ZERO_PAGE.len());
        let mut data = vec![ZERO_PAGE; count];
        let mut tags = vec![TagPage::ZERO; if memory.has_tags() { count } else { 0 }];
        memory.read(*page, &mut data, &mut tags)?;
        let note = data.as_flattened();
        let text = vmcoreinfo_len(note).map_or(&[][..], |len| &note[TEXT..TEXT + len]);
        let lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
        let has = |key: &[u8]| lines.iter().any(|line| line.starts_with(key));
        let right = text.is_ascii() && has(b"OSRELEASE=") && has(b"PAGESIZE=");
        if right && !found.iter().any(|known| known == text) {
            found.push(text.to_vec());
        }
    }
    Ok(found)
}
