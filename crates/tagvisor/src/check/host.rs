//! The examination of an arm64 host.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use engine::kvm::KvmHypervisor;
use engine::{Capabilities, Hypervisor, Vm};
use mte::{MteLevel, Tag, TagPage};
use vmm::layout::{self, PAGE_SIZE, RAM_START};
use vmm::memory::file;
use vmm::memory::tags::{AliasTags, CopiedTags, TagStore};
use vmm::memory::{GuestMemory, MemoryPlan, TagAccess, TagMethod};

use super::{Finding, Report};

pub fn examine(kvm: &Path) -> Report {
    let hypervisor = match KvmHypervisor::open(kvm) {
        Ok(hypervisor) => hypervisor,
        Err(e) => {
            let finding = Finding {
                id: "kvm",
                title: "KVM",
                available: false,
                value: e.to_string(),
                meaning: "Nothing can run without it.",
            };
            return Report {
                mte_guests: false,
                findings: vec![finding],
            };
        }
    };
    let host = hypervisor.capabilities();
    let tags = tag_access(&hypervisor);
    Report {
        mte_guests: host.mte.is_some() && host.gic_v3 && tags.available,
        findings: vec![
            kvm_itself(kvm, host),
            gic(host),
            mte_for_guests(host),
            tags,
            transparent_huge_pages(),
            huge_pages(host),
            huge_pages_reserved(),
            minor_faults(),
            mte_for_programs(),
            cpu_features(host),
            tap(),
        ],
    }
}

fn kvm_itself(path: &Path, host: &Capabilities) -> Finding {
    Finding {
        id: "kvm",
        title: "KVM",
        available: true,
        value: format!(
            "{}: up to {} CPUs, {}-bit guest addresses",
            path.display(),
            host.max_vcpus.min(layout::MAX_VCPUS),
            host.ipa_bits
        ),
        meaning: "Machines can run.",
    }
}

fn gic(host: &Capabilities) -> Finding {
    Finding {
        id: "gic-v3",
        title: "Interrupt controller",
        available: host.gic_v3,
        value: if host.gic_v3 { "GICv3" } else { "no GICv3" }.into(),
        meaning: if host.gic_v3 {
            "Guests get a GICv3."
        } else {
            "Tagvisor has no other interrupt controller for its guests, so none can run. Every CPU with MTE comes with a GICv3."
        },
    }
}

fn mte_for_guests(host: &Capabilities) -> Finding {
    Finding {
        id: "mte",
        title: "MTE for guests",
        available: host.mte.is_some(),
        value: host
            .mte
            .map_or("none".into(), |mte| mte.features.to_string()),
        meaning: if host.mte.is_some() {
            "A guest with --mte on sees exactly this; the level cannot be lowered."
        } else {
            "Only --mte off works. It needs a CPU with MTE2 or later whose firmware sets tag storage aside, a kernel with \
             CONFIG_ARM64_MTE, and neither arm64.nomte nor kvm-arm.mode=protected on the kernel's command line."
        },
    }
}

/// Writes tags of guest memory in the way a machine here would, and reads them back by the kernel's copy.
fn tag_access(hypervisor: &KvmHypervisor) -> Finding {
    let finding = |available, value: String, meaning| Finding {
        id: "tag-access",
        title: "Tag access",
        available,
        value,
        meaning,
    };
    if hypervisor.capabilities().mte.is_none() {
        return finding(
            false,
            "none".into(),
            "There are no tags to reach without MTE for guests.",
        );
    }
    match try_tag_access(hypervisor) {
        Ok(TagMethod::Alias) => finding(
            true,
            "alias: a second mapping, written there and read back by KVM".into(),
            "Tags are read and written with LDG and STG, by many threads at once, with no system call. \
             Post-copy migration and clones are possible.",
        ),
        Ok(TagMethod::Ioctl) => finding(
            true,
            "ioctl: KVM_ARM_MTE_COPY_TAGS, written and read back".into(),
            "This kernel refuses shared memory to guests with MTE, so KVM copies their tags. Post-copy migration and clones \
             are not possible. Linux 6.2 and later do better.",
        ),
        Err(e) => finding(
            false,
            e.to_string(),
            "Tags written to guest memory did not come back. That is a fault of this host: no machine with MTE should run here.",
        ),
    }
}

fn try_tag_access(hypervisor: &KvmHypervisor) -> Result<TagMethod, Box<dyn std::error::Error>> {
    let plan = MemoryPlan::choose(hypervisor.capabilities(), true, TagAccess::Auto, false)?;
    let size = 4 * vmm::memory::host_page_size();
    let memory = Arc::new(GuestMemory::new(size, plan)?);
    // SAFETY: the VM never has a vCPU.
    let vm = Arc::new(unsafe { memory.new_vm(hypervisor, true) }?);

    let copied = CopiedTags::new(memory.clone(), vm.clone());
    let method = plan.tags.ok_or("no method was chosen")?;
    let written: Vec<TagPage> = (0..size / PAGE_SIZE)
        .map(|page| pattern(page as u8))
        .collect();
    match method {
        TagMethod::Alias => AliasTags::new(memory.clone())
            .ok_or("the CPU does not let programs use tags")?
            .write(RAM_START, &written)?,
        TagMethod::Ioctl => copied.write(RAM_START, &written)?,
    }
    let mut read = vec![TagPage::ZERO; written.len()];
    copied.read(RAM_START, &mut read)?;
    if read != written {
        return Err("tags read back differ from those written".into());
    }
    vm.delete_memslot(memory.memslot().slot)?;
    Ok(method)
}

