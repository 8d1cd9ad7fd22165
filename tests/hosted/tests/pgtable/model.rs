//! What a tree shall mean: an ordered map of leaves, and the tables that have to be there for them.

use crate::walker::{Kind, Seen};
use pgtable::{Attributes, Dirty, Error, Memory};
use std::collections::{BTreeMap, BTreeSet};

/// A leaf.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mapped {
    pub bytes: u64,
    pub phys: u64,
    pub attributes: Attributes,
}

/// The sizes of a format, worked out from the manuals' numbers of bits.
#[derive(Clone, Debug)]
pub struct Shape {
    pub page: u64,
    /// What an entry of each level spans, from the pages up.
    pub spans: Vec<u64>,
    /// The sizes of leaves.
    pub leaves: Vec<u64>,
    pub input_bits: u32,
    pub output_bits: u32,
}

impl Shape {
    pub fn of(kind: Kind) -> Self {
        let (page_bits, stride, levels, input_bits, large) = match kind {
            Kind::LongMode { levels, nested, .. } => {
                (12, 9, levels, if nested { 12 + 9 * levels } else { 11 + 9 * levels }, false)
            }
            Kind::SecondStage { levels, .. } => (12, 9, levels, 12 + 9 * levels, false),
            Kind::Arm { stage, granule, bits } => {
                let first = crate::walker::start_level(stage, granule, bits);
                (granule, granule - 3, (4 - first) as u32, bits, bits > 48)
            }
        };
        let spans: Vec<u64> = (0..levels).map(|level| 1 << (page_bits + stride * level)).collect();
        let arm = matches!(kind, Kind::Arm { .. });
        let leaves = match (page_bits, arm && large) {
            (12, false) => 3,
            (12, true) => 4,
            (_, false) => 2,
            (_, true) => 3,
        };
        let leaves = spans[..leaves.min(spans.len())].to_vec();
        let output_bits = if arm && !large { 48 } else { 52 };
        Self { page: 1 << page_bits, spans, leaves, input_bits, output_bits }
    }
}

/// What a tree shall mean.
#[derive(Clone, Debug)]
pub struct Model {
    pub shape: Shape,
    /// By the address at which each starts.
    pub leaves: BTreeMap<u64, Mapped>,
    /// Below the top one: by the level of the entry that points at it, and the address that its span starts at.
    pub tables: BTreeSet<(usize, u64)>,
    largest: u64,
    /// One bit of an entry says both that a leaf was written, and that nothing is known of it.
    one_bit: bool,
}

impl Model {
    /// Nothing mapped, and leaves of at most `largest` bytes.
    pub fn new(kind: Kind, largest: u64) -> Self {
        let one_bit = !matches!(kind, Kind::Arm { .. });
        Self { shape: Shape::of(kind), leaves: BTreeMap::new(), tables: BTreeSet::new(), largest, one_bit }
    }

    fn range(&self, start: u64, bytes: u64) -> Result<u64, Error> {
        let wrong = Error::Range { address: start, bytes };
        let end = start.checked_add(bytes).ok_or(wrong)?;
        let whole = start.is_multiple_of(self.shape.page) && bytes.is_multiple_of(self.shape.page);
        if whole && bytes != 0 && end <= 1 << self.shape.input_bits { Ok(end) } else { Err(wrong) }
    }

    /// The leaf that `address` lies in.
    pub fn find(&self, address: u64) -> Option<(u64, Mapped)> {
        let (&start, &leaf) = self.leaves.range(..=address).next_back()?;
        (address - start < leaf.bytes).then_some((start, leaf))
    }

    /// Maps with `left` frames left.
    pub fn map(
        &mut self,
        start: u64,
        bytes: u64,
        phys: u64,
        attributes: Attributes,
        left: usize,
    ) -> Result<(), Error> {
        let end = self.range(start, bytes)?;
        if let Some((at, _)) =
            self.find(start).or_else(|| self.leaves.range(start..end).next().map(|(&a, &m)| (a, m)))
        {
            return Err(Error::Mapped { address: at.max(start) });
        }
        let mut after = self.clone();
        let top = self.shape.spans.len() - 1;
        after.place(top, start, end, phys, attributes);
        if after.tables.len() - self.tables.len() > left {
            return Err(Error::NoFrame);
        }
        *self = after;
        Ok(())
    }

