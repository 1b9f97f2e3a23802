//! One request of a virtio-blk driver: parsed, checked, executed, answered (virtio 1.2, 5.2.6).
//!
//! A request is a header that the device reads, data in one direction, and a status byte that is
//! the last byte the device writes. The borders between descriptors mean nothing (2.7.4.1): the
//! parts are cut out of the chain's bytes. Whatever is wrong with a request is answered in its
//! status byte, and nothing is done that was not checked against the size of the image first.

use std::io;

use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::Serial;
use super::image::{Access, Image, SECTOR_SIZE};
use crate::virtio::chain::{Buffers, Chain};

/// What one discard request may cover: it changes metadata alone.
pub(super) const DISCARD: RangeLimits = RangeLimits {
    segments: 32,
    sectors: 1 << 21,
};
/// What one write-zeroes request may cover: 128 MiB, since a file system may have it written out,
/// and a device that is to stop finishes its request first.
pub(super) const WRITE_ZEROES: RangeLimits = RangeLimits {
    segments: 1,
    sectors: 1 << 18,
};

/// The limits of a request that names ranges, as the configuration space states them.
pub(super) struct RangeLimits {
    /// The most ranges.
    pub segments: u32,
    /// The most sectors of each range.
    pub sectors: u32,
}

/// Length of the request header: type, reserved, sector.
const HEADER_LEN: usize = 16;
/// Length of one range of a discard or write-zeroes request: sector, number of sectors, flags.
const RANGE_LEN: usize = 16;

/// What requests are executed on.
pub(super) struct Disk<'a> {
    pub image: &'a Image,
    pub serial: &'a Serial,
    /// Each write is on the medium before it is answered: the driver did not agree to flush.
    pub write_through: bool,
}

