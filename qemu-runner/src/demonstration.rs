//! A demonstration: everything prepared once, then booted, watched and judged as often as asked.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, BufReader, Write},
    path::{Path, PathBuf},
};

use crate::{
    boot::{Boot, Ending, Purpose, STDERR, TRACE},
    build::{Images, build_plugin},
    error::Error,
    log::{Level, Line},
    machine::Machine,
    options::Options,
    process::say,
    qemu::{Plugin, Qemu},
    report::{Evidence, Report},
    scenes::{Message, Transcript},
    toolchain::{BARE_TARGETS, Toolchain},
    trace::{Told, Trace},
    variant::{Scene, VARIANTS, Variant},
    workspace::{BootDirectory, Workspace},
};

/// How many lines of the log are shown again when a scene or a boot ends badly.
const TAIL: usize = 20;

/// Machines that are ready to boot.
#[derive(Debug)]
pub struct Demonstration {
    options: Options,
    workspace: Workspace,
    stages: Vec<Stage>,
}

/// One machine that is ready to boot.
#[derive(Debug)]
struct Stage {
    machine: Machine,
    qemu: Qemu,
    /// The device that issues page requests, or why there is none.
    plugin: Result<Plugin, String>,
    images: Images,
}

impl Demonstration {
    /// Finds, fetches and builds what the demonstration needs; a `hypervisor` image that is given is taken as it is.
    pub fn prepare(options: Options, hypervisor: Option<&Path>) -> Result<Self, Error> {
        let workspace = Workspace::locate()?;
        let lock = workspace.lock()?;
        let machines = match hypervisor {
            Some(elf) => vec![machine_of(elf, &options)?],
            None => options.machines.clone(),
        };
        // First, so that a QEMU that cannot be had costs no build.
        let qemus = machines
            .iter()
            .map(|&machine| Qemu::provide(&workspace, machine, options.offline))
            .collect::<Result<Vec<_>, _>>()?;
        let targets: Vec<&str> = machines.iter().map(|machine| machine.target()).collect();
        let toolchain = Toolchain::provide(&workspace, &targets, options.offline)?;
        let library = build_plugin(&toolchain, options.offline)?;
        let mut stages = Vec::new();
        for (machine, qemu) in machines.into_iter().zip(qemus) {
            let images = Images::build(&toolchain, machine, hypervisor, options.offline)?;
            let plugin = qemu.try_plugin(&library);
            if let Err(reason) = &plugin {
                say(&format!("{}: scenes with page requests are skipped: {reason}", machine.name()));
            }
            stages.push(Stage { machine, qemu, plugin, images });
        }
        drop(lock);
        Ok(Self { options, workspace, stages })
    }

    /// Where [`Report::write`] is meant to write: `portcullis/report.json` in cargo's build directory.
    pub fn report_path(&self) -> PathBuf {
        self.workspace.kept.join("report.json")
    }

    /// Boots every machine in every variant once, shows on `out` what happens, and judges it.
    pub fn run(&self, out: &mut dyn Write) -> Result<Report, Error> {
        let mut report = Report::default();
        for variant in VARIANTS.iter().filter(|variant| self.options.wants_variant(variant)) {
            let stage = self.stages.iter().find(|stage| stage.machine == variant.machine);
            let wanted: Vec<Scene> =
                variant.scenes.iter().copied().filter(|scene| self.options.wants(scene.name)).collect();
            if let (Some(stage), false) = (stage, wanted.is_empty()) {
                self.boot(stage, variant, &wanted, out, &mut report)?;
            }
        }
        Ok(report)
    }

