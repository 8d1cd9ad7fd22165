//! `cargo run`: builds, boots and judges. `cargo run -- --help` explains.

use std::{
    env,
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use qemu_runner::{Demonstration, Error, HELP, Options, Request, toolchain_arguments};

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
        Request::Demonstrate(options) => demonstrate(options, None),
        Request::Boot(elf, options) => demonstrate(options, Some(&elf)),
    }
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
