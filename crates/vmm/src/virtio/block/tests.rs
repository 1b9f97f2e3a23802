//! A driver's side of the disk: whole requests through real rings, a real thread and a real file.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use proptest::prelude::*;
use tempfile::{NamedTempFile, TempDir};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::virtio::testing::{
    BUFFERS, CountedInterrupt, DriverQueue, INDIRECT, NEXT, RAM_SIZE, RAM_START, WRITE, activation,
    ram, wait_until,
};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// Where a request's parts are in guest memory.
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
/// A status no device writes.
const UNANSWERED: u8 = 0xee;

const IMAGE_SECTORS: usize = 64;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

/// A disk at work, and its driver.
struct Driver {
    memory: Arc<GuestRam>,
    queues: [DriverQueue; 1],
    interrupt: Arc<CountedInterrupt>,
    kick: EventFd,
    disk: Block,
    image: NamedTempFile,
}

impl Driver {
    fn new(access: Access, features: u64) -> Self {
        let image = image_of(&pattern(IMAGE_SECTORS * 512));
        let disk = Block::new(
            "disk0",
            Image::open(image.path(), access).unwrap(),
            Serial::new("serial-0").unwrap(),
        );
        Driver::with_disk(image, disk, features)
    }

    fn with_disk(image: NamedTempFile, mut disk: Block, features: u64) -> Self {
        let memory = ram();
        let queues = [DriverQueue::new(&memory, 0, 256)];
        let interrupt = Arc::new(CountedInterrupt::default());
        let (activation, mut kicks) = activation(&memory, &queues, &interrupt, features);
        disk.activate(activation).unwrap();
        Driver {
            memory,
            queues,
            interrupt,
            kick: kicks.remove(0),
            disk,
            image,
        }
    }

    fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Whether the device has yet to see the last kick.
    fn is_kicked(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.kick.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: the call reads and writes one pollfd.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    }

    fn put_header(&self, request_type: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&request_type.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory
            .write_slice(&header, GuestAddress(HEADER))
            .unwrap();
        self.memory
            .write_obj(UNANSWERED, GuestAddress(STATUS))
            .unwrap();
    }

    /// Submits a chain and waits for its end; returns the status and the used length.
    fn submit(&mut self, buffers: &[(u64, u32, u16)]) -> (u8, u32) {
        let before = self.queues[0].used_index();
        self.queues[0].add(buffers);
        self.kick();
        wait_until("the request is used", || {
            self.queues[0].used_index() != before
        });
        let status = self.memory.read_obj(GuestAddress(STATUS)).unwrap();
        (status, self.queues[0].used(before).1)
    }

    /// A request whose data goes to the device.
    fn send(&mut self, request_type: u32, sector: u64, data: &[u8]) -> u8 {
        self.put_header(request_type, sector);
        self.memory.write_slice(data, GuestAddress(DATA)).unwrap();
        let buffers = [
            (HEADER, 16, 0),
            (DATA, data.len() as u32, 0),
            (STATUS, 1, WRITE),
        ];
        self.submit(&buffers).0
    }

    /// A request whose data comes from the device.
    fn receive(&mut self, request_type: u32, sector: u64, len: usize) -> (u8, u32, Vec<u8>) {
        self.put_header(request_type, sector);
        let (status, used) = self.submit(&[
            (HEADER, 16, 0),
            (DATA, len as u32, WRITE),
            (STATUS, 1, WRITE),
        ]);
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(DATA))
            .unwrap();
        (status, used, data)
    }

    fn flush(&mut self) -> u8 {
        self.put_header(VIRTIO_BLK_T_FLUSH, 0);
        self.submit(&[(HEADER, 16, 0), (STATUS, 1, WRITE)]).0
    }

    fn content(&self) -> Vec<u8> {
        fs::read(self.image.path()).unwrap()
    }

    fn is_dirty(&self, address: u64) -> bool {
        let region = self.memory.find_region(GuestAddress(address)).unwrap();
        region.bitmap().dirty_at((address - RAM_START) as usize)
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|index| (index / 512 * 7 + index) as u8)
        .collect()
}

