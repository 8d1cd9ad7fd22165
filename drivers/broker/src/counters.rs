//! Counts of what happened to the groups of one device, and to the answers of one guest.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Buckets of a histogram of times.
pub const BUCKETS: usize = 24;

macro_rules! counters {
    ($(#[$outer:meta])* $counters:ident, $(#[$tally_doc:meta])* $tally:ident { $($(#[$doc:meta])* $name:ident,)* }) => {
        $(#[$outer])*
        #[derive(Debug)]
        pub(crate) struct $counters {
            $(pub $name: AtomicU64,)*
        }

        $(#[$tally_doc])*
        #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
        #[cfg_attr(feature = "defmt", derive(defmt::Format))]
        pub struct $tally {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl $counters {
            pub const fn new() -> Self {
                Self { $($name: AtomicU64::new(0),)* }
            }

            /// Reads all counts, one after the other.
            pub fn tally(&self) -> $tally {
                $tally { $($name: self.$name.load(Relaxed),)* }
            }

            pub fn reset(&self) {
                $(self.$name.store(0, Relaxed);)*
            }
        }

        impl $tally {
            /// Nothing happened.
            pub const ZERO: Self = Self { $($name: 0,)* };
        }

        impl core::ops::AddAssign for $tally {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)*
            }
        }
    };
}

counters! {
    /// Counts of a device.
    Counters,
    /// What happened to the page requests of one device since it was added.
    Tally {
        /// Page requests that were admitted or refused; one of them may be one part of a group.
        requests,
        /// Groups of which at least one request was seen.
        opened,
        /// Answered by the guest with success.
        succeeded,
        /// Answered by the guest as invalid.
        declined,
        /// Answered by the guest with response failure; hardware was told that they are invalid.
        failed,
        /// Answered as invalid, because the guest did not answer before the deadline.
        expired,
        /// Answered as invalid, because the attachment, the device, the queue or the guest went away.
        evicted,
        /// Answered at once, without asking the guest: no room, over budget, poisoned, or refused by policy.
        refused,
        /// Groups that were poisoned: parts over budget, too many pages, or a second group with the same number.
        poisoned,
        /// Half-seen groups that got no answer from us: lost in an overflow, never completed, or leaving.
        discarded,
        /// Requests of a group that was whole already: the device used its number twice.
        duplicates,
        /// Groups for a page that the guest had just claimed to have repaired.
        unrepaired,
        /// Answers that were held back, because the guest had claimed repairs that were none.
        held,
        /// Accesses that were refused for good, and not asked for before (unrecoverable faults), as far as they were reported;
        /// each time that the unit lost some behind one of the device's is one more.
        faults,
    }
}

impl Tally {
    /// Returns the groups that got an answer.
    pub fn answered(&self) -> u64 {
        self.succeeded + self.declined + self.failed + self.expired + self.evicted + self.refused
    }
}

counters! {
    /// Answers of one guest that were refused.
    Misses,
    /// Answers of one queue's owner that were refused, by what was wrong with their cookies.
    Missed {
        /// The group was answered before, by the guest or for it.
        late,
        /// The cookie is that of an earlier group in the same slot.
        stale,
        /// The cookie was never made here.
        unknown,
        /// There is no such slot.
        out_of_range,
    }
}

impl Missed {
    /// Returns all of them.
    pub fn total(&self) -> u64 {
        self.late + self.stale + self.unknown + self.out_of_range
    }
}

/// Counts of times, by powers of two of a microsecond.
///
/// Bucket 0 counts times of less than 1 us, bucket n those of 2^(n-1) us and more but less than 2^n us, and the last one
/// all that are longer.
#[derive(Debug)]
pub(crate) struct Histogram([AtomicU64; BUCKETS]);

impl Histogram {
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; BUCKETS])
    }

    /// Counts a time, in microseconds.
    pub fn count(&self, us: u64) {
        // The number of bits of `us`, found as the highest bit of twice `us` and one: that is never 0, which to ask for the
        // highest bit of costs a branch.
        // The least time of the last bucket stands for all that are longer.
        let bits = (us.min(1 << (BUCKETS - 2)) << 1 | 1).ilog2() as usize;
        if let Some(bucket) = self.0.get(bits) {
            count(bucket);
        }
    }

    pub fn read(&self) -> [u64; BUCKETS] {
        let mut counts = [0; BUCKETS];
        for (count, bucket) in counts.iter_mut().zip(&self.0) {
            *count = bucket.load(Relaxed);
        }
        counts
    }

    pub fn reset(&self) {
        for bucket in &self.0 {
            bucket.store(0, Relaxed);
        }
    }
}

/// Adds one, on any core.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

/// Adds one where one core alone counts, as the interrupt handler does most: others read it, so the bus need not be locked.
pub(crate) fn count_alone(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_by_powers_of_two_of_a_microsecond() {
        let histogram = Histogram::new();
        for us in [0, 1, 2, 3, 4, 1 << 21, (1 << 22) - 1, 1 << 22, u64::MAX] {
            histogram.count(us);
        }

        let mut expected = [0; BUCKETS];
        (expected[0], expected[1], expected[2], expected[3], expected[22], expected[23]) = (1, 1, 2, 1, 2, 2);
        assert_eq!(histogram.read(), expected);
    }
}
