//! KVM on arm64 as the hypervisor.
//!
//! [`KvmHypervisor`] opens `/dev/kvm` and asks it what it can do; [`KvmVmBuilder`], [`KvmVm`] and
//! [`KvmVcpu`] are the traits of this crate on KVM's VM and vCPU files. [`mte`](self::mte) has the
//! calls that kvm-ioctls lacks.

mod gic;
mod interrupter;
pub mod mte;
mod probe;
mod vcpu;
mod vm;

use std::io;
use std::path::Path;

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::Kvm;

pub use interrupter::KvmInterrupter;
pub use vcpu::KvmVcpu;
pub use vm::{KvmVm, KvmVmBuilder};

use crate::{Capabilities, Error, Hypervisor, Result};

/// KVM, open on this machine.
pub struct KvmHypervisor {
    kvm: Kvm,
    capabilities: Capabilities,
}

impl KvmHypervisor {
    /// Where KVM is found.
    pub const DEFAULT_PATH: &str = "/dev/kvm";

    /// Opens KVM at `path` and asks what it can do.
    ///
    /// # Errors
    /// [`Error::Open`] if it is not there or may not be used, [`Error::ApiVersion`] if it is
    /// another interface, [`Error::Host`] if it cannot make even an empty VM.
    pub fn open(path: &Path) -> Result<Self> {
        let kvm = open_kvm(path)?;
        interrupter::install_signal_handler()?;
        let capabilities = probe::capabilities(&kvm)?;
        Ok(Self { kvm, capabilities })
    }
}

fn open_kvm(path: &Path) -> Result<Kvm> {
    let c_path =
        std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| Error::Open {
            path: path.display().to_string(),
            source: e.into(),
            remedy: "the path has a zero byte in it",
        })?;
    let kvm = Kvm::new_with_path(c_path).map_err(|e| {
        let source = io::Error::from(e);
        Error::Open {
            path: path.display().to_string(),
            remedy: remedy(source.kind()),
            source,
        }
    })?;
    let found = kvm.get_api_version();
    if found < 0 {
        return Err(Error::Open {
            path: path.display().to_string(),
            source: io::ErrorKind::Unsupported.into(),
            remedy: "it is no KVM device",
        });
    }
    let needed = KVM_API_VERSION as i32;
    if found != needed {
        return Err(Error::ApiVersion {
            path: path.display().to_string(),
            found,
            needed,
        });
    }
    Ok(kvm)
}

fn remedy(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::NotFound => {
            "the kernel has no KVM or did not start at EL2: boot an arm64 host at EL2 with CONFIG_KVM, \
             or try the emulated host of `cargo xtask host`"
        }
        io::ErrorKind::PermissionDenied => {
            "join the group that owns it (usually `kvm`), or run as root"
        }
        _ => "is it a KVM device, and is its module loaded?",
    }
}

impl Hypervisor for KvmHypervisor {
    type VmBuilder = KvmVmBuilder;

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn new_vm(&self, ipa_bits: u8) -> Result<KvmVmBuilder> {
        if ipa_bits > self.capabilities.ipa_bits {
            return Err(Error::IpaBits {
                needed: ipa_bits,
                offered: self.capabilities.ipa_bits,
            });
        }
        KvmVmBuilder::new(&self.kvm, ipa_bits)
    }
}

/// The page size of this host's kernel, in bytes.
fn host_page_size() -> u64 {
    // SAFETY: a query without demands.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

/// Names the step of a host call that failed.
fn host_error(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |e| Error::Host {
        step,
        source: e.into(),
    }
}