fn image_of(content: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    file
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

fn refusal(path: &Path, access: Access) -> String {
    Image::open(path, access).unwrap_err().to_string()
}

#[test]
fn a_missing_image_is_refused_with_its_path() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("web.img");

    let message = refusal(&path, Access::ReadWrite);

    assert!(
        message.contains("web.img") && message.contains("no such file"),
        "{message}"
    );
}

#[test]
fn a_directory_is_refused_as_an_image_for_either_access() {
    let folder = TempDir::new().unwrap();

    for access in [Access::ReadOnly, Access::ReadWrite] {
        let message = refusal(folder.path(), access);
        assert!(message.contains("it is a directory"), "{message}");
    }
}

#[test]
fn a_character_device_is_refused_as_an_image() {
    let message = refusal(Path::new("/dev/null"), Access::ReadWrite);

    assert!(message.contains("it is a character device"), "{message}");
}

#[test]
fn an_empty_image_is_refused() {
    let image = image_of(&[]);

    let message = refusal(image.path(), Access::ReadOnly);

    assert!(message.contains("it is empty"), "{message}");
}

#[test]
fn an_image_that_is_no_multiple_of_512_bytes_is_refused_with_its_size() {
    let image = image_of(&[0; 1000]);

    let message = refusal(image.path(), Access::ReadWrite);

    assert!(
        message.contains("1000 bytes is not a multiple of 512 bytes"),
        "{message}"
    );
}

#[test]
fn an_image_without_permission_is_refused_with_the_way_out() {
    let image = image_of(&[0; 512]);
    fs::set_permissions(image.path(), fs::Permissions::from_mode(0o400)).unwrap();
    let path = image.path().to_owned();

    // Root may open anything. As another user, on a thread of its own, it may not.
    let as_nobody = thread::spawn(move || {
        // SAFETY: the call takes a number and changes nothing but this thread's file system identity.
        unsafe { libc::setfsuid(65534) };
        refusal(&path, Access::ReadWrite)
    });
    let message = as_nobody.join().unwrap();

    assert!(message.contains("permission denied"), "{message}");
    assert!(message.contains("attach the image read-only"), "{message}");
}

#[test]
fn an_image_in_use_for_writing_is_refused_to_writers_and_readers() {
    let image = image_of(&[0; 512]);
    let _writer = Image::open(image.path(), Access::ReadWrite).unwrap();

    for access in [Access::ReadOnly, Access::ReadWrite] {
        let message = refusal(image.path(), access);
        assert!(message.contains("another process"), "{message}");
    }
}

#[test]
fn an_image_is_shared_by_readers_and_refused_to_a_writer_meanwhile() {
    let image = image_of(&[0; 512]);
    let reader = Image::open(image.path(), Access::ReadOnly).unwrap();
    let second = Image::open(image.path(), Access::ReadOnly).unwrap();

    let message = refusal(image.path(), Access::ReadWrite);

    assert!(message.contains("holds a lock on it"), "{message}");
    drop((reader, second));
    Image::open(image.path(), Access::ReadWrite).unwrap();
}

#[test]
fn a_refused_image_is_not_left_locked() {
    let image = image_of(&[0; 512]);
    let reader = Image::open(image.path(), Access::ReadOnly).unwrap();
    refusal(image.path(), Access::ReadWrite);

    Image::open(image.path(), Access::ReadOnly).unwrap();

    drop(reader);
}

#[test]
fn an_image_goes_from_one_machine_to_another_and_is_never_both_ones() {
    let image = image_of(&[0; 512]);
    let source = Image::open(image.path(), Access::ReadWrite).unwrap();
    let destination = Image::unclaimed(image.path(), Access::ReadWrite).unwrap();

    let early = destination.claim().unwrap_err().to_string();
    source.release().unwrap();
    destination.claim().unwrap();
    let late = source.claim().unwrap_err().to_string();

    let name = image.path().to_str().unwrap();
    assert!(
        early.contains(name) && early.contains("holds a lock"),
        "{early}"
    );
    assert!(late.contains("holds a lock"), "{late}");
    assert!(destination.is_claimed() && !source.is_claimed());
}

