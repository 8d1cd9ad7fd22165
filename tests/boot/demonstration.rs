//! The demonstration as `cargo run` shows it, run once and looked at from several sides.
//!
//! Provisioning follows the environment as `cargo run` does. Where no QEMU can be had, the tests say so and pass,
//! unless the environment has `CI=true`: `cargo test` has no word for a test that could not be run.

use std::{
    io::{self, Write},
    sync::LazyLock,
};

use qemu_runner::{Demonstration, Error, Options, Report};

/// The scenes of x86_64, in the order in which they are shown.
const X86_64: [&str; 8] =
    ["deny", "allow", "event", "repair", "silence", "forgery", "departure", "isolation"];

/// What became of the one boot that all tests look at.
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
fn every_scene_of_x86_64_is_reported_once_and_in_order() {
    let Some(shown) = &*SHOWN else { return };

    let names: Vec<(&str, &str)> =
        shown.report.scenes.iter().map(|scene| (scene.machine, scene.name.as_str())).collect();

    assert_eq!(names, X86_64.map(|name| ("x86_64", name)));
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
fn each_scene_says_what_there_was_to_see_on_qemus_own_iommu() {
    let Some(shown) = &*SHOWN else { return };

    for scene in shown.report.scenes.iter().filter(|scene| scene.skipped.is_none()) {
        assert!(scene.passed && !scene.seen.is_empty(), "{scene:?}");
        assert!(!scene.test_double && scene.variant.is_none(), "{scene:?}");
    }
}

#[test]
fn qemu_saw_each_removed_mapping_invalidated_and_no_device_bypass_translation() {
    let Some(shown) = &*SHOWN else { return };
    let trace = &shown.report.trace["x86_64"];

    assert!(trace.clean(), "{:?}", trace.findings);
    assert!(trace.unmaps > 0, "the scene allow removes a mapping, and none was logged");
    assert_eq!((trace.bypassed, trace.invalidated), (0, trace.unmaps));
}

#[test]
fn what_the_scenes_counted_adds_up() {
    let Some(shown) = &*SHOWN else { return };
    let count = |name: &str, key: &str| {
        let scene =
            shown.report.scenes.iter().find(|scene| scene.name == name).expect("all scenes are reported");
        if scene.skipped.is_some() { None } else { Some(scene.counts[key]) }
    };

    // Scenes that were skipped have no counts, and are equal in that.
    let answered = count("repair", "answered_success").zip(count("repair", "answered_invalid"));
    assert_eq!(count("repair", "groups"), answered.map(|(success, invalid)| success + invalid));
    assert_eq!(count("silence", "expired"), count("silence", "late_answers_refused"));
    assert_eq!(count("forgery", "forged"), count("forgery", "refused"));
    assert_eq!(count("isolation", "tries"), count("isolation", "refused"));
    for (name, key) in
        [("repair", "groups"), ("silence", "expired"), ("forgery", "forged"), ("isolation", "tries")]
    {
        assert_ne!(count(name, key), Some(0), "{name}: {key}");
    }
    for (name, key) in [("silence", "stray_answers_at_the_device"), ("event", "events_of_the_other_guest")] {
        assert!(count(name, key).is_none_or(|count| count == 0), "{name}: {key}");
    }
}

#[test]
fn the_report_names_the_version_of_qemu() {
    let Some(shown) = &*SHOWN else { return };

    assert!(
        shown.report.qemu["x86_64"].starts_with(|first: char| first.is_ascii_digit()),
        "{:?}",
        shown.report.qemu
    );
}
