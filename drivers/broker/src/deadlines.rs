//! When something has to have happened.

/// A tick, in microseconds: deadlines are kept, and met, to the next tick.
pub const TICK_US: u64 = 1 << TICK_LOG2;
const TICK_LOG2: u32 = 10;
/// Ticks that a turn of the wheel takes: 16.7 s.
const BUCKETS: usize = 1 << 14;
const TURN_US: u64 = (BUCKETS as u64) << TICK_LOG2;
const WORD: usize = 64;
const WORDS: usize = BUCKETS / WORD;
/// No deadline is further away than this, in microseconds: half of what the clock can tell apart from the past, of which the
/// other half is for calls that come late.
const FARTHEST_US: u64 = u64::MAX / 4;

/// One deadline. Neighbours are entries of the same bucket, by their number plus one; 0 is none.
#[derive(Clone, Copy, Debug)]
struct Entry {
    next: u32,
    before: u32,
    /// Its bucket plus one, 0 if it is not armed.
    bucket: u32,
    /// When it is due, on the wheel's clock.
    at_us: u64,
}

/// What the wheel had to give.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Due {
    /// The deadline of this entry has come; it is not armed any more.
    Entry(u32),
    /// An entry was looked at and is not due yet; there may be more.
    Later,
    /// Nothing is due.
    Nothing,
}

/// Deadlines of `N` entries, in a wheel of one bucket for each tick.
///
/// To arm one, to take one back, and to find the next take the same time however many there are: a handful of loads and
/// stores. Whoever learns in time that a deadline is met may leave its entry where it is, to be skipped when it comes, or
/// armed anew before. An entry that is armed anew for a later time stays in its bucket, and moves on when that one comes: what
/// is armed often moves once in a deadline, not each time.
///
/// The clock may start anywhere, wrap, and jump. If it jumps ahead, everything is due that would have been; if it jumps
/// back, it stands still until it moves again.
#[derive(Debug)]
pub struct Deadlines<const N: usize> {
    entries: [Entry; N],
    /// First entry of each bucket plus one.
    heads: [u32; BUCKETS],
    /// Bit n of word w set: bucket w * 64 + n has entries.
    occupied: [u64; WORDS],
    /// Bit n of word w set: word w * 64 + n of `occupied` is not 0.
    summary: [u64; WORDS / WORD],
    /// What the wheel's clock is ahead of the caller's; both wrap.
    ahead_us: u64,
    /// The wheel's clock, which never goes back.
    clock_us: u64,
    /// The start of a tick: all before it is done, and all entries are in the buckets of one turn from it.
    cursor_us: u64,
}

impl<const N: usize> Default for Deadlines<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// Returns the bucket of the tick in which `us` lies.
const fn bucket_of(us: u64) -> usize {
    (us >> TICK_LOG2) as usize % BUCKETS
}

impl<const N: usize> Deadlines<N> {
    /// No deadlines. All of it is zero.
    pub const fn new() -> Self {
        const { assert!(N < u32::MAX as usize) };
        Self {
            entries: [Entry { next: 0, before: 0, bucket: 0, at_us: 0 }; N],
            heads: [0; BUCKETS],
            occupied: [0; WORDS],
            summary: [0; WORDS / WORD],
            ahead_us: 0,
            clock_us: 0,
            cursor_us: 0,
        }
    }

    /// Moves the wheel's clock to `now_us` of the caller's, and returns it.
    #[inline]
    fn tell(&mut self, now_us: u64) -> u64 {
        let clock_us = now_us.wrapping_add(self.ahead_us);
        if clock_us.wrapping_sub(self.clock_us) > u64::MAX / 2 {
            // It jumped back: time goes on from here.
            self.ahead_us = self.clock_us.wrapping_sub(now_us);
            return self.clock_us;
        }
        self.clock_us = clock_us;
        clock_us
    }

    /// Arms `entry`, armed before or not, for `after_us` from now. An entry that does not exist is never due.
    // Always inline, because most of it depends on what the caller knows of time and entry.
    #[inline(always)]
    pub fn arm(&mut self, entry: u32, now_us: u64, after_us: u64) {
        let at_us = self.tell(now_us).wrapping_add(after_us.min(FARTHEST_US));
        let bucket = self.bucket_for(at_us);
        let Some(armed) = self.entries.get_mut(entry as usize) else { return };
        armed.at_us = at_us;
        if armed.bucket != 0 {
            // All buckets are within one turn of the cursor, so this is how many ticks it has to go.
            let ticks = |bucket: usize| bucket.wrapping_sub(bucket_of(self.cursor_us)) % BUCKETS;
            if ticks(armed.bucket as usize - 1) <= ticks(bucket) {
                return;
            }
            self.disarm(entry);
        }
        self.link(entry, bucket);
    }

