//! The ACPI table `DMAR`: which units there are, which devices are behind each, and what those devices need.
//!
//! Bytes in, facts out. Firmware wrote them, so nothing is believed: [`Dmar::new`] reads the whole table
//! once, and one that is wrong gives an error that names the structure and its offset. What is asked
//! afterwards allocates nothing, and takes no longer than two passes over the table; what is to stay mapped
//! takes one for each region and one more.
//!
//! A device behind bridges is named by a path through them, because bus numbers are not firmware's to keep.
//! Questions about a device therefore take a closure `buses` that returns the buses behind a bridge, from its
//! configuration space.
//!
//! ```
//! # use vtd::dmar::*;
//! # use iommu::StreamId;
//! # use core::ops::RangeInclusive;
//! /// Whether a device can be given away: a unit translates it, and firmware has no use for it.
//! fn is_assignable(dmar: &Dmar, buses: impl Fn(Requester) -> Option<RangeInclusive<u8>>) -> bool {
//!     let device = Requester { segment: 0, id: StreamId(0x0100) };
//!     dmar.unit_of(device, &buses).is_some() && dmar.kept_mapped(device, Reserved::Refuse, &buses).is_ok()
//! }
//! ```

use core::{
    fmt,
    ops::{Range, RangeInclusive},
};
use iommu::{PAGE_SIZE, PhysAddr, StreamId};

/// Where the remapping structures start.
const STRUCTURES: usize = 48;
/// The fixed part of a device scope entry; its path follows.
const SCOPE: usize = 6;

/// Why a `DMAR` table cannot be used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Error {
    /// The bytes are shorter than a header, or do not say `DMAR`.
    NotDmar,
    /// The header claims `claimed` bytes; a header has 48, and there are `found`.
    Length {
        /// The length in the header.
        claimed: u32,
        /// The bytes that there are.
        found: usize,
    },
    /// The structure at `offset` has a length that leaves the table, or is too short for its type.
    Structure {
        /// Bytes from the start of the table.
        offset: usize,
        /// The structure's type.
        kind: u16,
        /// The length that it claims.
        length: u16,
    },
    /// The device scope entry at `offset` has a length that leaves its structure, an impossible length for a
    /// path, or a path through devices above 31 or functions above 7.
    Scope {
        /// Bytes from the start of the table.
        offset: usize,
        /// The type of the structure that it is in.
        kind: u16,
        /// The length that it claims.
        length: u8,
    },
    /// The unit at `offset` has its registers at address zero, off a page boundary, or past the host address
    /// width.
    Registers {
        /// Bytes from the start of the table.
        offset: usize,
        /// Where its registers would be.
        base: PhysAddr,
    },
    /// The reserved region at `offset` is not one of whole pages below the host address width.
    Region {
        /// Bytes from the start of the table.
        offset: usize,
        /// Its first byte.
        base: PhysAddr,
        /// Its last byte.
        limit: PhysAddr,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotDmar => write!(f, "this is no DMAR table"),
            Self::Length { claimed, found } => {
                write!(f, "DMAR: the header claims {claimed} bytes, there are {found}")
            }
            Self::Structure { offset, kind, length } => {
                write!(f, "DMAR: the structure of type {kind} at offset {offset:#x} has length {length}")
            }
            Self::Scope { offset, kind, length } => {
                write!(f, "DMAR: the device scope at offset {offset:#x}, in a structure of type {kind}, ")?;
                write!(f, "has length {length} or an impossible path")
            }
            Self::Registers { offset, base } => {
                write!(f, "DMAR: the unit at offset {offset:#x} cannot have registers at {:#x}", base.0)
            }
            Self::Region { offset, base, limit } => {
                write!(f, "DMAR: the reserved region at offset {offset:#x} is impossible: ")?;
                write!(f, "{:#x} to {:#x}", base.0, limit.0)
            }
        }
    }
}

impl core::error::Error for Error {}

