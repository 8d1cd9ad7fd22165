//! Driver for Arm SMMUv3, the IOMMU of Arm platforms.
//!
//! [`Found`] is a unit that was identified and left as it was. [`Found::enable`] takes it into service: once the unit
//! has taken its first register write (`GBPA`) every device that was not assigned is blocked. A unit in service is three halves ([`Smmu`]): what it
//! reports ([`Events`]), what it is told ([`Commands`]), which device is translated how ([`Tables`]).
//!
//! The words are those of the SMMUv3 architecture specification (Arm IHI 0070), Non-secure programming interface.
//!
//! What it assumes of the hardware: VMSAv8-64 tables with pages of 4 KiB, little-endian, faults that need not stall, and
//! tables and queues where the driver puts them (`IDR0.TTF`, `IDR5.GRAN4K`, `IDR0.TTENDIAN`, `IDR0.STALL_MODEL`,
//! `IDR1.TABLES_PRESET`, `IDR1.QUEUES_PRESET`); a unit without them is refused by name.
//!
//! ```
//! # use iommu::{Bus, Error};
//! fn bring_up<B: Bus + Clone>(bus: B, memory: smmuv3::Memory) -> Result<smmuv3::Smmu<B>, Error> {
//!     let found = smmuv3::Found::probe(bus)?;
//!     found.enable(memory)
//! }
//! ```
//!
//! | feature | supported | evidence |
//! |---|---|---|
//! | discovery | `IORT`: all units, root complexes and components, reserved memory; the device tree | model, QEMU |
//! | stage 1 | 4 levels, 48 bits; memory attributes 0 (write-back), 1 (device), 2 (not cached) | model, QEMU |
//! | stage 2 | 4 levels, as many bits as `IDR5.OAS` has, 44 or 48; 3 levels, 39 bits; `S2FWB` if asked for | model, QEMU (4 levels) |
//! | PASIDs (substreams) | 15 bits with tables of two levels, in 4 blocks of 64 for each device; 6 bits without; first stages; PASID 0 is that of accesses without one | model |
//! | nested stages | a guest's page table, or its table of context descriptors by a list of fields; its commands, field by field | model, QEMU (without PASIDs) |
//! | bypass | of a device, or of accesses without PASID beside PASIDs; by Config = bypass there is no ATS | model, QEMU (of a device) |
//! | replacement | every translation by every other, without a gap where one word decides | model, between any two stores |
//! | stream table | linear, or two levels: the second is made as devices are assigned, and stays | model, QEMU |
//! | silence of a blocked device | Config = abort | model, QEMU |
//! | command queue | tickets; a command that is refused fails its own, a queue that cannot be read is switched off | model, QEMU (refused commands) |
//! | completion | `CMD_SYNC` by message to memory (`IDR0.MSI`, `IDR0.COHACC`), else by `CMDQ_CONS`; by that too when a message is late or lost | model, QEMU (`CMDQ_CONS`) |
//! | completion that wakes a core (CS = SEV) | where the unit has it (`IDR0.SEV`), no erratum is against it, and no message is sent | model |
//! | take-over, stop | a unit that firmware left on, without a moment of bypass; a unit in service, which then refuses all | model, QEMU (take-over) |
//! | device TLBs (ATS) | all PASIDs or one; one device at a time is asked to forget, and one that is silent is named | model |
//! | page requests (PRI) | groups are put together by the broker; what the unit answers by itself has the PASID that was asked with | model |
//! | stalls | of devices that firmware names, never others; no ATS for those; answered by `CMD_RESUME`, ended by `CMD_STALL_TERM` | model |
//! | events | all of the manual, overflow, which stage refused; errors of the unit by their names | model, QEMU |
//! | range invalidation (RIL) | where the unit has it; not of a guest's own pages, whose size nobody knows | model, QEMU |
//! | interrupts of the unit | by wires or by messages (MSI) | model, QEMU (wires) |
//! | doorbells of devices | their address; whoever owns the tables maps them, as device memory | QEMU, stage 1 and stage 2: mapped, unmapped, not attached |
//! | VATOS (`IDR2`) | told where it is, used by nobody | model (has none) |
//! | errata | by `IIDR`; the driver does without what cannot be relied on, whatever the part | model |
//! | queues or tables preset, forced stalls, page 0 alone, Secure and Realm, MPAM, HTTU, AArch32 tables | no | |
//!
//! Hardware: none yet.
//!
//! Interrupts of devices that are messages are writes like any other: whoever owns the tables of a device maps the page of
//! its doorbell there ([`doorbell`]), and never in what a guest's CPU sees. A device whose tables lack it interrupts nobody.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod commands;
pub mod contexts;
pub mod doorbell;
pub mod errata;
pub mod events;
pub mod guest;
mod interrupts;
pub mod iort;
mod queue;
mod regs;
mod stalls;
pub mod streams;
pub mod tables;
pub mod tree;
mod update;

