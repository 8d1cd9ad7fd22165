//! Interrupt remapping: which device may interrupt whom, and by which message.
//!
//! A message in the remappable format names no processor and no vector: it names an entry of the interrupt remapping
//! table, and the entry names both. It also names the source, and the unit refuses the message of any other: source
//! validation is always on here. What devices write in the old, compatibility format is refused (`CFIS` = 0). The unit's
//! own events are not remapped.
//!
//! A [`Handle`] owns a block of entries. Its source is written once, while nothing of the block is present; from then on
//! everything that changes lies in the word with P, so each change is one store, and the unit sees the old entry or the
//! new one. A block that was [released](Remapping::release) is used again when its invalidation has completed.
//!
//! ```
//! # use iommu::{Bus, Error, Invalidations, Message, StreamId};
//! # use vtd::remap::*;
//! /// Lets a device interrupt a core by its only message.
//! fn connect<B: Bus>(
//!     remapping: &mut Remapping<B>,
//!     device: StreamId,
//!     core: u32,
//!     vector: u8,
//! ) -> Result<(Handle, Message, Invalidations), Error> {
//!     let handle = remapping.allocate(Source::Function(device), 0)?;
//!     let interrupt = Interrupt::fixed(Destination::Physical(core), vector);
//!     let to_invalidate = remapping.set(&handle, 0, interrupt)?;
//!     let message = remapping.message(&handle, 0)?;
//!     Ok((handle, message, to_invalidate))
//! }
//! ```

use crate::tables::Publisher;
use iommu::{
    Bus, DmaBuf, Error, FaultRecord, Field, Invalidation, Invalidations, Message, StreamId, Words, descriptor,
};

/// Entries in a table, at most.
pub const ENTRIES: usize = 1 << 16;
/// 64-bit words of an entry.
const ENTRY_WORDS: usize = 2;
/// The lowest vector that does not belong to the processor's own exceptions.
const FIRST_VECTOR: u8 = 32;

/// Who may send an interrupt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Source {
    /// One function (or I/O APIC, or timer, by the source-id that firmware gives it).
    Function(StreamId),
    /// One function that sends under other function numbers too: the upper `bits` (1 to 3) of its number are not
    /// compared (`Phantom Functions Supported`).
    Phantoms {
        /// The function.
        function: StreamId,
        /// How many bits.
        bits: u8,
    },
    /// Whatever is on these buses: a conventional PCI bridge sends its own requester ID for what is behind it.
    Buses {
        /// The first.
        first: u8,
        /// The last, which is one of them.
        last: u8,
    },
}

/// Which processors are interrupted, as their local APICs are numbered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Destination {
    /// The one with this ID.
    Physical(u32),
    /// Those with this logical ID.
    Logical(u32),
}

/// How a processor takes an interrupt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Delivery {
    /// Every destination, by its vector.
    Fixed,
    /// One of the destinations, by its vector.
    LowestPriority,
    /// Every destination, as a non-maskable interrupt.
    Nmi,
}

/// What a message becomes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Interrupt {
    /// For whom.
    pub destination: Destination,
    /// How.
    pub delivery: Delivery,
    /// By which vector, 32 at least; of no meaning for [`Delivery::Nmi`].
    pub vector: u8,
    /// Level-triggered, as a pin of an I/O APIC may be; messages are edge-triggered.
    pub level: bool,
}

impl Interrupt {
    /// The usual one: fixed and edge-triggered.
    pub const fn fixed(destination: Destination, vector: u8) -> Self {
        Self { destination, delivery: Delivery::Fixed, vector, level: false }
    }
}

descriptor! {
    /// One entry of the interrupt remapping table ("Interrupt Remapping Table Entry for Remapped Interrupts").
    pub struct RemapEntry([u64; 2]);
}

impl RemapEntry {
    const PRESENT: Field<Self> = Field::bit(0);
    const LOGICAL: Field<Self> = Field::bit(2);
    const REDIRECTION_HINT: Field<Self> = Field::bit(3);
    const LEVEL: Field<Self> = Field::bit(4);
    const DELIVERY: Field<Self> = Field::bits(7, 5);
    const VECTOR: Field<Self> = Field::bits(23, 16);
    const DESTINATION: Field<Self> = Field::bits(63, 32);
    const DESTINATION_XAPIC: Field<Self> = Field::bits(47, 40);
    const SOURCE: Field<Self> = Field::bits(79, 64);
    const SOURCE_QUALIFIER: Field<Self> = Field::bits(81, 80);
    const VALIDATION: Field<Self> = Field::bits(83, 82);

