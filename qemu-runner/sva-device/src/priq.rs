// SPDX-License-Identifier: GPL-2.0-or-later
//! The PRI queue of an SMMUv3, as Arm IHI 0070 has it: three registers, and where the next entry goes.

use crate::qemu::PageRequest;

/// `SMMU_IDR1.PRIQS`: log2 of the most entries that the queue may have.
pub(crate) const PRIQS: u32 = 10;

/// Bytes of an entry.
const ENTRY_BYTES: u64 = 16;
/// `OVFLG` of `SMMU_PRIQ_PROD` and `OVACKFLG` of `SMMU_PRIQ_CONS`.
const OVERFLOW: u32 = 1 << 31;
/// The bits of either that hold an index and its wrap flag.
const INDEX: u32 = (1 << 20) - 1;
/// The bits of `SMMU_PRIQ_BASE` that exist: `WA`, `ADDR`, `LOG2SIZE`.
const BASE: u64 = 1 << 62 | ADDRESS | 0x1f;
const ADDRESS: u64 = 0x00ff_ffff_ffff_ffe0;

/// The queue.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct PriQueue {
    base: u64,
    prod: u32,
    cons: u32,
}

/// One 32-bit word of the queue's registers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum QueueWord {
    BaseLow,
    BaseHigh,
    Prod,
    Cons,
}

impl PriQueue {
    /// Returns what software reads.
    pub(crate) fn read(&self, word: QueueWord) -> u32 {
        match word {
            QueueWord::BaseLow => self.base as u32,
            QueueWord::BaseHigh => (self.base >> 32) as u32,
            QueueWord::Prod => self.prod & (OVERFLOW | self.indices()),
            QueueWord::Cons => self.cons,
        }
    }

    /// Takes what software writes; while the queue is `enabled`, `SMMU_PRIQ_CONS` alone is writable.
    pub(crate) fn write(&mut self, word: QueueWord, value: u32, enabled: bool) {
        match word {
            QueueWord::Cons => self.cons = value & (OVERFLOW | INDEX),
            _ if enabled => {}
            QueueWord::BaseLow => self.base = BASE & (self.base & !0xffff_ffff | u64::from(value)),
            QueueWord::BaseHigh => self.base = BASE & (self.base & 0xffff_ffff | u64::from(value) << 32),
            QueueWord::Prod => self.prod = value & (OVERFLOW | INDEX),
        }
    }

    /// Returns the address of the next entry, or `None` while there is no place for one: when the queue is full, and
    /// from a lost request on until software has acknowledged the overflow.
    pub(crate) fn place(&self) -> Option<u64> {
        let entries = 1 << self.log2size();
        let full = (self.prod ^ self.cons) & self.indices() == entries;
        if full || self.has_overflowed() {
            return None;
        }
        let first = self.base & ADDRESS & !(u64::from(entries) * ENTRY_BYTES - 1);
        Some(first + u64::from(self.prod & (entries - 1)) * ENTRY_BYTES)
    }

    /// Moves past the entry that was written at [`Self::place`]; returns whether the queue was empty before.
    pub(crate) fn push(&mut self) -> bool {
        let empty = (self.prod ^ self.cons) & self.indices() == 0;
        self.prod = self.prod & OVERFLOW | (self.prod + 1) & self.indices();
        empty
    }

    /// Notes that a request was lost.
    pub(crate) fn overflow(&mut self) {
        if !self.has_overflowed() {
            self.prod ^= OVERFLOW;
        }
    }

    /// Whether a request was lost, and software has not acknowledged that.
    fn has_overflowed(&self) -> bool {
        (self.prod ^ self.cons) & OVERFLOW != 0
    }

    fn log2size(&self) -> u32 {
        (self.base as u32 & 0x1f).min(PRIQS)
    }

    /// The bits that an index and its wrap flag have in a queue of this size.
    fn indices(&self) -> u32 {
        (2 << self.log2size()) - 1
    }
}

