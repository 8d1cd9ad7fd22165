//! QEMU: finding one that can show the scenes, fetching one, and asking what it can do.

use std::{
    env,
    ffi::OsString,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    apt::Apt,
    error::Error,
    machine::Machine,
    process::{on_path, output, say},
    workspace::Workspace,
};

/// Limit for a question to QEMU, which takes a tenth of a second.
const QUESTION_LIMIT: Duration = Duration::from_secs(30);

/// A QEMU that can boot a machine of ours.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Qemu {
    start: Start,
    /// Where it was found, in words.
    pub(crate) origin: String,
    /// Its version, as it prints it.
    pub(crate) version: String,
    abilities: Abilities,
}

/// How a QEMU is started.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Start {
    program: PathBuf,
    leading: Vec<OsString>,
    module_dir: Option<PathBuf>,
}

/// What a QEMU can do beyond the least that any scene needs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Abilities {
    /// The IOMMU takes page requests (VT-d: option `svm`; SMMUv3: the plugin sees to it).
    page_requests: bool,
    /// Plugins can be loaded.
    plugins: bool,
    /// QEMU can end when the program that started it does, however that ends (since QEMU 10.2).
    ends_with_parent: bool,
}

/// A plugin that a QEMU was seen to load.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Plugin {
    pub(crate) library: PathBuf,
    /// Plugin API version to announce in [`PLUGIN_API`], where it is not the plugin's own choice.
    pub(crate) api: Option<u32>,
}

/// The environment variable by which the plugin is told which API version to announce.
pub(crate) const PLUGIN_API: &str = "PORTCULLIS_PLUGIN_API";

impl Qemu {
    /// Finds a QEMU for `machine`, or fetches one where that is possible and allowed.
    pub(crate) fn provide(workspace: &Workspace, machine: Machine, offline: bool) -> Result<Self, Error> {
        let variable = machine.qemu_variable();
        if let Some(named) = env::var_os(variable).filter(|named| !named.is_empty()) {
            return Self::ask(Start::program(named.into()), machine, variable.into()).map_err(|reason| {
                Error::NoQemu(format!("the QEMU that {variable} names cannot be used: {reason}"))
            });
        }

        let mut tried = format!("  {variable}: not set\n");
        let mut partial = None;
        let program = format!("qemu-system-{}", machine.name());
        match on_path(&program).map(|path| Self::ask(Start::program(path), machine, "PATH".into())) {
            Some(Ok(qemu)) if qemu.lacks().is_none() => return Ok(qemu),
            Some(Ok(qemu)) => partial = Some(qemu),
            Some(Err(reason)) => _ = writeln!(tried, "  PATH: {reason}"),
            None => _ = writeln!(tried, "  PATH: has no {program}"),
        }

        let kept = workspace.kept.join("qemu");
        if let Some(qemu) = cached(&kept, machine) {
            return Ok(qemu);
        }
        let fetched =
            if offline { Err("--offline forbids it".to_owned()) } else { fetch(workspace, &kept, machine) };
        match (fetched, partial) {
            (Ok(qemu), _) => Ok(qemu),
            (Err(reason), Some(qemu)) => {
                say(&format!("a QEMU that can show every scene could not be fetched: {reason}"));
                Ok(qemu)
            }
            (Err(reason), None) => {
                _ = writeln!(tried, "  fetching one: {reason}");
                Err(Error::NoQemu(advice(machine, &tried)))
            }
        }
    }

    /// Asks a QEMU what it can do; refuses one that can show no scene, and says why.
    fn ask(start: Start, machine: Machine, origin: String) -> Result<Self, String> {
        let said = |arguments: &[&str]| -> Result<String, String> {
            let captured =
                output(start.command().args(arguments), QUESTION_LIMIT).map_err(|error| error.to_string())?;
            Ok(captured.stdout + &captured.stderr)
        };
        let version = said(&["--version"])?;
        let version = version
            .lines()
            .find_map(|line| line.strip_prefix("QEMU emulator version "))
            .ok_or_else(|| format!("{} does not say that it is QEMU", start.program.display()))?;
        let (kind, name, options) = iommu(machine);
        let properties = properties(&said(&[kind, &format!("{name},help")])?);
        let offers = |name: &str| properties.iter().any(|property| property == name);
        for option in options {
            if !offers(option) {
                return Err(format!("QEMU {version} has no {name} with the option {option}"));
            }
        }
        if said(&["-device", "iommu-testdev,help"])?.contains("not found") {
            return Err(format!("QEMU {version} has no iommu-testdev"));
        }
        let help = said(&["-help"])?;
        let abilities = Abilities {
            page_requests: machine == Machine::Aarch64 || offers("svm"),
            plugins: help.lines().any(|line| line.starts_with("-plugin ")),
            ends_with_parent: help.contains("exit-with-parent="),
        };
        Ok(Self { version: version.to_owned(), start, origin, abilities })
    }

