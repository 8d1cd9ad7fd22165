//! Messages of devices as interrupts: the interrupt translation service (ITS) of GICv3, and the LPIs that it raises. Arm
//! IHI 0069.
//!
//! A device interrupts by a write to `GITS_TRANSLATER`, whose value is the event. The ITS knows the device by an ID that
//! comes with the write and that no device chooses, and looks the event up in a table of that device's own. What it does not
//! find there it drops, and tells nobody.
//!
//! Everything here is published past the caches, and the ITS is told to go past them as well: that is right whether or not
//! it looks into them.

use crate::{
    bus::Mmio,
    cpu::cores_present,
    gic,
    interrupts::{self, Source},
    machine, tree,
};
use core::ops::Range;
use heapless::Vec;
use iommu::{Bus, DmaBuf, Error, Message, PAGE_SIZE, PhysAddr, StreamId, bus::wait_until};
use smmuv3::doorbell::Doorbell;

/// `GITS_CTLR`: control and status.
const CONTROL: usize = 0x0000;
/// `GITS_TYPER`: what the ITS can do.
const TYPE: usize = 0x0008;
/// `GITS_CBASER`: where the command queue is.
const QUEUE: usize = 0x0080;
/// `GITS_CWRITER`: the end of what was written to it, in bytes.
const WRITTEN: usize = 0x0088;
/// `GITS_CREADR`: the end of what was executed of it, in bytes.
const EXECUTED: usize = 0x0090;
/// `GITS_BASER<n>`: where the ITS has memory of its own.
const TABLES: usize = 0x0100;
const TABLE_COUNT: usize = 8;

/// `Enabled` and `Quiescent` of `GITS_CTLR`.
const ENABLED: u32 = 1 << 0;
const QUIESCENT: u32 = 1 << 31;
/// `Physical` and `PTA` of `GITS_TYPER`.
const RAISES_LPIS: u64 = 1 << 0;
const TARGETS_ARE_ADDRESSES: u64 = 1 << 19;
/// `Valid`, and of the memory attributes normal memory that is not cached, of `GITS_CBASER` and `GITS_BASER<n>`.
const VALID: u64 = 1 << 63;
const NOT_CACHED: u64 = 0b001 << 59;
/// `Type` of `GITS_BASER<n>`: devices, collections.
const OF_DEVICES: u64 = 1;
const OF_COLLECTIONS: u64 = 4;
/// Bytes of a page by `Page_Size` of `GITS_BASER<n>`, log2.
const PAGES: [u32; 3] = [12, 14, 16];

/// Frames of each table: 64 KiB, of which every size of pages makes whole ones, and to which the queue is aligned.
const FRAMES: usize = 16;
const BYTES: u64 = FRAMES as u64 * 4096;
/// Frames for the configuration of all LPIs, a byte each.
const CONFIGURATION_FRAMES: usize = gic::LPIS / 4096;
/// Messages of all devices together. Each event has a number of its own, so that no two devices have the same.
pub(crate) const EVENTS: usize = 32;
/// Devices that have messages.
const DEVICES: usize = 8;
/// Bytes of a device's table of events: entries have 16 at most (`ITT_entry_size`).
const EVENTS_BYTES: u64 = EVENTS as u64 * 16;
/// A configured LPI: priority 0xA0, a bit that is always one, enabled.
const OPEN: u64 = 0xA3;
const CLOSED: u64 = 0xA2;

/// How long the ITS may take, in microseconds.
///
/// The manual sets no bound. 100 ms is short enough for a log to say what failed.
const ACK_LIMIT_US: u64 = 100_000;

/// What is known of an event.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Event {
    Free,
    /// A device's, and dropped.
    Closed,
    /// A device's, and an LPI.
    Open,
}

/// An event of a device's own.
pub struct Handle {
    event: usize,
    device: u32,
}

/// An event that went; `None` if the ITS did not confirm it.
pub struct Leaving(Option<usize>);

/// The ITS in service. It goes on to use the memory that it was given for as long as the machine runs.
pub(crate) struct Its {
    bus: Mmio,
    place: tree::Its,
    queue: DmaBuf,
    /// Where the next command goes, in bytes.
    next: u64,
    configuration: DmaBuf,
    /// The tables of events, one device's after the other.
    events_of: DmaBuf,
    /// The devices that have one, in their order.
    devices: Vec<u32, DEVICES>,
    /// IDs that devices can have.
    device_limit: u64,
    targets_are_addresses: bool,
    events: [Event; EVENTS],
    /// Bit n set: the ITS knows the collection of core n.
    collections: u64,
}

