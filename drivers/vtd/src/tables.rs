//! The tables by which the unit finds out how a device is translated, and which device has which.
//!
//! In scalable mode: root, context, PASID directory, PASID table. In legacy mode: root and context.
//!
//! Rules for a table that the unit may be walking: every word of an entry but the one with P, then a barrier, then that
//! one; to remove, P first, then the invalidation, and the rest of the entry only when that has completed. An entry that
//! is present is never changed into another that is.

use crate::{ACK_LIMIT_US, commands::number, regs};
use heapless::Vec;
use iommu::{
    Attachment, Bus, Capabilities, DmaBuf, DomainId, Error, Features, Field, FirstStage, Gpa, Invalidation,
    Invalidations, Leaving, PAGE_SIZE, Pasid, PhysAddr, Root, Stages, StreamId, Translation, Words,
    bus::wait_until, descriptor, unit::LeavingPart,
};
use regs::GLOBAL;

/// Words of a frame, the unit of table memory: 4 KiB.
pub const FRAME_WORDS: usize = 512;
/// Frames that a unit takes for its tables, at most.
pub const FRAMES: usize = 64;
/// Devices assigned at one time, at most.
pub const DEVICES: usize = 16;
/// Context tables, at most: each serves half of a bus, or a bus in legacy mode.
const CONTEXT_TABLES: usize = 8;
/// PASID tables of one device, at most: each holds 64 PASIDs.
const PASID_TABLES: usize = 4;
/// PASID directory entries that a context entry with PDTS = 0 promises, and the PASIDs that they reach.
const DIRECTORY: u32 = 128;
const PASIDS: u32 = DIRECTORY * 64;
/// Domain numbers in use at one time, at most; 0 stays reserved for units in caching mode.
const DOMAINS: u16 = 128;

/// Which tables a unit walks (`RTADDR.TTM`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Mode {
    /// A context entry of 128 bits for each device: second-stage tables or none, no PASIDs, no page requests.
    Legacy,
    /// A context entry of 256 bits for each device, which points at a table of PASIDs (`ECAP.SMTS`).
    Scalable,
}

descriptor! {
    /// A root entry of legacy mode: a pointer to the context table of a bus.
    pub struct LegacyRoot([u64; 2]);
}

impl LegacyRoot {
    const PRESENT: Field<Self> = Field::bit(0);
    const TABLE: Field<Self> = Field::bits(63, 12);

    /// Points at the context table `table`.
    pub fn new(table: PhysAddr) -> Self {
        Self::default().with(Self::PRESENT, 1).with_address(Self::TABLE, table.0)
    }
}

descriptor! {
    /// A context entry of legacy mode.
    pub struct LegacyContext([u64; 2]);
}

impl LegacyContext {
    const PRESENT: Field<Self> = Field::bit(0);
    const TRANSLATION_TYPE: Field<Self> = Field::bits(3, 2);
    const SECOND_STAGE: Field<Self> = Field::bits(63, 12);
    const ADDRESS_WIDTH: Field<Self> = Field::bits(66, 64);
    const DOMAIN: Field<Self> = Field::bits(87, 72);

    /// Refuses everything (P = 0).
    pub fn blocked(domain: DomainId) -> Self {
        Self::default().with(Self::DOMAIN, domain.0.into())
    }

    /// Translates by second-stage tables (TT = 0), and answers device TLBs as well if asked (TT = 1).
    pub fn second_stage(root: Root, domain: DomainId, device_tlb: bool) -> Self {
        Self::blocked(domain)
            .with(Self::PRESENT, 1)
            .with(Self::TRANSLATION_TYPE, device_tlb.into())
            .with(Self::ADDRESS_WIDTH, address_width(root.levels()))
            .with_address(Self::SECOND_STAGE, root.phys().0)
    }

    /// Lets everything through as it is (TT = 2). `levels` are the most that the unit walks.
    pub fn bypass(levels: u8, domain: DomainId) -> Self {
        Self::blocked(domain)
            .with(Self::PRESENT, 1)
            .with(Self::TRANSLATION_TYPE, 2)
            .with(Self::ADDRESS_WIDTH, address_width(levels))
    }
}

/// `AW` of tables of `levels` levels.
const fn address_width(levels: u8) -> u64 {
    levels.saturating_sub(2) as u64 & 0b111
}

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

