//! Finds an entry by its key, in a fixed number of places, while others add and remove.

use core::{
    ops::Range,
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
        fence,
    },
};

/// Places of a bucket: their keys are one cache line.
const WAYS: usize = 8;

/// Odd numbers with well-mixed bits, one for each of the two buckets of a key.
const FACTORS: [u64; 2] = [0x9E37_79B9_7F4A_7C15, 0xD6E8_FEB8_6659_FD93];

/// Low bits of a place's word; its generation is above them.
const FREE: u64 = 0;
const LIVE: u64 = 1;
const LEAVING: u64 = 2;
/// Someone is filling the place; nobody else uses it.
const CLAIMED: u64 = 3;
const STATE: u64 = 0xFF;
const GENERATION_ONE: u64 = STATE + 1;

/// Names what lies in a place until it is removed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub(crate) struct Id {
    pub place: u32,
    pub word: u64,
}

impl Id {
    /// Names nothing: no place is live in this word.
    pub const NONE: Self = Self { place: 0, word: FREE };
}

/// `N` places. A key lies in one of two buckets of eight places, so it is found, or known to be absent, after 16 looks. Two
/// thirds of the places can be filled before the sixteen of some key are all taken.
///
/// What belongs to a place is kept by the owner of the directory, and is written only while the place is claimed.
#[derive(Debug)]
pub(crate) struct Directory<const N: usize> {
    keys: [AtomicU64; N],
    words: [AtomicU64; N],
}

impl<const N: usize> Directory<N> {
    pub const fn new() -> Self {
        const { assert!(N.is_power_of_two() && N >= WAYS, "a directory has 8 places, or 16, or 32 and so on") };
        Self { keys: [const { AtomicU64::new(0) }; N], words: [const { AtomicU64::new(FREE) }; N] }
    }

    /// Returns the places where `key` may lie.
    fn places(key: u64) -> impl Iterator<Item = usize> {
        let [first, second] = Self::buckets(key);
        first.chain(second)
    }

    fn buckets(key: u64) -> [Range<usize>; 2] {
        [Self::bucket(key, FACTORS[0]), Self::bucket(key, FACTORS[1])]
    }

    /// The bucket that the highest bits of a product name: every bit of the key had a hand in them.
    fn bucket(key: u64, factor: u64) -> Range<usize> {
        let bits = (N / WAYS).ilog2();
        // One shift, in two parts because there may be no bits at all.
        let number = (key.wrapping_mul(factor) >> 1 >> (63 - bits)) as usize;
        number * WAYS..(number + 1) * WAYS
    }

    /// Puts `key` into a free place, where `fill` writes what belongs to it. `None` if the key is there, or if all its
    /// places are taken.
    ///
    /// Any core may call it. One key has one owner, who does not add it twice at the same time.
    pub fn add(&self, key: u64, fill: impl FnOnce(usize)) -> Option<Id> {
        let is_there = |&place: &usize| {
            matches!(self.words[place].load(Acquire) & STATE, LIVE | LEAVING)
                && self.keys[place].load(Relaxed) == key
        };
        if Self::places(key).any(|place| is_there(&place)) {
            return None;
        }
        // The emptier bucket first, so that neither is full while the other has room.
        let [first, second] = Self::buckets(key);
        let taken = |bucket: &Range<usize>| {
            self.words[bucket.clone()].iter().filter(|word| word.load(Relaxed) & STATE != FREE).count()
        };
        let order = if taken(&first) <= taken(&second) { [first, second] } else { [second, first] };
        let (place, before) = order.into_iter().flatten().find_map(|place| {
            let word = self.words[place].load(Relaxed);
            let claimed = word & !STATE | CLAIMED;
            let claim = || self.words[place].compare_exchange(word, claimed, Acquire, Relaxed).is_ok();
            (word & STATE == FREE && claim()).then_some((place, word))
        })?;
        // ORDER: a reader that still holds the word from before sees that it changed if it sees any of what follows.
        fence(Release);
        self.keys[place].store(key, Relaxed);
        fill(place);
        let word = (before & !STATE).wrapping_add(GENERATION_ONE) | LIVE;
        // ORDER: whoever sees the word sees what it stands for.
        self.words[place].store(word, Release);
        Some(Id { place: place as u32, word })
    }

    /// Returns what is live under `key`. Whoever reads what belongs to it asks [`is_still`](Self::is_still) afterwards.
    ///
    /// `add` puts most keys into the first of their buckets, so the second is computed and looked at only after that.
    // Always inline: as a function of its own it hands an `Id` over in memory, which costs as much as the search. For the same
    // reason what is out of line returns a place, which is looked at again.
    #[inline(always)]
    pub fn find(&self, key: u64) -> Option<Id> {
        let mut bucket = Self::bucket(key, FACTORS[0]);
        bucket.find_map(|place| self.at(place, key)).or_else(|| self.at(self.find_second(key)?, key))
    }

    #[inline(never)]
    fn find_second(&self, key: u64) -> Option<usize> {
        Self::bucket(key, FACTORS[1]).find(|&place| self.at(place, key).is_some())
    }

