//! What each device may ask for, and what it asked for.

use crate::{
    Tally,
    counters::{BUCKETS, Counters, Histogram, count, count_alone},
    directory::{Directory, Id},
    faults::{FaultCount, FaultLimits},
};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use iommu::{Iova, PAGE_SIZE, Pasid, StreamId};

/// The longest deadline, in microseconds.
pub const DEADLINE_MAX_US: u64 = 10_000_000;

/// What a device may ask for, and what becomes of it if its guest does not answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Limits {
    /// Page requests that it may have outstanding: what its PRI capability was allowed (`Outstanding Page Request
    /// Allocation`). A request more poisons its group.
    pub requests: u32,
    /// How long its guest may take to answer, from the last request of a group on, in microseconds; 0 refuses at once, more
    /// than [`DEADLINE_MAX_US`] is that.
    pub deadline_us: u64,
    /// Page requests of each second, on average; 0 does not limit them.
    pub per_second: u32,
    /// Page requests that may come at once, however few there were before.
    pub burst: u32,
    /// Groups that it may have half-seen at one time.
    pub half_seen: u32,
    /// What happens if answers expire again and again.
    pub escalation: Escalation,
    /// What happens if its accesses are refused again and again.
    pub faults: FaultLimits,
}

impl Limits {
    /// `requests` outstanding, 100 ms for an answer, any rate, and an escalation that leaves a guest some time to recover.
    pub const fn with_requests(requests: u32) -> Self {
        Self {
            requests,
            deadline_us: 100_000,
            per_second: 0,
            burst: requests,
            half_seen: requests,
            escalation: Escalation { warn: 1, throttle: 4, requests_off: 16, block: 0 },
            faults: FaultLimits::USUAL,
        }
    }
}

/// After how many expiries, with no answer between them, a device is restrained; 0 is never.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Escalation {
    /// To [`Restraint::Warned`].
    pub warn: u32,
    /// To [`Restraint::Throttled`].
    pub throttle: u32,
    /// To [`Restraint::RequestsOff`].
    pub requests_off: u32,
    /// To [`Restraint::Blocked`].
    pub block: u32,
}

impl Escalation {
    /// The restraint for so many expiries.
    fn restraint(self, expiries: u64) -> Restraint {
        let reached = |limit: u32| limit != 0 && expiries >= u64::from(limit);
        match self {
            Self { block, .. } if reached(block) => Restraint::Blocked,
            Self { requests_off, .. } if reached(requests_off) => Restraint::RequestsOff,
            Self { throttle, .. } if reached(throttle) => Restraint::Throttled,
            Self { warn, .. } if reached(warn) => Restraint::Warned,
            _ => Restraint::None,
        }
    }
}

/// What a device is held to.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[repr(u64)]
pub enum Restraint {
    /// Nothing.
    None = 0,
    /// Its owner is told. An answer in time lifts it, but of too many faults it is told once, until a reset.
    Warned = 1,
    /// It may have one group at a time. An answer in time lifts it.
    Throttled = 2,
    /// Its requests are refused at once; the hypervisor switches them off at the device. A reset lifts it.
    RequestsOff = 3,
    /// The same, and the hypervisor blocks the device and silences its faults. A reset lifts it.
    Blocked = 4,
}

impl Restraint {
    fn from_word(word: u64) -> Self {
        match word {
            0 => Self::None,
            1 => Self::Warned,
            2 => Self::Throttled,
            3 => Self::RequestsOff,
            _ => Self::Blocked,
        }
    }
}

/// Names a device until it is removed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct DeviceId(pub(crate) Id);

/// How long the groups of a device took, by powers of two of a microsecond: bucket 0 counts less than 1 us, bucket n less
/// than 2^n us, the last one all that are longer.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Latencies {
    /// From report to delivery.
    pub delivery: [u64; BUCKETS],
    /// From report to answer, whoever gave it.
    pub answer: [u64; BUCKETS],
}

