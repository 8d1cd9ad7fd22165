//! The arrays of [`Call::Invalidate`](crate::Call::Invalidate): what a guest wants forgotten, entry by entry.
//!
//! An array has a type, and the type fixes the layout of its entries for ever: another layout is another type. A guest
//! learns with an empty array whether the hypervisor takes a type.
//!
//! | type | an entry | words |
//! |---|---|---|
//! | [`Layout::Pages`] | pages of an address space that the hypervisor holds: attachment, address, pages, flags | 4 |
//! | [`Layout::VtdStage1`] | pages of a first stage that the guest bound: attachment, address, pages or all ones, flags | 4 |
//! | [`Layout::SmmuCommand`] | one command of Arm's SMMUv3, as the architecture lays it out | 2 |
//!
//! Addresses are of whole pages of 4 KiB. The one flag is [`LEAF`]: no table between the root and the last level changed.
//!
//! What is decoded is a [`Request`], in which nothing is left that hardware would take for its own: whose VMID and which
//! stream it is about is the hypervisor's to fill in, from the guest that asks and from the guest's own names. A bit that
//! is not in the table of its command is refused, because what hardware does with it is unknown: it may stop the command
//! queue that all guests share.

use crate::call::ARRAY;
use iommu::{Field, Iova, PAGE_SIZE, Pasid, Words, descriptor};

numbered! {
    /// The type of an array: how its entries are laid out.
    pub enum Layout {
        /// Pages of an address space that the hypervisor holds.
        Pages = 1,
        /// Pages of a VT-d first stage that the guest bound.
        VtdStage1 = 2,
        /// Commands of SMMUv3.
        SmmuCommand = 3,
    }
}

impl Layout {
    /// Returns the 64-bit words of an entry.
    pub const fn words(self) -> usize {
        match self {
            Self::Pages | Self::VtdStage1 => 4,
            Self::SmmuCommand => 2,
        }
    }

    /// Decodes one entry, of which there are [`words`](Self::words).
    fn decode(self, entry: &[u64]) -> Result<Request, Refusal> {
        match (self, entry) {
            (Self::Pages, &[a, b, c, d]) => PagesEntry([a, b, c, d]).decode(false),
            (Self::VtdStage1, &[a, b, c, d]) => PagesEntry([a, b, c, d]).decode(true),
            (Self::SmmuCommand, &[low, high]) => SmmuCommand([low, high]).decode(),
            // Not of that length, so not this entry.
            _ => Err(Refusal { why: Refused::Size, word: 0, bits: 0 }),
        }
    }
}

/// Words of the longest entry.
pub const ENTRY_WORDS: usize = 4;
/// In the flags of an entry: no table between the root and the last level changed.
pub const LEAF: u64 = 1;
/// As the number of pages of a bound first stage: all of it. The address is zero.
pub const ALL_PAGES: u64 = u64::MAX;

numbered! {
    /// What is wrong with an entry.
    pub enum Refused {
        /// No command of this opcode is taken.
        Opcode = 1,
        /// Bits are set that have no meaning here.
        Bits = 2,
        /// No pages, or pages beyond the last address, or an address with all of them.
        Range = 3,
        /// The sizes of a range exclude one another, or stand for nothing.
        Size = 4,
        /// An attachment or a device that is none of the guest's.
        NotYours = 5,
    }
}

/// Why an entry was refused, and for which bits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Refusal {
    /// What is wrong.
    pub why: Refused,
    /// The word of the entry in which it is, from 0.
    pub word: u32,
    /// The bits of that word which are wrong, at their places; none if they are zero and should not be.
    pub bits: u64,
}

impl Refusal {
    /// Returns what the call returns for it: the number of `why` in 31:0 and the word in 63:32, and the bits.
    pub const fn values(self) -> [u64; 2] {
        [self.why as u64 | (self.word as u64) << 32, self.bits]
    }
}

/// A guest's own name for a device, where it thinks that it programs an SMMU: what it calls a StreamID.
///
/// No StreamID of the machine: the hypervisor looks up which device of this guest's it names, if any.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct VirtualStream(pub u32);

