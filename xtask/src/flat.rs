//! Turns a bare-metal ELF program into the flat image that `tagvisor run --flat` loads: the
//! contents of its load segments, laid out from the lowest physical address, entered at the first byte.

use anyhow::{Context, Result, bail};
use object::elf::{FileHeader64, PT_LOAD};
use object::read::elf::{ElfFile, FileHeader, ProgramHeader};
use object::{Endianness, Object};

/// More than any program of ours needs; a wild address would ask for gigabytes.
const LARGEST: u64 = 64 << 20;

/// The flat image of `elf`. Memory that a segment has beyond its bytes (`.bss`) is zeros.
pub fn from_elf(elf: &[u8]) -> Result<Vec<u8>> {
    let file =
        ElfFile::<FileHeader64<Endianness>>::parse(elf).context("it is no 64-bit ELF file")?;
    let endian = file.endian();
    let segments: Vec<_> = file
        .elf_program_headers()
        .iter()
        .filter(|segment| segment.p_type(endian) == PT_LOAD)
        .collect();
    let lowest = segments.iter().map(|segment| segment.p_paddr(endian)).min();
    let lowest = lowest.context("it has no load segments")?;
    if file.elf_header().e_entry(endian) != lowest {
        bail!(
            "its entry point {:#x} is not its first byte {lowest:#x}: check its linker script",
            file.entry()
        );
    }
    let mut image = Vec::new();
    for segment in segments {
        let start = segment.p_paddr(endian) - lowest;
        let end = start
            .checked_add(segment.p_memsz(endian))
            .filter(|end| *end <= LARGEST);
        let Some(end) = end else {
            bail!("its segments span more than {} MiB", LARGEST >> 20)
        };
        let data = segment
            .data(endian, elf)
            .ok()
            .context("a segment lies outside the file")?;
        let (start, end) = (usize::try_from(start)?, usize::try_from(end)?);
        image.resize(image.len().max(end), 0);
        let place = image
            .get_mut(start..start + data.len())
            .context("a segment has more bytes than memory")?;
        place.copy_from_slice(data);
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with one header and the given load segments (address, bytes, size in memory).
    fn elf(entry: u64, segments: &[(u64, &[u8], u64)]) -> Vec<u8> {
        let headers = 64 + 56 * segments.len() as u64;
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        for half in [2_u16, 183] {
            file.extend(half.to_le_bytes());
        }
        file.extend(1_u32.to_le_bytes());
        for word in [entry, 64, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend(0_u32.to_le_bytes());
        for half in [64_u16, 56, segments.len() as u16, 64, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        let mut offset = headers;
        for (address, bytes, memory) in segments {
            file.extend(PT_LOAD.0.to_le_bytes());
            file.extend(7_u32.to_le_bytes());
            for word in [offset, *address, *address, bytes.len() as u64, *memory, 4] {
                file.extend(word.to_le_bytes());
            }
            offset += bytes.len() as u64;
        }
        for (_, bytes, _) in segments {
            file.extend(*bytes);
        }
        file
    }

    #[test]
    fn segments_are_laid_out_from_the_lowest_address() {
        let image = from_elf(&elf(
            0x4000_0000,
            &[(0x4000_0000, b"code", 4), (0x4000_0008, b"data", 8)],
        ))
        .unwrap();

        assert_eq!(image, b"code\0\0\0\0data\0\0\0\0");
    }

    #[test]
    fn an_entry_that_is_not_the_first_byte_is_refused() {
        let error = from_elf(&elf(0x4000_0004, &[(0x4000_0000, b"codecode", 8)])).unwrap_err();

        assert!(error.to_string().contains("entry point"), "{error}");
    }

    #[test]
    fn segments_far_apart_are_refused() {
        let error = from_elf(&elf(0, &[(0, b"code", 4), (1 << 40, b"data", 4)])).unwrap_err();

        assert!(error.to_string().contains("span"), "{error}");
    }

    #[test]
    fn bytes_that_are_no_elf_file_are_refused() {
        assert!(from_elf(b"#!/bin/sh").is_err());
    }
}
