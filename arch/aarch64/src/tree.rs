//! The device tree: what it says about the machine, checked. Devicetree Specification, version 0.4.
#![expect(unsafe_code, reason = "the boot loader hands the tree over by address")]

use crate::{
    console, gic,
    machine::Error,
    paging::{self, IMAGE_GIB},
};
use core::{ops::Range, ptr, slice};
use dtoolkit::{
    Node, Property,
    fdt::{Fdt, FdtNode},
};
use heapless::Vec;

/// The first word of a tree.
const MAGIC: u32 = 0xD00D_FEED;
/// The longest tree that is looked at, in bytes; that of QEMU has 1 MiB.
const LIMIT: u32 = 4 << 20;
/// How deep buses are searched for devices.
const DEPTH: usize = 4;
/// Regions with redistributors, at most.
const REGIONS: usize = 4;
/// Windows to devices' memory that are looked at.
const WINDOWS: usize = 4;

/// The interrupt controller.
pub(crate) struct Controller {
    /// The registers of its distributor.
    pub(crate) distributor: Range<u64>,
    /// The registers of its redistributors.
    pub(crate) redistributors: Vec<Range<u64>, REGIONS>,
    /// The number of the interrupt for the upkeep of list registers.
    pub(crate) maintenance: u32,
}

/// Configuration space, and where devices behind it find addresses.
pub(crate) struct Pci {
    /// Its registers.
    pub(crate) registers: Range<u64>,
    /// The first and the last bus that they are for.
    pub(crate) buses: (u8, u8),
    /// Addresses of devices' memory, the same on the bus as for the processor.
    pub(crate) windows: Vec<Range<u64>, WINDOWS>,
}

/// What turns messages of PCI functions into interrupts (ITS).
pub(crate) struct Its {
    /// Its registers.
    pub(crate) registers: Range<u64>,
    /// Its number in the tree.
    phandle: u32,
    tree: Tree,
}

impl Its {
    /// Returns the ID by which it knows the function with this requester ID; `None` if it takes no messages of that.
    pub(crate) fn device(&self, requester: u16) -> Option<u32> {
        let (phandle, device) = self.tree.message_receiver(requester)?;
        (phandle == self.phandle).then_some(device)
    }
}

/// The device tree.
#[derive(Clone, Copy)]
pub(crate) struct Tree {
    fdt: Fdt<'static>,
    address: u64,
}

impl Tree {
    /// Reads the tree at `address`, which stays as it is. Runs before any memory is handed out.
    pub(crate) fn read(address: u64) -> Result<Self, Error> {
        let found = |bytes: u64| {
            let range = address..address.checked_add(bytes)?;
            let image = paging::image();
            // Until the tree is read, the image's GiB is all that is mapped as memory.
            let inside = IMAGE_GIB <= range.start && range.end <= IMAGE_GIB + (1 << 30);
            let free = range.end <= image.start || image.end <= range.start;
            if !inside || !free || !address.is_multiple_of(8) {
                return None;
            }
            let start = ptr::with_exposed_provenance(address as usize);
            // SAFETY: the memory is mapped, is not null and not part of the image; no memory is handed out yet, and `Boot`
            // keeps this out of what will be.
            Some(unsafe { slice::from_raw_parts::<u8>(start, bytes as usize) })
        };
        let none = Error::NoTree { address };
        let header = found(8).ok_or(none)?;
        let [magic, bytes] = [0, 4].map(|at| u32_at(header, at).unwrap_or(0));
        if magic != MAGIC || bytes > LIMIT {
            return Err(none);
        }
        let fdt = found(bytes.into()).and_then(|bytes| Fdt::new(bytes).ok()).ok_or(none)?;
        Ok(Self { fdt, address })
    }

