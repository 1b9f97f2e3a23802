//! Whether an image is the one that a guest had elsewhere, as far as that can be known without reading all of it.
//!
//! On one host a file is known by its device and number. Of an image that nobody writes, samples of its contents are compared
//! where the files are two. An image that is written changes while it is looked at: of that, on another host, the size is all that is known.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use super::{Access, Image, SECTOR_SIZE};

/// How many places of an image are looked at, the first and the last among them.
const SAMPLES: u64 = 256;
/// Bytes at each of them.
const SAMPLE: u64 = 4096;

/// What an image is known by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageIdentity {
    /// Which boot of which host knows the file by the following (`/proc/sys/kernel/random/boot_id`).
    host: String,
    /// The device that the file is on, or that it is.
    device: u64,
    /// Its inode on that device; 0 for a device.
    inode: u64,
    /// In bytes.
    size: u64,
    /// A checksum of samples of its contents, unless the guest writes to it.
    sample: Option<u64>,
}

impl ImageIdentity {
    /// What shows that this is not the image `other`, if something does.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        let is_same_host = self.host == other.host;
        if is_same_host && (self.device, self.inode) == (other.device, other.inode) {
            return None;
        }
        match (self.sample, other.sample) {
            _ if self.size != other.size => Some("has another size than the source's"),
            (Some(one), Some(another)) if one == another => None,
            (Some(_), Some(_)) => Some("has other contents than the source's"),
            _ if is_same_host => Some("is another file than the source's, which the guest writes"),
            _ => None,
        }
    }
}

impl Image {
    /// What the image is known by; of one below an overlay, not what the overlay is.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn identity(&self) -> io::Result<ImageIdentity> {
        let metadata = self.file.metadata()?;
        let (device, inode) = match metadata.file_type().is_block_device() {
            true => (metadata.rdev(), 0),
            false => (metadata.dev(), metadata.ino()),
        };
        let size = self.sectors() * SECTOR_SIZE;
        let sample = match self.file_access() {
            Access::ReadOnly => Some(sample(&self.file, size)?),
            Access::ReadWrite => None,
        };
        Ok(ImageIdentity {
            host: fs::read_to_string("/proc/sys/kernel/random/boot_id")?,
            device,
            inode,
            size,
            sample,
        })
    }
}

fn sample(file: &File, size: u64) -> io::Result<u64> {
    let mut bytes = vec![0; (SAMPLES * SAMPLE).min(size) as usize];
    // A whole number, as the size is of sectors: one that is small is read whole.
    let length = bytes.len() / SAMPLES as usize;
    for (number, place) in bytes.chunks_exact_mut(length).enumerate() {
        let last = size - place.len() as u64;
        let at = u128::from(last) * number as u128 / u128::from(SAMPLES - 1);
        file.read_exact_at(place, at as u64)?;
    }
    Ok(XxHash3_64::oneshot(&bytes))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;

    const SIZE: usize = 3 << 20;

    fn file(size: usize, last: u8) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        let mut contents = vec![0; size];
        contents[size - 1] = last;
        file.write_all(&contents).unwrap();
        file
    }

    fn identity(file: &NamedTempFile, access: Access) -> ImageIdentity {
        Image::unclaimed(file.path(), access)
            .unwrap()
            .identity()
            .unwrap()
    }

    fn difference(
        access: Access,
        here: &NamedTempFile,
        there: &NamedTempFile,
    ) -> Option<&'static str> {
        identity(here, access).difference(&identity(there, access))
    }

    #[test]
    fn an_image_that_nobody_writes_is_known_by_its_contents() {
        let image = file(SIZE, 1);

        let of_read_only = |there: &NamedTempFile| difference(Access::ReadOnly, &image, there);

        assert_eq!(of_read_only(&image), None);
        assert_eq!(of_read_only(&file(SIZE, 1)), None);
        assert_eq!(
            of_read_only(&file(SIZE, 2)),
            Some("has other contents than the source's")
        );
        assert_eq!(
            of_read_only(&file(SIZE + 512, 1)),
            Some("has another size than the source's")
        );
    }

    #[test]
    fn an_image_that_the_guest_writes_is_known_by_its_file_where_hosts_are_the_same() {
        let (image, copy) = (file(512, 1), file(512, 1));
        let mut elsewhere = identity(&copy, Access::ReadWrite);
        elsewhere.host = "another boot".into();

        let here = identity(&image, Access::ReadWrite);

        assert_eq!(here.difference(&here), None);
        assert_eq!(
            difference(Access::ReadWrite, &image, &copy),
            Some("is another file than the source's, which the guest writes")
        );
        assert_eq!(here.difference(&elsewhere), None);
    }
}
