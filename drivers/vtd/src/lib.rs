//! Driver for Intel VT-d, the IOMMU of x86 platforms.
//!
//! [`Found`] is a unit that was identified and left as it was. [`Found::enable`] takes it into service: from then on
//! every device that was not assigned is blocked. A unit in service is three halves ([`Vtd`]): what it reports
//! ([`Events`]), what it is told ([`Commands`]), which device is translated how ([`Tables`]); and, where it remaps
//! interrupts, a fourth: which device may interrupt whom ([`Remapping`]).
//!
//! The words are those of the VT-d architecture specification, revision 4 and later.
//!
//! What it assumes of the hardware: queued invalidation (`ECAP.QI`), unless the unit is one of old that has neither scalable
//! mode nor interrupt remapping. Firmware may have left translation, interrupt remapping and the invalidation queue on:
//! they are taken over without a gap, if translation is by tables of the same mode.
//!
//! ```
//! # use iommu::{Bus, Error, DmaBuf};
//! fn bring_up<B: Bus + Clone>(bus: B, memory: vtd::Memory) -> Result<vtd::Vtd<B>, Error> {
//!     let found = vtd::Found::probe(bus)?;
//!     found.enable(memory)
//! }
//! ```
//!
//! | feature | supported | note: evidence |
//! |---|---|---|
//! | discovery, ACPI `DMAR` | yes | every structure; bridges and paths, several units and segments; one mistake refuses the table |
//! | reserved regions of firmware | by policy | [`dmar::Dmar::kept_mapped`]: the device is refused, or exactly they stay mapped: model |
//! | several units | yes | each has a driver of its own; a domain uses what [`Capabilities::common`] says: model |
//! | scalable mode, first stage | yes | 4 levels: QEMU, model; 5 where reported: model |
//! | scalable mode, second stage | yes | 3 to 5 levels, as reported: model; 4 levels: QEMU, which offers it without page requests |
//! | nested | yes | a guest's page tables over second-stage tables: model; its PASID tables no: the unit reads them by host addresses |
//! | which stage refused an access | by reason | [`Reason::stages`]: model; a missing permission to write may be either's, of page requests the unit does not say |
//! | pass-through | yes | for who vouches for it ([`Trust`](iommu::Trust)): QEMU, model; in legacy mode without a device TLB |
//! | legacy mode | yes | where there is no other, or when asked; 4 levels: QEMU, model; 3 and 5: model |
//! | blocking without records (`FPD`) | yes | until the device is given back: QEMU, model |
//! | page walks that do not look into caches | yes | only then are cache lines flushed: QEMU (nothing to see there), model |
//! | write buffers (`CAP.RWBF`) | yes | flushed at bring-up and after each entry: model; interrupt entries by their invalidation |
//! | snooping of accesses (`PGSNP`) | yes | wherever `ECAP.SC` is, in scalable mode: encoded |
//! | second-stage accessed and dirty bits, execute and supervisor requests | no | |
//! | PASID | yes | 1 to 8191 for each device: QEMU, model |
//! | queued invalidation, 256 bits | yes | tickets: QEMU, model |
//! | queued invalidation, 128 bits | yes | in legacy mode: model |
//! | register-based invalidation | yes | where there is no queue; each ticket is waited for: model |
//! | order of invalidations | fenced | the caches fill each other, and a unit may execute them in any order: model |
//! | refused descriptors (`IQE`) | replaced | what is behind them is executed: QEMU, model; a queue that cannot go on is given up |
//! | device TLBs | yes | one device at a time; virtual functions, throttle ([`Commands::describe`]): QEMU, model |
//! | silent devices (`ITE`) | named | their ticket has failed, the others go on: model; silent units: [`HEAD_LIMIT_US`] |
//! | stray answers of devices (`ICE`) | named | model |
//! | takeover from firmware | yes | translation of the same mode, interrupt remapping, queue: QEMU, model; protected memory: model |
//! | page requests | yes | overflow, drain; groups are put together by the broker: QEMU, model |
//! | primary faults | yes | all records in any order, overflow, [`Reason`]: QEMU (one record), model |
//! | advanced fault log | no | |
//! | interrupt remapping | yes | up to 65536 entries, x2APIC and xAPIC destinations; the source is always validated: QEMU, model |
//! | blocks of entries, sources behind bridges, phantom functions, pins of I/O APICs | yes | model |
//! | forgetting interrupt entries, in caching mode and without | yes | model; QEMU remembers none |
//! | compatibility format of interrupts | refused | model; QEMU lets it pass |
//! | posted interrupts | no | |
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod commands;
pub mod dmar;
pub mod events;
mod interrupts;
mod queue;
pub mod reason;
mod regs;
pub mod remap;
pub mod tables;
mod takeover;
mod tickets;

