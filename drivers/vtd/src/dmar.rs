//! The ACPI table `DMAR`: which units there are.
//!
//! Bytes in, facts out. Firmware wrote them, so nothing is believed: every length is checked, and a table that is
//! wrong gives an error that names the structure and its offset.

use core::fmt;
use iommu::PhysAddr;

/// Where the remapping structures start.
const STRUCTURES: usize = 48;

/// Why a `DMAR` table cannot be used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Error {
    /// The table is shorter than its own header, or does not say `DMAR`.
    NotDmar,
    /// The structure at `offset` has a length that leaves the table, or is too short for its type.
    Structure {
        /// Bytes from the start of the table.
        offset: usize,
        /// The structure's type.
        kind: u16,
        /// The length that it claims.
        length: u16,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotDmar => write!(f, "this is no DMAR table"),
            Self::Structure { offset, kind, length } => {
                write!(f, "DMAR: the structure of type {kind} at offset {offset:#x} has length {length}")
            }
        }
    }
}

impl core::error::Error for Error {}

/// One remapping structure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Structure {
    /// A remapping unit (`DRHD`).
    Unit(Unit),
    /// A structure that this driver does not use, by its type.
    Other(u16),
}

/// A remapping unit (`DRHD`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Unit {
    /// Where its registers are.
    pub base: PhysAddr,
    /// The size of its register window, in bytes.
    pub bytes: u64,
    /// The PCI segment that it serves.
    pub segment: u16,
    /// It serves every device of the segment that no other unit claims (`INCLUDE_PCI_ALL`).
    pub include_pci_all: bool,
}

/// A `DMAR` table.
#[derive(Clone, Copy, Debug)]
pub struct Dmar<'t> {
    table: &'t [u8],
}

impl<'t> Dmar<'t> {
    /// Reads a table, as ACPI hands it over with its header.
    pub fn new(table: &'t [u8]) -> Result<Self, Error> {
        if table.len() < STRUCTURES || !table.starts_with(b"DMAR") {
            return Err(Error::NotDmar);
        }
        Ok(Self { table })
    }

    /// Returns the bits of an address that the platform implements (`Host Address Width`).
    pub fn address_bits(&self) -> u32 {
        u32::from(self.table[36]) + 1
    }

    /// Returns the structures in their order; after an error there are no more.
    pub fn structures(&self) -> impl Iterator<Item = Result<Structure, Error>> + use<'t> {
        let table = self.table;
        let mut offset = STRUCTURES;
        core::iter::from_fn(move || {
            if offset >= table.len() {
                return None;
            }
            let rest = &table[offset..];
            let read = structure(rest, offset);
            // A structure that was accepted has a length of 4 or more.
            offset = match read {
                Ok((_, length)) => offset + length,
                Err(_) => table.len(),
            };
            Some(read.map(|(structure, _)| structure))
        })
    }

    /// Returns the units in their order.
    pub fn units(&self) -> impl Iterator<Item = Result<Unit, Error>> + use<'t> {
        self.structures().filter_map(|structure| match structure {
            Ok(Structure::Unit(unit)) => Some(Ok(unit)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        })
    }
}

/// Reads the structure at the start of `bytes`, and its length.
fn structure(bytes: &[u8], offset: usize) -> Result<(Structure, usize), Error> {
    let kind = bytes.first_chunk().map_or(u16::MAX, |b: &[u8; 2]| u16::from_le_bytes(*b));
    let claimed = bytes.get(2..4).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
    let wrong = Error::Structure { offset, kind, length: claimed };
    let length = usize::from(claimed);
    let body = bytes.get(..length).filter(|body| body.len() >= 4).ok_or(wrong)?;
    if kind != 0 {
        return Ok((Structure::Other(kind), length));
    }
    let drhd: &[u8; 16] = body.first_chunk().ok_or(wrong)?;
    let [_, _, _, _, flags, size, segment_low, segment_high, base @ ..] = *drhd;
    let unit = Unit {
        base: PhysAddr(u64::from_le_bytes(base)),
        bytes: 4096 << (size & 0xF),
        segment: u16::from_le_bytes([segment_low, segment_high]),
        include_pci_all: flags & 1 != 0,
    };
    Ok((Structure::Unit(unit), length))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header with host address width 48, then `structures`.
    fn table(structures: &[u8]) -> std::vec::Vec<u8> {
        let mut table = vec![0; STRUCTURES];
        table[..4].copy_from_slice(b"DMAR");
        table[36] = 47;
        table.extend_from_slice(structures);
        table
    }

    /// What QEMU describes: one unit at 0xFED9_0000 with an I/O APIC in its scope, then ATSR for all ports.
    const QEMU: [u8; 32] = [
        0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0xD9, 0xFE, 0, 0, 0, 0, // DRHD
        3, 8, 0, 0, 0, 0xFF, 0, 0, // scope
        2, 0, 8, 0, 1, 0, 0, 0, // ATSR
    ];

    #[test]
    fn the_unit_that_qemu_describes_is_found() {
        let table = table(&QEMU);
        let dmar = Dmar::new(&table).expect("a DMAR table");

        assert_eq!(dmar.address_bits(), 48);
        let unit = Unit { base: PhysAddr(0xFED9_0000), bytes: 4096, segment: 0, include_pci_all: false };
        assert_eq!(
            dmar.structures().collect::<std::vec::Vec<_>>(),
            [Ok(Structure::Unit(unit)), Ok(Structure::Other(2))]
        );
        assert_eq!(dmar.units().collect::<std::vec::Vec<_>>(), [Ok(unit)]);
    }

    #[test]
    fn a_structure_that_leaves_the_table_is_an_error_that_names_it() {
        let mut bytes = QEMU;
        bytes[26] = 9;
        let table = table(&bytes);
        let last = Dmar::new(&table).expect("a DMAR table").structures().last();

        assert_eq!(last, Some(Err(Error::Structure { offset: 72, kind: 2, length: 9 })));
    }

    #[test]
    fn a_structure_of_no_length_ends_the_walk() {
        for structures in [&[0, 0, 0, 0][..], &[0, 0, 3, 0], &[0], &[0, 0, 8, 0, 0, 0, 0, 0]] {
            let table = table(structures);
            let found: std::vec::Vec<_> = Dmar::new(&table).expect("a DMAR table").structures().collect();

            assert!(matches!(found[..], [Err(Error::Structure { offset: 48, .. })]), "{structures:?}");
        }
    }

    #[test]
    fn every_cut_of_a_table_is_read_without_a_panic() {
        let table = table(&QEMU);
        for end in 0..table.len() {
            if let Ok(dmar) = Dmar::new(&table[..end]) {
                let _ = dmar.structures().count();
            }
        }
    }
}
