//! The machines that the hypervisor runs on, and the scenes that each shows.

use std::{fs::File, io::Read, path::Path};

use crate::error::Error;

/// A machine that QEMU emulates and the hypervisor supports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Machine {
    /// QEMU's `q35` with its own VT-d unit.
    X86_64,
    /// QEMU's `virt` with its own SMMUv3, to which the plugin `sva-device` adds a PRI queue.
    Aarch64,
}

/// What is known about a scene before it is run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Scene {
    pub(crate) name: &'static str,
    /// Whether it needs a device that can issue page requests, which QEMU lacks and the plugin `sva-device` adds.
    pub(crate) page_requests: bool,
    /// Whether something that the scene is evidence about is our own model in place of QEMU's.
    pub(crate) test_double: bool,
}

/// The scenes of [`Machine::X86_64`], in the order in which they are shown.
///
/// The plugin adds an endpoint only: translation, page request queue, interrupt and response are those of QEMU's VT-d.
const X86_64_SCENES: [Scene; 10] = [
    Scene { name: "deny", page_requests: false, test_double: false },
    Scene { name: "allow", page_requests: false, test_double: false },
    Scene { name: "event", page_requests: true, test_double: false },
    Scene { name: "repair", page_requests: true, test_double: false },
    Scene { name: "silence", page_requests: true, test_double: false },
    Scene { name: "forgery", page_requests: true, test_double: false },
    Scene { name: "restraint", page_requests: true, test_double: false },
    Scene { name: "claims", page_requests: true, test_double: false },
    Scene { name: "departure", page_requests: true, test_double: false },
    Scene { name: "isolation", page_requests: true, test_double: false },
];

/// The scenes of [`Machine::Aarch64`], in the order in which they are shown.
///
/// Translation and event queue are those of QEMU's SMMUv3, which has no page requests: where a scene rests on those, the
/// plugin's PRI queue stands in.
const AARCH64_SCENES: [Scene; 10] = [
    Scene { name: "deny", page_requests: false, test_double: false },
    Scene { name: "allow", page_requests: false, test_double: false },
    Scene { name: "event", page_requests: true, test_double: false },
    Scene { name: "repair", page_requests: true, test_double: true },
    Scene { name: "silence", page_requests: true, test_double: true },
    Scene { name: "forgery", page_requests: true, test_double: true },
    Scene { name: "restraint", page_requests: true, test_double: true },
    Scene { name: "claims", page_requests: true, test_double: true },
    Scene { name: "departure", page_requests: true, test_double: true },
    Scene { name: "isolation", page_requests: true, test_double: false },
];

impl Machine {
    /// Every machine, in the order in which they are booted.
    pub const ALL: [Self; 2] = [Self::X86_64, Self::Aarch64];

    /// Returns the machine that a user calls `name`.
    pub fn named(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|machine| machine.name() == name).ok_or_else(|| {
            Error::Usage(format!("there is no machine {name}; the machines are x86_64 and aarch64"))
        })
    }

    /// Returns the machine that the hypervisor image at `elf` was built for.
    pub(crate) fn of_image(elf: &Path) -> Result<Self, Error> {
        let mut header = Vec::new();
        File::open(elf)
            .and_then(|file| file.take(HEADER as u64).read_to_end(&mut header))
            .map_err(Error::io("reading", elf))?;
        built_for(&header).ok_or_else(|| {
            Error::Image(format!(
                "{} is no ELF image for x86_64 or aarch64; build it with `--target` and the machine's target",
                elf.display()
            ))
        })
    }

    /// Name of the machine in options and reports: the architecture.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// Rust's name of the target that the images are built for.
    pub(crate) fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-none",
            Self::Aarch64 => "aarch64-unknown-none-softfloat",
        }
    }

    /// The environment variable that names the QEMU to use.
    pub(crate) fn qemu_variable(self) -> &'static str {
        match self {
            Self::X86_64 => "PORTCULLIS_QEMU_X86_64",
            Self::Aarch64 => "PORTCULLIS_QEMU_AARCH64",
        }
    }

    /// The Debian package that has the QEMU.
    pub(crate) fn qemu_package(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86",
            Self::Aarch64 => "qemu-system-arm",
        }
    }

    /// The scenes that a complete demonstration shows, in order.
    pub(crate) fn scenes(self) -> &'static [Scene] {
        match self {
            Self::X86_64 => &X86_64_SCENES,
            Self::Aarch64 => &AARCH64_SCENES,
        }
    }
}

/// How much of an ELF file it takes to know its machine, in bytes: up to and with `e_machine`.
const HEADER: usize = 20;

/// Returns the machine that the ELF file which begins with `header` is for: 64-bit, little-endian, `e_machine`.
fn built_for(header: &[u8]) -> Option<Machine> {
    let header: &[u8; HEADER] = header.first_chunk()?;
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    match u16::from_le_bytes([header[18], header[19]]) {
        62 => Some(Machine::X86_64),
        183 => Some(Machine::Aarch64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_found_by_its_name() {
        for machine in Machine::ALL {
            assert_eq!(Machine::named(machine.name()).unwrap(), machine);
        }
        assert!(Machine::named("pdp11").unwrap_err().to_string().contains("no machine pdp11"));
    }

    #[test]
    fn both_machines_show_the_same_scenes_in_the_same_order() {
        let names = |machine: Machine| machine.scenes().iter().map(|scene| (scene.name, scene.page_requests));

        assert!(names(Machine::X86_64).eq(names(Machine::Aarch64)));
    }

    #[test]
    fn only_what_rests_on_our_own_page_request_queue_is_a_test_double() {
        let doubles = |machine: Machine| -> Vec<&str> {
            machine.scenes().iter().filter(|scene| scene.test_double).map(|scene| scene.name).collect()
        };

        assert_eq!(doubles(Machine::X86_64), [""; 0]);
        assert_eq!(
            doubles(Machine::Aarch64),
            ["repair", "silence", "forgery", "restraint", "claims", "departure"]
        );
    }

    #[test]
    fn an_image_tells_its_machine() {
        let image = |ident: &[u8], machine: [u8; 2]| {
            let mut header = [0; HEADER];
            header[..ident.len()].copy_from_slice(ident);
            header[18..].copy_from_slice(&machine);
            built_for(&header)
        };

        assert_eq!(image(b"\x7fELF\x02\x01\x01", [62, 0]), Some(Machine::X86_64));
        assert_eq!(image(b"\x7fELF\x02\x01\x01", [183, 0]), Some(Machine::Aarch64));
        assert_eq!(image(b"\x7fELF\x02\x01\x01", [243, 0]), None);
        assert_eq!(image(b"\x7fELF\x01\x01\x01", [62, 0]), None);
        assert_eq!(image(b"#!/bin/sh", [62, 0]), None);
        assert_eq!(built_for(b"\x7fELF\x02\x01"), None);
    }
}