/// Which addresses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Range {
    /// All.
    All,
    /// Whole pages of 4 KiB, one at least, none beyond the last address.
    Pages {
        /// The first of them.
        first: Iova,
        /// How many.
        pages: u64,
    },
}

/// What a guest wants forgotten.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Request {
    /// Translations of an attachment.
    Attachment {
        /// The guest's name for it.
        attachment: u64,
        /// Which addresses.
        range: Range,
        /// No table between the root and the last level changed.
        leaf: bool,
    },
    /// Translations of the guest's own first stages, under whatever VMID the hypervisor gave it.
    Stage1 {
        /// Of this address space; `None` for all, the global ones included.
        asid: Option<u16>,
        /// Which addresses.
        range: Range,
        /// No table between the root and the last level changed.
        leaf: bool,
    },
    /// The context descriptors of a device.
    Contexts {
        /// The device.
        device: VirtualStream,
        /// Of this PASID, where 0 is also that of accesses without one; `None` for all.
        pasid: Option<Pasid>,
        /// No table between the root and the descriptor changed.
        leaf: bool,
    },
    /// What a device keeps itself.
    DeviceTlb {
        /// The device.
        device: VirtualStream,
        /// Of this PASID; `None` for accesses without one.
        pasid: Option<Pasid>,
        /// Of all PASIDs. Only with a PASID.
        global: bool,
        /// Which addresses.
        range: Range,
    },
}

descriptor! {
    /// An entry of [`Layout::Pages`] and of [`Layout::VtdStage1`]: attachment, address, pages, flags.
    pub struct PagesEntry([u64; 4]);
}

impl PagesEntry {
    /// What may be set in each word.
    const MASK: [u64; 4] = [u64::MAX, !(PAGE_SIZE - 1), u64::MAX, LEAF];

    fn decode(self, may_be_all: bool) -> Result<Request, Refusal> {
        allowed(&self.0, &Self::MASK)?;
        let [attachment, first, pages, flags] = self.0;
        let range = match (pages, first) {
            (ALL_PAGES, 0) if may_be_all => Range::All,
            _ => range(first, pages)?,
        };
        Ok(Request::Attachment { attachment, range, leaf: flags & LEAF != 0 })
    }
}

/// Returns the `pages` pages from `first` if they are, and end where addresses end or before.
fn range(first: u64, pages: u64) -> Result<Range, Refusal> {
    let beyond = (u64::MAX - first) / PAGE_SIZE + 1;
    if pages == 0 || pages > beyond {
        return Err(Refusal { why: Refused::Range, word: 2, bits: pages });
    }
    Ok(Range::Pages { first: Iova(first), pages })
}

/// Refuses what is set in `words` and not in `mask`.
fn allowed(words: &[u64], mask: &[u64]) -> Result<(), Refusal> {
    for (word, (found, allowed)) in words.iter().zip(mask).enumerate() {
        let bits = found & !allowed;
        if bits != 0 {
            return Err(Refusal { why: Refused::Bits, word: word as u32, bits });
        }
    }
    Ok(())
}

descriptor! {
    /// A command of SMMUv3 (Arm IHI 0070, "Commands"), as a guest writes it.
    pub struct SmmuCommand([u64; 2]);
}

impl SmmuCommand {
    const OPCODE: Field<Self> = Field::bits(7, 0);
    const GLOBAL: Field<Self> = Field::bit(9);
    const SUBSTREAM_VALID: Field<Self> = Field::bit(11);
    const NUM: Field<Self> = Field::bits(16, 12);
    const SUBSTREAM: Field<Self> = Field::bits(31, 12);
    /// One bit less than the largest unit has: the sixth is for addresses of 52 bits, which no guest is told of.
    const SCALE: Field<Self> = Field::bits(24, 20);
    /// Accepted, since a guest's driver fills it in, and never looked at.
    const VMID: Field<Self> = Field::bits(47, 32);
    const STREAM: Field<Self> = Field::bits(63, 32);
    const ASID: Field<Self> = Field::bits(63, 48);
    const LEAF: Field<Self> = Field::bit(64);
    const SIZE: Field<Self> = Field::bits(69, 64);
    const LEVEL: Field<Self> = Field::bits(73, 72);
    const GRANULE: Field<Self> = Field::bits(75, 74);
    const ADDRESS: Field<Self> = Field::bits(127, 76);

