//! Packages from the archive of a Debian machine, unpacked beside the system and not into it.
//!
//! `apt-get` is used with a state, a cache and a source list of our own, so that nothing of the machine's package
//! database changes, no privileges are needed, and it does not matter whether `apt-get update` ever ran. The mirror,
//! its signing key and the way to it (proxies) are the machine's.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    error::Error,
    process::{checked, on_path, say},
};

/// The release whose packages are fetched, with its backports: the first with a QEMU that has page requests.
const RELEASE: &str = "trixie";
/// Limit for one call of apt or dpkg; a slow line needs some minutes for the 50 MB that are fetched at most.
const LIMIT: Duration = Duration::from_secs(1200);

/// A mirror of an archive, as the machine's own configuration has it.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Mirror {
    uri: String,
    /// Value of `Signed-By`: a key file, or a key, its continuation lines included.
    signed_by: Option<String>,
}

/// An `apt-get` that knows only [`RELEASE`] and touches only its own directory, which goes when this value does.
#[derive(Debug)]
pub(crate) struct Apt {
    dir: PathBuf,
}

impl Drop for Apt {
    fn drop(&mut self) {
        // What is left behind is removed before the next is used.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A package file that would be downloaded.
#[derive(Debug, Eq, PartialEq)]
struct Archive {
    file: String,
    bytes: u64,
}

impl Apt {
    /// Makes an `apt-get` of our own below `kept` and fetches the lists of packages.
    pub(crate) fn open(kept: &Path) -> Result<Self, Error> {
        for program in ["apt-get", "apt-config", "apt-cache", "dpkg-deb"] {
            if on_path(program).is_none() {
                return Err(refusal("this machine has no apt"));
            }
        }
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        if os_release(&release, "ID") != Some("debian") {
            return Err(refusal("this machine's archive is not Debian's"));
        }
        let mirrors =
            mirrors(&configured_sources(), os_release(&release, "VERSION_CODENAME").unwrap_or_default());
        let apt = Self { dir: kept.join("apt") };
        let mut last = refusal("no mirror of Debian's archive is configured in /etc/apt");
        for mirror in mirrors {
            match apt.update(&mirror) {
                Ok(()) => return Ok(apt),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Writes the configuration for `mirror` and fetches its lists.
    fn update(&self, mirror: &Mirror) -> Result<(), Error> {
        // A file of an earlier try would be taken for one that need not be downloaded, or unpacked, again.
        let _ = fs::remove_dir_all(&self.dir);
        for part in ["sources", "state/lists/partial", "cache/archives/partial"] {
            let dir = self.dir.join(part);
            fs::create_dir_all(&dir).map_err(Error::io("creating", &dir))?;
        }
        let machine = checked(Command::new("apt-config").arg("dump"), LIMIT)?;
        for (name, text) in [
            ("apt.conf", configuration(&machine, &self.dir)),
            ("sources/portcullis.sources", source(mirror)),
            // Nothing counts as installed: every library that a package needs is fetched with it.
            ("status", String::new()),
        ] {
            let path = self.dir.join(name);
            fs::write(&path, text).map_err(Error::io("writing", &path))?;
        }
        say(&format!(
            "reading the package lists of {RELEASE} and {RELEASE}-backports from this machine's apt mirror ({}), about 10 MB",
            mirror.uri
        ));
        checked(self.command("apt-get").args(["update", "--error-on=any"]), LIMIT)?;
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.dir.join("apt.conf")).env("LC_ALL", "C.UTF-8");
        command
    }

    /// Returns the newest version of `package` that begins with `prefix`.
    pub(crate) fn version(&self, package: &str, prefix: &str) -> Result<String, Error> {
        let table = checked(self.command("apt-cache").args(["madison", package]), LIMIT)?;
        newest(&table, prefix).ok_or_else(|| {
            refusal(&format!("the mirror has no {package} whose version begins with {prefix:?}"))
        })
    }

    /// Downloads `packages` in `version` with all that they need and unpacks them into `into`, a directory of their own.
    ///
    /// apt checks each file against the signed lists.
    pub(crate) fn unpack(&self, packages: &[&str], version: &str, into: &Path) -> Result<(), Error> {
        let wanted: Vec<String> = packages.iter().map(|package| format!("{package}={version}")).collect();
        let plan =
            checked(self.command("apt-get").args(["install", "--print-uris", "--yes"]).args(&wanted), LIMIT)?;
        let archives = archives(&plan);
        let megabytes = archives.iter().map(|archive| archive.bytes).sum::<u64>().div_ceil(1_000_000);
        say(&format!(
            "downloading {} {version} and what it needs from this machine's apt mirror: {} files, {megabytes} MB",
            packages.join(" and "),
            archives.len()
        ));
        checked(self.command("apt-get").args(["install", "--download-only", "--yes"]).args(&wanted), LIMIT)?;
        // An earlier try may have left half of something.
        let _ = fs::remove_dir_all(into);
        fs::create_dir_all(into).map_err(Error::io("creating", into))?;
        for archive in archives {
            let file = self.dir.join("cache/archives").join(archive.file);
            checked(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(into), LIMIT)?;
        }
        Ok(())
    }
}

fn refusal(said: &str) -> Error {
    Error::Program { program: "apt".into(), said: said.into() }
}

/// Returns the value of `key` in the text of `/etc/os-release`.
fn os_release<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
    Some(value.trim_matches(['"', '\'']))
}

/// Returns the machine's source files with their text, in the order in which apt reads them.
fn configured_sources() -> Vec<(PathBuf, String)> {
    let mut files: Vec<PathBuf> = fs::read_dir("/etc/apt/sources.list.d")
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    files.sort();
    files.insert(0, "/etc/apt/sources.list".into());
    files.into_iter().filter_map(|file| fs::read_to_string(&file).ok().map(|text| (file, text))).collect()
}

/// Returns the mirrors that carry the machine's own release, `codename`, or one of Debian's named suites.
///
/// Other sources are somebody else's archive.
fn mirrors(sources: &[(PathBuf, String)], codename: &str) -> Vec<Mirror> {
    let named = ["stable", "oldstable", "testing", "unstable", "sid"];
    let carries = |suite: &str| suite == codename || named.contains(&suite);
    let mut mirrors = Vec::new();
    for (file, text) in sources {
        let found = match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => one_line_mirrors(text, carries),
            Some("sources") => deb822_mirrors(text, carries),
            _ => Vec::new(),
        };
        mirrors.extend(found);
    }
    mirrors.dedup();
    mirrors
}

/// Reads the one-line format: `deb [option=value …] URI suite component…`.
fn one_line_mirrors(text: &str, carries: impl Fn(&str) -> bool) -> Vec<Mirror> {
    let mirror = |line: &str| {
        let rest = line.trim_start().strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        carries(suite)
            .then(|| Mirror { uri: uri.into(), signed_by: signed_by.map(|keys| keys.replace(',', " ")) })
    };
    text.lines().filter_map(mirror).collect()
}

/// Reads the deb822 format: stanzas of `Field: value`, in which a line that begins with a space continues the value.
fn deb822_mirrors(text: &str, carries: impl Fn(&str) -> bool) -> Vec<Mirror> {
    let mut mirrors = Vec::new();
    // Comments may stand between the lines of a stanza.
    let text: String = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .fold(String::new(), |text, line| text + line.trim_end() + "\n");
    for stanza in text.split("\n\n") {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza.lines() {
            match (line.starts_with([' ', '\t']), fields.last_mut(), line.split_once(':')) {
                (true, Some((_, value)), _) => {
                    let _ = write!(value, "\n{line}");
                }
                (false, _, Some((name, value))) => {
                    fields.push((name.to_ascii_lowercase(), value.trim().to_owned()))
                }
                _ => {}
            }
        }
        let field =
            |name: &str| fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str());
        let words = |name: &str| field(name).unwrap_or_default().split_whitespace();
        let disabled = field("enabled")
            .is_some_and(|value| value.eq_ignore_ascii_case("no") || value.eq_ignore_ascii_case("false"));
        if disabled || !words("types").any(|kind| kind == "deb") || !words("suites").any(&carries) {
            continue;
        }
        mirrors.extend(
            words("uris")
                .map(|uri| Mirror { uri: uri.into(), signed_by: field("signed-by").map(Into::into) }),
        );
    }
    mirrors
}

/// Returns the source file for `mirror`, in the deb822 format.
fn source(mirror: &Mirror) -> String {
    let signed_by =
        mirror.signed_by.as_ref().map(|value| format!("Signed-By: {value}\n")).unwrap_or_default();
    format!(
        "Types: deb\nURIs: {}\nSuites: {RELEASE} {RELEASE}-backports\nComponents: main\n{signed_by}",
        mirror.uri
    )
}

/// Returns an apt configuration that keeps its state in `dir` and takes from the `machine`'s only how to reach a mirror.
///
/// The machine's hooks are left out: they would act on the system.
fn configuration(machine: &str, dir: &Path) -> String {
    let dir = dir.display();
    let mut text = format!(
        r#"Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{dir}/sources";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{dir}/state";
Dir::State::status "{dir}/status";
Dir::Cache "{dir}/cache";
APT::Default-Release "{RELEASE}-backports";
APT::Install-Recommends "false";
// The user that apt would download as cannot write here. Signatures are checked all the same.
APT::Sandbox::User "root";
"#
    );
    let reaches = |line: &&str| {
        ["Acquire::http", "Acquire::https", "Acquire::ftp", "Acquire::Proxy", "Acquire::Retries"]
            .iter()
            .any(|name| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', ':', '-'])))
    };
    for line in machine.lines().filter(reaches) {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str("Acquire::Languages \"none\";\n");
    text
}

/// Finds the newest version with `prefix` in what `apt-cache madison` printed: `package | version | source`, newest first.
fn newest(table: &str, prefix: &str) -> Option<String> {
    let versions = table.lines().filter_map(|line| line.split('|').nth(1));
    versions.map(str::trim).find(|version| version.starts_with(prefix)).map(Into::into)
}

/// Reads what `apt-get install --print-uris` printed: `'URI' file bytes hash`.
fn archives(plan: &str) -> Vec<Archive> {
    let archive = |line: &str| {
        let (_, rest) = line.strip_prefix('\'')?.split_once("' ")?;
        let mut words = rest.split_whitespace();
        let (file, bytes) = (words.next()?, words.next()?.parse().ok()?);
        // apt makes the name; that it stays in its directory is checked all the same, since it is joined to a path.
        (!file.contains('/')).then(|| Archive { file: file.into(), bytes })
    };
    plan.lines().filter_map(archive).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: &str, text: &str) -> Vec<Mirror> {
        mirrors(&[(name.into(), text.into())], "bookworm")
    }

    fn mirror(uri: &str, signed_by: Option<&str>) -> Mirror {
        Mirror { uri: uri.into(), signed_by: signed_by.map(Into::into) }
    }

    #[test]
    fn a_one_line_source_is_read_with_its_options() {
        let text = "# deb http://old.example/debian bookworm main\n\
                    deb-src http://one.example/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/a.gpg,/b.gpg] http://one.example/debian bookworm main contrib\n\
                    deb http://two.example/debian stable main\n";

        assert_eq!(
            found("/etc/apt/sources.list", text),
            [
                mirror("http://one.example/debian", Some("/a.gpg /b.gpg")),
                mirror("http://two.example/debian", None)
            ]
        );
    }

    #[test]
    fn a_deb822_source_is_read_with_its_key() {
        let text = "Types: deb deb-src\n# a remark\nURIs: http://one.example/debian\nSuites: bookworm\n bookworm-updates\n\
                    Components: main\nSigned-By:\n -----BEGIN PGP-----\n .\n AAAA\n\n\
                    Types: deb\nURIs: http://two.example/debian\nSuites: bookworm-security\nComponents: main\n";

        let found = found("debian.sources", text);

        assert_eq!(found, [mirror("http://one.example/debian", Some("\n -----BEGIN PGP-----\n .\n AAAA"))]);
        assert!(source(&found[0]).ends_with("Signed-By: \n -----BEGIN PGP-----\n .\n AAAA\n"));
    }

    #[test]
    fn a_source_of_someone_else_or_one_that_is_off_is_left_alone() {
        let off = "Types: deb\nURIs: http://one.example/debian\nSuites: bookworm\nEnabled: no\n";
        let source_only = "Types: deb-src\nURIs: http://one.example/debian\nSuites: bookworm\n";

        assert_eq!(found("node.list", "deb http://node.example/node_20.x nodistro main\n"), []);
        assert_eq!(found("db.list", "deb http://db.example/apt bookworm-pgdg main\n"), []);
        assert_eq!(found("debian.sources", off), []);
        assert_eq!(found("debian.sources", source_only), []);
        assert_eq!(found("debian.list.save", "deb http://one.example/debian bookworm main\n"), []);
    }

    #[test]
    fn half_a_line_is_no_mirror() {
        for text in
            ["deb", "deb ", "deb [arch=amd64", "deb http://one.example/debian", "debug http://x bookworm"]
        {
            assert_eq!(found("a.list", text), [], "{text}");
        }
    }

    #[test]
    fn the_way_to_the_mirror_is_taken_over_and_hooks_are_not() {
        let machine = "APT::Update::Post-Invoke:: \"rm -f /var/cache/apt/archives/*.deb\";\n\
                       Acquire::http::Proxy \"http://proxy.example:3128\";\n\
                       Acquire::Languages \"fr\";\n\
                       Dir::State \"var/lib/apt\";\n";

        let text = configuration(machine, Path::new("/here/apt"));

        assert!(text.contains("Acquire::http::Proxy \"http://proxy.example:3128\";\n"));
        assert!(text.contains("Dir::State \"/here/apt/state\";\n"));
        assert!(!text.contains("Post-Invoke") && !text.contains("fr\"") && !text.contains("var/lib"));
    }

    #[test]
    fn the_newest_version_with_the_prefix_is_chosen() {
        let table = "  rust-src | 1.96.1+dfsg1-2 | http://one.example trixie-backports/main amd64 Packages\n\
                     \x20 rust-src | 1.95.0+dfsg1-2 | http://one.example trixie-backports/main amd64 Packages\n\
                     \x20 rust-src | 1.95.0+dfsg1-1 | http://one.example trixie-backports/main amd64 Packages\n";

        assert_eq!(newest(table, "1.95.0+").as_deref(), Some("1.95.0+dfsg1-2"));
        assert_eq!(newest(table, "").as_deref(), Some("1.96.1+dfsg1-2"));
        assert_eq!(newest(table, "1.9+"), None);
    }

    #[test]
    fn the_plan_names_files_and_sizes() {
        let plan = "Reading package lists...\n\
                    'http://one.example/a_1%3a2.deb' a_1%3a2_amd64.deb 1500 SHA256:00\n\
                    'http://one.example/evil.deb' ../evil.deb 1 SHA256:00\n";

        assert_eq!(archives(plan), [Archive { file: "a_1%3a2_amd64.deb".into(), bytes: 1500 }]);
    }

    #[test]
    fn the_release_file_is_read_with_and_without_quotes() {
        let text = "PRETTY_NAME=\"Debian\"\nID=debian\nVERSION_CODENAME=\"bookworm\"\n";

        assert_eq!(os_release(text, "ID"), Some("debian"));
        assert_eq!(os_release(text, "VERSION_CODENAME"), Some("bookworm"));
        assert_eq!(os_release(text, "ID_LIKE"), None);
    }
}