pub use commands::{Commands, RETRY_LIMIT_US};
pub use contexts::{CONTEXT_TABLES, DEVICE_TABLES};
pub use errata::{Erratum, Part};
pub use events::Events;
pub use interrupts::Messages;
pub use streams::{SECOND_LEVEL_TABLES, StreamTableNeeds};
pub use tables::{FRAME_WORDS, Replacement, Tables};

/// Devices whose faults stall, at most: all that can be assigned.
pub const STALLING: usize = tables::DEVICES;

use contexts::{ContextTables, Shape};
use heapless::Vec;
use iommu::{
    Bus, Capabilities, Commands as _, Completion, DmaBuf, Error, Invalidation, PhysAddr, Rw, StreamId,
    bus::wait_until,
};
use queue::{COMMAND_WORDS, CommandQueue, EVENT_WORDS, REQUEST_WORDS, ReportQueue};
use regs::{
    CR0, CR2, GBPA, IDR0, IDR1, IDR3, IDR5, INDEX, QUEUE_BASE, QueueRegisters, STRTAB_BASE, STRTAB_BASE_CFG,
};
use streams::StreamTable;
use tables::Walks;
use tock_registers::{LocalRegisterCopy, fields::FieldValue};

/// How long the unit may take to acknowledge a control write or a first invalidation, in microseconds.
///
/// The manual sets no bound. 100 ms is short enough for a boot log to say what failed.
const ACK_LIMIT_US: u64 = 100_000;

/// What `IDR5.OAS` says of 48 bits.
const OAS_48: u32 = 5;

/// Where the pages of VATOS may begin, and how far apart they are.
const VATOS: usize = 0x2_0000;
const VATOS_UNIT: usize = 0x1_0000;

/// A unit that has been identified and left as it was.
#[derive(Debug)]
pub struct Found<B> {
    bus: B,
    idr0: LocalRegisterCopy<u32, IDR0::Register>,
    idr1: LocalRegisterCopy<u32, IDR1::Register>,
    idr3: LocalRegisterCopy<u32, IDR3::Register>,
    idr5: LocalRegisterCopy<u32, IDR5::Register>,
    part: Part,
}

/// Memory that a unit keeps for as long as it is in service: powers of two, aligned to their size.
#[derive(Debug)]
pub struct Memory {
    /// The stream table, as large as [`Found::stream_table`] says: 64 streams a frame from stream 0 on, or the first of
    /// two levels, 8 bytes for each table of the second. Devices past its end are blocked, and recorded.
    pub stream_table: DmaBuf,
    /// Tables of the second level, 64, 256 or 1024 streams each; without them the stream table is linear. One is taken
    /// for the first device of its streams that is assigned.
    pub second_level: Vec<DmaBuf, SECOND_LEVEL_TABLES>,
    /// One frame: context descriptors of devices without PASIDs.
    pub contexts: DmaBuf,
    /// Frames for the context descriptors of devices with PASIDs: for each device one for each 64 PASIDs of which it ever had
    /// one, [`DEVICE_TABLES`] at most, and one more; and one for each device whose first stage is a guest's page table. Without
    /// them there is neither.
    pub context_tables: Vec<DmaBuf, CONTEXT_TABLES>,
    /// One frame: a table that stays empty.
    pub empty_table: DmaBuf,
    /// The command queue, 256 entries a frame.
    pub command_queue: DmaBuf,
    /// One word: how far the unit has come with its commands, where it writes that by message ([`Found::messages`]).
    pub status: DmaBuf,
    /// The event queue, 128 entries a frame.
    pub event_queue: DmaBuf,
    /// The queue of page requests, 256 entries a frame.
    pub page_requests: DmaBuf,
    /// Answers to page requests and stalls that may be owed at one time; as many entries of the command queue stay free
    /// for them. Stalls are at most [`Found::stalls`].
    pub answers: usize,
    /// Devices whose accesses wait when they meet a fault of their tables, until they are answered (`dma-can-stall` of the
    /// device tree). Never one behind PCI Express: there an access that waits can block those that would end the wait.
    pub stalling: Vec<StreamId, STALLING>,
    /// Second-stage tables are in the format of `S2FWB`: their leaves decide alone how memory is cached, whatever a guest's
    /// first stage says. Needs `IDR3.FWB`.
    pub forced_write_back: bool,
}

