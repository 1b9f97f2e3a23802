//! The emulated Arm machine with the host in it: starts QEMU, gives the host its jobs, reads its
//! answers, and ends QEMU whatever happens.
//!
//! The host's root is a Debian tree over 9p, read-only, with a layer in memory over it. At `/lab`
//! it sees a folder that xtask has filled; `/lab/jobs` in it is writable and holds the orders and
//! what jobs leave behind. Two hosts see the same folder and are joined by two network cards each:
//! one for their scripts, and one by which scripts of one run commands on the other.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Error, Result, anyhow, bail};

use crate::command;
use crate::cpio::Archive;
use crate::interrupt;
use crate::kernel::Kernel;
use crate::ports::{self, Event, Sink};
use crate::terminal;

/// How long a host may take to its first order, even on a slow machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);
/// How often a wait looks at signals, the deadline and QEMU.
const TICK: Duration = Duration::from_millis(50);
/// The kernel's self-tests of its ciphers take half a second of emulation.
const COMMAND_LINE: &str =
    "console=ttyAMA0 quiet panic=-1 cryptomgr.notests initcall_blacklist=jent_mod_init";
/// The kernel's console, in the run's folder.
pub const CONSOLE_LOG: &str = "console.log";
const QEMU_LOG: &str = "qemu.log";
/// The networks between two hosts, and the third bytes of their addresses.
const CARDS: &[(&str, u32)] = &[("link", 7), ("agent", 8)];
/// That of the network between two hosts: a jumbo frame, as between hosts of one rack.
const MTU: u32 = 9000;

/// What machine to start.
pub struct Config<'a> {
    pub cpus: u32,
    /// In QEMU's words, such as `4G`.
    pub memory: &'a str,
    /// Whether time counts instructions.
    pub icount: bool,
    /// Words for the kernel's command line.
    pub kernel_args: &'a [String],
    pub qemu_args: &'a [String],
    pub kernel: &'a Kernel,
    /// The archive of [`crate::kernel::host_archive`].
    pub initrd: Vec<u8>,
    /// The Debian tree that is the host's root.
    pub tree: &'a Path,
    /// Where the machine's sockets and logs are to be.
    pub folder: &'a Path,
    /// What the host sees at `/lab`.
    pub lab: &'a Path,
    /// What joins it to another host.
    pub network: Option<Network<'a>>,
    /// What the host sees at `/share`.
    pub share: Option<&'a Path>,
    pub input: Input,
    /// Where the jobs' standard output and standard error go.
    pub out: Sink,
    pub err: Sink,
}

/// The network of two hosts.
#[derive(Clone, Copy)]
pub struct Network<'a> {
    /// Which of them this one is: 1 or 2.
    pub number: u32,
    /// Where the network's sockets are: a folder that both have.
    pub folder: &'a Path,
}

/// What the jobs read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Input {
    Nothing,
    Stdin,
    /// Standard input is a terminal that drives a shell.
    Terminal,
}

/// How a job ended.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    Exit(u8),
    /// The time was up. The job still runs: the host is of no more use.
    TimedOut,
    /// Whoever read the job's output has gone.
    ReaderGone,
}

/// A running host.
pub struct Machine {
    qemu: Qemu,
    control: UnixStream,
    events: Receiver<Event>,
    folder: PathBuf,
    lab: PathBuf,
    jobs: usize,
    /// The other host, without which jobs cannot end.
    peer: Option<Box<Machine>>,
}

impl Machine {
    /// Starts `qemu` as `config` says, and with it `peer`, a second host; waits until both take orders.
    pub fn boot(qemu: &Command, config: &Config, peer: Option<&Config>) -> Result<Self> {
        let start = |config: &Config| {
            Self::start(qemu, config).map_err(|error| with_logs(error, config.folder))
        };
        let mut machine = start(config)?;
        if let Some(peer) = peer {
            machine.wait_network()?;
            machine.peer = Some(Box::new(start(peer)?));
        }
        machine.wait_ready()?;
        Ok(machine)
    }

    fn start(qemu: &Command, config: &Config) -> Result<Self> {
        let folder = config.folder;
        let marker = random_marker()?;
        fs::create_dir_all(config.lab.join("jobs"))?;
        fs::write(folder.join("initrd"), initrd(config, &marker)?)
            .context("cannot write the initrd")?;
        let listeners = Listeners::bind(folder, config.input)?;

        let mut qemu = Qemu::spawn(qemu, &arguments(config), folder)?;
        let (sender, events) = channel();
        let control = listeners.connect(&mut qemu, config, &marker, &sender)?;
        Ok(Self {
            qemu,
            control,
            events,
            folder: folder.to_owned(),
            lab: config.lab.to_owned(),
            jobs: 0,
            peer: None,
        })
    }

