//! The rings that the unit and its driver share.

use crate::{commands::Descriptor, regs};
use iommu::{Bus, DmaBuf, Error};
use tock_registers::LocalRegisterCopy;

/// 64-bit words of a queue entry, in the invalidation queue and in the page request queue.
pub(crate) const ENTRY_WORDS: usize = 4;

/// The invalidation queue: the driver fills it at the tail, the unit empties it at the head.
#[derive(Debug)]
pub(crate) struct InvalidationQueue {
    ring: DmaBuf,
    tail: usize,
    /// Where the head was when it was last read; the unit can only be further.
    head: usize,
}

impl InvalidationQueue {
    /// A queue that fills `ring`, whose size is a power of two.
    pub(crate) fn new(ring: DmaBuf) -> Self {
        Self { ring, tail: 0, head: 0 }
    }

    fn entries(&self) -> usize {
        self.ring.words() / ENTRY_WORDS
    }

    /// Entries that can be pushed as far as is known; one stays empty, or full would look like empty.
    fn free(&self) -> usize {
        (self.head + self.entries() - self.tail - 1) % self.entries()
    }

    /// Appends `descriptors` and rings the doorbell once, if `reserve` entries remain free after them.
    pub(crate) fn push<B: Bus>(
        &mut self,
        bus: &B,
        descriptors: &[Descriptor],
        reserve: usize,
    ) -> Result<(), Error> {
        let needed = descriptors.len() + reserve;
        if self.free() < needed {
            // The register is read only when the last known head does not suffice. The value is reduced: what
            // hardware says must not lead outside the ring.
            self.head = regs::IQH.read(bus).read(regs::IQ::INDEX) as usize % self.entries();
        }
        let free = self.free();
        if free < needed {
            return Err(Error::QueueFull { needed: descriptors.len(), free: free.saturating_sub(reserve) });
        }
        for descriptor in descriptors {
            let at = self.tail * ENTRY_WORDS;
            for (i, word) in descriptor.0.into_iter().enumerate() {
                self.ring.store(at + i, word);
            }
            bus.publish(self.ring.range(at, ENTRY_WORDS));
            self.tail = (self.tail + 1) % self.entries();
        }
        // ORDER: `publish` put every descriptor before this write.
        regs::IQT.write(bus, regs::IQ::INDEX.val(self.tail as u64));
        Ok(())
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

    /// Takes the oldest entry, copied out, and gives its place back to the unit.
    pub(crate) fn pop<B: Bus>(&mut self, bus: &B) -> Option<[u64; ENTRY_WORDS]> {
        if self.head == self.tail {
            let tail: LocalRegisterCopy<u64, regs::PQ::Register> = regs::PQT.read(bus);
            self.tail = tail.read(regs::PQ::INDEX) as usize % self.entries();
            if self.head == self.tail {
                return None;
            }
        }
        let at = self.head * ENTRY_WORDS;
        bus.observe(self.ring.range(at, ENTRY_WORDS));
        let entry = core::array::from_fn(|i| self.ring.load(at + i));
        self.head = (self.head + 1) % self.entries();
        // Given back before it is answered: a device that is answered may ask again at once.
        regs::PQH.write(bus, regs::PQ::INDEX.val(self.head as u64));
        Some(entry)
    }

    fn entries(&self) -> usize {
        self.ring.words() / ENTRY_WORDS
    }
}