impl Its {
    /// Takes the ITS at `place` into service, and lets the redistributors take what it raises; `cut` gives zeroed memory by
    /// the frame, aligned to its size. All that it did before ends.
    pub(crate) fn enable(
        bus: Mmio,
        place: tree::Its,
        mut cut: impl FnMut(usize) -> Result<DmaBuf, Error>,
    ) -> Result<Self, Error> {
        let kind = bus.read64(TYPE);
        if kind & RAISES_LPIS == 0 || !gic::has_lpis() {
            return Err(Error::Unsupported { feature: "LPIs (GICD_TYPER.LPIS, GITS_TYPER.Physical)" });
        }
        if EVENTS_BYTES / EVENTS as u64 <= kind >> 4 & 0xF {
            return Err(Error::Unsupported { feature: "entries of 16 bytes (GITS_TYPER.ITT_entry_size)" });
        }
        bus.write32(CONTROL, bus.read32(CONTROL) & !ENABLED);
        wait_until(&bus, "GITS_CTLR.Quiescent", ACK_LIMIT_US, || bus.read32(CONTROL) & QUIESCENT != 0)?;

        let mut cut = |frames: usize| {
            let memory = cut(frames)?;
            bus.publish(memory.range(0, memory.words()));
            Ok(memory)
        };
        let configuration = cut(CONFIGURATION_FRAMES)?;
        for core in 0..cores_present() {
            gic::set_lpi_tables(core, start(&configuration), start(&cut(FRAMES)?));
        }
        // The others do so when they start.
        gic::enable_lpis(0).map_err(|error| match error {
            machine::Error::Silent { register, waited_us } => Error::Timeout { register, waited_us },
            _ => Error::InUse { what: "GICR_CTLR.EnableLPIs" },
        })?;

        let mut device_limit = 1 << (1 + (kind >> 13 & 0x1F));
        for table in (TABLES..).step_by(8).take(TABLE_COUNT) {
            let (of, entry_bytes) = (bus.read64(table) >> 56 & 7, 1 + (bus.read64(table) >> 48 & 0x1F));
            if [OF_DEVICES, OF_COLLECTIONS].contains(&of) {
                give(&bus, table, start(&cut(FRAMES)?))?;
            }
            if of == OF_DEVICES {
                device_limit = device_limit.min(BYTES / entry_bytes);
            }
        }
        let queue = cut(FRAMES)?;
        bus.write64(QUEUE, VALID | NOT_CACHED | start(&queue) | (FRAMES as u64 - 1));
        bus.write64(WRITTEN, 0);
        bus.write32(CONTROL, ENABLED);

        let events_of = cut((DEVICES as u64 * EVENTS_BYTES).div_ceil(4096) as usize)?;
        let mut its = Self {
            bus,
            place,
            queue,
            next: 0,
            configuration,
            events_of,
            devices: Vec::new(),
            device_limit,
            targets_are_addresses: kind & TARGETS_ARE_ADDRESSES != 0,
            events: [Event::Free; EVENTS],
            collections: 0,
        };
        its.collect(0)?;
        Ok(its)
    }

    /// Lets the ITS know the collection of `core`, which has that core's number. Only now: a redistributor that takes no LPIs yet
    /// may ignore its collection, or refuse it.
    fn collect(&mut self, core: usize) -> Result<(), Error> {
        if self.collections & 1 << core != 0 {
            return Ok(());
        }
        if !gic::takes_lpis(core) {
            return Err(Error::Unsupported { feature: "messages for a core that has not started" });
        }
        self.check_idle()?;
        self.command([0x09, 0, VALID | self.target(core) | core as u64, 0]); // MAPC
        self.command([0x0D, 0, core as u64, 0]); // INVALL
        self.complete(core)?;
        self.collections |= 1 << core;
        Ok(())
    }

    /// Returns where devices write their messages.
    fn translater(&self) -> PhysAddr {
        // It is mapped, so the sum is no more than the last address.
        Doorbell::Its(PhysAddr(self.place.registers.start)).register().unwrap_or(PhysAddr(0))
    }

    /// Takes an event for `stream`, which is dropped until it is opened.
    pub(crate) fn allocate(&mut self, stream: StreamId) -> Result<Handle, Error> {
        let unknown = Error::UnknownStream { stream };
        let device = u16::try_from(stream.0).ok().and_then(|requester| self.place.device(requester));
        let device = device.filter(|&id| u64::from(id) < self.device_limit).ok_or(unknown)?;
        let event = self.events.iter().position(|&event| event == Event::Free);
        let event = event.ok_or(Error::Exhausted { what: "events of devices" })?;
        if !self.devices.contains(&device) {
            self.check_idle()?;
            let table = start(&self.events_of) + self.devices.len() as u64 * EVENTS_BYTES;
            // Before the ITS may use its table, so that nobody else gets that.
            self.devices.push(device).map_err(|_| Error::Exhausted { what: "tables of events" })?;
            let bits = u64::from(EVENTS.ilog2());
            self.command([0x08 | u64::from(device) << 32, bits - 1, VALID | table, 0]); // MAPD
            self.complete(0)?;
        }
        self.events[event] = Event::Closed;
        Ok(Handle { event, device })
    }

    /// Returns the number of the interrupt (INTID).
    pub(crate) fn number(&self, handle: &Handle) -> u16 {
        (gic::FIRST_LPI as usize + handle.event) as u16
    }

    /// Returns the message by which the device raises the event.
    pub(crate) fn message(&self, handle: &Handle) -> Message {
        Message { address: self.translater().0, data: handle.event as u32 }
    }

