//! The device tree: which units there are, which stream a device is, and whose accesses may wait.
//!
//! Bytes in, facts out. Firmware wrote them, so nothing is believed: what is wrong gives an error that names the node and
//! where it is. What two entries of a map say differently is such an error, too; a stream is never guessed.
//!
//! The bindings are `arm,smmu-v3`, `iommu-map` of PCI host bridges (`pci-iommu`), and `iommus` with `dma-can-stall` of other
//! devices; the format is that of the Devicetree Specification, version 0.4.
//!
//! ```
//! # use iommu::StreamId;
//! # use smmuv3::tree::{Error, Tree};
//! /// Where function 02:00.0 behind the first host bridge ends up, if a unit translates it.
//! fn find(bytes: &[u8]) -> Result<Option<(u64, StreamId)>, Error> {
//!     let tree = Tree::new(bytes)?;
//!     let Some(bridge) = tree.bridges().next() else { return Ok(None) };
//!     let found = bridge.endpoint(0x0200)?;
//!     Ok(found.map(|(unit, stream)| (unit.registers.start.0, stream)))
//! }
//! ```

use core::{fmt, ops::Range};
use dtoolkit::{
    Node, Property,
    fdt::{Fdt, FdtNode},
};
use heapless::{String, Vec};
use iommu::{PhysAddr, StreamId};

/// How deep nodes are looked for.
const DEPTH: usize = 16;
/// Bytes of a node's name that an error keeps.
const NAME: usize = 31;
/// Bytes of an entry of `iommu-map`: the first requester, the unit, its stream, how many.
const MAP_ENTRY: usize = 16;
/// Bytes of a unit's registers: two pages of 64 KiB.
const REGISTER_BYTES: u64 = 0x2_0000;

/// Why a device tree cannot be used.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are no device tree, or not a whole one.
    NotTree,
    /// A node is wrong.
    Node {
        /// Bytes from the start of the tree.
        offset: usize,
        /// The beginning of its name.
        name: String<NAME>,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotTree => write!(f, "this is no device tree"),
            Self::Node { offset, name, what } => {
                write!(f, "device tree: the node {name} at offset {offset:#x}: {what}")
            }
        }
    }
}

impl core::error::Error for Error {}

/// A node, and where it is.
#[derive(Clone, Copy, Debug)]
struct Place<'t> {
    tree: Tree<'t>,
    node: FdtNode<'t>,
    /// Its addresses are the processor's.
    direct: bool,
}

impl<'t> Place<'t> {
    /// Returns where the node is, in bytes from the start of the tree.
    fn offset(&self) -> usize {
        // The name follows the word that begins a node.
        let name = self.node.name().as_ptr().addr();
        name.wrapping_sub(self.tree.fdt.data().as_ptr().addr()).wrapping_sub(4)
    }

    fn error(&self, what: &'static str) -> Error {
        let name = self.node.name().chars().filter(char::is_ascii).take(NAME).collect();
        Error::Node { offset: self.offset(), name, what }
    }

    fn value(&self, name: &str) -> Option<&'t [u8]> {
        self.node.property(name)?.value_as().ok()
    }

    fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// Returns a property that is one cell.
    fn cell(&self, name: &str, what: &'static str) -> Result<Option<u32>, Error> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match cell(value, 0) {
            Some(cell) if value.len() == 4 => Ok(Some(cell)),
            _ => Err(self.error(what)),
        }
    }

    fn is(&self, binding: &str) -> bool {
        let names = self.value("compatible").unwrap_or(&[]);
        names.split(|&byte| byte == 0).any(|name| name == binding.as_bytes())
    }

    /// Whether what it describes is there.
    fn is_in_use(&self) -> bool {
        matches!(self.value("status"), None | Some(b"okay\0" | b"ok\0"))
    }
}

fn cell(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_be_bytes)
}

/// A device tree.
#[derive(Clone, Copy, Debug)]
pub struct Tree<'t> {
    fdt: Fdt<'t>,
}

/// A unit.
#[derive(Clone, Debug)]
pub struct Unit<'t> {
    place: Place<'t>,
    /// Its registers.
    pub registers: Range<PhysAddr>,
    /// Its own accesses are coherent (`dma-coherent`).
    pub coherent: bool,
    /// Its number in the tree, if anything refers to it.
    pub phandle: Option<u32>,
}

/// Where a unit's messages go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MessageParent {
    /// The number in the tree of what receives them.
    pub phandle: u32,
    /// The name by which that knows the unit, if it wants one.
    pub device: Option<u32>,
}

/// A wired interrupt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wire {
    /// Its number (INTID).
    pub number: u32,
    /// Whether it interrupts by its edge; else by its level.
    pub edge: bool,
}

/// A PCI host bridge with a map of streams.
#[derive(Clone, Copy, Debug)]
pub struct Bridge<'t> {
    place: Place<'t>,
}

