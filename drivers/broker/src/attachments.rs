//! Which device's page requests go where.

use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
    fence,
};
use iommu::{Pasid, StreamId};

/// What is decided about an attachment when it is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Policy {
    /// The device.
    pub stream: StreamId,
    /// The PASID, or `None` for requests without one.
    pub pasid: Option<Pasid>,
    /// The queue that its groups go to.
    pub queue: u8,
    /// Groups that it may have outstanding; one more is refused.
    pub budget: u8,
    /// The guest's own name for the device.
    pub device: u32,
    /// A value that comes back with each of its requests, and is never interpreted.
    pub opaque: u64,
    /// How long the guest may take to answer, in microseconds; 0 refuses at once.
    pub deadline_us: u64,
}

/// Names an attachment until it is removed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct AttachmentId {
    index: usize,
    word: u64,
}

/// Low bits of an entry's word; the generation is above them.
const FREE: u64 = 0;
const LIVE: u64 = 1;
const LEAVING: u64 = 2;
/// Someone is adding an attachment here; nobody else uses the entry.
const CLAIMED: u64 = 3;
const STATE: u64 = 0xFF;
const GENERATION_ONE: u64 = STATE + 1;

/// One attachment. The words below `word` are written only while `word` says free, and valid only while it does not.
#[derive(Debug)]
struct Entry {
    word: AtomicU64,
    key: AtomicU64,
    queue_budget_device: AtomicU64,
    opaque: AtomicU64,
    deadline_us: AtomicU64,
}

/// The attachments of a unit, at most `A`.
///
/// Cores may add, and let go, at the same time; the interrupt handler reads without a lock.
#[derive(Debug)]
pub struct Attachments<const A: usize> {
    entries: [Entry; A],
}

/// Packs device and PASID into one word that is compared at once.
fn key(stream: StreamId, pasid: Option<Pasid>) -> u64 {
    u64::from(stream.0) << 32 | u64::from(pasid.map_or(u32::MAX, Pasid::value))
}

impl<const A: usize> Default for Attachments<A> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const A: usize> Attachments<A> {
    /// No attachments.
    pub const fn new() -> Self {
        Self {
            entries: [const {
                Entry {
                    word: AtomicU64::new(FREE),
                    key: AtomicU64::new(0),
                    queue_budget_device: AtomicU64::new(0),
                    opaque: AtomicU64::new(0),
                    deadline_us: AtomicU64::new(0),
                }
            }; A],
        }
    }

    /// Adds an attachment: from here on its requests are admitted. `None` if there is no room or it exists already.
    ///
    /// Any core may call it. One device and PASID has one owner, who does not add it twice at the same time.
    pub fn add(&self, policy: Policy) -> Option<AttachmentId> {
        let key = key(policy.stream, policy.pasid);
        let taken = |e: &Entry| matches!(e.word.load(Acquire) & STATE, LIVE | LEAVING);
        if self.entries.iter().any(|e| taken(e) && e.key.load(Relaxed) == key) {
            return None;
        }
        let (index, entry, before) = self.entries.iter().enumerate().find_map(|(index, entry)| {
            let word = entry.word.load(Relaxed);
            let claim =
                |word| entry.word.compare_exchange(word, word & !STATE | CLAIMED, Acquire, Relaxed).is_ok();
            (word & STATE == FREE && claim(word)).then_some((index, entry, word))
        })?;
        // ORDER: a reader that still holds the word from before sees that it changed if it sees any of what follows.
        fence(Release);
        entry.key.store(key, Relaxed);
        let packed = u64::from(policy.queue) | u64::from(policy.budget) << 8 | u64::from(policy.device) << 32;
        entry.queue_budget_device.store(packed, Relaxed);
        entry.opaque.store(policy.opaque, Relaxed);
        entry.deadline_us.store(policy.deadline_us, Relaxed);
        let word = (before & !STATE).wrapping_add(GENERATION_ONE) | LIVE;
        // ORDER: a handler that sees the word sees what it stands for.
        entry.word.store(word, Release);
        Some(AttachmentId { index, word })
    }

    /// Stops admitting requests of an attachment. A handler that runs now may still admit one; after it has passed
    /// through a drain, none.
    pub fn leave(&self, id: AttachmentId) {
        if let Some(entry) = self.entries.get(id.index) {
            // Lost only against an earlier `leave` or `remove`, and then there is nothing to do.
            let _ = entry.word.compare_exchange(id.word, id.word & !STATE | LEAVING, Relaxed, Relaxed);
        }
    }