/// Returns the entry for a `request` of `stream`, without a substream: `SSV`, `X` and `Priv` are clear.
pub(crate) fn entry(stream: u16, request: PageRequest) -> [u8; ENTRY_BYTES as usize] {
    let PageRequest { page, read, write, last, prgi, .. } = request;
    let low = u64::from(stream) | u64::from(read) << 60 | u64::from(write) << 61 | u64::from(last) << 62;
    let high = page | u64::from(prgi);
    (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::Pasid;

    /// An empty queue of `1 << log2size` entries at 0x8010_4000.
    fn queue(log2size: u32) -> PriQueue {
        let mut queue = PriQueue::default();
        queue.write(QueueWord::BaseLow, 0x8010_4000 | log2size, false);
        queue
    }

    /// Writes entries until there is no place for one; returns how many that were.
    fn fill(queue: &mut PriQueue) -> usize {
        let mut entries = 0;
        while queue.place().is_some() {
            queue.push();
            entries += 1;
        }
        entries
    }

    #[test]
    fn an_entry_has_its_fields_where_the_architecture_has_them() {
        let request = PageRequest {
            page: 0x4020_2000,
            pasid: Pasid(None),
            privileged: true,
            read: true,
            write: false,
            last: true,
            prgi: 3,
        };

        let [low, high] =
            [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|n| entry(0x108, request)[at + n])));

        assert_eq!((low, high), (0x5000_0000_0000_0108, 0x4020_2003));
    }

    #[test]
    fn entries_follow_each_other_and_the_index_wraps() {
        let mut queue = queue(1);

        assert_eq!(queue.place(), Some(0x8010_4000));
        assert!(queue.push());
        assert_eq!(queue.place(), Some(0x8010_4010));
        assert!(!queue.push());
        queue.write(QueueWord::Cons, 1, true);

        assert_eq!(queue.read(QueueWord::Prod), 2);
        assert_eq!(queue.place(), Some(0x8010_4000));
        assert!(!queue.push());
        assert_eq!(queue.read(QueueWord::Prod), 3);
        queue.write(QueueWord::Cons, 3, true);
        assert_eq!(queue.place(), Some(0x8010_4010));
        assert!(queue.push());
        assert_eq!(queue.read(QueueWord::Prod), 0);
    }

    #[test]
    fn a_queue_has_as_many_places_as_its_size_says_and_no_more_than_priqs_allows() {
        for (log2size, entries) in [(0, 1), (3, 8), (10, 1024), (31, 1024)] {
            assert_eq!(fill(&mut queue(log2size)), entries, "{log2size}");
        }
    }

    #[test]
    fn a_full_queue_has_lost_nothing_yet() {
        let mut queue = queue(3);

        fill(&mut queue);

        assert_eq!(queue.read(QueueWord::Prod), 8);
    }

    #[test]
    fn after_an_overflow_there_is_no_place_before_software_has_acknowledged_it() {
        let mut queue = queue(3);
        fill(&mut queue);

        queue.overflow();
        queue.overflow();
        assert_eq!(queue.read(QueueWord::Prod), OVERFLOW | 8);
        queue.write(QueueWord::Cons, 8, true);
        assert_eq!(queue.place(), None);
        queue.write(QueueWord::Cons, OVERFLOW | 8, true);

        assert_eq!(queue.place(), Some(0x8010_4000));
        queue.push();
        assert_eq!(queue.read(QueueWord::Prod), OVERFLOW | 9);
        fill(&mut queue);
        queue.overflow();
        assert_eq!(queue.read(QueueWord::Prod) & OVERFLOW, 0);
    }

    #[test]
    fn an_enabled_queue_stays_where_it_is() {
        let mut queue = queue(3);
        let before = queue;

        queue.write(QueueWord::BaseLow, 0x9000_0005, true);
        queue.write(QueueWord::BaseHigh, 1, true);
        queue.write(QueueWord::Prod, 5, true);

        assert_eq!(queue, before);
    }

    #[test]
    fn bits_that_do_not_exist_read_zero() {
        let mut queue = PriQueue::default();

        for word in [QueueWord::BaseLow, QueueWord::BaseHigh, QueueWord::Prod, QueueWord::Cons] {
            queue.write(word, u32::MAX, false);
        }

        assert_eq!(queue.read(QueueWord::BaseLow), u32::MAX);
        assert_eq!(queue.read(QueueWord::BaseHigh), 0x40ff_ffff);
        assert_eq!(queue.read(QueueWord::Prod), OVERFLOW | 0x7ff, "1024 entries and the wrap flag");
        assert_eq!(queue.read(QueueWord::Cons), OVERFLOW | 0xf_ffff);
    }

    #[test]
    fn the_base_is_aligned_to_the_queue() {
        let mut queue = queue(4);

        queue.write(QueueWord::BaseLow, 0x8010_4064, false);

        assert_eq!(queue.place(), Some(0x8010_4000));
    }
}