    /// Boots `variant` to show the scenes that are `wanted` of it.
    fn boot(
        &self,
        stage: &Stage,
        variant: &Variant,
        wanted: &[Scene],
        out: &mut dyn Write,
        report: &mut Report,
    ) -> Result<(), Error> {
        let Stage { machine: _, qemu, plugin, images } = stage;
        let possible: Vec<&str> = wanted
            .iter()
            .filter(|scene| plugin.is_ok() || !scene.page_requests)
            .map(|scene| scene.name)
            .collect();
        let directory = BootDirectory::create(&self.workspace.kept, &variant.label(), self.options.keep)?;
        let boot = Boot {
            variant,
            qemu,
            plugin: plugin.as_ref().ok(),
            images,
            scenes: &possible,
            purpose: Purpose::Demonstrate,
            limit: self.options.limit,
            directory: directory.path(),
        };

        writeln!(out, "{variant} in QEMU {} ({})", qemu.version, qemu.origin).map_err(Error::output)?;
        let mut transcript = Transcript::default();
        let mut tail = Tail::default();
        let least = if self.options.verbose { Level::Trace } else { Level::Info };
        let outcome = boot.run(&self.workspace.root, |line| {
            let message = Message::read(line);
            transcript.note(line, &message);
            tail.push(line, &message);
            show(out, line, &message, least)
                .and_then(|()| match message {
                    Ok(Some(Message::End { name, passed: false, .. })) => tail.show(out, name),
                    _ => Ok(()),
                })
                .map_err(Error::output)
        })?;

        // After a scene that failed, its own end of the log says more than that of the whole.
        let told = outcome.ending == Ending::Failed && tail.shown;
        if outcome.ending != Ending::Passed && !told {
            tail.show(out, &variant.to_string()).map_err(Error::output)?;
        }
        if self.options.keep {
            writeln!(out, "\nThe files of this boot are in {}", directory.path().display())
                .map_err(Error::output)?;
        }
        let trace = directory.path().join(TRACE);
        let trace = File::open(&trace).map_err(Error::io("reading", &trace))?;
        let told = Told {
            machine: variant.machine,
            tables: variant.tables,
            removals: &transcript.removals,
            with_device_tlb: variant.with_device_tlb,
            trusted: variant.trusted,
            restarts: variant.restarts,
            detachments: true,
        };
        let trace = Trace::judge(BufReader::new(trace), &told)?;
        let witnesses: Vec<&str> = wanted.iter().map(|scene| scene.witness).collect();
        report.judge(Evidence {
            said: said_by_qemu(directory.path(), &witnesses)?,
            variant,
            qemu_version: &qemu.version,
            wanted,
            no_page_requests: plugin.as_ref().err().map(String::as_str),
            skips_fail: self.options.skips_fail,
            transcript: &transcript,
            ending: outcome.ending.problem(),
            lost: outcome.lost,
            trace,
        });
        Ok(())
    }
}

/// Returns those of `texts` that QEMU said during the boot whose files are in `directory`.
fn said_by_qemu<'t>(directory: &Path, texts: &[&'t str]) -> Result<Vec<&'t str>, Error> {
    let mut said = Vec::new();
    for file in [TRACE, STDERR] {
        let path = directory.join(file);
        let bytes = fs::read(&path).map_err(Error::io("reading", &path))?;
        let text = String::from_utf8_lossy(&bytes);
        said.extend(texts.iter().filter(|wanted| !wanted.is_empty() && text.contains(**wanted)));
    }
    Ok(said)
}

/// Returns the machine that the image at `elf` is for, unless the options name another.
fn machine_of(elf: &Path, options: &Options) -> Result<Machine, Error> {
    let machine = Machine::of_image(elf)?;
    if options.machines.contains(&machine) {
        Ok(machine)
    } else {
        Err(Error::Usage(format!("{} is for {}, which --machine leaves out", elf.display(), machine.name())))
    }
}

/// Provides every bare-metal target and returns cargo's arguments that make them usable: none, where rustup has them.
pub fn toolchain_arguments(options: &Options) -> Result<Vec<String>, Error> {
    let workspace = Workspace::locate()?;
    let _lock = workspace.lock()?;
    Ok(Toolchain::provide(&workspace, &BARE_TARGETS, options.offline)?.cargo_arguments())
}

