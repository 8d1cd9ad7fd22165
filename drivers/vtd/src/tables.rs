//! The scalable-mode tables: root, context, PASID directory, PASID table; and which device has which.
//!
//! Rules for a table that the unit may be walking: every word of an entry but the one with P, then a barrier, then that
//! one; to remove, P first, then the invalidation, and the rest of the entry only when that has completed.

use crate::commands::number;
use heapless::Vec;
use iommu::{
    Attachment, Bus, DmaBuf, DomainId, Error, Features, Field, Invalidation, Invalidations, Leaving, Pasid,
    PhysAddr, Root, StreamId, Translation, Words, descriptor, unit::LeavingPart,
};

/// Words of a frame, the unit of table memory: 4 KiB.
pub const FRAME_WORDS: usize = 512;
/// Frames that a unit takes for its tables, at most.
pub const FRAMES: usize = 64;
/// Devices assigned at one time, at most.
pub const DEVICES: usize = 16;
/// Context tables, at most: each serves half of a bus.
const CONTEXT_TABLES: usize = 8;
/// PASID tables of one device, at most: each holds 64 PASIDs.
const PASID_TABLES: usize = 4;
/// PASID directory entries that a context entry with PDTS = 0 promises, and the PASIDs that they reach.
const DIRECTORY: u32 = 128;
const PASIDS: u32 = DIRECTORY * 64;
/// Domain numbers in use at one time, at most; 0 stays reserved for units in caching mode.
const DOMAINS: u16 = 128;

descriptor! {
    /// Half of a scalable-mode root entry: a pointer to a context table.
    pub struct RootHalf([u64; 1]);
}

impl RootHalf {
    const PRESENT: Field<Self> = Field::bit(0);
    const TABLE: Field<Self> = Field::bits(63, 12);

    /// Points at the context table `table` (LP with LCTP, or UP with UCTP).
    pub fn new(table: PhysAddr) -> Self {
        Self::default().with(Self::PRESENT, 1).with_address(Self::TABLE, table.0)
    }
}

descriptor! {
    /// A scalable-mode context entry.
    pub struct ContextEntry([u64; 4]);
}

impl ContextEntry {
    const PRESENT: Field<Self> = Field::bit(0);
    const DEVICE_TLB: Field<Self> = Field::bit(2);
    const PASID: Field<Self> = Field::bit(3);
    const PAGE_REQUESTS: Field<Self> = Field::bit(4);
    const DIRECTORY: Field<Self> = Field::bits(63, 12);

    /// Points at a PASID directory of 128 entries (PDTS = 0); accesses without PASID use entry 0 (RID_PASID = 0).
    pub fn new(directory: PhysAddr, features: Features) -> Self {
        Self::default()
            .with(Self::PRESENT, 1)
            .with(Self::DEVICE_TLB, features.device_tlb.into())
            .with(Self::PASID, features.pasid.into())
            .with(Self::PAGE_REQUESTS, features.page_requests.into())
            .with_address(Self::DIRECTORY, directory.0)
    }
}

descriptor! {
    /// A PASID directory entry.
    pub struct DirectoryEntry([u64; 1]);
}

impl DirectoryEntry {
    const PRESENT: Field<Self> = Field::bit(0);
    const TABLE: Field<Self> = Field::bits(63, 12);

    /// Points at the PASID table `table`.
    pub fn new(table: PhysAddr) -> Self {
        Self::default().with(Self::PRESENT, 1).with_address(Self::TABLE, table.0)
    }
}

descriptor! {
    /// A PASID table entry.
    pub struct PasidEntry([u64; 8]);
}

impl PasidEntry {
    const PRESENT: Field<Self> = Field::bit(0);
    const ADDRESS_WIDTH: Field<Self> = Field::bits(4, 2);
    const TRANSLATION_TYPE: Field<Self> = Field::bits(8, 6);
    const SECOND_STAGE: Field<Self> = Field::bits(63, 12);
    const DOMAIN: Field<Self> = Field::bits(79, 64);
    const WALK_SNOOP: Field<Self> = Field::bit(87);
    const FIRST_STAGE_MODE: Field<Self> = Field::bits(131, 130);
    const FIRST_STAGE: Field<Self> = Field::bits(191, 140);