    /// Lets the event interrupt `core` for `source`; returns when the ITS and the redistributor know.
    ///
    /// PANICS: when there is no such core.
    pub(crate) fn open(&mut self, handle: &Handle, source: Source, core: usize) -> Result<(), Error> {
        assert!(core < cores_present(), "no such core");
        self.collect(core)?;
        self.check_idle()?;
        interrupts::set_message(handle.event, source);
        self.configure(handle, OPEN);
        let (device, event, collection) = (u64::from(handle.device) << 32, handle.event as u64, core as u64);
        match self.events[handle.event] {
            Event::Open => self.command([0x01 | device, event, collection, 0]), // MOVI
            _ => {
                let number = u64::from(self.number(handle)) << 32;
                self.command([0x0A | device, number | event, collection, 0]); // MAPTI
                self.events[handle.event] = Event::Open;
            }
        }
        self.command([0x0C | device, event, 0, 0]); // INV
        self.complete(core)
    }

    /// Drops the event again; returns when the ITS does.
    pub(crate) fn release(&mut self, handle: Handle) -> Leaving {
        match self.close(&handle) {
            Ok(()) => Leaving(Some(handle.event)),
            Err(error) => {
                defmt::error!("event {=usize} is not used again: {}", handle.event, error);
                Leaving(None)
            }
        }
    }

    fn close(&mut self, handle: &Handle) -> Result<(), Error> {
        if self.events[handle.event] != Event::Open {
            return Ok(());
        }
        self.check_idle()?;
        self.configure(handle, CLOSED);
        let (device, event) = (u64::from(handle.device) << 32, handle.event as u64);
        self.command([0x0C | device, event, 0, 0]); // INV
        self.command([0x0F | device, event, 0, 0]); // DISCARD
        let collections = self.collections;
        for core in (0..cores_present()).filter(|core| collections >> core & 1 != 0) {
            // It may have been on its way to any.
            self.sync(core);
        }
        self.flush()?;
        self.events[handle.event] = Event::Closed;
        Ok(())
    }

    /// Takes note that nobody has the event any more.
    pub(crate) fn finish(&mut self, leaving: Leaving) {
        if let Some(event) = leaving.0 {
            self.events[event] = Event::Free;
        }
    }

    /// Writes the configuration of an event's LPI.
    fn configure(&mut self, handle: &Handle, value: u64) {
        let (word, shift) = (handle.event / 8, handle.event % 8 * 8);
        let others = self.configuration.load(word) & !(0xFF << shift);
        self.configuration.store(word, others | value << shift);
        self.bus.publish(self.configuration.range(word, 1));
    }

    /// Returns how commands name the redistributor of `core`.
    fn target(&self, core: usize) -> u64 {
        gic::message_target(core, self.targets_are_addresses)
    }

    /// Checks that everything before has been executed: then there is room for what comes.
    fn check_idle(&self) -> Result<(), Error> {
        match self.bus.read64(EXECUTED) == self.next {
            true => Ok(()),
            false => Err(Error::Busy { what: "command of the ITS" }),
        }
    }

    /// Writes a command, which the ITS does not know of until [`flush`](Self::flush).
    fn command(&mut self, words: [u64; 4]) {
        let at = (self.next / 8) as usize;
        self.queue.store_all(at, words);
        self.bus.publish(self.queue.range(at, words.len()));
        self.next = (self.next + 32) % BYTES;
    }

    fn sync(&mut self, core: usize) {
        self.command([0x05, 0, self.target(core), 0]); // SYNC
    }

    /// Has the commands executed; returns when the redistributor of `core` knows what they did.
    fn complete(&mut self, core: usize) -> Result<(), Error> {
        self.sync(core);
        self.flush()
    }

    /// Has the commands executed.
    fn flush(&mut self) -> Result<(), Error> {
        self.bus.write64(WRITTEN, self.next);
        // A command that the ITS does not take stalls it there (`GITS_CREADR.Stalled`), and that is no end either.
        wait_until(&self.bus, "GITS_CREADR", ACK_LIMIT_US, || self.bus.read64(EXECUTED) == self.next)
    }

    /// Returns the page that holds `GITS_TRANSLATER`, and nothing else that does anything.
    pub(crate) fn doorbell(&self) -> Range<PhysAddr> {
        let page = self.translater().0 & !(PAGE_SIZE - 1);
        PhysAddr(page)..PhysAddr(page + PAGE_SIZE)
    }
}

fn start(memory: &DmaBuf) -> u64 {
    memory.phys().0
}

/// Gives the ITS the [`FRAMES`] frames at `phys` for a table of its own, in pages of the size that it has.
fn give(bus: &Mmio, table: usize, phys: u64) -> Result<(), Error> {
    for (size, log2) in PAGES.into_iter().enumerate() {
        let value = VALID | NOT_CACHED | phys | (size as u64) << 8 | ((BYTES >> log2) - 1);
        bus.write64(table, value);
        if bus.read64(table) >> 8 & 3 == size as u64 {
            return Ok(());
        }
    }
    Err(Error::Unsupported { feature: "pages of 4, 16 or 64 KiB (GITS_BASER.Page_Size)" })
}

const _: () = assert!(EVENTS <= gic::LPIS && EVENTS.is_power_of_two());
