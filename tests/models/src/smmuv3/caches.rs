//! What the unit, and the devices behind it, may remember, and what each invalidation makes them forget.

use super::DeviceTlbEntry;
use std::{collections::BTreeMap, ops::RangeInclusive};

/// What translations are tagged with.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Tag {
    /// Stage 1, or both stages in one: by VMID, and by ASID unless the mapping is global.
    Stage1 { vmid: u16, asid: Option<u16> },
    /// Stage 2: by VMID.
    Stage2 { vmid: u16 },
}

/// The bytes from `first` to `last`, both included, so that the whole address space is a span as well.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Span {
    pub(super) const ALL: Self = Self { first: 0, last: u64::MAX };

    /// The naturally aligned 2^`log2` bytes around `address`.
    pub(super) fn aligned(address: u64, log2: u32) -> Self {
        let below = if log2 < 64 { (1 << log2) - 1 } else { u64::MAX };
        Self { first: address & !below, last: address | below }
    }

    pub(super) fn meets(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// A translation of 2^`log2` bytes, as the TLB holds it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaf {
    pub(super) tag: Tag,
    pub(super) input: u64,
    pub(super) log2: u32,
    /// The level of the leaf; of both stages in one, that of stage 1.
    pub(super) level: u32,
    pub(super) output: u64,
    pub(super) read: bool,
    pub(super) write: bool,
}

impl Leaf {
    fn span(&self) -> Span {
        Span::aligned(self.input, self.log2)
    }
}

/// Which tags a TLBI names.
#[derive(Clone, Copy, Debug)]
pub(super) enum Of {
    /// Everything (NSNH_ALL).
    All,
    /// Both stages of a VMID (S12_VMALL).
    Vmid(u16),
    /// Stage 1 of a VMID (NH_ALL, NH_VAA).
    Stage1(u16),
    /// Stage 1 of a VMID and ASID, but not what is global (NH_ASID).
    Asid(u16, u16),
    /// Stage 1 of a VMID and ASID, and what is global (NH_VA).
    AsidAndGlobal(u16, u16),
    /// Stage 2 of a VMID, but not both stages in one (S2_IPA).
    Stage2(u16),
}

impl Of {
    fn names(self, tag: Tag) -> bool {
        match (self, tag) {
            (Self::All, _) => true,
            (Self::Vmid(of), Tag::Stage1 { vmid, .. } | Tag::Stage2 { vmid }) => vmid == of,
            (Self::Stage1(of), Tag::Stage1 { vmid, .. }) => vmid == of,
            (Self::Asid(of, with), Tag::Stage1 { vmid, asid }) => vmid == of && asid == Some(with),
            (Self::AsidAndGlobal(of, with), Tag::Stage1 { vmid, asid }) => {
                vmid == of && asid.is_none_or(|asid| asid == with)
            }
            (Self::Stage2(of), Tag::Stage2 { vmid }) => vmid == of,
            _ => false,
        }
    }
}

/// Which addresses a TLBI names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pages {
    pub(super) span: Span,
    /// Leaf: the ways to the translations may stay.
    pub(super) leaves_only: bool,
    /// TTL: the level that the leaves are at; others may stay.
    pub(super) level: Option<u32>,
}

impl Pages {
    pub(super) const ALL: Self = Self { span: Span::ALL, leaves_only: false, level: None };
}

/// What a command promises to have been forgotten when the next CMD_SYNC is complete.
#[derive(Clone, Debug)]
pub(super) enum Forget {
    /// CFGI_STE, CFGI_STE_RANGE, CFGI_ALL: with all context descriptors of the streams. Unless Leaf, the first-level
    /// descriptors that lead to the streams as well.
    Streams { sids: RangeInclusive<u32>, leaf: bool },
    /// CFGI_CD; without a SubstreamID, CFGI_CD_ALL. Unless Leaf, the first-level descriptors that lead there as well.
    Contexts { sid: u32, ssid: Option<u32>, leaf: bool },
    /// TLBI.
    Translations { of: Of, pages: Pages },
    /// ATC_INV; without a SubstreamID, whatever the substream.
    Device { sid: u32, ssid: Option<u32>, span: Span },
}

/// What a device TLB holds, and what it was made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceEntry {
    pub(super) entry: DeviceTlbEntry,
    pub(super) tag: Tag,
}

impl DeviceEntry {
    fn span(&self) -> Span {
        let first = self.entry.iova.0;
        Span { first, last: first.saturating_add(self.entry.bytes - 1) }
    }
}

