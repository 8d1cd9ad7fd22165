//! The walker.
//!
//! One leaf, where all tables are there, is changed by one short walk that does nothing if anything is unusual. All else is
//! two passes over the tables: the first looks whether the change is possible, and counts the tables that it needs; the
//! second cannot fail.

use crate::{Attributes, Dirty, Error, Format, Frames, Gather, Layout, Limits, Table as _, Words};
use core::{marker::PhantomData, ops::Range};
use iommu::{Grant, PhysAddr};

/// Tells the address of a frame, kept in word 0 of another, from none. With it alone an entry is not present in any format.
pub(crate) const LINK: u64 = 1 << 2;

/// Attempts at an entry that hardware changes meanwhile. It sets two bits of it, each at most once.
const ATTEMPTS: usize = 4;

/// One translation tree, of the format `F`.
#[derive(Debug)]
pub struct Tree<F: Format> {
    root: PhysAddr,
    /// Bit n set: entries of level n may be leaves.
    leaves: u32,
    /// Bits that an address of memory cannot have.
    beyond: u64,
    format: PhantomData<F>,
}

/// An entry that maps memory.
#[derive(Clone, Copy, Debug)]
pub struct Leaf<F: Format> {
    phys: u64,
    entry: u64,
    level: u32,
    format: PhantomData<F>,
}

impl<F: Format> Leaf<F> {
    /// Returns the memory: of the address that was asked for, or of the leaf's start in a walk over a range.
    #[inline(always)]
    pub fn phys(&self) -> PhysAddr {
        PhysAddr(self.phys)
    }

    /// Returns the size of the leaf in bytes.
    pub fn bytes(&self) -> u64 {
        1 << F::LAYOUT.shift(self.level)
    }

    /// Returns what it permits, and what was recorded.
    pub fn attributes(&self) -> Attributes {
        F::LAYOUT.decode(self.entry)
    }

    /// Whether it may have been written since it was mapped or cleared.
    pub fn dirty(&self) -> bool {
        let Attributes { perms, dirty, .. } = self.attributes();
        perms.write && dirty != Dirty::Clean
    }

    /// Returns the entry itself.
    pub fn entry(&self) -> u64 {
        self.entry
    }
}

/// Addresses, both ends included, and the memory that they are for.
#[derive(Clone, Copy)]
struct Piece {
    start: u64,
    last: u64,
    phys: u64,
}

impl Piece {
    /// The pieces that the entries of one table have, if an entry spans 2^`shift` bytes.
    fn parts(self, shift: u32) -> impl Iterator<Item = Self> {
        let low = (1 << shift) - 1;
        let mut next = Some(self.start);
        core::iter::from_fn(move || {
            let start = next?;
            let last = self.last.min(start | low);
            // The last piece ends the iteration, so this is below `self.last`.
            next = (last != self.last).then(|| last + 1);
            Some(Self { start, last, phys: self.phys.wrapping_add(start - self.start) })
        })
    }

    /// Whether it is all that an entry spans, if that is 2^`shift` bytes.
    #[inline(always)]
    fn is_whole(&self, shift: u32) -> bool {
        let low = (1 << shift) - 1;
        self.start & low == 0 && self.last == self.start | low
    }
}

/// Entries of one table that were stored, one after the other, and are published together.
struct Stored {
    frame: PhysAddr,
    first: usize,
    count: usize,
}

impl Stored {
    fn none(frame: PhysAddr) -> Self {
        Self { frame, first: 0, count: 0 }
    }

    fn add(&mut self, frames: &impl Frames, index: usize) {
        if self.first + self.count != index {
            self.publish(frames);
        }
        if self.count == 0 {
            self.first = index;
        }
        self.count += 1;
    }

    fn publish(&mut self, frames: &impl Frames) {
        if self.count != 0 {
            publish(frames, self.frame, self.first, self.count);
            self.count = 0;
        }
    }
}

#[inline(always)]
fn publish(frames: &impl Frames, frame: PhysAddr, first: usize, count: usize) {
    let start = frame.0 + first as u64 * 8;
    frames.publish(PhysAddr(start)..PhysAddr(start + count as u64 * 8));
}

/// Frames that were taken, and are no tables yet. Word 0 of each leads to the next.
struct Spare(u64);

