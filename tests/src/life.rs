//! A Linux guest at work that goes on in another machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::kvm::KvmHypervisor;
use libtest_mimic::{Failed, Trial};
use mte::TagPage;
use vm_memory::{Bytes, GuestAddress};
use vmm::config::{MachineConfig, MemorySize};
use vmm::console::{Console, ConsoleConfig};
use vmm::layout::{PAGE_SIZE, RAM_START};
use vmm::machine::{Ending, Machine, MachineState};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// No guest here takes longer, whatever else the machine does.
const LIMIT: Duration = Duration::from_secs(200);
/// How often the guest changes its machine.
const MOVES: usize = 3;

pub fn tests() -> Vec<Trial> {
    vec![Trial::test(
        "a_guest_at_work_goes_on_in_another_machine",
        || goes_on_in_another_machine().map_err(|e| Failed::from(e.to_string())),
    )]
}

fn goes_on_in_another_machine() -> Result<()> {
    let hypervisor = KvmHypervisor::open(KvmHypervisor::DEFAULT_PATH.as_ref())?;
    let mut path = PathBuf::from("console-0");
    let mut console = open(&path)?;
    let mut machine = Machine::new(&hypervisor, &config(), &mut console)?;
    for number in 1..=MOVES {
        run_until(&mut machine, &path, " tags checked")?;
        let state = through_json(&machine.save()?)?;
        path = PathBuf::from(format!("console-{number}"));
        let mut next_console = open(&path)?;
        let next = Machine::restored(&hypervisor, &config(), &state, &mut next_console)?;
        copy_memory(&machine, &next)?;
        (machine, console) = (next, next_console);
    }
    let ending = machine.run()?;
    drop((machine, console));

    let text = fs::read_to_string(&path)?;
    assert_eq!(ending, Ending::Off);
    assert!(text.contains(" 0 differences"));
    assert!(text.contains("guest: exit 0"));
    Ok(())
}

fn config() -> MachineConfig {
    let lab = std::env::var("LAB").unwrap_or_else(|_| "/lab".into());
    let kernel = Path::new(&lab).join("kernels/trixie");
    MachineConfig {
        kernel: Some(kernel.join("Image")),
        initrd: Some(kernel.join("initrd.cpio")),
        cmdline: "console=ttyS0 quiet -- tag-workload --passes 8".into(),
        cpus: 2,
        memory: MemorySize(256 << 20),
        no_reboot: true,
        ..MachineConfig::default()
    }
}

fn open(path: &Path) -> Result<Console> {
    Ok(Console::open(&ConsoleConfig::File(path.into()))?)
}

/// Runs the guest until its console has a line more with `text`, and stops it there.
fn run_until(machine: &mut Machine<KvmHypervisor>, console: &Path, text: &str) -> Result<()> {
    let stop = machine.stop_handle();
    let ending = std::thread::scope(|scope| {
        scope.spawn(move || {
            let begun = Instant::now();
            let has_text = || fs::read_to_string(console).is_ok_and(|so_far| so_far.contains(text));
            while !has_text() && begun.elapsed() < LIMIT {
                std::thread::sleep(Duration::from_millis(50));
            }
            stop.stop();
        });
        machine.run()
    })?;
    let so_far = fs::read_to_string(console)?;
    match (ending, so_far.contains(text)) {
        (Ending::Asked, true) => Ok(()),
        _ => Err(format!("the guest ended ({ending:?}) or hangs; its console: {so_far}").into()),
    }
}

/// As a snapshot holds it.
fn through_json(state: &MachineState) -> Result<MachineState> {
    let text = serde_json::to_vec(state)?;
    let read: MachineState = serde_json::from_slice(&text)?;
    assert!(read == *state);
    Ok(read)
}

/// Gives a machine the memory of another, data and tags.
fn copy_memory(from: &Machine<KvmHypervisor>, to: &Machine<KvmHypervisor>) -> Result<()> {
    const PAGES: u64 = 256;
    let (source, target) = (from.memory(), to.memory());
    let (source_tags, target_tags) = (
        from.tags().ok_or("the guest has no tags")?,
        to.tags().ok_or("the guest has no tags")?,
    );
    let mut data = vec![0; (PAGES * PAGE_SIZE) as usize];
    let mut tags = vec![TagPage::ZERO; PAGES as usize];
    for range in source.populated(RAM_START..RAM_START + source.size()) {
        let range = range?;
        for ipa in range.clone().step_by(data.len()) {
            let length = (range.end - ipa).min(data.len() as u64);
            let (data, tags) = (
                &mut data[..length as usize],
                &mut tags[..(length / PAGE_SIZE) as usize],
            );
            source.ram().read_slice(data, GuestAddress(ipa))?;
            source_tags.read_populated(ipa, tags)?;
            target.ram().write_slice(data, GuestAddress(ipa))?;
            target_tags.write(ipa, tags)?;
        }
    }
    Ok(())
}
