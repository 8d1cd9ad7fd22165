//! The demonstration as `cargo run` shows it, run once and looked at from several sides.
//!
//! Provisioning follows the environment as `cargo run` does. Where no QEMU can be had, the tests say so and pass,
//! unless the environment has `CI=true`: `cargo test` has no word for a test that could not be run.

use std::{
    io::{self, Write},
    sync::LazyLock,
};

use qemu_runner::{Demonstration, Error, Options, Report};

/// The machines, in the order in which they are booted.
const MACHINES: [&str; 2] = ["x86_64", "aarch64"];

/// The scenes of each machine as it comes, in the order in which they are shown.
const SCENES: [&str; 12] = [
    "deny",
    "allow",
    "event",
    "repair",
    "silence",
    "forgery",
    "restraint",
    "claims",
    "departure",
    "isolation",
    "pager",
    "interrupts",
];

/// The other boots, in their order, and the scenes of each.
const VARIANTS: &[(&str, &str, &[&str])] = &[
    ("x86_64", "second-stage", &["deny", "allow", "event", "isolation", "trust", "interrupts"]),
    ("x86_64", "legacy", &["deny", "allow", "event", "isolation", "trust"]),
    ("aarch64", "second-stage", &["deny", "allow", "event", "repair", "isolation", "trust", "interrupts"]),
    ("x86_64", "pressure", &["recovery", "storm", "overflow", "staleness", "batch"]),
    ("aarch64", "pressure", &["recovery", "storm", "overflow", "staleness", "batch"]),
    ("aarch64", "nested", &["allow", "repair", "nested"]),
    ("x86_64", "restart", &["restart", "repair"]),
    ("aarch64", "restart", &["restart", "repair"]),
];

/// Every boot: its machine, its variant and its scenes.
fn boots() -> impl Iterator<Item = (&'static str, Option<&'static str>, &'static [&'static str])> {
    let ordinary = MACHINES.into_iter().map(|machine| (machine, None, &SCENES[..]));
    ordinary.chain(VARIANTS.iter().map(|&(machine, variant, scenes)| (machine, Some(variant), scenes)))
}

/// The scenes of aarch64, and their variants, for which a part of ours stands in for one that QEMU lacks: page requests on
/// SMMUv3.
const TEST_DOUBLES: &[(Option<&str>, &str)] = &[
    (None, "repair"),
    (None, "silence"),
    (None, "forgery"),
    (None, "restraint"),
    (None, "claims"),
    (None, "departure"),
    (None, "pager"),
    (Some("second-stage"), "repair"),
    (Some("pressure"), "recovery"),
    (Some("pressure"), "overflow"),
    (Some("pressure"), "staleness"),
    (Some("pressure"), "batch"),
    (Some("nested"), "repair"),
    (Some("restart"), "repair"),
];

/// What became of the one boot of each machine that all tests look at.
struct Shown {
    report: Report,
    /// All that `cargo run` would have shown.
    log: String,
}

/// The demonstration, shown once; `None` where this machine cannot show it and need not.
static SHOWN: LazyLock<Option<Shown>> = LazyLock::new(|| {
    let options = Options::from_environment();
    let must = options.skips_fail;
    let mut log = Vec::new();
    match Demonstration::prepare(options, None).and_then(|ready| ready.run(&mut log)) {
        Ok(report) => Some(Shown { report, log: String::from_utf8_lossy(&log).into_owned() }),
        Err(Error::NoQemu(reason)) if !must => {
            // Past the test harness, which keeps to itself what a passing test prints.
            let _ = writeln!(
                io::stderr(),
                "\nNOT RUN: the boot tests need QEMU, and pass without having shown anything.\n{reason}\n"
            );
            None
        }
        Err(error) => panic!("the demonstration could not be shown: {error}"),
    }
});

#[test]
fn every_scene_of_each_boot_is_reported_once_and_in_order() {
    let Some(shown) = &*SHOWN else { return };

    let scenes = &shown.report.scenes;
    let names: Vec<_> =
        scenes.iter().map(|scene| (scene.machine, scene.variant, scene.name.as_str())).collect();

    let expected: Vec<_> = boots()
        .flat_map(|(machine, variant, scenes)| scenes.iter().map(move |name| (machine, variant, *name)))
        .collect();
    assert_eq!(names, expected);
}

#[test]
fn the_demonstration_passes() {
    let Some(shown) = &*SHOWN else { return };

    assert!(shown.report.passed(), "{}\n{}", shown.log, shown.report.summary());
    if shown.report.scenes.iter().any(|scene| scene.skipped.is_some()) {
        let _ = writeln!(io::stderr(), "\n{}", shown.report.summary());
    }
}

