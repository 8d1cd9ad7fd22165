//! Finds a group by its name: device, PASID and the device's own number for it.

use iommu::{GroupTag, Pasid, StreamId};

/// What a device calls a group.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Name {
    /// Stream in 63:32, PASID in 31:0, all ones if there is none.
    who: u64,
    index: u16,
}

impl Name {
    fn new(stream: StreamId, tag: GroupTag) -> Self {
        let pasid = tag.pasid.map_or(u32::MAX, Pasid::value);
        Self { who: u64::from(stream.0) << 32 | u64::from(pasid), index: tag.index }
    }

    fn bucket(self, buckets: usize) -> usize {
        let mixed = (self.who ^ self.who >> 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mixed = (mixed ^ u64::from(self.index)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (((mixed >> 32) * buckets as u64) >> 32) as usize
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    name: Name,
    /// The next entry of the same bucket plus one.
    next: u32,
    is_in: bool,
}

/// The names of up to `N` groups, each with a place of its own.
///
/// A search looks at the groups that share a bucket: one or two as a rule. A device that chooses its names so that they share
/// one lengthens it by as many as it may have outstanding.
#[derive(Debug)]
pub(crate) struct Groups<const N: usize> {
    entries: [Entry; N],
    /// The first entry of each bucket plus one.
    heads: [u32; N],
}

impl<const N: usize> Groups<N> {
    pub const fn new() -> Self {
        Self { entries: [Entry { name: Name { who: 0, index: 0 }, next: 0, is_in: false }; N], heads: [0; N] }
    }

    pub fn find(&self, stream: StreamId, tag: GroupTag) -> Option<u32> {
        let name = Name::new(stream, tag);
        let mut at = self.heads[name.bucket(N)];
        while let Some(place) = at.checked_sub(1) {
            let entry = &self.entries[place as usize];
            if entry.name == name {
                return Some(place);
            }
            at = entry.next;
        }
        None
    }

    /// Names the group in `place`, which had perhaps another name before.
    pub fn insert(&mut self, place: u32, stream: StreamId, tag: GroupTag) {
        if place as usize >= N {
            return;
        }
        self.remove(place);
        let name = Name::new(stream, tag);
        let next = core::mem::replace(&mut self.heads[name.bucket(N)], place + 1);
        self.entries[place as usize] = Entry { name, next, is_in: true };
    }

    /// Forgets the name of the group in `place`.
    pub fn remove(&mut self, place: u32) {
        let Some(&Entry { name, next, is_in: true }) = self.entries.get(place as usize) else { return };
        self.entries[place as usize].is_in = false;
        let head = &mut self.heads[name.bucket(N)];
        if *head == place + 1 {
            *head = next;
            return;
        }
        let mut at = *head;
        while let Some(before) = at.checked_sub(1) {
            let entry = &mut self.entries[before as usize];
            if entry.next == place + 1 {
                entry.next = next;
                return;
            }
            at = entry.next;
        }
    }

    /// Returns what the group in `place` is called.
    pub fn name(&self, place: u32) -> (StreamId, GroupTag) {
        let Name { who, index } = self.entries[place as usize % N].name;
        (StreamId((who >> 32) as u32), GroupTag { pasid: Pasid::new(who as u32), index })
    }
}