/// Every tag, in another order on each page.
fn pattern(page: u8) -> TagPage {
    let mut tags = TagPage::ZERO;
    for granule in 0..=u8::MAX {
        tags.set(
            granule,
            Tag::from_low_bits(granule.wrapping_mul(7).wrapping_add(page)),
        );
    }
    tags
}

fn transparent_huge_pages() -> Finding {
    let result = file::of_transparent_huge_pages();
    Finding {
        id: "transparent-huge-pages",
        title: "Transparent huge pages",
        available: result.is_ok(),
        value: match &result {
            Ok(_) => "a tmpfs of them can be made".into(),
            Err(e) => e.to_string(),
        },
        meaning: if result.is_ok() {
            "Guest memory comes in pages of 2 MiB by itself: guests start and run faster."
        } else {
            "Guest memory comes in small pages, which is slower. Give Tagvisor CAP_SYS_ADMIN or set \
             /sys/kernel/mm/transparent_hugepage/shmem_enabled to advise."
        },
    }
}

fn huge_pages(host: &Capabilities) -> Finding {
    let available = host.mte.is_some_and(|mte| mte.huge_pages);
    Finding {
        id: "mte-huge-pages",
        title: "MTE with huge pages",
        available,
        value: if available { "accepted" } else { "refused" }.into(),
        meaning: if available {
            "--huge-pages works with --mte on, if huge pages are reserved."
        } else {
            "--huge-pages works with --mte off only. Linux 6.13 and later accept it with MTE."
        },
    }
}

fn huge_pages_reserved() -> Finding {
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap_or(0);
    Finding {
        id: "huge-pages",
        title: "Huge pages reserved",
        available: free != 0,
        value: format!("{free} of 2 MiB are free"),
        meaning: "Reserve them with `sysctl vm.nr_hugepages=N`; 512 are 1 GiB of guest memory.",
    }
}

fn minor_faults() -> Finding {
    let result = minor_faults_of_shared_memory();
    Finding {
        id: "userfaultfd-minor",
        title: "Minor faults",
        available: result.is_ok(),
        value: match &result {
            Ok(()) => "userfaultfd tells of them in shared memory".into(),
            Err(e) => format!("userfaultfd: {e}"),
        },
        meaning: if result.is_ok() {
            "Pages can come with their tags when they are touched: lazy restore and post-copy migration."
        } else {
            "Lazy restore and post-copy migration need it: Linux 5.14 or later with CONFIG_USERFAULTFD, and the right to use \
             it (CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd)."
        },
    }
}

/// Asks for a userfaultfd that tells of minor faults in shared memory (Linux
/// `Documentation/admin-guide/mm/userfaultfd.rst`).
fn minor_faults_of_shared_memory() -> io::Result<()> {
    #[repr(C)]
    struct UffdioApi {
        api: u64,
        features: u64,
        ioctls: u64,
    }
    const UFFD_API: u64 = 0xaa;
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;

    let uffd = userfaultfd()?;
    let mut api = UffdioApi {
        api: UFFD_API,
        features: UFFD_FEATURE_MINOR_SHMEM,
        ioctls: 0,
    };
    // SAFETY: the structure is the one that this request reads and writes.
    match unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API as _, &raw mut api) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A userfaultfd by the system call or, for those who may not make it, by the device (Linux 6.1 and later).
fn userfaultfd() -> io::Result<OwnedFd> {
    const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
    const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

    // SAFETY: makes a descriptor; no memory is involved.
    let by_call = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
    let by_call = i32::try_from(by_call).ok().filter(|fd| *fd >= 0);
    let refused = io::Error::last_os_error();
    let fd = by_call.or_else(|| {
        let device = fs::File::open("/dev/userfaultfd").ok()?;
        // SAFETY: makes a descriptor; no memory is involved.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, FLAGS) };
        (fd >= 0).then_some(fd)
    });
    // SAFETY: the descriptor was just made and nobody else has it.
    fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .ok_or(refused)
}

fn mte_for_programs() -> Finding {
    // SAFETY: a query without demands.
    let level = MteLevel::from_hwcap2(unsafe { libc::getauxval(libc::AT_HWCAP2) });
    Finding {
        id: "mte-programs",
        title: "MTE for programs",
        available: level.has_tagged_memory(),
        value: level.to_string(),
        meaning: "What programs of this host, Tagvisor among them, may use for their own memory.",
    }
}

fn cpu_features(host: &Capabilities) -> Finding {
    let features: Vec<&str> = [
        (host.sve, "SVE"),
        (host.pointer_authentication, "pointer authentication"),
        (host.pmu, "PMU"),
    ]
    .into_iter()
    .filter_map(|(has, name)| has.then_some(name))
    .collect();
    Finding {
        id: "cpu-features",
        title: "CPU features",
        available: !features.is_empty(),
        value: if features.is_empty() {
            "none of those that are optional".into()
        } else {
            features.join(", ")
        },
        meaning: if features.is_empty() {
            "Guests get a plain Armv8 CPU."
        } else {
            "Guests get all of them."
        },
    }
}

fn tap() -> Finding {
    let result = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    Finding {
        id: "tap",
        title: "Network interfaces",
        available: result.is_ok(),
        value: match &result {
            Ok(_) => "/dev/net/tun can be opened".into(),
            Err(e) => format!("/dev/net/tun: {e}"),
        },
        meaning: "--net needs it (`modprobe tun`), and a tap interface: `ip tuntap add dev NAME mode tap`.",
    }
}