    /// Translates by first-stage tables (PGTT = 1). Supervisor requests stay refused (SRE = 0).
    ///
    /// AW is ignored for first-stage tables by the manual, but QEMU checks addresses against it.
    pub fn first_stage(root: Root, domain: DomainId, walk_snoop: bool) -> Self {
        Self::common(1, root, domain, walk_snoop)
            .with(Self::FIRST_STAGE_MODE, u64::from(root.levels() == 5))
            .with_address(Self::FIRST_STAGE, root.phys().0)
    }

    /// Translates by second-stage tables (PGTT = 2).
    pub fn second_stage(root: Root, domain: DomainId, walk_snoop: bool) -> Self {
        Self::common(2, root, domain, walk_snoop).with_address(Self::SECOND_STAGE, root.phys().0)
    }

    fn common(translation_type: u64, root: Root, domain: DomainId, walk_snoop: bool) -> Self {
        Self::default()
            .with(Self::PRESENT, 1)
            .with(Self::ADDRESS_WIDTH, u64::from(root.levels()).saturating_sub(2) & 0b111)
            .with(Self::TRANSLATION_TYPE, translation_type)
            .with(Self::DOMAIN, domain.0.into())
            .with(Self::WALK_SNOOP, walk_snoop.into())
    }
}

/// Words of a PASID table entry.
const PASID_WORDS: usize = 8;

/// What the tables of a unit depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    pub(crate) capabilities: iommu::Capabilities,
    /// Domain numbers that the unit has, from `CAP.ND`.
    pub(crate) domains: u32,
}

/// Half a bus.
#[derive(Debug)]
struct ContextTable {
    bus: u32,
    upper: bool,
    table: DmaBuf,
}

#[derive(Debug)]
struct Device {
    stream: StreamId,
    features: Features,
    /// Blocked for good, and waiting for `finish`.
    leaving: bool,
    directory: DmaBuf,
    tables: Vec<PasidTable, PASID_TABLES>,
}

#[derive(Debug)]
struct PasidTable {
    /// Its place in the directory.
    at: usize,
    table: DmaBuf,
}

/// What the words of a PASID table entry say about it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum EntryState {
    /// All zero.
    Free,
    /// Present.
    Live,
    /// No longer present, but hardware may still know it.
    Leaving,
}

impl PasidTable {
    fn at(pasid: Pasid) -> (usize, usize) {
        ((pasid.value() >> 6) as usize, (pasid.value() & 0x3F) as usize * PASID_WORDS)
    }

    fn state(&self, word: usize) -> EntryState {
        let entry = PasidEntry(core::array::from_fn(|i| self.table.load(word + i)));
        if entry == PasidEntry::default() {
            EntryState::Free
        } else if entry.is_set(PasidEntry::PRESENT) {
            EntryState::Live
        } else {
            EntryState::Leaving
        }
    }

    fn is_empty(&self) -> bool {
        (0..64).all(|entry| self.state(entry * PASID_WORDS) == EntryState::Free)
    }
}

/// The table side of a unit; see [`iommu::Tables`].
///
/// A device without an entry is blocked: an entry that is not present stops it, whatever it issues.
#[derive(Debug)]
pub struct Tables<B> {
    bus: B,
    root: DmaBuf,
    abilities: Abilities,
    /// Frames that no table uses.
    frames: Vec<DmaBuf, FRAMES>,
    contexts: Vec<ContextTable, CONTEXT_TABLES>,
    devices: Vec<Device, DEVICES>,
    /// Bit n set: domain n is taken.
    domains: u128,
    /// Attachments made so far.
    attached: u64,
    /// The serial number of the attachment that a domain was last given to.
    serials: [u64; DOMAINS as usize],
}