    /// The ends of the hosts' consoles, each with a title.
    pub fn consoles(&self) -> Vec<(&'static str, String)> {
        let console = |machine: &Self| console_tail(&machine.folder.join(CONSOLE_LOG), 40);
        let mut consoles = vec![("the host's console", console(self))];
        if let Some(peer) = &self.peer {
            consoles.push(("the second host's console", console(peer)));
        }
        consoles
    }

    /// Runs `script` with bash in the host and waits for its end.
    pub fn run(&mut self, script: &str, limit: Option<Duration>) -> Result<Outcome> {
        self.jobs += 1;
        let name = self.jobs.to_string();
        let job = self.lab.join("jobs").join(&name);
        fs::create_dir_all(&job)?;
        fs::write(job.join("run"), script).context("cannot write a job")?;
        self.order(&format!("run {name}"))?;
        self.wait_end(limit)
            .map_err(|error| with_logs(error, &self.folder))
    }

    /// Runs an interactive shell in the host, on the terminal, and waits for its end.
    pub fn shell(&mut self) -> Result<Outcome> {
        let (rows, columns) = terminal::size();
        self.order(&format!("shell {rows} {columns}"))?;
        self.wait_end(None)
            .map_err(|error| with_logs(error, &self.folder))
    }

    fn order(&mut self, order: &str) -> Result<()> {
        writeln!(self.control, "{order}").context("the host takes no orders: it has ended")
    }

    /// Waits until QEMU listens for the second host's cards.
    fn wait_network(&mut self) -> Result<()> {
        while !CARDS
            .iter()
            .all(|(name, _)| self.folder.join(name).exists())
        {
            let checked = self.qemu.check();
            checked.map_err(|error| with_logs(error, &self.folder))?;
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn wait_ready(&mut self) -> Result<()> {
        let ready = self.wait_ready_itself();
        ready.map_err(|error| with_logs(error, &self.folder))?;
        match &mut self.peer {
            Some(peer) => peer.wait_ready().context("the second host"),
            None => Ok(()),
        }
    }

    fn wait_ready_itself(&mut self) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < BOOT_PATIENCE {
            match self.next_event()? {
                Some(Event::Control(line)) if line.starts_with("ready") => return Ok(()),
                Some(Event::Closed) => bail!("the host ended while it started"),
                _ => {}
            }
        }
        bail!("the host did not start in {} s", BOOT_PATIENCE.as_secs())
    }

    /// Waits for the exit status and for the last byte of both outputs.
    fn wait_end(&mut self, limit: Option<Duration>) -> Result<Outcome> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut status = None;
        let mut open_outputs = 2;
        loop {
            match self.next_event()? {
                Some(Event::Control(line)) => status = exit_status(&line).or(status),
                Some(Event::Ended) => open_outputs -= 1,
                Some(Event::ReaderGone) => return Ok(Outcome::ReaderGone),
                Some(Event::Closed) => bail!("the host ended before the command did"),
                None => {}
            }
            if let (Some(status), 0) = (status, open_outputs) {
                return Ok(Outcome::Exit(status));
            }
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                return Ok(Outcome::TimedOut);
            }
            if terminal::take_resized() {
                let (rows, columns) = terminal::size();
                self.order(&format!("size {rows} {columns}"))?;
            }
        }
    }

    /// The next event, or `None` after a short while without one.
    fn next_event(&mut self) -> Result<Option<Event>> {
        interrupt::check()?;
        match self.events.recv_timeout(TICK) {
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Disconnected) => Ok(Some(Event::Closed)),
            Err(RecvTimeoutError::Timeout) => self.check().map(|()| None),
        }
    }

    /// Fails if QEMU has ended, or that of the other host.
    fn check(&mut self) -> Result<()> {
        self.qemu.check()?;
        let Some(peer) = &mut self.peer else {
            return Ok(());
        };
        let checked = peer.check().context("the second host");
        checked.map_err(|error| with_logs(error, &peer.folder))
    }
}

/// The status in the control port's line `exit STATUS`.
fn exit_status(line: &str) -> Option<u8> {
    line.strip_prefix("exit ")?.trim().parse().ok()
}

/// The sockets to which QEMU connects.
struct Listeners {
    control: UnixListener,
    input: UnixListener,
    out: UnixListener,
    err: UnixListener,
    console: Option<UnixListener>,
}