    /// A present entry; `x2apic` as the table is (`IRTA.EIME`).
    pub fn new(source: Source, interrupt: Interrupt, x2apic: bool) -> Result<Self, Error> {
        Self::sent_by(source)?.raising(interrupt, x2apic)
    }

    /// An entry for the source, not present. All of it is in the upper word, which is not zero.
    fn sent_by(source: Source) -> Result<Self, Error> {
        let id = |stream: StreamId| match stream.0 {
            id @ 0..=0xFFFF => Ok(u64::from(id)),
            _ => Err(Error::UnknownStream { stream }),
        };
        let (validation, qualifier, id) = match source {
            Source::Function(function) => (1, 0, id(function)?),
            Source::Phantoms { function, bits: bits @ 1..=3 } => (1, bits, id(function)?),
            Source::Phantoms { .. } => {
                return Err(Error::Unsupported { feature: "this number of phantom function bits" });
            }
            Source::Buses { first, last } if first <= last => (2, 0, u64::from(first) << 8 | u64::from(last)),
            Source::Buses { .. } => return Err(Error::Unsupported { feature: "an empty range of buses" }),
        };
        Ok(Self::default()
            .with(Self::SOURCE, id)
            .with(Self::SOURCE_QUALIFIER, qualifier.into())
            .with(Self::VALIDATION, validation))
    }

    /// Makes the entry one for `interrupt`, and present. All of it is in the lower word.
    fn raising(self, interrupt: Interrupt, x2apic: bool) -> Result<Self, Error> {
        let Interrupt { destination, delivery, vector, level } = interrupt;
        let (hint, code) = match delivery {
            Delivery::Fixed => (0, 0),
            Delivery::LowestPriority => (1, 1),
            Delivery::Nmi => (0, 4),
        };
        let vector = if delivery == Delivery::Nmi { 0 } else { vector };
        if delivery != Delivery::Nmi && vector < FIRST_VECTOR {
            return Err(Error::Unsupported { feature: "an interrupt by the vector of an exception" });
        }
        let (logical, id) = match destination {
            Destination::Physical(id) => (0, id),
            Destination::Logical(id) => (1, id),
        };
        let field = if x2apic { Self::DESTINATION } else { Self::DESTINATION_XAPIC };
        if !x2apic && id > 0xFF {
            return Err(Error::Unsupported { feature: "x2APIC destinations (IRTA.EIME is clear)" });
        }
        let upper = self.0[1];
        Ok(Self([0, upper])
            .with(Self::PRESENT, 1)
            .with(Self::LOGICAL, logical)
            .with(Self::REDIRECTION_HINT, hint)
            .with(Self::LEVEL, level.into())
            .with(Self::DELIVERY, code)
            .with(Self::VECTOR, vector.into())
            .with(field, id.into()))
    }
}

/// A block of entries, owned by whoever holds this. It goes back by [`Remapping::release`].
#[derive(Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[must_use = "the entries stay taken until `release` and `finish` have this back"]
pub struct Handle {
    first: u16,
    /// The block has 2^`log2` entries, and starts at a multiple of that.
    log2: u8,
}

impl Handle {
    /// Returns the index of the first entry; faults name it.
    pub fn first(&self) -> u16 {
        self.first
    }

    /// Returns the number of entries.
    pub fn count(&self) -> usize {
        1 << self.log2
    }

    fn words(&self) -> core::ops::Range<usize> {
        let start = usize::from(self.first) * ENTRY_WORDS;
        start..start + self.count() * ENTRY_WORDS
    }

    fn invalidation(&self) -> Invalidation {
        Invalidation::InterruptEntry { index: self.first, log2: self.log2 }
    }
}

/// A block whose entries are blocked, but that the unit may still remember.
///
/// Goes back to [`Remapping::finish`] once the invalidation has completed; if it never does, the block is never used again.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "the entries stay out of use until `finish` takes this back"]
pub struct Leaving(Handle);

/// The interrupt remapping table of a unit in service.
///
/// It is a part of its own beside [`Tables`](crate::Tables): nobody needs both at once, so they need not share a lock.
#[derive(Debug)]
pub struct Remapping<B> {
    publisher: Publisher<B>,
    /// An entry whose upper word is zero is free; the unit never writes here.
    table: DmaBuf,
    x2apic: bool,
    /// The unit may remember that an entry was not present (`CAP.CM`), or not see at once that it is (`CAP.RWBF`).
    caches_absence: bool,
}

impl<B: Bus> Remapping<B> {
    /// Takes a table in which nothing is present, and publishes it.
    pub(crate) fn new(
        publisher: Publisher<B>,
        mut table: DmaBuf,
        x2apic: bool,
        caches_absence: bool,
    ) -> Self {
        table.clear();
        publisher.publish(&table, 0, table.words());
        Self { publisher, table, x2apic, caches_absence }
    }