    /// Says what keeps this QEMU from showing the scenes with page requests, if something does.
    fn lacks(&self) -> Option<String> {
        if !self.abilities.page_requests {
            Some(format!("QEMU {} has no page requests (intel-iommu has no option svm)", self.version))
        } else if !self.abilities.plugins {
            Some(format!("QEMU {} was built without plugins", self.version))
        } else {
            None
        }
    }

    /// Starts a command line of this QEMU, which ends with this program where it knows how to.
    pub(crate) fn command(&self) -> Command {
        let mut command = self.start.command();
        if self.abilities.ends_with_parent {
            command.args(["-run-with", "exit-with-parent=on"]);
        }
        command
    }

    /// Tries the plugin at `library`; an error is the reason for which page requests cannot be shown.
    pub(crate) fn try_plugin(&self, library: &Path) -> Result<Plugin, String> {
        if let Some(lack) = self.lacks() {
            return Err(lack);
        }
        let mut plugin = Plugin { library: library.to_owned(), api: None };
        let refusal = match self.loads(&plugin)? {
            None => return Ok(plugin),
            Some(refusal) => refusal,
        };
        plugin.api = offered_api(&refusal);
        if plugin.api.is_some() && self.loads(&plugin)?.is_none() {
            return Ok(plugin);
        }
        Err(format!("QEMU {} does not load the plugin: {}", self.version, refusal.trim_end()))
    }

    /// Starts an empty machine with `plugin`; returns what QEMU says against it.
    fn loads(&self, plugin: &Plugin) -> Result<Option<String>, String> {
        let mut command = self.command();
        plugin.add_to(&mut command, "");
        // The device is wrong on purpose: devices are made after plugins are loaded, and QEMU then ends by itself.
        command.args(["-machine", "none", "-nodefaults", "-display", "none", "-device", LAST_WORD]);
        let captured = output(&mut command, QUESTION_LIMIT).map_err(|error| error.to_string())?;
        Ok(Some(captured.stderr).filter(|said| !said.contains(LAST_WORD)))
    }
}

/// Which part of QEMU says what the IOMMU of `machine` can do: its kind, its name, and the options it must have.
fn iommu(machine: Machine) -> (&'static str, &'static str, &'static [&'static str]) {
    match machine {
        Machine::X86_64 => {
            ("-device", "intel-iommu", &["scalable-mode", "fsts", "device-iotlb", "pasid-bits", "eim"])
        }
        Machine::Aarch64 => ("-machine", "virt", &["iommu", "virtualization", "acpi", "gic-version"]),
    }
}

/// A device that no QEMU has: when QEMU complains of it, all before it was accepted.
const LAST_WORD: &str = "portcullis-last-word";

impl Start {
    fn program(program: PathBuf) -> Self {
        Self { program, leading: Vec::new(), module_dir: None }
    }

    /// How to start the QEMU for `machine` that was unpacked into `dir` with every library that it needs.
    fn unpacked(dir: &Path, machine: Machine) -> Option<Self> {
        let (triplet, loader) = match env::consts::ARCH {
            "x86_64" => ("x86_64-linux-gnu", "ld-linux-x86-64.so.2"),
            "aarch64" => ("aarch64-linux-gnu", "ld-linux-aarch64.so.1"),
            _ => return None,
        };
        let libraries = dir.join("usr/lib").join(triplet);
        // Where an installed system has a list of directories or alternatives, the unpacked one has neither.
        let mut path = OsString::from(&libraries);
        for beside in ["pulseaudio", "blas", "lapack"] {
            path.push(":");
            path.push(libraries.join(beside));
        }
        let mut leading = vec![
            "--library-path".into(),
            path,
            dir.join("usr/bin").join(format!("qemu-system-{}", machine.name())).into(),
        ];
        for data in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            leading.extend(["-L".into(), dir.join(data).into()]);
        }
        Some(Self { program: libraries.join(loader), leading, module_dir: Some(libraries.join("qemu")) })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.leading);
        if let Some(dir) = &self.module_dir {
            command.env("QEMU_MODULE_DIR", dir);
        }
        command
    }
}

impl Plugin {
    /// Adds the plugin to a command line of QEMU, with `options`, each after a comma.
    pub(crate) fn add_to(&self, command: &mut Command, options: &str) {
        let mut plugin = doubled_commas(&self.library);
        plugin.push(options);
        command.arg("-plugin").arg(plugin);
        if let Some(api) = self.api {
            command.env(PLUGIN_API, api.to_string());
        }
    }
}

