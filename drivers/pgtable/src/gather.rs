//! What changed, for the driver to invalidate, and what waits until it has.

use crate::{Format, Frames, Table as _, tree::LINK};
use core::marker::PhantomData;
use iommu::PhysAddr;

/// Ranges that a gather keeps apart.
pub const RANGES: usize = 8;

/// Addresses whose leaves changed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Changed {
    start: u64,
    /// The address after the last. Input addresses have 57 bits at most.
    end: u64,
    leaf_bits: u32,
    tables: bool,
}

impl Changed {
    /// The first address.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// How many bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// The size of the smallest leaf that changed, in bytes.
    pub fn leaf_bytes(&self) -> u64 {
        1 << self.leaf_bits
    }

    /// Whether tables went away, too: what the unit remembers of entries above the leaves has to go.
    pub fn tables_went(&self) -> bool {
        self.tables
    }
}

/// What one or more changes of a tree ask the driver to invalidate, and the tables that they took out of use.
///
/// 1. Invalidate [`ranges`](Self::ranges), and wait for the ticket.
/// 2. Give the tables back: [`give_back`](Self::give_back). If the ticket never completes, drop the gather instead; its
///    frames are then never used again.
///
/// Adjacent changes of leaves of one size become one range. A ninth range makes the eighth larger.
#[derive(Debug)]
#[must_use = "what changed has to be invalidated, and frames wait for that"]
pub struct Gather<F: Format> {
    /// The range that grows.
    open: Changed,
    /// The ranges before it.
    closed: [Changed; RANGES - 1],
    used: usize,
    retired: Retired<F>,
}

/// Tables that a change took out of use: hardware may still walk them.
///
/// [Give them back](Self::give_back) when the invalidation that covers the change has completed, or drop this if it never
/// does.
#[derive(Debug)]
#[must_use = "the frames of the tables wait for the invalidation"]
pub struct Retired<F: Format> {
    /// The first; word 0 of each leads to the next.
    first: u64,
    format: PhantomData<F>,
}

impl<F: Format> Retired<F> {
    /// None: of what is unmapped by pages, the tables stay.
    pub const NONE: Self = Self { first: 0, format: PhantomData };

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.first == 0
    }

    /// Gives them to `frames`.
    ///
    /// The ticket of the invalidation that covers the change has completed, and nobody who walks the tree in software has been
    /// at it since before the change.
    pub fn give_back(self, frames: &mut impl Frames) {
        let mut link = self.first;
        while link & LINK != 0 {
            let frame = PhysAddr(link & !LINK);
            link = frames.table(frame).load(0);
            frames.give_back(frame, 1 << F::LAYOUT.page_bits);
        }
    }
}

impl<F: Format> Default for Gather<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F: Format> Gather<F> {
    const NOTHING: Changed = Changed { start: 0, end: 0, leaf_bits: 0, tables: false };

    /// Nothing changed.
    pub const fn new() -> Self {
        Self { open: Self::NOTHING, closed: [Self::NOTHING; RANGES - 1], used: 0, retired: Retired::NONE }
    }

    /// Returns what changed.
    pub fn ranges(&self) -> impl Iterator<Item = Changed> {
        let open = (self.open.end != 0).then_some(self.open);
        self.closed.iter().copied().take(self.used).chain(open)
    }

    /// Whether tables went away.
    pub fn tables_went(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Returns the tables that went away, for a caller that knows by itself what to invalidate.
    pub fn into_retired(self) -> Retired<F> {
        self.retired
    }

    /// Gives the tables that went away back to `frames`; see [`Retired::give_back`].
    pub fn give_back(self, frames: &mut impl Frames) {
        self.retired.give_back(frames);
    }

    /// Notes a change of all leaves from `start` to before `end`, the smallest of which has 2^`leaf_bits` bytes.
    #[inline(always)]
    pub(crate) fn add(&mut self, start: u64, end: u64, leaf_bits: u32) {
        // One range that grows upwards is what most callers make.
        if self.open.end == 0 {
            self.open = Changed { start, end, leaf_bits, tables: false };
        } else if self.open.end == start && self.open.leaf_bits == leaf_bits {
            self.open.end = end;
        } else {
            self.add_apart(start, end, leaf_bits);
        }
    }

    #[inline(never)]
    fn add_apart(&mut self, start: u64, end: u64, leaf_bits: u32) {
        let Self { open, closed, used, .. } = self;
        let before = open.leaf_bits == leaf_bits && open.start == end;
        if let Some(place) = closed.get_mut(*used).filter(|_| !before) {
            *place = *open;
            *used += 1;
            *open = Changed { start, end, leaf_bits, tables: false };
        } else {
            open.start = open.start.min(start);
            open.end = open.end.max(end);
            open.leaf_bits = open.leaf_bits.min(leaf_bits);
        }
    }

    /// Notes that tables went away in the range that was added last.
    pub(crate) fn add_tables(&mut self) {
        self.open.tables = true;
    }

    /// Takes in the table `frame`, which nothing points at any more.
    pub(crate) fn keep(&mut self, frames: &mut impl Frames, frame: PhysAddr) {
        // Hardware may still walk it. A link is not present in any format, and what it replaces is going.
        frames.table(frame).store(0, self.retired.first);
        frames.publish(frame..PhysAddr(frame.0 + 8));
        self.retired.first = frame.0 | LINK;
    }
}