/// Pages that are remembered as repaired, for each device: the last of each page number modulo so many.
///
/// Whoever goes round among more pages than these, or among such as share a place, is not found out; what that costs is for
/// [`Limits::per_second`] to bound.
const REPAIRED: usize = 32;
/// A rate is kept in parts of a microsecond, of which there are 2^10.
const PARTS: u32 = 10;
/// The first answer that is held back is so for this long after its report, in microseconds; each further one longer.
const HOLD_US: u64 = 1_000;

/// One device. What is marked as the handler's is written by the interrupt handler alone, once the device is live.
#[derive(Debug)]
pub(crate) struct Device {
    pub counters: Counters,
    pub delivery: Histogram,
    pub answer: Histogram,
    /// Requests outstanding: added by the handler, taken away by whoever answers.
    pub outstanding: AtomicU64,
    requests: AtomicU64,
    pub deadline_us: AtomicU64,
    /// Parts of a microsecond between two requests, and how far requests may be ahead of that.
    interval: AtomicU64,
    ahead: AtomicU64,
    /// When the next request is due at an even rate, in parts of a microsecond; the handler's. 0: never asked.
    due: AtomicU64,
    pub half_seen_limit: AtomicU64,
    /// Groups that are half-seen; the handler's.
    pub half_seen: AtomicU64,
    warn_throttle: AtomicU64,
    off_block: AtomicU64,
    restraint: AtomicU64,
    /// Expiries since the last answer in time.
    expiries: AtomicU64,
    /// Pages that the guest claimed to have repaired, by their low bits.
    repaired: [AtomicU64; REPAIRED],
    /// How often claims of repairs were none, less how often they were some; the handler's.
    doubt: AtomicU64,
    /// Its unrecoverable faults; the handler's.
    faults: FaultCount,
}

/// A page of a PASID as a word, of which 0 is none.
fn page_word(pasid: Option<Pasid>, iova: Iova) -> u64 {
    // The PASID's word has 21 bits. Ten of them lie below the page, the others on the top of its address; bit 11 is left.
    (iova.0 & !(PAGE_SIZE - 1) | 1 << 11) ^ u64::from(Pasid::word(pasid)).rotate_right(11)
}

impl Device {
    const fn new() -> Self {
        Self {
            counters: Counters::new(),
            delivery: Histogram::new(),
            answer: Histogram::new(),
            outstanding: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            deadline_us: AtomicU64::new(0),
            interval: AtomicU64::new(0),
            ahead: AtomicU64::new(0),
            due: AtomicU64::new(0),
            half_seen_limit: AtomicU64::new(0),
            half_seen: AtomicU64::new(0),
            warn_throttle: AtomicU64::new(0),
            off_block: AtomicU64::new(0),
            restraint: AtomicU64::new(0),
            expiries: AtomicU64::new(0),
            repaired: [const { AtomicU64::new(0) }; REPAIRED],
            doubt: AtomicU64::new(0),
            faults: FaultCount::new(),
        }
    }

    fn set(&self, limits: &Limits) {
        self.counters.reset();
        self.delivery.reset();
        self.answer.reset();
        self.outstanding.store(0, Relaxed);
        self.half_seen.store(0, Relaxed);
        self.requests.store(limits.requests.into(), Relaxed);
        self.deadline_us.store(limits.deadline_us.min(DEADLINE_MAX_US), Relaxed);
        let interval = match limits.per_second {
            0 => 0,
            rate => (1_000_000 << PARTS) / u64::from(rate),
        };
        self.interval.store(interval, Relaxed);
        self.ahead.store(interval * u64::from(limits.burst.max(1) - 1), Relaxed);
        self.half_seen_limit.store(limits.half_seen.into(), Relaxed);
        let Escalation { warn, throttle, requests_off, block } = limits.escalation;
        self.warn_throttle.store(u64::from(warn) | u64::from(throttle) << 32, Relaxed);
        self.off_block.store(u64::from(requests_off) | u64::from(block) << 32, Relaxed);
        self.faults.set(&limits.faults);
        self.forgive();
    }

