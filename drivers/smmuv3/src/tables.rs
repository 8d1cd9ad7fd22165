//! Stream table entries (STE), and which device has which.
//!
//! The unit may read any word of a stream table entry at any time, one by one and in any order, and keep what it read
//! until it is told to forget the entry. So an entry must be harmless in every mixture of its old words with its new ones:
//!
//! - When a device is assigned, all that does not depend on its tables is written, while V is clear.
//! - A context descriptor is written before the entry points at it; one in a table that the entry leads to already changes
//!   by the rules of [`contexts`](crate::contexts). The entry then changes in one word, that with V, Config and the pointer.
//! - The second stage needs a second word, for its root. Whenever V is clear or in doubt, that word points at a table that
//!   is always empty.
//!
//! What cannot be done by one change of that kind is done by [`Tables::replace`], in several.

use crate::{
    contexts::{ContextDescriptor, ContextTable, ContextTables, Place, Shape},
    guest::{self, Choice, Limits},
    streams::{STREAM_WORDS, StreamTable},
    update,
};
use heapless::Vec;
use iommu::{
    Attachment, Bus, Capabilities, DomainId, Error, Features, Field, FirstStage, Gpa, Invalidation,
    Invalidations, Leaving, Pasid, PhysAddr, Root, Stages, StreamId, Translation, Words, descriptor,
    unit::LeavingPart,
};

/// Words of a frame: 4 KiB.
pub const FRAME_WORDS: usize = 512;
/// Devices assigned at one time, at most: a frame holds as many context descriptors.
pub const DEVICES: usize = FRAME_WORDS / crate::contexts::CONTEXT_WORDS;
/// PASIDs of all devices together that are attached at one time, at most.
pub const PASIDS: usize = 128;

/// What the unit is told about tables besides their address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Walks {
    /// The unit's own accesses are coherent (`IDR0.COHACC`): they are write-back and inner shareable, else not cached.
    pub coherent: bool,
    /// Physical addresses, as `IDR5.OAS` encodes their size; at most 48 bits (5) with pages of 4 KiB.
    pub address_size: u8,
}

impl Walks {
    /// Write-back with allocation, or not cached: the same in all fields of STE and CD.
    pub(crate) fn cacheability(self) -> u64 {
        self.coherent.into()
    }

    /// Inner shareable, or not.
    pub(crate) fn shareability(self) -> u64 {
        if self.coherent { 0b11 } else { 0b00 }
    }

    /// Returns the bits of a physical address.
    fn address_bits(self) -> u8 {
        match self.address_size {
            0 => 32,
            1 => 36,
            2 => 40,
            3 => 42,
            4 => 44,
            _ => 48,
        }
    }

    /// Returns the bits of an address that second-stage tables of `levels` levels take: 4 levels as many as a physical
    /// address has, which are 44 at least; 3 levels 39, or fewer where a physical address has fewer. The top table is one
    /// whole frame, whatever part of it is in use; none lie side by side.
    pub fn second_stage_bits(self, levels: u8) -> Option<u8> {
        match (levels, self.address_bits()) {
            (4, bits) if bits >= 44 => Some(bits),
            (3, bits) => Some(bits.min(39)),
            _ => None,
        }
    }

    /// The levels of second-stage tables that an entry is prepared for.
    fn levels(self) -> u8 {
        if self.second_stage_bits(4).is_some() { 4 } else { 3 }
    }
}

descriptor! {
    /// A stream table entry (STE).
    pub struct StreamEntry([u64; 8]);
}

impl StreamEntry {
    pub(crate) const VALID: Field<Self> = Field::bit(0);
    pub(crate) const CONFIG: Field<Self> = Field::bits(3, 1);
    pub(crate) const CONTEXT_FORMAT: Field<Self> = Field::bits(5, 4);
    pub(crate) const CONTEXT: Field<Self> = Field::bits(55, 6);
    pub(crate) const CONTEXTS_LOG2: Field<Self> = Field::bits(63, 59);
    pub(crate) const DEFAULT_SUBSTREAM: Field<Self> = Field::bits(65, 64);
    pub(crate) const CONTEXT_INNER: Field<Self> = Field::bits(67, 66);
    pub(crate) const CONTEXT_OUTER: Field<Self> = Field::bits(69, 68);
    pub(crate) const CONTEXT_SHARE: Field<Self> = Field::bits(71, 70);
    const PASID_IN_ANSWERS: Field<Self> = Field::bit(82);
    const MERGE: Field<Self> = Field::bit(83);
    const FORCED_WRITE_BACK: Field<Self> = Field::bit(89);
    pub(crate) const NEVER_STALL: Field<Self> = Field::bit(91);
    pub(crate) const DEVICE_TLB: Field<Self> = Field::bits(93, 92);
    const SHARE_OVERRIDE: Field<Self> = Field::bits(109, 108);
    const VMID: Field<Self> = Field::bits(143, 128);
    const INPUT_SIZE: Field<Self> = Field::bits(165, 160);
    const START_LEVEL: Field<Self> = Field::bits(167, 166);
    const WALK_INNER: Field<Self> = Field::bits(169, 168);
    const WALK_OUTER: Field<Self> = Field::bits(171, 170);
    const WALK_SHARE: Field<Self> = Field::bits(173, 172);
    const OUTPUT_SIZE: Field<Self> = Field::bits(178, 176);
    const AARCH64: Field<Self> = Field::bit(179);
    const PROTECTED_WALK: Field<Self> = Field::bit(182);
    const STALL: Field<Self> = Field::bit(185);
    const RECORD: Field<Self> = Field::bit(186);
    pub(crate) const ROOT: Field<Self> = Field::bits(247, 196);

