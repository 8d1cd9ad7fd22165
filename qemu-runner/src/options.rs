//! The command line.

use std::{env, ffi::OsString, path::PathBuf, time::Duration};

use lexopt::prelude::*;

use crate::{
    error::Error,
    machine::Machine,
    variant::{VARIANTS, Variant},
};

/// What `--help` prints.
pub const HELP: &str = "\
Boots Portcullis in QEMU, shows its scenes, and judges them.

  cargo run                        build everything, boot every machine in every variant, show every scene
  cargo run -- [OPTIONS]
  cargo run -- boot ELF [OPTIONS]  boot this hypervisor image (what `cargo run -p hv --target ...` does)
  cargo run -- measure [--record]  count what things cost, and compare with what was kept
  cargo run -- toolchain           make the bare-metal targets usable, and print what cargo needs for that

Options:
  --machine NAME     boot this machine only (x86_64, aarch64)
  --variant NAME     boot this variant only; may be given several times
                     (ordinary: the machine as it comes;
                     second-stage: devices are translated by second-stage tables;
                     legacy: the same in VT-d's legacy mode;
                     pressure: queues overflow, devices remember;
                     nested: a guest owns first-stage tables (aarch64);
                     restart: the unit is on already, and devices go on)
  --scene NAME       show this scene only; may be given several times
                     (deny allow event repair silence forgery restraint
                     claims departure isolation pager interrupts;
                     of pressure: recovery storm overflow staleness batch;
                     of second-stage and legacy: trust; of restart: restart;
                     of nested: nested)
  --keep             keep each boot's files (serial.bin, log.txt, trace.txt, stderr.txt) and say where
  --offline          download nothing
  --timeout SECONDS  limit for each boot (60)
  --repeat N         boot N times in a row and count
  --record           keep the figures that are measured (tests/bench/measured.json)
  --verbose          show all the hypervisor's log, not only what matters
  --help             this text

The report is written to portcullis/report.json in cargo's target directory. What was fetched is kept beside it.

Exit status: 0 if every scene passed; 1 if something failed or is missing; 2 if the command line is wrong.

Environment:
  PORTCULLIS_QEMU_X86_64, PORTCULLIS_QEMU_AARCH64
                          the QEMU to use for that machine, before any other
  PORTCULLIS_NO_RUSTUP    if set, leave rustup and its targets aside: build `core` from the distribution's rust-src
  RUST_SRC                the `library` directory of Rust's own source, of exactly the compiler's version
  CARGO_NET_OFFLINE       if true, the same as --offline
  CI                      if true, a scene that is skipped counts as failed
";

/// How a demonstration is run.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Options {
    /// Machines to boot, in order.
    pub machines: Vec<Machine>,
    /// Variants to boot; all if empty.
    pub variants: Vec<String>,
    /// Scenes to show; all if empty.
    pub scenes: Vec<String>,
    /// Whether each boot's files are kept.
    pub keep: bool,
    /// Whether nothing may be downloaded.
    pub offline: bool,
    /// How long one boot may take.
    pub limit: Duration,
    /// How many times in a row to boot.
    pub repeat: u32,
    /// Whether the figures that are measured are kept for the next comparison.
    pub record: bool,
    /// Whether all of the log is shown, and not only level info and above.
    pub verbose: bool,
    /// Whether a scene that is skipped counts as failed.
    pub skips_fail: bool,
}

impl Options {
    /// The options of a plain `cargo run`.
    ///
    /// [`skips_fail`](Self::skips_fail) follows the environment's `CI`, and [`offline`](Self::offline) cargo's own
    /// `CARGO_NET_OFFLINE`.
    pub fn from_environment() -> Self {
        Self {
            machines: Machine::ALL.to_vec(),
            variants: Vec::new(),
            scenes: Vec::new(),
            keep: false,
            offline: is_on("CARGO_NET_OFFLINE"),
            limit: Duration::from_secs(60),
            repeat: 1,
            record: false,
            verbose: false,
            skips_fail: is_on("CI"),
        }
    }