    /// Returns the bucket where a deadline is met, or as late as the wheel can.
    #[inline]
    fn bucket_for(&mut self, at_us: u64) -> usize {
        // The end of the tick: what is due in a tick is met at its end.
        let end_us = at_us.wrapping_add(TICK_US - 1);
        if end_us.wrapping_sub(self.cursor_us) < TURN_US {
            return bucket_of(end_us);
        }
        self.last_bucket_for(end_us)
    }

    /// The same for what the wheel cannot hold where its cursor is.
    #[cold]
    fn last_bucket_for(&mut self, end_us: u64) -> usize {
        if self.first_us().is_none() {
            // It has been idle.
            self.cursor_us = self.clock_us & !(TICK_US - 1);
        }
        let ahead_us = end_us.wrapping_sub(self.cursor_us).min(TURN_US - 1);
        bucket_of(self.cursor_us.wrapping_add(ahead_us))
    }

    /// Takes the deadline of `entry` back.
    #[inline(never)]
    pub fn disarm(&mut self, entry: u32) {
        let Some(armed) = self.entries.get_mut(entry as usize) else { return };
        let Entry { next, before, bucket, .. } = *armed;
        let Some(bucket) = bucket.checked_sub(1) else { return };
        armed.bucket = 0;
        if let Some(next) = self.neighbour(next) {
            next.before = before;
        }
        if let Some(before) = self.neighbour(before) {
            before.next = next;
            return;
        }
        let bucket = bucket as usize % BUCKETS;
        self.heads[bucket] = next;
        if next == 0 {
            self.mark_empty(bucket);
        }
    }

    #[inline]
    fn mark_empty(&mut self, bucket: usize) {
        let bucket = bucket % BUCKETS;
        let word = bucket / WORD;
        self.occupied[word] &= !(1 << (bucket % WORD));
        if self.occupied[word] == 0 {
            self.summary[word / WORD] &= !(1 << (word % WORD));
        }
    }

    fn neighbour(&mut self, number_plus_one: u32) -> Option<&mut Entry> {
        // 0 is none: one less is more than there can be.
        self.entries.get_mut(number_plus_one.wrapping_sub(1) as usize)
    }

    /// Puts `entry`, which exists and is in no bucket, into one.
    #[inline]
    fn link(&mut self, entry: u32, bucket: usize) {
        let bucket = bucket % BUCKETS;
        let next = core::mem::replace(&mut self.heads[bucket], entry + 1);
        if let Some(armed) = self.entries.get_mut(entry as usize) {
            (armed.next, armed.before, armed.bucket) = (next, 0, bucket as u32 + 1);
        }
        if let Some(next) = self.neighbour(next) {
            // The bucket is known to be occupied.
            next.before = entry + 1;
            return;
        }
        let word = bucket / WORD;
        self.occupied[word] |= 1 << (bucket % WORD);
        self.summary[word / WORD] |= 1 << (word % WORD);
    }

    /// Takes out one entry that is due; to be called until there is nothing.
    #[inline]
    pub fn pop(&mut self, now_us: u64) -> Due {
        // What is due by the start of this tick is due.
        let tick_us = self.tell(now_us) & !(TICK_US - 1);
        // The cursor's bucket is empty once all of it was taken out, and then the next one is looked for.
        if self.heads[bucket_of(self.cursor_us)] == 0 && !self.move_on(tick_us) {
            return Due::Nothing;
        }
        let bucket = bucket_of(self.cursor_us);
        let entry = self.heads[bucket].wrapping_sub(1);
        let Some(first) = self.entries.get_mut(entry as usize) else { return Due::Nothing };
        first.bucket = 0;
        let (at_us, next) = (first.at_us, first.next);
        self.heads[bucket] = next;
        match self.neighbour(next) {
            Some(next) => next.before = 0,
            None => self.mark_empty(bucket),
        }
        if tick_us.wrapping_sub(at_us) <= u64::MAX / 2 {
            return Due::Entry(entry);
        }
        // It was armed anew for later, or for later than the wheel could hold then.
        let bucket = self.bucket_for(at_us);
        self.link(entry, bucket);
        Due::Later
    }