    /// What a device has without being translated: not valid. Accesses with PASID stay refused (S1CDMax = 0).
    pub fn blocked(device_tlb: bool, walks: Walks) -> Self {
        Self::default()
            .with(Self::CONTEXT_INNER, walks.cacheability())
            .with(Self::CONTEXT_OUTER, walks.cacheability())
            .with(Self::CONTEXT_SHARE, walks.shareability())
            .with(Self::DEVICE_TLB, device_tlb.into())
            .with(Self::SHARE_OVERRIDE, 1) // 1: none
    }

    /// Adds what the second stage of a unit that has one needs, with the root `empty`. Translations of the first stage are
    /// cached under `vmid`, too.
    ///
    /// Tables have 4 levels of 4 KiB, or 3 where physical addresses are too small for 4 (see
    /// [`Walks::second_stage_bits`]). Faults are recorded (S2R). What a guest's first stage reaches of devices is no place
    /// for its tables (S2PTW).
    pub fn with_second_stage(self, vmid: u16, walks: Walks, empty: PhysAddr) -> Self {
        self.with(Self::VMID, vmid.into())
            .with_levels(walks.levels(), walks)
            .with(Self::WALK_INNER, walks.cacheability())
            .with(Self::WALK_OUTER, walks.cacheability())
            .with(Self::WALK_SHARE, walks.shareability())
            .with(Self::OUTPUT_SIZE, u64::from(walks.address_size) & 0b111)
            .with(Self::AARCH64, 1)
            .with(Self::PROTECTED_WALK, 1)
            .with(Self::RECORD, 1)
            .with_address(Self::ROOT, empty.0)
    }

    fn with_levels(self, levels: u8, walks: Walks) -> Self {
        let bits = walks.second_stage_bits(levels).unwrap_or(32);
        // 1: level 1, 2: level 0.
        let start = if levels == 4 { 2 } else { 1 };
        self.with(Self::INPUT_SIZE, 64 - u64::from(bits)).with(Self::START_LEVEL, start)
    }

    /// Has the answers that the unit gives by itself, to page requests for which its queue has no room, carry the PASID of
    /// the request (PPAR): a device that is used with PASIDs expects it there. Reserved where the unit knows no PASIDs or no
    /// page requests.
    pub fn answering_with_pasid(self) -> Self {
        self.with(Self::PASID_IN_ANSWERS, 1)
    }

    /// Has second-stage tables in the format of `S2FWB`, which decide alone how memory is cached.
    pub fn with_forced_write_back(self) -> Self {
        self.with(Self::FORCED_WRITE_BACK, 1)
    }

    /// Never has accesses wait that meet a fault, whatever context descriptors say (S1STALLD).
    pub fn never_stalling(self) -> Self {
        self.with(Self::NEVER_STALL, 1)
    }

    /// Has accesses wait that meet a fault of the second stage (S2S); those of the first are its descriptors' to say.
    pub fn stalling(self) -> Self {
        self.with(Self::STALL, 1)
    }

    /// Refuses everything without a record (Config = abort).
    pub fn silent(self) -> Self {
        self.with(Self::VALID, 1).with(Self::CONFIG, 0b000)
    }

    /// Lets everything through as it is.
    pub fn bypass(self) -> Self {
        self.with(Self::VALID, 1).with(Self::CONFIG, 0b100)
    }

    /// Translates by the first stage of the context descriptor at `context`.
    pub fn first_stage(self, context: PhysAddr) -> Self {
        self.with(Self::VALID, 1).with(Self::CONFIG, 0b101).with_address(Self::CONTEXT, context.0)
    }

    /// Translates by the first stage of the context descriptors in `table`, one for each PASID. Accesses without PASID have
    /// the first descriptor (S1DSS = 2), or with `bypass` none, and go through as they are (S1DSS = 1).
    pub fn contexts(self, table: ContextTable, bypass: bool) -> Self {
        self.first_stage(PhysAddr(table.at))
            .with(Self::CONTEXTS_LOG2, table.log2.into())
            .with(Self::CONTEXT_FORMAT, table.two_levels.into())
            .with(Self::DEFAULT_SUBSTREAM, if bypass { 1 } else { 2 })
    }

    /// Translates by the second stage with the tables at `root`.
    pub fn second_stage(self, root: PhysAddr) -> Self {
        self.with(Self::VALID, 1).with(Self::CONFIG, 0b110).with_address(Self::ROOT, root.0)
    }

    /// Puts the second stage with the tables at `root` behind a first stage, whose context descriptors lie at an address of
    /// the guest's. Events that are alike may be merged (MEV): they are of a guest's making.
    pub fn nested(self, root: PhysAddr) -> Self {
        self.second_stage(root).with(Self::CONFIG, 0b111).with(Self::MERGE, 1)
    }