    /// Returns the tree as it was handed over.
    pub(crate) fn bytes(&self) -> &'static [u8] {
        self.fdt.data()
    }

    /// Returns where the tree itself is.
    pub(crate) fn memory(&self) -> Range<u64> {
        self.address..self.address + self.fdt.data().len() as u64
    }

    /// Returns the first node that `fits`, is in use, and is on no bus that translates addresses.
    fn find(&self, fits: &dyn Fn(&FdtNode<'static>) -> bool) -> Option<FdtNode<'static>> {
        fn search(
            bus: FdtNode<'static>,
            fits: &dyn Fn(&FdtNode<'static>) -> bool,
            depth: usize,
        ) -> Option<FdtNode<'static>> {
            bus.children().find_map(|child| {
                if fits(&child) && is_in_use(&child) {
                    return Some(child);
                }
                let transparent = value(&child, "ranges").is_some_and(<[u8]>::is_empty);
                if transparent && depth > 0 { search(child, fits, depth - 1) } else { None }
            })
        }
        search(self.fdt.root(), fits, DEPTH)
    }

    /// As [`find`](Self::find), by a name of the binding.
    fn compatible(&self, name: &str) -> Option<FdtNode<'static>> {
        self.find(&|node| is_compatible(node, name))
    }

    fn child(&self, name: &str) -> Option<FdtNode<'static>> {
        self.fdt.root().children().find(|child| child.name_without_address() == name)
    }

    /// Returns where the registers of the UART are: the one that `/chosen` names, or else the first.
    pub(crate) fn console(&self) -> Result<u64, Error> {
        const PL011: &str = "arm,pl011";
        const NONE: Error = Error::NoNode { what: "a UART that is compatible with arm,pl011" };
        let path = self.chosen().and_then(|chosen| string(&chosen, "stdout-path"));
        // What follows a colon is how it is to be set up.
        let path = path.and_then(|path| path.split(':').next());
        let path = match path.filter(|path| !path.starts_with('/')) {
            Some(alias) => self.child("aliases").and_then(|aliases| string(&aliases, alias)),
            None => path,
        };
        let named = path.and_then(|path| self.fdt.find_node(path));
        let node =
            named.filter(|node| is_compatible(node, PL011)).or_else(|| self.compatible(PL011)).ok_or(NONE)?;
        let registers = registers(&node).next().ok_or(NONE)?;
        reachable("the UART", registers.start..registers.start.saturating_add(console::BYTES))
            .map(|registers| registers.start)
    }

    fn chosen(&self) -> Option<FdtNode<'static>> {
        self.child("chosen")
    }

    /// Returns the command line; empty if there is none, or it is not UTF-8.
    pub(crate) fn command_line(&self) -> &'static str {
        self.chosen().and_then(|chosen| string(&chosen, "bootargs")).unwrap_or("")
    }

    /// Returns where the boot loader put what it was given besides the image.
    pub(crate) fn initrd(&self) -> Option<Range<u64>> {
        let chosen = self.chosen()?;
        Some(number(&chosen, "linux,initrd-start")?..number(&chosen, "linux,initrd-end")?)
    }

    /// Returns the RAM.
    pub(crate) fn ram(&self) -> impl Iterator<Item = Range<u64>> {
        let is_memory = |node: &FdtNode<'_>| string(node, "device_type") == Some("memory");
        self.fdt.root().children().filter(is_memory).filter(is_in_use).flat_map(|node| registers(&node))
    }

    /// Returns what is reserved of the RAM, and whether the processor must not even map it.
    pub(crate) fn reserved(&self) -> impl Iterator<Item = (Range<u64>, bool)> {
        let listed = self.fdt.memory_reservations().map(|reservation| {
            (reservation.address()..reservation.address().saturating_add(reservation.size()), false)
        });
        let nodes = self.child("reserved-memory").into_iter().flat_map(|node| node.children());
        listed.chain(nodes.flat_map(|node| {
            let unmapped = node.property("no-map").is_some();
            registers(&node).map(move |range| (range, unmapped))
        }))
    }

    /// Returns whether memory is reserved for what some device does to it.
    pub(crate) fn reserves_for_devices(&self) -> bool {
        let mut nodes = self.child("reserved-memory").into_iter().flat_map(|node| node.children());
        nodes.any(|node| node.property("iommu-addresses").is_some())
    }

    /// Returns the affinities of the cores that can be started by PSCI.
    pub(crate) fn affinities(&self) -> impl Iterator<Item = u64> {
        let is_core = |node: &FdtNode<'_>| {
            string(node, "device_type") == Some("cpu") && string(node, "enable-method") == Some("psci")
        };
        let cores = self.child("cpus").into_iter().flat_map(|cpus| cpus.children());
        cores.filter(is_core).filter_map(|node| number(&node, "reg"))
    }

    /// Checks that PSCI is called by SMC: an HVC of ours would reach ourselves.
    pub(crate) fn check_psci(&self) -> Result<(), Error> {
        let psci = self.compatible("arm,psci-1.0").or_else(|| self.compatible("arm,psci-0.2"));
        let psci = psci.ok_or(Error::NoNode { what: "PSCI, version 0.2 or later" })?;
        match string(&psci, "method") {
            Some("smc") => Ok(()),
            _ => Err(Error::Unsupported { feature: "PSCI through SMC" }),
        }
    }

    fn timer_node(&self) -> Option<FdtNode<'static>> {
        self.compatible("arm,armv8-timer")
    }

    /// Returns the frequency of the counter, where firmware did not set `CNTFRQ_EL0` and the tree says so.
    pub(crate) fn counter_hz(&self) -> Option<u32> {
        u32_at(value(&self.timer_node()?, "clock-frequency")?, 0)
    }

    /// Returns the number of the EL2 physical timer's interrupt.
    pub(crate) fn timer(&self) -> Result<u32, Error> {
        // Secure physical, physical, virtual, EL2 physical.
        let wire = self.timer_node().and_then(|node| wires(&node).nth(3));
        wire.flatten().ok_or(Error::NoNode { what: "an EL2 timer of arm,armv8-timer" })
    }

    /// Returns the interrupt controller.
    pub(crate) fn interrupt_controller(&self) -> Result<Controller, Error> {
        let node = self
            .compatible("arm,gic-v3")
            .ok_or(Error::NoNode { what: "an interrupt controller arm,gic-v3" })?;
        if node.property("redistributor-stride").is_some() {
            return Err(Error::Unsupported {
                feature: "a redistributor stride of its own in the interrupt controller",
            });
        }
        let regions = number(&node, "#redistributor-regions");
        let mut registers = registers(&node);
        let distributor = registers.next().ok_or(Error::NoNode { what: "registers of arm,gic-v3" })?;
        let distributor = distributor.start..distributor.start.saturating_add(gic::DISTRIBUTOR_BYTES);
        let mut redistributors = Vec::new();
        for region in registers.take(regions.unwrap_or(1) as usize) {
            let region = reachable("a redistributor", region)?;
            let full = |_| Error::TooMany { what: "regions of redistributors", limit: REGIONS };
            redistributors.push(region).map_err(full)?;
        }
        let maintenance = wires(&node).next().flatten();
        Ok(Controller {
            distributor: reachable("the distributor", distributor)?,
            redistributors,
            maintenance: maintenance
                .ok_or(Error::NoNode { what: "a maintenance interrupt of arm,gic-v3" })?,
        })
    }

    /// Returns what takes the messages of PCI bus 0, if that is an ITS.
    pub(crate) fn its(&self) -> Option<Its> {
        const BYTES: u64 = 0x2_0000;
        let (phandle, _) = self.message_receiver(0)?;
        let is_it = |node: &FdtNode<'_>| {
            is_compatible(node, "arm,gic-v3-its") && number(node, "phandle") == Some(phandle.into())
        };
        let registers = registers(&self.find(&is_it)?).next()?;
        let registers = registers.start..registers.start.checked_add(BYTES)?;
        Some(Its { registers: reachable("the ITS", registers).ok()?, phandle, tree: *self })
    }

    /// Returns the number of what takes the messages of a PCI function (`msi-map`), and its name for the function.
    fn message_receiver(&self, requester: u16) -> Option<(u32, u32)> {
        let node = self.pci_node()?;
        let mask = value(&node, "msi-map-mask").map_or(Some(u32::MAX), |mask| u32_at(mask, 0))?;
        let requester = u32::from(requester) & mask;
        value(&node, "msi-map")?.chunks_exact(16).find_map(|entry| {
            let [first, phandle, device, count] = [0, 4, 8, 12].map(|at| u32_at(entry, at).unwrap_or(0));
            let within = requester.checked_sub(first).filter(|&within| within < count)?;
            Some((phandle, device.checked_add(within)?))
        })
    }

    fn pci_node(&self) -> Option<FdtNode<'static>> {
        self.compatible("pci-host-ecam-generic")
    }

    /// Returns PCI segment 0.
    pub(crate) fn pci(&self) -> Result<Pci, Error> {
        /// The space of an address on the bus: bit 25 of its first cell is set for memory.
        const MEMORY: u32 = 1 << 25;
        const NONE: Error = Error::NoNode { what: "configuration space pci-host-ecam-generic" };
        let node = self.pci_node().ok_or(NONE)?;
        let registers = reachable("configuration space", registers(&node).next().ok_or(NONE)?)?;
        let bus = |at| value(&node, "bus-range").and_then(|range| u32_at(range, at));
        let last = (registers.end - registers.start) / (1 << 20);
        let buses =
            (bus(0).unwrap_or(0) as u8, bus(4).unwrap_or(0xFF).min(last.saturating_sub(1) as u32) as u8);
        // Three cells of address on the bus, two of the processor's, two of length.
        let ranges = value(&node, "ranges").unwrap_or(&[]);
        let memory = ranges.chunks_exact(28).filter_map(|entry| {
            let [bus, processor, bytes] = [u64_at(entry, 4)?, u64_at(entry, 12)?, u64_at(entry, 20)?];
            let is_memory = u32_at(entry, 0)? & MEMORY != 0 && bus == processor;
            is_memory.then_some(processor..processor.checked_add(bytes)?)
        });
        let windows = memory.take(WINDOWS).collect();
        Ok(Pci { registers, buses, windows })
    }
}

