//! The rings that the unit and its driver share.

use crate::{commands::Descriptor, regs};
use core::ops::Range;
use iommu::{Bus, DmaBuf, Error, PhysAddr};
use tock_registers::LocalRegisterCopy;

/// 64-bit words of an entry of the page request queue, and of the invalidation queue where it is wide.
pub(crate) const ENTRY_WORDS: usize = 4;
/// 64-bit words of an entry of the invalidation queue where it is not.
pub(crate) const NARROW_WORDS: usize = 2;

/// The invalidation queue: the driver fills it at the tail, the unit empties it at the head.
#[derive(Debug)]
pub(crate) struct InvalidationQueue {
    ring: DmaBuf,
    /// 64-bit words of an entry.
    width: usize,
    /// The last place. There is a power of two of places, so this is also what reduces a number to one.
    last: usize,
    tail: usize,
    /// The tail that the unit knows.
    rung: usize,
    /// The first entry that is not free: the unit has not fetched it, or its ticket has no end yet.
    oldest: usize,
}

impl InvalidationQueue {
    /// A queue that fills `ring`, whose size is a power of two, with entries of `width` words.
    pub(crate) fn new(ring: DmaBuf, width: usize) -> Self {
        let last = (ring.words() / width).saturating_sub(1);
        Self { ring, width, last, tail: 0, rung: 0, oldest: 0 }
    }

    /// The queue in `ring` that somebody else filled, and the unit has emptied.
    pub(crate) fn left<B: Bus>(bus: &B, ring: DmaBuf, width: usize) -> Self {
        let mut queue = Self::new(ring, width);
        let units = regs::IQT.read(bus).read(regs::IQ::INDEX) as usize;
        queue.tail = (units * NARROW_WORDS / width) & queue.last;
        (queue.rung, queue.oldest) = (queue.tail, queue.tail);
        queue
    }

    pub(crate) fn entries(&self) -> usize {
        self.last + 1
    }

    pub(crate) fn tail(&self) -> usize {
        self.tail
    }

    /// Returns how many entries `at` is after the oldest one that is in use.
    pub(crate) fn age(&self, at: usize) -> usize {
        at.wrapping_sub(self.oldest) & self.last
    }

    /// Returns the place before `at`.
    pub(crate) fn before(&self, at: usize) -> usize {
        at.wrapping_sub(1) & self.last
    }

    /// Returns the descriptors from `start` to before `end`.
    pub(crate) fn between(&self, start: usize, end: usize) -> impl Iterator<Item = Descriptor> {
        let count = end.wrapping_sub(start) & self.last;
        (0..count).map(move |n| {
            let at = ((start + n) & self.last) * self.width;
            Descriptor(core::array::from_fn(|i| if i < self.width { self.ring.load(at + i) } else { 0 }))
        })
    }

    /// Takes all that was fetched, up to `head`, for free.
    pub(crate) fn release_fetched(&mut self, head: usize) {
        self.oldest = head;
    }

    /// Reads where the unit fetches next. The value is reduced: what hardware says must not lead outside the ring.
    pub(crate) fn read_head<B: Bus>(&self, bus: &B) -> usize {
        let units = regs::IQH.read(bus).read(regs::IQ::INDEX) as usize;
        (units * NARROW_WORDS / self.width) & self.last
    }

    /// Entries that can be pushed as far as is known; one stays empty, or full would look like empty.
    fn free(&self) -> usize {
        self.last - self.age(self.tail)
    }

    /// Returns whether `needed` more entries can be pushed as far as is known.
    pub(crate) fn has_room(&self, needed: usize) -> bool {
        self.free() >= needed
    }

    /// Gives back the entries that were fetched, up to the first one that is `kept`.
    fn release<B: Bus>(&mut self, bus: &B, kept: Option<usize>) {
        let fetched = self.age(self.read_head(bus));
        // A head past the tail is none.
        let fetched = if fetched <= self.age(self.tail) { fetched } else { 0 };
        let released = kept.map_or(fetched, |kept| fetched.min(self.age(kept)));
        self.oldest = (self.oldest + released) & self.last;
    }

    /// Appends `descriptors` and rings the doorbell once; see [`append`](Self::append).
    pub(crate) fn push<B: Bus>(
        &mut self,
        bus: &B,
        descriptors: &[Descriptor],
        reserve: usize,
        kept: impl FnOnce(&Self) -> Option<usize>,
    ) -> Result<usize, Error> {
        let start = self.append(bus, descriptors, reserve, kept)?;
        self.ring(bus);
        Ok(start)
    }

    /// Appends `descriptors`, if `reserve` entries remain free after them; [`ring`](Self::ring) tells the unit. Returns where
    /// they are. What `kept` returns is not overwritten, nor anything after it; it is asked only when the queue looks full.
    pub(crate) fn append<B: Bus>(
        &mut self,
        bus: &B,
        descriptors: &[Descriptor],
        reserve: usize,
        kept: impl FnOnce(&Self) -> Option<usize>,
    ) -> Result<usize, Error> {
        let needed = descriptors.len() + reserve;
        if !self.has_room(needed) {
            // The register is read only when what is known does not suffice.
            self.release(bus, kept(self));
        }
        let free = self.free();
        if free < needed {
            return Err(Error::QueueFull { needed: descriptors.len(), free: free.saturating_sub(reserve) });
        }
        let start = self.tail;
        let up_to_end = descriptors.len().min(self.entries() - start);
        let (first, rest) = descriptors.split_at(up_to_end);
        self.store(start, first);
        if !rest.is_empty() {
            self.store(0, rest);
        }
        self.tail = (start + descriptors.len()) & self.last;
        Ok(start)
    }