    /// Returns the number of entries.
    pub fn entries(&self) -> usize {
        self.table.words() / ENTRY_WORDS
    }

    /// Returns whether destinations are x2APIC IDs, of 32 bits; else they have 8.
    pub fn is_x2apic(&self) -> bool {
        self.x2apic
    }

    /// Takes a free block of 2^`log2` entries for `source`, which is refused until an entry is [set](Self::set).
    ///
    /// A function with several messages (Multiple Message Capable) needs all of them in one block. Looks at every entry,
    /// at worst.
    pub fn allocate(&mut self, source: Source, log2: u8) -> Result<Handle, Error> {
        let [_, upper] = RemapEntry::sent_by(source)?.0;
        let count = 1_usize.checked_shl(log2.into()).unwrap_or(usize::MAX);
        let is_free =
            |first: usize| (first..first + count).all(|at| self.table.load(at * ENTRY_WORDS + 1) == 0);
        let none = Error::Exhausted { what: "entries for interrupts" };
        let first = (0..self.entries() / count).map(|block| block * count).find(|&first| is_free(first));
        let first = u16::try_from(first.ok_or(none)?).map_err(|_| none)?;
        let handle = Handle { first, log2 };
        for word in handle.words().skip(1).step_by(ENTRY_WORDS) {
            self.table.store(word, upper);
        }
        // ORDER: the upper words are visible before any P is set beside them.
        self.publish(&handle);
        Ok(handle)
    }

    /// Lets message `number` of the block, from 0, be `interrupt` from now on; it may have been another before.
    pub fn set(
        &mut self,
        handle: &Handle,
        number: u16,
        interrupt: Interrupt,
    ) -> Result<Invalidations, Error> {
        let word = self.word(handle, number)?;
        let [lower, _] = RemapEntry::default().raising(interrupt, self.x2apic)?.0;
        let was_present = RemapEntry([self.table.load(word), 0]).is_set(RemapEntry::PRESENT);
        self.change(word, lower);
        Ok(self.entry_invalidations(handle, number, was_present || self.caches_absence))
    }

    /// Refuses message `number` of the block. It may still arrive until the invalidations have completed.
    pub fn block(&mut self, handle: &Handle, number: u16) -> Result<Invalidations, Error> {
        let word = self.word(handle, number)?;
        self.refuse(word);
        Ok(self.entry_invalidations(handle, number, true))
    }

    /// Refuses all messages of the block, and begins to give it back.
    pub fn release(&mut self, handle: Handle) -> (Leaving, Invalidations) {
        for word in handle.words().step_by(ENTRY_WORDS) {
            self.refuse(word);
        }
        let mut invalidations = Invalidations::new();
        let _ = invalidations.push(handle.invalidation());
        (Leaving(handle), invalidations)
    }

    /// Takes note that the invalidation of a block that left has completed: it is free.
    pub fn finish(&mut self, leaving: Leaving) {
        let Leaving(handle) = leaving;
        for word in handle.words() {
            self.table.store(word, 0);
        }
        self.publish(&handle);
    }

    /// Returns what a device writes for message `number` of the block: a table of messages (MSI-X) takes each as it is.
    ///
    /// A function with several messages in one register (MSI) takes that of number 0, and adds the number itself.
    pub fn message(&self, handle: &Handle, number: u16) -> Result<Message, Error> {
        self.word(handle, number)?;
        Ok(message(handle.first, handle.log2 > 0, number))
    }

    /// Returns the redirection entry of an I/O APIC for message `number` of the block, as it is set now.
    ///
    /// Vector and trigger mode are in both, and have to be the same, or the I/O APIC never knows that the interrupt ended.
    pub fn redirection(&self, handle: &Handle, number: u16, pin: Pin) -> Result<u64, Error> {
        let entry = RemapEntry([self.table.load(self.word(handle, number)?), 0]);
        if !entry.is_set(RemapEntry::PRESENT) {
            return Err(Error::Unsupported { feature: "the pin of an interrupt that is blocked" });
        }
        let index = handle.first.wrapping_add(number);
        let vector = entry.get(RemapEntry::VECTOR) as u8;
        Ok(Redirection::new(index, vector, entry.is_set(RemapEntry::LEVEL), pin).0[0])
    }

    /// Returns the lower word of message `number`'s entry.
    fn word(&self, handle: &Handle, number: u16) -> Result<usize, Error> {
        // A handle of another unit's table may be past the end of this one.
        let is_inside = usize::from(number) < handle.count() && handle.words().end <= self.table.words();
        if !is_inside {
            return Err(Error::Unsupported { feature: "an interrupt past the end of its block" });
        }
        Ok(handle.words().start + usize::from(number) * ENTRY_WORDS)
    }