    /// Forgets what the device, or its guest, did wrong.
    fn forgive(&self) {
        self.due.store(0, Relaxed);
        self.restraint.store(0, Relaxed);
        self.expiries.store(0, Relaxed);
        self.doubt.store(0, Relaxed);
        self.faults.forgive();
        for page in &self.repaired {
            page.store(0, Relaxed);
        }
    }

    pub fn restraint(&self) -> Restraint {
        Restraint::from_word(self.restraint.load(Relaxed))
    }

    pub fn restrain(&self, restraint: Restraint) {
        self.restraint.fetch_max(restraint as u64, Relaxed);
    }

    /// Takes note of an access that was refused; returns the restraint if it is one too many. The handler calls it.
    #[inline]
    pub fn faulted(&self, now_us: u64) -> Option<Restraint> {
        count_alone(&self.counters.faults);
        let restraint = self.faults.add(now_us)?;
        self.restrain(restraint);
        Some(restraint)
    }

    /// Takes note of one request; returns whether the device may have it. The handler calls it.
    #[inline]
    pub fn charge(&self, now_us: u64, opens: bool) -> bool {
        count_alone(&self.counters.requests);
        let mut limit = self.requests.load(Relaxed);
        if self.restraint.load(Relaxed) > Restraint::Warned as u64 {
            limit = self.restrained(limit, opens);
        }
        if self.outstanding.load(Relaxed) >= limit {
            return false;
        }
        if self.interval.load(Relaxed) != 0 && !self.is_in_rate(now_us) {
            return false;
        }
        self.outstanding.fetch_add(1, Relaxed);
        true
    }

    /// Returns the requests that a device may have outstanding which is held to something.
    #[cold]
    fn restrained(&self, limit: u64, opens: bool) -> u64 {
        match self.restraint() {
            Restraint::None | Restraint::Warned => limit,
            Restraint::Throttled if opens => limit.min(1),
            Restraint::Throttled => limit,
            Restraint::RequestsOff | Restraint::Blocked => 0,
        }
    }

    /// Lets requests through at an even rate, and some of them ahead of it.
    #[inline(never)]
    fn is_in_rate(&self, now_us: u64) -> bool {
        let interval = self.interval.load(Relaxed);
        let now = now_us.wrapping_shl(PARTS);
        let (due, allowed) = (self.due.load(Relaxed), self.ahead.load(Relaxed));
        let ahead = due.wrapping_sub(now);
        // A request that is due lies behind; one that is further ahead than can be is left over from a clock that jumped.
        let ahead = if due == 0 || ahead > allowed + interval { 0 } else { ahead };
        if ahead > allowed {
            return false;
        }
        self.due.store(now.wrapping_add(ahead + interval), Relaxed);
        true
    }

    /// Returns whether it may have one more group half-seen; the handler calls it.
    pub fn may_have_half_seen(&self) -> bool {
        self.half_seen.load(Relaxed) < self.half_seen_limit.load(Relaxed)
    }

    /// Takes `requests` off what is outstanding.
    pub fn discharge(&self, requests: u64) {
        self.outstanding.fetch_sub(requests, Relaxed);
    }

    /// Takes note that a group waits for `page`; the handler calls it. Returns how long after its report an answer is to be held
    /// back, in microseconds: nothing for a guest that is believed.
    ///
    /// If the guest had just claimed to have repaired that page, its claims are doubted.
    #[inline]
    pub fn asked(&self, pasid: Option<Pasid>, page: Iova) -> u64 {
        let word = page_word(pasid, page);
        let repaired = self.repaired_at(word);
        let doubt = self.doubt.load(Relaxed);
        if repaired.load(Relaxed) != word && doubt == 0 {
            return 0;
        }
        self.doubted(repaired, word, doubt)
    }