    /// Forgets an attachment that left, once its last group was answered.
    pub fn remove(&self, id: AttachmentId) {
        if let Some(entry) = self.entries.get(id.index) {
            let leaving = id.word & !STATE | LEAVING;
            let _ = entry.word.compare_exchange(leaving, id.word & !STATE | FREE, Release, Relaxed);
        }
    }

    /// Returns the live attachment of a device and PASID.
    pub fn find(&self, stream: StreamId, pasid: Option<Pasid>) -> Option<(AttachmentId, Policy)> {
        let key = key(stream, pasid);
        self.matching(|candidate| candidate == key)
    }

    /// Returns some live attachment of a device: its owner is told of faults that no PASID explains.
    pub fn find_device(&self, stream: StreamId) -> Option<(AttachmentId, Policy)> {
        self.matching(|candidate| candidate >> 32 == u64::from(stream.0))
    }

    /// Returns whether `id` is still live.
    pub fn is_live(&self, id: AttachmentId) -> bool {
        self.entries.get(id.index).is_some_and(|e| e.word.load(Acquire) == id.word)
    }

    fn matching(&self, matches: impl Fn(u64) -> bool) -> Option<(AttachmentId, Policy)> {
        self.entries.iter().enumerate().find_map(|(index, entry)| {
            let word = entry.word.load(Acquire);
            if word & STATE != LIVE {
                return None;
            }
            let key = entry.key.load(Relaxed);
            let packed = entry.queue_budget_device.load(Relaxed);
            let (opaque, deadline_us) = (entry.opaque.load(Relaxed), entry.deadline_us.load(Relaxed));
            // ORDER: the words were read before the word is read again; if it is the same, they belong to it.
            fence(Acquire);
            if entry.word.load(Relaxed) != word || !matches(key) {
                return None;
            }
            let policy = Policy {
                stream: StreamId((key >> 32) as u32),
                pasid: Pasid::new(key as u32),
                queue: packed as u8,
                budget: (packed >> 8) as u8,
                device: (packed >> 32) as u32,
                opaque,
                deadline_us,
            };
            Some((AttachmentId { index, word }, policy))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Policy = Policy {
        stream: StreamId(0x20),
        pasid: Pasid::new(5),
        queue: 1,
        budget: 4,
        device: 7,
        opaque: 0xFEED,
        deadline_us: 100_000,
    };

    #[test]
    fn an_attachment_is_found_as_it_was_made() {
        let attachments = Attachments::<2>::new();
        let id = attachments.add(DISK).expect("there is room");

        assert_eq!(attachments.find(StreamId(0x20), Pasid::new(5)), Some((id, DISK)));
        assert_eq!(attachments.find(StreamId(0x20), None), None);
        assert_eq!(attachments.find(StreamId(0x21), Pasid::new(5)), None);
        assert_eq!(attachments.find_device(StreamId(0x20)), Some((id, DISK)));
    }

    #[test]
    fn an_attachment_that_left_admits_nothing_and_keeps_its_place_until_removed() {
        let attachments = Attachments::<1>::new();
        let id = attachments.add(DISK).expect("there is room");

        attachments.leave(id);
        assert_eq!(attachments.find(DISK.stream, DISK.pasid), None);
        assert_eq!(attachments.add(DISK), None, "its place is not free yet");

        attachments.remove(id);
        let again = attachments.add(DISK).expect("its place is free");
        assert_ne!(again, id);
        attachments.leave(id);
        assert!(attachments.is_live(again), "an old name does nothing");
    }

    #[test]
    fn two_cores_that_add_at_once_get_two_places() {
        let attachments = Attachments::<2>::new();
        let add =
            |stream| attachments.add(Policy { stream: StreamId(stream), ..DISK }).expect("there is room");
        for _ in 0..2_000 {
            let (first, second) = std::thread::scope(|scope| {
                let other = scope.spawn(|| add(0x28));
                (add(0x20), other.join().expect("it does not panic"))
            });
            assert_ne!(first, second);
            for (id, stream) in [(first, 0x20), (second, 0x28)] {
                let found = attachments.find(StreamId(stream), DISK.pasid);
                assert_eq!(found, Some((id, Policy { stream: StreamId(stream), ..DISK })));
                attachments.leave(id);
                attachments.remove(id);
            }
        }
    }

    #[test]
    fn one_device_and_pasid_has_one_attachment() {
        let attachments = Attachments::<2>::new();
        let _ = attachments.add(DISK).expect("there is room");

        assert_eq!(attachments.add(Policy { queue: 0, ..DISK }), None);
        assert!(attachments.add(Policy { pasid: None, ..DISK }).is_some());
    }
}
