//! Why a demonstration could not be shown.

use std::{fmt, io, path::Path};

/// Why a demonstration could not be prepared or watched.
///
/// A demonstration that ran and failed is not an error: its [`Report`](crate::Report) says what failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The command line asks for something that does not exist; the text says what does.
    Usage(String),
    /// This machine has no QEMU that can show a scene, and none could be fetched; the text says what to install.
    NoQemu(String),
    /// The Rust toolchain has no `core` for a bare-metal target, and none could be made; the text says what to install.
    NoTarget(String),
    /// Cargo did not build `package`; it has said why on standard error, unless `said` does.
    NotBuilt {
        /// Name of the cargo package.
        package: String,
        /// What is missing, in one sentence.
        said: String,
    },
    /// Another program was run and failed, or ran for too long.
    Program {
        /// Name of the program.
        program: String,
        /// What it printed, or what it did not do.
        said: String,
    },
    /// The hypervisor image cannot be used for decoding its log.
    Image(String),
    /// Figures could not be measured, or a file does not hold any.
    Figures(String),
    /// The operating system refused something.
    Io {
        /// What was being done, and to which file.
        doing: String,
        /// The system's reason.
        source: io::Error,
    },
}

impl Error {
    /// Returns a function that makes an error out of the system's refusal to do `doing` to `path`.
    ///
    /// Made for `map_err`: `fs::read(path).map_err(Error::io("reading", path))`.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing: format!("{doing} {}", path.display()), source }
    }

    /// Makes an error out of a refused write of what is shown to the user.
    pub(crate) fn output(source: io::Error) -> Self {
        Self::Io { doing: "writing the log".into(), source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(said) => write!(f, "{said} (`cargo run -- --help` explains)"),
            Self::NoQemu(said) | Self::NoTarget(said) | Self::Image(said) | Self::Figures(said) => {
                f.write_str(said)
            }
            Self::NotBuilt { package, said } => write!(f, "package {package} was not built: {said}"),
            Self::Program { program, said } => write!(f, "{program}: {}", said.trim_end()),
            Self::Io { doing, source } => write!(f, "{doing}: {source}"),
        }
    }
}

impl std::error::Error for Error {}
