//! What a guest that owns its first stage may say: of its stream table entry, and by commands of its own.
//!
//! Nothing of a guest reaches the unit as it is. Of its entry the fields of [`MAY_SET`] are taken, one by one; its commands
//! become [`Invalidation`]s, which the driver encodes anew for the attachment's own stream and VMID. What is not on these
//! lists is refused by the name of its field, so that a guest never has the unit do what nobody thought of.

use crate::tables::StreamEntry;
use iommu::{Attachment, Field, Invalidation, Iova, PAGE_SIZE, Pasid, StreamId, Words, descriptor};

/// The field of a guest's entry or command that it may not set, or not to this value; by the manual's name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Refused(pub &'static str);

/// The fields of a stream table entry that are a guest's to choose: V, Config, S1Fmt, S1ContextPtr, S1CDMax; S1DSS, S1CIR,
/// S1COR, S1CSH, S1STALLD, EATS.
///
/// A hypervisor whose guests set others, to no effect, clears those before it hands an entry over.
pub const MAY_SET: [u64; 8] = [0xF8FF_FFFF_FFFF_FFFF, 0x0000_0000_3800_00FF, 0, 0, 0, 0, 0, 0];

/// Names of the fields that are the hypervisor's, to refuse them by.
const HYPERVISORS: [(Field<StreamEntry>, &str); 21] = [
    (Field::bits(75, 72), "STE.S2HWU"),
    (Field::bit(76), "STE.DRE"),
    (Field::bits(80, 77), "STE.CONT"),
    (Field::bit(81), "STE.DCP"),
    (Field::bit(82), "STE.PPAR"),
    (Field::bit(83), "STE.MEV"),
    (Field::bits(87, 84), "STE [87:84] (software's)"),
    (Field::bit(88), "STE.S1PIE"),
    (Field::bit(89), "STE.S2FWB"),
    (Field::bit(90), "STE.S1MPAM"),
    (Field::bits(95, 94), "STE.STRW"),
    (Field::bits(100, 96), "STE.MemAttr"),
    (Field::bits(104, 101), "STE.ALLOCCFG"),
    (Field::bits(109, 108), "STE.SHCFG"),
    (Field::bits(111, 110), "STE.NSCFG"),
    (Field::bits(113, 112), "STE.PRIVCFG"),
    (Field::bits(115, 114), "STE.INSTCFG"),
    (Field::bits(143, 128), "STE.S2VMID"),
    (Field::bits(191, 160), "STE [191:160] (second stage)"),
    (Field::bits(247, 196), "STE.S2TTB"),
    (Field::bits(375, 332), "STE.VMSPtr"),
];

/// How a guest has the accesses of a device go through its first stage.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Choice {
    /// Refused: its entry is not valid, or says so.
    Abort,
    /// They pass it as they are.
    Bypass,
    /// By the context descriptors of its own; the entry holds what it may say of them, and nothing else.
    Translate(StreamEntry),
}

/// What a guest's entry is checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bits of a SubstreamID (`IDR1.SSIDSIZE`).
    pub(crate) substreams: u8,
    /// Tables of context descriptors may have two levels (`IDR0.CD2L`).
    pub(crate) two_levels: bool,
    /// Bits of a guest's address.
    pub(crate) address_bits: u8,
    /// The unit stalls as it is configured (`IDR0.STALL_MODEL` = 0), so that S1STALLD means something.
    pub(crate) stall_choice: bool,
    /// The device keeps translations of its own (ATS).
    pub(crate) device_tlb: bool,
}