/// A device that is not behind PCI.
#[derive(Clone, Copy, Debug)]
pub struct Device<'t> {
    place: Place<'t>,
    /// Its accesses may wait for an answer (`dma-can-stall`).
    pub can_stall: bool,
}

impl<'t> Tree<'t> {
    /// Reads a tree, which may be followed by other bytes.
    pub fn new(bytes: &'t [u8]) -> Result<Self, Error> {
        let length = cell(bytes, 4).and_then(|length| bytes.get(..length as usize));
        let fdt = length.and_then(|bytes| Fdt::new(bytes).ok());
        Ok(Self { fdt: fdt.ok_or(Error::NotTree)? })
    }

    /// Returns all nodes that are in use, each before those in it.
    fn nodes(self) -> impl Iterator<Item = Place<'t>> + use<'t> {
        let mut above = Vec::<_, DEPTH>::new();
        let _ = above.push((self.fdt.root().children(), true));
        core::iter::from_fn(move || {
            loop {
                let (children, direct) = above.last_mut()?;
                let Some(node) = children.next() else {
                    above.pop();
                    continue;
                };
                let place = Place { tree: self, node, direct: *direct };
                if !place.is_in_use() {
                    continue;
                }
                let direct = *direct && place.value("ranges").is_some_and(<[u8]>::is_empty);
                // What is deeper is not looked at.
                let _ = above.push((node.children(), direct));
                return Some(place);
            }
        })
    }

    /// Returns the node with this number; an error of `from` if there is none.
    fn by_number(self, phandle: u32, from: &Place<'t>) -> Result<Place<'t>, Error> {
        let has_it =
            |place: &Place<'t>| place.value("phandle").and_then(|value| cell(value, 0)) == Some(phandle);
        self.nodes().find(has_it).ok_or_else(|| from.error("it refers to a node that is not there"))
    }

    /// Returns all units.
    pub fn units(&self) -> impl Iterator<Item = Result<Unit<'t>, Error>> + use<'t> {
        self.nodes().filter(|place| place.is(BINDING)).map(Unit::read)
    }

    /// Returns all PCI host bridges with a map of streams.
    pub fn bridges(&self) -> impl Iterator<Item = Bridge<'t>> + use<'t> {
        self.nodes().filter(|place| place.has("iommu-map")).map(|place| Bridge { place })
    }

    /// Returns all other devices with streams.
    pub fn devices(&self) -> impl Iterator<Item = Device<'t>> + use<'t> {
        self.nodes()
            .filter(|place| place.has("iommus"))
            .map(|place| Device { place, can_stall: place.has("dma-can-stall") })
    }

    /// Returns the streams of `unit` whose accesses may wait for an answer, as
    /// [`Memory::stalling`](crate::Memory::stalling) wants them.
    pub fn stalling(&self, unit: &Unit<'t>) -> Result<Vec<StreamId, { crate::STALLING }>, Error> {
        let mut streams = Vec::new();
        for device in self.devices().filter(|device| device.can_stall) {
            device.each_stream(unit, |stream| {
                let full = |_| device.place.error("there are more streams that may wait than places");
                if streams.contains(&stream) { Ok(()) } else { streams.push(stream).map_err(full) }
            })?;
        }
        Ok(streams)
    }
}

/// The binding of units.
const BINDING: &str = "arm,smmu-v3";

impl<'t> Unit<'t> {
    fn read(place: Place<'t>) -> Result<Self, Error> {
        if !place.direct {
            return Err(place.error("its registers are behind a bus that gives them other addresses"));
        }
        if place.cell("#iommu-cells", "#iommu-cells is not one number")? != Some(1) {
            return Err(place.error("#iommu-cells is not 1"));
        }
        let mut registers = place.node.reg().ok().flatten().into_iter().flatten();
        let first = registers.next().and_then(|range| {
            let (start, bytes): (u64, u64) = (range.address().ok()?, range.size().ok()?);
            Some(PhysAddr(start)..PhysAddr(start.checked_add(bytes)?))
        });
        let registers = first.ok_or_else(|| place.error("reg does not say where its registers are"))?;
        if !registers.start.0.is_multiple_of(0x1_0000) || registers.end.0 - registers.start.0 < REGISTER_BYTES
        {
            return Err(place.error("its registers are not whole pages of 64 KiB"));
        }
        let phandle = place.cell("phandle", "its phandle is not one number")?;
        Ok(Self { place, registers, coherent: place.has("dma-coherent"), phandle })
    }

    /// Returns where its messages go, if it can send any.
    pub fn message_parent(&self) -> Result<Option<MessageParent>, Error> {
        let Some(value) = self.place.value("msi-parent") else { return Ok(None) };
        let (phandle, device) = (cell(value, 0), cell(value, 4));
        match phandle {
            Some(phandle) if value.len() <= 8 && value.len().is_multiple_of(4) => {
                Ok(Some(MessageParent { phandle, device }))
            }
            _ => Err(self.place.error("msi-parent does not name one receiver")),
        }
    }

