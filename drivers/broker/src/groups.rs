//! Finds a group by its name: device, PASID and the device's own number for it.

use crate::attachments::who;
use iommu::{GroupTag, Pasid, StreamId};

/// What a device calls a group.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Name {
    /// The device and the PASID.
    who: u64,
    index: u16,
}

impl Name {
    fn new(stream: StreamId, tag: GroupTag) -> Self {
        Self { who: who(stream, Pasid::word(tag.pasid)), index: tag.index }
    }

    /// Returns which bucket of 2^`bits` it belongs to.
    fn bucket(self, bits: u32) -> u32 {
        // A PASID's word has 21 bits, so the index lies beside it, and its highest bits on the lowest of the stream.
        let mixed = self.who.wrapping_add(u64::from(self.index) << 21).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        // Every bit had a hand in the highest ones of a product.
        (mixed >> (u64::BITS - bits)) as u32
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    name: Name,
    /// The next entry of the same bucket plus one.
    next: u32,
    /// Its bucket plus one, 0 if it is in none.
    bucket: u32,
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
    /// The first entry of each bucket plus one. There are as many buckets as the largest power of two that is not above `N`.
    heads: [u32; N],
}

impl<const N: usize> Groups<N> {
    const BUCKETS_LOG2: u32 = N.ilog2();

    pub const fn new() -> Self {
        const { assert!(N >= 2, "a bucket is named by one bit at least") };
        let nameless = Entry { name: Name { who: 0, index: 0 }, next: 0, bucket: 0 };
        Self { entries: [nameless; N], heads: [0; N] }
    }

    /// Returns the key of a name, to be found or inserted.
    #[inline]
    pub fn key(stream: StreamId, tag: GroupTag) -> Key {
        let name = Name::new(stream, tag);
        Key { name, bucket: name.bucket(Self::BUCKETS_LOG2) }
    }

    #[inline]
    pub fn find(&self, Key { name, bucket }: Key) -> Option<u32> {
        let mut at = *self.heads.get(bucket as usize)?;
        while let Some(place) = at.checked_sub(1) {
            let entry = self.entries.get(place as usize)?;
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
        if self.entries.get(place as usize).is_some_and(|entry| entry.bucket != 0) {
            self.remove(place);
        }
        let head = self.heads.get_mut(bucket as usize);
        let (Some(head), Some(entry)) = (head, self.entries.get_mut(place as usize)) else { return };
        *entry = Entry { name, next: *head, bucket: bucket + 1 };
        *head = place + 1;
    }

    /// Forgets the name of the group in `place`.
    #[inline]
    pub fn remove(&mut self, place: u32) {
        let Some(entry) = self.entries.get_mut(place as usize) else { return };
        let (bucket, next) = (core::mem::take(&mut entry.bucket), entry.next);
        let Some(head) = bucket.checked_sub(1).and_then(|bucket| self.heads.get_mut(bucket as usize)) else {
            return;
        };
        if *head == place + 1 {
            *head = next;
        } else {
            let head = *head;
            self.unchain(head, place, next);
        }
    }

    /// Takes `place`, which `next` comes after, out of the chain that begins with `at`, but not out of its beginning.
    #[inline(never)]
    fn unchain(&mut self, mut at: u32, place: u32, next: u32) {
        while let Some(before) = at.checked_sub(1) {
            let Some(entry) = self.entries.get_mut(before as usize) else { return };
            if entry.next == place + 1 {
                entry.next = next;
                return;
            }
            at = entry.next;
        }
    }

    /// Returns what the group in `place` is called, or was called last.
    pub fn name(&self, place: u32) -> Option<Key> {
        let name = self.entries.get(place as usize)?.name;
        Some(Key { name, bucket: name.bucket(Self::BUCKETS_LOG2) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_found_by_its_name_as_long_as_its_place_has_that_name() {
        const PLACES: u32 = 8;
        let key = |n: u32| {
            let tag = GroupTag { pasid: Pasid::new(n % 3), index: (n / 3) as u16 };
            Groups::<{ PLACES as usize }>::key(StreamId(n / 9), tag)
        };
        let mut groups = Groups::<{ PLACES as usize }>::new();
        let mut names = [None; PLACES as usize];
        for n in 0..if cfg!(miri) { 100 } else { 10_000 } {
            let place = n * 5 % 7 % PLACES;
            groups.insert(place, key(n));
            names[place as usize] = Some(n);
            let removed = n * 11 % 13 % PLACES;
            groups.remove(removed);
            names[removed as usize] = None;

            for last in n.saturating_sub(20)..=n {
                let named = names.iter().position(|&name| name == Some(last));
                assert_eq!(groups.find(key(last)), named.map(|place| place as u32));
            }
        }
    }
}