    /// Takes over what a guest says of its first stage: `choice` has the guest's fields and no others.
    fn guest(self, choice: StreamEntry) -> Self {
        let mut entry = self;
        for field in [
            Self::CONTEXT_FORMAT,
            Self::CONTEXTS_LOG2,
            Self::DEFAULT_SUBSTREAM,
            Self::CONTEXT_INNER,
            Self::CONTEXT_OUTER,
            Self::CONTEXT_SHARE,
            Self::DEVICE_TLB,
        ] {
            entry = entry.with(field, choice.get(field));
        }
        let never_stall = self.get(Self::NEVER_STALL) | choice.get(Self::NEVER_STALL);
        entry.with(Self::NEVER_STALL, never_stall).with_address(Self::CONTEXT, choice.address(Self::CONTEXT))
    }

    /// Whether it leads to a table of context descriptors that the driver made.
    fn has_contexts(&self) -> bool {
        self.is_set(Self::VALID) && self.get(Self::CONFIG) == 0b101 && self.get(Self::CONTEXTS_LOG2) != 0
    }
}

/// What the tables of a unit depend on.
#[derive(Clone, Debug)]
pub(crate) struct Abilities {
    pub(crate) capabilities: Capabilities,
    pub(crate) walks: Walks,
    /// `IDR0.S2P`: there is a second stage, whether it can be used or not, and there are VMIDs.
    pub(crate) vmid: bool,
    /// `IDR0.ASID16`: an ASID has 16 bits, else 8.
    pub(crate) wide_asid: bool,
    /// Streams that the unit can tell apart, from `IDR1.SIDSIZE`.
    pub(crate) streams: u64,
    /// Which tables of context descriptors it has.
    pub(crate) shape: Shape,
    /// Faults stall as each stream is configured (`IDR0.STALL_MODEL` = 0).
    pub(crate) stall_choice: bool,
    /// Whose faults stall, if that can be chosen.
    pub(crate) stalling: Vec<StreamId, { crate::STALLING }>,
    /// Second-stage tables are in the format of `S2FWB`.
    pub(crate) forced_write_back: bool,
}

#[derive(Debug)]
struct Device {
    stream: StreamId,
    features: Features,
    /// Blocked for good, and waiting for `finish`.
    leaving: bool,
    /// What it tries is not recorded.
    silent: bool,
    /// Accesses without PASID; of a guest's first stage also the one PASID that it may be for.
    plain: State,
}

/// Whether there is an attachment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// There is none, and the unit knows.
    Blocked,
    /// There is.
    Attached(Attachment),
    /// No longer, but the unit may still know what it said.
    Leaving(Attachment),
}

impl State {
    /// Returns the attachment, even if it is leaving.
    fn attachment(self) -> Option<Attachment> {
        match self {
            Self::Blocked => None,
            Self::Attached(attachment) | Self::Leaving(attachment) => Some(attachment),
        }
    }
}

/// The memory of the tables.
#[derive(Debug)]
pub(crate) struct Frames {
    pub(crate) streams: StreamTable,
    pub(crate) contexts: ContextTables,
    pub(crate) empty: iommu::DmaBuf,
}

/// What a translation comes to: the entry, and the context descriptor that the driver makes for it, if it makes one.
#[derive(Clone, Copy, Debug)]
struct Goal {
    entry: StreamEntry,
    context: Option<(Place, ContextDescriptor)>,
}

/// A replacement of one translation by another that is under way; see [`Tables::replace`].
///
/// If it is dropped half-way, the attachment is translated as before, as after, or not at all, until it is detached.
#[derive(Debug)]
#[must_use = "nothing is replaced before `step` says that there is nothing more to do"]
pub struct Replacement {
    before: Attachment,
    after: Attachment,
    /// Of a PASID the entry stays as it is.
    entry: Option<StreamEntry>,
    /// The context descriptor to write, and the one to take out of use.
    context: Option<(Place, ContextDescriptor)>,
    old: Option<Place>,
    /// All stores are done, and what they ask for was told.
    done: bool,
}

impl Replacement {
    /// Returns the attachment that is there from now on; the one before names nothing any more.
    pub fn attachment(&self) -> Attachment {
        self.after
    }
}

/// The table side of a unit; see [`iommu::Tables`].
///
/// A device that is not attached is blocked, and what it tries is recorded: its entry is not valid. (Config = 0 would block
/// it in silence.)
///
/// What `assign` asks for must have completed before `attach`.
///
/// Numbers: the place of a device, below [`DEVICES`], is its VMID. Its own domain number is the same; that of its n-th PASID
/// has n above those bits, and is an ASID. So no two attachments share an ASID, and those of a device share its VMID.
#[derive(Debug)]
pub struct Tables<B> {
    bus: B,
    frames: Frames,
    abilities: Abilities,
    /// The place of a device is its domain number, and that of its context descriptor.
    devices: Vec<Option<Device>, DEVICES>,
    /// PASIDs; the number of a place, plus one, is the upper part of its domain number.
    pasids: Vec<State, PASIDS>,
    /// Attachments made so far.
    attached: u64,
}

/// Bits of a domain number that are the device's place, and its VMID.
const VMID_BITS: u32 = DEVICES.ilog2();

/// Returns the VMID under which translations of `domain` are cached.
pub(crate) const fn vmid(domain: DomainId) -> u16 {
    domain.0 & (DEVICES as u16 - 1)
}