    /// `CMD_CFGI_CD`.
    pub const CFGI_CD: u8 = 0x05;
    /// `CMD_CFGI_CD_ALL`.
    pub const CFGI_CD_ALL: u8 = 0x06;
    /// `CMD_TLBI_NH_ALL`.
    pub const TLBI_NH_ALL: u8 = 0x10;
    /// `CMD_TLBI_NH_ASID`.
    pub const TLBI_NH_ASID: u8 = 0x11;
    /// `CMD_TLBI_NH_VA`.
    pub const TLBI_NH_VA: u8 = 0x12;
    /// `CMD_TLBI_NH_VAA`.
    pub const TLBI_NH_VAA: u8 = 0x13;
    /// `CMD_TLBI_NSNH_ALL`.
    pub const TLBI_NSNH_ALL: u8 = 0x30;
    /// `CMD_ATC_INV`.
    pub const ATC_INV: u8 = 0x40;

    /// `Size` of an `ATC_INV` for all addresses; larger ones are for no known span.
    const SIZE_ALL: u64 = 52;

    /// What may be set in a command with `opcode`, if it is taken at all.
    const fn mask(opcode: u8) -> Option<[u64; 2]> {
        const RANGE: [Field<SmmuCommand>; 7] = [
            SmmuCommand::NUM,
            SmmuCommand::SCALE,
            SmmuCommand::VMID,
            SmmuCommand::LEAF,
            SmmuCommand::LEVEL,
            SmmuCommand::GRANULE,
            SmmuCommand::ADDRESS,
        ];
        let fields: &[Field<Self>] = match opcode {
            Self::CFGI_CD => &[Self::SUBSTREAM, Self::STREAM, Self::LEAF],
            Self::CFGI_CD_ALL => &[Self::STREAM],
            Self::TLBI_NH_ALL => &[Self::VMID],
            Self::TLBI_NH_ASID => &[Self::VMID, Self::ASID],
            Self::TLBI_NH_VA => {
                let [low, high] = Self::union(&RANGE);
                let [asid, _] = Self::union(&[Self::ASID]);
                return Some([low | asid, high]);
            }
            Self::TLBI_NH_VAA => &RANGE,
            Self::TLBI_NSNH_ALL => &[],
            Self::ATC_INV => &[
                Self::GLOBAL,
                Self::SUBSTREAM_VALID,
                Self::SUBSTREAM,
                Self::STREAM,
                Self::SIZE,
                Self::ADDRESS,
            ],
            _ => return None,
        };
        Some(Self::union(fields))
    }

    /// The bits of the opcode and of `fields`.
    const fn union(fields: &[Field<Self>]) -> [u64; 2] {
        let mut mask = [0; 2];
        let [low, high] = Self::OPCODE.bits_of();
        mask[0] |= low;
        mask[1] |= high;
        let mut at = 0;
        while at < fields.len() {
            let [low, high] = fields[at].bits_of();
            mask[0] |= low;
            mask[1] |= high;
            at += 1;
        }
        mask
    }

    fn decode(self) -> Result<Request, Refusal> {
        let opcode = self.get(Self::OPCODE) as u8;
        let unknown = Refusal { why: Refused::Opcode, word: 0, bits: opcode.into() };
        let mask = Self::mask(opcode).ok_or(unknown)?;
        allowed(&self.0, &mask)?;
        let device = VirtualStream(self.get(Self::STREAM) as u32);
        let pasid = Some(Pasid::from_low_bits(self.get(Self::SUBSTREAM)));
        let asid = Some(self.get(Self::ASID) as u16);
        let leaf = self.is_set(Self::LEAF);
        Ok(match opcode {
            Self::CFGI_CD => Request::Contexts { device, pasid, leaf },
            Self::CFGI_CD_ALL => Request::Contexts { device, pasid: None, leaf: false },
            Self::TLBI_NH_ASID => Request::Stage1 { asid, range: Range::All, leaf },
            Self::TLBI_NH_VA => Request::Stage1 { asid, range: self.span()?, leaf },
            Self::TLBI_NH_VAA => Request::Stage1 { asid: None, range: self.span()?, leaf },
            Self::ATC_INV => {
                // Without SSV the unit looks at neither.
                let valid = self.is_set(Self::SUBSTREAM_VALID);
                Request::DeviceTlb {
                    device,
                    pasid: pasid.filter(|_| valid),
                    global: valid && self.is_set(Self::GLOBAL),
                    range: self.device_span()?,
                }
            }
            // NH_ALL; NSNH_ALL of a guest is for what is the guest's, and is the same.
            _ => Request::Stage1 { asid: None, range: Range::All, leaf },
        })
    }

