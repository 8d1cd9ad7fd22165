//! How many unrecoverable faults a device may have.

use crate::Restraint;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// How many unrecoverable faults a device may have in a period, and what it is held to if there are more; 0 is never.
///
/// A period begins with the first fault after the one before. What it allows can therefore come twice in a row: at its end,
/// and at the beginning of the next. Each restraint comes once, until the device is reset.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct FaultLimits {
    /// How long a period is, in microseconds.
    pub period_us: u64,
    /// With so many in one period it is held to [`Restraint::Warned`].
    pub warn: u32,
    /// With so many in one period it is held to [`Restraint::Blocked`].
    pub block: u32,
}

impl FaultLimits {
    /// Any number.
    pub const NONE: Self = Self { period_us: 0, warn: 0, block: 0 };
    /// In a second, 64 are more than a driver's mistakes make before somebody looks, and 256 are a storm.
    pub const USUAL: Self = Self { period_us: 1_000_000, warn: 64, block: 256 };
}

/// Counts the unrecoverable faults of one device against its [`FaultLimits`].
///
/// One core alone counts, the interrupt handler's; what a fault costs is a dozen instructions.
#[derive(Debug)]
pub struct FaultCount {
    period_us: AtomicU64,
    /// Faults of a period for a warning in 31:0, to be blocked in 63:32.
    warn_block: AtomicU64,
    /// When this period began.
    start_us: AtomicU64,
    /// Faults in this period.
    count: AtomicU64,
    /// With so many in a period the next restraint is due; 0 is never.
    next: AtomicU64,
}

/// Whether `count` faults, which is at least one, have not come to `limit`; 0 is none.
fn is_below(count: u64, limit: u64) -> bool {
    // One less each: no limit is more than any count, and one that was just made is zero, as all of the ledger.
    count.wrapping_sub(1) < limit.wrapping_sub(1)
}

impl Default for FaultCount {
    fn default() -> Self {
        Self::new()
    }
}

impl FaultCount {
    /// Counts against no limits.
    pub const fn new() -> Self {
        Self {
            period_us: AtomicU64::new(0),
            warn_block: AtomicU64::new(0),
            start_us: AtomicU64::new(0),
            count: AtomicU64::new(0),
            next: AtomicU64::new(0),
        }
    }

    /// Counts against `limits` from here on, with nothing counted yet.
    pub fn set(&self, limits: &FaultLimits) {
        self.period_us.store(limits.period_us, Relaxed);
        self.warn_block.store(u64::from(limits.warn) | u64::from(limits.block) << 32, Relaxed);
        self.forgive();
    }

    /// Forgets what was counted.
    pub fn forgive(&self) {
        let (warn, block) = self.limits();
        self.count.store(0, Relaxed);
        self.next.store(if warn == 0 || block != 0 && block < warn { block } else { warn }, Relaxed);
    }

    fn limits(&self) -> (u64, u64) {
        let warn_block = self.warn_block.load(Relaxed);
        (warn_block & u64::from(u32::MAX), warn_block >> 32)
    }

    /// Counts a fault; returns the restraint if it is one too many.
    ///
    /// A clock that jumps ends a period, and one that wraps does not: no device is restrained for either.
    #[inline]
    pub fn add(&self, now_us: u64) -> Option<Restraint> {
        let is_over = now_us.wrapping_sub(self.start_us.load(Relaxed)) >= self.period_us.load(Relaxed);
        if is_over {
            self.start_us.store(now_us, Relaxed);
        }
        let count = if is_over { 1 } else { self.count.load(Relaxed).wrapping_add(1) };
        self.count.store(count, Relaxed);
        if is_below(count, self.next.load(Relaxed)) { None } else { Some(self.escalate(count)) }
    }