impl Spare {
    /// Takes `count` frames of `bytes` bytes, or none.
    fn take(frames: &mut impl Frames, count: u64, bytes: usize) -> Result<Self, Error> {
        let mut spare = Self(0);
        for _ in 0..count {
            let Some(frame) = frames.take(bytes) else {
                // The last that was taken goes back first: a source that is a stack is then as it was.
                while let Some(frame) = spare.next(frames) {
                    frames.give_back(frame, bytes);
                }
                return Err(Error::NoFrame);
            };
            frames.table(frame).store(0, spare.0);
            spare.0 = frame.0 | LINK;
        }
        Ok(spare)
    }

    /// Returns the next frame, empty again.
    fn next(&mut self, frames: &mut impl Frames) -> Option<PhysAddr> {
        if self.0 & LINK == 0 {
            return None;
        }
        let frame = PhysAddr(self.0 & !LINK);
        let table = frames.table(frame);
        self.0 = table.load(0);
        table.store(0, 0);
        publish(frames, frame, 0, 1);
        Some(frame)
    }
}

/// A table, and where it lies.
struct Place<T> {
    frame: PhysAddr,
    table: T,
}

impl<F: Format> Tree<F> {
    const L: Layout = F::LAYOUT;
    const PAGE_BITS: u32 = Self::L.page_bits;
    const PAGE_LOW: u64 = (1 << Self::PAGE_BITS) - 1;
    const TABLE_BYTES: usize = 1 << Self::PAGE_BITS;
    const ENTRIES: usize = Self::TABLE_BYTES / 8;
    /// Entries that are used of the top table.
    const TOP_ENTRIES: usize = 1 << (Self::L.input_bits - Self::L.shift(Self::L.levels));

    /// An empty tree, for a machine with `limits`.
    pub fn new(frames: &mut impl Frames, limits: Limits) -> Result<Self, Error> {
        let can = |level: &u32| {
            let shift = Self::L.shift(*level);
            Self::L.leaves >> level & 1 != 0 && (*level == 1 || limits.leaf_sizes >> shift & 1 != 0)
        };
        let leaves = (1..=Self::L.levels).filter(can).fold(0, |leaves, level| leaves | 1 << level);
        let bits = limits.output_bits.min(Self::L.output_bits);
        let root = frames.take(Self::L.root_bytes()).ok_or(Error::NoFrame)?;
        Ok(Self { root, leaves, beyond: !((1 << bits) - 1) | Self::PAGE_LOW, format: PhantomData })
    }

    /// Returns the physical address of the top table.
    pub fn root(&self) -> PhysAddr {
        self.root
    }

    /// Returns the number of levels.
    pub fn levels(&self) -> u8 {
        Self::L.levels as u8
    }

    /// Maps `grant` at `address`, where nothing is mapped.
    #[inline(always)]
    pub fn map(
        &self,
        frames: &mut impl Frames,
        address: u64,
        grant: &Grant,
        attributes: impl Into<Attributes>,
    ) -> Result<(), Error> {
        let attributes = attributes.into();
        if grant.bytes() == 1 << Self::PAGE_BITS
            && self.map_one::<1, _>(frames, address, grant, attributes).is_some()
        {
            return Ok(());
        }
        self.map_large(frames, address, grant, attributes)
    }

    /// Maps what is no page by itself, or anything that is unusual.
    #[inline(always)]
    fn map_large(
        &self,
        frames: &mut impl Frames,
        address: u64,
        grant: &Grant,
        attributes: Attributes,
    ) -> Result<(), Error> {
        let one = match grant.bytes() {
            bytes if bytes == 1 << Self::L.shift(2) => {
                self.map_one::<2, _>(frames, address, grant, attributes)
            }
            bytes if Self::L.levels > 2 && bytes == 1 << Self::L.shift(3) => {
                self.map_one::<3, _>(frames, address, grant, attributes)
            }
            _ => None,
        };
        match one {
            Some(()) => Ok(()),
            None => self.map_many(frames, address, grant, attributes),
        }
    }