    /// Moves the cursor to the first bucket with entries that is due by `tick_us`; if there is none, to `tick_us`.
    #[inline]
    fn move_on(&mut self, tick_us: u64) -> bool {
        let behind_us = tick_us.wrapping_sub(self.cursor_us);
        if behind_us == 0 {
            return false;
        }
        if let Some(ahead_us) = self.first_us()
            && ahead_us <= behind_us
        {
            self.cursor_us = self.cursor_us.wrapping_add(ahead_us);
            return true;
        }
        self.cursor_us = tick_us;
        false
    }

    /// Returns when there may be something due next, on the caller's clock; `None` if nothing is armed.
    pub fn next_us(&self) -> Option<u64> {
        let at_us = self.cursor_us.wrapping_add(self.first_us()?);
        // What is past is due now.
        let due_us = if self.clock_us.wrapping_sub(at_us) <= u64::MAX / 2 { self.clock_us } else { at_us };
        Some(due_us.wrapping_sub(self.ahead_us))
    }

    /// Returns how far the first bucket with entries is ahead of the cursor, in microseconds.
    #[inline]
    fn first_us(&self) -> Option<u64> {
        let start = bucket_of(self.cursor_us);
        let (word, bit) = (start / WORD, start % WORD);
        let here = self.occupied[word] >> bit;
        if here != 0 {
            return Some(u64::from(here.trailing_zeros()) << TICK_LOG2);
        }
        self.first_us_after(start)
    }

