//! The ACPI table `IORT`: which units there are, which stream a device is, and what memory firmware keeps for
//! it.
//!
//! Bytes in, facts out. Firmware wrote them, so nothing is believed: every length and reference is checked,
//! and a table that is wrong gives an error that names the node, its type and its offset. What two nodes say
//! differently is such an error, too; a stream is never guessed.
//!
//! The layouts are those of "IO Remapping Table" (Arm DEN 0049), up to revision E.e.
//!
//! ```
//! # use smmuv3::iort::{Error, Iort};
//! /// Where function 02:00.0 of segment 0 ends up, if a unit translates it.
//! fn find(table: &[u8]) -> Result<Option<(u64, u32)>, Error> {
//!     let found = Iort::new(table)?.endpoint(0, 0x0200)?;
//!     Ok(found.map(|endpoint| (endpoint.place.unit.base.0, endpoint.place.stream.0)))
//! }
//! ```

use core::fmt;
use iommu::{PhysAddr, StreamId};

/// Bytes of the table's header, which ACPI's begins.
const HEADER: usize = 48;
/// Bytes of a node's header.
const NODE: usize = 16;
/// Bytes of an ID mapping, and of a reserved region.
const RECORD: usize = 20;
/// What regions are multiples of.
const REGION: u64 = 0x1_0000;

// Types of nodes.
const ITS_GROUP: u8 = 0;
const NAMED_COMPONENT: u8 = 1;
const ROOT_COMPLEX: u8 = 2;
const OLDER_UNIT: u8 = 3;
const UNIT: u8 = 4;
const COUNTERS: u8 = 5;
const RESERVED: u8 = 6;

/// Why an `IORT` table cannot be used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Error {
    /// The table is shorter than its own header, or does not say `IORT`.
    NotIort,
    /// The table says that it is longer than what was given, or shorter than its header.
    Length {
        /// Bytes that it claims.
        claimed: u32,
        /// Bytes that were given.
        given: usize,
    },
    /// The table ends before all its nodes.
    Ends {
        /// Where the next node would be, in bytes from the start of the table.
        offset: usize,
        /// Nodes that are not there.
        missing: u32,
    },
    /// A node is wrong.
    Node {
        /// Bytes from the start of the table.
        offset: usize,
        /// The node's type.
        kind: u8,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotIort => write!(f, "this is no IORT table"),
            Self::Length { claimed, given } => {
                write!(f, "IORT: the table claims {claimed} bytes, and {given} are there")
            }
            Self::Ends { offset, missing } => {
                write!(f, "IORT: {missing} nodes are missing from offset {offset:#x} on")
            }
            Self::Node { offset, kind, what } => {
                let name = match kind {
                    ITS_GROUP => "ITS group",
                    NAMED_COMPONENT => "named component",
                    ROOT_COMPLEX => "root complex",
                    OLDER_UNIT => "SMMUv1 or v2",
                    UNIT => "SMMUv3",
                    COUNTERS => "PMCG",
                    RESERVED => "RMR",
                    _ => "unknown",
                };
                write!(f, "IORT: the node of type {kind} ({name}) at offset {offset:#x}: {what}")
            }
        }
    }
}

impl core::error::Error for Error {}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// What all nodes have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Common<'t> {
    offset: usize,
    kind: u8,
    revision: u8,
    /// All of the node.
    bytes: &'t [u8],
    /// Its ID mappings.
    mappings: &'t [u8],
}

/// Where an ID mapping leads.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Output {
    /// Offset of a node.
    to: usize,
    id: u32,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    first: u32,
    /// IDs after the first. (The field is called number of IDs, and holds one less.)
    more: u32,
    output: Output,
    single: bool,
}

impl Mapping {
    /// Returns the last output ID, or `None` if there is no such number.
    fn last_output(&self) -> Option<u32> {
        let more = if self.single { 0 } else { self.more };
        self.output.id.checked_add(more)
    }
}