#[test]
fn an_image_comes_back_when_the_other_machine_did_not_claim_it() {
    let image = image_of(&[0; 512]);
    let source = Image::open(image.path(), Access::ReadWrite).unwrap();
    let destination = Image::unclaimed(image.path(), Access::ReadWrite).unwrap();

    source.release().unwrap();
    source.claim().unwrap();

    assert!(matches!(destination.claim(), Err(DiskError::Locked { .. })));
    assert!(source.is_claimed());
}

#[test]
fn a_claim_that_failed_leaves_no_lock() {
    let image = image_of(&[0; 512]);
    let source = Image::open(image.path(), Access::ReadWrite).unwrap();
    let destination = Image::unclaimed(image.path(), Access::ReadWrite).unwrap();
    destination.claim().unwrap_err();

    drop(source);

    Image::open(image.path(), Access::ReadWrite).unwrap();
}

#[test]
fn an_image_that_grew_before_it_was_claimed_is_refused_with_both_sizes() {
    let image = image_of(&[0; 512]);
    let destination = Image::unclaimed(image.path(), Access::ReadWrite).unwrap();
    image.as_file().set_len(1024).unwrap();

    let refusal = destination.claim().unwrap_err().to_string();

    assert!(
        refusal.contains("had 512 bytes") && refusal.contains("has 1024 now"),
        "{refusal}"
    );
    Image::open(image.path(), Access::ReadWrite).unwrap();
}

#[test]
fn an_image_that_qemu_writes_to_is_refused_to_a_reader() {
    let image = image_of(&[0; 512]);
    let qemu = File::open(image.path()).unwrap();
    // QEMU locks byte 101 while it may write (RAW_LOCK_PERM_BASE + BLK_PERM_WRITE's bit).
    let flock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 101,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the call reads one flock.
    let locked = unsafe { libc::fcntl(qemu.as_raw_fd(), libc::F_OFD_SETLK, &raw const flock) };
    assert_eq!(locked, 0);

    let message = refusal(image.path(), Access::ReadOnly);

    assert!(message.contains("holds a lock on it"), "{message}");
}

#[test]
fn a_serial_longer_than_20_characters_is_refused() {
    let message = Serial::new("a-serial-of-21-letter")
        .unwrap_err()
        .to_string();

    assert!(message.contains("at most 20"), "{message}");
}

#[test]
fn a_writable_disk_offers_discard_and_write_zeroes() {
    let driver = Driver::new(Access::ReadWrite, 0);

    let features = driver.disk.features();

    assert_ne!(features & 1 << VIRTIO_BLK_F_DISCARD, 0);
    assert_ne!(features & 1 << VIRTIO_BLK_F_WRITE_ZEROES, 0);
    assert_eq!(features & 1 << VIRTIO_BLK_F_RO, 0);
}

#[test]
fn a_read_only_disk_says_so_and_offers_no_change() {
    let driver = Driver::new(Access::ReadOnly, 0);

    let features = driver.disk.features();

    assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(features & 1 << VIRTIO_BLK_F_DISCARD, 0);
    assert_eq!(features & 1 << VIRTIO_BLK_F_WRITE_ZEROES, 0);
}

#[test]
fn the_configuration_holds_the_capacity_and_reads_zero_past_its_end() {
    let driver = Driver::new(Access::ReadWrite, 0);
    let mut config = [0xff; 80];

    driver.disk.read_config(0, &mut config);

    assert_eq!(config[..8], (IMAGE_SECTORS as u64).to_le_bytes());
    assert_eq!(config[20..24], 512_u32.to_le_bytes());
    assert_eq!(config[CONFIG_LEN..], [0; 80 - CONFIG_LEN]);
}

#[test]
fn the_configuration_far_past_its_end_reads_zero() {
    let driver = Driver::new(Access::ReadWrite, 0);
    let mut byte = [0xff];

    driver.disk.read_config(u64::MAX, &mut byte);

    assert_eq!(byte, [0]);
}

#[test]
fn a_read_brings_the_image_into_guest_memory_and_marks_it_dirty() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);

    let (status, used, data) = driver.receive(VIRTIO_BLK_T_IN, 3, 8192);

    assert_eq!((status, used), (OK, 8193));
    assert_eq!(data, driver.content()[3 * 512..][..8192]);
    assert!(driver.is_dirty(DATA) && driver.is_dirty(DATA + 4096) && driver.is_dirty(STATUS));
    assert!(!driver.is_dirty(DATA + 8192));
}