    /// Unmaps `bytes` bytes from `address`, all of which are mapped, by leaves that lie in the range as a whole.
    ///
    /// Hardware may still use what it cached, and the tables that go away: see [`Gather`]. Tables go away where the range is
    /// all that they span; the others stay, empty or not, for what is mapped next.
    #[inline(always)]
    pub fn unmap(
        &self,
        frames: &mut impl Frames,
        address: u64,
        bytes: u64,
        gather: &mut Gather<F>,
    ) -> Result<(), Error> {
        let (one, leaf_bits) = match bytes {
            bytes if bytes == 1 << Self::L.shift(1) => {
                (self.unmap_one::<1, _>(frames, address), Self::L.shift(1))
            }
            bytes if bytes == 1 << Self::L.shift(2) => {
                (self.unmap_one::<2, _>(frames, address), Self::L.shift(2))
            }
            _ => (None, 0),
        };
        match one {
            Some(()) => {
                gather.add(address, address + bytes, leaf_bits);
                Ok(())
            }
            None => self.unmap_many(frames, address, bytes, gather),
        }
    }

    /// Unmaps the page at `address`, if a leaf of that size is all that maps it; the caller knows what to invalidate. Else `None`:
    /// then nothing was done, and [`unmap`](Self::unmap) says why.
    #[inline(always)]
    pub fn unmap_page(&self, frames: &mut impl Frames, address: u64) -> Option<()> {
        self.unmap_one::<1, _>(frames, address)
    }

    /// Gives the leaves of a range, all of which is mapped, other permissions. Their memory type has to be the one they have.
    ///
    /// A leaf that may be written before and after keeps its record of writes.
    #[inline(always)]
    pub fn protect(
        &self,
        frames: &mut impl Frames,
        address: u64,
        bytes: u64,
        attributes: impl Into<Attributes>,
        gather: &mut Gather<F>,
    ) -> Result<(), Error> {
        let attributes = attributes.into();
        if bytes == 1 << Self::PAGE_BITS && self.protect_page(frames, address, attributes, gather).is_some() {
            return Ok(());
        }
        self.protect_many(frames, address, bytes, attributes, gather)
    }

    /// Reads and clears the record of writes of the leaves of a range; absent ones are passed over.
    ///
    /// Calls `dirty` for each leaf that may have been written, with its address. Hardware records a further write once the
    /// gather is invalidated. A leaf that is not tracked stays dirty.
    pub fn clear_dirty(
        &self,
        frames: &mut impl Frames,
        address: u64,
        bytes: u64,
        gather: &mut Gather<F>,
        mut dirty: impl FnMut(u64, Leaf<F>),
    ) -> Result<(), Error> {
        let (start, last) = Self::range(address, bytes)?;
        for end in [start, last] {
            if let Some(leaf) = self.translate(frames, end) {
                let (at, low) = (end & !(leaf.bytes() - 1), leaf.bytes() - 1);
                if at < start || at | low > last {
                    return Err(Error::Superpage { address: at, bytes: leaf.bytes() });
                }
            }
        }
        let piece = Piece { start, last, phys: 0 };
        let writes = Self::L.writes;
        let clean = |entry: u64| {
            if entry & writes.bits == writes.dirty { entry & !writes.bits | writes.clean } else { entry }
        };
        let mut seen = |at, leaf: Leaf<F>| {
            if leaf.dirty() {
                dirty(at, leaf);
            }
        };
        self.change(frames, self.root, Self::L.levels, piece, gather, &clean, &mut seen);
        Ok(())
    }

    /// Returns the leaf at `address`, and the memory that it has there.
    #[inline]
    pub fn translate(&self, words: &impl Words, address: u64) -> Option<Leaf<F>> {
        if address >> Self::L.shift(Self::L.levels) >= Self::TOP_ENTRIES as u64 {
            return None;
        }
        let mut table = words.table(self.root);
        macro_rules! down_from {
            ($level:literal) => {
                if Self::L.levels >= $level {
                    let entry = table.load(Self::index(address, $level));
                    if !Self::L.is_table(entry) {
                        return Self::leaf(entry, $level, address);
                    }
                    table = words.table(Self::L.next(entry));
                }
            };
        }
        down_from!(5);
        down_from!(4);
        down_from!(3);
        down_from!(2);
        Self::leaf(table.load(Self::index(address, 1)), 1, address)
    }

    /// Calls `leaf` for each leaf that has a part of the range, in their order, with the address at which it starts.
    pub fn walk(
        &self,
        words: &impl Words,
        address: u64,
        bytes: u64,
        mut leaf: impl FnMut(u64, Leaf<F>),
    ) -> Result<(), Error> {
        let (start, last) = Self::range(address, bytes)?;
        self.walk_in(words, self.root, Self::L.levels, Piece { start, last, phys: 0 }, &mut leaf);
        Ok(())
    }