impl<'t> Common<'t> {
    /// Reads the header of the node at `offset`, if the table has one there.
    fn read(table: &'t [u8], offset: usize) -> Option<Result<Self, Error>> {
        let rest = table.get(offset..)?;
        let header: &[u8; NODE] = rest.first_chunk()?;
        let [kind, low, high, revision, ..] = *header;
        let length = usize::from(u16::from_le_bytes([low, high]));
        let wrong = |what| Error::Node { offset, kind, what };
        let Some(bytes) = rest.get(..length).filter(|bytes| bytes.len() >= NODE) else {
            return Some(Err(wrong("its length leaves the table, or is less than its header")));
        };
        let field = |at| word(bytes, at).unwrap_or(0) as usize;
        let (count, start) = (field(8), field(12));
        let mappings = match count.checked_mul(RECORD).and_then(|bytes| start.checked_add(bytes)) {
            _ if count == 0 => Some(&bytes[..0]),
            Some(end) if start >= NODE => bytes.get(start..end),
            _ => None,
        };
        let mappings = mappings.ok_or(wrong("its ID mappings leave it"));
        Some(mappings.map(|mappings| Self { offset, kind, revision, bytes, mappings }))
    }

    fn wrong(&self, what: &'static str) -> Error {
        Error::Node { offset: self.offset, kind: self.kind, what }
    }

    /// Checks that the node has at least `bytes` bytes.
    fn has(&self, bytes: usize) -> Result<(), Error> {
        let short = self.wrong("it is too short for its type");
        if self.bytes.len() >= bytes { Ok(()) } else { Err(short) }
    }

    /// Returns the 32 bits at `at`, which [`has`](Self::has) was asked for.
    fn word(&self, at: usize) -> u32 {
        word(self.bytes, at).unwrap_or(0)
    }

    fn long(&self, at: usize) -> u64 {
        long(self.bytes, at).unwrap_or(0)
    }

    fn byte(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or(0)
    }

    fn mappings(&self) -> impl Iterator<Item = Mapping> + use<'t> {
        self.mappings.chunks_exact(RECORD).map(|bytes| {
            let field = |at| word(bytes, at).unwrap_or(0);
            let output = Output { to: field(12) as usize, id: field(8) };
            Mapping { first: field(0), more: field(4), output, single: field(16) & 1 != 0 }
        })
    }

    /// Returns where `id` leads.
    ///
    /// A single mapping is for any ID of a root complex or a component, and never for the streams of a unit:
    /// there it is for the unit's own interrupts.
    ///
    /// Firmware has been seen that took the field for the number of IDs; then the last ID of a range is also
    /// the first of another, which counts.
    fn output(&self, id: u32) -> Result<Option<Output>, Error> {
        let mut found: Option<(Output, Mapping)> = None;
        for mapping in self.mappings() {
            let output = if mapping.single {
                if self.kind == UNIT {
                    continue;
                }
                mapping.output
            } else {
                let Some(at) = id.checked_sub(mapping.first).filter(|&at| at <= mapping.more) else {
                    continue;
                };
                let wraps = self.wrong("an ID mapping leads to numbers that do not exist");
                Output { id: mapping.output.id.checked_add(at).ok_or(wraps)?, ..mapping.output }
            };
            let begins = |mapping: &Mapping| !mapping.single && mapping.first == id;
            let ends = |mapping: &Mapping| {
                !mapping.single && mapping.more > 0 && id.checked_sub(mapping.first) == Some(mapping.more)
            };
            match &found {
                Some((other, _)) if *other == output => {}
                Some((_, other)) if begins(other) && ends(&mapping) => {}
                Some((_, other)) if !(ends(other) && begins(&mapping)) => {
                    return Err(self.wrong("two ID mappings lead one ID to different places"));
                }
                _ => found = Some((output, mapping)),
            }
        }
        Ok(found.map(|(output, _)| output))
    }
}