/// Shows one line of the log: the protocol as a story, the rest as it is.
fn show(
    out: &mut dyn Write,
    line: &Line,
    message: &Result<Option<Message<'_>>, String>,
    least: Level,
) -> io::Result<()> {
    match message {
        Ok(Some(Message::Begin { name })) => writeln!(out, "\n-- {name}"),
        Ok(Some(Message::Count { key, value, .. })) => writeln!(out, "{:>12}       {key}: {value}", ""),
        Ok(Some(Message::End { name, passed, seen })) => {
            let mark = if *passed { "passed" } else { "FAILED" };
            writeln!(out, "   {mark}: {name}: {seen}")
        }
        Ok(Some(Message::Skip { name, reason })) => writeln!(out, "\n-- {name}\n   SKIPPED: {reason}"),
        Ok(Some(Message::DemonstrationEnd { .. })) => writeln!(out),
        Ok(Some(Message::Removal(_)) | None) | Err(_) if line.level >= least => writeln!(out, "{line}"),
        Ok(Some(Message::Removal(_)) | None) | Err(_) => Ok(()),
    }
}

/// The last lines of the log since a scene began, of every level.
#[derive(Debug, Default)]
struct Tail {
    lines: VecDeque<String>,
    /// Whether it was shown for a scene.
    shown: bool,
}

impl Tail {
    fn push(&mut self, line: &Line, message: &Result<Option<Message<'_>>, String>) {
        if matches!(message, Ok(Some(Message::Begin { .. }))) {
            self.lines.clear();
        }
        if self.lines.len() == TAIL {
            self.lines.pop_front();
        }
        self.lines.push_back(line.to_string());
    }

    /// Shows the end of the log of `what`.
    fn show(&mut self, out: &mut dyn Write, what: &str) -> io::Result<()> {
        self.shown = true;
        writeln!(
            out,
            "\nThe end of the log of {what}, all levels (--keep keeps the whole of it and QEMU's trace):"
        )?;
        for line in &self.lines {
            writeln!(out, "{line}")?;
        }
        if self.lines.is_empty() {
            writeln!(out, "   (nothing was logged)")?;
        }
        writeln!(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(level: Level, text: &str, least: Level) -> String {
        let line = Line { time: "1.000000".into(), level, text: text.into(), place: None };
        let mut out = Vec::new();
        show(&mut out, &line, &Message::read(&line), least).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_scene_is_shown_as_a_story() {
        assert_eq!(shown(Level::Info, "scene begin name=deny", Level::Info), "\n-- deny\n");
        assert_eq!(
            shown(Level::Info, "scene end name=deny passed=true seen=reason 6", Level::Info),
            "   passed: deny: reason 6\n"
        );
        assert_eq!(
            shown(Level::Info, "scene skip name=deny reason=why", Level::Info),
            "\n-- deny\n   SKIPPED: why\n"
        );
    }

    #[test]
    fn details_are_shown_only_to_who_asks() {
        let unmap = "unmap stream=0x18 pasid=0x1 domain=0x5 iova=0x40000000 pages=4";

        assert_eq!(shown(Level::Debug, unmap, Level::Info), "");
        assert!(shown(Level::Debug, unmap, Level::Trace).contains("pages=4"));
        assert_eq!(shown(Level::Trace, "detail", Level::Info), "");
        assert!(shown(Level::Warn, "trouble", Level::Info).contains("WARN  trouble"));
    }

    fn push(tail: &mut Tail, text: &str) {
        let line = Line { time: String::new(), level: Level::Info, text: text.into(), place: None };
        tail.push(&line, &Message::read(&line));
    }

    fn end(tail: &mut Tail) -> String {
        let mut out = Vec::new();
        tail.show(&mut out, "repair").unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_tail_of_a_scene_has_nothing_of_the_one_before() {
        let mut tail = Tail::default();
        for text in ["scene begin name=allow", "of the one before", "scene begin name=repair", "of this one"]
        {
            push(&mut tail, text);
        }

        let text = end(&mut tail);

        assert!(text.contains("the log of repair") && text.contains("of this one"), "{text}");
        assert!(!text.contains("of the one before"), "{text}");
    }

    #[test]
    fn the_tail_keeps_the_last_lines() {
        let mut tail = Tail::default();
        for number in 0..100 {
            let text = format!("line {number}");
            push(&mut tail, &text);
        }
        let text = end(&mut tail);

        assert!(text.contains("line 99\n") && text.contains("line 80\n") && !text.contains("line 79\n"));
    }
}