    /// Tells the unit of what was appended since it was told last. There is nothing to tell of nothing.
    pub(crate) fn ring<B: Bus>(&mut self, bus: &B) {
        let (start, count) = (self.rung, self.tail.wrapping_sub(self.rung) & self.last);
        if count == 0 {
            return;
        }
        // Published together: up to the end of the ring, and from its start what is left.
        let up_to_end = count.min(self.entries() - start);
        bus.publish(self.ring.range(start * self.width, up_to_end * self.width));
        if up_to_end < count {
            bus.publish(self.ring.range(0, (count - up_to_end) * self.width));
        }
        self.ring_doorbell(bus);
    }

    /// Returns whether `count` more entries can be pushed as far as is known, side by side, while `reserve` remain free; and the
    /// unit knows of all before.
    #[inline]
    pub(crate) fn has_room_in_row(&self, count: usize, reserve: usize) -> bool {
        self.has_room(count + reserve) && self.tail + count - 1 <= self.last && self.rung == self.tail
    }

    /// Appends descriptors for which there [is room](Self::has_room_in_row), and rings the doorbell once. Returns where they
    /// are.
    #[inline(always)]
    pub(crate) fn push_row<B: Bus, const N: usize>(
        &mut self,
        bus: &B,
        descriptors: [Descriptor; N],
    ) -> usize {
        let start = self.tail;
        let stored = self.store(start, &descriptors);
        bus.publish(stored);
        self.tail = (start + N) & self.last;
        self.ring_doorbell(bus);
        start
    }

    /// Stores a descriptor at entry `at`, and makes it visible to the unit.
    pub(crate) fn put<B: Bus>(&mut self, bus: &B, at: usize, descriptor: Descriptor) {
        let stored = self.store(at, &[descriptor]);
        bus.publish(stored);
    }

    /// Stores `descriptors` from entry `at` on; returns where they are.
    #[inline(always)]
    fn store(&mut self, at: usize, descriptors: &[Descriptor]) -> Range<PhysAddr> {
        let at = at * self.width;
        // The upper half, where there is none, is zero in every descriptor.
        match self.width {
            NARROW_WORDS => self.ring.store_rows(at, descriptors.iter().map(|d| [d.0[0], d.0[1]])),
            _ => self.ring.store_rows(at, descriptors.iter().map(|descriptor| descriptor.0)),
        }
    }

    /// Returns the first word of entry `at`.
    pub(crate) fn first_word(&self, at: usize) -> u64 {
        self.ring.load(at * self.width)
    }

    /// Tells the unit where the tail is.
    #[inline]
    pub(crate) fn ring_doorbell<B: Bus>(&mut self, bus: &B) {
        // ORDER: `publish` put every descriptor before this write.
        regs::IQT.write(bus, regs::IQ::INDEX.val((self.tail * self.width / NARROW_WORDS) as u64));
        self.rung = self.tail;
    }
}

/// The page request queue: the unit fills it at the tail, the driver empties it at the head.
#[derive(Debug)]
pub(crate) struct PageRequestQueue {
    ring: DmaBuf,
    head: usize,
    /// Where the tail was when it was last read.
    tail: usize,
}

impl PageRequestQueue {
    /// A queue that fills `ring`, whose size is a power of two.
    pub(crate) fn new(ring: DmaBuf) -> Self {
        Self { ring, head: 0, tail: 0 }
    }

    /// Learns what the unit has queued by now.
    pub(crate) fn look<B: Bus>(&mut self, bus: &B) {
        let tail: LocalRegisterCopy<u64, regs::PQ::Register> = regs::PQT.read(bus);
        if tail.get() == u64::MAX {
            // There is no unit any more, and nothing new.
            return;
        }
        // There is a power of two of places: what hardware says must not lead outside the ring.
        self.tail = tail.read(regs::PQ::INDEX) as usize & (self.entries() - 1);
        // Observed together: up to the end of the ring, and from its start what is left.
        let observe = |start: usize, end: usize| {
            if start < end {
                bus.observe(self.ring.range(start * ENTRY_WORDS, (end - start) * ENTRY_WORDS));
            }
        };
        if self.head <= self.tail {
            observe(self.head, self.tail);
        } else {
            observe(self.head, self.entries());
            observe(0, self.tail);
        }
    }

    /// Takes the oldest entry that is known of, copied out.
    pub(crate) fn pop<B: Bus>(&mut self, bus: &B) -> Option<[u64; ENTRY_WORDS]> {
        let entry = self.peek()?;
        self.take(bus);
        Some(entry)
    }

    /// Returns the oldest entry that is known of, copied out.
    pub(crate) fn peek(&self) -> Option<[u64; ENTRY_WORDS]> {
        if self.head == self.tail {
            return None;
        }
        Some(self.ring.load_all(self.head * ENTRY_WORDS))
    }

    /// Takes out the entry that `peek` returned. The places of all that are known of are given back with the last one.
    pub(crate) fn take<B: Bus>(&mut self, bus: &B) {
        // There is a power of two of places.
        self.head = (self.head + 1) & (self.entries() - 1);
        if self.head == self.tail {
            regs::PQH.write(bus, regs::PQ::INDEX.val(self.head as u64));
        }
    }

    fn entries(&self) -> usize {
        self.ring.words() / ENTRY_WORDS
    }
}