    /// Gives all tables back to `frames`. No one walks the tree any more: the caller's invalidation has completed.
    pub fn take_down(self, frames: &mut impl Frames) {
        self.give_back(frames, self.root, Self::L.levels);
    }

    /// Returns both ends of a range of whole pages that the format can address.
    #[inline(always)]
    fn range(address: u64, bytes: u64) -> Result<(u64, u64), Error> {
        let last = address.wrapping_add(bytes).wrapping_sub(1);
        // Nothing at all ends before it starts, or at the end of all addresses; so does what wraps.
        if (address | bytes) & Self::PAGE_LOW != 0 || last < address || last >> Self::L.input_bits != 0 {
            return Err(Error::Range { address, bytes });
        }
        Ok((address, last))
    }

    /// Returns the index of `address` in a table of `level`.
    #[inline(always)]
    fn index(address: u64, level: u32) -> usize {
        let entries = if level == Self::L.levels { Self::TOP_ENTRIES } else { Self::ENTRIES };
        (address >> Self::L.shift(level)) as usize & (entries - 1)
    }

    /// Returns the indices of a piece, made of whole entries, within one table.
    #[inline(always)]
    fn run(level: u32, piece: Piece) -> Range<usize> {
        let first = Self::index(piece.start, level);
        let end = first + ((piece.last - piece.start) >> Self::L.shift(level)) as usize + 1;
        // The bound changes nothing; with it no index is checked again.
        first..end.min(if level == Self::L.levels { Self::TOP_ENTRIES } else { Self::ENTRIES })
    }

    /// Returns the address of entry `index`, if that of `run.start` is `piece.start`.
    #[inline(always)]
    fn address(level: u32, piece: Piece, run: &Range<usize>, index: usize) -> u64 {
        piece.start + (((index - run.start) as u64) << Self::L.shift(level))
    }

    #[inline(always)]
    fn leaf(entry: u64, level: u32, address: u64) -> Option<Leaf<F>> {
        if entry & Self::L.present == 0 {
            return None;
        }
        let low = (1 << Self::L.shift(level)) - 1;
        let phys = Self::L.unpack(entry) & !low | address & low;
        Some(Leaf { phys, entry, level, format: PhantomData })
    }

    /// Follows `address` down to its table of `LEVEL`. `None` if there is no such table, or the address is none of the tree's.
    #[inline(always)]
    fn at<const LEVEL: u32, W: Words>(&self, words: &W, address: u64) -> Option<Place<W::Table>> {
        if address >> Self::L.shift(Self::L.levels) >= Self::TOP_ENTRIES as u64 {
            return None;
        }
        let mut place = Place { frame: self.root, table: words.table(self.root) };
        // Written out, because a step of a level that the compiler knows is a third of one that it does not.
        macro_rules! down_from {
            ($level:literal) => {
                if Self::L.levels >= $level && LEVEL < $level {
                    let entry = place.table.load(Self::index(address, $level));
                    if !Self::L.is_table(entry) {
                        return None;
                    }
                    let frame = Self::L.next(entry);
                    place = Place { frame, table: words.table(frame) };
                }
            };
        }
        down_from!(5);
        down_from!(4);
        down_from!(3);
        down_from!(2);
        Some(place)
    }

    /// Maps one leaf of `LEVEL`, if nothing is in its way and no table is missing. Else `None`: then nothing was done.
    #[inline(always)]
    fn map_one<const LEVEL: u32, S: Frames>(
        &self,
        frames: &S,
        address: u64,
        grant: &Grant,
        attributes: Attributes,
    ) -> Option<()> {
        let low = (1 << Self::L.shift(LEVEL)) - 1;
        let phys = grant.phys().start.0;
        let bits = Self::L.encode(attributes).ok()? | if LEVEL == 1 { Self::L.page } else { Self::L.block };
        let fits = LEVEL == 1 || self.leaves >> LEVEL & 1 != 0 && phys & low == 0;
        if address & low != 0 || phys & self.beyond != 0 || !fits {
            return None;
        }
        let place = self.at::<LEVEL, S>(frames, address)?;
        let index = Self::index(address, LEVEL);
        if place.table.load(index) & Self::L.present != 0 {
            return None;
        }
        place.table.store(index, Self::L.pack(phys) | bits);
        publish(frames, place.frame, index, 1);
        Some(())
    }

