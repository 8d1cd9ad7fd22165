//! The machine's IOMMU, and the table formats that it and the cores walk.
#![expect(unsafe_code, reason = "names the registers that the device tree points at")]

use crate::{
    bus::Mmio,
    gic,
    interrupts::{self, Source},
    its::{self, Its},
    machine::Boot,
    paging::MAPPED_END,
};
use core::{fmt, ops::Range};
use heapless::Vec;
use iommu::{Capabilities, DmaBuf, FaultRecord, Invalidations, Message, PhysAddr, StreamId};
use pcie::DeviceTlb;
use smmuv3::tree::{self, Wire};

/// The event side of the unit.
pub type Events = smmuv3::Events<Mmio>;
/// The command side of the unit.
pub type Commands = smmuv3::Commands<Mmio>;
/// The table side of the unit.
pub type Tables = smmuv3::Tables<Mmio>;

/// The format of stage 1 tables, which translate what devices issue: 4 levels of 4 KiB, 48 bits.
pub type FirstStage = pgtable::Stage1<12, 48>;
/// The format of stage 2 tables, which do so where the unit has no stage 1: 4 levels of 4 KiB, 44 bits.
pub type SecondStage = pgtable::Stage2<12, 44>;
/// The format of tables that translate what guests issue: 4 levels of 4 KiB, 44 bits.
pub type GuestTables = pgtable::Stage2<12, 44>;

/// Whether the unit refuses translation requests for less than a page, so that a device must send none such.
pub const WHOLE_PAGES_ALONE: bool = false;

/// How long something may be at the head of the unit's queue before the unit has an end for it, in microseconds.
///
/// The unit itself reports a device that does not answer (`CERROR_ATC_INV_SYNC`), within a time that is the implementer's: PCI
/// Express, "Address Translation Services", gives a device one minute and a half at most. Where the unit does not go on then,
/// the driver gives it up.
pub const HEAD_LIMIT_US: u64 = 90_000_000 + smmuv3::RETRY_LIMIT_US;

/// Tells the unit what invalidations of a device TLB need: an SMMU asks for nothing but the stream.
pub fn describe_device_tlb(_: &mut Commands, _: StreamId, _: &DeviceTlb) -> Result<(), iommu::Error> {
    Ok(())
}

/// Why there is no IOMMU in service.
#[derive(Clone, Copy, Debug, defmt::Format)]
pub enum Error {
    /// The device tree has no `arm,smmu-v3` behind which PCI bus 0 is, with requester IDs for its stream IDs.
    NoNode,
    /// The device tree's node at `offset`, which is about the unit, is wrong.
    Tree {
        /// Bytes from the start of the tree.
        offset: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The unit has no wire of this name, or the interrupt controller has none of its number.
    NoWire {
        /// The name, as the device tree's binding has it.
        name: &'static str,
    },
    /// The registers lie where this build maps nothing.
    OutOfReach,
    /// The unit cannot be used.
    Unit(iommu::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoNode => write!(
                f,
                "the device tree names no arm,smmu-v3 for PCI bus 0: QEMU has one with iommu=smmuv3"
            ),
            Self::Tree { offset, what } => write!(f, "the device tree's node at offset {offset:#x}: {what}"),
            Self::NoWire { name } => write!(f, "the device tree names no interrupt {name} of arm,smmu-v3"),
            Self::OutOfReach => write!(f, "the unit's registers are not below 512 GiB"),
            Self::Unit(error) => write!(f, "{error}"),
        }
    }
}

impl core::error::Error for Error {}

impl From<tree::Error> for Error {
    fn from(error: tree::Error) -> Self {
        match error {
            tree::Error::Node { offset, what, .. } => Self::Tree { offset, what },
            _ => Self::NoNode,
        }
    }
}

/// The unit, identified and left as it was.
pub struct Found {
    unit: smmuv3::Found<Mmio>,
    bus: Mmio,
    registers: Range<PhysAddr>,
}

/// The unit in service.
pub struct Unit {
    /// What it reports.
    pub events: Events,
    /// What it is told.
    pub commands: Commands,
    /// Which device is translated how.
    pub tables: Tables,
    /// Which device may interrupt whom; there is none before [`serve_messages`](Self::serve_messages).
    pub remapping: Option<Remapping>,
}

/// Which device may interrupt which core, for what.
///
/// Here that is not the unit's part. A message is a write, which the unit translates as any other: a device reaches the
/// [`doorbell`](Self::doorbell) if its tables have it. What arrives there the interrupt controller tells apart.
pub struct Remapping(Its);

/// One interrupt that a device may send.
pub type InterruptHandle = its::Handle;
/// One that it may send no more.
pub type LeavingInterrupt = its::Leaving;

