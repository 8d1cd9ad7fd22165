//! Context descriptors (CD): what a first stage is. A device has one, or one for each of its PASIDs.
//!
//! A device without PASIDs has the descriptor of its number in a frame that all of them share. One with PASIDs has a table
//! of its own: linear, or of two levels with a frame for the first and a frame for each 64 PASIDs that are in use.
//!
//! The unit may read a descriptor that its stream's entry leads to at any time, word by word and in any order, and keep what
//! it read until it is told to forget it. So a descriptor of a table that is not in use is not valid, and names tables that
//! are always empty: in every mixture of its words with those that come, nothing is translated.

use crate::tables::{DEVICES, Walks};
use heapless::Vec;
use iommu::{Bus, DmaBuf, Error, Field, Gpa, Pasid, PhysAddr, Words, descriptor};

/// Frames for the context descriptors of devices with PASIDs, at most.
pub const CONTEXT_TABLES: usize = 128;
/// Words of a context descriptor.
pub(crate) const CONTEXT_WORDS: usize = 8;
/// Log2 of the descriptors in a frame.
const FRAME_LOG2: u8 = 6;
/// Log2 of the descriptors that a first level of one frame reaches.
const TWO_LEVELS_LOG2: u8 = 15;
/// Tables of 64 PASIDs that one device has, at most: each stays its own until the device goes, since the unit may remember that
/// it is there, so without a limit who takes one PASID after the other would have them all.
pub const DEVICE_TABLES: usize = 4;
/// The word of a context descriptor that holds V.
const HEAD: usize = 0;

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
    const STALL: Field<Self> = Field::bit(44);
    const RECORD: Field<Self> = Field::bit(45);
    const ABORT: Field<Self> = Field::bit(46);
    const OWN_ASID: Field<Self> = Field::bit(47);
    const ASID: Field<Self> = Field::bits(63, 48);
    const ROOT: Field<Self> = Field::bits(119, 68);
    const MEMORY: Field<Self> = Field::bits(223, 192);

    /// Memory attributes 0 to 2: normal memory, write-back; device memory (nGnRE); normal memory, not cached.
    const MEMORY_KINDS: u64 = 0x44_04_FF;

    /// Translates the lower half of the address space, 48 bits, by tables of 4 levels of 4 KiB at `root`.
    ///
    /// Faults are recorded (R) and abort the access (A).
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
            .with(Self::MEMORY, Self::MEMORY_KINDS)
    }

    /// Has accesses that meet a fault wait for an answer (S).
    pub fn stalling(self) -> Self {
        self.with(Self::STALL, 1)
    }

    /// Is not valid, and names the tables at `root`, which are empty.
    pub fn unused(root: PhysAddr) -> Self {
        Self::default().with_address(Self::ROOT, root.0).with(Self::MEMORY, Self::MEMORY_KINDS)
    }
}

descriptor! {
    /// An entry of the first level of a table of context descriptors (`L1CD`).
    pub struct FirstLevelContext([u64; 1]);
}

impl FirstLevelContext {
    const VALID: Field<Self> = Field::bit(0);
    const TABLE: Field<Self> = Field::bits(55, 12);

    /// Leads to the 64 context descriptors at `table`.
    pub fn new(table: PhysAddr) -> Self {
        Self::default().with(Self::VALID, 1).with_address(Self::TABLE, table.0)
    }
}

/// Which tables of context descriptors a unit has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Bits of a SubstreamID (`IDR1.SSIDSIZE`).
    pub(crate) substreams: u8,
    /// Tables may have two levels (`IDR0.CD2L`).
    pub(crate) two_levels: bool,
}

impl Shape {
    /// Returns the bits of a PASID that a device's table has room for.
    pub(crate) fn pasid_bits(self) -> u8 {
        self.substreams.min(if self.two_levels { TWO_LEVELS_LOG2 } else { FRAME_LOG2 })
    }

    /// Returns the bits of a PASID that one frame has room for.
    pub(crate) fn frame_bits(self) -> u8 {
        self.substreams.min(FRAME_LOG2)
    }

    /// Whether a device's table has two levels.
    fn is_two_level(self) -> bool {
        self.pasid_bits() > FRAME_LOG2
    }
}

/// A table of context descriptors, as a stream table entry names it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ContextTable {
    /// Where it is.
    pub at: u64,
    /// Log2 of the descriptors (`S1CDMax`); 0 is one descriptor, and no PASIDs.
    pub log2: u8,
    /// Two levels, with 64 descriptors in each table of the second (`S1Fmt` = 1).
    pub two_levels: bool,
}

/// What a frame is in use for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Use {
    Free,
    /// The first level of a device.
    First {
        device: usize,
    },
    /// The descriptors of a device from PASID `64 * index` on.
    Leaf {
        device: usize,
        index: u32,
    },
    /// What a guest's device reads through the guest's second stage, at `at`.
    Guest {
        device: usize,
        at: Gpa,
    },
}