pub use commands::Commands;
pub use events::Events;
pub use reason::Reason;
pub use remap::Remapping;
pub use tables::{FRAME_WORDS, FRAMES, Mode, Tables};
pub use tickets::HEAD_LIMIT_US;

use heapless::Vec;
use iommu::{
    Bus, Capabilities, Commands as _, Completion, DmaBuf, Error, Invalidation, PhysAddr, bus::wait_until,
};
use queue::{ENTRY_WORDS, InvalidationQueue, NARROW_WORDS, PageRequestQueue};
use regs::{CAP, ECAP, GLOBAL, IQA, IRTA, PMEN, PQA, RTADDR, VER};
use tables::{Publisher, Snoop};
use tock_registers::LocalRegisterCopy;

/// How long the unit may take to acknowledge a control write or a first invalidation, in microseconds.
///
/// The manual sets no bound. 100 ms is short enough for a boot log to say what failed.
const ACK_LIMIT_US: u64 = 100_000;

/// A unit that has been identified and left as it was.
#[derive(Debug)]
pub struct Found<B> {
    bus: B,
    cap: LocalRegisterCopy<u64, CAP::Register>,
    ecap: LocalRegisterCopy<u64, ECAP::Register>,
    mode: Mode,
    /// The queue that firmware left on, if its memory was lent.
    old_queue: Option<DmaBuf>,
}

/// Memory that a unit keeps for as long as it is in service. All of it is aligned to 4 KiB, queues to their size.
#[derive(Debug)]
pub struct Memory {
    /// One frame: the root table.
    pub root: DmaBuf,
    /// One to 128 frames, a power of two: the invalidation queue, 128 entries a frame.
    pub invalidation_queue: DmaBuf,
    /// One frame: where the unit writes what it has completed.
    pub status: DmaBuf,
    /// One to 128 frames, a power of two: the page request queue, 128 entries a frame.
    pub page_requests: DmaBuf,
    /// Frames for context tables, PASID directories and PASID tables: three for the first device, two for each other.
    pub frames: Vec<DmaBuf, FRAMES>,
    /// One to 256 frames, a power of two: the interrupt remapping table, 256 entries a frame. Not used by a unit that has none.
    pub interrupts: DmaBuf,
    /// The local APICs are in x2APIC mode: destinations of interrupts have 32 bits if the unit can (`ECAP.EIM`), else 8.
    pub x2apic: bool,
    /// Answers to page requests that may be owed at one time; as many entries of the invalidation queue stay free
    /// for them.
    pub answers: usize,
}

/// A unit in service, in its three halves, and a fourth where it remaps interrupts.
#[derive(Debug)]
pub struct Vtd<B> {
    /// What it reports.
    pub events: Events<B>,
    /// What it is told.
    pub commands: Commands<B>,
    /// Which device is translated how.
    pub tables: Tables<B>,
    /// Which device may interrupt whom; none if the unit leaves interrupts as they are.
    pub remapping: Option<Remapping<B>>,
}

impl<B: Bus + Clone> Found<B> {
    /// Identifies the unit behind `bus`, reading only.
    pub fn probe(bus: B) -> Result<Self, Error> {
        let (cap, ecap) = (regs::CAP.read(&bus), regs::ECAP.read(&bus));
        if cap.get() == u64::MAX && ecap.get() == u64::MAX {
            return Err(Error::Absent);
        }
        let mode = if ecap.is_set(ECAP::SMTS) { Mode::Scalable } else { Mode::Legacy };
        Ok(Self { bus, cap, ecap, mode, old_queue: None })
    }

    /// Returns which tables the unit will walk: those of scalable mode where it has that.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Has the unit walk the tables of legacy mode, whatever else it could.
    pub fn in_legacy_mode(self) -> Self {
        Self { mode: Mode::Legacy, ..self }
    }

    /// Returns how many bytes of registers the driver uses: the fault-recording registers may lie behind the window that the
    /// `DMAR` table names.
    pub fn register_bytes(&self) -> usize {
        let (first, count) = self.fault_records();
        (first + count * 16).max(regs::FIXED_BYTES)
    }

