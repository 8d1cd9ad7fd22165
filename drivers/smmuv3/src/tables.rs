//! The stream table and the context descriptors; and which device has which.
//!
//! The unit may read any word of a stream table entry at any time, one by one and in any order, and keep what it read
//! until it is told to forget the entry. So an entry must be harmless in every mixture of its old words with its new ones:
//!
//! - When a device is assigned, all that does not depend on its tables is written, while V is clear.
//! - A context descriptor cannot be reached before the entry points at it, and is written whole. The entry then changes in
//!   one word, that with V, Config and the pointer.
//! - The second stage needs a second word, for its root. Whenever V is clear or in doubt, that word points at a table that
//!   is always empty.

use crate::streams::{STREAM_WORDS, StreamTable};
use heapless::Vec;
use iommu::{
    Attachment, Bus, Capabilities, DmaBuf, DomainId, Error, Features, Field, Invalidation, Invalidations,
    Leaving, Pasid, PhysAddr, Root, StreamId, Translation, Words, descriptor, unit::LeavingPart,
};

/// Words of a frame: 4 KiB.
pub const FRAME_WORDS: usize = 512;
/// Devices assigned at one time, at most: a frame holds as many context descriptors.
pub const DEVICES: usize = FRAME_WORDS / CONTEXT_WORDS;
/// Words of a context descriptor.
const CONTEXT_WORDS: usize = 8;
/// The word of a stream table entry that holds V, Config and the pointer to the context descriptor.
const HEAD: usize = 0;
/// The word of a stream table entry that holds the root of the second stage.
const ROOT: usize = 3;

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
    fn cacheability(self) -> u64 {
        self.coherent.into()
    }

    /// Inner shareable, or not.
    fn shareability(self) -> u64 {
        if self.coherent { 0b11 } else { 0b00 }
    }
}

descriptor! {
    /// A stream table entry (STE).
    pub struct StreamEntry([u64; 8]);
}

impl StreamEntry {
    const VALID: Field<Self> = Field::bit(0);
    const CONFIG: Field<Self> = Field::bits(3, 1);
    const CONTEXT: Field<Self> = Field::bits(55, 6);
    const CONTEXT_INNER: Field<Self> = Field::bits(67, 66);
    const CONTEXT_OUTER: Field<Self> = Field::bits(69, 68);
    const CONTEXT_SHARE: Field<Self> = Field::bits(71, 70);
    const DEVICE_TLB: Field<Self> = Field::bits(93, 92);
    const SHARE_OVERRIDE: Field<Self> = Field::bits(109, 108);
    const VMID: Field<Self> = Field::bits(143, 128);
    const INPUT_SIZE: Field<Self> = Field::bits(165, 160);
    const START_LEVEL: Field<Self> = Field::bits(167, 166);
    const WALK_INNER: Field<Self> = Field::bits(169, 168);
    const WALK_OUTER: Field<Self> = Field::bits(171, 170);
    const WALK_SHARE: Field<Self> = Field::bits(173, 172);
    const OUTPUT_SIZE: Field<Self> = Field::bits(178, 176);
    const AARCH64: Field<Self> = Field::bit(179);
    const RECORD: Field<Self> = Field::bit(186);
    const ROOT: Field<Self> = Field::bits(247, 196);

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
    /// Tables have 4 levels of 4 KiB and take 44 bits. Faults are recorded (S2R).
    pub fn with_second_stage(self, vmid: u16, walks: Walks, empty: PhysAddr) -> Self {
        self.with(Self::VMID, vmid.into())
            .with(Self::INPUT_SIZE, 64 - 44)
            .with(Self::START_LEVEL, 2) // 2: level 0
            .with(Self::WALK_INNER, walks.cacheability())
            .with(Self::WALK_OUTER, walks.cacheability())
            .with(Self::WALK_SHARE, walks.shareability())
            .with(Self::OUTPUT_SIZE, u64::from(walks.address_size) & 0b111)
            .with(Self::AARCH64, 1)
            .with(Self::RECORD, 1)
            .with_address(Self::ROOT, empty.0)
    }