    #[inline(never)]
    fn doubted(&self, repaired: &AtomicU64, word: u64, doubt: u64) -> u64 {
        if repaired.load(Relaxed) == word {
            repaired.store(0, Relaxed);
            count(&self.counters.unrepaired);
            self.doubt.store((doubt + 1).min(32), Relaxed);
        } else {
            self.doubt.store(doubt.saturating_sub(1), Relaxed);
        }
        self.hold_us()
    }

    /// Returns where a page is remembered: neighbours in different places.
    fn repaired_at(&self, word: u64) -> &AtomicU64 {
        &self.repaired[(word / PAGE_SIZE) as usize % REPAIRED]
    }

    /// Takes note that the guest took pages back: to be asked for them again says nothing about its claims.
    pub fn unmapped(&self, pasid: Option<Pasid>, first: Iova, pages: u64) {
        if pages > REPAIRED as u64 {
            self.repaired.iter().for_each(|page| page.store(0, Relaxed));
            return;
        }
        for page in 0..pages {
            let word = page_word(pasid, Iova(first.0.wrapping_add(page * PAGE_SIZE)));
            // Lost only against a claim about another page, which stays.
            let _ = self.repaired_at(word).compare_exchange(word, 0, Relaxed, Relaxed);
        }
    }

    /// Takes note that the guest claims to have repaired `page`.
    pub fn repaired(&self, pasid: Option<Pasid>, page: Iova) {
        let word = page_word(pasid, page);
        self.repaired_at(word).store(word, Relaxed);
    }

    /// Returns how long after its report an answer is held back, in microseconds: nothing for a guest that is believed.
    fn hold_us(&self) -> u64 {
        match self.doubt.load(Relaxed) {
            0 | 1 => 0,
            doubt => (HOLD_US << (doubt - 2).min(20)).min(self.deadline_us.load(Relaxed)),
        }
    }

    /// Takes note of an answer in time.
    pub fn answered_in_time(&self) {
        self.expiries.store(0, Relaxed);
        let restraint = self.restraint.load(Relaxed);
        if restraint == Restraint::Warned as u64 || restraint == Restraint::Throttled as u64 {
            // Lost only against a harder restraint, which stays.
            let _ = self.restraint.compare_exchange(restraint, Restraint::None as u64, Relaxed, Relaxed);
        }
    }

    /// Takes note of an expiry; returns the restraint if it is a harder one than before.
    pub fn expired(&self) -> Option<Restraint> {
        count(&self.counters.expired);
        let expiries = self.expiries.fetch_add(1, Relaxed) + 1;
        let (warn_throttle, off_block) = (self.warn_throttle.load(Relaxed), self.off_block.load(Relaxed));
        let escalation = Escalation {
            warn: warn_throttle as u32,
            throttle: (warn_throttle >> 32) as u32,
            requests_off: off_block as u32,
            block: (off_block >> 32) as u32,
        };
        let restraint = escalation.restraint(expiries);
        let before = self.restraint.fetch_max(restraint as u64, Relaxed);
        (restraint as u64 > before).then_some(restraint)
    }
}

/// The devices of a unit, in `D` places.
#[derive(Debug)]
pub(crate) struct Devices<const D: usize> {
    directory: Directory<D>,
    devices: [Device; D],
    /// Entries of the hardware's queue that devices may fill.
    promised: AtomicU64,
    entries: u64,
}

impl<const D: usize> Devices<D> {
    pub const fn new(entries: u32) -> Self {
        Self {
            directory: Directory::new(),
            devices: [const { Device::new() }; D],
            promised: AtomicU64::new(0),
            entries: entries as u64,
        }
    }

    /// Entries of the hardware's queue that a device may fill: its requests, and as many stop markers.
    fn share(requests: u64) -> u64 {
        2 * requests
    }