/// One node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Node<'t> {
    /// Interrupt translation services that devices share.
    ItsGroup(ItsGroup<'t>),
    /// A device that is not a PCI function.
    NamedComponent(NamedComponent<'t>),
    /// A PCI root complex.
    RootComplex(RootComplex<'t>),
    /// An SMMUv3.
    Unit(Unit<'t>),
    /// Memory that firmware keeps for devices (`RMR`).
    ReservedMemory(ReservedMemory<'t>),
    /// A node that this driver does not use: an older SMMU, performance counters (`PMCG`), a newer type.
    Other {
        /// Its type.
        kind: u8,
        /// Bytes from the start of the table.
        offset: usize,
    },
}

impl Node<'_> {
    /// Returns where the node is, in bytes from the start of the table.
    pub fn offset(&self) -> usize {
        match self {
            Self::ItsGroup(node) => node.common.offset,
            Self::NamedComponent(node) => node.common.offset,
            Self::RootComplex(node) => node.common.offset,
            Self::Unit(node) => node.common.offset,
            Self::ReservedMemory(node) => node.common.offset,
            Self::Other { offset, .. } => *offset,
        }
    }
}

/// Interrupt translation services that devices share.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ItsGroup<'t> {
    common: Common<'t>,
    identifiers: &'t [u8],
}

impl<'t> ItsGroup<'t> {
    fn read(common: Common<'t>) -> Result<Self, Error> {
        common.has(20)?;
        let bytes = (common.word(16) as usize).checked_mul(4);
        let identifiers = bytes.and_then(|bytes| common.bytes.get(20..)?.get(..bytes));
        let identifiers = identifiers.ok_or(common.wrong("its identifiers leave it"))?;
        Ok(Self { common, identifiers })
    }

    /// Returns the identifiers of its services, as the MADT table has them.
    pub fn identifiers(&self) -> impl Iterator<Item = u32> + use<'t> {
        self.identifiers.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes))
    }
}

/// A device that is not a PCI function.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NamedComponent<'t> {
    common: Common<'t>,
    /// Its path in the ACPI namespace.
    pub path: &'t str,
    /// Its accesses may stall.
    pub stalls: bool,
    /// Bits of the PASIDs that it can send.
    pub pasid_bits: u8,
    /// Its accesses can be coherent.
    pub coherent: bool,
    /// Bits of the addresses that it can send, if they are told.
    pub address_bits: Option<u8>,
}

impl<'t> NamedComponent<'t> {
    fn read(common: Common<'t>) -> Result<Self, Error> {
        common.has(29)?;
        let flags = common.word(16);
        let name = common.bytes[29..].split(|&byte| byte == 0).next().unwrap_or_default();
        let ends = name.len() < common.bytes.len() - 29;
        let path = core::str::from_utf8(name).ok().filter(|_| ends);
        Ok(Self {
            common,
            path: path.ok_or(common.wrong("its name has no end, or is no text"))?,
            stalls: flags & 1 != 0,
            pasid_bits: (flags >> 1 & 0x1F) as u8,
            coherent: common.word(20) & 1 != 0,
            address_bits: address_bits(common.byte(28)),
        })
    }
}

/// A PCI root complex.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RootComplex<'t> {
    common: Common<'t>,
    /// The PCI segment whose functions are below it.
    pub segment: u32,
    /// It passes on what device TLBs ask for (ATS).
    pub ats: bool,
    /// It passes on page requests (PRI).
    pub pri: bool,
    /// It passes on PASIDs.
    pub pasid: bool,
    /// Bits of the PASIDs that it passes on, where the node tells (from revision 4 on); otherwise 0.
    pub pasid_bits: u8,
    /// Accesses through it can be coherent.
    pub coherent: bool,
    /// Bits of the addresses that it passes on, where the node tells (from revision 1 on).
    pub address_bits: Option<u8>,
}

impl<'t> RootComplex<'t> {
    fn read(common: Common<'t>) -> Result<Self, Error> {
        let told = common.revision >= 1;
        common.has(if told { 36 } else { 32 })?;
        let ats = common.word(24);
        let pasid_bits = if common.revision >= 4 { common.byte(33) & 0x1F } else { 0 };
        Ok(Self {
            common,
            segment: common.word(28),
            ats: ats & 1 != 0,
            pri: ats & 1 << 1 != 0,
            pasid: ats & 1 << 2 != 0,
            pasid_bits,
            coherent: common.word(16) & 1 != 0,
            address_bits: if told { address_bits(common.byte(32)) } else { None },
        })
    }
}

/// An address size limit: 0 says nothing, and there are no more than 64 bits.
fn address_bits(limit: u8) -> Option<u8> {
    (limit > 0).then(|| limit.min(64))
}