    /// Stores the word with P, in one store.
    fn change(&mut self, word: usize, lower: u64) {
        self.table.store(word, lower);
        self.publisher.publish(&self.table, word, 1);
    }

    fn refuse(&mut self, word: usize) {
        let [lower, _] = RemapEntry([self.table.load(word), 0]).with(RemapEntry::PRESENT, 0).0;
        self.change(word, lower);
    }

    fn publish(&self, handle: &Handle) {
        self.publisher.publish(&self.table, handle.words().start, handle.words().len());
    }

    fn entry_invalidations(&self, handle: &Handle, number: u16, needed: bool) -> Invalidations {
        let mut invalidations = Invalidations::new();
        if needed {
            let index = handle.first.wrapping_add(number);
            let _ = invalidations.push(Invalidation::InterruptEntry { index, log2: 0 });
        }
        invalidations
    }
}

/// Returns a message in the remappable format ("Interrupt Requests in Remappable Format").
///
/// With `several`, the unit adds the data (SHV = 1) to the index; without, the data has no meaning.
pub fn message(handle: u16, several: bool, number: u16) -> Message {
    const REMAPPABLE: u64 = 1 << 4;
    let handle = u64::from(handle);
    let address =
        0xFEE << 20 | (handle & 0x7FFF) << 5 | REMAPPABLE | u64::from(several) << 3 | (handle >> 15) << 2;
    Message { address, data: if several { number.into() } else { 0 } }
}

/// What is known of a pin of an I/O APIC.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Pin {
    /// It interrupts when it is low.
    pub active_low: bool,
    /// It does not interrupt for now.
    pub masked: bool,
}

descriptor! {
    /// The redirection entry of an I/O APIC, in the remappable format.
    pub struct Redirection([u64; 1]);
}

impl Redirection {
    const VECTOR: Field<Self> = Field::bits(7, 0);
    const INDEX_HIGH: Field<Self> = Field::bit(11);
    const ACTIVE_LOW: Field<Self> = Field::bit(13);
    const LEVEL: Field<Self> = Field::bit(15);
    const MASKED: Field<Self> = Field::bit(16);
    const REMAPPABLE: Field<Self> = Field::bit(48);
    const INDEX_LOW: Field<Self> = Field::bits(63, 49);

    /// Raises entry `index`, which has this vector and trigger mode.
    pub fn new(index: u16, vector: u8, level: bool, pin: Pin) -> Self {
        Self::default()
            .with(Self::VECTOR, vector.into())
            .with(Self::INDEX_HIGH, u64::from(index >> 15))
            .with(Self::ACTIVE_LOW, pin.active_low.into())
            .with(Self::LEVEL, level.into())
            .with(Self::MASKED, pin.masked.into())
            .with(Self::REMAPPABLE, 1)
            .with(Self::INDEX_LOW, u64::from(index & 0x7FFF))
    }
}

/// Why the unit refused an interrupt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Refusal {
    /// The message has a reserved field set.
    Reserved,
    /// The table has no such entry.
    PastTheEnd,
    /// The entry is not present.
    NotPresent,
    /// The unit could not read the table.
    Unreadable,
    /// The entry has a reserved field set.
    BadEntry,
    /// The message is in the compatibility format; it names no entry.
    CompatibilityFormat,
    /// The entry is for another source.
    WrongSource,
}

impl Refusal {
    /// Returns what it is in words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Reserved => "its message has a reserved field set",
            Self::PastTheEnd => "the table has no such entry",
            Self::NotPresent => "its entry is not present",
            Self::Unreadable => "the table could not be read",
            Self::BadEntry => "its entry has a reserved field set",
            Self::CompatibilityFormat => "its message is in the compatibility format",
            Self::WrongSource => "its entry is for another source",
        }
    }

    /// Returns why `fault` refused an interrupt, and the index that it names; `None` if it refused none.
    pub fn of(fault: &FaultRecord) -> Option<(Self, u16)> {
        let refusal = match fault.code {
            0x20 => Self::Reserved,
            0x21 => Self::PastTheEnd,
            0x22 => Self::NotPresent,
            0x23 => Self::Unreadable,
            0x24 => Self::BadEntry,
            0x25 => Self::CompatibilityFormat,
            0x26 => Self::WrongSource,
            _ => return None,
        };
        // FI holds the index in its upper 16 bits.
        Some((refusal, (fault.iova.0 >> 48) as u16))
    }
}