/// What snoops the CPU's caches, of what goes through a PASID table entry.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Snoop {
    /// Page walks (PWSNP); needs `ECAP.SMPWCS`.
    pub walks: bool,
    /// Accesses, whatever the device says of them (PGSNP); needs `ECAP.SC`.
    pub accesses: bool,
}

impl PasidEntry {
    const PRESENT: Field<Self> = Field::bit(0);
    const ADDRESS_WIDTH: Field<Self> = Field::bits(4, 2);
    const TRANSLATION_TYPE: Field<Self> = Field::bits(8, 6);
    const SECOND_STAGE: Field<Self> = Field::bits(63, 12);
    const DOMAIN: Field<Self> = Field::bits(79, 64);
    const WALK_SNOOP: Field<Self> = Field::bit(87);
    const ACCESS_SNOOP: Field<Self> = Field::bit(88);
    const FIRST_STAGE_MODE: Field<Self> = Field::bits(131, 130);
    const FIRST_STAGE: Field<Self> = Field::bits(191, 140);

    /// Refuses everything (P = 0).
    pub fn blocked(domain: DomainId) -> Self {
        Self::default().with(Self::DOMAIN, domain.0.into())
    }

    /// Translates by first-stage tables (PGTT = 1). Supervisor requests stay refused (SRE = 0).
    ///
    /// AW is ignored for first-stage tables by the manual, but QEMU checks addresses against it.
    pub fn first_stage(root: Root, domain: DomainId, snoop: Snoop) -> Self {
        Self::present(1, root.levels(), domain, snoop).with_first_stage(root.phys().0, root.levels())
    }

    /// Translates by second-stage tables (PGTT = 2).
    pub fn second_stage(root: Root, domain: DomainId, snoop: Snoop) -> Self {
        Self::present(2, root.levels(), domain, snoop).with_address(Self::SECOND_STAGE, root.phys().0)
    }

    /// Translates by first-stage tables of a guest, in which all addresses are the guest's, and those by second-stage tables
    /// (PGTT = 3). Supervisor requests stay refused.
    pub fn nested(first: Gpa, levels: u8, second: Root, domain: DomainId, snoop: Snoop) -> Self {
        Self::present(3, second.levels(), domain, snoop)
            .with_address(Self::SECOND_STAGE, second.phys().0)
            .with_first_stage(first.0, levels)
    }

    /// Lets everything through as it is (PGTT = 4). `levels` are the most that the unit walks.
    ///
    /// AW is not used by the manual of today; older parts, and Linux, have the largest here.
    pub fn bypass(levels: u8, domain: DomainId, snoop: Snoop) -> Self {
        Self::present(4, levels, domain, snoop)
    }

    fn present(translation_type: u64, levels: u8, domain: DomainId, snoop: Snoop) -> Self {
        Self::blocked(domain)
            .with(Self::PRESENT, 1)
            .with(Self::ADDRESS_WIDTH, address_width(levels))
            .with(Self::TRANSLATION_TYPE, translation_type)
            .with(Self::WALK_SNOOP, snoop.walks.into())
            .with(Self::ACCESS_SNOOP, snoop.accesses.into())
    }

    fn with_first_stage(self, root: u64, levels: u8) -> Self {
        self.with(Self::FIRST_STAGE_MODE, u64::from(levels == 5)).with_address(Self::FIRST_STAGE, root)
    }
}

/// P and FPD: in these places of every entry that can be present.
const PRESENT: u64 = 1;
const FAULT_PROCESSING_DISABLE: u64 = 1 << 1;

/// Words of a context entry of legacy mode, of one of scalable mode, and of a PASID table entry.
const LEGACY_WORDS: usize = 2;
const CONTEXT_WORDS: usize = 4;
const PASID_WORDS: usize = 8;

/// What the tables of a unit depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    pub(crate) capabilities: Capabilities,
    pub(crate) mode: Mode,
    /// Domain numbers that the unit has, from `CAP.ND`.
    pub(crate) domains: u32,
    /// Levels of second-stage tables that the unit walks: bit n set, it walks n (`CAP.SAGAW`).
    pub(crate) second_stage_levels: u8,
    /// The unit walks first-stage tables of 5 levels (`CAP.FS5LP`).
    pub(crate) five_levels: bool,
    pub(crate) snoop: Snoop,
}