/// Who issues a transaction: a requester ID of a PCI segment.
///
/// The table names physical functions. Ask for a virtual function by its physical one; for a conventional PCI
/// device, by the bridge that speaks for it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Requester {
    /// The PCI segment.
    pub segment: u16,
    /// `bus << 8 | device << 3 | function`.
    pub id: StreamId,
}

impl Requester {
    /// Returns the function `function` of device `device` on `bus`; values past 31 and 7 are cut to their
    /// fields.
    pub fn new(segment: u16, bus: u8, device: u8, function: u8) -> Self {
        let id = u32::from(bus) << 8 | u32::from(device & 0x1F) << 3 | u32::from(function & 7);
        Self { segment, id: StreamId(id) }
    }

    fn bus(self) -> u8 {
        (self.id.0 >> 8) as u8
    }
}

/// One remapping structure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Structure<'t> {
    /// A remapping unit (`DRHD`).
    Unit(Unit<'t>),
    /// Memory that firmware made devices use (`RMRR`).
    Region(Region<'t>),
    /// Root ports that let ATS through (`ATSR`).
    Atsr {
        /// The PCI segment.
        segment: u16,
        /// All root ports of the segment do (`ALL_PORTS`), and the scopes say nothing.
        all_ports: bool,
        /// The root ports that do.
        scopes: Scopes<'t>,
    },
    /// Which memory a unit is near (`RHSA`).
    Rhsa {
        /// Where the unit's registers are.
        base: PhysAddr,
        /// The proximity domain, as in ACPI's other tables.
        domain: u32,
    },
    /// A device that ACPI alone names (`ANDD`); its requester ID is in the scope [`ScopeKind::Named`] with
    /// its number.
    Andd {
        /// The number that the scope has as its [`Scope::id`].
        number: u8,
        /// The full path of its ACPI object, without the zero at the end.
        name: &'t [u8],
    },
    /// Devices of the SoC with a device TLB (`SATC`).
    Satc {
        /// The PCI segment.
        segment: u16,
        /// They work only with their device TLB on (`ATC_REQUIRED`).
        required: bool,
        /// The devices.
        scopes: Scopes<'t>,
    },
    /// Devices of the SoC with properties, which are the [`flags`](Scope::flags) of their scopes (`SIDP`).
    Sidp {
        /// The PCI segment.
        segment: u16,
        /// The devices.
        scopes: Scopes<'t>,
    },
    /// A structure that was not known when this was written, by its type; its length was believed, and no
    /// more.
    Other(u16),
}

/// A remapping unit (`DRHD`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Unit<'t> {
    /// Where its registers are.
    pub base: PhysAddr,
    /// The size of its register window, in bytes.
    pub bytes: u64,
    /// The PCI segment that it serves.
    pub segment: u16,
    /// It serves every device of the segment that no other unit claims (`INCLUDE_PCI_ALL`).
    pub include_pci_all: bool,
    /// The devices that it claims, and the interrupt controllers and timers whose interrupts it remaps.
    pub scopes: Scopes<'t>,
}

/// Memory that firmware made devices use, and that they go on using (`RMRR`).
///
/// Its devices can be translated only where the region is mapped at its own addresses. Before that, check
/// that the memory map has it reserved: the table is no proof.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Region<'t> {
    /// The PCI segment of its devices.
    pub segment: u16,
    /// Its first byte, on a page boundary.
    pub base: PhysAddr,
    /// The byte behind its last, on a page boundary.
    pub end: PhysAddr,
    /// The devices that use it. Several share it, or one that is a bridge.
    pub scopes: Scopes<'t>,
}

impl Region<'_> {
    /// Returns the addresses of the region.
    pub fn range(&self) -> Range<PhysAddr> {
        self.base..self.end
    }
}