    fn place(&mut self, level: usize, start: u64, end: u64, phys: u64, attributes: Attributes) {
        let span = self.shape.spans[level];
        let mut at = start;
        while at < end {
            let base = at - at % span;
            let part_end = end.min(base + span);
            let to = phys + (at - start);
            let whole = at == base && part_end == base + span && to.is_multiple_of(span);
            let may = level == 0 || self.shape.leaves.contains(&span) && span <= self.largest;
            if whole && may && !self.tables.contains(&(level, base)) {
                self.leaves.insert(at, Mapped { bytes: span, phys: to, attributes });
            } else {
                self.tables.insert((level, base));
                self.place(level - 1, at, part_end, to, attributes);
            }
            at = part_end;
        }
    }

    /// The leaves of a range that has nothing else.
    fn all_leaves(&self, start: u64, end: u64, memory: Option<Memory>) -> Result<Vec<(u64, Mapped)>, Error> {
        let mut found = Vec::new();
        let mut at = start;
        while at < end {
            let (leaf_start, leaf) = self.find(at).ok_or(Error::NotMapped { address: at })?;
            if leaf_start < start || leaf_start + leaf.bytes > end {
                return Err(Error::Superpage { address: leaf_start, bytes: leaf.bytes });
            }
            if memory.is_some_and(|memory| memory != leaf.attributes.memory) {
                return Err(Error::Memory);
            }
            found.push((leaf_start, leaf));
            at = leaf_start + leaf.bytes;
        }
        Ok(found)
    }

    /// Unmaps; returns the size of the smallest leaf, and how many tables go.
    pub fn unmap(&mut self, start: u64, bytes: u64) -> Result<(u64, usize), Error> {
        let end = self.range(start, bytes)?;
        let gone = self.all_leaves(start, end, None)?;
        for (at, _) in &gone {
            self.leaves.remove(at);
        }
        let before = self.tables.len();
        let spans = self.shape.spans.clone();
        self.tables.retain(|&(level, base)| base < start || base + spans[level] > end);
        let smallest = gone.iter().map(|(_, leaf)| leaf.bytes).min().unwrap_or_default();
        Ok((smallest, before - self.tables.len()))
    }

    /// Changes permissions; returns the addresses of the leaves that become others.
    pub fn protect(&mut self, start: u64, bytes: u64, attributes: Attributes) -> Result<Vec<u64>, Error> {
        let end = self.range(start, bytes)?;
        let mut changed = Vec::new();
        for (at, leaf) in self.all_leaves(start, end, Some(attributes.memory))? {
            let was = leaf.attributes;
            let was_dirty = was.dirty == Dirty::Dirty || self.one_bit && was.dirty == Dirty::Untracked;
            let keeps = was.perms.write && was_dirty && attributes.dirty == Dirty::Clean;
            let dirty = match attributes.perms.write {
                true if keeps => was.dirty,
                true => attributes.dirty,
                false => Dirty::Untracked,
            };
            let now = Attributes { perms: attributes.perms, dirty, ..was };
            self.leaves.insert(at, Mapped { attributes: now, ..leaf });
            if now != was {
                changed.push(at);
            }
        }
        Ok(changed)
    }
}

/// What a walk shall find at `address` of a leaf at `start`.
pub fn expected(kind: Kind, start: u64, leaf: Mapped, address: u64) -> Seen {
    let Attributes { perms, memory, accessed, dirty } = leaf.attributes;
    let (long_mode, arm) = (matches!(kind, Kind::LongMode { .. }), matches!(kind, Kind::Arm { .. }));
    let cannot_forbid_execution =
        matches!(kind, Kind::SecondStage { .. } | Kind::LongMode { execute_disable: false, .. });
    Seen {
        phys: leaf.phys + (address - start),
        leaf_bytes: leaf.bytes,
        read: perms.read || long_mode,
        write: perms.write,
        execute: perms.execute || cannot_forbid_execution,
        privileged: perms.privileged,
        memory: match memory {
            Memory::WriteBack => 0,
            Memory::Uncached => 1,
            Memory::Device => {
                if long_mode {
                    1
                } else {
                    2
                }
            }
        },
        accessed,
        // What is not tracked counts as dirty, and has its bit set where a format has one.
        dirty: perms.write && (dirty == Dirty::Dirty || dirty == Dirty::Untracked && !arm),
        clean: perms.write && dirty == Dirty::Clean,
    }
}
