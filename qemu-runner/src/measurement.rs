//! A measurement: each machine boots the image that measures, twice, and both times it must count the same.
//!
//! Instructions are counted by the image, MMIO accesses by QEMU's own trace: between two marks, which are writes to a
//! register of the IOMMU that ignores them. Some lines of the log are a protocol:
//!
//! ```text
//! measure bring_up instructions=12345
//! measure figure name=map one page streams=2 stretch=7 instructions=123
//! measure stack bytes=1234
//! measure end
//! ```

use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead, BufReader},
    ops::Range,
    path::PathBuf,
};

use crate::{
    boot::{Boot, Ending, Purpose, TRACE},
    build::{Images, build_plugin},
    error::Error,
    machine::Machine,
    options::Options,
    peers,
    process::say,
    qemu::{Plugin, Qemu},
    rows::{BYTES, INSTRUCTIONS, MMIO, Row, Rows},
    scenes::hex,
    sizes::{self, Size},
    toolchain::Toolchain,
    variant::ordinary,
    workspace::{BootDirectory, Workspace},
};

/// Where the figures of the last commit are kept, in the workspace.
const KEPT: &str = "tests/bench/measured.json";

/// Times that each machine is booted: they must agree.
const BOOTS: usize = 2;

/// Streams beside which the first figures are measured; the others are to cost the same.
const FEWEST_STREAMS: u64 = 2;

/// Machines that are ready to be measured.
#[derive(Debug)]
pub struct Measurement {
    options: Options,
    workspace: Workspace,
    stages: Vec<Stage>,
}

/// One machine that is ready to be measured.
#[derive(Debug)]
struct Stage {
    machine: Machine,
    qemu: Qemu,
    plugin: Plugin,
    images: Images,
    /// The hypervisor that is demonstrated, whose size is measured.
    demonstrated: PathBuf,
}

impl Measurement {
    /// Finds, fetches and builds what measuring needs.
    pub fn prepare(options: Options) -> Result<Self, Error> {
        let workspace = Workspace::locate()?;
        let _lock = workspace.lock()?;
        let qemus = options
            .machines
            .iter()
            .map(|&machine| Qemu::provide(&workspace, machine, options.offline))
            .collect::<Result<Vec<_>, _>>()?;
        let targets: Vec<&str> = options.machines.iter().map(|machine| machine.target()).collect();
        let toolchain = Toolchain::provide(&workspace, &targets, options.offline)?;
        let library = build_plugin(&toolchain, options.offline)?;
        let directory = workspace.kept.join("measure");
        let mut stages = Vec::new();
        for (&machine, qemu) in options.machines.iter().zip(qemus) {
            let images = Images::build_measuring(&toolchain, machine, &directory, options.offline)?;
            let plugin = qemu.try_plugin(&library).map_err(Error::Figures)?;
            let demonstrated = Images::build(&toolchain, machine, None, options.offline)?.hypervisor;
            stages.push(Stage { machine, qemu, plugin, images, demonstrated });
        }
        Ok(Self { options, workspace, stages })
    }

    /// Where the figures of this run go, hosted ones among them: `portcullis/measure.json` in cargo's build directory.
    pub fn rows_path(&self) -> PathBuf {
        self.workspace.kept.join("measure.json")
    }

    /// Where the figures of the last commit are kept.
    pub fn kept_path(&self) -> PathBuf {
        self.workspace.root.join(KEPT)
    }

    /// Measures every machine.
    pub fn run(&self) -> Result<Rows, Error> {
        let mut rows = Rows::default();
        for stage in &self.stages {
            say(&format!("measuring {} in QEMU {}", stage.machine.name(), stage.qemu.version));
            let first = self.boot(stage)?;
            for _ in 1..BOOTS {
                let again = self.boot(stage)?;
                if let Some(difference) = first.difference(&again) {
                    return Err(Error::Figures(format!(
                        "{}: two boots of the same image do not count the same: {difference}",
                        stage.machine.name()
                    )));
                }
            }
            rows.0.extend(first.rows(stage.machine));
            rows.0.extend(sizes(stage)?);
        }
        Ok(rows)
    }

