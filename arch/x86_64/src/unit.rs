//! The machine's IOMMU, and the table formats that it and the cores walk.
#![expect(unsafe_code, reason = "names the registers that firmware's table points at")]

use crate::{
    apic,
    bus::Mmio,
    interrupts::{self, Source},
    machine::Boot,
};
use core::{fmt, ops::Range};
use heapless::Vec;
use iommu::{Capabilities, DmaBuf, FaultRecord, Invalidations, Message, PhysAddr, StreamId};
use pcie::DeviceTlb;
use vtd::{
    dmar::{self, Dmar},
    remap,
};

/// The event side of the unit.
pub type Events = vtd::Events<Mmio>;
/// The command side of the unit.
pub type Commands = vtd::Commands<Mmio>;
/// The table side of the unit.
pub type Tables = vtd::Tables<Mmio>;

/// The format of first-stage tables, which translate what devices issue.
pub type FirstStage = pgtable::VtdFirstStage;
/// The format of second-stage tables, which do so where the unit has no first stage.
pub type SecondStage = pgtable::VtdSecondStage;
/// The format of tables that translate what guests issue.
pub type GuestTables = pgtable::SvmNested;

/// Whether the unit refuses translation requests for less than a page, so that a device must send none such.
pub const WHOLE_PAGES_ALONE: bool = true;

/// How long something may be at the head of the unit's queue before unit or driver has an end for it, in microseconds.
pub const HEAD_LIMIT_US: u64 = vtd::HEAD_LIMIT_US;

/// Tells the unit what invalidations of a device TLB need: the physical function of `stream`, and how many may be
/// outstanding there.
pub fn describe_device_tlb(
    commands: &mut Commands,
    stream: StreamId,
    device_tlb: &DeviceTlb,
) -> Result<(), iommu::Error> {
    commands.describe(stream, device_tlb.physical, device_tlb.invalidate_queue_depth)
}

/// Lets the unit interrupt `core`. What it reported before may or may not interrupt: look once afterwards.
pub fn enable_interrupts(events: &mut Events, core: usize) -> Result<(), iommu::Error> {
    let message = |source| interrupts::message(source, core);
    events.enable_interrupts(message(Source::IommuFault), message(Source::PageRequest));
    Ok(())
}

/// Why there is no IOMMU in service.
#[derive(Clone, Copy, Debug, defmt::Format)]
pub enum Error {
    /// ACPI has no `DMAR` table: firmware offers no IOMMU.
    NoTable,
    /// The `DMAR` table is wrong.
    Table(dmar::Error),
    /// The table lists several units, or one for another segment than 0: devices behind them would go unwatched.
    NotOneUnit,
    /// The registers lie where this build maps nothing.
    OutOfReach,
    /// The unit cannot be used.
    Unit(iommu::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTable => write!(f, "there is no DMAR table: switch VT-d on in the firmware's set-up"),
            Self::Table(error) => write!(f, "{error}"),
            Self::NotOneUnit => write!(f, "the DMAR table does not list exactly one unit, for segment 0"),
            Self::OutOfReach => write!(f, "the unit's registers are above 4 GiB"),
            Self::Unit(error) => write!(f, "{error}"),
        }
    }
}

/// The unit, identified and left as it was.
pub struct Found {
    unit: vtd::Found<Mmio>,
    bus: Mmio,
    registers: Range<PhysAddr>,
    /// Firmware does not object to x2APIC destinations.
    x2apic: bool,
}

/// The unit in service.
pub struct Unit {
    /// What it reports.
    pub events: Events,
    /// What it is told.
    pub commands: Commands,
    /// Which device is translated how.
    pub tables: Tables,
    /// Which device may interrupt whom, if the unit remaps interrupts.
    pub remapping: Option<Remapping>,
}

impl Unit {
    /// Takes what turns messages of devices into interrupts into service. Here that is the unit itself, which does so already.
    pub fn serve_messages(&mut self, _: &Boot, _: impl FnMut(usize) -> Option<DmaBuf>) {}
}

/// Which device may interrupt which core, for what.
pub struct Remapping(vtd::Remapping<Mmio>);

/// One interrupt that a device may send.
pub type InterruptHandle = remap::Handle;
/// One that it may send no more, but that the unit may still remember.
pub type LeavingInterrupt = remap::Leaving;

impl Remapping {
    /// Takes an interrupt for `stream`, which is refused until it is opened.
    pub fn allocate(&mut self, stream: StreamId) -> Result<InterruptHandle, iommu::Error> {
        self.0.allocate(remap::Source::Function(stream), 0)
    }

    /// Returns the number of the interrupt; what the unit refuses is told by it.
    pub fn number(&self, handle: &InterruptHandle) -> u16 {
        handle.first()
    }

    /// Lets the interrupt reach `core` for `source`, once the invalidations have completed.
    ///
    /// PANICS: when there is no such core.
    pub fn open(
        &mut self,
        handle: &InterruptHandle,
        source: Source,
        core: usize,
    ) -> Result<Invalidations, iommu::Error> {
        let (core, vector) = interrupts::target(source, core);
        self.0.set(handle, 0, remap::Interrupt::fixed(remap::Destination::Physical(core), vector))
    }