/// What becomes of a device that firmware goes on using memory with, when it is to be given away.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Reserved {
    /// It is not given away.
    Refuse,
    /// It is, with exactly its regions mapped at their own addresses, for reading and writing, as long as it is attached.
    ///
    /// Whoever has the device then reaches what firmware keeps there, and whatever other devices do that share a region:
    /// see its [`scopes`](Region::scopes).
    KeepMapped,
}

/// Firmware goes on using memory with a device, which is therefore not given away.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct UsedByFirmware {
    /// The first region that it uses.
    pub base: PhysAddr,
    /// The byte behind it.
    pub end: PhysAddr,
}

impl fmt::Display for UsedByFirmware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "firmware uses {:#x} to {:#x} with the device", self.base.0, self.end.0)
    }
}

impl core::error::Error for UsedByFirmware {}

/// The devices that a structure is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Scopes<'t> {
    /// Entries that were checked, one after the other.
    bytes: &'t [u8],
}

impl<'t> Iterator for Scopes<'t> {
    type Item = Scope<'t>;

    fn next(&mut self) -> Option<Scope<'t>> {
        let (scope, rest) = Scope::split_from(self.bytes)?;
        self.bytes = rest;
        Some(scope)
    }
}

impl<'t> Scopes<'t> {
    /// Checks the entries in `bytes`, which start at `offset`, of a structure of type `kind`.
    fn new(bytes: &'t [u8], offset: usize, kind: u16) -> Result<Self, Error> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let length = rest.get(1).copied().unwrap_or(0);
            let wrong = Error::Scope { offset: offset + bytes.len() - rest.len(), kind, length };
            (_, rest) = Scope::split_from(rest).ok_or(wrong)?;
        }
        Ok(Self { bytes })
    }

    /// Returns whether `of` is one of the devices, or behind one that is a bridge.
    fn cover(mut self, of: Requester, buses: &impl Fn(Requester) -> Option<RangeInclusive<u8>>) -> bool {
        self.any(|scope| scope.covers(of, buses))
    }
}

/// What a device scope entry names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum ScopeKind {
    /// A PCI function, and nothing behind it.
    Endpoint,
    /// A PCI bridge, and everything behind it.
    Bridge,
    /// An I/O APIC, by its ID in ACPI's `MADT`.
    IoApic,
    /// A timer that sends messages (`HPET`), by its number.
    Timer,
    /// A device that ACPI alone names, by its number in `ANDD`.
    Named,
    /// A kind that was not known when this was written; its bytes.
    Other(u8),
}

/// One device scope entry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Scope<'t> {
    /// What it names.
    pub kind: ScopeKind,
    /// Its flags, raw; `SIDP` has the properties of the device here.
    pub flags: u8,
    /// Its number among its kind (`Enumeration ID`); zero for functions and bridges.
    pub id: u8,
    /// The bus on which its path starts.
    pub start_bus: u8,
    /// Pairs of device and function: bridges to go through, then the device itself.
    path: &'t [u8],
}

impl<'t> Scope<'t> {
    /// Splits the first entry off `bytes`; `None` if its length or its path is impossible.
    fn split_from(bytes: &'t [u8]) -> Option<(Self, &'t [u8])> {
        let [kind, length, flags, _, id, start_bus] = *bytes.first_chunk::<SCOPE>()?;
        let (entry, rest) = bytes.split_at_checked(length.into())?;
        let path = entry.get(SCOPE..)?;
        let kind = match kind {
            1 => ScopeKind::Endpoint,
            2 => ScopeKind::Bridge,
            3 => ScopeKind::IoApic,
            4 => ScopeKind::Timer,
            5 => ScopeKind::Named,
            other => ScopeKind::Other(other),
        };
        let is_path = !path.is_empty()
            && path.len().is_multiple_of(2)
            && path.chunks_exact(2).all(|step| step[0] < 32 && step[1] < 8);
        let known = !matches!(kind, ScopeKind::Other(_));
        (is_path || !known).then_some((Self { kind, flags, id, start_bus, path }, rest))
    }

