//! One boot: QEMU's command line, the log as it comes, the deadline, and how it ended.

use std::{
    fmt,
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use crate::{
    build::Images,
    error::Error,
    flat,
    log::{Dictionary, Line},
    machine::Machine,
    process::Running,
    qemu::{Plugin, Qemu},
    variant::{PLUGIN_DEVICES, Variant},
};

/// How long QEMU may take to end once its serial port is closed.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What is booted, and how.
pub(crate) struct Boot<'b> {
    pub(crate) variant: &'b Variant,
    pub(crate) qemu: &'b Qemu,
    /// The device that issues page requests, where QEMU can have it.
    pub(crate) plugin: Option<&'b Plugin>,
    pub(crate) images: &'b Images,
    /// Scenes to show, for the hypervisor's command line.
    pub(crate) scenes: &'b [&'b str],
    /// What is traced, and how many cores there are.
    pub(crate) purpose: Purpose,
    pub(crate) limit: Duration,
    /// Where the files of this boot go.
    pub(crate) directory: &'b Path,
}

/// What a boot is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Purpose {
    /// To show scenes, with a core for each guest. What the IOMMU does is traced.
    Demonstrate,
    /// To measure, on one core. Every access to the IOMMU's registers is traced.
    Measure,
}

/// How a boot ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Ending {
    /// The hypervisor says that every scene passed.
    Passed,
    /// The hypervisor says that something failed.
    Failed,
    /// QEMU ended by itself, with a status that is not the hypervisor's and the last it said on standard error.
    Unexpected(ExitStatus, String),
    /// QEMU was stopped at the deadline.
    Deadline(Duration),
}

/// What the hypervisor ends with when every scene passed.
const PASSED: i32 = 0x10;
/// What the hypervisor ends with when something failed.
const FAILED: i32 = 0x11;

/// Returns what the hypervisor ended with, from QEMU's exit status `code`.
fn verdict(machine: Machine, code: i32) -> Option<i32> {
    match machine {
        // `isa-debug-exit` doubles what is written to it, and adds one.
        Machine::X86_64 => (code & 1 == 1).then_some(code >> 1),
        // Semihosting's `SYS_EXIT_EXTENDED` hands it on.
        Machine::Aarch64 => Some(code),
    }
}

impl Ending {
    fn of(machine: Machine, status: ExitStatus, stderr: &str) -> Self {
        match status.code().and_then(|code| verdict(machine, code)) {
            Some(PASSED) => Self::Passed,
            Some(FAILED) => Self::Failed,
            _ => Self::Unexpected(status, last_lines(stderr, 5)),
        }
    }

    /// Says what is wrong with this ending, if something is.
    pub(crate) fn problem(&self) -> Option<String> {
        match self {
            Self::Passed => None,
            _ => Some(self.to_string()),
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("the hypervisor ended: every scene passed"),
            Self::Failed => f.write_str("the hypervisor ended: something failed"),
            // QEMU runs with -no-reboot: what would have been a reset is the end.
            Self::Unexpected(status, _) if status.success() => {
                f.write_str("the machine was reset or switched off (on x86_64 by a triple fault most likely)")
            }
            Self::Unexpected(status, said) if said.is_empty() => {
                write!(f, "QEMU ended in the middle, with {status}, and said nothing")
            }
            Self::Unexpected(status, said) => {
                write!(f, "QEMU ended in the middle, with {status}, and said: {said}")
            }
            Self::Deadline(limit) => {
                write!(
                    f,
                    "nothing ended the boot within {} s, so it was stopped (--timeout sets the limit)",
                    limit.as_secs()
                )
            }
        }
    }
}

/// What is left of a boot besides its log.
pub(crate) struct Outcome {
    pub(crate) ending: Ending,
    /// Damaged frames on the serial port, each a line of the log that is missing.
    pub(crate) lost: u64,
}

/// Names of a boot's files in its directory.
/// What QEMU traced, and what it complained of.
pub(crate) const TRACE: &str = "trace.txt";
pub(crate) const STDERR: &str = "stderr.txt";
const IMAGE: &str = "hypervisor.bin";
const SERIAL: &str = "serial.bin";
const LOG: &str = "log.txt";