/// Takes from a guest's stream table entry what is the guest's to choose.
pub(crate) fn choice(entry: [u64; 8], limits: Limits) -> Result<Choice, Refused> {
    type Ste = StreamEntry;
    let entry = StreamEntry(entry);
    if !entry.is_set(Ste::VALID) {
        return Ok(Choice::Abort);
    }
    match entry.get(Ste::CONFIG) {
        0..4 => return Ok(Choice::Abort),
        4 | 5 => {}
        _ => return Err(Refused("STE.Config")),
    }
    for (field, name) in HYPERVISORS {
        if entry.is_set(field) {
            return Err(Refused(name));
        }
    }
    if entry.0.iter().zip(MAY_SET).any(|(&word, may)| word & !may != 0) {
        return Err(Refused("reserved bits of STE"));
    }
    if entry.get(Ste::CONFIG) == 4 {
        return Ok(Choice::Bypass);
    }
    let log2 = entry.get(Ste::CONTEXTS_LOG2);
    let pointer = entry.address(Ste::CONTEXT);
    let eats = entry.get(Ste::DEVICE_TLB);
    for (wrong, name) in [
        (log2 > limits.substreams.into(), "STE.S1CDMax"),
        (log2 != 0 && entry.get(Ste::CONTEXT_FORMAT) > if limits.two_levels { 2 } else { 0 }, "STE.S1Fmt"),
        (pointer.checked_shr(limits.address_bits.into()).unwrap_or(0) != 0, "STE.S1ContextPtr"),
        (entry.get(Ste::DEFAULT_SUBSTREAM) == 3, "STE.S1DSS"),
        (entry.get(Ste::CONTEXT_SHARE) == 1, "STE.S1CSH"),
        (entry.is_set(Ste::NEVER_STALL) && !limits.stall_choice, "STE.S1STALLD"),
        (eats > u64::from(limits.device_tlb), "STE.EATS"),
    ] {
        if wrong {
            return Err(Refused(name));
        }
    }
    let mut taken = StreamEntry::default();
    for field in [
        Ste::CONTEXT_FORMAT,
        Ste::CONTEXTS_LOG2,
        Ste::DEFAULT_SUBSTREAM,
        Ste::CONTEXT_INNER,
        Ste::CONTEXT_OUTER,
        Ste::CONTEXT_SHARE,
        Ste::NEVER_STALL,
        Ste::DEVICE_TLB,
    ] {
        taken = taken.with(field, entry.get(field));
    }
    if log2 == 0 {
        // One descriptor: the unit looks at neither.
        taken = taken.with(Ste::CONTEXT_FORMAT, 0).with(Ste::DEFAULT_SUBSTREAM, 0);
    }
    Ok(Choice::Translate(taken.with_address(Ste::CONTEXT, pointer)))
}

descriptor! {
    /// An entry of a guest's command queue.
    pub struct GuestCommand([u64; 2]);
}

/// What a guest asks for by a command. Streams are the guest's own numbers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GuestRequest {
    /// Nothing: what was asked for is a hint, or is done in any case.
    Nothing,
    /// Everything before is to be complete (`CMD_SYNC`).
    Sync,
    /// To look at its stream table entries again: those of 2^`log2` streams from `first` on (`CMD_CFGI_STE` and its range).
    Entries {
        /// The first.
        first: StreamId,
        /// Log2 of how many; 32 is all.
        log2: u8,
    },
    /// To forget context descriptors of a stream; [`contexts`](Self::of) of all its PASIDs, or of one.
    Contexts {
        /// Whose.
        stream: StreamId,
        /// Of which PASID; `None` is of all.
        pasid: Option<Pasid>,
    },
    /// To forget translations of its first stage, of all its attachments. A page table that is a first stage by itself
    /// ([`iommu::FirstStage::Pages`]) has ASID 0.
    FirstStage {
        /// Of which address space; `None` is of all.
        asid: Option<u16>,
        /// The first page and how many; `None` is all.
        pages: Option<(Iova, u64)>,
    },
    /// To have a device forget translations.
    DeviceTlb {
        /// Which.
        stream: StreamId,
        /// Of which PASID; `None` is without one.
        pasid: Option<Pasid>,
        /// The first page and how many; `None` is all.
        pages: Option<(Iova, u64)>,
    },
}