    /// The same if there is none in the rest of the cursor's word.
    fn first_us_after(&self, start: usize) -> Option<u64> {
        // The word after this one, and so on round the wheel; at last this one again, for what lies before `start`.
        let after = (start / WORD + 1) % WORDS;
        let rest = self.summary[after / WORD] >> (after % WORD);
        let word = if rest != 0 {
            after + rest.trailing_zeros() as usize
        } else {
            (1..=self.summary.len()).find_map(|turn| {
                let at = (after / WORD + turn) % self.summary.len();
                let words = self.summary[at];
                (words != 0).then(|| at * WORD + words.trailing_zeros() as usize)
            })?
        };
        let bucket = word * WORD + self.occupied[word].trailing_zeros() as usize;
        Some(((bucket.wrapping_sub(start) % BUCKETS) as u64) << TICK_LOG2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn due<const N: usize>(deadlines: &mut Deadlines<N>, now_us: u64) -> BTreeSet<u32> {
        let mut entries = BTreeSet::new();
        loop {
            match deadlines.pop(now_us) {
                Due::Entry(entry) => assert!(entries.insert(entry), "{entry} came twice"),
                Due::Later => {}
                Due::Nothing => return entries,
            }
        }
    }

    #[test]
    fn an_entry_is_due_at_the_first_tick_after_its_deadline_and_not_before() {
        let mut deadlines = Box::new(Deadlines::<4>::new());
        deadlines.arm(0, 5_000, 100_000);
        deadlines.arm(1, 5_000, 120);

        assert_eq!(due(&mut deadlines, 5_119), BTreeSet::new());
        assert_eq!(due(&mut deadlines, 5 * TICK_US), BTreeSet::from([1]));
        assert_eq!(deadlines.next_us(), Some(103 * TICK_US));
        assert_eq!(due(&mut deadlines, 103 * TICK_US - 1), BTreeSet::new());
        assert_eq!(due(&mut deadlines, 103 * TICK_US), BTreeSet::from([0]));
        assert_eq!(deadlines.next_us(), None);
    }

    #[test]
    fn an_entry_that_is_armed_anew_or_taken_back_is_not_due_at_its_old_time() {
        let mut deadlines = Box::new(Deadlines::<4>::new());
        (0..3).for_each(|entry| deadlines.arm(entry, 0, 10_000));

        deadlines.arm(1, 0, 20_000);
        deadlines.disarm(2);
        assert_eq!(due(&mut deadlines, 12_000), BTreeSet::from([0]));
        assert_eq!(due(&mut deadlines, 22_000), BTreeSet::from([1]));
    }

    #[test]
    fn an_entry_that_is_armed_anew_for_later_moves_on_when_its_old_time_comes() {
        let mut deadlines = Box::new(Deadlines::<4>::new());
        deadlines.arm(0, 0, 10_000);
        (1..=20).for_each(|n| deadlines.arm(0, n * 1_000, 10_000));

        assert_eq!(deadlines.pop(20 * TICK_US), Due::Later);
        assert_eq!(due(&mut deadlines, 29 * TICK_US), BTreeSet::new());
        assert_eq!(due(&mut deadlines, 30 * TICK_US), BTreeSet::from([0]));
        assert_eq!(deadlines.next_us(), None);
    }

    #[test]
    fn whatever_is_armed_and_taken_back_in_whatever_order_is_due_in_its_tick() {
        const ENTRIES: u32 = 24;
        let mut deadlines = Box::new(Deadlines::<{ ENTRIES as usize }>::new());
        let mut expected = [None; ENTRIES as usize];
        let (mut now_us, mut random) = (0, 1_u64);
        for _ in 0..if cfg!(miri) { 500 } else { 200_000 } {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (entry, after_us) = ((random >> 40) as u32 % ENTRIES, (random >> 20) % 40_000);
            match random >> 60 {
                0..8 => {
                    deadlines.arm(entry, now_us, after_us);
                    expected[entry as usize] = Some(now_us + after_us);
                }
                8..12 => {
                    deadlines.disarm(entry);
                    expected[entry as usize] = None;
                }
                _ => now_us += after_us / 8,
            }
            let tick_us = now_us & !(TICK_US - 1);
            // One of those that are due at times, and all at others.
            if random >> 57 & 1 == 0
                && let Due::Entry(entry) = deadlines.pop(now_us)
            {
                assert!(expected[entry as usize].take().is_some_and(|at_us| at_us <= tick_us));
            }
            if random >> 58 & 1 == 0 {
                let is_due = |&entry: &u32| expected[entry as usize].is_some_and(|at_us| at_us <= tick_us);
                let all: BTreeSet<u32> = (0..ENTRIES).filter(is_due).collect();
                assert_eq!(due(&mut deadlines, now_us), all);
                all.iter().for_each(|&entry| expected[entry as usize] = None);
            }
        }
    }

    #[test]
    fn a_deadline_beyond_the_turn_of_the_wheel_is_met_in_its_time() {
        let mut deadlines = Box::new(Deadlines::<4>::new());
        let turn_us = BUCKETS as u64 * TICK_US;
        deadlines.arm(0, 0, 3 * turn_us);
        deadlines.arm(1, 0, turn_us / 2);

        assert_eq!(due(&mut deadlines, turn_us), BTreeSet::from([1]));
        assert_eq!(due(&mut deadlines, 3 * turn_us - TICK_US), BTreeSet::new());
        assert_eq!(due(&mut deadlines, 3 * turn_us), BTreeSet::from([0]));
    }

    #[test]
    fn the_clock_may_wrap_jump_ahead_and_jump_back() {
        let mut deadlines = Box::new(Deadlines::<4>::new());
        deadlines.arm(0, u64::MAX - 1_000, 5_000);
        assert_eq!(due(&mut deadlines, 3_000), BTreeSet::new());
        assert_eq!(due(&mut deadlines, 6_000), BTreeSet::from([0]), "over the wrap");

        deadlines.arm(0, 6_000, 50_000);
        assert_eq!(due(&mut deadlines, 1 << 60), BTreeSet::from([0]), "far ahead");
        deadlines.arm(1, 1 << 60, 50_000);
        assert_eq!(due(&mut deadlines, 1 << 40), BTreeSet::new(), "back");
        assert_eq!(due(&mut deadlines, (1 << 40) + 52_000), BTreeSet::from([1]));
    }

    #[test]
    fn a_wheel_that_was_idle_for_long_meets_what_is_armed_then() {
        let mut deadlines = Box::new(Deadlines::<4>::new());
        deadlines.arm(0, 0, 1_000);
        let hour_us = 3_600_000_000;
        deadlines.arm(1, hour_us, 100_000);

        assert_eq!(due(&mut deadlines, hour_us), BTreeSet::from([0]));
        assert_eq!(due(&mut deadlines, hour_us + 99_000), BTreeSet::new());
        assert_eq!(due(&mut deadlines, hour_us + 102_000), BTreeSet::from([1]));
    }
}