impl Abilities {
    /// The most levels that the unit walks in second-stage tables.
    fn most_levels(self) -> u8 {
        self.second_stage_levels.checked_ilog2().unwrap_or(0) as u8
    }

    fn walks_first_stage(self, levels: u8) -> bool {
        levels == 4 || levels == 5 && self.five_levels
    }

    fn walks_second_stage(self, levels: u8) -> bool {
        self.second_stage_levels.checked_shr(levels.into()).unwrap_or(0) & 1 != 0
    }
}

/// How what is stored in tables reaches the unit.
#[derive(Clone, Debug)]
pub(crate) struct Publisher<B> {
    pub(crate) bus: B,
    /// The unit looks into the CPU's caches.
    pub(crate) coherent: bool,
    /// Stores stay in a buffer before memory until it is flushed (`CAP.RWBF`).
    pub(crate) write_buffer: bool,
}

impl<B: Bus> Publisher<B> {
    /// Makes `count` words of `table` from `at` visible to the unit, before any later store.
    pub(crate) fn publish(&self, table: &DmaBuf, at: usize, count: usize) {
        let range = table.range(at, count);
        if self.coherent {
            self.bus.order(range);
        } else {
            self.bus.publish(range);
        }
    }

    /// Has the write buffer flushed, if there is one, and waits.
    ///
    /// An invalidation flushes it as well. Beside this only a queue that is given up writes `GCMD`, once: on a unit with a
    /// write buffer, tables do not change while [`recover`](iommu::Commands::recover) is under way.
    pub(crate) fn flush_write_buffer(&self) -> Result<(), Error> {
        if !self.write_buffer {
            return Ok(());
        }
        let idle = || !regs::GSTS.read(&self.bus).is_set(GLOBAL::WBF);
        wait_until(&self.bus, "GSTS.WBFS", ACK_LIMIT_US, idle)?;
        let kept = regs::GSTS.read(&self.bus).get() & !regs::ONE_SHOT;
        regs::GCMD.set(&self.bus, kept | GLOBAL::WBF::SET.value);
        wait_until(&self.bus, "GSTS.WBFS", ACK_LIMIT_US, idle)
    }

    /// The entry that starts at word `at` of `table`.
    fn place<'t>(&'t self, table: &'t mut DmaBuf, at: usize) -> Place<'t, B> {
        Place { publisher: self, table, at }
    }
}

/// An entry of a table that the unit may be walking.
struct Place<'t, B> {
    publisher: &'t Publisher<B>,
    table: &'t mut DmaBuf,
    /// The entry's first word.
    at: usize,
}

impl<B: Bus> Place<'_, B> {
    fn load(&self, word: usize) -> u64 {
        self.table.load(self.at + word)
    }

    /// Stores an entry where nothing is present, its first word last.
    fn enter(self, entry: &[u64]) {
        let Self { publisher, table, at } = self;
        for (i, &word) in entry.iter().enumerate().skip(1) {
            table.store(at + i, word);
        }
        // ORDER: everything else is visible before the word with P.
        publisher.publish(table, at + 1, entry.len().saturating_sub(1));
        publisher.place(table, at).change_first(|_| entry.first().copied().unwrap_or(0));
    }

    /// Changes the first word, in one store.
    fn change_first(&mut self, change: impl FnOnce(u64) -> u64) {
        self.table.store(self.at, change(self.table.load(self.at)));
        self.publisher.publish(self.table, self.at, 1);
        // What the flush is for has been stored, and cannot be taken back: the unit may know it. Without an answer the next
        // entry fails before it has stored anything. Until then the unit sees nothing where there is something new; what is
        // gone is gone when its invalidation has completed, which flushes too.
        let _ = self.publisher.flush_write_buffer();
    }

    /// Zeroes the words from `first` to `words` of an entry that is not present, and that the unit has forgotten.
    fn clear(&mut self, first: usize, words: usize) {
        for word in first..words {
            self.table.store(self.at + word, 0);
        }
        self.publisher.publish(self.table, self.at + first, words - first);
    }
}

/// A bus, or half of one in scalable mode.
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
    /// In legacy mode there is none: the context entry is all that a device has.
    directory: Option<DmaBuf>,
    tables: Vec<PasidTable, PASID_TABLES>,
}

