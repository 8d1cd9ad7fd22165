//! The array that [`Call::Counters`](crate::Call::Counters) writes: what became of a device's page requests, in 64 words.
//!
//! | words | content |
//! |---|---|
//! | 15:0 | one for each [`Counter`] |
//! | 39:16 | how long groups took from the report to the channel: [`BUCKETS`] counts |
//! | 63:40 | how long groups took from the report to the answer: as many |
//!
//! A time of `us` whole microseconds is counted in bucket [`bucket`]`(us)`. All words only ever grow, modulo 2^64.

numbered! {
    /// The first words of the array.
    pub enum Counter {
        /// Page requests that the device sent.
        Requests = 0,
        /// Groups that became whole.
        Groups = 1,
        /// Groups that were answered with success.
        Succeeded = 2,
        /// Groups that the guest declined.
        Declined = 3,
        /// Groups that nobody answered in time.
        Expired = 4,
        /// Groups that were answered because their attachment went.
        Evicted = 5,
        /// Groups that were refused at once: over budget, or no room.
        Refused = 6,
        /// Groups that were refused when they ended because they were too long or inconsistent.
        Poisoned = 7,
        /// Half-seen groups that an overflow discarded.
        Discarded = 8,
        /// Requests for a page that the group had asked for before.
        Duplicates = 9,
        /// Times that the unit lost requests of nobody knows which device.
        Overflows = 10,
        /// Answers that came after the deadline.
        Late = 11,
        /// Answers with a cookie that was used before.
        Stale = 12,
        /// Answers with a cookie that was never given out.
        Unknown = 13,
        /// Answers with a code that there is not.
        OutOfRange = 14,
        /// Events that the guest never saw.
        LostEvents = 15,
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

/// Returns the bucket of a time of `us` microseconds: 0 for less than one, n for 2^(n-1) up to less than 2^n, the last for
/// all that is longer.
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
        assert_eq!((TO_CHANNEL_WORD, TO_ANSWER_WORD, COUNTERS_WORDS), (16, 40, 64));
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
