//! What the benches share. How to run them, and what they need: `README.md` beside this package.

pub mod pgtable;

use std::process::Command;

/// The programs that count instructions, and what installs each.
const TOOLS: [(&str, &str); 2] = [
    ("valgrind", "apt install valgrind, or the like for your system"),
    ("gungraun-runner", "cargo install gungraun-runner --version 0.20.0 --locked"),
];

/// Ends the process, and says what to install, if a program that counts instructions is missing.
pub fn tools_or_exit() {
    // The process that is counted is started by one that has looked.
    if std::env::args().any(|argument| argument.starts_with("--gungraun-run")) {
        return;
    }
    let missing = TOOLS.iter().filter(|(name, _)| {
        // Whoever says where its runner is has one.
        let elsewhere = *name == "gungraun-runner" && option_env!("GUNGRAUN_RUNNER").is_some();
        !elsewhere && Command::new(name).arg("--version").output().is_err()
    });
    let missing: Vec<_> =
        missing.map(|(name, how)| format!("{name} is missing; install it: {how}")).collect();
    if !missing.is_empty() {
        eprintln!("instructions cannot be counted:\n  {}", missing.join("\n  "));
        std::process::exit(1);
    }
}