#[test]
fn each_scene_says_what_there_was_to_see() {
    let Some(shown) = &*SHOWN else { return };

    for scene in shown.report.scenes.iter().filter(|scene| scene.skipped.is_none()) {
        assert!(scene.passed && !scene.seen.is_empty(), "{scene:?}");
    }
}

#[test]
fn what_does_not_run_on_qemus_own_iommu_alone_says_so() {
    let Some(shown) = &*SHOWN else { return };

    let doubles = || shown.report.scenes.iter().filter(|scene| scene.test_double);

    assert!(doubles().all(|scene| scene.machine == "aarch64"));
    assert!(doubles().map(|scene| (scene.variant, scene.name.as_str())).eq(TEST_DOUBLES.iter().copied()));
}

#[test]
fn qemu_saw_each_removal_invalidated_and_no_device_bypass_translation() {
    let Some(shown) = &*SHOWN else { return };

    for (machine, variant, _) in boots() {
        let machine = &variant.map_or(machine.to_owned(), |variant| format!("{machine} {variant}"));
        let trace = &shown.report.trace[machine];

        assert!(trace.clean(), "{machine}: {:?}", trace.findings);
        assert!(trace.unmaps > 0, "{machine}: a scene removes a mapping, and none was logged");
        assert_eq!((trace.bypassed, trace.invalidated), (0, trace.unmaps), "{machine}");
        assert!(trace.detachments > 0, "{machine}: a scene detaches, and nothing was logged");
        assert_eq!(trace.detached, trace.detachments, "{machine}");
        assert_eq!(trace.forgotten, trace.entries, "{machine}");
    }
}

#[test]
fn what_the_scenes_counted_adds_up() {
    let Some(shown) = &*SHOWN else { return };

    for machine in MACHINES {
        let count = |name: &str, key: &str| {
            let scene = shown
                .report
                .scenes
                .iter()
                .find(|scene| (scene.machine, scene.variant, scene.name.as_str()) == (machine, None, name))
                .expect("all scenes are reported");
            if scene.skipped.is_some() { None } else { Some(scene.counts[key]) }
        };

        // Scenes that were skipped have no counts, and are equal in that.
        let answered = count("repair", "answered_success").zip(count("repair", "answered_invalid"));
        assert_eq!(
            count("repair", "groups"),
            answered.map(|(success, invalid)| success + invalid),
            "{machine}"
        );
        for (name, key, other) in [
            ("silence", "expired", "late_answers_refused"),
            ("forgery", "forged", "refused"),
            ("restraint", "expired", "late_answers_refused"),
            ("isolation", "tries", "refused"),
        ] {
            assert_eq!(count(name, key), count(name, other), "{machine} {name}: {key} and {other}");
        }
        for (name, key) in [
            ("repair", "groups"),
            ("silence", "expired"),
            ("forgery", "forged"),
            ("restraint", "requests_off"),
            ("restraint", "groups_of_the_neighbour"),
            ("claims", "held"),
            ("isolation", "tries"),
        ] {
            assert_ne!(count(name, key), Some(0), "{machine} {name}: {key}");
        }
        for (name, key) in
            [("silence", "stray_answers_at_the_device"), ("event", "events_of_the_other_guest")]
        {
            assert!(count(name, key).is_none_or(|count| count == 0), "{machine} {name}: {key}");
        }
    }
}

#[test]
fn what_was_counted_under_pressure_adds_up() {
    let Some(shown) = &*SHOWN else { return };

    for scene in &shown.report.scenes {
        let count = |key: &str| scene.counts[key];
        match (scene.machine, scene.name.as_str(), &scene.skipped) {
            (_, _, Some(_)) => {}
            (machine, "storm", None) => {
                assert!((1..count("refused")).contains(&count("recorded")), "{scene:?}");
                // VT-d has one register for a fault, and SMMUv3 a queue of 128.
                let room = if machine == "x86_64" { 1 } else { 128 };
                assert_eq!(count("recorded"), room, "{scene:?}");
                assert_eq!(count("guests_told_of_loss"), 2, "{scene:?}");
            }
            (machine, "overflow", None) => {
                assert!(count("notices_of_loss") > 0, "{scene:?}");
                assert_eq!(count("groups"), count("answers_at_the_device"), "{scene:?}");
                // The device's own count. Our test double takes what it then loses, and QEMU does not.
                assert_eq!(count("refused_by_the_unit") > 0, machine == "x86_64", "{scene:?}");
            }
            _ => {}
        }
    }
}

#[test]
fn the_report_names_the_version_of_qemu() {
    let Some(shown) = &*SHOWN else { return };

    for machine in MACHINES {
        let version = &shown.report.qemu[machine];

        assert!(version.starts_with(|first: char| first.is_ascii_digit()), "{machine}: {version}");
    }
}