    /// Returns what is in a place if that is live, and has this key.
    #[inline(always)]
    pub fn at(&self, place: usize, key: u64) -> Option<Id> {
        if self.keys[place].load(Relaxed) != key {
            return None;
        }
        let word = self.words[place].load(Acquire);
        // The key was perhaps another's when it was looked at first.
        let is_live = word & STATE == LIVE && self.keys[place].load(Relaxed) == key;
        is_live.then_some(Id { place: place as u32, word })
    }

    /// Returns what is leaving under `key`, and was not removed yet.
    pub fn find_leaving(&self, key: u64) -> Option<Id> {
        Self::places(key).find_map(|place| {
            let word = self.words[place].load(Acquire);
            let is_it = word & STATE == LEAVING && self.keys[place].load(Relaxed) == key;
            is_it.then_some(Id { place: place as u32, word })
        })
    }

    /// Returns whether all that was read of `id` before belongs to it.
    #[inline]
    pub fn is_still(&self, id: Id) -> bool {
        // ORDER: all was read before the word is read again.
        fence(Acquire);
        self.words.get(id.place as usize).is_some_and(|word| word.load(Relaxed) == id.word)
    }

    /// Stops finding `id`, whose place stays taken.
    pub fn leave(&self, id: Id) {
        self.change(id, id.word, LEAVING);
    }

    /// Finds an `id` again that had left.
    pub fn return_to(&self, id: Id) {
        self.change(id, id.word & !STATE | LEAVING, LIVE);
    }

    /// Frees the place of an `id` that left.
    pub fn remove(&self, id: Id) {
        self.change(id, id.word & !STATE | LEAVING, FREE);
    }

    fn change(&self, id: Id, from: u64, state: u64) {
        if let Some(word) = self.words.get(id.place as usize) {
            // Lost only against an earlier change, and then `id` is an old name: there is nothing to do.
            let _ = word.compare_exchange(from, from & !STATE | state, Release, Relaxed);
        }
    }

    /// Returns whether `id` is live.
    #[inline]
    pub fn is_live(&self, id: Id) -> bool {
        self.words.get(id.place as usize).is_some_and(|word| word.load(Acquire) == id.word)
    }

    /// Returns whether `id` is live or leaving.
    pub fn is_there(&self, id: Id) -> bool {
        let there = |word: u64| word == id.word || word == id.word & !STATE | LEAVING;
        id != Id::NONE && self.words.get(id.place as usize).is_some_and(|word| there(word.load(Acquire)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn a_key_is_found_until_it_leaves_and_its_place_is_free_once_it_is_removed() {
        let directory = Directory::<8>::new();
        let id = directory.add(7, |_| ()).expect("there is room");

        assert_eq!(directory.find(7), Some(id));
        assert_eq!(directory.add(7, |_| ()), None, "a key is there once");
        directory.leave(id);
        assert_eq!(directory.find(7), None);
        assert!(!directory.is_live(id) && directory.is_there(id));
        assert_eq!(directory.add(7, |_| ()), None, "its place is not free yet");
        directory.return_to(id);
        assert_eq!(directory.find(7), Some(id));
        directory.leave(id);
        directory.remove(id);
        let again = directory.add(7, |_| ()).expect("its place is free");
        assert_ne!(again, id);
        directory.leave(id);
        assert!(directory.is_live(again) && !directory.is_there(id), "an old name does nothing");
    }

    #[test]
    #[cfg_attr(miri, ignore = "it takes minutes, and has one thread")]
    fn two_places_of_three_can_be_filled_with_keys_of_every_kind() {
        let patterns: [fn(u64) -> u64; 6] = [
            |n| n,
            |n| n << 32 | 5,
            |n| n << 35,
            |n| 0x20 << 32 | n,
            |n| n << 40 | u64::from(u32::MAX),
            |n| (n >> 4) << 32 | n << 16 & 0xF_0000,
        ];
        for pattern in patterns {
            let directory = Box::new(Directory::<4096>::new());
            let keys = (0..4096 * 2 / 3).map(pattern);
            let ids: HashMap<u64, Id> =
                keys.map(|key| (key, directory.add(key, |_| ()).expect("there is room"))).collect();

            for (&key, &id) in &ids {
                assert_eq!(directory.find(key), Some(id));
            }
        }
    }

    #[test]
    fn two_cores_that_add_at_once_get_two_places() {
        let directory = Directory::<8>::new();
        let add = |key| directory.add(key, |_| ()).expect("there is room");
        for _ in 0..if cfg!(miri) { 20 } else { 2_000 } {
            let (first, second) = std::thread::scope(|scope| {
                let other = scope.spawn(|| add(0x28));
                (add(0x20), other.join().expect("it does not panic"))
            });
            assert_ne!(first.place, second.place);
            for (id, key) in [(first, 0x20), (second, 0x28)] {
                assert_eq!(directory.find(key), Some(id));
                directory.leave(id);
                directory.remove(id);
            }
        }
    }
}