    /// Unmaps one leaf of `LEVEL`, if it is there. Else `None`: then nothing was done.
    #[inline(always)]
    fn unmap_one<const LEVEL: u32, S: Frames>(&self, frames: &S, address: u64) -> Option<()> {
        if address & ((1 << Self::L.shift(LEVEL)) - 1) != 0 {
            return None;
        }
        let place = self.at::<LEVEL, S>(frames, address)?;
        let index = Self::index(address, LEVEL);
        let entry = place.table.load(index);
        if entry & Self::L.present == 0 || LEVEL > 1 && Self::L.is_table(entry) {
            return None;
        }
        place.table.store(index, 0);
        publish(frames, place.frame, index, 1);
        Some(())
    }

    /// Changes the permissions of one page of which hardware has nothing to record. Else `None`: then nothing was done.
    #[inline]
    fn protect_page<S: Frames>(
        &self,
        frames: &S,
        address: u64,
        attributes: Attributes,
        gather: &mut Gather<F>,
    ) -> Option<()> {
        let bits = Self::L.encode(attributes).ok()?;
        if address & Self::PAGE_LOW != 0 {
            return None;
        }
        let place = self.at::<1, S>(frames, address)?;
        let index = Self::index(address, 1);
        let entry = place.table.load(index);
        let is_other = (entry ^ bits) & Self::L.memory_bits != 0;
        if entry & Self::L.present == 0 || is_other || !Self::is_recorded(entry) {
            return None;
        }
        let new = Self::permitting(entry, bits);
        if new != entry {
            place.table.store(index, new);
            publish(frames, place.frame, index, 1);
            gather.add(address, address + (1 << Self::PAGE_BITS), Self::PAGE_BITS);
        }
        Some(())
    }

    /// Whether one entry of `level` can map `piece`.
    #[inline(always)]
    fn fits(&self, level: u32, piece: &Piece) -> bool {
        let shift = Self::L.shift(level);
        self.leaves >> level & 1 != 0 && piece.is_whole(shift) && piece.phys & ((1 << shift) - 1) == 0
    }

    /// Whether `piece` can be mapped by entries of `level` alone.
    #[inline(always)]
    fn is_run(&self, level: u32, piece: &Piece) -> bool {
        let low = (1 << Self::L.shift(level)) - 1;
        self.leaves >> level & 1 != 0 && (piece.start | piece.phys | !piece.last) & low == 0
    }

    /// Refuses entries that are present.
    #[inline(always)]
    fn expect_nothing(table: impl crate::Table, level: u32, piece: Piece) -> Result<(), Error> {
        let run = Self::run(level, piece);
        for index in run.clone() {
            if table.load(index) & Self::L.present != 0 {
                return Err(Error::Mapped { address: Self::address(level, piece, &run, index) });
            }
        }
        Ok(())
    }