    /// Returns the wire with this name: `eventq`, `priq`, `cmdq-sync` or `gerror`. If one serves for all, it is `combined`.
    pub fn wire(&self, name: &str) -> Result<Option<Wire>, Error> {
        let place = &self.place;
        let Some(names) = place.value("interrupt-names") else { return Ok(None) };
        let Some(names) = names.strip_suffix(&[0]) else {
            return Err(place.error("interrupt-names is no list of names"));
        };
        let Some(at) = names.split(|&byte| byte == 0).position(|other| other == name.as_bytes()) else {
            return Ok(None);
        };
        let wires = place.value("interrupts").unwrap_or(&[]);
        // Three cells of a GIC: which kind, which number, how.
        let wire = wires.chunks_exact(12).nth(at).filter(|_| wires.len().is_multiple_of(12));
        let cells = wire.map(|wire| [0, 4, 8].map(|at| cell(wire, at).unwrap_or(u32::MAX)));
        let (first, number, flags) = match cells {
            Some([0, number @ 0..988, flags]) => (32, number, flags),
            Some([1, number @ 0..16, flags]) => (16, number, flags),
            _ => return Err(place.error("interrupts do not match interrupt-names, or are no wires of a GIC")),
        };
        Ok(Some(Wire { number: first + number, edge: flags & 0b11 != 0 }))
    }
}

impl<'t> Bridge<'t> {
    /// Returns the number of its PCI segment, if the tree gives it one.
    pub fn segment(&self) -> Result<Option<u32>, Error> {
        self.place.cell("linux,pci-domain", "linux,pci-domain is not one number")
    }

    /// Returns the unit behind which a function is, and its stream there; `None` where nothing translates it, or something
    /// else does.
    pub fn endpoint(&self, requester: u16) -> Result<Option<(Unit<'t>, StreamId)>, Error> {
        let place = &self.place;
        let map = place.value("iommu-map").unwrap_or(&[]);
        if !map.len().is_multiple_of(MAP_ENTRY) {
            return Err(place.error("iommu-map is not made of whole entries"));
        }
        let mask = place.cell("iommu-map-mask", "iommu-map-mask is not one number")?.unwrap_or(u32::MAX);
        let requester = u32::from(requester) & mask;
        let mut found = None;
        for entry in map.chunks_exact(MAP_ENTRY) {
            let [first, unit, stream, count] = [0, 4, 8, 12].map(|at| cell(entry, at).unwrap_or(0));
            if first & !mask != 0 {
                return Err(place.error("iommu-map begins at a requester that iommu-map-mask leaves out"));
            }
            let Some(within) = requester.checked_sub(first).filter(|&within| within < count) else {
                continue;
            };
            let Some(stream) = stream.checked_add(within) else {
                return Err(place.error("iommu-map leads past the last stream"));
            };
            if found.replace((unit, stream)).is_some_and(|other| other != (unit, stream)) {
                return Err(place.error("iommu-map gives one requester two streams"));
            }
        }
        let Some((unit, stream)) = found else { return Ok(None) };
        let unit = place.tree.by_number(unit, place)?;
        if unit.is(BINDING) { Ok(Some((Unit::read(unit)?, StreamId(stream)))) } else { Ok(None) }
    }
}

impl<'t> Device<'t> {
    /// Returns its streams of `unit`; an error, too, where there are more than can be assigned.
    pub fn streams(&self, unit: &Unit<'t>) -> Result<Vec<StreamId, { crate::STALLING }>, Error> {
        let mut streams = Vec::new();
        let full = |_| self.place.error("it has more streams than can be assigned");
        self.each_stream(unit, |stream| streams.push(stream).map_err(full))?;
        Ok(streams)
    }

    /// Returns its name.
    pub fn name(&self) -> &'t str {
        self.place.node.name()
    }

    /// Calls `take` with each of its streams of `unit`.
    fn each_stream(
        &self,
        unit: &Unit<'t>,
        mut take: impl FnMut(StreamId) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let place = &self.place;
        let whole = || place.error("iommus is not made of whole entries");
        let mut rest = place.value("iommus").unwrap_or(&[]);
        while !rest.is_empty() {
            let phandle = cell(rest, 0).ok_or_else(whole)?;
            let other = place.tree.by_number(phandle, place)?;
            // How long an entry is, its unit says.
            let cells = other.cell("#iommu-cells", "#iommu-cells is not one number")?;
            let bytes = cells.and_then(|cells| (cells as usize).checked_mul(4)?.checked_add(4));
            let (entry, others) = bytes.and_then(|bytes| rest.split_at_checked(bytes)).ok_or_else(whole)?;
            rest = others;
            if Some(phandle) == unit.phandle {
                take(StreamId(cell(entry, 4).ok_or_else(whole)?))?;
            }
        }
        Ok(())
    }
}