impl<B: Bus> Tables<B> {
    pub(crate) fn new(bus: B, root: DmaBuf, frames: Vec<DmaBuf, FRAMES>, abilities: Abilities) -> Self {
        Self {
            bus,
            root,
            abilities,
            frames,
            contexts: Vec::new(),
            devices: Vec::new(),
            // Domain 0 is what a unit in caching mode tags not-present entries with.
            domains: 1,
            attached: 0,
            serials: [0; DOMAINS as usize],
        }
    }

    /// Returns the number of frames that no table uses.
    pub fn frames_free(&self) -> usize {
        self.frames.len()
    }

    /// Takes a frame, zeroed and known to the unit as zero.
    fn frame(&mut self) -> Result<DmaBuf, Error> {
        let mut frame = self.frames.pop().ok_or(Error::Exhausted { what: "frames for tables" })?;
        frame.clear();
        self.bus.publish(frame.range(0, FRAME_WORDS));
        Ok(frame)
    }

    fn give_back(frames: &mut Vec<DmaBuf, FRAMES>, frame: DmaBuf) {
        // Every frame came from here, so there is room.
        let _ = frames.push(frame);
    }

    /// Returns where the context table of `stream` is, having made it if there was none.
    fn context_table(&mut self, stream: StreamId) -> Result<usize, Error> {
        let (bus, upper) = (stream.0 >> 8, stream.0 & 0x80 != 0);
        if bus > 0xFF {
            return Err(Error::UnknownStream { stream });
        }
        if let Some(at) = self.contexts.iter().position(|c| c.bus == bus && c.upper == upper) {
            return Ok(at);
        }
        if self.contexts.is_full() {
            return Err(Error::Exhausted { what: "context tables" });
        }
        let table = self.frame()?;
        let word = bus as usize * 2 + usize::from(upper);
        let half = RootHalf::new(table.phys());
        self.root.store(word, half.0[0]);
        self.bus.publish(self.root.range(word, 1));
        // There is room: checked above.
        let _ = self.contexts.push(ContextTable { bus, upper, table });
        Ok(self.contexts.len() - 1)
    }

    fn context_word(stream: StreamId) -> usize {
        (stream.0 & 0x7F) as usize * 4
    }

    fn device(&mut self, stream: StreamId) -> Result<&mut Device, Error> {
        self.devices.iter_mut().find(|d| d.stream == stream).ok_or(Error::UnknownStream { stream })
    }

    fn take_domain(&mut self) -> Result<DomainId, Error> {
        let free = self.domains.trailing_ones();
        if free >= self.abilities.domains.min(DOMAINS.into()) {
            return Err(Error::Exhausted { what: "domain numbers" });
        }
        self.domains |= 1 << free;
        Ok(DomainId(free as u16))
    }

    /// Returns the table and word of an attachment's entry.
    fn entry(&mut self, attachment: Attachment) -> Result<(&mut PasidTable, usize), Error> {
        let Attachment { stream, pasid, .. } = attachment;
        let (at, word) = PasidTable::at(number(attachment));
        let table = self.device(stream)?.tables.iter_mut().find(|t| t.at == at);
        Ok((table.ok_or(Error::PasidState { stream, pasid })?, word))
    }

    /// Encodes the entry, refusing what the unit cannot walk.
    fn encode(&self, translation: Translation, domain: DomainId) -> Result<PasidEntry, Error> {
        let capabilities = self.abilities.capabilities;
        let (supported, root, feature) = match translation {
            Translation::Stage1(root) => (capabilities.stage1, root, "ECAP.FSTS"),
            Translation::Stage2(root) => (capabilities.stage2, root, "ECAP.SSTS"),
            _ => return Err(Error::Unsupported { feature: "this translation" }),
        };
        if !supported {
            return Err(Error::Unsupported { feature });
        }
        if root.levels() > capabilities.levels || root.levels() < 4 {
            return Err(Error::Unsupported { feature: "this number of table levels" });
        }
        let snoop = capabilities.coherent_walks;
        Ok(match translation {
            Translation::Stage2(root) => PasidEntry::second_stage(root, domain, snoop),
            _ => PasidEntry::first_stage(root, domain, snoop),
        })
    }
}