#[test]
fn a_write_arrives_in_the_image_and_reads_back() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    let data = vec![0xa5; 1024];

    let status = driver.send(VIRTIO_BLK_T_OUT, 5, &data);

    assert_eq!(status, OK);
    let mut expected = pattern(IMAGE_SECTORS * 512);
    expected[5 * 512..][..1024].fill(0xa5);
    assert_eq!(driver.content(), expected);
    assert_eq!(driver.receive(VIRTIO_BLK_T_IN, 5, 1024).2, data);
}

#[test]
fn a_request_in_odd_pieces_is_put_together() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.put_header(VIRTIO_BLK_T_IN, 1);

    let (status, used) = driver.submit(&[
        (HEADER, 7, 0),
        (HEADER + 7, 9, 0),
        (DATA, 1, WRITE),
        (DATA + 1, 510, WRITE),
        (DATA + 511, 513, WRITE),
        (STATUS, 1, WRITE),
    ]);

    let mut data = vec![0; 1024];
    driver
        .memory
        .read_slice(&mut data, GuestAddress(DATA))
        .unwrap();
    assert_eq!((status, used), (OK, 1025));
    assert_eq!(data, driver.content()[512..][..1024]);
}

#[test]
fn the_status_may_share_a_buffer_with_the_data() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.put_header(VIRTIO_BLK_T_IN, 2);
    driver
        .memory
        .write_obj(UNANSWERED, GuestAddress(DATA + 512))
        .unwrap();

    let (_, used) = driver.submit(&[(HEADER, 16, 0), (DATA, 513, WRITE)]);

    let status: u8 = driver.memory.read_obj(GuestAddress(DATA + 512)).unwrap();
    assert_eq!((status, used), (OK, 513));
}

#[test]
fn a_request_in_an_indirect_table_is_served() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.put_header(VIRTIO_BLK_T_IN, 4);
    let table = BUFFERS + 0x200;
    let queue = &mut driver.queues[0];
    queue.write_descriptor(table, 0, (HEADER, 16, NEXT, 1));
    queue.write_descriptor(table, 1, (DATA, 512, NEXT | WRITE, 2));
    queue.write_descriptor(table, 2, (STATUS, 1, WRITE, 0));

    let (status, used) = driver.submit(&[(table, 48, INDIRECT)]);

    assert_eq!((status, used), (OK, 513));
}

#[test]
fn a_batch_of_requests_is_served_in_order() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.put_header(VIRTIO_BLK_T_IN, 0);
    let heads: Vec<u32> = (0..50)
        .map(|index| {
            let data = DATA + 512 * index;
            let request = [(HEADER, 16, 0), (data, 512, WRITE), (STATUS, 1, WRITE)];
            driver.queues[0].add(&request).into()
        })
        .collect();

    driver.kick();
    wait_until("all are used", || driver.queues[0].used_index() == 50);

    let used: Vec<u32> = (0..50)
        .map(|index| driver.queues[0].used(index).0)
        .collect();
    assert_eq!(used, heads);
    wait_until("the driver is interrupted", || {
        driver.interrupt.used.load(Ordering::SeqCst) > 0
    });
}

#[test]
fn more_work_than_fits_in_a_turn_is_done_whole() {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = Block::new(
        "disk0",
        Image::open(image.path(), Access::ReadOnly).unwrap(),
        Serial::default(),
    );
    let mut driver = Driver::with_disk(image, disk, FLUSH);
    driver.put_header(VIRTIO_BLK_T_IN, 0);
    let table = BUFFERS + 0x200;
    let queue = &mut driver.queues[0];
    queue.write_descriptor(table, 0, (HEADER, 16, NEXT, 1));
    queue.write_descriptor(table, 1, (DATA, 1 << 20, NEXT | WRITE, 2));
    queue.write_descriptor(table, 2, (STATUS, 1, WRITE, 0));
    (0..250).for_each(|_| {
        queue.add(&[(table, 48, INDIRECT)]);
    });

    driver.kick();

    wait_until("all are used", || driver.queues[0].used_index() == 250);
}