/// Returns `path` as a value in one of QEMU's lists of options, which commas separate.
fn doubled_commas(path: &Path) -> OsString {
    match path.to_str() {
        Some(text) => text.replace(',', ",,").into(),
        None => path.into(),
    }
}

/// Reads the names of properties from what `-device …,help` printed: `  name=<type>  - text`.
fn properties(help: &str) -> Vec<String> {
    help.lines()
        .filter_map(|line| line.strip_prefix("  ")?.split_once("=<"))
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// Reads the API version that QEMU offers from its refusal of another one.
fn offered_api(refusal: &str) -> Option<u32> {
    ["minimum version of ", "only up to version "]
        .iter()
        .filter_map(|words| refusal.split_once(words))
        .find_map(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
}

/// Returns a QEMU for `machine` that was unpacked into a directory of `kept` earlier, and still works.
fn cached(kept: &Path, machine: Machine) -> Option<Qemu> {
    let mut dirs: Vec<PathBuf> = fs::read_dir(kept).ok()?.flatten().map(|entry| entry.path()).collect();
    dirs.sort();
    dirs.iter().rev().find_map(|dir| unpacked(dir, machine).ok())
}

/// Asks the QEMU that was unpacked into `dir`.
fn unpacked(dir: &Path, machine: Machine) -> Result<Qemu, String> {
    let start = Start::unpacked(dir, machine).ok_or("packages can be unpacked on x86_64 and aarch64 only")?;
    let qemu = Qemu::ask(start, machine, "fetched".into())?;
    match qemu.lacks() {
        None => Ok(qemu),
        Some(lack) => Err(lack),
    }
}

/// Unpacks a QEMU into a directory of `kept` that is named for its version, and returns the one for `machine`.
fn fetch(workspace: &Workspace, kept: &Path, machine: Machine) -> Result<Qemu, String> {
    // Only what is complete and works gets a name below `kept`.
    let unfinished = kept.with_extension("unfinished");
    let found = unpack(workspace, &unfinished).map_err(|error| error.to_string()).and_then(|version| {
        unpacked(&unfinished, machine)?;
        // A colon, which ends the epoch of a version, also separates the directories of a library path.
        let named = kept.join(version.rsplit(':').next().unwrap_or_default());
        // What stands there was found not to work.
        let _ = fs::remove_dir_all(&named);
        fs::create_dir_all(kept)
            .and_then(|()| fs::rename(&unfinished, &named))
            .map_err(|source| Error::io("naming", &named)(source).to_string())?;
        unpacked(&named, machine)
    });
    // After success it has its name, and this does nothing.
    let _ = fs::remove_dir_all(&unfinished);
    found
}

/// Fetches the newest packages with QEMU for every machine, unpacks them into `into`, and returns their version.
///
/// Nearly all that they need is the same, so that one machine more is some megabytes more.
fn unpack(workspace: &Workspace, into: &Path) -> Result<String, Error> {
    let packages = Machine::ALL.map(Machine::qemu_package);
    let apt = Apt::open(&workspace.kept)?;
    // Built from one source, they have one version.
    let version = apt.version(packages[0], "")?;
    apt.unpack(&packages, &version, into)?;
    Ok(version)
}

fn advice(machine: Machine, tried: &str) -> String {
    let needs = match machine {
        Machine::X86_64 => {
            "intel-iommu with first-stage tables (scalable-mode, fsts), iommu-testdev, and for most scenes page\n\
             requests (svm) and plugins"
        }
        Machine::Aarch64 => {
            "the machine virt with an SMMUv3 (iommu) and EL2 (virtualization), iommu-testdev, and for most\n\
             scenes plugins"
        }
    };
    let elsewhere = match machine {
        Machine::X86_64 => "qemu-system-x86",
        Machine::Aarch64 => "qemu-system-aarch64",
    };
    format!(
        "No QEMU for {name} can be used. What was tried:\n{tried}\
         It must have {needs}.\n\
         QEMU 11.1 has all of that. What to install:\n\
         \x20 Debian 13   apt install -t trixie-backports {debian}   (or let this program fetch it, without --offline)\n\
         \x20 Debian 14   apt install {debian}\n\
         \x20 Fedora 45   dnf install {elsewhere}\n\
         \x20 Arch        pacman -S {elsewhere}\n\
         \x20 macOS       brew install qemu\n\
         \x20 Ubuntu      releases up to 26.04 have an older one: build QEMU 11.1 with --enable-plugins --enable-modules\n\
         Then it is found on PATH, or name it in {variable}. --machine boots another machine alone.",
        name = machine.name(),
        debian = machine.qemu_package(),
        variable = machine.qemu_variable(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELP: &str = "intel-iommu options:\n  fsts=<bool>            - on/off (default: off)\n  svm=<bool>             - on/off (default: off)\n";

    #[test]
    fn properties_are_read_from_the_help_of_a_device() {
        assert_eq!(properties(HELP), ["fsts", "svm"]);
        assert!(properties("qemu: -device intel-iommu,help: Device 'intel-iommu' not found\n").is_empty());
    }

    #[test]
    fn the_api_version_is_read_from_a_refusal() {
        let older = "Could not load plugin /p.so: plugin requires API version 6, but this QEMU supports only a minimum version of 7\n";
        let newer = "Could not load plugin /p.so: plugin requires API version 9, but this QEMU supports only up to version 8\n";

        assert_eq!(offered_api(older), Some(7));
        assert_eq!(offered_api(newer), Some(8));
        assert_eq!(offered_api("Could not load plugin /p.so: no such file"), None);
        assert_eq!(offered_api("a minimum version of "), None);
    }

    #[test]
    fn a_comma_in_a_path_does_not_end_the_option() {
        assert_eq!(doubled_commas(Path::new("/a,b/c.so")), "/a,,b/c.so");
    }

    #[test]
    fn the_advice_names_each_distribution_the_package_and_the_variable() {
        for machine in Machine::ALL {
            let advice = advice(machine, "  PATH: has none\n");

            let systems = ["Debian", "Ubuntu", "Fedora", "Arch", "macOS", "PATH: has none"];
            for name in systems.into_iter().chain([machine.qemu_package(), machine.qemu_variable()]) {
                assert!(advice.contains(name), "{name}");
            }
        }
    }

    /// A program that answers as a QEMU would whose IOMMU has `options`, and that says `testdev` of iommu-testdev.
    fn fake(name: &str, options: &str, testdev: &str) -> Start {
        let dir = env::temp_dir().join(format!("portcullis-fake-qemu-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let script = dir.join(name);
        let answers = format!(
            "case \"$*\" in\n--version) echo 'QEMU emulator version 9.9.9 (fake)';;\n\
             *intel-iommu* | *virt,help*) printf '{options}';;\n\
             *iommu-testdev*) echo '{testdev}';;\n-help) echo '-plugin [file=]<file>';;\nesac\n"
        );
        fs::write(&script, answers).unwrap();
        Start { program: "sh".into(), leading: vec![script.into()], module_dir: None }
    }

    /// Asks such a program, which is gone afterwards.
    fn ask(machine: Machine, name: &str, options: &str, testdev: &str) -> Result<Qemu, String> {
        let start = fake(name, options, testdev);
        let script = PathBuf::from(start.leading[0].clone());
        let answer = Qemu::ask(start, machine, String::new());
        fs::remove_file(script).unwrap();
        answer
    }

    #[test]
    fn a_qemu_for_x86_64_is_judged_by_what_its_vtd_offers() {
        let all = "  scalable-mode=<bool> x\\n  fsts=<bool> x\\n  device-iotlb=<bool> x\\n  pasid-bits=<uint8> x\\n  eim=<OnOffAuto> x\\n";
        let ask = |name, options: &str, testdev| ask(Machine::X86_64, name, options, testdev);

        let old = ask("old", "  x-scalable-mode=<bool> x\\n", "options:");
        let bare = ask("bare", all, "not found");
        let partial = ask("partial", all, "options:").unwrap();
        let full = ask("full", &format!("{all}  svm=<bool> x\\n"), "options:").unwrap();

        assert!(old.unwrap_err().contains("intel-iommu with the option scalable-mode"));
        assert!(bare.unwrap_err().contains("no iommu-testdev"));
        assert!(partial.try_plugin(Path::new("/p.so")).unwrap_err().contains("no page requests"));
        assert_eq!((full.version.as_str(), full.lacks()), ("9.9.9 (fake)", None));
    }

    #[test]
    fn a_qemu_for_aarch64_is_judged_by_what_its_machine_offers() {
        let all = "  acpi=<OnOffAuto> x\\n  gic-version=<string> x\\n  iommu=<string> x\\n  virtualization=<bool> x\\n";
        let ask = |name, options: &str, testdev| ask(Machine::Aarch64, name, options, testdev);

        let old = ask("arm-old", "  acpi=<OnOffAuto> x\\n", "options:");
        let bare = ask("arm-bare", all, "not found");
        let full = ask("arm-full", all, "options:").unwrap();

        assert!(old.unwrap_err().contains("virt with the option iommu"));
        assert!(bare.unwrap_err().contains("no iommu-testdev"));
        assert_eq!((full.version.as_str(), full.lacks()), ("9.9.9 (fake)", None));
    }
}