/// Returns whether a node has `name` among those of its bindings.
fn is_compatible(node: &FdtNode<'_>, name: &str) -> bool {
    node.compatible().into_iter().flatten().any(|other| other == name)
}

/// Returns whether a node's device is there (`status`).
fn is_in_use(node: &FdtNode<'_>) -> bool {
    matches!(string(node, "status"), None | Some("okay" | "ok"))
}

/// Returns the registers of a node, as it lists them; what is not well-formed is left out.
fn registers(node: &FdtNode<'static>) -> impl Iterator<Item = Range<u64>> + use<> {
    let registers = node.reg().ok().flatten();
    registers.into_iter().flatten().filter_map(|range| {
        let (start, bytes): (u64, u64) = (range.address().ok()?, range.size().ok()?);
        Some(start..start.checked_add(bytes)?)
    })
}

/// Returns the interrupts of a node, in the three cells of GICv3: their numbers (INTID), of those that each core has for
/// itself (PPI).
fn wires(node: &FdtNode<'static>) -> impl Iterator<Item = Option<u32>> + use<> {
    let cells = value(node, "interrupts").unwrap_or(&[]);
    cells.chunks_exact(12).map(|cells| {
        let [kind, number] = [0, 4].map(|at| u32_at(cells, at).unwrap_or(u32::MAX));
        (kind == 1 && number < 16).then_some(16 + number)
    })
}

/// Returns the value of a property; `None` if the node lacks it.
fn value<'a>(node: &FdtNode<'a>, name: &str) -> Option<&'a [u8]> {
    node.property(name)?.value_as().ok()
}

/// Returns the first text of a property; `None` if the node lacks it, or it is not UTF-8.
fn string<'a>(node: &FdtNode<'a>, name: &str) -> Option<&'a str> {
    core::str::from_utf8(value(node, name)?.split(|&byte| byte == 0).next()?).ok()
}

/// Returns a number of one or two cells.
fn number(node: &FdtNode<'_>, name: &str) -> Option<u64> {
    let value = value(node, name)?;
    if value.len() == 4 { u32_at(value, 0).map(u64::from) } else { u64_at(value, 0) }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_be_bytes)
}

/// Returns `range` if it is mapped.
fn reachable(what: &'static str, range: Range<u64>) -> Result<Range<u64>, Error> {
    let fits = range.start.is_multiple_of(4096) && range.end <= paging::MAPPED_END && !range.is_empty();
    if fits { Ok(range) } else { Err(Error::OutOfReach { what, address: range.start }) }
}