impl<B: Bus> Tables<B> {
    pub(crate) fn new(bus: B, frames: Frames, abilities: Abilities) -> Self {
        let devices = core::iter::repeat_with(|| None).take(DEVICES).collect();
        let pasids = core::iter::repeat_n(State::Blocked, PASIDS).collect();
        Self { bus, frames, abilities, devices, pasids, attached: 0 }
    }

    fn device(&mut self, stream: StreamId) -> Result<(usize, &mut Device), Error> {
        let places = self.devices.iter_mut().enumerate();
        let mut devices = places.filter_map(|(at, place)| Some((at, place.as_mut()?)));
        devices.find(|(_, device)| device.stream == stream).ok_or(Error::UnknownStream { stream })
    }

    /// Returns the bits of an address that second-stage tables of `levels` levels take, if the unit takes such tables.
    pub fn second_stage_bits(&self, levels: u8) -> Option<u8> {
        self.abilities.walks.second_stage_bits(levels)
    }

    /// Returns the number of frames for context descriptors that are not in use.
    pub fn free_context_tables(&self) -> usize {
        self.frames.contexts.free()
    }

    /// Takes a frame for the context descriptor of [`FirstStage::Pages`], and returns where it is.
    ///
    /// The unit reads the descriptor through the guest's second stage. So the owner of those tables maps the frame, for
    /// reading only, at `at` of the tables that the device is attached to, before it attaches the device. It is the device's
    /// until that is blocked for good.
    pub fn place_context(&mut self, stream: StreamId, at: Gpa) -> Result<PhysAddr, Error> {
        if !at.0.is_multiple_of(FRAME_WORDS as u64 * 8) {
            return Err(Error::Unsupported { feature: "a place that is not a page's" });
        }
        let (place, device) = self.device(stream)?;
        if device.leaving || device.plain != State::Blocked {
            return Err(Error::StreamBusy { stream });
        }
        self.frames.contexts.place_for_guest(&self.bus, place, at)
    }

    fn stalls(&self, stream: StreamId) -> bool {
        self.abilities.stall_choice && self.abilities.stalling.contains(&stream)
    }

    /// Returns the stream table entry of an assigned device that is not translated.
    fn blocked(&self, place: usize, stream: StreamId, features: Features) -> StreamEntry {
        let Abilities { walks, vmid, stall_choice, forced_write_back, .. } = self.abilities;
        let mut entry = StreamEntry::blocked(features.device_tlb, walks);
        if features.pasid {
            // As when PASIDs are attached, so that one word makes it so.
            entry = entry.with(StreamEntry::DEFAULT_SUBSTREAM, 2);
            if features.page_requests {
                entry = entry.answering_with_pasid();
            }
        }
        // Where there is no second stage its fields are reserved.
        if vmid {
            entry = entry.with_second_stage(place as u16, walks, self.frames.empty.phys());
            if forced_write_back {
                entry = entry.with_forced_write_back();
            }
            if self.stalls(stream) {
                entry = entry.stalling();
            }
        }
        if stall_choice && !self.stalls(stream) {
            entry = entry.never_stalling();
        }
        entry
    }

    /// Returns the entry of `stream` as it is.
    fn entry(&self, stream: StreamId) -> StreamEntry {
        StreamEntry(core::array::from_fn(|word| self.frames.streams.load(stream, word)))
    }

    /// Stores the words of an entry that differ from what is there, that with V last if it becomes valid, else first; each
    /// visible before the next.
    fn write(&mut self, stream: StreamId, entry: StreamEntry) {
        let old = self.entry(stream);
        let closes = !entry.is_set(StreamEntry::VALID);
        for n in 0..STREAM_WORDS {
            let word = if closes { n } else { STREAM_WORDS - 1 - n };
            if old.0[word] != entry.0[word] {
                self.frames.streams.store(&self.bus, stream, word, entry.0[word]);
            }
        }
    }

    /// Returns what accesses without PASID have when they are attached to nothing: not valid; or, where PASIDs may be
    /// attached, the entry that leads to those, whose first descriptor is not in use.
    fn rest(&self, place: usize, stream: StreamId, features: Features) -> StreamEntry {
        let now = self.entry(stream);
        if now.has_contexts() {
            return now.with(StreamEntry::DEFAULT_SUBSTREAM, 2);
        }
        self.blocked(place, stream, features)
    }

    /// The context descriptor with the tables at `root`.
    fn context(&self, stream: StreamId, root: PhysAddr, asid: u16) -> ContextDescriptor {
        let context = ContextDescriptor::new(root, asid, self.abilities.walks);
        if self.stalls(stream) { context.stalling() } else { context }
    }

    /// Whether PASIDs of the device are attached, or still leaving.
    fn has_pasids(&self, stream: StreamId) -> bool {
        self.pasids.iter().any(|state| state.attachment().is_some_and(|at| at.stream == stream))
    }