/// A place for one descriptor.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    /// In the frame of devices without PASIDs, by the device's number.
    Shared(usize),
    /// In a frame of [`ContextTables::frames`], by its number and that of the descriptor in it.
    Own(usize, usize),
}

/// The memory of all context descriptors.
#[derive(Debug)]
pub(crate) struct ContextTables {
    shape: Shape,
    shared: DmaBuf,
    /// Where tables are that stay empty.
    empty: PhysAddr,
    frames: Vec<(DmaBuf, Use), CONTEXT_TABLES>,
}

impl ContextTables {
    pub(crate) fn new(
        shape: Shape,
        shared: DmaBuf,
        empty: PhysAddr,
        frames: Vec<DmaBuf, CONTEXT_TABLES>,
    ) -> Self {
        let frames = frames.into_iter().map(|frame| (frame, Use::Free)).collect();
        Self { shape, shared, empty, frames }
    }

    /// Returns the number of frames that are free.
    pub(crate) fn free(&self) -> usize {
        self.frames.iter().filter(|(_, of)| *of == Use::Free).count()
    }

    fn find(&self, of: impl Fn(Use) -> bool) -> Option<usize> {
        self.frames.iter().position(|&(_, is)| of(is))
    }

    /// Takes a frame, fills it with `words` again and again, and publishes it.
    fn take(&mut self, bus: &impl Bus, of: Use, words: [u64; CONTEXT_WORDS]) -> Result<usize, Error> {
        const NONE: Error = Error::Exhausted { what: "frames for context descriptors" };
        let at = self.find(|of| of == Use::Free).ok_or(NONE)?;
        let (frame, is) = self.frames.get_mut(at).ok_or(NONE)?;
        *is = of;
        for first in (0..frame.words()).step_by(CONTEXT_WORDS) {
            frame.store_all(first, words);
        }
        bus.publish(frame.range(0, frame.words()));
        Ok(at)
    }

    /// Returns the table of `device`, which is made when there is none. It has no valid descriptor then.
    pub(crate) fn table(&mut self, bus: &impl Bus, device: usize) -> Result<ContextTable, Error> {
        let log2 = self.shape.pasid_bits();
        if !self.shape.is_two_level() {
            let at = self.leaf(bus, device, 0)?;
            return Ok(ContextTable { at: self.phys(at), log2, two_levels: false });
        }
        let at = match self.find(|of| of == Use::First { device }) {
            Some(at) => at,
            None => self.take(bus, Use::First { device }, [0; CONTEXT_WORDS])?,
        };
        Ok(ContextTable { at: self.phys(at), log2, two_levels: true })
    }

    /// Returns the place of `pasid` (`None`: of accesses without one, the first) in the table of `device`, which is there.
    ///
    /// The unit may remember that a table of the second level was not there.
    pub(crate) fn place(
        &mut self,
        bus: &impl Bus,
        device: usize,
        pasid: Option<Pasid>,
    ) -> Result<Place, Error> {
        let pasid = pasid.map_or(0, Pasid::value);
        let index = pasid >> FRAME_LOG2;
        let known = self.find(|of| of == Use::Leaf { device, index });
        let leaf = match known {
            Some(leaf) => leaf,
            None => self.leaf(bus, device, index)?,
        };
        if known.is_none()
            && let Some(first) = self.find(|of| of == Use::First { device })
        {
            let entry = FirstLevelContext::new(PhysAddr(self.phys(leaf)));
            // ORDER: the table was published when it was filled; one store leads to it.
            if let Some((frame, _)) = self.frames.get_mut(first) {
                frame.store(index as usize, entry.0[0]);
                bus.publish(frame.range(index as usize, 1));
            }
        }
        Ok(Place::Own(leaf, (pasid & 0x3F) as usize))
    }

    fn leaf(&mut self, bus: &impl Bus, device: usize, index: u32) -> Result<usize, Error> {
        let of = Use::Leaf { device, index };
        if let Some(at) = self.find(|is| is == of) {
            return Ok(at);
        }
        let is_its = |of| matches!(of, Use::Leaf { device: other, .. } if other == device);
        if self.frames.iter().filter(|&&(_, of)| is_its(of)).count() >= DEVICE_TABLES {
            return Err(Error::Exhausted { what: "tables of context descriptors of a device" });
        }
        self.take(bus, of, ContextDescriptor::unused(self.empty).0)
    }

    /// Takes a frame for what the unit is to read at `at` of a guest's addresses, or returns the one that `device` has.
    ///
    /// It is zero: no address of the hypervisor's is in it.
    pub(crate) fn place_for_guest(
        &mut self,
        bus: &impl Bus,
        device: usize,
        at: Gpa,
    ) -> Result<PhysAddr, Error> {
        let of = |is| matches!(is, Use::Guest { device: other, .. } if other == device);
        let frame = match self.find(of) {
            Some(frame) => frame,
            None => self.take(bus, Use::Guest { device, at }, [0; CONTEXT_WORDS])?,
        };
        if let Some((_, is)) = self.frames.get_mut(frame) {
            *is = Use::Guest { device, at };
        }
        Ok(PhysAddr(self.phys(frame)))
    }