impl<B: Bus> iommu::Tables for Tables<B> {
    fn assign(&mut self, stream: StreamId, features: Features) -> Result<Invalidations, Error> {
        let capabilities = self.abilities.capabilities;
        for (wanted, there, feature) in [
            (features.device_tlb, capabilities.device_tlb, "ECAP.DT"),
            (
                features.page_requests,
                capabilities.page_requests && features.device_tlb,
                "ECAP.PRS with PDS and DT",
            ),
            (features.pasid, capabilities.pasid_bits > 0, "ECAP.PASID"),
        ] {
            if wanted && !there {
                return Err(Error::Unsupported { feature });
            }
        }
        if self.device(stream).is_ok() {
            return Err(Error::StreamBusy { stream });
        }
        if self.devices.is_full() {
            return Err(Error::Exhausted { what: "places for devices" });
        }
        let context = self.context_table(stream)?;
        let directory = self.frame()?;
        let entry = ContextEntry::new(directory.phys(), features);
        let word = Self::context_word(stream);
        let table = &mut self.contexts[context].table;
        for i in (0..4).rev() {
            if i == 0 {
                // ORDER: the word with P last, and the others visible before it.
                self.bus.publish(table.range(word + 1, 3));
            }
            table.store(word + i, entry.0[i]);
        }
        self.bus.publish(table.range(word, 1));
        // There is room: checked above.
        let _ = self.devices.push(Device { stream, features, leaving: false, directory, tables: Vec::new() });
        let mut invalidations = Invalidations::new();
        if self.abilities.capabilities.caches_absence {
            let _ = invalidations.push(Invalidation::Device { stream, device_tlb: false });
        }
        Ok(invalidations)
    }

    fn attach(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        translation: Translation,
    ) -> Result<(Attachment, Invalidations), Error> {
        let limit = PASIDS.min(1 << self.abilities.capabilities.pasid_bits.min(20));
        if let Some(pasid) = pasid {
            if pasid.value() == 0 {
                // Entry 0 serves accesses without PASID, and can serve no other.
                return Err(Error::Unsupported { feature: "a PASID 0 of its own" });
            }
            if pasid.value() >= limit {
                return Err(Error::PasidOutOfRange { pasid, limit });
            }
        }
        let device = self.device(stream)?;
        if device.leaving {
            return Err(Error::StreamBusy { stream });
        }
        if pasid.is_some() && !device.features.pasid {
            return Err(Error::PasidState { stream, pasid });
        }
        let device_tlb = device.features.device_tlb;
        let stages = translation.stages();
        let (at, word) = PasidTable::at(pasid.unwrap_or(Pasid::from_low_bits(0)));
        match device.tables.iter().find(|t| t.at == at) {
            Some(table) if table.state(word) != EntryState::Free => {
                return Err(Error::PasidState { stream, pasid });
            }
            Some(_) => {}
            None if device.tables.is_full() => {
                return Err(Error::Exhausted { what: "PASID tables of a device" });
            }
            None => {
                let table = self.frame()?;
                let entry = DirectoryEntry::new(table.phys());
                let device = self.device(stream)?;
                device.directory.store(at, entry.0[0]);
                let published = device.directory.range(at, 1);
                // There is room: checked above.
                let _ = device.tables.push(PasidTable { at, table });
                self.bus.publish(published);
            }
        }
        let domain = self.take_domain()?;
        let entry = match self.encode(translation, domain) {
            Ok(entry) => entry,
            Err(error) => {
                self.domains &= !(1 << domain.0);
                return Err(error);
            }
        };
        self.attached += 1;
        self.serials[usize::from(domain.0)] = self.attached;
        let attachment = Attachment { serial: self.attached, stream, pasid, domain, stages, device_tlb };
        let (table, _) = self.entry(attachment)?;
        for i in 1..PASID_WORDS {
            table.table.store(word + i, entry.0[i]);
        }
        let others = table.table.range(word + 1, PASID_WORDS - 1);
        // ORDER: everything else is visible before the word with P.
        self.bus.publish(others);
        let (table, _) = self.entry(attachment)?;
        table.table.store(word, entry.0[0]);
        let first = table.table.range(word, 1);
        self.bus.publish(first);

        let mut invalidations = Invalidations::new();
        if self.abilities.capabilities.caches_absence {
            // Sources differ about the domain under which absence is cached: the new one, or 0.
            let _ = invalidations.push(Invalidation::All);
        }
        Ok((attachment, invalidations))
    }