    fn boot(&self, stage: &Stage) -> Result<Counted, Error> {
        let Stage { machine, qemu, plugin, images, .. } = stage;
        let directory = BootDirectory::create(&self.workspace.kept, machine.name(), self.options.keep)?;
        let boot = Boot {
            variant: ordinary(*machine),
            qemu,
            plugin: Some(plugin),
            images,
            scenes: &[],
            purpose: Purpose::Measure,
            limit: self.options.limit,
            directory: directory.path(),
        };
        let mut counted = Counted::default();
        let mut said = Vec::new();
        let outcome = boot.run(&self.workspace.root, |line| {
            counted.note(&line.text);
            said.push(line.to_string());
            Ok(())
        })?;
        if self.options.verbose {
            said.iter().for_each(|line| say(line));
        }
        if self.options.keep {
            say(&format!("the files of this boot are in {}", directory.path().display()));
        }
        let failed = |what: &str| {
            let last = said.iter().rev().take(5).rev().cloned().collect::<Vec<_>>().join("\n  ");
            Error::Figures(format!("{}: {what}; the log ends:\n  {last}", machine.name()))
        };
        if outcome.ending != Ending::Passed {
            return Err(failed(&outcome.ending.to_string()));
        }
        if outcome.lost > 0 || !counted.ended {
            return Err(failed("the log has no end, or lines of it are missing"));
        }
        let path = directory.path().join(TRACE);
        let trace = File::open(&path).map_err(Error::io("reading", &path))?;
        counted.accesses =
            accesses(registers(*machine), BufReader::new(trace)).map_err(|said| failed(&said))?;
        Ok(counted)
    }
}

/// How large the hypervisor is, by crate.
fn sizes(stage: &Stage) -> Result<Vec<Row>, Error> {
    let mut rows = Vec::new();
    let mut all = Size::default();
    for (name, size) in sizes::of_image(&stage.demonstrated)? {
        all.code += size.code;
        all.statics += size.statics;
        for (what, bytes) in [("code", size.code), ("static memory", size.statics)] {
            let name = format!("{what} of {name}");
            rows.push(Row::new(&name, stage.machine.name(), BYTES, bytes as f64));
        }
    }
    for (what, bytes) in [("code", all.code), ("static memory", all.statics)] {
        let name = format!("{what} of the whole hypervisor");
        rows.push(Row::new(&name, stage.machine.name(), BYTES, bytes as f64));
    }
    Ok(rows)
}

/// Where QEMU puts the registers of its VT-d.
const VTD: Range<u64> = 0xFED9_0000..0xFED9_1000;

/// Where QEMU puts the IOMMU's registers.
fn registers(machine: Machine) -> Range<u64> {
    match machine {
        Machine::X86_64 => VTD,
        Machine::Aarch64 => 0x0905_0000..0x0907_0000,
    }
}

/// A figure, as the hypervisor tells it.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Figure {
    name: String,
    streams: u64,
    stretch: u64,
    instructions: u64,
}

/// What one boot counted.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Counted {
    bring_up: u64,
    figures: Vec<Figure>,
    stack: u64,
    ended: bool,
    /// Accesses to the unit's registers, by stretch; those of bring-up are the stretch 0.
    accesses: HashMap<u64, u64>,
}

impl Counted {
    /// Takes in a line of the log.
    fn note(&mut self, text: &str) {
        let number = |key: &str| {
            let (_, rest) = text.split_once(&format!(" {key}="))?;
            rest.split(' ').next()?.parse().ok()
        };
        let Some(rest) = text.strip_prefix("measure ") else { return };
        match rest.split(' ').next() {
            Some("bring_up") => self.bring_up = number("instructions").unwrap_or(0),
            Some("stack") => self.stack = number("bytes").unwrap_or(0),
            Some("end") => self.ended = true,
            Some("figure") => {
                let name = rest.strip_prefix("figure name=").and_then(|rest| rest.split_once(" streams="));
                if let (Some((name, _)), Some(streams), Some(stretch), Some(instructions)) =
                    (name, number("streams"), number("stretch"), number("instructions"))
                {
                    let name = name.to_owned();
                    self.figures.push(Figure { name, streams, stretch, instructions });
                }
            }
            _ => {}
        }
    }

    /// Says the first thing in which two boots differ.
    fn difference(&self, other: &Self) -> Option<String> {
        let figures = self.figures.iter().zip(&other.figures);
        let differs = figures.into_iter().find(|(one, two)| one != two);
        if let Some((one, two)) = differs {
            return Some(format!("{one:?}, then {two:?}"));
        }
        for figure in &self.figures {
            let (one, two) = (self.accesses.get(&figure.stretch), other.accesses.get(&figure.stretch));
            if one != two {
                return Some(format!("{}: {one:?} accesses, then {two:?}", figure.name));
            }
        }
        (self != other).then(|| "bring-up, stack, or how many figures there are".to_owned())
    }

