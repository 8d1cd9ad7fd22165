//! The compiler and its bare-metal targets: present, added by rustup, or made from the compiler's own source.
//!
//! A rustup toolchain is never written to: a library put there by hand collides with the one that rustup adds later.

use std::{
    env,
    ffi::OsString,
    fmt::Write as _,
    fs,
    hash::{DefaultHasher, Hasher},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    apt::Apt,
    error::Error,
    process::{checked, on_path, say},
    workspace::{Workspace, cargo},
};

/// The targets that the workspace's images and packages are built for.
pub(crate) const BARE_TARGETS: [&str; 2] = ["x86_64-unknown-none", "aarch64-unknown-none-softfloat"];

/// The libraries that an image of ours links.
const LIBRARIES: [&str; 3] = ["core", "alloc", "compiler_builtins"];

/// Limit for a question to rustc.
const QUESTION_LIMIT: Duration = Duration::from_secs(60);
/// Limit for rustup's download of a target (some 20 MB) and for building `core` (a minute on a slow machine).
const WORK_LIMIT: Duration = Duration::from_secs(1200);

/// Variables that would replace or change the flags that a bare-metal build needs.
const SET_ASIDE: [&str; 4] =
    ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_RUSTFLAGS", "CARGO_BUILD_TARGET"];

/// A compiler that can build for some bare-metal targets.
#[derive(Debug)]
pub(crate) struct Toolchain {
    root: PathBuf,
    /// Targets whose libraries are in a private sysroot, with its directory.
    private: Vec<(&'static str, PathBuf)>,
}

impl Toolchain {
    /// Finds, fetches or makes what building for `targets` needs.
    pub(crate) fn provide(
        workspace: &Workspace,
        targets: &[&'static str],
        offline: bool,
    ) -> Result<Self, Error> {
        if SET_ASIDE.iter().any(|name| env::var_os(name).is_some()) {
            say(
                "flags for rustc are set in the environment; they are set aside for the builds made here, which need their own",
            );
        }
        let compiler = Compiler::ask(&workspace.root)?;
        let without_rustup = env::var_os("PORTCULLIS_NO_RUSTUP").is_some();
        let missing = |compiler: &Compiler| -> Vec<&'static str> {
            targets
                .iter()
                .copied()
                .filter(|target| without_rustup || !has_target(&compiler.sysroot, target))
                .collect()
        };

        let mut needed = missing(&compiler);
        let mut rustup = "rustup was not asked".to_owned();
        if !needed.is_empty() && !offline && !without_rustup && on_path("rustup").is_some() {
            say(&format!("asking rustup for the target {} (about 20 MB each)", needed.join(" and ")));
            let mut command = in_root("rustup", &workspace.root);
            match checked(command.args(["target", "add"]).args(&needed), WORK_LIMIT) {
                Ok(_) => needed = missing(&compiler),
                Err(error) => {
                    rustup = error.to_string();
                    say(&format!("rustup could not; trying to build from Rust's own source ({rustup})"));
                }
            }
        }
        let private = needed
            .into_iter()
            .map(|target| match private_sysroot(workspace, &compiler, target, offline) {
                Ok(sysroot) => Ok((target, sysroot)),
                Err(error) => Err(Error::NoTarget(advice(&compiler, target, &rustup, &error))),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { root: workspace.root.clone(), private })
    }

    /// Returns cargo's arguments that make the private sysroots, if any, count.
    ///
    /// Cargo joins them to the flags that the workspace's own configuration has for a target.
    pub(crate) fn cargo_arguments(&self) -> Vec<String> {
        let argument = |(target, sysroot): &(&str, PathBuf)| {
            // TOML's basic strings are JSON's, as far as paths go.
            let flag = serde_json::Value::from(format!("--sysroot={}", sysroot.display()));
            ["--config".to_owned(), format!("target.{target}.rustflags=[{flag}]")]
        };
        self.private.iter().flat_map(argument).collect()
    }

    /// Starts a cargo command in the workspace, free of flags that were meant for other builds.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = in_root(cargo(), &self.root);
        for name in SET_ASIDE {
            command.env_remove(name);
        }
        command
    }
}

fn in_root(program: impl Into<OsString>, root: &Path) -> Command {
    let mut command = Command::new(program.into());
    // Otherwise rustup may answer a question by a download that nobody announced.
    command.current_dir(root).env("RUSTUP_AUTO_INSTALL", "0");
    command
}

/// What rustc says of itself.
#[derive(Debug)]
struct Compiler {
    sysroot: PathBuf,
    /// `rustc -vV`: a library can be used by exactly the compiler that prints the same.
    identity: String,
    /// The release: `1.95.0`.
    release: String,
}

impl Compiler {
    fn ask(root: &Path) -> Result<Self, Error> {
        let rustc = || in_root(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()), root);
        let sysroot = checked(rustc().args(["--print", "sysroot"]), QUESTION_LIMIT)?;
        let identity = checked(rustc().arg("-vV"), QUESTION_LIMIT)?;
        let release =
            identity.lines().find_map(|line| line.strip_prefix("release: ")).unwrap_or_default().to_owned();
        Ok(Self { sysroot: sysroot.trim_end().into(), identity, release })
    }
}