    fn detach(&mut self, attachment: Attachment) -> Result<(Leaving, Invalidations), Error> {
        let Attachment { serial, stream, pasid, domain, .. } = attachment;
        let named = self.serials.get(usize::from(domain.0)) == Some(&serial);
        let (table, word) = self.entry(attachment)?;
        let first = table.table.load(word);
        let entry = PasidEntry([first, table.table.load(word + 1), 0, 0, 0, 0, 0, 0]);
        let live = table.state(word) == EntryState::Live;
        if !named || !live || entry.get(PasidEntry::DOMAIN) != domain.0.into() {
            return Err(Error::PasidState { stream, pasid });
        }
        table.table.store(word, entry.with(PasidEntry::PRESENT, 0).0[0]);
        let published = table.table.range(word, 1);
        self.bus.publish(published);
        let mut invalidations = Invalidations::new();
        let _ = invalidations.push(Invalidation::Attachment(attachment));
        Ok((Leaving { stream, what: LeavingPart::Attachment(attachment) }, invalidations))
    }

    fn block(&mut self, stream: StreamId) -> Result<(Leaving, Invalidations), Error> {
        let device = self.device(stream)?;
        if device.leaving {
            return Err(Error::StreamBusy { stream });
        }
        device.leaving = true;
        let device_tlb = device.features.device_tlb;
        let context = self.context_table(stream)?;
        let word = Self::context_word(stream);
        let table = &mut self.contexts[context].table;
        let first = ContextEntry([table.load(word), 0, 0, 0]).with(ContextEntry::PRESENT, 0).0[0];
        table.store(word, first);
        self.bus.publish(table.range(word, 1));
        let mut invalidations = Invalidations::new();
        let _ = invalidations.push(Invalidation::Device { stream, device_tlb });
        Ok((Leaving { stream, what: LeavingPart::Device }, invalidations))
    }

    fn silence(&mut self, _: StreamId) -> Result<Invalidations, Error> {
        Err(Error::Unsupported { feature: "silence of a blocked device" })
    }

    /// Zeroes what left and takes its frames back.
    ///
    /// A device whose attachments did not all leave keeps its frames: hardware may still know them.
    fn finish(&mut self, leaving: Leaving) {
        let Leaving { stream, what } = leaving;
        match what {
            LeavingPart::Attachment(attachment) => {
                let Ok((table, word)) = self.entry(attachment) else { return };
                for i in 0..PASID_WORDS {
                    table.table.store(word + i, 0);
                }
                let published = table.table.range(word, PASID_WORDS);
                self.bus.publish(published);
                self.domains &= !(1 << (attachment.domain.0 % DOMAINS));
            }
            LeavingPart::Device => {
                let empty =
                    |d: &Device| d.stream == stream && d.leaving && d.tables.iter().all(PasidTable::is_empty);
                let Some(at) = self.devices.iter().position(empty) else { return };
                let device = self.devices.swap_remove(at);
                let Ok(context) = self.context_table(stream) else { return };
                let word = Self::context_word(stream);
                let table = &mut self.contexts[context].table;
                for i in 0..4 {
                    table.store(word + i, 0);
                }
                self.bus.publish(table.range(word, 4));
                for table in device.tables {
                    Self::give_back(&mut self.frames, table.table);
                }
                Self::give_back(&mut self.frames, device.directory);
            }
        }
    }
}