    /// Returns the device at the end of the path on `segment`; `None` if a bridge on the way leads nowhere.
    pub fn requester(
        &self,
        segment: u16,
        buses: impl Fn(Requester) -> Option<RangeInclusive<u8>>,
    ) -> Option<Requester> {
        let mut at: Option<Requester> = None;
        for step in self.path.chunks_exact(2) {
            let bus = match at {
                None => self.start_bus,
                Some(bridge) => *behind(bridge, &buses)?.start(),
            };
            at = Some(Requester::new(segment, bus, step[0], step[1]));
        }
        at
    }

    /// Returns whether `of`, on the segment of the structure, is the device, or behind it if that is a
    /// bridge.
    fn covers(&self, of: Requester, buses: &impl Fn(Requester) -> Option<RangeInclusive<u8>>) -> bool {
        match self.kind {
            ScopeKind::Endpoint | ScopeKind::Named => self.requester(of.segment, buses) == Some(of),
            ScopeKind::Bridge => self.requester(of.segment, buses).is_some_and(|bridge| {
                bridge == of || behind(bridge, buses).is_some_and(|buses| buses.contains(&of.bus()))
            }),
            // These send interrupts and no DMA, from requester IDs that may be anybody's.
            ScopeKind::IoApic | ScopeKind::Timer | ScopeKind::Other(_) => false,
        }
    }
}

/// Returns the buses behind `bridge`, if they can be: they come after its own.
///
/// A bridge that nobody has set up says 0 to 0; taken at its word, it would own the devices beside it.
fn behind(
    bridge: Requester,
    buses: impl Fn(Requester) -> Option<RangeInclusive<u8>>,
) -> Option<RangeInclusive<u8>> {
    buses(bridge).filter(|buses| *buses.start() > bridge.bus() && buses.end() >= buses.start())
}

/// Whether a device may use ATS, by the table. What the device and the unit can do is not in it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Ats {
    /// No structure names the device or a port above it. Behind a root port it must not use ATS; a device on
    /// a root bus is behind none, and what it can do itself decides.
    NotListed,
    /// It may (`ATSR`, `SATC`).
    Allowed,
    /// It may, and does not work without (`SATC`, `ATC_REQUIRED`).
    Required,
}

/// A `DMAR` table without a mistake in its structure.
#[derive(Clone, Copy, Debug)]
pub struct Dmar<'t> {
    /// As long as the header says.
    table: &'t [u8],
}

impl<'t> Dmar<'t> {
    /// Reads a table, as ACPI hands it over with its header. Whoever found it has verified the checksum.
    pub fn new(table: &'t [u8]) -> Result<Self, Error> {
        if table.len() < STRUCTURES || !table.starts_with(b"DMAR") {
            return Err(Error::NotDmar);
        }
        let claimed = u32_at(table, 4).unwrap_or(0);
        let whole = table.get(..claimed as usize).filter(|whole| whole.len() >= STRUCTURES);
        let dmar = Self { table: whole.ok_or(Error::Length { claimed, found: table.len() })? };
        dmar.walk().try_for_each(|structure| structure.map(|_| ()))?;
        Ok(dmar)
    }

    /// Returns the bits of an address that the platform implements (`Host Address Width`).
    pub fn address_bits(&self) -> u32 {
        u32::from(self.table[36]) + 1
    }

    /// Returns whether the platform remaps interrupts (`INTR_REMAP`).
    pub fn remaps_interrupts(&self) -> bool {
        self.table[37] & 1 != 0
    }

    /// Returns whether firmware asks not to use x2APIC mode (`X2APIC_OPT_OUT`).
    pub fn refuses_x2apic(&self) -> bool {
        self.table[37] & 2 != 0
    }

    /// Returns whether firmware kept devices out of memory until now, and asks for the same
    /// (`DMA_CTRL_PLATFORM_OPT_IN`).
    pub fn asks_for_protection(&self) -> bool {
        self.table[37] & 4 != 0
    }