    /// Returns what the unit can do, in its mode.
    pub fn capabilities(&self) -> Capabilities {
        let (cap, ecap) = (self.cap, self.ecap);
        let scalable = self.mode == Mode::Scalable;
        let pasid = scalable && ecap.is_set(ECAP::PASID);
        // A device TLB is told through the queue alone.
        let device_tlb = ecap.is_set(ECAP::DT) && ecap.is_set(ECAP::QI);
        let second = self.second_stage_levels();
        let stage1 = scalable && ecap.is_set(ECAP::FSTS);
        let stage2 = second != 0 && (!scalable || ecap.is_set(ECAP::SSTS));
        // What each stage takes that there is.
        let first_levels = if cap.is_set(CAP::FS5LP) { 5 } else { 4 };
        let second_levels = second.checked_ilog2().unwrap_or(0) as u8;
        let levels = match (stage1, stage2) {
            (true, true) => second_levels.min(first_levels),
            (true, false) => first_levels,
            (false, true) => second_levels,
            (false, false) => 0,
        };
        Capabilities {
            stage1,
            stage2,
            levels,
            // Pages of 2 MiB are in every first stage, and none but those of 4 KiB in every second.
            stage1_leaves: 1 << 12 | 1 << 21 | u64::from(cap.is_set(CAP::FS1GP)) << 30,
            nested: stage1 && stage2 && ecap.is_set(ECAP::NEST),
            bypass: ecap.is_set(ECAP::PT),
            stage2_leaves: 1 << 12 | (cap.read(CAP::SSLPS) & 1) << 21 | (cap.read(CAP::SSLPS) >> 1 & 1) << 30,
            pasid_bits: if pasid { ecap.read(ECAP::PSS) as u8 + 1 } else { 0 },
            // Without drain a device cannot be taken away safely, so its page requests are not used either.
            page_requests: ecap.is_set(ECAP::PRS) && ecap.is_set(ECAP::PDS) && pasid && device_tlb,
            device_tlb,
            coherent_walks: ecap.is_set(if scalable { ECAP::SMPWCS } else { ECAP::C }),
            forced_snoop: ecap.is_set(ECAP::SC),
            // A write buffer is flushed by an invalidation, too.
            caches_absence: cap.is_set(CAP::CM) || cap.is_set(CAP::RWBF),
        }
    }

    /// Returns the levels of second-stage tables that the unit walks: bit n set, it walks n.
    fn second_stage_levels(&self) -> u8 {
        // SAGAW bit 1 is 39 bits by 3 levels, bit 2 48 by 4, bit 3 57 by 5; bits 0 and 4 are reserved.
        (self.cap.read(CAP::SAGAW) as u8 & 0b1110) << 2
    }

    /// Returns whether the unit looks into the CPU's caches for its own tables.
    ///
    /// The manual says it of PASID tables in two places; either may be what a unit goes by.
    fn sees_caches(&self) -> bool {
        self.ecap.is_set(ECAP::C) && (self.mode == Mode::Legacy || self.ecap.is_set(ECAP::SMPWCS))
    }