    /// The entry and context descriptor of `translation`, of accesses without PASID or of a guest's only one.
    fn goal(
        &mut self,
        place: usize,
        stream: StreamId,
        features: Features,
        pasid: Option<Pasid>,
        translation: Translation,
    ) -> Result<Goal, Error> {
        let blocked = self.blocked(place, stream, features);
        let unsupported = |feature| Err(Error::Unsupported { feature });
        let entry = |entry| Ok(Goal { entry, context: None });
        match translation {
            Translation::Blocked => entry(self.rest(place, stream, features)),
            Translation::Bypass(_) if features.pasid => {
                let table = self.frames.contexts.table(&self.bus, place)?;
                // The first descriptor is there, and not in use: PASID 0 has it, too.
                self.frames.contexts.place(&self.bus, place, None)?;
                entry(blocked.contexts(table, true))
            }
            Translation::Bypass(_) => entry(blocked.bypass()),
            Translation::Stage1(root) => {
                self.check_first(root)?;
                let context = self.context(stream, root.phys(), place as u16);
                if !features.pasid {
                    let at = Place::Shared(place);
                    let entry = blocked.first_stage(self.frames.contexts.address(at));
                    return Ok(Goal { entry, context: Some((at, context)) });
                }
                let table = self.frames.contexts.table(&self.bus, place)?;
                let at = self.frames.contexts.place(&self.bus, place, None)?;
                Ok(Goal { entry: blocked.contexts(table, false), context: Some((at, context)) })
            }
            Translation::Stage2(root) => {
                self.check_second(stream, root)?;
                entry(blocked.with_levels(root.levels(), self.abilities.walks).second_stage(root.phys()))
            }
            Translation::Nested { first, second } => {
                if !self.abilities.capabilities.nested {
                    return unsupported("IDR0.S1P and IDR0.S2P together");
                }
                self.check_second(stream, second)?;
                let behind = blocked.with_levels(second.levels(), self.abilities.walks);
                let nested = behind.nested(second.phys());
                let address_bits = self.second_stage_bits(second.levels()).unwrap_or(0);
                match first {
                    FirstStage::Pages { root, levels } => {
                        if levels != 4 || root.0 >> address_bits != 0 || !root.0.is_multiple_of(4096) {
                            return unsupported("this root of a guest's first stage");
                        }
                        let Some((at, table)) = self.frames.contexts.guest(place, pasid) else {
                            return unsupported("a context descriptor without a place in the second stage");
                        };
                        let entry = nested
                            .with_address(StreamEntry::CONTEXT, table.at)
                            .with(StreamEntry::CONTEXTS_LOG2, table.log2.into());
                        let context = self.context(stream, PhysAddr(root.0), 0);
                        Ok(Goal { entry, context: Some((at, context)) })
                    }
                    FirstStage::Contexts { entry: said } => {
                        let limits = Limits {
                            substreams: self.abilities.shape.substreams,
                            two_levels: self.abilities.shape.two_levels,
                            address_bits,
                            stall_choice: self.abilities.stall_choice,
                            device_tlb: features.device_tlb,
                        };
                        match guest::choice(said, limits) {
                            Ok(Choice::Abort) => entry(blocked.silent()),
                            Ok(Choice::Bypass) => entry(behind.second_stage(second.phys())),
                            Ok(Choice::Translate(choice)) => entry(nested.guest(choice)),
                            Err(guest::Refused(field)) => unsupported(field),
                        }
                    }
                    _ => unsupported("this first stage"),
                }
            }
            _ => unsupported("this translation"),
        }
    }

    fn check_first(&self, root: Root) -> Result<(), Error> {
        if !self.abilities.capabilities.stage1 {
            return Err(Error::Unsupported { feature: "IDR0.S1P" });
        }
        if root.levels() != 4 {
            return Err(Error::Unsupported { feature: "this number of table levels" });
        }
        Ok(())
    }

    fn check_second(&self, stream: StreamId, root: Root) -> Result<(), Error> {
        let unsupported = |feature| Err(Error::Unsupported { feature });
        if !self.abilities.capabilities.stage2 {
            return unsupported("IDR0.S2P");
        }
        if self.second_stage_bits(root.levels()).is_none() {
            return unsupported(match root.levels() {
                4 => "44 bits of IDR5.OAS for tables of 4 levels",
                _ => "this number of table levels",
            });
        }
        if self.has_pasids(stream) {
            return unsupported("a second stage beside PASIDs");
        }
        Ok(())
    }

    /// Makes a new attachment, with the next serial number.
    fn name(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        domain: u16,
        stages: Stages,
        device_tlb: bool,
    ) -> Attachment {
        self.attached += 1;
        let domain = DomainId(domain);
        Attachment { serial: self.attached, stream, pasid, domain, stages, device_tlb }
    }