#[derive(Debug)]
struct PasidTable {
    /// Its place in the directory.
    at: usize,
    table: DmaBuf,
}

impl PasidTable {
    /// Returns which table of a directory has the entry of `pasid`, and its first word there.
    fn at(pasid: Pasid) -> (usize, usize) {
        ((pasid.value() >> 6) as usize, (pasid.value() & 0x3F) as usize * PASID_WORDS)
    }

    fn is_empty(&self) -> bool {
        (0..FRAME_WORDS).all(|word| self.table.load(word) == 0)
    }
}

/// The table side of a unit; see [`iommu::Tables`].
///
/// A device without an entry is blocked: an entry that is not present stops it, whatever it issues. An entry that is taken
/// has a domain number, which is never 0, present or not.
#[derive(Debug)]
pub struct Tables<B> {
    publisher: Publisher<B>,
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
    /// The serial number of the attachment that has a domain; 0 where there is none, or it is leaving.
    serials: [u64; DOMAINS as usize],
}

impl<B: Bus> Tables<B> {
    pub(crate) fn new(
        publisher: Publisher<B>,
        root: DmaBuf,
        frames: Vec<DmaBuf, FRAMES>,
        abilities: Abilities,
    ) -> Self {
        Self {
            publisher,
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

    /// Returns which tables the unit walks.
    pub fn mode(&self) -> Mode {
        self.abilities.mode
    }

    /// Checks that there are `count` frames, so that what takes them fails before it has changed anything.
    fn demand_frames(&self, count: usize) -> Result<(), Error> {
        if self.frames.len() < count {
            return Err(Error::Exhausted { what: "frames for tables" });
        }
        Ok(())
    }

    /// Takes a frame, zeroed and known to the unit as zero.
    fn frame(&mut self) -> Result<DmaBuf, Error> {
        let mut frame = self.frames.pop().ok_or(Error::Exhausted { what: "frames for tables" })?;
        frame.clear();
        self.publisher.publish(&frame, 0, FRAME_WORDS);
        Ok(frame)
    }

    fn give_back(frames: &mut Vec<DmaBuf, FRAMES>, frame: DmaBuf) {
        // Every frame came from here, so there is room.
        let _ = frames.push(frame);
    }

    /// Returns where the context table of `stream` is, if there is one.
    fn context_table(&self, stream: StreamId) -> Option<usize> {
        let (bus, upper) = self.context_place(stream);
        self.contexts.iter().position(|c| c.bus == bus && c.upper == upper)
    }

    /// Returns bus and half of `stream`.
    fn context_place(&self, stream: StreamId) -> (u32, bool) {
        (stream.0 >> 8, self.abilities.mode == Mode::Scalable && stream.0 & 0x80 != 0)
    }

    fn context_word(&self, stream: StreamId) -> usize {
        match self.abilities.mode {
            Mode::Legacy => (stream.0 & 0xFF) as usize * LEGACY_WORDS,
            Mode::Scalable => (stream.0 & 0x7F) as usize * CONTEXT_WORDS,
        }
    }

    /// Makes a context table for `stream`, where there is none.
    fn add_context_table(&mut self, stream: StreamId) -> Result<(), Error> {
        let (bus, upper) = self.context_place(stream);
        let table = self.frame()?;
        // The second word of a root entry is zero in legacy mode, and the other half's in scalable mode.
        let [first, ..] = match self.abilities.mode {
            Mode::Legacy => LegacyRoot::new(table.phys()).0,
            Mode::Scalable => [RootHalf::new(table.phys()).0[0], 0],
        };
        self.publisher.place(&mut self.root, bus as usize * 2 + usize::from(upper)).enter(&[first]);
        self.contexts
            .push(ContextTable { bus, upper, table })
            .map_err(|_| Error::Exhausted { what: "context tables" })
    }

    /// Returns the context entry of `stream`.
    fn context_entry(&mut self, stream: StreamId) -> Result<Place<'_, B>, Error> {
        let word = self.context_word(stream);
        let at = self.context_table(stream).ok_or(Error::UnknownStream { stream })?;
        let context = self.contexts.get_mut(at).ok_or(Error::UnknownStream { stream })?;
        Ok(self.publisher.place(&mut context.table, word))
    }

    fn device(&mut self, stream: StreamId) -> Result<&mut Device, Error> {
        self.devices.iter_mut().find(|d| d.stream == stream).ok_or(Error::UnknownStream { stream })
    }

    /// Returns the entry that an attachment has or is to have; `None` if its table is not there yet.
    fn entry(&mut self, stream: StreamId, pasid: Pasid) -> Result<Option<Place<'_, B>>, Error> {
        if self.abilities.mode == Mode::Legacy {
            self.device(stream)?;
            return self.context_entry(stream).map(Some);
        }
        let (at, word) = PasidTable::at(pasid);
        let device = self.devices.iter_mut().find(|d| d.stream == stream);
        let tables = &mut device.ok_or(Error::UnknownStream { stream })?.tables;
        let table = tables.iter_mut().find(|t| t.at == at);
        Ok(table.map(|table| self.publisher.place(&mut table.table, word)))
    }