    pub fn add(&self, stream: StreamId, limits: &Limits) -> Option<DeviceId> {
        let share = Self::share(limits.requests.into());
        if self.promised.fetch_add(share, Relaxed) + share > self.entries {
            self.promised.fetch_sub(share, Relaxed);
            return None;
        }
        let id = self.directory.add(stream.0.into(), |place| self.devices[place].set(limits));
        if id.is_none() {
            self.promised.fetch_sub(share, Relaxed);
        }
        id.map(DeviceId)
    }

    pub fn leave(&self, id: DeviceId) {
        self.directory.leave(id.0);
    }

    pub fn return_to(&self, id: DeviceId) {
        if let Some(device) = self.of(id) {
            device.forgive();
        }
        self.directory.return_to(id.0);
    }

    pub fn remove(&self, id: DeviceId) {
        let share = self.of(id).map_or(0, |device| Self::share(device.requests.load(Relaxed)));
        self.directory.leave(id.0);
        self.directory.remove(id.0);
        self.promised.fetch_sub(share, Relaxed);
    }

    pub fn is_live(&self, id: DeviceId) -> bool {
        self.directory.is_live(id.0)
    }

    /// Returns the device in a place that a slot has noted.
    pub fn at(&self, place: u32) -> Option<&Device> {
        self.devices.get(place as usize)
    }

    /// Returns a live device.
    #[inline]
    pub fn live(&self, id: DeviceId) -> Option<&Device> {
        if self.is_live(id) { self.at(id.0.place) } else { None }
    }

    /// Returns a device that is not removed.
    pub fn of(&self, id: DeviceId) -> Option<&Device> {
        self.directory.is_there(id.0).then(|| self.at(id.0.place)).flatten()
    }

    /// Returns the live device that hardware names `stream`.
    pub fn find(&self, stream: StreamId) -> Option<&Device> {
        self.at(self.directory.find(stream.0.into())?.place)
    }

    pub fn tally(&self, id: DeviceId) -> Option<Tally> {
        self.of(id).map(|device| device.counters.tally())
    }