    /// Translates by the first stage of the context descriptor at `context`.
    pub fn first_stage(self, context: PhysAddr) -> Self {
        self.with(Self::VALID, 1).with(Self::CONFIG, 0b101).with_address(Self::CONTEXT, context.0)
    }

    /// Translates by the second stage with the tables at `root`.
    pub fn second_stage(self, root: PhysAddr) -> Self {
        self.with(Self::VALID, 1).with(Self::CONFIG, 0b110).with_address(Self::ROOT, root.0)
    }
}

descriptor! {
    /// A context descriptor (CD).
    pub struct ContextDescriptor([u64; 8]);
}

impl ContextDescriptor {
    const INPUT_SIZE: Field<Self> = Field::bits(5, 0);
    const WALK_INNER: Field<Self> = Field::bits(9, 8);
    const WALK_OUTER: Field<Self> = Field::bits(11, 10);
    const WALK_SHARE: Field<Self> = Field::bits(13, 12);
    const UPPER_HALF_OFF: Field<Self> = Field::bit(30);
    const VALID: Field<Self> = Field::bit(31);
    const OUTPUT_SIZE: Field<Self> = Field::bits(34, 32);
    const AARCH64: Field<Self> = Field::bit(41);
    const RECORD: Field<Self> = Field::bit(45);
    const ABORT: Field<Self> = Field::bit(46);
    const OWN_ASID: Field<Self> = Field::bit(47);
    const ASID: Field<Self> = Field::bits(63, 48);
    const ROOT: Field<Self> = Field::bits(119, 68);
    const MEMORY_0: Field<Self> = Field::bits(199, 192);

    /// Translates the lower half of the address space, 48 bits, by tables of 4 levels of 4 KiB at `root`.
    ///
    /// Faults are recorded (R) and abort the access (A). Memory attribute 0 is normal memory, write-back.
    pub fn new(root: PhysAddr, asid: u16, walks: Walks) -> Self {
        Self::default()
            .with(Self::INPUT_SIZE, 64 - 48)
            .with(Self::WALK_INNER, walks.cacheability())
            .with(Self::WALK_OUTER, walks.cacheability())
            .with(Self::WALK_SHARE, walks.shareability())
            .with(Self::UPPER_HALF_OFF, 1)
            .with(Self::VALID, 1)
            .with(Self::OUTPUT_SIZE, u64::from(walks.address_size) & 0b111)
            .with(Self::AARCH64, 1)
            .with(Self::RECORD, 1)
            .with(Self::ABORT, 1)
            .with(Self::OWN_ASID, 1)
            .with(Self::ASID, asid.into())
            .with_address(Self::ROOT, root.0)
            .with(Self::MEMORY_0, 0xFF)
    }
}

/// What the tables of a unit depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    pub(crate) capabilities: Capabilities,
    pub(crate) walks: Walks,
    /// `IDR0.S2P`: there is a second stage, whether it can be used or not, and there are VMIDs.
    pub(crate) vmid: bool,
    /// Streams that the unit can tell apart, from `IDR1.SIDSIZE`.
    pub(crate) streams: u64,
}

#[derive(Debug)]
struct Device {
    stream: StreamId,
    features: Features,
    /// Blocked for good, and waiting for `finish`.
    leaving: bool,
    entry: EntryState,
}

/// What a device's stream table entry says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum EntryState {
    /// Not valid, and the unit knows.
    Blocked,
    /// Valid.
    Attached(Attachment),
    /// No longer valid, but the unit may still know what it said.
    Leaving(Attachment),
}

/// The memory of the tables.
#[derive(Debug)]
pub(crate) struct Frames {
    pub(crate) streams: StreamTable,
    pub(crate) contexts: DmaBuf,
    pub(crate) empty: DmaBuf,
}