    /// Attaches a PASID of a device that has a table for them.
    fn attach_pasid(
        &mut self,
        stream: StreamId,
        pasid: Pasid,
        translation: Translation,
    ) -> Result<(Attachment, Invalidations), Error> {
        let (place, device) = self.device(stream)?;
        let (features, plain) = (device.features, device.plain);
        let state = Error::PasidState { stream, pasid: Some(pasid) };
        if !features.pasid {
            return Err(state);
        }
        let limit = 1 << self.abilities.capabilities.pasid_bits;
        if pasid.value() >= limit {
            return Err(Error::PasidOutOfRange { pasid, limit });
        }
        if pasid.value() == 0 {
            return Err(Error::Unsupported {
                feature: "PASID 0, whose context is that of accesses without one",
            });
        }
        if matches!(plain.attachment(), Some(Attachment { stages: Stages::Second | Stages::Nested, .. })) {
            return Err(Error::Unsupported { feature: "PASIDs beside a second stage" });
        }
        let of = |state: &State| {
            state.attachment().is_some_and(|at| (at.stream, at.pasid) == (stream, Some(pasid)))
        };
        if self.pasids.iter().any(of) {
            return Err(state);
        }
        let context = match translation {
            Translation::Stage1(root) => {
                self.check_first(root)?;
                Some(root.phys())
            }
            Translation::Blocked => None,
            _ => return Err(Error::Unsupported { feature: "this translation of a PASID" }),
        };
        const NONE: Error = Error::Exhausted { what: "places for PASIDs" };
        let free = self.pasids.iter().position(|state| *state == State::Blocked).ok_or(NONE)?;
        let domain = (free as u16 + 1) << VMID_BITS | place as u16;
        if !self.abilities.wide_asid && domain > 0xFF {
            return Err(Error::Exhausted { what: "ASIDs of 8 bits" });
        }
        let table = self.frames.contexts.table(&self.bus, place)?;
        // The first descriptors are there, and not in use: those of accesses without PASID.
        self.frames.contexts.place(&self.bus, place, None)?;
        let at = self.frames.contexts.place(&self.bus, place, Some(pasid))?;
        let attachment = self.name(stream, Some(pasid), domain, translation.stages(), features.device_tlb);
        if let Some(state) = self.pasids.get_mut(free) {
            *state = State::Attached(attachment);
        }
        if let Some(root) = context {
            let context = self.context(stream, root, domain);
            self.frames.contexts.write(&self.bus, at, context);
        }
        let now = self.entry(stream);
        if !now.has_contexts() {
            let entry = self.blocked(place, stream, features).contexts(table, false);
            self.write(stream, entry);
        }
        Ok((attachment, configuration(stream)))
    }

    /// Returns the place of the context descriptor of an attachment, if it is in a table for PASIDs: there others are reached
    /// by the same entry. What an entry alone leads to is out of use with it, and is written whole next time.
    fn listed_context(&mut self, place: usize, attachment: &Attachment, features: Features) -> Option<Place> {
        if attachment.stages != Stages::First || !features.pasid {
            return None;
        }
        self.frames.contexts.place(&self.bus, place, attachment.pasid).ok()
    }

    /// Returns the number of the PASID's place that holds `attachment`.
    fn pasid_place(&self, attachment: Attachment) -> Option<usize> {
        self.pasids.iter().position(|state| *state == State::Attached(attachment))
    }

    /// Replaces the translation of `attachment` by another.
    ///
    /// That takes several changes, each by [`step`](Self::step), and between them the unit has to forget what it knew. Where
    /// the architecture allows, the device is translated by the one or the other at every moment; elsewhere it is blocked in
    /// between. Nothing else is ever reached (but while accesses without PASID begin or cease to bypass translation, PASID 0
    /// may be translated as they are: it has no context of its own). What the translation before named may be used for something else when the last
    /// step's invalidations have completed.
    ///
    /// ```
    /// # use iommu::{Attachment, Bus, Commands, Completion, Error, Translation};
    /// fn replace<B: Bus>(
    ///     tables: &mut smmuv3::Tables<B>,
    ///     commands: &mut smmuv3::Commands<B>,
    ///     (attachment, translation): (Attachment, Translation),
    /// ) -> Result<Attachment, Error> {
    ///     let mut replacement = tables.replace(attachment, translation)?;
    ///     while let Some(invalidations) = tables.step(&mut replacement)? {
    ///         let ticket = commands.submit(&invalidations)?;
    ///         while commands.poll(ticket) == Completion::Pending {}
    ///     }
    ///     Ok(replacement.attachment())
    /// }
    /// ```
    pub fn replace(
        &mut self,
        attachment: Attachment,
        translation: Translation,
    ) -> Result<Replacement, Error> {
        let Attachment { stream, pasid, domain, .. } = attachment;
        let (place, device) = self.device(stream)?;
        let (features, plain, leaving) = (device.features, device.plain, device.leaving);
        if leaving {
            return Err(Error::StreamBusy { stream });
        }
        let device_tlb = features.device_tlb;
        if plain == State::Attached(attachment) {
            let fits = match translation {
                Translation::Blocked | Translation::Nested { first: FirstStage::Pages { .. }, .. } => true,
                _ => pasid.is_none(),
            };
            if !fits {
                return Err(Error::Unsupported { feature: "this translation of a PASID" });
            }
            let goal = self.goal(place, stream, features, pasid, translation)?;
            let old = self.listed_context(place, &attachment, features);
            let old = old.filter(|old| goal.context.is_none_or(|(new, _)| new != *old));
            let after = self.name(stream, pasid, domain.0, translation.stages(), device_tlb);
            let (_, device) = self.device(stream)?;
            device.plain = State::Attached(after);
            let entry = Some(goal.entry);
            return Ok(Replacement {
                before: attachment,
                after,
                entry,
                context: goal.context,
                old,
                done: false,
            });
        }
        let state = Error::PasidState { stream, pasid };
        let slot = self.pasid_place(attachment).ok_or(state)?;
        let at = self.frames.contexts.place(&self.bus, place, pasid)?;
        let (context, old) = match translation {
            Translation::Stage1(root) => {
                self.check_first(root)?;
                (Some((at, self.context(stream, root.phys(), domain.0))), None)
            }
            Translation::Blocked => (None, Some(at)),
            _ => return Err(Error::Unsupported { feature: "this translation of a PASID" }),
        };
        let after = self.name(stream, pasid, domain.0, translation.stages(), device_tlb);
        if let Some(state) = self.pasids.get_mut(slot) {
            *state = State::Attached(after);
        }
        Ok(Replacement { before: attachment, after, entry: None, context, old, done: false })
    }