/// A unit in service, in its three halves.
#[derive(Debug)]
pub struct Smmu<B> {
    /// What it reports.
    pub events: Events<B>,
    /// What it is told.
    pub commands: Commands<B>,
    /// Which device is translated how.
    pub tables: Tables<B>,
}

impl<B: Bus + Clone> Found<B> {
    /// Identifies the unit behind `bus`, reading only.
    pub fn probe(bus: B) -> Result<Self, Error> {
        let (idr0, idr1) = (regs::IDR0.read(&bus), regs::IDR1.read(&bus));
        if idr0.get() == u32::MAX && idr1.get() == u32::MAX {
            return Err(Error::Absent);
        }
        let (idr3, idr5) = (regs::IDR3.read(&bus), regs::IDR5.read(&bus));
        let part = Part::new(regs::IIDR.read(&bus).get(), regs::AIDR.read(&bus).get());
        Ok(Self { bus, idr0, idr1, idr3, idr5, part })
    }

    /// Returns what the unit can do.
    pub fn capabilities(&self) -> Capabilities {
        let device_tlb = self.idr0.is_set(IDR0::ATS);
        Capabilities {
            stage1: self.idr0.is_set(IDR0::S1P),
            stage2: self.idr0.is_set(IDR0::S2P),
            levels: 4,
            // What the architecture has for a granule of 4 KiB, every unit has.
            stage1_leaves: LEAVES_4K,
            nested: self.idr0.is_set(IDR0::S1P)
                && self.idr0.is_set(IDR0::S2P)
                && self.errata().all(|erratum| erratum.avoid != errata::Avoid::NestedStages),
            bypass: true,
            stage2_leaves: LEAVES_4K,
            pasid_bits: if self.idr0.is_set(IDR0::S1P) { self.shape().pasid_bits() } else { 0 },
            page_requests: self.idr0.is_set(IDR0::PRI) && device_tlb,
            device_tlb,
            coherent_walks: self.idr0.is_set(IDR0::COHACC),
            forced_snoop: false,
            caches_absence: false,
        }
    }

    /// Returns which part the unit is, and which version of the architecture it has.
    pub fn part(&self) -> Part {
        self.part
    }

    /// Returns how far the page of registers is from the unit's first by which somebody else could ask it for translations, in
    /// bytes (`IDR0.VATOS`, `IDR2.BA_VATOS`); `None` where there is none. The driver leaves it alone, and so must guests.
    pub fn vatos_page(&self) -> Option<usize> {
        let page = || regs::IDR2.read(&self.bus).read(regs::IDR2::BA_VATOS) as usize;
        self.idr0.is_set(IDR0::VATOS).then(|| VATOS + page() * VATOS_UNIT)
    }

    /// Returns `IDR4`, whose meaning the implementer defines.
    pub fn implementation_defined(&self) -> u32 {
        regs::IDR4.read(&self.bus).get()
    }

    /// Returns what this part is known not to do as the architecture says; the driver keeps clear of it by itself.
    pub fn errata(&self) -> impl Iterator<Item = Erratum> + use<B> {
        self.part.errata()
    }

    /// Which tables of context descriptors the unit has.
    fn shape(&self) -> Shape {
        Shape {
            substreams: self.idr1.read(IDR1::SSIDSIZE).min(20) as u8,
            two_levels: self.idr0.is_set(IDR0::CD2L),
        }
    }

    /// Returns how many accesses may wait for an answer at one time, of all devices together (`IDR5.STALL_MAX`); 0 where
    /// faults cannot stall.
    pub fn stalls(&self) -> u16 {
        if self.can_stall() { self.idr5.read(IDR5::STALL_MAX) as u16 } else { 0 }
    }

    /// Whether faults may stall, or not, as each device is configured.
    fn can_stall(&self) -> bool {
        self.idr0.matches_all(IDR0::STALL_MODEL::Chosen)
    }

