//! When something has to have happened.

/// A tick, in microseconds: deadlines are kept, and met, to the next tick.
pub const TICK_US: u64 = 1 << TICK_LOG2;
const TICK_LOG2: u32 = 10;
/// Ticks that a turn of the wheel takes: 16.7 s.
const BUCKETS: usize = 1 << 14;
const TURN_US: u64 = (BUCKETS as u64) << TICK_LOG2;
const WORD: usize = 64;
const WORDS: usize = BUCKETS / WORD;
/// How far ahead of the cursor an entry may lie. A word of buckets and one more is left free: the bits of those that the
/// cursor has passed in its word still stand there.
const HORIZON_US: u64 = TURN_US - ((WORD as u64 + 1) << TICK_LOG2);
/// No deadline is further away than this, in microseconds: half of what the clock can tell apart from the past, of which the
/// other half is for calls that come late.
const FARTHEST_US: u64 = u64::MAX / 4;

/// One deadline. Neighbours are entries of the same bucket, by their number plus one; 0 is none.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// When it is due, on the wheel's clock.
    at_us: u64,
    next: u32,
    before: u32,
    /// Its bucket plus one, 0 if it is not armed.
    bucket: u32,
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
/// A bucket has the deadlines that lie in its tick, and is due when that is over.
///
/// The clock may start anywhere, wrap, and jump. If it jumps ahead, everything is due that would have been; if it jumps
/// back, time goes on from the start of the tick that it had come to.
#[derive(Debug)]
pub struct Deadlines<const N: usize> {
    entries: [Entry; N],
    /// First entry of each bucket plus one.
    heads: [u32; BUCKETS],
    /// Bit n of word w set: bucket w * 64 + n has entries, or the cursor has passed it and is still in this word.
    occupied: [u64; WORDS],
    /// Bit n of word w set: word w * 64 + n of `occupied` is not 0.
    summary: [u64; WORDS / WORD],
    /// What the wheel's clock is ahead of the caller's; both wrap.
    ahead_us: u64,
    /// The tick that the wheel's clock is in, by its start. It never goes back.
    tick_us: u64,
    /// The first tick that is not done, by its start: all entries are in the buckets from it to the horizon. All is done that
    /// is due if it is `tick_us`.
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
            tick_us: 0,
            cursor_us: 0,
        }
    }

    /// Tells the wheel the time: what is due by then can be [popped](Self::pop). Returns the wheel's own.
    #[inline]
    pub fn tell(&mut self, now_us: u64) -> u64 {
        let clock_us = now_us.wrapping_add(self.ahead_us);
        let tick_us = clock_us & !(TICK_US - 1);
        if tick_us.wrapping_sub(self.tick_us) > u64::MAX / 2 {
            return self.stand_still(now_us);
        }
        self.tick_us = tick_us;
        clock_us
    }

    /// The caller's clock jumped back.
    #[cold]
    #[inline(never)]
    fn stand_still(&mut self, now_us: u64) -> u64 {
        self.ahead_us = self.tick_us.wrapping_sub(now_us);
        self.tick_us
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
            // All buckets with entries lie ahead of the cursor, so this is how many ticks it has to go.
            let ticks = |bucket: usize| bucket.wrapping_sub(bucket_of(self.cursor_us)) % BUCKETS;
            if ticks(armed.bucket as usize - 1) <= ticks(bucket) {
                return;
            }
            self.disarm(entry);
        }
        self.link(entry, bucket);
    }

    /// Returns the bucket of a deadline, or the last one that the wheel can hold.
    #[inline]
    fn bucket_for(&mut self, at_us: u64) -> usize {
        // Of two ticks that meet at a deadline it lies in the first one.
        let within_us = at_us.wrapping_sub(1);
        if within_us.wrapping_sub(self.cursor_us) < HORIZON_US {
            return bucket_of(within_us);
        }
        self.last_bucket_for(within_us)
    }

    /// The same for what the wheel cannot hold where its cursor is.
    #[cold]
    fn last_bucket_for(&mut self, within_us: u64) -> usize {
        let before_us = self.cursor_us.wrapping_sub(TICK_US);
        if within_us & !(TICK_US - 1) == before_us {
            // It is due at once, at the start of a tick, and the tick before that is done: the cursor goes back.
            self.cursor_us = before_us;
            self.mark_empty(bucket_of(before_us));
        } else if self.first_us().is_none() {
            // It has been idle.
            self.move_to(self.tick_us);
        }
        let ahead_us = within_us.wrapping_sub(self.cursor_us).min(HORIZON_US - 1);
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
            self.clear(word);
        }
    }

    fn neighbour(&mut self, number_plus_one: u32) -> Option<&mut Entry> {
        // 0 is none: one less is more than there can be.
        self.entries.get_mut((number_plus_one as usize).wrapping_sub(1))
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

    /// Takes out one entry that is due by the time that was told last; to be called until there is nothing.
    #[inline]
    pub fn pop(&mut self) -> Due {
        if self.cursor_us == self.tick_us {
            return Due::Nothing;
        }
        // The cursor's tick is as likely as any to have entries: its bucket is looked at before others are searched.
        match self.take_first() {
            Some(due) => due,
            None => self.search(),
        }
    }

    /// The same, in whatever tick comes first.
    #[cold]
    fn search(&mut self) -> Due {
        let is_due = self.move_on();
        is_due.then(|| self.take_first()).flatten().unwrap_or(Due::Nothing)
    }

    /// Takes out the first entry of the cursor's bucket, if it has any.
    #[inline]
    fn take_first(&mut self) -> Option<Due> {
        let (bucket, end_us) = (bucket_of(self.cursor_us), self.cursor_us.wrapping_add(TICK_US));
        // 0 is none: one less is more than there can be.
        let entry = (self.heads[bucket] as usize).wrapping_sub(1);
        let first = self.entries.get_mut(entry)?;
        let (at_us, next) = (first.at_us, first.next);
        first.bucket = 0;
        self.heads[bucket] = next;
        if end_us.wrapping_sub(at_us) > u64::MAX / 2 {
            return Some(self.put_back(bucket, entry as u32));
        }
        if next != 0 {
            if let Some(next) = self.neighbour(next) {
                next.before = 0;
            }
        } else if bucket_of(end_us).is_multiple_of(WORD) {
            // The bucket was the last one of its word.
            self.move_to(end_us);
        } else {
            self.cursor_us = end_us;
        }
        Some(Due::Entry(entry as u32))
    }

    /// The same for an entry, the first of a bucket until just now, that was armed anew for later, or for later than the wheel
    /// could hold then: perhaps it is due all the same.
    #[cold]
    #[inline(never)]
    fn put_back(&mut self, from: usize, entry: u32) -> Due {
        let Some(&Entry { at_us, next, .. }) = self.entries.get(entry as usize) else { return Due::Later };
        match self.neighbour(next) {
            Some(next) => next.before = 0,
            None => self.mark_empty(from),
        }
        if self.tick_us.wrapping_sub(at_us) <= u64::MAX / 2 {
            return Due::Entry(entry);
        }
        let to = self.bucket_for(at_us);
        self.link(entry, to);
        Due::Later
    }

    /// Moves the cursor to the first bucket with entries that is due; if there is none, to the clock's tick.
    fn move_on(&mut self) -> bool {
        let behind_us = self.tick_us.wrapping_sub(self.cursor_us);
        if let Some(ahead_us) = self.first_us()
            && ahead_us < behind_us
        {
            self.move_to(self.cursor_us.wrapping_add(ahead_us));
            return true;
        }
        self.move_to(self.tick_us);
        false
    }

    /// Moves the cursor ahead to a tick, over none with entries. If it leaves a word, the bits of those that it has passed
    /// there are cleared all at once, so that nothing is to be done for each.
    #[cold]
    #[inline(never)]
    fn move_to(&mut self, us: u64) {
        let word_of = |us: u64| (us >> TICK_LOG2) / WORD as u64;
        let left = word_of(self.cursor_us);
        if left != word_of(us) {
            self.clear(left as usize % WORDS);
        }
        self.cursor_us = us;
    }

    /// Takes note that no bucket of a word has entries.
    fn clear(&mut self, word: usize) {
        self.occupied[word] = 0;
        self.summary[word / WORD] &= !(1 << (word % WORD));
    }

    /// Returns when there may be something due next, on the caller's clock; `None` if nothing is armed.
    pub fn next_us(&self) -> Option<u64> {
        let end_us = self.cursor_us.wrapping_add(self.first_us()?).wrapping_add(TICK_US);
        // What is past is due now.
        let due_us = if self.tick_us.wrapping_sub(end_us) <= u64::MAX / 2 { self.tick_us } else { end_us };
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
        // The word after this one, and so on round the wheel. Before `start`, there are none in this one.
        let mut summary = self.summary;
        summary[start / WORD / WORD] &= !(1 << (start / WORD % WORD));
        let after = (start / WORD + 1) % WORDS;
        let rest = summary[after / WORD] >> (after % WORD);
        let word = if rest != 0 {
            after + rest.trailing_zeros() as usize
        } else {
            (1..=summary.len()).find_map(|turn| {
                let at = (after / WORD + turn) % summary.len();
                (summary[at] != 0).then(|| at * WORD + summary[at].trailing_zeros() as usize)
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
        deadlines.tell(now_us);
        loop {
            match deadlines.pop() {
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

        deadlines.tell(20 * TICK_US);
        assert_eq!(deadlines.pop(), Due::Later);
        assert_eq!(due(&mut deadlines, 29 * TICK_US), BTreeSet::new());
        assert_eq!(due(&mut deadlines, 30 * TICK_US), BTreeSet::from([0]));
        assert_eq!(deadlines.next_us(), None);
    }

    /// Arms, takes back and lets time pass at random, with deadlines of up to so long, and compares with a list.
    fn compare_with_a_list(longest_us: u64, rounds: usize) {
        const ENTRIES: u32 = 24;
        let mut deadlines = Box::new(Deadlines::<{ ENTRIES as usize }>::new());
        let mut expected = [None; ENTRIES as usize];
        let (mut now_us, mut random) = (0, 1_u64);
        for _ in 0..rounds {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (entry, after_us) = ((random >> 40) as u32 % ENTRIES, (random >> 20) % longest_us);
            match random >> 60 {
                0..8 => {
                    // Some at once.
                    let after_us = if random >> 56 & 3 == 0 { 0 } else { after_us };
                    deadlines.arm(entry, now_us, after_us);
                    expected[entry as usize] = Some(now_us + after_us);
                }
                8..12 => {
                    deadlines.disarm(entry);
                    expected[entry as usize] = None;
                }
                // To the start of a tick, or to somewhere.
                12 => now_us = (now_us + 1).next_multiple_of(TICK_US),
                _ => now_us += after_us / 8,
            }
            let tick_us = now_us & !(TICK_US - 1);
            // One of those that are due at times, and all at others.
            deadlines.tell(now_us);
            if random >> 57 & 1 == 0
                && let Due::Entry(entry) = deadlines.pop()
            {
                assert!(expected[entry as usize].take().is_some_and(|at_us| at_us <= tick_us));
            }
            if random >> 58 & 1 == 0 {
                let is_due = |&entry: &u32| expected[entry as usize].is_some_and(|at_us| at_us <= tick_us);
                let all: BTreeSet<u32> = (0..ENTRIES).filter(is_due).collect();
                assert_eq!(due(&mut deadlines, now_us), all);
                all.iter().for_each(|&entry| expected[entry as usize] = None);
            }
            let first_us = expected.iter().flatten().min().map(|at_us| at_us.next_multiple_of(TICK_US));
            let next_us = deadlines.next_us();
            assert_eq!(next_us.is_some(), first_us.is_some());
            assert!(next_us <= first_us.max(Some(now_us)), "{next_us:?} is later than {first_us:?}");
        }
    }

    #[test]
    fn whatever_is_armed_and_taken_back_in_whatever_order_is_due_in_its_tick() {
        compare_with_a_list(40_000, if cfg!(miri) { 500 } else { 200_000 });
    }

    #[test]
    fn deadlines_about_as_long_as_a_turn_of_the_wheel_are_met_in_their_tick() {
        for (longest_us, rounds) in [(TURN_US, 20_000), (2 * TURN_US, 20_000), (40 * TURN_US, 100_000)] {
            compare_with_a_list(longest_us, if cfg!(miri) { 100 } else { rounds });
        }
    }

    #[test]
    fn ticks_with_one_entry_each_leave_nothing_behind_over_turns_of_the_wheel() {
        let mut deadlines = Box::new(Deadlines::<2>::new());
        for tick in 0..if cfg!(miri) { 200 } else { 3 * BUCKETS as u64 } {
            deadlines.arm((tick % 2) as u32, tick * TICK_US, TICK_US);
            deadlines.tell((tick + 1) * TICK_US);

            assert_eq!(deadlines.pop(), Due::Entry((tick % 2) as u32), "in tick {tick}");
            assert_eq!(deadlines.pop(), Due::Nothing);
            assert_eq!(deadlines.next_us(), None);
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
