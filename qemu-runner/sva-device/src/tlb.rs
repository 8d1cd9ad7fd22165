// SPDX-License-Identifier: GPL-2.0-or-later
//! The device TLB (PCIe: address translation cache): translations that outlive the operation that asked for them.

use crate::{
    operation::{Access, Pasid},
    qemu::Space,
};
use std::collections::VecDeque;

/// Most translations that the device keeps: what all lanes together can use at once.
const CAPACITY: usize = 128;

/// What ATS says of one naturally aligned range.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Translation {
    /// The address space that `translated` is in.
    pub(crate) space: Space,
    /// An address of the range.
    pub(crate) iova: u64,
    /// The translation of `iova`.
    pub(crate) translated: u64,
    /// The size of the range less one; never less than a page's.
    pub(crate) mask: u64,
    /// Whether reads are permitted.
    pub(crate) read: bool,
    /// Whether writes are permitted.
    pub(crate) write: bool,
}

impl Translation {
    /// Returns what `address`, which is in the range, translates to.
    pub(crate) fn of(&self, address: u64) -> u64 {
        self.translated & !self.mask | address & self.mask
    }

    /// Whether the translation permits `access`.
    pub(crate) fn permits(&self, access: Access) -> bool {
        if access.write { self.write } else { self.read }
    }

    fn first(&self) -> u64 {
        self.iova & !self.mask
    }

    fn last(&self) -> u64 {
        self.iova | self.mask
    }
}

/// The device TLB; when full, the oldest translation makes room.
#[derive(Default)]
pub(crate) struct Tlb(VecDeque<Entry>);

struct Entry {
    pasid: Pasid,
    privileged: bool,
    translation: Translation,
}

impl Tlb {
    /// Returns a translation of `page` that permits `access`.
    pub(crate) fn lookup(&self, access: Access, page: u64) -> Option<Translation> {
        self.0
            .iter()
            .filter(|entry| (entry.pasid, entry.privileged) == (access.pasid, access.privileged))
            .map(|entry| entry.translation)
            .find(|it| it.first() <= page && page <= it.last() && it.permits(access))
    }

    /// Keeps `translation` for accesses like `access`.
    pub(crate) fn fill(&mut self, access: Access, translation: Translation) {
        self.0.truncate(CAPACITY - 1);
        self.0.push_front(Entry { pasid: access.pasid, privileged: access.privileged, translation });
    }

    /// Drops what overlaps the addresses `first` to `last` of `pasid`; returns how many translations that were.
    pub(crate) fn invalidate(&mut self, pasid: Pasid, first: u64, last: u64) -> usize {
        let before = self.0.len();
        self.0.retain(|Entry { pasid: of, translation: it, .. }| {
            *of != pasid || it.last() < first || last < it.first()
        });
        before - self.0.len()
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Access = Access { pasid: Pasid(Some(5)), privileged: false, write: false };

    fn page(iova: u64, translated: u64) -> Translation {
        Translation { space: Space::fake(0), iova, translated, mask: 0xfff, read: true, write: false }
    }

    #[test]
    fn a_translation_serves_the_accesses_that_it_permits_in_its_own_pasid() {
        let mut tlb = Tlb::default();

        tlb.fill(READ, page(0x4000, 0x9000));

        assert_eq!(tlb.lookup(READ, 0x4000).map(|it| it.of(0x4018)), Some(0x9018));
        assert!(tlb.lookup(READ, 0x5000).is_none());
        assert!(tlb.lookup(Access { write: true, ..READ }, 0x4000).is_none());
        assert!(tlb.lookup(Access { pasid: Pasid(Some(6)), ..READ }, 0x4000).is_none());
        assert!(tlb.lookup(Access { pasid: Pasid(None), ..READ }, 0x4000).is_none());
        assert!(tlb.lookup(Access { privileged: true, ..READ }, 0x4000).is_none());
    }

    #[test]
    fn a_large_translation_serves_each_of_its_pages() {
        let mut tlb = Tlb::default();

        tlb.fill(READ, Translation { mask: 0x1f_ffff, ..page(0x40_3000, 0x80_3000) });

        assert_eq!(tlb.lookup(READ, 0x5f_f000).map(|it| it.of(0x5f_f008)), Some(0x9f_f008));
        assert!(tlb.lookup(READ, 0x60_0000).is_none());
    }

    #[test]
    fn an_invalidation_drops_what_it_overlaps_in_its_pasid_alone() {
        let mut tlb = Tlb::default();
        tlb.fill(READ, page(0x4000, 0x9000));
        tlb.fill(READ, page(0x6000, 0xa000));
        tlb.fill(Access { pasid: Pasid(Some(6)), ..READ }, page(0x4000, 0xb000));

        assert_eq!(tlb.invalidate(Pasid(Some(5)), 0, 0x4fff), 1);

        assert!(tlb.lookup(READ, 0x4000).is_none());
        assert!(tlb.lookup(READ, 0x6000).is_some());
        assert!(tlb.lookup(Access { pasid: Pasid(Some(6)), ..READ }, 0x4000).is_some());
    }

    #[test]
    fn a_full_tlb_forgets_its_oldest_translation() {
        let mut tlb = Tlb::default();

        for n in 0..=CAPACITY as u64 {
            tlb.fill(READ, page(n << 12, 0));
        }

        assert!(tlb.lookup(READ, 0).is_none());
        assert!(tlb.lookup(READ, 1 << 12).is_some());
        assert!(tlb.lookup(READ, (CAPACITY as u64) << 12).is_some());
    }
}
