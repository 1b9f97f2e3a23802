//! A Linux guest at work that goes on in another machine.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::kvm::KvmHypervisor;
use libtest_mimic::{Failed, Trial};
use stream::Compression;
use vmm::config::{MachineConfig, MemorySize};
use vmm::console::{Console, ConsoleConfig};
use vmm::machine::snapshot::{self, Progress, SavedMachine};
use vmm::machine::{Ending, Machine};

/// What a test comes to.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// No guest here takes longer, whatever else the machine does.
const LIMIT: Duration = Duration::from_secs(200);
const THREADS: NonZeroUsize = NonZeroUsize::new(2).unwrap();

pub fn tests() -> Vec<Trial> {
    vec![Trial::test(
        "a_guest_at_work_goes_on_in_another_machine",
        || goes_on_in_another_machine().map_err(|e| Failed::from(e.to_string())),
    )]
}

/// Each machine writes a snapshot while its guest runs, every other one a delta on the snapshot that it came from, and
/// ends; the next one takes the guest up from it.
fn goes_on_in_another_machine() -> Result<()> {
    let hypervisor = KvmHypervisor::open(KvmHypervisor::DEFAULT_PATH.as_ref())?;
    let moves = moves()?;
    let mut path = PathBuf::from("console-0");
    let mut console = open(&path)?;
    let config = config("tag-workload", 4);
    let mut machine = Machine::new(&hypervisor, &config, &mut console)?;
    for number in 1..=moves {
        run_until(&mut machine, &path, 1)?;
        let file = PathBuf::from(format!("snapshot-{number}"));
        let base = PathBuf::from(format!("snapshot-{}", number - 1));
        let base = (number % 2 == 0)
            .then(|| snapshot::open(&base, &[]))
            .transpose()?;
        let options = snapshot::Options {
            config: &config,
            base: base.as_ref(),
            compression: Compression::default(),
            progress: &Progress::default(),
        };
        let report = machine.snapshot(&file, &options)?;
        println!(
            "snapshot {number}: {} KiB, {} rounds, {:?}, the guest stood still for {:?}",
            report.bytes >> 10,
            report.rounds,
            report.total,
            report.blackout
        );
        drop((machine, console));

        let begun = Instant::now();
        let snapshot = snapshot::open(&file, &[])?;
        let saved = SavedMachine::read(&snapshot)?;
        path = PathBuf::from(format!("console-{number}"));
        console = open(&path)?;
        machine = Machine::restored(
            &hypervisor,
            &saved.config,
            &saved.state,
            &mut console,
            |pages| Ok(stream::restore(&snapshot, pages, THREADS)?),
        )?;
        println!("restored in {:?}", begun.elapsed());
    }
    // By then it has been through all of its memory.
    run_until(&mut machine, &path, 3)
}

/// How often the guest changes its machine: $MOVES, or a few times.
fn moves() -> Result<usize> {
    match std::env::var("MOVES") {
        Ok(moves) => Ok(moves.parse()?),
        Err(_) => Ok(2),
    }
}

/// A Linux guest that runs `command`.
pub fn config(command: &str, cpus: u32) -> MachineConfig {
    let lab = std::env::var("LAB").unwrap_or_else(|_| "/lab".into());
    let kernel = Path::new(&lab).join("kernels/trixie");
    MachineConfig {
        kernel: Some(kernel.join("Image")),
        initrd: Some(kernel.join("initrd.cpio")),
        cmdline: format!("console=ttyS0 quiet -- {command}"),
        cpus,
        memory: MemorySize(256 << 20),
        no_reboot: true,
        ..MachineConfig::default()
    }
}

/// The console of a machine, in a file.
pub fn open(path: &Path) -> Result<Console> {
    Ok(Console::open(&ConsoleConfig::File(path.into()))?)
}

/// Runs the guest until its workload has said so often that all was as it had written it; it goes on behind that. It ends
/// at the first difference.
pub fn run_until(machine: &mut Machine<KvmHypervisor>, console: &Path, lines: usize) -> Result<()> {
    let handle = machine.handle();
    let has_said_so = || {
        let so_far = fs::read_to_string(console).unwrap_or_default();
        so_far.matches(" 0 differences").count() >= lines
    };
    let ending = std::thread::scope(|scope| {
        scope.spawn(|| {
            let begun = Instant::now();
            while !has_said_so() && begun.elapsed() < LIMIT {
                std::thread::sleep(Duration::from_millis(50));
            }
            handle.interrupt();
        });
        machine.run()
    })?;
    match (ending, has_said_so()) {
        (Ending::Interrupted, true) => Ok(()),
        _ => {
            let so_far = fs::read_to_string(console)?;
            Err(format!("the guest ended ({ending:?}) or hangs; its console: {so_far}").into())
        }
    }
}