    /// Refuses entries of level 1 that are not present, or not `memory` if that is given.
    #[inline(always)]
    fn expect_pages(table: impl crate::Table, piece: Piece, memory: Option<u64>) -> Result<(), Error> {
        let run = Self::run(1, piece);
        for index in run.clone() {
            let entry = table.load(index);
            if entry & Self::L.present == 0 {
                return Err(Error::NotMapped { address: Self::address(1, piece, &run, index) });
            }
            if Self::is_other(entry, memory) {
                return Err(Error::Memory);
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn is_other(entry: u64, memory: Option<u64>) -> bool {
        memory.is_some_and(|memory| entry & Self::L.memory_bits != memory)
    }

    /// Stores the leaves of `piece`, which is a run.
    #[inline(always)]
    fn fill<S: Frames>(&self, frames: &S, place: &Place<S::Table>, level: u32, piece: Piece, bits: u64) {
        let run = Self::run(level, piece);
        let bits = bits | if level == 1 { Self::L.page } else { Self::L.block };
        let step = 1 << Self::L.shift(level);
        let mut phys = piece.phys;
        let mut next = Self::L.pack(phys) | bits;
        for index in run.clone() {
            place.table.store(index, next);
            // The address after the last may be none; it is not used.
            phys = phys.wrapping_add(step);
            // Where no bits of an address are moved, one addition makes the next entry.
            next = if Self::L.moved == 0 { next.wrapping_add(step) } else { Self::L.pack(phys) | bits };
        }
        publish(frames, place.frame, run.start, run.len());
    }

    #[inline(never)]
    fn map_many(
        &self,
        frames: &mut impl Frames,
        address: u64,
        grant: &Grant,
        attributes: Attributes,
    ) -> Result<(), Error> {
        let (start, last) = Self::range(address, grant.bytes())?;
        let phys = grant.phys().start.0;
        let phys_last = phys.wrapping_add(last - start);
        if phys & Self::PAGE_LOW != 0 || phys_last < phys || phys_last & self.beyond & !Self::PAGE_LOW != 0 {
            return Err(Error::Range { address: phys, bytes: grant.bytes() });
        }
        let bits = Self::L.encode(attributes)?;
        let piece = Piece { start, last, phys };
        let mut needed = 0;
        self.plan(frames, self.root, Self::L.levels, piece, &mut needed)?;
        let mut spare = Spare::take(frames, needed, Self::TABLE_BYTES)?;
        self.place(frames, self.root, Self::L.levels, piece, bits, &mut spare);
        Ok(())
    }

    /// Counts the tables that are missing for `piece`, and refuses what is mapped already.
    fn plan(
        &self,
        words: &impl Words,
        frame: PhysAddr,
        level: u32,
        piece: Piece,
        needed: &mut u64,
    ) -> Result<(), Error> {
        let table = words.table(frame);
        if level == 1 {
            return Self::expect_nothing(table, 1, piece);
        }
        if self.is_run(level, &piece) && Self::expect_nothing(table, level, piece).is_ok() {
            return Ok(());
        }
        for part in piece.parts(Self::L.shift(level)) {
            let entry = table.load(Self::index(part.start, level));
            if Self::L.is_table(entry) {
                self.plan(words, Self::L.next(entry), level - 1, part, needed)?;
            } else if entry & Self::L.present != 0 {
                return Err(Error::Mapped { address: part.start });
            } else if !self.fits(level, &part) {
                *needed += self.tables(level - 1, part);
            }
        }
        Ok(())
    }

    /// Returns how many tables `piece` needs where there is none, the one of `level` included.
    fn tables(&self, level: u32, piece: Piece) -> u64 {
        let mut count = 1;
        if level > 1 {
            for part in piece.parts(Self::L.shift(level)) {
                if !self.fits(level, &part) {
                    count += self.tables(level - 1, part);
                }
            }
        }
        count
    }

    /// Maps `piece`, of which nothing is mapped, below the table `frame`, with as many spare frames as `plan` counted.
    fn place(
        &self,
        frames: &mut impl Frames,
        frame: PhysAddr,
        level: u32,
        piece: Piece,
        bits: u64,
        spare: &mut Spare,
    ) {
        let table = frames.table(frame);
        if level == 1 {
            return self.fill(frames, &Place { frame, table }, 1, piece, bits);
        }
        if self.is_run(level, &piece) && Self::expect_nothing(table, level, piece).is_ok() {
            return self.fill(frames, &Place { frame, table }, level, piece, bits);
        }
        let mut stored = Stored::none(frame);
        for part in piece.parts(Self::L.shift(level)) {
            let index = Self::index(part.start, level);
            let entry = table.load(index);
            if Self::L.is_table(entry) {
                self.place(frames, Self::L.next(entry), level - 1, part, bits, spare);
            } else if self.fits(level, &part) {
                table.store(index, Self::L.pack(part.phys) | Self::L.block | bits);
                stored.add(frames, index);
            } else if let Some(new) = spare.next(frames) {
                // ORDER: the table is complete and published before this entry points at it.
                self.place(frames, new, level - 1, part, bits, spare);
                table.store(index, Self::L.pack(new.0) | Self::L.table);
                stored.add(frames, index);
            }
        }
        stored.publish(frames);
    }

    #[inline(never)]
    fn unmap_many(
        &self,
        frames: &mut impl Frames,
        address: u64,
        bytes: u64,
        gather: &mut Gather<F>,
    ) -> Result<(), Error> {
        let (start, last) = Self::range(address, bytes)?;
        let piece = Piece { start, last, phys: 0 };
        let smallest = self.expect_leaves(frames, self.root, Self::L.levels, piece, None)?;
        let tables = self.remove(frames, self.root, Self::L.levels, piece, gather);
        gather.add(start, last + 1, Self::L.shift(smallest));
        if tables {
            gather.add_tables();
        }
        Ok(())
    }

    #[inline(never)]
    fn protect_many(
        &self,
        frames: &mut impl Frames,
        address: u64,
        bytes: u64,
        attributes: Attributes,
        gather: &mut Gather<F>,
    ) -> Result<(), Error> {
        let (start, last) = Self::range(address, bytes)?;
        let bits = Self::L.encode(attributes)?;
        let piece = Piece { start, last, phys: 0 };
        self.expect_leaves(frames, self.root, Self::L.levels, piece, Some(bits & Self::L.memory_bits))?;
        let to = |entry| Self::permitting(entry, bits);
        self.change(frames, self.root, Self::L.levels, piece, gather, &to, &mut |_, _| ());
        Ok(())
    }

    /// Refuses a piece that is not all mapped by leaves within it, or not all as `memory` if that is given. Returns the level
    /// of the smallest.
    fn expect_leaves(
        &self,
        words: &impl Words,
        frame: PhysAddr,
        level: u32,
        piece: Piece,
        memory: Option<u64>,
    ) -> Result<u32, Error> {
        let table = words.table(frame);
        if level == 1 {
            return Self::expect_pages(table, piece, memory).map(|()| 1);
        }
        let shift = Self::L.shift(level);
        let mut smallest = level;
        for part in piece.parts(shift) {
            let entry = table.load(Self::index(part.start, level));
            if Self::L.is_table(entry) {
                let next = Self::L.next(entry);
                smallest = smallest.min(self.expect_leaves(words, next, level - 1, part, memory)?);
            } else if entry & Self::L.present == 0 {
                return Err(Error::NotMapped { address: part.start });
            } else if !part.is_whole(shift) {
                return Err(Error::Superpage { address: part.start >> shift << shift, bytes: 1 << shift });
            } else if Self::is_other(entry, memory) {
                return Err(Error::Memory);
            }
        }
        Ok(smallest)
    }

    /// Takes everything in `piece` away; returns whether tables went.
    fn remove(
        &self,
        frames: &mut impl Frames,
        frame: PhysAddr,
        level: u32,
        piece: Piece,
        gather: &mut Gather<F>,
    ) -> bool {
        let table = frames.table(frame);
        let shift = Self::L.shift(level);
        let mut stored = Stored::none(frame);
        let mut tables = false;
        for part in piece.parts(shift) {
            let index = Self::index(part.start, level);
            let entry = table.load(index);
            if level > 1 && Self::L.is_table(entry) {
                let next = Self::L.next(entry);
                if !part.is_whole(shift) {
                    tables |= self.remove(frames, next, level - 1, part, gather);
                    continue;
                }
                table.store(index, 0);
                self.retire(frames, next, level - 1, gather);
                tables = true;
            } else {
                table.store(index, 0);
            }
            stored.add(frames, index);
        }
        stored.publish(frames);
        tables
    }

    /// Hands a table that nothing points at any more, and all below, to `gather`.
    fn retire(&self, frames: &mut impl Frames, frame: PhysAddr, level: u32, gather: &mut Gather<F>) {
        if level > 1 {
            let table = frames.table(frame);
            for index in 0..Self::ENTRIES {
                let entry = table.load(index);
                if Self::L.is_table(entry) {
                    self.retire(frames, Self::L.next(entry), level - 1, gather);
                }
            }
        }
        gather.keep(frames, frame);
    }

    /// Returns a leaf with the permissions of `bits`, and the memory and the record of `entry`.
    fn permitting(entry: u64, bits: u64) -> u64 {
        let Layout { writes, .. } = Self::L;
        let mut new = entry & !Self::L.permission_bits() | bits & Self::L.permission_bits();
        if new & writes.bits == writes.clean && entry & writes.bits == writes.dirty {
            new = new & !writes.bits | writes.dirty;
        }
        new
    }

    /// Makes each leaf in `piece` what `to` makes of it, and tells `seen` what it was. No leaf lies in it in part.
    #[expect(clippy::too_many_arguments, reason = "where, what and whom to tell")]
    fn change(
        &self,
        frames: &mut impl Frames,
        frame: PhysAddr,
        level: u32,
        piece: Piece,
        gather: &mut Gather<F>,
        to: &impl Fn(u64) -> u64,
        seen: &mut impl FnMut(u64, Leaf<F>),
    ) {
        let table = frames.table(frame);
        if level == 1 {
            return self.change_pages(frames, &Place { frame, table }, piece, gather, to, seen);
        }
        let shift = Self::L.shift(level);
        for part in piece.parts(shift) {
            let index = Self::index(part.start, level);
            let entry = table.load(index);
            if Self::L.is_table(entry) {
                self.change(frames, Self::L.next(entry), level - 1, part, gather, to, seen);
            } else if let Some((old, new)) = Self::change_one(table, index, to) {
                if old != new {
                    publish(frames, frame, index, 1);
                    gather.add(part.start, part.last + 1, shift);
                }
                if let Some(leaf) = Self::leaf(old, level, 0) {
                    seen(part.start, leaf);
                }
            }
        }
    }

    /// The same for the pages of one table.
    #[inline(always)]
    fn change_pages<S: Frames>(
        &self,
        frames: &S,
        place: &Place<S::Table>,
        piece: Piece,
        gather: &mut Gather<F>,
        to: &impl Fn(u64) -> u64,
        seen: &mut impl FnMut(u64, Leaf<F>),
    ) {
        let run = Self::run(1, piece);
        // Where a run of changed entries began.
        let mut since = run.start;
        let mut changed = |since: usize, end: usize| {
            if since < end {
                publish(frames, place.frame, since, end - since);
                let (start, end) = (Self::address(1, piece, &run, since), Self::address(1, piece, &run, end));
                gather.add(start, end, Self::PAGE_BITS);
            }
        };
        for index in run.clone() {
            let mut same = true;
            if let Some((old, new)) = Self::change_one(place.table, index, to) {
                same = old == new;
                if let Some(leaf) = Self::leaf(old, 1, 0) {
                    seen(Self::address(1, piece, &run, index), leaf);
                }
            }
            if same {
                changed(since, index);
                since = index + 1;
            }
        }
        changed(since, run.end);
    }

    /// Makes one leaf what `to` makes of it. Returns what it was, and what it is; `None` if it is not present.
    #[inline(always)]
    fn change_one(table: impl crate::Table, index: usize, to: &impl Fn(u64) -> u64) -> Option<(u64, u64)> {
        let mut entry = table.load(index);
        for _ in 0..ATTEMPTS {
            if entry & Self::L.present == 0 {
                return None;
            }
            let new = to(entry);
            if new == entry {
                return Some((entry, new));
            }
            if Self::is_recorded(entry) {
                table.store(index, new);
                return Some((entry, new));
            }
            match table.exchange(index, entry, new) {
                Ok(()) => return Some((entry, new)),
                // Hardware recorded an access in between.
                Err(now) => entry = now,
            }
        }
        None
    }

    /// Whether hardware has nothing to record in `entry`: then only the writer of the tree changes it.
    #[inline(always)]
    fn is_recorded(entry: u64) -> bool {
        entry & Self::L.accessed == Self::L.accessed && entry & Self::L.writes.bits != Self::L.writes.clean
    }

    fn walk_in(
        &self,
        words: &impl Words,
        frame: PhysAddr,
        level: u32,
        piece: Piece,
        leaf: &mut impl FnMut(u64, Leaf<F>),
    ) {
        let table = words.table(frame);
        let shift = Self::L.shift(level);
        for part in piece.parts(shift) {
            let entry = table.load(Self::index(part.start, level));
            if level > 1 && Self::L.is_table(entry) {
                self.walk_in(words, Self::L.next(entry), level - 1, part, leaf);
            } else if let Some(found) = Self::leaf(entry, level, 0) {
                leaf(part.start >> shift << shift, found);
            }
        }
    }

    /// Gives back the table `frame` of `level` and all below.
    fn give_back(&self, frames: &mut impl Frames, frame: PhysAddr, level: u32) {
        let table = frames.table(frame);
        let (entries, bytes) = match level == Self::L.levels {
            true => (Self::TOP_ENTRIES, Self::L.root_bytes()),
            false => (Self::ENTRIES, Self::TABLE_BYTES),
        };
        if level > 1 {
            for entry in (0..entries).map(|index| table.load(index)) {
                if Self::L.is_table(entry) {
                    self.give_back(frames, Self::L.next(entry), level - 1);
                }
            }
        }
        frames.give_back(frame, bytes);
    }
}