    pub fn latencies(&self, id: DeviceId) -> Option<Latencies> {
        self.of(id).map(|device| Latencies { delivery: device.delivery.read(), answer: device.answer.read() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(limits: Limits) -> Device {
        let device = Device::new();
        device.set(&limits);
        device
    }

    #[test]
    fn a_rate_lets_a_burst_through_and_then_an_even_stream() {
        let device = device(Limits { per_second: 1_000, burst: 3, ..Limits::with_requests(100) });
        let passed = |from_us: u64, to_us: u64| {
            (from_us..to_us).step_by(100).filter(|&now_us| device.is_in_rate(now_us)).count()
        };

        assert_eq!(passed(5_000, 5_100), 1, "one of the burst");
        assert_eq!((0..9).filter(|_| device.is_in_rate(5_050)).count(), 2, "the rest of the burst");
        assert_eq!(passed(6_100, 16_000), 10, "one each millisecond");
        assert_eq!((0..9).filter(|_| device.is_in_rate(60_000)).count(), 3, "the burst is there again");
        assert!(device.is_in_rate(1_000), "a clock that jumps back does not stop the device");
    }

    #[test]
    fn a_rate_survives_the_wrap_of_the_clock() {
        let device = device(Limits { per_second: 1_000, burst: 1, ..Limits::with_requests(100) });
        let wrap = 1 << (64 - PARTS);

        assert!(device.is_in_rate(wrap - 500));
        assert!(!device.is_in_rate(wrap - 1));
        assert!(device.is_in_rate(wrap + 500));
        assert!(!device.is_in_rate(wrap + 1_000));
    }

    #[test]
    fn expiries_restrain_step_by_step_and_an_answer_in_time_lifts_what_can_be_lifted() {
        let escalation = Escalation { warn: 1, throttle: 2, requests_off: 3, block: 4 };
        let device = device(Limits { escalation, ..Limits::with_requests(4) });

        assert_eq!(device.expired(), Some(Restraint::Warned));
        device.answered_in_time();
        assert_eq!(device.restraint(), Restraint::None);
        assert_eq!(
            [device.expired(), device.expired()],
            [Some(Restraint::Warned), Some(Restraint::Throttled)]
        );
        device.answered_in_time();
        assert_eq!(device.restraint(), Restraint::None);
        for _ in 0..3 {
            let _ = device.expired();
        }
        device.answered_in_time();
        assert_eq!(device.restraint(), Restraint::RequestsOff, "this is not lifted by an answer");
        for _ in 0..3 {
            let _ = device.expired();
        }
        assert_eq!(device.expired(), Some(Restraint::Blocked));
        assert_eq!(device.expired(), None, "there is nothing harder");
    }

    #[test]
    fn a_device_without_escalation_is_never_restrained() {
        let escalation = Escalation { warn: 0, throttle: 0, requests_off: 0, block: 0 };
        let device = device(Limits { escalation, ..Limits::with_requests(4) });

        assert!((0..1000).all(|_| device.expired().is_none()));
        assert_eq!(device.restraint(), Restraint::None);
    }

    #[test]
    fn claims_are_believed_until_the_same_page_is_asked_for_twice() {
        let device = device(Limits::with_requests(4));
        let (page, other) = (Iova(0x1000), Iova(0x9000));
        let claim = |page| {
            device.asked(None, page);
            device.repaired(None, page);
        };

        claim(page);
        claim(page);
        assert_eq!(device.hold_us(), 0, "once may be chance");
        claim(page);
        assert_eq!(device.hold_us(), HOLD_US);
        claim(page);
        assert_eq!(device.hold_us(), 2 * HOLD_US);
        (0..40).for_each(|_| claim(page));
        assert_eq!(device.hold_us(), 100_000, "never longer than the deadline");
        device.asked(None, other);
        assert!((0..40).all(|n| {
            device.asked(None, Iova(n << 20));
            true
        }));
        assert_eq!(device.hold_us(), 0, "good ones earn trust again");
        assert_eq!(device.counters.tally().unrepaired, 43);
    }

    #[test]
    fn whoever_goes_round_among_a_few_pages_without_repairing_them_is_found_out() {
        for pages in [1, 4, 8, 32] {
            let device = device(Limits::with_requests(4));
            for round in 0..200 {
                let page = Iova((round % pages) * PAGE_SIZE);
                device.asked(None, page);
                device.repaired(None, page);
            }
            assert_eq!(device.counters.tally().unrepaired, 200 - pages, "{pages} pages");
            assert_eq!(device.hold_us(), 100_000, "{pages} pages");
        }
    }

    #[test]
    fn a_guest_that_took_pages_back_may_be_asked_for_them_again() {
        let device = device(Limits::with_requests(4));
        for round in 0..100 {
            for page in (0..4).map(|page| Iova(0x1000 * page)) {
                device.asked(Pasid::new(5), page);
                device.repaired(Pasid::new(5), page);
            }
            match round % 2 {
                0 => device.unmapped(Pasid::new(5), Iova(0), 4),
                _ => device.unmapped(Pasid::new(5), Iova(0), u64::MAX),
            }
        }
        assert_eq!(device.counters.tally().unrepaired, 0);

        device.repaired(Pasid::new(5), Iova(0x1000));
        device.unmapped(None, Iova(0x1000), 1);
        device.unmapped(Pasid::new(5), Iova(0x2000), 1);
        device.asked(Pasid::new(5), Iova(0x1000));
        assert_eq!(device.counters.tally().unrepaired, 1, "those were other pages");
    }

    #[test]
    fn the_devices_together_may_not_have_more_outstanding_than_the_queue_holds() {
        let devices = Devices::<8>::new(64);
        let limits = Limits::with_requests(16);
        let first = devices.add(StreamId(1), &limits).expect("half of the queue");
        devices.add(StreamId(2), &limits).expect("the other half");

        assert_eq!(devices.add(StreamId(3), &Limits::with_requests(1)), None);
        devices.remove(first);
        assert!(devices.add(StreamId(3), &limits).is_some());
    }
}