    /// Returns the structures in their order.
    pub fn structures(&self) -> impl Iterator<Item = Structure<'t>> + use<'t> {
        self.walk().map_while(Result::ok)
    }

    /// Returns the units in their order.
    pub fn units(&self) -> impl Iterator<Item = Unit<'t>> + use<'t> {
        self.structures().filter_map(|structure| match structure {
            Structure::Unit(unit) => Some(unit),
            _ => None,
        })
    }

    /// Returns the unit that translates what `of` issues; `None` if none does, and nothing keeps it from
    /// memory.
    ///
    /// A unit that claims it goes before one that takes the rest (`INCLUDE_PCI_ALL`), in whatever order they
    /// are listed. If several claim it, the first is returned: when each unit is in service, the device is
    /// blocked at any other.
    pub fn unit_of(
        &self,
        of: Requester,
        buses: impl Fn(Requester) -> Option<RangeInclusive<u8>>,
    ) -> Option<Unit<'t>> {
        let mut units = self.units().filter(|unit| unit.segment == of.segment);
        let claiming = units.find(|unit| unit.scopes.cover(of, &buses));
        claiming.or_else(|| self.units().find(|unit| unit.segment == of.segment && unit.include_pci_all))
    }

    /// Returns the regions that `of` goes on using, in their order; they may overlap, and other devices may
    /// use them too.
    pub fn regions_of<F>(&self, of: Requester, buses: F) -> impl Iterator<Item = Region<'t>> + use<'t, F>
    where
        F: Fn(Requester) -> Option<RangeInclusive<u8>>,
    {
        self.structures().filter_map(move |structure| match structure {
            Structure::Region(region) => {
                (region.segment == of.segment && region.scopes.cover(of, &buses)).then_some(region)
            }
            _ => None,
        })
    }

    /// Decides whether `of` may be given away, as far as reserved regions go. Returns what has to be mapped at its own
    /// addresses before the device is attached, and no more of it: in their order, without overlap, and nothing where
    /// firmware uses nothing.
    pub fn kept_mapped<F>(
        &self,
        of: Requester,
        policy: Reserved,
        buses: F,
    ) -> Result<impl Iterator<Item = Range<PhysAddr>> + use<'t, F>, UsedByFirmware>
    where
        F: Fn(Requester) -> Option<RangeInclusive<u8>>,
    {
        if let (Reserved::Refuse, Some(region)) = (policy, self.regions_of(of, &buses).next()) {
            return Err(UsedByFirmware { base: region.base, end: region.end });
        }
        let dmar = *self;
        let mut done = PhysAddr(0);
        Ok(core::iter::from_fn(move || {
            let regions = || dmar.regions_of(of, &buses).map(|region| region.range());
            let mut next = regions().filter(|region| region.end > done).min_by_key(|region| region.start)?;
            // Whatever overlaps it or goes on where it ends is one with it.
            while let Some(more) = regions().find(|r| r.start <= next.end && r.end > next.end) {
                next.end = more.end;
            }
            done = next.end;
            Some(next)
        }))
    }

    /// Returns whether `of` may use ATS.
    pub fn ats_of(&self, of: Requester, buses: impl Fn(Requester) -> Option<RangeInclusive<u8>>) -> Ats {
        let mut found = Ats::NotListed;
        for structure in self.structures() {
            match structure {
                Structure::Satc { segment, required, scopes }
                    if segment == of.segment && scopes.cover(of, &buses) =>
                {
                    if required {
                        return Ats::Required;
                    }
                    found = Ats::Allowed;
                }
                Structure::Atsr { segment, all_ports, scopes }
                    if segment == of.segment && (all_ports || scopes.cover(of, &buses)) =>
                {
                    found = Ats::Allowed;
                }
                _ => {}
            }
        }
        found
    }

    /// Returns who sends the interrupts of I/O APIC or timer `id`, or what requester ACPI device `id` is, and
    /// the unit that it is behind.
    pub fn source(
        &self,
        kind: ScopeKind,
        id: u8,
        buses: impl Fn(Requester) -> Option<RangeInclusive<u8>>,
    ) -> Option<(Unit<'t>, Requester)> {
        self.units().find_map(|unit| {
            let scope = { unit.scopes }.find(|scope| scope.kind == kind && scope.id == id)?;
            Some((unit, scope.requester(unit.segment, &buses)?))
        })
    }

    /// Reads the structures in their order; after an error there are no more.
    fn walk(&self) -> impl Iterator<Item = Result<Structure<'t>, Error>> + use<'t> {
        let (table, address_bits) = (self.table, self.address_bits());
        let mut offset = STRUCTURES;
        core::iter::from_fn(move || {
            let rest = table.get(offset..).filter(|rest| !rest.is_empty())?;
            let read = structure(rest, offset, address_bits);
            // A structure that was accepted has a length of 4 or more.
            offset = match read {
                Ok((_, length)) => offset + length,
                Err(_) => table.len(),
            };
            Some(read.map(|(structure, _)| structure))
        })
    }
}