/// Which unit it is, where that has to be known.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Model {
    /// None of those below; `IIDR` may tell more.
    Generic,
    /// HiSilicon Hi161x: its prefetch commands must not be used.
    HisiliconHi161x,
    /// Cavium CN99xx: it has page 0 alone, and one interrupt for everything.
    CaviumCn99xx,
    /// A number that was given to nobody when this was written.
    Other(u32),
}

/// An SMMUv3.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Unit<'t> {
    common: Common<'t>,
    /// Where its registers are.
    pub base: PhysAddr,
    /// Which unit it is.
    pub model: Model,
    /// It is coherent, whatever `IDR0.COHACC` says.
    pub coherent: bool,
    /// What `IDR0.HTTU` is to be taken for: 0 for nothing, 1 for access flags, 2 for dirty state as well.
    pub httu: u8,
    /// The interrupt of the event queue, as a GSIV; 0 if it is not a wire.
    pub event: u32,
    /// The interrupt of the PRI queue; 0 if it is not a wire.
    pub page_request: u32,
    /// The interrupt of global errors; 0 if it is not a wire.
    pub global_error: u32,
    /// The interrupt of `CMD_SYNC`; 0 if it is not a wire.
    pub sync: u32,
    /// The proximity domain, if it is told.
    pub proximity: Option<u32>,
    /// Which mapping is for its own interrupts, if one is.
    own: Option<u32>,
}

impl<'t> Unit<'t> {
    fn read(common: Common<'t>) -> Result<Self, Error> {
        let first = common.revision == 0;
        common.has(if first { 60 } else { 68 })?;
        let flags = common.word(24);
        let [event, page_request, global_error, sync] = [44, 48, 52, 56].map(|at| common.word(at));
        // Up to revision 4 the index counts unless all interrupts are wires.
        let has_own = match common.revision {
            0 => false,
            1..5 => [event, page_request, global_error, sync].contains(&0),
            _ => flags & 1 << 4 != 0,
        };
        Ok(Self {
            common,
            base: PhysAddr(common.long(16)),
            model: match common.word(40) {
                0 => Model::Generic,
                1 => Model::HisiliconHi161x,
                2 => Model::CaviumCn99xx,
                other => Model::Other(other),
            },
            coherent: flags & 1 != 0,
            httu: (flags >> 1 & 0b11) as u8,
            event,
            page_request,
            global_error,
            sync,
            proximity: (!first && flags & 1 << 3 != 0).then(|| common.word(60)),
            own: has_own.then(|| common.word(64)),
        })
    }

    /// Returns the size of its register window, in bytes.
    pub fn bytes(&self) -> u64 {
        if self.model == Model::CaviumCn99xx { 0x1_0000 } else { 0x2_0000 }
    }
}

/// Memory that firmware keeps for devices (`RMR`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ReservedMemory<'t> {
    common: Common<'t>,
    regions: &'t [u8],
}

/// What kind of memory a region is to be accessed as.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum MemoryKind {
    /// Device memory: nGnRnE, nGnRE, nGRE or GRE, by number.
    Device(u8),
    /// Normal memory that is not cached.
    NormalNotCached,
    /// Normal memory, write-back and inner shareable.
    NormalWriteBack,
    /// A number that was given to nobody when this was written.
    Other(u8),
}

/// A region of memory that a device uses before anyone told it to.
///
/// Whoever takes the unit into service maps it for the device at the address where it is, or gives the device
/// away to nobody; only if `remap_permitted` may the device lose it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Region {
    /// Where it starts, a multiple of 64 KiB.
    pub start: PhysAddr,
    /// Its size, a multiple of 64 KiB, and not zero.
    pub bytes: u64,
    /// It may be mapped elsewhere, or not at all, once the device's driver is there.
    pub remap_permitted: bool,
    /// The device's accesses to it are privileged.
    pub privileged: bool,
    /// What it is to be accessed as.
    pub kind: MemoryKind,
}

impl<'t> ReservedMemory<'t> {
    fn read(common: Common<'t>) -> Result<Self, Error> {
        common.has(28)?;
        let (count, start) = (common.word(20) as usize, common.word(24) as usize);
        let end = count.checked_mul(RECORD).and_then(|bytes| start.checked_add(bytes));
        let regions = match end {
            _ if count == 0 => None,
            Some(end) if start >= 28 => common.bytes.get(start..end),
            _ => None,
        };
        let regions = regions.ok_or(common.wrong("its regions leave it, or there are none"))?;
        if common.mappings.is_empty() {
            return Err(common.wrong("it is for no stream"));
        }
        Ok(Self { common, regions })
    }