fn library_dir(sysroot: &Path, target: &str) -> PathBuf {
    sysroot.join("lib/rustlib").join(target).join("lib")
}

fn has_target(sysroot: &Path, target: &str) -> bool {
    LIBRARIES.iter().all(|library| !libraries(&library_dir(sysroot, target), library).is_empty())
}

/// Returns the files of `library` in `dir`: `libcore-0123456789abcdef.rlib`.
fn libraries(dir: &Path, library: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let is_library = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.strip_prefix("lib")
            .and_then(|name| name.strip_prefix(library))
            .is_some_and(|rest| rest.starts_with('-'))
            && name.ends_with(".rlib")
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_library).collect();
    files.sort();
    files
}

/// Name of the file in a private sysroot that says which compiler it is for.
const IDENTITY: &str = "rustc.txt";

/// Returns a sysroot with the libraries of `target`, made for `compiler` now or earlier.
fn private_sysroot(
    workspace: &Workspace,
    compiler: &Compiler,
    target: &str,
    offline: bool,
) -> Result<PathBuf, Error> {
    let kept = workspace.kept.join("sysroot");
    fs::create_dir_all(&kept).map_err(Error::io("creating", &kept))?;
    let fits = |dir: &PathBuf| {
        has_target(dir, target)
            && fs::read_to_string(dir.join(IDENTITY)).is_ok_and(|identity| identity == compiler.identity)
    };
    let entries = fs::read_dir(&kept).map_err(Error::io("reading", &kept))?;
    if let Some(made) = entries.flatten().map(|entry| entry.path()).find(fits) {
        return Ok(made);
    }

    let work = kept.join("work");
    let made = make_sysroot(workspace, compiler, target, offline, &work);
    // Rust's source and cargo's intermediate files are large, and needed no more.
    let _ = fs::remove_dir_all(&work);
    made
}

fn make_sysroot(
    workspace: &Workspace,
    compiler: &Compiler,
    target: &str,
    offline: bool,
    work: &Path,
) -> Result<PathBuf, Error> {
    let source = rust_source(workspace, compiler, offline, work)?;
    say(&format!("building core and alloc for {target} from {}", source.display()));
    let empty = work.join("empty");
    let write = |name: &str, text: &str| {
        let path = empty.join(name);
        fs::write(&path, text).map_err(Error::io("writing", &path))
    };
    fs::create_dir_all(empty.join("src")).map_err(Error::io("creating", &empty))?;
    write("Cargo.toml", "[package]\nname = \"empty\"\nedition = \"2024\"\n\n[workspace]\n")?;
    write("src/lib.rs", "#![no_std]\nextern crate alloc;\n")?;
    let flags = format!("-Cembed-bitcode=yes\x1f--remap-path-prefix={}=/rustc/library", source.display());
    let mut build = in_root(cargo(), &empty);
    for name in SET_ASIDE {
        build.env_remove(name);
    }
    build
        .args(["build", "--release", "--quiet", "--target", target])
        // Images bring no C library, so `memcpy` and its kin come from compiler_builtins.
        .args(["-Zbuild-std=core,alloc,compiler_builtins", "-Zbuild-std-features=compiler-builtins-mem"])
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .env("CARGO_TARGET_DIR", work.join("target"))
        // Building the standard library is the one thing here that stable cargo has no flag for.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", &source);
    if offline {
        build.arg("--offline");
    }
    checked(&mut build, WORK_LIMIT)?;

    let built = work.join("target").join(target).join("release/deps");
    let sysroot = work.join("sysroot");
    let into = library_dir(&sysroot, target);
    fs::create_dir_all(&into).map_err(Error::io("creating", &into))?;
    let mut hash = DefaultHasher::new();
    for library in LIBRARIES {
        let files = libraries(&built, library);
        let [file] = files.as_slice() else {
            let said = format!("left {} files of lib{library} instead of one", files.len());
            return Err(Error::Program { program: "cargo build -Zbuild-std".into(), said });
        };
        let bytes = fs::read(file).map_err(Error::io("reading", file))?;
        hash.write(&bytes);
        let copy = into.join(file.file_name().unwrap_or_default());
        fs::write(&copy, bytes).map_err(Error::io("writing", &copy))?;
    }
    let identity = sysroot.join(IDENTITY);
    fs::write(&identity, &compiler.identity).map_err(Error::io("writing", &identity))?;
    // Cargo rebuilds when flags change and not when a sysroot does: other contents must have another path.
    let name = format!("{}-{target}-{:016x}", compiler.release, hash.finish());
    let named = workspace.kept.join("sysroot").join(name);
    fs::rename(&sysroot, &named).map_err(Error::io("naming", &named))?;
    Ok(named)
}

