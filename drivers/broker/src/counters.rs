//! Counts of what happened to the groups of one queue.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counts that any core adds to.
        #[derive(Debug)]
        pub struct Counters {
            $(pub(crate) $name: AtomicU64,)*
        }

        /// What [`Counters`] held at one moment.
        #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
        #[cfg_attr(feature = "defmt", derive(defmt::Format))]
        pub struct Tally {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            pub(crate) const fn new() -> Self {
                Self { $($name: AtomicU64::new(0),)* }
            }

            /// Reads all counts, one after the other.
            pub fn tally(&self) -> Tally {
                Tally { $($name: self.$name.load(Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Groups of which at least one request was seen.
    opened,
    /// Answered by the guest with success.
    succeeded,
    /// Answered by the guest as invalid.
    declined,
    /// Answered as invalid, because the guest did not answer before the deadline.
    expired,
    /// Answered as invalid, because the attachment or the guest went away.
    evicted,
    /// Answered at once, without asking the guest: no room, over budget, malformed, or refused by policy.
    refused,
    /// Half-seen groups that got no answer from us: lost in an overflow, never completed, or leaving.
    discarded,
    /// Requests of a group that is outstanding already; dropped.
    duplicates,
    /// Answers to a group that was answered before, by the guest or for it.
    late,
    /// Answers with a cookie of an earlier group in the same slot.
    stale,
    /// Answers with a cookie that was never made here.
    unknown,
    /// Answers with a slot that does not exist.
    out_of_range,
}

impl Tally {
    /// Returns the groups that got an answer.
    pub fn answered(&self) -> u64 {
        self.succeeded + self.declined + self.expired + self.evicted + self.refused
    }

    /// Returns the answers that were refused, whatever was wrong with them.
    pub fn cookies_refused(&self) -> u64 {
        self.late + self.stale + self.unknown + self.out_of_range
    }
}

/// Adds one.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}