    /// The figures with their accesses, beside those of others.
    fn rows(&self, machine: Machine) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut both = |name: &str, instructions: f64, accesses: f64| {
            rows.push(Row::new(name, machine.name(), INSTRUCTIONS, instructions));
            rows.push(Row::new(name, machine.name(), MMIO, accesses));
        };
        let accesses = |stretch: u64| self.accesses.get(&stretch).copied().unwrap_or(0) as f64;
        both(peers::BRING_UP, self.bring_up as f64, accesses(0));
        let find = |name: &str, streams| {
            let found =
                self.figures.iter().find(|figure| figure.name == name && figure.streams == streams)?;
            Some((found.instructions as f64, accesses(found.stretch)))
        };
        for Figure { name, streams, stretch, instructions } in &self.figures {
            let beside = beside(*streams);
            both(&format!("{name}{beside}"), *instructions as f64, accesses(*stretch));
            if name == peers::UNMAP
                && let Some((map, map_accesses)) = find(peers::MAP, *streams)
            {
                let name = format!("{}{beside}", peers::PAIR);
                both(&name, *instructions as f64 + map, accesses(*stretch) + map_accesses);
            }
            if name == peers::FAULTS
                && let Some((fault, fault_accesses)) = find(peers::FAULT, *streams)
            {
                let name = format!("{}{beside}", peers::FURTHER_FAULT);
                let further = |all: f64, one: f64| (all - one) / (peers::FAULTS_OF_A_PASS - 1.0);
                both(
                    &name,
                    further(*instructions as f64, fault),
                    further(accesses(*stretch), fault_accesses),
                );
            }
        }
        let stack = Row::new("stack of the interrupt path", machine.name(), BYTES, self.stack as f64);
        rows.push(stack);
        let base = rows.clone();
        for row in &mut rows {
            peers::judge(machine, row, &base);
            if machine == Machine::Aarch64 && peers::needs_requests(&row.name) {
                row.name.push_str(peers::TEST_DOUBLE);
            }
        }
        rows
    }
}

/// How a figure's name ends that was measured beside so many attached streams.
fn beside(streams: u64) -> String {
    if streams == FEWEST_STREAMS { String::new() } else { format!("{}{streams} streams", peers::BESIDE) }
}

/// Counts the accesses to `registers` in QEMU's trace, by stretch: those before the first mark are the stretch 0.
fn accesses(registers: Range<u64>, trace: impl BufRead) -> Result<HashMap<u64, u64>, String> {
    let mut counts = HashMap::new();
    let mut stretch = Some(0);
    let mut region: Option<String> = None;
    for line in trace.lines().map_while(Result::ok) {
        let Some(access) = Access::read(&line).filter(|access| registers.contains(&access.address)) else {
            continue;
        };
        // The test double of page requests lies in front of QEMU's unit, and passes on what is not its own: that is
        // traced twice, and counts once.
        let outer = region.get_or_insert_with(|| access.region.to_owned());
        if access.region.contains("sva-dev") && !outer.contains("sva-dev") {
            *outer = access.region.to_owned();
            counts.clear();
        }
        if access.region != outer.as_str() {
            continue;
        }
        match access.mark() {
            Some((number, false)) => stretch = Some(number),
            Some((_, true)) => stretch = None,
            None => {
                if let Some(stretch) = stretch {
                    *counts.entry(stretch).or_insert(0) += 1;
                }
            }
        }
    }
    match stretch {
        None => Ok(counts),
        Some(number) => Err(format!("stretch {number} has no end in QEMU's trace")),
    }
}

/// One access to a device's registers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Access<'l> {
    write: bool,
    address: u64,
    value: u64,
    region: &'l str,
}

impl<'l> Access<'l> {
    /// Reads a line of QEMU's trace: of its VT-d, or of any registers at all.
    fn read(line: &'l str) -> Option<Self> {
        if let Some(rest) = line.strip_prefix("vtd_reg_") {
            let (event, rest) = rest.split_once(" addr ")?;
            let (offset, rest) = rest.split_once(" size ")?;
            // `vtd_reg_write_gcmd` and the like tell what a write does that was told before.
            let (write, value) = match event {
                "read" => (false, 0),
                "write" => (true, hex(rest.split_once(" value ")?.1)?),
                _ => return None,
            };
            let address = VTD.start.checked_add(hex(offset)?)?;
            return Some(Self { write, address, value, region: "vtd" });
        }
        let rest = line.strip_prefix("memory_region_ops_")?;
        let (event, rest) = rest.split_once(" cpu ")?;
        let (_, rest) = rest.split_once(" addr ")?;
        let (address, rest) = rest.split_once(" value ")?;
        let (value, rest) = rest.split_once(" size ")?;
        let (_, name) = rest.split_once(" name '")?;
        let region = name.strip_suffix('\'')?;
        Some(Self { write: event == "write", address: hex(address)?, value: hex(value)?, region })
    }