impl Listeners {
    fn bind(folder: &Path, input: Input) -> Result<Self> {
        let console = (input == Input::Terminal)
            .then(|| ports::listen(folder, "console"))
            .transpose()?;
        Ok(Self {
            control: ports::listen(folder, "control")?,
            input: ports::listen(folder, "in")?,
            out: ports::listen(folder, "out")?,
            err: ports::listen(folder, "err")?,
            console,
        })
    }

    /// Waits for QEMU, starts what reads and writes the ports, and returns the control port.
    fn connect(
        self,
        qemu: &mut Qemu,
        config: &Config,
        marker: &str,
        events: &Sender<Event>,
    ) -> Result<UnixStream> {
        let mut accept = |listener: &UnixListener| ports::accept(listener, || qemu.check());
        if let Some(console) = &self.console {
            let console = accept(console)?;
            ports::read_output(console.try_clone()?, marker, &config.out, events);
            ports::write_input(std::io::stdin(), console);
        }
        let control = accept(&self.control)?;
        let input = accept(&self.input)?;
        match config.input {
            Input::Stdin => ports::write_input(std::io::stdin(), input),
            Input::Nothing | Input::Terminal => ports::write_input(std::io::empty(), input),
        }
        ports::read_output(accept(&self.out)?, marker, &config.out, events);
        ports::read_output(accept(&self.err)?, marker, &config.err, events);
        ports::read_control(control.try_clone()?, events);
        Ok(control)
    }
}

/// QEMU as a child process. It ends with this value, and with xtask however that ends.
struct Qemu(Child);

impl Qemu {
    fn spawn(qemu: &Command, arguments: &[OsString], folder: &Path) -> Result<Self> {
        let log = fs::File::create(folder.join(QEMU_LOG)).context("cannot write QEMU's log")?;
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(qemu.get_program())
            .args(qemu.get_args())
            .args(arguments);
        for (name, value) in qemu.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        // Ctrl-C is for xtask, which then ends QEMU.
        command.process_group(0);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(Self(
            command
                .spawn()
                .context("cannot run setpriv (package util-linux)")?,
        ))
    }