impl Remapping {
    /// Takes an interrupt for `stream`, which is dropped until it is opened.
    pub fn allocate(&mut self, stream: StreamId) -> Result<InterruptHandle, iommu::Error> {
        self.0.allocate(stream)
    }

    /// Returns the number of the interrupt.
    pub fn number(&self, handle: &InterruptHandle) -> u16 {
        self.0.number(handle)
    }

    /// Lets the interrupt reach `core` for `source`. It may at once: there is nothing to invalidate.
    ///
    /// PANICS: when there is no such core.
    pub fn open(
        &mut self,
        handle: &InterruptHandle,
        source: Source,
        core: usize,
    ) -> Result<Invalidations, iommu::Error> {
        self.0.open(handle, source, core).map(|()| Invalidations::new())
    }

    /// Returns the message by which the device sends it. Its address is the device's own: the doorbell is to be mapped there.
    pub fn message(&self, handle: &InterruptHandle) -> Result<Message, iommu::Error> {
        Ok(self.0.message(handle))
    }

    /// Returns a message that names core and vector itself: there are none here.
    pub fn compatibility_message(&self, _: Source, _: usize) -> Option<Message> {
        None
    }

    /// Returns the page to which devices write their messages, and which the tables of each have to map for that.
    pub fn doorbell(&self) -> Option<Range<PhysAddr>> {
        Some(self.0.doorbell())
    }

    /// Drops the interrupt again. There is nothing to invalidate.
    pub fn release(&mut self, handle: InterruptHandle) -> (LeavingInterrupt, Invalidations) {
        (self.0.release(handle), Invalidations::new())
    }

    /// Takes note that one that left is nobody's.
    pub fn finish(&mut self, leaving: LeavingInterrupt) {
        self.0.finish(leaving);
    }
}

/// Returns why a fault refused an interrupt, and the number that it had: none does here. What the interrupt controller does
/// not know it drops in silence.
pub fn refused_interrupt(_: &FaultRecord) -> Option<(&'static str, u16)> {
    None
}

/// What the unit reports of a message whose entry is not present, or is another's: nothing.
pub const REFUSALS: Option<(u16, u16)> = None;

/// The last stream that has a place: every function of a PCI segment; of a unit that knows fewer, every function of bus 0.
const LAST_STREAMS: [StreamId; 2] = [StreamId(0xFFFF), StreamId(0xFF)];
/// Tables of the second level of the stream table, where it has two: devices are on bus 0.
const SECOND_LEVEL_TABLES: usize = 1;
/// Devices with PASIDs, or with a guest's first stage, that each have all the context descriptors that they may: those of two
/// guests, and the one of the hypervisor's pager.
const CONTEXT_DEVICES: usize = 5;
/// Frames for context descriptors: tables, and what leads to them.
const CONTEXT_FRAMES: usize = CONTEXT_DEVICES * (smmuv3::DEVICE_TABLES + 1);
/// Frames of the command queue: 256 entries.
const COMMAND_FRAMES: usize = 1;
/// Frames of the event queue: 128 entries.
const EVENT_FRAMES: usize = 1;
/// Frames of the page request queue, and its entries.
const REQUEST_FRAMES: usize = 1;
const REQUEST_ENTRIES: usize = REQUEST_FRAMES * 256;

/// Page requests that all devices together may have outstanding, stop markers included.
///
/// The queue holds twice as many: while those are dealt with that came together, each may be answered and asked for anew,
/// and their places are given back after the last.
pub const OUTSTANDING: usize = 127;
const _: () = assert!(2 * OUTSTANDING <= REQUEST_ENTRIES, "the queue has a place for each");

/// The wires that are used, for what, and whether a unit must have them.
const WIRES: [(&str, Source, bool); 3] = [
    ("eventq", Source::IommuFault, true),
    ("gerror", Source::IommuError, true),
    ("priq", Source::PageRequest, false),
];

/// Finds the unit that the device tree describes, and its wires.
pub fn find(boot: &Boot) -> Result<Found, Error> {
    let tree = tree::Tree::new(boot.tree().bytes())?;
    let bridge = tree.bridges().next().ok_or(Error::NoNode)?;
    // All of bus 0, with requester IDs for stream IDs.
    let [first, last] = [0, 0xFF].map(|requester| bridge.endpoint(requester));
    let ((described, first), (other, last)) = first?.zip(last?).ok_or(Error::NoNode)?;
    if described.phandle != other.phandle || (first, last) != (StreamId(0), StreamId(0xFF)) {
        return Err(Error::NoNode);
    }
    let registers = described.registers.clone();
    if registers.end.0 > MAPPED_END {
        return Err(Error::OutOfReach);
    }
    let mut wires = Vec::<(Source, Wire), { interrupts::WIRES }>::new();
    for (name, source, needed) in WIRES {
        match described.wire(name)?.filter(|wire| gic::is_shared(wire.number)) {
            // There is room: no more than these are looked for.
            Some(wire) => drop(wires.push((source, wire))),
            None if needed => return Err(Error::NoWire { name }),
            None => {}
        }
    }
    interrupts::connect(&wires);
    // SAFETY: the tree says that a unit's registers are here, and its driver is the only one to use them.
    let bus = unsafe { Mmio::new(registers.start, (registers.end.0 - registers.start.0) as usize) };
    let unit = smmuv3::Found::probe(bus).map_err(Error::Unit)?;
    defmt::info!("SMMUv3: {}", unit.part());
    Ok(Found { unit, bus, registers })
}