    /// Returns the message by which the device sends it.
    pub fn message(&self, handle: &InterruptHandle) -> Result<Message, iommu::Error> {
        self.0.message(handle, 0)
    }

    /// Returns a message that names core and vector itself, as devices did before there was remapping. The unit is to refuse
    /// it, whoever sends it.
    ///
    /// PANICS: when there is no such core.
    pub fn compatibility_message(&self, source: Source, core: usize) -> Option<Message> {
        Some(interrupts::message(source, core))
    }

    /// Returns the page to which devices write their messages, where their tables have to map it: none. The unit knows a message
    /// by its address, and translates none.
    pub fn doorbell(&self) -> Option<Range<PhysAddr>> {
        None
    }

    /// Refuses the interrupt again, once the invalidations have completed.
    pub fn release(&mut self, handle: InterruptHandle) -> (LeavingInterrupt, Invalidations) {
        self.0.release(handle)
    }

    /// Takes note that the invalidations of one that left have completed.
    pub fn finish(&mut self, leaving: LeavingInterrupt) {
        self.0.finish(leaving);
    }
}

/// Returns why a fault refused an interrupt, and the number that it had; `None` if it refused none.
pub fn refused_interrupt(fault: &FaultRecord) -> Option<(&'static str, u16)> {
    remap::Refusal::of(fault).map(|(refusal, number)| (refusal.words(), number))
}

/// What the unit reports of a message whose entry is not present, or is another's.
pub const REFUSALS: Option<(u16, u16)> = Some((0x22, 0x26));

/// Frames for the unit's own tables.
const TABLE_FRAMES: usize = 24;
/// Frames of the invalidation queue: 256 entries.
const COMMAND_FRAMES: usize = 2;
/// Frames of the interrupt remapping table: 256 entries.
const INTERRUPT_FRAMES: usize = 1;
/// Frames of the page request queue, and its entries.
const REQUEST_FRAMES: usize = 2;
const REQUEST_ENTRIES: usize = REQUEST_FRAMES * 128;

/// Page requests that all devices together may have outstanding, stop markers included.
///
/// The queue holds twice as many: while those are dealt with that came together, each may be answered and asked for anew,
/// and their places are given back after the last.
pub const OUTSTANDING: usize = 127;
const _: () = assert!(2 * OUTSTANDING < REQUEST_ENTRIES, "one place of a full queue stays empty");

/// Finds the unit that firmware describes.
pub fn find(boot: &Boot) -> Result<Found, Error> {
    let table = boot.acpi_table(b"DMAR").ok_or(Error::NoTable)?;
    let table = Dmar::new(table).map_err(Error::Table)?;
    let x2apic = !table.refuses_x2apic();
    let mut units = table.units();
    let unit = units.next().ok_or(Error::NotOneUnit)?;
    if units.next().is_some() || unit.segment != 0 {
        return Err(Error::NotOneUnit);
    }
    let window = registers(unit.base, unit.bytes)?;
    let used = vtd::Found::probe(mmio(&window)).map_err(Error::Unit)?.register_bytes() as u64;
    let registers = registers(unit.base, unit.bytes.max(used))?;
    let bus = mmio(&registers);
    let unit = vtd::Found::probe(bus).map_err(Error::Unit)?;
    Ok(Found { unit, bus, registers, x2apic })
}

/// Checks that `bytes` bytes of registers at `base` can be reached.
fn registers(base: PhysAddr, bytes: u64) -> Result<Range<PhysAddr>, Error> {
    let reachable = base.spanning(bytes).filter(|r| r.end.0 <= 1 << 32 && r.start.0.is_multiple_of(4096));
    reachable.ok_or(Error::OutOfReach)
}

fn mmio(registers: &Range<PhysAddr>) -> Mmio {
    // SAFETY: firmware says that a unit's registers are here, and its driver is the only one to use them.
    unsafe { Mmio::new(registers.start, (registers.end.0 - registers.start.0) as usize) }
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
                iommu::Error::Memory { purpose: "the unit", words: 0, needed: frames * vtd::FRAME_WORDS };
            cut(frames).ok_or(Error::Unit(none))
        };
        let mut frames = Vec::new();
        for _ in 0..TABLE_FRAMES {
            // There is room: the unit takes more than these.
            let _ = frames.push(cut(1)?);
        }
        let memory = vtd::Memory {
            root: cut(1)?,
            invalidation_queue: cut(COMMAND_FRAMES)?,
            status: cut(1)?,
            page_requests: cut(REQUEST_FRAMES)?,
            frames,
            interrupts: cut(INTERRUPT_FRAMES)?,
            x2apic: self.x2apic && apic::is_x2apic(),
            answers: OUTSTANDING,
        };
        let vtd::Vtd { events, commands, tables, remapping } =
            self.unit.enable(memory).map_err(Error::Unit)?;
        Ok(Unit { events, commands, tables, remapping: remapping.map(Remapping) })
    }
}
