//! The things that a boot needs built: the hypervisor, the guest image, and the plugin with the test device.

use std::{
    env,
    ffi::OsStr,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use serde::Deserialize;

use crate::{
    error::Error,
    machine::Machine,
    process::{Running, say},
    toolchain::Toolchain,
};

/// How long cargo may take to end once it has nothing more to say. How long it builds is for the user to watch.
const END_LIMIT: Duration = Duration::from_secs(60);

/// What a boot loads.
#[derive(Debug)]
pub(crate) struct Images {
    /// The hypervisor, an ELF file.
    pub(crate) hypervisor: PathBuf,
    /// The guest image, a flat binary.
    pub(crate) guest: PathBuf,
}

impl Images {
    /// Builds what `machine` needs; a `hypervisor` that is given is taken as it is.
    pub(crate) fn build(
        toolchain: &Toolchain,
        machine: Machine,
        hypervisor: Option<&Path>,
        offline: bool,
    ) -> Result<Self, Error> {
        let bare = Some(machine.target());
        Ok(Self {
            hypervisor: match hypervisor {
                Some(elf) => elf.to_owned(),
                None => build(toolchain, "hv", bare, &[], offline)?,
            },
            guest: build(toolchain, "guest", bare, &[], offline)?,
        })
    }

    /// Builds what `machine` needs to be measured; `directory` is for what is built for that alone.
    pub(crate) fn build_measuring(
        toolchain: &Toolchain,
        machine: Machine,
        directory: &Path,
        offline: bool,
    ) -> Result<Self, Error> {
        let bare = Some(machine.target());
        let measuring: [&OsStr; 4] =
            ["--features".as_ref(), "measure".as_ref(), "--target-dir".as_ref(), directory.as_ref()];
        Ok(Self {
            hypervisor: build(toolchain, "hv", bare, &measuring, offline)?,
            guest: build(toolchain, "guest", bare, &[], offline)?,
        })
    }
}

/// Builds the plugin with the test device, a shared library for the host that serves every machine.
pub(crate) fn build_plugin(toolchain: &Toolchain, offline: bool) -> Result<PathBuf, Error> {
    build(toolchain, "sva-device", None, &[], offline)
}

/// One line of `cargo build --message-format=json`, as far as it is used.
#[derive(Deserialize)]
struct Message {
    reason: String,
    target: Option<Target>,
    executable: Option<PathBuf>,
    #[serde(default)]
    filenames: Vec<PathBuf>,
}

/// The cargo target that an artifact was made from.
#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// Builds `package` in release mode, for the host if `target` is `None`, and returns its program or shared library.
///
/// With `measuring`, cargo's arguments for the image that measures, nothing below level error is logged: what a line
/// costs is the console's, and no figure of ours.
fn build(
    toolchain: &Toolchain,
    package: &str,
    target: Option<&str>,
    measuring: &[&OsStr],
    offline: bool,
) -> Result<PathBuf, Error> {
    say(&format!("building {package} for {}", target.unwrap_or("this machine")));
    let mut command = toolchain.cargo();
    command.args(["build", "--release", "--message-format=json-render-diagnostics", "--package", package]);
    if let Some(target) = target {
        command.args(["--target", target]).args(toolchain.cargo_arguments());
        if !measuring.is_empty() {
            command.args(measuring).env("DEFMT_LOG", "error");
        } else if env::var_os("DEFMT_LOG").is_none() {
            // defmt leaves out at build time what is not asked for; the runner chooses what is shown.
            command.env("DEFMT_LOG", "trace");
        }
    }
    if offline {
        command.arg("--offline");
    }
    let mut running = Running::start(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let lines = running.stdout().map(BufReader::new);
    let artifact = lines.and_then(|lines| {
        lines.lines().map_while(Result::ok).filter_map(|line| artifact(&line, package)).last()
    });
    let status = running.wait_until(Instant::now() + END_LIMIT)?;
    match (status, artifact) {
        (Some(status), Some(artifact)) if status.success() => Ok(artifact),
        (Some(status), None) if status.success() => {
            Err(not_built(package, "cargo named no program or shared library that it made"))
        }
        _ => Err(not_built(package, "cargo has said why, above")),
    }
}

fn not_built(package: &str, said: &str) -> Error {
    Error::NotBuilt { package: package.into(), said: said.into() }
}

/// Returns the program or shared library that `line`, one of cargo's messages, says was made from `package`.
fn artifact(line: &str, package: &str) -> Option<PathBuf> {
    let message: Message = serde_json::from_str(line).ok()?;
    let target = message.target.filter(|_| message.reason == "compiler-artifact")?;
    if target.name.replace('_', "-") != package {
        return None;
    }
    if target.kind.iter().any(|kind| kind == "bin") {
        return message.executable;
    }
    let shared =
        |file: &PathBuf| file.extension().is_some_and(|extension| extension == env::consts::DLL_EXTENSION);
    message.filenames.into_iter().find(shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_among_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","target":{"name":"hv","kind":["bin"]},"filenames":["/t/hv"],"executable":"/t/hv"}"#;

        assert_eq!(artifact(line, "hv"), Some("/t/hv".into()));
        assert_eq!(artifact(line, "guest"), None);
    }

    #[test]
    fn a_shared_library_is_found_beside_the_rust_library() {
        let library = format!("/t/libsva_device.{}", env::consts::DLL_EXTENSION);
        let line = format!(
            r#"{{"reason":"compiler-artifact","target":{{"name":"sva_device","kind":["cdylib","lib"]}},"filenames":["/t/libsva_device.rlib","{library}"],"executable":null}}"#
        );

        assert_eq!(artifact(&line, "sva-device"), Some(library.into()));
    }

    #[test]
    fn other_messages_are_no_artifacts() {
        for line in [
            r#"{"reason":"build-script-executed","package_id":"hv","linked_libs":[]}"#,
            r#"{"reason":"compiler-artifact","target":{"name":"hv","kind":["custom-build"]},"filenames":["/t/build"],"executable":null}"#,
            r#"{"reason":"build-finished","success":true}"#,
            "warning: not JSON",
        ] {
            assert_eq!(artifact(line, "hv"), None, "{line}");
        }
    }
}