    /// Whether a stream of a unit needs it.
    fn is_for(&self, unit: &Unit<'_>, stream: StreamId) -> Result<bool, Error> {
        let mut needed = false;
        for mapping in self.common.mappings().filter(|mapping| mapping.output.to == unit.common.offset) {
            let wraps = self.common.wrong("an ID mapping leads to numbers that do not exist");
            let last = mapping.last_output().ok_or(wraps)?;
            needed |= (mapping.output.id..=last).contains(&stream.0);
        }
        Ok(needed)
    }

    /// Returns its regions in their order; after an error there are no more.
    pub fn regions(&self) -> impl Iterator<Item = Result<Region, Error>> + use<'t> {
        let Self { common, regions } = *self;
        let flags = common.word(16);
        let kind = match (flags >> 2) as u8 {
            device @ 0..4 => MemoryKind::Device(device),
            4 => MemoryKind::NormalNotCached,
            5 => MemoryKind::NormalWriteBack,
            other => MemoryKind::Other(other),
        };
        let read = move |bytes: &[u8]| {
            let (start, bytes) = (long(bytes, 0)?, long(bytes, 8)?);
            let last = start.checked_add(bytes.checked_sub(1)?)?;
            (start % REGION == 0 && bytes % REGION == 0).then_some((start, last))
        };
        let mut failed = false;
        regions.chunks_exact(RECORD).enumerate().map_while(move |(at, bytes)| {
            if failed {
                return None;
            }
            let region = || {
                let crooked = common.wrong("a region is not whole multiples of 64 KiB that exist");
                let (start, last) = read(bytes).ok_or(crooked)?;
                let mut before = regions.chunks_exact(RECORD).take(at).filter_map(read);
                if before.any(|(other, end)| other <= last && start <= end) {
                    return Err(common.wrong("two of its regions overlap"));
                }
                Ok(Region {
                    start: PhysAddr(start),
                    bytes: last - start + 1,
                    remap_permitted: flags & 1 != 0,
                    privileged: flags & 1 << 1 != 0,
                    kind,
                })
            };
            let region = region();
            failed = region.is_err();
            Some(region)
        })
    }
}

/// A stream of a unit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place<'t> {
    /// The unit that translates it.
    pub unit: Unit<'t>,
    /// Which of its streams it is.
    pub stream: StreamId,
}

/// A PCI function that a unit translates.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Endpoint<'t> {
    /// What it is below.
    pub root_complex: RootComplex<'t>,
    /// Where it ends up.
    pub place: Place<'t>,
}

/// A number under which interrupt translation services know a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Interrupts<'t> {
    /// Which services.
    pub group: ItsGroup<'t>,
    /// The DeviceID.
    pub device: u32,
}

/// An `IORT` table.
#[derive(Clone, Copy, Debug)]
pub struct Iort<'t> {
    table: &'t [u8],
}

impl<'t> Iort<'t> {
    /// Reads a table, as ACPI hands it over with its header. The checksum is ACPI's matter.
    pub fn new(table: &'t [u8]) -> Result<Self, Error> {
        if table.len() < HEADER || !table.starts_with(b"IORT") {
            return Err(Error::NotIort);
        }
        let claimed = word(table, 4).unwrap_or(0);
        let length = Error::Length { claimed, given: table.len() };
        let table = table.get(..claimed as usize).filter(|table| table.len() >= HEADER).ok_or(length)?;
        Ok(Self { table })
    }

    /// Returns the revision of the table.
    fn revision(&self) -> u8 {
        self.table.get(8).copied().unwrap_or(0)
    }

    /// Returns the nodes in their order; after an error there are no more.
    pub fn nodes(&self) -> impl Iterator<Item = Result<Node<'t>, Error>> + use<'t> {
        let iort = *self;
        let mut missing = word(iort.table, 36).unwrap_or(0);
        let mut offset = word(iort.table, 40).unwrap_or(0) as usize;
        core::iter::from_fn(move || {
            if missing == 0 {
                return None;
            }
            let node = iort.node(offset, missing);
            // A node that was accepted has a length of 16 or more, so the table ends this.
            missing = if node.is_ok() { missing - 1 } else { 0 };
            let (node, length) = match node {
                Ok(read) => read,
                Err(error) => return Some(Err(error)),
            };
            offset += length;
            Some(Ok(node))
        })
    }

