//! Builds the images, finds or fetches what they need, boots them in QEMU, decodes their logs, and judges.
//!
//! `cargo run` in the root of the workspace runs the program of this package. A test does the same:
//!
//! ```no_run
//! use qemu_runner::{Demonstration, Options};
//!
//! let demonstration = Demonstration::prepare(Options::from_environment(), None)?;
//! let report = demonstration.run(&mut std::io::stdout())?;
//! assert!(report.passed(), "{}", report.summary());
//! # Ok::<(), qemu_runner::Error>(())
//! ```
//!
//! The path of a boot: [`Request`] is what the command line asks for; `toolchain` and `qemu` provide what is missing,
//! through `apt` where the machine has one; `build` makes the images; `variant` has every boot, and `boot` runs QEMU; `log` decodes the serial port;
//! `scenes` reads the protocol in the log, and `trace` what QEMU itself saw; [`Report`] is the verdict.
//!
//! Other programs, their output and the machine's files are not trusted: what cannot be used is an [`Error`] or a
//! failed scene, and says what to do.

mod apt;
mod boot;
mod build;
mod demonstration;
mod error;
mod flat;
mod log;
mod machine;
mod measurement;
mod options;
mod peers;
mod process;
mod qemu;
mod report;
mod rows;
mod scenes;
mod sizes;
mod toolchain;
mod trace;
mod variant;
mod workspace;

pub use demonstration::{Demonstration, toolchain_arguments};
pub use error::Error;
pub use machine::Machine;
pub use measurement::Measurement;
pub use options::{HELP, Options, Request};
pub use report::{Report, SceneReport};
pub use rows::{BYTES, Comparison, HOST, INSTRUCTIONS, MMIO, Row, Rows, rows_path};
pub use trace::Trace;