    /// Returns the place of a guest's descriptor, and its table as the guest's second stage has it.
    pub(crate) fn guest(&self, device: usize, pasid: Option<Pasid>) -> Option<(Place, ContextTable)> {
        let (frame, at) = self.frames.iter().enumerate().find_map(|(frame, (_, of))| match *of {
            Use::Guest { device: other, at } if other == device => Some((frame, at.0)),
            _ => None,
        })?;
        let log2 = if pasid.is_some() { self.shape.frame_bits() } else { 0 };
        let index = pasid.map_or(0, Pasid::value);
        if index >= 1 << log2 {
            return None;
        }
        Some((Place::Own(frame, index as usize), ContextTable { at, log2, two_levels: false }))
    }

    /// Returns the address of the descriptor at `place`.
    pub(crate) fn address(&self, place: Place) -> PhysAddr {
        let (frame, index) = match place {
            Place::Shared(device) => (self.shared.phys().0, device),
            Place::Own(frame, index) => (self.phys(frame), index),
        };
        PhysAddr(frame + (index * CONTEXT_WORDS * 8) as u64)
    }

    fn phys(&self, frame: usize) -> u64 {
        // Numbers of frames come from `find` and `take`.
        self.frames.get(frame).map_or(self.empty.0, |(frame, _)| frame.phys().0)
    }

    fn words(&mut self, place: Place) -> Option<(&mut DmaBuf, usize)> {
        match place {
            Place::Shared(device) if device < DEVICES => Some((&mut self.shared, device * CONTEXT_WORDS)),
            Place::Shared(_) => None,
            Place::Own(frame, index) => {
                let (frame, _) = self.frames.get_mut(frame)?;
                Some((frame, index * CONTEXT_WORDS))
            }
        }
    }

    /// Writes a descriptor, its first word last, each word visible before the next is stored. Returns whether one changed.
    ///
    /// What nothing leads to may be written whole. Of what the unit may be reading, this makes a valid descriptor of an
    /// unused one, or changes the tables of a valid one.
    pub(crate) fn write(&mut self, bus: &impl Bus, place: Place, context: ContextDescriptor) -> bool {
        let order = (0..CONTEXT_WORDS).rev();
        self.store(bus, place, context, order)
    }

    /// Makes a descriptor unused again, its first word first. Returns whether it was not.
    pub(crate) fn close(&mut self, bus: &impl Bus, place: Place) -> bool {
        let unused = match place {
            Place::Own(frame, _) if matches!(self.frames.get(frame), Some((_, Use::Guest { .. }))) => {
                ContextDescriptor::default()
            }
            _ => ContextDescriptor::unused(self.empty),
        };
        self.store(bus, place, unused, HEAD..CONTEXT_WORDS)
    }

    fn store(
        &mut self,
        bus: &impl Bus,
        place: Place,
        context: ContextDescriptor,
        order: impl Iterator<Item = usize>,
    ) -> bool {
        let Some((table, at)) = self.words(place) else { return false };
        let mut changed = false;
        for word in order {
            let Some(&value) = context.0.get(word) else { continue };
            if table.load(at + word) == value {
                continue;
            }
            changed = true;
            table.store(at + word, value);
            bus.publish(table.range(at + word, 1));
        }
        changed
    }

    /// Gives back all frames of `device`, which nothing leads to any more.
    pub(crate) fn give_back(&mut self, device: usize) {
        for (_, of) in &mut self.frames {
            if matches!(*of, Use::First { device: other } | Use::Leaf { device: other, .. } | Use::Guest { device: other, .. }
                if other == device)
            {
                *of = Use::Free;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row C1 of facts/smmuv3.md, section 11.4, but for the memory attributes.
    #[test]
    fn a_context_descriptor_holds_the_words_of_the_manual() {
        let walks = Walks { coherent: true, address_size: 5 };
        let context = ContextDescriptor::new(PhysAddr(0x1_0203_0000), 1, walks);

        assert_eq!(context.0, [0x0001_E205_C000_3510, 0x1_0203_0000, 0, 0x44_04FF, 0, 0, 0, 0]);
        assert_eq!(context.stalling().0[0], 0x0001_F205_C000_3510);
    }

    #[test]
    fn an_incoherent_unit_walks_past_the_caches() {
        let walks = Walks { coherent: false, address_size: 5 };

        assert_eq!(ContextDescriptor::new(PhysAddr(0), 0, walks).0[0], 0x0000_E205_C000_0010);
    }

    #[test]
    fn a_unit_has_as_many_pasids_as_its_tables_have_room_for() {
        for (substreams, two_levels, pasids, is_two_level) in [
            (0, true, 0, false),
            (4, false, 4, false),
            (6, true, 6, false),
            (20, false, 6, false),
            (8, true, 8, true),
            (20, true, 15, true),
        ] {
            let shape = Shape { substreams, two_levels };
            assert_eq!((shape.pasid_bits(), shape.is_two_level()), (pasids, is_two_level), "{shape:?}");
        }
    }
}