    /// Returns how much memory a stream table takes in which all streams up to `last` have a place.
    ///
    /// It is linear where that takes 16 KiB or less, or where the unit knows nothing else.
    pub fn stream_table(&self, last: StreamId) -> Result<StreamTableNeeds, Error> {
        let log2 = u32::BITS - last.0.leading_zeros();
        if log2 > self.stream_bits() {
            return Err(Error::UnknownStream { stream: last });
        }
        Ok(StreamTableNeeds::new(log2, self.has_two_levels()))
    }

    /// Whether the unit can say by message, in memory that it shares with the CPU, that commands are done (`IDR0.MSI`,
    /// `IDR0.COHACC`). No erratum is known against it.
    pub fn messages(&self) -> bool {
        self.idr0.is_set(IDR0::MSI) && self.idr0.is_set(IDR0::COHACC)
    }

    /// Whether the unit can wake cores that wait for commands (`WFE`), as it says and as no erratum denies. It does so while
    /// there are no [messages](Self::messages).
    pub fn wakes(&self) -> bool {
        self.idr0.is_set(IDR0::SEV) && self.errata().all(|erratum| erratum.avoid != errata::Avoid::WakeUp)
    }

    /// Returns the bits of a StreamID.
    fn stream_bits(&self) -> u32 {
        self.idr1.read(IDR1::SIDSIZE).min(32)
    }

    fn has_two_levels(&self) -> bool {
        self.idr0.matches_all(IDR0::ST_LEVEL::TwoLevel)
    }

