//! The machines that the hypervisor runs on.

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