    /// Whether the scene called `name` was asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.scenes.is_empty() || self.scenes.iter().any(|scene| scene == name)
    }

    /// Whether `variant` was asked for, and its machine.
    pub(crate) fn wants_variant(&self, variant: &Variant) -> bool {
        let named = self.variants.is_empty() || self.variants.iter().any(|name| name == variant.name());
        named && self.machines.contains(&variant.machine)
    }
}

/// Whether the environment switches `name` on.
fn is_on(name: &str) -> bool {
    env::var(name).is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"))
}

/// What the command line asks for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Request {
    /// Print [`HELP`].
    Help,
    /// Build everything and show the demonstration.
    Demonstrate(Options),
    /// Show the demonstration with a hypervisor image that is built already.
    Boot(PathBuf, Options),
    /// Measure what things cost.
    Measure(Options),
    /// Provide the bare-metal targets and print cargo's arguments for them.
    Toolchain(Options),
}

impl Request {
    /// Reads the command line, without the program's own name.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, Error> {
        let mut parser = lexopt::Parser::from_args(arguments);
        read(&mut parser, Options::from_environment()).map_err(|refused| match refused {
            Refused::Here(error) => error,
            Refused::Parser(error) => Error::Usage(error.to_string()),
        })
    }
}

/// Why the command line was refused, and by whom.
enum Refused {
    Here(Error),
    Parser(lexopt::Error),
}

impl From<lexopt::Error> for Refused {
    fn from(error: lexopt::Error) -> Self {
        Self::Parser(error)
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Here(error)
    }
}

fn read(parser: &mut lexopt::Parser, mut options: Options) -> Result<Request, Refused> {
    let mut words: Vec<OsString> = Vec::new();
    let mut machines = Vec::new();
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Request::Help),
            Long("machine") => machines.push(Machine::named(&parser.value()?.string()?)?),
            Long("variant") => options.variants.push(parser.value()?.string()?),
            Long("scene") => options.scenes.push(parser.value()?.string()?),
            Long("keep") => options.keep = true,
            Long("offline") => options.offline = true,
            Long("timeout") => {
                options.limit =
                    Duration::from_secs(at_least_one("--timeout", parser.value()?.parse()?)?.into())
            }
            Long("repeat") => options.repeat = at_least_one("--repeat", parser.value()?.parse()?)?,
            Long("record") => options.record = true,
            Long("verbose") => options.verbose = true,
            Value(word) => words.push(word),
            _ => return Err(argument.unexpected().into()),
        }
    }
    if !machines.is_empty() {
        options.machines = machines;
    }
    for name in &options.variants {
        let known = |variant: &&Variant| options.machines.contains(&variant.machine);
        if !VARIANTS.iter().filter(known).any(|variant| variant.name() == name) {
            return Err(Error::Usage(format!("there is no variant {name}")).into());
        }
    }
    for name in &options.scenes {
        let known = |variant: &&Variant| options.wants_variant(variant);
        if !VARIANTS.iter().filter(known).any(|variant| variant.scene(name).is_some()) {
            return Err(Error::Usage(format!("there is no scene {name}")).into());
        }
    }
    let mut words = words.into_iter();
    let request = match (words.next(), words.next()) {
        (None, _) => Request::Demonstrate(options),
        (Some(word), None) if word == "measure" => Request::Measure(options),
        (Some(word), None) if word == "toolchain" => Request::Toolchain(options),
        (Some(word), Some(elf)) if word == "boot" => Request::Boot(elf.into(), options),
        (Some(word), None) if word == "boot" => {
            return Err(Error::Usage("boot needs the path of an image".into()).into());
        }
        (Some(word), _) => return Err(Error::Usage(format!("{} is not understood", word.display())).into()),
    };
    match words.next() {
        None => Ok(request),
        Some(word) => Err(Error::Usage(format!("{} is one word too many", word.display())).into()),
    }
}