    /// Returns the addresses of a `TLBI` by address: a page, or a range of granules.
    fn span(self) -> Result<Range, Refusal> {
        let [num, scale, level, granule] =
            [Self::NUM, Self::SCALE, Self::LEVEL, Self::GRANULE].map(|field| self.get(field));
        let first = self.address(Self::ADDRESS);
        let refusal = Refusal { why: Refused::Size, word: 1, bits: self.0[1] & 0xF00 };
        let log2_granule = match granule {
            // One address, and nothing is said of a range.
            0 if (num, scale, level) == (0, 0, 0) => {
                return Ok(Range::Pages { first: Iova(first), pages: 1 });
            }
            0 => return Err(refusal),
            // A range that says nothing is an illegal command, and 16 KiB tables of these sizes have no leaves at level 1.
            _ if (num, scale, level) == (0, 0, 0) || (granule, level) == (2, 1) => return Err(refusal),
            1 => 12,
            2 => 14,
            _ => 16,
        };
        // At most 2^5 * 2^31 * 2^16 bytes. The level is a hint, and what is not said is any level.
        let bytes = (num + 1) << (scale + log2_granule);
        let first = first >> log2_granule << log2_granule;
        // A range ends with the addresses, and does not go on at their beginning.
        let beyond = (u64::MAX - first) / PAGE_SIZE + 1;
        Ok(Range::Pages { first: Iova(first), pages: (bytes / PAGE_SIZE).min(beyond) })
    }

    /// Returns the addresses of an `ATC_INV`: 2^Size pages, aligned to as many.
    fn device_span(self) -> Result<Range, Refusal> {
        match self.get(Self::SIZE) {
            Self::SIZE_ALL => Ok(Range::All),
            size if size < Self::SIZE_ALL => {
                let pages = 1 << size;
                let first = self.address(Self::ADDRESS) & !(pages * PAGE_SIZE - 1);
                Ok(Range::Pages { first: Iova(first), pages })
            }
            size => Err(Refusal { why: Refused::Size, word: 1, bits: size }),
        }
    }
}

/// How far [`handle`] came.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use = "what was not handled is still remembered"]
pub struct Handled {
    /// Entries that were handled, from the first.
    pub handled: usize,
    /// Why the next one was not, if it was refused.
    pub refusal: Option<Refusal>,
    /// Whether there are more that were not looked at for want of budget.
    pub more: bool,
}

/// Hands the entries in `words`, a copy of a guest's array, one after the other to `each`, which may refuse them too.
///
/// It ends at the first that is refused, after `budget` entries, or after [`ARRAY`]. An entry counts as one however many
/// pages it is for: `each` is to do no more for many than to forget everything. Part of an entry at the end is none.
pub fn handle(
    layout: Layout,
    words: &[u64],
    budget: usize,
    mut each: impl FnMut(Request) -> Result<(), Refusal>,
) -> Handled {
    let entries = words.chunks_exact(layout.words());
    let limit = budget.min(ARRAY as usize);
    let more = entries.len() > limit;
    for (handled, entry) in entries.take(limit).enumerate() {
        if let Err(refusal) = layout.decode(entry).and_then(&mut each) {
            return Handled { handled, refusal: Some(refusal), more: false };
        }
    }
    Handled { handled: limit.min(words.len() / layout.words()), refusal: None, more }
}