/// Lets the unit interrupt `core`, for faults, page requests and errors. Its handlers are set.
///
/// What was reported before does not interrupt any more: the caller drains the unit once afterwards.
///
/// PANICS: when there is no such core.
pub fn enable_interrupts(events: &mut Events, core: usize) -> Result<(), iommu::Error> {
    for source in WIRES.map(|(_, source, _)| source) {
        interrupts::route(source, core);
    }
    events.enable_interrupts()
}

impl Found {
    /// Returns what the unit can do.
    pub fn capabilities(&self) -> Capabilities {
        self.unit.capabilities()
    }

    /// Returns where the unit's registers are.
    pub fn registers(&self) -> Range<PhysAddr> {
        self.registers.clone()
    }

    /// Returns how the unit is reached; memory is published through it.
    pub fn bus(&self) -> Mmio {
        self.bus
    }

    /// Takes the unit into service with memory that `cut` gives by the frame, zeroed and aligned to its size.
    pub fn enable(self, mut cut: impl FnMut(usize) -> Option<DmaBuf>) -> Result<Unit, Error> {
        let mut cut = |frames: usize| {
            let none =
                iommu::Error::Memory { purpose: "the unit", words: 0, needed: frames * smmuv3::FRAME_WORDS };
            cut(frames).ok_or(Error::Unit(none))
        };
        let [segment, bus] = LAST_STREAMS.map(|last| self.unit.stream_table(last));
        let streams = segment.or(bus).map_err(Error::Unit)?;
        let frames = |words: usize| words.div_ceil(smmuv3::FRAME_WORDS);
        let mut second_level = Vec::new();
        if streams.second_level_words > 0 {
            for _ in 0..SECOND_LEVEL_TABLES {
                // There is room: the constant is small.
                let _ = second_level.push(cut(frames(streams.second_level_words))?);
            }
        }
        let mut context_tables = Vec::new();
        for _ in 0..CONTEXT_FRAMES {
            // There is room: the constant is small.
            let _ = context_tables.push(cut(1)?);
        }
        let memory = smmuv3::Memory {
            stream_table: cut(frames(streams.words))?,
            second_level,
            contexts: cut(1)?,
            context_tables,
            empty_table: cut(1)?,
            command_queue: cut(COMMAND_FRAMES)?,
            status: cut(1)?,
            event_queue: cut(EVENT_FRAMES)?,
            page_requests: cut(REQUEST_FRAMES)?,
            answers: OUTSTANDING,
            // The devices of this machine are all behind PCI Express.
            stalling: Vec::new(),
            forced_write_back: false,
        };
        let smmuv3::Smmu { events, commands, tables } = self.unit.enable(memory).map_err(Error::Unit)?;
        Ok(Unit { events, commands, tables, remapping: None })
    }
}

impl Unit {
    /// Takes what turns messages of devices into interrupts into service, with memory that `cut` gives as for the unit; if
    /// there is nothing, or it cannot be used, no device interrupts.
    ///
    /// Here that is the ITS. Devices are blocked before, and afterwards as well.
    pub fn serve_messages(&mut self, boot: &Boot, mut cut: impl FnMut(usize) -> Option<DmaBuf>) {
        let Some(its) = boot.tree().its() else { return };
        let (start, bytes) = (its.registers.start, its.registers.end - its.registers.start);
        // SAFETY: the tree says that an ITS's registers are here, and its driver is the only one to use them.
        let bus = unsafe { Mmio::new(PhysAddr(start), bytes as usize) };
        let memory = |frames: usize| {
            let none =
                iommu::Error::Memory { purpose: "the ITS", words: 0, needed: frames * smmuv3::FRAME_WORDS };
            cut(frames).ok_or(none)
        };
        match Its::enable(bus, its, memory) {
            Ok(its) => self.remapping = Some(Remapping(its)),
            Err(error) => defmt::warn!("no device can interrupt: {}", error),
        }
    }
}