#[test]
fn the_serial_is_read_with_zeroes_behind_it() {
    let mut driver = Driver::new(Access::ReadOnly, 0);

    let (status, used, id) = driver.receive(VIRTIO_BLK_T_GET_ID, 0, 20);

    assert_eq!((status, used), (OK, 21));
    assert_eq!(id, b"serial-0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_serial_into_too_short_a_buffer_is_an_error() {
    let mut driver = Driver::new(Access::ReadOnly, 0);

    let (status, ..) = driver.receive(VIRTIO_BLK_T_GET_ID, 0, 19);

    assert_eq!(status, IOERR);
}

#[test]
fn a_range_written_with_zeroes_reads_as_zeroes_with_and_without_unmap() {
    for flags in [0, 1] {
        let mut driver = Driver::new(Access::ReadWrite, FLUSH);

        let status = driver.send(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(3, 9, flags));

        let mut expected = pattern(IMAGE_SECTORS * 512);
        expected[3 * 512..12 * 512].fill(0);
        assert_eq!(status, OK);
        assert_eq!(driver.content(), expected);
    }
}

#[test]
fn zeroes_are_written_out_where_the_file_system_cannot_help() {
    let image = image_of(&pattern(512 * 1024));
    let opened = image.reopen().unwrap();

    image::overwrite_with_zeroes(&opened, 1024, 200 * 1024).unwrap();

    let mut expected = pattern(512 * 1024);
    expected[1024..][..200 * 1024].fill(0);
    assert_eq!(fs::read(image.path()).unwrap(), expected);
}

#[test]
fn discarded_ranges_give_their_space_back_and_the_rest_stays() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.image.as_file().sync_all().unwrap();
    let before = fs::metadata(driver.image.path()).unwrap();

    let ranges = [range(8, 8, 0), range(32, 16, 0)].concat();
    let status = driver.send(VIRTIO_BLK_T_DISCARD, 0, &ranges);

    let after = fs::metadata(driver.image.path()).unwrap();
    let mut expected = pattern(IMAGE_SECTORS * 512);
    expected[8 * 512..16 * 512].fill(0);
    expected[32 * 512..48 * 512].fill(0);
    assert_eq!(status, OK);
    assert_eq!(driver.content(), expected);
    assert_eq!(after.len(), before.len());
    assert!(after.blocks() < before.blocks());
}

#[test]
fn a_flush_succeeds_on_writable_and_read_only_disks() {
    for access in [Access::ReadOnly, Access::ReadWrite] {
        assert_eq!(Driver::new(access, FLUSH).flush(), OK);
    }
}

/// `struct cachestat` of the kernel.
#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Pages of `file` that are not on the medium yet; zero where the kernel (before 6.5) cannot tell.
fn dirty_pages(file: &File) -> u64 {
    let whole_file = [0_u64, 0];
    let mut stat = CacheStat::default();
    const SYS_CACHESTAT: libc::c_long = 451;
    // SAFETY: the call reads a range of two u64 and writes five u64.
    unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            whole_file.as_ptr(),
            &raw mut stat,
            0,
        );
    }
    stat.dirty + stat.writeback
}

#[test]
fn a_write_without_a_flush_feature_is_on_the_medium_when_it_is_answered() {
    let mut driver = Driver::new(Access::ReadWrite, 0);

    let status = driver.send(VIRTIO_BLK_T_OUT, 0, &[1; 4096]);

    assert_eq!((status, dirty_pages(driver.image.as_file())), (OK, 0));
}

#[test]
fn a_flush_brings_earlier_writes_to_the_medium() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.send(VIRTIO_BLK_T_OUT, 0, &[1; 4096]);

    let status = driver.flush();

    assert_eq!((status, dirty_pages(driver.image.as_file())), (OK, 0));
}

#[test]
fn the_end_of_a_disk_brings_its_writes_to_the_medium() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.send(VIRTIO_BLK_T_OUT, 0, &[1; 4096]);

    drop(driver.disk);

    assert_eq!(dirty_pages(driver.image.as_file()), 0);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let mut driver = Driver::new(Access::ReadOnly, FLUSH);

    let statuses = [
        driver.send(VIRTIO_BLK_T_OUT, 0, &[1; 512]),
        driver.send(VIRTIO_BLK_T_DISCARD, 0, &range(0, 8, 0)),
        driver.send(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 8, 1)),
    ];

    assert_eq!(statuses, [IOERR; 3]);
    assert_eq!(driver.content(), pattern(IMAGE_SECTORS * 512));
}