    /// Takes the unit into service, in the order of the manual, whatever firmware left on. Interrupts stay off.
    ///
    /// While translation is off, accesses are refused (`GBPA.ABORT`), and then by the stream table: there is no moment in
    /// between. Until translation of firmware's is off, devices reach what firmware let them. Devices that firmware let
    /// translate for themselves have to do so anew: they are to be reset before they are assigned.
    pub fn enable(self, memory: Memory) -> Result<Smmu<B>, Error> {
        self.check()?;
        let Memory {
            stream_table,
            second_level,
            mut contexts,
            context_tables,
            mut empty_table,
            command_queue,
            status,
            event_queue,
            page_requests,
            answers,
            stalling,
            forced_write_back,
        } = memory;
        let capabilities = self.capabilities();
        if !second_level.is_empty() && !self.has_two_levels() {
            return Err(Error::Unsupported { feature: "IDR0.ST_LEVEL (stream tables of two levels)" });
        }
        if !stalling.is_empty() && !self.can_stall() {
            return Err(Error::Unsupported { feature: "faults that stall (IDR0.STALL_MODEL)" });
        }
        if forced_write_back && !self.idr3.is_set(IDR3::FWB) {
            return Err(Error::Unsupported { feature: "IDR3.FWB" });
        }
        let mut streams = StreamTable::new(stream_table, second_level)?;
        for (purpose, frame) in [("context descriptors", &contexts), ("the empty table", &empty_table)] {
            aligned(purpose, frame, FRAME_WORDS)?;
        }
        aligned("the status of commands", &status, 1)?;
        for frame in &context_tables {
            aligned("tables of context descriptors", frame, FRAME_WORDS)?;
        }
        let limit = |field| self.idr1.read(field);
        let commands_log2 =
            entries_log2("the command queue", &command_queue, COMMAND_WORDS, limit(IDR1::CMDQS))?;
        let events_log2 = entries_log2("the event queue", &event_queue, EVENT_WORDS, limit(IDR1::EVENTQS))?;
        let requests_log2 = if capabilities.page_requests {
            let limit = limit(IDR1::PRIQS);
            Some(entries_log2("the page request queue", &page_requests, REQUEST_WORDS, limit)?)
        } else {
            None
        };
        let entries = 1 << commands_log2;
        if answers + commands::BATCH > entries {
            let needed = (answers + commands::BATCH).next_power_of_two() * COMMAND_WORDS;
            let words = command_queue.words();
            return Err(Error::Memory { purpose: "the command queue", words, needed });
        }

        let bus = &self.bus;
        refuse_all(bus)?;
        switch_off(bus)?;
        interrupts::disable(bus, self.idr0.is_set(IDR0::MSI), capabilities.page_requests)?;
        // Errors of firmware's time: GERRORN becomes what GERROR is, which acknowledges those that are active.
        regs::GERRORN.set(bus, regs::GERROR.read(bus).get());

        regs::CR1.set(bus, if capabilities.coherent_walks { regs::COHERENT } else { 0 });
        regs::CR2.write(
            bus,
            CR2::RECINVSID::SET
                + CR2::PTM.val(self.idr0.read(IDR0::BTM))
                + CR2::REC_CFG_ATS.val(self.idr0.read(IDR0::ATSRECERR)),
        );
        for table in [&mut contexts, &mut empty_table] {
            table.clear();
            bus.publish(table.range(0, table.words()));
        }
        streams.clear(bus);
        let base = STRTAB_BASE::ADDR.val(streams.phys().0 >> 6);
        regs::STRTAB_BASE.write(bus, STRTAB_BASE::RA::SET + base);
        let size = STRTAB_BASE_CFG::LOG2SIZE.val(streams.log2());
        let split = streams.split().map(|split| STRTAB_BASE_CFG::SPLIT.val(split));
        let format = split.map_or(size, |split| size + split + STRTAB_BASE_CFG::FMT::TwoLevel);
        regs::STRTAB_BASE_CFG.write(bus, format);

        self.place_queue(&regs::CMDQ, &command_queue, commands_log2);
        self.switch_on(CR0::CMDQEN::SET, "CR0ACK.CMDQEN")?;
        let vmid = self.idr0.is_set(IDR0::S2P);
        let ranges = self.idr3.is_set(IDR3::RIL);
        let abilities = commands::Abilities {
            vmid,
            ranges,
            two_levels: streams.split().is_some(),
            page_requests: capabilities.page_requests,
            stalls: self.can_stall(),
        };
        let word = self.messages().then_some(status);
        let queue = CommandQueue::new(bus, command_queue, word, self.wakes());
        let mut commands = Commands::new(self.bus.clone(), queue, abilities, answers, stalling.clone());
        let ticket = commands.submit(&[Invalidation::All])?;
        wait_until(bus, "CMDQ_CONS", ACK_LIMIT_US, || commands.poll(ticket) == Completion::Done)?;

        self.place_queue(&regs::EVENTQ, &event_queue, events_log2);
        self.switch_on(CR0::EVENTQEN::SET, "CR0ACK.EVENTQEN")?;
        let mut requests = None;
        if let Some(log2) = requests_log2 {
            self.place_queue(&regs::PRIQ, &page_requests, log2);
            self.switch_on(CR0::PRIQEN::SET, "CR0ACK.PRIQEN")?;
            requests = Some(ReportQueue::new(page_requests, &regs::PRIQ));
        }
        if capabilities.device_tlb {
            // What a device says it has translated passes only where its stream table entry admits that.
            self.switch_on(CR0::ATSCHK::SET, "CR0ACK.ATSCHK")?;
        }
        self.switch_on(CR0::SMMUEN::SET, "CR0ACK.SMMUEN")?;

        let walks = Walks {
            coherent: capabilities.coherent_walks,
            address_size: self.idr5.read(IDR5::OAS).min(OAS_48) as u8,
        };
        let known = 1 << self.stream_bits();
        let shape = self.shape();
        let abilities = tables::Abilities {
            capabilities,
            walks,
            vmid,
            wide_asid: self.idr0.is_set(IDR0::ASID16),
            streams: known,
            shape,
            stall_choice: self.can_stall(),
            stalling: stalling.clone(),
            overrides: self.idr1.is_set(IDR1::ATTR_TYPES_OVR),
            forced_write_back,
        };
        let contexts = ContextTables::new(shape, contexts, empty_table.phys(), context_tables);
        let frames = tables::Frames { streams, contexts, empty: empty_table };
        let events = ReportQueue::new(event_queue, &regs::EVENTQ);
        Ok(Smmu {
            events: Events::new(self.bus.clone(), events, requests, stalling),
            commands,
            tables: Tables::new(self.bus.clone(), frames, abilities),
        })
    }

