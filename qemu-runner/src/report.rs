//! The verdict on a demonstration: for a person as a table, for a program as `report.json`.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use serde::Serialize;

use crate::{
    error::Error,
    scenes::{Progress, Record, Transcript},
    trace::Trace,
    variant::{Scene, Variant},
};

/// The verdict on a demonstration.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Report {
    /// QEMU's version, by machine.
    pub qemu: BTreeMap<&'static str, String>,
    /// The scenes, in the order in which they were to be shown.
    pub scenes: Vec<SceneReport>,
    /// What QEMU's own trace shows, by boot: the machine, and after a space the variant where it is not the machine as it
    /// comes.
    pub trace: BTreeMap<String, Trace>,
    /// What failed outside any scene, in words.
    pub problems: Vec<String>,
}

/// The verdict on one scene.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct SceneReport {
    /// Name of the machine.
    pub machine: &'static str,
    /// Name of the scene.
    pub name: String,
    /// The variant of the machine, where it is not the machine as it comes.
    pub variant: Option<&'static str>,
    /// Whether it ran, and showed what it should.
    pub passed: bool,
    /// Why it was not shown, if it was not.
    pub skipped: Option<String>,
    /// Whether something that the scene is evidence about is our own model in place of QEMU's.
    pub test_double: bool,
    /// What there was to see.
    pub seen: String,
    /// What the hypervisor counted, by its own names.
    pub counts: BTreeMap<String, u64>,
}

impl SceneReport {
    fn verdict(&self) -> &'static str {
        match (self.passed, &self.skipped) {
            (true, _) => "passed",
            (false, Some(_)) => "SKIPPED",
            (false, None) => "FAILED",
        }
    }

    /// The boot that showed it.
    fn boot(&self) -> String {
        self.variant.map_or(self.machine.into(), |variant| format!("{} {variant}", self.machine))
    }
}

/// A boot to be judged: what was expected of it, and what became of it.
pub(crate) struct Evidence<'e> {
    pub(crate) variant: &'e Variant,
    pub(crate) qemu_version: &'e str,
    /// The scenes that were asked for.
    pub(crate) wanted: &'e [Scene],
    /// Why scenes with page requests could not be shown, if they could not.
    pub(crate) no_page_requests: Option<&'e str>,
    /// Whether a scene that is skipped counts as failed.
    pub(crate) skips_fail: bool,
    pub(crate) transcript: &'e Transcript,
    /// What is wrong with how the boot ended, if something is.
    pub(crate) ending: Option<String>,
    /// Damaged frames on the serial port.
    pub(crate) lost: u64,
    pub(crate) trace: Trace,
    /// What QEMU said of all that the scenes want it to say.
    pub(crate) said: Vec<&'e str>,
}

impl Report {
    /// Whether everything that could be shown was shown, and passed.
    pub fn passed(&self) -> bool {
        self.problems.is_empty() && self.scenes.iter().all(|scene| scene.passed || scene.skipped.is_some())
    }

