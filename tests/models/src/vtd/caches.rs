//! What the unit, and the devices behind it, may remember, and what each invalidation makes them forget.

use super::{DeviceTlbEntry, State};
use std::collections::BTreeMap;

/// What translations are tagged with.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Tag {
    /// First stage: by domain and PASID (of a request without PASID: RID_PASID).
    First { did: u16, pasid: u32 },
    /// Second stage: by domain.
    Second { did: u16 },
    /// Both: by domain and PASID.
    Nested { did: u16, pasid: u32 },
}

impl Tag {
    /// Whether a PASID-based invalidation of `pasid` in domain `did` drops it.
    pub(super) fn is_of_pasid(self, did: u16, pasid: u32) -> bool {
        self == Self::First { did, pasid } || self == Self::Nested { did, pasid }
    }
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

    fn meets(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// A translation of 2^`log2` bytes, as the IOTLB holds it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaf {
    pub(super) tag: Tag,
    pub(super) input: u64,
    pub(super) log2: u32,
    pub(super) output: u64,
    /// False for what only caching mode lets a unit remember: that there is nothing.
    pub(super) present: bool,
    pub(super) read: bool,
    pub(super) write: bool,
    /// First stage: U/S at every level.
    pub(super) user: bool,
    /// First stage: the leaf's D is set, so a write need not walk again.
    pub(super) dirty: bool,
}

impl Leaf {
    fn span(&self) -> Span {
        Span::aligned(self.input, self.log2)
    }
}

/// A PASID table entry, with what the way to it said.
#[derive(Clone, Copy)]
pub(super) struct CachedPasid {
    pub(super) entry: [u64; 8],
    /// FPD of the directory entry.
    pub(super) directory_fpd: bool,
    pub(super) did: u16,
}

/// The caches of the unit, and the device TLBs behind it. None of them has a limit.
#[derive(Default)]
pub(super) struct Caches {
    /// Context cache, by source-id: the entry, and the domain that it is tagged with.
    pub(super) contexts: BTreeMap<u16, ([u64; 4], u16)>,
    /// PASID cache, by source-id and PASID.
    pub(super) pasids: BTreeMap<(u16, u32), CachedPasid>,
    /// IOTLB.
    pub(super) leaves: Vec<Leaf>,
    /// Paging-structure caches: entries that point at tables, by level and the input address above it.
    pub(super) structures: BTreeMap<(Tag, u32, u64), u64>,
    /// The device TLBs of all devices.
    pub(super) device: Vec<DeviceTlbEntry>,
}

impl Caches {
    /// Returns the translation of `input`.
    pub(super) fn leaf(&self, tag: Tag, input: u64) -> Option<Leaf> {
        let holds = |leaf: &&Leaf| leaf.tag == tag && leaf.span().meets(Span::aligned(input, 0));
        self.leaves.iter().find(holds).copied()
    }

    /// Remembers `leaf`, in place of whatever it overlaps.
    pub(super) fn keep(&mut self, leaf: Leaf) {
        self.leaves.retain(|old| old.tag != leaf.tag || !old.span().meets(leaf.span()));
        self.leaves.push(leaf);
    }

    /// Empties the context cache, the PASID cache and the IOTLB.
    pub(super) fn forget_all(&mut self) {
        self.contexts.clear();
        self.pasids.clear();
        self.leaves.clear();
        self.structures.clear();
    }

    /// Drops the contexts that `named` picks by source-id and domain.
    pub(super) fn forget_contexts(&mut self, named: impl Fn(u16, u16) -> bool) {
        self.contexts.retain(|&sid, &mut (_, did)| !named(sid, did));
    }

    /// Drops the PASID table entries that `named` picks by PASID and domain.
    pub(super) fn forget_pasids(&mut self, named: impl Fn(u32, u16) -> bool) {
        self.pasids.retain(|&(_, pasid), cached| !named(pasid, cached.did));
    }

    /// Drops the translations in `span` whose tag `named` picks; with `leaves_only` the ways to them may stay.
    pub(super) fn forget_translations(&mut self, named: impl Fn(Tag) -> bool, span: Span, leaves_only: bool) {
        self.leaves.retain(|leaf| !named(leaf.tag) || !leaf.span().meets(span));
        if !leaves_only {
            self.structures.retain(|&(tag, level, above), _| {
                let covered = Span::aligned(above << level_shift(level), level_shift(level));
                !named(tag) || !covered.meets(span)
            });
        }
    }

    /// Drops entries in `span` from the device TLB of `sid`: those of `pasid`, or all.
    pub(super) fn forget_device(&mut self, sid: u16, pasid: Option<u32>, span: Span) {
        self.device.retain(|entry| {
            let named = pasid.is_none_or(|pasid| entry.pasid.map(|p| p.value()) == Some(pasid));
            let covered = Span { first: entry.iova.0, last: entry.iova.0.saturating_add(entry.bytes - 1) };
            entry.stream.0 != u32::from(sid) || !named || !covered.meets(span)
        });
    }
}

/// The input address bit at which an entry of `level` starts to choose: 12 for a level-1 entry, 21 for level 2.
pub(super) fn level_shift(level: u32) -> u32 {
    3 + level * 9
}

impl State {
    /// IOTLB invalidation without PASID: 1 global, 2 domain-, 3 page-selective. Returns false if the unit cannot.
    ///
    /// A domain's first-stage translations stay, because the manual asks for a PASID-based invalidation to drop them.
    /// Nested ones go with the domain, but not with pages of it: what they are kept by are addresses of the first stage.
    /// `page` is IVA, or the second word of the descriptor, which have the same layout.
    pub(super) fn invalidate_iotlb(&mut self, granularity: u64, did: u16, page: u64) -> bool {
        let cap = self.config.cap;
        let second = |tag| tag == Tag::Second { did };
        let of_domain = |tag| second(tag) || matches!(tag, Tag::Nested { did: d, .. } if d == did);
        match granularity {
            1 => self.caches.forget_translations(|_| true, Span::ALL, false),
            2 => self.caches.forget_translations(of_domain, Span::ALL, false),
            // CAP.PSI, and CAP.MAMV as the largest AM.
            3 if cap & 1 << 39 != 0 && page & 0x3F <= cap >> 48 & 0x3F => {
                let span = self.page_span(page);
                self.caches.forget_translations(second, span, page & 1 << 6 != 0);
            }
            _ => return false,
        }
        true
    }

    /// Returns what ADDR and AM name: 2^AM pages, aligned to their size.
    pub(super) fn page_span(&mut self, word: u64) -> Span {
        let (address, log2) = (word & !0xFFF, 12 + (word & 0x3F) as u32);
        let span = Span::aligned(address, log2);
        if span.first != address {
            self.violation(format!(
                "invalidation of 2^{log2} bytes at {address:#x}, which is not aligned to them"
            ));
        }
        span
    }
}