    /// Refuses a unit that lacks what the driver rests on.
    fn check(&self) -> Result<(), Error> {
        let (idr0, idr1) = (self.idr0, self.idr1);
        for (there, feature) in [
            (idr0.is_set(IDR0::TTF_AARCH64), "IDR0.TTF (VMSAv8-64 tables)"),
            (self.idr5.is_set(IDR5::GRAN4K), "IDR5.GRAN4K (pages of 4 KiB)"),
            (!idr0.matches_all(IDR0::TTENDIAN::Big), "little-endian tables (IDR0.TTENDIAN)"),
            (!idr0.matches_all(IDR0::STALL_MODEL::Forced), "faults without stall (IDR0.STALL_MODEL)"),
            (!idr1.is_set(IDR1::TABLES_PRESET), "tables of the driver's own (IDR1.TABLES_PRESET is set)"),
            (!idr1.is_set(IDR1::QUEUES_PRESET), "queues of the driver's own (IDR1.QUEUES_PRESET is set)"),
        ] {
            if !there {
                return Err(Error::Unsupported { feature });
            }
        }
        Ok(())
    }

    /// Tells the unit where a queue is, which is empty.
    fn place_queue(&self, registers: &QueueRegisters, ring: &DmaBuf, log2: u32) {
        // What whoever hands out memory stored there must not be written back over what the unit stores.
        self.bus.publish(ring.range(0, ring.words()));
        let base = QUEUE_BASE::ADDR.val(ring.phys().0 >> 5) + QUEUE_BASE::LOG2SIZE.val(log2.into());
        registers.base.write(&self.bus, base + QUEUE_BASE::ALLOCATE::SET);
        registers.prod.set(&self.bus, 0);
        registers.cons.set(&self.bus, 0);
    }

    /// Writes `CR0` with one more bit set, and waits until `CR0ACK` shows it.
    fn switch_on(&self, bit: FieldValue<u32, CR0::Register>, name: &'static str) -> Result<(), Error> {
        let kept = regs::CR0.read(&self.bus).get();
        regs::CR0.set(&self.bus, kept | bit.value);
        wait_until(&self.bus, name, ACK_LIMIT_US, || regs::CR0ACK.read(&self.bus).get() & bit.value != 0)
    }
}

impl<B: Bus + Clone> Smmu<B> {
    /// Takes the unit out of service, and returns it as it was found, but for one thing: it refuses every access.
    ///
    /// Devices do not translate any more (ATS), and ask for no pages: their owner saw to that. Accesses that stall end.
    ///
    /// On an error the unit may still read all of its memory, which is never used again.
    pub fn stop(mut self) -> Result<Found<B>, Error> {
        let bus = self.commands.bus().clone();
        refuse_all(&bus)?;
        // What was queued before is done: an answer to a device is ignored once translation is off. A queue that stopped for
        // good is left as it is. Nothing is written any more when this one is done, which has no message of its own.
        self.commands.without_messages();
        if let Ok(ticket) = self.commands.submit(&[]) {
            let over = || self.commands.poll(ticket) != Completion::Pending;
            wait_until(&bus, "CMDQ_CONS", ACK_LIMIT_US, over)?;
        }
        switch_off(&bus)?;
        let found = Found::probe(bus)?;
        interrupts::disable(&found.bus, found.idr0.is_set(IDR0::MSI), found.capabilities().page_requests)?;
        Ok(found)
    }
}

/// Has all accesses refused while translation is off.
fn refuse_all<B: Bus>(bus: &B) -> Result<(), Error> {
    let updated = || {
        let done = || !regs::GBPA.read(bus).is_set(GBPA::UPDATE);
        wait_until(bus, "GBPA.UPDATE", ACK_LIMIT_US, done)
    };
    // A write while an earlier one is pending is ignored.
    updated()?;
    let kept = regs::GBPA.read(bus).get();
    regs::GBPA.set(bus, kept | GBPA::ABORT::SET.value | GBPA::UPDATE::SET.value);
    updated()
}

