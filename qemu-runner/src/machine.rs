//! The machines that the hypervisor runs on, and the scenes that each shows.

use crate::error::Error;

/// A machine that QEMU emulates and the hypervisor supports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Machine {
    /// QEMU's `q35` with its own VT-d unit.
    X86_64,
}

/// What is known about a scene before it is run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Scene {
    pub(crate) name: &'static str,
    /// Whether it needs a device that issues page requests, which QEMU lacks and the plugin `sva-device` adds.
    pub(crate) page_requests: bool,
    /// Whether something that the scene is evidence about is our own model in place of QEMU's.
    pub(crate) test_double: bool,
}

/// The scenes of [`Machine::X86_64`], in the order in which they are shown.
///
/// The plugin adds an endpoint only: translation, page request queue, interrupt and response are those of QEMU's VT-d.
const X86_64_SCENES: [Scene; 8] = [
    Scene { name: "deny", page_requests: false, test_double: false },
    Scene { name: "allow", page_requests: false, test_double: false },
    Scene { name: "event", page_requests: true, test_double: false },
    Scene { name: "repair", page_requests: true, test_double: false },
    Scene { name: "silence", page_requests: true, test_double: false },
    Scene { name: "forgery", page_requests: true, test_double: false },
    Scene { name: "departure", page_requests: true, test_double: false },
    Scene { name: "isolation", page_requests: true, test_double: false },
];

impl Machine {
    /// Every machine, in the order in which they are booted.
    pub const ALL: [Self; 1] = [Self::X86_64];

    /// Returns the machine that a user calls `name`.
    pub fn named(name: &str) -> Result<Self, Error> {
        match (Self::ALL.into_iter().find(|machine| machine.name() == name), name) {
            (Some(machine), _) => Ok(machine),
            (None, "aarch64") => Err(Error::Usage(
                "the hypervisor does not run on aarch64 yet; the machine that it runs on is x86_64".into(),
            )),
            (None, _) => Err(Error::Usage(format!("there is no machine {name}; the machine is x86_64"))),
        }
    }

    /// Name of the machine in options and reports: the architecture.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
        }
    }

    /// Rust's name of the target that the images are built for.
    pub(crate) fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-none",
        }
    }

    /// The environment variable that names the QEMU to use.
    pub(crate) fn qemu_variable(self) -> &'static str {
        match self {
            Self::X86_64 => "PORTCULLIS_QEMU_X86_64",
        }
    }

    /// The scenes that a complete demonstration shows, in order.
    pub(crate) fn scenes(self) -> &'static [Scene] {
        match self {
            Self::X86_64 => &X86_64_SCENES,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_found_by_its_name() {
        assert_eq!(Machine::named("x86_64").unwrap(), Machine::X86_64);
    }

    #[test]
    fn a_machine_to_come_is_said_to_be_missing() {
        assert!(Machine::named("aarch64").unwrap_err().to_string().contains("not run on aarch64 yet"));
        assert!(Machine::named("pdp11").unwrap_err().to_string().contains("no machine pdp11"));
    }
}