/// The caches of the unit, and the device TLBs behind it. None of them has a limit.
#[derive(Default)]
pub(super) struct Caches {
    /// Stream table entries, the invalid ones too.
    pub(super) streams: BTreeMap<u32, [u64; 8]>,
    /// First-level descriptors of a stream table of two levels, the invalid ones too, by the first stream of theirs; and
    /// their last stream.
    pub(super) first_level: BTreeMap<u32, (u32, u64)>,
    /// Context descriptors, by StreamID and SubstreamID.
    pub(super) contexts: BTreeMap<(u32, u32), [u64; 8]>,
    /// First-level descriptors of tables of context descriptors, the invalid ones too, by StreamID and the first SubstreamID
    /// of theirs; and their last.
    pub(super) first_contexts: BTreeMap<(u32, u32), (u32, u64)>,
    /// TLB.
    pub(super) leaves: Vec<Leaf>,
    /// Walk caches: table descriptors, by level and the input address above it.
    pub(super) tables: BTreeMap<(Tag, u32, u64), u64>,
    /// The device TLBs of all devices.
    pub(super) device: Vec<DeviceEntry>,
    /// Everything that was cached before reset was dropped, of the configuration.
    pub(super) configuration_known: bool,
    /// The same, of translations.
    pub(super) translations_known: bool,
}

impl Caches {
    /// Returns the translation of `input` for one of `tags`.
    pub(super) fn leaf(&self, tags: &[Tag], input: u64) -> Option<Leaf> {
        let at = Span::aligned(input, 0);
        self.leaves.iter().find(|leaf| tags.contains(&leaf.tag) && leaf.span().meets(at)).copied()
    }

    /// Remembers `leaf`, in place of whatever it overlaps.
    pub(super) fn keep(&mut self, leaf: Leaf) {
        self.leaves.retain(|old| old.tag != leaf.tag || !old.span().meets(leaf.span()));
        self.leaves.push(leaf);
    }

    /// Drops what `batch` names: everything since the CMD_SYNC before.
    ///
    /// A device may ask again between an ATC_INV and a TLBI of the same batch, whichever comes first in the queue. So
    /// what only this batch drops from the TLB stays in the device TLB.
    pub(super) fn forget(&mut self, batch: &[Forget]) {
        let before = self.leaves.clone();
        for forget in batch {
            match forget {
                Forget::Streams { sids, leaf } => {
                    self.configuration_known |= *sids == (0..=u32::MAX);
                    if !leaf {
                        let leads = |first: u32, last: u32| first <= *sids.end() && *sids.start() <= last;
                        self.first_level.retain(|&first, &mut (last, _)| !leads(first, last));
                    }
                    self.streams.retain(|sid, _| !sids.contains(sid));
                    self.contexts.retain(|(sid, _), _| !sids.contains(sid));
                    self.first_contexts.retain(|(sid, _), _| !sids.contains(sid));
                }
                Forget::Contexts { sid, ssid, leaf } => {
                    let named = |first, last| ssid.is_none_or(|ssid| (first..=last).contains(&ssid));
                    self.contexts.retain(|&(of, context), _| of != *sid || !named(context, context));
                    if !leaf {
                        self.first_contexts
                            .retain(|&(of, first), &mut (last, _)| of != *sid || !named(first, last));
                    }
                }
                Forget::Translations { of, pages } => {
                    self.translations_known |= matches!(of, Of::All);
                    self.forget_translations(*of, *pages);
                }
                Forget::Device { .. } => {}
            }
        }
        let left = &self.leaves;
        let gone = |entry: &DeviceEntry| {
            let backs = |leaf: &&Leaf| leaf.tag == entry.tag && leaf.span().meets(entry.span());
            before.iter().filter(backs).count() > left.iter().filter(backs).count()
        };
        for forget in batch {
            if let Forget::Device { sid, ssid, span } = forget {
                self.device.retain(|entry| !named(entry, *sid, *ssid, *span) || gone(entry));
            }
        }
    }

    fn forget_translations(&mut self, of: Of, pages: Pages) {
        let Pages { span, leaves_only, level } = pages;
        self.leaves.retain(|leaf| {
            let at_level = level.is_none_or(|level| level == leaf.level);
            !(of.names(leaf.tag) && leaf.span().meets(span) && at_level)
        });
        if !leaves_only {
            self.tables.retain(|&(tag, level, above), _| {
                let shift = level_shift(level);
                !(of.names(tag) && Span::aligned(above << shift, shift).meets(span))
            });
        }
    }

    /// Drops what the device TLB of `sid` holds.
    pub(super) fn forget_device(&mut self, sid: u32) {
        self.device.retain(|entry| !named(entry, sid, None, Span::ALL));
    }
}

/// Whether an ATC_INV names `entry`. Without a PASID it names those of all PASIDs too.
fn named(entry: &DeviceEntry, sid: u32, ssid: Option<u32>, span: Span) -> bool {
    let of = entry.entry.pasid.map(|pasid| pasid.value());
    entry.entry.stream.0 == sid && ssid.is_none_or(|ssid| of == Some(ssid)) && entry.span().meets(span)
}

/// The lowest input address bit that a descriptor of `level` translates nothing of: 12 for level 3, 21 for level 2.
pub(super) fn level_shift(level: u32) -> u32 {
    39 - level * 9
}