/// The table side of a unit; see [`iommu::Tables`].
///
/// A device that is not attached is blocked, and what it tries is recorded: its entry is not valid. (Config = 0 would block
/// it in silence.)
///
/// What `assign` asks for must have completed before `attach`.
#[derive(Debug)]
pub struct Tables<B> {
    bus: B,
    frames: Frames,
    abilities: Abilities,
    /// The place of a device is its domain number, and that of its context descriptor.
    devices: Vec<Option<Device>, DEVICES>,
    /// Attachments made so far.
    attached: u64,
}

impl<B: Bus> Tables<B> {
    pub(crate) fn new(bus: B, frames: Frames, abilities: Abilities) -> Self {
        let devices = core::iter::repeat_with(|| None).take(DEVICES).collect();
        Self { bus, frames, abilities, devices, attached: 0 }
    }

    fn device(&mut self, stream: StreamId) -> Result<(DomainId, &mut Device), Error> {
        let places = self.devices.iter_mut().enumerate();
        let mut devices = places.filter_map(|(at, place)| Some((DomainId(at as u16), place.as_mut()?)));
        devices.find(|(_, device)| device.stream == stream).ok_or(Error::UnknownStream { stream })
    }

    /// Returns the stream table entry of an assigned device that is not translated.
    fn blocked(&self, domain: DomainId, features: Features) -> StreamEntry {
        let Abilities { walks, vmid, .. } = self.abilities;
        let entry = StreamEntry::blocked(features.device_tlb, walks);
        // Where there is no second stage its fields are reserved.
        if vmid { entry.with_second_stage(domain.0, walks, self.frames.empty.phys()) } else { entry }
    }

    /// Stores one word of a stream table entry, visible before any later store.
    fn store(&mut self, stream: StreamId, word: usize, value: u64) {
        self.frames.streams.store(&self.bus, stream, word, value);
    }

    /// Makes an entry valid. Only words of `entry` that the module's rules name differ from what is there.
    fn open(&mut self, stream: StreamId, entry: StreamEntry) {
        // ORDER: where the root is, before V.
        self.store(stream, ROOT, entry.0[ROOT]);
        self.store(stream, HEAD, entry.0[HEAD]);
    }

    /// Makes an entry not valid, and keeps it from its tables even if one word is read before and the other after.
    fn close(&mut self, stream: StreamId, blocked: StreamEntry) {
        self.store(stream, HEAD, blocked.0[HEAD]);
        self.store(stream, ROOT, blocked.0[ROOT]);
    }

    /// Writes the context descriptor of a domain, which nothing points at, and returns where it is.
    fn write_context(&mut self, domain: DomainId, root: Root) -> PhysAddr {
        let context = ContextDescriptor::new(root.phys(), domain.0, self.abilities.walks);
        let at = usize::from(domain.0) * CONTEXT_WORDS;
        for (i, word) in context.0.into_iter().enumerate() {
            self.frames.contexts.store(at + i, word);
        }
        let range = self.frames.contexts.range(at, CONTEXT_WORDS);
        let context = range.start;
        // ORDER: before the entry points at it.
        self.bus.publish(range);
        context
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
        self.devices[free] = Some(Device { stream, features, leaving: false, entry: EntryState::Blocked });
        let entry = self.blocked(DomainId(free as u16), features);
        for (word, value) in entry.0.into_iter().enumerate() {
            self.store(stream, word, value);
        }
        Ok(configuration(stream))
    }