    /// Judges one boot and adds what follows.
    pub(crate) fn judge(&mut self, evidence: Evidence<'_>) {
        let boot = evidence.variant.to_string();
        self.qemu.insert(evidence.variant.machine.name(), evidence.qemu_version.to_owned());
        let scenes: Vec<SceneReport> =
            evidence.wanted.iter().map(|scene| judge_scene(scene, &evidence)).collect();

        let mut problems: Vec<String> = evidence.ending.clone().into_iter().collect();
        if evidence.lost > 0 {
            problems.push(format!(
                "{} lines of the log were damaged on the serial port and are missing",
                evidence.lost
            ));
        }
        problems.extend(evidence.transcript.complaints.iter().cloned());
        for record in &evidence.transcript.scenes {
            if !evidence.wanted.iter().any(|scene| scene.name == record.name) {
                problems.push(format!(
                    "the hypervisor showed the scene {}, which was not asked for",
                    record.name
                ));
            }
        }
        for scene in scenes.iter().filter(|scene| scene.skipped.is_some()) {
            // The hypervisor was given all that it needs for every scene that it was asked for.
            let by_hypervisor = evidence.transcript.record(&scene.name).is_some();
            if by_hypervisor || evidence.skips_fail {
                problems.push(format!(
                    "the scene {} was skipped: {}",
                    scene.name,
                    scene.skipped.as_deref().unwrap_or_default()
                ));
            }
        }
        for record in &evidence.transcript.scenes {
            if let Some(&counted) = record.counts.get("unmaps").filter(|&&counted| counted != record.unmaps) {
                problems.push(format!(
                    "the scene {} counts {counted} unmaps, and its log shows {}",
                    record.name, record.unmaps
                ));
            }
        }
        if evidence.ending.is_none() {
            let passed = scenes.iter().filter(|scene| scene.passed).count() as u64;
            let ended = |record: &&Record| matches!(record.progress, Progress::Ended { .. });
            let logged = (evidence.transcript.scenes.iter().filter(ended).count() as u64, passed);
            match evidence.transcript.end {
                None => problems.push("the hypervisor did not say how many scenes it showed".into()),
                Some(counted) if counted != logged => problems.push(format!(
                    "the hypervisor counts {} scenes of which {} passed, and its log shows {} and {}",
                    counted.0, counted.1, logged.0, logged.1
                )),
                Some(_) => {}
            }
        }
        if !evidence.trace.clean() {
            problems.push("QEMU's trace contradicts the hypervisor".into());
        }

        self.scenes.extend(scenes);
        self.problems.extend(problems.into_iter().map(|problem| format!("{boot}: {problem}")));
        self.trace.insert(boot, evidence.trace);
    }

    /// Writes `report.json` to `path`, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let mut text = serde_json::to_string_pretty(self).map_err(|reason| Error::Io {
            doing: format!("writing {}", path.display()),
            source: reason.into(),
        })?;
        text.push('\n');
        let unfinished = path.with_extension("unfinished");
        fs::write(&unfinished, text).map_err(Error::io("writing", &unfinished))?;
        fs::rename(&unfinished, path).map_err(Error::io("naming", path))
    }

    /// Returns the report as a person reads it.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        let width =
            self.scenes.iter().map(|scene| scene.name.len()).max().unwrap_or_default().max("scene".len());
        let boots = self.scenes.iter().map(|scene| scene.boot().len()).max().unwrap_or_default().max(8);
        let mut row = |scene: &str, boot: &str, verdict: &str, double: &str, seen: &str| {
            let line = format!("{scene:<width$}  {boot:<boots$} {verdict:<8} {double:<12} {seen}");
            let _ = writeln!(text, "{}", line.trim_end());
        };
        row("scene", "boot", "verdict", "test double", "seen");
        for scene in &self.scenes {
            let double = if scene.test_double { "yes" } else { "no" };
            let seen = scene.skipped.as_deref().unwrap_or(&scene.seen);
            row(&scene.name, &scene.boot(), scene.verdict(), double, seen);
        }
        text.push('\n');
        for (boot, trace) in &self.trace {
            let detachments = match trace.detachments {
                0 => "0 detachments told".into(),
                told => format!("{} of {told} detachments complete", trace.detached),
            };
            let entries = match trace.entries {
                0 => String::new(),
                told => format!("; {} of {told} guest entries invalidated", trace.forgotten),
            };
            let _ = writeln!(
                text,
                "QEMU's trace ({boot}): {} bypassed translations; {} of {} unmaps invalidated; {detachments}{entries}.",
                trace.bypassed, trace.invalidated, trace.unmaps
            );
            for finding in &trace.findings {
                let _ = writeln!(text, "  {finding}");
            }
        }
        for problem in &self.problems {
            let _ = writeln!(text, "Problem on {problem}");
        }
        text.push_str(&self.closing_line());
        text.push('\n');
        text
    }

    /// Returns the verdict in one line.
    pub fn closing_line(&self) -> String {
        let total = self.scenes.len();
        let passed = self.scenes.iter().filter(|scene| scene.passed).count();
        let skipped = self.scenes.iter().filter(|scene| scene.skipped.is_some()).count();
        match (self.passed(), skipped) {
            (true, 0) => format!("All {total} scenes passed."),
            (true, _) => format!(
                "INCOMPLETE: {passed} of {total} scenes passed, and {skipped} were SKIPPED: QEMU cannot show them here."
            ),
            (false, _) => format!(
                "FAILED: {passed} of {total} scenes passed, {skipped} were skipped; problems: {}.",
                self.problems.len()
            ),
        }
    }
}

