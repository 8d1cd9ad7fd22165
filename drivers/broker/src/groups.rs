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
    bucket: u32,
    is_in: bool,
}

/// A name, and where it is looked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key {
    name: Name,
    bucket: u32,
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
        Self {
            entries: [Entry { name: Name { who: 0, index: 0 }, next: 0, bucket: 0, is_in: false }; N],
            heads: [0; N],
        }
    }

    /// Returns the key of a name, to be found or inserted.
    #[inline]
    pub fn key(stream: StreamId, tag: GroupTag) -> Key {
        let name = Name::new(stream, tag);
        Key { name, bucket: name.bucket(N) as u32 }
    }

    #[inline]
    pub fn find(&self, Key { name, bucket }: Key) -> Option<u32> {
        let mut at = self.heads[bucket as usize % N];
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
    #[inline]
    pub fn insert(&mut self, place: u32, Key { name, bucket }: Key) {
        self.remove(place);
        let Some(entry) = self.entries.get_mut(place as usize) else { return };
        let next = core::mem::replace(&mut self.heads[bucket as usize % N], place + 1);
        *entry = Entry { name, next, bucket, is_in: true };
    }

    /// Forgets the name of the group in `place`.
    #[inline]
    pub fn remove(&mut self, place: u32) {
        if self.entries.get(place as usize).is_some_and(|entry| entry.is_in) {
            self.take_out(place);
        }
    }

    fn take_out(&mut self, place: u32) {
        let Entry { bucket, next, .. } = self.entries[place as usize];
        self.entries[place as usize].is_in = false;
        let head = &mut self.heads[bucket as usize % N];
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
    pub fn name(&self, place: u32) -> Key {
        let Entry { name, bucket, .. } = self.entries[place as usize % N];
        Key { name, bucket }
    }
}