    /// Takes the unit into service, in the order of the manual. Interrupts stay masked.
    ///
    /// From the write that enables translation on, no device reaches memory. Before, they reach what firmware let
    /// them: a caller that needs more turns bus masters off first. If firmware left translation on, it stays on, and each
    /// device goes from what firmware let it reach to nothing, in one step. So do interrupts.
    ///
    /// On an error the unit is as firmware left it, or lets nothing through; it is never less strict than it was.
    pub fn enable(mut self, memory: Memory) -> Result<Vtd<B>, Error> {
        self.check()?;
        self.check_left()?;
        let Memory {
            mut root,
            invalidation_queue,
            mut status,
            page_requests,
            frames,
            interrupts,
            x2apic,
            answers,
        } = memory;
        let commands_size = queue_size("the invalidation queue", &invalidation_queue)?;
        let requests_size = queue_size("the page request queue", &page_requests)?;
        for (purpose, frame) in [("the root table", &root), ("completions", &status)]
            .into_iter()
            .chain(frames.iter().map(|frame| ("tables", frame)))
        {
            aligned(purpose, frame, FRAME_WORDS)?;
        }
        let interrupts_size = interrupt_table_size(&interrupts)?;
        let width = if self.mode == Mode::Scalable { ENTRY_WORDS } else { NARROW_WORDS };
        let entries = invalidation_queue.words() / width;
        if answers + commands::BATCH >= entries {
            let needed = (answers + commands::BATCH + 1).next_power_of_two() * width;
            let words = invalidation_queue.words();
            return Err(Error::Memory { purpose: "the invalidation queue", words, needed });
        }

        let publisher = Publisher {
            bus: self.bus.clone(),
            coherent: self.sees_caches(),
            write_buffer: self.cap.is_set(CAP::RWBF),
        };
        let page_requests_served = self.capabilities().page_requests;
        for event in [&regs::FAULT_EVENT, &regs::INVALIDATION_EVENT] {
            interrupts::mask(&self.bus, event);
        }
        if self.ecap.is_set(ECAP::PRS) {
            interrupts::mask(&self.bus, &regs::PAGE_REQUEST_EVENT);
        }
        self.discard_old_faults();
        self.end_old_queue(&mut status)?;

        let bus = &self.bus;
        let queue = if self.ecap.is_set(ECAP::QI) {
            regs::IQT.set(bus, 0);
            let base = invalidation_queue.phys().0 >> 12;
            let wide = if width == ENTRY_WORDS { IQA::DW::SET } else { IQA::DW::CLEAR };
            regs::IQA.write(bus, IQA::BASE.val(base) + wide + IQA::QS.val(commands_size));
            self.command(GLOBAL::QIE::SET.value, "GSTS.QIES")?;
            Some(InvalidationQueue::new(invalidation_queue, width))
        } else {
            None
        };

        root.clear();
        publisher.publish(&root, 0, FRAME_WORDS);
        publisher.flush_write_buffer()?;
        let mode = match self.mode {
            Mode::Legacy => RTADDR::TTM::Legacy,
            Mode::Scalable => RTADDR::TTM::Scalable,
        };
        regs::RTADDR.write(bus, RTADDR::RTA.val(root.phys().0 >> 12) + mode);
        self.command(GLOBAL::SRTP::SET.value, "GSTS.RTPS")?;

        let mut commands = Commands::new(self.bus.clone(), queue, status, self.command_abilities(), answers);
        let remapping = self.set_interrupt_table(interrupts, interrupts_size, x2apic, &publisher)?;
        // Also where setting the tables has invalidated everything (CAP.ESRTPS, ESIRTPS): it happens once.
        let all = [Invalidation::All, Invalidation::Interrupts];
        let ticket = commands.submit(if remapping.is_some() { &all } else { &all[..1] })?;
        wait_until(bus, "the first invalidation", ACK_LIMIT_US, || {
            commands.poll(ticket) == Completion::Done
        })?;

        // Interrupts of the compatibility format are not remapped, so they do not pass.
        self.command_off(GLOBAL::CFI::SET.value, "GSTS.CFIS")?;
        if remapping.is_some() {
            self.command(GLOBAL::IRE::SET.value, "GSTS.IRES")?;
        }
        self.command(GLOBAL::TE::SET.value, "GSTS.TES")?;
        self.end_protected_memory()?;

        if page_requests_served {
            // What whoever hands out memory stored there must not be written back over what the unit stores.
            bus.publish(page_requests.range(0, page_requests.words()));
            regs::PQH.set(bus, 0);
            regs::PQT.set(bus, 0);
            let base = page_requests.phys().0 >> 12;
            regs::PQA.write(bus, PQA::BASE.val(base) + PQA::PQS.val(requests_size));
            regs::PRS.clear(bus, regs::PRS::PPR::SET + regs::PRS::PRO::SET);
        }
        let requests = page_requests_served.then(|| PageRequestQueue::new(page_requests));
        let abilities = tables::Abilities {
            capabilities: self.capabilities(),
            mode: self.mode,
            domains: 1 << (4 + 2 * self.cap.read(CAP::ND).min(6)),
            second_stage_levels: self.second_stage_levels(),
            five_levels: self.cap.is_set(CAP::FS5LP),
            snoop: Snoop { walks: self.ecap.is_set(ECAP::SMPWCS), accesses: self.ecap.is_set(ECAP::SC) },
        };
        Ok(Vtd {
            events: Events::new(self.bus.clone(), requests, self.fault_records()),
            commands,
            tables: Tables::new(publisher, root, frames, abilities),
            remapping,
        })
    }

    /// Refuses a unit that lacks what the driver rests on.
    fn check(&self) -> Result<(), Error> {
        let queued = self.ecap.is_set(ECAP::QI);
        // Register-based invalidation knows neither PASIDs nor interrupt entries, and newer units have none.
        let by_registers = self.mode == Mode::Legacy
            && !self.ecap.is_set(ECAP::IR)
            && regs::VER.read(&self.bus).read(VER::MAX) < 6;
        if !queued && !by_registers {
            return Err(Error::Unsupported { feature: "ECAP.QI (queued invalidation)" });
        }
        Ok(())
    }

    /// Writes `GCMD` with one more bit set, and waits until `GSTS` shows it.
    fn command(&self, bit: u32, status: &'static str) -> Result<(), Error> {
        let kept = regs::GSTS.read(&self.bus).get() & !regs::ONE_SHOT;
        regs::GCMD.set(&self.bus, kept | bit);
        wait_until(&self.bus, status, ACK_LIMIT_US, || regs::GSTS.read(&self.bus).get() & bit != 0)
    }