    /// Returns the entry of `attachment`, if it still has one.
    fn entry_of(&mut self, attachment: Attachment) -> Result<Place<'_, B>, Error> {
        let Attachment { stream, pasid, domain, .. } = attachment;
        let mode = self.abilities.mode;
        let place = self.entry(stream, number(attachment))?.ok_or(Error::PasidState { stream, pasid })?;
        if domain.0 == 0 || domain_of(mode, place.load(1)) != domain.0 {
            return Err(Error::PasidState { stream, pasid });
        }
        Ok(place)
    }

    /// Makes the PASID table that has entry `pasid` of `stream`.
    fn add_pasid_table(&mut self, stream: StreamId, pasid: Pasid) -> Result<(), Error> {
        let table = self.frame()?;
        let (at, _) = PasidTable::at(pasid);
        let device = self.devices.iter_mut().find(|d| d.stream == stream);
        let device = device.ok_or(Error::UnknownStream { stream })?;
        let directory = device.directory.as_mut().ok_or(Error::UnknownStream { stream })?;
        self.publisher.place(directory, at).enter(&DirectoryEntry::new(table.phys()).0);
        // There is room: `attach` has looked.
        device
            .tables
            .push(PasidTable { at, table })
            .map_err(|_| Error::Exhausted { what: "PASID tables of a device" })
    }

    /// Returns a domain number that nobody has.
    fn free_domain(&self) -> Result<DomainId, Error> {
        let free = self.domains.trailing_ones();
        if free >= self.abilities.domains.min(DOMAINS.into()) {
            return Err(Error::Exhausted { what: "domain numbers" });
        }
        Ok(DomainId(free as u16))
    }

    /// Checks that the unit can walk the tables of `translation`; the error names what it lacks.
    fn check(&self, translation: Translation, features: Features) -> Result<(), Error> {
        let (abilities, capabilities) = (self.abilities, self.abilities.capabilities);
        let (there, first, second) = match translation {
            Translation::Blocked => return Ok(()),
            Translation::Bypass(_) => {
                // TT = 2 has no form that answers device TLBs.
                let refused = abilities.mode == Mode::Legacy && features.device_tlb;
                if capabilities.bypass && refused {
                    return Err(Error::Unsupported {
                        feature: "pass-through with a device TLB in legacy mode",
                    });
                }
                ((capabilities.bypass, "ECAP.PT"), None, None)
            }
            Translation::Stage1(root) => ((capabilities.stage1, "ECAP.FSTS"), Some(root.levels()), None),
            Translation::Stage2(root) => ((capabilities.stage2, "ECAP.SSTS"), None, Some(root.levels())),
            Translation::Nested { first: FirstStage::Pages { root, levels }, second } => {
                if capabilities.nested && !root.0.is_multiple_of(PAGE_SIZE) {
                    return Err(Error::Unsupported { feature: "tables off a page boundary" });
                }
                ((capabilities.nested, "ECAP.NEST"), Some(levels), Some(second.levels()))
            }
            Translation::Nested { .. } => ((false, "PASID tables at a guest's addresses"), None, None),
            _ => ((false, "this translation"), None, None),
        };
        let (supported, feature) = there;
        if !supported {
            return Err(Error::Unsupported { feature });
        }
        let walks = first.is_none_or(|levels| abilities.walks_first_stage(levels))
            && second.is_none_or(|levels| abilities.walks_second_stage(levels));
        if !walks {
            return Err(Error::Unsupported { feature: "this number of table levels" });
        }
        Ok(())
    }

    /// Encodes an entry of a translation that was checked.
    fn encode(&self, translation: Translation, domain: DomainId, features: Features) -> Entry {
        let Abilities { mode, snoop, .. } = self.abilities;
        let most = self.abilities.most_levels();
        match mode {
            Mode::Legacy => Entry::Context(match translation {
                Translation::Stage2(root) => LegacyContext::second_stage(root, domain, features.device_tlb),
                Translation::Bypass(_) => LegacyContext::bypass(most, domain),
                _ => LegacyContext::blocked(domain),
            }),
            Mode::Scalable => Entry::Pasid(match translation {
                Translation::Stage1(root) => PasidEntry::first_stage(root, domain, snoop),
                Translation::Stage2(root) => PasidEntry::second_stage(root, domain, snoop),
                Translation::Nested { first: FirstStage::Pages { root, levels }, second } => {
                    PasidEntry::nested(root, levels, second, domain, snoop)
                }
                Translation::Bypass(_) => PasidEntry::bypass(most, domain, snoop),
                _ => PasidEntry::blocked(domain),
            }),
        }
    }
}