impl GuestRequest {
    /// Returns what the unit is to forget of `attachment` because of it; `None` where that is nothing.
    ///
    /// The caller has found out which attachment of the guest the request's stream is. A request without a stream is about
    /// every attachment of the guest.
    pub fn of(self, attachment: Attachment) -> Option<Invalidation> {
        match self {
            Self::Nothing | Self::Sync | Self::Entries { .. } => None,
            Self::Contexts { pasid, .. } => Some(Invalidation::Contexts { attachment, pasid }),
            Self::FirstStage { asid, pages } => Some(Invalidation::FirstStage { attachment, asid, pages }),
            Self::DeviceTlb { .. } if !attachment.device_tlb => None,
            Self::DeviceTlb { pasid, pages, .. } => {
                Some(Invalidation::DeviceTlb { attachment, pasid, pages })
            }
        }
    }

    /// Returns which stream of the guest it is about, if it is about one.
    pub const fn stream(self) -> Option<StreamId> {
        match self {
            Self::Contexts { stream, .. } | Self::DeviceTlb { stream, .. } => Some(stream),
            _ => None,
        }
    }
}

/// Bits [hi:lo] of a word.
const fn bits(hi: u32, lo: u32) -> u64 {
    (u64::MAX >> (63 - (hi - lo))) << lo
}

/// The fields that a command of each opcode may have, in both words; all other bits are reserved.
const COMMANDS: [(u64, u64, u64); 13] = [
    // Prefetches: SSV, SubstreamID, StreamID; of addresses Size, Stride, Address.
    (0x01, bits(63, 11), 0),
    (0x02, bits(63, 11), bits(63, 12) | bits(9, 0)),
    // CFGI_STE: StreamID; Leaf. CFGI_STE_RANGE: StreamID; Range.
    (0x03, bits(63, 32), 1),
    (0x04, bits(63, 32), bits(4, 0)),
    // CFGI_CD: SubstreamID, StreamID; Leaf. CFGI_CD_ALL: StreamID.
    (0x05, bits(63, 12), 1),
    (0x06, bits(63, 32), 0),
    // TLBI_NH_ALL, _ASID, _VA, _VAA: NUM, SCALE, ASID; Leaf, TTL, TG, Address. VMID is reserved: a guest's unit has no
    // second stage.
    (0x10, 0, 0),
    (0x11, bits(63, 48), 0),
    (0x12, bits(63, 48) | bits(16, 12) | bits(24, 20), bits(63, 12) | bits(11, 8) | 1),
    (0x13, bits(16, 12) | bits(24, 20), bits(63, 12) | bits(11, 8) | 1),
    // TLBI_NSNH_ALL.
    (0x30, 0, 0),
    // ATC_INV: SSV, SubstreamID, StreamID; Size, Address. Not Global.
    (0x40, bits(63, 11), bits(63, 12) | bits(5, 0)),
    // SYNC: CS, MSH, MSIAttr, MSIData; MSIAddress. What it signals is the hypervisor's to do.
    (0x46, bits(13, 12) | bits(27, 22) | bits(63, 32), bits(55, 2)),
];

impl GuestCommand {
    const OPCODE: Field<Self> = Field::bits(7, 0);
    const GLOBAL: Field<Self> = Field::bit(9);
    const SECURE: Field<Self> = Field::bit(10);
    const SUBSTREAM_VALID: Field<Self> = Field::bit(11);
    const SUBSTREAM: Field<Self> = Field::bits(31, 12);
    const STREAM: Field<Self> = Field::bits(63, 32);
    const NUM: Field<Self> = Field::bits(16, 12);
    const SCALE: Field<Self> = Field::bits(24, 20);
    const VMID: Field<Self> = Field::bits(47, 32);
    const ASID: Field<Self> = Field::bits(63, 48);
    const RANGE: Field<Self> = Field::bits(68, 64);
    const SIZE: Field<Self> = Field::bits(69, 64);
    const LEVEL: Field<Self> = Field::bits(73, 72);
    const GRANULE: Field<Self> = Field::bits(75, 74);
    const ADDRESS: Field<Self> = Field::bits(127, 76);