impl Boot<'_> {
    /// Boots, hands each line of the log to `watch` as it comes, and returns when QEMU is gone.
    pub(crate) fn run(
        &self,
        root: &Path,
        mut watch: impl FnMut(&Line) -> Result<(), Error>,
    ) -> Result<Outcome, Error> {
        let elf = fs::read(&self.images.hypervisor).map_err(Error::io("reading", &self.images.hypervisor))?;
        let dictionary = Dictionary::read(&self.images.hypervisor, &elf)?;
        let mut decoder = dictionary.decoder(root);
        let (mut serial, mut log) =
            (Kept::create(self.directory, SERIAL)?, Kept::create(self.directory, LOG)?);

        // A QEMU that does not come as far as its trace leaves an empty one.
        Kept::create(self.directory, TRACE)?;

        let deadline = Instant::now() + self.limit;
        let kernel = self.kernel(&elf)?;
        let mut command = self.command(&kernel);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(Kept::create(self.directory, STDERR)?.file);
        let mut running = Running::start(&mut command)?;
        let chunks = read_chunks(running.stdout());
        let in_time = loop {
            // Asked anew each time: a hypervisor that never falls silent has a deadline as well.
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break false };
            match chunks.recv_timeout(left) {
                Ok(bytes) => {
                    serial.write(&bytes)?;
                    for line in decoder.decode(&bytes) {
                        log.write(format!("{line}\n").as_bytes())?;
                        watch(&line)?;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break true,
                Err(RecvTimeoutError::Timeout) => break false,
            }
        };
        let status = if in_time { running.wait_until(Instant::now() + END_LIMIT)? } else { None };
        drop(running);

        let ending = match status {
            Some(status) => {
                let path = self.directory.join(STDERR);
                let said = fs::read(&path).map_err(Error::io("reading", &path))?;
                Ending::of(self.variant.machine, status, &String::from_utf8_lossy(&said))
            }
            None => Ending::Deadline(self.limit),
        };
        Ok(Outcome { ending, lost: decoder.lost() })
    }

    /// QEMU's command line, for the image `kernel`.
    fn command(&self, kernel: &Path) -> Command {
        let mut command = self.qemu.command();
        match self.variant.machine {
            Machine::X86_64 => self.add_x86_64(&mut command),
            Machine::Aarch64 => self.add_aarch64(&mut command),
        }
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
        // Time is counted in instructions, and jumps while the machine waits: with sleep it would go on by the host's
        // clock then, and a busy host would make the machine late.
        command.args(["-icount", "shift=0,sleep=off"]);
        command.arg("-kernel").arg(kernel);
        command.arg("-initrd").arg(&self.images.guest);
        command.arg("-append").arg([&[self.variant.told], self.scenes].concat().join(" "));
        command.arg("-D").arg(self.directory.join(TRACE));
        command
    }

    /// Returns the file that QEMU boots: the hypervisor's ELF file `elf` itself, or the image that is in it.
    fn kernel(&self, elf: &[u8]) -> Result<PathBuf, Error> {
        match self.variant.machine {
            Machine::X86_64 => Ok(self.images.hypervisor.clone()),
            Machine::Aarch64 => {
                let hypervisor = self.images.hypervisor.display();
                let image = flat::image(elf).ok_or_else(|| {
                    Error::Image(format!("{hypervisor} has no segments that can be loaded"))
                })?;
                let path = self.directory.join(IMAGE);
                fs::write(&path, image).map_err(Error::io("writing", &path))?;
                Ok(path)
            }
        }
    }

    fn add_x86_64(&self, command: &mut Command) {
        command.args(["-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256M"]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        self.add_purpose(command, "vtd_*");
        self.add_devices(command);
    }

    fn add_aarch64(&self, command: &mut Command) {
        // With ACPI off the device tree tells of all there is.
        let unit = if self.variant.unit.is_none() { ",iommu=smmuv3" } else { "" };
        let machine = format!("virt,virtualization=on,gic-version=3,acpi=off,accel=tcg{unit}");
        command.args(["-machine", &machine, "-cpu", "max", "-m", "256M"]);
        command.args(["-semihosting-config", "enable=on,target=native"]);
        self.add_purpose(command, "smmu*");
        if self.purpose == Purpose::Demonstrate {
            command.args(["-trace", "gicv3_its_translation_write"]);
        }
        self.add_devices(command);
    }

    /// Adds the cores, and what is traced; `unit` is what QEMU's IOMMU does.
    fn add_purpose(&self, command: &mut Command, unit: &str) {
        match self.purpose {
            Purpose::Demonstrate => command.args(["-smp", "3", "-trace", unit]),
            Purpose::Measure => {
                let registers = match self.variant.machine {
                    Machine::X86_64 => "vtd_reg_*",
                    // What the plugin has in front of the SMMU's registers does not reach the SMMU.
                    Machine::Aarch64 => "memory_region_ops_*",
                };
                // Firmware looks at the clock on the wall, which must not count.
                command.args(["-smp", "1", "-trace", registers, "-rtc", "base=2000-01-01,clock=vm"])
            }
        };
    }

    /// Adds the IOMMU, unless it is part of the machine, and the devices that the scenes use, where the hypervisor looks for
    /// them.
    fn add_devices(&self, command: &mut Command) {
        // The IOMMU comes before every device that it is to translate for: iommu-testdev looks for it once, when it
        // is made, and goes past one that comes later.
        if let Some(unit) = self.variant.unit {
            let requests = if self.plugin.is_some() { self.variant.unit_with_requests } else { "" };
            command.args(["-device", &format!("{unit}{requests}")]);
        }
        command.args(["-device", "iommu-testdev,addr=3"]);
        if let Some(plugin) = self.plugin {
            plugin.add_to(command, self.variant.plugin);
            for stream in PLUGIN_DEVICES {
                command.args(["-device", &format!("sva-dev,addr={}", stream >> 3)]);
            }
        }
        for device in self.variant.devices {
            command.args(["-device", device]);
        }
    }
}

/// A file of a boot that is written as the boot goes on.
struct Kept<'d> {
    directory: &'d Path,
    name: &'static str,
    file: File,
}