/// Finds or fetches the `library` directory of Rust's own source, of exactly the compiler's release.
fn rust_source(
    workspace: &Workspace,
    compiler: &Compiler,
    offline: bool,
    work: &Path,
) -> Result<PathBuf, Error> {
    let packaged = format!("usr/src/rustc-{}/library", compiler.release);
    let present = [
        env::var_os("RUST_SRC").map(PathBuf::from),
        Some(compiler.sysroot.join("lib/rustlib/src/rust/library")),
        Some(Path::new("/").join(&packaged)),
    ];
    let is_source = |dir: &PathBuf| dir.join("core/Cargo.toml").is_file();
    if let Some(found) = present.into_iter().flatten().find(is_source) {
        return Ok(found);
    }
    if offline {
        return Err(Error::Program {
            program: "rust-src".into(),
            said: "it is not here, and --offline forbids to fetch it".into(),
        });
    }
    let apt = Apt::open(&workspace.kept)?;
    let version = apt.version("rust-src", &format!("{}+", compiler.release))?;
    let unpacked = work.join("rust-src");
    apt.unpack(&["rust-src"], &version, &unpacked)?;
    Some(unpacked.join(packaged)).filter(is_source).ok_or_else(|| Error::Program {
        program: "rust-src".into(),
        said: format!("package {version} has no library directory where one is expected"),
    })
}

fn advice(compiler: &Compiler, target: &str, rustup: &str, error: &Error) -> String {
    let mut text =
        format!("rustc {} has no libraries for {target}, and none could be had:\n", compiler.release);
    let _ = writeln!(text, "  rustup: {rustup}");
    let _ = writeln!(text, "  rust-src: {error}");
    let _ = write!(
        text,
        "With rustup, run `rustup target add {target}`. Without, unpack Rust's source of release {} and name its library\n\
         directory in RUST_SRC.",
        compiler.release
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_sysroot_becomes_an_argument_for_cargo() {
        let toolchain = Toolchain {
            root: "/here".into(),
            private: vec![("x86_64-unknown-none", "/a \"quoted\" place".into())],
        };

        assert_eq!(
            toolchain.cargo_arguments(),
            ["--config", r#"target.x86_64-unknown-none.rustflags=["--sysroot=/a \"quoted\" place"]"#]
        );
    }

    #[test]
    fn a_toolchain_with_its_targets_needs_no_arguments() {
        assert_eq!(Toolchain { root: "/here".into(), private: Vec::new() }.cargo_arguments(), [""; 0]);
    }

    #[test]
    fn flags_for_other_builds_do_not_reach_ours() {
        let command = Toolchain { root: "/here".into(), private: Vec::new() }.cargo();

        for name in SET_ASIDE {
            assert!(
                command.get_envs().any(|(variable, value)| variable == name && value.is_none()),
                "{name}"
            );
        }
    }

    #[test]
    fn the_compiler_that_builds_this_has_its_own_target_and_no_other() {
        let compiler = Compiler::ask(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        let host = compiler.identity.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();

        assert!(has_target(&compiler.sysroot, host));
        assert!(!has_target(&compiler.sysroot, "pdp11-unknown-none"));
    }
}