/// Switches off whatever is on: translation first, which leaves every access to `GBPA`; then what fills queues; and the
/// command queue last, when it is empty or stuck.
fn switch_off<B: Bus>(bus: &B) -> Result<(), Error> {
    let acknowledged = |bits: u32| (regs::CR0.read(bus).get() ^ regs::CR0ACK.read(bus).get()) & bits == 0;
    let on = CR0::SMMUEN::SET + CR0::PRIQEN::SET + CR0::EVENTQEN::SET + CR0::CMDQEN::SET;
    // A bit must not change again before it was acknowledged, whoever changed it.
    wait_until(bus, "CR0ACK", ACK_LIMIT_US, || acknowledged(on.value))?;
    for (bit, name) in [
        (CR0::SMMUEN::SET, "CR0ACK.SMMUEN"),
        (CR0::PRIQEN::SET, "CR0ACK.PRIQEN"),
        (CR0::EVENTQEN::SET, "CR0ACK.EVENTQEN"),
    ] {
        let kept = regs::CR0.read(bus).get();
        if kept & bit.value != 0 {
            regs::CR0.set(bus, kept & !bit.value);
            wait_until(bus, name, ACK_LIMIT_US, || acknowledged(bit.value))?;
        }
    }
    if regs::CR0.read(bus).is_set(CR0::CMDQEN) {
        let QueueRegisters { prod, cons, .. } = &regs::CMDQ;
        let index = |register: &Rw<u32, INDEX::Register>| register.read(bus).read(INDEX::INDEX);
        let stuck = || regs::GERROR.read(bus).get() != regs::GERRORN.read(bus).get();
        // Whatever is left after that is lost: none of it is ours to wait for.
        let _ = wait_until(bus, "CMDQ_CONS", ACK_LIMIT_US, || index(prod) == index(cons) || stuck());
    }
    regs::CR0.set(bus, 0);
    wait_until(bus, "CR0ACK", ACK_LIMIT_US, || regs::CR0ACK.read(bus).get() == 0)
}

/// Checks that `buffer` has at least `words` words and is aligned to its whole size.
fn aligned(purpose: &'static str, buffer: &DmaBuf, needed: usize) -> Result<(), Error> {
    let (PhysAddr(phys), words) = (buffer.phys(), buffer.words());
    let bytes = words as u64 * 8;
    if words >= needed && words.is_power_of_two() && phys.is_multiple_of(bytes) {
        Ok(())
    } else {
        Err(Error::Memory { purpose, words, needed })
    }
}

/// Leaves of tables with a granule of 4 KiB: 4 KiB, 2 MiB, 1 GiB.
const LEAVES_4K: u64 = 1 << 12 | 1 << 21 | 1 << 30;

/// Words below which a base register cannot name a place: the address fields of `STRTAB_BASE` and of the queues begin at
/// bit 5 or above.
const BASE_WORDS: usize = 4;

/// Returns log2 of the entries, of `entry_words` each, that `buffer` holds; they are at most 2^`limit`, and take
/// [`BASE_WORDS`] at least.
fn entries_log2(
    purpose: &'static str,
    buffer: &DmaBuf,
    entry_words: usize,
    limit: u32,
) -> Result<u32, Error> {
    aligned(purpose, buffer, entry_words.max(BASE_WORDS))?;
    let log2 = (buffer.words() / entry_words).ilog2();
    if log2 > limit {
        return Err(Error::Memory { purpose, words: buffer.words(), needed: entry_words << limit });
    }
    Ok(log2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::ops::Range;
    use iommu::PhysAddr;

    /// A unit that has its eight identification registers alone.
    #[derive(Clone, Copy)]
    struct Identification([u32; 8]);

    impl Bus for Identification {
        fn read32(&self, offset: usize) -> u32 {
            self.0.get(offset / 4).copied().unwrap_or(0)
        }
        fn write32(&self, _offset: usize, _value: u32) {}
        fn read64(&self, _offset: usize) -> u64 {
            0
        }
        fn write64(&self, _offset: usize, _value: u64) {}
        fn publish(&self, _range: Range<PhysAddr>) {}
        fn observe(&self, _range: Range<PhysAddr>) {}
        fn now_us(&self) -> u64 {
            0
        }
    }

    #[test]
    fn a_page_of_vatos_is_where_the_unit_says_and_nowhere_without() {
        // IDR0.VATOS is bit 20; IDR2.BA_VATOS is 9:0, in 64 KiB behind 0x20000.
        let page = |idr0, idr2| {
            let found = Found::probe(Identification([idr0, 0, idr2, 0, 0xCAFE, 0, 0, 0])).ok();
            found.map(|found| (found.vatos_page(), found.implementation_defined()))
        };

        assert_eq!(page(1 << 20, 0), Some((Some(0x2_0000), 0xCAFE)));
        assert_eq!(page(1 << 20, 0xFFFF_FC05), Some((Some(0x7_0000), 0xCAFE)));
        assert_eq!(page(1 << 19, 5), Some((None, 0xCAFE)));
    }
}