    /// Checks the command, field by field, and returns what it asks for.
    ///
    /// `ranges` says whether the guest's unit has invalidations by range (`IDR3.RIL`), and `device_tlbs` whether it has
    /// `CMD_ATC_INV` (`IDR0.ATS`).
    pub fn request(&self, ranges: bool, device_tlbs: bool) -> Result<GuestRequest, Refused> {
        let opcode = self.get(Self::OPCODE);
        let known = COMMANDS.iter().find(|known| known.0 == opcode);
        let Some(&(_, first, second)) = known else { return Err(Refused("opcode")) };
        if opcode == 0x40 && !device_tlbs {
            return Err(Refused("opcode"));
        }
        let by_tag = (0x10..=0x13).contains(&opcode);
        for (wrong, name) in [
            (opcode < 0x10 && self.is_set(Self::SECURE), "SSec"),
            (opcode == 0x40 && self.is_set(Self::GLOBAL), "Global"),
            (by_tag && self.is_set(Self::VMID), "VMID"),
            (self.0[0] & !(first | 0xFF) != 0 || self.0[1] & !second != 0, "reserved bits"),
        ] {
            if wrong {
                return Err(Refused(name));
            }
        }
        let stream = StreamId(self.get(Self::STREAM) as u32);
        let substream = Pasid::from_low_bits(self.get(Self::SUBSTREAM));
        let asid = self.get(Self::ASID) as u16;
        Ok(match opcode {
            0x03 => GuestRequest::Entries { first: stream, log2: 0 },
            0x04 => {
                let log2 = self.get(Self::RANGE) as u8 + 1;
                let below = 1_u32.checked_shl(log2.into()).map_or(u32::MAX, |entries| entries - 1);
                GuestRequest::Entries { first: StreamId(stream.0 & !below), log2 }
            }
            0x05 => GuestRequest::Contexts { stream, pasid: Some(substream) },
            0x06 => GuestRequest::Contexts { stream, pasid: None },
            0x10 | 0x30 => GuestRequest::FirstStage { asid: None, pages: None },
            0x11 => GuestRequest::FirstStage { asid: Some(asid), pages: None },
            0x12 => GuestRequest::FirstStage { asid: Some(asid), pages: self.pages(ranges)? },
            0x13 => GuestRequest::FirstStage { asid: None, pages: self.pages(ranges)? },
            0x40 => {
                let size = self.get(Self::SIZE);
                if size > 52 {
                    return Err(Refused("Size"));
                }
                let pasid = self.is_set(Self::SUBSTREAM_VALID).then_some(substream);
                // The unit takes the bits below the size for zero.
                let pages = (size < 52).then(|| {
                    let bytes = PAGE_SIZE << size;
                    (Iova(self.address(Self::ADDRESS) & bytes.wrapping_neg()), 1 << size)
                });
                GuestRequest::DeviceTlb { stream, pasid, pages }
            }
            0x46 if self.0[0] >> 12 & 3 == 3 => return Err(Refused("CS")),
            0x46 => GuestRequest::Sync,
            _ => GuestRequest::Nothing,
        })
    }