/// Reads the structure at the start of `bytes`, and its length.
fn structure(bytes: &[u8], offset: usize, address_bits: u32) -> Result<(Structure<'_>, usize), Error> {
    let kind = u16_at(bytes, 0).unwrap_or(u16::MAX);
    let length = u16_at(bytes, 2).unwrap_or(0);
    let wrong = Error::Structure { offset, kind, length };
    let body = bytes.get(..length.into()).filter(|body| body.len() >= 4).ok_or(wrong)?;
    let byte = |at: usize| body.get(at).copied().ok_or(wrong);
    let address = |at| u64_at(body, at).map(PhysAddr).ok_or(wrong);
    let segment = || u16_at(body, 6).ok_or(wrong);
    let scopes = |at: usize| Scopes::new(body.get(at..).ok_or(wrong)?, offset + at, kind);
    let is_implemented = |end: u64| address_bits >= u64::BITS || end <= 1 << address_bits;
    let structure = match kind {
        0 => {
            let (base, bytes) = (address(8)?, PAGE_SIZE << (byte(5)? & 0xF));
            let unit = Unit {
                base,
                bytes,
                segment: segment()?,
                include_pci_all: byte(4)? & 1 != 0,
                scopes: scopes(16)?,
            };
            let end = base.spanning(bytes).map(|registers| registers.end.0);
            if base.0 == 0 || !base.0.is_multiple_of(PAGE_SIZE) || !end.is_some_and(is_implemented) {
                return Err(Error::Registers { offset, base });
            }
            Structure::Unit(unit)
        }
        1 => {
            let (base, limit) = (address(8)?, address(16)?);
            let scopes = scopes(24)?;
            let end = limit.0.checked_add(1).filter(|&end| is_implemented(end) && base.0 < end);
            let pages = |end: &u64| base.0.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE);
            let end = end.filter(pages).ok_or(Error::Region { offset, base, limit })?;
            Structure::Region(Region { segment: segment()?, base, end: PhysAddr(end), scopes })
        }
        2 => Structure::Atsr { segment: segment()?, all_ports: byte(4)? & 1 != 0, scopes: scopes(8)? },
        3 => Structure::Rhsa { base: address(8)?, domain: u32_at(body, 16).ok_or(wrong)? },
        4 => {
            let name = body.get(8..).ok_or(wrong)?;
            let end = name.iter().position(|&letter| letter == 0).ok_or(wrong)?;
            Structure::Andd { number: byte(7)?, name: &name[..end] }
        }
        5 => Structure::Satc { segment: segment()?, required: byte(4)? & 1 != 0, scopes: scopes(8)? },
        6 => Structure::Sidp { segment: segment()?, scopes: scopes(8)? },
        _ => Structure::Other(kind),
    };
    Ok((structure, length.into()))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