/// Why a request fails.
#[derive(Debug, Error)]
pub(super) enum RequestError {
    #[error("its header is {0} bytes instead of 16")]
    Header(usize),
    #[error("its type {0} is not supported")]
    Type(u32),
    #[error("its range has flags {0:#x}, which are not supported")]
    Flags(u32),
    #[error("it has {0} bytes of data, which does not fit its type")]
    Length(usize),
    #[error("it begins at sector {sector} and has {sectors} sectors, but the image ends at {end}")]
    Range { sector: u64, sectors: u64, end: u64 },
    #[error("one of its ranges has {0} sectors, which is none or more than was offered")]
    RangeLength(u32),
    #[error("it would change a read-only disk")]
    ReadOnly,
    #[error("the image fails: {0}")]
    Image(#[from] io::Error),
}

impl RequestError {
    fn status(&self) -> u8 {
        let status = match self {
            RequestError::Type(_) | RequestError::Flags(_) => VIRTIO_BLK_S_UNSUPP,
            _ => VIRTIO_BLK_S_IOERR,
        };
        status as u8
    }
}

/// Executes the request in `chain` and writes its status.
///
/// Returns how many bytes were written to the chain from its first writable byte on, for the
/// used ring, and what was wrong with the request.
pub(super) fn serve(mut chain: Chain<'_>, disk: &Disk<'_>) -> (u32, Result<(), RequestError>) {
    // A chain with nothing to write to has no status byte; there is no way to answer.
    let Some(data_len) = chain.writable.len().checked_sub(1) else {
        return (0, Err(RequestError::Length(0)));
    };
    let Some(data) = chain.writable.take_front(data_len) else {
        return (0, Err(RequestError::Length(data_len)));
    };
    let (written, result) = match execute(chain.readable, data, disk) {
        Ok(written) => (written, Ok(())),
        Err(error) => (0, Err(error)),
    };
    let status = result
        .as_ref()
        .map_or_else(RequestError::status, |()| VIRTIO_BLK_S_OK as u8);
    let status_len = chain.writable.copy_from(&[status]);
    // The used length counts an unbroken run of bytes: the status only where all before it was written.
    let used = if written == data_len {
        written + status_len
    } else {
        written
    };
    (u32::try_from(used).unwrap_or(u32::MAX), result)
}

/// Returns how many bytes of `data_in` were written.
fn execute(
    mut readable: Buffers<'_>,
    data_in: Buffers<'_>,
    disk: &Disk<'_>,
) -> Result<usize, RequestError> {
    let mut header = [0; HEADER_LEN];
    let header_len = readable.copy_to(&mut header);
    readable
        .take_front(HEADER_LEN)
        .ok_or(RequestError::Header(header_len))?;
    let data_out = readable;
    let request_type = u32_at(&header, 0);
    let sector = u64_at(&header, 8);
    match request_type {
        VIRTIO_BLK_T_IN => read(disk, sector, data_in),
        VIRTIO_BLK_T_OUT => write(disk, sector, data_out),
        VIRTIO_BLK_T_FLUSH => disk.image.flush().map(|()| 0).map_err(Into::into),
        VIRTIO_BLK_T_GET_ID => get_id(disk, &data_in),
        VIRTIO_BLK_T_DISCARD => discard(disk, &data_out),
        VIRTIO_BLK_T_WRITE_ZEROES => write_zeroes(disk, &data_out),
        other => Err(RequestError::Type(other)),
    }
}

fn read(disk: &Disk<'_>, sector: u64, data: Buffers<'_>) -> Result<usize, RequestError> {
    let len = data.len();
    let offset = data_offset(disk, sector, len)?;
    disk.image.read(offset, data)?;
    Ok(len)
}

fn write(disk: &Disk<'_>, sector: u64, data: Buffers<'_>) -> Result<usize, RequestError> {
    let offset = data_offset(disk, sector, data.len())?;
    check_writable(disk)?;
    disk.image.write(offset, data)?;
    settle(disk)
}

fn get_id(disk: &Disk<'_>, data: &Buffers<'_>) -> Result<usize, RequestError> {
    if data.len() < disk.serial.bytes().len() {
        return Err(RequestError::Length(data.len()));
    }
    Ok(data.copy_from(disk.serial.bytes()))
}

fn discard(disk: &Disk<'_>, data: &Buffers<'_>) -> Result<usize, RequestError> {
    check_writable(disk)?;
    // No flag belongs to a discard (virtio 1.2, 5.2.6.2).
    for range in ranges(disk, data, &DISCARD, 0)? {
        disk.image.discard(range.offset, range.len)?;
    }
    Ok(0)
}

fn write_zeroes(disk: &Disk<'_>, data: &Buffers<'_>) -> Result<usize, RequestError> {
    check_writable(disk)?;
    for range in ranges(
        disk,
        data,
        &WRITE_ZEROES,
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
    )? {
        let unmap = range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        disk.image.write_zeroes(range.offset, range.len, unmap)?;
    }
    settle(disk)
}

/// A checked range of the image.
struct Range {
    /// Its first byte.
    offset: u64,
    /// Its length in bytes.
    len: u64,
    flags: u32,
}

/// The ranges of a request (`struct virtio_blk_discard_write_zeroes`), all of them checked.
fn ranges(
    disk: &Disk<'_>,
    data: &Buffers<'_>,
    limits: &RangeLimits,
    allowed_flags: u32,
) -> Result<Vec<Range>, RequestError> {
    let most = RANGE_LEN * limits.segments as usize;
    if data.len() == 0 || data.len() > most || !data.len().is_multiple_of(RANGE_LEN) {
        return Err(RequestError::Length(data.len()));
    }
    // Copied once, then checked and used: the driver can change its memory at any time.
    let mut bytes = vec![0; data.len()];
    data.copy_to(&mut bytes);
    bytes
        .chunks_exact(RANGE_LEN)
        .map(|bytes| parse_range(disk, bytes, limits, allowed_flags))
        .collect()
}

fn parse_range(
    disk: &Disk<'_>,
    bytes: &[u8],
    limits: &RangeLimits,
    allowed_flags: u32,
) -> Result<Range, RequestError> {
    let sectors = u32_at(bytes, 8);
    let flags = u32_at(bytes, 12);
    if flags & !allowed_flags != 0 {
        return Err(RequestError::Flags(flags));
    }
    if sectors == 0 || sectors > limits.sectors {
        return Err(RequestError::RangeLength(sectors));
    }
    Ok(Range {
        offset: checked_offset(disk, u64_at(bytes, 0), sectors.into())?,
        len: u64::from(sectors) * SECTOR_SIZE,
        flags,
    })
}

/// The image's byte of `sector`, where `len` bytes of data are whole sectors within the image.
fn data_offset(disk: &Disk<'_>, sector: u64, len: usize) -> Result<u64, RequestError> {
    let len_bytes = len as u64;
    if len_bytes == 0 || !len_bytes.is_multiple_of(SECTOR_SIZE) {
        return Err(RequestError::Length(len));
    }
    checked_offset(disk, sector, len_bytes / SECTOR_SIZE)
}

fn checked_offset(disk: &Disk<'_>, sector: u64, sectors: u64) -> Result<u64, RequestError> {
    let end = disk.image.sectors();
    let inside = sector.checked_add(sectors).is_some_and(|last| last <= end);
    if !inside {
        return Err(RequestError::Range {
            sector,
            sectors,
            end,
        });
    }
    // The image's size in bytes is a u64, and the sector lies within it.
    Ok(sector * SECTOR_SIZE)
}

fn check_writable(disk: &Disk<'_>) -> Result<(), RequestError> {
    match disk.image.access() {
        Access::ReadWrite => Ok(()),
        Access::ReadOnly => Err(RequestError::ReadOnly),
    }
}

/// Brings a change to the medium at once where the driver does not flush.
fn settle(disk: &Disk<'_>) -> Result<usize, RequestError> {
    if disk.write_through {
        disk.image.flush()?;
    }
    Ok(0)
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(field)
}