    /// Makes the next change of a replacement. What it returns must have completed before the next; `None` when there is
    /// nothing more to do.
    pub fn step(&mut self, replacement: &mut Replacement) -> Result<Option<Invalidations>, Error> {
        let Replacement { before, after, .. } = *replacement;
        let (stream, pasid) = (after.stream, after.pasid);
        let (_, device) = self.device(stream)?;
        let leaving = device.leaving;
        let is_there = device.plain == State::Attached(after) || self.pasid_place(after).is_some();
        if leaving || !is_there {
            return Err(Error::PasidState { stream, pasid });
        }
        if replacement.done {
            return Ok(None);
        }
        // What the entry is to lead to; the unit has to know it before the entry changes.
        if let Some((at, context)) = replacement.context.take()
            && self.frames.contexts.write(&self.bus, at, context)
            && matches!(at, Place::Own(..))
            && self.more(replacement)
        {
            return Ok(Some(configuration(stream)));
        }
        if let Some(goal) = replacement.entry {
            let now = self.entry(stream);
            match update::next(&now, &goal, self.frames.empty.phys()) {
                Some(next) => {
                    self.write(stream, next);
                    if self.more(replacement) {
                        return Ok(Some(configuration(stream)));
                    }
                }
                None => replacement.entry = None,
            }
        }
        // And what it no longer leads to.
        if let Some(old) = replacement.old.take() {
            self.frames.contexts.close(&self.bus, old);
        }
        replacement.done = true;
        let mut invalidations = Invalidations::new();
        // Of the new translation nothing is remembered that is not so: whatever had the same numbers before was forgotten when
        // it went.
        let _ = invalidations.push(Invalidation::Attachment(before));
        Ok(Some(invalidations))
    }

    /// Whether stores are left to do, after the unit has forgotten what it knew.
    fn more(&self, replacement: &Replacement) -> bool {
        let goal = replacement.entry.is_some_and(|goal| self.entry(replacement.after.stream) != goal);
        goal || replacement.old.is_some()
    }
}

impl<B: Bus> iommu::Tables for Tables<B> {
    fn assign(&mut self, stream: StreamId, features: Features) -> Result<Invalidations, Error> {
        let capabilities = self.abilities.capabilities;
        let page_requests = capabilities.page_requests && features.device_tlb;
        for (wanted, there, feature) in [
            (features.device_tlb, capabilities.device_tlb, "IDR0.ATS"),
            (features.page_requests, page_requests, "IDR0.PRI with ATS"),
            (features.pasid, capabilities.pasid_bits > 0, "PASIDs (substreams)"),
            (features.device_tlb, !self.stalls(stream), "ATS of a device whose faults stall"),
        ] {
            if wanted && !there {
                return Err(Error::Unsupported { feature });
            }
        }
        if u64::from(stream.0) >= self.frames.streams.streams().min(self.abilities.streams) {
            return Err(Error::UnknownStream { stream });
        }
        if self.device(stream).is_ok() {
            return Err(Error::StreamBusy { stream });
        }
        let free = self.devices.iter().position(Option::is_none);
        let free = free.ok_or(Error::Exhausted { what: "places for devices" })?;
        self.frames.streams.reach(&self.bus, stream)?;
        let entry = self.blocked(free, stream, features);
        self.devices[free] =
            Some(Device { stream, features, leaving: false, silent: false, plain: State::Blocked });
        self.write(stream, entry);
        Ok(configuration(stream))
    }

    /// Attaches in one change. What cannot be is refused, and nothing has changed: it is attached blocked, and that is
    /// [replaced](Tables::replace). That is a second stage of fewer levels than an entry is prepared for, and a guest's
    /// context descriptors on a device that had PASIDs before.
    fn attach(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        translation: Translation,
    ) -> Result<(Attachment, Invalidations), Error> {
        let (place, device) = self.device(stream)?;
        if device.leaving {
            return Err(Error::StreamBusy { stream });
        }
        let (features, plain) = (device.features, device.plain);
        // A guest's own descriptors have all its PASIDs, and one that the driver makes for it is the device's only one.
        let (is_pages, is_nested) = match translation {
            Translation::Nested { first: FirstStage::Pages { .. }, .. } => (true, true),
            Translation::Nested { .. } => (false, true),
            _ => (false, false),
        };
        if let Some(pasid) = pasid
            && !is_nested
        {
            return self.attach_pasid(stream, pasid, translation);
        }
        let is_one = pasid.is_none_or(|pasid| is_pages && features.pasid && pasid.value() != 0);
        if plain != State::Blocked || !is_one {
            return Err(Error::PasidState { stream, pasid });
        }
        let goal = self.goal(place, stream, features, pasid, translation)?;
        let now = self.entry(stream);
        // What an entry means that leads to a device's table: nothing for accesses without PASID, as the first descriptor is
        // not in use; or it is that of this attachment.
        let idle = if goal.entry.has_contexts() {
            goal.entry.with(StreamEntry::DEFAULT_SUBSTREAM, 2)
        } else {
            self.blocked(place, stream, features)
        };
        if !update::is_safe_at_once(&now, &goal.entry, &idle, self.frames.empty.phys()) {
            return Err(Error::Unsupported {
                feature: "this in one change: attach it blocked, and replace that",
            });
        }
        let attachment = self.name(stream, pasid, place as u16, translation.stages(), features.device_tlb);
        let (_, device) = self.device(stream)?;
        device.plain = State::Attached(attachment);
        if let Some((at, context)) = goal.context {
            // ORDER: before the entry points at it.
            self.frames.contexts.write(&self.bus, at, context);
        }
        self.write(stream, goal.entry);
        Ok((attachment, configuration(stream)))
    }