fn judge_scene(scene: &Scene, evidence: &Evidence<'_>) -> SceneReport {
    let record = evidence.transcript.record(scene.name);
    let said = |passed: bool| match record.and_then(|record| record.guest.as_deref()) {
        Some(guest) if !passed => format!("; the last that a guest said: {guest}"),
        _ => String::new(),
    };
    let witnessed = scene.witness.is_empty() || evidence.said.contains(&scene.witness);
    let (passed, skipped, seen) = match (record.map(|record| &record.progress), evidence.no_page_requests) {
        (Some(Progress::Ended { passed: true, .. }), _) if !witnessed => {
            (false, None, format!("the hypervisor saw it, and QEMU did not say: {}", scene.witness))
        }
        (Some(Progress::Ended { passed, seen }), _) => (*passed, None, seen.clone() + &said(*passed)),
        (Some(Progress::Skipped { reason }), _) => (false, Some(reason.clone()), String::new()),
        (Some(Progress::Began), _) => {
            let last = evidence.transcript.last.as_deref().unwrap_or("nothing since");
            (false, None, format!("it began and never ended; last in the log: {last}{}", said(false)))
        }
        (None, Some(reason)) if scene.page_requests => (false, Some(reason.to_owned()), String::new()),
        (None, _) => (false, None, "it never began".into()),
    };
    SceneReport {
        machine: evidence.variant.machine.name(),
        name: scene.name.to_owned(),
        variant: evidence.variant.name,
        passed,
        skipped,
        test_double: scene.test_double,
        seen,
        counts: record.map(|record| record.counts.clone()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        log::{Level, Line},
        machine::Machine,
        scenes::Message,
        variant::VARIANTS,
    };

    /// What a hypervisor logs that shows `names` and passes them all.
    fn all_passed(names: &[&str]) -> Vec<String> {
        let mut lines = Vec::new();
        for name in names {
            lines.push(format!("scene begin name={name}"));
            lines.push(format!("scene count name={name} key=answers value=3"));
            lines.push(format!("scene end name={name} passed=true seen=what {name} shows"));
        }
        lines.push(format!("demonstration end scenes={0} passed={0}", names.len()));
        lines
    }

    fn transcript(lines: &[String]) -> Transcript {
        let mut transcript = Transcript::default();
        for text in lines {
            let line = Line { time: String::new(), level: Level::Info, text: text.clone(), place: None };
            transcript.note(&line, &Message::read(&line));
        }
        transcript
    }

    fn evidence(transcript: &Transcript) -> Evidence<'_> {
        Evidence {
            variant: &VARIANTS[0],
            qemu_version: "11.1.3",
            wanted: VARIANTS[0].scenes,
            no_page_requests: None,
            skips_fail: false,
            transcript,
            ending: None,
            lost: 0,
            trace: Trace { enabled: true, ..Trace::default() },
            said: VARIANTS.iter().flat_map(|variant| variant.scenes).map(|scene| scene.witness).collect(),
        }
    }

    fn judged(evidence: Evidence<'_>) -> Report {
        let mut report = Report::default();
        report.judge(evidence);
        report
    }

    fn names() -> Vec<&'static str> {
        VARIANTS[0].scenes.iter().map(|scene| scene.name).collect()
    }

    #[test]
    fn a_demonstration_in_which_all_is_well_passes() {
        let transcript = transcript(&all_passed(&names()));

        let report = judged(evidence(&transcript));

        assert!(report.passed(), "{report:?}");
        assert_eq!(report.closing_line(), "All 12 scenes passed.");
        assert!(report.summary().contains("repair      x86_64   passed   no           what repair shows\n"));
    }

    #[test]
    fn both_machines_stand_side_by_side_each_with_its_test_doubles_and_its_trace() {
        let mut report = Report::default();
        for variant in &VARIANTS[..2] {
            let names: Vec<_> = variant.scenes.iter().map(|scene| scene.name).collect();
            let transcript = transcript(&all_passed(&names));
            report.judge(Evidence { variant, wanted: variant.scenes, ..evidence(&transcript) });
        }

        let summary = report.summary();

        assert_eq!(report.closing_line(), "All 24 scenes passed.");
        assert!(
            summary.contains("repair      x86_64   passed   no           what repair shows\n"),
            "{summary}"
        );
        assert!(
            summary.contains("repair      aarch64  passed   yes          what repair shows\n"),
            "{summary}"
        );
        assert!(
            summary.contains("event       aarch64  passed   no           what event shows\n"),
            "{summary}"
        );
        for machine in Machine::ALL {
            assert!(report.qemu.contains_key(machine.name()) && report.trace.contains_key(machine.name()));
        }
    }

    #[test]
    fn the_report_has_the_promised_shape() {
        let transcript = transcript(&all_passed(&["deny"]));
        let wanted = &VARIANTS[0].scenes[..1];

        let report = judged(Evidence { wanted, ..evidence(&transcript) });
        let mut json = serde_json::to_value(&report).unwrap();
        json.as_object_mut().unwrap().remove("trace");

        assert_eq!(
            json,
            serde_json::json!({
                "qemu": {"x86_64": "11.1.3"},
                "scenes": [{
                    "machine": "x86_64", "name": "deny", "variant": null, "passed": true, "skipped": null,
                    "test_double": false, "seen": "what deny shows", "counts": {"answers": 3},
                }],
                "problems": [],
            })
        );
    }

    #[test]
    fn a_scene_that_qemu_is_to_witness_fails_where_it_does_not() {
        let transcript = transcript(&all_passed(&["storm"]));
        let wanted = &[Scene { name: "storm", witness: "PFO", ..VARIANTS[0].scenes[0] }];

        let silent = judged(Evidence { wanted, ..evidence(&transcript) });
        let said = judged(Evidence { wanted, said: vec!["PFO"], ..evidence(&transcript) });

        assert!(said.passed(), "{said:?}");
        assert!(!silent.passed() && silent.scenes[0].seen.contains("PFO"), "{silent:?}");
    }

    #[test]
    fn a_scene_that_never_began_has_failed() {
        let transcript = transcript(&all_passed(&names()[1..]));

        let report = judged(evidence(&transcript));

        assert!(!report.passed() && !report.scenes[0].passed);
        assert_eq!(report.scenes[0].seen, "it never began");
    }

    #[test]
    fn a_scene_that_never_ended_tells_what_was_logged_last() {
        let transcript = transcript(&["scene begin name=deny".into(), "panicked at arch/x86_64".into()]);

        let report = judged(Evidence {
            ending: Some("the hypervisor ended: something failed".into()),
            ..evidence(&transcript)
        });

        assert!(!report.passed());
        assert!(report.scenes[0].seen.contains("panicked at arch/x86_64"), "{}", report.scenes[0].seen);
        assert!(report.summary().contains("Problem on x86_64: the hypervisor ended: something failed\n"));
    }

    #[test]
    fn a_scene_that_failed_quotes_what_a_guest_said_last() {
        let lines = |end: &str| {
            let lines = ["scene begin name=deny", "guest 0: the data is wrong", "fault: of another", end];
            transcript(&lines.map(String::from))
        };
        let failed = lines("scene end name=deny passed=false seen=no data");
        let passed = lines("scene end name=deny passed=true seen=data");
        let unended = lines("more");

        let seen = |transcript| judged(evidence(transcript)).scenes[0].seen.clone();

        assert_eq!(seen(&failed), "no data; the last that a guest said: guest 0: the data is wrong");
        assert_eq!(seen(&passed), "data");
        assert!(seen(&unended).contains("more") && seen(&unended).ends_with("guest 0: the data is wrong"));
    }

    #[test]
    fn what_a_scene_counts_as_unmapped_is_what_was_logged() {
        let unmap = "unmap stream=0x18 pasid=0x1 domain=0x5 iova=0x40000000 pages=1";
        let count = "scene count name=deny key=unmaps value=2";
        let end = "scene end name=deny passed=true seen=x";
        let problems = |unmaps: usize| {
            let lines = [&["scene begin name=deny"], &vec![unmap; unmaps][..], &[count, end]].concat();
            let lines: Vec<String> = lines.into_iter().map(String::from).collect();
            judged(evidence(&transcript(&lines))).problems
        };

        let told = |unmaps| problems(unmaps).iter().any(|problem| problem.contains("counts 2 unmaps"));

        assert!(!told(2) && told(1) && told(3));
    }

    #[test]
    fn the_summary_tells_how_many_detachments_the_trace_was_asked_for() {
        let transcript = transcript(&all_passed(&names()));
        let told = Trace { enabled: true, detachments: 3, detached: 3, ..Trace::default() };

        let none = judged(evidence(&transcript)).summary();
        let some = judged(Evidence { trace: told, ..evidence(&transcript) }).summary();

        assert!(none.contains("unmaps invalidated; 0 detachments told.\n"), "{none}");
        assert!(some.contains("unmaps invalidated; 3 of 3 detachments complete.\n"), "{some}");
    }

    #[test]
    fn a_scene_that_failed_fails_the_report() {
        let lines: Vec<String> = all_passed(&names())
            .into_iter()
            .map(|line| {
                line.replace("passed=true seen=what repair", "passed=false seen=what repair")
                    .replace("passed=12", "passed=11")
            })
            .collect();
        let transcript = transcript(&lines);

        let report = judged(evidence(&transcript));

        assert!(!report.passed() && report.problems.is_empty());
        assert!(report.summary().contains("FAILED: 11 of 12 scenes passed"));
    }

    #[test]
    fn scenes_that_qemu_cannot_show_are_skipped_aloud_and_fail_where_skips_do() {
        let transcript = transcript(&all_passed(&["deny", "allow"]));
        let partial = |skips_fail| Evidence {
            no_page_requests: Some("QEMU 10.2 has none"),
            skips_fail,
            ..evidence(&transcript)
        };

        let (at_home, in_ci) = (judged(partial(false)), judged(partial(true)));

        assert!(at_home.passed() && !in_ci.passed());
        assert!(at_home.summary().ends_with(
            "INCOMPLETE: 2 of 12 scenes passed, and 10 were SKIPPED: QEMU cannot show them here.\n"
        ));
        assert_eq!(at_home.scenes[2].skipped.as_deref(), Some("QEMU 10.2 has none"));
        assert_eq!(in_ci.problems.len(), 10);
    }

    #[test]
    fn a_scene_that_the_hypervisor_skips_fails_the_report_everywhere() {
        let mut lines = all_passed(&names()[1..]);
        lines.push("scene skip name=deny reason=no test device".into());
        let transcript = transcript(&lines);

        let report = judged(evidence(&transcript));

        assert_eq!(report.problems, ["x86_64: the scene deny was skipped: no test device"]);
        assert!(!report.passed());
    }

    #[test]
    fn a_hypervisor_that_miscounts_or_stays_silent_is_not_believed() {
        let lines = all_passed(&names());
        let miscounted: Vec<String> =
            lines.iter().map(|line| line.replace("scenes=12 passed=12", "scenes=12 passed=11")).collect();

        for lines in [&lines[..lines.len() - 1], &miscounted[..]] {
            let transcript = transcript(lines);

            assert!(!judged(evidence(&transcript)).passed());
        }
    }

    #[test]
    fn scenes_nobody_asked_for_lost_lines_and_a_contradicting_trace_are_problems() {
        let transcript = transcript(&all_passed(&names()));

        let unasked = judged(Evidence { wanted: &VARIANTS[0].scenes[1..], ..evidence(&transcript) });
        let lost = judged(Evidence { lost: 2, ..evidence(&transcript) });
        let bypassed = judged(Evidence {
            trace: Trace { enabled: true, bypassed: 1, ..Trace::default() },
            ..evidence(&transcript)
        });

        assert!(unasked.problems[0].contains("deny"));
        assert!(lost.problems[0].contains("2 lines"));
        assert!(bypassed.problems[0].contains("trace"));
    }

    #[test]
    fn the_report_is_written_whole() {
        let path = std::env::temp_dir().join(format!("portcullis-report-{}.json", std::process::id()));

        Report::default().write(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::remove_file(&path).unwrap();

        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&text).unwrap()["scenes"],
            serde_json::json!([])
        );
    }
}