    /// Ends the protection of memory from DMA that firmware may have left on: translation has taken its place.
    fn end_protected_memory(&self) -> Result<(), Error> {
        let protects = self.cap.is_set(CAP::PLMR) || self.cap.is_set(CAP::PHMR);
        if !protects || !regs::PMEN.read(&self.bus).is_set(PMEN::EPM) {
            return Ok(());
        }
        regs::PMEN.write(&self.bus, PMEN::EPM::CLEAR);
        wait_until(&self.bus, "PMEN.PRS", ACK_LIMIT_US, || !regs::PMEN.read(&self.bus).is_set(PMEN::PRS))
    }

    /// Sets an interrupt remapping table in which nothing is present, so that no device can interrupt the CPU once remapping
    /// is on. A unit without remapping leaves interrupts as they are.
    ///
    /// The compatibility format is blocked as well (`CFIS` = 0). The unit's own interrupts are not remapped, and come.
    fn set_interrupt_table(
        &self,
        table: DmaBuf,
        size: u64,
        x2apic: bool,
        publisher: &Publisher<B>,
    ) -> Result<Option<Remapping<B>>, Error> {
        if !self.ecap.is_set(ECAP::IR) {
            return Ok(None);
        }
        let x2apic = x2apic && self.ecap.is_set(ECAP::EIM);
        let base = table.phys().0 >> 12;
        let caches_absence = self.capabilities().caches_absence;
        let remapping = Remapping::new(publisher.clone(), table, x2apic, caches_absence);
        publisher.flush_write_buffer()?;
        regs::IRTA.write(&self.bus, IRTA::S.val(size) + IRTA::EIME.val(x2apic.into()) + IRTA::BASE.val(base));
        self.command(GLOBAL::SIRTP::SET.value, "GSTS.IRTPS")?;
        Ok(Some(remapping))
    }

    /// Clears what faults firmware's time left behind, so that none is taken for a fault of ours.
    fn discard_old_faults(&self) {
        let (first, count) = self.fault_records();
        for index in 0..count {
            let record = regs::FaultRecording::at(first, index);
            record.top.clear(&self.bus, regs::FRCD_TOP::F::SET);
        }
        let errors =
            regs::FSTS::PFO::SET + regs::FSTS::IQE::SET + regs::FSTS::ICE::SET + regs::FSTS::ITE::SET;
        regs::FSTS.clear(&self.bus, errors);
    }

    /// Returns where the fault-recording registers start, in bytes, and how many there are.
    fn fault_records(&self) -> (usize, usize) {
        (self.cap.read(CAP::FRO) as usize * 16, self.cap.read(CAP::NFR) as usize + 1)
    }

    fn command_abilities(&self) -> commands::Abilities {
        commands::Abilities {
            drain: self.cap.read(CAP::DWD) | self.cap.read(CAP::DRD) << 1,
            mask_limit: self.cap.read(CAP::MAMV) as u8,
            interrupt_mask_limit: self.ecap.read(ECAP::MHMV) as u8,
            second_stage_pages: self.cap.is_set(CAP::PSI),
            request_drain: self.ecap.is_set(ECAP::PDS),
            throttle: self.ecap.is_set(ECAP::DIT),
            registers: self.ecap.read(ECAP::IRO) as usize * 16,
            mode: self.mode,
        }
    }
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

/// Returns the manual's size of an interrupt remapping table (`IRTA.S`): log2 of its entries, minus one.
fn interrupt_table_size(buffer: &DmaBuf) -> Result<u64, Error> {
    const PURPOSE: &str = "the interrupt remapping table";
    const LIMIT: usize = remap::ENTRIES * 2;
    aligned(PURPOSE, buffer, FRAME_WORDS)?;
    if buffer.words() > LIMIT {
        return Err(Error::Memory { purpose: PURPOSE, words: buffer.words(), needed: LIMIT });
    }
    Ok(u64::from((buffer.words() / 2).ilog2()) - 1)
}

/// Returns the manual's size of a queue: log2 of its 4 KiB pages.
fn queue_size(purpose: &'static str, buffer: &DmaBuf) -> Result<u64, Error> {
    aligned(purpose, buffer, FRAME_WORDS)?;
    let size = (buffer.words() / FRAME_WORDS).ilog2();
    if size > 7 {
        return Err(Error::Memory { purpose, words: buffer.words(), needed: FRAME_WORDS << 7 });
    }
    Ok(size.into())
}