    fn detach(&mut self, attachment: Attachment) -> Result<(Leaving, Invalidations), Error> {
        let Attachment { stream, pasid, .. } = attachment;
        let (place, device) = self.device(stream)?;
        let (features, leaving) = (device.features, device.leaving);
        if device.plain == State::Attached(attachment) {
            device.plain = State::Leaving(attachment);
            if !leaving {
                let rest = self.rest(place, stream, features);
                self.write(stream, rest);
            }
        } else {
            let at = self.pasid_place(attachment).ok_or(Error::PasidState { stream, pasid })?;
            if let Some(state) = self.pasids.get_mut(at) {
                *state = State::Leaving(attachment);
            }
        }
        if let Some(context) = self.listed_context(place, &attachment, features) {
            self.frames.contexts.close(&self.bus, context);
        }
        let mut invalidations = Invalidations::new();
        let _ = invalidations.push(Invalidation::Attachment(attachment));
        Ok((Leaving { stream, what: LeavingPart::Attachment(attachment) }, invalidations))
    }

    fn block(&mut self, stream: StreamId) -> Result<(Leaving, Invalidations), Error> {
        let (place, device) = self.device(stream)?;
        if device.leaving {
            return Err(Error::StreamBusy { stream });
        }
        device.leaving = true;
        let features = device.features;
        let blocked = self.blocked(place, stream, features);
        self.write(stream, blocked);
        let mut invalidations = Invalidations::new();
        let _ = invalidations.push(Invalidation::Device { stream, device_tlb: features.device_tlb });
        Ok((Leaving { stream, what: LeavingPart::Device }, invalidations))
    }

    /// Has what a device tries that was blocked for good refused without a record, by an entry that says so (Config = 0).
    fn silence(&mut self, stream: StreamId) -> Result<Invalidations, Error> {
        let (place, device) = self.device(stream)?;
        if !device.leaving {
            return Err(Error::StreamBusy { stream });
        }
        device.silent = true;
        let features = device.features;
        let silent = self.blocked(place, stream, features).silent();
        self.write(stream, silent);
        Ok(configuration(stream))
    }

    /// Zeroes what left, and frees its place.
    ///
    /// A device whose attachment did not leave keeps its place: the unit may still know its translations.
    fn finish(&mut self, leaving: Leaving) {
        let Leaving { stream, what } = leaving;
        let Ok((place, device)) = self.device(stream) else { return };
        match what {
            LeavingPart::Attachment(attachment) => {
                if device.plain == State::Leaving(attachment) {
                    device.plain = State::Blocked;
                }
                for state in &mut self.pasids {
                    if *state == State::Leaving(attachment) {
                        *state = State::Blocked;
                    }
                }
            }
            LeavingPart::Device => {
                if device.leaving && device.plain == State::Blocked && !self.has_pasids(stream) {
                    self.devices[place] = None;
                    self.write(stream, StreamEntry::default());
                    self.frames.contexts.give_back(place);
                }
            }
        }
    }
}

/// What every change of an entry asks for: the unit may also remember entries that were not valid.
fn configuration(stream: StreamId) -> Invalidations {
    let mut invalidations = Invalidations::new();
    let _ = invalidations.push(Invalidation::Device { stream, device_tlb: false });
    invalidations
}

#[cfg(test)]
mod tests {
    use super::*;

    const WALKS: Walks = Walks { coherent: true, address_size: 4 };

    /// Worked out from the field tables of facts/smmuv3.md, section 2.2.
    #[test]
    fn a_stream_table_entry_holds_the_words_of_the_manual() {
        let blocked = StreamEntry::blocked(true, WALKS).with_second_stage(0x2A, WALKS, PhysAddr(0x8000_0000));
        let fixed = [0x0000_1000_1000_00D4, 0x044C_3594_0000_002A];

        assert_eq!(blocked.0[..4], [0, fixed[0], fixed[1], 0x8000_0000]);
        assert_eq!(blocked.0[4..], [0; 4]);
        assert_eq!(
            blocked.first_stage(PhysAddr(0x8812_3000)).0[..4],
            [0x8812_300B, fixed[0], fixed[1], 0x8000_0000]
        );
        assert_eq!(
            blocked.second_stage(PhysAddr(0x1_4000_0000)).0[..4],
            [0xD, fixed[0], fixed[1], 0x1_4000_0000]
        );
    }

    #[test]
    fn an_incoherent_unit_walks_past_the_caches() {
        let walks = Walks { coherent: false, address_size: 5 };

        assert_eq!(StreamEntry::blocked(false, walks).0[1], 0x0000_1000_0000_0000);
    }
}