    /// Fails if QEMU has ended.
    fn check(&mut self) -> Result<()> {
        match self.0.try_wait().context("cannot wait for QEMU")? {
            None => interrupt::check(),
            Some(status) => Err(anyhow!("QEMU ended ({status})")),
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The machine's arguments. The host needs no disks and no display, and no network but that of two hosts.
fn arguments(config: &Config) -> Vec<OsString> {
    let mut arguments = Arguments::default();
    let folder = config.folder;
    arguments.add(&[
        "-M",
        "virt,virtualization=on,mte=on,gic-version=3",
        "-cpu",
        "max,pauth-impdef=on",
    ]);
    arguments.add(&[
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-m",
        config.memory,
    ]);
    if config.icount {
        arguments.add(&["-smp", "1", "-icount", "shift=0,sleep=off"]);
    } else {
        arguments.add(&["-smp", &config.cpus.to_string()]);
    }
    arguments.with_path("-kernel", "", &config.kernel.image, "");
    arguments.with_path("-initrd", "", &folder.join("initrd"), "");
    let command_line = [&[COMMAND_LINE.to_owned()], config.kernel_args].concat();
    arguments.add(&["-append", &command_line.join(" ")]);
    arguments.with_path("-serial", "file:", &folder.join(CONSOLE_LOG), "");

    arguments.add(&["-device", "virtio-serial-pci"]);
    if config.input == Input::Terminal {
        arguments.port(folder, "console", "virtconsole");
    }
    for name in ["control", "in", "out", "err"] {
        arguments.port(folder, name, "virtserialport");
    }
    arguments.folder("root", config.tree, true);
    arguments.folder("lab", config.lab, true);
    arguments.folder("jobs", &config.lab.join("jobs"), false);
    if let Some(share) = config.share {
        arguments.folder("share", share, false);
    }
    if let Some(modules) = &config.kernel.modules {
        arguments.folder("modules", modules, true);
    }
    if let Some(network) = &config.network {
        for (name, subnet) in CARDS {
            arguments.card(network, name, *subnet);
        }
    }
    arguments.add_strings(config.qemu_args);
    arguments.0
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn add(&mut self, words: &[&str]) {
        self.0.extend(words.iter().map(OsString::from));
    }

    fn add_strings(&mut self, words: &[String]) {
        self.0.extend(words.iter().map(OsString::from));
    }

    /// Adds `option` with a value that holds a path.
    fn with_path(&mut self, option: &str, before: &str, path: &Path, after: &str) {
        let mut value = OsString::from(before);
        value.push(path);
        value.push(after);
        self.0.extend([option.into(), value]);
    }

    fn port(&mut self, folder: &Path, name: &str, device: &str) {
        let path = escaped(&folder.join(name));
        self.add(&["-chardev", &format!("socket,id={name},path={path}")]);
        let suffix = if device == "virtconsole" {
            String::new()
        } else {
            format!(",name={name}")
        };
        self.add(&["-device", &format!("{device},chardev={name}{suffix}")]);
    }

    fn folder(&mut self, tag: &str, path: &Path, readonly: bool) {
        let path = escaped(path);
        let readonly = if readonly { ",readonly=on" } else { "" };
        self.add(&[
            "-fsdev",
            &format!("local,id={tag},path={path},security_model=none,multidevs=remap{readonly}"),
        ]);
        self.add(&[
            "-device",
            &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
        ]);
    }
}

impl Arguments {
    /// A card on a network of the two hosts' own, whose addresses are those of 10.0.`subnet`. The first host listens at a
    /// Unix socket, the second connects.
    fn card(&mut self, network: &Network, name: &str, subnet: u32) {
        let number = network.number;
        let server = if number == 1 { "on" } else { "off" };
        let path = escaped(&network.folder.join(name));
        self.add(&[
            "-netdev",
            &format!("stream,id={name},server={server},addr.type=unix,addr.path={path}"),
        ]);
        let mac = format!("02:00:0a:00:{subnet:02x}:{number:02x}");
        let device = format!("virtio-net-pci,netdev={name},mac={mac},host_mtu={MTU},romfile=");
        self.add(&["-device", &device]);
    }
}

/// A path as QEMU's lists of options want it: a comma is doubled.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// The whole initial root file system: the kernel's part, then this run's.
fn initrd(config: &Config, marker: &str) -> Result<Vec<u8>> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let modules = config
        .kernel
        .modules
        .as_ref()
        .map_or("", |_| config.kernel.version.as_str());
    let share = config.share.map_or("", |_| "yes");
    let terminal = std::env::var("TERM").unwrap_or_default();
    let number = config
        .network
        .map_or_else(String::new, |network| network.number.to_string());
    let settings = format!(
        "LAB_TIME={now}\nLAB_SHARE={share}\nLAB_MODULES={}\nexport LAB_MARKER={marker} LAB_TERM={} LAB_NUMBER={number}\n",
        quoted(modules),
        quoted(&terminal)
    );
    let mut archive = Archive::default();
    archive.file("init", 0o755, include_bytes!("../lab/host-init.sh"))?;
    archive.file("agent", 0o644, include_bytes!("../lab/host-agent.sh"))?;
    archive.file("lab.conf", 0o644, settings.as_bytes())?;
    let mut bytes = config.initrd.clone();
    bytes.extend(archive.finish()?);
    Ok(bytes)
}

/// `word` as a shell reads it back unchanged.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A line that no output holds by chance.
fn random_marker() -> Result<String> {
    let mut bytes = [0; 16];
    let mut source = fs::File::open("/dev/urandom").context("cannot open /dev/urandom")?;
    std::io::Read::read_exact(&mut source, &mut bytes).context("cannot read /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Adds the ends of the host's console and of QEMU's messages to an error.
fn with_logs(error: Error, folder: &Path) -> Error {
    if interrupt::signal().is_some() {
        return error;
    }
    let mut text = format!("{error:#}");
    for (title, file) in [("the host's console", CONSOLE_LOG), ("QEMU", QEMU_LOG)] {
        let log = console_tail(&folder.join(file), 40);
        if !log.is_empty() {
            text.push_str(&format!("\n--- {title} ---\n{log}"));
        }
    }
    anyhow!(text)
}

/// The last `lines` lines of a log that may hold anything.
pub fn console_tail(path: &Path, lines: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).replace('\r', "");
    command::last_lines(text.trim_end(), lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_with_quotes_is_quoted() {
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    #[test]
    fn only_exit_lines_hold_a_status() {
        assert_eq!(exit_status("exit 42"), Some(42));
        assert_eq!(exit_status("ready 3.2"), None);
        assert_eq!(exit_status("exit 256"), None);
    }

    #[test]
    fn commas_in_paths_are_doubled_for_qemu() {
        assert_eq!(escaped(Path::new("/a,b")), "/a,,b");
    }
}
