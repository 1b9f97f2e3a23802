//! arm64 Linux kernels: the header of an `Image`, and how one gets into RAM.
//!
//! The header (Linux `Documentation/arch/arm64/booting.rst`, "Call the kernel image") says where
//! the kernel wants to lie, how much memory it needs from there, and for which page size it was
//! built. All of it is checked against the guest's RAM before anything is loaded; a compressed
//! kernel is then decompressed right into RAM, piece by piece.

use std::fmt;
use std::io::{self, Read};

use super::compression::Compressed;
use super::{Error, Input, Placement, u64_at};
use crate::layout::RAM_START;

/// A loaded kernel.
pub(super) struct Kernel {
    /// The first instruction.
    pub entry: u64,
    /// End of the memory that the kernel uses before it knows of the initrd.
    pub end: u64,
    /// The page size that it was built for, if it says so.
    pub page_size: Option<PageSize>,
}

/// The page size that a kernel was built for: the architecture's translation granule. A CPU need
/// not have all three, and a kernel stops mute, before its first message, on one that has not its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Kib4,
    /// 16 KiB.
    Kib16,
    /// 64 KiB.
    Kib64,
}

impl PageSize {
    /// Whether a CPU with this `ID_AA64MMFR0_EL1` has the page size for its own translation (stage 1):
    /// fields `TGran4`, `TGran16` and `TGran64`, read as Linux' `arch/arm64/include/asm/sysreg.h`
    /// reads them.
    pub fn is_offered(self, id_aa64mmfr0: u64) -> bool {
        let field = |shift: u32| (id_aa64mmfr0 >> shift) & 0xf;
        match self {
            Self::Kib4 => field(28) < 8,
            Self::Kib16 => field(20) != 0,
            Self::Kib64 => field(24) < 8,
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kib4 => "4 KiB",
            Self::Kib16 => "16 KiB",
            Self::Kib64 => "64 KiB",
        })
    }
}

/// The header of an `Image`, as far as loading needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ImageHeader {
    /// Where the kernel wants to lie, in bytes from a multiple of 2 MiB.
    text_offset: u64,
    /// Bytes that it needs from there; zero in kernels before 3.17.
    image_size: u64,
    flags: u64,
}

impl ImageHeader {
    const SIZE: u64 = 64;
    /// At byte 56.
    const MAGIC: &[u8] = b"ARM\x64";
    const BIG_ENDIAN: u64 = 1;

    fn parse(start: &[u8]) -> Option<Self> {
        if start.get(56..60)? != Self::MAGIC {
            return None;
        }
        Some(Self {
            text_offset: u64_at(start, 8)?,
            image_size: u64_at(start, 16)?,
            flags: u64_at(start, 24)?,
        })
    }

    fn page_size(self) -> Option<PageSize> {
        match (self.flags >> 1) & 3 {
            1 => Some(PageSize::Kib4),
            2 => Some(PageSize::Kib16),
            3 => Some(PageSize::Kib64),
            _ => None,
        }
    }

    /// The kernel's place in RAM, if it is one that can be started and fits.
    fn place(self, placement: &Placement<'_>, input: &Input<'_>) -> Result<Kernel, Error> {
        let unsupported = |reason| Error::UnsupportedKernel {
            path: input.path.into(),
            reason,
        };
        if self.image_size == 0 {
            return Err(unsupported(
                "it is older than Linux 3.17 and does not say how much memory it needs",
            ));
        }
        if self.flags & Self::BIG_ENDIAN != 0 {
            return Err(unsupported("it was built for big-endian"));
        }
        let entry = placement.reserve(input, RAM_START, self.text_offset)?;
        let end = placement.reserve(input, entry, self.image_size)?;
        Ok(Kernel {
            entry,
            end,
            page_size: self.page_size(),
        })
    }
}

/// Loads a kernel, plain or compressed.
pub(super) fn load(placement: &Placement<'_>, input: &Input<'_>) -> Result<Kernel, Error> {
    let start = read_header(&mut &input.file).map_err(|e| input.error(e))?;
    if let Some(header) = ImageHeader::parse(&start) {
        let kernel = header.place(placement, input)?;
        let file_end = placement.load(input, kernel.entry)?;
        return Ok(kernel.reaching(file_end));
    }
    match Compressed::recognise(&start) {
        Some(compressed) => load_compressed(placement, input, &compressed),
        None => Err(input.not_a_kernel()),
    }
}

fn load_compressed(
    placement: &Placement<'_>,
    input: &Input<'_>,
    compressed: &Compressed,
) -> Result<Kernel, Error> {
    let mut image = compressed
        .reader(&input.file)
        .map_err(|e| input.not_decompressed(&e))?
        .ok_or_else(|| Error::UnknownCompression {
            path: input.path.into(),
            name: compressed.name.clone(),
        })?;
    let start = read_header(&mut image).map_err(|e| input.not_decompressed(&e))?;
    let header = ImageHeader::parse(&start).ok_or_else(|| input.not_a_kernel())?;
    let kernel = header.place(placement, input)?;
    let mut image = start.as_slice().chain(image);
    let image_end = placement.stream(input, &mut image, kernel.entry)?;
    Ok(kernel.reaching(image_end))
}

fn read_header(image: &mut dyn Read) -> io::Result<Vec<u8>> {
    let mut start = Vec::new();
    image.take(ImageHeader::SIZE).read_to_end(&mut start)?;
    Ok(start)
}

impl Kernel {
    /// A kernel's file may be longer than the memory that its header asks for.
    fn reaching(self, file_end: u64) -> Self {
        Self {
            end: self.end.max(file_end),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_offers_the_page_sizes_that_its_id_register_names() {
        // TGran4 at bit 28 and TGran64 at 24 say 15 for "no", TGran16 at 20 says 0.
        let offered = |register: u64| {
            [PageSize::Kib4, PageSize::Kib16, PageSize::Kib64].map(|size| size.is_offered(register))
        };
        assert_eq!(offered(0x0010_0000), [true, true, true]);
        assert_eq!(offered(0xf010_0000), [false, true, true]);
        assert_eq!(offered(0x0000_0000), [true, false, true]);
        assert_eq!(offered(0x0f10_0000), [true, true, false]);
        assert_eq!(offered(0x1020_0000), [true, true, true]);
    }
}