    #[cold]
    #[inline(never)]
    fn escalate(&self, count: u64) -> Restraint {
        let (_, block) = self.limits();
        if is_below(count, block) {
            self.next.store(block, Relaxed);
            return Restraint::Warned;
        }
        self.next.store(0, Relaxed);
        Restraint::Blocked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: FaultLimits = FaultLimits { period_us: 1_000, warn: 4, block: 10 };
    const MANY: u64 = if cfg!(miri) { 1_000 } else { 100_000 };

    fn counting(limits: FaultLimits) -> FaultCount {
        let count = FaultCount::new();
        count.set(&limits);
        count
    }

    /// The restraints that `faults` faults at these times are one too many for, each with its number from 1.
    fn restraints(count: &FaultCount, times: impl Iterator<Item = u64>) -> Vec<(usize, Restraint)> {
        (1..).zip(times).filter_map(|(number, now_us)| Some((number, count.add(now_us)?))).collect()
    }

    #[test]
    fn a_storm_is_warned_of_and_then_blocked_each_once_and_by_exactly_so_many_faults() {
        let count = counting(LIMITS);

        let storm = restraints(&count, (0..MANY).map(|fault| 5_000 + fault / 500));

        assert_eq!(storm, [(4, Restraint::Warned), (10, Restraint::Blocked)]);
    }

    #[test]
    fn what_a_period_allows_may_come_in_every_period_and_for_ever() {
        let count = counting(LIMITS);
        // Three in each period, the first at its beginning: never four within one.
        let even = (0..MANY).map(|fault| fault / 3 * 1_000 + fault % 3 * 300);

        assert_eq!(restraints(&count, even), []);
    }

    #[test]
    fn a_period_begins_with_the_first_fault_after_the_one_before() {
        let count = counting(LIMITS);

        // Three at the end of a period, and three at the beginning of the next, are not six of one.
        assert_eq!(restraints(&count, [0, 998, 999, 1_000, 1_001, 1_002].into_iter()), []);
        // The one that began at 1000 has not ended yet.
        assert_eq!(count.add(1_999), Some(Restraint::Warned));
    }

    #[test]
    fn a_device_is_warned_once_however_many_periods_are_above_the_rate() {
        let count = counting(LIMITS);
        let five_a_period = (0..100).map(|fault| fault / 5 * 2_000);

        assert_eq!(restraints(&count, five_a_period), [(4, Restraint::Warned)]);
        // And is blocked in the first that has too many, until it is forgiven.
        assert_eq!(restraints(&count, (0..50).map(|_| 1 << 20)), [(10, Restraint::Blocked)]);
        assert_eq!(restraints(&count, (0..50).map(|_| 1 << 30)), []);
        count.forgive();
        let again = [(4, Restraint::Warned), (10, Restraint::Blocked)];
        assert_eq!(restraints(&count, (0..50).map(|_| 1 << 40)), again);
    }

    #[test]
    fn a_clock_that_wraps_ends_no_period_and_one_that_jumps_restrains_nobody() {
        let count = counting(LIMITS);
        let over_the_wrap = (0..9).map(|fault| (u64::MAX - 400).wrapping_add(fault * 100));
        assert_eq!(restraints(&count, over_the_wrap), [(4, Restraint::Warned)], "one period");
        assert_eq!(count.add(0x1FF), Some(Restraint::Blocked), "the tenth of it");

        // Back and ahead by more than a period, each time.
        for jumps in [[5_000, 3_000], [1 << 63, 0], [7, 1 << 40]] {
            let count = counting(LIMITS);
            assert_eq!(restraints(&count, jumps.into_iter().cycle().take(1_000)), [], "{jumps:?}");
        }
        // Back once, in the middle of a storm: what came before is forgotten, and the storm is found out none the less.
        let storm = (0..20).map(|fault| if fault < 3 { 5_000 } else { 4_000 });
        assert_eq!(restraints(&counting(LIMITS), storm), [(7, Restraint::Warned), (13, Restraint::Blocked)]);
    }

    #[test]
    fn a_limit_of_0_is_none() {
        let storm = |limits| restraints(&counting(limits), (0..MANY).map(|_| 0));

        assert_eq!(storm(FaultLimits::NONE), []);
        assert_eq!(storm(FaultLimits { warn: 0, ..LIMITS }), [(10, Restraint::Blocked)]);
        assert_eq!(storm(FaultLimits { block: 0, ..LIMITS }), [(4, Restraint::Warned)]);
        assert_eq!(storm(FaultLimits { warn: 0, block: 0, ..LIMITS }), []);
        assert_eq!(storm(FaultLimits { block: 4, ..LIMITS }), [(4, Restraint::Blocked)], "at once");
        assert_eq!(storm(FaultLimits { block: 1, ..LIMITS }), [(1, Restraint::Blocked)]);
        // A period of nothing is over before the second fault.
        assert_eq!(storm(FaultLimits { period_us: 0, ..LIMITS }), []);
        assert_eq!(storm(FaultLimits { period_us: u64::MAX, ..LIMITS })[1], (10, Restraint::Blocked));
    }
}
