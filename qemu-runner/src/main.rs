//! `cargo run`: builds, boots and judges. `cargo run -- --help` explains.

use std::{
    env,
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use qemu_runner::{Demonstration, Error, HELP, Measurement, Options, Request, Rows, toolchain_arguments};

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // Whoever closed standard error has the exit status.
            let _ = writeln!(io::stderr(), "portcullis: {error}");
            ExitCode::from(if matches!(error, Error::Usage(_)) { 2 } else { 1 })
        }
    }
}

/// Does what the command line asks; returns whether everything passed.
fn run() -> Result<bool, Error> {
    match Request::read(env::args_os().skip(1))? {
        Request::Help => print(HELP),
        Request::Toolchain(options) => {
            let arguments = toolchain_arguments(&options)?;
            print(&arguments.into_iter().map(|argument| argument + "\n").collect::<String>())
        }
        Request::Measure(options) => measure(options),
        Request::Demonstrate(options) => demonstrate(options, None),
        Request::Boot(elf, options) => demonstrate(options, Some(&elf)),
    }
}

/// Measures, prints what was measured, and compares it with what was kept; with `--record`, keeps it.
fn measure(options: Options) -> Result<bool, Error> {
    let record = options.record;
    let measurement = Measurement::prepare(options)?;
    let (rows_path, kept_path) = (measurement.rows_path(), measurement.kept_path());
    // Read before anything is measured: a damaged file is told at once.
    let (mut rows, mut kept) = (Rows::read(&rows_path)?, Rows::read(&kept_path)?);
    let measured = measurement.run()?;
    print(&measured.table())?;
    rows.replace(measured.clone());
    rows.write(&rows_path)?;
    let comparison = rows.compare(&kept);
    print(&format!("\n{}Figures: {}\n", comparison.text(), rows_path.display()))?;
    if record {
        kept.replace(measured.kept());
        // Of the benches, those that were run.
        kept.renew(rows.kept());
        kept.write(&kept_path)?;
        print(&format!("Kept: {}\n", kept_path.display()))?;
    }
    Ok(record || comparison.passed())
}

fn print(text: &str) -> Result<bool, Error> {
    let written = io::stdout().write_all(text.as_bytes());
    written.map(|()| true).map_err(|source| Error::Io { doing: "writing to standard output".into(), source })
}

/// Shows the demonstration as often as asked; the report is of the first time that failed, or else of the last.
fn demonstrate(options: Options, elf: Option<&Path>) -> Result<bool, Error> {
    let times = options.repeat;
    let demonstration = Demonstration::prepare(options, elf)?;
    let path = demonstration.report_path();
    let mut failed = 0;
    for time in 1..=times {
        let mut shown = Vec::new();
        let report = match times {
            1 => demonstration.run(&mut io::stdout())?,
            // A log that passes is the same as the one before; one that fails is worth reading.
            _ => demonstration.run(&mut shown)?,
        };
        if failed == 0 {
            report.write(&path)?;
        }
        if times == 1 || !report.passed() {
            print(&format!("{}\n{}", String::from_utf8_lossy(&shown), report.summary()))?;
        }
        if times > 1 {
            print(&format!("boot {time} of {times}: {}\n", report.closing_line()))?;
        }
        failed += u32::from(!report.passed());
    }
    if times > 1 {
        print(&format!("{times} boots: {} passed, {failed} failed.\n", times - failed))?;
    }
    print(&format!("Report: {}\n", path.display()))?;
    Ok(failed == 0)
}