fn at_least_one(option: &str, number: u32) -> Result<u32, Error> {
    match number {
        0 => Err(Error::Usage(format!("{option} 0 would show nothing"))),
        _ => Ok(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(words: &[&str]) -> Result<Request, Error> {
        Request::read(words.iter().map(OsString::from))
    }

    #[test]
    fn no_words_mean_everything() {
        let Request::Demonstrate(options) = request(&[]).unwrap() else { panic!("not a demonstration") };

        assert_eq!(options, Options::from_environment());
        assert!(options.wants("deny") && options.limit == Duration::from_secs(60));
    }

    #[test]
    fn options_are_taken_before_and_after_the_image() {
        let words =
            ["--keep", "boot", "hv.elf", "--scene", "deny", "--scene=allow", "--timeout", "5", "--repeat=3"];

        let Request::Boot(elf, options) = request(&words).unwrap() else { panic!("not a boot") };

        assert_eq!(elf, PathBuf::from("hv.elf"));
        assert!(options.keep && options.wants("deny") && options.wants("allow") && !options.wants("repair"));
        assert_eq!((options.limit, options.repeat), (Duration::from_secs(5), 3));
    }

    #[test]
    fn measuring_is_a_word_of_its_own() {
        let Request::Measure(options) = request(&["measure", "--record", "--machine=aarch64"]).unwrap()
        else {
            panic!("not a measurement")
        };

        assert!(options.record);
        assert_eq!(options.machines, [Machine::Aarch64]);
    }

    #[test]
    fn what_does_not_exist_is_refused_by_name() {
        for (words, name) in [
            (&["--scene", "opera"][..], "opera"),
            (&["--machine", "pdp11"], "pdp11"),
            (&["--variant", "opera"], "opera"),
            (&["--variant", "second-stage", "--scene", "silence"], "silence"),
            (&["--fast"], "--fast"),
            (&["--repeat", "0"], "--repeat"),
            (&["--timeout", "soon"], "soon"),
            (&["boot"], "boot"),
            (&["bot", "hv.elf"], "bot"),
            (&["boot", "hv.elf", "hw.elf"], "hw.elf"),
        ] {
            let refused = request(words).unwrap_err();

            assert!(matches!(&refused, Error::Usage(said) if said.contains(name)), "{words:?}: {refused}");
        }
    }

    #[test]
    fn the_help_names_every_machine_variant_scene_and_variable() {
        for machine in Machine::ALL {
            for name in [machine.name(), machine.qemu_variable()] {
                assert!(HELP.contains(name), "{name}");
            }
        }
        for variant in VARIANTS {
            for name in variant.scenes.iter().map(|scene| scene.name).chain([variant.name()]) {
                assert!(HELP.contains(name), "{name}");
            }
        }
    }

    #[test]
    fn every_variant_is_booted_unless_one_is_named() {
        let wanted = |words: &[&str]| match request(words).unwrap() {
            Request::Demonstrate(options) => VARIANTS
                .iter()
                .filter(|variant| options.wants_variant(variant))
                .map(Variant::to_string)
                .collect(),
            other => panic!("{other:?} is not a demonstration"),
        };

        let (all, ordinary, one): (Vec<_>, Vec<_>, Vec<_>) = (
            wanted(&[]),
            wanted(&["--variant", "ordinary"]),
            wanted(&["--machine", "aarch64", "--variant", "second-stage"]),
        );

        assert_eq!(all.len(), VARIANTS.len());
        assert_eq!(ordinary, ["x86_64", "aarch64"]);
        assert_eq!(one, ["aarch64 second-stage"]);
    }

    #[test]
    fn every_machine_is_booted_unless_one_is_named() {
        let machines = |words: &[&str]| match request(words).unwrap() {
            Request::Demonstrate(options) => options.machines,
            other => panic!("{other:?} is not a demonstration"),
        };

        assert_eq!(machines(&[]), Machine::ALL);
        assert_eq!(machines(&["--machine", "aarch64"]), [Machine::Aarch64]);
    }
}
