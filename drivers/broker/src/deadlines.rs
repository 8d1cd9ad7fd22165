//! When something has to have happened.

/// A tick, in microseconds: deadlines are kept, and met, to the next tick.
pub const TICK_US: u64 = 1 << TICK_LOG2;
const TICK_LOG2: u32 = 10;
/// Ticks that a turn of the wheel takes: 16.7 s.
const BUCKETS: usize = 1 << 14;
const WORD: usize = 64;
const WORDS: usize = BUCKETS / WORD;

/// One deadline. Neighbours are entries of the same bucket, by their number plus one; 0 is none.
#[derive(Clone, Copy, Debug)]
struct Entry {
    next: u32,
    before: u32,
    /// Its bucket plus one, 0 if it is not armed.
    bucket: u32,
    /// The tick in which it is due.
    at: u64,
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
/// armed anew before.
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
    /// Whether `last_us` means anything.
    is_started: bool,
    /// The caller's clock when it was last seen.
    last_us: u64,
    /// Microseconds since it was first seen.
    elapsed_us: u64,
    /// All before this tick is done.
    cursor: u64,
    armed: u32,
}

impl<const N: usize> Default for Deadlines<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Deadlines<N> {
    /// No deadlines. All of it is zero.
    pub const fn new() -> Self {
        const { assert!(N < u32::MAX as usize) };
        Self {
            entries: [Entry { next: 0, before: 0, bucket: 0, at: 0 }; N],
            heads: [0; BUCKETS],
            occupied: [0; WORDS],
            summary: [0; WORDS / WORD],
            is_started: false,
            last_us: 0,
            elapsed_us: 0,
            cursor: 0,
            armed: 0,
        }
    }

    /// Moves the clock to `now_us`, and returns the time since it was first seen.
    fn elapsed_us(&mut self, now_us: u64) -> u64 {
        let passed = now_us.wrapping_sub(self.last_us);
        if !self.is_started {
            self.is_started = true;
            self.last_us = now_us;
        } else if passed <= u64::MAX / 2 {
            self.last_us = now_us;
            self.elapsed_us = self.elapsed_us.saturating_add(passed);
        } else {
            // It jumped back: time goes on from here.
            self.last_us = now_us;
        }
        self.elapsed_us
    }

    /// Arms `entry`, armed before or not, for `after_us` from now. An entry that does not exist is never due.
    pub fn arm(&mut self, entry: u32, now_us: u64, after_us: u64) {
        if entry as usize >= N {
            return;
        }
        let elapsed_us = self.elapsed_us(now_us);
        self.disarm(entry);
        if self.armed == 0 {
            self.cursor = elapsed_us >> TICK_LOG2;
        }
        let at = elapsed_us.saturating_add(after_us).saturating_add(TICK_US - 1) >> TICK_LOG2;
        self.link(entry, at);
    }

    /// Takes the deadline of `entry` back.
    pub fn disarm(&mut self, entry: u32) {
        let Some(&Entry { next, before, bucket, .. }) = self.entries.get(entry as usize) else { return };
        let Some(bucket) = bucket.checked_sub(1) else { return };
        self.entries[entry as usize].bucket = 0;
        self.armed -= 1;
        if let Some(next) = next.checked_sub(1) {
            self.entries[next as usize].before = before;
        }
        if let Some(before) = before.checked_sub(1) {
            self.entries[before as usize].next = next;
            return;
        }
        let bucket = bucket as usize % BUCKETS;
        self.heads[bucket] = next;
        if next == 0 {
            let word = bucket / WORD;
            self.occupied[word] &= !(1 << (bucket % WORD));
            if self.occupied[word] == 0 {
                self.summary[word / WORD] &= !(1 << (word % WORD));
            }
        }
    }

    /// Puts `entry`, which is in no bucket, where it is met at tick `at`, or as late as the wheel can.
    fn link(&mut self, entry: u32, at: u64) {
        let tick = at.clamp(self.cursor, self.cursor.saturating_add(BUCKETS as u64 - 1));
        let bucket = tick as usize % BUCKETS;
        let next = core::mem::replace(&mut self.heads[bucket], entry + 1);
        self.entries[entry as usize] = Entry { next, before: 0, bucket: bucket as u32 + 1, at };
        if let Some(next) = next.checked_sub(1) {
            self.entries[next as usize].before = entry + 1;
        }
        let word = bucket / WORD;
        self.occupied[word] |= 1 << (bucket % WORD);
        self.summary[word / WORD] |= 1 << (word % WORD);
        self.armed += 1;
    }

    /// Takes out one entry that is due; to be called until there is nothing.
    pub fn pop(&mut self, now_us: u64) -> Due {
        let tick = self.elapsed_us(now_us) >> TICK_LOG2;
        let Some(first) = self.first() else {
            self.cursor = tick;
            return Due::Nothing;
        };
        if first > tick {
            self.cursor = tick;
            return Due::Nothing;
        }
        self.cursor = first;
        let Some(entry) = self.heads[first as usize % BUCKETS].checked_sub(1) else { return Due::Nothing };
        let at = self.entries[entry as usize].at;
        self.disarm(entry);
        if at <= tick {
            return Due::Entry(entry);
        }
        // It was armed for later than the wheel could hold then.
        self.link(entry, at);
        Due::Later
    }

    /// Returns when there may be something due next, on the caller's clock; `None` if nothing is armed.
    pub fn next_us(&self) -> Option<u64> {
        let at_us = self.first()? << TICK_LOG2;
        Some(self.last_us.wrapping_add(at_us.saturating_sub(self.elapsed_us)))
    }

    /// Returns the tick of the first bucket with entries, from the cursor on.
    fn first(&self) -> Option<u64> {
        let start = self.cursor as usize % BUCKETS;
        let (word, bit) = (start / WORD, start % WORD);
        let here = self.occupied[word] >> bit;
        if here != 0 {
            return Some(self.cursor + u64::from(here.trailing_zeros()));
        }
        // The word after this one, and so on round the wheel; at last this one again, for what lies before `bit`.
        let after = (word + 1) % WORDS;
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
        Some(self.cursor + (bucket.wrapping_sub(start) % BUCKETS) as u64)
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
        deadlines.arm(1, 5_000, 0);

        assert_eq!(due(&mut deadlines, 5_000), BTreeSet::from([1]));
        assert_eq!(deadlines.next_us(), Some(5_000 + 98 * TICK_US));
        assert_eq!(due(&mut deadlines, 5_000 + 98 * TICK_US - 1), BTreeSet::new());
        assert_eq!(due(&mut deadlines, 5_000 + 98 * TICK_US), BTreeSet::from([0]));
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