    fn attach(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        translation: Translation,
    ) -> Result<(Attachment, Invalidations), Error> {
        let capabilities = self.abilities.capabilities;
        let (stage1, supported, root, feature) = match translation {
            Translation::Stage1(root) => (true, capabilities.stage1, root, "IDR0.S1P"),
            Translation::Stage2(root) => {
                (false, capabilities.stage2, root, "IDR0.S2P with 44 bits of IDR5.OAS")
            }
            _ => return Err(Error::Unsupported { feature: "this translation" }),
        };
        if !supported {
            return Err(Error::Unsupported { feature });
        }
        if root.levels() != capabilities.levels {
            return Err(Error::Unsupported { feature: "this number of table levels" });
        }
        let serial = self.attached + 1;
        let (domain, device) = self.device(stream)?;
        if device.leaving {
            return Err(Error::StreamBusy { stream });
        }
        if pasid.is_some() || device.entry != EntryState::Blocked {
            return Err(Error::PasidState { stream, pasid });
        }
        let features = device.features;
        let device_tlb = features.device_tlb;
        let attachment =
            Attachment { serial, stream, pasid, domain, stages: translation.stages(), device_tlb };
        device.entry = EntryState::Attached(attachment);
        self.attached = serial;
        let entry = self.blocked(domain, features);
        let entry = if stage1 {
            let context = self.write_context(domain, root);
            entry.first_stage(context)
        } else {
            entry.second_stage(root.phys())
        };
        self.open(stream, entry);
        Ok((attachment, configuration(stream)))
    }

    fn detach(&mut self, attachment: Attachment) -> Result<(Leaving, Invalidations), Error> {
        let Attachment { stream, pasid, .. } = attachment;
        let (domain, device) = self.device(stream)?;
        if device.entry != EntryState::Attached(attachment) {
            return Err(Error::PasidState { stream, pasid });
        }
        device.entry = EntryState::Leaving(attachment);
        let features = device.features;
        self.close(stream, self.blocked(domain, features));
        let mut invalidations = Invalidations::new();
        let _ = invalidations.push(Invalidation::Attachment(attachment));
        Ok((Leaving { stream, what: LeavingPart::Attachment(attachment) }, invalidations))
    }

    fn block(&mut self, stream: StreamId) -> Result<(Leaving, Invalidations), Error> {
        let (domain, device) = self.device(stream)?;
        if device.leaving {
            return Err(Error::StreamBusy { stream });
        }
        device.leaving = true;
        let features = device.features;
        self.close(stream, self.blocked(domain, features));
        let mut invalidations = Invalidations::new();
        let _ = invalidations.push(Invalidation::Device { stream, device_tlb: features.device_tlb });
        Ok((Leaving { stream, what: LeavingPart::Device }, invalidations))
    }

    fn silence(&mut self, _: StreamId) -> Result<Invalidations, Error> {
        Err(Error::Unsupported { feature: "silence of a blocked device" })
    }

    /// Zeroes what left, and frees its place.
    ///
    /// A device whose attachment did not leave keeps its place: the unit may still know its translations.
    fn finish(&mut self, leaving: Leaving) {
        let Leaving { stream, what } = leaving;
        let Ok((domain, device)) = self.device(stream) else { return };
        match what {
            LeavingPart::Attachment(attachment) => {
                if device.entry == EntryState::Leaving(attachment) {
                    device.entry = EntryState::Blocked;
                }
            }
            LeavingPart::Device => {
                if device.leaving && device.entry == EntryState::Blocked {
                    self.devices[usize::from(domain.0)] = None;
                    for word in 0..STREAM_WORDS {
                        self.store(stream, word, 0);
                    }
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
        let fixed = [0x0000_1000_1000_00D4, 0x040C_3594_0000_002A];

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

    /// Row C1 of facts/smmuv3.md, section 11.4, but for the memory attributes.
    #[test]
    fn a_context_descriptor_holds_the_words_of_the_manual() {
        let walks = Walks { address_size: 5, ..WALKS };
        let context = ContextDescriptor::new(PhysAddr(0x1_0203_0000), 1, walks);

        assert_eq!(context.0, [0x0001_E205_C000_3510, 0x1_0203_0000, 0, 0xFF, 0, 0, 0, 0]);
    }

    #[test]
    fn an_incoherent_unit_walks_past_the_caches() {
        let walks = Walks { coherent: false, address_size: 5 };

        assert_eq!(ContextDescriptor::new(PhysAddr(0), 0, walks).0[0], 0x0000_E205_C000_0010);
        assert_eq!(StreamEntry::blocked(false, walks).0[1], 0x0000_1000_0000_0000);
    }
}
