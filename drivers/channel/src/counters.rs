//! The array that [`Call::Counters`](crate::Call::Counters) writes: what became of a device's page requests, in 68
//! words.
//!
//! | words | content |
//! |---|---|
//! | 19:0 | one for each [`Counter`] |
//! | 43:20 | how long groups took from the report to the channel: [`BUCKETS`] counts |
//! | 67:44 | how long groups took from the report to the answer: as many |
//!
//! A time of `us` whole microseconds is counted in bucket [`bucket`]`(us)`. All words but [`Counter::Outstanding`] only ever
//! grow, modulo 2^64. Those of answers and events that were refused or lost are of all the guest's devices together.

numbered! {
    /// The first words of the array.
    pub enum Counter {
        /// Page requests that the device sent.
        Requests = 0,
        /// Groups of which at least one request came.
        Groups = 1,
        /// Groups that the guest answered with success.
        Succeeded = 2,
        /// Groups that the guest declined.
        Declined = 3,
        /// Groups that nobody answered in time.
        Expired = 4,
        /// Groups that were answered because their attachment, device or queue went.
        Evicted = 5,
        /// Groups that were answered at once: over budget, poisoned, no room, nobody attached.
        Refused = 6,
        /// Groups that were poisoned: parts over budget, or a number that was used twice.
        Poisoned = 7,
        /// Half-seen groups without an answer from the hypervisor: an overflow lost them, they never ended, or they left.
        Discarded = 8,
        /// Requests with the number of a group that was whole already.
        Duplicates = 9,
        /// Times that the unit lost requests of nobody knows which device.
        Overflows = 10,
        /// Answers to a group that was answered before, by the guest or for it.
        Late = 11,
        /// Answers with the cookie of an earlier group.
        Stale = 12,
        /// Answers with a cookie that was never given out.
        Unknown = 13,
        /// Answers with a cookie that names no place for a group.
        OutOfRange = 14,
        /// Events that the guest never saw, at least; each time that the unit lost nobody knows how many is one.
        LostEvents = 15,
        /// Groups that the guest answered with response failure.
        Failed = 16,
        /// Groups for a page that the guest had just claimed to have repaired.
        Unrepaired = 17,
        /// Answers that were held back, because the guest had claimed repairs that were none.
        Held = 18,
        /// Page requests that wait for an answer now.
        Outstanding = 19,
    }
}

/// Counts of times, each.
pub const BUCKETS: usize = 24;
/// First word of the times from report to channel.
pub const TO_CHANNEL_WORD: usize = Counter::ALL.len();
/// First word of the times from report to answer.
pub const TO_ANSWER_WORD: usize = TO_CHANNEL_WORD + BUCKETS;
/// Words of the array.
pub const COUNTERS_WORDS: usize = TO_ANSWER_WORD + BUCKETS;

/// Returns the bucket of a time of `us` microseconds: 0 for less than one, n for 2^(n-1) up to less than 2^n, the
/// last for all that is longer.
pub const fn bucket(us: u64) -> usize {
    let bits = (u64::BITS - us.leading_zeros()) as usize;
    if bits < BUCKETS { bits } else { BUCKETS - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_array_is_laid_out_as_documented() {
        let names = Counter::ALL.iter().enumerate();
        assert!(names.into_iter().all(|(word, &(_, number, _))| word as u64 == number));
        assert_eq!((TO_CHANNEL_WORD, TO_ANSWER_WORD, COUNTERS_WORDS), (20, 44, 68));
    }

    #[test]
    fn each_bucket_holds_times_up_to_twice_those_of_the_one_before() {
        for (us, expected) in [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (1023, 10), (1024, 11)] {
            assert_eq!(bucket(us), expected, "{us} us");
        }
        // The last but one ends at 2^22 us, about 4.2 s.
        assert_eq!([(1 << 22) - 1, 1 << 22, u64::MAX].map(bucket), [22, 23, 23]);
    }
}