#[test]
fn requests_past_the_end_fail_and_leave_the_image_as_it_is() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    let end = IMAGE_SECTORS as u64;

    let statuses = [
        driver.send(VIRTIO_BLK_T_OUT, end, &[1; 512]),
        driver.send(VIRTIO_BLK_T_OUT, end - 1, &[1; 1024]),
        driver.send(VIRTIO_BLK_T_OUT, u64::MAX, &[1; 512]),
        driver.send(VIRTIO_BLK_T_OUT, u64::MAX / 512, &[1; 512]),
        driver.receive(VIRTIO_BLK_T_IN, end - 1, 1024).0,
        driver.send(VIRTIO_BLK_T_DISCARD, 0, &range(end - 1, 2, 0)),
        driver.send(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(u64::MAX, 1, 0)),
    ];

    assert_eq!(statuses, [IOERR; 7]);
    assert_eq!(driver.content(), pattern(IMAGE_SECTORS * 512));
}

#[test]
fn data_that_is_not_whole_sectors_is_an_error() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);

    let statuses = [
        driver.send(VIRTIO_BLK_T_OUT, 0, &[1; 100]),
        driver.send(VIRTIO_BLK_T_OUT, 0, &[]),
        driver.receive(VIRTIO_BLK_T_IN, 0, 513).0,
    ];

    assert_eq!(statuses, [IOERR; 3]);
    assert_eq!(driver.content(), pattern(IMAGE_SECTORS * 512));
}

#[test]
fn unknown_types_and_flags_are_unsupported() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);

    let statuses = [
        driver.send(2, 0, &[]),
        driver.send(u32::MAX, 0, &[0; 512]),
        driver.send(VIRTIO_BLK_T_DISCARD, 0, &range(0, 8, 1)),
        driver.send(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 8, 2)),
    ];

    assert_eq!(statuses, [UNSUPP; 4]);
    assert_eq!(driver.content(), pattern(IMAGE_SECTORS * 512));
}

#[test]
fn ranges_that_are_too_many_too_long_or_cut_are_errors() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    let too_many = range(0, 1, 0).repeat(request::DISCARD.segments as usize + 1);

    let statuses = [
        driver.send(VIRTIO_BLK_T_DISCARD, 0, &too_many),
        driver.send(VIRTIO_BLK_T_DISCARD, 0, &range(0, 8, 0)[..15]),
        driver.send(VIRTIO_BLK_T_DISCARD, 0, &range(0, 0, 0)),
        driver.send(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, u32::MAX, 0)),
    ];

    assert_eq!(statuses, [IOERR; 4]);
    assert_eq!(driver.content(), pattern(IMAGE_SECTORS * 512));
}

#[test]
fn one_wrong_range_stops_the_request_before_any_range_is_changed() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);

    let ranges = [range(0, 8, 0), range(1 << 40, 8, 0)].concat();
    let status = driver.send(VIRTIO_BLK_T_DISCARD, 0, &ranges);

    assert_eq!(status, IOERR);
    assert_eq!(driver.content(), pattern(IMAGE_SECTORS * 512));
}

#[test]
fn a_short_header_is_answered_with_an_error() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.put_header(VIRTIO_BLK_T_IN, 0);

    let (status, used) = driver.submit(&[(HEADER, 15, 0), (STATUS, 1, WRITE)]);

    assert_eq!((status, used), (IOERR, 1));
}

#[test]
fn a_request_without_room_for_a_status_is_used_and_changes_nothing() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.put_header(VIRTIO_BLK_T_OUT, 0);

    let (status, used) = driver.submit(&[(HEADER, 16, 0), (DATA, 512, 0)]);

    assert_eq!((status, used), (UNANSWERED, 0));
    assert_eq!(driver.content(), pattern(IMAGE_SECTORS * 512));
}