    /// Reads the node at `offset`, and its length; from it on there are `missing` nodes.
    fn node(&self, offset: usize, missing: u32) -> Result<(Node<'t>, usize), Error> {
        let ends = Error::Ends { offset, missing };
        let read = if offset < HEADER { None } else { Common::read(self.table, offset) };
        let common = read.ok_or(ends)??;
        let node = match common.kind {
            ITS_GROUP => Node::ItsGroup(ItsGroup::read(common)?),
            NAMED_COMPONENT => Node::NamedComponent(NamedComponent::read(common)?),
            ROOT_COMPLEX => Node::RootComplex(RootComplex::read(common)?),
            UNIT => Node::Unit(Unit::read(common)?),
            // Before, it had no flags.
            RESERVED if self.revision() >= 5 => Node::ReservedMemory(ReservedMemory::read(common)?),
            kind => Node::Other { kind, offset },
        };
        Ok((node, common.bytes.len()))
    }

    /// Returns the units in their order; after an error there are no more.
    pub fn units(&self) -> impl Iterator<Item = Result<Unit<'t>, Error>> + use<'t> {
        self.nodes().filter_map(|node| match node {
            Ok(Node::Unit(unit)) => Some(Ok(unit)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        })
    }

    /// Returns the node that a mapping of `from` leads to.
    fn target(&self, from: &Common<'t>, output: Output) -> Result<Node<'t>, Error> {
        for node in self.nodes() {
            let node = node?;
            if node.offset() == output.to {
                return Ok(node);
            }
        }
        Err(from.wrong("an ID mapping leads to no node"))
    }

    /// Returns the stream that `output`, of a mapping of `from`, is; `None` if no SMMUv3 translates it.
    fn place(&self, from: &Common<'t>, output: Output) -> Result<Option<Place<'t>>, Error> {
        match self.target(from, output)? {
            Node::Unit(unit) => Ok(Some(Place { unit, stream: StreamId(output.id) })),
            Node::ItsGroup(_) | Node::Other { kind: OLDER_UNIT, .. } => Ok(None),
            _ => Err(from.wrong("an ID mapping leads to a node that translates nothing")),
        }
    }

    /// Returns the interrupt services that `output`, of a mapping of `from`, leads to, straight or through a
    /// unit.
    fn services(&self, from: &Common<'t>, output: Output) -> Result<Option<Interrupts<'t>>, Error> {
        let (from, output) = match self.target(from, output)? {
            Node::ItsGroup(group) => return Ok(Some(Interrupts { group, device: output.id })),
            Node::Unit(unit) => match unit.common.output(output.id)? {
                Some(next) => (unit.common, next),
                None => return Ok(None),
            },
            Node::Other { kind: OLDER_UNIT, .. } => return Ok(None),
            _ => return Err(from.wrong("an ID mapping leads to a node that translates nothing")),
        };
        match self.target(&from, output)? {
            Node::ItsGroup(group) => Ok(Some(Interrupts { group, device: output.id })),
            _ => Err(from.wrong("an ID mapping leads from a unit to something other than an ITS group")),
        }
    }

    /// Returns the root complex that a PCI function is below, and where its requester ID leads.
    fn function(&self, segment: u16, requester: u16) -> Result<Option<(RootComplex<'t>, Output)>, Error> {
        let mut found: Option<(RootComplex<'t>, Output)> = None;
        for node in self.nodes() {
            let Node::RootComplex(root) = node? else { continue };
            if root.segment != u32::from(segment) {
                continue;
            }
            let Some(output) = root.common.output(requester.into())? else { continue };
            if found.is_some_and(|(_, other)| other != output) {
                return Err(root.common.wrong("another root complex leads one ID of its segment elsewhere"));
            }
            found = found.or(Some((root, output)));
        }
        Ok(found)
    }

    /// Returns which unit translates the PCI function `requester` (bus, device, function) of `segment`, and
    /// as which stream; `None` if no SMMUv3 does.
    pub fn endpoint(&self, segment: u16, requester: u16) -> Result<Option<Endpoint<'t>>, Error> {
        let Some((root_complex, output)) = self.function(segment, requester)? else { return Ok(None) };
        let place = self.place(&root_complex.common, output)?;
        Ok(place.map(|place| Endpoint { root_complex, place }))
    }

    /// Returns where the messages of a PCI function lead.
    pub fn interrupts(&self, segment: u16, requester: u16) -> Result<Option<Interrupts<'t>>, Error> {
        let Some((root, output)) = self.function(segment, requester)? else { return Ok(None) };
        self.services(&root.common, output)
    }

    /// Returns where the messages of a unit itself lead; `None` if it has wires.
    pub fn interrupts_of(&self, unit: &Unit<'t>) -> Result<Option<Interrupts<'t>>, Error> {
        let Some(own) = unit.own else { return Ok(None) };
        let Some(mapping) = unit.common.mappings().nth(own as usize) else {
            // Only from revision 5 on does the node say that the index means something.
            let wrong = unit.common.wrong("it has no mapping of the number that is for its own interrupts");
            return if unit.common.revision < 5 { Ok(None) } else { Err(wrong) };
        };
        if !mapping.single {
            return if unit.common.revision < 5 {
                Ok(None)
            } else {
                Err(unit.common.wrong("the mapping for its own interrupts is for others, too"))
            };
        }
        match self.target(&unit.common, mapping.output)? {
            Node::ItsGroup(group) => Ok(Some(Interrupts { group, device: mapping.output.id })),
            _ => Err(unit.common.wrong("the mapping for its own interrupts leads to no ITS group")),
        }
    }

    /// Returns the component with this path in the ACPI namespace.
    pub fn component(&self, path: &str) -> Result<Option<NamedComponent<'t>>, Error> {
        for node in self.nodes() {
            if let Node::NamedComponent(component) = node?
                && component.path == path
            {
                return Ok(Some(component));
            }
        }
        Ok(None)
    }

    /// Returns the streams that a component always has: one for each of its single mappings to an SMMUv3.
    pub fn component_streams(
        &self,
        component: &NamedComponent<'t>,
    ) -> impl Iterator<Item = Result<Place<'t>, Error>> + use<'t> {
        let (iort, common) = (*self, component.common);
        let single = common.mappings().filter(|mapping| mapping.single);
        single.filter_map(move |mapping| iort.place(&common, mapping.output).transpose())
    }

    /// Returns the stream that a component has for one of its own IDs.
    pub fn component_stream(
        &self,
        component: &NamedComponent<'t>,
        id: u32,
    ) -> Result<Option<Place<'t>>, Error> {
        let Some(output) = component.common.output(id)? else { return Ok(None) };
        self.place(&component.common, output)
    }

    /// Returns the memory that firmware keeps for a stream of a unit; after an error there is no more, and
    /// more may be needed.
    pub fn regions(
        &self,
        unit: &Unit<'t>,
        stream: StreamId,
    ) -> impl Iterator<Item = Result<Region, Error>> + use<'t> {
        let (mut nodes, unit) = (self.nodes(), *unit);
        let mut current = None;
        let mut failed = false;
        core::iter::from_fn(move || {
            loop {
                if failed {
                    return None;
                }
                if let Some(region) = current.as_mut().and_then(Iterator::next) {
                    failed = Result::is_err(&region);
                    return Some(region);
                }
                let needed = match nodes.next()? {
                    Ok(Node::ReservedMemory(memory)) => {
                        memory.is_for(&unit, stream).map(|is| is.then_some(memory))
                    }
                    Ok(Node::Other { kind: RESERVED, offset }) => {
                        let what = "it cannot be read in a table of a revision before 5";
                        Err(Error::Node { offset, kind: RESERVED, what })
                    }
                    Ok(_) => Ok(None),
                    Err(error) => Err(error),
                };
                match needed {
                    Ok(memory) => current = memory.map(|memory| memory.regions()),
                    Err(error) => {
                        failed = true;
                        return Some(Err(error));
                    }
                }
            }
        })
    }
}