    /// Returns the stretch that the access marks, and whether it ends it.
    fn mark(&self) -> Option<(u64, bool)> {
        let is_mark = self.write && self.value >> 16 == 0x4D4B && self.address & 0xFFF == 0;
        is_mark.then_some((self.value >> 1 & 0x7FFF, self.value & 1 != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of a boot of the x86_64 machine: one access of bring-up, a stretch of two, one that is nobody's.
    const TRACE: &str = "vtd_reg_read addr 0x8 size 0x8\n\
        vtd_reg_write addr 0x0 size 0x4 value 0x4d4b0002\n\
        vtd_reg_write addr 0x88 size 0x8 value 0x40\n\
        vtd_reg_write_gcmd status 0x0 value 0x1\n\
        vtd_reg_read addr 0x80 size 0x8\n\
        vtd_reg_write addr 0x0 size 0x4 value 0x4d4b0003\n\
        vtd_reg_read addr 0x34 size 0x4\n";

    fn count(machine: Machine, trace: &str) -> Result<Vec<(u64, u64)>, String> {
        let counts = accesses(registers(machine), trace.as_bytes())?;
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_unstable();
        Ok(counts)
    }

    #[test]
    fn accesses_count_for_the_stretch_that_they_are_in() {
        assert_eq!(count(Machine::X86_64, TRACE), Ok(vec![(0, 1), (1, 2)]));
    }

    #[test]
    fn a_stretch_without_an_end_is_no_measurement() {
        let cut = TRACE.split_once("vtd_reg_write addr 0x0 size 0x4 value 0x4d4b0003").unwrap().0;

        assert!(count(Machine::X86_64, cut).unwrap_err().contains("stretch 1"));
        assert!(count(Machine::X86_64, "").unwrap_err().contains("stretch 0"));
    }

    #[test]
    fn what_the_test_double_passes_on_counts_once() {
        let line = |event: &str, address: u64, value: u64, name: &str| {
            format!(
                "memory_region_ops_{event} cpu 0 mr 0x1 addr {address:#x} value {value:#x} size 4 name '{name}'\n"
            )
        };
        let both = |event: &str, address, value| {
            line(event, address, value, "smmuv3") + &line(event, address, value, "sva-dev-smmu")
        };
        let trace = both("read", 0x905_0000, 1)
            + &both("write", 0x905_0000, 0x4D4B_0002)
            + &line("write", 0x906_00CC, 7, "sva-dev-smmu")
            + &both("write", 0x905_0098, 3)
            + &line("write", 0x900_0000, 3, "pl011")
            + &both("write", 0x905_0000, 0x4D4B_0003);

        assert_eq!(count(Machine::Aarch64, &trace), Ok(vec![(0, 1), (1, 2)]));
    }

    fn counted(lines: &[&str]) -> Counted {
        let mut counted = Counted::default();
        lines.iter().for_each(|line| counted.note(line));
        counted
    }

    #[test]
    fn the_log_is_read_into_figures_and_the_pair_is_their_sum() {
        let mut counted = counted(&[
            "measure bring_up instructions=45",
            "measure figure name=map one page streams=2 stretch=3 instructions=200",
            "measure figure name=unmap one page, with its invalidation streams=2 stretch=4 instructions=300",
            "measure stack bytes=900",
            "measure end",
        ]);
        counted.accesses.insert(4, 1);

        let rows = counted.rows(Machine::X86_64);

        let pair =
            rows.iter().filter(|row| row.name == peers::PAIR).map(|row| (row.ours, row.peer, row.goal));
        assert!(counted.ended && counted.bring_up == 45);
        assert_eq!(
            pair.collect::<Vec<_>>(),
            [(500.0, Some(2439.0), Some(600.0)), (1.0, Some(1.0), Some(1.0))]
        );
    }

    #[test]
    fn beside_many_streams_a_figure_is_to_be_what_it_is_beside_few() {
        let counted = counted(&[
            "measure figure name=answer streams=2 stretch=1 instructions=100",
            "measure figure name=answer streams=4096 stretch=2 instructions=103",
        ]);

        let rows = counted.rows(Machine::Aarch64);

        // On this machine the requests are our own model's, and the name says so.
        let name = "answer, beside 4096 streams (test double)";
        let many = rows.iter().find(|row| row.name == name && row.unit == INSTRUCTIONS);
        assert_eq!(many.map(|row| (row.ours, row.goal)), Some((103.0, Some(102.0))));
    }

    #[test]
    fn boots_that_count_differently_are_told_apart() {
        let line = |instructions| {
            format!("measure figure name=answer streams=2 stretch=1 instructions={instructions}")
        };
        let (one, two) = (counted(&[&line(1)]), counted(&[&line(2)]));

        assert_eq!(one.difference(&one), None);
        assert!(one.difference(&two).unwrap().contains("answer"));
    }
}