/// What says how an attachment is translated.
enum Entry {
    Context(LegacyContext),
    Pasid(PasidEntry),
}

impl Entry {
    fn words(&self) -> &[u64] {
        match self {
            Self::Context(entry) => &entry.0,
            Self::Pasid(entry) => &entry.0,
        }
    }
}

/// Returns the domain in the second word of an attachment's entry.
fn domain_of(mode: Mode, second: u64) -> u16 {
    match mode {
        Mode::Legacy => LegacyContext([0, second]).get(LegacyContext::DOMAIN) as u16,
        Mode::Scalable => PasidEntry([0, second, 0, 0, 0, 0, 0, 0]).get(PasidEntry::DOMAIN) as u16,
    }
}

impl<B: Bus> iommu::Tables for Tables<B> {
    fn assign(&mut self, stream: StreamId, features: Features) -> Result<Invalidations, Error> {
        let Abilities { capabilities, mode, .. } = self.abilities;
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
        if stream.0 > 0xFFFF {
            return Err(Error::UnknownStream { stream });
        }
        let has_table = self.context_table(stream).is_some();
        if !has_table && self.contexts.is_full() {
            return Err(Error::Exhausted { what: "context tables" });
        }
        self.demand_frames(usize::from(!has_table) + usize::from(mode == Mode::Scalable))?;
        self.publisher.flush_write_buffer()?;

        // From here on nothing fails: everything was looked at.
        if !has_table {
            self.add_context_table(stream)?;
        }
        let directory = match mode {
            Mode::Legacy => None,
            Mode::Scalable => {
                let directory = self.frame()?;
                let entry = ContextEntry::new(directory.phys(), features);
                self.context_entry(stream)?.enter(&entry.0);
                Some(directory)
            }
        };
        let _ = self.devices.push(Device { stream, features, leaving: false, directory, tables: Vec::new() });
        let mut invalidations = Invalidations::new();
        if capabilities.caches_absence {
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
        let capabilities = self.abilities.capabilities;
        let limit = PASIDS.min(1 << capabilities.pasid_bits.min(20));
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
        let features = device.features;
        if pasid.is_some() && !features.pasid {
            return Err(Error::PasidState { stream, pasid });
        }
        let no_more_tables = device.tables.is_full();
        let index = pasid.unwrap_or(Pasid::from_low_bits(0));
        // The second word of an entry has its domain.
        let taken = self.entry(stream, index)?.map(|place| place.load(1) != 0);
        match taken {
            Some(true) => return Err(Error::PasidState { stream, pasid }),
            Some(false) => {}
            None if no_more_tables => return Err(Error::Exhausted { what: "PASID tables of a device" }),
            None => self.demand_frames(1)?,
        }
        self.check(translation, features)?;
        let domain = self.free_domain()?;
        self.publisher.flush_write_buffer()?;

        // From here on nothing fails: everything was looked at.
        if taken.is_none() {
            self.add_pasid_table(stream, index)?;
        }
        let entry = self.encode(translation, domain, features);
        self.entry(stream, index)?.ok_or(Error::PasidState { stream, pasid })?.enter(entry.words());
        self.domains |= 1 << domain.0;
        self.attached += 1;
        self.serials[usize::from(domain.0)] = self.attached;
        let (stages, device_tlb) = (translation.stages(), features.device_tlb);
        let attachment = Attachment { serial: self.attached, stream, pasid, domain, stages, device_tlb };
        let mut invalidations = Invalidations::new();
        if capabilities.caches_absence {
            // Sources differ about the domain under which absence is cached: the new one, or 0.
            let _ = invalidations.push(Invalidation::All);
        }
        Ok((attachment, invalidations))
    }

    fn detach(&mut self, attachment: Attachment) -> Result<(Leaving, Invalidations), Error> {
        let Attachment { serial, stream, pasid, domain, .. } = attachment;
        if serial == 0 || self.serials.get(usize::from(domain.0)) != Some(&serial) {
            return Err(Error::PasidState { stream, pasid });
        }
        self.entry_of(attachment)?.change_first(|first| first & !PRESENT);
        if let Some(serial) = self.serials.get_mut(usize::from(domain.0)) {
            *serial = 0;
        }
        let mut invalidations = Invalidations::new();
        if self.abilities.mode == Mode::Scalable && attachment.stages == Stages::None {
            // A bypass. QEMU's unit looks at the entry of a PASID whose accesses get past translation only when the context
            // is forgotten, and lets them through until then.
            let _ = invalidations.push(Invalidation::Device { stream, device_tlb: false });
        }
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
        self.context_entry(stream)?.change_first(|first| first & !PRESENT);
        let mut invalidations = Invalidations::new();
        let _ = invalidations.push(Invalidation::Device { stream, device_tlb });
        Ok((Leaving { stream, what: LeavingPart::Device }, invalidations))
    }

    /// Sets FPD in the context entry. A unit in caching mode may remember it until it is told otherwise, which the next
    /// assignment does.
    fn silence(&mut self, stream: StreamId) -> Result<Invalidations, Error> {
        if !self.device(stream)?.leaving {
            return Err(Error::StreamBusy { stream });
        }
        self.context_entry(stream)?.change_first(|first| first | FAULT_PROCESSING_DISABLE);
        let mut invalidations = Invalidations::new();
        if self.abilities.capabilities.caches_absence {
            let _ = invalidations.push(Invalidation::Device { stream, device_tlb: false });
        }
        Ok(invalidations)
    }

    /// Zeroes what left and takes its frames back.
    ///
    /// A device whose attachments did not all leave keeps its frames: hardware may still know them.
    fn finish(&mut self, leaving: Leaving) {
        let Leaving { stream, what } = leaving;
        let mode = self.abilities.mode;
        match what {
            LeavingPart::Attachment(attachment) => {
                // Its serial number ended when it was detached; one that is still there is somebody else's.
                if self.serials.get(usize::from(attachment.domain.0)) != Some(&0) {
                    return;
                }
                let Ok(mut place) = self.entry_of(attachment) else { return };
                match mode {
                    // What is left of the first word may be FPD of a device that is blocked.
                    Mode::Legacy => {
                        place.change_first(|first| first & FAULT_PROCESSING_DISABLE);
                        place.clear(1, LEGACY_WORDS);
                    }
                    Mode::Scalable => place.clear(0, PASID_WORDS),
                }
                self.domains &= !(1 << (attachment.domain.0 % DOMAINS));
            }
            LeavingPart::Device => {
                let words = if mode == Mode::Legacy { LEGACY_WORDS } else { CONTEXT_WORDS };
                let Some(at) = self.devices.iter().position(|d| d.stream == stream && d.leaving) else {
                    return;
                };
                let empty = self.devices.get(at).is_some_and(|d| d.tables.iter().all(PasidTable::is_empty));
                let Ok(mut place) = self.context_entry(stream) else { return };
                let attached = mode == Mode::Legacy && place.load(1) != 0;
                if !empty || attached {
                    return;
                }
                place.clear(0, words);
                let Device { directory, tables, .. } = self.devices.swap_remove(at);
                for table in tables.into_iter().map(|table| table.table).chain(directory) {
                    Self::give_back(&mut self.frames, table);
                }
            }
        }
    }
}