#[test]
fn an_image_that_was_cut_behind_the_disks_back_fails_the_read() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.image.as_file().set_len(512).unwrap();

    let (status, used, _) = driver.receive(VIRTIO_BLK_T_IN, 0, 1024);

    assert_eq!((status, used), (IOERR, 0));
}

#[test]
fn a_buffer_outside_guest_memory_ends_the_device_until_its_reset() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.put_header(VIRTIO_BLK_T_IN, 0);
    let outside = RAM_START + RAM_SIZE as u64 - 256;

    driver.queues[0].add(&[(HEADER, 16, 0), (outside, 512, WRITE), (STATUS, 1, WRITE)]);
    driver.kick();

    wait_until("the device asks for a reset", || {
        driver.interrupt.needs_reset.load(Ordering::SeqCst)
    });
    assert_eq!(driver.queues[0].used_index(), 0);
}

#[test]
fn a_readable_buffer_behind_a_writable_one_ends_the_device_until_its_reset() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.put_header(VIRTIO_BLK_T_OUT, 0);

    driver.queues[0].add(&[(HEADER, 16, 0), (STATUS, 1, WRITE), (DATA, 512, 0)]);
    driver.kick();

    wait_until("the device asks for a reset", || {
        driver.interrupt.needs_reset.load(Ordering::SeqCst)
    });
    assert_eq!(driver.content(), pattern(IMAGE_SECTORS * 512));
}