impl<'d> Kept<'d> {
    fn create(directory: &'d Path, name: &'static str) -> Result<Self, Error> {
        let path = directory.join(name);
        let file = File::create(&path).map_err(Error::io("creating", &path))?;
        Ok(Self { directory, name, file })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file
            .write_all(bytes)
            .map_err(|source| Error::io("writing", &self.directory.join(self.name))(source))
    }
}

/// Reads `stream` on a thread of its own, so that a deadline can pass while nothing comes.
fn read_chunks(stream: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    // A bound, so that QEMU waits for the reader and not the other way round in memory.
    let (sender, receiver) = mpsc::sync_channel(64);
    thread::spawn(move || {
        let Some(mut stream) = stream else { return };
        let mut buffer = [0; 4096];
        // An error ends the stream, as its end does: either way there is nothing more to come.
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Returns the last `count` lines of `text`.
fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn ending(machine: Machine, code: i32) -> Ending {
        Ending::of(machine, ExitStatus::from_raw(code << 8), "qemu: one\nqemu: two\n")
    }

    #[test]
    fn only_the_hypervisors_good_status_is_no_problem() {
        for (machine, passed, failed, others) in [
            (Machine::X86_64, 33, 35, [0, 1, 16, 17, 32, 34, 37]),
            (Machine::Aarch64, 16, 17, [0, 1, 15, 18, 33, 35, 255]),
        ] {
            assert_eq!(ending(machine, passed), Ending::Passed);
            assert_eq!(ending(machine, passed).problem(), None);
            assert_eq!(ending(machine, failed), Ending::Failed);
            for code in others {
                assert!(matches!(ending(machine, code), Ending::Unexpected(..)), "{machine:?} {code}");
            }
        }
    }

    #[test]
    fn an_unexpected_end_quotes_qemu() {
        let problem = ending(Machine::X86_64, 1).problem().unwrap();

        assert!(problem.contains("exit status: 1") && problem.contains("qemu: two"), "{problem}");
    }

    #[test]
    fn an_end_without_a_verdict_is_a_reset() {
        assert!(ending(Machine::X86_64, 0).problem().unwrap().contains("triple fault"));
        assert!(ending(Machine::Aarch64, 0).problem().unwrap().contains("reset or switched off"));
    }

    #[test]
    fn a_signal_and_a_deadline_say_so() {
        let killed = Ending::of(Machine::Aarch64, ExitStatus::from_raw(9), "").problem().unwrap();
        let late = Ending::Deadline(Duration::from_secs(60)).problem().unwrap();

        assert!(killed.contains("signal: 9") && killed.contains("said nothing"), "{killed}");
        assert!(late.contains("within 60 s"), "{late}");
    }

    #[test]
    fn the_last_lines_are_the_last() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines("a", 2), "a");
        assert_eq!(last_lines("", 2), "");
    }
}