    /// The pages of an invalidation by address: one, or the range that NUM and SCALE give. `None`, which is all of them,
    /// where the driver cannot say the same: of granules other than 4 KiB.
    fn pages(&self, ranges: bool) -> Result<Option<(Iova, u64)>, Refused> {
        let iova = Iova(self.address(Self::ADDRESS));
        let (num, scale, level) = (self.get(Self::NUM), self.get(Self::SCALE), self.get(Self::LEVEL));
        let granule = self.get(Self::GRANULE);
        if granule != 0 && !ranges {
            return Err(Refused("TG"));
        }
        if granule == 0 {
            for (set, name) in [(num, "NUM"), (scale, "SCALE"), (level, "TTL")] {
                if set != 0 {
                    return Err(Refused(name));
                }
            }
            return Ok(Some((iova, 1)));
        }
        if num == 0 && scale == 0 && level == 0 {
            return Err(Refused("TG"));
        }
        Ok((granule == 1).then(|| (iova, (num + 1) << scale)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits { substreams: 20, two_levels: true, address_bits: 44, stall_choice: true, device_tlb: true };
    /// Row S10 of facts/smmuv3.md, section 11.2, as a guest writes it: Config 5, and neither MEV, SHCFG nor a second stage.
    const ENTRY: [u64; 8] = [0x8000_0000_A000_002B, 0x0000_0000_1800_00D6, 0, 0, 0, 0, 0, 0];

    /// A simple generator of words, so that a failure can be repeated.
    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    #[test]
    fn what_a_guest_may_say_is_taken_as_it_is() {
        let Ok(Choice::Translate(taken)) = choice(ENTRY, LIMITS) else { panic!("it is allowed") };

        assert_eq!(taken.0, [0x8000_0000_A000_0020, 0x0000_0000_1800_00D6, 0, 0, 0, 0, 0, 0]);
        for (w0, expected) in
            [(0, Choice::Abort), (1, Choice::Abort), (7, Choice::Abort), (9, Choice::Bypass)]
        {
            assert_eq!(choice([w0, 0, 0, 0, 0, 0, 0, 0], LIMITS), Ok(expected), "{w0:#x}");
        }
    }

    #[test]
    fn every_bit_that_is_not_a_guest_s_is_refused_and_never_taken() {
        for bit in 0..512 {
            let mut entry = ENTRY;
            entry[bit / 64] ^= 1 << (bit % 64);
            let may = MAY_SET[bit / 64] >> (bit % 64) & 1 != 0;
            match choice(entry, LIMITS) {
                Ok(Choice::Translate(taken)) => {
                    assert!(may, "bit {bit}");
                    let kept = taken.0[bit / 64] >> (bit % 64) & 1 == entry[bit / 64] >> (bit % 64) & 1;
                    assert!(kept || bit < 4, "bit {bit}");
                }
                // V and Config.
                Ok(_) => assert!(bit < 4, "bit {bit}"),
                Err(Refused(name)) => assert!(!name.is_empty() && (!may || bit != 0), "bit {bit}: {name}"),
            }
        }
    }

    #[test]
    fn no_other_bit_of_any_entry_ever_gets_through() {
        let mut state = 0x9E37_79B9_7F4A_7C15;
        let mut taken = 0;
        for _ in 0..100_000 {
            let sparse = |state: &mut u64| random(state) & random(state) & random(state) & random(state);
            let mut entry = ENTRY.map(|word| word ^ sparse(&mut state) & sparse(&mut state));
            if random(&mut state) > u64::MAX / 8 {
                entry.iter_mut().zip(MAY_SET).for_each(|(word, may)| *word &= may);
            }
            if let Ok(Choice::Translate(got)) = choice(entry, LIMITS) {
                taken += 1;
                // The guest's fields, without V and Config.
                for (word, may) in
                    [0xF8FF_FFFF_FFFF_FFF0, MAY_SET[1], 0, 0, 0, 0, 0, 0].into_iter().enumerate()
                {
                    assert_eq!(got.0[word] & !may, 0, "{entry:#x?}");
                    assert_eq!(entry[word] & !MAY_SET[word], 0, "{entry:#x?}");
                }
            }
        }
        assert!(taken > 1000, "{taken} were allowed");
    }

    #[test]
    fn a_field_that_is_refused_is_named() {
        type Change = fn(&mut [u64; 8]);
        let cases: [(Change, &str); 14] = [
            (|e| e[0] |= 3 << 1, "STE.Config"),
            (|e| e[0] |= 1 << 57, "reserved bits of STE"),
            (|e| e[0] |= 3 << 4, "STE.S1Fmt"),
            (|e| e[0] |= 1 << 45, "STE.S1ContextPtr"),
            (|e| e[0] |= 21 << 59, "STE.S1CDMax"),
            (|e| e[1] |= 3, "STE.S1DSS"),
            (|e| e[1] ^= 2 << 6, "STE.S1CSH"),
            (|e| e[1] |= 2 << 28, "STE.EATS"),
            (|e| e[1] |= 1 << 19, "STE.MEV"),
            (|e| e[1] |= 1 << 25, "STE.S2FWB"),
            (|e| e[1] |= 2 << 30, "STE.STRW"),
            (|e| e[1] |= 1 << 44, "STE.SHCFG"),
            (|e| e[2] |= 7, "STE.S2VMID"),
            (|e| e[3] |= 1 << 20, "STE.S2TTB"),
        ];
        for (change, name) in cases {
            let mut entry = ENTRY;
            change(&mut entry);
            assert_eq!(choice(entry, LIMITS), Err(Refused(name)));
        }
        let narrow = |limits| choice(ENTRY, limits).err();
        assert_eq!(narrow(Limits { substreams: 15, ..LIMITS }), Some(Refused("STE.S1CDMax")));
        assert_eq!(narrow(Limits { two_levels: false, ..LIMITS }), Some(Refused("STE.S1Fmt")));
        assert_eq!(narrow(Limits { address_bits: 31, ..LIMITS }), Some(Refused("STE.S1ContextPtr")));
        assert_eq!(narrow(Limits { stall_choice: false, ..LIMITS }), Some(Refused("STE.S1STALLD")));
        assert_eq!(narrow(Limits { device_tlb: false, ..LIMITS }), Some(Refused("STE.EATS")));
    }

    /// Rows of facts/smmuv3.md, section 11.5, without the VMID, which a guest's unit does not have.
    #[test]
    fn a_guest_s_commands_are_understood() {
        let stream = StreamId(0x108);
        let first_stage = |asid, pages: Option<(u64, u64)>| GuestRequest::FirstStage {
            asid,
            pages: pages.map(|(iova, pages)| (Iova(iova), pages)),
        };
        let device = |pasid, pages: Option<(u64, u64)>| GuestRequest::DeviceTlb {
            stream,
            pasid,
            pages: pages.map(|(iova, pages)| (Iova(iova), pages)),
        };
        for (words, expected) in [
            // K1, K2.
            ([0x0000_0108_0000_0001, 0], GuestRequest::Nothing),
            ([0x0000_0108_0000_5802, 0x1234_5003], GuestRequest::Nothing),
            // K3 to K7.
            ([0x0000_0108_0000_0003, 1], GuestRequest::Entries { first: stream, log2: 0 }),
            ([0x0000_0108_0000_0004, 7], GuestRequest::Entries { first: StreamId(0x100), log2: 8 }),
            ([0x04, 0x1F], GuestRequest::Entries { first: StreamId(0), log2: 32 }),
            ([0x0000_0108_0000_5005, 1], GuestRequest::Contexts { stream, pasid: Pasid::new(5) }),
            ([0x0000_0108_0000_0006, 0], GuestRequest::Contexts { stream, pasid: None }),
            // K9 to K12, and five pages (K13) without TTL.
            ([0x10, 0], first_stage(None, None)),
            ([0x0007_0000_0000_0011, 0], first_stage(Some(7), None)),
            ([0x0007_0000_0000_0012, 0x4020_1001], first_stage(Some(7), Some((0x4020_1000, 1)))),
            ([0x0007_0000_0090_0012, 0x4020_0701], first_stage(Some(7), Some((0x4020_0000, 512)))),
            ([0x0007_0000_0000_4012, 0x4020_5401], first_stage(Some(7), Some((0x4020_5000, 5)))),
            // A granule of 64 KiB: all of the address space.
            ([0x0007_0000_0000_4012, 0x4020_0C01], first_stage(Some(7), None)),
            // K14, K22 to K25, K34, K37.
            ([0x13, 0xFFFF_0000_1234_5000], first_stage(None, Some((0xFFFF_0000_1234_5000, 1)))),
            ([0x30, 0], first_stage(None, None)),
            ([0x0000_0108_0000_0040, 0x1000_0002], device(None, Some((0x1000_0000, 4)))),
            ([0x0000_0108_0000_0040, 0x34], device(None, None)),
            ([0x0000_0108_0000_5840, 0x2000_1009], device(Pasid::new(5), Some((0x2000_0000, 512)))),
            ([0x46, 0], GuestRequest::Sync),
            ([0x0000_CAFE_0FC0_1046, 0x8010_3F40], GuestRequest::Sync),
        ] {
            assert_eq!(GuestCommand(words).request(true, true), Ok(expected), "{words:#x?}");
        }
    }

    #[test]
    fn a_command_that_is_refused_names_the_field() {
        for (words, name) in [
            ([0x00, 0], "opcode"),
            // CFGI_VMS_PIDM, EL2_ALL, S12_VMALL, S2_IPA, PRI_RESP, RESUME, STALL_TERM, and one of the implementer's.
            ([0x07, 0], "opcode"),
            ([0x20, 0], "opcode"),
            ([0x28, 0], "opcode"),
            ([0x2A, 0], "opcode"),
            ([0x41, 0], "opcode"),
            ([0x44, 0], "opcode"),
            ([0x45, 0], "opcode"),
            ([0x80, 0], "opcode"),
            ([0x0000_0108_0000_0403, 1], "SSec"),
            ([0x0000_002A_0000_0010, 0], "VMID"),
            ([0x0007_002A_0000_0012, 0x4020_1001], "VMID"),
            ([0x0000_0108_0000_0A40, 0x34], "Global"),
            ([0x0000_0108_0000_0040, 0x35], "Size"),
            ([0x3046, 0], "CS"),
            ([0x0007_0000_0000_0012, 0x4020_1401], "TG"),
            ([0x0007_0000_0000_4012, 0x4020_1001], "NUM"),
            ([0x0007_0000_0090_0012, 0x4020_1001], "SCALE"),
            ([0x0007_0000_0000_0012, 0x4020_1301], "TTL"),
            ([0x0000_0108_0000_1006, 0], "reserved bits"),
            ([0x0000_0108_0000_0006, 1], "reserved bits"),
        ] {
            assert_eq!(GuestCommand(words).request(true, true), Err(Refused(name)), "{words:#x?}");
        }
        assert_eq!(GuestCommand([0x40, 0]).request(true, false), Err(Refused("opcode")));
        assert_eq!(GuestCommand([0x0090_0012, 0x4020_0701]).request(false, true), Err(Refused("TG")));
    }

    #[test]
    fn no_command_of_a_guest_is_more_than_its_fields() {
        let mut state = 0x2545_F491_4F6C_DD1D;
        let mut allowed = 0;
        for _ in 0..100_000 {
            let (at, sparse) = (random(&mut state) as usize % COMMANDS.len(), random(&mut state));
            let (opcode, first, second) = COMMANDS[at];
            let few = |state: &mut u64| random(state) & random(state) & random(state) & random(state);
            let mut words = [random(&mut state) & first | opcode, random(&mut state) & second];
            if sparse & 1 != 0 {
                words[0] ^= few(&mut state) & few(&mut state);
                words[1] ^= few(&mut state) & few(&mut state);
            }

            let Ok(request) = GuestCommand(words).request(sparse & 2 != 0, sparse & 4 != 0) else { continue };

            allowed += 1;
            let known = COMMANDS.iter().find(|known| known.0 == words[0] & 0xFF).expect("it was allowed");
            assert_eq!((words[0] & !(known.1 | 0xFF), words[1] & !known.2), (0, 0), "{words:#x?}");
            if let GuestRequest::FirstStage { pages: Some((_, pages)), .. }
            | GuestRequest::DeviceTlb { pages: Some((_, pages)), .. } = request
            {
                assert!((1..=1 << 51).contains(&pages), "{words:#x?}");
            }
        }
        assert!(allowed > 1000, "{allowed} were allowed");
    }
}