#[test]
fn a_disk_goes_on_after_a_pause_exactly_where_it_stopped() {
    let mut driver = Driver::new(Access::ReadWrite, FLUSH);
    driver.send(VIRTIO_BLK_T_OUT, 0, &[1; 512]);
    let queues = driver.disk.deactivate().unwrap();
    driver.put_header(VIRTIO_BLK_T_IN, 0);
    driver.queues[0].add(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    let (mut again, _kicks) = activation(&driver.memory, &driver.queues, &driver.interrupt, FLUSH);
    again.queues = queues;

    driver.disk.activate(again).unwrap();

    wait_until("the request made in the pause is used", || {
        driver.queues[0].used_index() == 2
    });
    let mut data = [0; 512];
    driver
        .memory
        .read_slice(&mut data, GuestAddress(DATA))
        .unwrap();
    assert_eq!(data, [1; 512]);
}

#[test]
fn a_disk_that_is_not_active_gives_no_queues_back() {
    let mut driver = Driver::new(Access::ReadOnly, 0);
    driver.disk.deactivate().unwrap();

    assert!(driver.disk.deactivate().is_none());
}

/// What a random request asks for, and where.
#[derive(Clone, Debug)]
enum Request {
    Read {
        sector: u64,
        len: usize,
    },
    Write {
        sector: u64,
        len: usize,
        byte: u8,
    },
    Change {
        request_type: u32,
        sector: u64,
        sectors: u32,
    },
}

fn any_sector() -> impl Strategy<Value = u64> {
    let end = IMAGE_SECTORS as u64;
    prop_oneof![8 => 0..end, 2 => end - 2..end + 2, 1 => any::<u64>()]
}

fn any_request() -> impl Strategy<Value = Request> {
    let len = prop_oneof![4 => (1..16_usize).prop_map(|sectors| sectors * 512), 1 => 0..2000_usize];
    let changes = prop_oneof![Just(VIRTIO_BLK_T_WRITE_ZEROES), Just(VIRTIO_BLK_T_DISCARD)];
    prop_oneof![
        (any_sector(), len.clone()).prop_map(|(sector, len)| Request::Read { sector, len }),
        (any_sector(), len, any::<u8>()).prop_map(|(sector, len, byte)| Request::Write {
            sector,
            len,
            byte
        }),
        (changes, any_sector(), 0..20_u32).prop_map(|(request_type, sector, sectors)| {
            Request::Change {
                request_type,
                sector,
                sectors,
            }
        }),
    ]
}

/// The bytes of a valid request's range.
fn valid_range(model: &[u8], sector: u64, len: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(sector).ok()?.checked_mul(512)?;
    let end = start.checked_add(len)?;
    (len > 0 && len.is_multiple_of(512) && end <= model.len()).then_some(start..end)
}

/// A disk in a few lines: the status and, for a read, the data.
fn expect(model: &mut [u8], request: &Request) -> (u8, Option<Vec<u8>>) {
    let (sector, len) = match *request {
        Request::Read { sector, len } | Request::Write { sector, len, .. } => (sector, len),
        Request::Change {
            sector, sectors, ..
        } => (sector, sectors as usize * 512),
    };
    let Some(range) = valid_range(model, sector, len) else {
        return (IOERR, None);
    };
    match *request {
        Request::Read { .. } => return (OK, Some(model[range].to_vec())),
        Request::Write { byte, .. } => model[range].fill(byte),
        Request::Change { .. } => model[range].fill(0),
    }
    (OK, None)
}

fn perform(driver: &mut Driver, request: &Request) -> (u8, Option<Vec<u8>>) {
    match *request {
        Request::Read { sector, len } => {
            let (status, _, data) = driver.receive(VIRTIO_BLK_T_IN, sector, len);
            (status, (status == OK).then_some(data))
        }
        Request::Write { sector, len, byte } => (
            driver.send(VIRTIO_BLK_T_OUT, sector, &vec![byte; len]),
            None,
        ),
        Request::Change {
            request_type,
            sector,
            sectors,
        } => (
            driver.send(request_type, 0, &range(sector, sectors, 0)),
            None,
        ),
    }
}

/// A descriptor with anything in it, though rather something that works.
fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        6 => (0..16_u64).prop_map(|part| BUFFERS + part * 0x100),
        2 => Just(RAM_START + RAM_SIZE as u64 - 100),
        1 => RAM_START..RAM_START + 0x3000,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => prop_oneof![Just(0_u32), Just(1), Just(16), Just(48), Just(512), Just(513)],
        1 => 0..0x2000_u32,
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![8 => 0..4_u16, 1 => 0..8_u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..8_u16, 1 => any::<u16>()];
    (address, len, flags, next)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_sequence_of_requests_does_what_a_model_does(
        requests in prop::collection::vec(any_request(), 1..40)
    ) {
        let mut driver = Driver::new(Access::ReadWrite, FLUSH);
        let mut model = pattern(IMAGE_SECTORS * 512);

        for request in &requests {
            prop_assert_eq!(perform(&mut driver, request), expect(&mut model, request));
        }

        prop_assert_eq!(driver.content(), model);
    }

    #[test]
    fn any_descriptors_are_answered_or_end_the_device_and_stay_within_the_image(
        descriptors in prop::collection::vec(any_descriptor(), 8),
        headers in prop::collection::vec((0..16_u32, any_sector()), 16),
        heads in prop::collection::vec(prop_oneof![9 => 0..8_u16, 1 => any::<u16>()], 1..8),
    ) {
        let mut driver = Driver::new(Access::ReadWrite, FLUSH);
        for (part, &(request_type, sector)) in (0..).zip(&headers) {
            let at = GuestAddress(BUFFERS + part * 0x100);
            driver.memory.write_obj(u64::from(request_type).to_le(), at).unwrap();
            driver.memory.write_obj(sector.to_le(), GuestAddress(at.0 + 8)).unwrap();
        }
        for (index, &descriptor) in (0..).zip(&descriptors) {
            let table = driver.queues[0].descriptors();
            driver.queues[0].write_descriptor(table, index, descriptor);
        }
        for head in heads {
            driver.queues[0].make_available(head);
        }

        driver.kick();

        // Descriptors may lead the device over its own rings, so the used index says nothing.
        wait_until("the kick is taken or the device has ended", || {
            !driver.is_kicked() || driver.interrupt.needs_reset.load(Ordering::SeqCst)
        });
        prop_assert!(driver.disk.deactivate().is_some());
        prop_assert_eq!(driver.content().len(), IMAGE_SECTORS * 512);
    }

    #[test]
    fn no_request_changes_a_read_only_image(
        requests in prop::collection::vec(any_request(), 1..20)
    ) {
        let mut driver = Driver::new(Access::ReadOnly, FLUSH);

        for request in &requests {
            perform(&mut driver, request);
        }

        prop_assert_eq!(driver.content(), pattern(IMAGE_SECTORS * 512));
    }
}
